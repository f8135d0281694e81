"""Units of any network, found in its jaxpr: what belongs together when one of them is removed."""

from distill_jax.units import costs, scores
from distill_jax.units.align import Brought, bring, match_activations, match_weights
from distill_jax.units.costs import architecture, report
from distill_jax.units.edit import merge, prune, select
from distill_jax.units.graph import Group, Slice, UnitGraph
from distill_jax.units.inject import Injected, inject
from distill_jax.units.keep import keep, position_masks, silence
from distill_jax.units.orders import permutable, permute
from distill_jax.units.shrink import shrink
from distill_jax.units.trace import trace
from distill_jax.units.values import activations

__all__ = [
    "Brought", "Group", "Injected", "Slice", "UnitGraph", "activations", "architecture", "bring",
    "costs", "inject", "keep", "match_activations", "match_weights", "merge", "permutable", "permute",
    "position_masks", "prune", "report", "scores", "select", "shrink", "silence", "trace",
]  # fmt: skip

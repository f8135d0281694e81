"""Units of any network, found in its jaxpr: what belongs together when one of them is removed."""

from distill_jax.units.align import activations, match_activations, match_weights
from distill_jax.units.graph import Group, Slice, UnitGraph
from distill_jax.units.keep import keep, position_masks, silence
from distill_jax.units.orders import permutable, permute
from distill_jax.units.shrink import shrink
from distill_jax.units.trace import trace

__all__ = ["Group", "Slice", "UnitGraph", "keep", "position_masks", "shrink", "silence", "trace"]

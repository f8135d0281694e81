"""Finds the units of any network (neurons, channels, heads), and removes, merges, selects or reorders them.

:func:`trace` reads a model's program once and finds which indices of which arrays belong to one unit. All
other functions take its result.
"""

from distill_jax.compress.units import costs, scores
from distill_jax.compress.units.alignment import Brought, bring, match_activations, match_weights
from distill_jax.compress.units.averaging import Matched, average_widths, match_widths, put_back
from distill_jax.compress.units.compensation import Compensated, compensate
from distill_jax.compress.units.costs import architecture, report
from distill_jax.compress.units.depth import Block, blocks, drop_blocks, prune_blocks
from distill_jax.compress.units.graph import Group, Slice, UnitGraph, table
from distill_jax.compress.units.head_rotation import Rotated, rotate_heads
from distill_jax.compress.units.influence import block_influence
from distill_jax.compress.units.injection import Injected, inject
from distill_jax.compress.units.inputs import input_features
from distill_jax.compress.units.masks import position_masks
from distill_jax.compress.units.own_rules import check_rule, register_rule
from distill_jax.compress.units.permutation import permutable, permute
from distill_jax.compress.units.pruning import budgets, prune
from distill_jax.compress.units.regularisation import PenaltyState, group_lasso, growing_decay, living
from distill_jax.compress.units.removal import keep, silence
from distill_jax.compress.units.selection import merge, select
from distill_jax.compress.units.shrinking import shrink
from distill_jax.compress.units.tracing import trace
from distill_jax.compress.units.values import activations
from distill_jax.compress.units.verification import verify

__all__ = [
    "Block", "Brought", "Compensated", "Group", "Injected", "Matched", "PenaltyState", "Rotated", "Slice", "UnitGraph",
    "activations", "architecture", "average_widths", "block_influence", "blocks", "bring", "budgets", "check_rule",
    "compensate", "costs", "drop_blocks", "group_lasso", "growing_decay", "inject", "input_features", "keep", "living",
    "match_activations", "match_weights", "match_widths", "merge", "permutable", "permute", "position_masks", "prune",
    "prune_blocks", "put_back", "register_rule", "report", "rotate_heads", "scores", "select", "shrink", "silence",
    "table", "trace", "verify",
]  # fmt: skip

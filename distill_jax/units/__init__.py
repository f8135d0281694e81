"""Units of any network, found in its jaxpr: what belongs together when one of them is removed."""

from distill_jax.units.graph import Group, Slice, UnitGraph, trace
from distill_jax.units.keep import keep, position_masks, silence

__all__ = ["Group", "Slice", "UnitGraph", "keep", "position_masks", "silence", "trace"]

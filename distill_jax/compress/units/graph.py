"""Which indices of which axes of a network's arrays belong together: the result of a trace."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np


class Slice(NamedTuple):
    """Where a group's units lie along one axis of one array.

    Two groups may have slices on the same axis: one of heads × head size has a slice in the group of
    the heads and one in that of the head size. A position stays only if all its units do.

    Args:
      path: of the leaf: :func:`distill_jax.weights.path_name`.
      axis: of the leaf.
      index: ``[positions]``, the unit, from 0 to the group's size, to which each position along the
        axis belongs; −1 where it belongs to none of the group.
    """

    path: str
    axis: int
    index: np.ndarray  # type: ignore[assignment]  # tuple's own index() is not used


class Group(NamedTuple):
    """Units of one kind: any of them can be removed, together with all its slices.

    Args:
      name: the path of the first parameter in the program that has these units, such as
        ``layers.0.kernel``; ``#1`` and so on tell groups of one parameter apart.
      size: the number of units.
      slices: where they lie.
      free: whether units may be removed; else they are tied to the outside, or frozen.
      exact: whether the network without some of them equals the one in which they are silenced.
      reason: why they are not free or not exact, with the name of the primitive; else empty.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    free: bool
    exact: bool
    reason: str


@dataclass(frozen=True)
class UnitGraph:
    """The units of a network.

    ``print(graph)`` shows a table.

    Args:
      groups: by name, in the order of the program.
      shapes: the shape and dtype of every leaf, by path.
      notes: the primitives without a rule, and which axes they froze.
      program: what was traced, for :func:`distill_jax.compress.units.shrink`.
    """

    groups: Mapping[str, Group]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    notes: tuple[str, ...] = ()
    program: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """The table: a line a group, then the notes."""
        rows = [("group", "units", "removable", "where", "why not")]
        for group in self.groups.values():
            state = "no" if not group.free else "exactly" if group.exact else "inexactly"
            rows.append((group.name, str(group.size), state, _places(group), group.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d:<{widths[3]}}  {e}".rstrip()
            for a, b, c, d, e in rows
        ]
        lines.insert(1, "─" * max(map(len, lines)))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _places(group: Group, most: int = 3) -> str:
    places = [f"{s.path}:{s.axis}" for s in group.slices]
    rest = len(places) - most
    return ", ".join(places[:most]) + (f" and {rest} more" if rest > 0 else "")

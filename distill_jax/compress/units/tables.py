"""The table of a network's units, as text."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import jax
import numpy as np

from distill_jax.compress.units._trace.adapted import Adapted
from distill_jax.compress.units._trace.work import multiplications

if TYPE_CHECKING:
    from distill_jax.compress.units.graph import Group, UnitGraph

WIDTH = 120
NAMES = 56  # of the columns, for the names of groups


def table(graph: "UnitGraph", *, show_all: bool = False) -> str:
    """Writes a network's units as a table that is 120 columns wide.

    The first line counts the free groups, those that are exact (with ``keep`` or with ``shrink`` alone), and the
    share of the parameters and of the operations of matrix products and convolutions that belong to free units.
    Then comes a line for each free group. What cannot be removed follows, one line for each reason.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      show_all: whether there is also a line for each group that is not free.

    Returns:
      The table. ``print(graph)`` shows it, too.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> print(units.table(units.trace(model, jnp.ones((1, 3)))))
    1 free group of 4 units, 1 exact; prunable: 100 % of 20 parameters, 100 % of 40 FLOP
    group  units  removable  where
    ─────────────────────────────────
    a          4  exactly    a:1, b:0
    not removable: 1 group, tied to the outside by dot_general: a:0
    not removable: 1 group, a result of the network: b:1
    """
    every = [*graph.groups.values()]
    shown = [group for group in every if group.free or show_all]
    marks: dict[str, int] = {}
    for group in shown:
        if group.reason and (group.free or show_all):
            marks.setdefault(group.reason, len(marks) + 1)
    rows = [("group", "units", "removable")]
    rows += [(_tail(g.name), str(g.size), g.removable + _mark(g, marks)) for g in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for row, places in zip(rows, [["where"], *map(_places, shown)], strict=True):
        start = f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  "
        lines.append(start + _fit(places, WIDTH - len(start)))
    lines.insert(1, "─" * max(map(len, lines)))
    for reason, number in marks.items():
        lines.append(_cut(f"[{number}] {reason}"))
    frozen: dict[str, list[Group]] = {}
    for group in every:
        if not group.free and not show_all:
            frozen.setdefault(group.reason, []).append(group)
    for reason, groups in frozen.items():
        start = f"not removable: {_count(len(groups), 'group')}, {reason}: "
        lines.append(start + _fit([place for g in groups for place in _places(g)], WIDTH - len(start)))
    return "\n".join([_summary(graph), *lines, *(_cut(f"note: {note}") for note in graph.notes)])


def _summary(graph: "UnitGraph") -> str:
    free = [group for group in graph.groups.values() if group.free]
    fixed: dict[str, list[np.ndarray]] = {
        name: [np.ones(n, bool) for n in like.shape] for name, like in graph.shapes.items()
    }
    for group in free:
        for path, axis, index in group.slices:
            fixed[path][axis] &= index < 0
    names = [name for name in jax.tree.leaves(graph.names.params) if name in fixed]
    total = sum(prod(graph.shapes[name].shape) for name in names)
    left = sum(prod(int(mask.sum()) for mask in fixed[name]) for name in names)
    text = (
        f"{_count(len(free), 'free group')} of {_count(sum(g.size for g in free), 'unit')}, "
        f"{sum(g.exact_shrunk for g in free)} exact; prunable: {_share(total, left)} of {_short(total)}parameters"
    )
    if graph.traced is not None:
        traced = graph.traced
        small = Adapted(traced.program, traced.tracer, [traced.units[group.name] for group in free])
        total, left = multiplications(small, traced.program)
        text += f", {_share(total, left)} of {_short(2 * total)}FLOP"
    return text


def _places(group: "Group") -> list[str]:
    return [f"{s.path}:{s.axis}" for s in group.slices]


def _mark(group: "Group", marks: dict[str, int]) -> str:
    return f" [{marks[group.reason]}]" if group.reason else ""


def _fit(places: Sequence[str], width: int) -> str:
    """Joins as many places as fit; the first is cut if it is too long by itself."""
    text = ""
    for i, place in enumerate(places):
        rest = len(places) - i - 1
        more = f" and {rest} more" if rest else ""
        longer = f"{text}, {place}" if text else place
        if len(longer) + len(more) > width:
            left = f" and {rest + 1} more" if text else more
            return (text or _tail(place, max(8, width - len(more)))) + left
        text = longer
    return text


def _tail(name: str, width: int = NAMES) -> str:
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def _cut(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + "s" * (n != 1)


def _share(total: int, left: int) -> str:
    return f"{100 * (total - left) / max(total, 1):.3g} %"


def _short(n: int) -> str:
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.3g} {letter} "
    return f"{n} "

"""The result of a trace: which indices of which axes of a network's arrays belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax._model import Model, PyTree
from distill_jax.compress.units._trace.adapted import Adapted
from distill_jax.compress.units._trace.work import multiplications
from distill_jax.compress.units.tables import WIDTH, count, cut, fit, share, short, tail
from distill_jax.weights.structure import path_name


class Slice(NamedTuple):
    """Where the units of a group lie along one axis of one array.

    Two groups may have slices on the same axis: an axis of heads × head size has a slice in the group
    of heads and one in the group of head sizes. A position stays only if all its units stay.

    Attributes:
      path: the name of the array, see :attr:`UnitGraph.names`.
      axis: the axis of the array.
      index: ``[positions]``, the unit, from 0 to the group's size, to which each position along the
        axis belongs; −1 for positions that belong to no unit of the group.
    """

    path: str
    axis: int
    index: np.ndarray  # type: ignore[assignment]  # tuple's own index() is not used


class Group(NamedTuple):
    """Units of one kind. Each can be removed by itself, and then all its slices are removed.

    Attributes:
      name: the name of the first parameter in the program that has these units, such as
        ``layers.0.kernel``; a suffix ``#1``, ``#2`` and so on tells groups of one parameter apart.
      size: the number of units.
      slices: where the units lie.
      free: whether units can be removed. If not, they are tied to the network's inputs or outputs, or
        an operation without a rule uses them.
      exact: whether removing units gives the same outputs as setting them to zero, also by the network's own code
        with smaller arrays, unless that code refuses them.
      reason: why the group is not free or not exact, with the name of the operation; else empty.
      exact_shrunk: whether the program that was read from the network, with its sizes adapted, gives the same
        outputs as setting the units to zero. If this is true and ``exact`` is not, the network's own code computes
        something else with smaller arrays, or fails. Then :func:`~distill_jax.compress.units.keep` uses the adapted
        program, as :func:`~distill_jax.compress.units.shrink` always does.
      runs: whether the network's own code was seen to run with fewer of these units.
      silent: the slices that :func:`~distill_jax.compress.units.silence` sets to zero; empty for all. They are
        only those by which the units' values are multiplied where the network divides by something that is
        zero for a unit of zeros, such as its norm.
    """

    name: str
    size: int
    slices: tuple[Slice, ...]
    free: bool
    exact: bool
    reason: str
    exact_shrunk: bool = False
    runs: bool = False
    silent: tuple[Slice, ...] = ()

    @property
    def removable(self) -> str:
        """``exactly``, ``exactly, adapted`` (the network's own code cannot be used), ``inexactly`` or ``no``."""
        if not self.free:
            return "no"
        if self.exact and self.runs:
            return "exactly"
        return "exactly, adapted" if self.exact_shrunk else "inexactly"


class Names(NamedTuple):
    """The names of a model's arrays, in trees of the same structure as ``params`` and ``state``."""

    params: PyTree
    state: PyTree


def names_of(model: Model) -> Names:
    """Names the arrays of a model by their paths.

    A parameter has its path in ``params`` as its name, such as ``layers.0.kernel``. An array of the state
    has its path in ``state``, with ``state.`` before it if a parameter has the same path.

    Args:
      model: the model.

    Returns:
      Two trees of names, of the structures of ``params`` and ``state``.

    >>> names_of(Model(print, {"norm": {"scale": 1.0}}, {"norm": {"scale": 2.0, "mean": 0.0}})).state
    {'norm': {'mean': 'norm.mean', 'scale': 'state.norm.scale'}}
    """
    params = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path) or "params", model.params)
    taken = set(jax.tree.leaves(params))

    def name(path: Any, _: Any) -> str:
        found = path_name(path) or "state"
        while found in taken:
            found = f"state.{found}"
        return found

    return Names(params, jax.tree_util.tree_map_with_path(name, model.state))


@dataclass(frozen=True)
class UnitGraph:
    """The units of a network. ``print(graph)`` shows them as a table.

    Attributes:
      groups: the groups by name, in the order of the program.
      shapes: the shape and dtype of each array of the model, by name.
      names: the name of each array, in trees of the structure of the model's ``params`` and ``state``.
      notes: the operations without a rule, and how many axes they froze.
      traced: what was traced; other functions of this package read it.
    """

    groups: Mapping[str, Group]
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    names: Names
    notes: tuple[str, ...] = ()
    traced: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        """The table, see :func:`distill_jax.compress.units.table`."""
        return table(self)


def table(graph: UnitGraph, *, show_all: bool = False) -> str:
    """Writes a network's units as a table that is 120 columns wide.

    The first line counts the free groups, those of them that are removed exactly, and the share of the parameters
    and of the operations of matrix products and convolutions that belong to free units. Then comes a line for each
    free group. What cannot be removed follows, one line for each reason.

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
    check_graph(graph)
    every = [*graph.groups.values()]
    shown = [group for group in every if group.free or show_all]
    marks: dict[str, int] = {}
    for group in shown:
        if group.reason:
            marks.setdefault(group.reason, len(marks) + 1)
    rows = [("group", "units", "removable")]
    rows += [(tail(g.name), str(g.size), g.removable + _mark(g, marks)) for g in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = []
    for row, places in zip(rows, [["where"], *map(_places, shown)], strict=True):
        start = f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  "
        lines.append(start + fit(places, WIDTH - len(start)))
    lines.insert(1, "─" * max(map(len, lines)))
    for reason, number in marks.items():
        lines.append(cut(f"[{number}] {reason}"))
    frozen: dict[str, list[Group]] = {}
    for group in every:
        if not group.free and not show_all:
            frozen.setdefault(group.reason, []).append(group)
    for reason, groups in frozen.items():
        start = f"not removable: {count(len(groups), 'group')}, {reason}: "
        lines.append(start + fit([place for g in groups for place in _places(g)], WIDTH - len(start)))
    return "\n".join([_summary(graph), *lines, *(cut(f"note: {note}") for note in graph.notes)])


def _summary(graph: UnitGraph) -> str:
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
    groups, units = count(len(free), "free group"), count(sum(group.size for group in free), "unit")
    text = f"{groups} of {units}, {sum(group.exact_shrunk for group in free)} exact"
    text += f"; prunable: {share(total, left)} of {short(total).strip()} parameters"
    if graph.traced is not None:
        traced = graph.traced
        small = Adapted(traced.program, traced.tracer, [traced.units[group.name] for group in free])
        total, left = multiplications(small, traced.program)
        text += f", {share(total, left)} of {short(2 * total)}FLOP"
    return text


def _places(group: Group) -> list[str]:
    return [f"{s.path}:{s.axis}" for s in group.slices]


def _mark(group: Group, marks: dict[str, int]) -> str:
    return f" [{marks[group.reason]}]" if group.reason else ""


def check_graph(graph: UnitGraph) -> None:
    """Raises ``ValueError`` unless a value is a :class:`UnitGraph`."""
    if not isinstance(graph, UnitGraph):
        raise ValueError(f"graph must be a UnitGraph, from units.trace, got {type(graph).__name__}")

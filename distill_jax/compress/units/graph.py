"""The result of a trace: which indices of which axes of a network's arrays belong together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax._model import Model, PyTree
from distill_jax.compress.units.tables import table
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
      exact: whether removing units gives the same outputs as setting them to zero: with
        :func:`~distill_jax.compress.units.shrink`, and with the model that
        :func:`~distill_jax.compress.units.keep` returns, unless the network's code refuses smaller arrays.
      reason: why the group is not free or not exact, with the name of the operation; else empty.
      exact_shrunk: whether removing units with ``shrink`` gives the same outputs as setting them to zero.
        Only this is true of a group if the network's own code, which reads widths from its arrays, would
        compute something else with smaller ones: then use ``shrink``.
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
        """``exactly``, ``exactly by shrink`` (alone), ``inexactly`` or ``no``."""
        if not self.free:
            return "no"
        if self.exact and self.runs:
            return "exactly"
        return "exactly by shrink" if self.exact_shrunk else "inexactly"


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
        """The table, see :func:`distill_jax.compress.units.tables.table`."""
        return table(self)


def check_graph(graph: UnitGraph) -> None:
    """Raises ``ValueError`` unless a value is a :class:`UnitGraph`."""
    if not isinstance(graph, UnitGraph):
        raise ValueError(f"graph must be a UnitGraph, from units.trace, got {type(graph).__name__}")

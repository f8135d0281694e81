"""Removes units, or sets them to zero: the one edit of which all others are made."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from distill_jax._checks import check_mapping
from distill_jax._model import PyTree
from distill_jax.compress.units.editing import map_leaves, numpy_of
from distill_jax.compress.units.graph import Slice, UnitGraph, check_graph

Kept = Mapping[str, Sequence[int] | np.ndarray]


def keep(graph: UnitGraph, tree: PyTree, kept: Kept) -> PyTree:
    """Removes all units except the kept ones: the same pytree with smaller arrays.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: the model; or any pytree that holds whole trees of the structure of the traced ``params`` or
        ``state``: a training state, an optimizer's state, gradients, masks, or a dict of several of
        these. Each such part is found by its structure and edited. All other leaves stay.
      kept: for each group, the indices of the units that stay, in rising order. All units of groups
        that are not named stay.

    Returns:
      A pytree of the same structure. A smaller Model runs where the network's code takes its widths from
      the parameters; else use :func:`distill_jax.compress.units.shrink`.

    Raises:
      ValueError: if ``kept`` names a group that does not exist or is not free, or has no indices, or
        indices that are out of range or do not rise; if nothing in the tree has the traced structure, or
        something has, but with other shapes.

    >>> import jax, jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, units.keep(graph, model, {"a": [0, 3]}).params)
    {'a': (3, 2), 'b': (2, 2)}
    """
    masks = position_masks(graph, kept)

    def edit(leaf: Any, name: str) -> Any:
        for axis, mask in masks.get(name, {}).items():
            leaf = numpy_of(leaf).take(leaf, np.flatnonzero(mask), axis=axis)
        return leaf

    return map_leaves(graph, edit, tree)


def silence(graph: UnitGraph, tree: PyTree, kept: Kept) -> PyTree:
    """Sets all units except the kept ones to zero, and leaves all shapes as they are.

    If the network divides by something that is zero for a unit of zeros, such as the norm of its weights, only
    the slices by which the unit's value is multiplied are set to zero (``group.silent``), where these are known.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: the model, or a pytree as :func:`keep` takes it.
      kept: group → the indices of the units that are *not* set to zero.

    Returns:
      A pytree of the same structure and shapes.

    Raises:
      ValueError: in the same cases as :func:`keep`.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> units.silence(graph, model, {"a": [0, 3]}).params["b"][:, 0]
    Array([1., 0., 0., 1.], dtype=float32)
    """
    masks = _masks({
        name: (stays, graph.groups[name].silent or graph.groups[name].slices)
        for name, stays in unit_masks(graph, kept).items()
    })  # fmt: skip

    def edit(leaf: Any, name: str) -> Any:
        for axis, mask in masks.get(name, {}).items():
            shape = [-1 if a == axis else 1 for a in range(leaf.ndim)]
            # Not a product: infinities and NaN become zero, too
            leaf = numpy_of(leaf).where(mask.reshape(shape), leaf, np.zeros((), leaf.dtype))
        return leaf

    return map_leaves(graph, edit, tree)


def position_masks(graph: UnitGraph, kept: Kept) -> dict[str, dict[int, np.ndarray]]:
    """Says which positions along which axes stay.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      name of an array → axis → bool ``[positions]``, only for axes of which some positions go.
    """
    return _masks({n: (stays, graph.groups[n].slices) for n, stays in unit_masks(graph, kept).items()})


def _masks(given: Mapping[str, tuple[np.ndarray, Sequence[Slice]]]) -> dict[str, dict[int, np.ndarray]]:
    masks: dict[str, dict[int, np.ndarray]] = {}
    for stays, slices in given.values():
        for path, axis, index in slices:
            axes = masks.setdefault(path, {})
            # Position −1 reads the last element, which np.where then ignores
            mask = np.where(index < 0, True, stays[index])
            axes[axis] = axes[axis] & mask if axis in axes else mask
    return masks


def shapes_of(graph: UnitGraph, kept: Kept) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes that all arrays have with these units, by name.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      name of an array → shape and dtype.
    """
    masks = position_masks(graph, kept)
    found = {}
    for path, like in graph.shapes.items():
        axes = masks.get(path, {})
        shape = [int(axes[a].sum()) if a in axes else n for a, n in enumerate(like.shape)]
        found[path] = jax.ShapeDtypeStruct(tuple(shape), like.dtype)
    return found


def unit_masks(graph: UnitGraph, kept: Kept) -> dict[str, np.ndarray]:
    """Checks ``kept``, and turns its indices into masks, for the groups that lose units.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      group → bool ``[size]``, true for the units that stay.

    Raises:
      ValueError: if ``kept`` is not valid, see :func:`keep`.
    """
    check_graph(graph)
    check_mapping("kept", kept, "group → indices")
    stays = {name: _stays(graph, name, indices) for name, indices in kept.items()}
    return {name: mask for name, mask in stays.items() if not mask.all()}


def _stays(graph: UnitGraph, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    if name not in graph.groups:
        raise ValueError(f"kept names {name!r}, which is no group; there are {list(graph.groups)}")
    group = graph.groups[name]
    index = np.asarray(indices)
    if index.size == 0 or index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"kept[{name!r}] must be a list of at least one index, got {indices!r}")
    if index[0] < 0 or index[-1] >= group.size or (np.diff(index) <= 0).any():
        raise ValueError(f"kept[{name!r}] must rise and lie in 0 … {group.size - 1}, got {indices!r}")
    if not group.free and index.size < group.size:
        raise ValueError(f"kept[{name!r}]: the group is not free: {group.reason}")
    stays = np.zeros(group.size, bool)
    stays[index] = True
    return stays

"""The one edit of which the others are made: some units stay, the others go or fall silent."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compress.units.graph import UnitGraph
from distill_jax.weights.structure import by_path, path_name

Kept = Mapping[str, Sequence[int] | np.ndarray]


def keep(graph: UnitGraph, tree: Any, kept: Kept) -> Any:
    """Removes all units but the kept ones: the same pytree with smaller arrays.

    Args:
      graph: the network's units, of :func:`distill_jax.compress.units.trace`.
      tree: the parameters, or any pytree with leaves shaped like them whose paths end with a
        parameter's path, such as an optimizer's state. A tree that has none of them may lack
        their first key: after ``trace(fn, {"params": params, "state": state}, x)`` come ``params``,
        ``state`` and ``tx.init(params)`` each by itself. Where a tree holds the paths twice, as
        ``{"student": params, "teacher": params}`` does, both are edited. Other leaves stay.
      kept: the indices that stay in each group, in rising order; all units of groups not named.

    Returns:
      A pytree of the same structure.

    Raises:
      ValueError: if ``kept`` names no group of the graph, one that is not free, or no indices at all;
        if indices are out of range or do not rise; if a leaf has another shape than its parameter; if
        without their first key several parameters have its path.

    >>> from distill_jax import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> graph = units.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, units.keep(graph, params, {"a": [0, 3]}))
    {'a': (3, 2), 'b': (2, 2)}
    """
    masks = position_masks(graph, kept)

    def one(leaf: Any, path: str) -> Any:
        for axis, mask in masks[path].items():
            leaf = numpy_of(leaf).take(leaf, np.flatnonzero(mask), axis=axis)
        return leaf

    return map_leaves(graph, one, tree, masks)


def silence(graph: UnitGraph, tree: Any, kept: Kept) -> Any:
    """Sets all slices of all units but the kept ones to zero, and leaves the shapes.

    Args:
      graph: as in :func:`keep`.
      tree: as in :func:`keep`.
      kept: as in :func:`keep`: the units that are *not* silenced.

    Returns:
      A pytree of the same structure and shapes.

    Raises:
      ValueError: as :func:`keep` does.

    >>> from distill_jax import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> graph = units.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
    >>> units.silence(graph, params, {"a": [0, 3]})["b"][:, 0]
    Array([1., 0., 0., 1.], dtype=float32)
    """
    masks = position_masks(graph, kept)

    def one(leaf: Any, path: str) -> Any:
        for axis, mask in masks[path].items():
            shape = [-1 if a == axis else 1 for a in range(leaf.ndim)]
            # Not a product: what is not finite also falls silent
            leaf = numpy_of(leaf).where(mask.reshape(shape), leaf, np.zeros((), leaf.dtype))
        return leaf

    return map_leaves(graph, one, tree, masks)


def position_masks(graph: UnitGraph, kept: Kept) -> dict[str, dict[int, np.ndarray]]:
    """Says which positions along which axes stay.

    Args:
      graph: as in :func:`keep`.
      kept: as in :func:`keep`.

    Returns:
      path → axis → mask ``[positions]``; only for axes that lose something.
    """
    masks: dict[str, dict[int, np.ndarray]] = {}
    for name, stays in check(graph, kept).items():
        for path, axis, index in graph.groups[name].slices:
            axes = masks.setdefault(path, {})
            # Position −1 reads the last element, which np.where then ignores
            mask = np.where(index < 0, True, stays[index])
            axes[axis] = axes[axis] & mask if axis in axes else mask
    return masks


def check(graph: UnitGraph, kept: Kept) -> dict[str, np.ndarray]:
    """Says which units stay in the groups that lose some: group → mask ``[size]``.

    Args:
      graph: as in :func:`keep`.
      kept: as in :func:`keep`.

    Raises:
      ValueError: as :func:`keep` does for ``kept``.
    """
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


def numpy_of(leaf: Any) -> Any:
    """The library of an array: NumPy's stay NumPy's."""
    return np if isinstance(leaf, np.ndarray) else jnp


def map_leaves(graph: UnitGraph, one: Any, tree: Any, masks: Mapping[str, Any]) -> Any:
    """Applies ``one(leaf, path)`` to the leaves of a tree that belong to certain parameters.

    Args:
      graph: as in :func:`keep`.
      one: ``(leaf, path) -> leaf``.
      tree: as in :func:`keep`.
      masks: the parameters' paths, as keys.

    Raises:
      ValueError: if a leaf has another shape than its parameter, or may be several.
    """
    shorter: dict[str, list[str]] = {}
    for path in graph.shapes:
        shorter.setdefault(path.partition(".")[2], []).append(path)

    def ends(path: str) -> list[str]:
        parts = path.split(".")
        return [".".join(parts[i:]) for i in range(len(parts))]

    stripped = not any(tail in graph.shapes for path in by_path(tree) for tail in ends(path))

    def find(path: str) -> str | None:
        for tail in ends(path):
            if tail in graph.shapes:
                return tail
            meant = shorter.get(tail, [])
            if (len(meant) > 1 or not stripped) and not masks.keys().isdisjoint(meant):
                raise ValueError(
                    f"tree: {path} may be {' or '.join(meant)}, or something else: give the tree under "
                    "its first key, or a tree of several parts (a whole train state) part by part"
                )
            if meant:
                return meant[0]
        return None

    def visit(key: Any, leaf: Any) -> Any:
        path = find(path_name(key))
        if path is None or path not in masks or np.size(leaf) <= 1 < np.prod(graph.shapes[path].shape):
            return leaf
        if np.shape(leaf) != graph.shapes[path].shape:
            raise ValueError(
                f"tree: {jax.tree_util.keystr(key)} has shape {np.shape(leaf)}, but the parameter "
                f"{path} was traced with {graph.shapes[path].shape}"
            )
        return one(leaf, path)

    return jax.tree_util.tree_map_with_path(visit, tree)

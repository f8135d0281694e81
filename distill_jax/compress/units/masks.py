"""Which positions of which arrays stay: what ``kept`` means, checked."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from distill_jax._checks import check_mapping
from distill_jax.compress.units.graph import Slice, UnitGraph, check_graph

Kept = Mapping[str, Sequence[int] | np.ndarray]


def position_masks(graph: UnitGraph, kept: Kept) -> dict[str, dict[int, np.ndarray]]:
    """Says which positions along which axes stay.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      name of an array → axis → bool ``[positions]``, only for axes of which some positions go.
    """
    return masks_of({n: (stays, graph.groups[n].slices) for n, stays in unit_masks(graph, kept).items()})


def masks_of(given: Mapping[str, tuple[np.ndarray, Sequence[Slice]]]) -> dict[str, dict[int, np.ndarray]]:
    """Makes the masks of positions of arrays from those of units and the slices in which they lie.

    Args:
      given: group → (bool ``[units]``, slices).

    Returns:
      name of an array → axis → bool ``[positions]``.
    """
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

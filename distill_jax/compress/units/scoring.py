"""What all scores of units share: sums over the slices of a unit, and what makes groups comparable."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from distill_jax.compress.units.graph import Group, UnitGraph
from distill_jax.compress.units.values import free_groups

Scores = dict[str, np.ndarray]
Normalise = Literal["mean", "max", "norm", "none"]


def normalised(scores: Mapping[str, np.ndarray], normalise: Normalise) -> Scores:
    """Makes the scores of several groups comparable.

    Args:
      scores: group → ``[size]``.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      The scores, divided group by group.

    Raises:
      ValueError: if ``normalise`` is unknown, or a score is not finite.
    """
    measures: dict[str, Callable[[np.ndarray], Any]] = {
        "mean": np.mean, "max": np.max, "norm": np.linalg.norm, "none": lambda x: 1.0,
    }  # fmt: skip
    if normalise not in measures:
        raise ValueError(f"normalise must be one of {', '.join(measures)}, got {normalise!r}")
    for name, x in scores.items():
        if not np.isfinite(x).all():
            raise ValueError(f"the scores of {name!r} are not finite: has the training diverged?")
    return {name: x / (measures[normalise](x) or 1.0) for name, x in scores.items()}


def sums(
    graph: UnitGraph,
    leaves: Mapping[str, np.ndarray],
    function: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Scores:
    """Sums over all elements that belong to a unit, each once."""
    values = {path: function(x) for path, x in leaves.items()}
    return {group.name: _sum(group, values) for group in free_groups(graph)}


def _sum(group: Group, values: Mapping[str, np.ndarray]) -> np.ndarray:
    total = np.zeros(group.size)
    for i, (path, axis, index) in enumerate(group.slices):
        if path not in values:
            continue
        x = values[path]

        def column(axis: int, index: np.ndarray, n: int = x.ndim) -> np.ndarray:
            return index.reshape([-1 if a == axis else 1 for a in range(n)])

        for other in group.slices[:i]:
            # An element whose row and column are of one unit was summed with its row
            if other.path == path and other.axis != axis:
                twice = column(other.axis, other.index) == column(axis, index)
                x = np.where(twice, 0.0, x)
        sums = x.sum(tuple(a for a in range(x.ndim) if a != axis))
        here = index >= 0
        total += np.bincount(index[here], sums[here], group.size)
    return total

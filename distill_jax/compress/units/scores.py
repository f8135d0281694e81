"""Scores how much each unit matters: one number per unit, of which the lowest are pruned first.

Scores made of weights sum over *all* slices of a unit, incoming and outgoing, each element once. Only parameters
count, not the model's state (BatchNorm's statistics). ``normalise`` makes layers comparable: the scores of a
group are divided by their ``"mean"`` (the default), their ``"max"`` or their ``"norm"`` √Σs²; ``"none"``
leaves them as they are.
"""

from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from distill_jax._checks import check_key, check_mapping
from distill_jax._model import Model, PyTree
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import UnitGraph, check_graph
from distill_jax.compress.units.loss_scores import fisher, gates, kronecker, squared_gradients, taylor
from distill_jax.compress.units.measuring import measured
from distill_jax.compress.units.reconstruction import reconstruction
from distill_jax.compress.units.scoring import Normalise, Scores, normalised, sums
from distill_jax.compress.units.values import activations, free_groups, vectors

__all__ = [
    "Normalise", "Scores", "apoz", "average", "batch_norm_scale", "fisher", "fpgm", "gates", "kronecker", "l1", "l2",
    "lamp", "mean_activation", "measured", "normalised", "random", "reconstruction", "squared_gradients", "taylor",
]  # fmt: skip


def l1(graph: UnitGraph, model: PyTree, *, normalise: Normalise = "mean") -> Scores:
    """Sums the absolute weights of each unit: Σ|w|.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group, float64 ``[size]``.

    References:
      Li et al., `Pruning Filters for Efficient ConvNets`, 2017, §3.1 (of incoming weights there).

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 2)) * jnp.array([1.0, -2.0]), "b": jnp.ones((2, 1))}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> units.scores.l1(graph, model, normalise="none")
    {'a': array([4., 7.])}
    """
    return normalised(sums(graph, float_leaves(graph, model), np.abs), normalise)


def l2(graph: UnitGraph, model: PyTree, *, normalise: Normalise = "mean") -> Scores:
    """Takes the Euclidean norm of the weights of each unit: √Σw².

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group, float64 ``[size]``.
    """
    squares = sums(graph, float_leaves(graph, model), np.square)
    return normalised({name: np.sqrt(x) for name, x in squares.items()}, normalise)


def lamp(graph: UnitGraph, model: PyTree, *, normalise: Normalise = "none") -> Scores:
    """Scores a unit by its share of the energy of all larger units: w_u² / Σ_{v ≥ u} w_v².

    The sum is over the units of the group that are not smaller. The scores are comparable between layers
    as they are: the largest unit of every group has 1.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group, float64 ``[size]``.

    References:
      Lee et al., `Layer-Adaptive Sparsity for the Magnitude-based Pruning`, 2021 (of single weights
      there).
    """

    def share(energy: np.ndarray) -> np.ndarray:
        order = np.argsort(energy, kind="stable")
        rest = np.cumsum(energy[order][::-1])[::-1]
        found = np.zeros_like(energy)
        found[order] = energy[order] / np.where(rest > 0, rest, 1)
        return found

    squares = sums(graph, float_leaves(graph, model), np.square)
    return normalised({name: share(x) for name, x in squares.items()}, normalise)


def batch_norm_scale(
    graph: UnitGraph,
    model: PyTree,
    *,
    names: Sequence[str] = ("scale", "gamma"),
    normalise: Normalise = "none",
) -> Scores:
    """Scores units by |γ|, the factor after a normalisation, in groups that have one.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      names: the last part of the name of such a parameter.
      normalise: how the scores of a group are made comparable. The factors are of one kind in all layers,
        so "none" compares them as they are.

    Returns:
      For each free group with such a factor, float64 ``[size]``.

    Raises:
      ValueError: if no parameter of the model has such a name.

    References:
      Liu et al., `Learning Efficient Convolutional Networks through Network Slimming`, 2017, §3.
    """
    leaves = float_leaves(graph, model)
    factors = {p: w for p, w in leaves.items() if p.rpartition(".")[2] in names and w.ndim == 1}
    found = {
        name: score
        for name, score in sums(graph, factors, np.abs).items()
        if any(s.path in factors for s in graph.groups[name].slices)
    }
    if not found:
        raise ValueError(f"names: no vector among the parameters that has units is called {tuple(names)}")
    return normalised(found, normalise)


def mean_activation(graph: UnitGraph, model: Model, x: PyTree, *, normalise: Normalise = "mean") -> Scores:
    """Takes the mean absolute activation of each unit.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      x: inputs of the traced shapes, so trace with a batch of the same size.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group that has :func:`~distill_jax.compress.units.activations`, float64 ``[size]``.
    """
    values = activations(graph, model, x)
    return normalised({name: np.abs(a).mean(0) for name, a in values.items()}, normalise)


def apoz(graph: UnitGraph, model: Model, x: PyTree, *, normalise: Normalise = "none") -> Scores:
    """Takes the share of activations that are not zero, 1 − APoZ.

    Units that are nearly always zero have the lowest score.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      x: inputs of the traced shapes, so trace with a batch of the same size.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group that has :func:`~distill_jax.compress.units.activations`, float64 ``[size]``.

    References:
      Hu et al., `Network Trimming`, 2016, Eq. 1 (APoZ: the average percentage of zeros).
    """
    values = activations(graph, model, x)
    return normalised({name: (a != 0).mean(0) for name, a in values.items()}, normalise)


def fpgm(graph: UnitGraph, model: PyTree, *, normalise: Normalise = "mean") -> Scores:
    """Sums the distances of a unit's weights to those of the other units: Σ_v ‖w_u − w_v‖.

    A unit near the geometric median of its group has the lowest score, for others can replace it.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group, float64 ``[size]``.

    References:
      He et al., `Filter Pruning via Geometric Median`, 2019 (of incoming weights there).
    """
    found = {}
    for name, x in vectors(graph, model).items():
        squares = (x * x).sum(1)
        distances = squares[:, None] + squares - 2 * x @ x.T
        np.fill_diagonal(distances, 0)
        found[name] = np.sqrt(np.maximum(distances, 0)).sum(1)
    return normalised(found, normalise)


def random(key: jax.Array, graph: UnitGraph) -> Scores:
    """Draws random scores, uniform on [0, 1), as a baseline for the other scores.

    Args:
      key: the random key.
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.

    Returns:
      For each free group, float64 ``[size]``.
    """
    check_key("key", key)
    check_graph(graph)
    free = free_groups(graph)
    ends = np.cumsum([group.size for group in free])
    drawn = np.asarray(jax.random.uniform(key, (ends[-1],)), np.float64)
    parts = np.split(drawn, ends[:-1])
    return {group.name: part for group, part in zip(free, parts, strict=True)}


def average(many: Iterable[Mapping[str, np.ndarray]], *, normalise: Normalise = "mean") -> Scores:
    """Averages scores over batches, one batch after the other.

    Args:
      many: the scores of each batch, such as ``(scores.apoz(graph, model, x, normalise="none") for x in batches)``.
      normalise: how the averages of a group are made comparable, see the module's first lines. The scores of the
        batches should not be: the batches would count by other weights.

    Returns:
      For each group, float64 ``[size]``.

    Raises:
      ValueError: if there are no scores, or those of two batches are of other groups.

    >>> average([{"a": np.array([1.0, 2.0])}, {"a": np.array([3.0, 2.0])}], normalise="none")
    {'a': array([2., 2.])}
    """
    total: Scores = {}
    count = 0
    for scores in many:
        check_mapping("many", scores, "group → array [size], for each batch")
        shapes = {name: np.shape(x) for name, x in scores.items()}
        if count and shapes != {name: x.shape for name, x in total.items()}:
            raise ValueError(f"many: batch {count} has scores of {shapes}, the first one of {list(total)}")
        total = {name: np.asarray(x, np.float64) + total.get(name, 0.0) for name, x in scores.items()}
        count += 1
    if not count:
        raise ValueError("many: give the scores of at least one batch, got none")
    return normalised({name: x / count for name, x in total.items()}, normalise)

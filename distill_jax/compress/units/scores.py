"""How much each unit matters: one number a unit, of which the lowest are pruned first.

Every score sums over *all* slices of a unit, incoming and outgoing, each element once. Layers are made
comparable by ``normalize``: scores of a group are divided by their ``"mean"`` (the default), their
``"max"``, their ``"norm"`` √Σs²; ``"none"`` leaves them. Trees (parameters, gradients) may be of
all that was traced or of a part, as in :func:`distill_jax.compress.units.keep`; what is missing does not
count: give ``params`` alone where BatchNorm's statistics should not.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compress.units.graph import Group, UnitGraph
from distill_jax.compress.units.values import activations, free_groups, real_leaves, vectors

Scores = dict[str, np.ndarray]
Normalize = Literal["mean", "max", "norm", "none"]


def l1(graph: UnitGraph, params: Any, *, normalize: Normalize = "mean") -> Scores:
    """Sum of absolute weights: Σ|w|.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      params: the weights.
      normalize: see above.

    Returns:
      Free group → float64 ``[size]``.

    References:
      Li et al., `Pruning Filters for Efficient ConvNets`, 2017, §3.1 (of incoming weights there).

    >>> from distill_jax import units
    >>> params = {"a": jnp.ones((3, 2)) * jnp.array([1.0, -2.0]), "b": jnp.ones((2, 1))}
    >>> graph = units.trace(lambda p, x: (x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
    >>> units.scores.l1(graph, params, normalize="none")
    {'a': array([4., 7.])}
    """
    return normalized(_sums(graph, real_leaves(graph, params), np.abs), normalize)


def l2(graph: UnitGraph, params: Any, *, normalize: Normalize = "mean") -> Scores:
    """Euclidean norm of the weights: √Σw².

    Args:
      graph: as in :func:`l1`.
      params: likewise.
      normalize: likewise.
    """
    squares = _sums(graph, real_leaves(graph, params), np.square)
    return normalized({name: np.sqrt(x) for name, x in squares.items()}, normalize)


def lamp(graph: UnitGraph, params: Any, *, normalize: Normalize = "none") -> Scores:
    """A unit's share in the energy of those of its group that are no smaller: w_u² / Σ_{v ≥ u} w_v².

    It is comparable across layers as it is; the largest unit of every group has 1.

    Args:
      graph: as in :func:`l1`.
      params: likewise.
      normalize: likewise.

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

    squares = _sums(graph, real_leaves(graph, params), np.square)
    return normalized({name: share(x) for name, x in squares.items()}, normalize)


def taylor(graph: UnitGraph, params: Any, gradients: Any, *, normalize: Normalize = "mean") -> Scores:
    """The change of the loss without the unit, to first order: |Σ g·w|.

    Args:
      graph: as in :func:`l1`.
      params: likewise.
      gradients: of the loss, shaped like ``params``.
      normalize: as in :func:`l1`.

    References:
      Molchanov et al., `Importance Estimation for Neural Network Pruning`, 2019 (squared there).
    """
    products = _products(graph, params, gradients, "gradients")
    return normalized({n: np.abs(x) for n, x in _sums(graph, products).items()}, normalize)


def fisher(graph: UnitGraph, params: Any, diagonal: Any, *, normalize: Normalize = "mean") -> Scores:
    """The change of the loss without the unit, to second order: ½ Σ h·w².

    Args:
      graph: as in :func:`l1`.
      params: likewise.
      diagonal: of the Hessian, or of the Fisher matrix (:func:`squared_gradients`), shaped like
        ``params``.
      normalize: as in :func:`l1`.

    References:
      LeCun, Denker, Solla, `Optimal Brain Damage`, 1990; Theis et al., 2018 (the Fisher).
    """
    squared = {path: w * w for path, w in real_leaves(graph, params).items()}
    products = _products(graph, squared, diagonal, "diagonal")
    return normalized({n: x / 2 for n, x in _sums(graph, products).items()}, normalize)


def squared_gradients(
    loss_fn: Callable[[Any, Any], jax.Array], params: Any, examples: Any, *, chunk: int = 64
) -> Any:
    """Averages the squared gradients of single examples: the diagonal of the (empirical) Fisher matrix.

    Args:
      loss_fn: ``(params, example) -> loss`` of one example, without a batch axis.
      params: any pytree.
      examples: a pytree of arrays ``[examples, ...]``.
      chunk: examples whose gradients are held at once.

    >>> squared_gradients(lambda p, x: p * x, jnp.array(1.0), jnp.array([1.0, 3.0])).item()
    5.0
    """
    count = len(jax.tree.leaves(examples)[0])

    @jax.jit
    def total(part: Any) -> Any:
        gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(params, part)
        return jax.tree.map(lambda g: jnp.square(g).sum(0), gradients)

    parts = [total(jax.tree.map(lambda x, i=i: x[i : i + chunk], examples)) for i in range(0, count, chunk)]
    return jax.tree.map(lambda *sums: sum(sums[1:], sums[0]) / count, *parts)


def batch_norm_scale(
    graph: UnitGraph, params: Any, *, names: Sequence[str] = ("scale", "gamma"), normalize: Normalize = "none"
) -> Scores:
    """|γ|, the factor after a normalisation; only of groups that have one.

    Args:
      graph: as in :func:`l1`.
      params: likewise.
      names: what the last part of such a parameter's path is.
      normalize: as in :func:`l1`. The factors are of one kind in all layers: "none" compares them as
        they are.

    Raises:
      ValueError: if no parameter is called so.

    References:
      Liu et al., `Learning Efficient Convolutional Networks through Network Slimming`, 2017, §3.
    """
    leaves = real_leaves(graph, params)
    factors = {p: w for p, w in leaves.items() if p.rpartition(".")[2] in names and w.ndim == 1}
    found = {
        name: score
        for name, score in _sums(graph, factors, np.abs).items()
        if any(s.path in factors for s in graph.groups[name].slices)
    }
    if not found:
        raise ValueError(f"names: no vector of params that has units is called {tuple(names)}")
    return normalized(found, normalize)


def mean_activation(graph: UnitGraph, params: Any, *inputs: Any, normalize: Normalize = "mean") -> Scores:
    """Mean absolute value of what the unit hands on.

    Args:
      graph: as in :func:`l1`.
      params: all that was traced.
      inputs: of the shapes that were traced: trace with the batch to be looked at.
      normalize: as in :func:`l1`.

    Returns:
      As :func:`l1`, without groups that have no :func:`activations`.
    """
    values = activations(graph, params, *inputs)
    return normalized({name: np.abs(x).mean(0) for name, x in values.items()}, normalize)


def apoz(graph: UnitGraph, params: Any, *inputs: Any, normalize: Normalize = "none") -> Scores:
    """The share of non-zero activations, 1 − APoZ: units that are nearly always 0 have the lowest.

    Args:
      graph: as in :func:`mean_activation`.
      params: likewise.
      inputs: likewise.
      normalize: as in :func:`l1`.

    References:
      Hu et al., `Network Trimming`, 2016, Eq. 1 (APoZ: the average percentage of zeros).
    """
    values = activations(graph, params, *inputs)
    return normalized({name: (x != 0).mean(0) for name, x in values.items()}, normalize)


def fpgm(graph: UnitGraph, params: Any, *, normalize: Normalize = "mean") -> Scores:
    """Distance to the other units: Σ_v ‖w_u − w_v‖; what is near the geometric median can be spared.

    Args:
      graph: as in :func:`l1`.
      params: likewise.
      normalize: likewise.

    References:
      He et al., `Filter Pruning via Geometric Median`, 2019 (of incoming weights there).
    """
    found = {}
    for name, x in vectors(graph, params).items():
        squares = (x * x).sum(1)
        distances = squares[:, None] + squares - 2 * x @ x.T
        np.fill_diagonal(distances, 0)
        found[name] = np.sqrt(np.maximum(distances, 0)).sum(1)
    return normalized(found, normalize)


def random(key: jax.Array, graph: UnitGraph) -> Scores:
    """Uniform on [0, 1): what any other score must beat.

    Args:
      key: of the draw.
      graph: as in :func:`l1`.
    """
    free = free_groups(graph)
    ends = np.cumsum([group.size for group in free])
    drawn = np.asarray(jax.random.uniform(key, (ends[-1],)), np.float64)
    parts = np.split(drawn, ends[:-1])
    return {group.name: part for group, part in zip(free, parts, strict=True)}


def normalized(scores: Mapping[str, np.ndarray], normalize: Normalize) -> Scores:
    """Makes the scores of several groups comparable, as the module's first lines say.

    Args:
      scores: group → ``[size]``.
      normalize: how.

    Raises:
      ValueError: if there is no such way, or a score is not finite.
    """
    measures: dict[str, Callable[[np.ndarray], Any]] = {
        "mean": np.mean, "max": np.max, "norm": np.linalg.norm, "none": lambda x: 1.0,
    }  # fmt: skip
    if normalize not in measures:
        raise ValueError(f"normalize must be one of {', '.join(measures)}, got {normalize!r}")
    for name, x in scores.items():
        if not np.isfinite(x).all():
            raise ValueError(f"the scores of {name!r} are not finite: has the training diverged?")
    return {name: x / (measures[normalize](x) or 1.0) for name, x in scores.items()}


def _products(graph: UnitGraph, a: Any, b: Any, name: str) -> dict[str, np.ndarray]:
    left, right = real_leaves(graph, a), real_leaves(graph, b)
    if missing := sorted(left.keys() - right.keys()):
        raise ValueError(f"{name} must be shaped like params, but has no {missing[0]}")
    return {path: x * right[path] for path, x in left.items()}


def _sums(
    graph: UnitGraph,
    leaves: Mapping[str, np.ndarray],
    function: Callable[[np.ndarray], np.ndarray] = lambda x: x,
) -> Scores:
    """Σ over all elements that go with a unit, each once."""
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

"""Interpolation between two pytrees of parameters, and means of several."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_fraction, check_function, check_not_negative, check_real, check_sequence
from distill_jax._model import PyTree
from distill_jax.losses._arguments import to_float
from distill_jax.weights.structure import Scalar, Scalars, check, is_float, map_floats, scalars


def lerp(tree_a: PyTree, tree_b: PyTree, t: Scalars) -> PyTree:
    """Linear interpolation between two trees, (1 − t)·a + t·b: exactly a at t = 0 and b at t = 1.

    Args:
      tree_a: any pytree of arrays: parameters, or a whole :class:`~distill_jax.models.Model`.
      tree_b: a tree of the same structure, shapes and dtypes.
      t: a number in [0, 1]; or a mapping from path patterns to numbers, see
        :func:`distill_jax.weights.scalars`. It may be traced, so ``vmap`` and ``grad`` over t work.

    Returns:
      A tree with the structure, shapes and dtypes of ``tree_a``. Leaves that are not floating-point
      numbers are those of ``tree_a``, or of ``tree_b`` at t = 1. A model with BatchNorm needs
      :func:`distill_jax.weights.recalibrate` afterwards.

    Raises:
      ValueError: if the trees do not fit, hold values that are not finite, or t lies outside [0, 1].

    References:
      Wortsman et al., `Robust fine-tuning of zero-shot models`, 2022, Eq. 1.

    >>> lerp({"w": jnp.zeros(2)}, {"w": jnp.array([1.0, 2.0])}, 0.25)
    {'w': Array([0.25, 0.5 ], dtype=float32)}
    """
    check(tree_a, tree_b)
    return jax.tree.map(_lerp, tree_a, tree_b, scalars(t, tree_a))


def _lerp(a: Any, b: Any, t: Scalar) -> jax.Array:
    if not is_float(a):
        return jnp.where(jnp.asarray(t) == 1, b, a)
    # From the nearer end, so that both ends, and the way between equals, are exact; by halves, which
    # are exact too, so that the largest numbers' difference is finite
    x, y, t = to_float(a), to_float(b), jnp.asarray(t)
    near = t < 0.5
    moved = jnp.where(near, x, y) + jnp.where(near, 2 * t, 2 * (t - 1)) * (y / 2 - x / 2)
    return moved.astype(jnp.asarray(a).dtype)


def slerp(tree_a: PyTree, tree_b: PyTree, t: Scalars) -> PyTree:
    """Spherical interpolation between two trees, leaf by leaf: (sin((1 − t)Ω)·a + sin(tΩ)·b)/sin Ω.

    Ω is the angle between the two leaves as vectors. If they are parallel, opposite or zero (sin Ω <
    1e-4), the great circle between them is not defined, and the leaf is interpolated linearly.

    Args:
      tree_a: any pytree of arrays: parameters, or a whole :class:`~distill_jax.models.Model`.
      tree_b: a tree of the same structure, shapes and dtypes.
      t: a number in [0, 1]; or a mapping from path patterns to numbers, see
        :func:`distill_jax.weights.scalars`.

    Returns:
      A tree with the structure, shapes and dtypes of ``tree_a``.

    Raises:
      ValueError: if the trees do not fit, hold values that are not finite, or t lies outside [0, 1].

    References:
      Shoemake, `Animating Rotation with Quaternion Curves`, 1985, §3.3.

    >>> x = slerp({"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([0.0, 2.0])}, 0.5)["w"]
    >>> [round(float(v), 4) for v in x]
    [1.4142, 1.4142]
    """
    check(tree_a, tree_b)
    return jax.tree.map(_slerp, tree_a, tree_b, scalars(t, tree_a))


def _slerp(a: Any, b: Any, t: Scalar) -> jax.Array:
    straight = _lerp(a, b, t)
    if not is_float(a):
        return straight
    x, y, t = to_float(a), to_float(b), jnp.asarray(t)
    lengths = _norm(x), _norm(y)
    u, v = (z / jnp.where(length > 0, length, 1.0) for z, length in zip((x, y), lengths, strict=True))
    # arccos loses the digits of small angles (Kahan, `How Futile are Mindless Assessments`, 2006, §12)
    angle = 2 * jnp.arctan2(_norm(u - v), _norm(u + v))
    defined = (jnp.sin(angle) >= 1e-4) & (lengths[0] > 0) & (lengths[1] > 0)
    angle = jnp.where(defined, angle, 1.0)
    round_ = (jnp.sin((1 - t) * angle) * x + jnp.sin(t * angle) * y) / jnp.sin(angle)
    # Multiplied and divided by sin Ω, an end comes back up to a rounding only
    exact = (t == 0) | (t == 1) | ~defined
    return jnp.where(exact, straight, round_.astype(straight.dtype))


def _norm(x: jax.Array) -> jax.Array:
    """Computes the L2 norm, with gradient 0 at zero."""
    square = jnp.sum(jnp.square(jnp.abs(x)))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def mean(trees: Sequence[PyTree], weights: ArrayLike | Sequence[ArrayLike] | None = None) -> PyTree:
    """Weighted mean of trees, Σ wᵢθᵢ / Σ wᵢ; with equal weights a uniform soup.

    Args:
      trees: one or more trees of the same structure, shapes and dtypes.
      weights: w ≥ 0, one per tree and not all 0; by default all are equal.

    Returns:
      A tree with the structure, shapes and dtypes of the first. Leaves that are not floating-point
      numbers are those of the first.

    Raises:
      ValueError: if the trees do not fit, or the weights are not valid.

    References:
      Wortsman et al., `Model soups`, 2022, §2 (uniform soup).

    >>> float(mean([1.0, 2.0, 6.0], [1, 1, 2]))
    3.75
    """
    shares = _shares(trees, weights)
    return map_floats(
        lambda *leaves: _sum(map(jnp.multiply, shares, map(to_float, leaves)), leaves[0]), *trees
    )


def _shares(trees: Sequence[PyTree], weights: Any) -> jax.Array:
    check_sequence("trees", trees, "trees")
    if not len(trees):
        raise ValueError("trees must have at least one entry, got none")
    check(*trees, names=[f"trees[{i}]" for i in range(len(trees))])
    if weights is None:
        weights = np.ones(len(trees))
    if np.shape(weights) != (len(trees),):
        raise ValueError(f"weights must have one entry per tree, {len(trees)}, got shape {np.shape(weights)}")
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(weights)):
        check_real("weights", weights)
        values = np.asarray(weights, np.float64)
        if not (np.isfinite(values).all() and (values >= 0).all() and values.sum() > 0):
            raise ValueError(f"weights must be finite, ≥ 0 and not all 0, got {values}")
    weights = to_float(jnp.asarray(weights))
    return weights / jnp.sum(weights)


def _sum(terms: Any, like: Any) -> jax.Array:
    total, *rest = terms
    for term in rest:
        total = total + term
    return total.astype(jnp.asarray(like).dtype)


def fisher_mean(
    trees: Sequence[PyTree], fishers: Sequence[PyTree], weights: ArrayLike | Sequence[ArrayLike] | None = None
) -> PyTree:
    """Mean of trees in which each parameter is weighted by its Fisher information: Σ wᵢFᵢθᵢ / Σ wᵢFᵢ.

    Args:
      trees: one or more trees of the same structure, shapes and dtypes.
      fishers: one tree of the same structure per entry of ``trees``, with the diagonal of its Fisher
        information, F ≥ 0: the mean over examples of the squared gradient of the log-likelihood.
      weights: w ≥ 0, one per tree and not all 0; by default all are equal.

    Returns:
      A tree with the structure, shapes and dtypes of the first. A parameter on which no tree has
      information gets the plain weighted mean.

    Raises:
      ValueError: if trees do not fit, the two lists differ in length, or a value of F is negative.

    References:
      Matena, Raffel, `Merging Models with Fisher-Weighted Averaging`, 2022, Eq. 4.

    >>> float(fisher_mean([1.0, 2.0], [3.0, 1.0]))
    1.25
    """
    check_sequence("trees", trees, "trees")
    check_sequence("fishers", fishers, "trees")
    if len(fishers) != len(trees):
        raise ValueError(f"fishers must have one entry per tree, {len(trees)}, got {len(fishers)}")
    shares = _shares(trees, weights)
    names = ["trees[0]", *(f"fishers[{i}]" for i in range(len(fishers)))]
    check(trees[0], *fishers, names=names, dtypes=False)
    for i, fisher in enumerate(fishers):
        lowest = [jnp.min(x) for x in jax.tree.leaves(fisher) if is_float(x)]
        if any(not isinstance(x, jax.core.Tracer) and x < 0 for x in lowest):
            raise ValueError(f"fishers[{i}] must not be negative, got {min(map(float, lowest))}")

    def one(*leaves):
        values = [to_float(x) for x in leaves[: len(trees)]]
        information = [to_float(x) for x in leaves[len(trees) :]]
        # Only ratios matter, and sums of values as tiny as these would underflow
        highest = jnp.max(jnp.stack(information), 0)
        known = highest > 0
        highest = jnp.where(known, highest, 1.0)
        parts = [
            share * jnp.where(known, f / highest, 1.0) for share, f in zip(shares, information, strict=True)
        ]
        total = sum(parts[1:], parts[0])
        # Where the only trees with information have weight 0, there is none either
        parts = [
            jnp.where(total > 0, part / jnp.where(total > 0, total, 1.0), share)
            for part, share in zip(parts, shares, strict=True)
        ]
        return _sum(map(jnp.multiply, parts, values), leaves[0])

    return map_floats(one, *trees, *fishers)


class Soup(NamedTuple):
    """The result of :func:`greedy_soup`.

    Attributes:
      tree: the mean of the members.
      members: the members' places in the list of trees, the best first.
      score: the score of ``tree``.
    """

    tree: PyTree
    members: tuple[int, ...]
    score: float


def greedy_soup(trees: Sequence[PyTree], score: Callable[[PyTree], float]) -> Soup:
    """Greedy soup: averages trees one by one, the best first, and keeps each that does not lower the score.

    Args:
      trees: one or more trees of the same structure, shapes and dtypes.
      score: a function from a tree to a number on *validation* data, where higher is better. It is
        called at most 2·n − 1 times for n trees. If the network has BatchNorm, it must first call
        :func:`distill_jax.weights.recalibrate`.

    Returns:
      The soup; its score is never below that of the best tree.

    Raises:
      ValueError: if trees do not fit, or a score is NaN.

    References:
      Wortsman et al., `Model soups`, 2022, Recipe 1.

    >>> greedy_soup([1.0, 5.0, 2.0], lambda x: -abs(float(x) - 1.4))[1:]
    ((0, 2), -0.10000000000000009)
    """
    _shares(trees, None)
    check_function("score", score, "tree")
    scores = [float(score(tree)) for tree in trees]
    if any(map(np.isnan, scores)):
        raise ValueError(f"score must be a number, got {scores}")
    first, *others = sorted(range(len(trees)), key=lambda i: -scores[i])
    soup = Soup(trees[first], (first,), scores[first])
    for i in others:
        members = (*soup.members, i)
        tree = mean([trees[member] for member in members])
        reached = float(score(tree))
        if reached >= soup.score:
            soup = Soup(tree, members, reached)
    return soup


def ema(average: PyTree, tree: PyTree, decay: Scalar, *, step: Scalar | None = None) -> PyTree:
    """One step of an exponential moving average: d·average + (1 − d)·θ.

    With ``step`` it is bias-corrected: the average of the first t trees is Σ dᵗ⁻ⁱθᵢ / Σ dᵗ⁻ⁱ, whatever
    ``average`` was at the start. It stays normalised: the weight of the past is d(1 − dᵗ⁻¹)/(1 − dᵗ).

    Args:
      average: the average so far. Its dtypes may be wider than the tree's and should be: a mean over many
        steps moves by less than bfloat16 can hold.
      tree: the tree θ to add, of the same structure and shapes.
      decay: d in [0, 1]; with ``step`` in [0, 1).
      step: t ≥ 1, the number of trees in the new average; None for no correction.

    Returns:
      A tree with the structure, shapes and dtypes of ``average``. Leaves that are not floating-point
      numbers are those of ``tree``, or of ``average`` at d = 1.

    Raises:
      ValueError: if the trees do not fit, or decay or step lie outside these bounds.

    References:
      Kingma, Ba, `Adam`, 2015, §3 (the correction); Tarvainen, Valpola, `Mean Teachers Are Better Role
      Models`, 2017, §2 (the mean of weights).

    >>> float(ema(0.0, 8.0, 0.75)), float(ema(0.0, 8.0, 0.75, step=1))
    (2.0, 8.0)
    """
    check_fraction("decay", decay)
    if step is None:
        return _join(average, tree, decay)
    if not isinstance(decay, jax.core.Tracer) and not decay < 1:
        raise ValueError(f"decay must lie in [0, 1) where step is given, got {decay}: use swa")
    if not isinstance(step, jax.core.Tracer) and not step >= 1:
        raise ValueError(f"step must be at least 1, the number of trees in the new average, got {step}")
    decay, step = jnp.asarray(decay, jnp.float32), jnp.asarray(step, jnp.float32)
    log = jnp.log(jnp.where(decay > 0, decay, 1.0))
    share = decay * jnp.expm1((step - 1) * log) / jnp.where(decay > 0, jnp.expm1(step * log), 1.0)
    return _join(average, tree, share)


def swa(average: PyTree, tree: PyTree, count: Scalar) -> PyTree:
    """One step of stochastic weight averaging, the plain mean of all trees: (n·average + θ)/(n + 1).

    Args:
      average: the mean of the first n trees; its dtypes should be float32 or wider.
      tree: the tree θ to add, of the same structure and shapes.
      count: n ≥ 0. At 0 the result is ``tree``.

    Returns:
      A tree with the structure, shapes and dtypes of ``average``. Leaves that are not floating-point
      numbers are those of ``tree``.

    Raises:
      ValueError: if the trees do not fit, or the count is negative.

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization`, 2018,
      Algorithm 1.

    >>> float(swa(3.0, 7.0, 3))
    4.0
    """
    check_not_negative("count", count)
    count = jnp.asarray(count, jnp.float32)
    return _join(average, tree, count / (count + 1))


def _join(average: PyTree, tree: PyTree, share: Scalar) -> PyTree:
    check(average, tree, names=("average", "tree"), dtypes=False)
    tree = jax.tree.map(
        lambda x, like: jnp.asarray(x, jnp.asarray(like).dtype) if is_float(like) else x, tree, average
    )
    return jax.tree.map(lambda new, old: _lerp(new, old, share), tree, average)

"""Prunes weights during training: unstructured and N:M sparsity as part of the optimizer.

:func:`sparsify` wraps any optax transformation. On a schedule it removes the weights with the lowest scores.
From then on they are *exactly* zero: their update is −w, and w + (−w) = 0 in floating point. A removed weight
never returns. The masks are part of the optimizer's state, and so of every checkpoint.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from distill_jax._checks import (
    check_choice,
    check_count,
    check_fraction,
    check_integers,
    check_positive,
    check_tx,
    is_integer,
)
from distill_jax._model import PyTree
from distill_jax.compress._masks import (
    check_groups,
    check_masks,
    check_pattern,
    choose_leaves,
    f32,
    map_present,
    masked,
    masked_update,
    remove,
    zeroed,
)
from distill_jax.weights.structure import by_path


class Schedule(NamedTuple):
    """When to prune, and how much, from :func:`polynomial`, which explains and checks the values."""

    final: float
    begin: int
    end: int
    initial: float
    every: int
    power: float


def polynomial(
    final: float, *, begin: int, end: int, initial: float = 0.0, every: int = 1, power: float = 3.0
) -> Schedule:
    """Makes a schedule of a sparsity that rises fast at first, then ever more slowly.

    s(t) = final + (initial − final)·(1 − (t − begin)/(end − begin))^power

    Args:
      final: the fraction of weights that are zero from step ``end`` on, in [0, 1).
      begin: the first step at which weights are removed. Steps are counted from 0.
      end: the last step at which weights are removed, later than ``begin``, also if ``every`` does not
        divide the distance.
      initial: the sparsity reached at ``begin``, in [0, ``final``].
      every: number of steps from one removal to the next, at least 1. A hundred or more let the network
        recover in between.
      power: 3 in the paper, 1 for a straight line; greater than 0.

    Returns:
      The schedule, for :func:`sparsify` and :func:`sparsity_at`.

    Raises:
      ValueError: for values outside these bounds.

    References:
      Zhu, Gupta, `To prune, or not to prune`, 2017 (arXiv 1710.01878), Eq. 1, where
      end = begin + n·every.

    >>> schedule = polynomial(0.8, begin=0, end=10)
    >>> [round(float(sparsity_at(schedule, step)), 3) for step in (0, 5, 10, 99)]
    [0.0, 0.7, 0.8, 0.8]
    """
    for name, value in (("final", final), ("initial", initial)):
        check_fraction(name, value, without=1)
    if initial > final:
        raise ValueError(
            f"initial must be at most final, {final}, got {initial}: removed weights never return"
        )
    check_count("begin", begin, least=0)
    check_count("end", end)
    if end <= begin:
        raise ValueError(f"begin and end must satisfy 0 ≤ begin < end, got {begin} and {end}")
    check_count("every", every)
    check_positive("power", power)
    return Schedule(final, begin, end, initial, every, power)


def sparsity_at(schedule: Schedule, step: ArrayLike) -> jax.Array:
    """Returns the sparsity that a schedule asks for at a step: float32, 0 before it begins.

    Args:
      schedule: from :func:`polynomial`.
      step: the number of the step, an integer or an array of integers.

    Returns:
      The fraction of weights that are zero, in the shape of ``step``.
    """
    _check_schedule(schedule)
    check_integers("step", step)
    step = jnp.asarray(step)
    way = (step - schedule.begin).astype(jnp.float32) / (schedule.end - schedule.begin)
    rest = (1 - jnp.clip(way, 0, 1)) ** schedule.power
    value = schedule.final + (schedule.initial - schedule.final) * rest
    # Not the rounded sum at the end: the last count is exactly the one asked for
    value = jnp.where(step >= schedule.end, schedule.final, value)
    return jnp.where(step < schedule.begin, 0.0, value).astype(jnp.float32)


def _check_schedule(schedule: Any) -> None:
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be one of sparsity.polynomial, got {schedule!r}")


def _due(schedule: Schedule, step: jax.Array) -> jax.Array:
    on_grid = (step - schedule.begin) % schedule.every == 0
    within = (step >= schedule.begin) & (step < schedule.end)
    return (within & on_grid) | (step == schedule.end)


def _count_at(schedule: Schedule, step: jax.Array, size: int) -> jax.Array:
    """Says how many of ``size`` weights are zero after an update at ``step``."""
    last = round(schedule.final * size)
    count = jnp.round(sparsity_at(schedule, step) * size).astype(jnp.int32)
    return jnp.where(step >= schedule.end, last, jnp.minimum(count, last))


class SparsityState(NamedTuple):
    """The state of :func:`sparsify` and :func:`frozen`.

    Attributes:
      step: int32 scalar, the number of updates made.
      masks: for each leaf that is pruned a bool array, true where a weight lives; for all other leaves
        ``optax.MaskedNode``, which has no arrays.
      scores: for each leaf that is pruned the moving average of the saliency, float32; empty if weights
        are scored by magnitude.
      inner: the state of the wrapped transformation.
    """

    step: jax.Array
    masks: PyTree
    scores: PyTree
    inner: PyTree


def sparsify(
    tx: optax.GradientTransformation,
    schedule: Schedule,
    *,
    score: Literal["magnitude", "saliency"] = "magnitude",
    ranking: Literal["uniform", "global"] = "uniform",
    pattern: tuple[int, int] | None = None,
    axis: int = -2,
    exclude: Sequence[str] = (),
    min_ndim: int = 2,
    decay: float = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """Prunes weights while ``tx`` trains them, for example ``sparsify(optax.adam(1e-3), polynomial(...))``.

    It wraps ``tx`` and does not follow it in a chain, so that nothing comes after it, whatever ``tx`` does
    (momentum, weight decay), and so that ``tx`` sees zero gradients for removed weights: if it clips by a
    norm, this is the norm of the living weights. Put it outermost.

    A removal at step t looks at the weights as ``tx`` leaves them after step t. After it exactly
    k = round(s(t)·n) of the n weights that are ranked together are zero, also if weights are equal (then the
    first of them go). On the way s(t)·n has the 24 bits of float32; the last k is exact. A removal costs
    about 40 passes over the weights, at the steps of the schedule only, by ``lax.cond``. Under ``vmap`` over
    states XLA turns this into a ``select``, which costs as much at every step.

    Args:
      tx: any optax transformation.
      schedule: from :func:`polynomial`.
      score: how weights are scored. ``"magnitude"``: |w|. ``"saliency"``: the first-order estimate of how
        the loss would change, |w·∂L/∂w|, as a moving average over steps. (The average starts with the
        first step. Its bias is the same for all weights, so it is not corrected.)
      ranking: ``"uniform"``: each leaf gets the schedule's sparsity. ``"global"``: the weights of all
        leaves are ranked together, so that some leaves lose more than others.
      pattern: (N, M), such as (2, 4): at the end N of M neighbours along ``axis`` live; before that at
        least N do. The schedule's ``final`` must be 1 − N/M.
      axis: the axis along which the neighbours of ``pattern`` lie: −2 is that of the inputs of dense and
        convolution kernels in Flax.
      exclude: regular expressions. A leaf in whose path (such as ``head.kernel``) one of them is found
        keeps all its weights.
      min_ndim: leaves with fewer axes keep all their weights: by default biases and the scales of
        normalisation.
      decay: the decay of the saliency's moving average, in [0, 1).

    Returns:
      A transformation with the state :class:`SparsityState`. Its ``update`` needs ``params``, and passes
      further keyword arguments to ``tx``.

    Raises:
      ValueError: if an option has an impossible value; from ``init``, if an expression of ``exclude`` is
        found in no path, no leaf is left to prune, or an axis cannot be cut into groups of M; from
        ``update``, if it is called without ``params``.

    References:
      Zhu, Gupta, 2017 (schedule and magnitude); Molchanov et al., `Importance Estimation for Neural
      Network Pruning`, 2019, §3.1 (saliency, squared there: of a single batch, the same order);
      Mishra et al., `Accelerating Sparse Deep Neural Networks`, 2021 (2:4).

    >>> tx = sparsify(optax.sgd(0.1), polynomial(0.5, begin=0, end=1))
    >>> params = {"kernel": jnp.array([[1.0, -3.0], [2.0, 4.0]])}
    >>> state, still = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(still, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(params["kernel"])
    [[ 0. -3.]
     [ 0.  4.]]
    """
    for name, value, known in (
        ("score", score, ("magnitude", "saliency")),
        ("ranking", ranking, ("uniform", "global")),
    ):
        check_choice(name, value, known)
    check_fraction("decay", decay, without=1)
    check_count("min_ndim", min_ndim, least=0)
    _check_schedule(schedule)
    check_tx("tx", tx)
    if not is_integer(axis):
        raise ValueError(f"axis must be an integer, got {axis!r}")
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of expressions, such as ({exclude!r},)")
    if pattern is not None:
        keep, group = check_pattern(pattern)
        if abs(schedule.final - (1 - keep / group)) > 1e-6:
            raise ValueError(
                f"pattern {keep}:{group} is a sparsity of {1 - keep / group:g}, but the schedule's "
                f"final is {schedule.final:g}: make them equal"
            )
        schedule = schedule._replace(final=1 - keep / group)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        chosen = choose_leaves(params, exclude, min_ndim)
        if pattern is not None:
            check_groups(params, chosen, pattern[1], axis)

        def where(make):
            return jax.tree.map(lambda chosen, p: make(p) if chosen else optax.MaskedNode(), chosen, params)

        masks = where(lambda p: jnp.ones_like(p, bool))
        scores = where(lambda p: jnp.zeros_like(p, jnp.float32)) if score == "saliency" else ()
        return SparsityState(jnp.zeros((), jnp.int32), masks, scores, tx.init(params))

    def update(updates, state, params=None, **extra):
        _need_params(params)
        masks, scores = state.masks, state.scores
        if score == "saliency":
            scores = map_present(
                lambda old, p, g: decay * old + (1 - decay) * jnp.abs(f32(p) * f32(g)),
                scores, params, updates,
            )  # fmt: skip
        updates, inner = masked_update(tx, masks, updates, state.inner, params, extra)

        def prune(masks):
            values = scores
            if score == "magnitude":
                values = map_present(
                    lambda _, p, u: jnp.abs(f32((p + u).astype(p.dtype))), masks, params, updates
                )
            counts = functools.partial(_count_at, schedule, state.step)
            return remove(masks, values, counts, ranking, pattern, axis)

        masks = jax.lax.cond(_due(schedule, state.step), prune, lambda masks: masks, masks)
        step = optax.safe_increment(state.step)
        return zeroed(masks, updates, params), SparsityState(step, masks, scores, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def frozen(tx: optax.GradientTransformation, masks: PyTree) -> optax.GradientTransformationExtraArgs:
    """Trains the living weights with fixed masks, and keeps all other weights zero.

    Args:
      tx: any optax transformation. It is wrapped as :func:`sparsify` wraps it.
      masks: from :func:`mask_of`, for parameters of the same structure. They become part of the state,
        from which they are read, so that a checkpoint holds them.

    Returns:
      A transformation with the state :class:`SparsityState`. After the first update the weights outside
      the masks are zero, whatever they were before.

    Raises:
      ValueError: from ``init``, if the masks do not fit the parameters.

    >>> tx = frozen(optax.sgd(1.0), {"w": jnp.array([True, False])})
    >>> params = {"w": jnp.array([1.0, 0.0])}
    >>> updates, _ = tx.update({"w": jnp.array([0.5, 0.5])}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["w"])
    [0.5 0. ]
    """
    check_tx("tx", tx)
    tx = optax.with_extra_args_support(tx)

    def init(params):
        check_masks(masks, params)
        copies = jax.tree.map(jnp.copy, masks)  # or a donated state would take the caller's arrays
        return SparsityState(jnp.zeros((), jnp.int32), copies, (), tx.init(params))

    def update(updates, state, params=None, **extra):
        _need_params(params)
        updates, inner = masked_update(tx, state.masks, updates, state.inner, params, extra)
        state = state._replace(step=optax.safe_increment(state.step), inner=inner)
        return zeroed(state.masks, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def mask_of(opt_state: PyTree) -> PyTree:
    """Finds the masks in an optimizer's state, however deep in chains and wrappers.

    Args:
      opt_state: the state of an optimizer that contains :func:`sparsify` or :func:`frozen`.

    Returns:
      The masks, a tree of the structure of the parameters.

    Raises:
      ValueError: unless there is exactly one :class:`SparsityState`.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, SparsityState))
    found = [leaf.masks for leaf in leaves if isinstance(leaf, SparsityState)]
    if len(found) != 1:
        raise ValueError(f"opt_state: expected the state of one sparsify or frozen in it, found {len(found)}")
    return found[0]


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Sets the weights outside the masks to zero. Leaves without a mask stay as they are.

    Args:
      params: the parameters.
      masks: from :func:`mask_of`.

    Returns:
      The parameters with zeros, of the same structure and shapes.

    Raises:
      ValueError: if the masks do not fit the parameters.
    """
    check_masks(masks, params)
    return masked(params, masks)


def sparsity(tree: PyTree) -> dict[str, jax.Array]:
    """Returns the fraction of zeros in each leaf by path, and in all leaves as ``"overall"``: float32.

    Args:
      tree: parameters, whose zeros are counted in all leaves (also in biases, which may be zero by
        chance); or masks, which exist for pruned leaves only.

    Returns:
      path → fraction, a scalar.

    >>> {name: float(value) for name, value in sparsity({"w": jnp.array([0, 0, 1, 2])}).items()}
    {'w': 0.5, 'overall': 0.5}
    """
    leaves = by_path(tree)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "size"):
            raise ValueError(f"tree must hold arrays, got {type(leaf).__name__} at {path}")
    zeros = {path: jnp.sum(leaf == 0) for path, leaf in leaves.items()}
    result = {path: zeros[path].astype(jnp.float32) / leaf.size for path, leaf in leaves.items()}
    total = sum(leaf.size for leaf in leaves.values())
    overall = sum(map(f32, zeros.values()), jnp.float32(0)) / max(total, 1)
    return {**result, "overall": overall}


def report(tree: PyTree) -> str:
    """Makes a table of zeros: path, shape, weights, zeros, and zeros in percent.

    Args:
      tree: parameters; masks; or an optimizer's state, whose masks are shown.

    Returns:
      A text with one line per leaf, for ``print``.
    """
    states = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, SparsityState))
    if any(isinstance(leaf, SparsityState) for leaf in states):
        tree = mask_of(tree)
    rows = [
        (path, "×".join(map(str, leaf.shape)), leaf.size, int(jnp.sum(leaf == 0)))
        for path, leaf in by_path(tree).items()
    ]
    rows.append(("overall", "", sum(row[2] for row in rows), sum(row[3] for row in rows)))
    cells = [("leaf", "shape", "weights", "zeros", "zeros %")] + [
        (path, shape, f"{size:,}", f"{zeros:,}", f"{100 * zeros / max(size, 1):.2f}")
        for path, shape, size, zeros in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i > 1 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )


def _need_params(params: PyTree | None) -> None:
    if params is None:
        raise ValueError("pruning needs the parameters: call update(updates, state, params)")

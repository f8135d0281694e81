"""Logit losses that teach the student to rank the classes as the teacher does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_not_negative
from distill_jax.losses._arguments import both_logits, scalar, valid_classes
from distill_jax.losses._numerics import pair, probability_difference

_PAIRS = 2**22  # number of pairs of classes that are in memory at a time


def ranking_hinge(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    margin: float | ArrayLike | None = None,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Pairwise ranking hinge loss: the mean of max(0, m − (q_k − q_l)) over pairs of classes with p_k > p_l.

    The student learns to put the classes in the teacher's order, by a margin m. With m = p_k − p_l (the
    default) the value is 0 at student = teacher. At the corner of the hinge the derivative is 0.
    Classes with equal teacher logits make no pair, nor does a class that the student or the teacher excludes.
    Pairs are taken in blocks of classes, so memory does not grow with classes².

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      margin: m ≥ 0, a number. None uses the teacher's own difference, p_k − p_l.
      temperature: T > 0, a number, or an array with one axis per axis of the logits, each of
        the same size or 1, and 1 on the class axis.
      axis: the axis of the classes.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: which classes exist.
        ``[1, classes]`` leaves out classes, ``[batch, 1]`` examples, such as padding. A class whose logit is
        −inf does not exist either.

    Returns:
      ``[...]``, a probability, float32 (float64 for float64 input); 0 where no pair counts.

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive, or the margin is negative.

    References:
      Herbrich et al., `Large Margin Rank Boundaries for Ordinal Regression`, 2000, §3; as a loss on
      a teacher's classes: arcee-ai/DistillKit (no paper), which takes the mean over all pairs of the
      batch, and counts a pair only where the probabilities differ by more than 1e-8.

    >>> ranking_hinge(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 0.0]])).item()
    0.0
    >>> f'{ranking_hinge(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.5000'
    """
    if margin is not None:
        check_not_negative("margin", margin)
        margin = scalar("margin", margin, jnp.result_type(float))
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    if margin is None:  # m − (q_k − q_l) is the difference of p − q
        values, short = probability_difference(x), jnp.zeros((), x.q.dtype)
    else:
        values, short = -x.q, margin.astype(x.q.dtype)

    def hinge(difference):
        wanting = short + difference
        return jnp.where(wanting <= 0, 0.0, wanting)  # written so that a NaN shows

    return _mean_over_pairs(hinge, values, teacher_logits, x.has_q & x.has_p, axis)


def ranking_logistic(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Pairwise logistic ranking loss (RankNet): the mean of log(1 + e^(s_l − s_k)) over pairs with t_k > t_l.

    s and t are the logits of student and teacher. Only the *order* of t matters. The value is never zero: it
    falls as the gaps between the student's logits grow. Pairs and memory are as in :func:`ranking_hinge`.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      axis: the axis of the classes.
      where: as in :func:`ranking_hinge`.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input); 0 where no pair counts.

    Raises:
      ValueError: if the shapes differ.

    References:
      Burges et al., `Learning to Rank using Gradient Descent` (RankNet), 2005, Eq. 3 with target
      probability 1; as a loss on a teacher's classes: arcee-ai/DistillKit, as for
      :func:`ranking_hinge`.

    >>> f'{ranking_logistic(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0]]))[0]:.4f}'
    '0.6931'
    """
    student, teacher = both_logits(student_logits, teacher_logits, axis)
    valid = valid_classes(student, where) & valid_classes(teacher, where)
    student = jnp.where(valid, student, 0.0)
    return _mean_over_pairs(lambda difference: jax.nn.softplus(-difference), student, teacher, valid, axis)


def _mean_over_pairs(
    loss: Callable[[Array], Array], values: Array, teacher_logits: ArrayLike, valid: Array, axis: int
) -> Array:
    """Averages loss(v_k − v_l) over the pairs k, l in which the teacher ranks k above l, in blocks of k."""
    values, valid = jnp.moveaxis(values, axis, -1), jnp.moveaxis(valid, axis, -1)
    teacher = jnp.where(valid, jnp.moveaxis(jnp.asarray(teacher_logits), axis, -1), 0.0).astype(values.dtype)
    classes = values.shape[-1]
    block = min(classes, max(1, _PAIRS // max(1, values.size)))
    blocks = -(-classes // block)

    @jax.checkpoint  # or the pairs of all blocks would be kept for the backward pass
    def add(sums, ours):
        v, t, counted = ours
        # "not below": a NaN logit takes part, and shows in the result
        pairs = counted[..., :, None] & valid[..., None, :] & ~(t[..., :, None] <= teacher[..., None, :])
        each = jnp.where(pairs, loss(v[..., :, None] - values[..., None, :]), 0.0)
        return (sums[0] + jnp.sum(each, (-2, -1)), sums[1] + jnp.sum(pairs, (-2, -1))), None

    def split(x):
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * block - classes)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, block), -2, 0)

    parts = tuple(map(split, (values, teacher, valid)))
    sums = jnp.zeros(values.shape[:-1], values.dtype), jnp.zeros(values.shape[:-1], jnp.int32)
    if blocks == 1:
        sums, _ = add(sums, tuple(part[0] for part in parts))
    else:
        sums, _ = jax.lax.scan(add, sums, parts)
    hidden = jnp.any(jnp.isnan(teacher), -1)  # the order of a NaN is unknown
    return jnp.where(hidden, jnp.nan, sums[0] / jnp.maximum(sums[1], 1))

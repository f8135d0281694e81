"""Logit losses that teach the student to rank the classes as the teacher does."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax.losses._numerics import Pair, pair, probability_difference, to_float


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
    The loss needs memory for classes² values per example.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      margin: m, a number. None uses the teacher's own difference, p_k − p_l.
      temperature: T > 0, a scalar, or an array that broadcasts to the logits, with size 1 on the class
        axis.
      axis: the axis of the classes.
      where: ``bool``, broadcastable to the logits: which classes exist. A class whose logit is −inf does
        not exist either.

    Returns:
      ``[...]``, a probability, float32 (float64 for float64 input); 0 where no pair counts.

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive.

    References:
      Herbrich et al., `Large Margin Rank Boundaries for Ordinal Regression`, 2000, §3; as a loss on
      a teacher's classes: arcee-ai/DistillKit (no paper), which takes the mean over all pairs of the
      batch, and counts a pair only where the probabilities differ by more than 1e-8.

    >>> ranking_hinge(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 0.0]])).item()
    0.0
    >>> f'{ranking_hinge(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.5000'
    """
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    if margin is None:
        short = _between(probability_difference(x), axis)
    else:
        short = -_between(jnp.where(x.has_q, jnp.exp(x.log_q), 0.0), axis) + margin
    hinge = jnp.where(short <= 0, 0.0, short)  # written so that a NaN shows
    return _mean_over_pairs(hinge, teacher_logits, x, axis)


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
    x = pair(student_logits, teacher_logits, 1.0, axis, where)
    student = jnp.where(x.has_q & x.has_p, to_float(student_logits), 0.0)
    return _mean_over_pairs(jax.nn.softplus(-_between(student, axis)), teacher_logits, x, axis)


def _between(values: Array, axis: int) -> Array:
    """Computes v_k − v_l, ``[..., k, l]``."""
    values = jnp.moveaxis(values, axis, -1)
    return values[..., :, None] - values[..., None, :]


def _mean_over_pairs(values: Array, teacher_logits: ArrayLike, x: Pair, axis: int) -> Array:
    """Averages over the pairs k, l in which the teacher ranks k above l."""
    valid = jnp.moveaxis(x.has_q & x.has_p, axis, -1)
    teacher = jnp.moveaxis(to_float(teacher_logits), axis, -1)
    counts = valid[..., :, None] & valid[..., None, :]
    # "not below": a NaN logit takes part, and shows in the result
    counts &= ~(teacher[..., :, None] <= teacher[..., None, :])
    total = jnp.sum(jnp.where(counts, values, 0.0), (-2, -1))
    return total / jnp.maximum(jnp.sum(counts, (-2, -1)), 1)

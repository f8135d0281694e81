"""Logits without scale, and relations within a batch of predictions.

All leading axes of the logits, ``[..., classes]``, together are the batch. An example counts where at
least one of its classes is valid: so ``where=counted[:, None]`` leaves whole examples out (they have
value 0, take part in no relation and get no gradient), and ``where`` over classes leaves classes out.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses._numerics import (
    Pair,
    check_positive,
    kl_of,
    log_softmax,
    pair,
    probability_difference,
    to_float,
    valid_classes,
)
from distill_jax.losses._space import matmul

Array = jax.Array


def standardize(
    logits: Any, *, temperature: Any = 1.0, ddof: int = 0, axis: int = -1, where: Any = None
) -> Array:
    """Logit standardisation: (z − mean z)/(T·σ(z)), before any logit loss.

    Frees the student from matching the teacher's scale: ``kl(standardize(student),
    standardize(teacher), temperature=T)`` is the paper's loss, its factor T² included. A row whose
    logits are all equal (σ = 0) becomes exactly 0, with gradient 0.

    Args:
      logits: ``[..., classes]``, any float dtype.
      temperature: T > 0, a scalar, or an array that broadcasts, with a class axis of 1.
      ddof: σ² is the sum of squares over (classes − ddof): 0 in the paper, 1 in its code.
      axis: the axis of the classes.
      where: ``bool``, broadcastable to the logits: which classes exist. A logit of −inf says the
        same of one class.

    Returns:
      As ``logits``, no unit, float32 (float64 for float64 input); −inf where a class is not valid.

    Raises:
      ValueError: if the temperature is not positive, or ``ddof`` is negative.

    References:
      Sun et al., `Logit Standardization in Knowledge Distillation`, 2024, Algorithm 1. The authors'
      code uses ``ddof=1`` (with 10 classes its logits are 5 % smaller than the paper's, and the loss
      about 11 %) and adds 1e-7 to σ; torchdistill does the same, and drops T² where its α is 0.

    >>> print(standardize(jnp.array([[1.0, 3.0], [2.0, 2.0]])))
    [[-1.  1.]
     [ 0.  0.]]
    """
    logits = to_float(logits)
    check_positive("temperature", temperature)
    if ddof < 0:
        raise ValueError(f"ddof must be 0 or a positive integer, got {ddof}")
    valid = valid_classes(logits, where)
    safe = jnp.where(valid, logits, 0.0)
    peak = jnp.max(safe, axis, keepdims=True, where=valid, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
    free = jnp.maximum(jnp.sum(valid, axis, keepdims=True) - ddof, 1)
    unit, _ = _unit(safe - peak, valid, axis, free)
    return jnp.where(valid, unit / to_float(temperature), -jnp.inf)


def dist(
    student_logits: Any,
    teacher_logits: Any,
    *,
    beta: Any = 1.0,
    gamma: Any = 1.0,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """DIST: β·(1 − ρ over the classes of each example) + γ·(1 − ρ over the examples of each class).

    ρ is Pearson's correlation of p and q. With a and b the centred vectors at length 1,
    1 − ρ = ½·Σ (a − b)²: it is summed in this form, which keeps its digits where student and teacher
    almost agree, and gives each example its share of the second term, so that the mean over the
    examples is the paper's loss. A vector without variation has no correlation: where one of the two
    is constant, 1 − ρ is 1, where both are, 0, and the gradient is 0 in both cases (so a batch of one
    example has no second term).

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      beta: weight of the first term, between classes.
      gamma: weight of the second term, within classes.
      temperature: T > 0 of both softmaxes, a scalar, or an array that broadcasts, with a class axis
        of 1.
      axis: the axis of the classes.
      where: ``bool``, broadcastable to the logits: which classes of which examples exist. A logit
        of −inf has probability 0, or does not exist where both are −inf.

    Returns:
      ``[...]``, no unit, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive.

    References:
      Huang et al., `Knowledge Distillation from A Stronger Teacher`, 2022, Eq. 7 and 9 (their sum,
      Eq. 10). The authors' code, torchdistill and mmrazor multiply by T², though ρ does not fall
      with T, and add 1e-8 to a product of norms that is often near it: values move by up to 2e-4.
      They give 1 to two constant vectors.

    >>> x = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    >>> f'{dist(x, x[::-1]).mean():.4f}'
    '3.7630'
    """
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    shape = jnp.moveaxis(x.has_q, axis, -1).shape
    # Student and teacher as one array: what is equal in both is rounded alike.
    has = jnp.stack([_rows(x.has_q, axis), _rows(x.has_p, axis)])
    exists = has[0] | has[1]
    logits = jnp.stack([_rows(to_float(z), axis) for z in (student_logits, teacher_logits)])
    logits = jnp.where(has, logits, 0.0) / _per_row(temperature, axis, x.has_q.shape)
    counted = jnp.any(exists, 1)
    # Between classes: probabilities up to a factor and a constant, which ρ does not see.
    (a, b), (flat_a, flat_b) = _unit(_relative(logits, has, 2), exists[None], 2)
    between = jnp.sum(jnp.square(a - b), 1) / 2
    flat_a, flat_b = flat_a[:, 0], flat_b[:, 0]
    value = beta * jnp.where(flat_a == flat_b, jnp.where(flat_a, 0.0, between), 1.0)
    # Within a class: the same along the batch, of log-probabilities.
    (a, b), (flat_a, flat_b) = _unit(_relative(log_softmax(logits, has, 2), has, 1), exists[None], 1)
    members = jnp.sum(exists, 0, keepdims=True)
    number = jnp.sum(counted)
    per_member = number / jnp.maximum(members, 1)
    within = number * jnp.square(a - b) / 2
    within = jnp.where(flat_a == flat_b, jnp.where(flat_a, 0.0, within), per_member)
    used = jnp.maximum(jnp.sum(members > 0), 1)
    value += gamma * jnp.sum(jnp.where(exists, within, 0.0), 1) / used
    return jnp.where(counted, value, 0.0).reshape(shape[:-1])


def mlkd(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance_weight: Any = 1.0,
    batch_weight: Any = 1.0,
    class_weight: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Multi-level distillation: Σ_T of T²·KL, of relations of examples, and of relations of classes.

    With P and Q ``[batch, classes]`` the softened predictions of teacher and student, the sum over
    the temperatures of

    - T²·KL(p‖q) of each example,
    - ‖PPᵀ − QQᵀ‖²/batch: which examples are predicted alike,
    - ‖PᵀP − QᵀQ‖²/classes: which classes are predicted together.

    An example's value holds its row of the second term, and the whole of the third, which belongs
    to no example: so the mean over the examples is the paper's loss. The second term's memory is
    batch², the third grows with batch² in value.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      temperatures: several T > 0.
      instance_weight: weight of the first term.
      batch_weight: weight of the second.
      class_weight: weight of the third.
      axis: the axis of the classes.
      where: ``bool``, broadcastable to the logits: which classes of which examples exist. A logit
        of −inf says the same of one class.

    Returns:
      ``[...]``, float32 (float64 for float64 input). +inf where the student excludes a class that
      the teacher does not.

    Raises:
      ValueError: if the shapes differ, or a temperature is not positive, or there is none.

    References:
      Jin, Wang, Lin, `Multi-Level Logit Distillation`, 2023, §3.2–3.4 (there without T²). In the
      authors' code the masks for confident examples only scale their terms (the losses are reduced
      before the mask is applied), the second and third term of the strongly augmented view are
      computed and dropped, and two of its five temperatures see the weak view again. Their whole
      loss is the sum of this over both views, with cross-entropy.

    >>> x = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    >>> f'{mlkd(x, x[::-1], temperatures=(1.0,)).mean():.4f}'
    '1.8006'
    """
    if not len(temperatures):
        raise ValueError("temperatures must hold at least one, got none")
    for temperature in temperatures:
        check_positive("temperature", temperature)

    def at_one(temperature):
        x = pair(student_logits, teacher_logits, temperature, axis, where)
        x = Pair(*(_rows(a, axis) for a in x))
        q = jnp.where(x.has_q, jnp.exp(x.log_q), 0.0)
        p = jnp.where(x.has_p, jnp.exp(x.log_p), 0.0)
        gap = probability_difference(x)
        exists = x.has_q | x.has_p
        used = jnp.maximum(jnp.sum(jnp.any(exists, 0)), 1)
        instance = jnp.square(temperature) * kl_of(x.log_p, x.log_q, x.log_ratio, x.has_p, x.has_q, 1)
        # PPᵀ − QQᵀ = (P − Q)Pᵀ + Q(P − Q)ᵀ loses nothing where the two almost agree
        examples = matmul(gap, p.T) + matmul(q, gap.T)
        classes = matmul(gap.T, p) + matmul(q.T, gap)
        value = (
            instance_weight * instance
            + batch_weight * jnp.sum(jnp.square(examples), 1)
            + class_weight * jnp.sum(jnp.square(classes)) / used
        )
        return jnp.where(jnp.any(exists, 1), value, 0.0)

    dtype = jnp.result_type(to_float(student_logits), to_float(teacher_logits))
    values = jnp.sum(jax.vmap(at_one)(jnp.asarray(temperatures, dtype)), 0)
    shape = jnp.moveaxis(jnp.asarray(student_logits), axis, -1).shape
    return values.reshape(shape[:-1])


# --- parts -----------------------------------------------------------------------------------


def _rows(values: Array, axis: int) -> Array:
    """``[batch, classes]``: all leading axes together are the batch."""
    values = jnp.moveaxis(values, axis, -1)
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def _per_row(temperature: Any, axis: int, shape: tuple[int, ...]) -> Array:
    """A scalar, or ``[batch, 1]``."""
    temperature = to_float(temperature)
    if temperature.ndim:
        axis = axis % len(shape)
        shape = (*shape[:axis], 1, *shape[axis + 1 :])
        temperature = _rows(jnp.broadcast_to(temperature, shape), axis)
    return temperature


def _relative(logs: Array, has: Array, axis: int) -> Array:
    """e^(l − max l) − 1 along ``axis``: exactly 0 where all are equal; −1 where there is none."""
    peak = jnp.max(logs, axis, keepdims=True, where=has, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
    return jnp.where(has, jnp.expm1(jnp.where(has, logs - peak, 0.0)), -1.0)


def _unit(values: Array, mask: Array, axis: int, free: Any = 1) -> tuple[Array, Array]:
    """Values less their mean, of sum of squares ``free``, or 0 where constant; and whether they are."""
    values = jnp.where(mask, values, 0.0)
    count = jnp.maximum(jnp.sum(mask, axis, keepdims=True), 1)
    centred = jnp.where(mask, values - jnp.sum(values, axis, keepdims=True) / count, 0.0)
    # The length is taken of values of size 1; a constant factor does not change the result.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(centred), axis, keepdims=True))
    flat = size == 0
    centred = jnp.where(flat, 0.0, centred) / jnp.where(flat, 1.0, size)
    square = jnp.sum(jnp.square(centred), axis, keepdims=True)
    return centred / jnp.sqrt(jnp.where(flat, 1.0, square / free)), flat

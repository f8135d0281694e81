"""Logit losses that ignore the scale of the logits, or that relate the examples of a batch to each other.

All leading axes of the logits ``[..., classes]`` together are the batch. An example counts if at least one
of its classes exists. So ``where=counted[:, None]`` leaves out whole examples (they have value 0, no
gradient, and no influence on other examples), and a ``where`` over classes leaves out classes.
"""

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_positive
from distill_jax.losses._arguments import (
    both_logits,
    logits_of,
    mask_of,
    temperature_of,
    valid_classes,
    weight,
)
from distill_jax.losses._numerics import compare, divergence, log_softmax, probability_difference, soften
from distill_jax.losses._space import matmul


def standardise(
    logits: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    ddof: int = 0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Logit standardisation (LSKD): (z − mean z)/(T·σ(z)), applied to logits before any logit loss.

    With it the student need not match the scale of the teacher's logits. The paper's loss, factor T²
    included, is ``kl(standardise(student), standardise(teacher), temperature=T)``. A row whose logits are all
    equal (σ = 0) becomes exactly 0, with gradient 0.

    Args:
      logits: ``[..., classes]``, any float dtype.
      temperature: T > 0, a number, or an array with one axis per axis of the logits, each of
        the same size or 1, and 1 on the class axis.
      ddof: σ² is the sum of squares divided by (classes − ddof). The paper has 0, its code 1.
      axis: the axis of the classes.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: which classes exist.
        ``[1, classes]`` leaves out classes, ``[batch, 1]`` examples, such as padding. A class whose logit is
        −inf does not exist either.

    Returns:
      The shape of ``logits``, no unit, float32 (float64 for float64 input); −inf where a class does not
      exist.

    Raises:
      ValueError: if the temperature is not positive, or ``ddof`` is negative or not below the number of classes.

    References:
      Sun et al., `Logit Standardization in Knowledge Distillation`, 2024, Algorithm 1. The authors'
      code uses ``ddof=1`` (with 10 classes its logits are 5 % smaller than the paper's, and the loss
      is about 11 % smaller) and adds 1e-7 to σ; torchdistill does the same, and drops T² where its α is 0.

    >>> print(standardise(jnp.array([[1.0, 3.0], [2.0, 2.0]])))
    [[-1.  1.]
     [ 0.  0.]]
    """
    logits = logits_of("logits", logits, axis)
    temperature = temperature_of(temperature, logits, axis)
    check_count("ddof", ddof, least=0)
    if ddof >= logits.shape[axis]:
        raise ValueError(f"ddof must be below the number of classes, {logits.shape[axis]}, got {ddof}")
    valid = valid_classes(logits, where)
    safe = jnp.where(valid, logits, 0.0)
    peak = jnp.max(safe, axis, keepdims=True, where=valid, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
    free = jnp.maximum(jnp.sum(valid, axis, keepdims=True) - ddof, 1)
    unit, _ = _unit(safe - peak, valid, axis, free)
    return jnp.where(valid, unit / temperature, -jnp.inf)


def dist(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: float | ArrayLike = 1.0,
    gamma: float | ArrayLike = 1.0,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """DIST (stronger teacher): β·(1 − ρ over each example's classes) + γ·(1 − ρ over each class's examples).

    ρ is Pearson's correlation of p and q, the probabilities of teacher and student. It is computed as
    1 − ρ = ½·Σ (a − b)², where a and b are the two vectors less their mean, divided by their length. This
    form is accurate where student and teacher almost agree, and it gives each example its share of the second
    term, so that the mean over the examples is the paper's loss. A constant vector has no correlation: 1 − ρ
    is taken as 1 where one of the two is constant and as 0 where both are, and the gradient is 0. So a batch
    of one example has no second term.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      beta: weight of the first term, the correlation between classes.
      gamma: weight of the second term, the correlation within a class.
      temperature: T > 0 of both softmaxes, a number, or an array with one axis per axis of the logits, each of
        the same size or 1, and 1 on the class axis.
      axis: the axis of the classes.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: which classes of
        which examples exist. A class whose
        logit is −inf for only one of the two has probability 0 there; if it is −inf for both, it does not
        exist.

    Returns:
      ``[...]``, no unit, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive.

    References:
      Huang et al., `Knowledge Distillation from A Stronger Teacher`, 2022, Eq. 7 and 9 (their sum is
      Eq. 10). The authors' code, torchdistill and mmrazor multiply by T², although ρ does not fall
      with T, and add 1e-8 to a product of norms that is often near it: values change by up to 2e-4.
      They give 1 for two constant vectors.

    >>> x = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    >>> f'{dist(x, x[::-1]).mean():.4f}'
    '3.7630'
    """
    student, teacher = both_logits(student_logits, teacher_logits, axis)
    beta, gamma = weight("beta", beta, student, axis), weight("gamma", gamma, student, axis)
    shape = jnp.moveaxis(student, axis, -1).shape
    temperature = temperature_of(temperature, student, axis)
    if temperature.ndim:
        temperature = jnp.broadcast_to(jnp.moveaxis(temperature, axis, -1), (*shape[:-1], 1)).reshape(-1, 1)
    # Student and teacher are one array, so that equal values are rounded in the same way.
    has = jnp.stack([_rows(valid_classes(z, where), axis) for z in (student, teacher)])
    exists = has[0] | has[1]
    logits = jnp.stack([_rows(z, axis) for z in (student, teacher)])
    logits = jnp.where(has, logits, 0.0) / temperature
    counted = jnp.any(exists, 1)
    # Between classes: probabilities up to a factor and a constant, which do not change ρ.
    (a, b), (flat_a, flat_b) = _unit(_relative(logits, has, 2), exists[None], 2)
    between = jnp.sum(jnp.square(a - b), 1) / 2
    flat_a, flat_b = flat_a[:, 0], flat_b[:, 0]
    between = jnp.where(flat_a == flat_b, jnp.where(flat_a, 0.0, between), 1.0).reshape(shape[:-1])
    # Within a class: the same for log-probabilities, along the batch.
    (a, b), (flat_a, flat_b) = _unit(_relative(log_softmax(logits, has, 2), has, 1), exists[None], 1)
    members = jnp.sum(exists, 0, keepdims=True)
    number = jnp.sum(counted)
    per_member = (number / jnp.maximum(members, 1)).astype(student.dtype)
    within = number * jnp.square(a - b) / 2
    within = jnp.where(flat_a == flat_b, jnp.where(flat_a, 0.0, within), per_member)
    used = jnp.maximum(jnp.sum(members > 0), 1)
    within = jnp.sum(jnp.where(exists, within, 0.0), 1).reshape(shape[:-1]) / used
    value = beta * between + gamma * within
    return jnp.where(counted.reshape(shape[:-1]), value, 0.0)


def mlkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
    instance_weight: float | ArrayLike = 1.0,
    batch_weight: float | ArrayLike = 1.0,
    class_weight: float | ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Multi-level logit distillation (MLKD): KL, relations of examples, and relations of classes.

    P and Q are the softened predictions ``[batch, classes]`` of teacher and student. The loss is the sum over
    the temperatures of

    - T²·KL(p‖q) of each example,
    - ‖PPᵀ − QQᵀ‖²/batch: which examples get similar predictions,
    - ‖PᵀP − QᵀQ‖²/classes: which classes are predicted together.

    An example's value holds its row of the second term and the whole of the third term, which belongs to
    no single example. So the mean over the examples is the paper's loss. The second term needs memory for
    batch² numbers, and the value of the third grows with batch².

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      temperatures: one or more T > 0.
      instance_weight: weight of the first term, at least 0.
      batch_weight: weight of the second term, at least 0.
      class_weight: weight of the third term, at least 0.
      axis: the axis of the classes.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: which classes of
        which examples exist. A class whose
        logit is −inf does not exist either.

    Returns:
      ``[...]``, float32 (float64 for float64 input). +inf where the student excludes a class that
      the teacher does not.

    Raises:
      ValueError: if the shapes differ, a temperature is not positive, or there is no temperature.

    References:
      Jin, Wang, Lin, `Multi-Level Logit Distillation`, 2023, §3.2–3.4 (there without T²). In the
      authors' code the masks for confident examples only scale their terms (the losses are reduced
      before the mask is applied), the second and third term of the strongly augmented view are
      computed and dropped, and two of its five temperatures see the weak view again. Their whole
      loss is the sum of this over both views, plus cross-entropy.

    >>> x = jnp.array([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    >>> f'{mlkd(x, x[::-1], temperatures=(1.0,)).mean():.4f}'
    '1.8006'
    """
    if isinstance(temperatures, str) or not isinstance(temperatures, Sequence | np.ndarray | Array):
        raise ValueError(f"temperatures must be a sequence of numbers, got {temperatures!r}")
    if np.ndim(temperatures) == 0 or len(temperatures) == 0:
        raise ValueError(f"temperatures must hold at least one temperature, got {temperatures!r}")
    student, teacher = both_logits(student_logits, teacher_logits, axis)
    for temperature in temperatures:
        check_positive("temperature", temperature)
    given = {"instance_weight": instance_weight, "batch_weight": batch_weight, "class_weight": class_weight}
    weights = [weight(*each, student, axis) for each in given.items()]
    shape = jnp.moveaxis(student, axis, -1).shape[:-1]
    exists = _rows(mask_of(where, student), axis)
    student, teacher = _rows(student, axis), _rows(teacher, axis)

    def at_one(temperature):
        softened = soften(student, teacher, temperature, 1, exists)
        x = compare(softened, 1)
        gap, some = probability_difference(x), x.has_q | x.has_p
        instance = jnp.square(temperature) * divergence("kl", softened, 1)
        # PPᵀ − QQᵀ = (P − Q)Pᵀ + Q(P − Q)ᵀ loses nothing where the two almost agree
        examples = jnp.square(matmul(gap, x.p.T) + matmul(x.q, gap.T))
        classes = jnp.sum(jnp.square(matmul(gap.T, x.p) + matmul(x.q.T, gap)))
        classes /= jnp.maximum(jnp.sum(jnp.any(some, 0)), 1)
        terms = instance, jnp.sum(examples, 1), jnp.broadcast_to(classes, instance.shape)
        return [jnp.where(jnp.any(some, 1), term, 0.0).reshape(shape) for term in terms]

    terms = [jnp.sum(term, 0) for term in jax.vmap(at_one)(jnp.asarray(temperatures, student.dtype))]
    return sum(map(operator.mul, weights, terms), jnp.zeros(shape, student.dtype))


# --- parts -----------------------------------------------------------------------------------


def _rows(values: Array, axis: int) -> Array:
    """Reshapes to ``[batch, classes]``: all leading axes together are the batch."""
    values = jnp.moveaxis(values, axis, -1)
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def _relative(logs: Array, has: Array, axis: int) -> Array:
    """Computes e^(l − max l) − 1 along ``axis``: exactly 0 where all are equal, −1 with no class."""
    peak = jnp.max(logs, axis, keepdims=True, where=has, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(peak == -jnp.inf, 0.0, peak))
    return jnp.where(has, jnp.expm1(jnp.where(has, logs - peak, 0.0)), -1.0)


def _unit(values: Array, mask: Array, axis: int, free: ArrayLike = 1) -> tuple[Array, Array]:
    """Centres values and scales them to a sum of squares ``free``; returns 0 and True for constant values."""
    values = jnp.where(mask, values, 0.0)
    count = jnp.maximum(jnp.sum(mask, axis, keepdims=True), 1)
    centred = jnp.where(mask, values - jnp.sum(values, axis, keepdims=True) / count, 0.0)
    # Scaled to size 1 before squaring; a constant factor does not change the result.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(centred), axis, keepdims=True, initial=0.0))
    flat = size == 0
    centred = jnp.where(flat, 0.0, centred) / jnp.where(flat, 1.0, size)
    square = jnp.sum(jnp.square(centred), axis, keepdims=True)
    return centred / jnp.sqrt(jnp.where(flat, 1.0, square / free)), flat

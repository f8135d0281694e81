"""Shared numerics of the losses: masked log-softmax, accurate divergences.

A class exists where ``where`` is true and its logit is not −inf. Write p for the teacher's and q for the
student's probabilities, and d = log p − log q. A divergence is summed as Σ p·(e^(−d) − 1 + d), which
equals Σ p·d because Σ q = Σ p = 1. All its terms are ≥ 0, so a small divergence is not lost in the
rounding of terms of both signs. d itself is computed from the *difference* of the logits. Together they
keep values and gradients accurate to float32 even where student and teacher almost agree, or where the
temperature is high.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_positive, warn_if_probabilities

Loss = Callable[..., Array]

# Below this distance between logits d comes from their difference; far above it, log1p(Σ q·(e^δ − 1))
# would itself cancel.
_NEAR = 2.0


def to_float(x: ArrayLike) -> Array:
    """Converts to float32, or keeps float64."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def valid_classes(logits: Array, where: ArrayLike | None) -> Array:
    """Says which classes exist: those of ``where`` whose logit is above −inf."""
    finite = logits != -jnp.inf  # a NaN is valid, so that it shows in the result
    return finite if where is None else finite & where


def log_softmax(logits: Array, valid: Array, axis: int) -> Array:
    """Computes log-probabilities; 0 (not −inf) at classes that do not exist, so their gradient is zero."""
    safe = jnp.where(valid, logits, 0.0)
    peak = jax.lax.stop_gradient(jnp.max(safe, axis, keepdims=True, where=valid, initial=-jnp.inf))
    shifted = safe - jnp.where(peak == -jnp.inf, 0.0, peak)  # −inf: no class of the row is valid
    total = jnp.sum(jnp.exp(shifted), axis, keepdims=True, where=valid)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(valid, shifted - log_total, 0.0)


class Pair(NamedTuple):
    """Student (q) and teacher (p) over the same classes; 0 at classes that do not exist."""

    log_q: Array
    log_p: Array
    log_ratio: Array  # log p − log q where both exist, else 0
    has_q: Array
    has_p: Array


def pair(
    student: ArrayLike, teacher: ArrayLike, temperature: float | ArrayLike, axis: int, where: ArrayLike | None
) -> Pair:
    """Compares the logits that a user gave: warns of probabilities, then calls :func:`compare`."""
    warn_if_probabilities("student_logits", student, axis=axis)
    warn_if_probabilities("teacher_logits", teacher, axis=axis)
    return compare(student, teacher, temperature, axis, where)


def compare(
    student: ArrayLike, teacher: ArrayLike, temperature: float | ArrayLike, axis: int, where: ArrayLike | None
) -> Pair:
    """Checks the logits of both and the temperature, softens the logits, and compares them."""
    student, teacher = to_float(student), to_float(teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, got {student.shape} and {teacher.shape}"
        )
    check_positive("temperature", temperature)
    temperature = to_float(temperature)
    has_q, has_p = valid_classes(student, where), valid_classes(teacher, where)
    # Masked before the division, or the gradient for the temperature would be −inf·0
    student, teacher = jnp.where(has_q, student, 0.0), jnp.where(has_p, teacher, 0.0)
    log_q = log_softmax(student / temperature, has_q, axis)
    log_p = log_softmax(teacher / temperature, has_p, axis)
    both = has_q & has_p
    p = jnp.where(has_p, jnp.exp(log_p), 0.0)
    q = jnp.where(has_q, jnp.exp(log_q), 0.0)
    # log p − log q = δ − log Σ q·e^δ with δ = (teacher − student) / T, for any constant added to δ.
    # Centred on its mean, δ is small where the two agree, and nothing cancels.
    delta = jnp.where(both, teacher - student, 0.0) / temperature
    delta -= jax.lax.stop_gradient(jnp.sum(p * delta, axis, keepdims=True))
    near = jnp.all((has_q == has_p) & (jnp.abs(jnp.where(both, delta, 0.0)) < _NEAR), axis, keepdims=True)
    delta = jnp.where(near & both, delta, 0.0)
    accurate = delta - jnp.log1p(jnp.sum(q * jnp.expm1(delta), axis, keepdims=True))
    log_ratio = jnp.where(both, jnp.where(near, accurate, log_p - log_q), 0.0)
    return Pair(log_q, log_p, log_ratio, has_q, has_p)


def probability_difference(x: Pair) -> Array:
    """Computes p − q per class from log p − log q, so that it is accurate where the two almost agree."""
    p = jnp.where(x.has_p, jnp.exp(x.log_p), 0.0)
    q = jnp.where(x.has_q, jnp.exp(x.log_q), 0.0)
    above = x.log_ratio > 0
    down = jnp.expm1(jnp.where(above, -x.log_ratio, 0.0))
    up = jnp.expm1(jnp.where(above, 0.0, x.log_ratio))
    return jnp.where(x.has_p & x.has_q, jnp.where(above, -p * down, q * up), p - q)


def excess(d: Array) -> Array:
    """Computes e^(−d) − 1 + d for |d| < 1/2 by its series, because the direct formula cancels."""
    series = jnp.full_like(d, 1 / 10)
    for k in range(9, 2, -1):
        series = (1 - d * series) / k
    return d * d * (1 - d * series) / 2


def divergence_terms(log_a: Array, log_ratio: Array, a: Array, b: Array) -> Array:
    """Computes the terms of KL(a‖b), all ≥ 0, where both exist, from log a, log a − log b, a and b."""
    small = jnp.abs(log_ratio) < 0.5
    near = a * excess(jnp.where(small, log_ratio, 0.0))
    # a is taken out of the product at zero, so that no 0·∞ comes of an infinite ratio
    far = jnp.where(a > 0, a * log_ratio, 0.0) - a + b
    return jnp.where(small, near, far)


def kl_of(log_a: Array, log_b: Array, log_ratio: Array, has_a: Array, has_b: Array, axis: int) -> Array:
    """Computes KL(a‖b) by :func:`divergence_terms`; +inf where b excludes a class that a does not."""
    a = jnp.where(has_a, jnp.exp(log_a), 0.0)
    b = jnp.where(has_b, jnp.exp(log_b), 0.0)
    terms = divergence_terms(log_a, log_ratio, a, b)
    terms = jnp.where(has_a & has_b, terms, jnp.where(has_b, b, 0.0))
    impossible = jnp.any(has_a & ~has_b & (a > 0), axis)  # b is 0 where a is not
    return jnp.where(impossible, jnp.inf, jnp.sum(terms, axis))


def scale(temperature: float | ArrayLike, values: Array, axis: int) -> Array:
    """Computes T²·values. An array of temperatures, ``[..., 1]``, loses its class axis."""
    temperature = to_float(temperature)
    if temperature.ndim:
        temperature = jnp.squeeze(temperature, axis)
    return jnp.square(temperature) * values

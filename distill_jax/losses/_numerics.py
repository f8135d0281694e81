"""What the losses are computed with: checks, masked log-softmax, accurate divergences.

A class is *valid* where ``where`` is true and the logit is not −inf. Writing p for the teacher's and
q for the student's probabilities and d = log p − log q, divergences are summed as Σ p·(e^(−d) − 1 + d).
This equals Σ p·d, since Σ q = Σ p = 1, but has only terms ≥ 0: a small divergence is not lost in the
rounding of terms of both signs. Together with d computed from the *difference* of logits, values and
gradients keep float32's relative accuracy even where student and teacher almost agree, or at a high
temperature.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Below this distance between logits d comes from their difference; far above it, log1p(Σ q·(e^δ − 1))
# would itself cancel.
_NEAR = 2.0


def to_float(x: Any) -> Array:
    """An array of float32, or of float64 where ``x`` is."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_positive(name: str, value: Any) -> None:
    """Raises ``ValueError`` if a concrete ``value`` is not a positive, finite number."""
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value, np.float64)
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ``ValueError`` if a concrete ``value`` lies outside [0, 1]."""
    if isinstance(value, jax.core.Tracer):
        return
    array = np.asarray(value, np.float64)
    if not ((array >= 0).all() and (array <= 1).all()):
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_fractions(values: Mapping[str, Any]) -> None:
    """As :func:`check_fraction` for several names and values: one error names all that are wrong."""
    wrong = []
    for name, value in values.items():
        try:
            check_fraction(name, value)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(wrong))


def takes(function: Callable[..., Any], name: str) -> bool:
    """Says whether a function names such an argument: which options a loss can be given."""
    return name in inspect.signature(function).parameters


def valid_classes(logits: Array, where: Any) -> Array:
    """Which classes exist: ``where``, and a logit above −inf."""
    finite = logits != -jnp.inf  # a NaN is valid, so that it shows in the result
    return finite if where is None else finite & where


def log_softmax(logits: Array, valid: Array, axis: int) -> Array:
    """Log-probabilities; 0 (not −inf) at invalid classes, so that gradients there are zero."""
    safe = jnp.where(valid, logits, 0.0)
    peak = jax.lax.stop_gradient(jnp.max(safe, axis, keepdims=True, where=valid, initial=-jnp.inf))
    shifted = safe - jnp.where(peak == -jnp.inf, 0.0, peak)  # −inf: no class of the row is valid
    total = jnp.sum(jnp.exp(shifted), axis, keepdims=True, where=valid)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(valid, shifted - log_total, 0.0)


class Pair(NamedTuple):
    """Student (q) and teacher (p) over the same classes; values at invalid classes are 0."""

    log_q: Array
    log_p: Array
    log_ratio: Array  # log p − log q where both are valid, else 0
    has_q: Array
    has_p: Array


def pair(student: Any, teacher: Any, temperature: Any, axis: int, where: Any) -> Pair:
    """Softens the logits of both and compares them, after checks of shapes and temperature."""
    student, teacher = to_float(student), to_float(teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape, got {student.shape} and {teacher.shape}"
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
    """The difference p − q in each class, from log p − log q: exact where the two almost agree."""
    p = jnp.where(x.has_p, jnp.exp(x.log_p), 0.0)
    q = jnp.where(x.has_q, jnp.exp(x.log_q), 0.0)
    above = x.log_ratio > 0
    down = jnp.expm1(jnp.where(above, -x.log_ratio, 0.0))
    up = jnp.expm1(jnp.where(above, 0.0, x.log_ratio))
    return jnp.where(x.has_p & x.has_q, jnp.where(above, -p * down, q * up), p - q)


def excess(d: Array) -> Array:
    """e^(−d) − 1 + d for |d| < 1/2, by its series: directly, it would cancel to nothing."""
    series = jnp.full_like(d, 1 / 10)
    for k in range(9, 2, -1):
        series = (1 - d * series) / k
    return d * d * (1 - d * series) / 2


def divergence_terms(log_a: Array, log_ratio: Array, a: Array, b: Array) -> Array:
    """Terms of KL(a‖b) ≥ 0 where both are valid, from log a, log a − log b, a and b."""
    small = jnp.abs(log_ratio) < 0.5
    near = a * excess(jnp.where(small, log_ratio, 0.0))
    # a is taken out of the product at zero, so that no 0·∞ comes of an infinite ratio
    far = jnp.where(a > 0, a * log_ratio, 0.0) - a + b
    return jnp.where(small, near, far)


def kl_of(log_a, log_b, log_ratio, has_a, has_b, axis) -> Array:
    """KL(a‖b) by :func:`divergence_terms`; +inf where b excludes a class that a does not."""
    a = jnp.where(has_a, jnp.exp(log_a), 0.0)
    b = jnp.where(has_b, jnp.exp(log_b), 0.0)
    terms = divergence_terms(log_a, log_ratio, a, b)
    terms = jnp.where(has_a & has_b, terms, jnp.where(has_b, b, 0.0))
    impossible = jnp.any(has_a & ~has_b & (a > 0), axis)  # b is 0 where a is not
    return jnp.where(impossible, jnp.inf, jnp.sum(terms, axis))


def scale(temperature: Any, values: Array, axis: int) -> Array:
    """T²·values; a temperature an example, ``[..., 1]``, loses its class axis."""
    temperature = to_float(temperature)
    if temperature.ndim:
        temperature = jnp.squeeze(temperature, axis)
    return jnp.square(temperature) * values

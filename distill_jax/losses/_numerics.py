"""Shared numerics of the losses: masked log-softmax and accurate divergences.

A class exists where ``where`` is true and its logit is not −inf. Write p for the teacher's and q for the
student's probabilities, and d = log p − log q. A divergence is summed as Σ p·(e^(−d) − 1 + d), which
equals Σ p·d because Σ q = Σ p = 1. All its terms are ≥ 0, so a small divergence is not lost in the
rounding of terms of both signs. d itself is computed from the *difference* of the logits. Together they
keep values and gradients accurate to float32 even where student and teacher almost agree, or where the
temperature is high.

Derivatives are written in closed form (``custom_jvp``), such as q − p of the Kullback–Leibler divergence,
again from d. So the backward pass keeps the digits too, and needs nothing but p, q and d.

On a CPU, XLA hands sums to YNNPACK together with the products and differences around them, and writes out every
array that enters such a group. Where terms are summed that need several arrays, they end in a ``jnp.where``, which
YNNPACK does not take: then only the terms themselves are written out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from distill_jax.losses._arguments import both_logits, masked, temperature_of

Loss = Callable[..., Array]

_NEAR = 0.5  # where a difference of logarithms is smaller than this, series replace formulas that cancel


# --- softmax ---------------------------------------------------------------------------------


def class_sum(x: Array, axis: int, axis_name: str | None = None, *, keepdims: bool = False) -> Array:
    """Sums over the classes, also over those of other devices."""
    total = jnp.sum(x, axis, keepdims=keepdims)
    return total if axis_name is None else lax.psum(total, axis_name)


def peak(logits: Array, axis: int, axis_name: str | None = None) -> Array:
    """Computes the maximum, a constant to the gradient; 0 where no class exists."""
    top = lax.stop_gradient(jnp.max(logits, axis, keepdims=True))
    if axis_name is not None:
        top = lax.pmax(top, axis_name)
    return jnp.where(top == -jnp.inf, 0.0, top)


def log_total(logits: Array, axis: int, axis_name: str | None = None) -> tuple[Array, Array]:
    """Computes the logits less their maximum, 0 where no class exists, and the logarithm of Σ exp of them."""
    valid = logits != -jnp.inf
    shifted = jnp.where(valid, logits - peak(logits, axis, axis_name), 0.0)
    total = class_sum(jnp.where(valid, jnp.exp(shifted), 0.0), axis, axis_name, keepdims=True)
    return shifted, jnp.log(jnp.where(total > 0, total, 1.0))


def log_softmax(logits: Array, valid: Array, axis: int) -> Array:
    """Computes log-probabilities; 0 (not −inf) at classes that do not exist, so their gradient is zero."""
    shifted, total = log_total(jnp.where(valid, logits, -jnp.inf), axis)
    return jnp.where(valid, shifted - total, 0.0)


class Softened(NamedTuple):
    """Softened logits of student and teacher, each less its maximum; −inf at classes that do not exist."""

    student: Array
    teacher: Array
    difference: Array  # teacher − student where both exist, from the difference of the logits, else 0

    @property
    def has_q(self) -> Array:
        """The classes of the student."""
        return self.student != -jnp.inf

    @property
    def has_p(self) -> Array:
        """The classes of the teacher."""
        return self.teacher != -jnp.inf

    @property
    def swapped(self) -> "Softened":
        """Student and teacher exchanged."""
        return Softened(self.teacher, self.student, -self.difference)


class Pair(NamedTuple):
    """Probabilities of student (q) and teacher (p) over the same classes; 0 at classes that do not exist."""

    q: Array
    p: Array
    log_q: Array
    log_p: Array
    log_ratio: Array  # log p − log q where both exist, else 0
    has_q: Array
    has_p: Array


def soften(
    student: Array,
    teacher: Array,
    temperature: Array,
    axis: int,
    where: ArrayLike | None,
    apart: Array | bool = False,
    axis_name: str | None = None,
) -> Softened:
    """Divides checked logits by the temperature, each less its maximum over the classes that are not ``apart``."""
    student, teacher = masked(student, where), masked(teacher, where)
    has_q, has_p = student != -jnp.inf, teacher != -jnp.inf
    top_q, top_p = (
        peak(x if apart is False else jnp.where(apart, -jnp.inf, x), axis, axis_name)
        for x in (student, teacher)
    )
    # 0 before the division, or the gradient for the temperature would be −inf·0
    x, y = jnp.where(has_q, student - top_q, 0.0), jnp.where(has_p, teacher - top_p, 0.0)
    # Two ways to the difference: between the networks first, or to the maximum first. The smaller numbers
    # lose fewer digits.
    across, along = teacher - student, top_p - top_q
    closer = jnp.abs(across) + jnp.abs(along) < jnp.abs(x) + jnp.abs(y)
    difference = jnp.where(has_q & has_p, jnp.where(closer, across - along, y - x), 0.0)
    return Softened(
        jnp.where(has_q, x / temperature, -jnp.inf),
        jnp.where(has_p, y / temperature, -jnp.inf),
        difference / temperature,
    )


def pair(
    student: ArrayLike, teacher: ArrayLike, temperature: float | ArrayLike, axis: int, where: ArrayLike | None
) -> Pair:
    """Compares the logits that a user gave."""
    student, teacher = both_logits(student, teacher, axis)
    return compare(soften(student, teacher, temperature_of(temperature, student, axis), axis, where), axis)


def compare(x: Softened, axis: int, axis_name: str | None = None) -> Pair:
    """Computes the probabilities of both, their logarithms, and the difference of these."""
    q, p, log_q, log_p, log_ratio = _compare(axis, axis_name, *x)
    return Pair(q, p, log_q, log_p, log_ratio, x.has_q, x.has_p)


class Totals(NamedTuple):
    """Logarithms of Σ exp of the softened logits, 0 where no class exists; the class axis has size 1."""

    log_q: Array
    log_p: Array
    change: Array  # log_p − log_q, accurate also where the two almost agree


def totals(x: Softened, axis: int) -> Totals:
    """Computes the logarithms of Σ exp of the softened logits, and their difference."""
    return Totals(*_totals(axis, *x))


def _sums(axis, axis_name, student, teacher, difference):
    """Computes exp of the softened logits, the sums of these, and log(Σ e^teacher / Σ e^student)."""
    e_q, e_p = jnp.exp(student), jnp.exp(teacher)
    sum_q, sum_p = (class_sum(e, axis, axis_name, keepdims=True) for e in (e_q, e_p))
    sum_q, sum_p = jnp.where(sum_q == 0, 1.0, sum_q), jnp.where(sum_p == 0, 1.0, sum_p)
    # By log1p where the sums almost agree
    has_both = (student != -jnp.inf) & (teacher != -jnp.inf)
    near = has_both & (jnp.abs(difference) < _NEAR)
    grown = jnp.where(near, e_q * (difference + excess(-difference)), e_p - e_q)
    grown = class_sum(grown, axis, axis_name, keepdims=True) / sum_q
    change = jnp.where(jnp.abs(grown) < _NEAR, jnp.log1p(grown), jnp.log(sum_p / sum_q))
    return e_q, e_p, sum_q, sum_p, change


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _totals(axis, student, teacher, difference):
    _, _, sum_q, sum_p, change = _sums(axis, None, student, teacher, difference)
    return jnp.log(sum_q), jnp.log(sum_p), change


def _totals_jvp(axis, primals, tangents):
    result = _totals(axis, *primals)
    q, p, *_ = _compare(axis, None, *primals)
    d_q, d_p = (
        jnp.zeros_like(total)
        if isinstance(tangent, SymbolicZero)
        else jnp.sum(probability * tangent, axis, keepdims=True)
        for total, probability, tangent in zip(result, (q, p), tangents, strict=False)
    )
    return result, (d_q, d_p, d_p - d_q)


_totals.defjvp(_totals_jvp, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _compare(axis, axis_name, student, teacher, difference):
    e_q, e_p, sum_q, sum_p, change = _sums(axis, axis_name, student, teacher, difference)
    has_q, has_p = student != -jnp.inf, teacher != -jnp.inf
    return (
        e_q / sum_q,
        e_p / sum_p,
        jnp.where(has_q, student - jnp.log(sum_q), 0.0),
        jnp.where(has_p, teacher - jnp.log(sum_p), 0.0),
        jnp.where(has_q & has_p, difference - change, 0.0),  # log p − log q
    )


def _compare_jvp(axis, axis_name, primals, tangents):
    q, p, *rest = _compare(axis, axis_name, *primals)
    has_q, has_p = (x != -jnp.inf for x in primals[:2])

    def tangent_of_log(tangent, probability, has):
        if isinstance(tangent, SymbolicZero):
            return jnp.zeros_like(probability)
        mean = class_sum(probability * tangent, axis, axis_name, keepdims=True)
        return jnp.where(has, tangent - mean, 0.0)

    d_q, d_p = tangent_of_log(tangents[0], q, has_q), tangent_of_log(tangents[1], p, has_p)
    return (q, p, *rest), (q * d_q, p * d_p, d_q, d_p, jnp.where(has_q & has_p, d_p - d_q, 0.0))


_compare.defjvp(_compare_jvp, symbolic_zeros=True)


# --- divergences -----------------------------------------------------------------------------


def excess(d: Array) -> Array:
    """Computes e^(−d) − 1 + d for |d| < 1/2 by its series, because the direct formula cancels."""
    terms: list[Any] = [(-1) ** k / math.factorial(k) for k in range(2, 18 if d.dtype == jnp.float64 else 10)]
    power = d
    while len(terms) > 1:  # in pairs: fewer steps that wait for each other than one after another
        terms.extend([0.0] * (len(terms) % 2))
        terms = [low + high * power for low, high in zip(terms[::2], terms[1::2], strict=True)]
        power = power * power
    return d * d * terms[0]


def probability_difference(x: Pair) -> Array:
    """Computes p − q per class from log p − log q, so that it is accurate where the two almost agree."""
    near = x.has_q & x.has_p & (jnp.abs(x.log_ratio) < _NEAR)
    d = jnp.where(near, x.log_ratio, 0.0)
    return jnp.where(near, x.p * (d - excess(d)), x.p - x.q)


def divergence_terms(ratio: Array, a: Array, b: Array) -> Array:
    """Computes the terms of KL(a‖b), all ≥ 0, from log a − log b, a and b."""
    near = jnp.abs(ratio) < _NEAR
    # a is taken out of the product at zero, so that no 0·∞ comes of an infinite ratio
    far = jnp.where(a > 0, a * ratio, 0.0) - a + b
    return jnp.where(near, a * excess(jnp.where(near, ratio, 0.0)), far)


def kl_of(log_a: Array, log_b: Array, log_ratio: Array, has_a: Array, has_b: Array, axis: int) -> Array:
    """Computes KL(a‖b) by :func:`divergence_terms`; +inf where b excludes a class that a does not."""
    a = jnp.where(has_a, jnp.exp(log_a), 0.0)
    b = jnp.where(has_b, jnp.exp(log_b), 0.0)
    terms = jnp.where(has_a & has_b, divergence_terms(log_ratio, a, b), jnp.where(has_b, b, 0.0))
    impossible = jnp.any(has_a & ~has_b & (a > 0), axis)  # b is 0 where a is not
    return jnp.where(impossible, jnp.inf, jnp.sum(terms, axis))


class _Terms(NamedTuple):
    """A divergence Σ terms, and its derivatives for log q and for log p of each class."""

    terms: Array
    by_q: Array
    by_p: Array


def _forbidden(x: Pair, terms: Array) -> Array:
    """Makes +inf of the terms of classes that only p allows."""
    return jnp.where(x.has_p & ~x.has_q & (x.p > 0), jnp.inf, terms)


def _kl_terms(x: Pair, share: Array) -> _Terms:
    """Of KL(p‖q) = Σ p·log(p/q)."""
    near = x.has_q & x.has_p & (jnp.abs(x.log_ratio) < _NEAR)
    d = jnp.where(near, x.log_ratio, 0.0)
    small = excess(d)
    terms = jnp.where(near, x.p * small, x.p * x.log_ratio - x.p + x.q)
    return _Terms(
        _forbidden(x, terms),
        jnp.where(near, x.p * (small - d), x.q - x.p),
        jnp.where(x.has_p, x.p * x.log_ratio, 0.0),
    )


def _cross_terms(x: Pair, share: Array) -> _Terms:
    """Of the cross-entropy −Σ p·log q."""
    terms = -x.p * x.log_q
    return _Terms(_forbidden(x, terms), _kl_terms(x, share).by_q, terms)


def _variation_terms(x: Pair, share: Array) -> _Terms:
    """Of the total variation distance ½·Σ |p − q|, whose derivative is 0 where p = q."""
    gap = probability_difference(x)
    sign = jnp.sign(gap) / 2
    return _Terms(sign * gap, -sign * x.q, sign * x.p)


def _skew_terms(x: Pair, share: Array) -> _Terms:
    """Of KL(p‖m) with m = share·p + (1 − share)·q."""
    m, gap, log_p_m, _ = _mixture(x, share)
    log_p_m = jnp.where(share > 0, log_p_m, x.log_ratio)
    terms = divergence_terms(log_p_m, x.p, m)
    terms = jnp.where(share > 0, terms, _forbidden(x, terms))
    of_q = jnp.where(m > 0, (1 - share) * x.q / m, 0.0)  # the part of m that is q's
    gap = (1 - share) * gap
    by_q = jnp.where(m > 0, -of_q * gap, 0.0)
    return _Terms(terms, by_q, x.p * log_p_m - (1 - of_q) * gap)


def _jensen_shannon_terms(x: Pair, share: Array) -> _Terms:
    """Of share·KL(p‖m) + (1 − share)·KL(q‖m) with m = share·p + (1 − share)·q."""
    _, _, log_p_m, log_q_m = _mixture(x, share)
    near = x.has_q & x.has_p & (jnp.abs(x.log_ratio) < _NEAR)
    a, b = jnp.where(near, log_p_m, 0.0), jnp.where(near, log_q_m, 0.0)
    by_q, by_p = (1 - share) * x.q * log_q_m, share * x.p * log_p_m
    # share·(m − p) + (1 − share)·(m − q) = 0, so both sums may take the form of `divergence_terms`
    small = share * x.p * excess(a) + (1 - share) * x.q * excess(b)
    return _Terms(jnp.where(near, small, by_p + by_q), by_q, by_p)


def _mixture(x: Pair, share: Array) -> tuple[Array, Array, Array, Array]:
    """Computes m = share·p + (1 − share)·q, p − q, log(p/m) and log(q/m).

    The ratios are p/m = 1 + (1 − share)·(p − q)/m and q/m = 1 − share·(p − q)/m. A ratio is raised to the machine
    epsilon at least, so that its logarithm is finite; this changes p·log(p/m) by the order of a rounding.
    """
    m, gap = share * x.p + (1 - share) * x.q, probability_difference(x)
    relative = gap / jnp.where(m == 0, 1.0, m)
    least = jnp.finfo(m.dtype).eps - 1
    log_p_m = jnp.log1p(jnp.maximum((1 - share) * relative, least))
    return m, gap, log_p_m, jnp.log1p(jnp.maximum(-share * relative, least))


_KINDS: dict[str, Callable[[Pair, Array], _Terms]] = {
    "kl": _kl_terms,
    "cross_entropy": _cross_terms,
    "total_variation": _variation_terms,
    "skew": _skew_terms,
    "jensen_shannon": _jensen_shannon_terms,
}


def divergence(
    kind: str, x: Softened, axis: int, share: ArrayLike = 0.0, axis_name: str | None = None
) -> Array:
    """Computes a divergence of the teacher p from the student q, or of a mixture of both.

    It is +inf where the second distribution excludes a class that the first does not, and 0 in a row in which
    neither has a class.
    """
    share = jnp.asarray(share, x.student.dtype)
    return _divergence(kind, axis, axis_name, *x, share)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _divergence(kind, axis, axis_name, student, teacher, difference, share):
    x = compare(Softened(student, teacher, difference), axis, axis_name)
    return class_sum(_KINDS[kind](x, share).terms, axis, axis_name)


def _divergence_jvp(kind, axis, axis_name, primals, tangents):
    *logits, share = primals
    x = compare(Softened(*logits), axis, axis_name)
    terms, by_q, by_p = _KINDS[kind](x, share)
    value = class_sum(terms, axis, axis_name)
    tangent = jnp.zeros_like(value)
    for kept, probability, by_log in ((tangents[0], x.q, by_q), (tangents[1], x.p, by_p)):
        if isinstance(kept, SymbolicZero):
            continue
        if kind not in ("kl", "cross_entropy") or by_log is by_p:  # Σ (q − p) = 0
            total = class_sum(by_log, axis, axis_name, keepdims=True)
            # The select changes nothing, but ends what YNNPACK takes
            by_log = by_log - probability * jnp.where(jnp.isnan(total), jnp.nan, total)
        tangent += class_sum(by_log * kept, axis, axis_name)
    if not isinstance(tangents[-1], SymbolicZero):
        terms = jax.jvp(lambda s: _KINDS[kind](x, s).terms, (share,), (tangents[-1],))[1]
        tangent += class_sum(terms, axis, axis_name)
    return value, tangent


_divergence.defjvp(_divergence_jvp, symbolic_zeros=True)


def scale(temperature: float | ArrayLike, values: Array, axis: int) -> Array:
    """Computes T²·values. An array of temperatures, ``[..., 1]``, loses its class axis."""
    temperature = jnp.asarray(temperature, values.dtype)
    if temperature.ndim:
        temperature = jnp.squeeze(temperature, axis)
    return jnp.square(temperature) * values

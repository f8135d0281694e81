"""Losses between the logits of a student and of a teacher, or of a student and labels.

A class is *valid* where ``where`` is true and the logit is not −inf. Every class that is not valid
has probability exactly 0, and takes part in no maximum, sum or mean. Computation is in float32 (in
float64 for float64 input), in log-space, and no probability is clipped.

Writing p for the teacher's and q for the student's probabilities and d = log p − log q, the
divergences are summed as Σ p·(e^(−d) − 1 + d). This equals Σ p·d, since Σ q = Σ p = 1, but has only
terms ≥ 0: a small divergence is not lost in the rounding of terms of both signs. Together with d
computed from the *difference* of logits, values and gradients keep float32's relative accuracy even
where student and teacher almost agree, or at a high temperature.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Below this distance between logits d comes from their difference; far above it, log1p(Σ q·(e^δ − 1))
# would itself cancel.
_NEAR = 2.0


def _float(x: Any) -> Array:
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


def _valid(logits: Array, where: Any) -> Array:
    finite = logits != -jnp.inf  # a NaN is valid, so that it shows in the result
    return finite if where is None else finite & where


def _log_softmax(logits: Array, valid: Array, axis: int) -> Array:
    """Log-probabilities; 0 (not −inf) at invalid classes, so that gradients there are zero."""
    safe = jnp.where(valid, logits, 0.0)
    peak = jax.lax.stop_gradient(jnp.max(safe, axis, keepdims=True, where=valid, initial=-jnp.inf))
    shifted = safe - jnp.where(peak == -jnp.inf, 0.0, peak)  # −inf: no class of the row is valid
    total = jnp.sum(jnp.exp(shifted), axis, keepdims=True, where=valid)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(valid, shifted - log_total, 0.0)


class _Pair(NamedTuple):
    """Student (q) and teacher (p) over the same classes; values at invalid classes are 0."""

    log_q: Array
    log_p: Array
    log_ratio: Array  # log p − log q where both are valid, else 0
    has_q: Array
    has_p: Array


def _pair(student: Any, teacher: Any, temperature: Any, axis: int, where: Any) -> _Pair:
    student, teacher = _float(student), _float(teacher)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape, got {student.shape} "
            f"and {teacher.shape}"
        )
    check_positive("temperature", temperature)
    temperature = _float(temperature)
    has_q, has_p = _valid(student, where), _valid(teacher, where)
    # Masked before the division, or the gradient for the temperature would be −inf·0
    student, teacher = jnp.where(has_q, student, 0.0), jnp.where(has_p, teacher, 0.0)
    log_q = _log_softmax(student / temperature, has_q, axis)
    log_p = _log_softmax(teacher / temperature, has_p, axis)
    both = has_q & has_p
    p = jnp.where(has_p, jnp.exp(log_p), 0.0)
    q = jnp.where(has_q, jnp.exp(log_q), 0.0)
    # log p − log q = δ − log Σ q·e^δ with δ = (teacher − student) / T, for any constant added to δ.
    # Centred on its mean, δ is small where the two agree, and nothing cancels.
    delta = jnp.where(both, teacher - student, 0.0) / temperature
    delta -= jax.lax.stop_gradient(jnp.sum(p * delta, axis, keepdims=True))
    near = jnp.all(
        (has_q == has_p) & (jnp.abs(jnp.where(both, delta, 0.0)) < _NEAR), axis, keepdims=True
    )
    delta = jnp.where(near & both, delta, 0.0)
    accurate = delta - jnp.log1p(jnp.sum(q * jnp.expm1(delta), axis, keepdims=True))
    log_ratio = jnp.where(both, jnp.where(near, accurate, log_p - log_q), 0.0)
    return _Pair(log_q, log_p, log_ratio, has_q, has_p)


def _excess(d: Array) -> Array:
    """e^(−d) − 1 + d for |d| < 1/2, by its series: directly, it would cancel to nothing."""
    series = jnp.full_like(d, 1 / 10)
    for k in range(9, 2, -1):
        series = (1 - d * series) / k
    return d * d * (1 - d * series) / 2


def _divergence(log_a: Array, log_ratio: Array, a: Array, b: Array) -> Array:
    """Terms of KL(a‖b) ≥ 0 where both are valid, from log a, log a − log b, a and b."""
    small = jnp.abs(log_ratio) < 0.5
    near = a * _excess(jnp.where(small, log_ratio, 0.0))
    # a is taken out of the product at zero, so that no 0·∞ comes of an infinite ratio
    far = jnp.where(a > 0, a * log_ratio, 0.0) - a + b
    return jnp.where(small, near, far)


def _kl(log_a, log_b, log_ratio, has_a, has_b, axis) -> Array:
    a = jnp.where(has_a, jnp.exp(log_a), 0.0)
    b = jnp.where(has_b, jnp.exp(log_b), 0.0)
    terms = _divergence(log_a, log_ratio, a, b)
    terms = jnp.where(has_a & has_b, terms, jnp.where(has_b, b, 0.0))
    impossible = jnp.any(has_a & ~has_b & (a > 0), axis)  # b is 0 where a is not
    return jnp.where(impossible, jnp.inf, jnp.sum(terms, axis))


def _scale(temperature: Any, values: Array, axis: int) -> Array:
    """T²·values; a temperature an example, ``[..., 1]``, loses its class axis."""
    temperature = _float(temperature)
    if temperature.ndim:
        temperature = jnp.squeeze(temperature, axis)
    return jnp.square(temperature) * values


def kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Forward Kullback–Leibler divergence of softened predictions: T²·KL(teacher‖student).

    T²·Σ p·log(p/q) with p = softmax(teacher/T), q = softmax(student/T). The factor T² keeps the
    gradient's size when T changes, T·(q − p).

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      temperature: T > 0, a scalar, or an array that broadcasts, with a class axis of 1.
      axis: the axis of the classes.
      where: ``bool``, broadcastable to the logits: which classes exist. A logit of −inf says the
        same of one class. A row without any class has value 0.

    Returns:
      ``[...]``, nats × T², float32 (float64 for float64 input). +inf where the student excludes a
      class that the teacher does not.

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §2 (Eq. 1 for the
      softened probabilities; the factor T² at the section's end).

    >>> f'{kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1308'
    """
    x = _pair(student_logits, teacher_logits, temperature, axis, where)
    return _scale(temperature, _kl(x.log_p, x.log_q, x.log_ratio, x.has_p, x.has_q, axis), axis)


def reverse_kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Reverse Kullback–Leibler divergence: T²·KL(student‖teacher) = T²·Σ q·log(q/p).

    Mode-seeking: the student may leave out what it cannot hold. Arguments, result and errors are
    those of :func:`kl`; +inf where the *teacher* excludes a class that the student does not.

    References:
      Gu et al., `MiniLLM`, 2024, Eq. 1 (there over sequences).

    >>> f'{reverse_kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1438'
    """
    x = _pair(student_logits, teacher_logits, temperature, axis, where)
    return _scale(temperature, _kl(x.log_q, x.log_p, -x.log_ratio, x.has_q, x.has_p, axis), axis)


def jensen_shannon(
    student_logits: Any,
    teacher_logits: Any,
    *,
    beta: Any = 0.5,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Generalised Jensen–Shannon divergence: T²·[β·KL(p‖m) + (1−β)·KL(q‖m)], m = β·p + (1−β)·q.

    p is the teacher, q the student. Bounded by T²·log 2, also where the supports differ. JSD/β
    tends to KL(p‖q) as β → 0, and JSD/(1−β) to KL(q‖p) as β → 1; at 0 and 1 itself it is 0.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      beta: β in [0, 1], the teacher's share of the mixture; a scalar.
      temperature: as in :func:`kl`.
      axis: the axis of the classes.
      where: as in :func:`kl`.

    Returns:
      ``[...]``, nats × T², float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ, the temperature is not positive, or β is outside [0, 1].

    References:
      Agarwal et al., `On-Policy Distillation of Language Models` (GKD), 2024, Eq. 1.

    >>> f'{jensen_shannon(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.0338'
    """
    check_fraction("beta", beta)
    x = _pair(student_logits, teacher_logits, temperature, axis, where)
    beta = _float(beta)
    proper = (beta > 0) & (beta < 1)
    beta = jnp.where(proper, beta, 0.5)  # no logarithm of 0; the value is set to 0 at the end
    log_beta, log_rest = jnp.log(beta), jnp.log1p(-beta)
    # log(p/m) = −log(β + (1−β)·q/p), log(q/m) = −log(β·p/q + 1−β)
    small = jnp.abs(x.log_ratio) < 0.5
    near, far = jnp.where(small, x.log_ratio, 0.0), jnp.where(small, 0.0, x.log_ratio)
    log_p_m = -jnp.where(
        small, jnp.log1p((1 - beta) * jnp.expm1(-near)), jnp.logaddexp(log_beta, log_rest - far)
    )
    log_q_m = -jnp.where(
        small, jnp.log1p(beta * jnp.expm1(near)), jnp.logaddexp(log_beta + far, log_rest)
    )
    p = jnp.where(x.has_p, jnp.exp(x.log_p), 0.0)
    q = jnp.where(x.has_q, jnp.exp(x.log_q), 0.0)
    m = beta * p + (1 - beta) * q
    # β·(m − p) + (1−β)·(m − q) = 0 in each class, so both sums may take the form of `_divergence`.
    terms = beta * _divergence(x.log_p, log_p_m, p, m)
    terms += (1 - beta) * _divergence(x.log_q, log_q_m, q, m)
    # Where one of the two excludes a class, m holds only the other: log(p/m) = −log β.
    alone = -beta * log_beta * p - (1 - beta) * log_rest * q  # of these, one is 0
    terms = jnp.where(x.has_p & x.has_q, terms, alone)
    return _scale(temperature, jnp.where(proper, jnp.sum(terms, axis), 0.0), axis)


def soft_cross_entropy(
    student_logits: Any,
    teacher_logits: Any,
    *,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Cross-entropy with the teacher's soft targets: −T²·Σ p·log q.

    :func:`kl` plus T² times the teacher's entropy: the same gradient for the student, and a value
    that does not fall to zero. Arguments, result and errors are those of :func:`kl`.

    References:
      Hinton, Vinyals, Dean, 2015, §2.

    >>> f'{soft_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.6931'
    """
    x = _pair(student_logits, teacher_logits, temperature, axis, where)
    divergence = _kl(x.log_p, x.log_q, x.log_ratio, x.has_p, x.has_q, axis)
    entropy = -jnp.sum(jnp.where(x.has_p, jnp.exp(x.log_p) * x.log_p, 0.0), axis)
    return _scale(temperature, divergence + entropy, axis)


def mean_squared_logits(
    student_logits: Any, teacher_logits: Any, *, axis: int = -1, where: Any = None
) -> Array:
    """Mean over the valid classes of (student − teacher)².

    For logits of mean zero, the limit of 2·:func:`kl` at high temperature. A class that either
    excludes (−inf) is left out.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      axis: the axis of the classes.
      where: as in :func:`kl`.

    Returns:
      ``[...]``, squared logits, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.

    References:
      Ba, Caruana, `Do Deep Nets Really Need to be Deep?`, 2014, Eq. 1; Hinton et al., 2015, Eq. 4.

    >>> print(mean_squared_logits(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])))
    [5.]
    """
    student, teacher = _float(student_logits), _float(teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape, got {student.shape} "
            f"and {teacher.shape}"
        )
    valid = _valid(student, where) & _valid(teacher, where)
    difference = jnp.where(valid, student, 0.0) - jnp.where(valid, teacher, 0.0)
    count = jnp.maximum(jnp.sum(valid, axis), 1)
    return jnp.sum(jnp.square(difference), axis) / count


def cross_entropy(
    logits: Any,
    labels: Any,
    *,
    label_smoothing: Any = 0.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Cross-entropy with labels: −log q[label], or −Σ y·log q for soft labels y.

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``, or probabilities ``[..., classes]`` (used as given: their
        sum is not checked).
      label_smoothing: ε in [0, 1]: y becomes (1 − ε)·y + ε/(number of valid classes).
      axis: the axis of the classes.
      where: as in :func:`kl`.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input). +inf where the label's class is not
      valid; NaN where an integer label is outside [0, classes).

    Raises:
      ValueError: if the shapes do not fit, or ε is outside [0, 1].

    References:
      Szegedy et al., `Rethinking the Inception Architecture`, 2016, §7 (label smoothing).

    >>> f'{cross_entropy(jnp.array([[0.0, 1.0986123]]), jnp.array([1]))[0]:.4f}'  # −log ¾
    '0.2877'
    """
    logits, labels = _float(logits), jnp.asarray(labels)
    check_fraction("label_smoothing", label_smoothing)
    axis = axis % logits.ndim
    per_example = logits.shape[:axis] + logits.shape[axis + 1 :]
    classes = logits.shape[axis]
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != (per_example if integer else logits.shape):
        raise ValueError(
            f"labels must be integers {per_example} or probabilities {logits.shape} for logits "
            f"{logits.shape}, got {labels.dtype} {labels.shape}"
        )
    bad: Any = False
    if integer:
        bad = (labels < 0) | (labels >= classes)
        labels = jax.nn.one_hot(labels, classes, axis=axis, dtype=logits.dtype)
    valid = _valid(logits, where)
    count = jnp.maximum(jnp.sum(valid, axis, keepdims=True), 1)
    smoothing = _float(label_smoothing)
    targets = (1 - smoothing) * labels + smoothing * valid / count
    log_q = _log_softmax(logits, valid, axis)
    loss = -jnp.sum(jnp.where(valid, targets * log_q, 0.0), axis)
    impossible = jnp.any((targets > 0) & ~valid, axis)
    loss = jnp.where(impossible, jnp.inf, loss)
    return jnp.where(bad, jnp.nan, loss)

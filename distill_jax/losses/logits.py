"""Losses between the logits of a student and of a teacher, or of a student and labels.

A class is *valid* where ``where`` is true and the logit is not −inf. Every class that is not valid
has probability exactly 0, and takes part in no maximum, sum or mean. Computation is in float32 (in
float64 for float64 input), in log-space, and no probability is clipped;
:mod:`distill_jax.losses._numerics` says how small divergences keep their digits.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses._numerics import (
    check_fraction,
    divergence_terms,
    kl_of,
    log_softmax,
    pair,
    probability_difference,
    scale,
    to_float,
    valid_classes,
)

Array = jax.Array


def kl(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, axis: int = -1, where: Any = None
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
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    return scale(temperature, kl_of(x.log_p, x.log_q, x.log_ratio, x.has_p, x.has_q, axis), axis)


def reverse_kl(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, axis: int = -1, where: Any = None
) -> Array:
    """Reverse Kullback–Leibler divergence: T²·KL(student‖teacher) = T²·Σ q·log(q/p).

    Mode-seeking: the student may leave out what it cannot hold. Arguments, result and errors are
    those of :func:`kl`; +inf where the *teacher* excludes a class that the student does not.

    References:
      Gu et al., `MiniLLM`, 2024, Eq. 1 (there over sequences).

    >>> f'{reverse_kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1438'
    """
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    return scale(temperature, kl_of(x.log_q, x.log_p, -x.log_ratio, x.has_q, x.has_p, axis), axis)


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
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    beta = to_float(beta)
    proper = (beta > 0) & (beta < 1)
    beta = jnp.where(proper, beta, 0.5)  # no logarithm of 0; the value is set to 0 at the end
    log_beta, log_rest = jnp.log(beta), jnp.log1p(-beta)
    # log(p/m) = −log(β + (1−β)·q/p), log(q/m) = −log(β·p/q + 1−β)
    small = jnp.abs(x.log_ratio) < 0.5
    near, far = jnp.where(small, x.log_ratio, 0.0), jnp.where(small, 0.0, x.log_ratio)
    log_p_m = -jnp.where(
        small, jnp.log1p((1 - beta) * jnp.expm1(-near)), jnp.logaddexp(log_beta, log_rest - far)
    )
    log_q_m = -jnp.where(small, jnp.log1p(beta * jnp.expm1(near)), jnp.logaddexp(log_beta + far, log_rest))
    p = jnp.where(x.has_p, jnp.exp(x.log_p), 0.0)
    q = jnp.where(x.has_q, jnp.exp(x.log_q), 0.0)
    m = beta * p + (1 - beta) * q
    # β·(m − p) + (1−β)·(m − q) = 0 in each class, so both sums may take the form of `divergence_terms`.
    terms = beta * divergence_terms(x.log_p, log_p_m, p, m)
    terms += (1 - beta) * divergence_terms(x.log_q, log_q_m, q, m)
    # Where one of the two excludes a class, m holds only the other: log(p/m) = −log β.
    alone = -beta * log_beta * p - (1 - beta) * log_rest * q  # of these, one is 0
    terms = jnp.where(x.has_p & x.has_q, terms, alone)
    return scale(temperature, jnp.where(proper, jnp.sum(terms, axis), 0.0), axis)


def skew_kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    alpha: Any = 0.1,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Skew Kullback–Leibler divergence: T²·KL(p‖α·p + (1−α)·q), p the teacher, q the student.

    At most −T²·log α, so finite for α > 0 whatever the student leaves out. :func:`kl` at α = 0, and
    0 at α = 1.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      alpha: α in [0, 1], the teacher's share of the mixture; a scalar.
      temperature: as in :func:`kl`.
      axis: the axis of the classes.
      where: as in :func:`kl`.

    Returns:
      ``[...]``, nats × T², float32 (float64 for float64 input). +inf at α = 0 where the student
      excludes a class that the teacher does not.

    Raises:
      ValueError: if the shapes differ, the temperature is not positive, or α is outside [0, 1].

    References:
      Ko et al., `DistiLLM: Towards Streamlined Distillation for Large Language Models`, 2024, §3.1
      (the definition of SKL); Lee, `On the Effectiveness of the Skew Divergence`, 2001, Eq. 1. The
      authors' code (distillm) leaves the teacher's entropy out: its value is a cross-entropy, its
      gradient the same.

    >>> f'{skew_kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1070'
    """
    check_fraction("alpha", alpha)
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    value = _skewed(x.log_p, x.log_q, x.log_ratio, x.has_p, x.has_q, to_float(alpha), axis)
    return scale(temperature, value, axis)


def skew_reverse_kl(
    student_logits: Any,
    teacher_logits: Any,
    *,
    alpha: Any = 0.1,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Skew reverse Kullback–Leibler divergence: T²·KL(q‖(1−α)·p + α·q).

    :func:`skew_kl` with student and teacher exchanged: :func:`reverse_kl` at α = 0. Arguments,
    result and errors are those of :func:`skew_kl`; α is the *student's* share of the mixture.

    References:
      Ko et al., `DistiLLM`, 2024, §3.1 (the definition of SRKL).

    >>> f'{skew_reverse_kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1131'
    """
    check_fraction("alpha", alpha)
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    value = _skewed(x.log_q, x.log_p, -x.log_ratio, x.has_q, x.has_p, to_float(alpha), axis)
    return scale(temperature, value, axis)


def _skewed(log_a, log_b, log_ratio, has_a, has_b, alpha, axis) -> Array:
    """KL(a‖m), m = α·a + (1−α)·b, as sums of terms ≥ 0."""
    # log(a/m) = −log(α + (1−α)·b/a), whose two forms meet at |log(a/b)| = 1/2
    near = jnp.abs(log_ratio) < 0.5
    close, far = jnp.where(near, log_ratio, 0.0), jnp.where(near, 0.0, log_ratio)
    proper = (alpha > 0) & (alpha < 1)
    inside = jnp.where(proper, alpha, 0.5)
    mixed = -jnp.logaddexp(jnp.log(inside), jnp.log1p(-inside) - far)
    apart = jnp.where(proper, mixed, jnp.where(alpha > 0, 0.0, far))
    log_a_m = jnp.where(near, -jnp.log1p((1 - alpha) * jnp.expm1(-close)), apart)
    a = jnp.where(has_a, jnp.exp(log_a), 0.0)
    b = jnp.where(has_b, jnp.exp(log_b), 0.0)
    m = alpha * a + (1 - alpha) * b
    terms = divergence_terms(log_a, log_a_m, a, m)
    # A class of a alone has m = α·a, one of b alone m = (1−α)·b.
    only_a = a * -jnp.log(jnp.where(alpha > 0, alpha, 1.0)) - a + m
    terms = jnp.where(has_a & has_b, terms, jnp.where(has_a, only_a, m))
    impossible = jnp.any(has_a & ~has_b & (a > 0), axis) & (alpha <= 0)
    return jnp.where(impossible, jnp.inf, jnp.sum(terms, axis))


def total_variation(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, axis: int = -1, where: Any = None
) -> Array:
    """Total variation distance of softened predictions: ½·Σ |p − q|.

    Between 0 and 1, and never larger than √(KL/2). *No* factor T²: the gradient falls as 1/T. Where
    p = q in a class, that class's derivative is taken as 0 (the middle of its subgradients).

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      temperature: as in :func:`kl`.
      axis: the axis of the classes.
      where: as in :func:`kl`.

    Returns:
      ``[...]``, a probability, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive.

    References:
      Wen et al., `f-Divergence Minimization for Sequence-Level Knowledge Distillation`, 2023, §3.2
      (TVD, there over sequences); Levin, Peres, `Markov Chains and Mixing Times`, Proposition 4.2.

    >>> f'{total_variation(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.2500'
    """
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    difference = probability_difference(x)
    return jnp.sum(jnp.sign(difference) * difference, axis) / 2


def soft_cross_entropy(
    student_logits: Any, teacher_logits: Any, *, temperature: Any = 1.0, axis: int = -1, where: Any = None
) -> Array:
    """Cross-entropy with the teacher's soft targets: −T²·Σ p·log q.

    :func:`kl` plus T² times the teacher's entropy: the same gradient for the student, and a value
    that does not fall to zero. Arguments, result and errors are those of :func:`kl`.

    References:
      Hinton, Vinyals, Dean, 2015, §2.

    >>> f'{soft_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.6931'
    """
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    divergence = kl_of(x.log_p, x.log_q, x.log_ratio, x.has_p, x.has_q, axis)
    entropy = -jnp.sum(jnp.where(x.has_p, jnp.exp(x.log_p) * x.log_p, 0.0), axis)
    return scale(temperature, divergence + entropy, axis)


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
    student, teacher = to_float(student_logits), to_float(teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have one shape, got {student.shape} and {teacher.shape}"
        )
    valid = valid_classes(student, where) & valid_classes(teacher, where)
    difference = jnp.where(valid, student, 0.0) - jnp.where(valid, teacher, 0.0)
    count = jnp.maximum(jnp.sum(valid, axis), 1)
    return jnp.sum(jnp.square(difference), axis) / count


def cross_entropy(
    logits: Any, labels: Any, *, label_smoothing: Any = 0.0, axis: int = -1, where: Any = None
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
    logits, labels = to_float(logits), jnp.asarray(labels)
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
    valid = valid_classes(logits, where)
    count = jnp.maximum(jnp.sum(valid, axis, keepdims=True), 1)
    smoothing = to_float(label_smoothing)
    targets = (1 - smoothing) * labels + smoothing * valid / count
    log_q = log_softmax(logits, valid, axis)
    loss = -jnp.sum(jnp.where(valid, targets * log_q, 0.0), axis)
    impossible = jnp.any((targets > 0) & ~valid, axis)
    loss = jnp.where(impossible, jnp.inf, loss)
    return jnp.where(bad, jnp.nan, loss)

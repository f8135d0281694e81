"""Logit losses between a student and a teacher, or between a student and labels.

Logits are real numbers; integers are converted to float32. Values have the dtype of the logits, float32 or
float64, whatever the dtypes of the options are.

A class exists where ``where`` is true and its logit is not −inf. A class that does not exist has
probability exactly 0 and takes no part in any maximum, sum or mean. Everything is computed in float32
(in float64 for float64 input) from logarithms, and no probability is clipped. Differences of logits
keep the digits of small divergences.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from distill_jax._checks import check_fraction, check_real
from distill_jax.losses._arguments import (
    both_logits,
    check_axis_name,
    logits_of,
    mask_of,
    masked,
    scalar,
    temperature_of,
    valid_classes,
)
from distill_jax.losses._numerics import class_sum, divergence, log_total, scale, soften


def kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Hinton's knowledge distillation (KD), the Kullback–Leibler divergence T²·KL(teacher‖student).

    T²·Σ p·log(p/q) with p = softmax(teacher/T) and q = softmax(student/T). The gradient for the student's
    logits is T·(q − p). The factor T² keeps its size when T changes.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      temperature: T > 0, a number, or an array with one axis per axis of the logits, each of
        the same size or 1, and 1 on the class axis.
      axis: the axis of the classes.
      axis_name: the mesh axis over which the classes are spread inside ``jax.shard_map``: each device holds the
        logits of its own, and gets the value of all.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: which classes exist.
        ``[1, classes]`` leaves out classes, ``[batch, 1]`` examples, such as padding. A class whose logit is
        −inf does not exist either. A row that ``where`` leaves without a class has value 0 and gradient 0.

    Returns:
      ``[...]``, nats × T², float32 (float64 for float64 input). +inf where the student excludes a class
      that the teacher does not.

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §2 (Eq. 1 for the
      softened probabilities; the factor T² at the section's end).

    >>> f'{kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1308'
    """
    return _scaled("kl", student_logits, teacher_logits, temperature, axis, axis_name, where)


def reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Reverse Kullback–Leibler divergence: T²·KL(student‖teacher) = T²·Σ q·log(q/p).

    It is mode-seeking: a student that is too small to learn every class of the teacher may leave some out.
    Arguments, result and errors are those of :func:`kl`, except that the value is +inf where the *teacher*
    excludes a class that the student does not.

    References:
      Gu et al., `MiniLLM`, 2024, Eq. 1 (there over sequences).

    >>> f'{reverse_kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1438'
    """
    return _scaled("kl", student_logits, teacher_logits, temperature, axis, axis_name, where, swap=True)


def jensen_shannon(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    beta: float | ArrayLike = 0.5,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Generalised Jensen–Shannon divergence: T²·[β·KL(p‖m) + (1−β)·KL(q‖m)], m = β·p + (1−β)·q.

    p is the teacher's and q the student's distribution. The value is at most T²·log 2, also where one of
    them excludes a class of the other. JSD/β tends to KL(p‖q) as β → 0, and JSD/(1−β) tends to KL(q‖p) as
    β → 1. At β = 0 and β = 1 the value is 0.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      beta: β in [0, 1], the teacher's share of the mixture m; a scalar.
      temperature: as in :func:`kl`.
      axis: the axis of the classes.
      axis_name: as in :func:`kl`.
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
    share = ("beta", beta)
    return _scaled(
        "jensen_shannon", student_logits, teacher_logits, temperature, axis, axis_name, where, share=share
    )


def skew_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float | ArrayLike = 0.1,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Skew Kullback–Leibler divergence: T²·KL(p‖α·p + (1−α)·q), p the teacher, q the student.

    The value is at most −T²·log α: for α > 0 it is finite whatever classes the student excludes. At α = 0 it
    is :func:`kl`, at α = 1 it is 0.

    Args:
      student_logits, teacher_logits, temperature, axis, axis_name, where: as in :func:`kl`.
      alpha: α in [0, 1], the teacher's share of the mixture; a scalar.

    Returns:
      ``[...]``, nats × T², float32 (float64 for float64 input). +inf at α = 0 where the student excludes
      a class that the teacher does not.

    Raises:
      ValueError: if the shapes differ, the temperature is not positive, or α is outside [0, 1].

    References:
      Ko et al., `DistiLLM: Towards Streamlined Distillation for Large Language Models`, 2024, §3.1
      (the definition of SKL); Lee, `On the Effectiveness of the Skew Divergence`, 2001, Eq. 1. The
      authors' code (distillm) leaves out the teacher's entropy: its value is a cross-entropy, and its
      gradient is the same.

    >>> f'{skew_kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1070'
    """
    return _scaled(
        "skew", student_logits, teacher_logits, temperature, axis, axis_name, where, share=("alpha", alpha)
    )


def skew_reverse_kl(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    alpha: float | ArrayLike = 0.1,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Skew reverse Kullback–Leibler divergence: T²·KL(q‖(1−α)·p + α·q), p the teacher, q the student.

    This is :func:`skew_kl` with student and teacher exchanged: α is the *student's* share of the mixture, and
    at α = 0 the value is :func:`reverse_kl`. Arguments, result and errors are otherwise those of
    :func:`skew_kl`.

    References:
      Ko et al., `DistiLLM`, 2024, §3.1 (the definition of SRKL).

    >>> f'{skew_reverse_kl(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.1131'
    """
    share = ("alpha", alpha)
    return _scaled(
        "skew", student_logits, teacher_logits, temperature, axis, axis_name, where, share=share, swap=True
    )


def _scaled(
    kind: str,
    student: ArrayLike,
    teacher: ArrayLike,
    temperature: float | ArrayLike,
    axis: int,
    axis_name: str | None,
    where: ArrayLike | None,
    *,
    share: tuple[str, ArrayLike] = ("share", 0.0),
    swap: bool = False,
) -> Array:
    """Computes T² times a divergence of softened logits."""
    check_fraction(*share)
    student, teacher = both_logits(student, teacher, axis)
    check_axis_name("student_logits", student, axis_name)
    check_axis_name("teacher_logits", teacher, axis_name)
    of_teacher = scalar(*share, student.dtype)
    temperature = temperature_of(temperature, student, axis)
    x = soften(student, teacher, temperature, axis, where, axis_name=axis_name)
    value = divergence(kind, x.swapped if swap else x, axis, of_teacher, axis_name)
    return value if kind == "total_variation" else scale(temperature, value, axis)


def total_variation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Total variation distance between softened predictions: ½·Σ |p − q|.

    The value lies between 0 and 1 and is never larger than √(KL/2). It has *no* factor T²: the gradient
    falls as 1/T. Where p = q in a class, the derivative for that class is 0 (the middle of its
    subgradients).

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      temperature, axis, axis_name, where: as in :func:`kl`.

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
    return _scaled("total_variation", student_logits, teacher_logits, temperature, axis, axis_name, where)


def soft_cross_entropy(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy with the teacher's soft targets: −T²·Σ p·log q.

    This is :func:`kl` plus T² times the teacher's entropy. The gradient for the student is the same, but
    the value does not fall to zero. Arguments, result and errors are those of :func:`kl`.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §2.

    >>> f'{soft_cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.6931'
    """
    return _scaled("cross_entropy", student_logits, teacher_logits, temperature, axis, axis_name, where)


def mean_squared_logits(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> Array:
    """Mean squared error between logits: the mean over classes of (student − teacher)².

    For logits whose mean over the classes is zero, this is the limit of 2·:func:`kl` at high temperature. A
    class that the student or the teacher excludes (by −inf) is left out of the mean.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      axis: the axis of the classes.
      where: as in :func:`kl`.

    Returns:
      ``[...]``, squared logits, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.

    References:
      Ba, Caruana, `Do Deep Nets Really Need to be Deep?`, 2014, Eq. 1; Hinton, Vinyals, Dean, `Distilling
      the Knowledge in a Neural Network`, 2015, Eq. 4.

    >>> print(mean_squared_logits(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])))
    [5.]
    """
    student, teacher = both_logits(student_logits, teacher_logits, axis)
    valid = valid_classes(student, where) & valid_classes(teacher, where)
    difference = jnp.where(valid, student, 0.0) - jnp.where(valid, teacher, 0.0)
    count = jnp.maximum(jnp.sum(valid, axis), 1)
    return jnp.sum(jnp.square(difference), axis) / count


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float | ArrayLike = 0.0,
    axis: int = -1,
    axis_name: str | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Cross-entropy with labels: −log q[label], or −Σ y·log q for soft labels y.

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``, or probabilities ``[..., classes]``, which are used as given: nothing
        checks that they sum to 1.
      label_smoothing: ε in [0, 1]. The labels y become (1 − ε)·y + ε/(number of classes that exist).
      axis: the axis of the classes.
      axis_name: as in :func:`kl`. Integer labels count the classes of all devices, in the order of the axis.
      where: as in :func:`kl`.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input). +inf where the label's class does not exist;
      NaN where an integer label is outside [0, classes); 0 where ``where`` leaves a row without a class,
      whatever its label.

    Raises:
      ValueError: if the shapes do not fit, or ε is outside [0, 1].

    References:
      Szegedy et al., `Rethinking the Inception Architecture`, 2016, §7 (label smoothing).

    >>> f'{cross_entropy(jnp.array([[0.0, 1.0986123]]), jnp.array([1]))[0]:.4f}'  # −log ¾
    '0.2877'
    """
    check_real("labels", labels)
    logits, labels = logits_of("logits", logits, axis), jnp.asarray(labels)
    check_fraction("label_smoothing", label_smoothing)
    smoothing = scalar("label_smoothing", label_smoothing, logits.dtype)
    check_axis_name("logits", logits, axis_name)
    axis = axis % logits.ndim
    per_example = logits.shape[:axis] + logits.shape[axis + 1 :]
    classes = logits.shape[axis]
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    floating = jnp.issubdtype(labels.dtype, jnp.floating)
    if not (integer or floating) or labels.shape != (per_example if integer else logits.shape):
        raise ValueError(
            f"labels must be integers of shape {per_example} or probabilities of shape {logits.shape} for "
            f"logits of shape {logits.shape}, got {labels.dtype} of shape {labels.shape}"
        )
    logits = masked(logits, where)
    valid = logits != -jnp.inf
    if integer:
        parts, part = (1, 0) if axis_name is None else (lax.axis_size(axis_name), lax.axis_index(axis_name))
        bad: Array | bool = (labels < 0) | (labels >= parts * classes)
        labels = labels - part * classes
        targets = jax.nn.one_hot(labels, classes, axis=axis, dtype=logits.dtype)
        mass = jnp.ones((), logits.dtype)
    else:
        bad, targets = False, labels.astype(logits.dtype)
        mass = class_sum(jnp.where(valid, targets, 0.0), axis, axis_name)
    if not isinstance(label_smoothing, int | float) or label_smoothing:
        count = jnp.maximum(class_sum(valid, axis, axis_name, keepdims=True), 1)
        targets = (1 - smoothing) * targets + smoothing * valid / count
        mass = (1 - smoothing) * mass + smoothing
    shifted, total = log_total(logits, axis, axis_name)
    impossible = (targets > 0) & ~valid
    terms = jnp.where(impossible, jnp.inf, -jnp.where(valid, targets, 0.0) * shifted)
    loss = jnp.squeeze(total, axis) * mass + class_sum(terms, axis, axis_name)
    loss = jnp.where(bad, jnp.nan, loss)
    if where is None:
        return loss
    return jnp.where(class_sum(mask_of(where, logits), axis, axis_name) > 0, loss, 0.0)

"""Logit losses that use the label's class.

Labels are integers ``[...]``. p is the teacher's and q the student's distribution, and y is the label's
class. ``p̂`` and ``q̂`` are the distributions over the other classes alone: p_k/(1 − p_y). They are
computed from masked softmaxes and log-odds, never from 1 − p_y, so nothing is lost where the teacher is
certain.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_fraction, check_positive, check_real
from distill_jax.losses._arguments import (
    both_logits,
    logits_of,
    mask_of,
    scalar,
    temperature_of,
    valid_classes,
    weight,
)
from distill_jax.losses._numerics import Softened, compare, divergence, scale, totals
from distill_jax.losses._numerics import soften as _soften
from distill_jax.losses.logits import soft_cross_entropy


def dkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float | ArrayLike = 1.0,
    beta: float | ArrayLike = 8.0,
    temperature: float | ArrayLike = 4.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Decoupled knowledge distillation (DKD): T²·[α·KL(b‖b′) + β·KL(p̂‖q̂)].

    b = (p_y, 1 − p_y) and b′ = (q_y, 1 − q_y) say how likely the label's class is; p̂ and q̂ say which other
    class it would be. With α = 1 and β = 1 − p_y the value would be that of :func:`kl`. The second term is 0
    where there are only two classes, and where the teacher allows no class but the label's.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``.
      alpha: weight of the first term.
      beta: weight of the second term. The paper tunes it between 1 and 10 to suit the teacher's confidence.
      temperature: T > 0, a number, or an array with one axis per axis of the logits, each of
        the same size or 1, and 1 on the class axis.
      axis: the axis of the classes.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: which classes exist.
        ``[1, classes]`` leaves out classes, ``[batch, 1]`` examples, such as padding. A class whose logit is
        −inf does not exist either. A row that ``where`` leaves without a class has value 0 and gradient 0.

    Returns:
      ``[...]``, nats × T², float32 (float64 for float64 input). +inf where the student excludes a class
      that the teacher does not; NaN where a label is outside [0, classes).

    Raises:
      ValueError: if the shapes differ, the labels are not integers, or the temperature is not positive.

    References:
      Zhao et al., `Decoupled Knowledge Distillation`, 2022, Eq. 7 (Eq. 1–4 for b and p̂). The
      authors' code (mdistiller) takes the logarithm of a sum of rounded probabilities and subtracts 1000
      from the label's logit: it gives NaN for logit gaps of a few hundred, and a wrong second term where
      that gap is near 1000·T.

    >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[3.0, 0.0, 1.0]])
    >>> f'{dkd(student, teacher, jnp.array([0]), temperature=1.0)[0]:.4f}'
    '3.7785'
    """
    student, teacher = both_logits(student_logits, teacher_logits, axis)
    alpha, beta = weight("alpha", alpha, student, axis), weight("beta", beta, student, axis)
    temperature = temperature_of(temperature, student, axis)
    exists = mask_of(where, student)
    target, bad = _one_hot(labels, student.shape, axis)
    softened = _soften(student, teacher, temperature, axis, where, apart=target)
    is_it = divergence("kl", _label_or_not(softened, target, axis), -1)
    rest = _without(softened, target)
    which = divergence("kl", rest, axis)
    which = jnp.where(jnp.any(rest.has_p, axis), which, 0.0)
    value = is_it * alpha + which * beta
    return _finish(scale(temperature, value, axis), exists, bad, axis)


def nkd(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma: float | ArrayLike = 1.5,
    temperature: float | ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Normalised knowledge distillation (NKD): −p_y·log q_y − γ·T²·Σ_k p̂_k·log q̂_k over the classes k ≠ y.

    The first term has no temperature; p̂ and q̂ are softened by T. Both terms are cross-entropies, so the
    value does not fall to zero at student = teacher, and only the second term's gradient does. The paper adds
    :func:`cross_entropy` with the labels. γ is the weight of the other classes. The remaining arguments, the
    result and the errors are those of :func:`dkd`.

    References:
      Yang et al., `From Knowledge Distillation to Self-Knowledge Distillation`, 2023, §3.2 (NKD);
      the defaults are those of the authors' code (cls_KD), with whose values this agrees.

    >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[3.0, 0.0, 1.0]])
    >>> f'{nkd(student, teacher, jnp.array([0]))[0]:.4f}'
    '1.9104'
    """
    student, teacher = both_logits(student_logits, teacher_logits, axis)
    gamma = weight("gamma", gamma, student, axis)
    temperature = temperature_of(temperature, student, axis)
    exists = mask_of(where, student)
    target, bad = _one_hot(labels, student.shape, axis)
    rest = _soften(student, teacher, temperature, axis, exists & ~target)
    odds_q, target_q, others_q = _log_odds(student, target, axis, exists)
    odds_p, target_p, others_p = _log_odds(teacher, target, axis, exists)
    surprise = jnp.where(target_q & others_q, jax.nn.softplus(-odds_q), 0.0)
    p = jnp.where(others_p, jax.nn.sigmoid(odds_p), 1.0) * target_p
    first = jnp.where(target_q, p * surprise, jnp.where(p > 0, jnp.inf, 0.0))
    others = compare(rest, axis)
    entropy = -jnp.sum(others.p * others.log_p, axis)
    second = jnp.where(jnp.any(rest.has_p, axis), divergence("kl", rest, axis) + entropy, 0.0)
    value = jnp.squeeze(first, axis) + scale(temperature, second, axis) * gamma
    return _finish(value, exists, bad, axis)


def wsld(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    labels: ArrayLike,
    *,
    temperature: float | ArrayLike = 2.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Weighted soft label distillation (WSLD): −w·T²·Σ p·log q, with w = 1 − exp(−log q_y / log p_y).

    This is :func:`soft_cross_entropy` with less weight on examples whose label the student already predicts
    better than the teacher does. The weight w is computed at temperature 1. By the method's definition it is
    a constant to the gradient (``stop_gradient``). w is 1 where the teacher is certain of the label and the
    student is not, and 0 where the student is certain. Arguments, result and errors are those of :func:`dkd`,
    and the value is also NaN where both exclude the label's class.

    References:
      Zhou et al., `Rethinking Soft Labels for Knowledge Distillation: A Bias–Variance Tradeoff
      Perspective`, 2021, Eq. 10 and 11. The authors' code adds 1e-7 to −log p_y; with cross-entropy
      its whole loss is ``cross_entropy + 2.5·wsld`` (T = 2, ImageNet).

    >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[3.0, 0.0, 1.0]])
    >>> f'{wsld(student, teacher, jnp.array([0]), temperature=1.0)[0]:.4f}'
    '0.6165'
    """
    student, teacher = both_logits(student_logits, teacher_logits, axis)
    temperature = temperature_of(temperature, student, axis)
    exists = mask_of(where, student)
    target, bad = _one_hot(labels, student.shape, axis)
    value = soft_cross_entropy(
        student_logits, teacher_logits, temperature=temperature, axis=axis, where=where
    )
    odds_q, target_q, others_q = _log_odds(student, target, axis, exists)
    odds_p, target_p, others_p = _log_odds(teacher, target, axis, exists)
    by_student = _surprise(odds_q, target_q, others_q)
    by_teacher = _surprise(odds_p, target_p, others_p)
    finite = (by_teacher > 0) & (by_teacher < jnp.inf)
    ratio = by_student / jnp.where(finite, by_teacher, 1.0)
    ratio = jnp.where(by_teacher == 0, jnp.where(by_student > 0, jnp.inf, 0.0), ratio)
    ratio = jnp.where(by_teacher == jnp.inf, 0.0, ratio)
    weight = jax.lax.stop_gradient(jnp.squeeze(-jnp.expm1(-ratio), axis))
    # A weight of 0 times an infinite cross-entropy stays infinite: it cannot be fitted.
    value = jnp.where(value == jnp.inf, jnp.inf, weight * jnp.where(value == jnp.inf, 0.0, value))
    some = (target_q | others_q) & (target_p | others_p)
    bad |= jnp.squeeze(~target_q & ~target_p & some, axis)
    return _finish(value, exists, bad, axis)


def teacher_free(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    probability: float | ArrayLike = 0.99,
    temperature: float | ArrayLike = 20.0,
    student_temperature: float | ArrayLike | None = None,
    soften: str = "power",
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Teacher-free distillation (Tf-KD): T_s²·KL(p‖q) from a made-up teacher that is right.

    The made-up teacher d gives the label's class ``probability``, and the rest in equal parts to the other
    classes. p is d softened by T, and q is softmax(logits/T_s).

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``.
      probability: in [0, 1], what the made-up teacher gives the label's class at T = 1.
      temperature: T > 0, the teacher's temperature; a scalar.
      student_temperature: T_s > 0, a scalar. None uses T.
      soften: ``"power"`` softens probabilities as a teacher's logits are softened: p ∝ d^(1/T).
        ``"softmax"`` is p = softmax(d/T), as in the authors' code, which uses the probabilities as logits:
        p is then nearly uniform at any T ≥ 1.
      axis: the axis of the classes.
      where: as in :func:`dkd`.

    Returns:
      ``[...]``, nats × T_s², float32 (float64 for float64 input). +inf where the label's class does not
      exist; NaN where a label is outside [0, classes).

    Raises:
      ValueError: if the labels do not fit the logits, or an option is outside its range.

    References:
      Yuan et al., `Revisiting Knowledge Distillation via Label Smoothing Regularization`, 2020, §4
      (Tf-KD_reg; the paper writes no factor T²). The authors' code is ``soften="softmax"`` with
      ``student_temperature=1``, averaged over the classes too (1/K of this value for K classes), times a
      "multiplier".

    >>> f'{teacher_free(jnp.zeros((1, 2)), jnp.array([0]), probability=0.75, temperature=1.0)[0]:.4f}'
    '0.1308'
    """
    logits = logits_of("logits", logits, axis)
    check_fraction("probability", probability)
    check_positive("temperature", temperature)
    student_temperature = temperature if student_temperature is None else student_temperature
    check_positive("student_temperature", student_temperature)
    temperature = scalar("temperature", temperature, logits.dtype)
    student_temperature = scalar("student_temperature", student_temperature, logits.dtype)
    if soften not in ("power", "softmax"):
        raise ValueError(f"soften must be 'power' or 'softmax', got {soften!r}")
    exists = mask_of(where, logits)
    target, bad = _one_hot(labels, logits.shape, axis)
    valid = valid_classes(logits, where)
    others = jnp.maximum(jnp.sum(valid | target, axis, keepdims=True) - 1, 1)
    right = jnp.full(logits.shape, scalar("probability", probability, logits.dtype))
    teacher = jnp.where(target, right, (1 - right) / others)
    if soften == "power":
        teacher = jnp.log(teacher)
    # The label's class is the teacher's also where it does not exist: then the value is +inf.
    teacher = jnp.where(valid | target, teacher / temperature, -jnp.inf)
    cooled = jnp.where(valid, jnp.where(valid, logits, 0.0) / student_temperature, -jnp.inf)
    value = jnp.square(student_temperature) * divergence(
        "kl", _soften(cooled, teacher, jnp.ones((), logits.dtype), axis, None), axis
    )
    return _finish(value, exists, bad, axis)


# --- parts -----------------------------------------------------------------------------------


def _one_hot(labels: ArrayLike, shape: tuple[int, ...], axis: int) -> tuple[Array, Array]:
    """Marks the label's class, ``bool [..., classes]``, and the labels that are out of range."""
    check_real("labels", labels)
    labels = jnp.asarray(labels)
    axis = axis % len(shape)
    expected = shape[:axis] + shape[axis + 1 :]
    if labels.shape != expected or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers of shape {expected} for logits of shape {shape}, got "
            f"{labels.dtype} of shape {labels.shape}: if they are soft labels, take their argmax"
        )
    target = jax.nn.one_hot(labels, shape[axis], axis=axis, dtype=bool)
    return target, (labels < 0) | (labels >= shape[axis])


def _log_odds(logits: Array, target: Array, axis: int, where: Array) -> tuple[Array, Array, Array]:
    """Computes log(q_y/(1 − q_y)), 0 where either is 0, and which of the two are above 0; keeps the axis."""
    valid = valid_classes(logits, where)
    has_target = jnp.any(valid & target, axis, keepdims=True)
    others = valid & ~target
    has_others = jnp.any(others, axis, keepdims=True)
    peak = jnp.max(logits, axis, keepdims=True, where=others, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(has_others, peak, 0.0))
    terms = jnp.exp(jnp.where(others, logits, peak) - peak)
    total = jnp.sum(terms, axis, keepdims=True, where=others)
    top = jnp.sum(jnp.where(target & valid, logits - peak, 0.0), axis, keepdims=True)
    both = has_target & has_others
    return jnp.where(both, top - jnp.log(jnp.where(both, total, 1.0)), 0.0), has_target, has_others


def _surprise(odds: Array, has_target: Array, has_others: Array) -> Array:
    """Computes −log q_y accurately also where it is tiny."""
    value = jnp.where(has_others, jax.nn.softplus(-odds), 0.0)
    return jnp.where(has_target, value, jnp.inf)


def _without(x: Softened, target: Array) -> Softened:
    """Leaves out the label's class."""
    return Softened(
        jnp.where(target, -jnp.inf, x.student),
        jnp.where(target, -jnp.inf, x.teacher),
        jnp.where(target, 0.0, x.difference),
    )


def _label_or_not(softened: Softened, target: Array, axis: int) -> Softened:
    """Makes two classes, the label's and all others together, on a new last axis; their logits are log-odds."""

    def two(a, b):
        return jnp.stack([jnp.squeeze(a, axis), jnp.squeeze(b, axis)], -1)

    rest = _without(softened, target)
    total = totals(rest, axis)
    label = Softened(*(jnp.sum(jnp.where(target, part, 0.0), axis, keepdims=True) for part in softened))
    others_q, others_p = (jnp.any(has, axis, keepdims=True) for has in (rest.has_q, rest.has_p))
    has_q, has_p = two(label.has_q, others_q), two(label.has_p, others_p)
    odds_q = jnp.where(label.has_q & others_q, label.student - total.log_q, 0.0)
    odds_p = jnp.where(label.has_p & others_p, label.teacher - total.log_p, 0.0)
    top_q, top_p = (jax.lax.stop_gradient(jnp.maximum(odds, 0.0)) for odds in (odds_q, odds_p))
    x = jnp.where(has_q, two(odds_q - top_q, -top_q), -jnp.inf)
    y = jnp.where(has_p, two(odds_p - top_p, -top_p), -jnp.inf)
    # Where the log-odds almost agree, y − x would lose what the differences of logits keep
    step = label.difference - total.change
    close = two(step - (top_p - top_q), top_q - top_p)
    both = label.has_q & label.has_p & others_q & others_p
    near = both & (jnp.abs(step) < 2)
    return Softened(x, y, jnp.where(has_q & has_p, jnp.where(two(near, near), close, y - x), 0.0))


def _finish(value: Array, exists: Array, bad: Array, axis: int) -> Array:
    """Sets NaN where the label is out of range, and 0 where ``where`` leaves no class, as in padding."""
    return jnp.where(jnp.any(exists, axis), jnp.where(bad, jnp.nan, value), 0.0)

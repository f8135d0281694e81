"""Logit losses that use the label, or the order of the classes.

Labels are integers ``[...]``; p is the teacher's, q the student's distribution, y the label's class.
``p̂`` and ``q̂`` are the distributions over the other classes alone, p_k/(1 − p_y). All of them come
from masked softmaxes and log-odds, never from 1 − p_y: so nothing is lost where the teacher is
certain.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distill_jax.losses._numerics import (
    Pair,
    check_fraction,
    check_positive,
    kl_of,
    pair,
    probability_difference,
    scale,
    to_float,
    valid_classes,
)
from distill_jax.losses.logits import kl, soft_cross_entropy

Array = jax.Array


def dkd(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    *,
    alpha: Any = 1.0,
    beta: Any = 8.0,
    temperature: Any = 4.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Decoupled distillation: T²·[α·KL(b‖b′) + β·KL(p̂‖q̂)].

    b = (p_y, 1 − p_y) and b′ = (q_y, 1 − q_y): is it the label's class or another; p̂ and q̂: if
    another, which. With β = 1 − p_y and α = 1 it would be :func:`kl`. KL(p̂‖q̂) is 0 where the teacher
    has no other class, and where there are two classes in all.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      labels: integers ``[...]``.
      alpha: weight of the first term.
      beta: weight of the second; the paper tunes it, about the teacher's confidence (1 to 10).
      temperature: T > 0, a scalar, or an array that broadcasts, with a class axis of 1.
      axis: the axis of the classes.
      where: ``bool``, broadcastable to the logits: which classes exist. A logit of −inf says the
        same of one class. A row without any class has value 0.

    Returns:
      ``[...]``, nats × T², float32 (float64 for float64 input). +inf where the student excludes a
      class that the teacher does not; NaN where a label is outside [0, classes).

    Raises:
      ValueError: if the shapes differ or the labels are no integers, or T is not positive.

    References:
      Zhao et al., `Decoupled Knowledge Distillation`, 2022, Eq. 7 (Eq. 1–4 for b and p̂). The
      authors' code (mdistiller) takes log of a sum of rounded probabilities and subtracts 1000 from
      the label's logit: NaN on logit gaps of a few hundred, and a wrong second term where that gap
      is near 1000·T.

    >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[3.0, 0.0, 1.0]])
    >>> f'{dkd(student, teacher, jnp.array([0]), temperature=1.0)[0]:.4f}'
    '3.7785'
    """
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    target, bad = _one_hot(labels, x.log_q.shape, axis)
    others = ~target if where is None else ~target & where
    rest = pair(student_logits, teacher_logits, temperature, axis, others)
    binary = _target_or_not(student_logits, teacher_logits, target, rest, temperature, axis, where)
    is_it = _forward_kl(binary, -1)
    which = _forward_kl(rest, axis)
    which = jnp.where(jnp.any(rest.has_p, axis), which, 0.0)
    value = scale(temperature, alpha * is_it + beta * which, axis)
    return _finish(value, x.has_q | x.has_p, bad, axis)


def nkd(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    *,
    gamma: Any = 1.5,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Normalised distillation: −p_y·log q_y − γ·T²·Σ_k p̂_k·log q̂_k, over the classes k ≠ y.

    The first term is without temperature; p̂ and q̂ are softened by T. Two cross-entropies: the
    value does not fall to zero at student = teacher, though the gradient of the second does. Meant
    beside :func:`cross_entropy`. Arguments, result and errors are those of :func:`dkd`, with γ for
    the weight of the other classes.

    References:
      Yang et al., `From Knowledge Distillation to Self-Knowledge Distillation`, 2023, §3.2 (NKD);
      the defaults are those of the authors' code (cls_KD), with whose values this agrees.

    >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[3.0, 0.0, 1.0]])
    >>> f'{nkd(student, teacher, jnp.array([0]))[0]:.4f}'
    '1.9104'
    """
    plain = pair(student_logits, teacher_logits, 1.0, axis, where)
    target, bad = _one_hot(labels, plain.log_q.shape, axis)
    others = ~target if where is None else ~target & where
    rest = pair(student_logits, teacher_logits, temperature, axis, others)
    odds_q, target_q, others_q = _log_odds(student_logits, target, 1.0, axis, where)
    odds_p, target_p, others_p = _log_odds(teacher_logits, target, 1.0, axis, where)
    surprise = jnp.where(target_q & others_q, jax.nn.softplus(-odds_q), 0.0)
    p = jnp.where(others_p, jax.nn.sigmoid(odds_p), 1.0) * target_p
    first = jnp.where(target_q, p * surprise, jnp.where(p > 0, jnp.inf, 0.0))
    entropy = -jnp.sum(jnp.where(rest.has_p, jnp.exp(rest.log_p) * rest.log_p, 0.0), axis)
    second = jnp.where(jnp.any(rest.has_p, axis), _forward_kl(rest, axis) + entropy, 0.0)
    value = jnp.squeeze(first, axis) + gamma * scale(temperature, second, axis)
    return _finish(value, plain.has_q | plain.has_p, bad, axis)


def wsld(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    *,
    temperature: Any = 2.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Weighted soft labels: −w·T²·Σ p·log q, with w = 1 − exp(−log q_y / log p_y).

    :func:`soft_cross_entropy`, trusted less where the student already fits the label better than the
    teacher does. The weight is without temperature and, by the method's definition, a constant to
    the gradient (``stop_gradient``). It is 1 where the teacher is certain of the label and the
    student is not, 0 where the student is. Arguments, result and errors are those of :func:`dkd`;
    NaN also where both exclude the label's class.

    References:
      Zhou et al., `Rethinking Soft Labels for Knowledge Distillation: A Bias–Variance Tradeoff
      Perspective`, 2021, Eq. 10 and 11. The authors' code adds 1e-7 to −log p_y; with cross-entropy
      its whole loss is ``cross_entropy + 2.5·wsld`` (T = 2, ImageNet).

    >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[3.0, 0.0, 1.0]])
    >>> f'{wsld(student, teacher, jnp.array([0]), temperature=1.0)[0]:.4f}'
    '0.6165'
    """
    value = soft_cross_entropy(
        student_logits, teacher_logits, temperature=temperature, axis=axis, where=where
    )
    target, bad = _one_hot(labels, jnp.shape(student_logits), axis)
    odds_q, target_q, others_q = _log_odds(student_logits, target, 1.0, axis, where)
    odds_p, target_p, others_p = _log_odds(teacher_logits, target, 1.0, axis, where)
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
    return _finish(value, some, bad, axis)


def teacher_free(
    logits: Any,
    labels: Any,
    *,
    probability: Any = 0.99,
    temperature: Any = 20.0,
    student_temperature: Any = None,
    soften: str = "power",
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Distillation from a made-up teacher who is right with a given probability: T_s²·KL(p‖q).

    The teacher d gives the label's class ``probability``, and the K − 1 others the rest in equal
    parts; p is d softened by T, q is softmax(logits/T_s).

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``.
      probability: in [0, 1]: the teacher's for the label's class, at T = 1.
      temperature: T > 0, of the teacher; a scalar.
      student_temperature: T_s > 0, a scalar; T unless given.
      soften: ``"power"``: p ∝ d^(1/T), a teacher's logits over T. ``"softmax"``: p = softmax(d/T), as
        the authors' code has it, which takes probabilities for logits: nearly uniform at any T ≥ 1.
      axis: the axis of the classes.
      where: as in :func:`dkd`.

    Returns:
      ``[...]``, nats × T_s², float32 (float64 for float64 input). +inf where the label's class is
      not valid; NaN where a label is outside [0, classes).

    Raises:
      ValueError: if the labels do not fit, or an option is outside its range.

    References:
      Yuan et al., `Revisiting Knowledge Distillation via Label Smoothing Regularization`, 2020, §4
      (Tf-KD_reg; the paper writes no factor T²). The authors' code is ``soften="softmax"``,
      ``student_temperature=1``, the mean over classes too (1/K of this), times a "multiplier".

    >>> f'{teacher_free(jnp.zeros((1, 2)), jnp.array([0]), probability=0.75, temperature=1.0)[0]:.4f}'
    '0.1308'
    """
    logits = to_float(logits)
    check_fraction("probability", probability)
    check_positive("temperature", temperature)
    student_temperature = temperature if student_temperature is None else student_temperature
    check_positive("student_temperature", student_temperature)
    if soften not in ("power", "softmax"):
        raise ValueError(f"soften must be 'power' or 'softmax', got {soften!r}")
    target, bad = _one_hot(labels, logits.shape, axis)
    valid = valid_classes(logits, where)
    others = jnp.maximum(jnp.sum(valid | target, axis, keepdims=True) - 1, 1)
    right = jnp.full(logits.shape, to_float(probability), logits.dtype)
    teacher = jnp.where(target, right, (1 - right) / others)
    if soften == "power":
        teacher = jnp.log(teacher)
    teacher = jnp.where(valid | target, teacher / temperature, -jnp.inf)
    cooled = jnp.where(valid, jnp.where(valid, logits, 0.0) / student_temperature, -jnp.inf)
    value = jnp.square(to_float(student_temperature)) * kl(cooled, teacher, axis=axis)
    return _finish(value, valid, bad, axis)


def ranking_hinge(
    student_logits: Any,
    teacher_logits: Any,
    *,
    margin: Any = None,
    temperature: Any = 1.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Pairwise ranking by a hinge: mean of max(0, m − (q_k − q_l)) over pairs that p_k > p_l.

    The student is to put the classes in the teacher's order, by a margin m. With m = p_k − p_l (the
    default) the value is 0 at student = teacher. Classes of equal teacher logits make no pair, nor
    does a class that either excludes. The derivative at the hinge is taken as 0. Memory: classes²
    values an example.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      margin: m, a number; or None: the teacher's own difference, p_k − p_l.
      temperature: as in :func:`dkd`.
      axis: the axis of the classes.
      where: as in :func:`dkd`.

    Returns:
      ``[...]``, a probability, float32 (float64 for float64 input); 0 where there is no pair.

    Raises:
      ValueError: if the shapes differ, or the temperature is not positive.

    References:
      Herbrich et al., `Large Margin Rank Boundaries for Ordinal Regression`, 2000, §3; as a loss on
      a teacher's classes: arcee-ai/DistillKit (no paper), which takes the mean over all pairs of the
      batch, and wants probabilities to differ by 1e-8 to make a pair.

    >>> ranking_hinge(jnp.array([[0.0, 1.0]]), jnp.array([[0.0, 0.0]])).item()
    0.0
    >>> f'{ranking_hinge(jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 1.0986123]]))[0]:.4f}'
    '0.5000'
    """
    x = pair(student_logits, teacher_logits, temperature, axis, where)
    if margin is None:
        short = _between(probability_difference(x), axis)
    else:
        short = margin - _between(jnp.where(x.has_q, jnp.exp(x.log_q), 0.0), axis)
    hinge = jnp.where(short <= 0, 0.0, short)  # written so that a NaN shows
    return _mean_over_pairs(hinge, teacher_logits, x, axis)


def ranking_logistic(student_logits: Any, teacher_logits: Any, *, axis: int = -1, where: Any = None) -> Array:
    """Pairwise ranking by a logistic loss: mean of log(1 + e^(s_l − s_k)) over pairs that t_k > t_l.

    s and t are the logits of student and teacher; only the *order* of t counts, and the value falls
    to zero only as the student's gaps grow. Pairs, memory and errors are those of
    :func:`ranking_hinge`.

    Args:
      student_logits: ``[..., classes]``, any float dtype.
      teacher_logits: as ``student_logits``.
      axis: the axis of the classes.
      where: as in :func:`dkd`.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input); 0 where there is no pair.

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


# --- parts -----------------------------------------------------------------------------------


def _one_hot(labels: Any, shape: tuple[int, ...], axis: int) -> tuple[Array, Array]:
    """Where the label's class is, ``bool [..., classes]``; and which labels are out of range."""
    labels = jnp.asarray(labels)
    axis = axis % len(shape)
    expected = shape[:axis] + shape[axis + 1 :]
    if labels.shape != expected or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers {expected} for logits {shape}, got {labels.dtype} "
            f"{labels.shape}: for soft labels, take their argmax"
        )
    target = jax.nn.one_hot(labels, shape[axis], axis=axis, dtype=bool)
    return target, (labels < 0) | (labels >= shape[axis])


def _log_odds(logits: Any, target: Array, temperature: Any, axis: int, where: Any):
    """log(q_y/(1 − q_y)), or 0 where one of the two is 0; and whether either is not (keepdims)."""
    logits = to_float(logits)
    valid = valid_classes(logits, where)
    has_target = jnp.any(valid & target, axis, keepdims=True)
    others = valid & ~target
    has_others = jnp.any(others, axis, keepdims=True)
    peak = jnp.max(logits, axis, keepdims=True, where=others, initial=-jnp.inf)
    peak = jax.lax.stop_gradient(jnp.where(has_others, peak, 0.0))
    temperature = to_float(temperature)
    terms = jnp.exp((jnp.where(others, logits, peak) - peak) / temperature)
    total = jnp.sum(terms, axis, keepdims=True, where=others)
    top = jnp.sum(jnp.where(target & valid, logits - peak, 0.0), axis, keepdims=True) / temperature
    both = has_target & has_others
    return jnp.where(both, top - jnp.log(jnp.where(both, total, 1.0)), 0.0), has_target, has_others


def _surprise(odds: Array, has_target: Array, has_others: Array) -> Array:
    """−log q_y, with all digits also where it is tiny."""
    value = jnp.where(has_others, jax.nn.softplus(-odds), 0.0)
    return jnp.where(has_target, value, jnp.inf)


def _target_or_not(student, teacher, target, rest: Pair, temperature, axis, where) -> Pair:
    """(p_y, 1 − p_y) and (q_y, 1 − q_y) as a :class:`Pair`, on a new last axis."""
    odds_q, target_q, others_q = _log_odds(student, target, temperature, axis, where)
    odds_p, target_p, others_p = _log_odds(teacher, target, temperature, axis, where)

    def stack(a, b):
        return jnp.stack([jnp.squeeze(a, axis), jnp.squeeze(b, axis)], -1)

    def logs(odds, has_target, has_others):
        both = has_target & has_others
        log = stack(-jax.nn.softplus(-odds), -jax.nn.softplus(odds))
        return jnp.where(stack(both, both), log, 0.0), stack(has_target, has_others)

    log_q, has_q = logs(odds_q, target_q, others_q)
    log_p, has_p = logs(odds_p, target_p, others_p)
    # The difference of the two log-odds, again from differences of logits: that of the label's class,
    # less the change of log Σ exp over the others, which is δ_k − log(p̂_k/q̂_k) for each k of them.
    student, teacher = to_float(student), to_float(teacher)
    valid = valid_classes(student, where) & valid_classes(teacher, where)
    delta = jnp.where(valid, teacher, 0.0) - jnp.where(valid, student, 0.0)
    delta = delta / to_float(temperature)
    shared = rest.has_q & rest.has_p
    weight = jnp.where(shared, jnp.exp(rest.log_p), 0.0)
    total = jnp.sum(weight, axis, keepdims=True)
    weight = jax.lax.stop_gradient(weight / jnp.where(total > 0, total, 1.0))
    change = jnp.sum(weight * (delta - rest.log_ratio), axis, keepdims=True)
    step = jnp.sum(jnp.where(target, delta, 0.0), axis, keepdims=True) - change
    near = target_q & others_q & target_p & others_p & (total > 0) & (jnp.abs(step) < 2)
    step = jnp.where(near, step, 0.0)
    q_y = jax.nn.sigmoid(odds_q)
    close = stack(-jnp.log1p(jax.nn.sigmoid(-odds_q) * jnp.expm1(-step)), -jnp.log1p(q_y * jnp.expm1(step)))
    ratio = jnp.where(stack(near, near), close, log_p - log_q)
    return Pair(log_q, log_p, jnp.where(has_q & has_p, ratio, 0.0), has_q, has_p)


def _forward_kl(x: Pair, axis: int) -> Array:
    return kl_of(x.log_p, x.log_q, x.log_ratio, x.has_p, x.has_q, axis)


def _between(values: Array, axis: int) -> Array:
    """v_k − v_l, ``[..., k, l]``."""
    values = jnp.moveaxis(values, axis, -1)
    return values[..., :, None] - values[..., None, :]


def _mean_over_pairs(values: Array, teacher_logits: Any, x: Pair, axis: int) -> Array:
    """Mean over the pairs that the teacher ranks, k above l."""
    valid = jnp.moveaxis(x.has_q & x.has_p, axis, -1)
    teacher = jnp.moveaxis(to_float(teacher_logits), axis, -1)
    counts = valid[..., :, None] & valid[..., None, :]
    # "not below": a NaN logit takes part, and shows in the result
    counts &= ~(teacher[..., :, None] <= teacher[..., None, :])
    total = jnp.sum(jnp.where(counts, values, 0.0), (-2, -1))
    return total / jnp.maximum(jnp.sum(counts, (-2, -1)), 1)


def _finish(value: Array, valid: Array, bad: Array, axis: int) -> Array:
    """NaN where the label is bad; 0 where the row has no class at all."""
    value = jnp.where(bad, jnp.nan, value)
    some = jnp.squeeze(valid, axis) if valid.shape[axis] == 1 else jnp.any(valid, axis)
    return jnp.where(some, value, 0.0)

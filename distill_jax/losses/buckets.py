"""Top-k labels of a teacher: its k likeliest tokens, and one class, OTHER, for all other tokens together."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import (
    check_count,
    check_integers,
    check_positive,
    check_real,
    takes,
    warn_if_probabilities,
)
from distill_jax.losses._arguments import to_float, valid_classes
from distill_jax.losses._numerics import Loss, log_softmax, scale
from distill_jax.losses.logits import cross_entropy


@dataclasses.dataclass(frozen=True)
class TopK:
    """Top-k labels: a teacher's k likeliest tokens, and all other tokens together as the class OTHER.

    A pytree of arrays. A temperature that is a number is part of its structure, so it is known wherever the
    labels are, also inside ``jax.jit``.

    Attributes:
      indices: integers ``[..., k]``, distinct tokens.
      log_probs: ``[..., k + 1]``, the log-probabilities of these tokens and, last, of OTHER: the logarithm
        of the probability of all other tokens, −inf where there is no other token.
      temperature: the temperature at which the labels were made: a number, or ``[..., 1]`` where it was an
        array or traced.
    """

    indices: Array
    log_probs: Array
    temperature: float | Array


def _flatten(labels: TopK) -> tuple[tuple[Any, ...], float | None]:
    if isinstance(labels.temperature, int | float | np.number):
        return (labels.indices, labels.log_probs), float(labels.temperature)
    return (labels.indices, labels.log_probs, labels.temperature), None


def _unflatten(temperature: float | None, arrays: tuple[Any, ...]) -> TopK:
    return TopK(*arrays, *([] if temperature is None else [temperature]))


jax.tree_util.register_pytree_node(TopK, _flatten, _unflatten)


def top_k(
    teacher_logits: ArrayLike, k: int, *, temperature: float | ArrayLike = 1.0, where: ArrayLike | None = None
) -> TopK:
    """Makes top-k labels: a teacher's k likeliest tokens and the class OTHER for the rest.

    Logits are softened first and summed over OTHER afterwards: p_other = Σ_rest softmax(z/T). The order
    matters, so labels made at one temperature are valid at that temperature alone.

    Args:
      teacher_logits: ``[..., vocabulary]``, any float dtype.
      k: the number of tokens, from 1 to the vocabulary's size.
      temperature: T > 0, a scalar, or an array that broadcasts, ``[..., 1]``.
      where: ``bool``, broadcastable to the logits: which tokens exist.

    Returns:
      A :class:`TopK`, likeliest token first, with log-probabilities in float32 (float64 for float64
      input). OTHER is summed from its own logits, so it is accurate however small it is.

    Raises:
      ValueError: if k is outside [1, vocabulary], or the temperature is not positive.

    >>> labels = top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), 2)
    >>> labels.indices.tolist(), [f'{p:.1f}' for p in jnp.exp(labels.log_probs)]
    ([1, 3], ['0.6', '0.2', '0.2'])
    """
    warn_if_probabilities("teacher_logits", teacher_logits)
    check_real("teacher_logits", teacher_logits)
    logits = to_float(teacher_logits)
    check_count("k", k)
    if k > logits.shape[-1]:
        raise ValueError(f"k must lie in [1, {logits.shape[-1]}], the vocabulary's size, got {k}")
    valid = valid_classes(logits, where)
    indices = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(valid, logits, -jnp.inf)), k)[1]
    indices = indices.astype(jnp.int32)
    labels = _bucket(logits, indices, temperature, where)
    return TopK(indices, labels, _number_or_rows(temperature, labels.shape[:-1]))


def _number_or_rows(temperature: Any, tokens: tuple[int, ...]) -> float | Array:
    """Returns a temperature as a number if it is a known scalar, else as an array ``[..., 1]``."""
    if isinstance(temperature, jax.core.Tracer) or np.ndim(temperature):
        return jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (*tokens, 1))
    return float(temperature)


def bucket(
    logits: ArrayLike,
    indices: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Log-probabilities of chosen tokens and, last, of OTHER, all other tokens together.

    The result is (log p₁, …, log p_k, log Σ_rest p) with p = softmax(logits/T). It can be used as the logits
    of k + 1 classes: any logit loss compares a student's with a teacher's.

    Args:
      logits: ``[..., vocabulary]``, any float dtype.
      indices: integers ``[..., k]``, distinct tokens, such as the indices of a teacher's :func:`top_k`.
      temperature: T > 0, as in :func:`top_k`. The loss that follows must then have temperature 1.
      where: ``bool``, broadcastable to the logits: which tokens exist.

    Returns:
      ``[..., k + 1]``, float32 (float64 for float64 input). −inf for a token that does not exist, and
      for OTHER where no other token exists. NaN where an index is outside [0, vocabulary), or occurs twice.

    Raises:
      ValueError: if the shapes do not fit, indices are not integers, or the temperature is not
        positive.

    >>> log_probs = bucket(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), jnp.array([3]))
    >>> [f'{p:.1f}' for p in jnp.exp(log_probs)]
    ['0.2', '0.8']
    """
    warn_if_probabilities("logits", logits)
    return _bucket(logits, indices, temperature, where)


def _bucket(
    logits: ArrayLike, indices: ArrayLike, temperature: float | ArrayLike, where: ArrayLike | None
) -> Array:
    check_real("logits", logits)
    check_integers("indices", indices)
    logits, indices = to_float(logits), jnp.asarray(indices)
    if not indices.ndim or indices.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"indices must have shape {(*logits.shape[:-1], 'k')} for logits of shape {logits.shape}, got "
            f"{indices.shape}"
        )
    check_positive("temperature", temperature)
    bad = (indices < 0) | (indices >= logits.shape[-1])
    indices = jnp.where(bad, 0, indices)
    valid = jnp.broadcast_to(valid_classes(logits, where), logits.shape)
    softened = jnp.where(valid, logits, 0.0) / jnp.asarray(temperature, logits.dtype)
    rest = jnp.put_along_axis(valid, indices, False, axis=-1, inplace=False)
    has_chosen = jnp.take_along_axis(valid, indices, -1)
    taken = jnp.sum(valid & ~rest, -1, keepdims=True)
    bad |= taken != jnp.sum(has_chosen, -1, keepdims=True)  # an index occurs twice, or was bad
    chosen = jnp.where(bad, jnp.nan, jnp.take_along_axis(softened, indices, -1))
    has_chosen |= bad
    # The rest has its own peak: relative to the chosen tokens' it may be too small to be summed
    peak = jax.lax.stop_gradient(jnp.max(softened, -1, keepdims=True, where=rest, initial=-jnp.inf))
    has_rest = jnp.any(rest, -1, keepdims=True)
    peak = jnp.where(has_rest, peak, 0.0)
    total = jnp.sum(jnp.exp(jnp.where(rest, softened - peak, 0.0)), -1, keepdims=True, where=rest)
    other = peak + jnp.log(jnp.where(has_rest, total, 1.0))
    has = jnp.concatenate([has_chosen, has_rest], -1)
    log_probs = log_softmax(jnp.concatenate([chosen, other], -1), has, -1)
    return jnp.where(has, log_probs, -jnp.inf)


def append_other(log_probs: ArrayLike) -> Array:
    """Appends the log-probability of OTHER, log(1 − Σ p), to those of k tokens.

    Use it for labels from elsewhere, such as the top log-probabilities that a server returns. OTHER has the
    absolute error of Σ p, about 1e-7 in float32; :func:`top_k` computes it more accurately.

    Args:
      log_probs: ``[..., k]``, log-probabilities over the *whole* vocabulary, not over the k tokens alone.

    Returns:
      ``[..., k + 1]``, float32 (float64 for float64 input). OTHER is −inf where the k tokens hold all the
      probability, or by rounding more than that.

    >>> [f'{p:.1f}' for p in jnp.exp(append_other(jnp.log(jnp.array([0.6, 0.2]))))]
    ['0.6', '0.2', '0.2']
    """
    log_probs = to_float(log_probs)
    rest = 1 - jnp.sum(jnp.exp(log_probs), -1, keepdims=True)
    none = rest <= 0
    other = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1.0, rest)))
    return jnp.concatenate([log_probs, other], -1)


def bucket_labels(labels: ArrayLike, indices: ArrayLike) -> Array:
    """Translates token labels into classes of :func:`bucket`: the position in ``indices``, or k for OTHER.

    Args:
      labels: integers ``[...]``, tokens.
      indices: integers ``[..., k]``, as in :func:`bucket`.

    Returns:
      int32 ``[...]`` in [0, k].

    >>> print(bucket_labels(jnp.array([3, 5]), jnp.array([[1, 3], [1, 3]])))
    [1 2]
    """
    check_integers("labels", labels)
    check_integers("indices", indices)
    matches = jnp.asarray(indices) == jnp.asarray(labels)[..., None]
    place = jnp.argmax(matches, -1).astype(jnp.int32)
    return jnp.where(jnp.any(matches, -1), place, jnp.int32(matches.shape[-1]))


def other_cross_entropy(
    logits: ArrayLike, labels: ArrayLike, indices: ArrayLike, *, where: ArrayLike | None = None
) -> Array:
    """Cross-entropy among the tokens of OTHER, −log(q[label] / q_OTHER); 0 where the label is one of the k tokens.

    Top-k labels say nothing of the tokens within OTHER. Where the label of the data is one of them, it does. If the
    labels are distributed as the teacher says, KL over buckets and this loss have together the gradient that KL over
    all tokens has, on average over the labels: KL(p ‖ q) = KL over buckets + p_OTHER·KL within OTHER.

    Args:
      logits: the student's, ``[..., vocabulary]``, any float dtype.
      labels: integers ``[...]``, tokens of the data.
      indices: integers ``[..., k]``, the tokens of top-k labels.
      where: ``bool``, broadcastable to the logits: which tokens exist.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input). NaN where a label is outside [0, vocabulary), or indices
      are not valid as in :func:`bucket`.

    Raises:
      ValueError: if the shapes do not fit, or labels or indices are not integers.

    References:
      Cover, Thomas, `Elements of Information Theory`, 2006, Theorem 2.5.3 (the chain rule of relative entropy).

    >>> logits = jnp.log(jnp.array([[0.1, 0.6, 0.1, 0.2]]))
    >>> f'{other_cross_entropy(logits, jnp.array([3]), jnp.array([[1]]))[0]:.4f}'  # −log(0.2 / 0.4)
    '0.6931'
    """
    log_other = bucket(logits, indices, where=where)[..., -1]
    of_label = cross_entropy(logits, labels, where=where)
    is_other = bucket_labels(labels, indices) == jnp.shape(indices)[-1]
    unknown = jnp.where(jnp.isnan(log_other), log_other, 0.0)
    return jnp.where(is_other, of_label + jnp.where(log_other == -jnp.inf, 0.0, log_other), unknown)


def bucketed(loss: Loss) -> Loss:
    """Turns a logit loss into one against top-k labels: T²·loss(bucket(student/T), labels).

    Both distributions keep the probability of the tokens that were dropped, as the class OTHER. Summing up
    classes can only lower a Kullback–Leibler or Jensen–Shannon divergence, so the value is a lower bound of
    the full one, and equals it where k is the vocabulary's size. Some libraries renormalise both over the k
    tokens instead; then a student that gives these tokens hardly any probability may have loss 0.

    Args:
      loss: ``(student_logits, teacher_logits, ..., **options) -> [...]``, any logit loss.

    Returns:
      ``(student_logits, teacher, ..., *, temperature=1.0, where=None, **options) -> [...]``. Student
      logits are ``[..., vocabulary]``. The teacher is a :class:`TopK` made *at the same temperature*:
      another number is refused, and where one of the two is an array or traced, a value is NaN where they
      differ. Then follow integer labels where the loss takes any (they become :func:`bucket_labels`).
      ``where`` says which tokens of the student's vocabulary exist. The student is softened before it is
      bucketed, so the loss is called with temperature 1, and its values get the usual factor T².

    Raises:
      ValueError: when called, if the shapes do not fit, the temperature is not positive or not that of the
        labels, or the loss has several temperatures of its own (MLKD).

    References:
      Cover, Thomas, `Elements of Information Theory`, 2006, Theorem 2.7.1 (log sum inequality).
      DistillKit's `symmetric_uniform` is the same loss at the temperature of the labels; at a higher
      one it softens OTHER as if it were one token, and so gives the teacher too little mass there.

    >>> from distill_jax.losses import kl
    >>> teacher = top_k(jnp.array([[8.0, 0.0, 0.0, 0.0]]), 1)
    >>> f'{bucketed(kl)(jnp.array([[-8.0, 0.0, 0.0, 0.0]]), teacher)[0]:.4f}'
    '9.0816'
    """

    def bucketed_loss(
        student_logits: ArrayLike,
        teacher: TopK,
        *labels: ArrayLike,
        temperature: float | ArrayLike = 1.0,
        where: ArrayLike | None = None,
        **options: Any,
    ) -> Array:
        if not isinstance(teacher, TopK):
            raise ValueError(f"teacher must be top-k labels, a TopK, got {type(teacher).__name__}: see top_k")
        check_positive("temperature", temperature)
        indices, log_probs = jnp.asarray(teacher.indices), jnp.asarray(teacher.log_probs)
        if log_probs.shape != (*indices.shape[:-1], indices.shape[-1] + 1):
            raise ValueError(
                f"log_probs must have shape {(*indices.shape[:-1], indices.shape[-1] + 1)} for indices of "
                f"shape {indices.shape}, with OTHER last (see append_other), got {log_probs.shape}"
            )
        if takes(loss, "temperatures"):
            raise ValueError(
                "loss has several temperatures of its own, but the labels have one: give a loss without "
                "the parameter temperatures"
            )
        if takes(loss, "temperature"):  # the student is softened already
            options["temperature"] = 1.0
        warn_if_probabilities("student_logits", student_logits)
        same = _same_temperature(
            *(_number_or_rows(t, indices.shape[:-1]) for t in (teacher.temperature, temperature))
        )
        student = _bucket(student_logits, indices, temperature, where)
        bucketed_labels = []
        for label in map(jnp.asarray, labels):
            # A label that is no token must not become OTHER: a loss returns NaN for −1
            known = (label >= 0) & (label < jnp.shape(student_logits)[-1])
            bucketed_labels.append(jnp.where(known, bucket_labels(label, indices), -1))
        values = loss(student, log_probs, *bucketed_labels, **options)
        return jnp.where(same, scale(temperature, values, -1), jnp.nan)

    vars(bucketed_loss)["loss"] = loss  # for chunked, which asks what is inside
    return bucketed_loss


def _same_temperature(labels: float | Array, student: float | Array) -> bool | Array:
    if not (isinstance(labels, float) and isinstance(student, float)):
        return jnp.squeeze(jnp.asarray(labels, jnp.float32) == jnp.asarray(student, jnp.float32), -1)
    if np.float32(labels) != np.float32(student):  # as for arrays: 2.1 and its rounding are the same
        raise ValueError(
            f"the labels were made at temperature {labels}, but temperature is {student}: give the loss the "
            "labels' temperature, or make labels at this one"
        )
    return True

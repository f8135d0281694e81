"""Logit losses over sequences of tokens, ``[..., length, vocabulary]``.

Every logit loss of this package already gives one value a token, ``[..., length]``. What language
models need besides is made here of functions that take a loss and return one:

- :func:`sequence` leaves padding out and gives one value a sequence;
- :func:`bucketed` takes the teacher's ``k`` likeliest tokens (:func:`top_k`) for the whole teacher,
  with one bucket more, OTHER, for the rest of the vocabulary;
- :func:`~distill_jax.losses.chunked` never holds the logits of all positions at once.

They nest, ``sequence(chunked(bucketed(kl), chunk=256))``. :func:`common_vocabulary` comes before any.

Mean over tokens or over sequences? Training steps average values over examples, weighted by
``batch["weight"]``. With ``batch["weight"] = sequence_weight(mask)``, the mean of a batch is that
over all its tokens, Σ values / Σ tokens; without weights it is the mean over sequences of each one's
own mean. Either way the parts of a batch, under gradient accumulation or on several devices, add up
to exactly the whole batch, however unequally padding is spread over them.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax.losses._numerics import check_positive, log_softmax, scale, takes, to_float, valid_classes
from distill_jax.losses.chunks import chunked

__all__ = [
    "TopK",
    "append_other",
    "bucket",
    "bucket_labels",
    "bucketed",
    "chunked",
    "common_vocabulary",
    "per_sequence",
    "sequence",
    "sequence_weight",
    "top_k",
]

Loss = Callable[..., Array]


class TopK(NamedTuple):
    """A teacher's prediction in short: its k likeliest tokens, and all others together.

    Attributes:
      indices: int32 ``[..., k]``, distinct tokens.
      log_probs: ``[..., k + 1]``, their log-probabilities; last the bucket OTHER, the logarithm of the
        probability of all other tokens; −inf where there is no such token.
    """

    indices: Array
    log_probs: Array


# --- sequences --------------------------------------------------------------------------------


def per_sequence(
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce: str = "mean",
) -> Array:
    """Reduces the values of tokens to one a sequence: Σ w·v / Σ w over the tokens that count.

    Args:
      values: ``[..., length]``, one value a token. Where a token does not count its value may be
        anything, also inf or NaN.
      where: ``bool``, broadcastable to ``values``: which tokens count; None for all.
      weights: ≥ 0, broadcastable to ``values``: how much each token counts; None for 1. A token of
        weight 0 does not count.
      reduce: "mean", as above, or "sum", Σ w·v, such as a whole sequence's log-likelihood.

    Returns:
      ``[...]``, float32 (float64 for float64 input); 0 for a sequence in which no token counts. For
      the mean over all tokens of a batch see :func:`sequence_weight`.

    Raises:
      ValueError: if ``reduce`` is another word, or ``where`` or ``weights`` do not broadcast.

    >>> print(per_sequence(jnp.array([[1.0, 3.0, jnp.nan]]), where=jnp.array([[True, True, False]])))
    [2.]
    """
    values = to_float(values)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
    counts, weights = _counts(values.shape, where, weights)
    total = jnp.sum(jnp.where(counts, values, 0.0) * weights, -1)
    if reduce == "sum":
        return total
    weight = jnp.sum(weights, -1)
    return total / jnp.where(weight > 0, weight, 1.0)


def sequence_weight(where: ArrayLike | None, *, weights: ArrayLike | None = None) -> Array:
    """Weighs each sequence by its tokens: Σ w over the tokens that count.

    As ``batch["weight"]`` it turns the mean over sequences that training steps make of
    :func:`per_sequence` into the mean over all tokens, Σ w·v / Σ w, of the whole batch, and of the
    whole batch also where the step sees it in parts.

    Args:
      where: ``bool [..., length]``, which tokens count.
      weights: as in :func:`per_sequence`.

    Returns:
      ``[...]``, float32: without weights, the number of tokens.

    Raises:
      ValueError: if ``weights`` do not broadcast.

    >>> print(sequence_weight(jnp.array([[True, True, False]])))
    [2.]
    """
    return jnp.sum(_counts(jnp.shape(where), where, weights)[1], -1)


def _counts(
    shape: tuple[int, ...], where: ArrayLike | None, weights: ArrayLike | None
) -> tuple[Array, Array]:
    """Which tokens count, and how much: bool and float, both of the given shape."""
    for name, value in (("where", where), ("weights", weights)):
        given = np.shape(value)
        tail = zip(reversed(given), reversed(shape), strict=False)
        if len(given) > len(shape) or any(a not in (1, b) for a, b in tail):
            raise ValueError(f"{name} must broadcast to {shape}, one entry a token, got {given}")
    counts = jnp.broadcast_to(True if where is None else jnp.asarray(where, bool), shape)
    if weights is None:
        return counts, counts.astype(jnp.float32)
    weights = jnp.broadcast_to(to_float(weights), shape)
    counts &= weights != 0
    return counts, jnp.where(counts, weights, 0.0)


def sequence(loss: Loss, *, reduce: str = "mean") -> Loss:
    """Makes a loss over sequences of one over tokens: padding takes no part in value or gradient.

    Args:
      loss: ``(student, teacher, ..., **options) -> [..., length]``, any logit loss.
      reduce: as in :func:`per_sequence`.

    Returns:
      ``(student, teacher, ..., *, tokens=None, weights=None, **options) -> [...]``, reduced as by
      :func:`per_sequence`. ``tokens``, bool ``[..., length]``, says which tokens count; ``weights``
      are theirs. (``where`` remains the loss's own, and says which *classes* exist.) What is given by
      position, logits, labels or :class:`TopK`, has shape ``[..., length, ...]``; at tokens that do
      not count it is replaced by 0, so that nothing there (a label of −100, a NaN) can reach a
      gradient. Options go to the loss as they are.

    Raises:
      ValueError: when called, if shapes do not fit.

    References:
      Kim, Rush, `Sequence-Level Knowledge Distillation`, 2016, Eq. 3 (word-level distillation, there
      summed: ``reduce="sum"``).

    >>> from distill_jax.losses import kl
    >>> student, teacher = jnp.zeros((1, 2, 2)), jnp.array([[[0.0, 1.0986123], [9.0, 5.0]]])
    >>> mask = jnp.array([[True, False]])
    >>> f'{sequence(kl)(student, teacher, tokens=mask, temperature=1.0)[0]:.4f}'
    '0.1308'
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")

    def sequence_loss(student, *others, tokens=None, weights=None, **options):
        if tokens is None and weights is None:
            return per_sequence(loss(student, *others, **options), reduce=reduce)
        shape = jnp.shape(student)[:-1]
        counts, full = _counts(shape, tokens, weights)

        def blank(x):
            x = jnp.asarray(x)
            if x.shape[: len(shape)] != shape:
                raise ValueError(
                    f"what is given by position must have shape {shape} + (...), one row a token as "
                    f"the student has, got {x.shape}: pass other arrays as keywords"
                )
            mask = counts.reshape(shape + (1,) * (x.ndim - len(shape)))
            return jnp.where(mask, x, jnp.zeros((), x.dtype))

        if takes(loss, "where"):  # one that compares tokens with each other must not see padding
            where = options.get("where")
            options["where"] = counts[..., None] & (True if where is None else where)
        values = loss(*jax.tree.map(blank, (student, *others)), **options)
        return per_sequence(values, where=counts, weights=full, reduce=reduce)

    return sequence_loss


# --- top-k labels -----------------------------------------------------------------------------


def top_k(
    teacher_logits: ArrayLike, k: int, *, temperature: float | ArrayLike = 1.0, where: ArrayLike | None = None
) -> TopK:
    """Shortens a teacher's logits to its k likeliest tokens and the bucket OTHER.

    Softening comes first, then the sum over OTHER: p_other = Σ_rest softmax(z/T). The two do not
    commute, so labels made at one temperature serve that temperature alone.

    Args:
      teacher_logits: ``[..., vocabulary]``, any float dtype.
      k: how many tokens, 1 to the vocabulary's size.
      temperature: T > 0, a scalar, or an array ``[..., 1]`` that broadcasts.
      where: ``bool``, broadcastable to the logits: which tokens exist.

    Returns:
      The labels, likeliest token first; log-probabilities in float32 (float64 for float64 input).
      OTHER is summed from its own logits, and so is accurate however small.

    Raises:
      ValueError: if k is outside [1, vocabulary], or the temperature is not positive.

    >>> labels = top_k(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), 2)
    >>> labels.indices.tolist(), [f'{p:.1f}' for p in jnp.exp(labels.log_probs)]
    ([1, 3], ['0.6', '0.2', '0.2'])
    """
    logits = to_float(teacher_logits)
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must lie in [1, {logits.shape[-1]}], the vocabulary's size, got {k}")
    valid = valid_classes(logits, where)
    indices = jax.lax.top_k(jax.lax.stop_gradient(jnp.where(valid, logits, -jnp.inf)), k)[1]
    indices = indices.astype(jnp.int32)
    return TopK(indices, bucket(logits, indices, temperature=temperature, where=where))


def bucket(
    logits: ArrayLike,
    indices: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Log-probabilities of chosen tokens and, last, of all others together.

    (log p₁, …, log p_k, log Σ_rest p) with p = softmax(logits/T). These are logits of k + 1 classes:
    any logit loss compares a student's with a teacher's.

    Args:
      logits: ``[..., vocabulary]``, any float dtype.
      indices: integers ``[..., k]``, distinct tokens, such as a teacher's :func:`top_k`.
      temperature: T > 0, as in :func:`top_k`. The loss that follows must then not soften again.
      where: ``bool``, broadcastable to the logits: which tokens exist.

    Returns:
      ``[..., k + 1]``, float32 (float64 for float64 input). −inf for a token that does not exist, and
      for OTHER where no other token exists. NaN where an index is outside [0, vocabulary).

    Raises:
      ValueError: if the shapes do not fit, indices are not integers, or the temperature is not
        positive.

    >>> log_probs = bucket(jnp.log(jnp.array([0.1, 0.6, 0.1, 0.2])), jnp.array([3]))
    >>> [f'{p:.1f}' for p in jnp.exp(log_probs)]
    ['0.2', '0.8']
    """
    logits, indices = to_float(logits), jnp.asarray(indices)
    fits = indices.ndim and indices.shape[:-1] == logits.shape[:-1]
    if not fits or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices must be integers {(*logits.shape[:-1], 'k')} for logits {logits.shape}, got "
            f"{indices.dtype} {indices.shape}"
        )
    check_positive("temperature", temperature)
    bad = (indices < 0) | (indices >= logits.shape[-1])
    indices = jnp.where(bad, 0, indices)
    valid = jnp.broadcast_to(valid_classes(logits, where), logits.shape)
    softened = jnp.where(valid, logits, 0.0) / to_float(temperature)
    rest = jnp.put_along_axis(valid, indices, False, axis=-1, inplace=False)
    chosen = jnp.where(bad, jnp.nan, jnp.take_along_axis(softened, indices, -1))
    has_chosen = bad | jnp.take_along_axis(valid, indices, -1)
    # The rest by a peak of its own: beside the chosen tokens it may be too small to be summed
    peak = jax.lax.stop_gradient(jnp.max(softened, -1, keepdims=True, where=rest, initial=-jnp.inf))
    has_rest = jnp.any(rest, -1, keepdims=True)
    peak = jnp.where(has_rest, peak, 0.0)
    total = jnp.sum(jnp.exp(jnp.where(rest, softened - peak, 0.0)), -1, keepdims=True, where=rest)
    other = peak + jnp.log(jnp.where(has_rest, total, 1.0))
    has = jnp.concatenate([has_chosen, has_rest], -1)
    log_probs = log_softmax(jnp.concatenate([chosen, other], -1), has, -1)
    return jnp.where(has, log_probs, -jnp.inf)


def append_other(log_probs: ArrayLike) -> Array:
    """Completes log-probabilities of k tokens by that of OTHER, log(1 − Σ p).

    For labels from elsewhere, such as a server's top log-probabilities; :func:`top_k` gives OTHER
    more accurately. Its error here is that of Σ p: absolute, and about 1e-7 in float32.

    Args:
      log_probs: ``[..., k]``, normalised over the *whole* vocabulary.

    Returns:
      ``[..., k + 1]``, float32 (float64 for float64 input). OTHER is −inf where the k tokens hold
      everything, or by rounding more than that.

    >>> [f'{p:.1f}' for p in jnp.exp(append_other(jnp.log(jnp.array([0.6, 0.2]))))]
    ['0.6', '0.2', '0.2']
    """
    log_probs = to_float(log_probs)
    rest = 1 - jnp.sum(jnp.exp(log_probs), -1, keepdims=True)
    none = rest <= 0
    other = jnp.where(none, -jnp.inf, jnp.log(jnp.where(none, 1.0, rest)))
    return jnp.concatenate([log_probs, other], -1)


def bucket_labels(labels: ArrayLike, indices: ArrayLike) -> Array:
    """Translates labels into classes of :func:`bucket`: a token's place in ``indices``, or k, OTHER.

    Args:
      labels: integers ``[...]``, tokens.
      indices: integers ``[..., k]``, as in :func:`bucket`.

    Returns:
      int32 ``[...]`` in [0, k].

    >>> print(bucket_labels(jnp.array([3, 5]), jnp.array([[1, 3], [1, 3]])))
    [1 2]
    """
    matches = jnp.asarray(indices) == jnp.asarray(labels)[..., None]
    place = jnp.argmax(matches, -1).astype(jnp.int32)
    return jnp.where(jnp.any(matches, -1), place, jnp.int32(matches.shape[-1]))


def bucketed(loss: Loss) -> Loss:
    """Makes a loss against top-k labels of one against logits: T²·loss(bucket(student/T), labels).

    Both distributions keep the mass of the tokens that were dropped, in the bucket OTHER. Summing
    classes up can only lower a Kullback–Leibler or Jensen–Shannon divergence, so this is a lower
    bound of the full one, and is equal where k is the vocabulary's size. To renormalise both over
    the k tokens instead, as some libraries do, gives loss 0 to a student with no mass there.

    Args:
      loss: ``(student_logits, teacher_logits, ..., **options) -> [...]``, any logit loss.

    Returns:
      ``(student_logits, teacher, ..., *, temperature=1.0, where=None, **options) -> [...]``: student
      logits ``[..., vocabulary]``, teacher a :class:`TopK` made *at the same temperature*, then
      integer labels where the loss takes any (they become :func:`bucket_labels`). ``where`` says
      which tokens of the student's vocabulary exist. The student is softened before it is bucketed
      (the loss is called with temperature 1), and values get the usual factor T².

    Raises:
      ValueError: when called, if the shapes do not fit, the temperature is not positive, or the loss
        is MLKD, which has temperatures of its own.

    References:
      Cover, Thomas, `Elements of Information Theory`, 2006, Theorem 2.7.1 (log sum inequality).
      DistillKit's `symmetric_uniform` is the same loss at the temperature of the labels; at a higher
      one it softens OTHER as if it were one token, and so gives the teacher too little mass there.

    >>> from distill_jax.losses import kl
    >>> teacher = top_k(jnp.array([[8.0, 0.0, 0.0, 0.0]]), 1)
    >>> f'{bucketed(kl)(jnp.array([[-8.0, 0.0, 0.0, 0.0]]), teacher)[0]:.4f}'
    '9.0816'
    """

    def bucketed_loss(student_logits, teacher, *labels, temperature=1.0, where=None, **options):
        indices, log_probs = map(jnp.asarray, teacher)
        if log_probs.shape != (*indices.shape[:-1], indices.shape[-1] + 1):
            raise ValueError(
                f"log_probs must be {(*indices.shape[:-1], indices.shape[-1] + 1)} for indices "
                f"{indices.shape}, with OTHER last (see append_other), got {log_probs.shape}"
            )
        if takes(loss, "temperatures"):
            raise ValueError("loss softens at temperatures of its own, but the labels have one")
        if takes(loss, "temperature"):  # the student is softened already
            options["temperature"] = 1.0
        student = bucket(student_logits, indices, temperature=temperature, where=where)
        bucketed_labels = []
        for label in map(jnp.asarray, labels):
            # What is no token must not become OTHER: a loss says NaN to −1
            known = (label >= 0) & (label < jnp.shape(student_logits)[-1])
            bucketed_labels.append(jnp.where(known, bucket_labels(label, indices), -1))
        return scale(temperature, loss(student, log_probs, *bucketed_labels, **options), -1)

    return bucketed_loss


# --- unequal vocabularies ---------------------------------------------------------------------


def common_vocabulary(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    vocabulary_size: int,
    teacher_vocabulary_size: int | None = None,
) -> tuple[Array, Array]:
    """Cuts the padding off the vocabularies of both, so that any loss applies.

    Models pad their vocabulary to a round number, each to its own. The columns past the true size
    belong to no token: here they get no probability and no gradient.

    Args:
      student_logits: ``[..., at least vocabulary_size]``.
      teacher_logits: as ``student_logits``, with its own number of columns.
      vocabulary_size: how many tokens the tokenizer of the student has.
      teacher_vocabulary_size: how many that of the teacher has; checked to be the same. (That the
        tokens themselves are the same, only the tokenizers can tell.)

    Returns:
      Both, ``[..., vocabulary_size]``, in their own dtype.

    Raises:
      ValueError: if the true sizes differ, or one side has fewer columns.

    >>> s, t = common_vocabulary(jnp.zeros((2, 8)), jnp.zeros((2, 6)), vocabulary_size=5)
    >>> print(s.shape, t.shape)
    (2, 5) (2, 5)
    """
    if teacher_vocabulary_size not in (None, vocabulary_size):
        raise ValueError(
            f"the vocabularies differ: student {vocabulary_size} tokens, teacher "
            f"{teacher_vocabulary_size}; logits compare only where both use one tokenizer"
        )
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not 1 <= vocabulary_size <= logits.shape[-1]:
            raise ValueError(
                f"vocabulary_size must lie in [1, {logits.shape[-1]}], the columns of {name}, got "
                f"{vocabulary_size}: give the tokenizer's size, without padding"
            )
    return student[..., :vocabulary_size], teacher[..., :vocabulary_size]

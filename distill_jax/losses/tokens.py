"""Logit losses over sequences of tokens, ``[..., length, vocabulary]``, for language models.

Every logit loss of :mod:`distill_jax.losses` gives one value per token, ``[..., length]``. The functions
here take such a loss and return one that language models need:

- :func:`sequence` ignores padding and gives one value per sequence;
- :func:`bucketed` compares with the teacher's ``k`` likeliest tokens (:func:`top_k`) and one class, OTHER,
  for the rest of the vocabulary;
- :func:`chunked` never holds the logits of all positions at once.

They nest: ``sequence(chunked(bucketed(kl)))``. Call :func:`common_vocabulary` before any of them. Between
networks whose tokenizers differ, :func:`align_tokens` finds the places of equal text, and :func:`uld` compares there.

**The mean over tokens or over sequences?** A training step averages values over examples, weighted by
``batch["weight"]``. With ``batch["weight"] = sequence_weight(mask)`` the result is the mean over all
tokens, Σ values / Σ tokens. Without weights it is the mean over sequences of each one's own mean. In both
cases the parts of a batch, under gradient accumulation or on several devices, add up to exactly the whole
batch, however padding is spread over them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_bool, check_count, takes
from distill_jax.losses._arguments import (
    blank_rows,
    check_option_of_rows,
    check_rows,
    to_float,
    token_weights,
)
from distill_jax.losses._numerics import Loss
from distill_jax.losses.buckets import (
    TopK,
    append_other,
    bucket,
    bucket_labels,
    bucketed,
    other_cross_entropy,
    top_k,
)
from distill_jax.losses.chunks import chunked
from distill_jax.losses.tokenizers import align_tokens, uld

__all__ = [
    "TopK",
    "align_tokens",
    "append_other",
    "bucket",
    "bucket_labels",
    "bucketed",
    "chunked",
    "common_vocabulary",
    "other_cross_entropy",
    "per_sequence",
    "sequence",
    "sequence_weight",
    "top_k",
    "uld",
]


def per_sequence(
    values: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduce: str = "mean",
) -> Array:
    """Reduces the values of tokens to one value per sequence: Σ w·v / Σ w over the tokens that count.

    Args:
      values: ``[..., length]``, one value per token. At a token that does not count, the value may be
        anything, also inf or NaN.
      where: ``bool``, broadcastable to ``values``: which tokens count. None counts all.
      weights: ≥ 0, broadcastable to ``values``: the weight of each token. None is 1 for all. A token with
        weight 0 does not count.
      reduce: ``"mean"``, as above, or ``"sum"``, Σ w·v, such as the log-likelihood of a whole sequence.

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
    counts, weights = token_weights(values.shape, where, weights)
    weights = weights.astype(values.dtype)
    total = jnp.sum(jnp.where(counts, values, 0.0) * weights, -1)
    if reduce == "sum":
        return total
    weight = jnp.sum(weights, -1)
    return total / jnp.where(weight > 0, weight, 1.0)


def sequence_weight(where: ArrayLike, *, weights: ArrayLike | None = None) -> Array:
    """Weight of each sequence for a mean over all tokens of a batch: Σ w over the tokens that count.

    A training step averages the values of :func:`per_sequence` over sequences. With this as
    ``batch["weight"]`` it gives the mean over all tokens of the batch, Σ w·v / Σ w, also where it sees the
    batch in parts.

    Args:
      where: ``bool [..., length]``: which tokens count.
      weights: as in :func:`per_sequence`.

    Returns:
      ``[...]``, float32; without weights, the number of tokens.

    Raises:
      ValueError: if ``weights`` do not broadcast.

    >>> print(sequence_weight(jnp.array([[True, True, False]])))
    [2.]
    """
    return jnp.sum(token_weights(jnp.shape(where), where, weights)[1], -1)


def sequence(loss: Loss, *, reduce: str = "mean") -> Loss:
    """Turns a loss over tokens into one over sequences; padding influences neither value nor gradient.

    Args:
      loss: ``(student, teacher, ..., **options) -> [..., length]``, any logit loss.
      reduce: as in :func:`per_sequence`.

    Returns:
      ``(student, teacher, ..., *, tokens=None, weights=None, **options) -> [...]``, reduced by
      :func:`per_sequence`. ``tokens``, bool ``[..., length]``, says which tokens count, and ``weights`` are
      their weights. (``where`` is still the loss's own argument: which *classes* exist.) Logits, labels
      and :class:`TopK` have shape ``[..., length, ...]``. At tokens that do not count they are replaced by
      0, so that nothing there (a label of −100, a NaN) can reach a gradient. Options go to the loss
      unchanged.

    Raises:
      ValueError: if ``reduce`` is another word; when called, if shapes do not fit.

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

    def sequence_loss(
        student: ArrayLike,
        *others: Any,
        tokens: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        **options: Any,
    ) -> Array:
        if tokens is None and weights is None:
            return per_sequence(loss(student, *others, **options), reduce=reduce)
        shape = jnp.shape(student)[:-1]
        counts, full = token_weights(shape, tokens, weights, name="tokens")

        rows = jax.tree.map(jnp.asarray, (student, *others))
        check_rows(shape, rows)
        where = options.get("where")
        if where is not None:
            check_bool("where", where)
            check_option_of_rows("where", where, shape)
        if takes(loss, "tokens"):  # the result of chunked
            options["tokens"] = counts
        elif takes(loss, "where"):  # a loss that compares tokens with each other must not see padding
            options["where"] = counts[..., None] & (True if where is None else where)
        values = loss(*jax.tree.map(lambda x: blank_rows(counts, x), rows), **options)
        return per_sequence(values, where=counts, weights=full, reduce=reduce)

    return sequence_loss


def common_vocabulary(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    vocabulary_size: int,
    teacher_vocabulary_size: int | None = None,
) -> tuple[Array, Array]:
    """Cuts the padding off both vocabularies, so that student and teacher logits can be compared.

    Models pad their vocabulary to a round number, which differs between models. The columns past the
    tokenizer's size belong to no token: after the cut they have no probability and no gradient.

    Args:
      student_logits: ``[..., columns]`` with at least ``vocabulary_size`` columns.
      teacher_logits: ``[..., columns]``; its number of columns may be different.
      vocabulary_size: the number of tokens of the student's tokenizer.
      teacher_vocabulary_size: the number of tokens of the teacher's tokenizer, which must be the same.
        (Whether the tokens themselves are the same, only the tokenizers can tell.)

    Returns:
      Both logits, ``[..., vocabulary_size]``, in their own dtypes.

    Raises:
      ValueError: if the vocabulary sizes differ, or one side has fewer columns.

    >>> s, t = common_vocabulary(jnp.zeros((2, 8)), jnp.zeros((2, 6)), vocabulary_size=5)
    >>> print(s.shape, t.shape)
    (2, 5) (2, 5)
    """
    check_count("vocabulary_size", vocabulary_size)
    if teacher_vocabulary_size not in (None, vocabulary_size):
        raise ValueError(
            f"the vocabularies differ: student {vocabulary_size} tokens, teacher "
            f"{teacher_vocabulary_size}: use a student and a teacher with the same tokenizer"
        )
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not 1 <= vocabulary_size <= logits.shape[-1]:
            raise ValueError(
                f"vocabulary_size must lie in [1, {logits.shape[-1]}], the number of columns of {name}, got "
                f"{vocabulary_size}: give the tokenizer's size, without padding"
            )
    return student[..., :vocabulary_size], teacher[..., :vocabulary_size]

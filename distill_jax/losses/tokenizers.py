"""Distillation between networks whose tokenizers differ: by order of probability, at places of equal text."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from distill_jax._checks import check_integers
from distill_jax.losses._arguments import logits_of, masked, temperature_of
from distill_jax.losses._numerics import log_total


def uld(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: float | ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> Array:
    """Universal logit distillation (ULD), between vocabularies of any sizes: Σ |p₍ᵢ₎ − q₍ᵢ₎|.

    p₍₁₎ ≥ p₍₂₎ ≥ … are the teacher's probabilities and q₍ᵢ₎ the student's, each in its own order, the shorter one
    filled up with zeros. The paper derives it from a Wasserstein distance in which all moves of probability cost the
    same. It says how sure the student should be, not of which token: add a cross-entropy with labels. The value lies
    between 0 and 2. It has *no* factor T²: the gradient falls as 1/T.

    Args:
      student_logits: ``[..., vocabulary]``, any float dtype.
      teacher_logits: ``[..., vocabulary]``, any float dtype; only the vocabulary may have another size. Where the
        networks cut a text in different places, first take the rows that belong together: :func:`align_tokens`.
      temperature: T > 0, a number, or an array with one axis per axis of the logits, each of the same size or 1, and 1
        on the last.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: ``[..., 1]`` leaves out tokens
        of the text. A token of the vocabulary whose logit is −inf has probability 0. A row that ``where`` leaves out
        has value 0 and gradient 0.

    Returns:
      ``[...]``, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes do not fit, or the temperature is not positive.

    References:
      Boizard et al., `Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs`, 2024
      (arXiv 2402.12030; there summed over the tokens of a text, with a cross-entropy beside it).

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.1, 0.9]))
    >>> f'{uld(student, teacher):.4f}'  # 0.9 − 0.5 + 0.3 − 0.1 + 0.2
    '0.8000'
    """
    student = logits_of("student_logits", student_logits, -1)
    teacher = logits_of("teacher_logits", teacher_logits, -1)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape up to the last axis, got "
            f"{student.shape} and {teacher.shape}: align_tokens says which rows belong together"
        )
    q, p = (
        _descending(x, temperature_of(temperature, x, -1), where, max(student.shape[-1], teacher.shape[-1]))
        for x in (student, teacher)
    )
    return jnp.sum(lax.stop_gradient(jnp.sign(p - q)) * (p - q), -1)


def _descending(logits: Array, temperature: Array, where: ArrayLike | None, size: int) -> Array:
    """Computes probabilities, largest first, and zeros up to a size."""
    logits = masked(logits, where)
    valid = logits != -jnp.inf
    softened = jnp.where(valid, jnp.where(valid, logits, 0.0) / temperature, -jnp.inf)
    shifted, total = log_total(softened, -1)
    p = -jnp.sort(-jnp.where(valid, jnp.exp(shifted - total), 0.0), -1)
    return jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, size - p.shape[-1])])


def align_tokens(student_ends: ArrayLike, teacher_ends: ArrayLike) -> np.ndarray:
    """Finds the tokens of two tokenizers after which the same part of a text has been read.

    What the networks predict there can be compared (:func:`uld`), since both have seen the same. Between two such
    places the tokens of both networks spell the same text, in the shortest possible spans, so that the products of
    their probabilities over a span can be compared too.

    Args:
      student_ends: integers ``[tokens]`` that do not fall: where in the text, counted in characters or bytes, each
        token of the student ends. Tokenizers give it as the second number of an offset.
      teacher_ends: the same of the teacher's tokens, for the same text.

    Returns:
      int64 ``[places, 2]``: numbers of the student's and the teacher's token, rising. Of several tokens that end at
      one place (bytes of one character) it is the last.

    Raises:
      ValueError: if ends are no integers ``[tokens]``, are negative, or fall.

    >>> pairs = align_tokens([2, 5, 6, 9], [2, 3, 6, 9])  # "di|sti|l|led" and "di|s|til|led"
    >>> print(pairs.tolist())
    [[0, 0], [2, 2], [3, 3]]
    """
    last = []
    for name, ends in (("student_ends", student_ends), ("teacher_ends", teacher_ends)):
        check_integers(name, ends)
        array = np.asarray(ends).astype(np.int64)
        if array.ndim != 1:
            raise ValueError(f"{name} must have shape [tokens], got {array.shape}: align one text at a time")
        if (array < 0).any() or (np.diff(array) < 0).any():
            raise ValueError(
                f"{name} must not be negative or fall: give the end of each token, in the order of the text"
            )
        last.append(dict(zip(array.tolist(), range(len(array)), strict=True)))
    student, teacher = last
    return np.array([(i, teacher[end]) for end, i in student.items() if end in teacher], np.int64).reshape(
        -1, 2
    )

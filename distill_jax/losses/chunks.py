"""Losses over a large vocabulary, computed a few tokens at a time so that the logits fit in memory."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import check_count
from distill_jax.losses._numerics import Loss, to_float
from distill_jax.losses.correlations import dist, mlkd

Head = ArrayLike | Sequence[ArrayLike]  # a kernel, or a kernel and a bias


def chunked(loss: Loss, *, chunk: int) -> Loss:
    """Turns a loss over logits into one over hidden states that needs little memory for a large vocabulary.

    Value and gradient are those of ``loss(student @ student_kernel, teacher @ teacher_kernel)``. Only the
    logits of ``chunk`` tokens exist at a time, both forward and backward (the backward pass computes them
    again), instead of several copies of those of ``batch · length`` tokens. Use it where the logits are what
    fills the memory. For at most a few thousand tokens, plain code is faster.

    Args:
      loss: ``(student_logits, teacher, ..., **options) -> [tokens]``, one value per token that depends on
        this token alone: any logit loss but those that compare tokens with each other (DIST, MLKD), or
        the result of :func:`distill_jax.losses.tokens.bucketed`.
      chunk: the number of tokens, over batch and length, that are computed at a time. Their number need
        not be a multiple of it. A chunk takes its tokens from all parts of the batch, so a batch that is
        split over devices stays split.

    Returns:
      ``(student_hidden, teacher, ..., *, student_kernel, teacher_kernel=None, **options) ->
      [..., length]``, float32 (float64 for float64 input).

      - ``student_hidden`` is ``[..., length, hidden]``.
      - ``student_kernel`` is ``[hidden, vocabulary]``, or a pair of it and a bias ``[vocabulary]``.
      - ``teacher`` is hidden states ``[..., length, hidden]`` if ``teacher_kernel`` is given. Otherwise it is
        what the loss compares with, ``[..., length, ...]``: integer labels or top-k labels.
      - More arrays may follow, ``[..., length, ...]``, such as labels.
      - Options go to the loss unchanged, the same for every chunk.

      Logits, and the sum of the kernel's gradient over the chunks, are float32 also for bfloat16 input.

    Raises:
      ValueError: if ``chunk`` is not positive, or the loss compares tokens; when called, if shapes do not
        fit.

    >>> from distill_jax.losses import kl
    >>> hidden, kernel = jnp.ones((2, 5, 3)), jnp.eye(3, 4)
    >>> small = chunked(kl, chunk=2)
    >>> print(small(hidden, 2 * hidden, student_kernel=kernel, teacher_kernel=kernel).shape)
    (2, 5)
    """
    check_count("chunk", chunk)
    inner: Any = loss
    while hasattr(inner, "func") or hasattr(inner, "loss"):  # of functools.partial, of bucketed
        inner = inner.func if hasattr(inner, "func") else inner.loss
    if inner in (dist, mlkd):
        raise ValueError(
            f"loss must treat each token by itself, but {inner.__name__} compares tokens with each other, "
            "which a chunk would cut apart: use it without chunked"
        )

    def chunked_loss(
        student_hidden: ArrayLike,
        teacher: Any,
        *labels: Any,
        student_kernel: Head,
        teacher_kernel: Head | None = None,
        **options: Any,
    ) -> Array:
        rows = jax.tree.map(jnp.asarray, (student_hidden, teacher, *labels))
        if rows[0].ndim < 2:
            raise ValueError(f"student_hidden must have shape [..., length, hidden], got {rows[0].shape}")
        shape = rows[0].shape[:-1]
        for leaf in jax.tree.leaves(rows):
            if leaf.shape[: len(shape)] != shape:
                raise ValueError(
                    f"positional arrays must have shape {shape} + (...), one row per token as "
                    f"student_hidden has, got {leaf.shape}: pass other arrays as keywords"
                )
        heads = [_head("student_kernel", student_kernel, rows[0])]
        if teacher_kernel is not None:
            heads.append(_head("teacher_kernel", teacher_kernel, rows[1]))
        heads, dtypes = _widened(heads)

        def one(part):
            logits = [
                _logits(hidden, head, dtype)
                for hidden, head, dtype in zip(part[: len(heads)], heads, dtypes, strict=True)
            ]
            return loss(*logits, *part[len(heads) :], **options)

        tokens = math.prod(shape)
        parts = jax.tree.map(lambda x: _split(x.reshape(tokens, *x.shape[len(shape) :]), chunk), rows)
        values = jax.lax.map(jax.checkpoint(one, prevent_cse=False), parts)
        expected = jax.tree.leaves(parts)[0].shape[:2]
        if values.shape != expected:
            raise ValueError(
                f"loss must return one value per token, shape {expected[1:]} for a chunk, got "
                f"{values.shape[1:]}: reduce after chunked, as in sequence(chunked(loss, chunk=...))"
            )
        return values.T.reshape(-1)[:tokens].reshape(shape)

    return chunked_loss


def _head(name: str, head: Head, hidden: Any) -> tuple[Array, Array | None]:
    """Checks a kernel, or a pair of kernel and bias, and returns (kernel, bias or None)."""
    kernel, bias = head if isinstance(head, tuple | list) else (head, None)
    kernel = jnp.asarray(kernel)
    if not hasattr(hidden, "shape") or kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name} must have shape [hidden, vocabulary] for hidden states of shape "
            f"{getattr(hidden, 'shape', type(hidden).__name__)}, got {kernel.shape}"
        )
    if bias is not None and jnp.shape(bias) != kernel.shape[1:]:
        raise ValueError(
            f"the bias of {name} must have shape {kernel.shape[1:]} for a kernel of shape {kernel.shape}, "
            f"got {jnp.shape(bias)}"
        )
    return kernel, None if bias is None else jnp.asarray(bias)


def _widened(
    heads: Sequence[tuple[Array, Array | None]],
) -> tuple[list[tuple[Array, Array | None]], list[DTypeLike]]:
    """Converts the heads to float32 at least; also returns the kernels' own dtypes.

    A loop sums the gradient of an array that it closes over in that array's dtype. In bfloat16, each
    chunk's share would be rounded into the sum.
    """
    wide = [(to_float(kernel), bias if bias is None else to_float(bias)) for kernel, bias in heads]
    return wide, [kernel.dtype for kernel, _ in heads]


def _logits(hidden: Array, head: tuple[Array, Array | None], dtype: DTypeLike) -> Array:
    """Computes logits in float32 at least, multiplied in the kernel's own dtype."""
    kernel, bias = head
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, dtype), jnp.float32)
    logits = jnp.matmul(hidden, kernel.astype(dtype), preferred_element_type=wide)
    return logits if bias is None else logits + bias


def _split(x: Array, chunk: int) -> Array:
    """Cuts tokens into parts of at most ``chunk``, ``[parts, tokens of a part, ...]``.

    A part takes every so many tokens, so that it has some of each device's. The last are filled up with zeros.
    """
    parts = max(1, -(-x.shape[0] // chunk))
    size = -(-x.shape[0] // parts)
    x = jnp.pad(x, [(0, parts * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(size, parts, *x.shape[1:]), 0, 1)

"""Losses of a large vocabulary, whose logits would fill the memory: a few positions at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax.losses._numerics import to_float

Loss = Callable[..., Array]


def chunked(loss: Loss, *, chunk: int) -> Loss:
    """Makes a loss over hidden states of one over logits, computing few positions' logits at a time.

    Value and gradient are those of ``loss(student @ student_kernel, teacher @ teacher_kernel)``. The
    logits of ``batch · chunk`` tokens exist at once, forward and backward (where they are computed
    a second time), instead of those of ``batch · length`` tokens several times over. It pays where
    the logits are what fills the memory: at most a few thousand tokens, plain code is faster.

    Args:
      loss: ``(student_logits, teacher, ..., **options) -> [..., length]``, one value a token, each
        from its own token alone; any logit loss, or
        :func:`distill_jax.losses.bucketed`.
      chunk: positions at a time, along the length axis, so that a batch split over devices stays so.
        The length need not be a multiple.

    Returns:
      ``(student_hidden, teacher, ..., *, student_kernel, teacher_kernel=None, **options) ->
      [..., length]``, float32 (float64 for float64 input). ``student_hidden`` is ``[..., length,
      hidden]``; ``student_kernel`` ``[hidden, vocabulary]``, or a pair of it and a bias
      ``[vocabulary]``. ``teacher`` is likewise hidden states, where there is a ``teacher_kernel``,
      else whatever the loss compares with, ``[..., length, ...]``: integer labels, top-k labels.
      More labels by position. Options go to the loss as they are, the same for every chunk. Logits,
      and the sum of the kernel's gradient over chunks, are in float32 also for bfloat16 input.

    Raises:
      ValueError: if ``chunk`` is not positive; when called, if shapes do not fit.

    >>> from distill_jax.losses import kl
    >>> hidden, kernel = jnp.ones((2, 5, 3)), jnp.eye(3, 4)
    >>> small = chunked(kl, chunk=2)
    >>> print(small(hidden, 2 * hidden, student_kernel=kernel, teacher_kernel=kernel).shape)
    (2, 5)
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")

    def chunked_loss(student_hidden, teacher, *labels, student_kernel, teacher_kernel=None, **options):
        rows = jax.tree.map(jnp.asarray, (student_hidden, teacher, *labels))
        if rows[0].ndim < 2:
            raise ValueError(f"student_hidden must be [..., length, hidden], got shape {rows[0].shape}")
        shape = rows[0].shape[:-1]
        for leaf in jax.tree.leaves(rows):
            if leaf.shape[: len(shape)] != shape:
                raise ValueError(
                    f"what is given by position must have shape {shape} + (...), one row a token as "
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

        parts = jax.tree.map(lambda x: _split(x, len(shape) - 1, chunk), rows)
        values = jax.lax.map(jax.checkpoint(one, prevent_cse=False), parts)
        expected = (*shape[:-1], min(chunk, shape[-1]))
        if values.shape[1:] != expected:
            raise ValueError(
                f"loss must give one value a token, {expected} for a chunk, got {values.shape[1:]}: "
                "reduce after chunked, as in sequence(chunked(loss, chunk=...))"
            )
        values = jnp.moveaxis(values, 0, -2)
        return values.reshape(*shape[:-1], -1)[..., : shape[-1]]

    return chunked_loss


def _head(name: str, head: ArrayLike, hidden: ArrayLike) -> tuple[Array, Array | None]:
    """Takes a kernel, or a kernel and a bias, apart, and checks them."""
    kernel, bias = head if isinstance(head, tuple | list) else (head, None)
    kernel = jnp.asarray(kernel)
    if not hasattr(hidden, "shape") or kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name} must be [hidden, vocabulary] for hidden states "
            f"{getattr(hidden, 'shape', type(hidden).__name__)}, got {kernel.shape}"
        )
    if bias is not None and jnp.shape(bias) != kernel.shape[1:]:
        raise ValueError(
            f"the bias of {name} must be {kernel.shape[1:]} for a kernel {kernel.shape}, got "
            f"{jnp.shape(bias)}"
        )
    return kernel, None if bias is None else jnp.asarray(bias)


def _widened(heads: list) -> tuple[list, list]:
    """The heads in float32 at least, and the kernels' own dtypes.

    A loop adds up the gradient of what it closes over in that array's dtype. Were that bfloat16,
    each chunk's share would be rounded into the sum.
    """
    wide = [(to_float(kernel), bias if bias is None else to_float(bias)) for kernel, bias in heads]
    return wide, [kernel.dtype for kernel, _ in heads]


def _logits(hidden: Array, head: tuple[Array, Array | None], dtype: ArrayLike) -> Array:
    """Logits in float32 at least, multiplied in the kernel's own dtype."""
    kernel, bias = head
    wide = jnp.promote_types(jnp.promote_types(hidden.dtype, dtype), jnp.float32)
    logits = jnp.matmul(hidden, kernel.astype(dtype), preferred_element_type=wide)
    return logits if bias is None else logits + bias


def _split(x: Array, axis: int, chunk: int) -> Array:
    """Cuts an axis into chunks ``[chunks, ..., chunk, ...]``, the last filled up with zeros."""
    length = x.shape[axis]
    chunk = min(chunk, length)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -length % chunk)
    x = jnp.pad(x, pad)
    x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

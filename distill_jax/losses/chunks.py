"""Losses from hidden states: the logits of a large vocabulary are computed a few tokens at a time."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from distill_jax._checks import check_bool, check_choice, check_count, check_positive, check_real
from distill_jax.losses import _parts
from distill_jax.losses._arguments import (
    blank_rows,
    check_axis_name,
    check_option_of_rows,
    check_rows,
    token_weights,
)
from distill_jax.losses._numerics import Loss
from distill_jax.losses.correlations import dist, mlkd

Head = ArrayLike | Sequence[ArrayLike]  # a kernel, or a kernel and a bias

# By default a chunk has at most this many logits of one network: 256 MiB in float32
_HELD = 2**26


def chunked(loss: Loss, *, chunk: int | None = None, reduce: str | None = None) -> Loss:
    """Turns a loss over logits into one over hidden states that never holds the logits of all tokens.

    Value and gradient are those of ``loss(student @ student_kernel, teacher @ teacher_kernel)``, but only the logits
    of ``chunk`` tokens exist at a time. If ``chunk`` is at least the number of tokens, it is computed in one piece.

    Without ``reduce`` there is one value per token. The backward pass computes the logits again, because only then is
    the gradient known that each value gets. With ``reduce`` the result is one number. When JAX differentiates it, the
    forward pass also computes the gradients of hidden states and kernels, so no logit is computed twice. More than
    one chunk has reverse-mode gradients alone: ``jax.jvp`` and ``jax.hessian`` raise ``TypeError``.

    Args:
      loss: ``(student_logits, teacher, ..., **options) -> [tokens]``, one value per token that depends on
        this token alone: any logit loss but those that compare tokens with each other (DIST, MLKD), or
        the result of :func:`distill_jax.losses.tokens.bucketed`.
      chunk: the number of tokens, over batch and length, that are computed at a time. Their number need
        not be a multiple of it. A chunk takes its tokens from all parts of the batch, so a batch that is
        split over devices stays split. By default 2²⁶ divided by the size of the vocabulary.
      reduce: None for one value per token, ``"sum"`` for Σ w·v, or ``"mean"`` for Σ w·v / Σ w, over the tokens
        that count. The mean is 0 if no token counts. Inside ``jax.shard_map`` both are of the tokens of one device.
        Where tokens are spread over devices, take ``"sum"`` and divide the ``psum`` of it by that of the weights.

    Returns:
      ``(student_hidden, teacher, ..., *, student_kernel, teacher_kernel=None, student_softcap=None,
      teacher_softcap=None, tokens=None, weights=None, where=None, **options) -> [..., length]``, or ``[]`` with
      ``reduce``; float32 (float64 for float64 input).

      - ``student_hidden`` is ``[..., length, hidden]``.
      - ``student_kernel`` is ``[hidden, vocabulary]``, or a pair of it and a bias ``[vocabulary]``.
      - ``teacher`` is hidden states ``[..., length, hidden]`` if ``teacher_kernel`` is given. Otherwise it is
        what the loss compares with, ``[..., length, ...]``: integer labels or top-k labels.
      - More arrays may follow, ``[..., length, ...]``, such as labels.
      - ``student_softcap`` and ``teacher_softcap``: c > 0 makes c·tanh(z/c) of the logits z, as Gemma does.
      - ``tokens``: ``bool``, broadcastable to ``[..., length]``: which tokens count. The others have value 0 and
        gradient 0, whatever their arrays hold.
      - ``weights``: ≥ 0, broadcastable to ``[..., length]``: w, the weight of each token, with ``reduce`` alone.
      - ``where`` and ``temperature`` have one axis per axis of the logits, ``[..., length, vocabulary]``, as for the
        loss. So ``where[None, None]`` says which classes exist. A token that ``where`` leaves without a class does not
        count.
      - Other options go to the loss unchanged, the same for every chunk.

      Kernels are multiplied in their own dtype. Logits, and the sums of gradients over tokens, are float32 also for
      bfloat16 input; there, with more than one chunk, the gradient for the logits is rounded to bfloat16 before it is
      multiplied.

    Raises:
      ValueError: if ``chunk`` is not positive, ``reduce`` is another word, or the loss compares tokens; when called,
        if shapes do not fit.

    References:
      Hsu et al., `Liger Kernel: Efficient Triton Kernels for LLM Training`, 2024, §3.2 (gradients in the forward
      pass of a fused linear cross-entropy).

    >>> from distill_jax.losses import kl
    >>> hidden, kernel = jnp.ones((2, 5, 3)), jnp.eye(3, 4)
    >>> small = chunked(kl, chunk=2)
    >>> print(small(hidden, 2 * hidden, student_kernel=kernel, teacher_kernel=kernel).shape)
    (2, 5)
    """
    if chunk is not None:
        check_count("chunk", chunk)
    check_choice("reduce", reduce, (None, "mean", "sum"))
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
        student_softcap: float | ArrayLike | None = None,
        teacher_softcap: float | ArrayLike | None = None,
        tokens: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        where: ArrayLike | None = None,
        **options: Any,
    ) -> Array:
        check_real("student_hidden", student_hidden)
        if teacher_kernel is not None:
            check_real("teacher_hidden", teacher)
        rows = jax.tree.map(jnp.asarray, [student_hidden, teacher, *labels])
        if getattr(rows[0], "ndim", 0) < 2:
            raise ValueError(
                f"student_hidden must have shape [..., length, hidden], got {jnp.shape(rows[0])}"
            )
        shape = rows[0].shape[:-1]
        check_rows(shape, rows)
        heads = [_head("student", student_kernel, student_softcap, rows[0])]
        if teacher_kernel is not None:
            heads.append(_head("teacher", teacher_kernel, teacher_softcap, rows[1]))
        elif teacher_softcap is not None:
            raise ValueError("teacher_softcap needs teacher_kernel, which is None: give both or neither")
        if weights is not None and reduce is None:
            raise ValueError("weights need reduce='mean' or 'sum': give one, or multiply the values yourself")
        shaped = {} if where is None else {"where": where}
        shaped |= {name: options.pop(name) for name in ("temperature",) if name in options}
        per_token, fixed = _options_of_rows(shaped, shape)
        options |= fixed
        if "where" in per_token:
            mask = per_token["where"]
            if mask.shape[-1] == 1:  # not of classes
                del per_token["where"]
            exists = jnp.any(mask, -1)
            axis_name = options.get("axis_name")
            if axis_name is not None and mask.shape[-1] > 1:  # a class may exist on another device
                check_axis_name("where", mask, axis_name)
                exists = lax.psum(exists.astype(jnp.int32), axis_name) > 0
            tokens = exists & token_weights(shape, tokens, None, name="tokens")[0]
        counts, full = token_weights(shape, tokens, weights, name="tokens")
        some = tokens is not None or weights is not None
        if some:
            rows = jax.tree.map(lambda x: blank_rows(counts, x), rows)
        count = math.prod(shape)
        flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(shape) :]), [*rows, per_token, counts])
        hidden, others = flat[: len(heads)], flat[len(heads) :]

        def values_of(logits, others):
            *compared, per_token, counts = others
            if some:  # labels of 0 may make a NaN, whose gradient is one too
                logits = [blank_rows(counts, x) for x in logits]
            values = loss(*logits, *compared, **options, **per_token)
            if values.shape != counts.shape:
                raise ValueError(
                    f"loss must return one value per token, shape {counts.shape} for a chunk, got "
                    f"{values.shape}: reduce after chunked, as in sequence(chunked(loss, chunk=...))"
                )
            return jnp.where(counts, values, 0.0)

        size = chunk or max(1, _HELD // heads[0].kernel.shape[1])
        if size >= count:
            products = _parts.products(hidden, heads)
            values = values_of(
                [_parts.capped(x, head.softcap) for x, head in zip(products, heads, strict=True)], others
            )
            total = jnp.sum(values * full.reshape(count)) if reduce else values.reshape(shape)
        else:
            total = _parts.in_parts(
                values_of, heads, hidden, others, full.reshape(count), size, reduce is not None
            )
            total = total if reduce else total.reshape(shape)
        if reduce != "mean":
            return total
        weight = jnp.sum(full).astype(total.dtype)
        return total / jnp.where(weight > 0, weight, 1.0)

    return chunked_loss


def _head(name: str, head: Head, softcap: ArrayLike | None, hidden: Any) -> _parts.Head:
    """Checks the last layer of a network and its hidden states."""
    kernel, bias = head if isinstance(head, tuple | list) and len(head) == 2 else (head, None)
    check_real(f"{name}_kernel", kernel)
    kernel = jnp.asarray(kernel)
    if not hasattr(hidden, "shape") or kernel.ndim != 2 or hidden.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"{name}_kernel must have shape [hidden, vocabulary] for hidden states of shape "
            f"{getattr(hidden, 'shape', type(hidden).__name__)}, got {kernel.shape}"
        )
    if bias is not None:
        check_real(f"the bias of {name}_kernel", bias)
        if jnp.shape(bias) != kernel.shape[1:]:
            raise ValueError(
                f"the bias of {name}_kernel must have shape {kernel.shape[1:]} for a kernel of shape {kernel.shape}, "
                f"got {jnp.shape(bias)}"
            )
        bias = jnp.asarray(bias)
    if softcap is not None:
        check_positive(f"{name}_softcap", softcap)
        if jnp.ndim(softcap):
            raise ValueError(f"{name}_softcap must be a number, got an array of shape {jnp.shape(softcap)}")
    return _parts.Head(kernel, bias, softcap)


def _options_of_rows(
    options: dict[str, Any], shape: tuple[int, ...]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Separates options with an entry per token, ``[*shape, n]``, from those that hold for all tokens."""
    per_token, fixed = {}, {}
    for name, value in options.items():
        if name == "where":
            check_bool(name, value)
        else:
            check_real(name, value)
        given = jnp.shape(value)
        if not given and name != "where":
            fixed[name] = value
            continue
        check_option_of_rows(name, value, shape)
        if all(size == 1 for size in given[:-1]) and (name != "where" or given[-1] > 1):
            fixed[name] = jnp.reshape(value, (1, given[-1]))
        else:
            per_token[name] = jnp.broadcast_to(jnp.asarray(value), (*shape, given[-1]))
    return per_token, fixed

"""Losses from hidden states: the logits of a large vocabulary are computed a few tokens at a time.

The gradient for the logits of a chunk comes from the loss itself. What leads from there to the hidden states, the
kernels and the biases is written out here: products in the dtype of the operands (as the layer itself would compute
them), sums over tokens in float32 at least.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import check_bool, check_choice, check_count, check_positive, check_real
from distill_jax.losses._arguments import token_weights
from distill_jax.losses._numerics import Loss
from distill_jax.losses.correlations import dist, mlkd

Head = ArrayLike | Sequence[ArrayLike]  # a kernel, or a kernel and a bias

# If the user gives no number of tokens, a chunk has at most so many logits of one network, 256 MiB
_HELD = 2**26
# A kernel of so many numbers is large: a chunk's share of its gradient is computed in blocks, of the first number that
# divides its rows
_LARGE, _BLOCKS = 2**24, (8, 4, 2, 1)


def chunked(loss: Loss, *, chunk: int | None = None, reduce: str | None = None) -> Loss:
    """Turns a loss over logits into one over hidden states that never holds the logits of all tokens.

    Value and gradient are those of ``loss(student @ student_kernel, teacher @ teacher_kernel)``, but only the logits
    of ``chunk`` tokens exist at a time. Where they would be those of all tokens, the loss is computed in one piece.

    Without ``reduce`` there is one value per token. The backward pass computes the logits again, because only then is
    the gradient known that each value gets. With ``reduce`` the result is one number, and the forward pass of a
    gradient already computes the gradient for every hidden state and kernel, so no logit is computed twice.

    Args:
      loss: ``(student_logits, teacher, ..., **options) -> [tokens]``, one value per token that depends on
        this token alone: any logit loss but those that compare tokens with each other (DIST, MLKD), or
        the result of :func:`distill_jax.losses.tokens.bucketed`.
      chunk: the number of tokens, over batch and length, that are computed at a time. Their number need
        not be a multiple of it. A chunk takes its tokens from all parts of the batch, so a batch that is
        split over devices stays split. By default 2²⁶ divided by the size of the vocabulary.
      reduce: None for one value per token, ``"sum"`` for Σ w·v, or ``"mean"`` for Σ w·v / Σ w, over the tokens
        that count. The mean is 0 if no token counts.

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
      bfloat16 input; there, the gradient for the logits is rounded to bfloat16 before it is multiplied.

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
        for leaf in jax.tree.leaves(rows):
            if leaf.shape[: len(shape)] != shape:
                raise ValueError(
                    f"positional arrays must have shape {shape} + (...), one row per token as "
                    f"student_hidden has, got {leaf.shape}: pass other arrays as keywords"
                )
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
            tokens = jnp.any(mask, -1) & token_weights(shape, tokens, None, name="tokens")[0]
        counts, full = token_weights(shape, tokens, weights, name="tokens")
        some = tokens is not None or weights is not None
        if some:
            rows = jax.tree.map(lambda x: _blank(counts, x), rows)
        count = math.prod(shape)
        flat = jax.tree.map(lambda x: x.reshape(count, *x.shape[len(shape) :]), [*rows, per_token, counts])
        hidden, others = flat[: len(heads)], flat[len(heads) :]

        def values_of(logits, others):
            *compared, per_token, counts = others
            if some:  # labels of 0 may make a NaN, whose gradient is one too
                logits = [_blank(counts, x) for x in logits]
            values = loss(*logits, *compared, **options, **per_token)
            if values.shape != counts.shape:
                raise ValueError(
                    f"loss must return one value per token, shape {counts.shape} for a chunk, got "
                    f"{values.shape}: reduce after chunked, as in sequence(chunked(loss, chunk=...))"
                )
            return jnp.where(counts, values, 0.0)

        size = chunk or max(1, _HELD // heads[0].kernel.shape[1])
        if size >= count:
            products = _products(hidden, heads)
            values = values_of(
                [_capped(x, head.softcap) for x, head in zip(products, heads, strict=True)], others
            )
            total = values @ full.reshape(count).astype(values.dtype) if reduce else values.reshape(shape)
        else:
            total = _in_parts(values_of, heads, hidden, others, full.reshape(count), size, reduce is not None)
            total = total if reduce else total.reshape(shape)
        if reduce != "mean":
            return total
        weight = jnp.sum(full).astype(total.dtype)
        return total / jnp.where(weight > 0, weight, 1.0)

    return chunked_loss


class _Head(NamedTuple):
    """The last layer of a network: logits = softcap(hidden @ kernel + bias)."""

    kernel: Array
    bias: Array | None
    softcap: ArrayLike | None


def _head(name: str, head: Head, softcap: ArrayLike | None, hidden: Any) -> _Head:
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
    return _Head(kernel, bias, softcap)


def _matmul(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    """Multiplies matrices in their own dtype, summed over one axis of each in float32 at least.

    A transpose would do the same, but on a CPU, XLA makes a float32 copy of a bfloat16 matrix for it.
    """
    dtype = jnp.result_type(a, b)
    contracted = ((axes[:1], axes[1:]), ((), ()))
    return lax.dot_general(a.astype(dtype), b.astype(dtype), contracted, preferred_element_type=_wide(a, b))


def _products(hidden: Sequence[Array], heads: Sequence[_Head]) -> list[Array]:
    """Computes the logits of both networks before the softcap."""
    logits = [_matmul(x, head.kernel) for x, head in zip(hidden, heads, strict=True)]
    return [
        x if head.bias is None else x + head.bias.astype(x.dtype)
        for x, head in zip(logits, heads, strict=True)
    ]


def _capped(logits: Array, softcap: ArrayLike | None) -> Array:
    if softcap is None:
        return logits
    softcap = jnp.asarray(softcap, logits.dtype)
    return softcap * jnp.tanh(logits / softcap)


def _wide(*arrays: Array) -> DTypeLike:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


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
        if len(given) != len(shape) + 1 or any(a not in (1, b) for a, b in zip(given, shape, strict=False)):
            raise ValueError(
                f"{name} must have one axis per axis of the logits {(*shape, 'vocabulary')}, each of the same size or "
                f"1, got shape {given}"
            )
        if all(size == 1 for size in given[:-1]) and (name != "where" or given[-1] > 1):
            fixed[name] = jnp.reshape(value, (1, given[-1]))
        else:
            per_token[name] = jnp.broadcast_to(jnp.asarray(value), (*shape, given[-1]))
    return per_token, fixed


def _blank(counts: Array, rows: Array) -> Array:
    """Sets the rows of tokens that do not count to 0, so that nothing there can reach a gradient."""
    mask = counts.reshape(counts.shape + (1,) * (rows.ndim - counts.ndim))
    return jnp.where(mask, rows, jnp.zeros((), rows.dtype))


def _in_parts(
    values_of: Callable[[list[Array], Any], Array],
    heads: list[_Head],
    hidden: list[Array],
    others: Any,
    weights: Array,
    size: int,
    total: bool,
) -> Array:
    """Computes the values of all tokens, ``[tokens]``, or their weighted sum, at most ``size`` tokens at a time."""
    softcaps = [head.softcap for head in heads]
    layers = [head._replace(softcap=None) for head in heads]
    hidden, others = jax.tree.map(lambda x: _split(x, size, "edge"), (hidden, others))
    split_weights = _split(weights, size, "constant")

    def from_products(products, others):
        return values_of([_capped(*pair) for pair in zip(products, softcaps, strict=True)], others)

    # Options may be traced, even differentiated: what the loss closes over becomes an argument
    first, first_others = jax.tree.map(lambda x: x[0], (hidden, others))
    loss, closed = jax.closure_convert(from_products, _products(first, layers), first_others)

    def summed(values, weights):
        return jnp.sum(values * weights.astype(values.dtype)) if total else values

    @jax.custom_vjp
    def run(layers, hidden, others, closed, weights):
        def step(_, part):
            return None, loss(_products(part[0], layers), part[1], *closed)

        return summed(lax.scan(step, None, (hidden, others))[1], weights)

    def forward(*primals):
        arguments = jax.tree.map(lambda x: x.value, primals)
        wanted = _Wanted(tuple(x.perturbed for x in jax.tree.leaves(primals[:-1])))
        if not total:
            return run(*arguments), (arguments, wanted, None)
        known = _gradients(loss, wanted, arguments[-1], *arguments[:-1])
        return summed(known[0], arguments[-1]), (arguments, wanted, known)

    def backward(kept, cotangent):
        arguments, wanted, known = kept
        *shared, _ = arguments
        if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
            return (None,) * len(arguments)
        if known is not None:
            values, gradients = known
            gradients = *jax.tree.map(lambda x: cotangent * x, gradients), cotangent * values
        else:
            gradients = *_gradients(loss, wanted, cotangent, *shared)[1], None
        return jax.tree.map(_fitted, gradients, arguments, is_leaf=lambda x: x is None)

    run.defvjp(forward, backward, symbolic_zeros=True)
    result = run(layers, hidden, others, closed, split_weights)
    return result if total else result.T.reshape(-1)[: weights.shape[0]]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Which of the arrays get a gradient: known while a program is traced, and kept for its backward pass."""

    flags: tuple[bool, ...]


def _gradients(
    loss: Loss, wanted: _Wanted, weights: Array, layers: list[_Head], hidden: Any, others: Any, closed: Any
) -> tuple[Array, tuple[Any, Any, Any, Any]]:
    """Computes the values, and the gradients of Σ w·v for the arrays that want one; None for the others."""
    arguments = layers, hidden, others, closed
    of_layers, of_hidden, *of_rest = jax.tree.unflatten(jax.tree.structure(arguments), wanted.flags)
    of_products = [any(pair) for pair in zip(map(any, of_layers), of_hidden, strict=True)]
    chosen = jax.tree.leaves((of_products, *of_rest))
    # Inside shard_map a sum over chunks varies over the mesh axes over which any of the arrays does
    zero = sum(jnp.ravel(x)[0].astype(jnp.float32) for x in jax.tree.leaves((arguments, weights)))
    zero = jnp.where(False, zero, 0.0)

    def zeros(x, is_wanted):
        return jnp.broadcast_to(zero.astype(_wide(x)), x.shape) if is_wanted else None

    def step(sums, part):
        hidden, others, weights = part
        leaves, tree = jax.tree.flatten((_products(hidden, layers), others, closed))

        def values_of(some):
            some = iter(some)
            rest, others, closed = jax.tree.unflatten(
                tree, [next(some) if is_wanted else x for x, is_wanted in zip(leaves, chosen, strict=True)]
            )
            return loss(rest, others, *closed)

        values, pull = jax.vjp(
            values_of, [x for x, is_wanted in zip(leaves, chosen, strict=True) if is_wanted]
        )
        by = iter(pull(weights.astype(values.dtype))[0])
        by_products, by_others, by_closed = jax.tree.unflatten(
            tree, [next(by) if flag else None for flag in chosen]
        )
        layer_sums, by_hidden = [], []
        for i, (layer, total) in enumerate(zip(layers, sums[0], strict=True)):
            by_logits, low = by_products[i], jnp.result_type(hidden[i], layer.kernel)
            if by_logits is not None and total.bias is not None:
                total = total._replace(bias=total.bias + jnp.sum(by_logits, 0))
            if by_logits is not None and low == jnp.bfloat16:  # a wider kernel would be a copy of it
                by_logits = by_logits.astype(low)
            if total.kernel is not None:
                total = total._replace(kernel=_add_product(total.kernel, hidden[i], by_logits))
            layer_sums.append(total)
            by_hidden.append(_matmul(by_logits, layer.kernel, (1, 1)) if of_hidden[i] else None)
        sums = (layer_sums, jax.tree.map(jnp.add, sums[1], by_closed))
        return sums, (values, by_hidden, by_others)

    start = jax.tree.map(zeros, (layers, closed), (of_layers, of_rest[1]))
    (layers, closed), (values, hidden, others) = lax.scan(step, start, (hidden, others, weights))
    return values, (layers, hidden, others, closed)


def _add_product(total: Array, hidden: Array, by_logits: Array) -> Array:
    """Adds a chunk's share to the gradient of a kernel, in blocks: the whole share would be as large as the kernel."""
    blocks = next(n for n in _BLOCKS if len(total) % n == 0) if total.size >= _LARGE else 1
    width = len(total) // blocks

    def add(i, total):
        block = lax.dynamic_slice_in_dim(hidden, i * width, width, 1)
        return total.at[i].add(_matmul(block, by_logits, (0, 0)))

    return lax.fori_loop(0, blocks, add, total.reshape(blocks, width, -1)).reshape(total.shape)


def _fitted(gradient: Array | None, x: Array) -> Array | None:
    """Gives a gradient the dtype of its array, and sums it over the mesh axes over which the array is the same."""
    if gradient is None:
        return None
    # Inside shard_map an array that meets one of another device is broadcast, whose transpose is that sum
    return jax.vjp(lambda x: x.astype(gradient.dtype) + gradient, x)[1](gradient)[0]


def _split(x: Array, chunk: int, mode: str) -> Array:
    """Cuts tokens into parts of at most ``chunk``, ``[parts, tokens of a part, ...]``.

    A part takes every so many tokens, so that it has some of each device's. The last are filled up: with zeros, or with
    the last token, whose loss is as well defined as it was.
    """
    parts = max(1, -(-x.shape[0] // chunk))
    size = -(-x.shape[0] // parts)
    x = jnp.pad(x, [(0, parts * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1), mode)
    return jnp.swapaxes(x.reshape(size, parts, *x.shape[1:]), 0, 1)

"""From hidden states to the values of a loss, a part of the tokens at a time, and back to the gradients.

The gradient for the logits of a part comes from the loss itself. What leads from there to the hidden states, the
kernels and the biases is written out here: products in the dtype of the operands (as the layer itself would compute
them), sums over tokens in float32 at least.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jax.typing import ArrayLike, DTypeLike

from distill_jax.losses._numerics import Loss

# A kernel of so many numbers is large: a chunk's share of its gradient is computed in blocks, of the first number that
# divides its rows
_LARGE, _BLOCKS = 2**24, (8, 4, 2, 1)


class Head(NamedTuple):
    """The last layer of a network: logits = softcap(hidden @ kernel + bias)."""

    kernel: Array
    bias: Array | None
    softcap: ArrayLike | None


def _matmul(a: Array, b: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    """Multiplies matrices in their own dtype, summed over one axis of each in float32 at least.

    A transpose would do the same, but on a CPU, XLA makes a float32 copy of a bfloat16 matrix for it.
    """
    dtype = jnp.result_type(a, b)
    contracted = ((axes[:1], axes[1:]), ((), ()))
    return lax.dot_general(a.astype(dtype), b.astype(dtype), contracted, preferred_element_type=_wide(a, b))


def products(hidden: Sequence[Array], heads: Sequence[Head]) -> list[Array]:
    """Computes the logits of both networks before the softcap."""
    logits = [_matmul(x, head.kernel) for x, head in zip(hidden, heads, strict=True)]
    return [
        x if head.bias is None else x + head.bias.astype(x.dtype)
        for x, head in zip(logits, heads, strict=True)
    ]


def capped(logits: Array, softcap: ArrayLike | None) -> Array:
    if softcap is None:
        return logits
    softcap = jnp.asarray(softcap, logits.dtype)
    return softcap * jnp.tanh(logits / softcap)


def _wide(*arrays: Array) -> DTypeLike:
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def in_parts(
    values_of: Callable[[list[Array], Any], Array],
    heads: list[Head],
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

    def from_products(logits, others):
        return values_of([capped(*pair) for pair in zip(logits, softcaps, strict=True)], others)

    # Options may be traced, even differentiated: what the loss closes over becomes an argument (jax.closure_convert
    # would do so with floating-point numbers alone)
    first, first_others = jax.tree.map(lambda x: x[0], (hidden, others))
    program = jax.make_jaxpr(from_products)(jax.eval_shape(products, first, layers), first_others)
    closed = list(program.consts)

    def loss(logits, others, *closed):
        converted = core.ClosedJaxpr(program.jaxpr, closed)
        return core.jaxpr_as_fun(converted)(*jax.tree.leaves((logits, others)))[0]

    def summed(values, weights):
        return jnp.sum(values * weights.astype(values.dtype)) if total else values

    @jax.custom_vjp
    def run(layers, hidden, others, closed, weights):
        def step(_, part):
            return None, loss(products(part[0], layers), part[1], *closed)

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
    loss: Loss, wanted: _Wanted, weights: Array, layers: list[Head], hidden: Any, others: Any, closed: Any
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
        leaves, tree = jax.tree.flatten((products(hidden, layers), others, closed))

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

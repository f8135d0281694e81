"""Integer codes of numbers: rounding with a gradient, two codes per byte, and products of integers.

A number x is held as the integer q = round(x/scale) + zero, limited to the codes that the bits have, and means
(q − zero)·scale.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import _jaxpr
from distill_jax.losses._arguments import to_float

INT8 = (-128, 127)  # the codes of a product's inputs; those of weights are symmetric, up to highest(bits)


def highest(bits: int) -> int:
    """Returns the largest code of weights, 2^(bits − 1) − 1; the smallest is its negative."""
    return 2 ** (bits - 1) - 1


def codes_of(x: jax.Array, scale: jax.Array, zero: Any, limits: tuple[int, int]) -> jax.Array:
    """Rounds numbers to codes, float32 at least, with the gradient of x/scale where the code is within limits.

    The gradient for the scale is the same chain rule, which makes the scale of codes·scale learn as in Esser et al.,
    `Learned Step Size Quantization`, 2020 (arXiv 1902.08153), Eq. 3.
    """

    @jax.custom_jvp
    def nearest(v: jax.Array, zero: Any) -> jax.Array:
        return jnp.clip(jnp.round(v) + zero, *limits)

    @nearest.defjvp
    def nearest_jvp(primals: Any, tangents: Any) -> Any:
        (v, zero), (dv, _) = primals, tangents
        codes = nearest(v, zero)
        return codes, jnp.where(codes == jnp.round(v) + zero, dv, 0)

    # Not x/scale, which XLA may turn into this product or not: every program must find the same code
    return nearest(to_float(x) * (1 / scale), zero)


def spread_over(scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats the scales of groups, so that they broadcast to ``shape``; axes of size 1 stay."""
    for axis, (parts, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if parts not in (1, size):
            scale = jnp.repeat(scale, size // parts, axis)
    return scale


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes of 4 bits into bytes: uint8 ``[ceil(n/2)]``, in row-major order, the first in the low half."""
    flat = codes.astype(jnp.int8).reshape(-1)
    flat = jnp.pad(flat, (0, flat.size % 2)).astype(jnp.uint8) & 15
    return flat[::2] | flat[1::2] << 4


def unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unpacks what :func:`pack` packed: int8 of ``shape``."""
    halves = jnp.stack([packed << 4, packed], axis=-1).astype(jnp.int8) >> 4  # the sign fills up the left
    return halves.reshape(-1)[: math.prod(shape)].reshape(shape)


def summed_axes(eqn: Any, place: int) -> tuple[int, ...] | None:
    """Lists the axes of operand ``place`` over which a matrix product or convolution sums, groups included.

    A convolution's channels come last. None if the equation is no such product.
    """
    if eqn.primitive.name == "conv_general_dilated":
        return _jaxpr.summed_axes(eqn, place) if place == 1 and eqn.params["batch_group_count"] == 1 else None
    return _jaxpr.summed_axes(eqn, place) or None if eqn.primitive.name == "dot_general" else None


def per_output(eqn: Any, place: int, array: jax.Array) -> jax.Array:
    """Turns an array of operand ``place``, of size 1 where the product sums, so that it broadcasts to the outputs."""
    rank = eqn.outvars[0].aval.ndim
    if eqn.primitive.name == "conv_general_dilated":
        axis = eqn.params["dimension_numbers"].out_spec[1]
        return array.reshape([-1 if i == axis else 1 for i in range(rank)])
    contracted, batch = (sides[place] for sides in eqn.params["dimension_numbers"])
    free = [axis for axis in range(array.ndim) if axis not in (*contracted, *batch)]
    array = jnp.transpose(array, (*batch, *free, *contracted))
    left, right = array.shape[: len(batch)], array.shape[len(batch) : len(batch) + len(free)]
    ones = (1,) * (rank - len(left) - len(right))
    return array.reshape(*left, *((*ones, *right) if place else (*right, *ones)))


def product(eqn: Any, place: int, inputs: jax.Array, weights: jax.Array, zero: jax.Array) -> jax.Array:
    """Computes Σ (inputs − zero)·weights of codes exactly, by int8 × int8 → int32 or an equal sum of floats.

    Args:
      eqn: a matrix product or a convolution.
      place: the operand that is the weights.
      inputs: codes from −128 to 127, in a floating type.
      weights: codes from −127 to 127, in a floating type.
      zero: the code that means 0.

    Returns:
      float32, with the gradient of the product.
    """

    def run(kind: Any, inputs: jax.Array, weights: jax.Array, **options: Any) -> jax.Array:
        operands = (inputs, weights) if place else (weights, inputs)
        return eqn.primitive.bind(*operands, **eqn.params | {"preferred_element_type": kind, **options})

    @jax.custom_jvp
    def exact(inputs: jax.Array, weights: jax.Array, zero: jax.Array) -> jax.Array:
        small, zero8 = inputs.astype(jnp.int8), zero.astype(jnp.int8)
        summed = summed_axes(eqn, place)
        assert summed is not None
        kernel, options = weights.astype(jnp.int8), dict[str, Any](precision=None)
        total = kernel.sum(summed, keepdims=True, dtype=jnp.int32)
        if eqn.primitive.name != "dot_general":
            small, padding = _padded(eqn, small, zero8)
            options |= padding
        terms = math.prod(kernel.shape[axis] for axis in summed)

        def integers(a: jax.Array, w: jax.Array) -> jax.Array:
            return run(jnp.int32, a, w, **options)

        # XLA has no convolution of integers on accelerators, and a network with matrix products of integers gave wrong
        # numbers on an H200, where it was called outside of jit
        platforms = ("cpu", "tpu") if eqn.primitive.name == "dot_general" else ("cpu",)
        choose = functools.partial(
            jax.lax.platform_dependent,
            **dict.fromkeys(platforms, integers),
            default=lambda a, w: by_floats(lambda *ab: run(jnp.float32, *ab, **options), a, w, terms),
        )
        sums = jax.jit(choose)(small, kernel)  # within jit, the platform is that of the arrays
        return (sums - per_output(eqn, place, total) * zero.astype(jnp.int32)).astype(jnp.float32)

    @exact.defjvp
    def exact_jvp(primals: Any, tangents: Any) -> Any:
        (inputs, weights, zero), (d_inputs, d_weights, _) = primals, tangents
        change = run(jnp.float32, d_inputs, weights) + run(jnp.float32, inputs - zero, d_weights)
        return exact(inputs, weights, zero), change.astype(jnp.float32)

    return exact(inputs.astype(jnp.float32), weights.astype(jnp.float32), zero)


def _padded(eqn: Any, inputs: jax.Array, zero: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
    """Pads and dilates a convolution's inputs by the code of 0, and returns the options that are left to do."""
    spatial = eqn.params["dimension_numbers"].lhs_spec[2:]
    widths = [(0, 0, 0)] * inputs.ndim
    for axis, (low, high), dilation in zip(
        spatial, eqn.params["padding"], eqn.params["lhs_dilation"], strict=True
    ):
        widths[axis] = (low, high, dilation - 1)
    none = {"padding": ((0, 0),) * len(spatial), "lhs_dilation": (1,) * len(spatial)}
    return jax.lax.pad(inputs, zero, widths), none


def by_floats(run: Any, inputs: jax.Array, weights: jax.Array, terms: int) -> jax.Array:
    """Computes a sum of products of int8 exactly by float32, for where XLA cannot do it with integers.

    Weights are cut into parts of few bits, so that no partial sum reaches 2^24, up to which float32 holds all
    integers. The factors are exact even in bfloat16, to which the operation may round them.

    Args:
      run: the product of two float32 arrays.
      inputs: int8.
      weights: int8.
      terms: the number of products in a sum.

    Returns:
      int32.
    """
    bits = min(8, max(1, 17 - math.ceil(math.log2(max(terms, 1)))))
    sums: Any = 0
    for shift in range(0, 8, bits):
        part = weights >> shift
        part = part if shift + bits >= 8 else part & (2**bits - 1)
        one = run(inputs.astype(jnp.float32), part.astype(jnp.float32)).astype(jnp.int32)
        sums = sums + (one << shift)
    return sums

"""A convolution whose weight gradient is fast on a CPU.

XLA computes the gradient of a convolution with respect to its kernel as a convolution with the gradient of the
outputs, a kernel as large as the image, and on a CPU takes up to five times as long for it as for the convolution
itself. Here the gradient is a sum of matrix products over small groups of examples: the patches of a group stay
in the processor's cache.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import ad, batching, mlir

# One group's patches should stay in a core's second-level cache, and a product over fewer rows is slow
_PATCH_BYTES = 2**20
_ROWS = 512
_NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


def conv_general_dilated(lhs: jax.Array, rhs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Computes ``jax.lax.conv_general_dilated``, with a fast weight gradient on a CPU.

    Values, input gradients, and everything on other platforms are those of JAX. On a CPU the gradient with respect
    to the kernel is computed in another order, and so differs in its last digits. It is used for
    two-dimensional convolutions of float32 or float64 in the layout NHWC, HWIO, NHWC (Flax's layout), with any
    strides, padding and dilation of the kernel, and without groups. All other convolutions are JAX's own. The
    transformations of JAX (``jvp``, ``vmap``, second derivatives, ``jax.export``) work as they do there.

    Flax's layers take it as an argument, ``nnx.Conv(..., conv_general_dilated=conv_general_dilated)``, and
    ``linen.Conv`` does too. The reference networks use it.

    Args:
      lhs: the images, ``[batch, height, width, inputs]``.
      rhs: the kernel, ``[height, width, inputs, outputs]``.
      args: further arguments of ``jax.lax.conv_general_dilated``.
      kwargs: further arguments of ``jax.lax.conv_general_dilated``.

    Returns:
      The images of the convolution, ``[batch, height', width', outputs]``.

    >>> def total(kernel):
    ...     y = conv_general_dilated(jnp.ones((2, 4, 4, 1)), kernel, (1, 1), "VALID",
    ...                              dimension_numbers=("NHWC", "HWIO", "NHWC"))
    ...     return y.sum()
    >>> print(jax.grad(total)(jnp.ones((1, 1, 1, 1))).ravel())
    [32.]
    """

    def convolve(lhs, rhs):
        return lax.conv_general_dilated(lhs, rhs, *args, **kwargs)

    eqns = jax.make_jaxpr(convolve)(lhs, rhs).eqns
    if len(eqns) == 1 and _is_covered(eqns[0]):
        return _conv_p.bind(jnp.asarray(lhs), jnp.asarray(rhs), **eqns[0].params)
    return convolve(lhs, rhs)


def _is_covered(eqn: Any) -> bool:
    if eqn.primitive is not lax.conv_general_dilated_p:
        return False
    avals = [v.aval for v in (*eqn.invars, *eqn.outvars)]
    p = eqn.params
    return (
        p["dimension_numbers"] == _NHWC
        and p["feature_group_count"] == p["batch_group_count"] == 1
        and set(p["lhs_dilation"]) == {1}
        and len({a.dtype for a in avals}) == 1
        and avals[0].dtype in (jnp.float32, jnp.float64)
        and all(isinstance(size, int) and size > 0 for a in avals for size in a.shape)
    )


def _weight_gradient(ct: jax.Array, lhs: jax.Array, kernel: tuple[int, ...], params: Any) -> jax.Array:
    """Sums patches · gradients over groups of examples.

    Args:
      ct: the gradient with respect to the outputs, ``[batch, height', width', outputs]``.
      lhs: the images.
      kernel: the kernel's shape.
      params: the parameters of the convolution.
    """
    height, width, inputs, outputs = kernel
    batch, *space = ct.shape[:3]
    rows = math.prod(space)
    group = max(
        math.ceil(_ROWS / rows), _PATCH_BYTES // (height * width * inputs * rows * ct.dtype.itemsize), 1
    )
    padding = ((0, 0, 0), (0, 0, 0), *((*pad, 0) for pad in params["padding"]))

    def of_group(start, size):
        images = lax.dynamic_slice_in_dim(lhs, start, size).transpose(3, 0, 1, 2)
        # The barriers keep XLA from computing padding and patches anew inside of what reads them
        images = lax.optimization_barrier(lax.pad(images, jnp.zeros((), images.dtype), padding))

        def shifted(i, j):
            starts = [at * d for at, d in zip((i, j), params["rhs_dilation"], strict=True)]
            steps = params["window_strides"]
            ends = [a + (n - 1) * s + 1 for a, n, s in zip(starts, space, steps, strict=True)]
            return lax.slice(images, (0, 0, *starts), (*images.shape[:2], *ends), (1, 1, *steps))

        patches = jnp.stack([shifted(i, j) for i in range(height) for j in range(width)])
        patches = lax.optimization_barrier(patches.reshape(-1, size * rows))
        gradients = lax.dynamic_slice_in_dim(ct, start, size).reshape(-1, outputs)
        return lax.dot(patches, gradients, precision=params["precision"])

    # The first group has what is left of the batch, so all others are full
    groups = (batch - 1) // group
    first = batch - groups * group
    total = of_group(0, first)
    if groups:
        starts = first + group * jnp.arange(groups)
        total, _ = lax.scan(lambda total, start: (total + of_group(start, group), None), total, starts)
    return total.reshape(kernel)


def _transpose_rhs(ct: jax.Array, lhs: jax.Array, rhs: Any, **params: Any) -> jax.Array:
    kernel = rhs.aval

    def jax_gradient(ct, lhs):
        return jax.linear_transpose(lambda rhs: _as_jax(lhs, rhs, **params), kernel)(ct)[0]

    def fast_gradient(ct, lhs):
        return _weight_gradient(ct, lhs, kernel.shape, params)

    return lax.platform_dependent(ct, lhs, cpu=fast_gradient, default=jax_gradient)


def _transpose_lhs(ct: jax.Array, lhs: Any, rhs: jax.Array, **params: Any) -> jax.Array:
    return jax.linear_transpose(lambda lhs: _as_jax(lhs, rhs, **params), lhs.aval)(ct)[0]


def _as_jax(lhs: jax.Array, rhs: jax.Array, **params: Any) -> jax.Array:
    return lax.conv_general_dilated_p.bind(lhs, rhs, **params)


def _batch(operands: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    return jax.vmap(lambda lhs, rhs: _as_jax(lhs, rhs, **params), axes)(*operands), 0


# The name and the parameters are those of JAX, so that whoever reads a program needs no case for it
_conv_p = core.Primitive("conv_general_dilated")
_conv_p.def_impl(_as_jax)
_conv_p.def_effectful_abstract_eval(lax.conv_general_dilated_p.abstract_eval)
ad.defbilinear(_conv_p, _transpose_lhs, _transpose_rhs)
batching.primitive_batchers[_conv_p] = _batch
mlir.register_lowering(_conv_p, mlir.lower_fun(_as_jax, multiple_results=False))

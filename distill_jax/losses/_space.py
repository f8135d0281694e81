"""Shared helpers of the feature losses: checks, masks, means and pooling over spatial axes.

Features are ``[batch, *spatial, channels]`` with any number of spatial axes, or none. A *position* is one
index of the spatial axes, and ``where`` says which positions count. The features at all others are set to
zero before anything is computed, so that nothing there, not even NaN, reaches a value or a gradient.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_bool, check_real
from distill_jax.losses._arguments import to_float

_HIGHEST = jax.lax.Precision.HIGHEST  # or a GPU multiplies float32 in 10 bits
matmul = functools.partial(jnp.matmul, precision=_HIGHEST)


class FeaturePair(NamedTuple):
    """Features of student and teacher, zero at positions that do not count, and which positions count."""

    student: Array
    teacher: Array
    valid: Array  # bool, [batch, *spatial]


def features_of(name: str, x: ArrayLike) -> Array:
    """Converts real numbers to float32 or float64 and checks the shape, ``[batch, *spatial, channels]``."""
    check_real(f"{name} features", x)
    x = to_float(x)
    if x.ndim < 2:
        raise ValueError(f"{name} features must have shape [batch, *spatial, channels], got {x.shape}")
    return x


def positions(where: ArrayLike | None, shape: Sequence[int]) -> Array:
    """Expands ``where``, ``[batch]`` or with one axis per axis of ``[batch, *spatial]``, to all positions."""
    space = tuple(shape[:-1])
    if where is None:
        return jnp.ones(space, bool)
    check_bool("where", where)
    where = jnp.asarray(where)
    if where.shape == space[:1]:
        where = where.reshape(space[:1] + (1,) * (len(space) - 1))
    if where.ndim != len(space) or any(w not in (1, n) for w, n in zip(where.shape, space, strict=True)):
        raise ValueError(
            f"where must have shape {space[:1]} (which examples count), or {len(space)} axes that broadcast "
            f"to {space} (which positions count), got shape {where.shape}"
        )
    return jnp.broadcast_to(where, space)


def example_mask(where: ArrayLike | None, batch: int) -> Array:
    """Returns which examples count, bool ``[batch]``, for losses that do not keep positions apart."""
    if where is None:
        return jnp.ones(batch, bool)
    check_bool("where", where)
    if jnp.shape(where) != (batch,):
        raise ValueError(
            f"where must have one entry per example, shape {(batch,)}, got shape {jnp.shape(where)}: this "
            "loss does not keep positions apart"
        )
    return jnp.asarray(where)


def feature_pair(
    student: ArrayLike,
    teacher: ArrayLike,
    where: ArrayLike | None,
    *,
    channels: bool = True,
    space: bool = True,
) -> FeaturePair:
    """Checks the features of student and teacher, and sets the positions that do not count to zero.

    Args:
      student: ``[batch, *spatial, channels]``.
      teacher: an array of the same shape, or different where the two switches below allow it.
      where: as in :func:`positions`.
      channels: whether both must have the same number of channels.
      space: whether both must have the same spatial shape. If not, and the shapes do differ, ``where`` may
        only be ``[batch]``.

    Raises:
      ValueError: if the shapes do not fit.
    """
    student, teacher = features_of("student", student), features_of("teacher", teacher)
    s, t = student.shape, teacher.shape
    if s[0] != t[0] or (channels and s[-1] != t[-1]) or (space and s[1:-1] != t[1:-1]):
        same = ["batch size"] + ["spatial shape"] * space + ["number of channels"] * channels
        raise ValueError(
            f"student and teacher features must agree in {', '.join(same)}, got shapes {s} and {t}: "
            "match them first, for example with distill_jax.features.project"
        )
    valid = positions(where, s)
    if s[1:-1] == t[1:-1]:
        valid_teacher = valid
    elif where is None or jnp.shape(where) == s[:1]:
        valid_teacher = positions(where, t)
    else:
        raise ValueError(
            f"where must have shape {s[:1]} for features of different spatial shapes {s} and {t}, "
            f"got {jnp.shape(where)}"
        )
    return FeaturePair(
        jnp.where(valid[..., None], student, 0.0), jnp.where(valid_teacher[..., None], teacher, 0.0), valid
    )


def per_channel(name: str, value: ArrayLike, features: Array) -> Array:
    """Converts a number, or one number per channel, to the dtype of the features."""
    if jnp.shape(value) not in ((), features.shape[-1:]):
        raise ValueError(
            f"{name} must be a scalar or one number per channel, shape {features.shape[-1:]}, "
            f"got {jnp.shape(value)}"
        )
    return jnp.asarray(value, features.dtype)


def flatten(student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None) -> tuple[Array, Array, Array]:
    """Flattens student and teacher to ``[batch, features]`` of one float type; returns which examples count.

    Excluded rows are set to zero, so that nothing in them, not even NaN, can reach a result.
    """
    student, teacher = features_of("student", student), features_of("teacher", teacher)
    batch = student.shape[0]
    if teacher.shape[0] != batch:
        raise ValueError(
            "student and teacher features must have the same batch size, got shapes "
            f"{student.shape} and {teacher.shape}"
        )
    valid = example_mask(where, batch)
    dtype = jnp.promote_types(student.dtype, teacher.dtype)
    rows = (x.reshape(batch, math.prod(x.shape[1:])).astype(dtype) for x in (student, teacher))
    student, teacher = (jnp.where(valid[:, None], x, 0.0) for x in rows)
    return student, teacher, valid


def per_example(values: Array) -> Array:
    """Sums over all axes but the first."""
    return jnp.sum(values, tuple(range(1, values.ndim)))


def total(values: Array, valid: Array, mean: bool) -> Array:
    """Sums or averages each example of ``[batch, *spatial, channels]``, already 0 at excluded positions."""
    summed = per_example(values)
    return summed / (jnp.maximum(per_example(valid), 1) * values.shape[-1]) if mean else summed


def power_of_two(size: Array) -> Array:
    """Returns a power of two near a size ≥ 0, a constant to the gradient: to divide by it rounds nothing.

    Of 0 it is 1: on a GPU, XLA may turn x/a/b into x/(a·b), which is 0/0 where the product of two tiny powers is 0.
    """
    limits = jnp.finfo(size.dtype)
    size = jax.lax.stop_gradient(size)
    size = jnp.clip(jnp.where(size == 0, 1, size), limits.tiny, limits.max / 8)  # its reciprocal is normal
    return jax.lax.reduce_precision(size, limits.nexp, 0)


def scaled(x: Array, axis: int | tuple[int, ...] | None) -> Array:
    """Divides by a power of two, so that no square or product of two over- or underflows."""
    peak = jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0)
    return jnp.where(peak == 0, 0.0, x / power_of_two(peak))  # no gradient where all is 0


def direction(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Computes x/‖x‖₂ without over- or underflow; zero, with zero gradient, where x is exactly zero."""
    x = scaled(x, axis)
    squares = jnp.sum(jnp.square(x), axis, keepdims=True)
    return x / jnp.sqrt(jnp.where(squares == 0, 1.0, squares))


def direction_difference(a: Array, b: Array, axis: int | tuple[int, ...]) -> Array:
    """Computes a/‖a‖₂ − b/‖b‖₂ like :func:`direction`; exactly zero where a equals b, also when compiled.

    A compiler turns the difference of two products into a fused multiply-add, which leaves the rounding of
    one product. A norm of the difference would then have a gradient of ordinary size at a = b. Here all that
    is subtracted is equal where a equals b, and the scaling rounds nothing.
    """

    def parts(x):
        x = scaled(x, axis)
        squares = jnp.sum(jnp.square(x), axis, keepdims=True)
        return x, 1 / jnp.sqrt(jnp.where(squares == 0, 1.0, squares))

    (a, over_a), (b, over_b) = parts(a), parts(b)
    return (a - b) * over_a + b * (over_a - over_b)


def norm(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Computes ‖x‖₂ without over- or underflow; zero gradient where x is exactly zero."""
    power = power_of_two(jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0))
    squares = jnp.sum(jnp.square(x / power), axis, keepdims=True)
    size = jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))
    return jnp.squeeze(power * size, axis)


def _bins(size: int, bins: int) -> list[tuple[int, int]]:
    """Computes the bins of PyTorch's adaptive pooling, from ⌊i·size/bins⌋ to ⌈(i+1)·size/bins⌉."""
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def pool_mean(x: Array, space: Sequence[int]) -> Array:
    """Adaptive average pooling to a spatial shape; ``space`` of () takes the mean over all positions."""
    if not space:
        return jnp.mean(x, tuple(range(1, x.ndim - 1)))
    for axis, bins in enumerate(space, 1):
        size = x.shape[axis]
        if size == bins:
            continue
        weights = np.zeros((bins, size))
        for i, (start, stop) in enumerate(_bins(size, bins)):
            weights[i, start:stop] = 1 / (stop - start)
        pooled = jnp.tensordot(x, jnp.asarray(weights, x.dtype), (axis, 1), precision=_HIGHEST)
        x = jnp.moveaxis(pooled, -1, axis)
    return x


def pool_max(x: Array, space: Sequence[int]) -> Array:
    """Adaptive maximum pooling to a spatial shape; ``space`` of () takes the maximum over all positions."""
    if not space:
        return jnp.max(x, tuple(range(1, x.ndim - 1)))
    for axis, bins in enumerate(space, 1):
        size = x.shape[axis]
        if size != bins:
            parts = [
                jnp.max(jax.lax.slice_in_dim(x, start, stop, axis=axis), axis)
                for start, stop in _bins(size, bins)
            ]
            x = jnp.stack(parts, axis)
    return x


def common_space(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """Finds the spatial shape to which features of two shapes are pooled: the smaller size along each axis.

    It is (), global pooling, where the shapes have different numbers of spatial axes or none.
    """
    if len(first) != len(second):
        return ()
    return tuple(map(min, first[1:-1], second[1:-1]))


def count(space: Sequence[int]) -> int:
    """Counts the positions of a spatial shape; 1 for ()."""
    return math.prod(space)


def gram(a: Array, b: Array) -> Array:
    """Sums products of channels over the positions: ``[batch, channels of a, channels of b]``."""
    a, b = (x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]) for x in (a, b))
    return jnp.einsum("npi,npj->nij", a, b, precision=_HIGHEST)


def product(a: Array, b: Array) -> Array:
    """Computes a·bᵀ over the last two axes, in full precision also where the default is lower."""
    return matmul(a, jnp.swapaxes(b, -1, -2))

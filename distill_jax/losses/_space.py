"""What losses between features are computed with: checks, masks, means and pooling over space.

Features are ``[batch, *spatial, channels]`` with any number of spatial axes, none included. A
*position* is a place in space; ``where`` says which positions count. What stands at the others is
set to zero before anything is computed, so that nothing there, NaN included, reaches a value or a
gradient.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses._numerics import to_float

Array = jax.Array
_HIGHEST = jax.lax.Precision.HIGHEST  # or a GPU multiplies float32 in 10 bits
matmul = functools.partial(jnp.matmul, precision=_HIGHEST)


class FeaturePair(NamedTuple):
    """Features of student and teacher, zero where excluded, and the positions that count."""

    student: Array
    teacher: Array
    valid: Array  # bool, [batch, *spatial]


def features_of(name: str, x: Any) -> Array:
    """``x`` as float32 or float64, checked to be ``[batch, *spatial, channels]``."""
    x = to_float(x)
    if x.ndim < 2:
        raise ValueError(f"{name} features must be [batch, *spatial, channels], got {x.shape}")
    return x


def positions(where: Any, shape: Sequence[int]) -> Array:
    """``where`` as bool ``[batch, *spatial]``: given so, with axes of 1, or as ``[batch]``."""
    space = tuple(shape[:-1])
    if where is None:
        return jnp.ones(space, bool)
    where = jnp.asarray(where)
    if where.dtype == bool and where.shape == space[:1]:
        where = where.reshape(space[:1] + (1,) * (len(space) - 1))
    fits = where.dtype == bool and where.ndim == len(space)
    if not fits or any(w not in (1, n) for w, n in zip(where.shape, space, strict=True)):
        raise ValueError(
            f"where must be bool, {space[:1]} for examples or broadcastable to {space} for "
            f"positions, with as many axes, got {where.dtype} {where.shape}"
        )
    return jnp.broadcast_to(where, space)


def feature_pair(
    student: Any, teacher: Any, where: Any, *, channels: bool = True, space: bool = True
) -> FeaturePair:
    """Checks two arrays of features, and clears the positions that do not count.

    Args:
      student: ``[batch, *spatial, channels]``.
      teacher: the same; other channels or space where the two switches below say so.
      where: as in :func:`positions`.
      channels: whether both must have the same number of channels.
      space: whether both must have the same spatial shape. If not, ``where`` may only name
        examples, unless the shapes do agree.

    Raises:
      ValueError: if the shapes do not fit.
    """
    student, teacher = features_of("student", student), features_of("teacher", teacher)
    s, t = student.shape, teacher.shape
    if s[0] != t[0] or (channels and s[-1] != t[-1]) or (space and s[1:-1] != t[1:-1]):
        same = ["batch"] + ["spatial shape"] * space + ["number of channels"] * channels
        raise ValueError(
            f"student and teacher features must have one {', one '.join(same)}, got {s} and {t}: "
            "match them first, as the parts of distill_jax.learned do"
        )
    valid = positions(where, s)
    if s[1:-1] == t[1:-1]:
        valid_teacher = valid
    elif where is None or jnp.asarray(where).shape == s[:1]:
        valid_teacher = positions(where, t)
    else:
        raise ValueError(
            f"where must be [batch] for features of different space, {s} and {t}, "
            f"got {jnp.asarray(where).shape}"
        )
    return FeaturePair(
        jnp.where(valid[..., None], student, 0.0), jnp.where(valid_teacher[..., None], teacher, 0.0), valid
    )


def per_example(values: Array) -> Array:
    """The sum over all axes but the first."""
    return jnp.sum(values, tuple(range(1, values.ndim)))


def total(values: Array, valid: Array, mean: bool) -> Array:
    """Sum or mean an example of ``[batch, *spatial, channels]``, already 0 at excluded positions."""
    summed = per_example(values)
    return summed / (jnp.maximum(per_example(valid), 1) * values.shape[-1]) if mean else summed


def direction(x: Array, axis: int | tuple[int, ...]) -> Array:
    """x/‖x‖₂; zero, with zero gradient, where x is exactly zero. Neither over- nor underflows."""
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0))
    zero = peak == 0
    x = jnp.where(zero, 0.0, x / jnp.where(zero, 1.0, peak))  # no change to the direction
    squares = jnp.sum(jnp.square(x), axis, keepdims=True)
    return x / jnp.sqrt(jnp.where(zero, 1.0, squares))


def norm(x: Array, axis: int | tuple[int, ...]) -> Array:
    """‖x‖₂, with zero gradient where x is exactly zero."""
    peak = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0))
    zero = peak == 0
    peak = jnp.where(zero, 1.0, peak)
    squares = jnp.sum(jnp.square(jnp.where(zero, 0.0, x / peak)), axis, keepdims=True)
    size = jnp.where(zero, 0.0, peak * jnp.sqrt(jnp.where(zero, 1.0, squares)))
    return jnp.squeeze(size, axis)


def _bins(size: int, bins: int) -> list[tuple[int, int]]:
    """Bins from ⌊i·size/bins⌋ to ⌈(i+1)·size/bins⌉: of PyTorch's adaptive pooling."""
    return [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]


def pool_mean(x: Array, space: Sequence[int]) -> Array:
    """Adaptive average pooling to a spatial shape; ``space`` of () is the mean over all positions."""
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
    """Adaptive maximum pooling to a spatial shape; ``space`` of () is the maximum over positions."""
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
    """The spatial shape in which features of two shapes meet: the smaller along each axis.

    () where either has no spatial axis, or where they have different numbers of them: such features
    meet after global pooling.
    """
    if len(first) != len(second):
        return ()
    return tuple(map(min, first[1:-1], second[1:-1]))


def count(space: Sequence[int]) -> int:
    """The number of positions; 1 for ()."""
    return math.prod(space)


def gram(a: Array, b: Array) -> Array:
    """Σ over positions of the products of channels: ``[batch, a's channels, b's channels]``."""
    a, b = (x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]) for x in (a, b))
    return jnp.einsum("npi,npj->nij", a, b, precision=_HIGHEST)

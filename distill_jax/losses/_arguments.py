"""Checks and conversions of the arguments that losses share: logits, options, masks, weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import (
    check_bool,
    check_not_negative,
    check_positive,
    check_real,
    is_integer,
    warn_if_probabilities,
)


def to_float(x: ArrayLike) -> Array:
    """Converts to float32, or keeps float64 and complex numbers. A Python number stays weak: it widens nothing."""
    if isinstance(x, int | float):
        return jnp.asarray(float(x))
    x = jnp.asarray(x)
    return x if x.dtype == jnp.float64 or jnp.iscomplexobj(x) else x.astype(jnp.float32)


def logits_of(name: str, logits: ArrayLike, axis: int) -> Array:
    """Checks logits that a user gave, warns of probabilities, and converts to float32 or float64."""
    check_real(name, logits)
    shape = jnp.shape(logits)
    if not is_integer(axis) or not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis must be an integer that names an axis of {name}, of shape {shape}, got {axis!r}"
        )
    if shape[axis] == 0:
        raise ValueError(f"{name} must have at least one class on axis {axis}, got shape {shape}")
    warn_if_probabilities(name, logits, axis=axis)
    return to_float(logits)


def both_logits(student: ArrayLike, teacher: ArrayLike, axis: int) -> tuple[Array, Array]:
    """Checks and converts the logits of student and teacher, which must have one shape."""
    student = logits_of("student_logits", student, axis)
    teacher = logits_of("teacher_logits", teacher, axis)
    if student.shape != teacher.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, got {student.shape} and {teacher.shape}"
        )
    return student, teacher


def scalar(name: str, value: ArrayLike, dtype: DTypeLike) -> Array:
    """Converts an option that must be one number."""
    check_real(name, value)
    if jnp.ndim(value):
        raise ValueError(f"{name} must be a number, got an array of shape {jnp.shape(value)}")
    return jnp.asarray(value, dtype)


def weight(name: str, value: ArrayLike, logits: Array, axis: int) -> Array:
    """Converts the weight of a term, a number or an array that broadcasts to the values, one per row of logits."""
    check_not_negative(name, value)
    given, axis = jnp.shape(value), axis % logits.ndim
    wanted = logits.shape[:axis] + logits.shape[axis + 1 :]
    tail = zip(given[::-1], wanted[::-1], strict=False)
    if len(given) > len(wanted) or any(a not in (1, b) for a, b in tail):
        raise ValueError(f"{name} must be a number or broadcast to {wanted}, got shape {given}")
    return jnp.asarray(value, logits.dtype)


def temperature_of(value: ArrayLike, logits: Array, axis: int) -> Array:
    """Converts a temperature: a number, or one axis per axis of the logits, with size 1 on the class axis."""
    check_positive("temperature", value)
    given, wanted = jnp.shape(value), list(logits.shape)
    wanted[axis] = 1
    if given and (
        len(given) != len(wanted) or any(a not in (1, b) for a, b in zip(given, wanted, strict=True))
    ):
        raise ValueError(
            f"temperature must be a number, or broadcast to {tuple(wanted)} with as many axes, got shape {given}"
        )
    return jnp.asarray(value, logits.dtype)


def valid_classes(logits: Array, where: ArrayLike | None) -> Array:
    """Says which classes exist: those of ``where`` whose logit is above −inf."""
    return masked(logits, where) != -jnp.inf  # a NaN is valid, so that it shows in the result


def masked(logits: Array, where: ArrayLike | None) -> Array:
    """Makes −inf of the logits of classes that ``where`` excludes.

    ``where`` is ``bool`` with one axis per axis of the logits, each of the same size or 1. So a mask of
    classes, ``[1, classes]``, and a mask of examples, ``[batch, 1]``, cannot be mistaken for each other.
    """
    return logits if where is None else jnp.where(mask_of(where, logits), logits, -jnp.inf)


def mask_of(where: ArrayLike | None, logits: Array) -> Array:
    """Checks ``where`` and expands it to the shape of the logits."""
    if where is None:
        return jnp.ones(logits.shape, bool)
    check_bool("where", where)
    where, shape = where if isinstance(where, jax.Array) else np.asarray(where), logits.shape
    fits = where.ndim == len(shape) and all(a in (1, b) for a, b in zip(where.shape, shape, strict=True))
    if not fits:
        raise ValueError(
            f"where must have one axis per axis of the logits {shape}, each of the same size or 1 (for example "
            f"where[None, :] for classes, where[:, None] for examples), got shape {where.shape}"
        )
    return jnp.broadcast_to(where, shape)


def token_weights(
    shape: tuple[int, ...], where: ArrayLike | None, weights: ArrayLike | None, *, name: str = "where"
) -> tuple[Array, Array]:
    """Expands which tokens count (bool) and their weights (float) to a shape."""
    if weights is not None:
        check_real("weights", weights)
    for argument, value in ((name, where), ("weights", weights)):
        given = () if value is None else np.shape(value)
        tail = zip(reversed(given), reversed(shape), strict=False)
        if len(given) > len(shape) or any(a not in (1, b) for a, b in tail):
            raise ValueError(f"{argument} must broadcast to {shape}, one entry per token, got {given}")
    if where is not None:
        check_bool(name, where)
    counts = jnp.broadcast_to(True if where is None else jnp.asarray(where), shape)
    if weights is None:
        return counts, counts.astype(jnp.float32)
    if not isinstance(weights, jax.core.Tracer):
        least, most = np.min(weights, initial=0), np.max(weights, initial=0)
        if not 0 <= least <= most < np.inf:  # a NaN is both
            raise ValueError(f"weights must be at least 0 and finite, got {least if least < 0 else most}")
    weights = jnp.broadcast_to(to_float(weights), shape)
    counts &= weights != 0
    return counts, jnp.where(counts, weights, 0.0)


def check_rows(shape: tuple[int, ...], rows: Any) -> None:
    """Raises ``ValueError`` unless all arrays have a row for each token: ``[*shape, ...]``."""
    for leaf in jax.tree.leaves(rows):
        if leaf.shape[: len(shape)] != shape:
            raise ValueError(
                f"positional arrays must have shape {shape} + (...), one row per token as the student has, got "
                f"{leaf.shape}: pass other arrays as keywords"
            )


def check_option_of_rows(name: str, value: ArrayLike, shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless an option broadcasts to the logits of tokens, with as many axes."""
    given = jnp.shape(value)
    if len(given) != len(shape) + 1 or any(a not in (1, b) for a, b in zip(given, shape, strict=False)):
        raise ValueError(
            f"{name} must have one axis per axis of the logits {(*shape, 'vocabulary')}, each of the same size or 1, "
            f"got shape {given}"
        )


def blank_rows(counts: Array, rows: Array) -> Array:
    """Sets the rows of tokens that do not count to 0, so that nothing there can reach a gradient."""
    mask = counts.reshape(counts.shape + (1,) * (rows.ndim - counts.ndim))
    return jnp.where(mask, rows, jnp.zeros((), rows.dtype))


def check_axis_name(name: str, logits: Array, axis_name: str | None) -> None:
    """Raises ``ValueError`` unless logits are spread over a mesh axis inside ``jax.shard_map``."""
    if axis_name is None:
        return
    if not isinstance(axis_name, str):
        raise ValueError(f"axis_name must be the name of a mesh axis, got {axis_name!r}")
    try:
        lax.axis_size(axis_name)
        lax.pcast(logits, axis_name, to="varying")
    except NameError:  # there is no such axis
        pass
    except ValueError:  # there is nothing to convert: they vary over the axis
        return
    raise ValueError(
        f"axis_name names the mesh axis over which the classes of {name} are spread inside jax.shard_map, whose "
        f"check_vma must be True, but they do not vary over {axis_name!r}: leave it out, or check in_specs"
    )

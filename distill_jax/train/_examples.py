"""Checks of the examples that a training or a validation is given, once and outside of compiled code."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_real
from distill_jax._model import Model, PyTree


def as_arrays(name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """Converts examples to JAX arrays, and checks them.

    Args:
      name: what messages call the examples.
      data: name → array ``[n, ...]``, or name → pytree of such arrays.

    Returns:
      The same as JAX arrays.

    Raises:
      ValueError: if ``data`` is no dict of arrays of numbers, the arrays are not equally long, a weight is
        negative or all are 0, or the teacher's output for an example that counts is NaN.
    """
    if not isinstance(data, Mapping) or not jax.tree.leaves(data):
        raise ValueError(
            f"{name} must be a dict, such as {{'image': ..., 'label': ...}}, of arrays [n, ...], got "
            f"{type(data).__name__}{'' if isinstance(data, Mapping) else ', no dict'}"
        )
    for key, part in data.items():
        for leaf in jax.tree.leaves(part, is_leaf=lambda x: x is None):
            _check_leaf(f"{name}[{key!r}]", leaf, real=key in ("teacher", "weight"))
    lengths = {key: len(leaf) for key, part in data.items() for leaf in jax.tree.leaves(part)}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"{name} must have as many examples in each array, got {lengths}")
    if not lengths.popitem()[1]:
        raise ValueError(f"{name} must have at least one example in each array ('image' and so on), got none")
    if "weight" in data:
        _check_weight(f"{name}['weight']", data["weight"])
    arrays: dict[str, Any] = jax.tree.map(jnp.asarray, dict(data))
    for leaf in jax.tree.leaves(arrays.get("teacher")):
        if wrong := _count_nan(leaf, _counted(arrays)):
            raise ValueError(
                f"{name}['teacher'] holds NaN in {wrong} of {len(leaf)} examples: check the teacher, or leave them out"
            )
    return arrays


def _check_leaf(name: str, leaf: Any, *, real: bool) -> None:
    mask = hasattr(leaf, "dtype") and leaf.dtype == np.bool_
    if real and not mask:  # weights may be a mask
        check_real(name, leaf)
    elif not isinstance(leaf, jax.Array) and (
        isinstance(leaf, np.ma.MaskedArray) or np.asarray(leaf).dtype.kind in "OSUV"
    ):
        kind = (
            type(leaf).__name__
            if not isinstance(leaf, np.ndarray)
            else f"{type(leaf).__name__} of {leaf.dtype}"
        )
        raise ValueError(f"{name} must be an array of numbers [n, ...], got {kind}")
    if not np.ndim(leaf):
        raise ValueError(
            f"{name} must be an array [n, ...], got a single value: turn a list into an array first"
        )


def _check_weight(name: str, weight: Any) -> None:
    weight = np.asarray(weight)
    if weight.ndim != 1 or not (weight >= 0).all() or not np.isfinite(weight).all() or not weight.any():
        raise ValueError(
            f"{name} must be finite numbers [n] ≥ 0 that are not all 0, got shape {weight.shape} from "
            f"{weight.min()} to {weight.max()}"
        )


def _counted(data: Mapping[str, Any]) -> jax.Array | None:
    """Returns bool ``[n]``, the examples whose weight is not 0; None where there are no weights."""
    return jnp.asarray(data["weight"]) > 0 if "weight" in data else None


def _count_nan(leaf: Any, counted: jax.Array | None) -> int:
    """Counts the examples that count and hold NaN."""
    leaf = jnp.asarray(leaf)
    return int(_nan_rows(leaf, counted)) if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0


@jax.jit
def _nan_rows(leaf: jax.Array, counted: jax.Array | None) -> jax.Array:
    wrong = jnp.any(jnp.isnan(leaf).reshape(len(leaf), -1), -1)
    return jnp.sum(wrong if counted is None else wrong & counted)


def complaint_about(data: Mapping[str, Any], model: Model, images: PyTree) -> str:
    """Says what in the examples makes a loss NaN; an empty string if nothing does, so the training diverged.

    Args:
      data: the examples, with or without ``"weight"``.
      model: a model whose outputs are ``[..., classes]`` for integer labels ``[...]``.
      images: its inputs, or what takes their place; only shapes and dtypes are used.

    Returns:
      A clause for a message.
    """
    counted = _counted(data)
    for key in ("image", "label"):
        for leaf in jax.tree.leaves(data.get(key)):
            if count := _count_nan(leaf, counted):
                return f"{key!r} holds NaN in {count} of {len(leaf)} examples: correct or leave out these examples"
    label = data.get("label")
    if label is None or not jnp.issubdtype(jnp.asarray(label).dtype, jnp.integer):
        return ""
    label = np.asarray(label)
    try:
        outputs = jax.tree.leaves(jax.eval_shape(model, images))
    except Exception:  # whatever the model raises on images that are not prepared: its classes are not known
        outputs = []
    classes = next((out.shape[-1] for out in outputs if out.ndim == label.ndim + 1), np.inf)
    wrong = (label < 0) | (label >= classes)
    if counted is not None:
        wrong &= np.asarray(counted).reshape(-1, *[1] * (label.ndim - 1))
    if not wrong.any():
        return ""
    return (
        f"{int(wrong.sum())} of {label.size} labels lie outside [0, {classes}), the classes of the model: "
        f"'label' goes from {label.min()} to {label.max()}"
    )

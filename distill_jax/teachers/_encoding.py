"""Checks and conversions of a teacher's outputs before they are stored, common to all kinds of labels."""

from typing import Any

import numpy as np

from distill_jax._checks import check_real, warn_if_probabilities
from distill_jax.teachers._label_files import DTYPES


def as_array(name: str, given: Any, ids: np.ndarray | None, form: str = "...") -> np.ndarray:
    """Converts outputs to an array ``[n, ...]``, ``[n, form]`` with two axes."""
    check_real(name, given)
    given = np.asarray(given)
    n = "n" if ids is None else str(len(ids))
    fits = given.ndim == 2 if form != "..." else given.ndim > 0
    if not fits or not given.size or n not in ("n", str(len(given))):
        raise ValueError(f"expected {name} of shape [{n}, {form}], got {given.shape}")
    return given.astype(np.float32) if given.dtype.isbuiltin == 2 else given  # bfloat16 and narrower types


def as_logits(outputs: Any, ids: np.ndarray | None) -> np.ndarray:
    """Converts outputs to logits ``[n, classes]``."""
    logits = as_array("logits", outputs, ids, "classes")
    warn_if_probabilities("the labels to store", logits)
    return logits


def cast(name: str, given: np.ndarray, dtype: str, *, masked: bool = False) -> np.ndarray:
    """Converts numbers to the dtype on disk; classes may be masked by −∞, but not all of an example."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = given.astype(DTYPES[dtype], order="C")
    without = given == -np.inf if masked else np.zeros(given.shape, bool)
    lost = ~np.isfinite(stored) & ~without
    if lost.any():
        raise ValueError(
            f"{lost.reshape(len(lost), -1).any(-1).sum()} of {len(lost)} examples have {name} that are NaN, infinite, "
            f"or too large for {dtype}: check the teacher, or store float32"
        )
    if masked and without.all(-1).any():
        raise ValueError(
            f"{without.all(-1).sum()} of {len(given)} examples have no class: all their {name} are -inf"
        )
    return stored


def wide(array: np.ndarray) -> np.ndarray:
    """Converts numbers to float32."""
    return array.astype(np.float32, copy=False)


def narrowest(most: int) -> type[np.unsignedinteger]:
    """The narrowest dtype of integers from 0 to ``most``."""
    return np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.uint32

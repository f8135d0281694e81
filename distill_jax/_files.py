"""Writes files and JSON in one piece: a reader finds the whole file, the old one, or none."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path and then moves the file to ``path``, so it is never half there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any, where: str = "") -> Any:
    """Turns NumPy values into plain ones for JSON.

    Args:
      value: mappings with string keys, lists, arrays, numbers, strings and None, nested in any way.
      where: the key of ``value``, for messages.

    Raises:
      ValueError: if a value is NaN, infinite, or of a type that JSON cannot hold; the message names its key.
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(x, f"{where}.{key}".lstrip(".")) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x, f"{where}[{i}]") for i, x in enumerate(value)]
    if isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{where or 'results'} is {value!r}, which JSON cannot hold")


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON in one piece.

    Raises:
      ValueError: if a value is NaN, infinite, or of a type that JSON cannot hold; the message names its key.
    """
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

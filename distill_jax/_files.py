"""Files that are whole or not there: a reader never meets half of one."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write(temporary path)`` and moves the result to ``path``: whole, or not there."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any, where: str = "") -> Any:
    """Turns NumPy's values into JSON's, and refuses what JSON has not, naming its key."""
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
    """Writes strict JSON atomically.

    Raises:
      ValueError: if a value is NaN, infinite or not JSON's, naming its key.
    """
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

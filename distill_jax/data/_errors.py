"""The error of all sources of data, and its one-line messages."""

from typing import Any


class DataError(ValueError):
    """Data that was not found, is damaged, or has the wrong form; the message is one line."""


def need(ok: Any, where: Any, expected: str, found: Any) -> None:
    """Raises :class:`DataError` that says where, what was expected and what was found, unless ``ok``."""
    if not ok:
        raise DataError(f"{where}: expected {expected}, found {found}")


def one_line(error: BaseException) -> str:
    """Writes another library's error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

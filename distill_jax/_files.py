"""Writes files and JSON in one piece: a reader finds the whole file, the old one, or none."""

import contextlib
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Calls ``write`` with a temporary path and then moves the file to ``path``, so it is never half there.

    The temporary name is drawn, so two processes or threads that write one file do not mix their contents.
    After the return the file survives a power cut.

    Raises:
      OSError: if the file cannot be written; the error names ``path``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can open a directory
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps other writers out of a directory. The system opens the lock when the process ends, however it ends.

    Raises:
      ValueError: if another writer is at work there.
    """
    path = directory / LOCK
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if not _lock(descriptor) or not _same_file(descriptor, path):
            raise ValueError(
                f"another process is writing in {directory}: wait for it, or choose another directory"
            )
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks
        pass
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    """Says whether a lock file is still there: the writer before removes it when it has done."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def plain(value: Any, where: str = "") -> Any:
    """Turns NumPy values into plain ones for JSON.

    Args:
      value: mappings with string keys, lists, arrays, numbers, strings and None, nested in any way.
      where: the key of ``value``, for messages.

    Raises:
      ValueError: if a value is NaN, infinite, or of a type that JSON cannot hold; the message names its key.
    """
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.ma.MaskedArray):
        value = value.tolist()
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(x, f"{where}.{key}".lstrip(".")) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x, f"{where}[{i}]") for i, x in enumerate(value)]
    if isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    shown = " ".join(repr(value).split())
    raise ValueError(f"{where or 'results'} is {shown[:100]}, which JSON cannot hold")


def write_json(path: str | Path, value: Any) -> None:
    """Writes strict JSON in one piece.

    Raises:
      ValueError: if a value is NaN, infinite, or of a type that JSON cannot hold; the message names its key.
    """
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def seal(value: Mapping[str, Any], name: str = "digest") -> dict[str, Any]:
    """Adds a digest of this name to a JSON object, by which a reader, such as :func:`unseal`, notices damage.

    >>> unseal(seal({"epoch": 3}))
    {'epoch': 3}
    """
    value = json.loads(json.dumps(value))  # as it will be read: string keys, lists
    return {**value, name: _digest(value)}


def unseal(value: Any) -> dict[str, Any]:
    """Takes the digest from a JSON object that :func:`seal` made.

    Raises:
      ValueError: if the object is not as it was sealed.
    """
    if not isinstance(value, dict) or "digest" not in value:
        raise ValueError("it holds no digest, as if an earlier version had written it")
    rest = {key: x for key, x in value.items() if key != "digest"}
    if value["digest"] != _digest(rest):
        raise ValueError("its contents do not have the digest that was written with them")
    return rest


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""Keeps decoded and downloaded arrays in a file, which is used only if it is whole and up to date."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from distill_jax._files import write_atomically
from distill_jax.data._errors import one_line

# train_image, train_label, test_image, test_label; glyphs has more
Arrays = dict[str, np.ndarray]


def folder_of(cache_dir: str | Path | None) -> Path:
    """Returns the folder of kept data: the one given, or ``distill_jax`` in the user's cache."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "distill_jax"
    return Path(cache_dir)


def cached(folder: Path, what: str, version: str, build: Callable[[], Arrays]) -> Arrays:
    """Returns the arrays that ``build`` makes, from a file of an earlier call where there is one.

    Args:
      folder: where the file is kept; it may start with ``~``.
      what: names the data; each has its own file.
      version: changes when the source does; a file of another version is built anew.
      build: makes the arrays.
    """
    name = file_name(what)
    version = f"{what} {version}"
    # NumPy and zipfile raise errors of a dozen types for a damaged file; each means: build anew
    with (
        contextlib.suppress(Exception),
        (folder.expanduser() / name).open("rb") as file,
        np.load(file) as saved,
    ):
        arrays = {key: saved[key] for key in saved.files if key != "digest"}
        if str(saved["digest"]) == _digest(version, arrays):
            return arrays
    arrays = build()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, digest=_digest(version, arrays), **arrays)

    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, write)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home directory
        warnings.warn(f"decoded data is not kept in {folder}: {one_line(error)}", stacklevel=5)
    return arrays


def file_name(what: str) -> str:
    """Returns the name of the file in which :func:`cached` keeps the data."""
    return f"{what.split('/')[0]}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.npz"


def _digest(version: str, arrays: Arrays) -> str:
    digest = hashlib.sha256(version.encode())
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

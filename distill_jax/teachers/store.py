"""The store of soft labels: a teacher's outputs for a data set on disk, found by example id."""

import hashlib
import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_function, check_integers, check_real, warn_if_probabilities
from distill_jax._files import locked
from distill_jax.teachers import _label_files
from distill_jax.teachers._fingerprint import fingerprint
from distill_jax.teachers._label_files import DTYPES, FORMAT, brief


class LabelStore:
    """Soft labels on disk, found by example id. Only what is asked for is read.

    Open a store with :func:`open_labels`, and write one with :func:`write_labels`. Its directory holds
    ``store.json`` (a description, with a checksum of itself and of the ids), ``ids.bin`` (the ids, int64,
    sorted) and the files ``00000.bin``, ``00001.bin`` and so on: the logits in the order of the ids, with the
    same number of rows per file, and after them the file's SHA-256 of 32 bytes.

    Attributes:
      path: the directory.
      count: the number of examples.
      classes: the number of logits per example.
      fingerprint: name → string; says what the labels were made from, such as the teacher and the data.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.count: int = manifest["count"]
        self.classes: int = manifest["classes"]
        self.fingerprint: dict[str, str] = manifest["fingerprint"]
        self._manifest = manifest
        self._folder = path.absolute()  # files are opened when they are read, in whatever directory that is
        self._ids = _label_files.map_ids(path)
        self._written = _label_files.stamp(self._folder)

    def __getitem__(self, ids: ArrayLike) -> np.ndarray:
        """Reads the logits of examples.

        Args:
          ids: integers ``[n]``, in any order; an id may occur several times. Any other shape is allowed, too,
            such as a single integer.

        Returns:
          The logits in the order of ``ids``, float32 ``[n, classes]``.

        Raises:
          KeyError: if an id has no label.
          ValueError: if the ids are no integers, a file cannot be read, or another store was written in the
            place of this one.
        """
        wanted = _as_ids(ids)
        order = np.argsort(wanted, axis=None)
        in_order = wanted.ravel()[order]
        rows = np.minimum(np.searchsorted(self._ids, in_order), self.count - 1)
        missing = in_order[self._ids[rows] != in_order]
        if missing.size:
            raise KeyError(
                f"{missing.size} of {wanted.size} examples have no soft label in {self.path}, for "
                f"instance ids {missing[:5].tolist()}: label them with the teacher first"
            )
        result = np.empty((wanted.size, self.classes), np.float32)
        shard_rows = self._manifest["shard_rows"]
        shards = rows // shard_rows
        starts = [0, *(np.flatnonzero(np.diff(shards)) + 1), wanted.size] if wanted.size else []
        for start, end in itertools.pairwise(starts):
            labels = _label_files.map_shard(self._folder, self._manifest, int(shards[start]))
            result[order[start:end]] = labels[rows[start:end] % shard_rows]
        if _label_files.stamp(self._folder) != self._written:
            raise ValueError(f"{self.path} was deleted or written anew since it was opened: open it again")
        return result.reshape(*wanted.shape, self.classes)


def write_labels(
    path: str | Path,
    ids: ArrayLike,
    logits: Callable[[np.ndarray], ArrayLike],
    *,
    fingerprint: Mapping[str, str],
    dtype: str = "float32",
    shard_rows: int = 8192,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> LabelStore:
    """Writes a store of soft labels, or completes one whose writing was interrupted.

    Args:
      path: the directory, which is created if it does not exist.
      ids: the ids of the examples, integers ``[n]``, without repetition.
      logits: a function ``positions -> logits [len(positions), classes]``, where position i means the
        example ``ids[i]``. A class that is masked has the logit −∞.
      fingerprint: names → strings that say what the labels depend on, for example
        ``{"teacher": fingerprint(model), "preprocessing": "x / 255", "data": fingerprint(images)}``.
      dtype: the dtype on disk: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
      shard_rows: the number of examples per file. An interruption loses at most one file.
      progress: called after each file with the number of examples written and the number of all.

    Returns:
      The opened store. A complete store that fits is returned as it is.

    Raises:
      ValueError: if the directory holds other labels (the message names the difference) or another process
        writes in it, if the checksum of a file is wrong, if ids repeat or are no integers, or if logits have
        the wrong shape, are no real numbers, are NaN, overflow ``dtype``, or are −∞ for all classes.
      OSError: if the disk is full or cannot be written. What was written stays, and the same call goes on.

    Warns:
      UserWarning: if the labels seem to be probabilities and not logits.

    >>> import tempfile
    >>> logits = np.array([[1.0, -1.0], [0.0, 2.0]])
    >>> with tempfile.TemporaryDirectory() as path:
    ...     store = write_labels(path, [7, 3], lambda rows: logits[rows], fingerprint={"teacher": "t"})
    ...     print(store[[3]])
    [[0. 2.]]
    """
    path, ids = _as_directory(path), _as_ids(ids)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {brief(repr(dtype))}")
    check_count("shard_rows", shard_rows)
    _check_entries("fingerprint", fingerprint)
    check_function("logits", logits, "positions")
    check_function("progress", progress, "done, total")
    if ids.ndim != 1 or not len(ids):
        raise ValueError(
            f"ids must be a non-empty list without repetition, got an array of shape {ids.shape}"
        )
    order = np.argsort(ids)
    ids = ids[order]
    repeated = ids[1:][ids[1:] == ids[:-1]]
    if repeated.size:
        raise ValueError(f"ids must be a non-empty list without repetition, got {repeated[0]} several times")
    described = {
        "format": FORMAT,
        "count": len(ids),
        "dtype": dtype,
        "shard_rows": min(int(shard_rows), len(ids)),
        "ids": hashlib.sha256(ids.data).hexdigest(),
        "fingerprint": dict(fingerprint),
    }
    state = _label_files.find(path, described)
    if state is not None and not _label_files.missing_files(path, state):
        _label_files.verify(path, state)
        return LabelStore(path, state)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        state = _label_files.find(path, described)  # again: another process may have written since
        return LabelStore(path, _complete(path, state, described, order, ids, logits, progress))


def _complete(
    path: Path,
    state: dict[str, Any] | None,
    described: dict[str, Any],
    order: np.ndarray,
    ids: np.ndarray,
    logits: Callable[[np.ndarray], ArrayLike],
    progress: Callable[[int, int], Any],
) -> dict[str, Any]:
    """Writes the files that are missing, after verifying those that are there."""
    _label_files.clear_left(path)
    if state is not None:
        _label_files.verify(path, state, complete=False)
    shards = _label_files.missing_shards(path, described)
    done = len(ids) - sum(_label_files.rows_of(described, shard) for shard in shards)
    for shard in shards:
        rows = order[shard * described["shard_rows"] :][: described["shard_rows"]]
        classes = None if state is None else state["classes"]
        stored = _to_store(logits(rows), len(rows), classes, described["dtype"])
        content = stored.view(np.uint8).data
        if state is None:
            state = _label_files.begin(path, {**described, "classes": stored.shape[1]}, content)
        _label_files.write_shard(path, state, shard, content)
        done += len(rows)
        progress(done, len(ids))
    _label_files.finish(path, ids)
    assert state is not None  # there is at least one file
    return state


def import_labels(
    path: str | Path, ids: ArrayLike, logits: ArrayLike, *, source: str, data: str, dtype: str = "float32"
) -> LabelStore:
    """Writes a store from the outputs of a teacher from another framework.

    Args:
      path: the directory, which is created if it does not exist.
      ids: the ids of the examples in the data set, integers ``[n]``.
      logits: ``[n, classes]``, row i for ``ids[i]``. Logarithms of probabilities are logits, too.
      source: the name of the teacher, with version and preprocessing. The store's fingerprint holds it, with
        a checksum of the logits.
      data: the fingerprint of the data, see :func:`fingerprint`, to be checked when the store is opened.
      dtype: the dtype on disk, as in :func:`write_labels`.

    Returns:
      The opened store.

    Raises:
      ValueError: if there is not one row of logits per id, or for the reasons of :func:`write_labels`.

    Warns:
      UserWarning: if the labels seem to be probabilities and not logits. Give their logarithms.
    """
    ids = _as_ids(ids)
    check_real("logits", logits)
    logits = np.asarray(logits)
    if logits.ndim != 2 or len(logits) != ids.size:
        raise ValueError(f"expected logits [{ids.size}, classes], got {logits.shape}")
    _check_entries("source and data", {"source": source, "data": data})
    described = {"teacher": f"{source} ({fingerprint(logits)[:16]})", "data": data}
    return write_labels(path, ids, lambda rows: logits[rows], fingerprint=described, dtype=dtype)


def open_labels(
    path: str | Path, *, expect: Mapping[str, str] | None = None, verify: bool = True
) -> LabelStore:
    """Opens a complete store of soft labels.

    Args:
      path: the directory.
      expect: entries that the store's fingerprint must have.
      verify: whether every file is read once, to compare its checksum. Without it only ``store.json`` and the
        sizes of the files are checked.

    Returns:
      The opened store.

    Raises:
      ValueError: if there is no complete store, if the fingerprint differs (the message says where), or if a
        file is not as it was written.
    """
    path = _as_directory(path)
    state = _label_files.read_manifest(path)
    if expect is not None:
        _check_entries("expect", expect)
        _label_files.refuse_differences(path, state["fingerprint"], expect)
    _label_files.verify(path, state, checksums=verify)
    return LabelStore(path, state)


def _as_directory(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path must name a directory, got {brief(repr(path))}")
    path = Path(path)
    try:
        os.fsencode(path)
        there = next((place for place in (path, *path.parents) if place.exists()), None)
    except (OSError, ValueError) as error:  # names that the system does not allow
        raise ValueError(f"path must name a directory, got {brief(repr(path))}: {error}") from None
    if there is not None and not there.is_dir():
        raise ValueError(f"path must name a directory, got {path}, where {there} is a file")
    return path


def _as_ids(ids: Any) -> np.ndarray:
    if isinstance(ids, list | tuple) and not ids:
        return np.empty(0, np.int64)  # NumPy would make floats of it
    if isinstance(ids, jax.core.Tracer):
        raise ValueError("ids must be known, got a traced array: read labels outside of jit")
    check_integers("ids", ids)
    return np.asarray(ids, np.int64)


def _check_entries(name: str, entries: Any) -> None:
    if not isinstance(entries, Mapping):
        raise ValueError(f"{name} must map names to strings, got {type(entries).__name__}")
    for entry in entries.items():
        if not all(isinstance(part, str) for part in entry):
            raise ValueError(f"{name} must map names to strings, got {brief(entry)}")


def _to_store(given: Any, rows: int, classes: int | None, dtype: str) -> np.ndarray:
    """Converts the logits of one file to the dtype on disk, after checking them."""
    check_real("logits", given)
    given = np.asarray(given)
    if given.ndim != 2 or given.shape != (rows, classes or max(1, given.shape[1])):
        raise ValueError(f"expected logits of shape [{rows}, {classes or 'classes'}], got {given.shape}")
    if given.dtype.isbuiltin == 2:  # bfloat16 and narrower types of ml_dtypes, all within float32
        given = given.astype(np.float32)
    warn_if_probabilities("the labels to store", given)
    with np.errstate(over="ignore", invalid="ignore"):
        stored = given.astype(DTYPES[dtype], order="C")
    masked = given == -np.inf
    lost = ~np.isfinite(stored) & ~masked
    if lost.any():
        raise ValueError(
            f"{lost.any(-1).sum()} of {rows} examples have logits that are NaN, infinite, or too large for "
            f"{dtype}: check the teacher, or store float32"
        )
    if masked.all(-1).any():
        raise ValueError(
            f"{masked.all(-1).sum()} of {rows} examples have no class: all their logits are -inf"
        )
    return stored

"""The store of soft labels: a teacher's outputs for a data set on disk, found by example id."""

import hashlib
import itertools
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_function, check_integers, check_real, warn_if_probabilities
from distill_jax._files import LOCK, locked, write_atomically
from distill_jax.teachers._fingerprint import fingerprint

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FORMAT = 2
MANIFEST, IDS = "store.json", "ids.bin"
_LEFT = re.compile(r"\.(store\.json|\w+\.bin)\.[0-9a-f]{8}\.tmp")  # what a process that is killed leaves
CHUNK = 2**20  # bytes that are read at once to compute a checksum


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
        self._rows: int = manifest["shard_rows"]
        self._dtype = np.dtype(DTYPES[manifest["dtype"]])
        self._folder = path.absolute()  # files are opened when they are read, in whatever directory that is
        self._ids = np.memmap(path / IDS, np.int64, mode="r")
        self._written = self._stamp()

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
        shards = rows // self._rows
        starts = [0, *(np.flatnonzero(np.diff(shards)) + 1), wanted.size] if wanted.size else []
        for start, end in itertools.pairwise(starts):
            labels = self._map(int(shards[start]))
            result[order[start:end]] = labels[rows[start:end] % self._rows]
        if self._stamp() != self._written:  # a store that takes this one's place begins with its manifest
            raise ValueError(f"{self.path} was deleted or written anew since it was opened: open it again")
        return result.reshape(*wanted.shape, self.classes)

    def _map(self, shard: int) -> np.ndarray:
        """Maps one file of labels; only one is open at a time, since each takes a descriptor."""
        file, rows = f"{self._folder}/{_shard_name(shard)}", min(self._rows, self.count - shard * self._rows)
        try:
            with open(file, "rb") as opened:
                content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            return np.frombuffer(content, self._dtype, rows * self.classes).reshape(rows, self.classes)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"{file} is damaged: it has become shorter since the store was opened") from None

    def _stamp(self) -> tuple[int, ...]:
        """Tells this store from another one in its place."""
        try:
            found = os.stat(f"{self._folder}/{MANIFEST}")
        except OSError:
            return ()
        return found.st_ino, found.st_mtime_ns


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
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {_brief(repr(dtype))}")
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
    state = _find(path, described)
    if state is not None and not _missing(path, state):
        _verify(path, state)
        return LabelStore(path, state)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        state = _find(path, described)  # again: another process may have written since
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
    for file in path.iterdir():
        if _LEFT.fullmatch(file.name):
            file.unlink()
    if state is not None:
        _verify(path, state, complete=False)
    shards = [shard for shard in range(_shards(described)) if not (path / _shard_name(shard)).exists()]
    done = len(ids) - sum(_rows_of(described, shard) for shard in shards)
    for shard in shards:
        rows = order[shard * described["shard_rows"] :][: described["shard_rows"]]
        classes = None if state is None else state["classes"]
        stored = _to_store(logits(rows), len(rows), classes, described["dtype"])
        content = stored.view(np.uint8).data
        if state is None:
            # The first labels set this store apart from others of the same description
            first = hashlib.sha256(content).hexdigest()
            state = _sealed({**described, "classes": stored.shape[1], "first": first})
            _write(path / MANIFEST, _render(state))
        _write(path / _shard_name(shard), content, _checksum(state, shard, [content]))
        done += len(rows)
        progress(done, len(ids))
    if not (path / IDS).exists():
        _write(path / IDS, ids.data)
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
    state = _read_manifest(path)
    if expect is not None:
        _check_entries("expect", expect)
        _refuse_differences(path, state["fingerprint"], expect)
    _verify(path, state, checksums=verify)
    return LabelStore(path, state)


def _as_directory(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike) or not str(path):
        raise ValueError(f"path must name a directory, got {_brief(repr(path))}")
    path = Path(path)
    try:
        os.fsencode(path)
        there = next((place for place in (path, *path.parents) if place.exists()), None)
    except (OSError, ValueError) as error:  # names that the system does not allow
        raise ValueError(f"path must name a directory, got {_brief(repr(path))}: {error}") from None
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
            raise ValueError(f"{name} must map names to strings, got {_brief(entry)}")


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


def _write(file: Path, *parts: Any) -> None:
    """Writes bytes to a file."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as opened:
            for part in parts:
                opened.write(part)

    write_atomically(file, write)


def _shard_name(index: int) -> str:
    return f"{index:05d}.bin"


def _shards(state: Mapping[str, Any]) -> int:
    """The number of files of labels."""
    return -(-state["count"] // state["shard_rows"])


def _rows_of(state: Mapping[str, Any], shard: int) -> int:
    """The number of rows of a file: all have the same but the last."""
    return min(state["shard_rows"], state["count"] - shard * state["shard_rows"])


def _checksum(state: Mapping[str, Any], shard: int, content: Iterable[Any]) -> bytes:
    """The SHA-256 of a file's labels, of its number, and of the store: no other file passes for it."""
    digest = hashlib.sha256(f"{state['sha256']} {shard} ".encode())
    for part in content:
        digest.update(part)
    return digest.digest()


def _sealed(described: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum to a description."""
    text = json.dumps(described, sort_keys=True)
    return {**described, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _render(state: Mapping[str, Any]) -> bytes:
    return json.dumps(state, indent=1).encode() + b"\n"


def _find(path: Path, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads the manifest of the store that is to be written, or returns None where there is none yet."""
    if (path / MANIFEST).exists():
        state = _read_manifest(path)
        _refuse_differences(path, state, described)
        return state
    if path.exists() and any(x.name != LOCK and not _LEFT.fullmatch(x.name) for x in path.iterdir()):
        raise ValueError(f"{path} is not empty and holds no label store: choose another directory")
    return None


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path} holds no soft-label store (no {MANIFEST})") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    try:
        state = json.loads(content)
    except (ValueError, RecursionError):
        state = None
    if isinstance(state, dict) and state.get("format") == 1:
        raise ValueError(
            f"{path} was written by an earlier version (store format 1, expected {FORMAT}): write the labels again "
            "into another directory"
        )
    if not isinstance(state, dict) or content != _render(
        _sealed({k: state[k] for k in state if k != "sha256"})
    ):
        raise ValueError(
            f"{file} is damaged, or belongs to another program: write the labels into another directory"
        )
    return state


def _refuse_differences(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = dict(_leaves(found))
    differing = [
        f"{name} is {_brief(found.get(name))}, expected {_brief(value)}"
        for name, value in _leaves(expected)
        if found.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"the soft labels in {path} were made from something else: {'; '.join(differing)}. "
            "Use another directory, or move this one away"
        )


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in tree.items():
        flat += _leaves(value) if isinstance(value, Mapping) else [(name, value)]
    return flat


def _brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:12] + "…"


def _missing(path: Path, state: Mapping[str, Any]) -> list[str]:
    """The names of the files that are not there."""
    there = set(os.listdir(path))
    return [name for name in (*map(_shard_name, range(_shards(state))), IDS) if name not in there]


def _verify(path: Path, state: Mapping[str, Any], *, checksums: bool = True, complete: bool = True) -> None:
    """Raises ValueError if a file is damaged or, for a store that should be complete, missing."""
    missing = _missing(path, state)
    absent = set(missing)
    there = [shard for shard in range(_shards(state)) if _shard_name(shard) not in absent]
    if missing and complete:
        done = sum(_rows_of(state, shard) for shard in there)
        raise ValueError(
            f"{path} holds {done} of {state['count']} soft labels: its writing was interrupted, or files were "
            f"deleted (no {_some(missing)}); write the labels again to finish it"
        )
    damaged = [_shard_name(shard) for shard in there if not _is_whole(path, state, shard, checksums)]
    if IDS not in missing and not _ids_are_whole(path / IDS, state, checksums):
        damaged.append(IDS)
    if damaged:
        raise ValueError(
            f"damaged in {path}: {_some(damaged)}. Delete these files and write the labels again: only what is "
            "missing is made anew"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_whole(path: Path, state: Mapping[str, Any], shard: int, checksums: bool) -> bool:
    file = path / _shard_name(shard)
    size = _rows_of(state, shard) * state["classes"] * np.dtype(DTYPES[state["dtype"]]).itemsize
    if file.stat().st_size != size + hashlib.sha256().digest_size:
        return False
    if not checksums:
        return True
    with file.open("rb") as opened:
        parts = (opened.read(min(CHUNK, size - start)) for start in range(0, size, CHUNK))
        return _checksum(state, shard, parts) == opened.read()


def _ids_are_whole(file: Path, state: Mapping[str, Any], checksums: bool) -> bool:
    if file.stat().st_size != state["count"] * np.dtype(np.int64).itemsize:
        return False
    if not checksums:
        return True
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == state["ids"]

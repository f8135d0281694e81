"""The store of soft labels: a teacher's outputs for a data set on disk, found by example id."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import warn_if_probabilities
from distill_jax._files import write_atomically, write_json
from distill_jax._model import PyTree

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def fingerprint(tree: PyTree) -> str:
    """Computes a checksum of a pytree: the SHA-256 of its paths, shapes, dtypes and bytes.

    The fingerprint of a model covers its parameters and its state, not its function: if the function may
    change, add an entry that names it.

    Args:
      tree: a pytree of arrays, numbers and strings, such as a model or a data set.

    Returns:
      64 hexadecimal digits.

    >>> fingerprint({"w": np.zeros(2)}) == fingerprint({"w": np.ones(2)})
    False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if isinstance(leaf, str):
            leaf = np.frombuffer(leaf.encode(), np.uint8)
        array = np.ascontiguousarray(leaf)
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};"
        digest.update(head.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


class LabelStore:
    """Soft labels on disk, read by memory map and found by example id.

    Open a store with :func:`open_labels`, and write one with :func:`write_labels`. Its directory holds
    ``store.json`` (a description, with a checksum of each file), ``ids.npy`` (the ids, sorted) and the
    files ``00000.bin``, ``00001.bin`` and so on (the logits in the order of the ids, with the same number of
    rows per file).

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
        self._ids = np.load(path / "ids.npy", mmap_mode="r")
        self._shards = [
            np.memmap(path / _shard_name(i), DTYPES[manifest["dtype"]], mode="r").reshape(-1, self.classes)
            for i in range(len(manifest["shards"]))
        ]

    def __getitem__(self, ids: ArrayLike) -> np.ndarray:
        """Reads the logits of examples.

        Args:
          ids: integers ``[n]``, in any order; an id may occur several times.

        Returns:
          The logits in the order of ``ids``, float32 ``[n, classes]``.

        Raises:
          KeyError: if an id has no label.
        """
        ids = np.asarray(ids, np.int64)
        rows = np.minimum(np.searchsorted(self._ids, ids), self.count - 1)
        missing = ids[self._ids[rows] != ids]
        if missing.size:
            raise KeyError(
                f"{missing.size} of {ids.size} examples have no soft label in {self.path}, for "
                f"instance ids {missing[:5].tolist()}: label them with the teacher first"
            )
        result = np.empty((*ids.shape, self.classes), np.float32)
        for i in np.unique(rows // self._rows):
            here = rows // self._rows == i
            result[here] = self._shards[i][rows[here] - i * self._rows]
        return result


def _shard_name(index: int) -> str:
    return f"{index:05d}.bin"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        example ``ids[i]``.
      fingerprint: names → strings that say what the labels depend on, for example
        ``{"teacher": fingerprint(model), "preprocessing": "x / 255", "data": fingerprint(images)}``.
      dtype: the dtype on disk: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
      shard_rows: the number of examples per file. An interruption loses at most one file.
      progress: called after each file with the number of examples written and the number of all.

    Returns:
      The opened store. A complete store that fits is returned as it is.

    Raises:
      ValueError: if the directory holds other labels (the message names the difference), if the checksum of
        a file is wrong, if ids repeat, or if logits have the wrong shape, are NaN, or overflow ``dtype``.

    Warns:
      UserWarning: if the labels seem to be probabilities and not logits.

    >>> import tempfile
    >>> logits = np.array([[1.0, -1.0], [0.0, 2.0]])
    >>> with tempfile.TemporaryDirectory() as path:
    ...     store = write_labels(path, [7, 3], lambda rows: logits[rows], fingerprint={"teacher": "t"})
    ...     print(store[[3]])
    [[0. 2.]]
    """
    path, ids = Path(path), np.asarray(ids, np.int64)
    order = np.argsort(ids, kind="stable")
    if ids.ndim != 1 or not len(ids) or (np.diff(ids[order]) == 0).any():
        raise ValueError(
            f"ids must be a non-empty list without repetition, got an array of shape {ids.shape}"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    if shard_rows < 1:
        raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
    total = -(-len(ids) // shard_rows)
    described = {
        "format": 1,
        "count": len(ids),
        "dtype": dtype,
        "shard_rows": shard_rows,
        "ids": hashlib.sha256(ids[order].tobytes()).hexdigest(),
        "fingerprint": dict(fingerprint),
    }
    path.mkdir(parents=True, exist_ok=True)
    manifest = path / "store.json"
    if manifest.exists():
        state = _read_manifest(path)
        _refuse_differences(path, {k: state.get(k) for k in described}, described)
        _verify(path, state)
    else:
        # A process that was killed before the first manifest leaves the ids
        if any(file.name != "ids.npy" and file.suffix != ".tmp" for file in path.iterdir()):
            raise ValueError(f"{path} is not empty and holds no label store: choose another directory")
        if (path / "ids.npy").exists() and not _same_array(path / "ids.npy", ids[order]):
            raise ValueError(f"{path} holds an ids.npy of something else: choose another directory")
        write_atomically(path / "ids.npy", lambda tmp: _save_array(tmp, ids[order]))
        state = {**described, "classes": None, "shards": []}
        write_json(manifest, state)
    for shard in range(len(state["shards"]), total):
        rows = order[shard * shard_rows : (shard + 1) * shard_rows]
        values = np.asarray(logits(rows), np.float32)
        classes = state["classes"] or values.shape[-1]
        if values.shape != (len(rows), classes):
            raise ValueError(f"expected logits of shape {(len(rows), classes)}, got {values.shape}")
        warn_if_probabilities("the labels to store", values)
        with np.errstate(over="ignore"):
            stored = values.astype(DTYPES[dtype])
        lost = ~np.isfinite(stored.astype(np.float32)) & (values != -np.inf)
        if lost.any():
            raise ValueError(
                f"{int(lost.any(-1).sum())} of {len(rows)} examples have logits that are NaN, "
                f"infinite, or too large for {dtype}: check the teacher, or store float32"
            )
        target = path / _shard_name(shard)
        write_atomically(target, stored.tofile)
        checksum = hashlib.sha256(stored.tobytes()).hexdigest()
        state = {**state, "classes": classes, "shards": [*state["shards"], checksum]}
        write_json(manifest, state)
        progress(min((shard + 1) * shard_rows, len(ids)), len(ids))
    return LabelStore(path, state)


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
    logits = np.asarray(logits)
    if logits.ndim != 2 or len(logits) != len(np.asarray(ids)):
        raise ValueError(f"expected logits [{len(np.asarray(ids))}, classes], got {logits.shape}")
    described = {"teacher": f"{source} ({fingerprint(logits)[:16]})", "data": data}
    return write_labels(path, ids, lambda rows: logits[rows], fingerprint=described, dtype=dtype)


def open_labels(
    path: str | Path, *, expect: Mapping[str, str] | None = None, verify: bool = True
) -> LabelStore:
    """Opens a complete store of soft labels.

    Args:
      path: the directory.
      expect: entries that the store's fingerprint must have.
      verify: whether every file is read once, to compare its checksum.

    Raises:
      ValueError: if there is no complete store, if the fingerprint differs (the message says where), or if a
        file is not as it was written.
    """
    path = Path(path)
    state = _read_manifest(path)
    if expect is not None:
        _refuse_differences(path, {k: state["fingerprint"].get(k) for k in expect}, dict(expect))
    if len(state["shards"]) * state["shard_rows"] < state["count"]:
        done = len(state["shards"]) * state["shard_rows"]
        raise ValueError(
            f"{path} holds {done} of {state['count']} soft labels: its writing was interrupted; "
            "run it again to finish it"
        )
    if verify:
        _verify(path, state)
    return LabelStore(path, state)


def _same_array(path: Path, array: np.ndarray) -> bool:
    try:
        return np.array_equal(np.load(path), array)
    except (OSError, ValueError):
        return False


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # by handle: np.save adds ".npy" to a name without it
        np.save(file, array)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / "store.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} holds no soft-label store (no store.json)") from None
    except ValueError as error:
        raise ValueError(f"{path}/store.json cannot be read ({error}): delete the store") from None
    if state.get("format") != 1:
        raise ValueError(f"{path} has store format {state.get('format')}, expected 1")
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
            "Use another directory, or delete this one"
        )


def _leaves(tree: Mapping[str, Any]) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in tree.items():
        flat += _leaves(value) if isinstance(value, Mapping) else [(name, value)]
    return flat


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _verify(path: Path, state: Mapping[str, Any]) -> None:
    wrong = []
    ids = path / "ids.npy"
    try:
        if hashlib.sha256(np.load(ids).tobytes()).hexdigest() != state["ids"]:
            wrong.append(ids.name)
    except (OSError, ValueError):
        wrong.append(ids.name)
    for index, checksum in enumerate(state["shards"]):
        shard, rows = path / _shard_name(index), state["shard_rows"]
        rows = min(rows, state["count"] - index * rows)
        size = rows * state["classes"] * np.dtype(DTYPES[state["dtype"]]).itemsize
        if not shard.exists() or shard.stat().st_size != size or _sha256(shard) != checksum:
            wrong.append(shard.name)
    if wrong:
        raise ValueError(
            f"damaged or missing in {path}: {', '.join(wrong)}. Delete the directory and write the "
            "labels again"
        )

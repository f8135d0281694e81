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

from distill_jax._checks import check_count, check_function, check_integers, check_real
from distill_jax._files import locked
from distill_jax._model import PyTree
from distill_jax.teachers import _label_files
from distill_jax.teachers._fingerprint import fingerprint
from distill_jax.teachers._ids import as_ids
from distill_jax.teachers._label_files import brief, check_dtype
from distill_jax.teachers.kinds import KINDS, Kind, Logits, kind_of
from distill_jax.teachers.views import Views


class LabelStore:
    """Soft labels on disk, found by example id. Only what is asked for is read.

    Open a store with :func:`open_labels`, and write one with :func:`write_labels`. Its directory holds
    ``store.json`` (a description, with a checksum of itself and of the ids), ``ids.bin`` (the ids, int64,
    sorted) and the files ``00000.bin``, ``00001.bin`` and so on: the labels in the order of the ids, with the
    same number of examples per file, and after them the file's SHA-256 of 32 bytes.

    Attributes:
      path: the directory.
      kind: what the labels are, see :mod:`distill_jax.teachers.kinds`.
      count: the number of examples.
      views: the number of views per example; 0 for labels of the examples themselves.
      classes: the number of classes; None for features without logits.
      bytes_per_label: the number of bytes of a label, that of one view. The files hold besides 8 bytes per example
        for its id, 32 per file for its checksum, and the head of hidden states.
      fingerprint: name → string; says what the labels were made from, such as the teacher and the data.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path = path
        self.count: int = manifest["count"]
        self.views: int = manifest["views"]
        self.classes: int | None = manifest["classes"]
        self.bytes_per_label = _label_files.bytes_per_example(manifest) // max(1, self.views)
        self.fingerprint: dict[str, str] = manifest["fingerprint"]
        self.kind = kind_of(manifest, _label_files.read_head(path))
        self._manifest = manifest
        self._folder = path.absolute()  # files are opened when they are read, in whatever directory that is
        self._ids = _label_files.map_ids(path)
        self._written = _label_files.stamp(self._folder)

    def __getitem__(self, ids: ArrayLike | tuple[ArrayLike, ArrayLike]) -> PyTree:
        """Reads the labels of examples.

        Args:
          ids: integers ``[n]``, in any order; an id may occur several times. Any other shape is allowed, too,
            such as a single integer. From a store with views, ``store[ids, views]`` reads one view of each example,
            with integers of any shape that broadcasts with the ids.

        Returns:
          The labels in the order of ``ids``: float32 ``[n, classes]``, or what the kind reads back. From a store
          with views, ``store[ids]`` gives those of all views, ``[n, views, ...]``.

        Raises:
          KeyError: if an id or a view has no label.
          ValueError: if the ids are no integers, a file cannot be read, or another store was written in the
            place of this one.
        """
        view = None
        if self.views and isinstance(ids, tuple) and len(ids) == 2:
            wanted, view = as_ids(ids[0]), self._as_views(ids[1])
            wanted, view = np.broadcast_arrays(wanted, view)
        else:
            wanted = as_ids(ids)
        order = np.argsort(wanted, axis=None)
        in_order = wanted.ravel()[order]
        rows = np.minimum(np.searchsorted(self._ids, in_order), self.count - 1)
        missing = in_order[self._ids[rows] != in_order]
        if missing.size:
            raise KeyError(
                f"{missing.size} of {wanted.size} examples have no soft label in {self.path}, for "
                f"instance ids {missing[:5].tolist()}: label them with the teacher first"
            )
        chosen = None if view is None else view.ravel()[order]
        shard_rows = self._manifest["shard_rows"]
        shards = rows // shard_rows
        starts = [0, *(np.flatnonzero(np.diff(shards)) + 1), wanted.size] if wanted.size else []
        nothing = _label_files.empty(self._manifest, of_one_view=view is not None)
        leaves, structure = jax.tree.flatten(self.kind.decode(nothing))
        result = [np.empty((wanted.size, *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        for start, end in itertools.pairwise(starts):
            part = rows[start:end] % shard_rows
            where = part if chosen is None else (part, chosen[start:end])
            arrays = _label_files.map_shard(self._folder, self._manifest, int(shards[start]))
            labels = self.kind.decode({name: array[where] for name, array in arrays.items()})
            for leaf, values in zip(result, jax.tree.leaves(labels), strict=True):
                leaf[order[start:end]] = values
        if _label_files.stamp(self._folder) != self._written:
            raise ValueError(f"{self.path} was deleted or written anew since it was opened: open it again")
        return jax.tree.unflatten(
            structure, [leaf.reshape(*wanted.shape, *leaf.shape[1:]) for leaf in result]
        )

    def _as_views(self, view: Any) -> np.ndarray:
        check_integers("views", view)
        view = np.asarray(view, np.int64)
        unknown = view[(view < 0) | (view >= self.views)]
        if unknown.size:
            raise KeyError(f"{self.path} has the views 0 to {self.views - 1}, and no view {unknown[0]}")
        return view


def write_labels(
    path: str | Path,
    ids: ArrayLike,
    outputs: Callable[..., PyTree],
    *,
    fingerprint: Mapping[str, str],
    kind: Kind = Logits(),  # noqa: B008
    views: Views | None = None,
    dtype: str = "float32",
    shard_rows: int = 8192,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> LabelStore:
    """Writes a store of soft labels, or completes one whose writing was interrupted.

    Args:
      path: the directory, which is created if it does not exist.
      ids: the ids of the examples, integers ``[n]``, without repetition.
      outputs: a function ``positions -> outputs [len(positions), ...]`` of the teacher, where position i means the
        example ``ids[i]``. Outputs are logits ``[..., classes]``, or what ``kind`` says. A class that is masked has
        the logit −∞. With views it is a function ``positions, keys -> outputs``, called once per view, where ``keys``
        are those with which ``views.apply`` makes the view.
      fingerprint: names → strings that say what the labels depend on, for example
        ``{"teacher": fingerprint(model), "preprocessing": "x / 255", "data": fingerprint(images)}``. With views it
        must have an entry ``"augmentation"``, such as :meth:`Views.fingerprint`.
      kind: what is kept of the outputs; see :mod:`distill_jax.teachers.kinds`.
      views: labels the views of the examples in the place of the examples themselves.
      dtype: the dtype of floating-point numbers on disk: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
      shard_rows: the number of examples per file, whose labels are in memory while it is written. An interruption
        loses at most one file.
      progress: called after each file with the number of examples written and the number of all.

    Returns:
      The opened store. A complete store that fits is returned as it is.

    Raises:
      ValueError: if the directory holds other labels (the message names the difference) or another process
        writes in it, if the checksum of a file is wrong, if ids repeat or are no integers, or if outputs have
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
    path, ids = _as_directory(path), as_ids(ids)
    check_dtype(dtype)
    check_count("shard_rows", shard_rows)
    _check_entries("fingerprint", fingerprint)
    if type(kind) not in KINDS:  # a store must know how to read what it has written
        raise ValueError(f"kind must be a kind of labels, such as kinds.Top(k=10), got {brief(repr(kind))}")
    of_views = _described(views)
    _name_augmentation("fingerprint", fingerprint, views)
    check_function("outputs", outputs, "positions" if views is None else "positions, keys")
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
        "count": len(ids),
        "dtype": dtype,
        "shard_rows": min(int(shard_rows), len(ids)),
        "ids": hashlib.sha256(ids.data).hexdigest(),
        "fingerprint": dict(fingerprint),
        **kind.described(),
        **of_views,
    }
    state = _label_files.find(path, described)
    if state is not None and not _label_files.missing_files(path, state):
        _label_files.verify(path, state)
        return LabelStore(path, state)
    path.mkdir(parents=True, exist_ok=True)
    with locked(path):
        state = _label_files.find(path, described)  # again: another process may have written since

        def encoded(rows: np.ndarray) -> tuple[dict[str, np.ndarray], int | None]:
            return _encode(outputs, kind, views, dtype, order[rows], ids[rows])

        return LabelStore(path, _complete(path, state, described, ids, kind.head(), encoded, progress))


def _described(views: Any) -> dict[str, Any]:
    if views is None:
        return {"views": 0}
    if not isinstance(views, Views):
        raise ValueError(f"views must be teachers.Views or None, got {brief(repr(views))}")
    return {"views": int(views.count), "views_seed": int(views.seed)}


def _name_augmentation(name: str, entries: Mapping[str, str], views: Views | None) -> None:
    """Raises ValueError if entries do not say how views are made, which count and seed leave open."""
    if views is not None and "augmentation" not in entries:
        raise ValueError(
            f"{name} must have an entry 'augmentation' where views are labelled: give views.fingerprint(ids, images), "
            "or name it in words"
        )


def _encode(
    outputs: Callable[..., PyTree],
    kind: Kind,
    views: Views | None,
    dtype: str,
    positions: np.ndarray,
    ids: np.ndarray,
) -> tuple[dict[str, np.ndarray], int | None]:
    """Computes the arrays of a file, and the number of classes."""
    if views is None:
        given = outputs(positions)
        return kind.encode(given, dtype=dtype, ids=ids), kind.count_classes(given)
    parts = []
    for view in range(views.count):
        given = outputs(positions, views.keys(ids, view))
        parts.append((kind.encode(given, dtype=dtype, ids=ids, view=view), kind.count_classes(given)))
        _check_form(_form(*parts[-1]), _form(*parts[0]))
    arrays, classes = parts[0]
    return {name: np.stack([part[name] for part, _ in parts], 1) for name in arrays}, classes


def _form(arrays: Mapping[str, np.ndarray], classes: int | None) -> tuple[dict[str, Any], int | None]:
    return _label_files.layout(arrays), classes


def _check_form(
    found: tuple[dict[str, Any], int | None], expected: tuple[dict[str, Any], int | None]
) -> None:
    """Raises ValueError unless labels have the form of the first ones."""
    if found != expected:
        told = [
            ", ".join(f"{name} {shape}" for name, (_, shape) in arrays.items()) + f" of {classes} classes"
            for arrays, classes in (expected, found)
        ]
        raise ValueError(f"all outputs must have the form of the first: expected {told[0]}, got {told[1]}")


def _complete(
    path: Path,
    state: dict[str, Any] | None,
    described: dict[str, Any],
    ids: np.ndarray,
    head: bytes,
    encoded: Callable[[np.ndarray], tuple[dict[str, np.ndarray], int | None]],
    progress: Callable[[int, int], Any],
) -> dict[str, Any]:
    """Writes the files that are missing, after verifying those that are there."""
    _label_files.clear_left(path)
    if state is not None:
        _label_files.verify(path, state, complete=False)
    shards = _label_files.missing_shards(path, described)
    done = len(ids) - sum(_label_files.rows_of(described, shard) for shard in shards)
    for shard in shards:
        first = shard * described["shard_rows"]
        rows = np.arange(first, first + _label_files.rows_of(described, shard))
        arrays, classes = encoded(rows)
        if state is None:
            state = _label_files.begin(path, described, classes, arrays)
        _check_form(_form(arrays, classes), (state["arrays"], state["classes"]))
        _label_files.write_shard(path, state, shard, arrays)
        done += len(rows)
        progress(done, len(ids))
    _label_files.finish(path, ids, head)
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
    ids = as_ids(ids)
    check_real("logits", logits)
    logits = np.asarray(logits)
    if logits.ndim != 2 or len(logits) != ids.size:
        raise ValueError(f"expected logits [{ids.size}, classes], got {logits.shape}")
    _check_entries("source and data", {"source": source, "data": data})
    described = {"teacher": f"{source} ({fingerprint(logits)[:16]})", "data": data}
    return write_labels(path, ids, lambda rows: logits[rows], fingerprint=described, dtype=dtype)


def open_labels(
    path: str | Path,
    *,
    expect: Mapping[str, str] | None = None,
    views: Views | None = None,
    verify: bool = True,
) -> LabelStore:
    """Opens a complete store of soft labels.

    Args:
      path: the directory.
      expect: entries that the store's fingerprint must have; it may have others.
      views: the views whose labels the store must have; by default it may have any. ``expect`` must then have the
        entry ``"augmentation"``.
      verify: whether every file is read once, to compare its checksum. Without it only ``store.json`` and the
        sizes of the files are checked.

    Returns:
      The opened store.

    Raises:
      ValueError: if there is no complete store, if the fingerprint or the views differ (the message says where),
        or if a file is not as it was written.
    """
    path = _as_directory(path)
    state = _label_files.read_manifest(path)
    _name_augmentation("expect", {} if expect is None else expect, views)
    if expect is not None:
        _check_entries("expect", expect)
        _label_files.refuse_differences(path, state["fingerprint"], expect)
    if views is not None:
        _label_files.refuse_differences(path, state, _described(views))
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


def _check_entries(name: str, entries: Any) -> None:
    if not isinstance(entries, Mapping):
        raise ValueError(f"{name} must map names to strings, got {type(entries).__name__}")
    for entry in entries.items():
        if not all(isinstance(part, str) for part in entry):
            raise ValueError(f"{name} must map names to strings, got {brief(entry)}")

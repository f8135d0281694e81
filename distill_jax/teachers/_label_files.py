"""The files of a label store: a description, the ids, and files of labels, each with a checksum.

``store.json`` describes the store and is written once, with a checksum of itself, of the ids, and of the teacher's head
where there is one (``head.bin``). A file of labels holds one array after another, with a row per example, and ends with
a checksum over the store, its own number and its contents. The ids are written last: a store that has them, and all its
files of labels, is complete.

Format 2 is a store of all logits without views. Format 3 is any other: it names the kind of its labels, the views, and
the arrays of a file.
"""

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from distill_jax._files import LOCK, seal, write_atomically

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
PLAIN, FORMAT = 2, 3
MANIFEST, IDS, HEAD, SEAL = "store.json", "ids.bin", "head.bin", "sha256"
_LEFT = re.compile(r"\.(store\.json|\w+\.bin)\.[0-9a-f]{8}\.tmp")  # what a process that is killed leaves
CHUNK = 2**20  # bytes that are read at once to compute a checksum


def check_dtype(dtype: Any) -> None:
    """Raises ``ValueError`` unless a value names a dtype of floating-point numbers on disk."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {brief(repr(dtype))}")


def begin(
    path: Path, described: Mapping[str, Any], classes: int | None, arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Writes the manifest of a store, sealed; the first labels set it apart from others of the same description."""
    first = hashlib.sha256()
    for part in arrays.values():
        first.update(_content(part))
    state = {"format": FORMAT, **described, "classes": classes}
    if described["kind"] == "logits" and not described["views"]:
        state["format"] = PLAIN
        del state["kind"], state["views"]
    else:
        state["arrays"] = layout(arrays)
    state = seal({**state, "first": first.hexdigest()}, SEAL)
    _write(path / MANIFEST, _render(state))
    return _in_full(state)


def layout(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Describes the arrays of a file: name → [dtype, shape of an example]."""
    return {name: [array.dtype.name, list(array.shape[1:])] for name, array in arrays.items()}


def _in_full(state: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a manifest what format 2 leaves unsaid."""
    arrays = {"logits": [state.get("dtype"), [state.get("classes")]]}
    return {"kind": "logits", "views": 0, "arrays": arrays, **state}


def write_shard(path: Path, state: Mapping[str, Any], shard: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file of labels."""
    parts = [_content(arrays[name]) for name in state["arrays"]]
    _write(path / _shard_name(shard), *parts, _checksum(state, shard, parts))


def _content(array: np.ndarray) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def finish(path: Path, ids: np.ndarray, head: bytes) -> None:
    """Writes the head, if there is one, and the ids, with which a store is complete."""
    for name, content in ((HEAD, head), (IDS, ids.data)):
        if len(content) and not (path / name).exists():
            _write(path / name, content)


def _write(file: Path, *parts: Any) -> None:
    """Writes bytes to a file."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as opened:
            for part in parts:
                opened.write(part)

    write_atomically(file, write)


def map_ids(path: Path) -> np.ndarray:
    """Maps the ids of a store, in rising order."""
    return np.memmap(path / IDS, np.int64, mode="r")


def read_head(path: Path) -> bytes:
    """Reads the teacher's head; nothing where the store has none."""
    return (path / HEAD).read_bytes() if (path / HEAD).exists() else b""


def map_shard(path: Path, state: Mapping[str, Any], shard: int) -> dict[str, np.ndarray]:
    """Maps the arrays of a file of labels. Only one should be mapped at a time, since each takes a descriptor.

    Raises:
      ValueError: if the file cannot be read, or has become shorter.
    """
    file, rows, offset, arrays = path / _shard_name(shard), rows_of(state, shard), 0, {}
    try:
        with file.open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        for name, (dtype, shape) in state["arrays"].items():
            flat = np.frombuffer(content, _dtype(dtype), rows * math.prod(shape), offset)
            arrays[name] = flat.reshape(rows, *shape)
            offset += flat.nbytes
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{file} is damaged: it has become shorter since the store was opened") from None
    return arrays


def empty(state: Mapping[str, Any], *, of_one_view: bool) -> dict[str, np.ndarray]:
    """Makes the arrays of no example."""
    return {
        name: np.empty((0, *(shape[1:] if of_one_view else shape)), _dtype(dtype))
        for name, (dtype, shape) in state["arrays"].items()
    }


def _dtype(name: str) -> np.dtype:
    return np.dtype(DTYPES.get(name, name))


def bytes_per_example(state: Mapping[str, Any]) -> int:
    """The number of bytes that the labels of an example take, those of all views."""
    return sum(_dtype(dtype).itemsize * math.prod(shape) for dtype, shape in state["arrays"].values())


def stamp(path: Path) -> tuple[int, ...]:
    """Tells a store from another one in its place, which begins with its manifest."""
    try:
        found = (path / MANIFEST).stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns


def clear_left(path: Path) -> None:
    """Deletes what writers left that were killed."""
    for file in path.iterdir():
        if _LEFT.fullmatch(file.name):
            file.unlink()


def _shard_name(index: int) -> str:
    return f"{index:05d}.bin"


def missing_shards(path: Path, state: Mapping[str, Any]) -> list[int]:
    """The numbers of the files of labels that are not there."""
    return [shard for shard in range(shards(state)) if not (path / _shard_name(shard)).exists()]


def shards(state: Mapping[str, Any]) -> int:
    """The number of files of labels."""
    return -(-state["count"] // state["shard_rows"])


def rows_of(state: Mapping[str, Any], shard: int) -> int:
    """The number of rows of a file: all have the same but the last."""
    return min(state["shard_rows"], state["count"] - shard * state["shard_rows"])


def _checksum(state: Mapping[str, Any], shard: int, content: Iterable[Any]) -> bytes:
    """The SHA-256 of a file's labels, of its number, and of the store: no other file passes for it."""
    digest = hashlib.sha256(f"{state[SEAL]} {shard} ".encode())
    for part in content:
        digest.update(part)
    return digest.digest()


def _render(state: Mapping[str, Any]) -> bytes:
    return json.dumps(state, indent=1).encode() + b"\n"


def find(path: Path, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """Reads the manifest of the store that is to be written, or returns None where there is none yet."""
    if (path / MANIFEST).exists():
        state = read_manifest(path)
        refuse_differences(path, state, described)
        return state
    if path.exists() and any(x.name != LOCK and not _LEFT.fullmatch(x.name) for x in path.iterdir()):
        raise ValueError(f"{path} is not empty and holds no label store: choose another directory")
    return None


def read_manifest(path: Path) -> dict[str, Any]:
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
            f"{path} was written by an earlier version (store format 1, expected {PLAIN}): write the labels again "
            "into another directory"
        )
    if not isinstance(state, dict) or content != _render(
        seal({k: state[k] for k in state if k != SEAL}, SEAL)
    ):
        raise ValueError(
            f"{file} is damaged, or belongs to another program: write the labels into another directory"
        )
    if state["format"] not in (PLAIN, FORMAT):
        raise ValueError(
            f"{path} was written by a later version (store format {state['format']}, expected {PLAIN} or {FORMAT}): "
            "read it with that version"
        )
    return _in_full(state)


def refuse_differences(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError if a description differs from what is expected; the message names the entries."""
    if differing := list(_differences(found, expected)):
        raise ValueError(
            f"the soft labels in {path} were made from something else: {'; '.join(differing)}. "
            "Use another directory, or move this one away"
        )


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    for name, value in expected.items():
        if isinstance(value, Mapping):  # with what is found there and not expected
            also = dict.fromkeys(sorted(found[name].keys() - value.keys()))
            yield from _differences(found[name], {**value, **also})
        elif found.get(name) != value:
            yield f"{name} is {brief(found.get(name))}, expected {brief(value)}"


def brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:12] + "…"


def missing_files(path: Path, state: Mapping[str, Any]) -> list[str]:
    """The names of the files that are not there."""
    there = set(os.listdir(path))
    return [name for name in (*map(_shard_name, range(shards(state))), *_singles(state)) if name not in there]


def _singles(state: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """The files that are there once: name → (size, SHA-256)."""
    files = {IDS: (state["count"] * np.dtype(np.int64).itemsize, state["ids"])}
    if "head" in state:
        hidden, classes = state["head_shape"]
        files[HEAD] = ((hidden + 1) * classes * np.dtype(np.float32).itemsize, state["head"])
    return files


def verify(path: Path, state: Mapping[str, Any], *, checksums: bool = True, complete: bool = True) -> None:
    """Raises ValueError if a file is damaged or, for a store that should be complete, missing."""
    missing = missing_files(path, state)
    absent = set(missing)
    there = [shard for shard in range(shards(state)) if _shard_name(shard) not in absent]
    if missing and complete:
        done = sum(rows_of(state, shard) for shard in there)
        raise ValueError(
            f"{path} holds {done} of {state['count']} soft labels: its writing was interrupted, or files were "
            f"deleted (no {_some(missing)}); write the labels again to finish it"
        )
    damaged = [_shard_name(shard) for shard in there if not _is_whole(path, state, shard, checksums)]
    for name, (size, digest) in _singles(state).items():
        expected = digest if checksums or name == HEAD else None  # the head is read anyway
        if name not in absent and not _has(path / name, size, expected):
            damaged.append(name)
    if damaged:
        raise ValueError(
            f"damaged in {path}: {_some(damaged)}. Delete these files and write the labels again: only what is "
            "missing is made anew"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _is_whole(path: Path, state: Mapping[str, Any], shard: int, checksums: bool) -> bool:
    file = path / _shard_name(shard)
    size = rows_of(state, shard) * bytes_per_example(state)
    if file.stat().st_size != size + hashlib.sha256().digest_size:
        return False
    if not checksums:
        return True
    with file.open("rb") as opened:
        parts = (opened.read(min(CHUNK, size - start)) for start in range(0, size, CHUNK))
        return _checksum(state, shard, parts) == opened.read()


def _has(file: Path, size: int, digest: str | None) -> bool:
    if file.stat().st_size != size:
        return False
    if digest is None:
        return True
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == digest

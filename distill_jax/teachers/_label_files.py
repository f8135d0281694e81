"""The files of a label store: a description, the ids, and files of labels, each with a checksum.

``store.json`` describes the store and is written once, with a checksum of itself and of the ids. A file of labels ends
with a checksum over the store, its own number and its contents. The ids are written last: a store that has them, and
all its files of labels, is complete.
"""

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from distill_jax._files import LOCK, seal, write_atomically

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
FORMAT = 2
MANIFEST, IDS, SEAL = "store.json", "ids.bin", "sha256"
_LEFT = re.compile(r"\.(store\.json|\w+\.bin)\.[0-9a-f]{8}\.tmp")  # what a process that is killed leaves
CHUNK = 2**20  # bytes that are read at once to compute a checksum


def begin(path: Path, described: Mapping[str, Any], content: Any) -> dict[str, Any]:
    """Writes the manifest of a store, sealed; the first labels set it apart from others of the same description."""
    state = seal({**described, "first": hashlib.sha256(content).hexdigest()}, SEAL)
    _write(path / MANIFEST, _render(state))
    return state


def write_shard(path: Path, state: Mapping[str, Any], shard: int, content: Any) -> None:
    """Writes a file of labels."""
    _write(path / _shard_name(shard), content, _checksum(state, shard, [content]))


def finish(path: Path, ids: np.ndarray) -> None:
    """Writes the ids, with which a store is complete."""
    if not (path / IDS).exists():
        _write(path / IDS, ids.data)


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


def map_shard(path: Path, state: Mapping[str, Any], shard: int) -> np.ndarray:
    """Maps a file of labels. Only one should be mapped at a time, since each takes a descriptor.

    Raises:
      ValueError: if the file cannot be read, or has become shorter.
    """
    file, shape = path / _shard_name(shard), (rows_of(state, shard), state["classes"])
    try:
        with file.open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(content, DTYPES[state["dtype"]], math.prod(shape)).reshape(shape)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{file} is damaged: it has become shorter since the store was opened") from None


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
            f"{path} was written by an earlier version (store format 1, expected {FORMAT}): write the labels again "
            "into another directory"
        )
    if not isinstance(state, dict) or content != _render(
        seal({k: state[k] for k in state if k != SEAL}, SEAL)
    ):
        raise ValueError(
            f"{file} is damaged, or belongs to another program: write the labels into another directory"
        )
    return state


def refuse_differences(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = dict(_leaves(found))
    differing = [
        f"{name} is {brief(found.get(name))}, expected {brief(value)}"
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


def brief(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:12] + "…"


def missing_files(path: Path, state: Mapping[str, Any]) -> list[str]:
    """The names of the files that are not there."""
    there = set(os.listdir(path))
    return [name for name in (*map(_shard_name, range(shards(state))), IDS) if name not in there]


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
    size = rows_of(state, shard) * state["classes"] * np.dtype(DTYPES[state["dtype"]]).itemsize
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

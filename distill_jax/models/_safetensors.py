"""Weights in files of the format safetensors, by the package of that name: one file, or several and their index."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from distill_jax import _files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT8 = {"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)}
DTYPES = FLOAT8 | {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
        "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F32": np.float32, "F64": np.float64, "C64": np.complex64,
    }.items()
}  # fmt: skip


class Tensor(NamedTuple):
    """An array of a file: its shape, its type as the format names it, and a function that reads it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def package() -> Any:
    """Returns the package safetensors; raises ``ModuleNotFoundError``, which says how it is installed, without it."""
    try:
        import safetensors.numpy
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "files of safetensors need the package of that name: pip install 'distill_jax[text]'"
        ) from None
    return safetensors


def read(path: Path) -> dict[str, Tensor]:
    """Opens the arrays of one file.

    Raises:
      ValueError: if the file is missing, damaged or truncated; the message names the file and, where its header tells,
        the tensor.
    """
    safetensors = package()
    if not path.is_file():
        raise ValueError(f"path: {path} does not exist")
    try:
        file = safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"path: {path} is damaged or truncated: {_culprit(path)}{reason}") from None

    def tensor(name: str) -> Tensor:
        view = file.get_slice(name)
        shape, kind = tuple(view.get_shape()), view.get_dtype()

        def whole() -> np.ndarray:
            if kind not in FLOAT8:
                return file.get_tensor(name)
            # The package looks for these types in NumPy, which has not got them
            entry = dict(safetensors.deserialize(path.read_bytes()))[name]
            return np.frombuffer(entry["data"], FLOAT8[kind]).reshape(shape)

        return Tensor(path, shape, kind, whole)

    return {name: tensor(name) for name in file.keys()}  # noqa: SIM118


def is_one(path: Path) -> bool:
    """Says whether a file is of this format, whole or damaged: it begins with the length of an object of JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _culprit(path: Path) -> str:
    """Names the first tensor that a damaged file does not hold as its header says. The package does not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        text = file.read(length) if length <= size - 8 else b""
    if first == b"version ":
        return "it is a pointer of Git LFS, the file itself must be fetched (git lfs pull): "
    try:
        header = json.loads(text)
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, AttributeError):
        return ""
    for name, entry in entries:
        try:
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            bits = int((re.findall(r"\d+", kind) or ["8"])[0]) * math.prod(shape)  # BOOL has no number
            if 8 * (end - begin) != bits:
                return f"its tensor {name} has {end - begin} bytes, which is not {kind} {shape}: "
            if end > size - 8 - length:
                return f"its tensor {name} ends at byte {end}, but there are {size - 8 - length}: "
        except (KeyError, TypeError, ValueError):
            return f"its tensor {name} is described as {' '.join(str(entry).split())}: "
    return ""


def read_directory(directory: Path) -> dict[str, Tensor]:
    """Opens the arrays of a directory: of ``model.safetensors``, or of the files that an index names.

    Raises:
      ValueError: if there is none, a file or a tensor that the index names is missing, or a file is damaged.
    """
    index = directory / INDEX
    if (directory / SINGLE).exists():
        return read(directory / SINGLE)
    if not index.exists():
        others = sorted(file.name for file in directory.glob("pytorch_model*.bin"))
        hint = f", but {others[0]}: let transformers save the model again, as safetensors" if others else ""
        raise ValueError(f"path: {directory} holds neither {SINGLE} nor {INDEX}{hint}")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"path: {index} has no weight_map from tensors to files")
    files = {file: read(directory / file) for file in sorted(set(places.values()))}
    # What a file holds beyond the index is not hidden from the reader
    found = {name: tensor for held in files.values() for name, tensor in held.items()}
    for name, file in places.items():
        if name not in files[file]:
            raise ValueError(f"path: {directory / file} lacks tensor {name}, which {INDEX} says it holds")
        found[name] = files[file][name]
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: if the file does not exist or holds something else.
    """
    if not path.is_file():
        raise ValueError(f"path: {path} does not exist")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"path: {path} is damaged: it holds no JSON object where one was expected")
    return found


def write_directory(directory: Path, arrays: Mapping[str, np.ndarray], shard_bytes: int) -> None:
    """Writes ``model.safetensors``, or several files of at most so many bytes (or one tensor) and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    filled = 0
    for name, array in arrays.items():
        if shards[-1] and filled + array.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    if len(shards) == 1:
        write(directory / SINGLE, arrays)
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(directory / file, shard)
        places |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for array in arrays.values())
    _files.write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to one file."""
    save = package().numpy.save_file
    # The package writes the memory of an array as it lies, so a transposed one would be written as it was
    whole = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    # Without this entry, transformers refuses the file
    _files.write_atomically(path, lambda temporary: save(whole, temporary, metadata={"format": "pt"}))

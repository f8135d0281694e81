"""The file format safetensors: the length of a header, the header in JSON, and the arrays one after another.

The package of that name has no bfloat16 for NumPy, and its messages do not name the file.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from distill_jax import _files

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(bool),
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """An array of a file; the array is read when it is used."""

    file: Path
    array: np.ndarray


def read(path: Path) -> dict[str, Tensor]:
    """Opens the arrays of one file.

    Raises:
      ValueError: if the file is damaged or truncated; the message names the file and the tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= size - 8 else b""
    except FileNotFoundError:
        raise ValueError(f"path: {path} does not exist") from None
    if size < 8 or length > size - 8:
        raise ValueError(f"path: {path} is truncated, or no safetensors file: its header does not end")
    header = _json(path, text)
    header.pop("__metadata__", None)
    empty = 8 + length == size
    data = np.zeros(0, np.uint8) if empty else np.memmap(path, np.uint8, "r", offset=8 + length)
    return {name: Tensor(path, _array(path, name, entry, data)) for name, entry in header.items()}


def _array(path: Path, name: str, entry: Any, data: np.ndarray) -> np.ndarray:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        count = math.prod(shape)
        fits = 0 <= begin <= end
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"path: {path} describes its tensor {name} wrongly: {' '.join(str(entry).split())}"
        ) from None
    if kind not in DTYPES:
        raise ValueError(f"path: tensor {name} of {path} has the type {kind}: known are {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if not fits or end - begin != count * dtype.itemsize:
        raise ValueError(
            f"path: tensor {name} of {path} has {end - begin} bytes, but {kind} {list(shape)} needs "
            f"{count * dtype.itemsize}"
        )
    if end > data.size:
        raise ValueError(
            f"path: {path} is truncated: its tensor {name} ends at byte {end}, but there are {data.size}"
        )
    return data[begin:end].view(dtype).reshape(shape)


def read_directory(directory: Path) -> dict[str, Tensor]:
    """Opens the arrays of a directory: of ``model.safetensors``, or of the files that an index names.

    Raises:
      ValueError: if there is none, a file or a tensor that the index names is missing, or a file is damaged.
    """
    index = directory / INDEX
    if (directory / SINGLE).exists() or not index.exists():
        if not (directory / SINGLE).exists():
            raise ValueError(f"path: {directory} holds neither {SINGLE} nor {INDEX}")
        return read(directory / SINGLE)
    places = _json(index, index.read_bytes()).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"path: {index} has no weight_map from tensors to files")
    files = {file: read(directory / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in files[file]:
            raise ValueError(f"path: {directory / file} lacks tensor {name}, which {INDEX} says it holds")
    # What a file holds beyond the index is not hidden from the reader
    return {name: tensor for held in files.values() for name, tensor in held.items()}


def _json(path: Path, text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"path: {path} is damaged: it holds no JSON object where one was expected")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ValueError: if the file does not exist or holds something else.
    """
    try:
        return _json(path, path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"path: {path} does not exist") from None


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to one file, in one piece."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without this, transformers refuses the file
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8 bytes

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).tobytes())

    _files.write_atomically(path, save)


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

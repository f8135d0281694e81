"""ONNX files of this library: with a digest at the end, and facts in their metadata."""

import hashlib
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from distill_jax import _files

FORMAT = "distill_jax onnx 1"
# A protobuf message may be continued by another of its kind. So the digest of all bytes before it is one more entry
# of the metadata: field 14, of 74 bytes, with the key "sha256" and 64 hexadecimal digits.
_HEAD = b"\x72\x4a\x0a\x06sha256\x12\x40"
_LENGTH = len(_HEAD) + 64


def package(name: str) -> Any:
    """Imports a package of the extra ``onnx``, or says how it is installed."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(
            f"ONNX files need the package {name}: pip install 'distill_jax[onnx]'", name=name
        )
    return importlib.import_module(name)


def seal(data: bytes) -> bytes:
    """Adds the digest to the bytes of an ONNX message."""
    return data + _HEAD + hashlib.sha256(data).hexdigest().encode()


def is_onnx(path: Path) -> bool:
    """Says whether a file is an ONNX file with a digest, whole or damaged."""
    if not path.is_file():
        return False
    data = path.read_bytes()
    return data[-_LENGTH:-64] == _HEAD


def read(path: Path) -> bytes:
    """Returns the bytes of an ONNX file of this library.

    Raises:
      ValueError: if the digest is not that of the bytes before it.
    """
    data = path.read_bytes()
    if hashlib.sha256(data[:-_LENGTH]).hexdigest().encode() != data[-64:]:
        raise ValueError(f"path: {path} is damaged: its SHA-256 is not the one that was written")
    return data


def session(data: bytes, threads: int = 1) -> Any:
    """Loads an ONNX file into ONNX Runtime, on the CPU with so many threads."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors are raised, warnings about the graph are not for the caller
    return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def metadata(facts: dict[str, Any]) -> dict[str, str]:
    """Writes facts as the texts that ONNX's metadata hold: JSON, in the order of their names."""
    return {
        name: json.dumps(_files.plain(value), ensure_ascii=False) for name, value in sorted(facts.items())
    }

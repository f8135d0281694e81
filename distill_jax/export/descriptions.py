"""What an exported file says of itself."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.export import _sealed
from distill_jax.models import files

STATED = ("labels", "preprocessing", "provenance", "digest", "integers")
MAKERS = ("distill_jax", "jax", "jax2onnx", "onnxruntime")


def describe(path: str | Path) -> dict[str, Any]:
    """Reads what an exported file says of itself, and checks that it is whole.

    Args:
      path: a file of :func:`distill_jax.export.stablehlo`, :func:`distill_jax.export.onnx` or
        :func:`distill_jax.models.save`.

    Returns:
      ``format``; ``bytes``, the size of the file; ``platforms`` of a StableHLO program, else None; ``inputs`` and
      ``outputs``, each a list of name, shape and dtype, where ``"batch"`` in a shape stands for any size;
      ``labels``, ``preprocessing`` and ``provenance`` as they were given, or None; ``digest``, the SHA-256 of
      parameters and state, the same in all files of one model; ``integers``, for the path of each kernel that
      is integers the bits of its ``weights`` and of its ``inputs``, None if these are floats; ``made by``, the versions
      of the libraries that wrote it.

    Raises:
      ValueError: if the file is none of these, of another version of the format, or damaged.
      ModuleNotFoundError: if it is an ONNX file and onnxruntime is not installed.
    """
    path = Path(path)
    found = _of_graph(path) if _sealed.is_onnx(path) else _of_program(path)
    makers = {name: found[name] for name in MAKERS if name in found}
    shown = {name: found.get(name) for name in ("format", "platforms", "inputs", "outputs", *STATED)}
    return {"format": shown.pop("format"), "bytes": path.stat().st_size, **shown, "made by": makers}


def _of_program(path: Path) -> dict[str, Any]:
    description, _ = files.read(path)
    program = description["programs"]["evaluation"]
    # Files of models.save once had no names of inputs, and said nothing of outputs
    inputs = [{"name": "x", **each} for each in description["x arrays"]]
    if program["any batch size"]:
        inputs = [{**each, "shape": ["batch", *each["shape"][1:]]} for each in inputs]
    found = {"inputs": inputs, "outputs": program.get("output arrays"), "platforms": program["platforms"]}
    return {**description, **found}


def _of_graph(path: Path) -> dict[str, Any]:
    session = _sealed.session(_sealed.read(path))
    stated = {
        name: json.loads(text)
        for name, text in session.get_modelmeta().custom_metadata_map.items()
        if name != "sha256"
    }
    if stated.get("format") != _sealed.FORMAT:
        raise ValueError(
            f"path: {path} has the format {stated.get('format')!r}, but this version reads {_sealed.FORMAT!r}: "
            "export it anew"
        )
    return {**stated, "inputs": _arrays(session.get_inputs()), "outputs": _arrays(session.get_outputs())}


def _arrays(nodes: Any) -> list[dict[str, Any]]:
    """Names, shapes and dtypes, as ONNX Runtime tells them: ``tensor(float)`` is float32."""
    names = {"float": "float32", "double": "float64"}
    types = [node.type.removeprefix("tensor(").removesuffix(")") for node in nodes]
    return [
        {"name": node.name, "shape": node.shape, "dtype": str(np.dtype(names.get(kind, kind)))}
        for node, kind in zip(nodes, types, strict=True)
    ]

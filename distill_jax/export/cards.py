"""The model card beside an exported file."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax import _files
from distill_jax._checks import check_finite, check_mapping, check_sequence, shown
from distill_jax.export._facts import Facts
from distill_jax.export._sealed import is_onnx
from distill_jax.export.descriptions import describe

NOT_STATED = "not stated"
# How the figures of distill_jax.metrics are called in a card; any other keeps its name
FIGURES = {
    "accuracy": "accuracy",
    "errors": "errors",
    "nll": "negative log-likelihood (nats)",
    "brier": "Brier score",
    "ece": "expected calibration error",
    "agreement": "agreement with the original",
    "teacher_kl": "KL divergence from the original (nats)",
    "precision": "precision (macro)",
    "recall": "recall (macro)",
    "f1": "F1 (macro)",
}
PROGRAM = """import json
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

with zipfile.ZipFile("{file}") as file:
    about = json.loads(file.read("model.json"))
    program = export.deserialize(bytearray(file.read("evaluation")))
    arrays = [
        jnp.array(np.frombuffer(file.read(f"arrays/{{i}}"), jnp.dtype(array["dtype"])).reshape(array["shape"]))
        for i, array in enumerate(about["arrays"])
    ]
outputs = jax.jit(program.call)(arrays, [{inputs}])
"""
GRAPH = """import onnxruntime

session = onnxruntime.InferenceSession("{file}")
outputs = session.run(None, {{{inputs}}})
"""


def card(
    path: str | Path,
    *,
    title: str | None = None,
    origin: Facts | None = None,
    data: Facts | None = None,
    figures: Mapping[str, float] | None = None,
    latencies: Sequence[Mapping[str, Any]] = (),
    limits: str | None = None,
) -> Path:
    """Writes a model card in Markdown beside an exported file: ``digits.onnx`` gets ``digits.onnx.md``.

    The card says what is given here, what the file says of itself, and how the file is run. What is not given is
    called not stated; nothing is filled in.

    Args:
      path: a file of :func:`distill_jax.export.stablehlo` or :func:`distill_jax.export.onnx`.
      title: the title; the name of the file if it is None.
      origin: what the network was made from and how, such as the original and its size.
      data: the data on which ``figures`` were measured.
      figures: measured numbers by name, such as those of :func:`distill_jax.metrics.figures`.
      latencies: results of :func:`distill_jax.export.latency` for this file.
      limits: what the network is not for.

    Returns:
      The path of the card. An older card there is replaced.

    Raises:
      ValueError: if the file is no exported file or damaged, a figure is no number, or a latency is that of a file of
        another size.
    """
    path = Path(path)
    about = describe(path)
    figures = figures or {}
    check_mapping("figures", figures, "names to numbers")
    for name, value in figures.items():
        check_finite(f"figures[{name!r}]", value)
        if np.ndim(value):
            raise ValueError(f"figures[{name!r}] must be one number, got shape {np.shape(value)}")
    check_sequence("latencies", latencies, "results of export.latency")
    for measured in latencies:
        if not isinstance(measured, Mapping) or measured.get("bytes") != about["bytes"]:
            raise ValueError(
                f"latencies must be results of export.latency for this file of {about['bytes']} bytes, got "
                f"{shown(measured)}"
            )
    makers = ", ".join(f"{name} {version}" for name, version in about["made by"].items())
    rows = {
        "File": f"`{path.name}`, {about['bytes']:,} bytes, format {about['format']}",
        "Inputs": _arrays(about["inputs"]),
        "Outputs": _arrays(about["outputs"]),
        "Classes": ", ".join(about["labels"] or ()) or NOT_STATED,
        "Preprocessing": _text(about["preprocessing"]),
        "Provenance": _text(about["provenance"]),
        "SHA-256 of the parameters": f"`{about['digest']}`" if about["digest"] else NOT_STATED,
        "Integers": _integers(about["integers"]),
        "Made by": makers or NOT_STATED,
    }
    measured = {FIGURES.get(name, name): f"{float(value):,.5g}" for name, value in figures.items()}
    parts = [
        f"# {title or path.name}",
        f"**Origin.** {_text(origin)}",
        _table(("", ""), list(rows.items())),
        "## Quality",
        f"**Data.** {_text(data)}",
        _table(("figure", "value"), list(measured.items())) if measured else NOT_STATED,
        "## Cost",
        _latencies(latencies) if latencies else f"{about['bytes']:,} bytes; latency: {NOT_STATED}",
        "## How to run it",
        f"```python\n{_program(path, about['inputs'])}```",
        "## Limits",
        limits or NOT_STATED,
    ]
    target = path.with_name(f"{path.name}.md")
    _files.write_atomically(
        target, lambda temporary: temporary.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    )
    return target


def _text(value: Facts | None) -> str:
    """Writes a fact, or several with their names, in one line."""
    if not isinstance(value, Mapping):
        return value or NOT_STATED
    plain = {
        name: each if isinstance(each, str) else json.dumps(each)
        for name, each in _files.plain(value).items()
    }
    return "; ".join(f"{name}: {each}" for name, each in plain.items()) or NOT_STATED


def _integers(kernels: Mapping[str, Mapping[str, Any]] | None) -> str:
    """Says how many kernels have how many bits, and their inputs."""
    if kernels is None:
        return NOT_STATED
    kinds = Counter((each["weights"], each["inputs"]) for each in kernels.values())
    parts = [
        f"{count} kernel{'s' * (count > 1)} of {weights} bits, inputs of {f'{inputs} bits' if inputs else 'floats'}"
        for (weights, inputs), count in kinds.items()
    ]
    return "; ".join(parts) or "none"


def _arrays(arrays: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(
        f"`{each['name']}`, {each['dtype']} [{', '.join(map(str, each['shape']))}]" for each in arrays
    )


def _latencies(latencies: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            each["batch"], each["threads"], f"{each['latency_ms']:.4g}",
            " to ".join(f"{quartile:.4g}" for quartile in each["quartiles_ms"]), each["runtime"], each["machine"],
        )
        for each in latencies
    ]  # fmt: skip
    head = ("batch", "threads", "median (ms)", "quartiles (ms)", "runtime", "machine")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _program(path: Path, inputs: Sequence[Mapping[str, Any]]) -> str:
    names = [each["name"] for each in inputs]
    variables = [name.replace(".", "_") for name in names]
    if is_onnx(path):
        pairs = zip(names, variables, strict=True)
        return GRAPH.format(file=path.name, inputs=", ".join(f'"{name}": {each}' for name, each in pairs))
    return PROGRAM.format(file=path.name, inputs=", ".join(variables))

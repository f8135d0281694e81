"""Networks as ONNX graphs, which ONNX Runtime and others run without JAX."""

import functools
import importlib.metadata
import logging
import re
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from distill_jax import _files, _jaxpr
from distill_jax._checks import check_positive
from distill_jax._model import Model, PyTree
from distill_jax.export._facts import Facts, facts
from distill_jax.export._folding import folded
from distill_jax.export._fusing import fused
from distill_jax.export._integers import with_integers
from distill_jax.export._kernels import Kernel, as_floats, grid_of, has_groups, kernels_of
from distill_jax.export._sealed import FORMAT, is_onnx, metadata, package, seal, session
from distill_jax.export.descriptions import describe
from distill_jax.models._containers import leaf_names
from distill_jax.models.files import check_target

TINY = float(np.finfo(np.float32).tiny)
# By how much outputs may differ where activations are rounded, as multiples of what the rounding costs: at most, and
# on average; without any rounding they would differ by 1 on average
FLIPS = np.array([4, 0.75])
# But at most these multiples of the outputs: with wrong ranges of activations, rounding changes everything, and the
# limit above would allow anything
MOST = np.array([1, 0.25])


def onnx(
    path: str | Path,
    model: Model,
    x: PyTree,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Facts | None = None,
    provenance: Facts | None = None,
    tolerance: float = 1e-5,
) -> dict[str, Any]:
    """Writes a network to one ONNX file, and compares what ONNX Runtime computes from it with JAX.

    The program of the network is read by JAX, simplified (BatchNorm moves into the convolution before it), and
    converted by the package jax2onnx. The file takes any batch size where that works, else that of ``x``, and
    a warning says so. It is written only if the outputs for ``x``, and where any batch size is meant for its first
    example alone and for ``x`` twice, agree with those
    of JAX. Two exports of one model are equal byte by byte. It needs ``pip install 'distill_jax[onnx]'``.

    The kernels of a model from :func:`distill_jax.compress.quantisation.quantise` or ``freeze`` are stored as integers
    of 8 or 4 bits. If activations are rounded too, ONNX Runtime computes dense layers and convolutions in integers, and
    the outputs agree but for activations in the middle between two codes. Otherwise it turns the kernels into floats
    once, when it loads the file, and computes with these.

    Args:
      path: the file. An older file of this function there is replaced; anything else is not overwritten.
      model: any model whose evaluation is a function of parameters, state and inputs.
      x: a batch of real inputs, on which both are compared; best several.
      labels: the name of each class.
      preprocessing: how an input is made, as a text or a dict.
      provenance: where the network comes from, as a text or a dict.
      tolerance: by how much an output may differ, as a share of the largest output. Where activations are rounded, the
        limit is four times the most that quantisation changes an output for ``x``, but at most the largest output; and
        outputs may differ on average by three quarters of what quantisation changes on average, but at most by a
        quarter of the mean output.

    Returns:
      What the file says of itself, as :func:`distill_jax.export.describe` returns it.

    Raises:
      ModuleNotFoundError: if jax2onnx, onnx or onnxruntime is not installed.
      ValueError: if ``path`` is something else than such a file; evaluation draws random numbers, changes the state or
        calls Python; an operation cannot be converted, which is named; ONNX Runtime does not run the file or
        computes other outputs; a kernel of integers is not found in the graph; or labels and outputs do not fit.
    """
    about = facts(model, x, labels, preprocessing, provenance)
    check_positive("tolerance", tolerance)
    path = Path(path)
    check_target(path, is_onnx(path), "file of export.onnx")
    package("onnxruntime")
    converter = package("jax2onnx")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax2onnx", "onnxruntime")}
    properties = metadata({**about, **versions, "format": FORMAT})
    x = jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), x)  # in the dtypes that JAX uses
    run = jax.jit(lambda model, x: model(x))
    outputs = jax.tree.map(np.asarray, run(model, x))
    limits = [np.full(2, tolerance * max(TINY, _most(output))) for output in jax.tree.leaves(outputs)]
    kernels = {path: kernel for path, kernel in kernels_of(model).items() if not has_groups(kernel)}
    model = as_floats(model)
    if any(map(grid_of, kernels.values())):
        # A number in the middle between two codes may get the other one, and others follow
        cost = map(_differ, jax.tree.leaves(outputs), jax.tree.leaves(run(model, x)))
        sizes = [_differ(output, 0) for output in jax.tree.leaves(outputs)]
        limits = [
            np.maximum(limit, np.minimum(FLIPS * each, MOST * size))
            for limit, each, size in zip(limits, cost, sizes, strict=True)
        ]
    problems: list[Exception] = []
    for any_batch in (True, False):
        try:
            data = seal(_convert(converter, model, kernels, x, outputs, properties, any_batch))
            _compare(data, x, outputs, limits, any_batch)
        except Exception as error:  # whatever JAX, the network, the converter or the runtime raises
            problems.append(error)
            continue
        if problems:
            shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
            warnings.warn(
                f"the ONNX file takes batches of the shapes of x only, {shapes}: {_why(problems[0])}",
                stacklevel=2,
            )
        _files.write_atomically(path, functools.partial(Path.write_bytes, data=data))
        return describe(path)
    raise ValueError(f"model: it cannot be written as ONNX: {_why(problems[-1])}") from problems[-1]


def _convert(
    converter: Any,
    model: Model,
    kernels: Mapping[str, Kernel],
    x: PyTree,
    outputs: PyTree,
    properties: dict[str, str],
    any_batch: bool,
) -> bytes:
    """Returns the network as an ONNX message, with the kernels that are integers."""
    structure: Any
    leaves, structure = jax.tree.flatten(x)
    batch = export.symbolic_shape("batch") if any_batch else ()
    like = [jax.ShapeDtypeStruct((*batch, *leaf.shape[len(batch) :]), leaf.dtype) for leaf in leaves]
    program, _ = _jaxpr.trace(lambda *leaves: jax.tree.leaves(model(structure.unflatten(leaves))), *like)
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about shapes that it will not write
    try:
        message = converter.to_onnx(
            folded(program), like, input_names=leaf_names("x", x), output_names=leaf_names("y", outputs)
        )
    finally:
        logger.setLevel(level)
    message = fused(package("onnx"), message)
    if kernels:
        message = with_integers(message, kernels)
    for key, value in properties.items():
        message.metadata_props.add(key=key, value=value)
    return message.SerializeToString(deterministic=True)


def _compare(data: bytes, x: PyTree, outputs: PyTree, limits: Sequence[np.ndarray], any_batch: bool) -> None:
    """Raises an error if ONNX Runtime computes other outputs: for the batch, and perhaps for batches of other sizes."""
    running = session(data)
    inputs = dict(zip(leaf_names("x", x), jax.tree.leaves(x), strict=True))
    expected = jax.tree.leaves(outputs)
    size = len(next(iter(inputs.values())))
    for rows in (np.arange(size), [0], np.arange(2 * size) % size) if any_batch else (np.arange(size),):
        found = running.run(None, {name: leaf[rows] for name, leaf in inputs.items()})
        for name, ours, theirs, limit in zip(leaf_names("y", outputs), expected, found, limits, strict=True):
            ours = ours[rows]
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise ValueError(
                    f"ONNX Runtime returns {name} as {theirs.dtype} {theirs.shape}, JAX {ours.dtype} {ours.shape}"
                )
            kinds = ("at most", "on average")[: 1 if len(rows) < size else 2]  # one example is no average
            for kind, difference, most in zip(kinds, _differ(ours, theirs), limit, strict=False):
                if not difference <= most:
                    raise ValueError(
                        f"ONNX Runtime's {name} differs from JAX {kind} by {difference:.2g}, more than {most:.2g}"
                    )


def _most(array: np.ndarray) -> float:
    return float(np.abs(array.astype(np.float64)).max(initial=0))


def _differ(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """Returns the largest and the mean difference."""
    difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    return np.array([difference.max(initial=0), difference.sum() / max(1, difference.size)])


def _why(error: Exception) -> str:
    """Says in one line why there is no such file, and which operation is to blame."""
    text = " ".join(str(error).split())
    named = re.findall(r"primitive '([^']+)'", text)
    for frame, _ in traceback.walk_tb(error.__traceback__):
        eqn: Any = frame.f_locals.get("eqn")  # the equation that was being converted
        if hasattr(eqn, "primitive") and "jax2onnx" in frame.f_code.co_filename:
            named.append(eqn.primitive.name)
    culprit = f"the operation {named[-1]} is not converted: " if named else ""
    return f"{culprit}{type(error).__name__}: {text}"[:500]

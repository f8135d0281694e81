"""What an exported file costs, measured where it runs: in a fresh process."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax._checks import check_count, check_positive
from distill_jax._model import PyTree, check_inputs, example_count
from distill_jax.export import _timed
from distill_jax.export.descriptions import describe


def latency(path: str | Path, x: PyTree, *, threads: int = 1, seconds: float = 1.0) -> dict[str, Any]:
    """Measures how long an exported file takes for a batch, in a fresh process without this library.

    The process loads the file into its runtime, JAX or ONNX Runtime, and calls it again and again: from NumPy arrays to
    NumPy arrays. The first fifth of the calls is not counted. Compare only figures that were taken on one machine
    without other work.

    Args:
      path: a file of :func:`distill_jax.export.stablehlo` or :func:`distill_jax.export.onnx`.
      x: a batch of inputs, whose size is the batch size that is measured.
      threads: the number of threads that the runtime may use on a CPU.
      seconds: how long calls are made, after loading; at least 20 calls are made, at most 10,000.

    Returns:
      ``latency_ms``, the median wall time of a call in milliseconds, and ``quartiles_ms``; ``calls``, how many were
      counted; ``load_s``, seconds from the file to the first result; ``bytes`` of the file; ``batch``; ``threads``;
      ``runtime`` with its version; ``machine``.

    Raises:
      ValueError: if the file is damaged or no exported file, ``x`` does not fit its inputs, or it does not run.
    """
    check_inputs("x", x)
    check_count("threads", threads)
    check_positive("seconds", seconds)
    described = describe(path)
    arrays = _arrays(x, described["inputs"])
    with tempfile.TemporaryDirectory() as directory:
        inputs = Path(directory) / "inputs.npz"
        np.savez(inputs, *arrays)
        # -P: the modules beside the script are none of the process's
        command = [sys.executable, "-P", _timed.__file__, str(Path(path).resolve()), str(inputs)]
        done = subprocess.run(
            [*command, str(threads), str(seconds)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ValueError(f"path: {path} does not run: {reason[0]}")
    found = json.loads(done.stdout.splitlines()[-1])
    batch = example_count("x", x)
    return {**found, "bytes": described["bytes"], "batch": batch, "threads": threads, "machine": _machine()}


def _arrays(x: PyTree, inputs: list[dict[str, Any]]) -> list[np.ndarray]:
    """Returns the arrays of a batch in the order of a file's inputs, or raises ``ValueError`` if they do not fit."""
    arrays = list(map(np.asarray, jax.tree.leaves(x)))
    fit = len(arrays) == len(inputs)
    for array, expected in zip(arrays, inputs, strict=False):
        shape = [n if n == "batch" else m for n, m in zip(expected["shape"], array.shape, strict=False)]
        fit &= len(array.shape) == len(expected["shape"]) and shape == expected["shape"]
        fit &= str(array.dtype) == expected["dtype"]
    if not fit:
        got = [f"{array.dtype} {list(array.shape)}" for array in arrays]
        wanted = [f"{each['dtype']} {each['shape']}" for each in inputs]
        raise ValueError(f"x must be {wanted}, as the file says, got {got}")
    return arrays


def _machine() -> str:
    """Names the processor and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {count} cores, {platform.system()}"

"""Networks as programs of StableHLO, which JAX runs without this library."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_jax._model import Model, PyTree
from distill_jax.export._facts import Facts, facts
from distill_jax.export.descriptions import describe
from distill_jax.models import files


def stablehlo(
    path: str | Path,
    model: Model,
    x: PyTree,
    *,
    labels: Sequence[str] | None = None,
    preprocessing: Facts | None = None,
    provenance: Facts | None = None,
) -> dict[str, Any]:
    """Writes a network to one file that JAX runs without this library, on CPU, CUDA and TPU.

    The file is that of :func:`distill_jax.models.save` without the training program and the gradient,
    compressed. So :func:`distill_jax.models.load` reads it, too. It holds the program by ``jax.export`` for
    any batch size, all arrays, and what is said about them, each part with a SHA-256. Two exports of one model
    are equal byte by byte. Where a program cannot be exported for any batch size or for all platforms, a
    warning says so, and it takes the batch size of ``x``, or runs on this platform only.

    Args:
      path: the file. An older saved model there is replaced; anything else is not overwritten.
      model: any model whose evaluation is a function of parameters, state and inputs.
      x: a batch of inputs; only its shapes and dtypes are used.
      labels: the name of each class.
      preprocessing: how an input is made, as a text or a dict, such as ``{"pixels": "grey value / 255"}``.
      provenance: where the network comes from, as a text or a dict: data, training, commit.

    Returns:
      What the file says of itself, as :func:`distill_jax.export.describe` returns it.

    Raises:
      ValueError: if ``path`` is something else than a saved model, evaluation draws random numbers, changes the
        state or calls Python, or labels and outputs do not fit.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> file = Path(tempfile.mkdtemp()) / "doubler.model"
    >>> model = models.from_function(lambda w, x: w * x, jnp.array([2.0]))
    >>> stablehlo(file, model, jnp.ones((1, 1)), labels=["two"])["inputs"]
    [{'name': 'x', 'shape': ['batch', 1], 'dtype': 'float32'}]
    """
    about = facts(model, x, labels, preprocessing, provenance)
    for note in files.write(path, model, x, modes=("evaluation",), about=about):
        warnings.warn(note, stacklevel=2)
    return describe(path)

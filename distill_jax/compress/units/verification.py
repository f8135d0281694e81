"""Compares a smaller network with the silenced one by running both."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from distill_jax._model import Model, PyTree, check_inputs, check_model
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.removal import Kept, keep, silence


def verify(
    graph: UnitGraph,
    model: Model,
    kept: Kept,
    *inputs: PyTree,
    by: Callable[[UnitGraph, Model, Kept], Model] = keep,
) -> float:
    """Runs the network without some of its units and the network in which they are zero, and compares.

    For exact groups the difference is one of rounding. It shows, on these inputs, what units of inexact groups
    contribute when they are zero.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      kept: group → the indices of the units that stay.
      inputs: one or more batches of inputs.
      by: what makes the smaller network: :func:`~distill_jax.compress.units.keep`,
        :func:`~distill_jax.compress.units.shrink`, or a function of yours.

    Returns:
      The largest absolute difference between the outputs of both, divided by the largest absolute output.

    Raises:
      ValueError: if there are no inputs; if the smaller network does not run, or has outputs of other shapes; if
        outputs are not finite.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> x = jnp.ones((1, 3))
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"] / p["a"].shape[1], params)
    >>> graph = units.trace(model, x)
    >>> graph.groups["a"].removable
    'exactly by shrink'
    >>> units.verify(graph, model, {"a": [0, 3]}, x)
    0.0
    """
    check_model("model", model)
    if not inputs:
        raise ValueError("inputs: give at least one batch to compare the networks on, got none")
    silent, small = silence(graph, model, kept), by(graph, model, kept)
    run = jax.jit(lambda model, x: model(x))
    largest = 0.0
    for x in inputs:
        check_inputs("inputs", x)
        expected = jax.tree.map(np.asarray, run(silent, x))
        try:
            given = jax.tree.map(np.asarray, run(small, x))
        except Exception as error:
            raise ValueError(
                f"kept: the network does not run with the smaller arrays: {_one_line(error)}"
            ) from error
        if _shapes(given) != _shapes(expected):
            raise ValueError(
                f"kept: the smaller network has outputs of shapes {_shapes(given)[1]} where the silenced one has "
                f"{_shapes(expected)[1]}: its code reads them from its arrays; give by=units.keep"
            )
        for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(expected), strict=True):
            a, b = (np.asarray(y, np.complex128 if np.iscomplexobj(y) else np.float64) for y in (a, b))
            for name, outputs in (("smaller", a), ("silenced", b)):
                if not np.isfinite(outputs).all():
                    raise ValueError(
                        f"inputs: outputs of the {name} network are not finite, so nothing can be compared"
                    )
            largest = max(largest, float(np.abs(a - b).max(initial=0) / (np.abs(b).max(initial=0) or 1.0)))
    return largest


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _shapes(outputs: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(outputs)
    return structure, [np.shape(leaf) for leaf in leaves]

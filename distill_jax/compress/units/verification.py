"""Compares a smaller network with the silenced one by running both."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_key
from distill_jax._model import Model, PyTree, check_inputs, check_model
from distill_jax.compress.units.edited_functions import shapes_in
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.masks import Kept
from distill_jax.compress.units.removal import keep, remove, silence


def verify(
    graph: UnitGraph,
    model: Model,
    kept: Kept,
    *inputs: PyTree,
    by: Callable[[UnitGraph, Model, Kept], Model] = keep,
    key: jax.Array | None = None,
) -> float:
    """Runs the network without some of its units and the network in which they are zero, and compares.

    For exact groups the difference is one of rounding. For inexact groups it measures, on these inputs, how much
    units still contribute when they are set to zero.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      kept: group → the indices of the units that stay.
      inputs: one or more batches of inputs.
      by: what makes the smaller network: :func:`~distill_jax.compress.units.keep`,
        :func:`~distill_jax.compress.units.shrink`, or a function of yours.
      key: a random key to compare both in training mode: the outputs, and for the kept units the new state and
        the gradient of the outputs' mean square. ``shrink`` draws the random numbers, such as dropout's masks,
        that the kept units have in the whole network; a network that keeps its own function under ``keep``
        draws others.

    Returns:
      The largest absolute difference between the outputs of both, divided by the largest absolute output; in
      training mode, where it is larger, the same of all gradients or of the state.

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
    'exactly, adapted'
    >>> units.verify(graph, model, {"a": [0, 3]}, x)
    0.0
    """
    check_model("model", model)
    if not inputs:
        raise ValueError("inputs: give at least one batch to compare the networks on, got none")
    if key is not None:
        check_key("key", key)
    silent, small = silence(graph, model, kept), by(graph, model, kept)
    run = jax.jit(_evaluate if key is None else _train)
    largest = 0.0
    for x in inputs:
        check_inputs("inputs", x)
        expected = run(silent, x, key)
        if key is not None:
            outputs, whole = expected
            expected = outputs, remove(graph, whole, kept, lambda graph, apply_fn, kept: small.apply_fn)
        try:
            given = jax.block_until_ready(run(small, x, key))
        except Exception as error:
            raise ValueError(
                f"kept: the network does not run with the smaller arrays: {_one_line(error)}"
            ) from error
        if shapes_in(given) != shapes_in(expected):
            raise ValueError(
                f"kept: the smaller network has outputs of shapes {shapes_in(given)[1]} where the silenced one has "
                f"{shapes_in(expected)[1]}: its code reads them from its arrays; give by=units.keep"
            )
        for a, b in zip(_parts(given, key), _parts(expected, key), strict=True):
            for name, arrays in (("smaller", a), ("silenced", b)):
                if not all(np.isfinite(array).all() for array in arrays):
                    raise ValueError(
                        f"inputs: what the {name} network computes is not finite, so nothing can be compared"
                    )
            gap, size = (
                max(float(np.abs(y).max(initial=0)) for y in part) for part in (map(np.subtract, a, b), b)
            )
            largest = max(largest, gap / (size or 1.0))
    return largest


def _evaluate(model: Model, x: PyTree, key: None) -> PyTree:
    return model(x)


def _train(model: Model, x: PyTree, key: jax.Array) -> tuple[PyTree, Model]:
    """Computes the outputs, and what changes: the gradient in the place of the parameters, and the new state."""

    def loss(params: PyTree) -> tuple[jax.Array, PyTree]:
        outputs, state = model.replace(params=params).apply(x, key=key)
        floating = [y for y in jax.tree.leaves(outputs) if jnp.issubdtype(y.dtype, jnp.inexact)]
        squares = [jnp.mean((y * y.conj()).real) for y in floating]
        return sum(squares, jnp.zeros(())), (outputs, state)

    changes, (outputs, state) = jax.grad(loss, has_aux=True, allow_int=True)(model.params)
    return outputs, model.replace(params=changes, state=state)


def _parts(found: PyTree, key: jax.Array | None) -> list[list[np.ndarray]]:
    """Lists what is compared by one measure: each output, all gradients, all floating-point numbers of the state."""
    outputs, changed = (found, []) if key is None else (found[0], [found[1].params, found[1].state])
    parts = [[y] for y in jax.tree.leaves(outputs)]
    parts += [[y for y in jax.tree.leaves(tree) if jnp.issubdtype(y.dtype, jnp.inexact)] for tree in changed]
    return [
        [np.asarray(y, np.complex128 if np.iscomplexobj(y) else np.float64) for y in part]
        for part in parts if part
    ]  # fmt: skip


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Features of a network's inputs as units: columns that a smaller network does not look at."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax._model import ApplyFn, Model, PyTree, check_inputs, check_model
from distill_jax.weights.structure import path_name


def input_features(model: Model, x: PyTree) -> Model:
    """Makes the features of a model's inputs units, which can be scored and removed as others are.

    The new model takes the same inputs, and uses the features whose numbers stand in its state. Features are the
    positions along the last axis of each floating-point array of two axes or more (columns of a table, channels
    of an image; flatten an image to choose pixels). Removing one takes its number out of the state and its row out
    of the first kernels. Scores are then those of these rows, or of the features' values, which are the
    activations of their group.

    A model without some features still takes them all and leaves them aside, so that data, labels and training stay as
    they are. ``model.state["features"]`` says which ones it needs.

    Args:
      model: the model.
      x: a batch of inputs, or ``jax.ShapeDtypeStruct``.

    Returns:
      The model, with the state ``{"features": {name of the input: int32 [features]}, "model": the state}``. The name
      of an input that is one array is ``x``.

    Raises:
      ValueError: if there is no such array in ``x``.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> model = models.from_function(lambda w, x: x @ w, jnp.array([[1.0], [0.1], [2.0]]))
    >>> x = jnp.array([[1.0, 2.0, 3.0]])
    >>> model = units.input_features(model, x)
    >>> graph = units.trace(model, x)
    >>> small = units.keep(graph, model, units.prune(graph, units.scores.l2(graph, model), {"features.x": 0.7}))
    >>> small.state["features"]["x"], small(x)
    (Array([0, 2], dtype=int32), Array([[7.]], dtype=float32))
    """
    check_model("model", model)
    check_inputs("x", x)
    features = {
        _name(path): jnp.arange(leaf.shape[-1], dtype=jnp.int32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(x)
        if len(leaf.shape) > 1 and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }
    if not features:
        raise ValueError(
            "x: there is no array of floating-point numbers with two axes or more, whose last axis holds features; "
            f"got {jax.tree.map(jnp.shape, x)}"
        )
    return Model(_Chosen(model.apply_fn), model.params, {"features": features, "model": model.state})


def _name(path: Any) -> str:
    return path_name(path) or "x"


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """The ``apply_fn`` of a model that chooses features; equal for equal functions."""

    apply_fn: ApplyFn

    def __call__(self, params: PyTree, state: PyTree, x: PyTree, *, key: Any = None) -> tuple[Any, PyTree]:
        features = state["features"]

        def choose(path: Any, leaf: Any) -> Any:
            numbers = features.get(_name(path))
            return leaf if numbers is None else jnp.take(leaf, numbers, axis=-1, mode="clip")

        x = jax.tree_util.tree_map_with_path(choose, x)
        outputs, new = self.apply_fn(params, state["model"], x, key=key)
        return outputs, {"features": features, "model": new}

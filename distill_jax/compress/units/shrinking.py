"""Runs a traced network with smaller arrays, whatever library it was written in."""

from distill_jax._model import Model
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.masks import Kept
from distill_jax.compress.units.removal import remove
from distill_jax.compress.units.running import adapt


def shrink(graph: UnitGraph, model: Model, kept: Kept) -> Model:
    """Makes the network of the kept units as :func:`~distill_jax.compress.units.keep` does, always by adapting.

    :func:`~distill_jax.compress.units.keep` leaves a network its own function where that computes the same. The
    adapted program differs from it in training mode: it draws random numbers, such as dropout's masks, for all
    units of the whole network and takes those of the kept ones. Numbers that the network computed from sizes,
    such as 1/√head_size, stay as they were, except those of a mean.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      kept: group → the indices of the units that stay.

    Returns:
      The smaller model; its arrays are ``keep(graph, model, kept)``.

    Raises:
      ValueError: if ``kept`` is not valid; when the result is called, if its arrays have not the shapes
        that the kept units make, or if other units must stay for these inputs or in training mode.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> units.shrink(graph, model, {"a": [0, 3]})(jnp.ones((2, 3)))
    Array([[6., 6.],
           [6., 6.]], dtype=float32)
    """
    return remove(graph, model, kept, adapt)

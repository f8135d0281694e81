"""Removes units, or sets them to zero: the one edit of which all others are made."""

from collections.abc import Callable
from typing import Any

import numpy as np

from distill_jax._model import ApplyFn, PyTree
from distill_jax.compress.units.editing import map_leaves, numpy_of
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.masks import Kept, masks_of, position_masks, unit_masks
from distill_jax.compress.units.running import function_for

Choice = Callable[[UnitGraph, ApplyFn, Kept], ApplyFn]


def keep(graph: UnitGraph, tree: PyTree, kept: Kept) -> PyTree:
    """Removes all units except the kept ones: the same pytree with smaller arrays, and models that run.

    A model keeps its function where the function, traced with the smaller arrays, is the traced program with
    every size adapted, in evaluation and in training mode on the traced inputs; other shapes are not compared.
    Elsewhere (its code has widths written into it, computes numbers from them, defines derivatives, or cannot be
    traced with a key) the adapted program becomes its function. That program is made anew for each shape and
    dtype of inputs and for training mode, so the model takes any batch size and trains: with dropout, whose masks
    are those that the kept units have in the whole network, with the new statistics in its state, and with the
    derivatives that the network defines by ``custom_jvp`` and ``custom_vjp``.

    Units of exact groups may count in training mode, or for other shapes of inputs, even where they are zero, as
    in the mean of a mask over all units. The adapted program then raises ``ValueError``. The derivatives that
    the network defines are adapted without this check: a mean over units in them becomes one over the kept units.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: the model; or any pytree that holds whole trees of the structure of the traced ``params`` or
        ``state``: a training state, an optimizer's state, gradients, masks, or a dict of several of
        these. Each such part is found by its structure and edited. All other leaves stay.
      kept: for each group, the indices of the units that stay, in rising order. All units of groups
        that are not named stay.

    Returns:
      A pytree of the same structure. A Model in it whose parameters and state are the traced ones runs; it
      raises ``ValueError`` when it is called in a way in which the units cannot be removed. The function of a
      Model around others (an encoder and decoder, a student with a learned loss) stays as it is.

    Raises:
      ValueError: if ``kept`` names a group that does not exist or is not free, or has no indices, or
        indices that are out of range or do not rise; if nothing in the tree has the traced structure, or
        something has, but with other shapes.

    >>> import jax, jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> jax.tree.map(jnp.shape, units.keep(graph, model, {"a": [0, 3]}).params)
    {'a': (3, 2), 'b': (2, 2)}
    """
    return remove(graph, tree, kept, function_for)


def remove(graph: UnitGraph, tree: PyTree, kept: Kept, function: Choice) -> PyTree:
    """Removes units as :func:`keep` does, with another way to make the functions of models.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: as :func:`keep` takes it.
      kept: group → the indices of the units that stay.
      function: ``(graph, apply_fn, kept) -> apply_fn``.

    Returns:
      A pytree of the same structure.
    """
    masks = position_masks(graph, kept)

    def edit(leaf: Any, name: str) -> Any:
        for axis, mask in masks.get(name, {}).items():
            leaf = numpy_of(leaf).take(leaf, np.flatnonzero(mask), axis=axis)
        return leaf

    return map_leaves(graph, edit, tree, lambda apply_fn: function(graph, apply_fn, kept))


def silence(graph: UnitGraph, tree: PyTree, kept: Kept) -> PyTree:
    """Sets all units except the kept ones to zero, and leaves all shapes as they are.

    If the network divides by something that is zero for a unit of zeros, such as the norm of its weights, only
    the slices by which the unit's value is multiplied are set to zero (``group.silent``), where these are known.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: the model, or a pytree as :func:`keep` takes it.
      kept: group → the indices of the units that are *not* set to zero.

    Returns:
      A pytree of the same structure and shapes.

    Raises:
      ValueError: in the same cases as :func:`keep`.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> units.silence(graph, model, {"a": [0, 3]}).params["b"][:, 0]
    Array([1., 0., 0., 1.], dtype=float32)
    """
    masks = masks_of({
        name: (stays, graph.groups[name].silent or graph.groups[name].slices)
        for name, stays in unit_masks(graph, kept).items()
    })  # fmt: skip

    def edit(leaf: Any, name: str) -> Any:
        for axis, mask in masks.get(name, {}).items():
            shape = [-1 if a == axis else 1 for a in range(leaf.ndim)]
            # Not a product: infinities and NaN become zero, too
            leaf = numpy_of(leaf).where(mask.reshape(shape), leaf, np.zeros((), leaf.dtype))
        return leaf

    return map_leaves(graph, edit, tree)

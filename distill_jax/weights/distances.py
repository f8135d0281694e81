"""Distance and angle between two pytrees of parameters."""

import jax
import jax.numpy as jnp

from distill_jax._model import PyTree
from distill_jax.losses._arguments import to_float
from distill_jax.weights.structure import check, is_float


def distance(tree_a: PyTree, tree_b: PyTree) -> jax.Array:
    """Euclidean distance ‖a − b‖₂ between two trees, with all float leaves as one vector.

    Args:
      tree_a: any pytree of arrays, for instance a model's parameters.
      tree_b: a tree of the same structure, shapes and dtypes.

    Returns:
      The distance, a float32 scalar.

    Raises:
      ValueError: if the trees do not fit, or hold values that are not finite.

    >>> float(distance({"a": 3.0, "b": 0.0}, {"a": 0.0, "b": 4.0}))
    5.0
    """
    check(tree_a, tree_b)
    difference = [to_float(x) - to_float(y) for x, y in _floats(tree_a, tree_b)]
    return jnp.sqrt(_dot(difference, difference))


def cosine(tree_a: PyTree, tree_b: PyTree) -> jax.Array:
    """Cosine a·b / (‖a‖‖b‖) of the angle between two trees, with all float leaves as one vector.

    Args:
      tree_a: any pytree of arrays, for instance a task vector.
      tree_b: a tree of the same structure, shapes and dtypes.

    Returns:
      The cosine, a float32 scalar in [−1, 1]; NaN if one of the two is zero and so has no direction.

    Raises:
      ValueError: if the trees do not fit, or hold values that are not finite.

    >>> float(cosine({"a": 1.0, "b": 1.0}, {"a": -2.0, "b": 2.0}))
    0.0
    """
    check(tree_a, tree_b)
    pairs = _floats(tree_a, tree_b)
    a, b = [to_float(x) for x, _ in pairs], [to_float(y) for _, y in pairs]
    return jnp.clip(_dot(a, b) / (jnp.sqrt(_dot(a, a)) * jnp.sqrt(_dot(b, b))), -1, 1)


def _floats(tree_a, tree_b):
    leaves = zip(jax.tree.leaves(tree_a), jax.tree.leaves(tree_b), strict=True)
    return [(x, y) for x, y in leaves if is_float(x)]


def _dot(a, b):
    """Computes Re Σ x̄y, which treats complex numbers as vectors of two."""
    products = (jnp.sum(jnp.real(jnp.conj(x) * y)) for x, y in zip(a, b, strict=True))
    return sum(products, jnp.float32(0))

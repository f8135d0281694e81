"""How far apart two trees are."""

import jax
import jax.numpy as jnp

from distill_jax.losses._numerics import to_float
from distill_jax.weights.structure import PyTree, check, is_float


def distance(tree_a: PyTree, tree_b: PyTree) -> jax.Array:
    """The Euclidean distance ‖a − b‖₂ of all float leaves as one vector: float32 scalar.

    Args:
      tree_a: any pytree of arrays.
      tree_b: another of the same structure, shapes and dtypes.

    Raises:
      ValueError: if the trees do not fit, or hold values that are not finite.

    >>> float(distance({"a": 3.0, "b": 0.0}, {"a": 0.0, "b": 4.0}))
    5.0
    """
    check(tree_a, tree_b)
    difference = [to_float(x) - to_float(y) for x, y in _floats(tree_a, tree_b)]
    return jnp.sqrt(_dot(difference, difference))


def cosine(tree_a: PyTree, tree_b: PyTree) -> jax.Array:
    """The cosine a·b / (‖a‖‖b‖) of all float leaves as one vector: float32 scalar.

    Args:
      tree_a: as in :func:`distance`.
      tree_b: likewise.

    Returns:
      in [−1, 1]; NaN where one of the two is zero, which has no direction.

    Raises:
      ValueError: as in :func:`distance`.

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
    """Re Σ x̄y: the product of complex numbers as vectors of two."""
    products = (jnp.sum(jnp.real(jnp.conj(x) * y)) for x, y in zip(a, b, strict=True))
    return sum(products, jnp.float32(0))

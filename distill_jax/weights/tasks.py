"""Task vectors: the differences that training makes to parameters, and how to add and merge them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_fraction, check_key, check_sequence
from distill_jax._model import PyTree
from distill_jax.losses._arguments import to_float
from distill_jax.weights.structure import Scalars, check, is_float, map_floats, scalars


def task_vector(base: PyTree, tuned: PyTree) -> PyTree:
    """Computes a task vector τ = θ_tuned − θ_base, in float32 at least.

    Args:
      base: the parameters before training, any pytree of arrays.
      tuned: the parameters after training, of the same structure, shapes and dtypes.

    Returns:
      A tree for :func:`add`. Leaves that are not floating-point numbers are the base's, and are not used.

    Raises:
      ValueError: if the trees do not fit, or hold values that are not finite.

    References:
      Ilharco et al., `Editing Models with Task Arithmetic`, 2023, §2.

    >>> float(task_vector(1.0, 3.5))
    2.5
    """
    check(base, tuned, names=("base", "tuned"))
    return map_floats(lambda a, b: to_float(b) - to_float(a), base, tuned)


def add(tree: PyTree, vector: PyTree, scale: Scalars = 1.0) -> PyTree:
    """Adds a task vector to parameters: θ + s·τ.

    Args:
      tree: the parameters θ.
      vector: the task vector τ, of the same structure and shapes; dtypes may differ.
      scale: s, any number (a negative one unlearns the task); or a mapping from path patterns to numbers,
        see :func:`distill_jax.weights.scalars`.

    Returns:
      A tree with the structure, shapes and dtypes of ``tree``.

    Raises:
      ValueError: if the trees do not fit, hold values that are not finite, or a pattern matches no path.

    References:
      Ilharco et al., `Editing Models with Task Arithmetic`, 2023, §2.

    >>> float(add(1.0, 2.5, scale=2.0))
    6.0
    """
    check(tree, vector, names=("tree", "vector"), dtypes=False)
    return map_floats(
        lambda x, v, s: (to_float(x) + s * to_float(v)).astype(jnp.asarray(x).dtype),
        tree,
        vector,
        scalars(scale, tree, name="scale", fraction=False),
    )


def ties(vectors: Sequence[PyTree], *, density: float = 0.2) -> PyTree:
    """Merges task vectors (TIES): trims each, elects a sign per parameter, and averages the entries of that sign.

    Trim: each vector keeps the fraction ``density`` of its entries with the largest absolute values,
    counted over all leaves together. Elect: γ = sgn Σ τᵢ. Merge: the mean of the entries ≠ 0 whose sign
    is γ; 0 where there is none.

    Args:
      vectors: one or more task vectors, of the same structure, shapes and dtypes.
      density: the fraction of entries that is kept, in (0, 1].

    Returns:
      A task vector for :func:`add`.

    Raises:
      ValueError: if the vectors do not fit, or the density lies outside (0, 1].

    References:
      Yadav et al., `TIES-Merging`, 2023, Algorithm 1.

    >>> vectors = [{"w": jnp.array([4.0, -3.0, 0.1])}, {"w": jnp.array([2.0, 1.0, 0.1])}]
    >>> ties(vectors, density=0.67)["w"]
    Array([ 3., -3.,  0.], dtype=float32)
    """
    check_fraction("density", density, without=0)
    check_sequence("vectors", vectors, "task vectors")
    if not len(vectors):
        raise ValueError("vectors must have at least one entry, got none")
    check(*vectors, names=[f"vectors[{i}]" for i in range(len(vectors))])

    def merge(*leaves):
        values = jnp.stack([to_float(leaf) for leaf in leaves])
        agree = jnp.sign(values) == jnp.sign(jnp.sum(values, 0))
        agree &= values != 0
        count = jnp.sum(agree, 0)
        total = jnp.sum(jnp.where(agree, values, 0.0), 0)
        return (total / jnp.where(count > 0, count, 1)).astype(leaves[0].dtype)

    return map_floats(merge, *[_trim(vector, density) for vector in vectors])


def _trim(vector: PyTree, density: float) -> PyTree:
    leaves, structure = jax.tree.flatten(vector)
    floats = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    # The bits of floats ≥ 0 are integers in the same order
    keys = [
        jax.lax.bitcast_convert_type(jnp.abs(leaves[i]).astype(jnp.float32), jnp.int32).ravel()
        for i in floats
    ]
    if keys:
        size = sum(key.size for key in keys)
        order = jnp.argsort(jnp.concatenate(keys), stable=True)
        gone = jnp.zeros(size, bool).at[order[: size - max(1, round(density * size))]].set(True)
        ends = np.cumsum([key.size for key in keys])[:-1].tolist()
        for i, part in zip(floats, jnp.split(gone, ends), strict=True):
            leaf = jnp.asarray(leaves[i])
            leaves[i] = jnp.where(part.reshape(leaf.shape), jnp.zeros_like(leaf), leaf)
    return jax.tree.unflatten(structure, leaves)


def dare(key: jax.Array, vector: PyTree, *, rate: float) -> PyTree:
    """Drops entries of a task vector at random and rescales the rest (DARE): τ·m/(1 − p).

    m is 1 with probability 1 − p, else 0, so the expectation is the vector itself.

    Args:
      key: draws the mask of each leaf.
      vector: a task vector.
      rate: p in [0, 1), the probability that an entry is dropped.

    Returns:
      A tree with the structure, shapes and dtypes of ``vector``.

    Raises:
      ValueError: if the rate lies outside [0, 1), or the vector holds values that are not finite.

    References:
      Yu et al., `Language Models are Super Mario`, 2024, §3.1 (DARE).

    >>> float(jnp.mean(dare(jax.random.key(0), jnp.ones(100_000), rate=0.9)).round(1))
    1.0
    """
    check_key("key", key)
    check_fraction("rate", rate, without=1)
    check(vector, names=("vector",))
    leaves, structure = jax.tree.flatten(vector)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def drop(x, key):
        kept = jax.random.bernoulli(key, 1 - rate, jnp.shape(x))
        return jnp.where(kept, to_float(x) / (1 - rate), 0.0).astype(jnp.asarray(x).dtype)

    return map_floats(drop, vector, keys)

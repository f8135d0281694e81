"""Task vectors: what training added to the weights, to be kept, mixed and put elsewhere."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses._numerics import check_fraction, to_float
from distill_jax.weights.structure import PyTree, Scalars, check, is_float, map_floats, scalars


def task_vector(base: PyTree, tuned: PyTree) -> PyTree:
    """The difference τ = θ_tuned − θ_base, in float32 at least.

    Args:
      base: the weights before.
      tuned: the weights after, of the same structure, shapes and dtypes.

    Returns:
      A tree for :func:`add`. Its leaves that are no floats are the base's, and are not used.

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
    """Adds a task vector: θ + s·τ.

    Args:
      tree: the weights.
      vector: of the same structure and shapes; its dtypes may be others.
      scale: s, any number (negative to forget), or one for each path pattern.

    Returns:
      A tree like ``tree``.

    Raises:
      ValueError: if the trees do not fit, hold values that are not finite, or a pattern is in no path.

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
    """Merges task vectors: trims each, elects a sign for each parameter, and averages who agrees.

    Trim: of each vector the ``density`` of its entries that are largest stay, of all leaves together.
    Elect: γ = sgn Σ τᵢ. Merge: the mean of the entries ≠ 0 whose sign is γ; 0 where there is none.

    Args:
      vectors: at least one; of the same structure, shapes and dtypes.
      density: the fraction that stays, in (0, 1].

    Returns:
      A vector for :func:`add`.

    Raises:
      ValueError: if the vectors do not fit, or the density lies outside (0, 1].

    References:
      Yadav et al., `TIES-Merging`, 2023, Algorithm 1.

    >>> vectors = [{"w": jnp.array([4.0, -3.0, 0.1])}, {"w": jnp.array([2.0, 1.0, 0.1])}]
    >>> ties(vectors, density=0.67)["w"]
    Array([ 3., -3.,  0.], dtype=float32)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
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
        gone = lowest(jnp.concatenate(keys), size - max(1, round(density * size)))
        ends = np.cumsum([key.size for key in keys])[:-1].tolist()
        for i, part in zip(floats, jnp.split(gone, ends), strict=True):
            leaf = jnp.asarray(leaves[i])
            leaves[i] = jnp.where(part.reshape(leaf.shape), jnp.zeros_like(leaf), leaf)
    return jax.tree.unflatten(structure, leaves)


def lowest(keys: jax.Array, count: Any) -> jax.Array:
    """True at the ``count`` lowest of int32 ``[n]`` keys ≥ −1, the first of equals; else false.

    The key at that place in the order is found by bisection: 31 sums over the keys, which take a
    tenth of the time of a sort on a CPU, and leave keys that lie over several devices where they are.

    >>> lowest(jnp.array([3, 1, 2, 1]), 2)
    Array([False,  True, False,  True], dtype=bool)
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        enough = jnp.sum(keys <= middle) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    bounds = jnp.int32(0), jnp.int32(np.iinfo(np.int32).max)
    last, _ = jax.lax.fori_loop(0, 31, halve, bounds)
    below, equal = keys < last, keys == last
    return below | (equal & (jnp.cumsum(equal) <= count - jnp.sum(below)))


def dare(key: jax.Array, vector: PyTree, *, rate: float) -> PyTree:
    """Drops entries of a task vector at random and rescales the rest: τ·m/(1 − p).

    m is 1 with probability 1 − p, else 0. The expectation is the vector itself.

    Args:
      key: draws the mask of each leaf.
      vector: a task vector.
      rate: p in [0, 1), the fraction dropped.

    Returns:
      A tree like ``vector``.

    Raises:
      ValueError: if the rate lies outside [0, 1), or the vector holds values that are not finite.

    References:
      Yu et al., `Language Models are Super Mario`, 2024, §3.1 (DARE).

    >>> float(jnp.mean(dare(jax.random.key(0), jnp.ones(100_000), rate=0.9)).round(1))
    1.0
    """
    check_fraction("rate", rate)
    if not isinstance(rate, jax.core.Tracer) and not rate < 1:
        raise ValueError(f"rate must lie in [0, 1), got {rate}: at 1 nothing would be left")
    check(vector, names=("vector",))
    leaves, structure = jax.tree.flatten(vector)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def drop(x, key):
        kept = jax.random.bernoulli(key, 1 - rate, jnp.shape(x))
        return jnp.where(kept, to_float(x) / (1 - rate), 0.0).astype(jnp.asarray(x).dtype)

    return map_floats(drop, vector, keys)

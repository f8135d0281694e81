"""Masks of living weights: which leaves have one, what they do to updates, and the removal of the lowest weights."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax._checks import is_integer
from distill_jax._model import PyTree
from distill_jax.weights.structure import by_path, path_name


def f32(x: jax.Array) -> jax.Array:
    """Converts an array to float32."""
    return x.astype(jnp.float32)


def absent(mask: Any) -> bool:
    """Says whether a leaf has no mask."""
    return isinstance(mask, optax.MaskedNode)


def map_present(fn: Any, first: PyTree, *rest: PyTree) -> PyTree:
    """Maps a function over the leaves that ``first`` has; its ``MaskedNode`` stay where they are."""
    return jax.tree.map(lambda x, *others: x if absent(x) else fn(x, *others), first, *rest, is_leaf=absent)


def choose_leaves(params: PyTree, exclude: Sequence[str], min_ndim: int) -> PyTree:
    """Says for each leaf whether it is pruned.

    Raises:
      ValueError: if an expression is found in no path, or no leaf is left.
    """
    leaves = by_path(params)
    for expression in exclude:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"exclude: {expression!r} is no regular expression: {error}") from None
        if leaves and not any(re.search(expression, path) for path in leaves):
            raise ValueError(f"exclude: {expression!r} is found in no path; there are {', '.join(leaves)}")

    def chosen(path, leaf):
        return bool(
            leaf.ndim >= min_ndim
            and leaf.size
            and jnp.issubdtype(leaf.dtype, jnp.floating)
            and not any(re.search(expression, path_name(path)) for expression in exclude)
        )

    tree = jax.tree_util.tree_map_with_path(chosen, params)
    if leaves and not any(jax.tree.leaves(tree)):
        raise ValueError(
            f"no leaf is left to prune: of {', '.join(leaves)}, all are excluded, not of a floating "
            f"type, or have fewer than min_ndim={min_ndim} axes"
        )
    return tree


def check_pattern(pattern: Any) -> tuple[int, int]:
    """Returns N and M, or raises ``ValueError`` unless ``pattern`` is N of M neighbours."""
    paired = isinstance(pattern, tuple | list) and len(pattern) == 2 and all(map(is_integer, pattern))
    if not paired or not 1 <= pattern[0] < pattern[1]:
        raise ValueError(f"pattern (N, M) must satisfy 1 ≤ N < M, got {pattern}")
    return pattern[0], pattern[1]


def check_groups(params: PyTree, chosen: PyTree, group: int, axis: int) -> None:
    """Raises ``ValueError`` if an axis of a chosen leaf cannot be cut into groups of this size."""
    wrong = [
        f"{path} {leaf.shape}"
        for (path, leaf), is_chosen in zip(by_path(params).items(), jax.tree.leaves(chosen), strict=True)
        if is_chosen and (not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] % group)
    ]
    if wrong:
        raise ValueError(
            f"axis {axis} must be a multiple of pattern's M={group} in every leaf that is pruned, "
            f"but is not in {', '.join(wrong)}: exclude them"
        )


def check_masks(masks: PyTree, params: PyTree) -> None:
    """Raises ``ValueError`` if masks do not fit the parameters."""
    try:
        fits = jax.tree.map(
            lambda p, mask: absent(mask) or (mask.dtype == bool and mask.shape == p.shape), params, masks
        )
    except (ValueError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"masks must have the structure of params, with an array or a MaskedNode for each leaf: {reason}"
        ) from None
    wrong = [path for path, fit in by_path(fits).items() if not fit]
    if wrong:
        raise ValueError(f"masks must be bool arrays of the parameters' shapes; not so: {wrong}")


def masked_update(
    tx: optax.GradientTransformationExtraArgs,
    masks: PyTree,
    updates: PyTree,
    inner: PyTree,
    params: PyTree,
    extra: Mapping[str, Any],
) -> tuple[PyTree, PyTree]:
    """Computes the updates of ``tx``, which sees zero gradients for removed weights."""
    return tx.update(masked(updates, masks), inner, params, **extra)


def masked(tree: PyTree, masks: PyTree) -> PyTree:
    """Sets the entries outside the masks to zero."""
    return jax.tree.map(
        lambda x, mask: x if absent(mask) else jnp.where(mask, x, jnp.zeros_like(x)), tree, masks
    )


def zeroed(masks: PyTree, updates: PyTree, params: PyTree) -> PyTree:
    """Changes updates so that each removed weight is exactly zero after them."""
    # −p in the wider of both types: rounded to a narrower one it would leave a remainder
    return jax.tree.map(
        lambda u, mask, p: u if absent(mask) else jnp.where(mask, u, -p), updates, masks, params
    )


def remove(
    masks: PyTree,
    values: PyTree,
    counts: Callable[[int], jax.Array],
    ranking: str,
    pattern: tuple[int, int] | None,
    axis: int,
) -> PyTree:
    """Removes the ``counts(n)`` lowest of n values from masks, those that were gone before among them."""
    leaves, structure = jax.tree.flatten(masks)
    # The bits of floats ≥ 0 are integers in the same order; what is gone comes before them
    keys = [
        jnp.where(mask, jax.lax.bitcast_convert_type(value, jnp.int32), -1)
        for mask, value in zip(leaves, jax.tree.leaves(values), strict=True)
    ]
    if pattern is not None:
        keys = [_spare(key, pattern, axis) for key in keys]
    flat = [key.ravel() for key in keys]
    if ranking == "global":
        ends = list(itertools.accumulate(leaf.size for leaf in leaves))
        gone = jnp.split(_lowest(jnp.concatenate(flat), counts(ends[-1])), ends[:-1])
    else:
        gone = [_lowest(key, counts(key.size)) for key in flat]
    new = [mask & ~part.reshape(mask.shape) for mask, part in zip(leaves, gone, strict=True)]
    return jax.tree.unflatten(structure, new)


def _spare(keys: jax.Array, pattern: tuple[int, int], axis: int) -> jax.Array:
    """Protects the N highest of each M neighbours from removal."""
    keep, group = pattern
    moved = jnp.moveaxis(keys, axis, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, group)
    one, other = groups[..., :, None], groups[..., None, :]
    first = np.tri(group, k=-1, dtype=bool)  # of equals, the first is the lower
    rank = jnp.sum((other < one) | ((other == one) & first), -1)
    groups = jnp.where(rank < group - keep, groups, np.iinfo(np.int32).max)
    return jnp.moveaxis(groups.reshape(moved.shape), -1, axis)


def _lowest(keys: jax.Array, count: Any) -> jax.Array:
    """Marks the ``count`` lowest of int32 ``[n]`` keys ≥ −1, the first among equal ones.

    The key at that place in the order is found by bisection: 31 sums over the keys, which take a
    tenth of the time of a sort on a CPU, and leave keys that lie over several devices where they are.
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

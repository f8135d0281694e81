"""Paths of leaves, checks that trees fit each other, and scalars chosen by path patterns."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_fractions, check_real
from distill_jax._model import Model, PyTree

Scalar = float | jax.Array
Scalars = Scalar | Mapping[str, Scalar]


def path_name(path: tuple[Any, ...]) -> str:
    """Writes the path of a leaf in this library's form, ``dense.0.kernel``.

    Args:
      path: a path as JAX gives it, for instance in ``jax.tree_util.tree_leaves_with_path``.

    Returns:
      The names of the keys, joined by dots.

    >>> path_name(jax.tree_util.tree_leaves_with_path({"dense": [{"kernel": 1}]})[0][0])
    'dense.0.kernel'
    """
    return jax.tree_util.keystr(path, simple=True, separator=".")


def by_path(tree: PyTree) -> dict[str, Any]:
    """Lists the leaves of a tree by their paths, in the tree's order.

    >>> by_path({"b": 1, "a": [2, 3]})
    {'a.0': 2, 'a.1': 3, 'b': 1}
    """
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_float(leaf: Any) -> bool:
    """Says whether a leaf holds floating-point numbers, real or complex: those that arithmetic changes."""
    return jnp.issubdtype(_dtype(leaf), jnp.inexact)


def map_floats(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps a function over the float leaves; all other leaves are those of the first tree."""
    return jax.tree.map(lambda x, *xs: function(x, *xs) if is_float(x) else x, tree, *rest)


def mismatch_report(*trees: PyTree, names: Sequence[str] | None = None, dtypes: bool = True) -> str:
    """Lists where trees differ in structure, shape or dtype, or hold values that are not finite.

    Args:
      trees: one or more trees. All others are compared with the first.
      names: the names of the trees in the report; by default ``tree_a``, ``tree_b`` and so on.
      dtypes: whether dtypes must agree.

    Returns:
      One line per difference, with the path of the leaf; an empty string if there is none. Traced values
      count as finite.

    >>> import numpy as np
    >>> print(mismatch_report({"w": np.ones(2), "b": np.ones(1)}, {"w": np.ones(3)}))
    b: missing in tree_b
    w: shape (2,) in tree_a, (3,) in tree_b
    """
    names = names or [f"tree_{chr(ord('a') + i)}" for i in range(len(trees))]
    first, *others = leaves = [by_path(tree) for tree in trees]
    lines = [
        f"{path}: no numbers but {type(leaf).__name__} in {name}"
        for name, tree in zip(names, leaves, strict=True)
        for path, leaf in tree.items()
        if not _is_array(leaf)
    ]
    if lines:
        return "\n".join(lines)
    for name, other in zip(names[1:], others, strict=True):
        lines += [f"{path}: missing in {name}" for path in first if path not in other]
        lines += [f"{path}: missing in {names[0]}" for path in other if path not in first]
        for path in [path for path in first if path in other]:
            a, b = first[path], other[path]
            if np.shape(a) != np.shape(b):
                lines.append(f"{path}: shape {np.shape(a)} in {names[0]}, {np.shape(b)} in {name}")
            if dtypes and _dtype(a) != _dtype(b):
                lines.append(f"{path}: dtype {_dtype(a)} in {names[0]}, {_dtype(b)} in {name}")
    if not lines:
        structures: list[Any] = [jax.tree.structure(tree) for tree in trees]
        lines += [
            _containers(trees[0], tree, names[0], name)
            for name, tree, structure in zip(names[1:], trees[1:], structures[1:], strict=True)
            if structure != structures[0]
        ]
    for name, tree in zip(names, leaves, strict=True):
        for path, leaf in tree.items():
            if not isinstance(leaf, jax.core.Tracer) and is_float(leaf):
                with jax.ensure_compile_time_eval():  # a constant is known inside jit, too
                    bad = np.size(leaf) - int(jnp.sum(jnp.isfinite(leaf)))
                if bad:
                    lines.append(f"{path}: {bad} of {np.size(leaf)} values not finite in {name}")
    return "\n".join(lines)


def _containers(first: PyTree, other: PyTree, first_name: str, name: str) -> str:
    """Says how two trees differ whose leaves have the same paths, shapes and dtypes."""
    models = isinstance(first, Model) and isinstance(other, Model)
    if models and first.apply_fn != other.apply_fn:
        return (
            f"apply_fn: {first_name} and {name} are models of different functions; if both compute the "
            "same, give one the other's function with replace(apply_fn=...)"
        )
    return f"containers: {jax.tree.structure(first)} in {first_name}, {jax.tree.structure(other)} in {name}"


def check(*trees: PyTree, names: Sequence[str] | None = None, dtypes: bool = True) -> None:
    """Raises ``ValueError`` unless trees fit each other and hold finite values.

    Args:
      trees: one or more trees. All others are compared with the first.
      names: the names of the trees in the message; by default ``tree_a``, ``tree_b`` and so on.
      dtypes: whether dtypes must agree.

    Raises:
      ValueError: with the entries of :func:`mismatch_report`, if there are any.
    """
    if report := mismatch_report(*trees, names=names, dtypes=dtypes):
        raise ValueError(
            "the trees must have the same structure, shapes and dtypes, and finite values: "
            + report.replace("\n", "; ")
        )


def scalars(value: Scalars, tree: PyTree, *, name: str = "t", fraction: bool = True) -> PyTree:
    """Gives each leaf of a tree a scalar: one for all leaves, or one per path pattern.

    Args:
      value: a scalar; or a mapping from regular expressions to scalars, such as ``{"dense.0": 0.2, "":
        0.5}``. A leaf gets the scalar of the expression that is found in its path, and the scalar of the
        empty expression if there is none. (The order of the mapping has no meaning, because ``jit`` sorts
        dictionaries.)
      tree: the tree whose leaves get the scalars.
      name: the argument's name in messages.
      fraction: whether the scalars must lie in [0, 1].

    Returns:
      A tree of the same structure, with scalars as leaves.

    Raises:
      ValueError: if a value is not a scalar or out of range, an expression is found in no path, or a leaf
        has no scalar or several. The message names all such expressions and paths.

    >>> scalars({"a": 0.2, "": 0.5}, {"a": 7.0, "b": 8.0})
    {'a': 0.2, 'b': 0.5}
    """
    given = value if isinstance(value, Mapping) else {"": value}
    labelled = {}
    for pattern, scalar in given.items():
        label = f"{name}[{pattern!r}]" if isinstance(value, Mapping) else name
        if np.ndim(scalar):
            raise ValueError(
                f"{label} must be a scalar, got shape {np.shape(scalar)}: use jax.vmap for several values"
            )
        labelled[label] = scalar
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"{label}: {pattern!r} is no regular expression: {error}") from None
    if fraction:
        check_fractions(labelled)
    for label, scalar in labelled.items():
        check_real(label, scalar)
        if not isinstance(scalar, jax.core.Tracer) and not np.isfinite(scalar):
            raise ValueError(f"{label} must be finite, got {scalar}")
    patterns = [pattern for pattern in given if pattern]
    paths = list(by_path(tree))
    found = {path: [p for p in patterns if re.search(p, path)] for path in paths}
    lines = [f"{p!r} is found in no path" for p in patterns if not any(p in x for x in found.values())]
    for path, matches in found.items():
        if len(matches) > 1:
            lines.append(f"{path}: found by {', '.join(map(repr, matches))}")
        if not matches and "" not in given:
            lines.append(f"{path}: found by none; the expression '' stands for the rest")
    if lines:
        lines.append(f"the paths are {', '.join(paths)}")
        raise ValueError(f"{name}: each path must be found by one expression: {'; '.join(lines)}")
    return jax.tree.unflatten(jax.tree.structure(tree), [given[(found[path] or [""])[0]] for path in paths])


def _is_array(leaf: Any) -> bool:
    """Says whether a leaf is an array of numbers, of booleans or of random keys, or a number."""
    if isinstance(leaf, np.ma.MaskedArray):
        return False
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, bool | int | float | complex)
    return jax.dtypes.issubdtype(dtype, jax.dtypes.extended) or (
        jnp.issubdtype(dtype, np.bool_) or jnp.issubdtype(dtype, np.number)
    )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)

"""The containers of a pytree in JSON, and names for its arrays."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax

from distill_jax._model import PyTree


def describe(tree: PyTree) -> Any:
    """Describes the containers of a pytree in JSON; a leaf is its number in the tree's own order."""
    numbers = itertools.count()

    def of(node: Any) -> Any:
        if node is None or jax.tree_util.all_leaves([node]):
            return None if node is None else next(numbers)
        pairs, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
        children = [of(child) for _, child in pairs]
        if type(node) in (list, tuple):
            return [type(node).__name__, children]
        return [
            "dict",
            [[plain_key(path[0]), child] for (path, _), child in zip(pairs, children, strict=True)],
        ]

    return of(tree)


def plain_key(key: Any) -> str | int:
    """Returns a dict's key, or the name or number of a child of another container."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            found = getattr(key, attribute)
            return found if isinstance(found, str | int) else str(found)
    return str(key)


def build(description: Any, leaves: Sequence[Any]) -> PyTree:
    """Builds a pytree of such containers from leaves in the order of the tree that was described."""
    if description is None:
        return None
    if isinstance(description, int):
        return leaves[description]
    kind, children = description
    if kind == "dict":
        return {key: build(child, leaves) for key, child in children}
    made = [build(child, leaves) for child in children]
    return made if kind == "list" else tuple(made)


def leaf_names(root: str, tree: PyTree) -> list[str]:
    """Names the arrays of a pytree by their places, such as ``x`` or ``x.image``."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return [".".join([root, *(str(plain_key(key)) for key in path)]) for path in paths]

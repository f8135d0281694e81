"""Finds a network's parameters and state within any pytree, by structure, and edits them there."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._model import Model, PyTree, identity
from distill_jax.compress.units.graph import UnitGraph, check_graph

Kind = Literal["params", "state"]
Edit = Callable[[Any, str], Any]
Function = Callable[[Any], Any]


def map_leaves(graph: UnitGraph, edit: Edit, tree: PyTree, function: Function = identity) -> PyTree:
    """Applies a function to all leaves of a tree that belong to a parameter or to the state of a network.

    Those are the leaves of each subtree that has the structure of the traced parameters or of the traced
    state: in a Model, an optimizer's state, gradients, masks, or a container of several of these.
    ``None`` and ``optax.MaskedNode`` in the place of a leaf, and single numbers in the place of an array,
    stay as they are.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      edit: ``(leaf, name) -> new leaf``.
      tree: the pytree.
      function: ``apply_fn -> apply_fn``, for each Model that has the traced parameters and state as a whole.

    Returns:
      A pytree of the same structure.

    Raises:
      ValueError: if no subtree has such a structure; if one has, but with arrays of other shapes; or if
        one may be either the parameters or the state.
    """
    check_graph(graph)
    edited, count = _edit(graph, edit, tree, "tree", function)
    if not count:
        raise ValueError(
            f"tree: nothing in it has the structure of the traced parameters, "
            f"{jax.tree.structure(graph.names.params)}: give the model, or a tree that holds whole "
            f"parameters or a whole state; got {jax.tree.structure(tree)}"
        )
    return edited


def _edit(graph: UnitGraph, edit: Edit, tree: PyTree, where: str, function: Function) -> tuple[PyTree, int]:
    """The edited tree, and in how many of its subtrees something was found."""
    count = 0

    def part(node: Any) -> bool:
        return isinstance(node, Model) or bool(_kinds(graph, node))

    def visit(path: Any, node: Any) -> Any:
        nonlocal count
        place = where + jax.tree_util.keystr(path)
        if not isinstance(node, Model):
            kinds = _kinds(graph, node)
            if not kinds:
                return node
            count += 1
            return _edit_part(graph, edit, node, _choose(graph, node, kinds, place), place)
        found: dict[str, Any] = {}
        counts = {}
        kind: Kind
        for kind in ("params", "state"):
            tree, place_of = getattr(node, kind), f"{place}.{kind}"
            if kind in _kinds(graph, tree):
                found[kind], counts[kind] = _edit_part(graph, edit, tree, kind, place_of), 1
            else:
                found[kind], counts[kind] = _edit(graph, edit, tree, place_of, function)
        if counts["state"] and not counts["params"]:
            raise ValueError(
                f"{place}.params has another structure than the traced parameters, and the state alone "
                "would be edited: trace this model, or one of the same structure"
            )
        count += counts["params"]
        traced: Any = jax.tree.structure(tuple(graph.names))
        if jax.tree.structure((node.params, node.state)) == traced:
            found["apply_fn"] = function(node.apply_fn)
        return node.replace(**found)

    return jax.tree_util.tree_map_with_path(visit, tree, is_leaf=part), count


def _kinds(graph: UnitGraph, node: Any) -> list[Kind]:
    """Says whether a node has the structure of the parameters, of the state, or of both."""
    kinds: tuple[Kind, ...] = ("params", "state")
    return [kind for kind in kinds if matching_leaves(graph, node, kind) is not None]


def matching_leaves(graph: UnitGraph, node: PyTree, kind: Kind) -> dict[str, Any] | None:
    """Returns the leaves of a node by name, if it has the structure of the parameters or the state.

    Args:
      graph: the network's units.
      node: any pytree.
      kind: which of the two structures is meant.

    Returns:
      The leaves, ``None`` and ``optax.MaskedNode`` among them; or None if the structure is another.
    """
    names, structure = _structure(graph, kind)
    try:
        leaves = structure.flatten_up_to(node)
    except ValueError:
        return None
    real = [leaf for leaf in leaves if _is_leaf(leaf)]
    if not real or not all(_is_leaf(leaf) or not jax.tree.leaves(leaf) for leaf in leaves):
        return None
    if jax.tree_util.treedef_is_leaf(structure) and np.shape(node) != graph.shapes[names[0]].shape:
        return None  # an array alone has every leaf's structure: only its shape tells
    return dict(zip(names, leaves, strict=True))


def _structure(graph: UnitGraph, kind: Kind) -> tuple[list[str], Any]:
    return jax.tree.flatten(getattr(graph.names, kind))


def _choose(graph: UnitGraph, node: Any, kinds: list[Kind], place: str) -> Kind:
    if len(kinds) == 1:
        return kinds[0]
    fitting = [kind for kind in kinds if not _misfits(graph, node, kind)]
    if len(fitting) == 2:
        raise ValueError(
            f"{place} may be the parameters or the state, which have the same structure and shapes: put "
            "it into a Model, for example model.replace(params=...)"
        )
    return (fitting or kinds)[0]


def _misfits(graph: UnitGraph, node: Any, kind: Kind) -> list[str]:
    """The leaves that have another shape than they were traced with, as a text each."""
    found = []
    for name, leaf in (matching_leaves(graph, node, kind) or {}).items():
        traced = graph.shapes[name].shape
        if _is_array_of(leaf, traced) and np.shape(leaf) != traced:
            found.append(f"{name} has shape {np.shape(leaf)} where {traced} was traced")
    return found


def _edit_part(graph: UnitGraph, edit: Edit, node: Any, kind: Kind, place: str) -> Any:
    if wrong := _misfits(graph, node, kind):
        raise ValueError(
            f"{place}: {wrong[0]}: trace a model of these shapes, use jax.vmap for a leading axis, or give "
            "the other parts of the tree one by one"
        )
    leaves = matching_leaves(graph, node, kind) or {}
    new = [
        edit(leaf, name) if _is_array_of(leaf, graph.shapes[name].shape) else leaf
        for name, leaf in leaves.items()
    ]
    return _structure(graph, kind)[1].unflatten(new)


def _is_leaf(node: Any) -> bool:
    return jax.tree_util.all_leaves([node])


def _is_array_of(leaf: Any, traced: tuple[int, ...]) -> bool:
    """Whether a leaf holds something for each of a parameter's numbers: not None, nor one number for all."""
    return _is_leaf(leaf) and not np.size(leaf) <= 1 < np.prod(traced)


def numpy_of(leaf: ArrayLike) -> Any:
    """Returns the module for an array's operations, so that NumPy arrays stay NumPy arrays."""
    return np if isinstance(leaf, np.ndarray) else jnp


def float_leaves(
    graph: UnitGraph, tree: PyTree, *, state: bool = False, argument: str = "model"
) -> dict[str, np.ndarray]:
    """Returns the floating-point parameters of a model in float64, by name.

    Args:
      graph: the network's units.
      tree: a Model, or a pytree with the structure of its ``params``, such as gradients.
      state: whether to return the arrays of a Model's state also.
      argument: what error messages call the tree.

    Returns:
      name → float64 array.

    Raises:
      ValueError: if the tree has another structure or other shapes than were traced.
    """
    check_graph(graph)
    parts: dict[Kind, Any] = {"params": tree.params if isinstance(tree, Model) else tree}
    if state and isinstance(tree, Model) and jax.tree.leaves(graph.names.state):
        parts["state"] = tree.state
    found: dict[str, np.ndarray] = {}
    for kind, part in parts.items():
        leaves = matching_leaves(graph, part, kind)
        if leaves is None:
            raise ValueError(
                f"{argument}: expected the model that was traced, or a tree with the structure of its "
                f"{kind}, {jax.tree.structure(getattr(graph.names, kind))}; got {jax.tree.structure(part)}"
            )
        if wrong := _misfits(graph, part, kind):
            raise ValueError(f"{argument}: {wrong[0]}: trace a model of these shapes")
        for name, leaf in leaves.items():
            if _is_leaf(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating):
                found[name] = np.asarray(leaf, np.float64)
    return found

"""Reorders the units of a network, which changes nothing that the network computes."""

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_mapping
from distill_jax._model import PyTree
from distill_jax.compress.units.editing import map_leaves, numpy_of
from distill_jax.compress.units.graph import UnitGraph, check_graph
from distill_jax.compress.units.running import traced_function
from distill_jax.compress.units.tracing import Traced

Permutations = Mapping[str, Sequence[int] | np.ndarray]


def permute(graph: UnitGraph, tree: PyTree, permutations: Permutations) -> PyTree:
    """Puts units into another order: new unit i is old unit π(i), in all slices.

    The outputs of the network stay the same. Where several positions belong to one unit, such as the
    places of an image behind a flattened channel, they keep their order within the unit.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: the model, or any pytree that :func:`distill_jax.compress.units.keep` takes.
      permutations: group → π, each of 0 … size − 1 once. All units of groups that are not named stay.

    Returns:
      A pytree of the same structure and shapes.

    Raises:
      ValueError: if a group does not exist, its π is no permutation, or the order of its units matters
        (see :func:`permutable`); if nothing in the tree has the traced structure and shapes.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.eye(3), "b": jnp.arange(6.0).reshape(3, 2)}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> permute(graph, model, {"a": [2, 0, 1]}).params["b"][:, 0]
    Array([4., 0., 2.], dtype=float32)
    """
    moving = {name: order for name, order in checked_orders(graph, permutations).items() if _moves(order)}
    permutable_groups(graph, moving)
    orders = position_orders(graph, moving)

    def edit(leaf: Any, name: str) -> Any:
        for axis, order in orders.get(name, {}).items():
            leaf = numpy_of(leaf).take(leaf, order, axis=axis)
        return leaf

    return map_leaves(graph, edit, tree)


def permutable(graph: UnitGraph) -> tuple[str, ...]:
    """Names the groups whose units may stand in any order.

    These groups are free, and the program with random parameters gives the same results on random inputs
    when their units stand in another order. (A program that takes a ``cumsum`` over units does not.) The
    answer is kept with the graph. To find it, the program is compiled.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.

    Returns:
      The names of the groups.
    """
    return tuple(name for name, reason in _reasons(graph).items() if not reason)


def permutable_groups(graph: UnitGraph, groups: Iterable[str] | None) -> list[str]:
    """Returns the names of the groups asked for, or of all groups whose units can be reordered.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      groups: names, or None for all.

    Returns:
      The names, in the order given.

    Raises:
      ValueError: if a group does not exist, or its units cannot be reordered.
    """
    check_graph(graph)
    if isinstance(groups, str):
        raise ValueError(f"groups must be a list of names of groups, got {groups!r}")
    if groups is None:
        return list(permutable(graph))
    names = list(groups)
    for name in names:
        _known(graph, name)
        if not graph.groups[name].free:
            raise ValueError(f"{name!r}: the group is not free: {graph.groups[name].reason}")
    for name in names:
        if reason := _reasons(graph)[name]:
            raise ValueError(f"{name!r}: the order of its units matters: {reason}")
    return names


def checked_orders(graph: UnitGraph, permutations: Permutations) -> dict[str, np.ndarray]:
    """Checks permutations, and returns them as integer arrays.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      permutations: group → π, the old index of each new unit.

    Returns:
      group → π, int ``[size]``.

    Raises:
      ValueError: if a π is no permutation, or its group does not exist.
    """
    check_graph(graph)
    check_mapping("permutations", permutations, "group → order of its units")
    orders = {}
    for name, order in permutations.items():
        _known(graph, name)
        array, size = np.asarray(order), graph.groups[name].size
        whole = np.issubdtype(array.dtype, np.integer)
        if array.shape != (size,) or not whole or not np.array_equal(np.sort(array), np.arange(size)):
            raise ValueError(f"permutations[{name!r}] must hold each of 0 … {size - 1} once, got {order!r}")
        orders[name] = array.astype(np.int64)
    return orders


def position_orders(
    graph: UnitGraph, orders: Mapping[str, np.ndarray], paths: Iterable[str] | None = None
) -> dict[str, dict[int, np.ndarray]]:
    """Says where positions come from: name of an array → axis → the old position of each new one.

    The k-th position of a unit goes to the k-th position of the other. (:func:`permutable` finds out
    whether this is right.)

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      orders: group → π.
      paths: the names of the arrays that are wanted; None for all.

    Returns:
      name of an array → axis → int ``[positions]``.
    """
    wanted = None if paths is None else set(paths)
    parts: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = {}
    for name, group in graph.groups.items():
        for path, axis, index in group.slices:
            if wanted is None or path in wanted:
                parts.setdefault((path, axis), []).append((name, index))
    found: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), slices in parts.items():
        if not any(name in orders for name, _ in slices):
            continue
        old = np.stack([index for _, index in slices])
        new = np.stack([
            np.where(index < 0, -1, orders[name][index]) if name in orders else index
            for name, index in slices
        ])  # fmt: skip
        # Stable, so that positions of the same units keep their order
        first, second = np.lexsort(old), np.lexsort(new)
        if not np.array_equal(old[:, first], new[:, second]):
            raise ValueError(f"{path}: units of {slices[0][0]!r} do not lie alike along axis {axis}")
        order = np.empty_like(first)
        order[second] = first
        found.setdefault(path, {})[axis] = order
    return found


def _known(graph: UnitGraph, name: str) -> None:
    if name not in graph.groups:
        raise ValueError(f"{name!r} is no group; there are {list(graph.groups)}")


def _moves(order: np.ndarray) -> bool:
    return not np.array_equal(order, np.arange(len(order)))


_FOUND: weakref.WeakKeyDictionary[Any, dict[str, str]] = weakref.WeakKeyDictionary()


def _reasons(graph: UnitGraph) -> dict[str, str]:
    """Says for each free group why its units cannot be reordered; the empty string if they can be."""
    key = graph.traced.tracer
    if key not in _FOUND:
        _FOUND[key] = _try_all(graph)
    return _FOUND[key]


def _try_all(graph: UnitGraph) -> dict[str, str]:
    traced: Traced = graph.traced
    rng = np.random.default_rng(0)
    params, state = jax.tree.map(
        lambda like: _random(rng, like, np.prod(like.shape[:-1])), (traced.model.params, traced.model.state)
    )
    x = jax.tree.map(lambda like: _random(rng, like), traced.x)
    function = traced_function(graph, {})
    model = traced.model.replace(params=params, state=state)
    options: Any = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    forward = jax.jit(lambda model, x: function(model.params, model.state, x))
    run = forward.lower(model, x).compile(compiler_options=options)
    expected = [np.asarray(y) for y in jax.tree.leaves(run(model, x))]

    def fails(names: list[str]) -> str:
        orders = {name: _without_fixed_point(rng, graph.groups[name].size) for name in names}
        try:
            found = position_orders(graph, orders)
        except ValueError as error:
            return str(error)

        def edit(leaf: Any, name: str) -> Any:
            for axis, order in found.get(name, {}).items():
                leaf = jnp.take(leaf, order, axis=axis)
            return leaf

        results = jax.tree.leaves(run(map_leaves(graph, edit, model), x))
        same = all(_same(x, np.asarray(y)) for x, y in zip(expected, results, strict=True))
        return "" if same else "in another one the results are others"

    names = [name for name, group in graph.groups.items() if group.free]
    if not names or not fails(names):
        return dict.fromkeys(names, "")
    return {name: fails([name]) for name in names}


def _random(rng: np.random.Generator, aval: Any, fan_in: float = 1.0) -> Any:
    """Draws numbers with which a deep network does not overflow; those of vectors are positive."""
    if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
        return jnp.broadcast_to(jax.random.key(0), aval.shape)
    if not jnp.issubdtype(aval.dtype, jnp.inexact):
        return jnp.asarray(rng.integers(0, 2, aval.shape), aval.dtype)
    if len(aval.shape) < 2:
        return jnp.asarray(rng.uniform(0.5, 1.5, aval.shape), aval.dtype)
    return jnp.asarray(rng.normal(size=aval.shape) / np.sqrt(fan_in), aval.dtype)


def _without_fixed_point(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draws a random cycle through all units."""
    cycle = rng.permutation(size)
    order = np.empty_like(cycle)
    order[cycle] = np.roll(cycle, 1)
    return order


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Says whether two results are equal up to rounding, and finite."""
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return np.array_equal(a, b)
    tolerance = 8 * float(jnp.finfo(a.dtype).eps) ** 0.5
    a, b = a.astype(np.float64), b.astype(np.float64)
    return bool(np.isfinite(a).all() and np.abs(a - b).max(initial=0) <= tolerance * np.abs(a).max())

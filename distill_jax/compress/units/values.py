"""What units are, in numbers: what they hand on, and their weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compress.units._trace.program import Step, bind, evaluate
from distill_jax.compress.units._trace.roles import positions, roles
from distill_jax.compress.units.graph import Group, UnitGraph
from distill_jax.compress.units.removal import map_leaves


def activations(graph: UnitGraph, params: Any, *inputs: Any) -> dict[str, np.ndarray]:
    """What the units of each group hand on: the values that are contracted with their outgoing slices.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      params: all that was traced.
      inputs: of the shapes that were traced.

    Returns:
      Group → ``[samples, size]``: a sample for each example, place and use. Groups whose values are
      used within a loop only, or in no contraction, are missing.

    Raises:
      ValueError: if params or inputs are not what was traced.
    """
    traced = graph.program
    leaves, structure = jax.tree.flatten((params, inputs))
    expected = [traced.program.avals[number].shape for number in traced.program.inputs]
    if structure != traced.inputs or [np.shape(leaf) for leaf in leaves] != expected:
        raise ValueError(
            f"params and inputs must be what was traced, {traced.inputs} of shapes {expected}; got "
            f"{structure} of shapes {[np.shape(leaf) for leaf in leaves]}"
        )
    uses = {name: role.uses for name, role in roles(graph).items()}
    wanted = {number for each in uses.values() for number, _, _ in each}

    @jax.jit
    def run(leaves: Any) -> dict[int, Any]:
        seen: dict[int, Any] = {}

        def step(step: Step, operands: list[Any]) -> Sequence[Any]:
            results = [jax.nn.relu(operands[0])] if step.name == "relu" else bind(step, operands)
            seen.update((n, x) for n, x in zip(step.outputs, results, strict=True) if n in wanted)
            return results

        evaluate(traced.program, step, traced.program.constants.__getitem__, leaves)
        return seen

    values = run([jnp.asarray(leaf) for leaf in leaves])
    found = {}
    for name, each in uses.items():
        parts = []
        for number, axis, index in each:
            places = positions(index, graph.groups[name].size)
            if number in values and places is not None:
                x = np.moveaxis(np.asarray(values[number]), axis, -1)
                x = np.moveaxis(x.astype(np.float64)[..., places], -1, 0)
                parts.append(x.reshape(-1, graph.groups[name].size))
        if parts:
            found[name] = np.concatenate(parts)
    return found


def vectors(
    graph: UnitGraph, params: Any, *, incoming: Mapping[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """The weights of each unit, one after another.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      params: the parameters, or a part of them, as in :func:`distill_jax.compress.units.keep`.
      incoming: group → the slices that count; None for all slices of all free groups.

    Returns:
      Group → ``[size, weights]``. Slices of which units have different shares are left out.
    """
    leaves = real_leaves(graph, params)
    found = {}
    for group in free_groups(graph):
        slices = group.slices if incoming is None else incoming.get(group.name, ())
        parts = [np.zeros((group.size, 0))]
        for path, axis, index in slices:
            places = positions(index, group.size)
            if path in leaves and places is not None:
                x = np.moveaxis(leaves[path], axis, 0)[places]
                parts.append(x.reshape(group.size, -1))
        if incoming is None or slices:
            found[group.name] = np.concatenate(parts, 1)
    return found


def free_groups(graph: UnitGraph) -> list[Group]:
    """The groups whose units may be removed."""
    return [group for group in graph.groups.values() if group.free]


def real_leaves(graph: UnitGraph, tree: Any) -> dict[str, np.ndarray]:
    """The real arrays of a tree, in float64, by the path of their parameter.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      tree: of parameters, as in :func:`distill_jax.compress.units.keep`.

    Raises:
      ValueError: if there is none.
    """
    found: dict[str, np.ndarray] = {}

    def one(leaf: Any, path: str) -> Any:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            found[path] = np.asarray(leaf, np.float64)
        return leaf

    map_leaves(graph, one, tree, graph.shapes)
    if not found:
        raise ValueError("params: no leaf of the tree is one of the traced parameters")
    return found

"""The activations of units, and their weights as vectors."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._model import Model, PyTree, check_model
from distill_jax.compress.units._trace.program import Step, bind, evaluate
from distill_jax.compress.units._trace.roles import positions, roles
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import Group, UnitGraph, check_graph


def activations(graph: UnitGraph, model: Model, x: PyTree) -> dict[str, np.ndarray]:
    """Computes the activations of each group's units: the values that their outgoing slices multiply.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      x: inputs of the traced shapes, so trace with as many examples.

    Returns:
      Group → float64 ``[samples, size]``, with one sample for each example, place and use. Groups are
      missing whose values are used only within a loop, or in no contraction.

    Raises:
      ValueError: if the model or the inputs have another structure or other shapes than were traced.
    """
    check_graph(graph)
    check_model("model", model)
    traced = graph.traced
    leaves, structure = jax.tree.flatten((model.params, model.state, x))
    expected = [traced.program.avals[number].shape for number in traced.program.inputs]
    shapes, count = [np.shape(leaf) for leaf in leaves], len(graph.shapes)
    if structure == traced.arguments and shapes[:count] == expected[:count] and shapes != expected:
        raise ValueError(
            f"x: a batch of the shapes {shapes[count:]} where {expected[count:]} was traced: give batches of that "
            "size, or trace the model on a batch of this size"
        )
    if structure != traced.arguments or shapes != expected:
        raise ValueError(
            f"model and x must be what was traced, {traced.arguments} of shapes {expected}; got "
            f"{structure} of shapes {shapes}"
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
    graph: UnitGraph, tree: PyTree, *, incoming: Mapping[str, Any] | None = None, state: bool = False
) -> dict[str, np.ndarray]:
    """Returns the weights of each unit as one vector.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: the model, or a pytree of the structure of its ``params``.
      incoming: group → the slices that count; None for all slices of all free groups.
      state: whether the vectors also hold the model's state.

    Returns:
      Group → ``[size, weights]``. A slice in which units have different numbers of places is left out.
    """
    leaves = float_leaves(graph, tree, state=state)
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
    """Returns the groups whose units can be removed."""
    return [group for group in graph.groups.values() if group.free]

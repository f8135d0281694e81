"""Finds the units of a network: reads its program once, with labels in the place of numbers."""

from collections import Counter
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax._model import Model, PyTree, check_inputs, check_model
from distill_jax.compress.units._trace.again import REFUSED, SAME, reruns
from distill_jax.compress.units._trace.elementwise_rules import POLES
from distill_jax.compress.units._trace.program import Program, flatten
from distill_jax.compress.units._trace.roles import roles
from distill_jax.compress.units._trace.rules import Tracer
from distill_jax.compress.units._trace.unused import freeze_unused, label_inputs, tie_to_training
from distill_jax.compress.units.edited_functions import traced
from distill_jax.compress.units.graph import Group, Slice, UnitGraph, names_of

Key = tuple[Any, ...]


class Traced(NamedTuple):
    """What was traced: all that is needed to run the program with smaller arrays.

    Attributes:
      model: the model, with ``jax.ShapeDtypeStruct`` as its arrays.
      x: the input, with ``jax.ShapeDtypeStruct`` as its arrays.
      program: the steps.
      tracer: the labels of every value.
      units: for each group, the nodes of its units.
      structure: the structure of the outputs.
    """

    model: Model
    x: PyTree
    program: Program
    tracer: Tracer
    units: dict[str, np.ndarray]
    structure: Any

    @property
    def arguments(self) -> Any:
        """The structure of the evaluation program's arguments, ``(params, state, x)``."""
        return jax.tree.structure((self.model.params, self.model.state, self.x))


def trace(model: Model, x: PyTree) -> UnitGraph:
    """Finds which indices of which axes of a model's arrays belong together, for any network.

    The program ``model(x)`` is run once with labels in the place of numbers. Two positions that meet in
    a sum, a product or a contraction belong to one unit. A reshape makes an axis a product of units of
    two kinds (heads × head size). Inputs, outputs and constants that vary have no units, and what meets
    them is not free. An operation without a rule freezes all axes that it touches, and is named in
    ``graph.notes``.

    A group is *exact* if the network without some of its units (:func:`~distill_jax.compress.units.keep`)
    computes in evaluation what the network with these units set to zero (:func:`~distill_jax.compress.units.silence`)
    computes, wherever that is finite. A group is not exact if a unit that is zero still counts, for
    example in a mean, a softmax or a normalisation over the units.

    Code that reads a width from an array may compute a number from it (1/√head_size), or choose where a slice
    begins, a stride or the shape of a reshape. With smaller arrays it then computes something else. To find
    this out, the network is traced again with fewer units, in several random ways, and compared with the
    traced program adapted to these units: each operation, its options, its constants and its shapes. Where
    they differ, ``keep`` uses the adapted program. (A difference that
    shows for few choices of units may be missed: :func:`~distill_jax.compress.units.verify` tries yours.)

    Args:
      model: the model. Its arrays may be ``jax.ShapeDtypeStruct``. It is traced in evaluation mode.
      x: a batch of inputs: an array, a pytree of arrays, or ``jax.ShapeDtypeStruct``. The axes of inputs
        cannot be removed.

    Returns:
      The groups of units. Their names are the paths of parameters.

    Raises:
      ValueError: if ``model`` is no Model, or one from :func:`distill_jax.models.load`, whose program is closed;
        if ``x`` is no batch.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = trace(model, jnp.ones((1, 3)))
    >>> group = graph.groups["a"]
    >>> group.size, group.free, group.exact, [(s.path, s.axis) for s in group.slices]
    (4, True, True, [('a', 1), ('b', 0)])
    """
    check_model("model", model)
    check_inputs("x", x)
    model, x = jax.eval_shape(lambda *given: given, model, x)
    graph = groups_of(model, x)
    closed = any("call_exported" in note for note in graph.notes)
    if closed and not any(group.free for group in graph.groups.values()):
        raise ValueError(
            "model: it was loaded from a file, and its program is closed, so no unit can be removed: trace and "
            "prune the model before models.save"
        )
    graph = _silenced_behind(graph)
    groups = dict(graph.groups)
    for name, found in reruns(graph).items():
        if found == SAME:
            groups[name] = groups[name]._replace(runs=True)
        elif found != REFUSED:
            groups[name] = groups[name]._replace(exact=False, reason=found)
    return UnitGraph(groups, graph.shapes, graph.names, graph.notes, graph.traced)


def _silenced_behind(graph: UnitGraph) -> UnitGraph:
    """Makes groups exact whose zeros would be divided by, where the outgoing slices alone can be silenced."""
    poles = [g.name for g in graph.groups.values() if g.free and g.reason.endswith(POLES)]
    if not poles:
        return graph
    found, groups = roles(graph, alike=False), dict(graph.groups)
    for name in poles:
        if not found[name].reason:
            groups[name] = groups[name]._replace(
                exact=True, exact_shrunk=True, reason="", silent=found[name].outgoing
            )
    return UnitGraph(groups, graph.shapes, graph.names, graph.notes, graph.traced)


def groups_of(model: Model, x: PyTree) -> UnitGraph:
    """Finds the units as :func:`trace` does, but does not look for numbers computed from sizes.

    Args:
      model: the model, with ``jax.ShapeDtypeStruct`` as its arrays.
      x: the input, with ``jax.ShapeDtypeStruct`` as its arrays.

    Returns:
      The groups of units.
    """
    closed, results = traced(model.apply_fn, (model.params, model.state), x, None)
    program = flatten(closed)
    tracer = Tracer()
    names = names_of(model)
    paths = jax.tree.leaves(names)
    label_inputs(tracer, program, len(paths))
    tracer.run(program)
    outputs = [tracer.result(program, i) for i in range(len(program.outputs))]
    for output in outputs:
        for units in output.units:
            tracer.labels.freeze(units, "a result of the network")
    tie_to_training(tracer, program, model, x)
    freeze_unused(tracer, program)
    groups, members = _groups(tracer, program, paths)
    shapes = {
        path: jax.ShapeDtypeStruct(program.avals[n].shape, program.avals[n].dtype)
        for path, n in zip(paths, program.inputs, strict=False)
    }
    notes = [f"{note} (×{n})" if n > 1 else note for note, n in Counter(tracer.notes).items()]
    found = Traced(model, x, program, tracer, members, jax.tree.structure(results))
    return UnitGraph(groups, shapes, names, tuple(notes), found)


def _groups(
    tracer: Tracer, program: Program, paths: list[str]
) -> tuple[dict[str, Group], dict[str, np.ndarray]]:
    """Makes a group of the units whose slices lie in the same places, with as many positions in each."""
    labels = tracer.labels
    frozen, inexact = _reasons(tracer, labels.frozen), _reasons(tracer, labels.inexact)
    births: dict[int, set[int]] = {}
    for node in np.flatnonzero(labels.birth[: labels.count] >= 0):
        for root in labels.resolve(np.array([[node]])).ravel().tolist():
            births.setdefault(root, set()).add(int(labels.birth[node]))
    first = _first_uses(program)
    order = sorted(range(len(paths)), key=lambda i: first.get(program.inputs[i], len(program.avals)))
    places: list[tuple[str, int, np.ndarray]] = []
    of_node: dict[int, list[tuple[int, int]]] = {}
    for i in order:
        for a, units in enumerate(tracer.values[program.inputs[i]].units):
            nodes = labels.resolve(units)
            found, where, counts = np.unique(
                nodes.T.ravel(), return_index=True, return_counts=True
            )  # fmt: skip
            for j in np.argsort(where):
                if found[j] >= 0:
                    of_node.setdefault(int(found[j]), []).append((len(places), int(counts[j])))
            places.append((paths[i], a, nodes))
    kinds: dict[Key, list[int]] = {}
    for root, lies in of_node.items():
        kind = (
            tuple(lies), tuple(sorted(births.get(root, ()))), root in frozen, root in inexact,
        )  # fmt: skip
        kinds.setdefault(kind, []).append(root)
    found_groups: list[tuple[Group, np.ndarray]] = []
    for (shared, _, is_frozen, is_inexact), roots in kinds.items():
        members = np.array(roots)
        reason = frozen.get(roots[0]) or inexact.get(roots[0]) or ""
        if not reason and len(roots) == 1:
            reason = "one unit alone"
        free = not is_frozen and len(roots) > 1
        lies_in = [places[place] for place, _ in shared]
        slices = [s for path, a, nodes in lies_in for s in _slices(path, a, nodes, members)]
        name = slices[0].path
        group = Group(name, len(roots), tuple(slices), free, not is_inexact, reason, free and not is_inexact)
        found_groups.append((group, members))
    names: Counter[str] = Counter()
    named: dict[int, str] = {}
    # What can be removed has the first right to a parameter's name
    for i in sorted(range(len(found_groups)), key=lambda i: not found_groups[i][0].free):
        name = found_groups[i][0].name
        named[i] = f"{name}#{names[name]}" if names[name] else name
        names[name] += 1
    groups = {named[i]: g._replace(name=named[i]) for i, (g, _) in enumerate(found_groups)}
    return groups, {named[i]: members for i, (_, members) in enumerate(found_groups)}


def _first_uses(program: Program) -> dict[int, int]:
    """Says when each value is first an operand, also within loops, counted in results."""
    first: dict[int, int] = {}
    for step in program.steps:
        time = step.outputs[0] if step.outputs else 0
        for body in step.bodies:
            inner = _first_uses(body)
            # A loop's bodies take the last of the operands, but for its condition's
            for number, within in zip(step.inputs[::-1], body.inputs[::-1], strict=False):
                if within in inner:
                    first.setdefault(number, inner[within])
        for number in step.inputs:
            first.setdefault(number, time)
    return first


def _reasons(tracer: Tracer, marks: list[tuple[np.ndarray, str]]) -> dict[int, str]:
    reasons: dict[int, str] = {}
    for nodes, reason in marks:
        for root in np.unique(tracer.labels.resolve(nodes[None])):
            if root >= 0:
                reasons.setdefault(int(root), reason)
    return reasons


def _slices(path: str, axis: int, nodes: np.ndarray, members: np.ndarray) -> list[Slice]:
    """Says where the members lie on an axis. A position that has two of them needs two slices."""
    order = np.argsort(members)
    found = np.minimum(np.searchsorted(members[order], nodes), len(members) - 1)
    unit = np.where(members[order][found] == nodes, order[found], -1)
    unit = -np.sort(-unit, axis=0)
    return [Slice(path, axis, row) for row in unit if (row >= 0).any()]

"""Arrays, and positions of them, that the program of evaluation does not use."""

from typing import Any

import jax
import numpy as np

from distill_jax._model import Model, PyTree
from distill_jax.compress.units._trace.program import Program, flatten
from distill_jax.compress.units._trace.rules import Tracer, fixed, value
from distill_jax.compress.units.edited_functions import any_key, shapes_in, traced


def label_inputs(tracer: Tracer, program: Program, count: int) -> None:
    """Gives each axis of the first inputs (parameters and state) labels, and the others none.

    Args:
      tracer: where the labels go.
      program: the program.
      count: how many inputs are parameters or state.
    """
    for i, number in enumerate(program.inputs):
        aval = program.avals[number]
        if i >= count or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
            tracer.values[number] = value(fixed(n) for n in aval.shape)
        else:
            axes = [tracer.fresh(n) for n in aval.shape]
            # All slices of a silenced unit are 0
            tracer.values[number] = value((units, np.ones_like(zero)) for units, zero in axes)


def tie_to_training(tracer: Tracer, program: Program, model: Model, x: PyTree) -> None:
    """Ties arrays that only training uses to the arrays with which training uses them.

    Such are the running sums of Haiku's BatchNorm, of which evaluation uses the averages, and the kernel that
    makes a router's noise. Evaluation does not need them, but they must get smaller with the others, or the
    smaller network could not be trained.

    Args:
      tracer: the labels of the program of evaluation.
      program: the program of evaluation.
      model: the model, with ``jax.ShapeDtypeStruct`` as its arrays.
      x: the input, with ``jax.ShapeDtypeStruct`` as its arrays.
    """
    count = len(jax.tree.leaves(model))
    used = {number for step in program.steps for number in step.inputs}.union(program.outputs)
    unused = [i for i, n in enumerate(program.inputs[:count]) if n not in used and program.avals[n].shape]
    if not unused:
        return
    try:
        closed, (outputs, state) = traced(model.apply_fn, (model.params, model.state), x, any_key())
    except Exception:  # whatever the network raises: it has no training mode
        return
    training, tied = flatten(closed), Tracer()
    label_inputs(tied, training, count)
    tied.run(training)
    if shapes_in(state) == shapes_in(model.state):  # what an array of the state becomes is that array
        first, after = count - len(jax.tree.leaves(state)), len(jax.tree.leaves(outputs))
        for i, number in enumerate(training.inputs[first:count]):
            new = tied.result(training, after + i)
            for a, units in enumerate(tied.values[number].units):
                tied.labels.unify(units, new.units[a], "state")

    def positions(i: int) -> list[tuple[Any, int]]:
        """For each position of an array: what it means in training, and its node in evaluation."""
        axes = zip(tied.values[training.inputs[i]].units, tracer.values[program.inputs[i]].units, strict=True)
        return [
            (tuple(sorted(meaning[meaning >= 0].tolist())), int(node))
            for there, here in axes
            for meaning, node in zip(tied.labels.resolve(there).T, here.max(0, initial=-1), strict=True)
        ]

    known = dict(pair for i in range(count) if i not in unused for pair in positions(i) if pair[0])
    pairs = [(node, known[meaning]) for i in unused for meaning, node in positions(i) if meaning in known]
    if pairs:
        a, b = np.array(pairs).T
        tracer.labels.unify(a[None], b[None], "training")


def freeze_unused(tracer: Tracer, program: Program) -> None:
    """Freezes the nodes of parameters on which no result depends, such as positions that are cut off.

    Other inputs may use them, so they are not free. A node is used where an axis that has it is summed or
    otherwise gone in the result; what becomes a result of the network is frozen already.

    Args:
      tracer: the labels of the program.
      program: the program.
    """
    labels = tracer.labels
    used = np.zeros(labels.count + 1, bool)
    last_seen = np.full(labels.count + 1, -1)
    known: dict[int, np.ndarray] = {}

    def nodes(units: np.ndarray) -> np.ndarray:
        if id(units) not in known:
            known[id(units)] = np.unique(tracer.meaning(units))
        return known[id(units)]

    def visit(program: Program) -> None:
        for step in program.steps:
            for body in step.bodies:
                visit(body)
            if step.bodies or step.name in ("slice", "split"):
                continue
            now = step.outputs[0] if step.outputs else labels.count
            results = [units for n in step.outputs for units in tracer.read(n, program).units if len(units)]
            for units in results:
                last_seen[nodes(units)] = now
            passed = {id(units) for units in results}
            for i in range(len(step.inputs)):
                for units in tracer.operand(step, i, program).units:
                    if len(units) and id(units) not in passed:
                        found = nodes(units)
                        used[found[last_seen[found] != now]] = True

    visit(program)
    for number in program.inputs:
        for units in tracer.values[number].units:
            found = nodes(units)
            labels.freeze(found[(found >= 0) & ~used[found]], "not used on these inputs")

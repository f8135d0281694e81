"""Finds out whether a program computes each example of a batch by itself."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from distill_jax.compress.units._trace.program import flatten
from distill_jax.compress.units._trace.rules import Tracer, fixed, value


def examples_apart(closed: Any, batches: Sequence[bool]) -> bool:
    """Says whether each example of a batch of two is computed by itself.

    Args:
      closed: a closed jaxpr.
      batches: for each input, whether its first axis is the batch.
    """
    program = flatten(closed)
    tracer = Tracer()
    examples = tracer.labels.fresh(2)
    for number, batch in zip(program.inputs, batches, strict=True):
        axes = [fixed(n) for n in program.avals[number].shape]
        if batch:
            axes[0] = examples, np.zeros(2, bool)
        tracer.values[number] = value(axes)
    tracer.run(program)
    labels = tracer.labels
    mine = labels.resolve(examples)
    for nodes, _ in (*labels.frozen, *labels.inexact):
        if np.isin(labels.resolve(nodes[None]), mine).any():
            return False
    if mine.shape != (1, 2) or mine[0, 0] == mine[0, 1]:
        return False
    for i in range(len(program.outputs)):
        first, *rest = (labels.resolve(units) for units in (tracer.result(program, i).units or [mine[:, :0]]))
        if not np.array_equal(first, mine) or any(np.isin(units, mine).any() for units in rest):
            return False
    return True

"""Counts the multiplications of a program, and those that would be left with fewer units."""

from collections.abc import Callable
from math import prod
from typing import Any

from distill_jax.compress.units._trace.adapted import Adapted, shape_of
from distill_jax.compress.units._trace.program import Program, Step
from distill_jax.compress.units._trace.sum_rules import contractions


def multiplications(small: Adapted, program: Program) -> tuple[int, int]:
    """Counts the multiplications of matrix products and convolutions.

    The body of a ``scan`` counts as often as it runs, that of a ``shard_map`` for each device, that of a ``while``
    once; of a ``cond`` the largest branch counts.

    Args:
      small: the program adapted to the units that are left.
      program: the whole program, or one within a loop.

    Returns:
      The number with all units, and the number with those that are left.
    """
    return whole_multiplications(program), _summed(program, lambda step: _left_of_step(small, step))


def whole_multiplications(program: Program) -> int:
    """Counts the multiplications of a program with all its units, as :func:`multiplications` does."""
    return _summed(program, lambda step: _of_step(program, step))


def _summed(program: Program, count: Callable[[Step], int]) -> int:
    total = 0
    for step in program.steps:
        counts = [_summed(body, count) for body in step.bodies] or [count(step)]
        times = 1
        if step.name == "scan":
            times = step.params["length"]
        elif step.name == "shard_map":
            times = step.params["mesh"].size
        total += times * (max(counts) if step.name == "cond" else sum(counts))
    return total


def _of_step(program: Program, step: Step) -> int:
    pairs = contractions(step)
    if not pairs:
        return 0
    left, right, out = (program.avals[number].shape for number in (*step.inputs[:2], step.outputs[0]))
    return prod((*out, *_terms(step, left, right, pairs)))


def _left_of_step(small: Adapted, step: Step) -> int:
    pairs = contractions(step)
    if not pairs:
        return 0
    left, right = (shape_of(small.operand(step, place)) for place in (0, 1))
    return prod((*shape_of(small.output(step)), *_terms(step, left, right, pairs)))


def _terms(step: Step, left: Any, right: Any, pairs: Any) -> list[int]:
    """Returns the sizes of the axes over which a product sums."""
    if step.name == "conv_general_dilated":
        return [right[a] for a in step.params["dimension_numbers"].rhs_spec[1:]]
    return [left[pair[0][1]] for pair in pairs]

"""Counts the multiplications of a program, and those that would be left with fewer units."""

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
    total = left = 0
    for step in program.steps:
        counts = [multiplications(small, body) for body in step.bodies] or [_of_step(small, step)]
        if step.name == "cond":
            counts = [max(counts)]
        times = 1
        if step.name == "scan":
            times = step.params["length"]
        elif step.name == "shard_map":
            times = step.params["mesh"].size
        total += times * sum(n for n, _ in counts)
        left += times * sum(n for _, n in counts)
    return total, left


def _of_step(small: Adapted, step: Step) -> tuple[int, int]:
    pairs = contractions(step)
    if not pairs:
        return 0, 0
    out, rhs = small.output(step), small.operand(step, 1)
    summed: list[Any] = [small.operand(step, 0)[left[1]] for left, _ in pairs]
    if step.name == "conv_general_dilated":
        numbers = step.params["dimension_numbers"].rhs_spec
        summed = [rhs[a] for a in numbers[1:]]
    return prod(mask.size for mask in [*out, *summed]), prod(shape_of([*out, *summed]))

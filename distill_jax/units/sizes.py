"""Which numbers in a program were computed from sizes: 1/√(head size), say.

In the program they are constants. The same function with smaller arrays has others there, and then
what it computes is not what the larger network with silenced units computes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from distill_jax.units.graph import Group, UnitGraph
from distill_jax.units.keep import keep
from distill_jax.units.program import Program, flatten


def groups_in_numbers(
    fn: Callable[..., Any], params: Any, inputs: Any, graph: UnitGraph, program: Program
) -> set[str]:
    """The exact groups from whose size ``fn`` computes a number that is no size.

    Traces ``fn`` again with a unit less in each group; where that shows other numbers, or fails (for
    some widths are written into ``fn``), with a unit less in the groups of one kind at a time.

    Args:
      fn: as in :func:`distill_jax.units.trace`.
      params: likewise.
      inputs: likewise, all of them in a tuple.
      graph: the groups.
      program: what ``fn`` does with whole arrays.
    """
    before = list(_numbers(program))
    like = jax.eval_shape(lambda tree: tree, params)

    def changed(groups: list[Group]) -> bool | None:
        kept = {group.name: range(group.size - 1) for group in groups}
        small = jax.eval_shape(lambda tree: keep(graph, tree, kept), like)

        def fresh(params: Any, inputs: Any) -> Any:
            return fn(params, *inputs)

        try:
            after = flatten(jax.make_jaxpr(fresh)(small, inputs))
        except Exception:  # Whatever fn raises: it does not run with these sizes, and says so
            return None
        return list(_numbers(after)) != before

    exact = [group for group in graph.groups.values() if group.free and group.exact]
    whole = changed(exact) if exact else False
    if whole is False:
        return set()
    kinds: dict[Any, list[Group]] = {}
    for group in exact:
        places = tuple((s.axis, len(graph.shapes[s.path].shape)) for s in group.slices)
        kinds.setdefault((group.size, places), []).append(group)
    constants = {abs(number) for _, numbers in before for number in numbers}
    found: set[str] = set()
    for (size, _), groups in kinds.items():
        likely = np.power(float(size), [1, -1, 0.5, -0.5])
        if whole or any(np.isclose(number, likely).any() for number in constants):
            found |= {group.name for group in groups if changed(groups)}
    return found


def _numbers(program: Program) -> Iterator[tuple[str, tuple[float, ...]]]:
    """The steps and their constant scalars."""
    for step in program.steps:
        constants = [program.constants[n] for n in step.inputs if n in program.constants]
        scalars = [c for c in map(np.asarray, constants) if c.ndim == 0 and c.dtype.kind in "biuf"]
        yield step.name, tuple(map(float, scalars))
        for body in step.bodies:
            yield from _numbers(body)

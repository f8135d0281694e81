"""Which numbers in a program were computed from sizes: 1/√(head size), say.

In the program they are constants. The same function with smaller arrays has others there, and then
what it computes is not what the larger network with silenced units computes.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax.compress.units._trace.program import Program, flatten
from distill_jax.compress.units.graph import Group, UnitGraph
from distill_jax.compress.units.removal import keep

REDUCTIONS = ("reduce_", "cum", "arg", "dot_general")


def groups_in_numbers(
    fn: Callable[..., Any], params: Any, inputs: Any, graph: UnitGraph, program: Program
) -> set[str]:
    """The exact groups from whose size ``fn`` computes a number that is no size.

    Traces ``fn`` again with fewer units in some groups (:func:`_probes`); where that shows other
    numbers, or fails (for some widths are written into ``fn``), in half of the kinds of groups, and so
    on down to one. A group with which alone ``fn`` does not run is none of them: only its program does.

    Args:
      fn: as in :func:`distill_jax.compress.units.trace`.
      params: likewise.
      inputs: likewise, all of them in a tuple.
      graph: the groups.
      program: what ``fn`` does with whole arrays.
    """
    before = list(_numbers(program))
    like = jax.eval_shape(lambda tree: tree, params)

    def changed(groups: list[Group]) -> bool | None:
        verdicts = []
        for losses in _probes(groups):
            verdicts.append(with_less(losses))
            if verdicts[-1]:
                return True
        return False if False in verdicts else None

    def with_less(losses: Mapping[str, int]) -> bool | None:
        kept = {name: range(graph.groups[name].size - n) for name, n in losses.items()}
        small = jax.eval_shape(lambda tree: keep(graph, tree, kept), like)

        def fresh(params: Any, inputs: Any) -> Any:
            return fn(params, *inputs)

        try:
            after = flatten(jax.make_jaxpr(fresh)(small, inputs))
        except Exception:  # Whatever fn raises: it does not run with these sizes, and says so
            return None
        return list(_numbers(after)) != before

    def search(kinds: list[list[Group]]) -> set[str]:
        groups = [group for kind in kinds for group in kind]
        verdict = changed(groups) if groups else False
        if verdict is False:
            return set()
        if verdict is None and len(kinds) == 1:
            kinds = [[group] for group in groups]
        everything = {group.name for group in groups} if verdict else set()
        if len(kinds) == 1:
            return everything
        middle = len(kinds) // 2
        # If it takes several kinds at once, it may be any of them
        return search(kinds[:middle]) | search(kinds[middle:]) or everything

    kinds: dict[Any, list[Group]] = {}
    for group in graph.groups.values():
        if group.free and group.exact:
            places = tuple((s.axis, len(graph.shapes[s.path].shape)) for s in group.slices)
            kinds.setdefault((group.size, places), []).append(group)
    return search(list(kinds.values()))


def _probes(groups: list[Group]) -> Iterator[dict[str, int]]:
    """How many units groups lose.

    One each; half, where a size is divided or compared; and one in some groups only, such that of any
    two it is one alone in one of the cases: a ratio or a difference changes. One unit of three or more
    is never left alone: what takes no axis of one apart, such as a reshape, is another operation then.
    """
    yield {group.name: 1 for group in groups}
    yield {group.name: group.size - max(2, group.size // 2) or 1 for group in groups}
    for bit in range((len(groups) - 1).bit_length()):
        yield {group.name: 1 for i, group in enumerate(groups) if i >> bit & 1}


def _numbers(program: Program) -> Iterator[Any]:
    """The steps, their numbers, the values in their constants, and how much of these is summed."""
    fixed = set(program.constants)  # and what is computed of them alone

    def read(program: Program) -> Iterator[Any]:
        for step in program.steps:
            constants = [program.constants[n] for n in step.inputs if n in program.constants]
            # Of a convolution, how many groups of channels there are is a size
            options = {
                name: option for name, option in step.params.items()
                if isinstance(option, (int, float)) and not name.endswith("group_count")
            }  # fmt: skip
            summed = None
            if fixed.issuperset(step.inputs):
                fixed.update(step.outputs)
                if step.name.startswith(REDUCTIONS):  # a count is a sum of ones
                    summed = [program.avals[n].shape for n in step.inputs]
            yield step.name, options, [_values(c) for c in constants], summed
            for body in step.bodies:
                yield from read(body)

    return read(program)


def _values(constant: Any, most: int = 2**16) -> Any:
    """What two constants have in common that hold the same values, in arrays of whatever size."""
    if jax.dtypes.issubdtype(getattr(constant, "dtype", np.float32), jax.dtypes.extended):
        return None  # a random key
    array = np.asarray(constant)
    if array.size > most:
        return array.shape, hashlib.sha256(array.tobytes()).digest()
    return np.unique(array).tobytes()

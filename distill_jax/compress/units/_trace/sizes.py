"""Finds groups whose size enters the computation as a number, for example 1/√head_size.

In the program such numbers are constants. The same network with smaller arrays has other constants, and
then computes something else than the larger network with silenced units.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from distill_jax import _jaxpr
from distill_jax.compress.units._trace.program import Program, flatten
from distill_jax.compress.units.graph import Group, UnitGraph
from distill_jax.compress.units.removal import keep

REDUCTIONS = ("reduce_", "cum", "arg", "dot_general")


def groups_in_numbers(graph: UnitGraph) -> set[str]:
    """Finds the exact groups whose size enters the computation as a number, for example 1/√head_size.

    Traces the network again with fewer units in some groups (:func:`_probes`). Where that shows other
    numbers, or fails (some widths are written into the network's code), it tries half of the kinds of
    groups, and so on down to one. If the network does not even run with one group made smaller, that
    group is not reported: only its traced program can be made smaller.

    Args:
      graph: the groups, and what was traced.
    """
    traced = graph.traced
    before = list(_numbers(traced.program))

    def changed(groups: list[Group]) -> bool | None:
        verdicts = []
        for losses in _probes(groups):
            verdicts.append(with_less(losses))
            if verdicts[-1]:
                return True
        return False if False in verdicts else None

    def with_less(losses: Mapping[str, int]) -> bool | None:
        kept = {name: range(graph.groups[name].size - n) for name, n in losses.items()}
        small = jax.eval_shape(lambda model: keep(graph, model, kept), traced.model)
        try:
            closed, _ = _jaxpr.trace(lambda model, x: model(x), small, traced.x)
        except Exception:  # Whatever the network raises: it does not run with these sizes
            return None
        return list(_numbers(flatten(closed))) != before

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
    """Yields how many units each group shall lose, in several cases.

    In the first case each group loses one; in the second half, which shows where a size is divided or
    compared. In the others only some groups lose one, so that for any two groups there is a case in which
    exactly one of them does: then a ratio or a difference changes. Of three or more units at least two are
    left, because operations such as a reshape treat an axis of size one in another way.
    """
    yield {group.name: 1 for group in groups}
    yield {group.name: group.size - max(2, group.size // 2) or 1 for group in groups}
    for bit in range((len(groups) - 1).bit_length()):
        yield {group.name: 1 for i, group in enumerate(groups) if i >> bit & 1}


def _numbers(program: Program) -> Iterator[Any]:
    """Yields the steps, their numbers, the values in their constants, and how many of these are summed."""
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
    """Returns what is equal for two constants that hold the same values in arrays of any size."""
    if jax.dtypes.issubdtype(getattr(constant, "dtype", np.float32), jax.dtypes.extended):
        return None  # a random key
    array = np.asarray(constant)
    if array.size > most:
        return array.shape, hashlib.sha256(array.tobytes()).digest()
    return np.unique(array).tobytes()

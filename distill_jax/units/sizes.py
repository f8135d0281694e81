"""Which numbers in a program were computed from sizes: 1/√(head size), say.

In the program they are constants. The same function with smaller arrays has others there, and then
what it computes is not what the larger network with silenced units computes.
"""

import hashlib
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

    Traces ``fn`` again with fewer units in each group, as different numbers of them as can be, for a
    ratio of two groups stays what it is where both lose as many; where that shows other numbers, or
    fails (for some widths are written into ``fn``), in half of the kinds of groups, and so on down to
    one. A group with which alone ``fn`` does not run is none of them: only its program runs it.

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
        # Two groups of one size lose as many twice only if they are far apart in a long list
        found = {with_less(groups, digit) for digit in (np.mod, np.floor_divide)}
        return True if True in found else False if False in found else None

    def with_less(groups: list[Group], digit: Callable[[int, int], int]) -> bool | None:
        kept = {}
        for i, group in enumerate(groups):
            losses = max(1, group.size // 2)
            kept[group.name] = range(group.size - 1 - int(digit(i, losses)) % losses)
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


def _numbers(program: Program) -> Iterator[Any]:
    """The steps, their numbers, and the values that are in their constants."""
    for step in program.steps:
        constants = [program.constants[n] for n in step.inputs if n in program.constants]
        # Of a convolution, how many groups of channels there are is a size
        options = {
            name: option for name, option in step.params.items()
            if isinstance(option, (int, float)) and not name.endswith("group_count")
        }  # fmt: skip
        yield step.name, options, [_values(c) for c in constants]
        for body in step.bodies:
            yield from _numbers(body)


def _values(constant: Any, most: int = 2**16) -> Any:
    """What two constants have in common that hold the same values, in arrays of whatever size."""
    if jax.dtypes.issubdtype(getattr(constant, "dtype", np.float32), jax.dtypes.extended):
        return None  # a random key
    array = np.asarray(constant)
    if array.size > most:
        return array.shape, hashlib.sha256(array.tobytes()).digest()
    return np.unique(array).tobytes()

"""Compares the network run again with smaller arrays with its traced program adapted to them.

Code that reads a width from an array may do more with it than give an array that size: it may compute a
number (1/√head_size), or choose where a slice begins, a stride or a window. The program that it then runs
is another than the traced one with every size adapted, which computes what the silenced network computes.
"""

import dis
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from distill_jax import _jaxpr
from distill_jax.compress.units._trace.adapted import Adapted, cuts, shape_of, taken
from distill_jax.compress.units._trace.program import BODIES, OWN, Program, Step, flatten
from distill_jax.compress.units._trace.rules import Value
from distill_jax.compress.units.graph import Group, UnitGraph
from distill_jax.compress.units.masks import shapes_of

SAME, REFUSED = "same", "refused"
# Packages whose errors are those of operations, which may run by chance for other sizes
OPERATIONS = "jax", "jaxlib", "numpy", "opt_einsum", "einops"
PROGRAMS = core.Jaxpr, core.ClosedJaxpr
# Probes that are to run, of more that are tried: more in small programs, which are quickly traced
LEAST, MOST, TRIES, STEPS = 8, 16, 4, 800
CANNOT = "the network's own code does not run with fewer units"
NUMBER = "the network's own code computes a number from its size"
OTHER = "with fewer units the network's own code has"


class Outcome(NamedTuple):
    """What running the network again with fewer units showed.

    Attributes:
      ran: the groups that had lost units when it ran.
      checked: whether it did not run because its own code checks shapes, rather than by an operation's error.
      difference: in what it differs from the adapted program; else empty.
    """

    ran: frozenset[str]
    checked: bool
    difference: str


def reruns(graph: UnitGraph) -> dict[str, str]:
    """Says of each exact group what the network's own code does with fewer units.

    The network is traced again with fewer units in all groups, in several random ways (:func:`_probes`).
    Where a program differs from the adapted one, or the network does not run, it tries half of the kinds of
    groups, and so on down to one kind: groups of one size whose arrays are used by the same lines of code. So
    the number of traces does not depend on how often a network repeats its blocks.

    Args:
      graph: the groups, and what was traced.

    Returns:
      Group → ``SAME``, if it runs the adapted program; ``REFUSED``, if it checks the shapes of arrays and
      refuses smaller ones; else a reason why only the adapted program can do without units of the group.
    """
    groups = [group for group in graph.groups.values() if group.free and group.exact]
    lines = _lines(graph)
    found: dict[str, str] = {}
    outcomes: dict[Any, Outcome] = {}
    enough = min(max(LEAST, STEPS // max(1, len(graph.traced.program.steps))), MOST)

    def probe(kinds: Sequence[Sequence[Group]], most: int = TRIES * enough) -> Outcome:
        ran: frozenset[str] = frozenset()
        checked, runs = True, 0
        for i, kept in zip(range(most), _probes(kinds), strict=False):
            key = tuple((name, len(units), units.tobytes()) for name, units in kept.items())
            if key not in outcomes:
                outcomes[key] = _run(graph, kept)
            outcome = outcomes[key]
            if outcome.difference:
                return outcome
            ran |= outcome.ran
            runs += bool(outcome.ran)
            checked &= outcome.checked
            if runs >= enough or (not runs and (i >= enough or (checked and i >= _planned(kinds)))):
                break
        return Outcome(ran, checked and not ran, "")

    def note(kind: Sequence[Group], verdict: str) -> None:
        found.update((group.name, verdict) for group in kind)

    def search(kinds: list[list[Group]]) -> None:
        if not kinds:
            return
        outcome = probe(kinds)
        seen = [kind for kind in kinds if all(group.name in outcome.ran for group in kind)]
        if seen and not outcome.difference:
            for kind in seen:
                note(kind, SAME)
            search([kind for kind in kinds if kind not in seen])
        elif len(kinds) > 1:
            middle = len(kinds) // 2
            search(kinds[:middle])
            search(kinds[middle:])
            if outcome.difference and all(found[g.name] == SAME for kind in kinds for g in kind):
                for kind in kinds:  # it takes several kinds at once
                    note(kind, outcome.difference)
        elif outcome.difference:
            note(kinds[0], outcome.difference)
        elif outcome.ran:
            note(kinds[0], SAME)
        elif len(kinds[0]) == 1 or not probe([kinds[0][-1:]]).ran:
            note(kinds[0], REFUSED if outcome.checked else CANNOT)
        else:
            search([[group] for group in kinds[0]])

    def alike(group: Group) -> Any:
        """What is equal for groups that the same code treats alike."""
        lie = frozenset((s.axis, len(s.index), int((np.diff(s.index) != 0).sum())) for s in group.slices)
        return group.size, lie, lines[group.name]

    open_ = _by(groups, alike)
    if groups and not probe(open_, 1).ran:
        # Code with widths written into it refuses all the groups that it makes
        for kind in _by(groups, lambda group: lines[group.name]):
            first, last = kind[:1], kind[-1:]
            if probe([first], _planned([first]) + 1).checked and (len(kind) == 1 or probe([last], 1).checked):
                note(kind, REFUSED)
        open_ = _by([group for group in groups if group.name not in found], alike)
    search(open_)
    return found


def _by(groups: Sequence[Group], key: Any) -> list[list[Group]]:
    kinds: dict[Any, list[Group]] = {}
    for group in groups:
        kinds.setdefault(key(group), []).append(group)
    return list(kinds.values())


def _lines(graph: UnitGraph) -> dict[str, Any]:
    """Says for each group which lines of code first use its arrays, and where they lie in these."""
    program = graph.traced.program
    first: dict[int, Any] = {}
    for step in program.steps:
        for place, number in enumerate(step.inputs):
            first.setdefault(number, (step.name, place, step.source))
    uses = {path: first.get(n) for path, n in zip(graph.shapes, program.inputs, strict=False)}
    known: dict[int, Any] = {}

    def line(source: Any) -> Any:
        if id(source) not in known:
            known[id(source)] = tuple(
                (frame.file_name, frame.function_name, frame.line_num)
                for traceback in source for frame in traceback.frames
            )  # fmt: skip
        return known[id(source)]

    def where(path: str) -> Any:
        use = uses[path]
        return path if use is None or None in use[2] else (*use[:2], line(use[2]))

    return {
        name: frozenset((where(s.path), s.axis, len(graph.shapes[s.path].shape)) for s in group.slices)
        for name, group in graph.groups.items()
    }


def _probes(kinds: Sequence[Sequence[Group]]) -> Iterator[dict[str, np.ndarray]]:
    """Yields units to keep, in several ways.

    First each group loses its last unit; then a random half of its units; then all but one; then all but a third,
    a fifth and so on of them, for code that checks that a size is divisible. Then come random numbers of random
    units: at first the same number in all groups of a kind, so that inner functions need not be traced for each,
    later another in each group.
    """
    rng = np.random.default_rng(0)

    def some(group: Group, left: int) -> np.ndarray:
        return np.sort(rng.choice(group.size, max(1, left), replace=False))

    def number(group: Group) -> int:
        return int(rng.choice([group.size, group.size - 1, *rng.integers(1, group.size + 1, 2)]))

    groups = [group for kind in kinds for group in kind]
    yield {group.name: np.arange(max(1, group.size - 1)) for group in groups}
    yield {group.name: some(group, -(-group.size // 2)) for group in groups}
    yield {group.name: some(group, 1) for group in groups}
    for p in _odd_primes(groups):
        yield {g.name: some(g, g.size // p) for g in groups if g.size % p == 0}
    for i in count(0):
        first = [number(kind[0]) for kind in kinds for _ in kind]
        counts = first if i < 2 else [number(group) for group in groups]
        yield {g.name: some(g, n) for g, n in zip(groups, counts, strict=True) if n < g.size}


def _planned(kinds: Sequence[Sequence[Group]]) -> int:
    """Counts the probes before those with random numbers of units."""
    return 3 + len(_odd_primes([group for kind in kinds for group in kind]))


def _odd_primes(groups: Sequence[Group]) -> list[int]:
    """Lists the odd primes that divide sizes of groups. Every divisor of a size n divides n/2 or one of n/p."""
    sizes = {group.size for group in groups}
    odd = range(3, max(sizes) // 2 + 1, 2)
    return [
        p for p in odd if any(n % p == 0 for n in sizes) and all(p % d for d in range(3, int(p**0.5) + 1, 2))
    ]


def _run(graph: UnitGraph, kept: Mapping[str, np.ndarray]) -> Outcome:
    """Traces the network with the arrays of the kept units, and compares."""
    traced = graph.traced
    arrays = jax.tree.unflatten(
        jax.tree.structure((traced.model.params, traced.model.state)), [*shapes_of(graph, kept).values()]
    )
    checked = False

    def run(params: Any, state: Any, x: Any) -> Any:
        nonlocal checked
        try:
            return traced.model.replace(params=params, state=state)(x)
        except Exception as error:  # here its traceback is whole
            checked = _is_check(error)
            raise

    try:
        closed, results = _jaxpr.trace(run, *arrays, traced.x)
    except Exception:  # Whatever the network raises: it does not run with these sizes
        return Outcome(frozenset(), checked, "")
    lost = frozenset(name for name, indices in kept.items() if len(indices) < graph.groups[name].size)
    if jax.tree.structure(results) != traced.structure:
        return Outcome(lost, False, f"{OTHER} results in another structure")
    return Outcome(lost, False, difference(Adapted.of(traced, kept), flatten(closed)))


def _is_check(error: Exception) -> bool:
    """Says whether a statement of the network raised an error, such as a module's check of shapes."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    code = place.tb_frame.f_code
    raised = dis.opname[code.co_code[place.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")
    return raised and not any(f"{os.sep}{name}{os.sep}" in code.co_filename for name in OPERATIONS)


def difference(small: Adapted, again: Program, *, draws: bool = False) -> str:
    """Says in what a program differs from an adapted one; the empty string if it is the same.

    Args:
      small: the traced program, adapted to the units that are left.
      again: the program of the network traced again with the smaller arrays.
      draws: whether it may draw random numbers of the smaller sizes, which are others than those that the
        kept units have in the whole network.
    """
    numbers: dict[int, int] = {}
    same: tuple[dict[int, int], dict[int, int]] = {}, {}  # results of idle steps → their operands
    constants = small.program.constants

    def root(number: int, idle: dict[int, int]) -> int:
        return root(idle[number], idle) if number in idle else number

    def shape(value: Value) -> Any:
        return None if any(value.repeats) else shape_of(small.stays(value))

    def busy(steps: Sequence[Step], *, old: bool) -> Iterator[Step]:
        """Leaves out what does nothing with the new sizes, which code writes for some sizes alone."""
        for step in steps:
            idle = step.name in ("reshape", "slice")
            if idle and old:
                operand = small.tracer.operand(step, 0, small.program)
                idle = shape(operand) is not None and shape(operand) == shape(small.value(step.outputs[0]))
            elif idle:
                idle = again.avals[step.inputs[0]].shape == again.avals[step.outputs[0]].shape
            if idle and step.inputs[0] not in (constants if old else again.constants):
                same[not old][step.outputs[0]] = step.inputs[0]
            else:
                yield step

    def other_value(
        where: str,
        old: int,
        new: int,
        masks: Sequence[np.ndarray],
        any_size: Sequence[bool] = (),
        term: Any = lambda a: a,
    ) -> str:
        given, wanted = again.avals[new].shape, shape_of(masks)
        free = any_size or [False] * len(wanted)
        if len(given) != len(wanted) or any(
            a != b and not f for a, b, f in zip(given, wanted, free, strict=True)
        ):
            return f"{OTHER} other shapes in {where}"
        if (old in constants) != (new in again.constants):
            return NUMBER
        if old not in constants:
            found = numbers.get(root(old, same[0]))
            return "" if found == root(new, same[1]) else f"{OTHER} another order of operations"
        a, b = term(constants[old]), again.constants[new]
        return "" if _same_array(a, b, masks, any_size) else NUMBER

    def other_step(old: Step, new: Step) -> str:
        results = [small.value(number) for number in old.outputs]
        repeats = any(any(result.repeats) for result in results)
        for i, (a, b) in enumerate(zip(old.inputs, new.inputs, strict=True)):
            operand = small.tracer.operand(old, i, small.program)
            any_size = operand.repeats if repeats else ()
            term = partial(small.count, old, i)
            if reason := other_value(old.name, a, b, small.stays(operand), any_size, term):
                return reason
        numbers.update(zip(old.outputs, new.outputs, strict=True))
        if option := other_option(old, new, results[0].repeats if results else ()):
            return f"{OTHER} another {option} in {old.name}"
        for body, again_body in zip(old.bodies, new.bodies, strict=True):
            if reason := other_program(body, again_body):
                return reason
        return ""

    def other_option(old: Step, new: Step, any_size: Sequence[bool]) -> str:
        expected = small.options(old)
        apart = {*IN_SHAPES.get(old.name, ()), *BODIES.get(old.name, ())}
        if draws and old.name in ("random_bits", "rng_bit_generator"):
            apart.add("shape")
        if old.name == "relu" or old.name in OWN:
            return ""
        if old.name == "slice":
            apart |= {"start_indices", "limit_indices", "strides"}
            for a, mask in enumerate(small.operand(old, 0)):
                index = taken(mask, cuts(old)[a])
                if any_size[a : a + 1] != (True,) and not np.array_equal(np.arange(*cuts(new)[a]), index):
                    return "cut"
        if any(isinstance(option, PROGRAMS) for option in new.params.values()):
            # The function that such a program was traced from is another object each time
            apart |= {
                n for n, option in new.params.items() if callable(option) and not isinstance(option, PROGRAMS)
            }
        names = (expected.keys() | new.params.keys()) - apart
        return next((n for n in sorted(names) if not _same(expected.get(n), new.params.get(n))), "")

    def other_program(old: Program, new: Program) -> str:
        olds, news = [*busy(old.steps, old=True)], [*busy(new.steps, old=False)]
        if [*map(_form, olds)] != [*map(_form, news)]:
            return f"{OTHER} other operations"
        numbers.update(zip(old.inputs, new.inputs, strict=True))
        for a, b in zip(olds, news, strict=True):
            if reason := other_step(a, b):
                return reason
        for i, (result, given) in enumerate(zip(old.outputs, new.outputs, strict=True)):
            masks = small.stays(small.tracer.result(old, i))
            if reason := other_value("its results", result, given, masks):
                return reason
        return ""

    return other_program(small.program, again)


# Options that are the shape of a result, which is compared itself
IN_SHAPES = {
    "broadcast_in_dim": ("shape",), "iota": ("shape",), "reshape": ("new_sizes",),
    "dynamic_slice": ("slice_sizes",), "split": ("sizes",),
}  # fmt: skip


def _form(step: Step) -> tuple[str, int, int]:
    """Says which operation a step is, and how many operands and results it has."""
    return step.name, len(step.inputs), len(step.outputs)


def _same_array(a: Any, b: Any, masks: Sequence[np.ndarray], any_size: Sequence[bool]) -> bool:
    """Compares a constant, cut to the positions that stay, with one of that shape; one index where it repeats."""
    if a is b and all(mask.all() for mask in masks):
        return True
    if jax.dtypes.issubdtype(getattr(a, "dtype", np.float32), jax.dtypes.extended):
        a, b, masks, any_size = jax.random.key_data(a), jax.random.key_data(b), (), ()
    a, b = np.asarray(a), np.asarray(b)
    for axis, mask in enumerate(masks):
        if any_size[axis : axis + 1] == (True,):
            a, b = a.take([0], axis), b.take([0], axis)
        elif not mask.all():
            a = a.take(np.flatnonzero(mask), axis)
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _same(a: Any, b: Any) -> bool:
    """Compares an option of two operations."""
    if isinstance(a, PROGRAMS):  # arrays that it uses are operands; JAX allows none among options
        return str(a) == str(b)
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b or (a != a and b != b))  # NaN, with which a gather fills what is out of bounds

"""Tells where a group's units come from and where they go, which merging and looking at them needs.

A unit is made of its *incoming* slices, and used by contractions with its *outgoing* slices. If two units
have equal incoming slices, one of them with the sum of both outgoing slices does the work of both. This
holds if every sum over the units is a contraction of their values with a parameter as it is, if no slice
is both incoming and outgoing, and if the program treats all units alike. Otherwise the group has a reason
why its units cannot be merged.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from distill_jax import _jaxpr
from distill_jax.compress.units._trace.layout_rules import segments
from distill_jax.compress.units._trace.program import Program, Step
from distill_jax.compress.units._trace.rules import Value
from distill_jax.compress.units._trace.sum_rules import REDUCTIONS, contractions
from distill_jax.compress.units.graph import Slice, UnitGraph


class Role(NamedTuple):
    """What the slices of a group are for.

    Attributes:
      incoming: slices of which a unit's value is made.
      outgoing: slices by which its value is multiplied where it is used.
      uses: the values contracted with the outgoing slices: number, axis, and the unit of each position.
      reason: why this cannot be told, or does not suffice to merge units; else empty.
    """

    incoming: tuple[Slice, ...]
    outgoing: tuple[Slice, ...]
    uses: tuple[tuple[int, int, np.ndarray], ...]
    reason: str


# Steps whose result holds a parameter's numbers as they are
COPIES = {
    "convert_element_type", "copy", "stop_gradient", "slice", "split", "reduce_precision",
    "sharding_constraint", "layout_constraint", "reshard", "pvary",
}  # fmt: skip
# Over or along an axis: sums and orders that are no contraction
ALONG = {
    "cumsum": "axis", "cumlogsumexp": "axis", "cummax": "axis", "cummin": "axis", "cumprod": "axis",
    "sort": "dimension", "top_k": "axis",
}  # fmt: skip
DRAWS = "random_bits", "rng_bit_generator"
View = tuple[str, tuple[frozenset[int], ...]]  # a leaf's path, and its axes in each of the value's


def roles(graph: UnitGraph, *, alike: bool = True) -> dict[str, Role]:
    """Tells incoming from outgoing slices in every free group.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      alike: whether there is a reason against units that the program treats differently from each other.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> role = roles(graph)["a"]
    >>> [s.path for s in role.incoming], [s.path for s in role.outgoing], role.reason
    (['a'], ['b'], '')
    """
    reader = _Reader(graph)
    program = graph.traced.program
    for path, number in zip(graph.shapes, program.inputs, strict=False):
        axes = range(len(graph.shapes[path].shape))
        reader.views[number] = path, tuple(frozenset([a]) for a in axes)
    reader.walk(program)
    found = {}
    for name, group in graph.groups.items():
        if not group.free:
            continue
        out, into = reader.outgoing.get(name, set()), reader.incoming.get(name, set())
        outgoing = tuple(s for s in group.slices if s[:2] in out)
        incoming = tuple(s for s in group.slices if s[:2] not in out)
        reason = reader.reasons.get(name, "")
        if not reason and out & into:
            path, axis = min(out & into)
            reason = f"{path}, axis {axis}, is incoming and outgoing at once"
        if not reason and not (outgoing and incoming):
            reason = f"it has no {'incoming' if outgoing else 'outgoing'} slice"
        found[name] = Role(incoming, outgoing, tuple(reader.uses.get(name, ())), reason)
    for name, reason in reader.asymmetric() if alike else ():
        found[name] = found[name]._replace(reason=found[name].reason or reason)
    return found


def positions(index: np.ndarray, size: int) -> np.ndarray | None:
    """Says where each unit lies, ``[size, places per unit]``; None if not all have as many places.

    Args:
      index: the index of a :class:`~distill_jax.compress.units.Slice`.
      size: the number of units.
    """
    order = np.argsort(index, kind="stable")
    order = order[(index < 0).sum() :]
    counts = np.bincount(index[index >= 0], minlength=size)
    return order.reshape(size, -1) if counts.min() == counts.max() else None


class _Reader:
    """Goes through the program, and notes how each group's units are used."""

    def __init__(self, graph: UnitGraph):
        traced = graph.traced
        self.program: Program = traced.program
        self.tracer = traced.tracer
        self.names = [name for name, group in graph.groups.items() if group.free]
        self.sizes = [graph.groups[name].size for name in self.names]
        self.places = {name: {s[:2] for s in graph.groups[name].slices} for name in self.names}
        # One longer: NONE reads the last
        self.group_of = np.full(self.tracer.labels.count + 1, -1)
        self.member = np.full(self.tracer.labels.count + 1, -1)
        for i, name in enumerate(self.names):
            self.group_of[traced.units[name]] = i
            self.member[traced.units[name]] = np.arange(self.sizes[i])
        self.known: dict[int, dict[str, np.ndarray]] = {}
        self.views: dict[int, View] = {}
        self.outgoing: dict[str, set[tuple[str, int]]] = {}
        self.incoming: dict[str, set[tuple[str, int]]] = {}
        self.uses: dict[str, list[tuple[int, int, np.ndarray]]] = {}
        self.reasons: dict[str, str] = {}

    def on(self, value: Value, axis: int) -> dict[str, np.ndarray]:
        """Finds the groups that have units on an axis of a value, and the unit of each position."""
        key = id(value.units[axis])
        if key not in self.known:
            nodes = self.tracer.meaning(value.units[axis])
            groups, members = self.group_of[nodes], self.member[nodes]
            found = {}
            for i in np.unique(groups[groups >= 0]).tolist():
                here = groups == i
                if (here.sum(0) > 1).any():
                    self.refuse(self.names[i], "one position has two of its units")
                found[self.names[i]] = np.where(here, members, -1).max(0)
            self.known[key] = found
        return self.known[key]

    def refuse(self, name: str, reason: str) -> None:
        self.reasons.setdefault(name, reason)

    def walk(self, program: Program) -> None:
        for step in program.steps:
            if step.bodies:
                self.enter(step)
            else:
                self.visit(step)

    def enter(self, step: Step) -> None:
        """Enters a loop or a choice; operands that stay the same there are views there, too."""
        fixed: dict[int, View] = {}
        options = step.params
        if step.name == "scan":
            consts, carries = _jaxpr.scan_sizes(options)
            same = [(0, 0, consts)]
        elif step.name == "while":
            first = options["cond_nconsts"]
            same = [(0, 0, first), (1, first, options["body_nconsts"])]
        elif step.name == "cond":
            same = [(i, 1, len(step.inputs) - 1) for i in range(len(step.bodies))]
        else:
            same = [(0, 0, len(step.inputs))]
        for body, start, count in same:
            outer = step.inputs[start : start + count]
            for number, inner in zip(outer, step.bodies[body].inputs, strict=False):
                if number in self.views:
                    self.views[inner] = fixed[number] = self.views[number]
        if step.name == "scan":
            first = consts + carries
            for number, inner in zip(step.inputs[first:], step.bodies[0].inputs[first:], strict=True):
                if number in self.views:
                    path, axes = fixed[number] = self.views[number]
                    self.views[inner] = path, axes[1:]
        for i, number in enumerate(step.inputs):
            if number in self.views and number not in fixed:
                for a in range(len(self.views[number][1])):
                    self.enters(step, i, a, set())
        for inner_program in step.bodies:
            self.walk(inner_program)

    def visit(self, step: Step) -> None:
        contracted: dict[tuple[int, int], set[str]] = {}
        for pair in contractions(step):
            summed = set(self.on(self.operand(step, pair[1][0]), pair[1][1]))
            for name in summed:
                self.contract(name, step, pair)
            for side in pair:
                contracted[side] = summed
        over: Sequence[int] = step.params["axes"] if step.name in REDUCTIONS.split() else ()
        if step.name in ALONG:
            over = [step.params.get(ALONG[step.name], -1)]
        for i in range(len(step.inputs)) if over else ():
            operand = self.operand(step, i)
            for a in over:
                for name in self.on(operand, a % len(operand.shape)):
                    self.refuse(name, f"{step.name} over it")
        for output in step.outputs if step.name in DRAWS else ():
            for a in range(len(self.tracer.avals[output].shape)):
                for name in self.on(self.tracer.read(output, self.program), a):
                    self.refuse(name, f"{step.name} gives each of its units other numbers")
        number = step.inputs[0] if step.inputs else -1
        axes = self.same(step) if number in self.views else None
        if axes is not None:
            for output in step.outputs:
                self.views[output] = self.views[number][0], axes
            return
        for i, number in enumerate(step.inputs):
            for a in range(len(self.views[number][1]) if number in self.views else 0):
                self.enters(step, i, a, contracted.get((i, a), set()))

    def same(self, step: Step) -> tuple[frozenset[int], ...] | None:
        """Returns the leaf's axes in each axis of a result that holds the leaf's numbers as they are."""
        _, axes = self.views[step.inputs[0]]
        none: frozenset[int] = frozenset()
        if step.name in COPIES:
            return axes
        if step.name == "transpose":
            return tuple(axes[a] for a in step.params["permutation"])
        if step.name == "squeeze":
            gone = [a % len(axes) for a in step.params["dimensions"]]
            return tuple(axis for a, axis in enumerate(axes) if a not in gone)
        if step.name == "broadcast_in_dim":
            source = {a: i for i, a in enumerate(step.params["broadcast_dimensions"])}
            shape = step.params["shape"]
            return tuple(axes[source[a]] if a in source else none for a in range(len(shape)))
        if step.name == "reshape":
            old = self.tracer.avals[step.inputs[0]].shape
            found: list[frozenset[int]] = []
            for ins, outs in segments(old, tuple(step.params["new_sizes"])):
                found += [none.union(*(axes[a] for a in ins))] * len(outs)
            return tuple(found)
        return None

    def leaf_axes(self, name: str, number: int, axis: int) -> set[tuple[str, int]]:
        """Finds the slices of a group that an axis of a value is a view of."""
        if number not in self.views:
            return set()
        path, axes = self.views[number]
        return {(path, a) for a in axes[axis]} & self.places[name]

    def operand(self, step: Step, place: int) -> Value:
        return self.tracer.operand(step, place, self.program)

    def contract(self, name: str, step: Step, sides: Sequence[tuple[int, int]]) -> None:
        leaves = [self.leaf_axes(name, step.inputs[i], a) for i, a in sides]
        if all(leaves) or not any(leaves):
            self.refuse(name, f"{step.name} of {'two parameters' if all(leaves) else 'two values'}")
        else:
            self.outgoing.setdefault(name, set()).update(*leaves)
        for (i, a), leaf in zip(sides, leaves, strict=True):
            if not leaf:
                index = self.on(self.operand(step, i), a)[name]
                self.uses.setdefault(name, []).append((step.inputs[i], a, index))

    def enters(self, step: Step, place: int, axis: int, but: set[str]) -> None:
        """Notes that a parameter's axis becomes units of a value, in all groups except ``but``."""
        for name in self.on(self.operand(step, place), axis).keys() - but:
            self.incoming.setdefault(name, set()).update(self.leaf_axes(name, step.inputs[place], axis))

    def asymmetric(self) -> Iterator[tuple[str, str]]:
        """Yields the groups whose units the program may treat differently from each other.

        It treats them alike if all units lie wherever some do, one after another at equal distances, and
        if each piece cut out of an axis holds the same places of all units.
        """
        for value in self.tracer.values.values():
            for a in range(len(value.shape)):
                for name, index in self.on(value, a).items():
                    places = positions(index, self.sizes[self.names.index(name)])
                    steps = np.diff(places, axis=0) if places is not None else np.array([[-1]])
                    if (steps != steps[:1]).any() or (steps < 1).any():
                        yield name, "its units do not all lie in the same order everywhere"
        for step in _steps(self.program):
            if step.name not in ("slice", "split"):
                continue
            operand = self.operand(step, 0)
            shape = operand.shape
            for a in range(len(shape)):
                for name, index in self.on(operand, a).items():
                    places = positions(index, self.sizes[self.names.index(name)])
                    for cut in _cuts(step, a):
                        inside = np.zeros(shape[a], bool)
                        inside[cut] = True
                        if places is None or (inside[places] != inside[places][:1]).any():
                            yield name, f"{step.name} cuts some of its units from the others"


def _steps(program: Program) -> Iterator[Step]:
    for step in program.steps:
        yield step
        for body in step.bodies:
            yield from _steps(body)


def _cuts(step: Step, axis: int) -> list[slice]:
    """Lists the pieces that a step cuts out of an axis."""
    if step.name == "slice":
        strides = step.params["strides"] or (1,) * (axis + 1)
        bounds = step.params["start_indices"][axis], step.params["limit_indices"][axis]
        return [slice(*bounds, strides[axis])]
    if axis != step.params["axis"]:
        return []
    ends = np.cumsum(step.params["sizes"]).tolist()
    return [slice(end - n, end) for end, n in zip(ends, step.params["sizes"], strict=True)]

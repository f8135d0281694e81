"""Finds the residual branches of a program and the layers of a scan, takes them out, and runs what is left."""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from distill_jax import _jaxpr
from distill_jax.compress.units._trace.program import Program, Step, bind, evaluate

REMAT = "remat2", "checkpoint"
SAME = "convert_element_type", "copy", "copy_p", "name"  # the same numbers, in arrays of any shape
VIEWS = *SAME, "reshape", "transpose", "squeeze", "broadcast_in_dim", "sharding_constraint"


class Branch(NamedTuple):
    """The branch f(x) of a residual sum x + f(x), or one of the layers that a scan goes through.

    Attributes:
      key: the number of the sum, or of the first result of the scan.
      stays: the number of x; of a layer, which of the scan's carried values it changes.
      row: which layer of the scan it is; None for a branch of a sum.
      layers: the number of layers of the scan.
      inputs: the inputs of the program that are needed for it alone; of a layer, those that lose a row.
    """

    key: int
    stays: int
    row: int | None
    layers: int
    inputs: tuple[int, ...]


class _Node(NamedTuple):
    """A step, or a passage into or out of a rematerialised call: operands and results by their numbers."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    step: Step | None = None


def _nodes(program: Program) -> list[_Node]:
    """Lists the steps, those of rematerialised calls among them."""
    found: list[_Node] = []
    for step in program.steps:
        if step.name not in REMAT:
            found.append(_Node(step.name, step.inputs, step.outputs, step))
            continue
        (body,) = step.bodies
        found += [_Node("copy", (a,), (b,)) for a, b in zip(step.inputs, body.inputs, strict=True)]
        found += _nodes(body)
        found += [_Node("copy", (a,), (b,)) for a, b in zip(body.outputs, step.outputs, strict=True)]
    return found


def _needed(nodes: Sequence[_Node], ends: Collection[int], gone: Mapping[int, int]) -> set[int]:
    """Returns the values on which the ends depend, where some sums are nothing but one of their operands."""
    needed = set(ends)
    for node in reversed(nodes):
        if not needed.isdisjoint(node.outputs):
            total = node.outputs[0]
            needed.update([gone[total]] if total in gone else node.inputs)
    return needed


class _Reader:
    """Finds the residual sums among the nodes of a program.

    Args:
      nodes: the nodes in their order.
      avals: shape and dtype of each value.
      ends: the values that count.
      parameters: the inputs of which a branch needs one that nothing else needs. (Without one it is no branch, but
        the x + x³ of GELU, or the sum in the logarithm of a sum of exponentials.)
    """

    def __init__(
        self, nodes: Sequence[_Node], avals: Sequence[Any], ends: Sequence[int], parameters: set[int]
    ):
        self.nodes, self.avals, self.ends, self.parameters = nodes, avals, ends, parameters
        self.made = {number: (i, node) for i, node in enumerate(nodes) for number in node.outputs}
        self.needed = _needed(nodes, ends, {})
        self.gone: dict[int, int] = {}  # residual sum → the operand that stays
        self.found: dict[int, Branch] = {}
        for node in nodes:
            if node.name in ("add", "add_any") and node.outputs[0] in self.needed:
                self._read_sum(node)

    def _read_sum(self, node: _Node) -> None:
        (total,) = node.outputs
        for stays, branch in (node.inputs, node.inputs[::-1]):
            stream = self._stream(stays)
            if stream.isdisjoint(self._stream(branch)) and self._depends(branch, stream):
                needed = _needed(self.nodes, self.ends, {total: stays})
                if alone := self.parameters & (self.needed - needed):
                    self.gone[total] = stays
                    self.found[total] = Branch(total, stays, None, 0, tuple(sorted(alone)))
                    return

    def _stream(self, number: int) -> set[int]:
        """Returns the values that a value is a view of, or the sum of with residual branches."""
        found = {number}
        while (before := self._before(number, VIEWS)) is not None:
            number = before
            found.add(number)
        return found

    def _before(self, number: int, views: Collection[str]) -> int | None:
        if number in self.gone:
            return self.gone[number]
        node = self.made[number][1] if number in self.made else None
        return node.inputs[0] if node is not None and node.name in views else None

    def _depends(self, number: int, stream: set[int]) -> bool:
        """Says whether a value is computed from one of a stream."""
        first, seen, left = min(map(self._time, stream)), {number}, [number]
        while left:
            number = left.pop()
            if number in stream:
                return True
            if self._time(number) > first:
                new = set(self.made[number][1].inputs) - seen
                seen |= new
                left += new
        return False

    def _time(self, number: int) -> int:
        return self.made[number][0] if number in self.made else -1

    def is_kept(self, end: int, start: int) -> bool:
        """Says whether a value is exactly another one where all residual branches are zero."""
        dtype, wide = self.avals[start].dtype, True
        while end != start and (before := self._before(end, SAME)) is not None:
            end = before
            wide &= jnp.promote_types(dtype, self.avals[end].dtype) == self.avals[end].dtype
        return end == start and wide

    def layers(self, node: _Node, uses: Counter[int]) -> list[Branch]:
        """Lists the layers of a scan, if each adds residual branches to what is carried, and does no more."""
        step: Any = node.step
        first, carried = _jaxpr.scan_sizes(step.params)
        last = first + carried
        (body,) = step.bodies
        ends, start = body.outputs[: last - first], body.inputs[first:last]
        if not self.needed.isdisjoint(step.outputs[last - first :]):
            return []
        inner = _Reader(_nodes(body), self.avals, ends, set(body.inputs[last:]))
        if not inner.gone or not all(map(inner.is_kept, ends, start)):
            return []
        rows = [self._whole_input(number, uses) for number in step.inputs[last:]]
        inputs = tuple(sorted(number for number in rows if number is not None))
        if self.parameters.isdisjoint(inputs):
            return []
        changed = next(i for i, (a, b) in enumerate(zip(ends, start, strict=True)) if a != b)
        length = step.params["length"]
        return [Branch(step.outputs[0], changed, row, length, inputs) for row in range(length)]

    def _whole_input(self, number: int, uses: Counter[int]) -> int | None:
        """Follows a value back to an input that is used for nothing else."""
        while uses[number] == 1:
            if number not in self.made:
                return number
            node = self.made[number][1]
            if node.name not in SAME:
                break
            number = node.inputs[0]
        return None


def find(program: Program, names: Sequence[str], count: int) -> dict[str, Branch]:
    """Finds the residual branches of a program, and the layers of its scans.

    Args:
      program: the steps, with calls that define derivatives as steps.
      names: the names of the parameters, which are the first inputs.
      count: the number of the first outputs that count. Others, such as a new state, do not.

    Returns:
      Branches by name, in the order in which they end.
    """
    nodes = _nodes(program)
    reader = _Reader(nodes, program.avals, program.outputs[:count], set(program.inputs[: len(names)]))
    uses = Counter([*program.outputs, *(number for node in nodes for number in node.inputs)])
    first: dict[int, int] = {}  # parameter → when it is first used
    found: list[Branch] = []
    for i, node in enumerate(nodes):
        for number in node.inputs:
            first.setdefault(number, i)
        if node.outputs and node.outputs[0] in reader.found:
            found.append(reader.found[node.outputs[0]])
        elif node.name == "scan" and not reader.needed.isdisjoint(node.outputs):
            found += reader.layers(node, uses)
    return _named(found, program, names, first)


def _named(
    found: Sequence[Branch], program: Program, names: Sequence[str], first: Mapping[int, int]
) -> dict[str, Branch]:
    """Names each branch by what the paths of its kernels have in common, or by its first kernel."""
    shared, kernels = [], []
    for branch in found:
        numbers = sorted((n for n in branch.inputs if n < len(names)), key=lambda n: (first[n], n))
        axes = {n: len(program.avals[n].shape) for n in numbers}
        least = min(2 if branch.row is None else 3, max(axes.values()))
        paths = [names[n] for n in numbers if axes[n] >= least]
        shared.append((_common([path.split(".")[:-1] for path in paths]), branch.row))
        kernels.append(paths[0])
    often, named = Counter(shared), {}
    for branch, (path, row), kernel in zip(found, shared, kernels, strict=True):
        base = path if path and often[path, row] == 1 else kernel
        base += "" if row is None else f"[{row}]"
        name = next(n for i in itertools.count() if (n := f"{base}#{i}" if i else base) not in named)
        named[name] = branch
    return named


def _common(paths: Sequence[Sequence[str]]) -> str:
    """Returns the beginning that paths have in common."""
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same)


def rows_left(branches: Iterable[Branch]) -> dict[int, np.ndarray]:
    """Says for each scan that loses layers which are left, as bool ``[layers]``."""
    rows: dict[int, np.ndarray] = {}
    for branch in branches:
        if branch.row is not None:
            rows.setdefault(branch.key, np.ones(branch.layers, bool))[branch.row] = False
    return rows


def take_out(program: Program, branches: Collection[Branch], ends: Sequence[int]) -> Program:
    """Takes branches out of a program, and all that is then not needed.

    Args:
      program: the steps.
      branches: what goes, found in this program.
      ends: the outputs of the program that stay.

    Returns:
      A program with the same inputs, some of which are not used.
    """
    gone = {branch.key: branch.stays for branch in branches if branch.row is None}
    rows = rows_left(branches)
    needed = _needed(_nodes(program), ends, gone)

    def now(number: int) -> int:
        return now(gone[number]) if number in gone else number

    def edit(program: Program, inputs: Sequence[int], ends: Sequence[int]) -> Program:
        steps = []
        for step in program.steps:
            if needed.isdisjoint(step.outputs) or step.outputs[0] in gone:
                continue
            step = step._replace(inputs=tuple(map(now, step.inputs)))
            if step.name in REMAT:
                (body,) = step.bodies
                goes_in = [i for i, number in enumerate(body.inputs) if number in needed]
                comes_out = [i for i, number in enumerate(step.outputs) if number in needed]
                step = step._replace(
                    inputs=tuple(step.inputs[i] for i in goes_in),
                    outputs=tuple(step.outputs[i] for i in comes_out),
                    bodies=(
                        edit(body, [body.inputs[i] for i in goes_in], [body.outputs[i] for i in comes_out]),
                    ),
                )
            elif step.outputs[0] in rows:
                step = step._replace(params={**step.params, "length": int(rows[step.outputs[0]].sum())})
            steps.append(step)
        return Program([*inputs], [now(number) for number in ends], steps, program.avals, program.constants)

    return edit(program, program.inputs, ends)


def used(program: Program) -> set[int]:
    """Returns the values that the outputs of a program need."""
    return _needed(_nodes(program), program.outputs, {})


Change = Callable[[Step, list[Any]], Sequence[Any] | None]


def run(program: Program, values: Sequence[Any], change: Change, *, remat: bool = True) -> list[Any]:
    """Runs a program.

    Args:
      program: the steps.
      values: the inputs.
      change: ``(step, operands) -> results``, or None for steps that run as they are.
      remat: whether what is computed again for the derivative still is.
    """

    def one(step: Step, operands: list[Any]) -> Sequence[Any]:
        results = change(step, operands) if step.outputs else None
        if results is not None:
            return results
        if step.name not in REMAT:
            return bind(step, operands)
        body = lambda *operands: run(step.bodies[0], operands, change, remat=remat)  # noqa: E731
        if remat:
            body = jax.checkpoint(body, prevent_cse=step.params["prevent_cse"], policy=step.params["policy"])
        return body(*operands)

    return evaluate(program, one, program.constants.__getitem__, values)


def run_layers(
    step: Step,
    operands: Sequence[Any],
    rows: np.ndarray | None = None,
    *,
    extra: Any = None,
    after: Callable[[Any, Any, Any], tuple[Any, Any]] = lambda old, new, _: (new, ()),
) -> list[Any]:
    """Runs a scan over some of its layers.

    Args:
      step: the scan.
      operands: its operands; those that are gone through have all rows, or only those that stay.
      rows: bool ``[layers]``, which layers stay; None for all.
      extra: an array that is gone through, too.
      after: ``(old, new, row of extra) -> (carried values, further results)``, called after each layer.

    Returns:
      The results of the scan, and the further results stacked.
    """
    first, carried = _jaxpr.scan_sizes(step.params)
    start, each = list(operands[first : first + carried]), list(operands[first + carried :])
    length = step.params["length"] if rows is None else int(rows.sum())
    if rows is not None:
        each = [x if np.shape(x)[0] == length else x[np.flatnonzero(rows)] for x in each]
    body = core.jaxpr_as_fun(step.params["jaxpr"])

    def layer(old: Any, xs: Any) -> Any:
        row, of_extra = xs
        outputs = body(*operands[:first], *old, *row)
        new, further = after(old, outputs[:carried], of_extra)
        return new, (outputs[carried:], further)

    options = {"reverse": step.params["reverse"], "unroll": min(step.params["unroll"], max(length, 1))}
    end, (stacked, further) = jax.lax.scan(layer, start, (each, extra), length=length, **options)
    return [*end, *stacked, *jax.tree.leaves(further)]

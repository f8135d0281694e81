"""The traced program with smaller arrays, whatever library the network was written in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compress.units._trace.program import Program, Step, bind, evaluate
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.removal import Kept, check
from distill_jax.compress.units.tracing import Traced


def shrink(graph: UnitGraph, kept: Kept) -> Callable[..., Any]:
    """The network of the kept units: its program, with every size in it adapted.

    Needed where ``fn`` itself has widths written into it (Linen's features, a BatchNorm's, the number
    of heads); otherwise ``fn`` can be called with the smaller parameters. It is differentiable and can
    be compiled. Numbers that ``fn`` computed from sizes, as 1/√(head size), stay as they were, but for
    a mean's. Of custom derivatives only ReLU's stays. Inputs have the traced shapes: for any
    batch, trace with one example and ``vmap``.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      kept: the indices that stay in each group, as in :func:`distill_jax.compress.units.keep`.

    Returns:
      ``(keep(graph, params, kept), *inputs) -> results``.

    Raises:
      ValueError: if ``kept`` is not valid; when called, if the arrays have not the shapes that the
        program then has.

    >>> from distill_jax import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> graph = units.trace(lambda p, x: (x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
    >>> small = units.shrink(graph, {"a": [0, 3]})
    >>> small(units.keep(graph, params, {"a": [0, 3]}), jnp.ones((1, 3)))
    Array([[6., 6.]], dtype=float32)
    """
    traced: Traced = graph.program
    smaller = _Smaller(traced, [traced.units[n][~s] for n, s in check(graph, kept).items()])

    def fn(params: Any, *inputs: Any) -> Any:
        leaves, structure = jax.tree.flatten((params, inputs))
        if structure != traced.inputs:
            raise ValueError(f"params and inputs must be {traced.inputs}, got {structure}")
        for number, leaf in zip(traced.program.inputs, leaves, strict=True):
            if np.shape(leaf) != smaller.shape(number):
                raise ValueError(
                    f"params or inputs have an array of shape {np.shape(leaf)} where the kept units "
                    f"make it {smaller.shape(number)}: give keep(graph, params, kept)"
                )
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        return jax.tree.unflatten(traced.structure, smaller.run(traced.program, leaves))

    return fn


class _Smaller:
    """Sizes of every value, and each step adapted to them."""

    def __init__(self, traced: Traced, removed: Sequence[np.ndarray]):
        self.tracer = traced.tracer
        self.program = traced.program
        # One longer: NONE reads the last
        self.removed = np.zeros(traced.tracer.labels.count + 1, bool)
        for nodes in removed:
            self.removed[nodes] = True
        self.masks: dict[int, list[np.ndarray]] = {}

    def stays(self, number: int) -> list[np.ndarray]:
        """For each axis of a value, which positions stay."""
        if number not in self.masks:
            resolve = self.tracer.labels.resolve
            self.masks[number] = [
                ~self.removed[resolve(units)].any(0) for units in self.tracer.read(number, self.program).units
            ]
        return self.masks[number]

    def shape(self, number: int) -> tuple[int, ...]:
        return tuple(int(mask.sum()) for mask in self.stays(number))

    def constant(self, number: int) -> Any:
        array = self.program.constants[number]
        for a, mask in enumerate(self.stays(number)):
            if not mask.all():
                array = jnp.take(array, np.flatnonzero(mask), axis=a)
        return array

    def changes(self, step: Step) -> bool:
        """Whether any size in it is another, or the number of terms of a mean."""
        touched = (*step.inputs, *step.outputs)
        return step.outputs[0] in self.tracer.means or not all(
            mask.all() for number in touched for mask in self.stays(number)
        )

    def run(self, program: Program, values: Sequence[Any]) -> list[Any]:
        return evaluate(program, self.step, self.constant, values)

    def step(self, step: Step, operands: list[Any]) -> Sequence[Any]:
        function = ADAPTED.get(step.name)
        if not self.changes(step):
            function = None
        results = function(self, step, operands) if function else bind(step, operands)
        for number, result in zip(step.outputs, results, strict=True):
            if np.shape(result) != self.shape(number):
                raise ValueError(
                    f"graph: {step.name} gives {np.shape(result)} where its units make "
                    f"{self.shape(number)}: please report this, with the network"
                )
        return results


def _relu(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    return [jax.nn.relu(operands[0])]


def _sized(option: str) -> Any:
    def adapted(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
        return bind(step, operands, **{option: small.shape(step.outputs[0])})

    return adapted


def _split(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    sizes = [small.shape(number)[step.params["axis"]] for number in step.outputs]
    return bind(step, operands, sizes=tuple(sizes))


def _slice(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    (x,) = operands
    strides = step.params["strides"] or (1,) * x.ndim
    cuts = zip(step.params["start_indices"], step.params["limit_indices"], strides, strict=True)
    for a, (cut, mask) in enumerate(zip(cuts, small.stays(step.inputs[0]), strict=True)):
        positions = np.arange(*cut)
        index = (np.cumsum(mask) - 1)[positions[mask[positions]]]
        gaps = np.unique(np.diff(index))
        if index.size and gaps.size <= 1:
            gap = int(gaps[0]) if gaps.size else 1
            x = jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, gap, a)
        else:
            x = jnp.take(x, index, axis=a)
    return [x]


def _pad(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    config = []
    for (low, high, interior), mask in zip(
        step.params["padding_config"], small.stays(step.outputs[0]), strict=True
    ):
        if not mask.all():
            low, high = int(mask[:low].sum()), int(mask[mask.size - high :].sum())
        config.append((low, high, interior))
    return bind(step, operands, padding_config=tuple(config))


def _gather(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    old = [mask.size for mask in small.stays(step.inputs[0])]
    new = small.shape(step.inputs[0])
    sizes = [b if size == a else size for size, a, b in zip(
        step.params["slice_sizes"], old, new, strict=True
    )]  # fmt: skip
    return bind(step, operands, slice_sizes=tuple(sizes))


def _conv(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    numbers = step.params["dimension_numbers"]
    features = small.shape(step.inputs[0])[numbers.lhs_spec[1]]
    groups = features // small.shape(step.inputs[1])[numbers.rhs_spec[1]]
    return bind(step, operands, feature_group_count=groups)


def _scaled(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    """A sum over n units divided by n, or times 1/n: n counts those that stay."""
    axes = small.tracer.means.get(step.outputs[0])
    if axes is not None:
        masks = [~small.removed[small.tracer.labels.resolve(units)].any(0) for units in axes]
        left = float(np.prod([mask.mean() for mask in masks]))
        factor = left if step.name == "div" else 1 / left
        for i, number in enumerate(step.inputs):
            count = small.tracer.number(number)
            if count is not None:
                operands[i] = np.asarray(count * factor, small.program.avals[number].dtype)
    return bind(step, operands)


def _scan(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    consts, carries = step.params["num_consts"], step.params["num_carry"]
    first, start, each = (
        operands[:consts], operands[consts : consts + carries], operands[consts + carries :],
    )  # fmt: skip

    def body(carry: Any, x: Any) -> Any:
        outputs = small.run(step.bodies[0], [*first, *carry, *x])
        return outputs[:carries], outputs[carries:]

    options = {name: step.params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = jax.lax.scan(body, start, each, **options)
    return [*carry, *outputs]


def _while(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    m, n = step.params["cond_nconsts"], step.params["body_nconsts"]
    condition, body = step.bodies
    return jax.lax.while_loop(
        lambda carry: small.run(condition, [*operands[:m], *carry])[0],
        lambda carry: small.run(body, [*operands[m : m + n], *carry]),
        operands[m + n :],
    )


def _cond(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    branches = [lambda *values, p=program: small.run(p, values) for program in step.bodies]
    return jax.lax.switch(operands[0], branches, *operands[1:])


# Primitives that have sizes among their parameters, or programs within
ADAPTED: dict[str, Callable[[_Smaller, Step, list[Any]], Sequence[Any]]] = {
    "relu": _relu, "broadcast_in_dim": _sized("shape"), "iota": _sized("shape"),
    "reshape": _sized("new_sizes"), "dynamic_slice": _sized("slice_sizes"), "split": _split,
    "slice": _slice, "pad": _pad, "gather": _gather, "conv_general_dilated": _conv,
    "div": _scaled, "mul": _scaled, "scan": _scan, "while": _while, "cond": _cond,
}  # fmt: skip

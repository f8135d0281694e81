"""A traced program with every size adapted to the units that are left."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import _jaxpr
from distill_jax.compress.units._trace.device_rules import parts
from distill_jax.compress.units._trace.program import OWN, Program, Step, bind, evaluate
from distill_jax.compress.units._trace.rules import Tracer, Value

Shape = tuple[int, ...]


class Adapted:
    """A program with the sizes of every value, and each step adapted to them.

    Args:
      program: the steps.
      tracer: the labels of every value.
      removed: the nodes of the units that are gone.
    """

    def __init__(self, program: Program, tracer: Tracer, removed: Sequence[np.ndarray]):
        self.program = program
        self.tracer = tracer
        # Shapes and dtypes, with symbolic sizes where the program has numbers in their places
        self.avals = program.avals
        # One longer: NONE reads the last
        self.removed = np.zeros(tracer.labels.count + 1, bool)
        for nodes in removed:
            self.removed[nodes] = True
        self.masks: dict[int, np.ndarray] = {}
        self.constants: dict[int, Any] = {}
        # The adapted derivatives of calls, by their first result
        self.derivatives: dict[int, Any] = {}

    @classmethod
    def of(cls, traced: Any, kept: Mapping[str, Any]) -> "Adapted":
        """Adapts what was traced to the kept units (group → their indices)."""
        removed = []
        for name, indices in kept.items():
            gone = np.ones(len(traced.units[name]), bool)
            gone[np.asarray(indices)] = False
            removed.append(traced.units[name][gone])
        return cls(traced.program, traced.tracer, removed)

    def stays(self, value: Value) -> list[np.ndarray]:
        """Says for each axis of a value which positions stay."""
        return [self.mask(units) for units in value.units]

    def mask(self, units: np.ndarray) -> np.ndarray:
        """Says which positions stay along an axis with these labels."""
        key = id(units)  # the tracer holds all labels as long as it lives
        if key not in self.masks:
            self.masks[key] = ~self.removed[self.tracer.meaning(units)].any(0)
        return self.masks[key]

    def value(self, number: int) -> Value:
        """Returns the labels of a value."""
        return self.tracer.read(number, self.program)

    def operand(self, step: Step, place: int) -> list[np.ndarray]:
        """Says for each axis of an operand which positions stay for this step."""
        return self.stays(self.tracer.operand(step, place, self.program))

    def output(self, step: Step, place: int = 0) -> list[np.ndarray]:
        """Says for each axis of a result which positions stay."""
        return self.stays(self.value(step.outputs[place]))

    def constant(self, number: int) -> Any:
        """Returns a constant, cut to the positions that stay."""
        if number not in self.constants:
            array, masks = self.program.constants[number], self.stays(self.value(number))
            if not isinstance(array, jax.core.Tracer) and not all(mask.all() for mask in masks):
                array = np.asarray(array)  # so that it stays a constant in a program that is traced
            self.constants[number] = cut(array, masks)
        return self.constants[number]

    def shape(self, number: int, masks: Sequence[np.ndarray]) -> tuple[Any, ...]:
        """Returns the shape of a value of which these positions stay."""
        sizes = zip(self.avals[number].shape, masks, strict=True)
        return tuple(n if mask.all() else int(mask.sum()) for n, mask in sizes)

    def changes(self, step: Step) -> bool:
        """Says whether a step has another size, or a mean with another number of terms."""
        masks = [mask for i in range(len(step.inputs)) for mask in self.operand(step, i)]
        masks += [mask for i in range(len(step.outputs)) for mask in self.output(step, i)]
        return (step.outputs[:1] and step.outputs[0] in self.tracer.means) or not all(m.all() for m in masks)

    def options(self, step: Step) -> dict[str, Any]:
        """Returns the parameters of a step with their sizes adapted."""
        sized = SIZED.get(step.name)
        return step.params | (sized(self, step) if sized else {})

    def count(self, step: Step, place: int, operand: Any) -> Any:
        """Returns an operand, with its number of terms adapted if the step divides a sum over units by it."""
        axes = self.tracer.means.get(step.outputs[0])
        count = None if axes is None else self.tracer.number(step.inputs[place])
        if axes is None or count is None:
            return operand
        left = float(np.prod([self.mask(units).mean() for units in axes]))
        factor = left if step.name == "div" else 1 / left
        return np.asarray(count * factor, self.program.avals[step.inputs[place]].dtype)

    def run(self, program: Program, values: Sequence[Any]) -> list[Any]:
        """Runs a program, the whole or one within a loop, on smaller values."""
        results = evaluate(program, self.step, self.constant, values)
        return [
            resize(x, self.shape(program.outputs[i], self.stays(self.tracer.result(program, i))))
            for i, x in enumerate(results)
        ]

    def step(self, step: Step, operands: list[Any]) -> Sequence[Any]:
        """Runs one step on smaller values."""
        operands = [
            resize(x, self.shape(step.inputs[i], self.operand(step, i))) for i, x in enumerate(operands)
        ]
        if step.symbolic is not None:
            step = step._replace(params=step.symbolic)
        function = ADAPTED.get(step.name) if self.changes(step) else None
        results = function(self, step, operands) if function else bind(step, operands)
        for i, result in enumerate(results):
            shape = self.shape(step.outputs[i], self.output(step, i))
            if np.shape(result) != shape:
                raise ValueError(
                    f"graph: {step.name} gives {np.shape(result)} where its units make {shape}: please "
                    "report this, with the network"
                )
        return results


def shape_of(masks: Sequence[np.ndarray]) -> Shape:
    """Counts what stays along each axis."""
    return tuple(int(mask.sum()) for mask in masks)


def cut(array: Any, masks: Sequence[np.ndarray]) -> Any:
    """Takes the positions that stay out of an array."""
    module = np if isinstance(array, np.ndarray) else jnp
    for a, mask in enumerate(masks):
        if not mask.all():
            array = module.take(array, np.flatnonzero(mask), axis=a)
    return array


def resize(x: Any, shape: Shape) -> Any:
    """Resizes a value along axes on which all its entries are equal."""
    if np.shape(x) == shape:
        return x
    one = tuple(slice(None) if n == new else slice(1) for n, new in zip(np.shape(x), shape, strict=True))
    return jnp.broadcast_to(x[one], shape)


def _split(small: Adapted, step: Step) -> dict[str, Any]:
    axis = step.params["axis"]
    sizes = [small.shape(number, small.output(step, i))[axis] for i, number in enumerate(step.outputs)]
    return {"sizes": tuple(sizes)}


def _pad(small: Adapted, step: Step) -> dict[str, Any]:
    config = []
    for (low, high, interior), mask in zip(step.params["padding_config"], small.output(step), strict=True):
        if not mask.all():
            low, high = int(mask[:low].sum()), int(mask[mask.size - high :].sum())
        config.append((low, high, interior))
    return {"padding_config": tuple(config)}


def _gather(small: Adapted, step: Step) -> dict[str, Any]:
    sizes = step.params["slice_sizes"]
    new = [
        n if mask.all() or n != mask.size else int(mask.sum())
        for n, mask in zip(sizes, small.operand(step, 0), strict=True)
    ]
    return {"slice_sizes": tuple(new)}


def _conv(small: Adapted, step: Step) -> dict[str, Any]:
    numbers = step.params["dimension_numbers"]
    features = shape_of(small.operand(step, 0))[numbers.lhs_spec[1]]
    return {"feature_group_count": features // shape_of(small.operand(step, 1))[numbers.rhs_spec[1]]}


def _output_shape(option: str) -> Any:
    return lambda small, step: {option: small.shape(step.outputs[0], small.output(step))}


# Primitives that have sizes among their parameters, and what these become
SIZED: dict[str, Callable[[Adapted, Step], dict[str, Any]]] = {
    "broadcast_in_dim": _output_shape("shape"), "iota": _output_shape("shape"),
    "reshape": _output_shape("new_sizes"),
    "dynamic_slice": _output_shape("slice_sizes"), "split": _split, "pad": _pad, "gather": _gather,
    "conv_general_dilated": _conv,
}  # fmt: skip


def cuts(step: Step) -> list[tuple[Any, Any, Any]]:
    """Returns start, limit and stride of a slice along each axis."""
    starts, limits = step.params["start_indices"], step.params["limit_indices"]
    return [*zip(starts, limits, step.params["strides"] or (1,) * len(starts), strict=True)]


def taken(mask: np.ndarray, cut: tuple[int, int, int]) -> np.ndarray:
    """Says which positions a slice takes along an axis of which these positions stay."""
    positions = np.arange(*cut)
    return (np.cumsum(mask) - 1)[positions[mask[positions]]]


def _sized(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    return bind(step, operands, **small.options(step))


def _relu(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    return [jax.nn.relu(operands[0])]


def _slice(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    (x,) = operands
    new = cuts(step)
    for a, mask in enumerate(small.operand(step, 0)):
        if mask.all():
            continue
        index = taken(mask, new[a])
        gaps = np.unique(np.diff(index))
        if index.size and gaps.size <= 1:
            new[a] = int(index[0]), int(index[-1]) + 1, int(gaps[0]) if gaps.size else 1
        else:
            x, new[a] = jnp.take(x, index, axis=a), (0, index.size, 1)
    starts, limits, strides = zip(*new, strict=True)
    return bind(step, [x], start_indices=starts, limit_indices=limits, strides=strides)


def _scaled(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    """A sum over n units that is divided by n, or multiplied by 1/n: n becomes the number that stays."""
    return bind(step, [small.count(step, i, x) for i, x in enumerate(operands)])


def _scan(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    consts, carries = _jaxpr.scan_sizes(step.params)
    first, start, each = (
        operands[:consts], operands[consts : consts + carries], operands[consts + carries :],
    )  # fmt: skip

    def body(carry: Any, x: Any) -> Any:
        outputs = small.run(step.bodies[0], [*first, *carry, *x])
        return outputs[:carries], outputs[carries:]

    options = {name: step.params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = jax.lax.scan(body, start, each, **options)
    return [*carry, *outputs]


def _while(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    m, n = step.params["cond_nconsts"], step.params["body_nconsts"]
    condition, body = step.bodies
    return jax.lax.while_loop(
        lambda carry: small.run(condition, [*operands[:m], *carry])[0],
        lambda carry: small.run(body, [*operands[m : m + n], *carry]),
        operands[m + n :],
    )


def _cond(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    branches = [lambda *values, p=program: small.run(p, values) for program in step.bodies]
    return jax.lax.switch(operands[0], branches, *operands[1:])


def _drawn(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    """Random numbers are drawn for all units: those that stay get the ones that they had among all."""
    return [cut(x, small.output(step, i)) for i, x in enumerate(bind(step, operands))]


def _constrained(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    """Splits among devices only the axes that they can still share evenly."""
    sharding = step.params["sharding"]
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return operands
    spec, shape = list(sharding.spec), np.shape(operands[0])
    for a, devices in parts(sharding.spec, sharding.mesh.shape):
        if shape[a] % devices:
            spec[a] = None
    return bind(step, operands, sharding=sharding.update(spec=jax.sharding.PartitionSpec(*spec)))


def _shard_map(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    options = {name: step.params[name] for name in ("mesh", "in_specs", "out_specs", "check_vma")}
    body = step.bodies[0]
    mapped = jax.shard_map(
        lambda *values: tuple(small.run(body, values)), axis_names=step.params["newly_manual_axes"], **options
    )
    return mapped(*operands)


def run_own(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    """A user's primitive: by the user's function for any sizes, or by its plain program."""
    run = OWN[step.name].run
    return (
        small.run(step.bodies[0], operands) if run is None else jax.tree.leaves(run(*operands, **step.params))
    )


# How steps run on smaller values where that is not as they ran before
ADAPTED: dict[str, Callable[[Adapted, Step, list[Any]], Sequence[Any]]] = {
    **dict.fromkeys(SIZED, _sized), "relu": _relu, "slice": _slice, "div": _scaled, "mul": _scaled,
    "scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map, "random_bits": _drawn,
    "rng_bit_generator": _drawn, "sharding_constraint": _constrained,
}  # fmt: skip

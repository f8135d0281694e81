"""A traced program with every size adapted to the units that are left."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
        # One longer: NONE reads the last
        self.removed = np.zeros(tracer.labels.count + 1, bool)
        for nodes in removed:
            self.removed[nodes] = True
        self.masks: dict[int, np.ndarray] = {}

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
        return cut(self.program.constants[number], self.stays(self.value(number)))

    def changes(self, step: Step) -> bool:
        """Says whether a step has another size, or a mean with another number of terms."""
        masks = [mask for i in range(len(step.inputs)) for mask in self.operand(step, i)]
        masks += [mask for i in range(len(step.outputs)) for mask in self.output(step, i)]
        return (step.outputs[:1] and step.outputs[0] in self.tracer.means) or not all(m.all() for m in masks)

    def options(self, step: Step) -> dict[str, Any]:
        """Returns the parameters of a step with their sizes adapted."""
        sized = SIZED.get(step.name)
        return step.params | (sized(self, step) if sized else {})

    def run(self, program: Program, values: Sequence[Any]) -> list[Any]:
        """Runs a program, the whole or one within a loop, on smaller values."""
        results = evaluate(program, self.step, self.constant, values)
        return [
            resize(x, shape_of(self.stays(self.tracer.result(program, i)))) for i, x in enumerate(results)
        ]

    def step(self, step: Step, operands: list[Any]) -> Sequence[Any]:
        """Runs one step on smaller values."""
        operands = [resize(x, shape_of(self.operand(step, i))) for i, x in enumerate(operands)]
        function = ADAPTED.get(step.name) if self.changes(step) else None
        results = function(self, step, operands) if function else bind(step, operands)
        for i, result in enumerate(results):
            shape = shape_of(self.output(step, i))
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
    for a, mask in enumerate(masks):
        if not mask.all():
            array = jnp.take(array, np.flatnonzero(mask), axis=a)
    return array


def resize(x: Any, shape: Shape) -> Any:
    """Resizes a value along axes on which all its entries are equal."""
    if np.shape(x) == shape:
        return x
    one = tuple(slice(None) if n == new else slice(1) for n, new in zip(np.shape(x), shape, strict=True))
    return jnp.broadcast_to(x[one], shape)


def _split(small: Adapted, step: Step) -> dict[str, Any]:
    axis = step.params["axis"]
    sizes = [shape_of(small.output(step, i))[axis] for i in range(len(step.outputs))]
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
        int(mask.sum()) if n == mask.size else n
        for n, mask in zip(sizes, small.operand(step, 0), strict=True)
    ]
    return {"slice_sizes": tuple(new)}


def _conv(small: Adapted, step: Step) -> dict[str, Any]:
    numbers = step.params["dimension_numbers"]
    features = shape_of(small.operand(step, 0))[numbers.lhs_spec[1]]
    return {"feature_group_count": features // shape_of(small.operand(step, 1))[numbers.rhs_spec[1]]}


def _output_shape(option: str) -> Any:
    return lambda small, step: {option: shape_of(small.output(step))}


# Primitives that have sizes among their parameters, and what these become
SIZED: dict[str, Callable[[Adapted, Step], dict[str, Any]]] = {
    "broadcast_in_dim": _output_shape("shape"), "iota": _output_shape("shape"),
    "reshape": _output_shape("new_sizes"),
    "dynamic_slice": _output_shape("slice_sizes"), "split": _split, "pad": _pad, "gather": _gather,
    "conv_general_dilated": _conv,
}  # fmt: skip


def taken(small: Adapted, step: Step) -> list[np.ndarray]:
    """Says which positions of the smaller operand a slice takes along each axis."""
    shape = small.program.avals[step.inputs[0]].shape
    strides = step.params["strides"] or (1,) * len(shape)
    cuts = zip(step.params["start_indices"], step.params["limit_indices"], strides, strict=True)
    found = []
    for old, mask in zip(cuts, small.operand(step, 0), strict=True):
        positions = np.arange(*old)
        found.append((np.cumsum(mask) - 1)[positions[mask[positions]]])
    return found


def _sized(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    return bind(step, operands, **small.options(step))


def _relu(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    return [jax.nn.relu(operands[0])]


def _slice(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    (x,) = operands
    for a, index in enumerate(taken(small, step)):
        gaps = np.unique(np.diff(index))
        if index.size and gaps.size <= 1:
            gap = int(gaps[0]) if gaps.size else 1
            x = jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, gap, a)
        else:
            x = jnp.take(x, index, axis=a)
    return [x]


def _scaled(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    """A sum over n units that is divided by n, or multiplied by 1/n: n becomes the number that stays."""
    axes = small.tracer.means.get(step.outputs[0])
    if axes is not None:
        left = float(np.prod([small.mask(units).mean() for units in axes]))
        factor = left if step.name == "div" else 1 / left
        for i, number in enumerate(step.inputs):
            count = small.tracer.number(number)
            if count is not None:
                operands[i] = np.asarray(count * factor, small.program.avals[number].dtype)
    return bind(step, operands)


def _scan(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
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
    """Random numbers: in evaluation all are drawn, since each unit that stays keeps the ones it had."""
    if small.tracer.training and step.name == "random_bits":
        keys = len(small.operand(step, 0))
        return bind(step, operands, shape=shape_of(small.output(step))[keys:])
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

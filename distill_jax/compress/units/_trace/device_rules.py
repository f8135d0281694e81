"""Rules for programs that run on several devices.

Within ``shard_map`` every device runs the same program on its part of the arrays. An axis of which each device
has a part is split there into devices × positions. A unit is removed on all devices at once, so that all parts
stay equally long.
"""

from math import prod
from typing import Any

import numpy as np

from distill_jax.compress.units._trace.layout_rules import tiled
from distill_jax.compress.units._trace.loop_rules import inner
from distill_jax.compress.units._trace.program import Step
from distill_jax.compress.units._trace.rules import Axis, Tracer, Value, fixed, rule, value


@rule(
    "sharding_constraint", "layout_constraint", "reshard", "pvary", "pbroadcast", "ppermute", "device_put",
    "psum", "psum_invariant", "pmax", "pmin",
)  # fmt: skip
def _same_places(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    """Leaves each element in its place; sums of zeros over devices are zero, too."""
    return [operand._replace(total=None) for operand in operands]


@rule("axis_index")
def _axis_index(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    return [value(())]


@rule("all_gather", "all_gather_invariant")
def _all_gather(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    devices, along = step.params["axis_size"], step.params["all_gather_dimension"]
    axes = operand.axes
    if step.params["tiled"]:
        axes[along] = tiled(axes[along], devices)
    else:
        axes.insert(along, fixed(devices))
    return [value(axes, nil=operand.nil)]


@rule("reduce_scatter")
def _reduce_scatter(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    along, axes = step.params["scatter_dimension"], operand.axes
    if step.params["tiled"]:
        axes[along] = _part(tracer, axes[along], step.params["axis_size"], step.name)
    else:
        tracer.settle(axes.pop(along), f"given to devices by {step.name}")
    return [value(axes, nil=operand.nil)]


@rule("all_to_all")
def _all_to_all(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    (operand,) = operands
    split, along = step.params["split_axis"], step.params["concat_axis"]
    if not step.params["tiled"]:
        return None
    devices = operand.shape[split] // tracer.avals[step.outputs[0]].shape[split] if split != along else 0
    axes = operand.axes
    if not devices:
        tracer.settle(axes[split], f"given to devices by {step.name}")
        axes[split] = fixed(operand.shape[split])
    else:
        axes[split] = _part(tracer, axes[split], devices, step.name)
        axes[along] = tiled(axes[along], devices)
    return [value(axes, nil=operand.nil)]


@rule("shard_map")
def _shard_map(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    sizes = step.params["mesh"].shape
    inputs = []
    for operand, spec in zip(operands, step.params["in_specs"], strict=True):
        axes = operand.axes
        for a, devices in parts(spec, sizes):
            axes[a] = _part(tracer, axes[a], devices, step.name)
        inputs.append(value(axes, nil=operand.nil))
    results = []
    outputs = inner(tracer, step.bodies[0], inputs)
    for output, spec in zip(outputs, step.params["out_specs"], strict=True):
        axes = output.axes
        for a, devices in parts(spec, sizes):
            axes[a] = tiled(axes[a], devices)
        results.append(value(axes, nil=output.nil))
    return results


def parts(spec: Any, sizes: Any) -> list[tuple[int, int]]:
    """Lists the axes of which each device has a part, and the number of parts."""
    names = [() if name is None else name if isinstance(name, tuple) else (name,) for name in spec]
    counts = [prod(sizes.get(name, 1) for name in each) for each in names]
    return [(a, devices) for a, devices in enumerate(counts) if devices > 1]


def _part(tracer: Tracer, axis: Axis, devices: int, name: str) -> Axis:
    """Returns what each device has of an axis: what is removed is removed on all of them."""
    units, zero = axis
    sizes = devices, units.shape[1] // devices
    each, within = tracer.labels.split(units, sizes, name)
    tracer.labels.freeze(each, f"given to devices by {name}")
    return within, np.asarray(zero.reshape(sizes).all(0))

"""Rules for operations that find by numbers which elements of an array they read or write."""

from typing import Any

import numpy as np
from jax import lax

from distill_jax.compress.units._trace.program import Step
from distill_jax.compress.units._trace.rules import Axis, Tracer, Value, fixed, rule, value


def _whole(tracer: Tracer, step: Step, operand: Value, sizes: Any) -> list[Axis]:
    """Returns the axes that are taken whole, and freezes the others."""
    return [
        operand.axis(a)
        if size == n
        else (tracer.settle(operand.axis(a), f"indexed by {step.name}"), fixed(size))[1]
        for a, (size, n) in enumerate(zip(sizes, operand.shape, strict=True))
    ]


@rule("dynamic_slice")
def _dynamic_slice(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    axes = _whole(tracer, step, operands[0], step.params["slice_sizes"])
    return [value(axes, nil=operands[0].nil)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    operand, update = operands[:2]
    olds = _whole(tracer, step, operand, update.shape)
    axes = []
    for a, n in enumerate(operand.shape):
        new = update.axis(a)
        if update.shape[a] == n:
            units = tracer.join([olds[a], new], step.name)
            axes.append((units, olds[a][1] & new[1]))
        else:
            tracer.settle(new, f"indexed by {step.name}")
            axes.append(fixed(n))
    return [value(axes, nil=operand.nil and update.nil)]


@rule("gather")
def _gather(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    operand, indices = operands
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    batching = dict(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    batch = indices.axes[:-1]
    whole: list[Axis] = []
    for a, (size, n) in enumerate(zip(sizes, operand.shape, strict=True)):
        axis = operand.axis(a)
        if a in batching:
            b = batching[a]
            batch[b] = tracer.join([batch[b], axis], step.name), axis[1]
        elif size != n or n == 1 or a in numbers.collapsed_slice_dims:
            tracer.settle(axis, f"indexed by {step.name}")
            axis = fixed(size)
        whole.append(axis)
    tracer.settle(indices.axis(-1), f"indexed by {step.name}")
    gone = {*numbers.collapsed_slice_dims, *batching}
    kept, rest = iter([axis for a, axis in enumerate(whole) if a not in gone]), iter(range(len(batch)))
    filled = _filled(step, tracer.avals[step.outputs[0]].dtype)
    axes = []
    for a in range(len(numbers.offset_dims) + len(batch)):
        if a in numbers.offset_dims:
            axes.append(next(kept))
        else:
            b = next(rest)
            units, zero = batch[b]
            axes.append((units, zero if b in batching.values() else np.zeros_like(zero)))
    return [value(((u, z & (not filled)) for u, z in axes), nil=operand.nil and not filled)]


def _filled(step: Step, dtype: Any) -> bool:
    """Says whether ``gather`` puts other numbers than zero where an index is outside."""
    fill = step.params["fill_value"]
    if step.params["mode"] != lax.GatherScatterMode.FILL_OR_DROP:
        return False
    if fill is None:  # NaN, or the least or greatest integer
        return not np.issubdtype(dtype, np.inexact)
    return bool(fill != 0 and np.isfinite(fill))


SCATTERS = "scatter scatter-add scatter-sub scatter-mul scatter-min scatter-max"


@rule(*SCATTERS.split())
def _scatter(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    operand, indices, updates = operands
    numbers = step.params["dimension_numbers"]
    windows = numbers.update_window_dims
    batch = [a for a in range(len(updates.shape)) if a not in windows]  # the indices' axes in the updates
    batching = {
        a: (b, batch[b])
        for a, b in zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
    }
    indexed = f"indexed by {step.name}"
    for a, axis in enumerate(indices.axes):
        if a not in numbers.scatter_indices_batching_dims:
            tracer.settle(axis, indexed)
    for b, a in enumerate(batch):
        if b not in numbers.scatter_indices_batching_dims:
            tracer.settle(updates.axis(a), indexed)
    window, axes = iter(windows), []
    for a, axis in enumerate(operand.axes):
        if a in batching:
            b, place = batching[a]
            units = tracer.join([axis, indices.axis(b), updates.axis(place)], step.name)
            axes.append((units, axis[1] & updates.zero[place]))
            continue
        if a in numbers.inserted_window_dims:
            tracer.settle(axis, indexed)
            axes.append(fixed(operand.shape[a]))
            continue
        new = updates.axis(next(window))
        if new[0].shape[1] != operand.shape[a] or operand.shape[a] == 1:
            tracer.settle(axis, indexed)
            tracer.settle(new, indexed)
            axes.append(fixed(operand.shape[a]))
        else:
            # What is multiplied by something stays zero
            zero = axis[1] if step.name == "scatter-mul" else axis[1] & new[1]
            axes.append((tracer.join([axis, new], step.name), zero))
    return [value(axes, nil=operand.nil and (updates.nil or step.name == "scatter-mul"))]

"""Rules for operations that move values around, whatever these are."""

from functools import reduce
from typing import Any

import numpy as np

from distill_jax.compress.units._trace.labels import append, merge
from distill_jax.compress.units._trace.program import Step
from distill_jax.compress.units._trace.rules import Axis, Tracer, Value, fixed, rule, value


@rule("broadcast_in_dim")
def _broadcast_in_dim(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    if len(operands) > 1:
        return None
    (operand,) = operands
    source = {a: i for i, a in enumerate(step.params["broadcast_dimensions"])}
    axes, repeats = [], []
    for a, n in enumerate(step.params["shape"]):
        if a in source and operand.shape[source[a]] == n:
            axes.append(operand.axis(source[a]))
            repeats.append(operand.repeating(source[a]))
        else:
            if a in source:
                tracer.settle(operand.axis(source[a]), f"repeated by {step.name}")
            axes.append(fixed(n))
            repeats.append(n > 1)
    return [value(axes, nil=operand.nil, total=operand.total, repeats=repeats)]


@rule("reshape")
def _reshape(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    (operand, *rest) = operands
    if rest or step.params["dimensions"] is not None:
        return None
    old, new = operand.shape, tuple(step.params["new_sizes"])
    if 0 in old:
        return None
    axes: list[Axis] = []
    repeats: list[bool] = []
    for ins, outs in segments(old, new):
        alone = len(ins) == len(outs) == 1 and operand.repeating(ins[0])
        repeats += [alone] * len(outs)
        olds = [operand.axis(a) for a in ins]
        olds = [_single(tracer, axis, step.name) for axis in olds]
        sizes = [new[a] for a in outs]
        if not sizes:
            continue
        wide = [axis for axis in olds if axis[0].shape[1] > 1]
        if not wide:
            axes += [fixed(n) for n in sizes]
            continue
        units = merge([units for units, _ in wide])
        zero = reduce(np.logical_and.outer, [zero for _, zero in wide]).ravel()
        if sum(n > 1 for n in sizes) == 1:
            axes += [fixed(1) if n == 1 else (units, zero) for n in sizes]
            continue
        parts = tracer.labels.split(units, sizes, step.name)
        grid = zero.reshape(sizes)
        for d, part in enumerate(parts):
            others = tuple(i for i in range(len(sizes)) if i != d)
            axes.append((part, np.asarray(np.all(grid, others))))
    return [value(axes, nil=operand.nil, total=operand.total, repeats=repeats)]


def segments(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Cuts two shapes of equal size into the shortest runs of axes with equal products.

    Args:
      old: a shape.
      new: another.

    >>> segments((2, 3, 4), (6, 2, 2))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        ins: list[int] = []
        outs: list[int] = []
        a = b = 1
        while True:
            if a <= b and i < len(old) and (a < b or not ins):
                a, ins, i = a * old[i], [*ins, i], i + 1
            elif j < len(new) and (b < a or not outs):
                b, outs, j = b * new[j], [*outs, j], j + 1
            else:
                break
        runs.append((ins, outs))
    return runs


def _single(tracer: Tracer, axis: Axis, name: str) -> Axis:
    """Freezes an axis of size 1: without its only unit nothing would be left."""
    return tracer.settle(axis, f"one index alone, by {name}") if axis[0].shape[1] == 1 else axis


@rule("squeeze")
def _squeeze(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    gone = [a % len(operand.shape) for a in step.params["dimensions"]]
    axes, repeats = [], []
    for a in range(len(operand.shape)):
        if a in gone:
            _single(tracer, operand.axis(a), step.name)
        else:
            axes.append(operand.axis(a))
            repeats.append(operand.repeating(a))
    return [value(axes, nil=operand.nil, total=operand.total, repeats=repeats)]


@rule("transpose")
def _transpose(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    axes = [operand.axis(a) for a in step.params["permutation"]]
    repeats = [operand.repeating(a) for a in step.params["permutation"]]
    return [value(axes, nil=operand.nil, total=operand.total, repeats=repeats)]


@rule("rev")
def _rev(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    axes = operand.axes
    for a in step.params["dimensions"]:
        axes[a] = (axes[a][0][:, ::-1], axes[a][1][::-1])
    return [value(axes, nil=operand.nil)]


@rule("concatenate")
def _concatenate(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    along = step.params["dimension"]
    axes = []
    for a in range(len(operands[0].shape)):
        each = [operand.axis(a) for operand in operands]
        if a == along:
            units = append([units for units, _ in each])
            axes.append((units, np.concatenate([zero for _, zero in each])))
        else:
            units = tracer.join(each, step.name)
            axes.append((units, np.logical_and.reduce([zero for _, zero in each])))
    return [value(axes, nil=all(operand.nil for operand in operands))]


def _cut(axis: Axis, index: Any) -> Axis:
    return axis[0][:, index], axis[1][index]


@rule("split")
def _split(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    along, results, start = step.params["axis"], [], 0
    for size in step.params["sizes"]:
        axes = operand.axes
        axes[along] = _cut(axes[along], slice(start, start + size))
        start += size
        results.append(value(axes, nil=operand.nil))
    return results


@rule("slice")
def _slice(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    strides = step.params["strides"] or (1,) * len(operand.shape)
    cuts = zip(step.params["start_indices"], step.params["limit_indices"], strides, strict=True)
    axes = [_cut(operand.axis(a), slice(*cut)) for a, cut in enumerate(cuts)]
    repeats = [operand.repeating(a) and units.shape[1] > 1 for a, (units, _) in enumerate(axes)]
    return [value(axes, nil=operand.nil, repeats=repeats)]


@rule("pad")
def _pad(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    operand, filling = operands
    axes: list[Axis] = []
    for a, (low, high, interior) in enumerate(step.params["padding_config"]):
        axis = operand.axis(a)
        size = axis[0].shape[1]
        total = low + high + size + max(0, size - 1) * interior
        if (low, high, interior) == (0, 0, 0):
            axes.append(axis)
        elif not axis[0].size or interior or low < 0 or high < 0:
            tracer.settle(axis, f"filled by {step.name}")
            axes.append(fixed(total))
        else:
            # New positions, as many as there are in what they will meet
            ends = [tracer.labels.fresh(n) for n in (low, high)]
            units = append([ends[0], axis[0], ends[1]])
            axes.append((units, np.pad(axis[1], (low, high), constant_values=filling.nil)))
    # What is filled in counts for all units of the other axes, too
    zeros = filling.nil or not any(map(any, step.params["padding_config"]))
    return [value(((units, zero & zeros) for units, zero in axes), nil=operand.nil and filling.nil)]


@rule("iota")
def _iota(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    shape, along = step.params["shape"], step.params["dimension"]
    return [value(map(fixed, shape), repeats=(n > 1 and a != along for a, n in enumerate(shape)))]


@rule("stack")
def _stack(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    along, axes, repeats = step.params["axis"], [], []
    for a in range(len(operands[0].shape)):
        units = tracer.join([operand.axis(a) for operand in operands], step.name)
        axes.append((units, np.logical_and.reduce([operand.zero[a] for operand in operands])))
        repeats.append(all(operand.repeating(a) for operand in operands))
    axes.insert(along, fixed(len(operands)))
    repeats.insert(along, False)
    return [value(axes, nil=all(operand.nil for operand in operands), repeats=repeats)]


@rule("unstack")
def _unstack(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    along = step.params["axis"]
    tracer.settle(operand.axis(along), f"taken apart by {step.name}")
    rest = [a for a in range(len(operand.shape)) if a != along]
    repeats = [operand.repeating(a) for a in rest]
    each = value([operand.axis(a) for a in rest], nil=operand.nil, repeats=repeats)
    return [each for _ in step.outputs]


@rule("tile")
def _tile(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    axes, repeats = [], []
    for a, times in enumerate(step.params["reps"]):
        n = operand.shape[a]
        if n == 1 and times > 1:
            tracer.settle(operand.axis(a), f"repeated by {step.name}")
            axes.append(fixed(times))
        else:
            axes.append(tiled(operand.axis(a), times))
        repeats.append(operand.repeating(a) or (n == 1 and times > 1))
    return [value(axes, nil=operand.nil, repeats=repeats)]


def tiled(axis: Axis, times: int) -> Axis:
    """Repeats an axis, one after another."""
    return np.tile(axis[0], times), np.tile(axis[1], times)

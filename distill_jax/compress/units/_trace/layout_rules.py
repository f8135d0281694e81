"""Rules for the primitives that move values around, and for loops and choices."""

from functools import reduce
from typing import Any

import numpy as np

from distill_jax.compress.units._trace.labels import append, merge
from distill_jax.compress.units._trace.program import Program, Step
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
            repeats.append(repeating(operand, source[a]))
        else:
            if a in source:
                tracer.settle(operand.axis(source[a]), f"repeated by {step.name}")
            axes.append(fixed(n))
            repeats.append(n > 1)
    return [value(axes, nil=operand.nil, total=operand.total, repeats=repeats)]


def repeating(operand: Value, axis: int) -> bool:
    """Says whether a value repeats along an axis."""
    return bool(operand.repeats) and operand.repeats[axis]


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
        alone = len(ins) == len(outs) == 1 and repeating(operand, ins[0])
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
            repeats.append(repeating(operand, a))
    return [value(axes, nil=operand.nil, total=operand.total, repeats=repeats)]


@rule("transpose")
def _transpose(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    axes = [operand.axis(a) for a in step.params["permutation"]]
    repeats = [repeating(operand, a) for a in step.params["permutation"]]
    return [value(axes, nil=operand.nil, total=operand.total, repeats=repeats)]


@rule("rev")
def _rev(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    axes = [operand.axis(a) for a in range(len(operand.shape))]
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
        axes = [operand.axis(a) for a in range(len(operand.shape))]
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
    repeats = [repeating(operand, a) and units.shape[1] > 1 for a, (units, _) in enumerate(axes)]
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
    return [value(axes, nil=operand.nil and filling.nil)]


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
def _gather(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    operand, indices = operands
    numbers, sizes = step.params["dimension_numbers"], step.params["slice_sizes"]
    if numbers.operand_batching_dims or numbers.start_indices_batching_dims:
        return None
    whole = _whole(tracer, step, operand, sizes)
    for a in numbers.start_index_map:
        # Also a full slice of it, whose only index is 0
        whole[a] = (tracer.settle(whole[a], f"indexed by {step.name}"), fixed(sizes[a]))[1]
    for a in numbers.collapsed_slice_dims:
        tracer.settle(whole[a], f"indexed by {step.name}")
    kept = iter(a for a in range(len(sizes)) if a not in numbers.collapsed_slice_dims)
    *batch, vector = [indices.axis(a) for a in range(len(indices.shape))]
    tracer.settle(vector, f"indexed by {step.name}")
    rank, remaining = len(numbers.offset_dims) + len(batch), iter(batch)
    axes = []
    for a in range(rank):
        if a in numbers.offset_dims:
            axes.append(whole[next(kept)])
        else:
            units, _ = next(remaining)
            axes.append((units, np.zeros(units.shape[1], bool)))
    return [value(axes, nil=operand.nil)]


@rule("iota")
def _iota(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    shape, along = step.params["shape"], step.params["dimension"]
    return [value(map(fixed, shape), repeats=(n > 1 and a != along for a, n in enumerate(shape)))]


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    options = [step.params[name] for name in ("window_dimensions", "window_strides", "padding")]
    dilation = step.params["base_dilation"]
    axes: list[Axis] = []
    for a, n in enumerate(tracer.avals[step.outputs[0]].shape):
        if [option[a] for option in options] == [1, 1, (0, 0)] and dilation[a] == 1:
            axes.append(operand.axis(a))
        else:
            tracer.settle(operand.axis(a), f"window of {step.name}")
            axes.append(fixed(n))
    return [value(axes, nil=operand.nil)]


def _inner(tracer: Tracer, program: Program, inputs: list[Value]) -> list[Value]:
    tracer.values.update(zip(program.inputs, inputs, strict=True))
    tracer.run(program)
    return [tracer.result(program, i) for i in range(len(program.outputs))]


def _agree(tracer: Tracer, a: Value, b: Value, name: str) -> Value:
    """Ties two values of which one can take the place of the other."""
    axes = []
    for i in range(len(a.shape)):
        units = tracer.join([a.axis(i), b.axis(i)], name)
        axes.append((units, a.zero[i] & b.zero[i]))
    return value(axes, nil=a.nil and b.nil)


def _loop(tracer: Tracer, carry: list[Value], name: str, body: Any) -> list[Value]:
    """Finds the labels of a loop's carry, going round until nothing new is known of its zeros."""
    while True:
        outputs = body(carry)
        after = [_agree(tracer, a, b, name) for a, b in zip(carry, outputs, strict=True)]
        if all(_known(a) == _known(b) for a, b in zip(carry, after, strict=True)):
            return after
        carry = after


def _known(v: Value) -> Any:
    return v.nil, [zero.tolist() for zero in v.zero]


@rule("scan")
def _scan(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    consts, carries = step.params["num_consts"], step.params["num_carry"]
    program = step.bodies[0]
    each = []
    for operand in operands[consts + carries :]:
        tracer.settle(operand.axis(0), "gone through by scan")
        each.append(Value(operand.units[1:], operand.zero[1:], operand.nil))
    stacked: list[Value] = []

    def body(carry: list[Value]) -> list[Value]:
        outputs = _inner(tracer, program, [*operands[:consts], *carry, *each])
        stacked[:] = outputs[carries:]
        return outputs[:carries]

    start = [v._replace(total=None, repeats=()) for v in operands[consts : consts + carries]]
    carry = _loop(tracer, start, step.name, body)
    length = fixed(step.params["length"])
    outs = [
        value([length, *((v.units[a], v.zero[a]) for a in range(len(v.units)))], nil=v.nil) for v in stacked
    ]
    return [*carry, *outs]


@rule("while")
def _while(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    first, second = step.params["cond_nconsts"], step.params["body_nconsts"]
    condition, body = step.bodies
    consts, start = operands[first : first + second], operands[first + second :]

    def both(carry: list[Value]) -> list[Value]:
        _inner(tracer, condition, [*operands[:first], *carry])
        return _inner(tracer, body, [*consts, *carry])

    return _loop(tracer, [v._replace(total=None, repeats=()) for v in start], step.name, both)


@rule("cond")
def _cond(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    results: list[Value] = []
    for program in step.bodies:
        outputs = _inner(tracer, program, operands[1:])
        results = (
            [_agree(tracer, a, b, step.name) for a, b in zip(results, outputs, strict=True)]
            if results
            else [v._replace(total=None) for v in outputs]
        )
    return results

"""Rules for operations over or along an axis: contractions, reductions, transforms and orders."""

from math import prod

import numpy as np

from distill_jax.compress.units._trace.labels import merge
from distill_jax.compress.units._trace.program import Step
from distill_jax.compress.units._trace.rules import Axis, Tracer, Value, fixed, rule, value


@rule("dot_general")
def _dot_general(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    lhs, rhs = operands
    (contract_l, contract_r), (batch_l, batch_r) = step.params["dimension_numbers"]
    for a, b in zip(contract_l, contract_r, strict=True):
        tracer.contract(lhs.axis(a), rhs.axis(b), step.name)
    axes = []
    for a, b in zip(batch_l, batch_r, strict=True):
        units = tracer.join([lhs.axis(a), rhs.axis(b)], step.name)
        axes.append((units, lhs.zero[a] | rhs.zero[b]))
    for operand, gone in ((lhs, (*contract_l, *batch_l)), (rhs, (*contract_r, *batch_r))):
        axes += [operand.axis(a) for a in range(len(operand.shape)) if a not in gone]
    return [value(axes, nil=lhs.nil or rhs.nil)]


@rule("ragged_dot_general")
def _ragged_dot_general(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    """A product in which the rows of the left side are dealt out to the matrices of the right side."""
    lhs, rhs, sizes = operands
    numbers = step.params["ragged_dot_dimension_numbers"]
    (contract_l, contract_r), (batch_l, batch_r) = numbers.dot_dimension_numbers
    (rows,), groups = numbers.lhs_ragged_dimensions, tuple(numbers.rhs_group_dimensions)
    if rows in (*contract_l, *batch_l) or len(sizes.shape) != 1:
        return None
    for axis in (lhs.axis(rows), *(rhs.axis(a) for a in groups), sizes.axis(0)):
        tracer.settle(axis, f"dealt out by {step.name}")
    for a, b in zip(contract_l, contract_r, strict=True):
        tracer.contract(lhs.axis(a), rhs.axis(b), step.name)
    axes = []
    for a, b in zip(batch_l, batch_r, strict=True):
        units = tracer.join([lhs.axis(a), rhs.axis(b)], step.name)
        axes.append((units, lhs.zero[a] | rhs.zero[b]))
    for a, n in enumerate(lhs.shape):
        if a not in (*contract_l, *batch_l):
            axes.append(fixed(n) if a == rows else lhs.axis(a))
    axes += [rhs.axis(a) for a in range(len(rhs.shape)) if a not in (*contract_r, *batch_r, *groups)]
    return [value(axes, nil=lhs.nil or rhs.nil)]


@rule("conv_general_dilated")
def _conv(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    if step.params["batch_group_count"] != 1:
        return None
    lhs, rhs = operands
    numbers = step.params["dimension_numbers"]
    batch, feature, *space = numbers.lhs_spec
    outputs, inputs, *window = numbers.rhs_spec
    for operand, axes in ((lhs, space), (rhs, window)):
        for a in axes:
            tracer.settle(operand.axis(a), f"window of {step.name}")
    groups = step.params["feature_group_count"]
    out = rhs.axis(outputs)
    if groups == 1:
        tracer.contract(lhs.axis(feature), rhs.axis(inputs), step.name)
    else:
        units, zero = lhs.axis(feature)
        sizes = (groups, units.shape[1] // groups)
        group, within = tracer.labels.split(units, sizes, step.name)
        rows = zero.reshape(sizes)
        # A group's channels all go together, so within a group what is silent adds nothing
        tracer.contract((within, np.all(rows, 0)), rhs.axis(inputs), step.name)
        sizes = (groups, out[0].shape[1] // groups)
        group_out, within_out = tracer.labels.split(out[0], sizes, step.name)
        tracer.labels.unify(group, group_out, step.name)
        out = (merge([group_out, within_out]), out[1])
    # Strides, padding and dilation are no matter of units
    shape = tracer.avals[step.outputs[0]].shape
    spec = numbers.out_spec
    axes = {spec[0]: lhs.axis(batch), spec[1]: out}
    axes |= {a: fixed(shape[a]) for a in spec[2:]}
    return [value([axes[a] for a in range(len(spec))], nil=lhs.nil or rhs.nil)]


REDUCTIONS = "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin"


@rule(*REDUCTIONS.split())
def _reduce(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    gone = step.params["axes"]
    for a in gone:
        if step.name == "reduce_sum":
            tracer.contract(operand.axis(a), None, f"{step.name} over it")
        elif step.name.startswith("arg"):
            tracer.settle(operand.axis(a), f"{step.name} counts it")
        else:
            tracer.labels.mark(operand.units[a], f"{step.name} over it")
    stays = [operand.axis(a) for a in range(len(operand.shape)) if a not in gone]
    total = None
    if step.name == "reduce_sum":
        total = prod(operand.shape[a] for a in gone), tuple(operand.units[a] for a in gone)
    if step.name in ("reduce_prod", "reduce_and") or step.name.startswith("arg"):
        return [value((u, np.zeros_like(z)) for u, z in stays)]
    return [value(stays, nil=operand.nil, total=total)]


@rule("cumsum", "cumlogsumexp", "cummax", "cummin", "cumprod")
def _cumulate(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    along = step.params["axis"]
    if step.name == "cumsum":
        tracer.contract(operand.axis(along), None, f"{step.name} along it")
    else:
        tracer.labels.mark(operand.units[along], f"{step.name} along it")
    zero_stays = step.name in ("cumsum", "cummax", "cummin")
    return [
        value(
            (u, z & zero_stays & (a != along)) for a, (u, z) in enumerate(operand.axes)
        )
    ]  # fmt: skip


@rule("fft")
def _fft(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (operand,) = operands
    shape = tracer.avals[step.outputs[0]].shape
    first, axes = len(shape) - len(step.params["fft_lengths"]), operand.axes
    for a in range(first, len(shape)):
        tracer.settle(axes[a], f"transformed by {step.name}")
        axes[a] = fixed(shape[a])
    return [value(axes, nil=operand.nil)]


@rule("sort")
def _sort(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    along = step.params["dimension"]
    axes = []
    for a in range(len(operands[0].shape)):
        each = [operand.axis(a) for operand in operands]
        if a == along:
            each = [tracer.settle(axis, f"ordered by {step.name}") for axis in each]
        axes.append((tracer.join(each, step.name), np.logical_and.reduce([zero for _, zero in each])))
    return [value(axes) for _ in operands]


@rule("top_k")
def _top_k(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    axes = operands[0].axes
    along = step.params.get("axis", -1) % len(axes)
    tracer.settle(axes[along], f"ordered by {step.name}")
    axes[along] = fixed(step.params["k"])
    return [value(axes), value((u, np.zeros_like(z)) for u, z in axes)]


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


def contractions(step: Step) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Pairs of (operand, axis) over whose products a step sums."""
    numbers = step.params.get("ragged_dot_dimension_numbers")
    if step.name == "dot_general" or numbers:
        pairs, _ = numbers.dot_dimension_numbers if numbers else step.params["dimension_numbers"]
        left, right = pairs
        return [((0, a), (1, b)) for a, b in zip(left, right, strict=True)]
    if step.name == "conv_general_dilated":
        numbers = step.params["dimension_numbers"]
        return [((0, numbers.lhs_spec[1]), (1, numbers.rhs_spec[1]))]
    return []

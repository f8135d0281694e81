"""Rules for operations that compute each element of the result from one element of each operand."""

from typing import Any

import numpy as np

from distill_jax.compress.units._trace.program import Step
from distill_jax.compress.units._trace.rules import Tracer, Value, rule, value

# Elementwise operations: their result is 0 where all operands are 0, where any operand is 0, or nowhere.
ZERO_IF_ALL = (
    "add add_any sub neg abs sign floor ceil round real imag conj sin tan tanh sinh asin atan "
    "asinh atanh erf expm1 log1p sqrt cbrt square max min or xor relu copy stop_gradient "
    "convert_element_type reduce_precision name nextafter bessel_i1e complex"
)
ZERO_IF_ANY = "mul and"
ZERO_NEVER = (
    "exp exp2 cos cosh acos logistic erfc erf_inv eq ne lt le gt ge not is_finite "
    "shift_left shift_right_logical shift_right_arithmetic population_count clz bessel_i0e"
)
# Operations that are not finite where an operand (the last) is 0: a silenced unit then spoils sums
POLE = "log rsqrt lgamma digamma acosh"
POLES = ("of 0", "by 0")  # how the reasons end


def _elementwise(tracer: Tracer, step: Step, operands: list[Value], zero: Any) -> list[Value]:
    """Ties operands position by position; axes of size 1 and scalars repeat."""
    shape = np.broadcast_shapes(*(operand.shape for operand in operands))
    axes = []
    for a, n in enumerate(shape):
        full = []
        for operand in operands:
            if operand.shape and operand.shape[a] == n:
                full.append(operand.axis(a))
            elif operand.shape:
                tracer.settle(operand.axis(a), f"repeated by {step.name}")
        units = tracer.join(full, step.name)
        zeros = [o.zero[a] if o.shape and o.shape[a] == n else np.full(n, o.nil) for o in operands]
        axes.append((units, zero(zeros)))
    nil = bool(zero([np.array([o.nil]) for o in operands])[0])
    repeats = [
        n > 1 and all(o.repeats[a : a + 1] == (True,) for o in operands if o.shape and o.shape[a] == n)
        for a, n in enumerate(shape)
    ]
    return [value(axes, nil=nil, repeats=repeats)]


def _all(zeros: list[np.ndarray]) -> np.ndarray:
    return np.logical_and.reduce(zeros)


def _any(zeros: list[np.ndarray]) -> np.ndarray:
    return np.logical_or.reduce(zeros)


def _never(zeros: list[np.ndarray]) -> np.ndarray:
    return np.zeros_like(zeros[0])


@rule(*ZERO_IF_ALL.split())
def _zero_if_all(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    counts = [True] * len(operands)
    if step.name in ("max", "min"):
        # max(0, c) is 0 for any c ≤ 0: then only the other operand counts
        sign = 1 if step.name == "max" else -1
        known = [tracer.number(number) for number in step.inputs]
        counts = [c is None or sign * c > 0 for c in known]

    def zero(zeros: list[np.ndarray]) -> np.ndarray:
        return _all([z for z, count in zip(zeros, counts, strict=True) if count or not any(counts)])

    results = _elementwise(tracer, step, operands, zero)
    if step.name in ("convert_element_type", "copy", "stop_gradient", "name", "reduce_precision"):
        results = [results[0]._replace(total=operands[0].total)]
    return results


@rule(*ZERO_IF_ANY.split())
def _zero_if_any(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    if step.name == "mul":
        for i in (0, 1):
            _mean(tracer, step, operands[i], tracer.number(step.inputs[1 - i]), -1)
    return _elementwise(tracer, step, operands, _any)


@rule(*ZERO_NEVER.split())
def _zero_never(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    return _elementwise(tracer, step, operands, _never)


@rule(*POLE.split())
def _pole(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    for units, zero in zip(operands[0].units, operands[0].zero, strict=True):
        tracer.labels.mark(units[:, zero], f"{step.name} of 0")
    return _elementwise(tracer, step, operands, _never)


@rule("atan2")
def _angle(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    # The angle of (0, 0) is 0 or π, by the signs of the zeros, and 0 may be divided by
    y, x = operands
    for a, units in enumerate(y.units):
        both = y.zero[a] & (x.zero[a] if x.shape else x.nil)
        tracer.labels.mark(units[:, both], "atan2 of 0")
    return _elementwise(tracer, step, operands, _never)


@rule("div", "rem", "pow")
def _division(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    # Of a power it is the base that must not be 0, lest the exponent is negative
    place = 0 if step.name == "pow" else 1
    exponent = tracer.number(step.inputs[1]) if step.name == "pow" else None
    if exponent is not None and exponent > 0:
        return _elementwise(tracer, step, operands, lambda zeros: zeros[0])
    for units, zero in zip(operands[place].units, operands[place].zero, strict=True):
        tracer.labels.mark(units[:, zero], f"{step.name} by 0")
    if step.name == "div":
        _mean(tracer, step, operands[0], tracer.number(step.inputs[1]), 1)
    if step.name == "pow":
        return _elementwise(tracer, step, operands, _never)
    return _elementwise(tracer, step, operands, lambda zeros: zeros[0])


@rule("integer_pow")
def _integer_pow(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    if step.params["y"] > 0:
        return _elementwise(tracer, step, operands, _all)
    return _pole(tracer, step, operands)


def _mean(tracer: Tracer, step: Step, summed: Value, by: float | None, power: int) -> None:
    """Notes a sum over n units that is divided by n: the mean of the units that are left is another."""
    if not by or summed.total is None or not np.isclose(by**power, summed.total[0]):
        return
    tracer.means[step.outputs[0]] = summed.total[1]
    for units in summed.total[1]:
        tracer.labels.mark(units, "a mean over it")


@rule("select_n")
def _select(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    return _elementwise(tracer, step, operands, lambda zeros: _all(zeros[1:]))


@rule("clamp")
def _clamp(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    low, high = (tracer.number(step.inputs[i]) for i in (0, 2))
    through = low is not None and high is not None and low <= 0 <= high
    return _elementwise(tracer, step, operands, (lambda zeros: zeros[1]) if through else _never)


@rule("optimization_barrier")
def _barrier(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    return list(operands)

"""Rules for random numbers and their keys."""

import numpy as np

from distill_jax.compress.units._trace.program import Step
from distill_jax.compress.units._trace.rules import Tracer, Value, fixed, rule, value


@rule("random_bits")
def _random_bits(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    """Makes new units: which number stands where is no matter as long as each unit has its own."""
    keys = [tracer.settle(axis, f"keys of {step.name}") for axis in operands[0].axes]
    return [value([*keys, *(tracer.fresh(n) for n in step.params["shape"])])]


@rule("rng_bit_generator")
def _rng_bit_generator(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    key = [tracer.settle(axis, f"keys of {step.name}") for axis in operands[0].axes]
    return [value(key), value(tracer.fresh(n) for n in step.params["shape"])]


@rule("random_seed", "random_wrap", "random_unwrap", "random_split", "random_fold_in", "random_clone")
def _key(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    for operand in operands:
        for axis in operand.axes:
            tracer.settle(axis, f"keys of {step.name}")
    return [value(fixed(n) for n in tracer.avals[number].shape) for number in step.outputs]


@rule("bitcast_convert_type")
def _bitcast(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    (operand,) = operands
    if operand.shape != tracer.avals[step.outputs[0]].shape:
        return None
    # A zero may be −0, whose bits are not 0
    return [value((units, np.zeros_like(zero)) for units, zero in operand.axes)]

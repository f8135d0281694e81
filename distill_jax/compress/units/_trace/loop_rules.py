"""Rules for loops, choices, and primitives of which a plain program is known."""

from typing import Any

from distill_jax import _jaxpr
from distill_jax.compress.units._trace.program import Program, Step
from distill_jax.compress.units._trace.rules import Tracer, Value, fixed, rule, value


def inner(tracer: Tracer, program: Program, inputs: list[Value]) -> list[Value]:
    """Finds the labels of the outputs of a program within a step."""
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
    consts, carries = _jaxpr.scan_sizes(step.params)
    program = step.bodies[0]
    each = []
    for operand in operands[consts + carries :]:
        tracer.settle(operand.axis(0), "gone through by scan")
        each.append(Value(operand.units[1:], operand.zero[1:], operand.nil))
    stacked: list[Value] = []

    def body(carry: list[Value]) -> list[Value]:
        outputs = inner(tracer, program, [*operands[:consts], *carry, *each])
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
        inner(tracer, condition, [*operands[:first], *carry])
        return inner(tracer, body, [*consts, *carry])

    return _loop(tracer, [v._replace(total=None, repeats=()) for v in start], step.name, both)


@rule("cond")
def _cond(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    results: list[Value] = []
    for program in step.bodies:
        outputs = inner(tracer, program, operands[1:])
        results = (
            [_agree(tracer, a, b, step.name) for a, b in zip(results, outputs, strict=True)]
            if results
            else [v._replace(total=None) for v in outputs]
        )
    return results


def own(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    """The rule for a user's primitive: units go the way that they go in its plain program."""
    return inner(tracer, step.bodies[0], [v._replace(total=None) for v in operands])

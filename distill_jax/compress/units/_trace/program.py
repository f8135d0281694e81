"""A traced program as one list of steps, in which calls are written out and each value has a number."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from jax.extend import core

from distill_jax import _jaxpr

SYMBOL = 8  # the number in the place of a symbol
BODIES = {
    "scan": ("jaxpr",), "while": ("cond_jaxpr", "body_jaxpr"), "cond": ("branches",), "shard_map": ("jaxpr",),
}  # fmt: skip
# Calls that say more than their body computes: its derivative, or what of it is stored for the derivative
DERIVED = "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint"

# What JAX computes of constant indices: one of −1 is counted from the end, for which it needs the size of the axis
FOLDED: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "lt": np.less, "ge": np.greater_equal,
    "select_n": lambda which, *cases: cases[int(which)],
}  # fmt: skip


class Own(NamedTuple):
    """What a user says of a primitive of their own.

    Attributes:
      reference: computes the same in plain JAX: ``(*operands, **parameters) -> result or results``.
      run: computes the same for operands of any sizes, or None to run the reference.
    """

    reference: Callable[..., Any]
    run: Callable[..., Any] | None


OWN: dict[str, Own] = {}


class Step(NamedTuple):
    """One operation on values, which are given by their numbers.

    Attributes:
      name: of the primitive, see :func:`name_of`.
      primitive: the primitive.
      params: its parameters.
      inputs: the numbers of its operands.
      outputs: the numbers of its results.
      bodies: the programs within a loop or a choice.
      source: the tracebacks of the code that the operation comes from, of the calls around it first.
      symbolic: the parameters as they are, where ``params`` has numbers in the place of symbolic sizes.
    """

    name: str
    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bodies: tuple["Program", ...] = ()
    source: tuple[Any, ...] = ()
    symbolic: dict[str, Any] | None = None


@dataclass(eq=False)
class Program:
    """A list of steps, and which values go in and come out. Steps that nothing depends on are left out.

    Attributes:
      inputs: the numbers of the inputs.
      outputs: the numbers of the outputs.
      steps: the steps in their order.
      avals: shape and dtype of each value, by number.
      constants: the values of constants, by number. Inner programs use them, too.
    """

    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    avals: list[Any] = field(default_factory=list)
    constants: dict[int, Any] = field(default_factory=dict)


def flatten(jaxpr: Any, *, calls: bool = False) -> Program:
    """Reads a closed jaxpr into a :class:`Program`.

    Args:
      jaxpr: the closed jaxpr.
      calls: whether calls with a derivative of their own, or that are computed again for the derivative, are
        steps with a body; else they are written out as all other calls are.
    """
    return _read(jaxpr, [], {}, calls)


def _read(closed: Any, avals: list[Any], constants: dict[int, Any], calls: bool) -> Program:
    program = Program(avals=avals, constants=constants)
    needed: set[int] = set()
    effects: set[int] = set()

    def new(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def constant(value: Any, aval: Any) -> int:
        number = new(aval)
        constants[number] = value
        return number

    def run(jaxpr: Any, consts: Any, inputs: list[int], source: tuple[Any, ...] = ()) -> list[int]:
        values = dict(zip(jaxpr.invars, inputs, strict=True))
        for var, value in zip(jaxpr.constvars, consts, strict=True):
            values[var] = value if isinstance(value, int) else constant(value[0], var.aval)

        def read(atom: Any) -> int:
            if isinstance(atom, core.Literal):
                return constant(atom.val, atom.aval)
            return values[atom]

        for eqn in jaxpr.eqns:
            name, operands = name_of(eqn), [read(atom) for atom in eqn.invars]
            if name in FOLDED and all(_is_index(constants.get(n)) for n in operands):
                result = FOLDED[name](*(np.asarray(constants[n]) for n in operands))
                values[eqn.outvars[0]] = constant(
                    np.asarray(result, eqn.outvars[0].aval.dtype), eqn.outvars[0].aval
                )
                continue
            body, here = _jaxpr.body_of(eqn), (*source, eqn.source_info.traceback)
            whole = _is_relu(eqn) or (calls and name in DERIVED)
            if body and not whole:
                outputs = run(body[0], [(c,) for c in body[1]], operands, here)
            else:
                outputs = [new(var.aval) for var in eqn.outvars]
                bodies: tuple[Program, ...] = ()
                if name in BODIES:
                    inner: Any = [eqn.params[key] for key in BODIES[name]]
                    inner = inner[0] if isinstance(inner[0], tuple) else inner
                    bodies = tuple(_read(_closed(each), avals, constants, calls) for each in inner)
                elif name in OWN:
                    bodies = (_read(_reference(name, eqn), avals, constants, calls),)
                elif body and not _is_relu(eqn):
                    bodies = (_read(core.ClosedJaxpr(*body), avals, constants, calls),)
                name = "relu" if _is_relu(eqn) else name
                if eqn.effects:
                    effects.add(len(program.steps))
                program.steps.append(
                    Step(name, eqn.primitive, eqn.params, tuple(operands), tuple(outputs), bodies, here)
                )
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    program.inputs = [new(var.aval) for var in closed.jaxpr.invars]
    program.outputs = run(closed.jaxpr, [(c,) for c in closed.consts], program.inputs)
    needed.update(program.outputs)
    steps = []
    for i, step in reversed([*enumerate(program.steps)]):
        if i in effects or not needed.isdisjoint(step.outputs):
            steps.append(step)
            needed.update(step.inputs)
    program.steps = steps[::-1]
    return program


def _is_index(value: Any) -> bool:
    return value is not None and np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iub"


def name_of(eqn: Any) -> str:
    """Returns the name of an equation's primitive; with that of the kernel, where one primitive has many.

    >>> [name_of(eqn) for eqn in jax.make_jaxpr(jax.numpy.sin)(1.0).eqns]
    ['sin']
    """
    name, params = eqn.primitive.name, eqn.params
    if name == "pallas_call":
        return f"{name}:{params.get('name') or params['jaxpr'].debug_info.func_name}"
    return f"{name}:{params['target_name']}" if name == "ffi_call" else name


def _reference(name: str, eqn: Any) -> Any:
    """Traces the user's plain program for a primitive of their own, on operands of the equation's shapes."""
    operands = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in eqn.invars]
    closed, _ = _jaxpr.trace(lambda *operands: OWN[name].reference(*operands, **eqn.params), *operands)
    expected = [(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
    given = [(aval.shape, aval.dtype) for aval in closed.out_avals]
    if given != expected:
        raise ValueError(
            f"reference: that of {name!r} gives {_text(given)} where the primitive gives {_text(expected)}: it must "
            "compute what the primitive computes"
        )
    return closed


def _text(avals: Sequence[tuple[Any, Any]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in avals)


def _closed(jaxpr: Any) -> Any:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _is_relu(eqn: Any) -> bool:
    """Says whether a call is ``jax.nn.relu``, whose derivative at 0 is not that of a maximum."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    jaxpr = eqn.params["call_jaxpr"].jaxpr
    if jaxpr.debug_info.func_name != "relu":
        return False
    while len(jaxpr.eqns) == 1 and jaxpr.eqns[0].primitive.name in ("jit", "pjit"):
        jaxpr = jaxpr.eqns[0].params["jaxpr"].jaxpr
    if [eqn.primitive.name for eqn in jaxpr.eqns] != ["max"]:
        return False
    x, zero = jaxpr.eqns[0].invars
    return x in jaxpr.invars and isinstance(zero, core.Literal) and bool(np.all(zero.val == 0))


def numbered(program: Program, avals: list[Any] | None = None) -> Program:
    """Returns a program with a number in the place of each symbolic size, such as that of the batch."""
    if avals is None:
        avals = [_numbered_aval(aval) for aval in program.avals]
        if all(new is old for new, old in zip(avals, program.avals, strict=True)):
            return program
    steps = [
        step._replace(
            params={name: _number(option) for name, option in step.params.items()},
            bodies=tuple(numbered(body, avals) for body in step.bodies),
            symbolic=step.params,
        )
        for step in program.steps
    ]
    return Program(program.inputs, program.outputs, steps, avals, program.constants)


def _number(option: Any) -> Any:
    if export.is_symbolic_dim(option):
        size: Any = option
        # JAX has no public function that puts a number in the place of a symbol
        return size._evaluate(defaultdict(lambda: SYMBOL))
    return type(option)(map(_number, option)) if type(option) in (tuple, list) else option


def _numbered_aval(aval: Any) -> Any:
    shape = tuple(map(_number, aval.shape))
    return aval if shape == aval.shape else jax.ShapeDtypeStruct(shape, aval.dtype)


def evaluate(
    program: Program,
    run: Callable[[Step, list[Any]], Sequence[Any]],
    constant: Callable[[int], Any],
    values: Sequence[Any],
) -> list[Any]:
    """Runs a program.

    Args:
      program: the steps.
      run: ``(step, operands) -> results``.
      constant: the value of a constant, by number.
      values: the program's inputs.
    """
    known = dict(zip(program.inputs, values, strict=True))

    def read(number: int) -> Any:
        return known[number] if number in known else constant(number)

    for step in program.steps:
        results = run(step, [read(number) for number in step.inputs])
        known.update(zip(step.outputs, results, strict=True))
    return [read(number) for number in program.outputs]


def bind(step: Step, operands: Sequence[Any], **changed: Any) -> list[Any]:
    """Applies a step's primitive to values: its results, always as a list.

    Args:
      step: the operation.
      operands: the values.
      changed: parameters of the primitive that differ.
    """
    options = step.primitive.get_bind_params({**step.params, **changed})
    results = step.primitive.bind(*operands, **options)
    return list(results) if step.primitive.multiple_results else [results]

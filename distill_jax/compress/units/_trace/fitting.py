"""Adapts any program to given sizes of its inputs and outputs, with the derivatives of the calls within it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compress.units._trace.adapted import ADAPTED, Adapted
from distill_jax.compress.units._trace.elementwise_rules import POLES
from distill_jax.compress.units._trace.loop_rules import inner
from distill_jax.compress.units._trace.program import DERIVED, Step, bind, flatten, numbered
from distill_jax.compress.units._trace.rules import Tracer, Value, fixed, rule, value

Masks = Sequence[np.ndarray]


class MisfitError(ValueError):
    """A program cannot have these sizes; the message says why, as a clause."""


class Exact(NamedTuple):
    """What is said of an input whose positions are removed as if they were set to zero.

    Attributes:
      masks: for each axis, bool ``[positions]``, false for those that are removed so.
      silent: for each axis, bool ``[positions]``, whether setting the units of a position to zero makes it zero.
    """

    masks: Masks
    silent: Masks


def fit(
    closed: Any,
    inputs: Sequence[Masks | None],
    outputs: Sequence[Masks | None],
    *,
    calls: bool = True,
    exact: Sequence[Exact] = (),
) -> Adapted:
    """Adapts a program so that its inputs and outputs have the given positions alone.

    Positions that go along an axis have labels, and all others stay. What a label has in common with a
    position that stays, stays; all other labels of positions that go are removed.

    Args:
      closed: the closed jaxpr, traced in its old sizes.
      inputs: for each input, for each of its axes, bool ``[positions]``, true for those that stay; None for all.
      outputs: for the first outputs the same. The others are whatever the inputs make.
      calls: whether calls with derivatives of their own keep them.
      exact: for the first inputs, which positions must be removed exactly.

    Returns:
      The adapted program.

    Raises:
      MisfitError: if the positions cannot be removed, or not exactly.
    """
    symbolic = flatten(closed, calls=calls)
    program = numbered(symbolic)
    tracer = Tracer()
    ends: list[tuple[np.ndarray, np.ndarray]] = []
    removed_exactly: list[tuple[np.ndarray, np.ndarray]] = []
    for i, (number, masks) in enumerate(zip(program.inputs, inputs, strict=True)):
        axes = []
        for a, n in enumerate(program.avals[number].shape):
            mask = np.ones(n, bool) if masks is None else masks[a]
            zero = exact[i].silent[a] if i < len(exact) else np.ones(n, bool)
            # An axis that stays whole has labels too: what pads it may go
            axes.append(fixed(n) if masks is None else (tracer.labels.fresh(n), zero))
            if i < len(exact):
                removed_exactly.append((axes[-1][0], exact[i].masks[a]))
            ends.append((axes[-1][0], mask))
        tracer.values[number] = value(axes)
    tracer.run(program)
    for i, masks in enumerate(outputs):
        for a, units in enumerate(tracer.result(program, i).units):
            ends.append((units, np.ones(units.shape[1], bool) if masks is None else masks[a]))
    removed = _removed(tracer, ends)
    small = Adapted(program, tracer, [removed])
    small.avals = symbolic.avals
    for units, mask in ends:
        wrong = small.mask(units) != mask
        if wrong.any():
            reason = _why(tracer, units[:, wrong])
            raise MisfitError(f"the kept units are not the only ones that must stay ({reason})")
    gone = _removed(tracer, removed_exactly)
    for nodes, reason in tracer.labels.inexact:
        # Where a silenced unit divides, the silenced network has no finite result to compare with
        if not reason.endswith(POLES) and np.isin(tracer.labels.resolve(nodes[None]), gone).any():
            raise MisfitError(f"units that are gone would still count if they were zero ({reason})")
    return small


def _removed(tracer: Tracer, ends: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Returns the nodes of positions that go, except those that a position that stays has, too."""
    stays, goes = (np.zeros(tracer.labels.count + 1, bool) for _ in range(2))
    for nodes, _ in tracer.labels.frozen:
        stays[tracer.labels.resolve(nodes[None])] = True
    for units, mask in ends:
        stays[tracer.meaning(units)[:, mask]] = True
        goes[tracer.meaning(units)[:, ~mask]] = True
    stays[-1] = True  # what NONE reads
    return np.flatnonzero(goes & ~stays)


def _why(tracer: Tracer, units: np.ndarray) -> str:
    held = tracer.labels.resolve(units)
    for nodes, reason in tracer.labels.frozen:
        if np.isin(tracer.labels.resolve(nodes[None]), held[held >= 0]).any():
            return reason
    return "they belong to other positions there"


@rule(*DERIVED)
def _call(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    (body,) = step.bodies
    return inner(tracer, body, operands)


def _floating(small: Adapted, numbers: Sequence[int]) -> list[int]:
    """Says which of the values have a derivative."""
    return [i for i, n in enumerate(numbers) if jnp.issubdtype(small.program.avals[n].dtype, jnp.inexact)]


def _chosen(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[i] for i in places]


def _like(aval: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


class _Derivative:
    """The derivative of a call, adapted as the program is: traced in its old sizes from the call itself.

    Args:
      small: the program.
      step: the call.
    """

    def __init__(self, small: Adapted, step: Step):
        self.small, self.step = small, step
        self.inputs, self.outputs = _floating(small, step.inputs), _floating(small, step.outputs)
        self.operands = [small.operand(step, i) for i in range(len(step.inputs))]
        self.results = [small.output(step, i) for i in range(len(step.outputs))]
        self.avals = [_like(small.avals[number]) for number in step.inputs]
        self.programs: dict[str, Any] = {}

    def fit(self, function: Any, arguments: Any, inputs: Any, outputs: Any) -> Adapted:
        closed = jax.make_jaxpr(function)(*arguments)
        try:
            return fit(closed, inputs, outputs)
        except MisfitError as error:
            name = self.step.params["call_jaxpr"].jaxpr.debug_info.func_name
            raise ValueError(
                f"graph: the derivative that {name} defines cannot be computed without the units that are gone "
                f"({error}): keep all units that it uses, or build the network anew with smaller widths"
            ) from None

    def called(self, operands: Sequence[Any]) -> Any:
        """The call as a function of the operands that have a derivative, to the results that have one."""

        def function(*floating: Any) -> tuple[list[Any], list[Any]]:
            values = dict(enumerate(operands)) | dict(zip(self.inputs, floating, strict=True))
            results = bind(self.step, [values[i] for i in range(len(operands))])
            return _chosen(results, self.outputs), results

        return function

    def forward_mode(self) -> Adapted:
        """The program ``(operands, tangents) -> (results, tangents)``."""
        if "jvp" not in self.programs:

            def jvp(operands: Any, tangents: Any) -> Any:
                primals = _chosen(operands, self.inputs)
                _, changes, results = jax.jvp(self.called(operands), primals, tangents, has_aux=True)
                return results, changes

            arguments = self.avals, _chosen(self.avals, self.inputs)
            inputs = [*self.operands, *_chosen(self.operands, self.inputs)]
            outputs = [*self.results, *_chosen(self.results, self.outputs)]
            self.programs["jvp"] = self.fit(jvp, arguments, inputs, outputs)
        return self.programs["jvp"]

    def reverse_mode(self) -> tuple[Adapted, Adapted]:
        """The programs ``operands -> (results, residuals)`` and ``(residuals, cotangents) -> cotangents``."""
        if "vjp" not in self.programs:
            structure: Any = None

            def forward(*operands: Any) -> Any:
                nonlocal structure
                primals = _chosen(operands, self.inputs)
                _, pull, results = jax.vjp(self.called(operands), *primals, has_aux=True)
                residuals, structure = jax.tree.flatten(pull)
                return results, residuals

            def backward(residuals: Any, cotangents: Any) -> Any:
                return jax.tree.unflatten(structure, residuals)(cotangents)

            first = self.fit(forward, self.avals, self.operands, self.results)
            ends = range(len(first.program.outputs))[len(self.results) :]
            avals = [first.avals[n] for n in first.program.outputs]
            kept = [first.stays(first.tracer.result(first.program, i)) for i in ends]
            second = self.fit(
                backward,
                ([_like(avals[i]) for i in ends], [_like(avals[i]) for i in self.outputs]),
                [*kept, *_chosen(self.results, self.outputs)],
                _chosen(self.operands, self.inputs),
            )
            self.programs["vjp"] = first, second
        return self.programs["vjp"]


def _derivative(small: Adapted, step: Step) -> _Derivative:
    key = step.outputs[0]
    if key not in small.derivatives:
        small.derivatives[key] = _Derivative(small, step)
    return small.derivatives[key]


def _custom_jvp(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    own = _derivative(small, step)

    @jax.custom_jvp
    def call(*operands: Any) -> list[Any]:
        return small.run(step.bodies[0], operands)

    @call.defjvp
    def jvp(operands: Any, tangents: Any) -> Any:
        program = own.forward_mode()
        found = program.run(program.program, [*operands, *_chosen(tangents, own.inputs)])
        results, changes = found[: len(step.outputs)], found[len(step.outputs) :]
        all_changes = [np.zeros(np.shape(result), jax.dtypes.float0) for result in results]
        for i, change in zip(own.outputs, changes, strict=True):
            all_changes[i] = change
        return results, all_changes

    return call(*operands)


def _custom_vjp(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    own = _derivative(small, step)
    count = len(step.outputs)

    @jax.custom_vjp
    def call(*operands: Any) -> list[Any]:
        return small.run(step.bodies[0], operands)

    def forward(*operands: Any) -> Any:
        first, _ = own.reverse_mode()
        found = first.run(first.program, operands)
        return found[:count], found[count:]

    def backward(residuals: Any, changes: Any) -> Any:
        _, second = own.reverse_mode()
        found = second.run(second.program, [*residuals, *_chosen(changes, own.outputs)])
        all_changes: list[Any] = [None] * len(step.inputs)
        for i, change in zip(own.inputs, found, strict=True):
            all_changes[i] = change
        return tuple(all_changes)

    call.defvjp(forward, backward)
    return call(*operands)


def _remat(small: Adapted, step: Step, operands: list[Any]) -> Sequence[Any]:
    options = {name: step.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *operands: small.run(step.bodies[0], operands), **options)(*operands)


ADAPTED |= {
    "custom_jvp_call": _custom_jvp, "custom_vjp_call": _custom_vjp,
    "remat2": _remat, "checkpoint": _remat,
}  # fmt: skip

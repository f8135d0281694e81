"""What a rule is, and the tracer that applies one to each step of a program.

A rule says what a primitive does to units. It takes the tracer, the step and the operands as :class:`Value`,
and returns the results. It ties the positions of the operands that belong together, and moves their labels to
the results. A primitive without a rule freezes all axes that it touches. The rules themselves stand in the
modules ``…_rules``.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from distill_jax.compress.units._trace.labels import Labels
from distill_jax.compress.units._trace.program import Program, Step


class Value(NamedTuple):
    """What is known of a value in a program.

    Attributes:
      units: for each axis, its label array ``[layers, positions]``.
      zero: for each axis, bool ``[positions]``: whether the value is 0 at a position if any unit of the
        position is silenced.
      nil: whether the whole value is 0.
      total: for a sum over units, perhaps reshaped: the number of its terms, and their labels. (If it is
        later divided by that number, it is a mean, and the number counts the units.)
      repeats: for each axis, whether the value repeats along it, so that each step that uses the value can
        have it in a size of its own (:meth:`Tracer.operand`). Such an axis has no labels here.
    """

    units: tuple[np.ndarray, ...]
    zero: tuple[np.ndarray, ...]
    nil: bool = False
    total: tuple[int, tuple[np.ndarray, ...]] | None = None
    repeats: tuple[bool, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The value's shape."""
        return tuple(units.shape[1] for units in self.units)

    def axis(self, a: int) -> "Axis":
        """Returns the labels and zeros of one axis."""
        return self.units[a], self.zero[a]

    @property
    def axes(self) -> list["Axis"]:
        """The labels and zeros of all axes."""
        return [*zip(self.units, self.zero, strict=True)]

    def repeating(self, a: int) -> bool:
        """Says whether the value repeats along an axis."""
        return bool(self.repeats) and self.repeats[a]


Axis = tuple[np.ndarray, np.ndarray]


def value(
    axes: Iterable[Axis], *, nil: bool = False, total: Any = None, repeats: Iterable[bool] = ()
) -> Value:
    """Makes a value from its axes. Positions without a unit count as zero, because none can be silenced.

    Args:
      axes: the labels and zeros of each axis.
      nil: whether the whole value is 0.
      total: see :class:`Value`.
      repeats: see :class:`Value`.
    """
    pairs = [(units, zero | nil | (units < 0).all(0)) for units, zero in axes]
    again = tuple(repeats)
    for a, repeat in enumerate(again):
        if repeat:
            pairs[a] = fixed(pairs[a][0].shape[1])
    return Value(tuple(u for u, _ in pairs), tuple(z for _, z in pairs), nil, total, again)


def fixed(size: int) -> Axis:
    """Makes an axis whose positions always stay."""
    return np.zeros((0, size), np.int64), np.ones(size, bool)


class Tracer:
    """Runs a program on labels in the place of numbers."""

    def __init__(self) -> None:
        self.labels = Labels()
        self.values: dict[int, Value] = {}
        self.notes: list[str] = []
        # Steps that divide a sum over units by their number: the results' numbers → labels summed
        self.means: dict[int, tuple[np.ndarray, ...]] = {}
        # What repeats along an axis has labels for each use: (result of the step, place) → labels
        self.uses: dict[tuple[int, int], tuple[np.ndarray, ...]] = {}
        self.meanings: dict[int, np.ndarray] = {}
        self.constants: dict[int, Any] = {}
        self.avals: list[Any] = []

    def run(self, program: Program) -> None:
        """Finds the labels of every value of the program; its inputs have theirs already."""
        self.constants, self.avals = program.constants, program.avals
        for step in program.steps:
            operands = [self.operand(step, i, program) for i in range(len(step.inputs))]
            rule = RULES.get(step.name)
            results = None if rule is None else rule(self, step, operands)
            if results is None:
                shapes = [program.avals[number].shape for number in step.outputs]
                results = self.freeze_all(step, operands, shapes)
            for number, result in zip(step.outputs, results, strict=True):
                expected = program.avals[number].shape
                assert result.shape == expected, (step.name, result.shape, expected)
                self.values[number] = result

    def read(self, number: int, program: Program) -> Value:
        """Returns the labels of a value. Constants have labels along axes along which they are constant."""
        if number not in self.values:
            if number in program.constants:
                self.values[number] = self.constant(program.constants[number])
            else:  # in a loop that has no rule: nothing in it changes
                self.values[number] = value(map(fixed, program.avals[number].shape))
        return self.values[number]

    def operand(self, step: Step, place: int, program: Program) -> Value:
        """Returns the labels of an operand, with labels of its own along axes along which it repeats."""
        key = step.outputs[0] if step.outputs else -1, place
        return self._used(self.read(step.inputs[place], program), key)

    def result(self, program: Program, place: int) -> Value:
        """Returns the labels of an output of a program, as :meth:`operand` does for a step."""
        found = self._used(self.read(program.outputs[place], program), (-2 - id(program), place))
        return found._replace(repeats=())

    def _used(self, found: Value, key: tuple[int, int]) -> Value:
        if not any(found.repeats):
            return found
        if key not in self.uses:
            self.uses[key] = tuple(
                self.labels.fresh(units.shape[1]) if repeat else units
                for units, repeat in zip(found.units, found.repeats, strict=True)
            )
        zero = tuple(
            np.full(z.shape, found.nil) if r else z for z, r in zip(found.zero, found.repeats, strict=True)
        )
        return found._replace(units=self.uses[key], zero=zero)

    def constant(self, array: Any) -> Value:
        """Labels a constant: it repeats along an axis along which it does not vary."""
        if jax.dtypes.issubdtype(jax.numpy.asarray(array).dtype, jax.dtypes.extended):
            return value(fixed(n) for n in np.shape(array))
        array = np.asarray(array)
        nil = bool((array == 0).all())
        same = [n > 1 and (array == array.take([0], a)).all() for a, n in enumerate(array.shape)]
        return value((fixed(n) for n in array.shape), nil=nil, repeats=same)

    def meaning(self, units: np.ndarray) -> np.ndarray:
        """Resolves the labels of an axis, once all is known, and remembers what they mean."""
        key = id(units)
        if key not in self.meanings:
            self.meanings[key] = self.labels.resolve(units)
        return self.meanings[key]

    def number(self, number: int) -> float | None:
        """Returns the value of a constant scalar, and None for any other value."""
        array = self.constants.get(number)
        if array is None or np.size(array) != 1 or not np.isrealobj(np.asarray(array)):
            return None
        return float(np.asarray(array).reshape(()))

    def freeze_all(self, step: Step, operands: Sequence[Value], shapes: Sequence[Any]) -> Any:
        """Freezes all axes of operands and results, where there is no rule."""
        reason = f"no rule for {step.name}"
        touched = [units for operand in operands for units in operand.units if units.size]
        for units in touched:
            self.labels.freeze(units, reason)
        self.notes.append(f"{reason}: its {len(step.inputs)} operands, {len(touched)} axes")
        results = []
        for shape in shapes:
            axes = [(self.labels.fresh(n), np.zeros(n, bool)) for n in shape]
            for units, _ in axes:
                self.labels.freeze(units, reason)
            results.append(value(axes))
        return results

    def settle(self, axis: Axis, reason: str) -> Axis:
        """Freezes an axis, and returns one without units for what comes after."""
        self.labels.freeze(axis[0], reason)
        return fixed(axis[0].shape[1])

    def join(self, axes: Sequence[Axis], reason: str) -> np.ndarray:
        """Ties axes that correspond position by position, and returns their labels."""
        first = axes[0][0]
        for units, _ in axes[1:]:
            self.labels.unify(first, units, reason)
        return first

    def contract(self, a: Axis, b: Axis | None, reason: str) -> None:
        """Notes a sum over the products of two axes, or over one: exact if silent units add nothing."""
        silent = a[1] if b is None else a[1] | b[1]
        if b is not None:
            self.labels.unify(a[0], b[0], reason)
        self.labels.mark(a[0][:, ~silent], reason)

    def fresh(self, size: int) -> Axis:
        """Makes an axis of new units."""
        if size == 1:
            return fixed(1)
        return self.labels.fresh(size), np.zeros(size, bool)


Rule = Callable[[Tracer, Step, list[Value]], list[Value] | None]
R = TypeVar("R", bound=Rule)
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[R], R]:
    """Registers a function as the rule for primitives of these names."""

    def register(function: R) -> R:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register

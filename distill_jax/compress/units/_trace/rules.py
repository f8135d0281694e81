"""Rules for what each primitive does to units: one rule per primitive, in :data:`RULES`.

A rule takes the tracer, the step and the operands as :class:`Value`, and returns the results. It ties the
positions of the operands that belong together, and moves their labels to the results. A primitive without a
rule freezes all axes that it touches.
"""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from distill_jax.compress.units._trace.labels import Labels, merge
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

    def axis(self, a: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the labels and zeros of one axis."""
        return self.units[a], self.zero[a]


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
    """Runs a program on labels in the place of numbers.

    Args:
      training: whether the program is one of training mode, where random masks may have other numbers
        once units are gone.
    """

    def __init__(self, *, training: bool = False) -> None:
        self.rules = RULES | TRAINING_RULES if training else RULES
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
            rule = self.rules.get(step.name)
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
TRAINING_RULES: dict[str, Rule] = {}


def rule(*names: str, training: bool = False) -> Callable[[R], R]:
    """Registers a function as the rule for primitives of these names, or only for those of training mode."""

    def register(function: R) -> R:
        (TRAINING_RULES if training else RULES).update(dict.fromkeys(names, function))
        return function

    return register


# Elementwise operations: their result is 0 where all operands are 0, where any operand is 0, or nowhere.
ZERO_IF_ALL = (
    "add add_any sub neg abs sign floor ceil round real imag conj sin tan tanh sinh asin atan "
    "asinh atanh erf expm1 log1p sqrt cbrt square max min or xor relu copy stop_gradient "
    "convert_element_type reduce_precision name nextafter bessel_i1e"
)
ZERO_IF_ANY = "mul and"
ZERO_NEVER = (
    "exp exp2 cos cosh acos acosh logistic erfc erf_inv eq ne lt le gt ge not is_finite "
    "atan2 shift_left shift_right_logical shift_right_arithmetic population_count clz bessel_i0e"
)
# Operations that are not finite where an operand (the last) is 0: a silenced unit then spoils sums
POLE = "log rsqrt lgamma digamma"
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


@rule("random_bits", training=True)
def _random_bits(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    if operands[0].shape:
        return None
    return [value(tracer.fresh(n) for n in step.params["shape"])]


@rule("bitcast_convert_type", training=True)
def _bitcast(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value] | None:
    same = operands[0].shape == tracer.avals[step.outputs[0]].shape
    return _elementwise(tracer, step, operands, _never) if same else None


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
            (u, z & zero_stays & (a != along)) for a, (u, z) in enumerate(_axes(operand))
        )
    ]  # fmt: skip


def _axes(operand: Value) -> list[Axis]:
    return [operand.axis(a) for a in range(len(operand.shape))]


@rule("sort")
def _sort(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    along = step.params["dimension"]
    axes = []
    for a in range(len(operands[0].shape)):
        each = [operand.axis(a) for operand in operands]
        if a == along:
            each = [tracer.settle(axis, f"ordered by {step.name}") for axis in each]
        axes.append((tracer.join(each, step.name), _all([zero for _, zero in each])))
    return [value(axes) for _ in operands]


@rule("top_k")
def _top_k(tracer: Tracer, step: Step, operands: list[Value]) -> list[Value]:
    axes = _axes(operands[0])
    along = step.params.get("axis", -1) % len(axes)
    tracer.settle(axes[along], f"ordered by {step.name}")
    axes[along] = fixed(step.params["k"])
    return [value(axes), value((u, np.zeros_like(z)) for u, z in axes)]

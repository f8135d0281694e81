"""Interpolation of the parameters of student and teacher: ŷ = g(x; λθₜ + (1 − λ)θ_g).

λ, the transfer coefficient, lies in [0, 1]. The formula can be used in two ways:

- :func:`pull` moves the student's parameters towards the teacher's before each step of the student. The
  trained model is the student.
- :func:`through` takes the loss at the interpolated parameters, and its gradient flows through the
  interpolation to the student's parameters. The trained model is the interpolated network, :func:`mix`.

λ is a constant or an optax schedule (``optax.linear_schedule``, ``cosine_decay_schedule``,
``exponential_decay``), or a dict of these by path pattern (:func:`distill_jax.weights.scalars`). The
teacher is trained together with the student, or beforehand and frozen.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from distill_jax import weights
from distill_jax._checks import check_fractions, check_function, check_tx
from distill_jax._model import ApplyFn, Model, PyTree, check_model
from distill_jax.train.objectives import Schedule, at
from distill_jax.train.step import LossFn, Metrics, Step, TrainState

Rate = Schedule | Mapping[str, Schedule]


class Pair(NamedTuple):
    """Teacher and student in training: it takes the place of a ``TrainState`` in epochs and loops.

    Attributes:
      teacher: the teacher's state; it never changes where the teacher is frozen.
      student: the student's state; its step and its key are those of the pair.
    """

    teacher: TrainState
    student: TrainState

    @property
    def step(self) -> jax.Array:
        """The student's step."""
        return self.student.step

    @property
    def key(self) -> jax.Array:
        """The student's random key."""
        return self.student.key

    @property
    def model(self) -> Model:
        """The student."""
        return self.student.model


def pull(
    teacher_step: Step | None, student_step: Step, rate: Rate
) -> Callable[[Pair, Any], tuple[Pair, Metrics]]:
    """Makes a step of both: the teacher's step, then θ_g ← λθₜ + (1 − λ)θ_g, then the student's step.

    Args:
      teacher_step: a step from :func:`distill_jax.train.make_train_step`; None for a frozen teacher.
      student_step: the student's step, with any objective.
      rate: λ in [0, 1], a schedule of it, or a dict of these by path pattern. Schedules count the student's
        steps.

    Returns:
      ``(pair, batch) -> (pair, metrics)``, which runs under ``jit``, ``scan`` and ``vmap`` like any step. The
      metrics are the student's, the teacher's as ``"teacher_loss"`` and so on, and ``"rate"``.

    Raises:
      ValueError: for a constant λ outside [0, 1]; when traced, if the parameters of the two do not fit.

    >>> import optax
    >>> from distill_jax import models, train
    >>> tx, step = optax.sgd(0.1), train.make_train_step(train.supervised(), optax.sgd(0.1))
    >>> def fn(p, x):
    ...     return x @ p
    >>> states = [
    ...     train.init_state(models.from_function(fn, jnp.full((3, 2), w)), tx, jax.random.key(0))
    ...     for w in (1.0, 0.0)
    ... ]
    >>> batch = {"image": jnp.zeros((4, 3)), "label": jnp.zeros(4, int)}
    >>> pair, metrics = pull(step, step, 0.5)(Pair(*states), batch)
    >>> float(pair.student.model.params[0, 0])
    0.5
    """
    _check(rate)
    check_function("student_step", student_step, "state, batch")
    if teacher_step is not None:
        check_function("teacher_step", teacher_step, "state, batch")

    def step(pair: Pair, batch: Any) -> tuple[Pair, Metrics]:
        teacher = pair.teacher
        figures: Metrics = {}
        if teacher_step is not None:
            teacher, figures = teacher_step(teacher, batch)
        share = _at(rate, pair.student.step)
        moved = _interpolate(pair.student.model.params, teacher.model.params, share)
        student = pair.student._replace(model=pair.student.model.replace(params=moved))
        student, metrics = student_step(student, batch)
        figures = {f"teacher_{name}": value for name, value in figures.items()}
        return Pair(teacher, student), {**metrics, **figures, **_shown(share)}

    return step


def join(student: Model, teacher: Model, rate: float | Mapping[str, float]) -> Model:
    """Joins student and teacher into the interpolated network, for :func:`through`.

    Args:
      student: the student.
      teacher: a teacher with parameters of the same paths and shapes.
      rate: the λ at which the model is evaluated, for example in validation: a number in [0, 1], or a dict
        by path pattern. Training uses the λ of :func:`through`, which may be a schedule.

    Returns:
      A model with params and state ``{"student", "teacher"}``. In evaluation it computes the student's
      function at λθₜ + (1 − λ)θ_g. Use :func:`mix` to evaluate at another λ.

    Raises:
      ValueError: for a λ outside [0, 1] or a schedule, or if the parameters do not fit.
    """
    check_model("student", student)
    check_model("teacher", teacher)
    named = rate if isinstance(rate, Mapping) else {None: rate}
    if any(map(callable, named.values())):
        raise ValueError(
            "rate must be the number λ at which the model is evaluated: give a schedule to through"
        )
    _check(rate)
    _interpolate(student.params, teacher.params, rate)
    constant = tuple((pattern, float(x)) for pattern, x in named.items())
    return Model(
        _Interpolated(student.apply_fn, teacher.apply_fn, constant),
        {"student": student.params, "teacher": teacher.params},
        {"student": student.state, "teacher": teacher.state},
    )


@dataclasses.dataclass(frozen=True)
class _Interpolated:
    """The ``apply_fn`` of :func:`join`; the pattern None stands for all parameters."""

    student_fn: ApplyFn
    teacher_fn: ApplyFn
    rates: tuple[tuple[str | None, float], ...]

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        rates: dict[Any, float] = dict(self.rates)
        mixed = _interpolate(params["student"], params["teacher"], rates.get(None, rates))
        outputs, student = self.student_fn(mixed, state["student"], x, key=key)
        return outputs, {**state, "student": student}


def _interpolated(model: Model) -> _Interpolated:
    check_model("model", model)
    if not isinstance(model.apply_fn, _Interpolated):
        raise ValueError("expected a model from interpolation.join, got another one")
    return model.apply_fn


def through(loss_fn: LossFn, rate: Rate, *, teacher_loss: LossFn | None = None) -> LossFn:
    """Builds an objective at λθₜ + (1 − λ)θ_g; its gradient flows to θ_g, scaled by 1 − λ.

    Args:
      loss_fn: the student's objective, of any kind.
      rate: λ in [0, 1], a schedule of it, or a dict of these by path pattern.
      teacher_loss: the teacher's own objective, added to the student's; None for a frozen teacher.

    Returns:
      A ``loss_fn`` for a model from :func:`join`, and the optimizer of :func:`split_tx`. The student's state
      is that of the interpolated network. The metrics are the student's, ``"teacher_error_rate"`` and so on,
      and ``"rate"``.

    Raises:
      ValueError: for a constant λ outside [0, 1].

    >>> from distill_jax import models, train
    >>> def fn(p, x):
    ...     return x @ p
    >>> student, teacher = (models.from_function(fn, p) for p in (jnp.eye(2), jnp.zeros((2, 2))))
    >>> batch = {"image": jnp.eye(2), "label": jnp.arange(2)}
    >>> loss_fn = through(train.supervised(), 0.25)
    >>> loss, _ = loss_fn(join(student, teacher, 0.25), batch, key=None, step=0)
    >>> round(float(loss - jnp.log1p(jnp.exp(-0.75))), 6)
    0.0
    """
    _check(rate)
    check_function("loss_fn", loss_fn, "model, batch, *, key, step")
    if teacher_loss is not None:
        check_function("teacher_loss", teacher_loss, "model, batch, *, key, step")

    def joint_loss(model, batch, *, key, step):
        functions = _interpolated(model)
        keys: Any = (None, None) if key is None else jax.random.split(key)
        share = _at(rate, step)
        teacher = model.params["teacher"]
        mixed = _interpolate(model.params["student"], jax.lax.stop_gradient(teacher), share)
        inside = Model(functions.student_fn, mixed, model.state["student"])
        loss, (student_state, metrics) = loss_fn(inside, batch, key=keys[0], step=step)
        state = {**model.state, "student": student_state}
        metrics = {**metrics, **_shown(share)}
        if teacher_loss is not None:
            outside = Model(functions.teacher_fn, teacher, model.state["teacher"])
            own, (teacher_state, figures) = teacher_loss(outside, batch, key=keys[1], step=step)
            loss += own
            state["teacher"] = teacher_state
            metrics |= {f"teacher_{name}": value for name, value in figures.items()}
            metrics["teacher_loss"] = own
        return loss, (state, metrics)

    return joint_loss


def split_tx(
    student: optax.GradientTransformation, teacher: optax.GradientTransformation | None = None
) -> optax.GradientTransformation:
    """Makes one optimizer of two, for the parts of a model from :func:`join`.

    Args:
      student: the student's optimizer.
      teacher: the teacher's optimizer; None freezes the teacher.

    Returns:
      One transformation for both. Clipping by norm and weight decay act within each part.
    """
    check_tx("student", student)
    if teacher is not None:
        check_tx("teacher", teacher)
    return optax.multi_transform(
        {"student": student, "teacher": teacher or optax.set_to_zero()},
        lambda params: {name: name for name in params},
    )


def mix(model: Model | Pair, rate: float | ArrayLike | Mapping[str, Any]) -> Model:
    """Computes the interpolated network of a model from :func:`join`, as a model of its own.

    Args:
      model: the joined model, or the :class:`Pair` of a training.
      rate: λ in [0, 1], or a dict by path pattern.

    Returns:
      The student with the parameters λθₜ + (1 − λ)θ_g and its own state.

    Raises:
      ValueError: if the two do not fit (every path is listed), or λ lies outside [0, 1].
    """
    if isinstance(model, Pair):
        student, theirs = model.student.model, model.teacher.model.params
        return student.replace(params=_interpolate(student.params, theirs, rate))
    functions = _interpolated(model)
    mixed = _interpolate(model.params["student"], model.params["teacher"], rate)
    return Model(functions.student_fn, mixed, model.state["student"])


def student_axes(state: PyTree) -> PyTree:
    """Says which leaves are the student's own, so that students of many λ can share one teacher in training.

    λ does not reach the teacher, which so is trained once for all of them.

    Args:
      state: a :class:`Pair`, or the ``TrainState`` of a model from :func:`join`.

    Returns:
      The ``axes`` of :func:`distill_jax.train.sweeps.each`: 0 for what is the student's, None for the teacher.

    Raises:
      ValueError: for any other state.
    """
    shared: Any = None
    if isinstance(state, Pair):
        return Pair(shared, 0)  # type: ignore[arg-type]
    _interpolated(state.model)
    if not hasattr(state.opt_state, "inner_states"):
        raise ValueError(
            "a sweep of a joined model needs the optimizer of interpolation.split_tx itself, got the state "
            f"{type(state.opt_state).__name__}: put other transformations inside its parts"
        )
    parts = {"student": 0, "teacher": shared}
    model = state.model.replace(params=parts, state=parts)
    return state._replace(step=0, model=model, opt_state=state.opt_state._replace(inner_states=parts), key=0)


def _interpolate(student: PyTree, teacher: PyTree, rate: Any) -> PyTree:
    weights.check(student, teacher, names=("the student", "the teacher"))
    return weights.lerp(student, teacher, rate)


def _check(rate: Any) -> None:
    named = {f"rate[{n!r}]": v for n, v in rate.items()} if isinstance(rate, Mapping) else {"rate": rate}
    check_fractions({name: value for name, value in named.items() if not callable(value)})


def _at(rate: Rate, step: jax.Array) -> Any:
    if isinstance(rate, Mapping):
        return {pattern: at(value, step) for pattern, value in rate.items()}
    return at(rate, step)


def _shown(share: Any) -> Metrics:
    if isinstance(share, Mapping):
        return {f"rate {pattern}": jnp.float32(value) for pattern, value in share.items()}
    return {"rate": jnp.float32(share)}

"""The two readings of the formula, each of which makes a step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distill_jax import weights
from distill_jax.losses._numerics import check_fractions
from distill_jax.train.interpolation.search import Search, line_search
from distill_jax.train.objectives import Schedule, at
from distill_jax.train.step import LossFn, Metrics, Step, TrainState

PyTree = Any
Rate = Schedule | Mapping[str, Schedule]


class Pair(NamedTuple):
    """Teacher and student of :func:`pull`, in the place of a ``TrainState`` in epochs and loops.

    Attributes:
      teacher: never changes where the teacher is frozen.
      student: its step and its key are the pair's.
    """

    teacher: TrainState
    student: TrainState

    @property
    def step(self) -> jax.Array:
        """The student's."""
        return self.student.step

    @property
    def key(self) -> jax.Array:
        """The student's."""
        return self.student.key

    @property
    def params(self) -> dict[str, PyTree]:
        """As in :func:`through`: ``{"student", "teacher"}``."""
        return {"student": self.student.params, "teacher": self.teacher.params}

    @property
    def model_state(self) -> dict[str, PyTree]:
        """Likewise."""
        return {"student": self.student.model_state, "teacher": self.teacher.model_state}


def pull(
    teacher_step: Step | None,
    student_step: Step,
    rate: Rate | Search,
    *,
    label: Callable[..., Any] | None = None,
    project: Callable[[PyTree], PyTree] = lambda params: params,
) -> Callable[[Pair, Any], tuple[Pair, Metrics]]:
    """Makes a step of both: the teacher's, then θ_g ← λθₜ + (1 − λ)θ_g, then the student's.

    Args:
      teacher_step: of :func:`distill_jax.train.make_train_step`; None for a frozen teacher.
      student_step: likewise, with any loss.
      rate: λ in [0, 1], its schedule, one of these for each path pattern, or a :class:`Search`. The
        step that counts is the student's. A search takes ``batch["validation"]``, which the student's
        step does not see.
      label: ``((params, model_state), batch) -> batch``, such as
        :func:`distill_jax.teachers.make_label` gives, to distil from the teacher of the moment as well.
      project: brings the teacher's parameters to the shape, and the basin, of the student's.

    Returns:
      ``(pair, batch) -> (pair, metrics)``: under ``jit``, ``scan`` and ``vmap`` like any step. The
      metrics are the student's, the teacher's as ``"teacher_loss"`` and so on, and ``"rate"``.

    Raises:
      ValueError: for a constant λ outside [0, 1]; when traced, if the parameters do not fit, or a
        search finds no validation data.

    >>> import optax
    >>> from distill_jax import objectives, train
    >>> tx, apply_fn = optax.sgd(0.1), lambda p, s, x, *, key=None: (x @ p, s)
    >>> step = train.make_train_step(objectives.supervised(apply_fn), tx)
    >>> states = [train.init_state(jnp.full((3, 2), w), tx, jax.random.key(0)) for w in (1.0, 0.0)]
    >>> batch = {"image": jnp.zeros((4, 3)), "label": jnp.zeros(4, int)}
    >>> pair, metrics = pull(step, step, 0.5)(Pair(*states), batch)
    >>> float(pair.student.params[0, 0])
    0.5
    """
    if not isinstance(rate, Search):
        _check(rate)

    def step(pair, batch):
        batch = dict(batch)
        validation = batch.pop("validation", None)
        teacher: TrainState = pair.teacher
        figures: Metrics = {}
        if teacher_step is not None:
            teacher, figures = teacher_step(teacher, batch)
        if label is not None:
            batch = label((teacher.params, teacher.model_state), batch)
        student, towards = pair.student, project(teacher.params)
        weights.check(student.params, towards, names=("the student", "the teacher"))
        if isinstance(rate, Search):
            if validation is None:
                raise ValueError("the batch has no 'validation', which a Search for λ needs")
            share, _ = line_search(
                lambda params: rate.loss(params, student.model_state, validation),
                student.params,
                towards,
                points=rate.points,
                rounds=rate.rounds,
            )
        else:
            share = _at(rate, student.step)
        student = student._replace(params=weights.lerp(student.params, towards, share))
        student, metrics = student_step(student, batch)
        figures = {f"teacher_{name}": value for name, value in figures.items()}
        return Pair(teacher, student), {**metrics, **figures, **_shown(share)}

    return step


def through(
    loss_fn: LossFn,
    rate: Rate | None,
    *,
    teacher_loss: LossFn | None = None,
    flow: bool = False,
    label: Callable[..., Any] | None = None,
    project: Callable[[PyTree], PyTree] = lambda params: params,
) -> LossFn:
    """Takes a student's loss at λθₜ + (1 − λ)θ_g; its gradient flows to θ_g, scaled by 1 − λ.

    Args:
      loss_fn: the student's, of any kind.
      rate: λ as in :func:`pull`, but no search; None to learn it, as the logistic function of
        ``params["rate"]``.
      teacher_loss: the teacher's own, added to the student's; None for a teacher that is frozen, or
        learns by ``flow`` alone.
      flow: whether the gradient flows to θₜ as well, scaled by λ.
      label: as in :func:`pull`.
      project: likewise.

    Returns:
      A ``loss_fn`` over ``params`` and ``model_state`` of :func:`join`, for
      :func:`distill_jax.train.make_train_step` with the ``tx`` of :func:`split_tx`. The student's
      ``model_state`` is the interpolated network's. The metrics are the student's,
      ``"teacher_errors"`` and so on, and ``"rate"``.

    Raises:
      ValueError: for a constant λ outside [0, 1].

    >>> from distill_jax import objectives
    >>> apply_fn = lambda p, s, x, *, key=None: (x @ p, s)
    >>> loss_fn = through(objectives.supervised(apply_fn), 0.25)
    >>> params, state = join((jnp.eye(2), {}), (jnp.zeros((2, 2)), {}))
    >>> batch = {"image": jnp.eye(2), "label": jnp.arange(2)}
    >>> loss, _ = loss_fn(params, state, batch, key=None, step=0)
    >>> round(float(loss - jnp.log1p(jnp.exp(-0.75))), 6)
    0.0
    """
    if rate is not None:
        _check(rate)

    def joint_loss(params, model_state, batch, *, key, step):
        keys: Any = (None, None) if key is None else jax.random.split(key)
        teacher = params["teacher"]
        if label is not None:
            batch = label((teacher, model_state["teacher"]), batch)
        share = None if rate is None else _at(rate, step)
        source = teacher if flow else jax.lax.stop_gradient(teacher)
        mixed = mix({**params, "teacher": source}, share, project=project)
        loss, (student_state, metrics) = loss_fn(mixed, model_state["student"], batch, key=keys[0], step=step)
        model_state = {**model_state, "student": student_state}
        metrics = {**metrics, **_shown(_share(params, share))}
        if teacher_loss is not None:
            own, (teacher_state, figures) = teacher_loss(
                teacher, model_state["teacher"], batch, key=keys[1], step=step
            )
            loss += own
            model_state["teacher"] = teacher_state
            metrics |= {f"teacher_{name}": value for name, value in figures.items()}
            metrics["teacher_loss"] = own
        return loss, (model_state, metrics)

    return joint_loss


def join(
    student: tuple[PyTree, PyTree], teacher: tuple[PyTree, PyTree], *, rate: Any = None
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Puts student and teacher into the ``params`` and ``model_state`` of :func:`through`.

    Args:
      student: ``(params, model_state)``.
      teacher: likewise.
      rate: where λ is to be learned, from where: in (0, 1), or a value for each path pattern.

    Returns:
      ``{"student", "teacher"}`` of each; with ``rate``, ``params["rate"]`` is its logit, log λ/(1 − λ).

    Raises:
      ValueError: for a rate outside (0, 1).
    """
    params, model_state = (
        {"student": ours, "teacher": theirs} for ours, theirs in zip(student, teacher, strict=True)
    )
    if rate is not None:
        if not all(0 < value < 1 for value in jax.tree.leaves(rate)):
            raise ValueError(f"rate must lie in (0, 1), so that it can be learned, got {rate}")
        params["rate"] = jax.tree.map(lambda t: jnp.float32(jnp.log(t) - jnp.log1p(-t)), rate)
    return params, model_state


def split_tx(
    student: optax.GradientTransformation,
    teacher: optax.GradientTransformation | None = None,
    rate: optax.GradientTransformation | None = None,
) -> optax.GradientTransformation:
    """Makes an optimizer for each part of :func:`join`'s ``params``.

    Args:
      student: the student's.
      teacher: the teacher's; None freezes it.
      rate: the one of λ where it is learned; None freezes that.

    Returns:
      One transformation for all. What is clipped by norm, or decays, does so within its part.
    """
    frozen = optax.set_to_zero()
    return optax.multi_transform(
        {"student": student, "teacher": teacher or frozen, "rate": rate or frozen},
        lambda params: {name: name for name in params},
    )


def mix(
    params: Mapping[str, PyTree],
    rate: Any = None,
    *,
    project: Callable[[PyTree], PyTree] = lambda params: params,
) -> PyTree:
    """λθₜ + (1 − λ)θ_g: the parameters of the interpolated network.

    Args:
      params: ``{"student", "teacher"}``, of :func:`join` or a :class:`Pair`.
      rate: λ in [0, 1], or one for each path pattern; None for the one learned.
      project: as in :func:`pull`.

    Raises:
      ValueError: if the two do not fit (every path is listed), or λ lies outside [0, 1].

    >>> float(mix({"student": jnp.zeros(()), "teacher": jnp.ones(())}, 0.25))
    0.25
    """
    towards = project(params["teacher"])
    weights.check(params["student"], towards, names=("the student", "the teacher"))
    return weights.lerp(params["student"], towards, _share(params, rate))


def interpolated(
    apply_fn: Callable[..., Any],
    rate: Any = None,
    *,
    project: Callable[[PyTree], PyTree] = lambda params: params,
) -> Callable[..., Any]:
    """Makes the ``apply_fn`` of the interpolated network, over the ``params`` of :func:`join`.

    Args:
      apply_fn: the student's.
      rate: as in :func:`mix`.
      project: as in :func:`pull`.
    """

    def mixed_fn(params, model_state, x, *, key=None):
        return apply_fn(mix(params, rate, project=project), model_state["student"], x, key=key)

    return mixed_fn


def _share(params: Mapping[str, PyTree], rate: Any) -> Any:
    if rate is not None:
        return rate
    if "rate" not in params:
        raise ValueError("rate is None, to be learned, and params has no 'rate': give join one")
    return jax.tree.map(jax.nn.sigmoid, params["rate"])


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

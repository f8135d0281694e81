"""Objectives without a separate teacher: learning from peers, from own exits, from a running mean.

Each is a ``loss_fn`` for :func:`distill_jax.train.make_train_step`; see
:mod:`distill_jax.train.objectives` for the batches and their names.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses, weights
from distill_jax._checks import check_fraction, need
from distill_jax._model import ApplyFn, Model, PyTree, check_model
from distill_jax.losses._arguments import to_float
from distill_jax.train.objectives import Schedule, at, check_options, check_weight, error_rate, soft_mean
from distill_jax.train.step import LossFn, weighted_mean


def mutual(
    *, weight: Schedule = 1.0, temperature: Schedule = 1.0, soft: Callable[..., jax.Array] = losses.kl
) -> LossFn:
    """Builds the objective of deep mutual learning: students learn from labels and from each other.

    Lₖ = hardₖ + w/(K − 1)·Σ_{l≠k} KL(p_l‖p_k), and the loss is Σₖ Lₖ. To each student the predictions of
    the others are constants, so its gradient is that of its own Lₖ.

    Args:
      weight: w ≥ 0, or a schedule of it; 1 in the paper.
      temperature: T > 0, or a schedule of it; 1 in the paper.
      soft: the soft loss, as in :func:`distill_jax.train.distill`.

    Returns:
      A ``loss_fn`` for a model whose outputs are a tuple of logits, one entry per student, as
      :func:`distill_jax.models.side_by_side` makes it. Its metrics are ``"hard"``, ``"soft"`` and
      ``"error_rate"`` (means over the students), ``"error_rate_0"``, ``"error_rate_1"`` and so on. All students take
      their step at once; in the paper they take turns within a batch.

    Raises:
      ValueError: if ``weight`` is negative; when traced, if there are fewer than two students.

    References:
      Zhang, Xiang, Hospedales, Lu, `Deep Mutual Learning`, 2018 (the loss of K networks).
    """
    check_weight("weight", weight)
    check_options(0.0, temperature, soft)

    def loss_fn(model, batch, *, key, step):
        need(batch, "image", "label")
        logits, state = model.apply(batch["image"], key=key)
        _check_exits(logits, "mutual", "one per student: join the students by models.side_by_side")
        count = len(logits)
        options = {"temperature": at(temperature, step)}
        hard: Any = 0.0
        peers: Any = 0.0
        for number, ours in enumerate(logits):
            hard += weighted_mean(losses.cross_entropy(ours, batch["label"]), batch)
            for other, theirs in enumerate(logits):
                if other != number:
                    theirs = jax.lax.stop_gradient(theirs)
                    peers += soft_mean(soft, ours, theirs, batch, **options) / (count - 1)
        wrong = [error_rate(z, batch) for z in logits]
        metrics = {
            "hard": hard / count,
            "soft": peers / count,
            "error_rate": sum(wrong) / count,
            **{f"error_rate_{number}": value for number, value in enumerate(wrong)},
        }
        return hard + at(weight, step) * peers, (state, metrics)

    return loss_fn


def self_distillation(
    *, temperature: Schedule = 3.0, alpha: Schedule = 0.7, soft: Callable[..., jax.Array] = losses.kl
) -> LossFn:
    """Builds the objective of self-distillation: the deepest exit of a network teaches the earlier ones.

    The loss is the sum over the earlier exits of α·hardᵢ + (1 − α)·soft(exitᵢ, deepest), plus the hard loss
    of the deepest exit, which is a constant in the other terms.

    Args:
      temperature: T > 0, or a schedule of it.
      alpha: α in [0, 1], the weight of the labels in the loss of the earlier exits, or a schedule of it.
        (The paper's α is 1 − ours.)
      soft: the soft loss, as in :func:`distill_jax.train.distill`.

    Returns:
      A ``loss_fn`` for a model whose outputs are a list or tuple of logits, one per exit, the deepest last.
      Its metrics are ``"hard"`` and ``"soft"`` (sums over exits, unweighted), ``"error_rate"`` (of the deepest
      exit), ``"error_rate_0"``, ``"error_rate_1"`` and so on. The paper's third term, ‖Fᵢ − F_deepest‖², is what
      :func:`distill_jax.train.distill_features` computes between captured layers.

    Raises:
      ValueError: if α or T is a constant outside its range; when traced, if there are fewer than two exits.

    References:
      Zhang et al., `Be Your Own Teacher`, 2019, §3.2. That the deepest exit is a constant follows the
      authors' program; the paper does not say.
    """
    check_options(alpha, temperature, soft)

    def loss_fn(model, batch, *, key, step):
        need(batch, "image", "label")
        exits, state = model.apply(batch["image"], key=key)
        _check_exits(exits, "self_distillation", "one per exit, the deepest last")
        deepest, options = exits[-1], {"temperature": at(temperature, step)}
        hards = [weighted_mean(losses.cross_entropy(z, batch["label"]), batch) for z in exits]
        softs = [soft_mean(soft, z, jax.lax.stop_gradient(deepest), batch, **options) for z in exits[:-1]]
        share = at(alpha, step)
        loss = share * sum(hards[:-1]) + (1 - share) * sum(softs) + hards[-1]
        metrics = {"hard": sum(hards), "soft": sum(softs), "error_rate": error_rate(deepest, batch)}
        for number, logits in enumerate(exits):
            metrics[f"error_rate_{number}"] = error_rate(logits, batch)
        return loss, (state, metrics)

    return loss_fn


def _check_exits(outputs: Any, objective: str, which: str) -> None:
    if not isinstance(outputs, list | tuple) or len(outputs) < 2:
        raise ValueError(
            f"{objective} needs a model whose outputs are a list of at least two arrays of logits, {which}; "
            f"got {jax.tree.structure(outputs)}"
        )


def attach_mean_teacher(student: Model) -> Model:
    """Makes the model that :func:`mean_teacher` trains: a student with the running mean of itself.

    Args:
      student: the student; the teacher starts as its copy.

    Returns:
      A model with the student's parameters that computes what the student computes. Its state is
      ``{"student": state, "teacher": (params, state), "step"}``. The teacher is kept in float32 at least,
      since the mean over many steps moves by less than bfloat16 can hold. ``step`` is the last one whose
      parameters are in the mean. :func:`detach_mean_teacher` takes student and teacher out.
    """
    check_model("student", student)

    def precise(x):
        return to_float(x) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else x

    teacher = jax.tree.map(precise, (student.params, student.state))
    state = {"student": student.state, "teacher": teacher, "step": jnp.full((), -1, jnp.int32)}
    return Model(_WithMeanTeacher(student.apply_fn), student.params, state)


def detach_mean_teacher(model: Model) -> tuple[Model, Model]:
    """Takes student and teacher out of a model from :func:`attach_mean_teacher`.

    Args:
      model: the model in training, or after it.

    Returns:
      The student, and the teacher, which is often the better of the two.
    """
    student = Model(_student_fn(model), model.params, model.state["student"])
    return student, Model(student.apply_fn, *model.state["teacher"])


@dataclasses.dataclass(frozen=True)
class _WithMeanTeacher:
    """The ``apply_fn`` of a student whose state is one entry of a dict."""

    student_fn: ApplyFn

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        outputs, student = self.student_fn(params, state["student"], x, key=key)
        return outputs, {**state, "student": student}


def _student_fn(model: Model) -> ApplyFn:
    check_model("model", model)
    if not isinstance(model.apply_fn, _WithMeanTeacher):
        raise ValueError("expected a model from attach_mean_teacher, got another one")
    return model.apply_fn.student_fn


def mean_teacher(
    *,
    decay: Schedule = 0.999,
    weight: Schedule = 1.0,
    soft: Callable[..., jax.Array] | None = None,
    teacher_input: str = "image",
) -> LossFn:
    """Builds the objective of the mean teacher: the mean of hard + w·soft against a running mean.

    θ′ₜ = d·θ′ₜ₋₁ + (1 − d)·θₜ, the mean of the student's parameters *before* the step, so that it
    holds all updates made so far; floating-point statistics (BatchNorm's) are averaged in the same way.
    The teacher predicts in evaluation mode, and is a constant to the student.

    Args:
      decay: d in [0, 1], or a schedule of it, such as ``lambda t: jnp.minimum(0.999, t / (t + 1))``,
        which is the plain mean at first.
      weight: w ≥ 0, or a schedule of it (the paper ramps it up).
      soft: ``(student_logits, teacher_logits) -> values``, one value per example. By default the loss of
        the paper, the sum over classes of the squared difference of probabilities.
      teacher_input: the name in the batch of the teacher's input, where that is another view than
        ``"image"``.

    Returns:
      A ``loss_fn`` for a model from :func:`attach_mean_teacher`, with the metrics ``"hard"``, ``"soft"`` and
      ``"error_rate"``. The mean moves once per step, also where gradients are accumulated over parts of the
      batch.

    Raises:
      ValueError: if d is a constant outside [0, 1], or w a negative one.

    References:
      Tarvainen, Valpola, `Mean Teachers Are Better Role Models`, 2017, §2: the consistency cost J(θ)
      and the moving average, its two displayed equations. Their program averages over classes.
    """
    if not callable(decay):
        check_fraction("decay", decay)
    check_weight("weight", weight)
    check_options(0.0, None, soft)

    def loss_fn(model, batch, *, key, step):
        need(batch, "image", "label", teacher_input)
        student_fn = _student_fn(model)
        student_state, now = model.state["student"], jnp.asarray(step, jnp.int32)
        new = now != model.state["step"]  # false for the later parts of an accumulated batch
        current = jax.lax.stop_gradient((model.params, student_state))
        keep = jnp.where(new, at(decay, step), 1.0)
        teacher = weights.ema(model.state["teacher"], current, keep)
        params, state = jax.tree.map(lambda x, like: x.astype(like.dtype), teacher, current)
        theirs = jax.lax.stop_gradient(student_fn(params, state, batch[teacher_input])[0])
        ours, student_state = student_fn(model.params, student_state, batch["image"], key=key)
        metrics = {
            "hard": weighted_mean(losses.cross_entropy(ours, batch["label"]), batch),
            "soft": soft_mean(soft or _squared_difference, ours, theirs, batch),
            "error_rate": error_rate(ours, batch),
        }
        loss = metrics["hard"] + at(weight, step) * metrics["soft"]
        return loss, ({"student": student_state, "teacher": teacher, "step": now}, metrics)

    return loss_fn


def _squared_difference(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    student, teacher = (jax.nn.softmax(to_float(z)) for z in (student_logits, teacher_logits))
    return jnp.sum(jnp.square(student - teacher), axis=-1)

"""Training objectives: functions that build a ``loss_fn`` for :func:`distill_jax.train.make_train_step`.

Batches are dicts with ``"image"`` (the input of the model, whatever it is), ``"label"`` (integer classes
or probabilities), ``"teacher"`` (the teacher's logits, or ``{"logits": ..., "features": {name: ...}}``, put
there by :func:`distill_jax.teachers.label` or from a store of soft labels) and, where examples count
unequally, ``"weight"``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses, metrics
from distill_jax._checks import (
    check_fraction,
    check_function,
    check_not_negative,
    check_positive,
    check_sequence,
    need,
    takes,
)
from distill_jax._model import PyTree
from distill_jax.train.step import Batch, LossFn, weighted_mean

Schedule = float | Callable[[jax.Array], jax.Array]


def at(schedule: Schedule, step: jax.Array) -> Any:
    """Evaluates a schedule at a step; a constant is its own value."""
    return schedule(step) if callable(schedule) else schedule


def is_zero(schedule: Schedule) -> bool:
    """Says whether a weight is the constant 0, so that its term need not be computed."""
    return isinstance(schedule, int | float) and schedule == 0


def check_weight(name: str, weight: Schedule) -> None:
    """Raises ``ValueError`` if a weight is a constant that is negative or not finite."""
    if not callable(weight):
        check_not_negative(name, weight)


def check_options(
    alpha: Schedule, temperature: Schedule | None, soft: Callable[..., Any] | None = None
) -> None:
    """Raises ``ValueError`` if α is a constant outside [0, 1], T one that is not positive, or soft no loss."""
    if soft is not None:
        form = "student, teacher" + ("" if temperature is None else ", *, temperature")
        check_function("soft", soft, form)
    if not callable(alpha):
        check_fraction("alpha", alpha)
    if temperature is not None and not callable(temperature):
        check_positive("temperature", temperature)


def teacher_of(batch: Batch) -> Mapping[str, Any]:
    """Returns the teacher's outputs in a batch as a dict with ``"logits"`` and perhaps ``"features"``.

    Raises:
      ValueError: if the batch has none.
    """
    need(batch)
    if "teacher" not in batch:
        raise ValueError(
            "the batch has no 'teacher' logits: add them with a soft-label store, or with a "
            f"label function as the epoch's transform; it has {sorted(batch)}"
        )
    teacher = batch["teacher"]
    return teacher if isinstance(teacher, Mapping) else {"logits": teacher}


def soft_mean(
    soft: Callable[..., jax.Array], student: jax.Array, teacher: PyTree, batch: Batch, **options: Any
) -> jax.Array:
    """Computes the weighted mean over the batch of a loss between the outputs of student and teacher.

    Examples of weight 0 are hidden, by ``where``, from a loss that takes that argument: a loss that
    compares examples with each other would see them otherwise.

    Args:
      soft: ``(student, teacher, **options) -> values``, one value per example, ``[batch]``.
      student: the student's outputs, ``[batch, ...]``.
      teacher: the teacher's outputs, ``[batch, ...]``.
      batch: the batch, with or without ``"weight"``.
      options: further arguments of ``soft``.

    Returns:
      The mean, a scalar.
    """
    if "weight" in batch and takes(soft, "where"):
        counts = batch["weight"] > 0
        if counts.shape != student.shape[: counts.ndim]:
            raise ValueError(
                f"batch['weight'] must have one number per example, {student.shape[0]}, got shape {counts.shape}"
            )
        options["where"] = counts.reshape(counts.shape + (1,) * (student.ndim - counts.ndim))
    return weighted_mean(soft(student, teacher, **options), batch)


def supervised(*, label_smoothing: Schedule = 0.0) -> LossFn:
    """Builds the objective of learning from labels: the mean cross-entropy.

    Args:
      label_smoothing: ε in [0, 1], or an optax schedule of it.

    Returns:
      A ``loss_fn`` with the metric ``"error_rate"``, the fraction of examples whose top class is wrong.

    Raises:
      ValueError: if ε is a constant outside [0, 1].
    """
    if not callable(label_smoothing):
        check_fraction("label_smoothing", label_smoothing)

    def loss_fn(model, batch, *, key, step):
        need(batch, "image", "label")
        logits, state = model.apply(batch["image"], key=key)
        values = losses.cross_entropy(logits, batch["label"], label_smoothing=at(label_smoothing, step))
        return weighted_mean(values, batch), (state, {"error_rate": error_rate(logits, batch)})

    return loss_fn


def distill(
    *, temperature: Schedule | None = 4.0, alpha: Schedule = 0.1, soft: Callable[..., jax.Array] = losses.kl
) -> LossFn:
    """Builds the objective of knowledge distillation: the mean of α·hard + (1 − α)·soft.

    The hard loss is the cross-entropy with ``batch["label"]``. The soft loss compares the student's
    logits with the teacher's in ``batch["teacher"]``. The losses of this library carry the factor T²,
    which keeps the two comparable when T changes.

    Args:
      temperature: T > 0, or an optax schedule of it, passed to ``soft`` by that name; None for a
        ``soft`` that takes no temperature.
      alpha: α in [0, 1], the weight of the labels, or a schedule of it. With a constant 0 the batch needs
        no labels.
      soft: ``(student_logits, teacher_logits, *, temperature) -> values``, one value per example.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"``, ``"soft"`` (each unweighted) and ``"error_rate"``.

    Raises:
      ValueError: if α is a constant outside [0, 1], or T one that is not positive.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §2.
    """
    check_options(alpha, temperature, soft)

    def loss_fn(model, batch, *, key, step):
        teacher = teacher_of(batch)
        need(batch, "image")
        logits, state = model.apply(batch["image"], key=key)
        options = {} if temperature is None else {"temperature": at(temperature, step)}
        metrics = {"soft": soft_mean(soft, logits, teacher["logits"], batch, **options)}
        loss = add_hard(metrics, losses.cross_entropy, logits, batch, at(alpha, step), is_zero(alpha))
        if "label" in batch:
            metrics["error_rate"] = error_rate(logits, batch)
        return loss, (state, metrics)

    return loss_fn


def add_hard(
    metrics: dict[str, Any],
    hard: Callable[..., jax.Array],
    outputs: jax.Array,
    batch: Batch,
    alpha: float | jax.Array,
    unused: bool,
) -> jax.Array:
    """Computes α·hard + (1 − α)·soft from ``metrics["soft"]``, and notes ``metrics["hard"]``.

    Args:
      metrics: the metrics of the step, with ``"soft"``.
      hard: ``(outputs, labels) -> values``, one value per example.
      outputs: the student's outputs.
      batch: the batch, with ``"label"`` unless ``unused``.
      alpha: α at this step.
      unused: whether α is the constant 0, so that the hard loss is not computed.

    Returns:
      The loss, a scalar.

    Raises:
      ValueError: if the batch has no labels where they are needed.
    """
    if unused:
        return metrics["soft"]
    need(batch, "label")
    metrics["hard"] = weighted_mean(hard(outputs, batch["label"]), batch)
    return alpha * metrics["hard"] + (1 - alpha) * metrics["soft"]


def error_rate(logits: jax.Array, batch: Batch) -> jax.Array:
    """Computes the weighted fraction of examples whose top class is not the label's: a scalar."""
    need(batch, "label")
    label = batch["label"]
    if label.ndim == logits.ndim:
        label = jnp.argmax(label, -1)
    return weighted_mean(metrics.errors(logits, label), batch)


def distill_each(
    *,
    weights: Sequence[float] | None = None,
    temperature: Schedule = 4.0,
    alpha: Schedule = 0.1,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Builds the objective of several teachers at once: the mean of α·hard + (1 − α)·Σₖ wₖ·softₖ.

    With Kullback–Leibler divergences and weights that sum to 1, the gradient is that of learning from
    the weighted mean of the teachers' softened probabilities; the value is larger by the teachers'
    disagreement.

    Args:
      weights: wₖ ≥ 0, one per teacher, used as given; 1/(number of teachers) by default.
      temperature: T > 0, or a schedule of it, as in :func:`distill`.
      alpha: α in [0, 1], the weight of the labels, or a schedule of it.
      soft: the soft loss, as in :func:`distill`.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"``, ``"soft"`` (the weighted sum), ``"soft_0"``, ``"soft_1"`` and
      so on (one per teacher) and ``"error_rate"``. The batch must hold a tuple of logits, as
      :func:`distill_jax.teachers.label_each` makes it.

    Raises:
      ValueError: if a weight is negative; when traced, if there is not one weight per teacher.

    References:
      Hinton, Vinyals, Dean, 2015, §2 (one teacher); You et al., `Learning from Multiple Teacher
      Networks`, 2017, §3.1 (equal weights).
    """
    if weights is not None:
        check_sequence("weights", weights, "numbers")
        for weight in weights:
            check_not_negative("weights", weight)
    check_options(alpha, temperature, soft)

    def loss_fn(model, batch, *, key, step):
        need(batch)
        teachers = teacher_of(batch)["logits"]
        if not isinstance(teachers, list | tuple) or not teachers:
            raise ValueError(
                "batch['teacher'] must hold a tuple of logits, one array per teacher, as teachers.label_each "
                f"makes it; got {jax.tree.structure(teachers)}"
            )
        shares = [1 / len(teachers)] * len(teachers) if weights is None else list(weights)
        if len(shares) != len(teachers):
            raise ValueError(
                f"got {len(shares)} weights for {len(teachers)} teachers: give one weight per teacher"
            )
        need(batch, "image")
        logits, state = model.apply(batch["image"], key=key)
        options = {"temperature": at(temperature, step)}
        softs = [soft_mean(soft, logits, teacher, batch, **options) for teacher in teachers]
        metrics = {
            "soft": sum(share * value for share, value in zip(shares, softs, strict=True)),
            **{f"soft_{number}": value for number, value in enumerate(softs)},
            "error_rate": error_rate(logits, batch),
        }
        loss = add_hard(metrics, losses.cross_entropy, logits, batch, at(alpha, step), False)
        return loss, (state, metrics)

    return loss_fn

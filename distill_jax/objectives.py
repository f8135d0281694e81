"""What is minimised: builders of ``loss_fn`` for :func:`distill_jax.train.make_train_step`.

Batches are dicts with ``"image"`` (the model's input), ``"label"`` (integer or soft),
``"teacher"`` (the teacher's logits, put there by :mod:`distill_jax.targets`) and, where examples
count unequally, ``"weight"``.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.losses.numerics import check_fraction, check_positive
from distill_jax.train import LossFn, weighted_mean

Schedule = float | Callable[[jax.Array], jax.Array]


def _at(schedule: Schedule, step: jax.Array) -> Any:
    return schedule(step) if callable(schedule) else schedule


def supervised(apply_fn: Callable[..., Any], *, label_smoothing: Schedule = 0.0) -> LossFn:
    """Learning from labels: the mean cross-entropy.

    Args:
      apply_fn: as in :class:`distill_jax.models.Model`.
      label_smoothing: ε in [0, 1], or an optax schedule of it.

    Returns:
      A ``loss_fn`` with the metric ``"errors"``, the fraction of examples whose top class is wrong.
    """
    if not callable(label_smoothing):
        check_fraction("label_smoothing", label_smoothing)

    def loss_fn(params, model_state, batch, *, key, step):
        logits, model_state = apply_fn(params, model_state, batch["image"], key=key)
        values = losses.cross_entropy(
            logits, batch["label"], label_smoothing=_at(label_smoothing, step)
        )
        return weighted_mean(values, batch), (model_state, {"errors": _errors(logits, batch)})

    return loss_fn


def distill(
    apply_fn: Callable[..., Any],
    *,
    temperature: Schedule | None = 4.0,
    alpha: Schedule = 0.1,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Learning from a teacher: the mean of α·hard + (1 − α)·soft.

    hard is the cross-entropy with ``batch["label"]``, soft the given loss against
    ``batch["teacher"]``; the losses of this library carry the factor T² that keeps the two
    comparable when T changes.

    Args:
      apply_fn: the student's, as in :class:`distill_jax.models.Model`.
      temperature: T > 0 or an optax schedule of it, given to ``soft`` by that name; None for a
        ``soft`` that takes none.
      alpha: the labels' share in [0, 1], or a schedule of it. At a constant 0 labels are not needed.
      soft: ``(student_logits, teacher_logits, *, temperature) -> [batch]``, any such loss.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"``, ``"soft"`` (each unweighted) and ``"errors"``.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §2.
    """
    if not callable(alpha):
        check_fraction("alpha", alpha)
    if temperature is not None and not callable(temperature):
        check_positive("temperature", temperature)

    def loss_fn(params, model_state, batch, *, key, step):
        if "teacher" not in batch:
            raise ValueError(
                "the batch has no 'teacher' logits: add them with a soft-label store, or with a "
                f"label function as the epoch's transform; it has {sorted(batch)}"
            )
        logits, model_state = apply_fn(params, model_state, batch["image"], key=key)
        options = {} if temperature is None else {"temperature": _at(temperature, step)}
        metrics = {"soft": weighted_mean(soft(logits, batch["teacher"], **options), batch)}
        share = _at(alpha, step)
        loss = metrics["soft"]
        if not (isinstance(alpha, int | float) and alpha == 0):
            metrics["hard"] = weighted_mean(losses.cross_entropy(logits, batch["label"]), batch)
            loss = share * metrics["hard"] + (1 - share) * metrics["soft"]
        if "label" in batch:
            metrics["errors"] = _errors(logits, batch)
        return loss, (model_state, metrics)

    return loss_fn


def _errors(logits: jax.Array, batch: Any) -> jax.Array:
    label = batch["label"]
    if label.ndim == logits.ndim:
        label = jnp.argmax(label, -1)
    return weighted_mean((jnp.argmax(logits, -1) != label).astype(jnp.float32), batch)

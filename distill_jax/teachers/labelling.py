"""Teachers as functions from batch to batch: they add soft labels to a batch of examples."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax._checks import check_sequence, need
from distill_jax._model import ApplyFn, Model, PyTree, check_model


def label(teacher: Model, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the teacher's logits to a batch.

    Called inside the student's train step (as the ``transform`` of :func:`distill_jax.train.make_epoch`)
    this is online distillation. The teacher runs in evaluation mode, and no gradient flows to it.

    Args:
      teacher: the teacher. Under ``jit``, pass it as an argument of the jitted function: a model that
        is closed over is compiled into the program.
      batch: a dict with ``"image"``, the teacher's input.

    Returns:
      The batch with ``"teacher"``: the logits, or for a captured teacher
      (:func:`distill_jax.features.capture`) the dict ``{"logits": ..., "features": {name: ...}}``.

    Raises:
      ValueError: if ``teacher`` is no Model, or the batch no dict with ``"image"``.

    >>> from distill_jax.models import from_function
    >>> teacher = from_function(lambda w, x: x @ w, jnp.eye(2))
    >>> print(label(teacher, {"image": jnp.ones((1, 2))})["teacher"])
    [[1. 1.]]
    """
    check_model("teacher", teacher)
    need(batch, "image")
    outputs = teacher(batch["image"])
    if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], Mapping):
        outputs = {"logits": outputs[0], "features": outputs[1]}
    return {**batch, "teacher": jax.lax.stop_gradient(outputs)}


def label_each(teachers: Sequence[Model], batch: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the logits of several teachers to a batch, for :func:`distill_jax.train.distill_each`.

    Args:
      teachers: the teachers, run in evaluation mode.
      batch: a dict with ``"image"``.

    Returns:
      The batch with ``"teacher"``, ``{"logits": (...)}``: a tuple with one array per teacher.

    Raises:
      ValueError: if there is no teacher, one is no Model, or the batch is no dict with ``"image"``.
    """
    check_sequence("teachers", teachers, "models")
    if not teachers:
        raise ValueError("label_each needs at least one teacher, got none")
    for number, teacher in enumerate(teachers):
        check_model(f"teachers[{number}]", teacher)
    need(batch, "image")
    logits = tuple(teacher(batch["image"]) for teacher in teachers)
    return {**batch, "teacher": {"logits": jax.lax.stop_gradient(logits)}}


def ensemble(*models: Model) -> Model:
    """Averages the *probabilities* of several classifiers: a model in the place of all of them.

    Args:
      models: the members; their outputs are logits ``[batch, classes]``.

    Returns:
      A model whose params and state are tuples with one entry per member, and whose outputs are
      log-probabilities, log((1/n)·Σ softmax(zᵢ)). These are logits like any other.

    Raises:
      ValueError: if there is no member, or one is no Model; when called, if their outputs differ in shape.

    References:
      Hinton, Vinyals, Dean, 2015, §4 (ensembles as teachers).
    """
    if not models:
        raise ValueError("ensemble needs at least one model, got none")
    for number, model in enumerate(models):
        check_model(f"models[{number}]", model)
    apply_fn = _Ensemble(tuple(model.apply_fn for model in models))
    return Model(apply_fn, tuple(model.params for model in models), tuple(model.state for model in models))


@dataclasses.dataclass(frozen=True)
class _Ensemble:
    """The ``apply_fn`` of :func:`ensemble`; equal for equal members."""

    members: tuple[ApplyFn, ...]

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        outputs = [fn(p, s, x, key=key) for fn, p, s in zip(self.members, params, state, strict=True)]
        if len(shapes := {jnp.shape(z) for z, _ in outputs}) > 1:
            raise ValueError(
                f"the models of an ensemble must have outputs of one shape, got {sorted(shapes)}"
            )
        logits = jnp.stack([jnp.asarray(z, jnp.float32) for z, _ in outputs])
        mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(len(self.members))
        return mean, tuple(state for _, state in outputs)

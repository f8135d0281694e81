"""Trains many students in one program, each with its own learning rate, temperature and so on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax import train
from distill_jax.models import Model
from distill_jax.train import sweeps
from harness.experiment import adam


def fit(
    model: Model, loss_fn: train.LossFn, tx: optax.GradientTransformation, examples: Mapping[str, Any], *,
    epochs: int, batch_size: int, seed: int, transform: Callable[..., Any], context: Any = None,
) -> Model:  # fmt: skip
    """Trains a model without validation and without checkpoints.

    Args:
      model: the model with its initial parameters.
      loss_fn: the objective.
      tx: the optimizer.
      examples: the training arrays.
      epochs: the number of epochs.
      batch_size: the number of examples per step.
      seed: the seed of all that is random.
      transform: prepares a batch, as in :func:`distill_jax.train.make_epoch`.
      context: arrays for ``transform``, such as a teacher.
    """
    epoch = train.make_epoch(train.make_train_step(loss_fn, tx), transform=transform)
    state = train.init_state(model, tx, jax.random.key(seed, impl="rbg"))
    done = train.fit(state, epoch, examples, epochs=epochs, batch_size=batch_size, seed=seed, context=context)
    return done.model


def train_many(
    student: Model,
    objective: Callable[[Any], train.LossFn],
    settings: Mapping[str, Sequence[float]],
    examples: Mapping[str, Any],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    transform: Callable[..., Any],
    context: Any = None,
) -> Model:
    """Trains many students, all from the same initial parameters, on the same batches.

    Args:
      student: the student with its initial parameters.
      objective: makes the loss function from the settings of one student.
      settings: name → values, one per student; ``"learning_rate"`` is among the names.
      examples: the training arrays.
      epochs: the number of epochs.
      batch_size: the number of examples per step.
      seed: as in :func:`fit`, and so are the others.
      transform: prepares a batch, once for all students.
      context: arrays for ``transform``.

    Returns:
      A model that gives the logits of all students, ``[batch, students, classes]``.
    """
    count = len(settings["learning_rate"])

    def tx(rate: Any) -> optax.GradientTransformation:  # its state does not depend on the rate
        return optax.chain(adam(1.0, epochs, len(examples["label"]) // batch_size), optax.scale(rate))

    def make_step(**setting: Any) -> train.Step:
        return train.make_train_step(objective(setting), tx(setting["learning_rate"]))

    keys = jnp.stack([jax.random.key(seed, impl="rbg")] * count)
    states = sweeps.init_states(sweeps.repeat(student, count), tx(1.0), keys)
    done = sweeps.fit(
        sweeps.Students(states, settings), sweeps.make_epoch(make_step, transform=transform, share=True), examples,
        epochs=epochs, batch_size=batch_size, seeds=[seed] * count, context=context,
    )  # fmt: skip
    return sweeps.as_one(done.model)

"""Trains many students in one program, each with its own learning rate, temperature and so on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from distill_jax import train
from distill_jax.models import Model
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
    **options: Any,
) -> Model:
    """Trains many students, all from the same initial parameters, in the same order of examples.

    The loss is the sum of the students' losses. No parameter of one student enters the loss of another, and
    Adam treats each number by itself: each student learns what it would learn alone.

    Args:
      student: the student with its initial parameters.
      objective: makes the loss function from the settings of one student.
      settings: name → values, one per student; ``"learning_rate"`` is among the names.
      examples: the training arrays.
      epochs: the number of epochs.
      batch_size: the number of examples per step.
      options: further options of :func:`fit`.

    Returns:
      A model that gives the logits of all students, ``[batch, students, classes]``.
    """
    values = {name: jnp.asarray(value, jnp.float32) for name, value in settings.items()}
    rates = values["learning_rate"]

    def apply_fn(params, state, x, *, key=None):
        def apply_one(params, state):
            return student.apply_fn(params, state, x, key=key)

        return jax.vmap(apply_one, out_axes=(1, 0))(params, state)

    def loss_fn(model, batch, *, key, step):
        def loss_of_one(params, state, setting):
            one = student.replace(params=params, state=state)
            loss, (state, _) = objective(setting)(one, batch, key=key, step=step)
            return loss, state

        each, state = jax.vmap(loss_of_one)(model.params, model.state, values)
        return each.sum(), (state, {})

    def scale(updates, params):
        return jax.tree.map(lambda x: x * rates.reshape(-1, *[1] * (x.ndim - 1)), updates)

    repeated = jax.tree.map(lambda x: jnp.repeat(x[None], len(rates), 0), (student.params, student.state))
    tx = optax.chain(adam(1.0, epochs, len(examples["label"]) // batch_size), optax.stateless(scale))
    return fit(
        Model(apply_fn, *repeated), loss_fn, tx, examples, epochs=epochs, batch_size=batch_size, **options
    )

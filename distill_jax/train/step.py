"""The train step, ``(state, batch) -> (state, metrics)``: one for every model.

Teacher, student, encoder and decoder differ only in their ``loss_fn`` (see
:mod:`distill_jax.train.objectives`). Whether the step runs under ``jit``, ``vmap``, ``pmap``,
``shard_map`` or ``scan`` is the caller's choice.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from distill_jax._checks import check_count, check_function, check_key, check_positive, check_tx
from distill_jax._model import Model, PyTree, check_model

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """The whole state of a training run, as a pytree: it can be sharded, scanned, mapped and saved.

    Attributes:
      step: int32 scalar, the number of updates made.
      model: the model in training.
      opt_state: the optimizer's state.
      key: a random key. Every random number of the run derives from it and from ``step``.
    """

    step: jax.Array
    model: Model
    opt_state: PyTree
    key: jax.Array


class LossFn(Protocol):
    """A training objective: ``(model, batch, *, key, step) -> (loss, (state, metrics))``.

    The loss and every metric are scalars and *means over the examples of the batch*, weighted by
    ``batch["weight"]`` where there is one: from the parts of a batch (accumulation, devices) the step
    computes the mean over the whole. ``state`` is the model's state after the forward pass. With ``key``
    None the model runs in evaluation mode.
    """

    def __call__(  # noqa: D102
        self, model: Model, batch: Batch, *, key: jax.Array | None, step: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]: ...


Step = Callable[[Any, Any], tuple[Any, Metrics]]


def init_state(model: Model, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Makes the state of a training run before its first step.

    The arrays are copied, so that a step that donates its state leaves the caller's model intact.

    Args:
      model: the model to train.
      tx: the optimizer.
      key: a random key for the whole run.

    Returns:
      The state, with ``step`` 0 and the optimizer's state for the model's parameters.

    Raises:
      ValueError: if ``model`` is no Model, ``tx`` no optax transformation, or ``key`` no random key.
    """
    check_model("model", model)
    check_tx("tx", tx)
    check_key("key", key)
    model, key = jax.tree.map(jnp.copy, (model, key))
    return TrainState(jnp.zeros((), jnp.int32), model, tx.init(model.params), key)


def step_key(state: PyTree, stream: int) -> jax.Array:
    """Derives the random key of the current step.

    Args:
      state: the training state.
      stream: 0 for the model (dropout), 1 for the data (augmentation).

    Returns:
      A random key, a function of the run's key, the step and the stream alone.
    """
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), stream)


def batch_weight(batch: Batch) -> jax.Array:
    """Sums the weights of a batch: a float32 scalar, the number of examples where there are no weights."""
    if "weight" in batch:
        return jnp.sum(batch["weight"], dtype=jnp.float32)
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


def weighted_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """Averages values ``[batch, ...]`` over the examples, weighted by ``batch["weight"]`` if it exists.

    An example of weight 0 does not count, whatever its value. The mean over a batch of weight 0 is 0.
    """
    values = values.reshape(values.shape[0], -1).mean(-1) if values.ndim > 1 else values
    if "weight" not in batch:
        return jnp.mean(values)
    weight = batch["weight"]
    if weight.shape != values.shape:
        raise ValueError(
            f"batch['weight'] must have one number per example, shape {values.shape}, got {weight.shape}"
        )
    total = jnp.sum(weight)
    values = jnp.where(weight > 0, values, 0.0)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1.0)


def make_train_step(
    loss_fn: LossFn, tx: optax.GradientTransformation, *, axis_name: str | None = None, accumulate: int = 1
) -> Step:
    """Makes a train step, ``(state, batch) -> (state, metrics)``: one update by gradient descent.

    Args:
      loss_fn: the objective, see :class:`LossFn`.
      tx: any optax transformation; schedules and clipping belong to it. It sees the gradient of the
        mean loss over the whole batch.
      axis_name: the name of the mapped axis that splits the batch under ``pmap`` and ``shard_map``; None
        under ``jit``, also with a sharded batch. State and metrics are the same on every device.
      accumulate: the number of parts that the batch is split into. They are computed one after another,
        which saves memory. The update is that of the whole batch, for unequal weights too, except for
        models that look across examples: BatchNorm sees one part at a time, and dropout draws anew in
        each.

    Returns:
      The step. It adds ``"loss"`` and ``"gradient_norm"`` to the metrics of ``loss_fn``.

    Raises:
      ValueError: if ``loss_fn`` is no objective, ``tx`` no optax transformation, or ``accumulate`` not positive;
        when the step is traced, if ``accumulate`` does not divide the batch.
    """
    check_function("loss_fn", loss_fn, "model, batch, *, key, step")
    check_tx("tx", tx)
    check_count("accumulate", accumulate)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if not isinstance(state, TrainState):
            raise ValueError(f"state must be a TrainState, from init_state, got {type(state).__name__}")
        model, key = state.model, step_key(state, 0)
        if axis_name:
            # Each device differentiates its own copy. Without the cast, `shard_map` would sum the
            # gradients of replicated parameters by itself, and `psum` would sum them again.
            model = jax.tree.map(lambda x: jax.lax.pcast(x, axis_name, to="varying"), model)
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        model_state, totals = _accumulated_sums(loss_fn, model, batch, key, state.step, accumulate)
        if axis_name:
            totals = jax.lax.psum(totals, axis_name)
            model_state = _mean_over_devices(model_state, axis_name)
        gradients, metrics, weight = totals
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        gradients = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
        metrics = {name: value * scale for name, value in metrics.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, state.model.params)
        params = optax.apply_updates(state.model.params, updates)
        model = state.model.replace(params=params, state=model_state)
        return TrainState(state.step + 1, model, opt_state, state.key), metrics

    return train_step


Totals = tuple[PyTree, Metrics, jax.Array]  # sums of gradients and of metrics, and the total weight


def _weighted_sums(
    loss_fn: LossFn, model: Model, batch: Batch, key: jax.Array, step: jax.Array
) -> tuple[PyTree, Totals]:
    """Sums over the examples of one part of a batch, which parts and devices can add up."""
    weight = batch_weight(batch)

    def scaled_loss(params):
        loss, aux = loss_fn(model.replace(params=params), batch, key=key, step=step)
        return loss * weight, (loss, aux)

    gradients, (loss, (model_state, metrics)) = jax.grad(scaled_loss, has_aux=True)(model.params)
    metrics = jax.tree.map(lambda m: m * weight, {**metrics, "loss": loss})
    return model_state, (gradients, metrics, weight)


def _accumulated_sums(
    loss_fn: LossFn, model: Model, batch: Batch, key: jax.Array, step: jax.Array, parts: int
) -> tuple[PyTree, Totals]:
    """Adds up the sums over ``parts`` equal parts of the batch, one after another."""
    if parts == 1:
        return _weighted_sums(loss_fn, model, batch, key, step)
    split = jax.tree.map(lambda x: _split(x, parts), dict(batch))
    keys = jax.random.split(key, parts)

    def add(carry, part_and_key):
        model_state, totals = carry
        part, key = part_and_key
        model_state, new = _weighted_sums(loss_fn, model.replace(state=model_state), part, key, step)
        return (model_state, jax.tree.map(jnp.add, totals, new)), None

    first, rest = (jax.tree.map(lambda x, s=s: x[s], (split, keys)) for s in (0, slice(1, None)))
    start = _weighted_sums(loss_fn, model, first[0], first[1], step)
    # Unrolled on a CPU, where a convolution inside a loop is 50 times slower
    unroll = parts - 1 if jax.default_backend() == "cpu" else 1
    return jax.lax.scan(add, start, rest, unroll=unroll)[0]


def _split(x: jax.Array, parts: int) -> jax.Array:
    if x.shape[0] % parts:
        raise ValueError(f"accumulate={parts} must divide the batch, which has {x.shape[0]} examples")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _mean_over_devices(tree: PyTree, axis_name: str) -> PyTree:
    """Averages floating-point leaves over a mapped axis; counters and the like are equal everywhere."""

    def one(x):
        inexact = jnp.issubdtype(x.dtype, jnp.inexact)
        return jax.lax.pmean(x, axis_name) if inexact else jax.lax.pmax(x, axis_name)

    return jax.tree.map(one, tree)


def max_norm(limit: float) -> optax.GradientTransformation:
    """Keeps each unit's incoming weights within a ball: after the update, ‖w‖₂ ≤ limit.

    It belongs last in an ``optax.chain``. Dense and convolution kernels are those leaves with two or
    more axes, the last of which counts the units.

    Args:
      limit: the largest L2 norm, > 0.

    Returns:
      An optax transformation without state; its ``update`` needs ``params``.

    Raises:
      ValueError: if ``limit`` is not positive.

    References:
      Srivastava et al., `Dropout`, 2014, §5.1; Hinton et al., 2012 (arXiv 1207.0580), §1.
    """
    check_positive("limit", limit)

    def project(update, param):
        if param.ndim < 2:
            return update
        moved = param + update
        norm = jnp.sqrt(jnp.sum(jnp.square(moved), range(param.ndim - 1), keepdims=True))
        return moved * (limit / jnp.maximum(norm, limit)) - param

    def update_fn(updates, state, params=None):
        return jax.tree.map(project, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)

"""One step for every model, and the epoch made of it.

A step is ``(state, batch) -> (state, metrics)``. Teacher, student, encoder and decoder differ in
their ``loss_fn`` alone (see :mod:`distill_jax.train.objectives`); ``jit``, ``vmap``, ``pmap``,
``shard_map`` and ``scan`` around the step are the caller's choice.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a training run is: arrays alone, so it shards, scans, vmaps and is saved whole.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: the pytree that is trained.
      opt_state: the optimizer's.
      model_state: what the model itself changes, such as BatchNorm's statistics.
      key: every random number of the run derives from it and from ``step``.
    """

    step: jax.Array
    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    key: jax.Array


class LossFn(Protocol):
    """What is minimised.

    It returns ``(loss, (model_state, metrics))``. The loss and every metric are scalars, and *means
    over the batch's examples*, weighted by ``batch["weight"]`` where there is one: from the parts of
    a batch (accumulation, devices) the step then makes the mean of the whole.
    """

    def __call__(  # noqa: D102
        self, params: PyTree, model_state: PyTree, batch: Batch, *, key: jax.Array | None, step: jax.Array
    ) -> tuple[jax.Array, tuple[PyTree, Metrics]]: ...


Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(
    params: PyTree, tx: optax.GradientTransformation, key: jax.Array, model_state: PyTree | None = None
) -> TrainState:
    """Makes the state of a run that has made no step.

    The arrays are copied, so that a step which donates its state leaves the caller's own intact.
    """
    model_state = {} if model_state is None else model_state
    params, model_state, key = jax.tree.map(jnp.copy, (params, model_state, key))
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), model_state, key)


def step_key(state: TrainState, stream: int) -> jax.Array:
    """Derives the key of a step; stream 0 is the model's, 1 the data's."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), stream)


def batch_weight(batch: Batch) -> jax.Array:
    """Sums the weights of a batch: float32 scalar, the number of examples where none has one."""
    if "weight" in batch:
        return jnp.sum(batch["weight"], dtype=jnp.float32)
    return jnp.float32(jax.tree.leaves(batch)[0].shape[0])


def weighted_mean(values: jax.Array, batch: Batch) -> jax.Array:
    """Averages values ``[batch, ...]`` over examples, weighted by ``batch["weight"]`` if there.

    An example of weight 0 counts for nothing, whatever its value. A batch of weight 0 has mean 0.
    """
    values = values.reshape(values.shape[0], -1).mean(-1) if values.ndim > 1 else values
    if "weight" not in batch:
        return jnp.mean(values)
    weight = batch["weight"]
    total = jnp.sum(weight)
    values = jnp.where(weight > 0, values, 0.0)
    return jnp.sum(values * weight) / jnp.where(total > 0, total, 1.0)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    accumulate: int = 1,
    accumulate_axis: str | None = None,
) -> Step:
    """Makes ``(state, batch) -> (state, metrics)``: one update by gradient descent.

    Args:
      loss_fn: see :class:`LossFn`.
      tx: any optax transformation; schedules and clipping belong to it. It sees the gradient of the
        whole batch's mean loss.
      axis_name: the mapped axis that splits the batch, under ``pmap`` and ``shard_map``; None under
        ``jit``, also with a sharded batch. State and metrics are the same on every device.
      accumulate: into how many parts to split the batch, one after another, to save memory. The
        update is the whole batch's, for unequal weights too, except for models that look across
        examples: BatchNorm then sees its part only, and dropout draws anew in each.
      accumulate_axis: run the parts in lockstep instead, as a mapped axis of this name. It saves no
        memory, but a model with ``BatchNorm(axis_name=…)`` written for that many devices then
        computes on one what it would compute on all of them.

    Returns:
      The step. It adds ``"loss"`` and ``"gradient_norm"`` to the metrics of ``loss_fn``.

    Raises:
      ValueError: if ``accumulate`` is not positive or, when the step is traced, does not divide the
        batch.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")

    def weighted_sums(params, model_state, batch, key, step):
        """Sums over a part's examples, which parts and devices can add up."""
        weight = batch_weight(batch)

        def scaled_loss(params):
            loss, aux = loss_fn(params, model_state, batch, key=key, step=step)
            return loss * weight, (loss, aux)

        gradients, (loss, (model_state, metrics)) = jax.grad(scaled_loss, has_aux=True)(params)
        metrics = jax.tree.map(lambda m: m * weight, {**metrics, "loss": loss})
        return model_state, (gradients, metrics, weight)

    def sums(params, model_state, batch, key, step):
        if accumulate == 1:
            return weighted_sums(params, model_state, batch, key, step)
        parts = jax.tree.map(lambda x: _split(x, accumulate), dict(batch))
        keys = jax.random.split(key, accumulate)
        if accumulate_axis:
            states, totals = jax.vmap(
                lambda part, key: weighted_sums(params, model_state, part, key, step),
                axis_name=accumulate_axis,
            )(parts, keys)
            return _mean_inexact(states, lambda x: x.mean(0), lambda x: x[0]), jax.tree.map(
                lambda x: x.sum(0), totals
            )

        def add(carry, part_and_key):
            model_state, totals = carry
            part, key = part_and_key
            model_state, new = weighted_sums(params, model_state, part, key, step)
            return (model_state, jax.tree.map(jnp.add, totals, new)), None

        first, rest = (jax.tree.map(lambda x, s=s: x[s], (parts, keys)) for s in (0, slice(1, None)))
        start = weighted_sums(params, model_state, first[0], first[1], step)
        # Unrolled on a CPU, where a convolution inside a loop is 50 times slower
        unroll = accumulate - 1 if jax.default_backend() == "cpu" else 1
        return jax.lax.scan(add, start, rest, unroll=unroll)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        params, model_state = state.params, state.model_state
        key = step_key(state, 0)
        if axis_name:
            # Each device differentiates its own copy. Without the cast, `shard_map` would sum the
            # gradients of replicated parameters by itself, and `psum` would sum them again.
            params, model_state = jax.tree.map(
                lambda x: jax.lax.pcast(x, axis_name, to="varying"), (params, model_state)
            )
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        model_state, totals = sums(params, model_state, batch, key, state.step)
        if axis_name:
            totals = jax.lax.psum(totals, axis_name)
            model_state = _mean_inexact(
                model_state, lambda x: jax.lax.pmean(x, axis_name), lambda x: jax.lax.pmax(x, axis_name)
            )
        gradients, metrics, weight = totals
        scale = 1.0 / jnp.where(weight > 0, weight, 1.0)
        gradients = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
        metrics = {name: value * scale for name, value in metrics.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        updates, opt_state = tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, model_state, state.key), metrics

    return train_step


def _split(x: jax.Array, parts: int) -> jax.Array:
    if x.shape[0] % parts:
        raise ValueError(f"accumulate={parts} must divide the batch, which has {x.shape[0]} examples")
    return x.reshape(parts, x.shape[0] // parts, *x.shape[1:])


def _mean_inexact(tree: PyTree, mean: Callable, other: Callable) -> PyTree:
    return jax.tree.map(lambda x: mean(x) if jnp.issubdtype(x.dtype, jnp.inexact) else other(x), tree)


def make_eval_step(
    apply_fn: Callable[..., Any],
    metrics: Mapping[str, Callable[[jax.Array, Batch], jax.Array]],
    *,
    axis_name: str | None = None,
) -> Callable[[PyTree, PyTree, Batch], Metrics]:
    """Makes ``(params, model_state, batch) -> sums``: a model's metrics in evaluation mode.

    Args:
      apply_fn: as in :class:`distill_jax.models.Model`.
      metrics: name → ``(outputs, batch) -> [batch]`` values, one an example.
      axis_name: as in :func:`make_train_step`.

    Returns:
      The step. Its result holds for each metric the weighted *sum* over the batch's examples, and
      ``"weight"``, their total weight: sums of batches add up, whatever their sizes.
    """

    def eval_step(params: PyTree, model_state: PyTree, batch: Batch) -> Metrics:
        outputs, _ = apply_fn(params, model_state, batch["image"])
        weight = batch_weight(batch)
        sums = {
            name: weighted_mean(metric(outputs, batch), batch) * weight for name, metric in metrics.items()
        }
        sums["weight"] = weight
        return jax.lax.psum(sums, axis_name) if axis_name else sums

    return eval_step


def max_norm(limit: float) -> optax.GradientTransformation:
    """Keeps each unit's incoming weights within a ball: after the update, ‖w‖₂ ≤ limit.

    It belongs last in an ``optax.chain``. Dense and convolution kernels are those leaves with two or
    more axes, the last of which counts the units.

    Args:
      limit: the largest L2 norm, > 0.

    References:
      Srivastava et al., `Dropout`, 2014, §5.1; Hinton et al., 2012 (arXiv 1207.0580), §1.
    """
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")

    def project(update, param):
        if param.ndim < 2:
            return update
        moved = param + update
        norm = jnp.sqrt(jnp.sum(jnp.square(moved), range(param.ndim - 1), keepdims=True))
        return moved * (limit / jnp.maximum(norm, limit)) - param

    def update_fn(updates, state, params=None):
        return jax.tree.map(project, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)

"""An epoch: many steps as one call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.train.step import Batch, Metrics, PyTree, Step, TrainState, step_key


def scan_is_fast(fn: Callable[..., Any], *args: Any) -> bool:
    """Tells whether ``fn`` may stand in a ``scan``, judging by its jaxpr at ``args``.

    A convolution inside any loop runs 55 to 95 times slower on XLA's CPU backend; everything else,
    and everything on other backends, is fastest in a ``scan``.
    """
    if jax.default_backend() != "cpu":
        return True
    # Printed, a jaxpr shows the primitives of every jaxpr inside it.
    return "conv_general_dilated" not in str(jax.make_jaxpr(fn)(*args))


def make_epoch(
    step: Step,
    *,
    transform: Callable[[PyTree, Batch, jax.Array], Batch] | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes many steps one call: ``epoch(state, data, order, context=None) -> (state, metrics)``.

    Args:
      step: see :func:`make_train_step`.
      transform: ``(context, batch, key) -> batch``, applied to each batch inside the compiled step:
        augmentation, a teacher that labels online. What it needs (the teacher's parameters) comes
        as ``context``, an argument, so that it is not compiled into the program.
      sharding: how the batch is laid over devices (see :mod:`distill_jax.train.parallel`).

    Returns:
      ``epoch``. ``data`` is a dict of arrays ``[examples, ...]``; ``order`` is int32
      ``[steps, batch]``, the rows of each batch; ``metrics`` are arrays ``[steps]``. The state is
      donated: use the one that comes back. The steps run as one ``scan`` where :func:`scan_is_fast`,
      else as a loop over the jitted step, with the same results up to rounding.
    """

    def one(state, rows, data, context):
        batch = jax.tree.map(lambda x: x[rows], data)
        if sharding is not None:
            batch = jax.lax.with_sharding_constraint(batch, sharding)
        if transform is not None:
            batch = transform(context, batch, step_key(state, 1))
        return step(state, batch)

    def scan(state, data, order, context):
        return jax.lax.scan(lambda state, rows: one(state, rows, data, context), state, order)

    jitted_one = jax.jit(one, donate_argnums=0)
    jitted_scan = jax.jit(scan, donate_argnums=0)
    fast: dict[Any, bool] = {}

    def epoch(state, data, order, context=None):
        order = np.asarray(order)
        shapes = tuple(map(np.shape, jax.tree.leaves((state.params, data)))), order.shape[1:]
        if shapes not in fast:
            fast[shapes] = scan_is_fast(one, state, order[0], data, context)
        if fast[shapes]:
            return jitted_scan(state, data, order, context)
        collected = []
        for rows in order:
            state, metrics = jitted_one(state, rows, data, context)
            collected.append(metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *collected)

    return epoch


def epoch_order(seed: int, epoch: int, examples: int, batch_size: int) -> np.ndarray:
    """Shuffles an epoch: rows int32 ``[steps, batch_size]``, a pure function of its arguments.

    The remainder that fills no batch sits the epoch out, another one in each.
    """
    if not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size must be 1 to the number of training examples, {examples}, got {batch_size}"
        )
    steps = examples // batch_size
    rows = np.random.default_rng([seed, epoch]).permutation(examples)[: steps * batch_size]
    return rows.reshape(steps, batch_size).astype(np.int32)

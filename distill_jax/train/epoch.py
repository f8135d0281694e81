"""An epoch: many steps as one call."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, check_function, check_integers, is_integer, takes
from distill_jax._cpu import compiler_options
from distill_jax._jaxpr import primitives
from distill_jax.train.step import Batch, Metrics, PyTree, Step, TrainState, step_key


def scan_is_fast(fn: Callable[..., Any], *args: Any) -> bool:
    """Says whether ``fn`` runs fast inside a ``scan``, judging by its jaxpr at ``args``.

    A convolution inside any loop runs 55 to 95 times slower on XLA's CPU backend. Everything else, and
    everything on other backends, is fastest in a ``scan``.

    Args:
      fn: a function of ``args``.
      args: its arguments; only shapes and dtypes are used.

    Returns:
      Whether to put it into a ``scan``.
    """
    if jax.default_backend() != "cpu":
        return True
    return "conv_general_dilated" not in primitives(jax.make_jaxpr(fn)(*args))


def make_epoch(
    step: Step,
    *,
    transform: Callable[[PyTree, Batch, jax.Array], Batch] | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes one call of many steps: ``epoch(state, data, order, context=None) -> (state, metrics)``.

    Args:
      step: a train step, from :func:`make_train_step`.
      transform: ``(context, batch, key) -> batch``, applied to each batch inside the compiled step, for
        augmentation or for a teacher that labels online. Arrays that it needs, such as the teacher,
        are passed as ``context``: an argument, so that they are not compiled into the program. One with a
        parameter ``model``, such as that of :func:`on_policy`, also gets the model in training by that name.
      sharding: how each batch is laid over devices, from :func:`sharded`.

    Returns:
      ``epoch``. ``data`` is a dict of arrays ``[examples, ...]``; ``order`` is int32
      ``[steps, batch]``, the rows of each batch; ``metrics`` are arrays ``[steps]``. The state is
      donated: use the one that is returned. The steps run as one ``scan`` where :func:`scan_is_fast`,
      and otherwise as a loop over the jitted step, with the same results up to rounding.

    Raises:
      ValueError: if ``step`` or ``transform`` is no such function; from ``epoch``, if ``order`` is no such array.
    """
    check_function("step", step, "state, batch")
    on_policy = False
    if transform is not None:
        on_policy = callable(transform) and takes(transform, "model")
        check_function("transform", transform, "context, batch, key" + (", *, model" if on_policy else ""))

    def one(state, rows, data, context):
        batch = jax.tree.map(lambda x: x[rows], data)
        if sharding is not None:
            batch = jax.lax.with_sharding_constraint(batch, sharding)
        if transform is not None:
            options = {"model": state.model} if on_policy else {}
            batch = transform(context, batch, step_key(state, 1), **options)
        return step(state, batch)

    return in_one_call(one)


def in_one_call(
    one: Callable[..., tuple[Any, Metrics]], *, axes: tuple[int, ...] = (2,)
) -> Callable[..., tuple[Any, Metrics]]:
    """Makes one call of many: ``(state, data, order, context=None) -> (state, metrics)``.

    Args:
      one: ``(state, rows, data, context) -> (state, metrics)``, where ``rows`` are those of ``order`` in turn.
      axes: the numbers of axes that ``order`` may have.

    Returns:
      The call. The state is donated.
    """

    def scan(state, data, order, context):
        return jax.lax.scan(lambda state, rows: one(state, rows, data, context), state, order)

    @functools.cache
    def jitted(fn: Callable[..., Any], traced: bool) -> Callable[..., Any]:
        # JAX refuses compiler options inside of another jitted function
        return jax.jit(fn, donate_argnums=0, compiler_options=None if traced else compiler_options())

    fast: dict[Any, bool] = {}

    def epoch(state, data, order, context=None):
        check_integers("order", order)
        order = np.asarray(order)
        examples = min((len(leaf) for leaf in jax.tree.leaves(data)), default=0)
        if order.ndim not in axes or not order.size or order.min() < 0 or order.max() >= examples:
            raise ValueError(
                f"order must be rows [steps, batch] of the {examples} examples, such as epoch_order makes it, got "
                f"shape {order.shape}" + (f" from {order.min()} to {order.max()}" if order.size else "")
            )
        leaves, structure = jax.tree.flatten((state, data, context))  # models' functions are in the structure
        program = structure, tuple(map(np.shape, leaves)), order.shape[1:]
        if program not in fast:
            fast[program] = scan_is_fast(one, state, order[0], data, context)
        traced = isinstance(
            jnp.zeros(()), jax.core.Tracer
        )  # inside of a jitted function even a constant is traced
        if fast[program]:
            return jitted(scan, traced)(state, data, order, context)
        collected = []
        for rows in order:
            state, metrics = jitted(one, traced)(state, rows, data, context)
            collected.append(metrics)
        return state, jax.tree.map(lambda *values: jnp.stack(values), *collected)

    return epoch


def epoch_order(seed: int, epoch: int, examples: int, batch_size: int) -> np.ndarray:
    """Shuffles the examples of an epoch; a pure function of its arguments.

    Examples that do not fill a whole batch are left out of the epoch, different ones in each.

    Args:
      seed: the seed of the shuffling.
      epoch: the number of the epoch.
      examples: the number of examples.
      batch_size: the number of examples per batch.

    Returns:
      The rows of each batch, int32 ``[steps, batch_size]``.

    Raises:
      ValueError: if ``batch_size`` does not lie between 1 and the number of examples.
    """
    check_count("seed", seed, least=0)
    check_count("epoch", epoch, least=0)
    check_count("examples", examples)
    if not is_integer(batch_size) or not 1 <= batch_size <= examples:
        raise ValueError(
            f"batch_size must be 1 to the number of training examples, {examples}, got {batch_size}"
        )
    steps = examples // batch_size
    rows = np.random.default_rng([seed, epoch]).permutation(examples)[: steps * batch_size]
    return rows.reshape(steps, batch_size).astype(np.int32)

"""The straight line between two trained networks: its barrier, and new BatchNorm statistics on it."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_fraction, check_function, check_real, need
from distill_jax._model import Model, PyTree, check_model
from distill_jax.weights.means import lerp
from distill_jax.weights.structure import by_path, is_float


class StaleStatisticsWarning(UserWarning):
    """Running statistics belong to other parameters than those they are used with."""


def recalibrate(model: Model, batches: Iterable[Mapping[str, Any]], *, key: jax.Array | None = None) -> Model:
    """Estimates BatchNorm's running statistics anew, as every averaging of parameters requires.

    The statistics of an averaged network are not the average of statistics: they belong to activations
    that no network had before. In training mode a running statistic becomes m·s + (1 − m)·x with the
    batch's statistic x, in every library. Two starts, s = 0 and s = c, give m and therefore x. The
    result is the mean of x over the batches, weighted by their sizes, and independent of the old value.

    Args:
      model: the model with averaged parameters; the values of its state do not matter.
      batches: training batches with ``"image"``, the model's input. A few hundred examples are enough.
      key: a random key for training mode, for example for dropout. None uses a fixed key.

    Returns:
      The model with a new state. Leaves that training mode does not change, or that are no
      floating-point numbers, stay as they are. A model without such statistics is returned unchanged.

    Raises:
      ValueError: if there are no batches, or a statistic is no running mean (its path is named).

    References:
      Izmailov et al., `Averaging Weights Leads to Wider Optima and Better Generalization`, 2018, §3.2.
    """
    check_model("model", model)
    if not jax.tree.leaves(model.state):
        return model
    key = jax.random.key(0) if key is None else key
    total, count = None, 0
    for number, batch in enumerate(batches):
        need(batch, "image")
        images = batch["image"]
        size = len(jax.tree.leaves(images)[0])
        found = _statistics(model, images, jax.random.fold_in(key, number))
        found = jax.tree.map(lambda x, n=size: n * x, found)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += size
    if total is None:
        raise ValueError("batches must have at least one batch, got none")
    values, spread = jax.tree.map(lambda x: x / count, total)
    wrong = [path for path, x in by_path(spread).items() if not x < 1e-3]
    if wrong:
        raise ValueError(
            f"the state has leaves that are no running means and cannot be recalibrated: {wrong}"
        )
    state = jax.tree.map(
        lambda s, x: x.astype(jnp.asarray(s).dtype) if is_float(s) else s, model.state, values
    )
    return model.replace(state=state)


@jax.jit
def _statistics(model: Model, x: Any, key: jax.Array) -> Any:
    """The batch's statistics, and by how much each leaf's momentum differs between its entries."""
    model_state = model.state

    def after(state):
        return model.replace(state=state).apply(x, key=key)[1]

    def start(scales):
        return jax.tree.map(lambda s, c: jnp.full_like(s, c) if is_float(s) else s, model_state, scales)

    low = after(start(jax.tree.map(lambda s: 0.0, model_state)))
    # As large as what is added to it, so that the difference has all its digits
    scales = jax.tree.map(lambda s: 1 + jnp.max(jnp.abs(s)) if is_float(s) else 0.0, low)
    high = after(start(scales))

    def solve(s, a, b, c):
        if not is_float(s):
            return jnp.float32(0), jnp.float32(0)
        momentum = (b - a) / c
        m = jnp.mean(momentum)
        # What the network does not change: each start stayed what it was
        constant = jnp.all((a == 0) & (b == c))
        value = jnp.where(constant, s, a / jnp.where(constant, 1, 1 - m))
        possible = constant | ((m > -1e-3) & (m < 1 - 1e-6))
        spread = jnp.where(possible, jnp.max(jnp.abs(momentum - m)), jnp.nan)
        return value.astype(jnp.float32), spread.astype(jnp.float32)

    solved = jax.tree.map(solve, model_state, low, high, scales)
    outer, inner = jax.tree.structure(model_state), jax.tree.structure((0, 0))
    return jax.tree.transpose(outer, inner, solved)


def along(
    evaluate: Callable[[Any], Any],
    start: PyTree,
    end: PyTree,
    ts: ArrayLike | Sequence[float],
    *,
    refresh: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Evaluates the networks on the straight line between two: (1 − t)·start + t·end.

    Args:
      evaluate: ``model -> figures``, for example from :func:`distill_jax.train.make_validation`.
      start: the model (or any pytree) at t = 0.
      end: the model at t = 1.
      ts: the points, each in [0, 1].
      refresh: ``model -> model``: :func:`recalibrate` with the batches filled in. Networks with running
        statistics need it.

    Returns:
      What ``evaluate`` returned, one entry per point.

    Raises:
      ValueError: if the two models do not fit.

    Warns:
      StaleStatisticsWarning: if there are running statistics and no ``refresh``.

    >>> along(lambda w: round(float(w) ** 2, 2), -1.0, 1.0, [0, 0.5, 0.75])
    [1.0, 0.0, 0.25]
    """
    check_fraction("ts", ts)
    if np.ndim(ts) != 1:
        raise ValueError(f"ts must be a list of points, got {ts!r}")
    check_function("evaluate", evaluate, "model")
    if refresh is None and isinstance(start, Model):
        warn_if_stale(start.state)
    between = (lerp(start, end, float(t)) for t in np.asarray(ts))
    return [evaluate(model if refresh is None else refresh(model)) for model in between]


def barrier(ts: ArrayLike | Sequence[float], losses: ArrayLike | Sequence[float]) -> float:
    """Computes the loss barrier: the highest rise above the chord, max L(t) − ((1 − t)·L(0) + t·L(1)).

    Args:
      ts: the points ``[n]``, rising from 0 to 1.
      losses: the loss at each point, ``[n]``.

    Returns:
      0 or more: at the ends the rise is 0.

    Raises:
      ValueError: if the points do not rise from 0 to 1, or are not as many as the losses.

    References:
      Entezari et al., `The Role of Permutation Invariance in Linear Mode Connectivity of Neural
      Networks`, 2022, Eq. 1.

    >>> barrier([0, 0.5, 1], [1.0, 4.0, 2.0])
    2.5
    """
    check_real("ts", ts)
    check_real("losses", losses)
    t, values = np.asarray(ts, np.float64), np.asarray(losses, np.float64)
    if t.ndim != 1 or t.shape != values.shape or not t.size:
        raise ValueError(f"ts and losses must be [n], got shapes {t.shape} and {values.shape}")
    if t[0] != 0 or t[-1] != 1 or not (np.diff(t) > 0).all():
        raise ValueError(f"ts must rise from 0 to 1, got {t}")
    return float(np.max(values - ((1 - t) * values[0] + t * values[-1])))


def warn_if_stale(state: PyTree) -> None:
    """Warns that running statistics, if there are any, do not belong to averaged parameters.

    Args:
      state: the state of the averaged model.

    Warns:
      StaleStatisticsWarning: naming every path.
    """
    paths = [path for path, leaf in by_path(state).items() if is_float(leaf)]
    if paths:
        warnings.warn(
            "running statistics were averaged, and are not those of the averaged parameters: "
            f"re-estimate them with distill_jax.weights.recalibrate; {', '.join(paths)}",
            StaleStatisticsWarning,
            stacklevel=3,
        )

"""The one training loop: epochs, validation, checkpoints, resume."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses, metrics
from distill_jax.train.checkpoints import Checkpoints
from distill_jax.train.epoch import epoch_order
from distill_jax.train.step import TrainState, make_eval_step

PyTree = Any
History = dict[str, list[float]]


class Fit(NamedTuple):
    """What training gave.

    Attributes:
      state: after the last epoch.
      best: ``(params, model_state)`` of the epoch with the fewest validation errors (or the lowest of
        another figure), the latest of equals; those of ``state`` without validation.
      history: ``"epoch"``, ``"loss"`` (mean over the epoch), the other metrics, and the validation
        figures, a value an epoch.
      seconds: wall time of the epochs, over all restarts.
    """

    state: TrainState
    best: tuple[PyTree, PyTree]
    history: History
    seconds: float


def make_validation(
    apply_fn: Callable[..., Any],
    data: Mapping[str, Any],
    *,
    prepare: Callable[[Any], Any] = lambda x: x,
    batch_size: int = 1000,
) -> Callable[[PyTree, PyTree], dict[str, float]]:
    """Makes ``(params, model_state) -> {"validation_errors", "validation_nll"}``: a count, and nats.

    Args:
      apply_fn: as in :class:`distill_jax.models.Model`.
      data: ``"image"`` and integer ``"label"``, ``[n, ...]``.
      prepare: applied to each batch of images inside the compiled program.
      batch_size: examples at a time.
    """
    step = make_eval_step(
        lambda params, model_state, x: apply_fn(params, model_state, prepare(x)),
        {
            "errors": lambda logits, batch: metrics.errors(logits, batch["label"]),
            "nll": lambda logits, batch: losses.cross_entropy(logits, batch["label"]),
        },
    )
    run = jax.jit(step)
    count = len(data["label"])
    size = min(batch_size, count)
    batches = []
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        batch = {name: jnp.asarray(data[name][rows % count]) for name in ("image", "label")}
        batches.append({**batch, "weight": jnp.asarray(rows < count, jnp.float32)})

    def validate(params, model_state):
        parts = [run(params, model_state, batch) for batch in batches]
        totals = jax.tree.map(lambda *x: sum(map(float, x)), *parts)
        return {"validation_errors": totals["errors"], "validation_nll": totals["nll"] / totals["weight"]}

    return validate


def fit(
    state: TrainState,
    epoch: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    data: Mapping[str, Any],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    context: PyTree = None,
    validate: Callable[[PyTree, PyTree], dict[str, float]] | None = None,
    best_by: str = "validation_errors",
    stop: Callable[[History], bool] = lambda history: False,
    directory: str | Path | None = None,
    save_seconds: float = 20.0,
    on_epoch: Callable[[int, dict[str, float]], Any] = lambda done, figures: None,
) -> Fit:
    """Trains for a number of epochs; continues where an earlier, interrupted call stopped.

    The result does not depend on where, or how often, it was interrupted: the order of examples is
    a function of ``seed`` and the epoch, every other random number of ``state.key`` and the step.

    Args:
      state: the start (donated: use what comes back).
      epoch: see :func:`distill_jax.train.make_epoch`.
      data: arrays ``[examples, ...]`` by name, or trees of them.
      epochs: how many, in all.
      batch_size: examples a step.
      seed: of the shuffling.
      context: passed to ``epoch``.
      validate: ``(params, model_state) -> figures``, after each epoch.
      best_by: the figure that is lowest in the best epoch.
      stop: ``history -> bool``, asked after each epoch whether to end before ``epochs``. A function of
        the history alone, so that a resumed training ends where an undisturbed one does.
      directory: where checkpoints are kept; None keeps none.
      save_seconds: the least time between two checkpoints. The last epoch is always saved.
      on_epoch: called with the number of epochs done and the figures, once at a resume too.

    Raises:
      ValueError: if the loss is no longer finite; or the directory holds the checkpoint of another
        model, optimizer, seed, batch size or number of examples. (Other differences, such as a learning
        rate, it cannot see: :func:`harness.runs.open_run` keeps a run's options.)
    """
    data = jax.tree.map(jnp.asarray, dict(data))
    examples = len(jax.tree.leaves(data)[0])
    best = jax.tree.map(jnp.copy, (state.params, state.model_state))
    run = {"seed": seed, "batch_size": batch_size, "examples": examples}
    info: dict[str, Any] = {"epoch": 0, "best": math.inf, "history": {}, "seconds": 0.0} | run
    checkpoints = Checkpoints(directory) if directory is not None else None
    try:
        if checkpoints and (found := checkpoints.restore({"state": state, "best": best})):
            tree, info = found
            state, best = tree["state"], tree["best"]
            other = [f"{k} {info[k]}, not {v}" for k, v in run.items() if info[k] != v]
            if other:
                raise ValueError(
                    f"the checkpoint in {directory} is of a run with {', '.join(other)}: "
                    "use another directory, or delete this one"
                )
            if info["epoch"] > epochs:
                raise ValueError(
                    f"the checkpoint in {directory} has {info['epoch']} epochs, more than the "
                    f"{epochs} asked for: use another directory, or delete this one"
                )
            history = info["history"]
            on_epoch(info["epoch"], {name: values[-1] for name, values in history.items()})
        saved = time.monotonic()
        ended = info["epoch"] > 0 and stop(info["history"])
        for number in range(info["epoch"], epochs):
            if ended:
                break
            start = time.monotonic()
            order = epoch_order(seed, number, examples, batch_size)
            state, collected = epoch(state, data, order, context)
            figures = {name: float(np.mean(values)) for name, values in collected.items()}
            if not math.isfinite(figures["loss"]):
                kept = f"; the last checkpoint is in {directory}" if checkpoints else ""
                raise ValueError(
                    f"the loss became {figures['loss']} in epoch {number + 1}: the training has "
                    f"diverged; use a smaller learning rate{kept}"
                )
            if validate:
                figures |= validate(state.params, state.model_state)
            rank = figures.get(best_by, -math.inf)
            if rank <= info["best"]:
                best = jax.tree.map(jnp.copy, (state.params, state.model_state))
            history = {
                name: [*info["history"].get(name, []), value]
                for name, value in {"epoch": number + 1, **figures}.items()
            }
            now = time.monotonic()
            info = {
                "epoch": number + 1,
                "best": min(rank, info["best"]),
                "history": history,
                "seconds": info["seconds"] + now - start,
            } | run
            ended = number + 1 == epochs or stop(history)
            if checkpoints and (now - saved >= save_seconds or ended):
                checkpoints.save(number + 1, {"state": state, "best": best}, info)
                saved = now
            on_epoch(number + 1, figures)
    finally:
        if checkpoints:
            checkpoints.close()
    return Fit(state, best, info["history"], info["seconds"])

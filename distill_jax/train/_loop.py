"""The loop over epochs that one training and a sweep of many have in common."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, check_function, warn_if_probabilities
from distill_jax._model import Model, PyTree, example_count
from distill_jax.train._examples import as_arrays, complaint_about
from distill_jax.train.checkpoints import Checkpoints
from distill_jax.train.objectives import teacher_of

History = dict[str, Any]  # each a list with one number per epoch


class Fit(NamedTuple):
    """The result of a training.

    Attributes:
      state: the training state after the last epoch.
      best: the model of the epoch with the fewest validation errors (or the lowest of another figure),
        the latest of equal ones; the last model where there is no validation.
      history: ``"epoch"``, ``"loss"`` (mean over the epoch), the other metrics and the validation figures,
        each a list with one value per epoch. (In a sweep, the figures are arrays ``[epochs, students]``.)
      seconds: wall time of the epochs, over all restarts.
    """

    state: Any
    best: Model
    history: History
    seconds: float

    @property
    def model(self) -> Model:
        """The model after the last epoch."""
        return self.state.model


def check_options(
    state: Any, epoch: Any, epochs: Any, batch_size: Any, seeds: Sequence[Any], validate: Any, best_by: str,
    save_seconds: Any, on_epoch: Any,
) -> None:  # fmt: skip
    """Refuses arguments of :func:`fit`, or that of a sweep, before anything is trained or written."""
    if not all(hasattr(state, name) for name in ("step", "key", "model")):
        raise ValueError(f"state must be a training state, from init_state, got {type(state).__name__}")
    check_function("epoch", epoch, "state, data, order, context")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    for seed in seeds:
        check_count("seed", seed, least=0)
    if validate is not None:
        check_function("validate", validate, "model")
    elif best_by != "validation_errors":
        raise ValueError(f"best_by needs validate, which makes the figures, got {best_by!r} without it")
    check_function("on_epoch", on_epoch, "done, figures")
    if isinstance(save_seconds, str) or not save_seconds >= 0:
        raise ValueError(f"save_seconds must not be negative, got {save_seconds!r}")


def checked_data(data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns the training data as JAX arrays, and the number of examples.

    Args:
      data: name → array ``[examples, ...]``, or name → pytree of such arrays.

    Raises:
      ValueError: if they are not arrays of equal length.
    """
    arrays = as_arrays("data", data)
    if "teacher" in arrays:
        for logits in jax.tree.leaves(teacher_of(arrays)["logits"]):
            warn_if_probabilities("the teacher's logits in data['teacher']", logits)
    return arrays, example_count("data", arrays)


def ranks(figures: Mapping[str, Any], best_by: str) -> np.ndarray:
    """Ranks what was trained: the figure ``best_by``, or ∞ where it is NaN or the loss is not finite.

    Args:
      figures: the figures of an epoch, or a history: numbers, or arrays of equal leading axes.
      best_by: the name of the figure.
    """
    rank = np.asarray(figures[best_by], np.float64)
    loss = np.asarray(figures["loss"], np.float64).reshape(*rank.shape, -1).mean(-1)
    return np.where(np.isfinite(loss) & ~np.isnan(rank), rank, np.inf)


def run_epochs(
    start: Fit,
    epoch: Callable[..., tuple[Any, dict[str, jax.Array]]],
    data: Mapping[str, Any],
    *,
    epochs: int,
    order: Callable[[int], np.ndarray],
    identity: Mapping[str, Any],
    context: PyTree,
    validate: Callable[[Model], dict[str, Any]] | None,
    best_by: str,
    stop: Callable[[History], bool],
    directory: str | Path | None,
    save_seconds: float,
    on_epoch: Callable[[int, dict[str, Any]], Any],
) -> Fit:
    """Runs the loop of :func:`fit`, and that of :func:`distill_jax.train.sweeps.fit`.

    Metrics and figures are numbers, or in a sweep have a first axis of students: then the best model is each
    student's own, and a student whose loss is no longer finite only ranks last.

    Args:
      start: what is there before the first epoch, or the result of an earlier call that this one goes on from.
      epoch: as in :func:`fit`.
      data: from :func:`checked_data`.
      epochs: the number of epochs in all, those of ``start`` included.
      order: the number of an epoch → the rows of its batches.
      identity: JSON values by which a checkpoint of this run is known.
      context: as in :func:`fit`, and so are the others.
      validate: ``model -> figures``.
      best_by: the name of the figure that is lowest in the best epoch.
      stop: ``history -> bool``.
      directory: where checkpoints are kept.
      save_seconds: the shortest time between two checkpoints.
      on_epoch: called with the number of epochs done and the figures.
    """
    state, best, history, seconds = start
    context = jax.tree.map(jnp.asarray, context)  # once, and not at each step
    done = len(history.get("epoch", ()))
    lowest = ranks(history, best_by).min(0).tolist() if done and validate else math.inf
    info: dict[str, Any] = {"epoch": done, "best": lowest, "history": history, "seconds": seconds, **identity}
    checkpoints = Checkpoints(directory) if directory is not None else None
    try:
        if checkpoints and (found := checkpoints.restore({"state": state, "best": best})):
            tree, info = found
            state, best = tree["state"], tree["best"]
            other = [f"{k} {info.get(k)}, not {v}" for k, v in identity.items() if info.get(k) != v]
            if other:
                raise ValueError(
                    f"the checkpoint in {directory} is of a run with {', '.join(other)}: "
                    "use another directory, or move this one away"
                )
            if info["epoch"] > epochs:
                raise ValueError(
                    f"the checkpoint in {directory} has {info['epoch']} epochs, more than the "
                    f"{epochs} asked for: use another directory, or move this one away"
                )
            history = info["history"]
            on_epoch(info["epoch"], {name: values[-1] for name, values in history.items()})
        saved = time.monotonic()
        ended = info["epoch"] > 0 and stop(info["history"])
        for number in range(info["epoch"], epochs):
            if ended:
                break
            begun = time.monotonic()
            state, collected = epoch(state, data, order(number), context)
            figures = {name: np.asarray(np.mean(values, 0)).tolist() for name, values in collected.items()}
            finite = np.isfinite(figures["loss"])
            if not (finite.any() if validate else finite.all()):
                loss = np.mean(figures["loss"])
                if complaint := complaint_about(data, state.model, data.get("image")):
                    raise ValueError(f"the loss became {loss} in epoch {number + 1}: {complaint}")
                kept = f"; the last checkpoint is in {directory}" if checkpoints else ""
                raise ValueError(
                    f"the loss became {loss} in epoch {number + 1}: the training has "
                    f"diverged; use a smaller learning rate{kept}"
                )
            if validate:
                found_figures = validate(state.model)
                if not isinstance(found_figures, Mapping):
                    raise ValueError(
                        f"validate must return a dict of figures, got {type(found_figures).__name__}"
                    )
                figures |= found_figures
                if best_by not in figures:
                    raise ValueError(f"best_by must be one of {', '.join(figures)}, got {best_by!r}")
            rank = ranks(figures, best_by) if validate else np.float64(-np.inf)
            best = _choose(rank <= info["best"], state.model, best)
            history = {
                name: [*info["history"].get(name, []), value]
                for name, value in {"epoch": number + 1, **figures}.items()
            }
            now = time.monotonic()
            info = {
                "epoch": number + 1,
                "best": np.minimum(rank, info["best"]).tolist(),
                "history": history,
                "seconds": info["seconds"] + now - begun,
                **identity,
            }
            ended = number + 1 == epochs or stop(history)
            if checkpoints and (now - saved >= save_seconds or ended):
                checkpoints.save(number + 1, {"state": state, "best": best}, info)
                saved = now
            on_epoch(number + 1, figures)
    finally:
        if checkpoints:
            checkpoints.close()
    return Fit(state, best, info["history"], info["seconds"])


def _choose(better: np.ndarray, new: Model, old: Model) -> Model:
    """Takes the new model, or of stacked models those of the students that became better, and copies it."""
    if better.all():
        return jax.tree.map(jnp.copy, new)
    if not better.any():
        return old
    return jax.tree.map(lambda x, y: jnp.where(better.reshape(-1, *[1] * (x.ndim - 1)), x, y), new, old)

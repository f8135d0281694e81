"""The training loop: epochs, validation, checkpoints, resume."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, check_function, need, warn_if_probabilities
from distill_jax._model import Model, PyTree, check_model, example_count, identity, padded_batches
from distill_jax.train._examples import as_arrays, complaint_about
from distill_jax.train.checkpoints import Checkpoints
from distill_jax.train.epoch import epoch_order
from distill_jax.train.objectives import supervised, teacher_of
from distill_jax.train.step import Batch, LossFn, batch_weight

History = dict[str, list[float]]


class Fit(NamedTuple):
    """The result of a training.

    Attributes:
      state: the training state after the last epoch.
      best: the model of the epoch with the fewest validation errors (or the lowest of another figure),
        the latest of equal ones; the last model where there is no validation.
      history: ``"epoch"``, ``"loss"`` (mean over the epoch), the other metrics and the validation figures,
        each a list with one value per epoch.
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


def make_measure(
    loss_fn: LossFn,
    data: Mapping[str, Any],
    *,
    prepare: Callable[[Any], Any] = identity,
    batch_size: int = 1000,
) -> Callable[[Model], dict[str, float]]:
    """Makes a function that evaluates an objective on validation data: ``model -> figures``.

    Args:
      loss_fn: the objective, run in evaluation mode at step 0 of its schedules.
      data: name → array ``[n, ...]``, with ``"weight"`` where examples count unequally.
      prepare: applied to the images of each batch inside the compiled program.
      batch_size: the number of examples per batch.

    Returns:
      A function whose figures are ``"validation_loss"`` and, for each metric, ``"validation_<name>"``, means over
      the examples; and ``"validation_errors"``, the number of wrong ones, where there is an ``"error_rate"``.

    Raises:
      ValueError: if ``data`` are no examples; when called, if ``model`` is no Model, or the loss is NaN because
        of NaN in the data or of labels that are no classes of the model.
    """
    check_function("loss_fn", loss_fn, "model, batch, *, key, step")
    check_function("prepare", prepare, "images")
    need(data, "image")
    as_arrays("data", data)
    data = {"weight": np.ones(count_examples(data), np.float32), **data}
    batches = [
        {**jax.tree.map(jnp.asarray, batch), "weight": jnp.asarray(batch["weight"] * counted, jnp.float32)}
        for batch, counted in padded_batches(data, batch_size)
    ]

    @jax.jit
    def sums(model: Model, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
        batch = {**batch, "image": prepare(batch["image"])}
        loss, (_, metrics) = loss_fn(model, batch, key=None, step=jnp.int32(0))
        weight = batch_weight(batch)
        return jax.tree.map(lambda m: m * weight, {**metrics, "loss": loss}), weight

    def measure(model: Model) -> dict[str, float]:
        check_model("model", model)
        parts = [sums(model, batch) for batch in batches]
        totals, weight = jax.tree.map(lambda *x: sum(map(float, x)), *parts)
        if math.isnan(totals["loss"]):
            images = jax.eval_shape(prepare, batches[0]["image"])
            if complaint := complaint_about(data, model, images):
                raise ValueError(f"the validation loss is NaN: {complaint}")
        figures = {f"validation_{name}": total / weight for name, total in totals.items()}
        if "error_rate" in totals:
            figures["validation_errors"] = totals["error_rate"]
        return figures

    return measure


def count_examples(data: Mapping[str, Any]) -> int:
    """Counts the examples of a data set by its images."""
    return example_count("the images", data["image"])


def make_validation(
    data: Mapping[str, Any], *, prepare: Callable[[Any], Any] = identity, batch_size: int = 1000
) -> Callable[[Model], dict[str, float]]:
    """Makes the validation of a classifier: ``model -> {"validation_errors", "validation_nll"}``.

    Args:
      data: ``"image"`` and integer ``"label"``, arrays ``[n, ...]``.
      prepare: applied to each batch of images inside the compiled program.
      batch_size: the number of examples per batch.

    Returns:
      A function that gives the number of wrong examples and the mean negative log-likelihood in nats.
    """
    need(data, "image", "label")
    data = {name: data[name] for name in ("image", "label")}
    measure = make_measure(supervised(), data, prepare=prepare, batch_size=batch_size)

    def validate(model: Model) -> dict[str, float]:
        figures = measure(model)
        return {
            "validation_errors": figures["validation_errors"],
            "validation_nll": figures["validation_loss"],
        }

    return validate


def _check_options(
    state: Any, epoch: Any, epochs: Any, batch_size: Any, seed: Any, validate: Any, best_by: str, stop: Any,
    save_seconds: Any, on_epoch: Any,
) -> None:  # fmt: skip
    """Refuses arguments of :func:`fit` before anything is trained or written."""
    if not all(hasattr(state, name) for name in ("step", "key", "model")):
        raise ValueError(f"state must be a training state, from init_state, got {type(state).__name__}")
    check_function("epoch", epoch, "state, data, order, context")
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_count("seed", seed, least=0)
    if validate is not None:
        check_function("validate", validate, "model")
    elif best_by != "validation_errors":
        raise ValueError(f"best_by needs validate, which makes the figures, got {best_by!r} without it")
    check_function("stop", stop, "history")
    check_function("on_epoch", on_epoch, "done, figures")
    if isinstance(save_seconds, str) or not save_seconds >= 0:
        raise ValueError(f"save_seconds must not be negative, got {save_seconds!r}")


def fit(
    state: PyTree,
    epoch: Callable[..., tuple[Any, dict[str, jax.Array]]],
    data: Mapping[str, Any],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    context: PyTree = None,
    validate: Callable[[Model], dict[str, float]] | None = None,
    best_by: str = "validation_errors",
    stop: Callable[[History], bool] = lambda history: False,
    directory: str | Path | None = None,
    save_seconds: float = 20.0,
    on_epoch: Callable[[int, dict[str, float]], Any] = lambda done, figures: None,
) -> Fit:
    """Trains for a number of epochs; continues where an earlier, interrupted call stopped.

    The result does not depend on where, or how often, it was interrupted: the order of the examples is
    a function of ``seed`` and the epoch, and every other random number of the state's key and the step.

    Args:
      state: the state at the start, from :func:`distill_jax.train.init_state` (donated: use the one that is
        returned). Any pytree with ``step``, ``key`` and ``model`` will do, such as the ``Pair`` of
        :mod:`distill_jax.train.interpolation`.
      epoch: a function from :func:`distill_jax.train.make_epoch`.
      data: name → array ``[examples, ...]``, or name → pytree of such arrays.
      epochs: the number of epochs in all.
      batch_size: the number of examples per step.
      seed: the seed of the shuffling.
      context: passed to ``epoch``, for its ``transform``.
      validate: ``model -> figures``, called after each epoch.
      best_by: the name of the figure that is lowest in the best epoch.
      stop: ``history -> bool``, called after each epoch; True ends the training before ``epochs``. It must be
        a function of the history alone, so that a resumed training ends where an undisturbed one does.
      directory: where checkpoints are kept; None keeps none.
      save_seconds: the shortest time between two checkpoints, in seconds. The last epoch is always saved.
      on_epoch: called with the number of epochs done and the figures, once at a resume too.

    Warns:
      UserWarning: if ``data["teacher"]`` seems to hold probabilities and not logits.

    Returns:
      The final state, the best model, the history and the time.

    Raises:
      ValueError: if an argument is not what is said above; if the arrays of ``data`` are not equally long, or a
        teacher's output is NaN; if the loss is no longer finite, because of NaN in the data, of labels that are no
        classes, or because the training diverges; if
        ``best_by`` is not among the figures; or if the directory holds the checkpoint of another model,
        optimizer, seed, batch size or number of examples. (It cannot see other differences, such as a
        learning rate: use another directory for another run.)
    """
    _check_options(state, epoch, epochs, batch_size, seed, validate, best_by, stop, save_seconds, on_epoch)
    data = as_arrays("data", data)
    if "teacher" in data:
        for logits in jax.tree.leaves(teacher_of(data)["logits"]):
            warn_if_probabilities("the teacher's logits in data['teacher']", logits)
    examples = example_count("data", data)
    best = jax.tree.map(jnp.copy, state.model)
    run = {"seed": seed, "batch_size": batch_size, "examples": examples}
    info: dict[str, Any] = {"epoch": 0, "best": math.inf, "history": {}, "seconds": 0.0} | run
    checkpoints = Checkpoints(directory) if directory is not None else None
    try:
        if checkpoints and (found := checkpoints.restore({"state": state, "best": best})):
            tree, info = found
            state, best = tree["state"], tree["best"]
            other = [f"{k} {info.get(k)}, not {v}" for k, v in run.items() if info.get(k) != v]
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
            start = time.monotonic()
            order = epoch_order(seed, number, examples, batch_size)
            state, collected = epoch(state, data, order, context)
            figures = {name: float(np.mean(values)) for name, values in collected.items()}
            if not math.isfinite(figures["loss"]):
                if complaint := complaint_about(data, state.model, data.get("image")):
                    raise ValueError(f"the loss became {figures['loss']} in epoch {number + 1}: {complaint}")
                kept = f"; the last checkpoint is in {directory}" if checkpoints else ""
                raise ValueError(
                    f"the loss became {figures['loss']} in epoch {number + 1}: the training has "
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
            rank = figures[best_by] if validate else -math.inf
            rank = math.inf if math.isnan(rank) else rank
            if rank <= info["best"]:
                best = jax.tree.map(jnp.copy, state.model)
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

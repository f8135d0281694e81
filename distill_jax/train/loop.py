"""The training loop: epochs, validation, checkpoints, resume."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_function, need
from distill_jax._cpu import compiler_options
from distill_jax._model import Model, PyTree, check_model, example_count, identity, padded_batches
from distill_jax.train._examples import as_arrays, complaint_about
from distill_jax.train._loop import Fit, History, check_options, checked_data, run_epochs
from distill_jax.train.epoch import epoch_order
from distill_jax.train.objectives import supervised
from distill_jax.train.step import Batch, LossFn, batch_weight


def make_measure(
    loss_fn: LossFn,
    data: Mapping[str, Any],
    *,
    prepare: Callable[[Any], Any] = identity,
    batch_size: int = 1000,
    stacked: bool = False,
) -> Callable[[Model], dict[str, Any]]:
    """Makes a function that evaluates an objective on validation data: ``model -> figures``.

    Args:
      loss_fn: the objective, run in evaluation mode at step 0 of its schedules.
      data: name → array ``[n, ...]``, with ``"weight"`` where examples count unequally.
      prepare: applied to the images of each batch inside the compiled program.
      batch_size: the number of examples per batch.
      stacked: whether the model is a stack of students' (:mod:`distill_jax.train.sweeps`): each figure then is
        a list with one number per student.

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

    def sums(model: Model, batch: Batch) -> tuple[dict[str, jax.Array], jax.Array]:
        batch = {**batch, "image": prepare(batch["image"])}
        loss, (_, metrics) = loss_fn(model, batch, key=None, step=jnp.int32(0))
        weight = batch_weight(batch)
        return jax.tree.map(lambda m: m * weight, {**metrics, "loss": loss}), weight

    sums_of_all = jax.vmap(sums, in_axes=(0, None)) if stacked else sums
    compiled = jax.jit(sums_of_all, compiler_options=compiler_options())

    def measure(model: Model) -> dict[str, Any]:
        check_model("model", model)
        parts = [compiled(model, batch) for batch in batches]
        totals, weight = jax.tree.map(lambda *x: sum(np.asarray(v, np.float64) for v in x), *parts)
        if np.isnan(totals["loss"]).all():
            images = jax.eval_shape(prepare, batches[0]["image"])
            if complaint := complaint_about(data, model, images):
                raise ValueError(f"the validation loss is NaN: {complaint}")
        figures = {f"validation_{name}": (total / weight).tolist() for name, total in totals.items()}
        if "error_rate" in totals:
            # A float32 mean times its weight: a count up to rounding, by which equal epochs would differ
            figures["validation_errors"] = np.round(totals["error_rate"], 3).tolist()
        return figures

    return measure


def count_examples(data: Mapping[str, Any]) -> int:
    """Counts the examples of a data set by its images."""
    return example_count("the images", data["image"])


def make_validation(
    data: Mapping[str, Any],
    *,
    prepare: Callable[[Any], Any] = identity,
    batch_size: int = 1000,
    stacked: bool = False,
) -> Callable[[Model], dict[str, Any]]:
    """Makes the validation of a classifier: ``model -> {"validation_errors", "validation_nll"}``.

    Args:
      data: ``"image"`` and integer ``"label"``, arrays ``[n, ...]``.
      prepare: applied to each batch of images inside the compiled program.
      batch_size: the number of examples per batch.
      stacked: whether the model is a stack of students', as in :func:`make_measure`.

    Returns:
      A function that gives the number of wrong examples and the mean negative log-likelihood in nats.
    """
    need(data, "image", "label")
    data = {name: data[name] for name in ("image", "label")}
    measure = make_measure(supervised(), data, prepare=prepare, batch_size=batch_size, stacked=stacked)

    def validate(model: Model) -> dict[str, Any]:
        figures = measure(model)
        return {
            "validation_errors": figures["validation_errors"],
            "validation_nll": figures["validation_loss"],
        }

    return validate


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
    check_options(state, epoch, epochs, batch_size, [seed], validate, best_by, save_seconds, on_epoch)
    check_function("stop", stop, "history")
    data, examples = checked_data(data)
    return run_epochs(
        Fit(state, jax.tree.map(jnp.copy, state.model), {}, 0.0),
        epoch,
        data,
        epochs=epochs,
        order=lambda number: epoch_order(seed, number, examples, batch_size),
        identity={"seed": seed, "batch_size": batch_size, "examples": examples},
        context=context,
        validate=validate,
        best_by=best_by,
        stop=stop,
        directory=directory,
        save_seconds=save_seconds,
        on_epoch=on_epoch,
    )

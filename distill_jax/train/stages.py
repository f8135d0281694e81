"""Encoder and decoder: their objective, and training in stages: the encoder, the decoder, then both."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import losses
from distill_jax._checks import check_choice, check_count, check_fraction, check_function, check_tx, need
from distill_jax._model import Model, PyTree, check_model, identity
from distill_jax.models import compose
from distill_jax.train.epoch import make_epoch
from distill_jax.train.loop import History, count_examples, fit, make_measure
from distill_jax.train.objectives import (
    Schedule,
    add_hard,
    at,
    check_options,
    check_weight,
    error_rate,
    is_zero,
    soft_mean,
    teacher_of,
)
from distill_jax.train.step import LossFn, init_state, make_train_step, weighted_mean

# stage → the part that does not change in it
STAGES: Mapping[str, str | None] = {"encoder": "decoder", "decoder": "encoder", "joint": None}


def mean_squares(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the mean squared error per example, over all axes but the first.

    Args:
      outputs: ``[batch, ...]``.
      targets: an array of the same shape.

    Returns:
      One value per example, ``[batch]``.

    Raises:
      ValueError: if the shapes differ.

    >>> print(mean_squares(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])))
    [5.]
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs and targets must have one shape, got {outputs.shape} and {targets.shape}")
    return jnp.square(outputs - targets).reshape(outputs.shape[0], -1).mean(-1)


def encoder_decoder(
    *,
    soft: Callable[..., jax.Array] = mean_squares,
    alpha: Schedule = 0.0,
    hard: Callable[..., jax.Array] = losses.cross_entropy,
    inputs_weight: Schedule = 0.0,
) -> LossFn:
    """Builds the objective of learning an original model through a narrow code.

    The loss is the mean of α·hard + (1 − α)·soft + ι·inputs. With ŷ = decoder(code(encoder(x))), soft compares
    ŷ with the outputs of the original in ``batch["teacher"]``, hard compares it with ``batch["label"]``, and
    inputs is the mean squared error of x itself, where the decoder returns ``(ŷ, x̂)``.

    Args:
      soft: ``(outputs, teacher) -> values``, one value per example: mean squares, or for a classifier
        :func:`distill_jax.losses.kl`.
      alpha: α in [0, 1], the weight of the labels, or a schedule of it. With a constant 0 no labels are
        needed.
      hard: ``(outputs, labels) -> values``, one value per example.
      inputs_weight: ι ≥ 0, or a schedule of it.

    Returns:
      A ``loss_fn`` for a model from :func:`distill_jax.models.compose`, with the metrics ``"soft"``, ``"hard"``
      and ``"inputs"`` (each unweighted) and, where labels are classes, ``"error_rate"``.

    Raises:
      ValueError: for options outside these bounds; when traced, if shapes do not fit, or if the decoder
        returns no x̂ where it is needed.
    """
    check_options(alpha, None, soft)
    check_function("hard", hard, "outputs, labels")
    check_weight("inputs_weight", inputs_weight)

    def loss_fn(model, batch, *, key, step):
        teacher = teacher_of(batch)["logits"]
        need(batch, "image")
        outputs, state = model.apply(batch["image"], key=key)
        outputs, inputs = outputs if isinstance(outputs, tuple) else (outputs, None)
        metrics = {"soft": soft_mean(soft, outputs, teacher, batch)}
        loss = add_hard(metrics, hard, outputs, batch, at(alpha, step), is_zero(alpha))
        if not is_zero(inputs_weight):
            if inputs is None:
                raise ValueError(
                    "inputs_weight needs a decoder that returns (outputs, inputs), got outputs alone"
                )
            flat = batch["image"].reshape(inputs.shape)
            metrics["inputs"] = weighted_mean(mean_squares(inputs, flat), batch)
            loss += at(inputs_weight, step) * metrics["inputs"]
        if "label" in batch and jnp.issubdtype(batch["label"].dtype, jnp.integer):
            metrics["error_rate"] = error_rate(outputs, batch)
        return loss, (state, metrics)

    return loss_fn


class Stage(NamedTuple):
    """Facts about one stage of training.

    Attributes:
      name: ``"encoder"``, ``"decoder"`` or ``"joint"``: what was trained.
      epochs: the number of epochs it took.
      converged: whether it ended because validation no longer improved, and not at its maximum.
      before: the validation loss at its start.
      after: the validation loss at its end, never above ``before``.
    """

    name: str
    epochs: int
    converged: bool
    before: float
    after: float


class Staged(NamedTuple):
    """The result of training in stages.

    Attributes:
      model: the trained encoder and decoder, as :func:`distill_jax.models.compose` joins them.
      stages: facts about each stage, in their order.
      history: the figures of all epochs, as in :class:`distill_jax.train.Fit`.
      seconds: wall time of the epochs.
    """

    model: Model
    stages: tuple[Stage, ...]
    history: History
    seconds: float


def freeze(tx: optax.GradientTransformation, frozen: str | None) -> optax.GradientTransformation:
    """Restricts an optimizer to all entries of a dict of parameters except one, which does not change.

    Args:
      tx: any optax transformation; it keeps state for the trained entries only.
      frozen: the key of the entry that does not change, or None.

    Returns:
      The transformation.

    Raises:
      ValueError: if ``tx`` is no optax transformation; when the optimizer is initialised, if the parameters have
        no such key.

    >>> tx = freeze(optax.sgd(1.0), "decoder")
    >>> params = {"encoder": jnp.ones(()), "decoder": jnp.ones(())}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> {name: float(x) for name, x in optax.apply_updates(params, updates).items()}
    {'decoder': 1.0, 'encoder': 0.0}
    """
    check_tx("tx", tx)
    if frozen is None:
        return tx

    def labels(params):
        if frozen not in params:
            raise ValueError(f"frozen must be one of {', '.join(params)}, got {frozen!r}")
        return {name: "frozen" if name == frozen else "trained" for name in params}

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def converged(history: History, *, tolerance: float, patience: int) -> bool:
    """Says whether the last epochs brought no relative improvement of the validation loss.

    Training has converged if the lowest loss of the last ``patience`` epochs is not below
    (1 − tolerance) times the lowest loss before them.

    Args:
      history: a history with ``"validation_loss"``, one value per epoch.
      tolerance: the least relative improvement, in [0, 1).
      patience: the number of epochs in which it must be made.

    Returns:
      Whether it has converged.

    Raises:
      ValueError: if an option lies outside its bounds, or the history has no such figure.

    >>> converged({"validation_loss": [4.0, 2.0, 1.99]}, tolerance=0.01, patience=1)
    True
    """
    check_fraction("tolerance", tolerance, without=1)
    check_count("patience", patience)
    if "validation_loss" not in history:
        raise ValueError(f"history has no 'validation_loss'; it has {sorted(history)}")
    values = history["validation_loss"]
    before, last = values[:-patience], values[-patience:]
    return bool(before) and min(last) >= (1 - tolerance) * min(before)


def train_stages(
    key: jax.Array,
    encoder: Model,
    decoder: Model,
    loss_fn: LossFn,
    data: Mapping[str, Any],
    validation: Mapping[str, Any],
    *,
    tx: Callable[[int], optax.GradientTransformation],
    epochs: int,
    batch_size: int,
    seed: int,
    code: Callable[[jax.Array], jax.Array] = identity,
    tolerance: float = 1e-3,
    patience: int = 5,
    stages: Mapping[str, str | None] = STAGES,
    transform: Callable[..., Any] | None = None,
    context: PyTree = None,
    prepare: Callable[[Any], Any] = identity,
    directory: str | Path | None = None,
    save_seconds: float = 20.0,
    on_stage: Callable[[str], Callable[[int, dict[str, float]], Any]] | None = None,
) -> Staged:
    """Trains the encoder, then the decoder, then both, each until validation no longer improves.

    A stage ends when :func:`converged` says so, or after ``epochs``. It gives the parameters of its best
    epoch, or those that it began with if no epoch was better: no stage is worse than the one before.
    Where a directory is given, an interrupted training continues in the stage where it was.

    Args:
      key: a random key for all that is random in a step.
      encoder: the first model.
      decoder: the second model.
      loss_fn: the objective of the composed model, usually :func:`encoder_decoder`.
      data: ``"image"``, ``"teacher"`` (the outputs of the original, unless ``transform`` adds them) and
        perhaps ``"label"``, arrays ``[examples, ...]``.
      validation: the same for validation, always with ``"teacher"``.
      tx: makes the optimizer from the number of steps per epoch.
      epochs: the largest number of epochs of a stage.
      batch_size: the number of examples per step.
      seed: the seed of the shuffling.
      code: applied between encoder and decoder, see :func:`distill_jax.models.compose`.
      tolerance: the least relative improvement, see :func:`converged`.
      patience: the number of epochs in which it must be made, see :func:`converged`.
      stages: stage → the part that does not change in it, or None.
      transform: see :func:`distill_jax.train.make_epoch`.
      context: arrays for ``transform``.
      prepare: what ``transform`` does to images, without what is random in it.
      directory: where checkpoints are kept, one directory per stage; None keeps none.
      save_seconds: the shortest time between two checkpoints, in seconds.
      on_stage: called with the name of a stage; returns the ``on_epoch`` of :func:`distill_jax.train.fit`.

    Returns:
      The trained model, facts about each stage, the history and the time.

    Raises:
      ValueError: if an output of the original is not finite, an option lies outside its bounds, or the
        training diverges.
    """
    check_fraction("tolerance", tolerance, without=1)
    check_count("patience", patience)
    check_count("epochs", epochs)
    check_count("batch_size", batch_size)
    check_count("seed", seed, least=0)
    check_model("encoder", encoder)
    check_model("decoder", decoder)
    check_function("tx", tx, "steps")
    for fixed in stages.values():
        check_choice("each part of stages", fixed, ("encoder", "decoder", None))
    need(data, "image")
    need(validation, "image", "teacher")
    for name, part in {"data": data, "validation": validation}.items():
        if "teacher" in part:
            check_original(part["teacher"], name)
    measure = make_measure(loss_fn, validation, prepare=prepare)
    model = compose(encoder, decoder, code=code)
    level = measure(model)["validation_loss"]
    history: dict[str, Any] = {}
    done, seconds = [], 0.0
    for number, (name, frozen) in enumerate(stages.items()):
        optimizer = freeze(tx(max(1, count_examples(data) // batch_size)), frozen)
        in_stage = compose(encoder, decoder, code=code, frozen=frozen).replace(
            params=model.params, state=model.state
        )
        result = fit(
            init_state(in_stage, optimizer, jax.random.fold_in(key, number)),
            make_epoch(make_train_step(loss_fn, optimizer), transform=transform),
            data,
            epochs=epochs,
            batch_size=batch_size,
            seed=seed + number,
            context=context,
            validate=measure,
            best_by="validation_loss",
            stop=lambda history: converged(history, tolerance=tolerance, patience=patience),
            directory=Path(directory) / name if directory is not None else None,
            save_seconds=save_seconds,
            on_epoch=on_stage(name) if on_stage else lambda done, figures: None,
        )
        best = model.replace(params=result.best.params, state=result.best.state)
        before, after = level, measure(best)["validation_loss"]
        if after <= before or not math.isfinite(before):
            model, level = best, after
        taken = len(result.history["epoch"])
        ended = converged(result.history, tolerance=tolerance, patience=patience)
        done.append(Stage(name, taken, ended, before, level))
        for figure, values in result.history.items():
            shift = len(history.get("epoch", ())) if figure == "epoch" else 0
            history[figure] = [*history.get(figure, []), *(value + shift for value in values)]
        seconds += result.seconds
    return Staged(model, tuple(done), history, seconds)


def check_original(outputs: PyTree, where: str) -> None:
    """Raises ``ValueError`` if an original's outputs ``[n, ...]`` are not all finite numbers.

    Args:
      outputs: what the original returned.
      where: for which examples, for the message.
    """
    finite = np.isfinite(np.asarray(outputs, np.float32)).reshape(len(outputs), -1)
    wrong = np.asarray(~np.all(finite, -1))
    if wrong.any():
        raise ValueError(
            f"the original's outputs for {where} are not finite for {int(wrong.sum())} of {len(wrong)} "
            "examples: nothing can be learned from them; check its parameters and its inputs"
        )

"""Training an encoder and a decoder in turn: the encoder, the decoder, then both, each to its end."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax.train.epoch import make_epoch
from distill_jax.train.loop import History, fit
from distill_jax.train.step import LossFn, batch_weight, init_state, make_train_step

PyTree = Any
# stage → what stands still in it
STAGES: Mapping[str, str | None] = {"encoder": "decoder", "decoder": "encoder", "joint": None}


class Stage(NamedTuple):
    """How one stage went.

    Attributes:
      name: ``"encoder"``, ``"decoder"`` or ``"joint"``: what was trained.
      epochs: how many it took.
      converged: whether it ended because validation no longer improved, not at its maximum.
      before: the validation loss at its start.
      after: at its end, not above ``before``.
    """

    name: str
    epochs: int
    converged: bool
    before: float
    after: float


class Staged(NamedTuple):
    """What training in stages gave.

    Attributes:
      params: ``{"encoder": …, "decoder": …}``.
      model_state: likewise.
      stages: in their order.
      history: of all epochs, as in :class:`distill_jax.train.Fit`.
      seconds: wall time of the epochs.
    """

    params: PyTree
    model_state: PyTree
    stages: tuple[Stage, ...]
    history: History
    seconds: float


def only(tx: optax.GradientTransformation, frozen: str | None) -> optax.GradientTransformation:
    """Restricts an optimizer to all entries of a dict of parameters but one, which stays as it is.

    Args:
      tx: any optax transformation; what it keeps, it keeps for the trained entries alone.
      frozen: the key of the other one, or None.

    Raises:
      ValueError: at its start, if the parameters have no such key.

    >>> tx = only(optax.sgd(1.0), "decoder")
    >>> params = {"encoder": jnp.ones(()), "decoder": jnp.ones(())}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> {name: float(x) for name, x in optax.apply_updates(params, updates).items()}
    {'decoder': 1.0, 'encoder': 0.0}
    """
    if frozen is None:
        return tx

    def labels(params):
        if frozen not in params:
            raise ValueError(f"frozen must be one of {', '.join(params)}, got {frozen!r}")
        return {name: "frozen" if name == frozen else "trained" for name in params}

    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)


def converged(history: History, *, tolerance: float, patience: int) -> bool:
    """Says whether the last epochs no longer made the validation loss lower.

    That is: the lowest of the last ``patience`` epochs is not below (1 − tolerance) times the lowest
    before them.

    Args:
      history: with ``"validation_loss"``, a value an epoch.
      tolerance: the least relative improvement, in [0, 1).
      patience: epochs in which it must be made.

    >>> converged({"validation_loss": [4.0, 2.0, 1.99]}, tolerance=0.01, patience=1)
    True
    """
    values = history["validation_loss"]
    before, last = values[:-patience], values[-patience:]
    return bool(before) and min(last) >= (1 - tolerance) * min(before)


def make_measure(
    loss_fn: LossFn,
    data: Mapping[str, Any],
    *,
    prepare: Callable[[Any], Any] = lambda x: x,
    batch_size: int = 1000,
) -> Callable[[PyTree, PyTree], dict[str, float]]:
    """Makes ``(params, model_state) -> figures``: an objective and its metrics on validation data.

    Args:
      loss_fn: run in evaluation mode, at step 0 of its schedules.
      data: arrays ``[n, ...]`` by name, ``"weight"`` among them where examples count unequally.
      prepare: applied to each batch's ``"image"`` inside the compiled program.
      batch_size: examples at a time.

    Returns:
      A function whose figures are ``"validation_loss"`` and, for each metric, ``"validation_<name>"``:
      means, except for the errors, which are counted.
    """
    count = len(data["image"])
    size = min(batch_size, count)
    weights = np.asarray(data.get("weight", np.ones(count)), np.float32)
    batches = []
    for start in range(0, count, size):
        rows = np.arange(start, start + size)
        batch = {name: jnp.asarray(values[rows % count]) for name, values in data.items()}
        batches.append({**batch, "weight": jnp.asarray(weights[rows % count] * (rows < count))})

    @jax.jit
    def sums(params, model_state, batch):
        batch = {**batch, "image": prepare(batch["image"])}
        loss, (_, metrics) = loss_fn(params, model_state, batch, key=None, step=jnp.int32(0))
        weight = batch_weight(batch)
        return jax.tree.map(lambda m: m * weight, {**metrics, "loss": loss}), weight

    def measure(params, model_state):
        parts = [sums(params, model_state, batch) for batch in batches]
        totals, weight = jax.tree.map(lambda *x: sum(map(float, x)), *parts)
        return {
            f"validation_{name}": total if name == "errors" else total / weight
            for name, total in totals.items()
        }

    return measure


def train_stages(
    key: jax.Array,
    params: Mapping[str, PyTree],
    model_state: Mapping[str, PyTree],
    objective: Callable[..., LossFn],
    data: Mapping[str, Any],
    validation: Mapping[str, Any],
    *,
    tx: Callable[[int], optax.GradientTransformation],
    epochs: int,
    batch_size: int,
    seed: int,
    tolerance: float = 1e-3,
    patience: int = 5,
    stages: Mapping[str, str | None] = STAGES,
    transform: Callable[..., Any] | None = None,
    context: PyTree = None,
    prepare: Callable[[Any], Any] = lambda x: x,
    directory: str | Path | None = None,
    save_seconds: float = 20.0,
    on_stage: Callable[[str], Callable[[int, dict[str, float]], Any]] | None = None,
) -> Staged:
    """Trains the encoder, then the decoder, then both, each until it has converged on validation.

    A stage ends as :func:`converged` says, or after ``epochs``, and gives the parameters of its best
    epoch, or those it began with if no epoch was better: no stage is worse than the one before.
    Where ``directory`` is given, an interrupted training goes on in the stage where it was.

    Args:
      key: of all that is random in a step.
      params: the start, ``{"encoder": …, "decoder": …}``.
      model_state: likewise.
      objective: ``(frozen=…) -> loss_fn``, such as a ``functools.partial`` of
        :func:`distill_jax.train.encoder_decoder`.
      data: ``"image"``, ``"teacher"`` (the original's outputs, unless ``transform`` adds them) and
        perhaps ``"label"``, ``[examples, ...]``.
      validation: likewise, always with ``"teacher"``.
      tx: the optimizer, from the number of steps an epoch.
      epochs: the most that a stage may take.
      batch_size: examples a step.
      seed: of the shuffling.
      tolerance: see :func:`converged`.
      patience: likewise.
      stages: stage → the part that stands still in it, or None.
      transform: see :func:`distill_jax.train.make_epoch`.
      context: for ``transform``.
      prepare: what ``transform`` does to images, without what is random in it.
      directory: where checkpoints are kept, a directory a stage; None keeps none.
      save_seconds: the least time between two checkpoints.
      on_stage: called with a stage's name, returns the ``on_epoch`` of :func:`distill_jax.train.fit`.

    Raises:
      ValueError: if an output of the original is not finite, an option lies outside its bounds, or the
        training diverges.
    """
    if not 0 <= tolerance < 1 or patience < 1 or epochs < 1:
        raise ValueError(
            "tolerance must lie in [0, 1), patience and epochs be at least 1, got "
            f"{tolerance}, {patience} and {epochs}"
        )
    for name, part in {"data": data, "validation": validation}.items():
        if "teacher" in part:
            check_original(part["teacher"], name)
    measure = make_measure(objective(frozen=None), validation, prepare=prepare)
    current: tuple[Any, Any] = (dict(params), dict(model_state))
    level = measure(*current)["validation_loss"]
    history: dict[str, Any] = {}
    done, seconds = [], 0.0
    for number, (name, frozen) in enumerate(stages.items()):
        optimizer = only(tx(max(1, len(data["image"]) // batch_size)), frozen)
        result = fit(
            init_state(current[0], optimizer, jax.random.fold_in(key, number), current[1]),
            make_epoch(make_train_step(objective(frozen=frozen), optimizer), transform=transform),
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
        before, after = level, measure(*result.best)["validation_loss"]
        if after <= before or not math.isfinite(before):
            current, level = result.best, after
        taken = len(result.history["epoch"])
        ended = converged(result.history, tolerance=tolerance, patience=patience)
        done.append(Stage(name, taken, ended, before, level))
        for figure, values in result.history.items():
            shift = len(history.get("epoch", ())) if figure == "epoch" else 0
            history[figure] = [*history.get(figure, []), *(value + shift for value in values)]
        seconds += result.seconds
    return Staged(*current, tuple(done), history, seconds)


def check_original(outputs: Any, where: str) -> None:
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

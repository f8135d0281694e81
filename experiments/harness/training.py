"""What the experiments share: one model trained in a run's directory, and judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax

from distill_jax import data, models, teachers, train
from distill_jax.data.datasets import Dataset, Split
from distill_jax.train import History
from harness import runs
from harness.options import Options
from harness.study import Trained


def prepare(images: Any) -> Any:
    """Turns uint8 images into the network's input, in [0, 1]."""
    return images.astype(np.float32) / 255


PROBE = np.arange(256, dtype=np.uint8)  # what becomes of it tells one preprocessing from another


def arrays(split: Split) -> dict[str, np.ndarray]:
    """Makes a training batch's fields of a split."""
    return {"image": split.image, "label": split.label}


def plain(context: Any, batch: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """Prepares a batch as it is."""
    return {**batch, "image": prepare(batch["image"])}


def jittered(pixels: int) -> Callable[..., dict[str, Any]]:
    """Prepares a batch of images shifted at random, see :func:`distill_jax.data.random_shift`."""

    def transform(context, batch, key):
        return {**batch, "image": prepare(data.random_shift(key, batch["image"], pixels))}

    return transform


def work(model: models.Model, dataset: Dataset) -> float:
    """Estimates the work of an epoch from the arithmetic of one example, for the time left."""
    lowered = jax.jit(model.apply_fn).lower(model.params, model.model_state, prepare(dataset.train.image[:1]))
    return float((lowered.cost_analysis() or {}).get("flops", 1.0))


def adam(learning_rate: float, epochs: int) -> Callable[[int], optax.GradientTransformation]:
    """Makes Adam of the number of steps an epoch: a rise over one epoch, then a cosine to 0."""

    def make(steps):
        return optax.adam(
            optax.warmup_cosine_decay_schedule(
                0.0, learning_rate, warmup_steps=steps, decay_steps=max(epochs, 2) * steps
            )
        )

    return make


def begin(experiment: str, config: Options, dataset: Dataset) -> Path:
    """Opens a run's directory, and says what it is about.

    Args:
      experiment: its name.
      config: its options; the directory is named after the preset too, where there are several.
      dataset: of :func:`distill_jax.data.load`.
    """
    print(f"Data: {dataset.name}, {dataset.source}.")
    identity = config.recorded() | {
        "distill_jax": runs.environment()["distill_jax"],
        "data": teachers.fingerprint([dataset.train._asdict(), dataset.test._asdict()])[:16],
    }
    names = [experiment, dataset.name.replace("/", "-"), getattr(config, "preset", "")]
    folder = "-".join([*filter(None, names), runs.config_digest(identity)])
    out = config.out or Path("runs") / folder
    runs.open_run(out, identity, restart=config.restart)
    print(f"Run: {out} (the same command goes on where it was stopped)")
    return out


@dataclass(frozen=True)
class Lab:
    """Where models are trained and judged.

    Attributes:
      dataset: of :func:`distill_jax.data.load`.
      out: the run's directory; checkpoints go to ``seed0/<name>`` and so on.
      progress: the bar.
      seeds: how many repetitions, for the bar.
      select: which epoch is the model: the last, or the best on validation data.
      save_seconds: the least time between two checkpoints.
      devices: how many to spread each batch over.
    """

    dataset: Dataset
    out: Path
    progress: runs.Progress
    seeds: int
    select: Literal["last", "best"] = "last"
    save_seconds: float = 20.0
    devices: int = 1

    def train(
        self,
        name: str,
        seed: int,
        model: models.Model,
        loss_fn: train.LossFn,
        training: Mapping[str, Any],
        *,
        epochs: int,
        tx: Callable[[int], optax.GradientTransformation],
        batch_size: int,
        order_seed: int,
        unit: float,
        transform: Callable[..., Any] = plain,
        context: Any = None,
        extra: Any = None,
    ) -> Trained:
        """Trains one model, or takes it from the run's checkpoint.

        Args:
          name: of the model; its checkpoints' directory.
          seed: counted from 0.
          model: its start.
          loss_fn: see :func:`distill_jax.train.make_train_step`.
          training: arrays ``[examples, ...]``, images as uint8.
          epochs: how many.
          tx: the optimizer, from the number of steps an epoch.
          batch_size: examples a step.
          order_seed: of the shuffling and of all else that is random.
          unit: the work of an epoch, for the bar.
          transform: see :func:`distill_jax.train.make_epoch`.
          context: for ``transform``.
          extra: parameters trained beside the model's and dropped at the end: ``loss_fn`` then gets
            ``{"student": params, "learned": extra}``.
        """
        optimizer = tx(max(1, len(training["label"]) // batch_size))
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), order_seed)
        params = model.params if extra is None else {"student": model.params, "learned": extra}
        state = train.init_state(params, optimizer, key, model.model_state)
        sharding = None
        if self.devices > 1:
            mesh = train.data_mesh(self.devices)
            sharding, everywhere = train.sharded(mesh), train.replicated(mesh)
            state, context = jax.device_put((state, context), everywhere)

        def student(params):
            return params if extra is None else params["student"]

        validate = train.make_validation(model.apply_fn, arrays(self.dataset.validation), prepare=prepare)
        done = train.fit(
            state,
            train.make_epoch(
                train.make_train_step(loss_fn, optimizer), transform=transform, sharding=sharding
            ),
            training,
            epochs=epochs,
            batch_size=batch_size,
            seed=order_seed,
            context=context,
            validate=lambda params, model_state: validate(student(params), model_state),
            directory=self.out / f"seed{seed}" / name,
            save_seconds=self.save_seconds,
            on_epoch=self.progress.stage(f"seed {seed + 1}/{self.seeds}, {name}", unit),
        )
        params, model_state = done.best
        if self.select == "last":
            params, model_state = done.state.params, done.state.model_state
        trained = self.judge(model.apply_fn, (student(params), model_state), done.history, done.seconds)
        return trained._replace(opt_state=done.state.opt_state)

    def judge(
        self, apply_fn: Callable[..., Any], variables: tuple[Any, Any], history: History, seconds: float
    ) -> Trained:
        """Takes a model's predictions for validation and test images."""
        variables = jax.device_put(variables, jax.devices()[0])
        validation, test = (
            teachers.predict(apply_fn, variables[0], variables[1], split.image, prepare=prepare)
            for split in (self.dataset.validation, self.dataset.test)
        )
        return Trained(apply_fn, variables, history, seconds, validation, test)

    def store_labels(self, seed: int, teacher: Trained, *, dtype: str = "float32") -> np.ndarray:
        """Writes the teacher's soft labels for the training images, and reads them by example id."""
        split = self.dataset.train

        def logits(rows):
            images = split.image[rows]
            return teachers.predict(teacher.apply_fn, *teacher.variables, images, prepare=prepare)

        described = {
            "teacher": teachers.fingerprint(teacher.variables),
            "preprocessing": teachers.fingerprint(prepare(PROBE))[:16],
            "data": teachers.fingerprint({"id": split.id, "image": split.image}),
        }
        directory = self.out / f"seed{seed}" / "labels"
        store = teachers.write_labels(directory, split.id, logits, fingerprint=described, dtype=dtype)
        return store[split.id]

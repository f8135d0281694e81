"""A run of an experiment: its data, its directory, training with checkpoints, and the report at the end."""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tqdm

from distill_jax import _files, data, teachers, train
from distill_jax.models import Model, predict
from harness import logs, results, runs
from harness.options import Options

PROBE = np.arange(256, dtype=np.uint8)  # its preparation tells one preprocessing from another


def prepare(images: Any) -> Any:
    """Turns images into the network's input, float32 from 0 to 1: uint8 is divided by 255, floats are kept."""
    scaled = images.astype(np.float32)
    return scaled / 255 if images.dtype == np.uint8 else scaled


def arrays(split: data.Split) -> dict[str, np.ndarray]:
    """Takes the images and labels of a split, named as in a training batch."""
    return {"image": split.image, "label": split.label}


def plain(context: Any, batch: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """Prepares the images of a batch without augmentation: a ``transform`` for an epoch."""
    return {**batch, "image": prepare(batch["image"])}


def jittered(pixels: int) -> Callable[..., dict[str, Any]]:
    """Makes a ``transform`` that shifts each image at random by up to ``pixels`` in both directions."""

    def transform(context, batch, key):
        return {**batch, "image": prepare(data.random_shift(key, batch["image"], pixels))}

    return transform


def shifted_views(pixels: int, count: int) -> teachers.Views:
    """Makes views of images that are shifted as in :func:`jittered`, for labels that are stored."""

    def augment(key, image):
        return prepare(data.random_shift(key, image[None], pixels)[0])

    return teachers.Views(augment, count)


def labelled(transform: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Makes a ``transform`` whose context is a teacher, which labels the transformed images online."""
    return lambda teacher, batch, key: teachers.label(teacher, transform(None, batch, key))


def rise_and_fall(
    learning_rate: float, epochs: int, steps: int, *, warmup: int | None = None
) -> optax.Schedule:
    """Makes a learning rate that rises over the first epoch and then falls as a cosine to 0.

    Args:
      learning_rate: the highest learning rate.
      epochs: the number of epochs.
      steps: the number of steps per epoch.
      warmup: the number of steps over which the rate rises (default: those of an epoch).
    """
    warmup, total = (steps, max(epochs, 2) * steps) if warmup is None else (warmup, epochs * steps)
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=min(warmup, total - 1), decay_steps=total
    )


def adam(
    learning_rate: float, epochs: int, steps: int, *, warmup: int | None = None
) -> optax.GradientTransformation:
    """Makes Adam with the learning rate of :func:`rise_and_fall`."""
    return optax.adam(rise_and_fall(learning_rate, epochs, steps, warmup=warmup))


class Trained(NamedTuple):
    """A trained model.

    Attributes:
      model: the model.
      history: figures of its training, one value per epoch (see :class:`distill_jax.train.Fit`).
      seconds: wall time of its training.
      validation_logits: its logits for the validation images, float32 ``[examples, classes]``.
      opt_state: the state of its optimizer at the end, None where there is none.
    """

    model: Model
    history: train.History
    seconds: float
    validation_logits: np.ndarray
    opt_state: Any = None


@dataclasses.dataclass
class Run:
    """What is the same in every experiment.

    Attributes:
      name: the name of the experiment.
      config: its options.
      dataset: its data.
      directory: where everything is written.
      started: the time at which the run began.
      sharding: how a batch is laid over several devices; None on one.
    """

    name: str
    config: Any
    dataset: data.Dataset
    directory: Path
    started: float
    sharding: jax.sharding.Sharding | None = None

    @classmethod
    def start(
        cls,
        experiment: str,
        config_name: str,
        config: Any,
        check: Callable[[Any, Any], None] = lambda config, dataset: None,
        dataset: Any = None,
    ) -> "Run":
        """Loads the data, checks the options, and opens the directory of the run.

        Args:
          experiment: the name of the experiment.
          config_name: the name of the config.
          config: the options, an instance of a subclass of ``Options``.
          check: ``(config, dataset)``: raises ``ValueError`` for options that do not fit the data.
          dataset: the data; loaded as the options say by default.
        """
        started = time.monotonic()
        dataset = dataset or load(config)
        check(config, dataset)
        print(f"Config: {config_name}. Data: {dataset.name}, {dataset.source}.")
        identity = {
            **config.recorded(),
            "distill_jax": runs.environment()["distill_jax"],
            "data": teachers.fingerprint([dataset.train._asdict(), dataset.test._asdict()])[:16],
        }
        folder = f"{experiment}-{config_name}-{dataset.name.replace('/', '-')}-{runs.config_digest(identity)}"
        directory = config.out or Path("runs") / folder
        runs.open_run(directory, identity, restart=config.restart)
        print(f"Run: {directory} (the same command continues it if it is interrupted)")
        run = cls(experiment, config, dataset, directory, started)
        if getattr(config, "devices", 1) > 1:
            run.sharding = train.sharded(train.data_mesh(config.devices))
        return run

    @functools.cached_property
    def validation(self) -> Callable[[Model], dict[str, float]]:
        """The validation of classifiers on the run's data: made once, so that it is compiled once."""
        return train.make_validation(arrays(self.dataset.validation), prepare=prepare)

    def key(self, seed: int, order: int) -> jax.Array:
        """Makes the random key of one training."""
        return jax.random.fold_in(jax.random.key(seed, impl="rbg"), order)

    def fit(
        self,
        name: str,
        seed: int | None,
        state: Any,
        epoch: Callable[..., Any],
        examples: Mapping[str, Any],
        *,
        epochs: int,
        batch_size: int,
        order: int | Sequence[int],
        context: Any = None,
        **options: Any,
    ) -> train.Fit:
        """Trains with validation, checkpoints and a progress bar; see :func:`distill_jax.train.fit`.

        Args:
          name: the name of the model; its checkpoints are in ``seed0/<name>`` and so on.
          seed: the number of the repetition, from 0; None for a sweep, of all repetitions at once.
          state: the state at the start, that of a sweep its :class:`~distill_jax.train.sweeps.Students`.
          epoch: from :func:`distill_jax.train.make_epoch`, or that of :mod:`distill_jax.train.sweeps`.
          examples: the training arrays, images as uint8.
          epochs: the number of epochs.
          batch_size: the number of examples per step.
          order: the seed of the shuffling; in a sweep that of each student.
          context: arrays for the ``transform`` of the epoch.
          options: further options of :func:`distill_jax.train.fit` or :func:`distill_jax.train.sweeps.fit`.
        """
        fit: Any = train.fit
        if seed is None:
            fit = train.sweeps.fit
            options["seeds"] = order
            options["mesh"] = self.sharding and self.sharding.mesh  # type: ignore[attr-defined]
        else:
            options["seed"] = order
            if "validate" not in options:  # that of classifiers, which other data does not have
                options["validate"] = self.validation
            if self.sharding is not None:
                mesh = self.sharding.mesh  # type: ignore[attr-defined]
                state, context = jax.device_put((state, context), train.replicated(mesh))
        part = "all seeds" if seed is None else f"seed {seed + 1}/{self.config.seeds}"
        folder = "all_seeds" if seed is None else f"seed{seed}"
        with self.progress(f"{part}, {name}", epochs, folder, name) as on_epoch:
            return fit(
                state,
                epoch,
                examples,
                epochs=epochs,
                batch_size=batch_size,
                context=context,
                directory=self.directory / folder / runs.file_name(name),
                save_seconds=self.config.save_seconds,
                on_epoch=on_epoch,
                **options,
            )

    @contextmanager
    def progress(self, shown: str, epochs: int, *names: str) -> Iterator[logs.OnEpoch]:
        """Shows the progress of one training, writes its figures, and records a profile if one is wanted.

        Args:
          shown: the name that is shown.
          epochs: the number of epochs.
          *names: where the figures are kept: ``"seed0", "teacher"`` means ``seed0/teacher.jsonl``.

        Yields:
          The ``on_epoch`` of :func:`distill_jax.train.fit`.
        """
        sinks = logs.open_sinks(self.config.log, self.directory, "/".join(map(runs.file_name, names)))
        if self.config.profile:
            sinks.append(logs.Profile(self.directory / "profile"))
        bar = tqdm.tqdm(
            total=epochs, desc=shown, unit=" epochs", disable=None, leave=False, dynamic_ncols=True
        )
        start = time.monotonic()
        line = f"{shown}: compiling, then epoch 1 of {epochs}"
        logs.pulse.doing = line

        def on_epoch(number: int, figures: logs.Figures) -> None:
            nonlocal line
            line = f"{shown}: epoch {number} of {epochs}, loss {figures['loss']:.4f}"
            if "validation_errors" in figures:
                line += f", {figures['validation_errors']:.0f} validation errors"
            logs.pulse.doing = line
            bar.set_postfix_str(line.partition(", ")[2], refresh=False)
            bar.update(number - bar.n)
            for sink in sinks:
                sink.write(number, figures)
            runs.check_stopped()

        try:
            yield on_epoch
        finally:
            bar.close()
            for sink in sinks:
                sink.close()
        logs.pulse.say(f"{line}, {time.monotonic() - start:.1f} s")
        logs.pulse.doing = f"after {shown}"

    def judge(
        self, model: Model, history: train.History | None = None, seconds: float = 0.0, opt_state: Any = None
    ) -> Trained:
        """Makes the record of a model: computes its logits for the validation images."""
        model = jax.device_put(model, jax.devices()[0])
        logits = predict(model, self.dataset.validation.image, prepare=prepare)
        return Trained(model, history or {}, seconds, logits, opt_state)

    def store_labels(
        self, seed: int, teacher: Model, *, views: teachers.Views | None = None, dtype: str = "float32"
    ) -> np.ndarray:
        """Stores the teacher's soft labels for the training images, and reads them back by example id.

        Args:
          seed: the number of the repetition; the store is in ``seed0/labels`` and so on.
          teacher: the teacher.
          views: the views to label in the place of the images; their store is in ``seed0/views``.
          dtype: of the stored numbers.

        Returns:
          Logits, float32 ``[examples, classes]`` or ``[examples, views, classes]``, in the order of the
          training images.
        """

        def logits(rows, keys=None):
            images = split.image[rows]
            if views is None:
                return predict(teacher, images, prepare=prepare)
            return predict(teacher, views.apply(keys, images))

        split = self.dataset.train
        described = {
            "teacher": teachers.fingerprint((teacher.params, teacher.state)),
            "preprocessing": teachers.fingerprint(prepare(PROBE))[:16],
            "data": teachers.fingerprint({"id": split.id, "image": split.image}),
        }
        if views is not None:
            described["augmentation"] = views.fingerprint(split.id, split.image)
        store = teachers.write_labels(
            self.directory / f"seed{seed}" / ("labels" if views is None else "views"),
            split.id,
            logits,
            fingerprint=described,
            views=views,
            dtype=dtype,
            progress=logs.counter(f"seed {seed + 1}/{self.config.seeds}, labels"),
        )
        return store[split.id]

    def test_logits(self, trained: Sequence[Mapping[str, Trained]]) -> list[dict[str, np.ndarray]]:
        """Computes the logits of all models for the test images: for the report, at the very end."""
        images = self.dataset.test.image
        return [
            {name: predict(entry.model, images, prepare=prepare) for name, entry in models.items()}
            for models in trained
        ]

    def evaluate(
        self,
        trained: Sequence[Mapping[str, Trained]],
        logits: Sequence[Mapping[str, np.ndarray]],
        *,
        reference: str = "teacher",
    ) -> dict[str, Any]:
        """Evaluates all models on the test set; see :func:`harness.results.evaluate_all`."""
        table = results.evaluate_all(self.dataset, trained, logits, reference=reference, prepare=prepare)
        times = {name: [seed[name].seconds for seed in trained] for name in trained[0]}
        return self.record(table, **times)

    def record(self, table: Mapping[str, Any], **seconds: Any) -> dict[str, Any]:
        """Makes the contents of results.json: the models' entries, the data, the options, the environment."""
        splits = {s: len(getattr(self.dataset, s).id) for s in ("train", "validation", "test")}
        return {
            "experiment": self.name,
            "dataset": {"name": self.dataset.name, "source": self.dataset.source, **splits},
            "config": self.config.recorded(),
            "command": runs.command(),
            "environment": runs.environment(),
            "seconds": {**seconds, "total": time.monotonic() - self.started},
            "models": dict(table),
        }

    def finish(
        self,
        found: Mapping[str, Any],
        pictures: Mapping[str, str],
        *,
        headline: str,
        notes: Sequence[str] = (),
        columns: Mapping[str, results.Column] = results.COLUMNS,
    ) -> None:
        """Writes results.json and report.md, and prints the table, the notes and the headline.

        Args:
          found: the contents of results.json, from :meth:`evaluate` or :meth:`record`.
          pictures: caption → file name, already drawn in the directory of the run.
          headline: what was found, in one sentence.
          notes: paragraphs for the report.
          columns: the columns of the table.
        """
        found = _files.plain(found, "results")
        _files.write_json(self.directory / "results.json", found)
        results.write_report(self.directory, found, pictures, notes, columns=columns, headline=headline)
        print("", results.table(found, columns), "", *notes, headline, sep="\n")
        if self.config.profile:
            print("", logs.profile_table(self.directory / "profile"), "", sep="\n")
        print(f"Report with pictures: {self.directory / 'report.md'}")

    def check(self, ok: bool, complaint: str) -> int:
        """Returns the exit status for the option ``--check``: 1, with a message, if it is set and not ``ok``."""
        if not self.config.check or ok:
            return 0
        print(f"check failed: {complaint}", file=sys.stderr)
        return 1


def load(config: Options) -> data.Dataset:
    """Loads the data set that the options name."""
    return data.load(config.dataset, data_dir=config.data_dir, validation=config.validation)


def mnist_or_digits(given: Mapping[str, str]) -> str:
    """Chooses the config where none is named: ``mnist`` where the data can be had, else ``digits``.

    Args:
      given: the options on the command line, of which ``data_dir`` says where the data may be.
    """
    try:
        data.load("mnist", data_dir=given.get("data_dir"))
    except data.DataError as error:
        if "data_dir" in given:
            raise
        print(f"The config is digits, with embedded data, since MNIST cannot be had: {error}")
        return "digits"
    return "mnist"


def config_of_data(given: Mapping[str, str]) -> str:
    """Chooses the config where none is named: that of the data set, or "choose" where it has none of its own.

    Args:
      given: the options on the command line, of which ``dataset`` names the data set.
    """
    if "dataset" not in given:
        return mnist_or_digits(given)
    return given["dataset"] if given["dataset"] in ("mnist", "digits") else "choose"

"""Draws a map of distillation: the student's validation errors for each temperature T and each weight α of the labels.

For each seed a teacher is trained on all images. Students then learn from a part of the images, all from the same
initial parameters and in the same order: from the labels alone ("scratch"), and at each T and α from the labels and
the teacher's soft labels. The students of all T, α and seeds run as one compiled program. T and α are chosen on
validation data; only what was chosen is tested.

    python experiments/sweep_mnist.py                      # mnist where it can be had, else digits
    python experiments/sweep_mnist.py digits               # a minute, no download
    python experiments/sweep_mnist.py digits --rungs 20 50 # after 20 and 50 epochs the worse half of the map stops
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from harness import lanes, pictures, results
from harness.experiment import Run, adam, arrays, mnist_or_digits, plain, prepare
from harness.networks import build
from harness.options import Count, Dropout, Options, Positive, Share, Whole, read
from harness.runs import run_main

from distill_jax import data, models, train
from distill_jax.train import sweeps


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    seeds: Count = 3  # number of repetitions, each with its own networks, images and order of examples
    teacher: str = "mlp:400,400"  # teacher network, such as mlp:1200,1200 or convnet:8,16
    student: str = "mlp:32"  # student network, such as mlp:32; convolutions run slowly side by side on a CPU
    temperatures: tuple[Positive, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
    """temperatures T of the map, which soften the predictions of teacher and student"""
    alphas: tuple[Share, ...] = (0.0, 0.1, 0.25, 0.5, 0.75)
    """weights α of the labels of the map; the soft labels have 1 - α"""
    examples: Whole = 5000  # number of training images of the students; 0: all
    epochs: Count = 30  # number of epochs to train each student
    learning_rate: Positive = 3e-3  # highest learning rate of the students (Adam, cosine schedule)
    batch_size: Count = 50  # number of examples per step of the students
    teacher_epochs: Count = 8  # number of epochs to train each teacher
    teacher_learning_rate: Positive = 1e-3  # highest learning rate of the teachers
    teacher_batch_size: Count = 128  # number of examples per step of the teachers
    dropout: Dropout = 0.3  # fraction of the teacher's hidden units that is dropped in training
    rungs: tuple[Count, ...] = ()
    """numbers of epochs after which only the better half of the T and α goes on (successive halving)"""
    chunk: Whole = 0  # number of students that are trained at a time, to save memory; 0: all
    devices: Count = 1  # number of devices over which the students are divided
    check: bool = False  # exit with status 1 unless the chosen T and α lower the test errors


CONFIGS = {
    "mnist": ("MNIST, students 784-32-10 on 5,000 images: minutes on two cores", Config()),
    "digits": ("scikit-learn's digits, which need no download: a minute", Config(
        dataset="digits", examples=300, epochs=100, learning_rate=1e-2, batch_size=20, teacher_epochs=40,
        teacher_batch_size=32,
    )),
    "hinton2015": ("The networks of Hinton et al. 2015 on all of MNIST: for a GPU", Config(
        teacher="mlp:1200,1200", student="mlp:800,800", examples=0, learning_rate=1e-3, batch_size=128,
        teacher_epochs=60, dropout=0.4, temperatures=(1.0, 2.0, 4.0, 8.0, 20.0),
    )),
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    most = len(dataset.train.label)
    between = f"lie between --batch-size, {config.batch_size}, and {most}, or be 0"
    config.need("examples", config.batch_size <= (config.examples or most) <= most, between)
    config.at_most(most, "batch_size", "teacher_batch_size")
    whole = config.teacher_batch_size % config.devices == 0
    config.need("teacher_batch_size", whole, f"be a multiple of --devices, {config.devices}")
    for name in ("temperatures", "alphas"):
        values = getattr(config, name)
        config.need(
            name, bool(values) and len(set(values)) == len(values), "name at least one, and none twice"
        )
    rises = bool((np.diff((0, *config.rungs, config.epochs)) >= 1).all())
    config.need("rungs", rises, f"rise to less than --epochs, {config.epochs}")
    for kind in ("teacher", "student"):
        build(config, dataset, kind, 0)


def train_teachers(config: Config, run: Run) -> models.Model:
    """Trains the teacher of each seed on all training images; returns them stacked."""
    examples = arrays(run.dataset.train)
    steps = len(examples["label"]) // config.teacher_batch_size
    tx = adam(config.teacher_learning_rate, config.teacher_epochs, steps)
    step = train.make_train_step(train.supervised(), tx)
    epoch, trained = train.make_epoch(step, transform=plain, sharding=run.sharding), []
    for seed in range(config.seeds):
        order = 10_000 + seed
        state = train.init_state(build(config, run.dataset, "teacher", seed), tx, run.key(seed, order))
        done = run.fit(
            "teacher", seed, state, epoch, examples, epochs=config.teacher_epochs,
            batch_size=config.teacher_batch_size, order=order,
        )  # fmt: skip
        trained.append(done.model)
    return sweeps.stack(trained)


class Trained(NamedTuple):
    """Students of all T, α and seeds.

    Attributes:
      model: the stacked models after the last epoch of each.
      errors: validation errors after that epoch, ``[T, α, seeds]``.
      epochs: the number of epochs, ``[T, α]``.
    """

    model: models.Model
    errors: np.ndarray
    epochs: np.ndarray


def train_students(
    config: Config, run: Run, name: str, logits: np.ndarray, temperatures: tuple[float, ...], alphas: tuple[float, ...]
) -> Trained:  # fmt: skip
    """Trains the students of each T, α and seed in one program.

    Args:
      config: the options.
      run: the run.
      name: what these students are called.
      logits: each teacher's for the training images, ``[images, seeds, classes]``.
      temperatures: values of T.
      alphas: values of α.
    """
    values = sweeps.grid(temperature=temperatures, alpha=alphas, seed=range(config.seeds))
    seeds, examples = values["seed"], arrays(run.dataset.train) | {"teacher": logits}
    rows = lanes.orders(config.seeds, len(logits))[:, : config.examples or None]
    tx = adam(config.learning_rate, config.epochs, rows.shape[1] // config.batch_size)

    def make_step(temperature, alpha, seed):
        loss_fn = train.distill(temperature=temperature, alpha=alpha)
        return lanes.each_seed(train.make_train_step(loss_fn, tx))(seed)

    student = sweeps.stack([build(config, run.dataset, "student", seed) for seed in range(config.seeds)])
    keys = jax.random.split(jax.random.key(0), config.seeds)[seeds]
    done = run.fit(
        name, None, sweeps.Students(sweeps.init_states(sweeps.take(student, seeds), tx, keys), values),
        sweeps.make_epoch(make_step), examples, epochs=config.epochs, batch_size=config.batch_size,
        order=seeds.tolist(), rows=rows[seeds], chunk=config.chunk or None,
        groups=np.arange(len(seeds)) // config.seeds,  # the seeds of one T and α stay or go together
        rungs=config.rungs if len(temperatures) * len(alphas) > 1 else (),
        validate=train.make_validation(arrays(run.dataset.validation), prepare=prepare, stacked=True),
    )  # fmt: skip
    history = done.history["validation_errors"]
    epochs = np.isfinite(history).sum(0)
    errors = history[epochs - 1, np.arange(len(seeds))]
    shape = len(temperatures), len(alphas), config.seeds
    return Trained(done.model, errors.reshape(shape), epochs.reshape(shape)[:, :, 0])


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    if config.devices > 1:
        train.use_cpu_devices(config.devices)
    run = Run.start("sweep_mnist", name, config, check)
    dataset, teacher = run.dataset, train_teachers(config, run)
    logits = lanes.logits(teacher, dataset.train.image)
    scratch = train_students(config, run, "scratch", logits, (1.0,), (1.0,))
    students = train_students(config, run, "students", logits, config.temperatures, config.alphas)
    # Chosen on validation data, among those that were trained to the end
    means = np.where(students.epochs == config.epochs, students.errors.mean(-1), np.inf)
    t, a = map(int, np.unravel_index(means.argmin(), means.shape))
    first = (t * len(config.alphas) + a) * config.seeds
    chosen = sweeps.take(students.model, np.arange(first, first + config.seeds))

    taught = lanes.logits(teacher, dataset.test.image)
    best = {"temperature": config.temperatures[t], "alpha": config.alphas[a]}
    table = {
        "teacher": judged(teacher, dataset, lanes.errors(teacher, dataset.validation)),
        "scratch": judged(scratch.model, dataset, scratch.errors[0, 0], taught),
        "distilled": best | judged(chosen, dataset, students.errors[t, a], taught),
    }
    found = run.record(table) | {
        "map": {
            "temperature": config.temperatures, "alpha": config.alphas, "validation_errors": students.errors,
            "epochs": students.epochs,
        }
    }  # fmt: skip
    method = f"Distillation at T = {best['temperature']:g}, α = {best['alpha']:g}"
    headline = results.summary(found, method=method)
    run.finish(found, draw(run, students, scratch, (t, a)), headline=headline, notes=notes(config, students))
    errors = {name: np.mean(model["test"]["errors"]) for name, model in table.items()}
    return run.check(errors["distilled"] < errors["scratch"], headline)


def judged(
    model: models.Model, dataset: data.Dataset, wrong: np.ndarray, taught: np.ndarray | None = None
) -> dict[str, Any]:
    """Makes the entry of a model of all seeds in results.json: validation errors, and figures of the test set."""
    return {"validation": {"errors": wrong.tolist()}, **lanes.evaluate(model, dataset.test, taught)}


def notes(config: Config, students: Trained) -> list[str]:
    """Makes the table of the map."""
    cells = [
        [results.mean_sd(each.tolist()) + ("" if n == config.epochs else f" after {n}") for each, n in row]
        for row in map(zip, students.errors, students.epochs)
    ]
    heading = ["T", *(f"α = {alpha:g}" for alpha in config.alphas)]
    rows = [[f"{t:g}", *row] for t, row in zip(config.temperatures, cells, strict=True)]
    stopped = " (or after as many as are named, where they were stopped)" if config.rungs else ""
    return [
        f"Validation errors after {config.epochs} epochs{stopped}, mean ± standard deviation over seeds. The fewest "
        "of so many are lower than what the same T and α would make on other images: see the test errors.",
        results.markdown([heading, *rows]),
    ]


def draw(run: Run, students: Trained, scratch: Trained, chosen: tuple[int, int]) -> Mapping[str, str]:
    """Draws the map."""
    config, mean = run.config, scratch.errors.mean()
    pictures.heat_map(
        run.directory / "map.png", students.errors.mean(-1), [f"{t:g}" for t in config.temperatures],
        [f"{a:g}" for a in config.alphas], xlabel="α, weight of the labels", ylabel="temperature T",
        label="validation errors", baseline=("scratch", mean), chosen=chosen, faint=students.epochs < config.epochs,
    )  # fmt: skip
    return {
        f"Validation errors of {len(run.dataset.validation.label):,} against T and α, mean over {config.seeds} seeds; "
        f"the frame marks what was chosen; scratch: {mean:.1f}": "map.png"
    }


if __name__ == "__main__":
    run_main(main)

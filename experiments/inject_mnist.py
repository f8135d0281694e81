"""Starts a small network from the units of a trained teacher, where labelled examples are few.

A teacher is trained. Narrower students of the same depth start in five ways: at random; from units of the
teacher that are evenly spaced ("uniform") or have the highest scores ("by score"); from merged units ("merged");
and, as a control, from the uniformly selected numbers in random places ("shuffled"). Each learns from few
labels, in the same order of examples; the students of all seeds and learning rates run as one compiled program.
Score, scale and learning rate of each start are chosen on validation data; only what was chosen is tested.

    python experiments/inject_mnist.py                 # mnist where it can be had, else digits
    python experiments/inject_mnist.py soft            # also with the teacher's soft labels of the same examples
    python experiments/inject_mnist.py small_teacher   # the teacher itself saw no more than 1,000 labels
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from harness import lanes, pictures, results
from harness.experiment import Run, adam, arrays, mnist_or_digits, plain, prepare
from harness.networks import build
from harness.options import Count, Dropout, Options, Positive, Share, Whole, read
from harness.runs import run_main
from inject_mnist_starts import RANDOM, SELECTED, SHUFFLED, STARTS, Start, all_starts, begin

from distill_jax import data, models, train
from distill_jax.compress import units
from distill_jax.train import sweeps

SCORES = ("l1", "l2", "fpgm", "lamp", "mean_activation", "apoz")
WATCHED = 1000  # number of validation examples on which the errors of every epoch are counted


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    teacher: str = "mlp:512,512"  # teacher network, such as mlp:512,512 or mlp:1200,1200
    student: str = "mlp:128,128"  # student network, as deep as the teacher and nowhere wider
    labels: tuple[int, ...] = (100, 300, 1000)  # numbers of labelled examples to learn from, rising
    epochs: Count = 30  # number of epochs to train each student
    batch_size: Count = 25  # number of examples per step of the students
    learning_rates: tuple[Positive, ...] = (1e-3, 3e-3, 1e-2)
    """highest learning rates of the students to choose from (Adam, cosine schedule)"""
    scores: tuple[str, ...] = ("l2", "mean_activation")
    """scores of units to choose from: l1, l2, fpgm, lamp, mean_activation, apoz"""
    scales: tuple[float, ...] = (0.0, 0.5)
    """powers p to choose from: kernels of selected units are multiplied by (the teacher's number of inputs /
    the student's number of inputs)^p"""
    examples: int = 1024  # number of training images, without labels, on which units are scored and compared
    soft: bool = False  # also train on the teacher's soft labels of the same few examples
    temperature: Positive = 4.0  # temperature T that softens the predictions of teacher and student
    alpha: Share = 0.1  # weight of the labels in the loss with soft labels
    teacher_labels: Whole = 0
    """number of labelled examples to train the teacher, among them those of the students; 0: all"""
    teacher_epochs: Count = 5  # number of epochs to train the teacher
    teacher_learning_rate: Positive = 1e-3  # highest learning rate of the teacher
    teacher_batch_size: Count = 128  # number of examples per step of the teacher
    dropout: Dropout = 0.2  # fraction of the teacher's hidden units that is dropped in training
    check: bool = False
    """exit with status 1 unless, with the most labels, the start from selected units has fewer test errors than
    the random start, by more than two standard errors of the paired difference"""


CONFIGS = {
    "mnist": ("MNIST, students 784-128-128-10: minutes on two cores", Config()),
    "digits": ("scikit-learn's digits, which need no download: a minute", Config(
        dataset="digits", teacher="mlp:256,256", student="mlp:32,32", labels=(50, 100, 200), batch_size=10,
        teacher_epochs=60, teacher_batch_size=32,
    )),
    "soft": ("MNIST, also with the teacher's soft labels", Config(soft=True)),
    "small_teacher": ("MNIST, with a teacher of 1,000 labels", Config(teacher_labels=1000, teacher_epochs=200)),
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    most = len(dataset.train.label)
    for name in ("learning_rates", "scales", "scores"):
        config.need(name, bool(getattr(config, name)), "name at least one")
    config.need("scales", bool(np.isfinite(config.scales).all()), "be finite numbers")
    config.among("scores", SCORES)
    seen = config.teacher_labels or most
    rises = np.diff((config.batch_size - 1, *config.labels, seen + 1))
    config.need(
        "labels", bool(config.labels and (rises >= 1).all()),
        f"rise from at least --batch-size, {config.batch_size}, to at most the teacher's {seen} "
        "labelled examples",
    )  # fmt: skip
    between = f"lie between --teacher-batch-size, {config.teacher_batch_size}, and {most}, or be 0"
    config.need("teacher_labels", config.teacher_batch_size <= seen <= most, between)
    config.need("examples", 2 <= config.examples <= most, f"lie between 2 and {most}")
    for name in ("teacher", "student"):
        config.need(name, getattr(config, name).startswith("mlp:"), "be an MLP, such as mlp:128,128")
    same = config.student.count(",") == config.teacher.count(",")
    config.need("student", same, f"be as deep as the teacher, {config.teacher}")
    teacher, student = (build(config, dataset, kind, 0) for kind in ("teacher", "student"))
    image = prepare(dataset.train.image[:1])
    units.select(units.trace(teacher, image), units.trace(student, image))


class Setting(NamedTuple):
    """The number of labelled examples, and whether the teacher's soft labels of them are used."""

    labels: int
    soft: bool

    def __str__(self) -> str:
        return f"{self.labels:,} {'soft ' * self.soft}labels"


def train_teachers(config: Config, run: Run, rows: np.ndarray) -> list[models.Model]:
    """Trains the teacher of each seed, on all labels or on its first ones."""
    examples = arrays(run.dataset.train)
    steps = (config.teacher_labels or len(examples["label"])) // config.teacher_batch_size
    tx = adam(config.teacher_learning_rate, config.teacher_epochs, steps)
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx), transform=plain)
    trained = []
    for seed in range(config.seeds):
        chosen, order = np.sort(rows[seed][: config.teacher_labels or None]), 10_000 + seed
        state = train.init_state(build(config, run.dataset, "teacher", seed), tx, run.key(seed, order))
        done = run.fit(
            "teacher", seed, state, epoch, {name: values[chosen] for name, values in examples.items()},
            epochs=config.teacher_epochs, batch_size=config.teacher_batch_size, order=order,
        )  # fmt: skip
        trained.append(done.model)
    return trained


def train_students(
    config: Config,
    run: Run,
    setting: Setting,
    rows: np.ndarray,
    teacher: models.Model,
    starts: Mapping[Start, models.Model],
) -> list[dict[str, Any]]:
    """Trains the students of all starts, seeds and learning rates of one setting.

    Args:
      config: the options.
      run: the run.
      setting: the setting.
      rows: the numbers of each seed's examples, ``[seeds, labels]``.
      teacher: the teachers of all seeds, who give the soft labels.
      starts: the students before their first step, with a first axis of seeds.

    Returns:
      A record for each start and learning rate. Its ``"model"`` has a first axis of seeds, its ``"curve"``
      are the errors on the first WATCHED validation examples, ``[seeds, epochs + 1]``.
    """
    loss_fn, examples = train.supervised(), arrays(run.dataset.train)
    if setting.soft:
        loss_fn = train.distill(temperature=config.temperature, alpha=config.alpha)
        examples["teacher"] = lanes.logits(teacher, examples["image"])
    validation, rates = run.dataset.validation, config.learning_rates
    values = sweeps.grid(seed=range(config.seeds), rate=rates)
    keys = jax.random.split(jax.random.key(0), len(values["seed"]))
    watched = {name: each[:WATCHED] for name, each in arrays(validation).items()}
    validate = train.make_validation(watched, prepare=prepare, stacked=True)

    def tx(rate: Any) -> optax.GradientTransformation:  # its state does not depend on the rate
        schedule = adam(1.0, config.epochs, setting.labels // config.batch_size)
        return optax.chain(schedule, optax.scale(rate))

    def make_step(seed, rate):
        return lanes.each_seed(train.make_train_step(loss_fn, tx(rate)))(seed)

    epoch = sweeps.make_epoch(make_step)
    found = []
    for start, model in starts.items():
        states = sweeps.init_states(sweeps.take(model, values["seed"]), tx(1.0), keys)
        first = validate(states.model)["validation_errors"]
        done = run.fit(
            f"{setting}, {start}", None, sweeps.Students(states, values), epoch, examples, epochs=config.epochs,
            batch_size=config.batch_size, order=[0] * len(keys), rows=rows[values["seed"]], validate=validate,
        )  # fmt: skip
        curves = np.vstack([first, done.history["validation_errors"]]).T
        for i, rate in enumerate(rates):
            each = np.arange(i, len(keys), len(rates))  # the students of all seeds
            model = sweeps.take(done.model, each)
            wrong = lanes.errors(model, validation)
            found.append({
                **start._asdict(), **setting._asdict(), "learning_rate": rate, "model": model,
                "validation": {"errors": wrong.tolist()}, "curve": curves[each],
            })  # fmt: skip
    return found


COLUMNS = {
    "parameters": results.count("parameters"),
    "errors": results.score("errors"),
    "change against random": lambda m: results.mean_sd(m["change"]) if m["start"] in STARTS[1:] else None,
    "score": lambda model: model.get("score"),
    "p": lambda model: f"{model['scale']:g}" if model.get("start") in (*SELECTED, SHUFFLED) else None,
    "learning rate": lambda model: f"{model['learning_rate']:g}" if "learning_rate" in model else None,
    "agreement %": results.score("agreement", percent=True),
}


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("inject_mnist", name, config, check)
    dataset = run.dataset
    rows = lanes.orders(config.seeds, len(dataset.train.label))
    teachers = train_teachers(config, run, rows)
    each = [begin(config, dataset, teacher, seed) for seed, teacher in enumerate(teachers)]
    starts = {start: sweeps.stack([seed[start] for seed in each]) for start in all_starts(config)}
    teacher = sweeps.stack(teachers)
    settings = [Setting(n, soft) for soft in (False, True)[: 1 + config.soft] for n in config.labels]
    tried: list[dict[str, Any]] = []
    best: dict[tuple[str, Setting], dict[str, Any]] = {}  # chosen on validation data
    for setting in settings:
        for one in train_students(config, run, setting, rows[:, : setting.labels], teacher, starts):
            tried.append({key: value for key, value in one.items() if key not in ("model", "curve")})
            known = best.setdefault((one["start"], setting), one)
            if sum(one["validation"]["errors"]) < sum(known["validation"]["errors"]):
                best[one["start"], setting] = one
    main_setting = Setting(config.labels[-1], False)
    method = min(SELECTED, key=lambda kind: sum(best[kind, main_setting]["validation"]["errors"]))

    taught = lanes.logits(teacher, dataset.test.image)
    for (_, setting), one in best.items():
        one |= lanes.evaluate(one.pop("model"), dataset.test, taught)
        one["change"] = np.subtract(one["test"]["errors"], best[RANDOM, setting]["test"]["errors"])
    table = {"teacher": {"start": "teacher", **lanes.evaluate(teacher, dataset.test)}}
    table |= {f"{start}, {setting}": one for (start, setting), one in best.items()}
    pair = {kind: best[kind, main_setting] for kind in (RANDOM, method)}
    headline = results.summary(
        {"models": pair}, baseline=RANDOM, model=method,
        method=f"Starting from units of the teacher ({method}; {main_setting})",
    )  # fmt: skip
    found = run.record(table) | {"tried": tried}
    run.finish(found, draw(run, best, settings), headline=headline, columns=COLUMNS)
    t = results.paired(*[pair[kind]["test"]["errors"] for kind in (RANDOM, method)]).t
    return run.check(t < -2, headline)


def draw(run: Run, best: Mapping[tuple[str, Setting], Any], settings: Sequence[Setting]) -> dict[str, str]:
    """Draws the errors against the number of labels, and against the epoch with the fewest labels."""
    drawn, band = {}, f"mean over {run.config.seeds} seeds; band: one standard deviation"
    for word, soft in {"labels": False, "soft labels": True}.items():
        ours = [setting for setting in settings if setting.soft == soft]
        share, file = 100 / len(run.dataset.test.label), f"{word.replace(' ', '-')}.png"
        series = {k: share * np.array([best[k, each]["test"]["errors"] for each in ours]).T for k in STARTS}
        if len(ours) > 1:
            pictures.curves(
                run.directory / file, [each.labels for each in ours], series,
                xlabel=f"number of {word}", ylabel="test error, %", log_x=True,
            )  # fmt: skip
            drawn[f"Test error against the number of {word}, {band}"] = file
    share = 100 / min(WATCHED, len(run.dataset.validation.label))
    pictures.curves(
        run.directory / "epochs.png", np.arange(run.config.epochs + 1),
        {kind: share * best[kind, settings[0]]["curve"] for kind in STARTS},
        xlabel="epoch", ylabel="validation error, %",
    )  # fmt: skip
    drawn[f"Validation error against the epoch with {settings[0]}, {band}"] = "epochs.png"
    return drawn


if __name__ == "__main__":
    run_main(main)

"""Mixes a student's parameters with its teacher's: the network with λ × teacher + (1 − λ) × student.

Teacher and student are networks of one shape that learn from the same batches. They are mixed in two ways:
"pull" moves the student towards the teacher by λ before each of its steps; "through" trains the student by the
gradient of the loss at the mixed parameters, and the mixed network is the result. A student alone ("scratch")
and a student of the teacher's soft labels train beside them for as many epochs. A wider teacher is first cut to
the student's shape, also with its units in the order that is nearest to the student's ("aligned").

The program also draws the validation loss on the straight line between teacher and student, as trained and
aligned. On MNIST and on digits neither way of mixing beats the student alone; aligning lowers the barrier on the
line by about nine tenths. All seeds of a model, and all λ of a sweep, run as one compiled program.

    python experiments/interpolate_mnist.py                 # mnist where it can be had, else digits: a minute
    python experiments/interpolate_mnist.py study           # also few labels, a wider teacher, λ from 0 to 1
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import lanes
from harness.experiment import Run, arrays, mnist_or_digits, prepare
from harness.options import Count, Options, Positive, Share, Whole, read
from harness.runs import run_main
from interpolate_mnist_report import draw, headline, notes

from distill_jax import data, losses, models, train, weights
from distill_jax.compress import units
from distill_jax.train import interpolation, sweeps


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    seeds: Count = 3  # number of repetitions, each with its own networks and order of examples
    hidden: Count = 128  # number of hidden units of the student and of the teacher of equal width
    wide: Whole = 0  # number of hidden units of a further, wider teacher; 0: no such teacher
    rate: Share = 0.5  # λ, the teacher's share of the mixed parameters
    learning_rate: Positive = 0.01  # learning rate of all networks (SGD)
    batch_size: Count = 100  # number of examples per step
    epochs: Count = 10  # number of epochs to train each network on all labels
    few: Whole = 0  # also train on this number of labelled examples; 0: only on all
    few_epochs: Count = 200  # number of epochs to train each network on the few labels
    temperature: Positive = 4.0  # temperature T that softens the predictions of teacher and student
    alpha: Share = 0.1  # weight of the labels in the loss with soft labels
    points: Whole = 0  # number of λ from 0 to 1 to sweep, with few labels if there are; 0: no sweep


SMALL: Any = {"dataset": "digits", "learning_rate": 0.1, "batch_size": 20, "epochs": 40}
CONFIGS = {
    "mnist": ("MNIST, two networks 784-128-10: a minute on two cores", Config()),
    "digits": ("scikit-learn's digits, which need no download: half a minute", Config(**SMALL)),
    "study": ("MNIST, also 1,000 labels, a teacher of 1200 units, and a sweep of λ: an hour",
              Config(wide=1200, few=1000, points=21)),
    "digits_study": ("the same study on digits: minutes", Config(wide=512, few=200, points=21, **SMALL)),
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    examples = len(dataset.train.id)
    wider = f"exceed --hidden, {config.hidden}, to have units that the student can select, or be 0"
    config.need("wide", not config.wide or config.wide > config.hidden, wider)
    enough = config.hidden > 1 or not config.wide
    config.need("hidden", enough, "be at least 2 with --wide: one unit alone has no order")
    config.at_most(examples, "batch_size")
    fits = not config.few or config.batch_size <= config.few <= examples
    config.need("few", fits, f"be from --batch-size, {config.batch_size}, to {examples}, or 0")
    config.need("points", config.points != 1, "be at least 2, or 0")


@dataclass(frozen=True)
class Setting:
    """One width of the teacher and one number of labels."""

    teacher_hidden: int
    labels: int
    epochs: int

    def __str__(self) -> str:
        return f"({self.teacher_hidden} units, {self.labels:,} labels)"


@dataclass(frozen=True)
class Trained:
    """The networks of all seeds that were trained in one way, from a wider teacher's aligned units or not."""

    setting: Setting
    method: str
    aligned: bool
    model: models.Model

    def __str__(self) -> str:
        return f"{self.method}{', aligned' * self.aligned} {self.setting}"


def build(config: Config, dataset: data.Dataset, hidden: int, teacher: bool) -> models.Model:
    """Builds the teachers or the students of all seeds."""
    keys = [jax.random.key(2 * seed + teacher) for seed in range(config.seeds)]
    return sweeps.stack(
        [models.build(f"mlp:{hidden}", dataset.image_shape, dataset.classes, key) for key in keys]
    )


def bring(
    dataset: data.Dataset, student: models.Model, teacher: models.Model, align: bool
) -> tuple[models.Model, list[float]]:
    """Cuts each seed's teacher to its student's shape; the units of the largest weights stay.

    Args:
      dataset: the data, for the shape of an image.
      student: the students of all seeds.
      teacher: the teachers, as wide or wider.
      align: whether the teacher's units are put into the order that is nearest to the student's.

    Returns:
      The teachers in the student's shape, and the cosine between the parameters of the two for each seed.
    """
    image, found = prepare(dataset.train.image[:1]), []
    for seed in range(len(jax.tree.leaves(student)[0])):
        small, large = sweeps.take(student, seed), sweeps.take(teacher, seed)
        graph, wide = units.trace(small, image), units.trace(large, image)
        scores = units.scores.l2(wide, large)
        found.append(units.bring(graph, small, wide, large, how=scores, groups=None if align else ()))
    return sweeps.stack([each.model for each in found]), [each.cosine[1] for each in found]


def train_setting(config: Config, run: Run, setting: Setting, rows: np.ndarray) -> list[Trained]:
    """Trains all models of one setting, the teacher first."""
    examples = arrays(run.dataset.train)
    wider = setting.teacher_hidden > config.hidden
    student = build(config, run.dataset, config.hidden, teacher=False)
    teacher = build(config, run.dataset, setting.teacher_hidden, teacher=True)
    tx = optax.sgd(config.learning_rate)
    hard = train.make_train_step(train.supervised(), tx)
    soft = train.make_train_step(train.distill(temperature=config.temperature, alpha=config.alpha), tx)
    found: list[Trained] = []
    epochs: dict[train.Step, Any] = {}  # so that networks of the same shapes are compiled once

    def learn(method, step, states, *, aligned=False, examples=examples):
        epoch = epochs.setdefault(step, sweeps.make_epoch(lanes.each_seed(step)))
        name = str(Trained(setting, method, aligned, student))
        model = run.fit(
            name, None, sweeps.Students(states, {"seed": np.arange(config.seeds)}), epoch, examples,
            epochs=setting.epochs, batch_size=config.batch_size, order=[0] * config.seeds,
            rows=rows[:, : setting.labels],
        ).model  # fmt: skip
        if method == "through":
            model = interpolation.mix(model, config.rate)
        found.append(Trained(setting, method, aligned, model))
        return model

    def start(model, tx=tx):
        return sweeps.init_states(model, tx, jax.random.split(jax.random.key(0), config.seeds))

    taught = learn("teacher", hard, start(teacher))
    labelled = examples | {"teacher": lanes.logits(taught, examples["image"])}
    learn("scratch", hard, start(student))
    # A wider teacher is trained and cut first; one of the student's shape learns beside the student
    cut = {align: bring(run.dataset, student, taught, align)[0] for align in (False, True) if wider}
    for align, partner in (cut or {False: teacher}).items():
        pull = interpolation.pull(None if wider else hard, hard, config.rate)
        learn("pull", pull, interpolation.Pair(start(partner), start(student)), aligned=align)
        supervised = train.supervised()
        through = interpolation.through(supervised, config.rate, teacher_loss=None if wider else supervised)
        both = interpolation.split_tx(tx, None if wider else tx)
        joined = interpolation.join(student, partner, config.rate)
        learn("through", train.make_train_step(through, both), start(joined, both), aligned=align)
    learn("soft labels", soft, start(student), examples=labelled)
    for align, partner in (cut or {False: taught}).items():
        pull = interpolation.pull(None, soft, config.rate)
        pair = interpolation.Pair(start(partner), start(student))
        learn("soft labels + pull", pull, pair, aligned=align, examples=labelled)
    return found


def sweep(config: Config, run: Run, setting: Setting, rows: np.ndarray) -> dict[str, list[models.Model]]:
    """Trains at all λ in one program: "pull" and "through" → the networks of each λ."""
    tx, rates = optax.sgd(config.learning_rate), np.linspace(0, 1, config.points)
    both, supervised = interpolation.split_tx(tx, tx), train.supervised()
    hard = train.make_train_step(supervised, tx)
    student, teacher = (build(config, run.dataset, config.hidden, teacher=t) for t in (False, True))

    def pull(rate):
        return interpolation.pull(hard, hard, rate)

    def through(rate):
        return train.make_train_step(interpolation.through(supervised, rate, teacher_loss=supervised), both)

    def start(model, tx):
        return sweeps.init_states(model, tx, jax.random.split(jax.random.key(0), config.seeds))

    pair = interpolation.Pair(start(teacher, tx), start(student, tx))
    joined = start(interpolation.join(student, teacher, config.rate), both)
    found = {}
    for method, make, states in (("pull", pull, pair), ("through", through, joined)):
        axes = interpolation.student_axes(states)  # of each seed, the students of all λ share one teacher
        each_rate = sweeps.Students(
            jax.vmap(lambda state, axes=axes: sweeps.repeat(state, config.points, axes))(states),
            {"rate": np.tile(rates, (config.seeds, 1))},
        )
        epoch = sweeps.make_epoch(lanes.each_seed(sweeps.each(make, axes=axes)))
        done = run.fit(
            f"{method} at all lambda", None, sweeps.Students(each_rate, {"seed": np.arange(config.seeds)}), epoch,
            arrays(run.dataset.train), epochs=setting.epochs, batch_size=config.batch_size,
            order=[0] * config.seeds, rows=rows[:, : setting.labels],
        ).state.states.states  # fmt: skip
        each = [
            jax.vmap(lambda state, i=i, axes=axes: sweeps.take(state, i, axes))(done).model
            for i in range(config.points)
        ]
        if method == "through":
            each = [interpolation.mix(model, rate) for model, rate in zip(each, rates, strict=True)]
        found[method] = each
    return found


def line(
    dataset: data.Dataset, setting: Setting, teacher: models.Model, student: models.Model, align: bool
) -> dict[str, Any]:
    """Computes the validation loss on the straight line from teacher to student: one record."""
    ts = np.linspace(0, 1, 21)
    start, cosines = bring(dataset, student, teacher, align)
    image, label = prepare(dataset.validation.image), jnp.asarray(dataset.validation.label)

    @jax.jit
    @jax.vmap
    def along(start, end):
        def loss(t):
            return jnp.mean(losses.cross_entropy(weights.lerp(start, end, t)(image), label))

        return jax.lax.map(loss, jnp.asarray(ts, jnp.float32))

    values = np.asarray(along(start, student))
    return {
        **asdict(setting), "aligned": align, "t": ts, "validation_loss": values, "cosine": cosines,
        "barrier": [weights.barrier(ts, each) for each in values],
    }  # fmt: skip


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("interpolate_mnist", name, config, check)
    dataset, examples = run.dataset, len(run.dataset.train.id)
    rows = lanes.orders(config.seeds, examples)
    counts = {config.few: config.few_epochs} if config.few else {}
    counts[examples] = config.epochs
    widths = (config.hidden, config.wide) if config.wide else (config.hidden,)
    settings = [Setting(width, *count) for width in widths for count in counts.items()]
    trained: list[Trained] = []
    lines = []
    for setting in settings:
        networks = train_setting(config, run, setting, rows)
        trained += networks
        if setting.labels == examples:
            of = {each.method: each.model for each in networks}
            lines += [line(dataset, setting, of["teacher"], of["scratch"], a) for a in (False, True)]
    swept = sweep(config, run, settings[0], rows) if config.points else {}

    table = {
        str(each): {
            **asdict(each.setting), "method": each.method, "aligned": each.aligned,
            "validation": {"errors": lanes.errors(each.model, dataset.validation)},
            **lanes.evaluate(each.model, dataset.test),
        }
        for each in trained
    }  # fmt: skip
    found = run.record(table) | {"lines": lines, "sweep": {"rate": np.linspace(0, 1, config.points)}}
    for method, each in swept.items():
        found["sweep"][method] = np.stack([lanes.errors(model, dataset.test) for model in each], 1)
    run.finish(found, draw(run, found), headline=headline(config, found, examples), notes=notes(found))
    return 0


if __name__ == "__main__":
    run_main(main)

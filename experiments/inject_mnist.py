"""Units of a teacher as a small network's start, where labels are few (system S0), on MNIST or digits.

A teacher is trained; students of its depth, but narrower, begin at random, from selected units of the
teacher (evenly spaced, or by score), or from its merged units; and as a control from the selected
numbers in random places, which keep their sizes alone. Each learns from few labels, in the same order
of examples, all seeds and learning rates in one compiled program. Score, scale and learning rate of
each start are chosen on validation data; of the chosen ones alone the test errors are looked at.

    python experiments/inject_mnist.py                # minutes on two cores
    python experiments/inject_mnist.py --teacher-labels 1000 --teacher-epochs 100  # saw no more itself
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import pictures, report, runs, study  # fmt: skip
from harness.lanes import Lanes, orders
from harness.options import Count, Dropout, Options, Positive, Share, Whole, parse
from harness.study import Trained
from harness.training import Lab, adam, arrays, begin, prepare, work

from distill_jax import _files, data, metrics, models, train
from distill_jax.compress import units

RANDOM, SHUFFLED, UNIFORM, SCORED, MERGED = STARTS = (
    "random", "shuffled", "uniform", "by score", "merged",
)  # fmt: skip
SELECTED = (UNIFORM, SCORED)
SCORES = ("l1", "l2", "fpgm", "lamp", "mean_activation", "apoz")
WATCHED = 1000  # validation examples on which the errors of every epoch are counted


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those on MNIST."""

    seeds: Count = 5
    """how many repetitions, each with its own teacher and its own labelled examples"""
    teacher: str = "mlp:512,512"
    """such as mlp:512,512 or mlp:1200,1200"""
    student: str = "mlp:128,128"
    """likewise, as deep, and nowhere wider"""
    labels: tuple[int, ...] = (100, 300, 1000)
    """numbers of labelled examples, rising; --check is about the last"""
    epochs: Count = 30
    """the students'"""
    batch_size: Count = 25
    """examples a step of the students"""
    learning_rates: tuple[Positive, ...] = (1e-3, 3e-3, 1e-2)
    """the students', at their highest: a rise over one epoch, then a cosine to 0 (Adam)"""
    scores: tuple[str, ...] = ("l2", "mean_activation")
    """by which units are selected: of l1, l2, fpgm, lamp, mean_activation, apoz"""
    scales: tuple[float, ...] = (0.0, 0.5)
    """powers p: kernels of selected units are multiplied by (teacher's inputs / student's inputs)^p"""
    examples: int = 1024
    """training images, without labels, on which units are scored and compared"""
    soft: bool = False
    """also learn from the teacher's soft labels of the same few examples"""
    temperature: Positive = 4.0
    """T, of the soft labels"""
    alpha: Share = 0.1
    """the labels' share of the loss with soft labels"""
    teacher_labels: Whole = 0
    """labelled examples of the teacher, among them the students'; 0: all"""
    teacher_epochs: Count = 5
    """the teacher's"""
    teacher_learning_rate: Positive = 1e-3
    """the teacher's"""
    teacher_batch_size: Count = 128
    """the teacher's"""
    dropout: Dropout = 0.2
    """of the teacher's hidden units"""
    check: bool = False
    """exit 1 unless the selected start (uniform or by score, as validation data says) has fewer test
    errors than the random one, by more than two standard errors of the paired difference"""


DEFAULTS: dict[tuple[str, bool], dict[str, Any]] = {("", True): {
    "teacher": "mlp:256,256", "student": "mlp:32,32", "labels": (50, 100, 200), "batch_size": 10,
    "teacher_epochs": 60, "teacher_batch_size": 32,
}}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    most = len(dataset.train.label)
    for name in ("learning_rates", "scales", "scores"):
        config.need(name, bool(getattr(config, name)), "name at least one")
    config.need("scales", bool(np.isfinite(config.scales).all()), "be finite numbers")
    config.among("scores", SCORES)
    seen = config.teacher_labels or most
    steps = np.diff((config.batch_size - 1, *config.labels, seen + 1))
    config.need(
        "labels", bool(config.labels and (steps >= 1).all()),
        f"rise from at least --batch-size, {config.batch_size}, to at most the teacher's {seen} "
        "labelled examples",
    )  # fmt: skip
    config.need(
        "teacher_labels", config.teacher_batch_size <= seen <= most,
        f"lie between --teacher-batch-size, {config.teacher_batch_size}, and {most}, or be 0",
    )  # fmt: skip
    config.need("examples", 2 <= config.examples <= most, f"lie in 2 … {most}")
    for name in ("teacher", "student"):
        config.need(name, getattr(config, name).startswith("mlp:"), "be mlp:…")
    depth = config.teacher.count(",")
    config.need("student", config.student.count(",") == depth, f"be as deep as the teacher, {config.teacher}")
    teacher, student = (build(config, dataset, kind, 0) for kind in ("teacher", "student"))
    images = dataset.train.image[:2]
    units.select(graph_of(teacher, images), graph_of(student, images))


def build(config: Config, dataset: data.Dataset, kind: str, seed: int) -> models.Model:
    """Builds the teacher or the student with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), kind == "student")
    dropout = config.dropout if kind == "teacher" else 0.0
    shape: Any = dataset.train.image.shape[1:]
    return models.build(getattr(config, kind), shape, dataset.classes, key, dropout=dropout)


def graph_of(model: models.Model, images: np.ndarray) -> units.UnitGraph:
    """The units of a network."""
    return units.trace(lambda p, x: model.apply_fn(p, model.model_state, x)[0], model.params, prepare(images))


class Start(NamedTuple):
    """A way to begin.

    Attributes:
      kind: of STARTS.
      score: by which units were selected, or "".
      scale: the power p.
    """

    kind: str
    score: str = ""
    scale: float = 0.0

    def __str__(self) -> str:
        """What is shown, and what its checkpoints are called."""
        power = f", p = {self.scale:g}" if self.kind in (*SELECTED, SHUFFLED) else ""
        return self.kind + (f", {self.score}" if self.score else "") + power


def all_starts(config: Config) -> list[Start]:
    """What is tried."""
    scaled = [Start(kind, "", p) for kind in (SHUFFLED, UNIFORM) for p in config.scales]
    scored = [Start(SCORED, score, p) for score in config.scores for p in config.scales]
    return [Start(RANDOM), *scaled, *scored, Start(MERGED)]


def begun(config: Config, dataset: data.Dataset, teacher: models.Model, seed: int) -> dict[Start, Any]:
    """The students of one seed before their first step: start → params."""
    rows = np.random.default_rng([2, seed]).permutation(len(dataset.train.label))
    images = dataset.train.image[rows[: config.examples]]
    student = build(config, dataset, "student", seed)
    large, small = graph_of(teacher, images), graph_of(student, images)
    inputs, params = prepare(images), teacher.params

    def cut(tree: Any, kept: Any) -> Any:
        done = units.inject(student.params, units.keep(large, tree, kept))
        assert not done.kept, done.kept
        return done.params

    def score(name: str) -> dict[str, np.ndarray]:
        looks = (inputs,) if name in ("mean_activation", "apoz") else ()
        return getattr(units.scores, name)(large, params, *looks)

    def scaled(tree: Any, power: float) -> Any:
        """A kernel's inputs are on its last axis but one, in dense layers and convolutions alike."""
        return jax.tree.map(
            lambda x, y: x if x.ndim < 2 else x * (y.shape[-2] / x.shape[-2]) ** power, tree, params
        )

    uniform = units.select(large, small)
    selected = {"": cut(params, uniform)} | {
        name: cut(params, units.select(large, small, how=score(name))) for name in config.scores
    }
    values = units.activations(large, params, inputs)
    alike = {name: values[name].T for name in uniform}
    sizes = {name: len(kept) for name, kept in uniform.items()}
    merged = cut(*units.merge(large, params, sizes, likeness=alike))
    places = np.random.default_rng([3, seed])

    def shuffle(x: Any) -> Any:
        return jnp.asarray(places.permutation(np.ravel(x)).reshape(x.shape))

    trees = {RANDOM: student.params, MERGED: merged, SHUFFLED: jax.tree.map(shuffle, selected[""])}
    return {
        start: scaled(trees.get(start.kind, selected.get(start.score)), start.scale)
        for start in all_starts(config)
    }


class Candidate(NamedTuple):
    """Trained students of all seeds, of one start and learning rate.

    Attributes:
      start: how they began.
      learning_rate: the highest.
      params: ``[seeds, ...]``.
      wrong: validation errors, ``[seeds]``.
      curve: errors on the first WATCHED validation examples, ``[seeds, epochs + 1]``.
    """

    start: Start
    learning_rate: float
    params: Any
    wrong: np.ndarray
    curve: np.ndarray


class Bench:
    """Where students of one setting learn, and are judged.

    Args:
      config: the options.
      lanes: with so many labelled examples of each seed as the setting has.
      name: of the setting.
      soft: the teachers' logits for them, ``[seeds, examples, classes]``, or None.
    """

    def __init__(self, config: Config, lanes: Lanes, name: str, soft: Any = None):
        self.config, self.lanes, self.name, self.soft = config, lanes, name, soft
        self.apply_fn = apply_fn = build(config, lanes.dataset, "student", 0).apply_fn
        loss_fn = train.supervised(apply_fn)
        if soft is not None:
            loss_fn = train.distill(apply_fn, temperature=config.temperature, alpha=config.alpha)

        def step(state, rate, batch):
            return train.make_train_step(loss_fn, self.tx(rate))(state, batch)

        rates = jnp.asarray(config.learning_rates)
        mapped = jax.vmap(step, (0, 0, None))
        self.epoch = lanes.make_epoch(lambda states, batch: mapped(states, rates, batch))
        each = jax.vmap(jax.vmap(lambda p, x: apply_fn(p, {}, x)[0], (0, None)), (0, None))
        count = jax.jit(
            lambda params, images, labels: metrics.errors(each(params, prepare(images)), labels).sum(-1)
        )
        held_out = lanes.dataset.validation
        watched = held_out.image[:WATCHED], held_out.label[:WATCHED]
        self.count = lambda params: np.asarray(count(params, *watched))

    def tx(self, rate: Any) -> optax.GradientTransformation:
        """The students' optimizer; its state does not depend on the rate."""
        steps = self.lanes.rows.shape[1] // self.config.batch_size
        return optax.chain(adam(1.0, self.config.epochs)(steps), optax.scale(rate))

    def train(self, start: Start, params: Any) -> list[Candidate]:
        """Trains the students of one start, or takes them from their checkpoint.

        Args:
          start: how they begin.
          params: ``[seeds, ...]``.
        """
        config, lanes = self.config, self.lanes
        rates = config.learning_rates

        def state(params, key):
            return train.init_state(params, self.tx(1.0), key)

        def seed(params, key):
            return jax.vmap(lambda _: state(params, key))(jnp.arange(len(rates)))

        states = jax.vmap(seed)(params, jax.random.split(jax.random.key(0), config.seeds))

        def validate(params, model_state):
            wrong = self.count(params)
            each = {f"wrong {i}": float(x) for i, x in enumerate(np.ravel(wrong))}
            return {"validation_errors": float(wrong.mean()), **each}

        first = np.ravel(self.count(states.params))
        done = lanes.train(
            f"{self.name}, {start}", self.epoch, states, epochs=config.epochs,
            unit=float(config.seeds * len(rates)), soft=self.soft, validate=validate,
        )  # fmt: skip
        curves = np.array([[x, *done.history[f"wrong {i}"]] for i, x in enumerate(first)])
        curves = curves.reshape(config.seeds, len(rates), -1)
        found = []
        for i, rate in enumerate(rates):
            lane = jax.tree.map(lambda x, i=i: x[:, i], done.state.params)
            said = lanes.logits(self.apply_fn, lane, lanes.dataset.validation)
            wrong = (said.argmax(-1) != lanes.dataset.validation.label).sum(-1)
            found.append(Candidate(start, rate, lane, wrong, curves[:, i]))
        return found


def train_teacher(config: Config, lab: Lab, rows: np.ndarray, seed: int, unit: float) -> Trained:
    """Trains one seed's teacher, on all labels or on its first ones."""
    model = build(config, lab.dataset, "teacher", seed)
    chosen = np.sort(rows[seed][: config.teacher_labels or None])
    return lab.train(
        "teacher", seed, model, train.supervised(model.apply_fn),
        {name: values[chosen] for name, values in arrays(lab.dataset.train).items()},
        epochs=config.teacher_epochs, tx=adam(config.teacher_learning_rate, config.teacher_epochs),
        batch_size=config.teacher_batch_size, order_seed=10_000 + seed, unit=unit,
    )  # fmt: skip


Chosen = dict[str, dict[str, Candidate]]  # setting → kind of start → the best by validation


def run_students(
    config: Config, lanes: Lanes, teachers: list[Trained]
) -> tuple[Chosen, list[dict[str, Any]]]:
    """Trains all students in all settings.

    Returns:
      The chosen ones, and a row for everything that was tried.
    """
    dataset, rows = lanes.dataset, lanes.rows
    each = [
        begun(config, dataset, models.Model(t.apply_fn, *t.variables), seed)
        for seed, t in enumerate(teachers)
    ]
    taught = jax.tree.map(lambda *x: jnp.stack(x), *[t.variables[0] for t in teachers])
    chosen: Chosen = {}
    tried = []
    for soft in (False, True)[: 1 + config.soft]:
        for count in config.labels:
            name = setting(count, soft)
            few = dataclasses.replace(lanes, rows=rows[:, :count])
            labels = few.soft_labels(teachers[0].apply_fn, taught) if soft else None
            bench = Bench(config, few, name, labels)
            best: dict[str, Candidate] = {}
            for start in all_starts(config):
                params = jax.tree.map(lambda *x: jnp.stack(x), *[seed[start] for seed in each])
                for one in bench.train(start, params):
                    row = {"setting": name, **start._asdict(), "learning_rate": one.learning_rate}
                    tried.append({**row, "validation_errors": one.wrong.tolist()})
                    known = best.get(start.kind)
                    if known is None or one.wrong.sum() < known.wrong.sum():
                        best[start.kind] = one
            chosen[name] = best
    return chosen, tried


def setting(count: int, soft: bool) -> str:
    """The name of a number of labels."""
    return f"{count:,} {'soft ' if soft else ''}labels"


def entries(
    config: Config, lanes: Lanes, chosen: Chosen, teachers: list[Trained], main: str
) -> dict[str, dict[str, Any]]:
    """Looks at the test set: the models of results.json, a list a setting."""
    dataset = lanes.dataset
    apply_fn = build(config, dataset, "student", 0).apply_fn
    label = dataset.test.label

    def size(params: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(params))

    first = [metrics.evaluate(teacher.test_logits, label) for teacher in teachers]
    found: dict[str, dict[str, Any]] = {
        "teacher": {
            "parameters": size(teachers[0].variables[0]),
            "test": {key: [f[key] for f in first] for key in first[0]}
            | {name: [f["errors"] for f in first] for name in chosen},
        }
    }
    for kind in STARTS:
        found[kind] = {"test": {}, "validation": {}, "chosen": {}, "curve": {}}
        for name, best in chosen.items():
            one = best[kind]
            said = lanes.logits(apply_fn, one.params, dataset.test)
            figures = [metrics.evaluate(x, label, t.test_logits) for x, t in zip(said, teachers, strict=True)]
            entry = found[kind]
            entry["test"][name] = [f["errors"] for f in figures]
            entry["validation"][name] = one.wrong.tolist()
            entry["chosen"][name] = {**one.start._asdict(), "learning_rate": one.learning_rate}
            entry["curve"][name] = one.curve
            if name == main:
                entry["test"] |= {key: [f[key] for f in figures] for key in figures[0]}
                entry["parameters"] = size(one.params) // config.seeds
    return found


def versus(entry: Mapping[str, Any], random: Mapping[str, Any], name: str) -> str:
    """A cell: test errors, and t of the paired difference from the random start's."""
    values = entry["test"][name]
    if entry is random:
        return report.mean_sd(values)
    t = report.paired(random["test"][name], values).t
    return f"{report.mean_sd(values)} (t = {t:.1f})".replace("-", "−")


def selected(table: Mapping[str, Any], name: str) -> str:
    """Which of the selected starts validation data prefers."""
    return min(SELECTED, key=lambda kind: sum(table[kind]["validation"][name]))


def sentence(table: Mapping[str, Any], name: str) -> str:
    """What the selected start did to the test errors of a setting."""
    kind = selected(table, name)
    pair = {k: {"test": {"errors": table[k]["test"][name]}} for k in (RANDOM, kind)}
    return report.summary(
        {"models": pair}, baseline=RANDOM, model=kind,
        method=f"With {name}, starting from selected units ({kind})",
    )  # fmt: skip


def draw(config: Config, results: Mapping[str, Any], watched: int, out: Path) -> dict[str, str]:
    """Draws errors against epochs in each setting, and against the number of labels."""
    table, drawn = results["models"], {}
    for name in results["settings"]:
        file = f"epochs-{name.replace(' ', '-').replace(',', '')}.png"
        series = {kind: 100 * table[kind]["curve"][name] / watched for kind in STARTS}
        pictures.curves(
            out / file, np.arange(config.epochs + 1), series, xlabel="epoch",
            ylabel="validation error, %",
        )  # fmt: skip
        drawn[f"Validation error against epoch, {name}; band: one standard deviation over seeds"] = file
    if len(config.labels) > 1:
        for soft in (False, True)[: 1 + config.soft]:
            file = f"labels{'-soft' if soft else ''}.png"
            names = [setting(count, soft) for count in config.labels]
            size = results["dataset"]["test"]
            pictures.curves(
                out / file, config.labels,
                {kind: 100 / size * np.array([table[kind]["test"][name] for name in names]).T
                 for kind in STARTS},
                xlabel="soft labels" if soft else "labels", ylabel="test error, %", log_x=True,
            )  # fmt: skip
            drawn[
                f"Test error against the number of {'soft ' if soft else ''}labels; band: one "
                "standard deviation over seeds"
            ] = file
    return drawn


def main() -> int:
    """Runs the experiment; returns the exit status."""
    started = time.monotonic()
    config, dataset = parse(Config, __doc__, DEFAULTS)
    check(config, dataset)
    out = begin("inject_mnist", config, dataset)
    examples, seeds = len(dataset.train.label), range(config.seeds)
    rows = orders(config.seeds, examples)
    # The unit of work is one example of one student
    ratio = work(build(config, dataset, "teacher", 0), dataset)
    ratio *= (config.teacher_labels or examples) / work(build(config, dataset, "student", 0), dataset)
    unit = float(config.seeds * len(config.learning_rates))
    total = unit * config.epochs * len(all_starts(config)) * sum(config.labels) * (1 + config.soft)
    progress = runs.Progress(config.seeds * config.teacher_epochs * ratio + total)
    lab = Lab(dataset, out, progress, config.seeds, save_seconds=config.save_seconds)
    teachers = [train_teacher(config, lab, rows, seed, ratio) for seed in seeds]
    lanes = Lanes(dataset, rows, out, progress, config.batch_size, config.save_seconds)
    chosen, tried = run_students(config, lanes, teachers)
    progress.close()

    main_setting = setting(config.labels[-1], False)
    table = entries(config, lanes, chosen, teachers, main_setting)
    results = study.record(
        "inject_mnist",
        dataset,
        table,
        config=config,
        seconds={"total": time.monotonic() - started},
        settings=list(chosen),
        tried=tried,
    )
    _files.write_json(out / "results.json", _files.plain(results, "results"))
    drawn = draw(config, results, min(WATCHED, len(dataset.validation.label)), out)
    by_kind = {name: partial(versus, random=table[RANDOM], name=name) for name in chosen}
    students = {kind: table[kind] for kind in STARTS}
    picks = {name: partial(picked, name=name) for name in chosen}
    teacher = report.mean_sd(table["teacher"]["test"]["errors"])
    notes = [
        f"Test errors of {len(dataset.test.label):,} (teacher: {teacher}), by how students start, and "
        f"t of the paired difference from random:\n\n{report.table({'models': students}, by_kind)}",
        "\n\n".join(sentence(table, name) for name in chosen),
        "Score, p and learning rate, chosen on validation data:\n\n"
        + report.table({"models": students}, picks),
    ]
    report.write_report(
        out, results, drawn, notes,
        headline=sentence(table, main_setting),
    )  # fmt: skip
    print()
    print("\n\n".join(notes))
    print(f"Report with pictures: {out / 'report.md'}")
    ours = table[selected(table, main_setting)]["test"][main_setting]
    found = report.paired(table[RANDOM]["test"][main_setting], ours)
    if config.check and not found.t < -2:
        print(f"check failed: {sentence(table, main_setting)}", file=sys.stderr)
        return 1
    return 0


def picked(entry: Mapping[str, Any], name: str) -> str:
    """A cell: what validation data chose."""
    choice = entry["chosen"][name]
    start = Start(choice["kind"], choice["score"], choice["scale"])
    return f"{str(start)[len(start.kind) + 2 :]}, {choice['learning_rate']:g}".removeprefix(", ")


if __name__ == "__main__":
    runs.run_main(main)

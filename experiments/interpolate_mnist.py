"""λθₜ + (1 − λ)θ_g: a student that shares its teacher's parameters (system S3), on MNIST or digits.

Two networks of the same shape learn batch by batch: the teacher by its own step, the student after it
has moved towards the teacher by λ ("pull"), or through the interpolation of both ("through"). Beside
them: the student alone, and the student of stored soft labels, at equal epochs. All seeds of a
model, and all λ of a sweep, run as one compiled program.

    python experiments/interpolate_mnist.py                   # the tutorial's example: minutes
    python experiments/interpolate_mnist.py --preset study    # few labels, other widths, λ from 0 to 1
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import pictures, report, runs, study  # fmt: skip
from harness.lanes import Lanes, orders
from harness.options import Count, Options, Positive, Share, Whole, parse
from harness.training import begin, prepare
from scipy import stats

from distill_jax import _files, data, losses, metrics, models, train, weights
from distill_jax.compress import units
from distill_jax.train import interpolation

ALL, EQUAL, UNEQUAL = "all labels", "equal widths", "unequal widths"


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those of the preset tutorial on MNIST."""

    preset: Literal["tutorial", "study"] = "tutorial"
    """tutorial: the example of S3; study: also few labels, a wider teacher, and the sweep of λ"""
    seeds: Count = 3
    """how many repetitions, each with its own networks and order of examples"""
    hidden: Count = 128
    """hidden units of the student, and of the teacher of equal width"""
    wide: Whole = 0
    """hidden units of a further, wider teacher; 0: none"""
    rate: Share = 0.5
    """λ, the transfer coefficient"""
    learning_rate: Positive = 0.01
    """of all networks (SGD)"""
    batch_size: Count = 100
    """examples a step"""
    epochs: Count = 10
    """of all networks"""
    few: Whole = 0
    """a further setting: so many labelled examples, another choice for each seed; 0: none"""
    few_epochs: Count = 200
    """in that setting"""
    temperature: Positive = 4.0
    """T of the soft labels"""
    alpha: Share = 0.1
    """the labels' share of the loss with soft labels"""
    points: Whole = 0
    """values of λ from 0 to 1 in a sweep of both readings, with few labels if there are; 0: none"""


# How the other presets differ
STUDY: dict[str, Any] = {"wide": 1200, "few": 1000, "points": 21}
SMALL_IMAGES: dict[str, Any] = {"learning_rate": 0.1, "batch_size": 20, "epochs": 40}
DEFAULTS = {
    ("tutorial", True): SMALL_IMAGES, ("study", False): STUDY,
    ("study", True): SMALL_IMAGES | {"wide": 512, "few": 200, "points": 21},
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    examples = len(dataset.train.id)
    config.need(
        "wide", not config.wide or config.wide > config.hidden,
        f"exceed --hidden, {config.hidden}, to have units that the student can select, or be 0",
    )  # fmt: skip
    enough = config.hidden > 1 or not config.wide
    config.need("hidden", enough, "be at least 2 with --wide: one unit alone has no order")
    config.fit(examples, "batch_size")
    config.need(
        "few", not config.few or config.batch_size <= config.few <= examples,
        f"be from --batch-size, {config.batch_size}, to {examples}, or 0",
    )  # fmt: skip
    config.need("points", config.points != 1, "be at least 2, or 0")


@dataclass(frozen=True)
class Setting:
    """Networks of one width and one number of labels.

    Attributes:
      config: the options.
      lanes: with so many labelled examples of each seed.
      epochs: how many.
      name: which the models' checkpoints begin with.
    """

    config: Config
    lanes: Lanes
    epochs: int
    name: str

    def train(self, name: str, step: Callable[..., Any], states: Any, unit: float, soft: Any = None) -> Any:
        """Trains a model of all seeds: its last state.

        Args:
          name: of the model.
          step: ``(state, batch) -> (state, metrics)`` of one seed.
          states: ``[seeds, ...]``.
          unit: the work of an example, for the bar.
          soft: as in :meth:`harness.lanes.Lanes.train`.
        """
        epoch = self.lanes.make_epoch(step)
        name = f"{self.name}, {name}"
        return self.lanes.train(name, epoch, states, epochs=self.epochs, unit=unit, soft=soft).state


def build(config: Config, dataset: data.Dataset, hidden: int, teacher: bool) -> models.Model:
    """Builds the networks of all seeds: params with leaves ``[seeds, ...]``."""
    shape: Any = dataset.train.image.shape[1:]
    made = [
        models.build(f"mlp:{hidden}", shape, dataset.classes, jax.random.key(2 * seed + teacher))
        for seed in range(config.seeds)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *[model.params for model in made])
    return models.Model(made[0].apply_fn, stacked, {})


def starts(params: Any, tx: optax.GradientTransformation) -> train.TrainState:
    """The states of all seeds before the first step."""
    return jax.vmap(lambda p, key: train.init_state(p, tx, key))(
        params, jax.random.split(jax.random.key(0), len(jax.tree.leaves(params)[0]))
    )


def joined(student: Any, teacher: Any, tx: optax.GradientTransformation) -> train.TrainState:
    """The states of "through" before the first step."""
    params, _ = interpolation.join((student, {}), (teacher, {}))

    def one(params, key):
        return train.init_state(params, tx, key, {"student": {}, "teacher": {}})

    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(student)[0]))
    return jax.vmap(one)(params, keys)


def traced(model: models.Model, dataset: data.Dataset) -> units.UnitGraph:
    """The units of a network of :func:`build`."""
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), model.params)
    image = prepare(dataset.train.image[:1])
    return units.trace(lambda p, x: model.apply_fn(p, {}, x)[0], params, image)


def fitted(
    student: models.Model, teacher: models.Model, dataset: data.Dataset
) -> dict[str, tuple[Any, list[float]]]:
    """Brings each seed's teacher to its student's shape, and to its basin as well.

    Args:
      student: params ``[seeds, ...]``.
      teacher: likewise, as wide or wider; of the largest weights as many units stay as the student has.
      dataset: for the shapes.

    Returns:
      ``""`` and ``", aligned"`` → the teachers in the student's shape, their cosines to the students.
    """
    ours, theirs = (traced(model, dataset) for model in (student, teacher))
    found: dict[str, tuple[Any, list[float]]] = {}
    for suffix, groups in {"": (), ", aligned": None}.items():
        cosines: list[float] = []

        def bring(small, large, groups=groups, cosines=cosines):
            scores = units.scores.l2(theirs, large)
            done = units.bring(ours, small, theirs, large, how=scores, groups=groups)
            cosines.append(done.cosine[1])
            return done.params

        found[suffix] = each_seed(bring, student.params, teacher.params), cosines
    return found


def each_seed(function: Callable[..., Any], *stacked: Any) -> Any:
    """Applies a function of NumPy trees to each seed's."""
    seeds = len(jax.tree.leaves(stacked[0])[0])
    results = [
        function(*[jax.tree.map(lambda x, i=i: np.asarray(x[i]), tree) for tree in stacked])
        for i in range(seeds)
    ]
    return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *results)


def train_setting(setting: Setting, wide: bool) -> dict[str, tuple[Any, Any]]:
    """Trains all models of one setting: name → ``(apply_fn, params)``, the teacher first."""
    config, lanes, run = setting.config, setting.lanes, setting.train
    tx = optax.sgd(config.learning_rate)
    student = build(config, lanes.dataset, config.hidden, teacher=False)
    teacher = build(config, lanes.dataset, config.wide if wide else config.hidden, teacher=True)
    apply_fn = student.apply_fn
    supervised = train.supervised(apply_fn)
    hard = train.make_train_step(supervised, tx)
    distil = train.distill(apply_fn, temperature=config.temperature, alpha=config.alpha)
    soft = train.make_train_step(distil, tx)
    teacher_hard = train.make_train_step(train.supervised(teacher.apply_fn), tx)
    breadth = config.wide / config.hidden if wide else 1.0

    taught = run("teacher", teacher_hard, starts(teacher.params, tx), breadth).params
    labels = lanes.soft_labels(teacher.apply_fn, taught)
    results = {"teacher": (teacher.apply_fn, taught)}
    start = starts(student.params, tx)

    results["scratch"] = (apply_fn, run("scratch", hard, start, 1.0).params)

    def both(suffix, theirs, together):
        """The two readings, from a teacher's parameters in the student's shape."""
        pulled = interpolation.pull(hard if together else None, hard, config.rate)
        pair = interpolation.Pair(starts(theirs, tx), start)
        unit = 2.0 if together else 1.0
        done = run(f"pull{suffix}", pulled, pair, unit)
        results[f"pull{suffix}"] = (apply_fn, done.student.params)
        loss_fn = interpolation.through(
            supervised, config.rate, teacher_loss=supervised if together else None
        )
        split = interpolation.split_tx(tx, tx if together else None)
        step = train.make_train_step(loss_fn, split)
        done = run(f"through{suffix}", step, joined(student.params, theirs, split), unit)
        mixed = jax.vmap(lambda params: interpolation.mix(params, config.rate))(done.params)
        results[f"through{suffix}"] = (apply_fn, mixed)

    if wide:
        found = fitted(student, teacher._replace(params=taught), lanes.dataset)
        fitting = {suffix: theirs for suffix, (theirs, _) in found.items()}
        for suffix, theirs in fitting.items():
            both(suffix, theirs, together=False)
    else:
        fitting = {"": taught}
        both("", teacher.params, together=True)
    results["soft labels"] = (apply_fn, run("soft labels", soft, start, 1.0, labels).params)
    for suffix, theirs in fitting.items():
        step = interpolation.pull(None, soft, config.rate)
        pair = interpolation.Pair(starts(theirs, tx), start)
        name = f"soft labels + pull{suffix}"
        results[name] = (apply_fn, run(name, step, pair, 1.0, labels).student.params)
    return results


def sweep(setting: Setting) -> dict[str, np.ndarray]:
    """Both readings at many λ, each as one program: reading → test errors ``[seeds, λ]``."""
    config, lanes = setting.config, setting.lanes
    tx = optax.sgd(config.learning_rate)
    split = interpolation.split_tx(tx, tx)
    student, teacher = (build(config, lanes.dataset, config.hidden, teacher=t) for t in (False, True))
    apply_fn, rates = student.apply_fn, jnp.linspace(0, 1, config.points)
    supervised = train.supervised(apply_fn)
    hard = train.make_train_step(supervised, tx)

    def through(rate):
        loss_fn = interpolation.through(supervised, rate, teacher_loss=supervised)
        return train.make_train_step(loss_fn, split)

    readings: dict[str, tuple[Any, Any, Any]] = {
        "pull": (
            lambda rate: interpolation.pull(hard, hard, rate),
            interpolation.Pair(starts(teacher.params, tx), starts(student.params, tx)),
            lambda params, rate: params["student"],
        ),
        "through": (through, joined(student.params, teacher.params, split), interpolation.mix),
    }
    errors = {}
    for name, (make, states, model) in readings.items():
        states = jax.vmap(lambda state: interpolation.repeat(state, config.points))(states)
        done = setting.train(
            f"{name} at all λ", interpolation.sweep(make, rates), states, config.points + 1.0
        )

        test, counts = lanes.dataset.test, []
        for i, rate in enumerate(rates):
            params = jax.vmap(
                lambda s, i=i, rate=rate, model=model: model(interpolation.lane(s, i).params, rate)
            )(done)
            wrong = np.argmax(lanes.logits(apply_fn, params, test), -1) != test.label
            counts.append(wrong.sum(-1))
        errors[name] = np.stack(counts, 1)
    return errors


def lines(
    dataset: data.Dataset, trained: Mapping[str, tuple[Any, Any]], ts: np.ndarray
) -> dict[str, tuple[np.ndarray, list[float]]]:
    """The straight line from teacher to student, before and after alignment.

    Returns:
      name → the validation loss ``[seeds, points]`` in nats, and the cosines of the ends.
    """
    teacher, student = (models.Model(*trained[name], {}) for name in ("teacher", "scratch"))
    apply_fn = student.apply_fn
    image, label = prepare(dataset.validation.image), jnp.asarray(dataset.validation.label)

    @jax.jit
    @jax.vmap
    def way(a, b):
        def at(t):
            logits, _ = apply_fn(weights.lerp(a, b, t), {}, image)
            return jnp.mean(losses.cross_entropy(logits, label))

        return jax.lax.map(at, jnp.asarray(ts, jnp.float32))

    found = fitted(student, teacher, dataset)
    return {
        name: (np.asarray(way(found[suffix][0], student.params)), found[suffix][1])
        for suffix, name in {"": "as trained", ", aligned": "aligned"}.items()
    }


def verdict(results: Mapping[str, Any]) -> str:
    """One sentence: in which settings which reading makes clearly fewer errors than each rival."""
    readings = [name for name in results["models"] if name.startswith(("pull", "through"))]
    level = stats.t.ppf(0.975, results["config"]["seeds"] - 1)
    wins: dict[str, list[str]] = {"scratch": [], "soft labels": []}
    for setting in results["settings"]:
        found = {name: model["test"].get(setting) for name, model in results["models"].items()}
        for reading in (name for name in readings if found[name]):
            for rival, settings in wins.items():
                difference = report.paired(found[rival], found[reading])
                if difference.t < -level:
                    settings.append(f"{setting} ({reading}, {difference.mean:+.1f} errors)")
    texts = [
        f"{'than ' + rival} in {'; '.join(settings) if settings else 'no setting'}"
        for rival, settings in wins.items()
    ]
    return (
        f"At λ = {results['config']['rate']:g} a reading of the interpolation made clearly fewer test "
        f"errors (paired t, 5 % on two sides) {', and '.join(texts)}."
    ).replace("-", "−")


def main() -> int:
    """Runs the experiment; returns the exit status."""
    started = time.monotonic()
    config, dataset = parse(Config, __doc__, DEFAULTS)
    check(config, dataset)
    out = begin("interpolate_mnist", config, dataset)
    examples = len(dataset.train.id)
    rows = orders(config.seeds, examples)
    few = f"{config.few:,} labels"
    counts = {ALL: (examples, config.epochs)}
    if config.few:
        counts = {few: (config.few, config.few_epochs), **counts}
    widths = (EQUAL, UNEQUAL) if config.wide else (EQUAL,)
    # The unit of work is one example of one student
    total = sum(n * e for n, e in counts.values())
    work = total * (9.0 + (6.0 + config.wide / config.hidden if config.wide else 0.0))
    size, epochs = counts[few] if config.few else counts[ALL]
    work += bool(config.points) * size * epochs * 2 * (config.points + 1)
    progress = runs.Progress(work)

    def setting(count: str, name: str) -> Setting:
        size, epochs = counts[count]
        lanes = Lanes(dataset, rows[:, :size], out, progress, config.batch_size, config.save_seconds)
        return Setting(config, lanes, epochs, name)

    table: dict[str, dict[str, Any]] = {}
    ways: dict[str, np.ndarray] = {}
    barriers: dict[str, list[float]] = {}
    cosines: dict[str, list[float]] = {}
    ts = np.linspace(0, 1, 21)
    main_setting = f"{EQUAL}, {ALL}"
    for width in widths:
        for count in counts:
            place = setting(count, f"{width}, {count}")
            trained = train_setting(place, width == UNEQUAL)
            for name, (apply_fn, params) in trained.items():
                logits = place.lanes.logits(apply_fn, params, dataset.test)
                entry = table.setdefault(name, {"test": {}})
                figures = [metrics.evaluate(x, dataset.test.label) for x in logits]
                entry["test"][place.name] = [f["errors"] for f in figures]
                if place.name == main_setting:
                    entry["test"] |= {key: [f[key] for f in figures] for key in figures[0]}
                    entry["parameters"] = sum(x[0].size for x in jax.tree.leaves(params))
            if count == ALL:
                for name, (values, ends) in lines(dataset, trained, ts).items():
                    ways[f"{width}, {name}"], cosines[f"{width}, {name}"] = values, ends
    for name, values in ways.items():
        barriers[name] = [weights.barrier(ts, row) for row in values]
    swept = sweep(setting(few if config.few else ALL, "sweep")) if config.points else {}
    progress.close()

    settings = [f"{width}, {count}" for width in widths for count in counts]
    results = study.record(
        "interpolate_mnist",
        dataset,
        table,
        config=config,
        seconds={"total": time.monotonic() - started},
        settings=settings,
        barriers=barriers,
        cosines=cosines,
        line={"t": ts, **ways},
        sweep={"rate": np.linspace(0, 1, config.points), **swept},
    )
    _files.write_json(out / "results.json", _files.plain(results, "results"))
    drawn = draw(config, out, ways, ts, swept)
    columns = {setting: report.score(setting) for setting in settings}
    heights = [
        f"{name} {report.mean_sd(values)} (cosine {report.mean_sd(cosines[name])})"
        for name, values in barriers.items()
    ]
    notes = [
        verdict(results),
        "Barrier of the validation loss between teacher and scratch, nats, and the cosine of their "
        f"weights: {', '.join(heights)}.",
        f"Test errors of {len(dataset.test.label):,} in each setting:\n\n" + report.table(results, columns),
    ]
    shown = {name: model for name, model in table.items() if "errors" in model["test"]}
    report.write_report(
        out, {**results, "models": shown}, drawn, notes,
        model="pull", method="Pulling the student towards its teacher",
    )  # fmt: skip
    print()
    print("\n\n".join([notes[2], *notes[:2]]))
    print(f"Report with pictures: {out / 'report.md'}")
    return 0


def draw(
    config: Config, out: Path, ways: Mapping[str, np.ndarray], ts: np.ndarray, swept: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Draws the pictures: title → file name."""
    drawn = {}
    if swept:
        pictures.curves(
            out / "sweep.png", np.linspace(0, 1, config.points), swept, xlabel="λ", ylabel="test errors"
        )
        drawn["Test errors against λ; band: one standard deviation over seeds"] = "sweep.png"
    pictures.curves(out / "line.png", ts, ways, xlabel="teacher → student", ylabel="validation loss, nats")
    drawn[
        "Validation loss on the straight line from the teacher to the student from scratch, before and "
        "after the teacher's units were aligned with the student's"
    ] = "line.png"
    return drawn


if __name__ == "__main__":
    runs.run_main(main)

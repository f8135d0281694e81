"""Distillation methods beside each other: one teacher, one student, many methods, over seeds.

Trains a teacher once. Then trains, for each seed, the same student from scratch and by each method,
from the same initial parameters and in the same order of examples. Evaluates on the test set once, at
the end, and times a step of each method against a step of plain training.

    python experiments/kd_methods.py                                             # on two cores
    python experiments/kd_methods.py --preset repdistiller --dataset cifar100    # on a GPU
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import pictures, report, runs, study, training  # fmt: skip
from harness.options import Count, Options, Positive, Whole, parse
from harness.study import Trained

from distill_jax import _files, data, features, losses, metrics, models, train
from distill_jax.features import Learned


def on_logits(loss: Callable[..., jax.Array], *, labelled: bool = False) -> Callable[[], Learned]:
    """Gives a loss between logits the form of one between layers, so that one objective serves all."""

    def apply(params, student, teacher, *, labels=None, where=None, key=None):
        where = None if where is None else where[:, None]
        return loss(student[0], teacher[0], *([labels] if labelled else []), where=where)

    return lambda: Learned(lambda key, student_shapes, teacher_shapes: {}, apply)


def standardized_kl(student: jax.Array, teacher: jax.Array, where: Any) -> jax.Array:
    """KL after logit standardisation."""
    student, teacher = (losses.standardize(x, where=where) for x in (student, teacher))
    return losses.kl(student, teacher, temperature=2.0, where=where)


kl = functools.partial(losses.kl, temperature=4.0)  # as RepDistiller has it
attention = functools.partial(losses.attention_transfer, mean=True)


class Method(NamedTuple):
    """hard·cross-entropy + weight·part, and between which layers part stands.

    ``maps``: the last feature map of each resolution, ``map``: the last of all, ``vector``: the
    embedding before the classifier, ``logits``.
    """

    hard: float
    weight: float
    part: Callable[[], Learned]
    layers: Literal["maps", "map", "vector", "logits"]


# Weights of the papers or of RepDistiller, whose PKT is ours by the size of the batch, 64; of CC, which
# is another loss there, and of methods it does not have, 1 or what brings them to KD's size: not tuned.
METHODS: dict[str, Method] = {
    "kd": Method(0.1, 0.9, on_logits(kl), "logits"),
    "lskd": Method(0.1, 9.0, on_logits(standardized_kl), "logits"),
    "dkd": Method(1.0, 1.0, on_logits(losses.dkd, labelled=True), "logits"),
    "nkd": Method(1.0, 1.0, on_logits(losses.nkd, labelled=True), "logits"),
    "wsld": Method(1.0, 2.5, on_logits(losses.wsld, labelled=True), "logits"),
    "dist": Method(1.0, 32.0, on_logits(functools.partial(losses.dist, temperature=4.0)), "logits"),
    "ranking": Method(1.0, 1.0, on_logits(losses.ranking_logistic), "logits"),
    "jensen_shannon": Method(0.1, 4.0, on_logits(losses.jensen_shannon), "logits"),
    "total_variation": Method(0.1, 0.9, on_logits(losses.total_variation), "logits"),
    "fitnet": Method(1.0, 100.0, lambda: features.project(losses.hint), "map"),
    "at": Method(1.0, 1000.0, lambda: features.project_maps(attention), "maps"),
    "nst": Method(1.0, 50.0, lambda: features.project_maps(losses.nst), "maps"),
    "vid": Method(1.0, 1.0, lambda: features.vid(mean=True), "maps"),
    "ft": Method(1.0, 200.0, lambda: features.factor_transfer(mean=True), "map"),
    "review": Method(1.0, 1.0, features.review_kd, "maps"),
    "cka": Method(1.0, 1.0, lambda: features.relation(losses.cka), "vector"),
    "sp": Method(1.0, 3000.0, lambda: features.relation(losses.similarity_preserving), "map"),
    "rkd": Method(1.0, 1.0, lambda: features.rkd(distance=25.0, angle=50.0), "vector"),
    "pkt": Method(1.0, 30000.0 / 64, lambda: features.relation(losses.pkt, pool=True), "vector"),
    "cc": Method(1.0, 1.0, features.correlation_congruence, "vector"),
    "ickd": Method(1.0, 1.0, features.ickd, "map"),
    "info_nce": Method(1.0, 0.8, features.info_nce, "vector"),
}

# Of the preset quick, chosen on validation data
QUICK_WEIGHTS = {"dist": 8.0, "fitnet": 10.0, "at": 100.0, "pkt": 30000.0}


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those of the preset quick on MNIST."""

    preset: Literal["quick", "repdistiller"] = "quick"
    """quick: for two cores; repdistiller: 240 epochs of SGD, crops and flips, for a GPU"""
    methods: tuple[str, ...] = (
        "kd", "lskd", "dkd", "nkd", "dist", "fitnet", "at", "sp", "rkd", "pkt",
    )  # fmt: skip
    """which methods, in the order of the table; all: every one there is"""
    weight: tuple[str, ...] = ()
    """such as at=300: the weight of a method's loss, in the place of its own"""
    seeds: Count = 5
    """students of each method"""
    examples: Whole = 2000
    """training examples, the first of the set (0: all); the teacher is trained on all of it"""
    teacher: str = "vgg8:0.5"
    """such as resnet32x4, wrn40-2, vgg13:0.5 or convnet:16,32"""
    student: str = "vgg8:0.25"
    """likewise"""
    epochs: Count = 20
    """the students'"""
    learning_rate: Positive = 3e-3
    """the students', at its highest"""
    batch_size: Count = 50
    """examples a step"""
    teacher_epochs: Count = 2
    """the teacher's"""
    teacher_learning_rate: Positive = 3e-3
    """the teacher's"""
    jitter: Whole = 0
    """pixels by which training images are shifted at random; the teacher labels the shifted ones"""
    flip: bool = False
    """training images are mirrored at random"""


SMALL_IMAGES: dict[str, Any] = {
    "examples": 0, "teacher": "convnet:16,32", "student": "convnet:2,4", "epochs": 40,
    "teacher_epochs": 60, "learning_rate": 1e-2,
}  # fmt: skip
REPDISTILLER: dict[str, Any] = {
    "dataset": "cifar100", "examples": 0, "teacher": "resnet32x4", "student": "resnet8x4",
    "epochs": 240, "teacher_epochs": 240, "learning_rate": 0.05, "teacher_learning_rate": 0.05,
    "batch_size": 64, "jitter": 4, "flip": True, "methods": tuple(METHODS),
}  # fmt: skip
DEFAULTS = {("quick", True): SMALL_IMAGES, ("repdistiller", False): REPDISTILLER}
COLUMNS: Mapping[str, report.Column] = {
    "parameters": report.count("parameters"),
    "errors": report.score("errors"),
    "accuracy %": report.score("accuracy", percent=True),
    "agreement %": report.score("agreement", percent=True),
    "ECE %": report.score("ece", percent=True),
    "t against scratch": lambda model: model.get("t"),
    "step cost": lambda model: f"{model['step_cost']:.2f}" if "step_cost" in model else None,
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    named = set(config.methods) <= set(METHODS) and len(set(config.methods)) == len(config.methods)
    config.need(
        "methods", named and bool(config.methods),
        f"name some of {', '.join(METHODS)}, each once, or all",
    )  # fmt: skip
    weights(config)
    most = len(dataset.train.id)
    config.need("examples", config.examples <= most, f"be at most {most}, or 0 for all")
    config.fit(config.examples or most, "batch_size")
    for kind in ("teacher", "student"):
        build(config, dataset, kind, 0)


def weights(config: Config) -> dict[str, float]:
    """Reads --weight, beside the preset's."""
    result = dict(QUICK_WEIGHTS) if config.preset == "quick" else {}
    for entry in config.weight:
        name, _, value = entry.partition("=")
        try:
            result[name] = float(value)
        except ValueError:
            result[name] = -1.0
        if name not in METHODS or not 0 <= result[name] < float("inf"):
            raise ValueError(f"--weight must be such as at=300, of a method there is; got {entry!r}")
    return result


def build(config: Config, dataset: data.Dataset, kind: str, seed: int) -> models.Model:
    """Builds the teacher or the student with the initial parameters of a seed."""
    shape: Any = dataset.train.image.shape[1:]
    key = jax.random.fold_in(jax.random.key(seed), kind == "student")
    return models.build(getattr(config, kind), shape, dataset.classes, key)


def optimizer(
    config: Config, learning_rate: float, epochs: int
) -> Callable[[int], optax.GradientTransformation]:
    """Makes the optimizer of the number of steps an epoch."""
    if config.preset == "repdistiller":
        return lambda steps: optax.chain(
            optax.add_decayed_weights(5e-4), optax.sgd(in_steps(learning_rate, steps * epochs), momentum=0.9)
        )
    return training.adam(learning_rate, epochs)


def in_steps(learning_rate: float, steps: int) -> optax.Schedule:
    """RepDistiller's schedule: a tenth each time at 150, 180 and 210 of 240 epochs."""
    return optax.piecewise_constant_schedule(
        learning_rate, {steps * eighths // 8: 0.1 for eighths in (5, 6, 7)}
    )


class Layers(NamedTuple):
    """Which layers of the student learn from which of the teacher, and the models that give them."""

    pairs: Mapping[str, list[tuple[str, str]]]  # for each of Method.layers
    student: Callable[..., Any]
    teacher: Callable[..., Any]
    shapes: tuple[Mapping[str, Any], Mapping[str, Any]]  # student's and teacher's


def with_logits(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Puts the logits among the features of a captured ``apply_fn``."""

    def apply(params, model_state, x, *, key=None):
        (logits, features), model_state = apply_fn(params, model_state, x, key=key)
        return (logits, {**features, "logits": logits}), model_state

    return apply


def choose_layers(student: models.Model, teacher: models.Model, image: Any) -> Layers:
    """Pairs the layers of two models, and prints how."""
    shapes = [features.layer_shapes(*model, image) for model in (student, teacher)]
    pairing = features.match_layers(*shapes)
    print(f"\nLayers:\n{pairing}\n")
    maps = [pair for pair in pairing if len(shapes[0][pair[0]].shape) > 2] or list(pairing)
    vectors = [pair for pair in pairing if len(shapes[0][pair[0]].shape) == 2] or maps
    pairs = {
        "maps": maps, "map": maps[-1:], "vector": vectors[-1:], "logits": [("logits", "logits")],
    }  # fmt: skip
    names = [sorted({pair[side] for pair in maps + vectors}) for side in (0, 1)]
    captured = [
        with_logits(features.capture(model.apply_fn, names[side]))
        for side, model in enumerate((student, teacher))
    ]
    shapes_of = [
        jax.eval_shape(apply_fn, model.params, model.model_state, image)[0][1]
        for apply_fn, model in zip(captured, (student, teacher), strict=True)
    ]
    return Layers(pairs, captured[0], captured[1], (shapes_of[0], shapes_of[1]))


def label_all(layers: Layers, teacher: Trained, images: np.ndarray) -> dict[str, Any]:
    """Computes the teacher's logits and features of all images, once."""
    run = jax.jit(lambda variables, x: layers.teacher(*variables, training.prepare(x))[0][1])
    parts = [run(teacher.variables, images[i : i + 500]) for i in range(0, len(images), 500)]
    features = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    return {"logits": features["logits"], "features": features}


def make_transform(config: Config, label: Callable[..., Any] | None = None) -> Callable[..., dict[str, Any]]:
    """Augments and prepares a batch, and labels it online where there is a teacher."""

    def transform(variables, batch, key):
        first, second = jax.random.split(key)
        image = data.random_shift(first, batch["image"], config.jitter)
        if config.flip:
            image = data.random_flip(second, image)
        batch = {**batch, "image": training.prepare(image)}
        return batch if label is None else label(variables, batch)

    return transform


def make_label(layers: Layers) -> Callable[..., Any]:
    """Labels a batch with the teacher's logits and features."""

    def label(variables, batch):
        (logits, features), _ = layers.teacher(*variables, batch["image"])
        return {**batch, "teacher": jax.lax.stop_gradient({"logits": logits, "features": features})}

    return label


class Job(NamedTuple):
    """A student to train: its loss and what is trained beside it."""

    loss_fn: train.LossFn
    extra: Any


def make_job(config: Config, name: str, model: models.Model, layers: Layers, seed: int) -> Job:
    """Makes a method's loss."""
    method = METHODS[name]
    part = method.part()
    weight = weights(config).get(name, method.weight)
    pairs = layers.pairs[method.layers]
    loss_fn = train.distill_features(layers.student, [(weight, part)], pairs=pairs, hard_weight=method.hard)
    params = train.init_learned(
        jax.random.fold_in(jax.random.key(seed), 2),
        model.params,
        [(weight, part)],
        pairs=pairs,
        student_shapes=layers.shapes[0],
        teacher_shapes=layers.shapes[1],
    )
    return Job(loss_fn, params["learned"])


def step_costs(jobs: Mapping[str, Job], model: models.Model, batch: Any) -> dict[str, float]:
    """Times a step of each job, in turn, against that of "scratch": medians of ratios."""
    calls = {}
    for name, job in jobs.items():
        params = {"student": model.params, "learned": job.extra}
        params = model.params if job.extra is None else params
        tx = optax.sgd(1e-3)
        state = train.init_state(params, tx, jax.random.key(0), model.model_state)
        step = jax.jit(train.make_train_step(job.loss_fn, tx))
        calls[name] = functools.partial(step, state, batch)
    seconds = dict(zip(jobs, metrics.timings(list(calls.values()), repeats=45).T, strict=True))
    return {name: float(np.median(seconds[name] / seconds["scratch"])) for name in jobs}


def main() -> None:
    """Runs the experiment."""
    started = time.monotonic()
    config, dataset = parse(Config, __doc__, DEFAULTS)
    if config.methods == ("all",):
        config = dataclasses.replace(config, methods=tuple(METHODS))
    check(config, dataset)
    out = training.begin("kd_methods", config, dataset)
    blank, student = (build(config, dataset, kind, 0) for kind in ("teacher", "student"))
    examples = training.arrays(dataset.train)
    few = {name: values[: config.examples or None] for name, values in examples.items()}
    unit = training.work(blank, dataset) / training.work(student, dataset)
    unit *= len(examples["label"]) / len(few["label"])
    layers = choose_layers(student, blank, training.prepare(dataset.train.image[: config.batch_size]))
    students = config.seeds * (1 + len(config.methods)) * config.epochs
    progress = runs.Progress(config.teacher_epochs * unit + students)
    place = training.Lab(dataset, out, progress, config.seeds, save_seconds=config.save_seconds)
    teacher = place.train(
        "teacher",
        0,
        blank,
        train.supervised(blank.apply_fn),
        examples,
        epochs=config.teacher_epochs,
        tx=optimizer(config, config.teacher_learning_rate, config.teacher_epochs),
        batch_size=config.batch_size,
        order_seed=10_000,
        unit=unit,
        transform=make_transform(config),
    )
    online = bool(config.jitter or config.flip)
    labelled = few if online else few | {"teacher": label_all(layers, teacher, few["image"])}
    label = make_label(layers)

    trained: list[dict[str, Trained]] = []
    for seed in range(config.seeds):
        model = build(config, dataset, "student", seed)
        jobs = {"scratch": Job(train.supervised(model.apply_fn), None)} | {
            name: make_job(config, name, model, layers, seed) for name in config.methods
        }
        trained.append({"teacher": teacher})
        for name, job in jobs.items():
            distilled = name != "scratch"
            trained[-1][name] = place.train(
                name,
                seed,
                model,
                job.loss_fn,
                labelled if distilled else few,
                epochs=config.epochs,
                tx=optimizer(config, config.learning_rate, config.epochs),
                batch_size=config.batch_size,
                order_seed=20_000 + seed,
                unit=1.0,
                transform=make_transform(config, label if distilled and online else None),
                context=teacher.variables if distilled and online else None,
                extra=job.extra,
            )
    progress.close()

    results = study.results(
        "kd_methods",
        dataset,
        trained,
        config=config,
        seconds={"total": time.monotonic() - started},
        prepare=training.prepare,
    )
    results["dataset"]["train"] = len(few["label"])
    batch = jax.tree.map(lambda x: jnp.asarray(x[: config.batch_size]), labelled)
    batch = batch | {"image": training.prepare(batch["image"])}
    costs = step_costs(jobs, model, label(teacher.variables, batch) if online else batch)
    scratch = results["models"]["scratch"]["test"]["errors"]
    for name in jobs:
        entry = results["models"][name]
        entry["step_cost"] = costs[name]
        if name != "scratch" and config.seeds > 1:
            t = report.paired(scratch, entry["test"]["errors"]).t
            entry["t"] = f"{t:.1f}".replace("-", "−")
    _files.write_json(out / "results.json", results)
    errors = {name: results["models"][name]["test"]["errors"] for name in jobs}
    pictures.comparison(out / "methods.png", errors, baseline="scratch")
    drawn = {"Test errors of each method, a point a seed; bar: mean and its standard error": "methods.png"}
    best = min(config.methods, key=lambda name: np.mean(results["models"][name]["validation"]["errors"]))
    drawn |= study.draw(out, dataset, trained, ("teacher", "scratch", best))
    notes = [
        f"Of the methods {best} made the fewest errors on validation data. t: mean over seeds of the "
        "difference to scratch over its standard error. Step cost: time of a training step over one "
        "of plain training, with the teacher's outputs at hand."
    ]
    report.write_report(
        out, results, drawn, notes, model=best,
        method=best, columns=COLUMNS,
    )  # fmt: skip
    print(report.table(results, COLUMNS))
    print()
    print(report.summary(results, model=best, method=best))
    print(f"Report with pictures: {out / 'report.md'}")


if __name__ == "__main__":
    runs.run_main(main)

"""Compares the kinds of stored labels: what a student learns from them against the bytes that they take.

For each seed the program trains a teacher and writes a store of each kind of labels. It trains the same student from
each store, from the same initial parameters and in the same order of examples, and from the labels alone ("scratch").

    python experiments/label_kinds.py                      # mnist where it can be had, else digits
    python experiments/label_kinds.py digits               # minutes, no download
    python experiments/label_kinds.py glyphs               # 62 characters in the fonts of the machine
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from harness import (
    Count,
    Dropout,
    Options,
    Positive,
    Run,
    Trained,
    Whole,
    adam,
    arrays,
    jittered,
    logs,
    mnist_or_digits,
    pictures,
    plain,
    prepare,
    read,
    results,
    run_main,
)

from distill_jax import data, features, losses, models, teachers, train
from distill_jax.losses.tokens import bucketed
from distill_jax.teachers import kinds


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    teacher: tuple[Count, ...] = (256, 128)  # widths of the teacher's hidden layers
    student: tuple[Count, ...] = (64, 32)  # widths of a student's hidden layers
    top: tuple[Count, ...] = (1, 2, 4)  # numbers of classes of top-k labels
    draws: tuple[Count, ...] = (1, 4, 16, 64)  # numbers of draws of sampled labels
    temperature: Positive = 4.0  # temperature T that softens the predictions of teacher and students
    feature_weight: Positive = 1.0  # weight of the distance between hidden layers, with stored features
    epochs: Count = 40  # number of epochs to train each student
    learning_rate: Positive = 3e-3  # highest learning rate of a student (Adam, cosine schedule)
    batch_size: Count = 64  # number of examples per step
    teacher_epochs: Count = 40  # number of epochs to train the teacher
    teacher_learning_rate: Positive = 2e-3  # highest learning rate of the teacher
    dropout: Dropout = 0.2  # fraction of the teacher's hidden units that is dropped in training
    jitter: Whole = 1  # largest random shift of the teacher's training images, in pixels


CONFIGS = {
    "digits": ("The digits embedded in scikit-learn, without download; minutes.", Config(dataset="digits")),
    "mnist": ("MNIST; about an hour on two cores.", Config(dataset="mnist", jitter=2, epochs=20, teacher_epochs=20)),
    "glyphs": ("62 characters in the fonts of the machine.", Config(dataset="glyphs", jitter=2, top=(1, 4, 16))),
}  # fmt: skip
COLUMNS: Mapping[str, results.Column] = {
    "bytes per label": lambda model: f"{model['bytes_per_label']:,}" if "bytes_per_label" in model else None,
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "agreement %": results.score("agreement", percent=True),
    "KL from teacher": results.score("teacher_kl"),
}
SERIES = {
    "logits": "logits",
    "top": "top-k",
    "sampled": "sampled",
    "hidden": "hidden states",
    "features": "features",
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size")
    config.need("top", all(k <= dataset.classes for k in config.top), f"be at most {dataset.classes}")


def network(config: Config, dataset: data.Dataset, kind: str, seed: int) -> models.Model:
    """Builds the teacher or the student with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), kind == "student")
    widths = ",".join(map(str, getattr(config, kind)))
    dropout = config.dropout if kind == "teacher" else 0.0
    return models.build(f"mlp:{widths}", dataset.image_shape, dataset.classes, key, dropout=dropout)


def last_input(widths: tuple[int, ...]) -> str:
    """Names the input of the last layer of an MLP."""
    return f"dropout.{len(widths)}"


class Stored(NamedTuple):
    """A kind of labels: what is stored, in which dtype, and which of the teacher's outputs it is made of."""

    kind: kinds.Kind
    dtype: str
    outputs: Callable[[tuple[Any, Mapping[str, Any]]], Any]


def stores(config: Config, teacher: models.Model) -> dict[str, Stored]:
    """Lists the kinds of labels by name; each name begins with that of its series."""
    t, layer = config.temperature, last_input(config.teacher)
    head = teacher.params["dense"][len(config.teacher)]

    def logits(outputs):
        return outputs[0]

    return {
        "logits, float32": Stored(kinds.Logits(), "float32", logits),
        "logits, bfloat16": Stored(kinds.Logits(), "bfloat16", logits),
        **{f"top {k}": Stored(kinds.Top(k, t), "bfloat16", logits) for k in config.top},
        **{f"sampled {n}": Stored(kinds.Sampled(n, t), "bfloat16", logits) for n in config.draws},
        "hidden, bfloat16": Stored(
            kinds.Hidden(head["kernel"], head["bias"]), "bfloat16", lambda outputs: outputs[1][layer]
        ),
        "features, bfloat16": Stored(kinds.Features(), "bfloat16", lambda outputs: outputs),
    }


def write(run: Run, seed: int, name: str, stored: Stored, teacher: models.Model) -> teachers.LabelStore:
    """Writes the store of one kind of labels for the training images, or opens it."""
    captured = features.capture(teacher, last_input(run.config.teacher))
    split = run.dataset.train
    return teachers.write_labels(
        run.directory / f"seed{seed}" / "labels" / name.replace(" ", "-").replace(",", ""),
        split.id,
        lambda rows: stored.outputs(models.predict(captured, split.image[rows], prepare=prepare)),
        fingerprint={"teacher": teachers.fingerprint((teacher.params, teacher.state))},
        kind=stored.kind,
        dtype=stored.dtype,
        progress=logs.counter(f"seed {seed + 1}/{run.config.seeds}, labels: {name}"),
    )


def objective(
    run: Run, kind: kinds.Kind | None, student: models.Model, teacher: models.Model, seed: int
) -> tuple[models.Model, train.LossFn]:
    """Makes the loss for a kind of labels (None: the true labels), and the student with what it trains beside it."""
    config, t = run.config, run.config.temperature
    if kind is None:
        return student, train.supervised()
    if not isinstance(kind, kinds.Features):
        soft = bucketed(losses.kl) if isinstance(kind, kinds.Top | kinds.Sampled) else losses.kl
        return student, train.distill(temperature=t, alpha=0.0, soft=soft)
    learned = [(config.feature_weight, features.project(losses.hint))]
    pairs = [(last_input(config.student), last_input(config.teacher))]
    image = prepare(run.dataset.train.image[:1])
    attached = train.attach_learned(
        jax.random.key(seed), student, learned, pairs=pairs,
        student_shapes=features.layer_shapes(student, image), teacher_shapes=features.layer_shapes(teacher, image),
    )  # fmt: skip
    options: dict[str, Any] = {"hard_weight": 0.0, "soft_weight": 1.0, "temperature": t}
    return attached, train.distill_features(learned, pairs=pairs, **options)


def train_model(
    run: Run, name: str, seed: int, model: models.Model, loss_fn: train.LossFn, examples: Mapping[str, Any], *,
    epochs: int, learning_rate: float, order: int, transform: Any = plain,
) -> Trained:  # fmt: skip
    """Trains one model, or takes it from the checkpoint of the run."""
    size = run.config.batch_size
    tx = adam(learning_rate, epochs, len(examples["label"]) // size)
    step = train.make_train_step(loss_fn, tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=transform)  # many steps in one call
    state = train.init_state(model, tx, run.key(seed, order))
    done = run.fit(name, seed, state, epoch, examples, epochs=epochs, batch_size=size, order=order)
    trained = train.detach_learned(done.model) if name.startswith("features") else done.model
    return run.judge(trained, done.history, done.seconds)


def train_all(run: Run, seed: int) -> tuple[dict[str, Trained], dict[str, int]]:
    """Trains the models of one seed; also returns the bytes per label of each kind."""
    config, examples = run.config, arrays(run.dataset.train)
    start = network(config, run.dataset, "teacher", seed)
    found = {
        "teacher": train_model(
            run, "teacher", seed, start, train.supervised(), examples, epochs=config.teacher_epochs,
            learning_rate=config.teacher_learning_rate, order=10_000 + seed, transform=jittered(config.jitter),
        )
    }  # fmt: skip
    teacher, student, sizes = found["teacher"].model, network(config, run.dataset, "student", seed), {}

    def learn(name, kind, examples):
        model, loss_fn = objective(run, kind, student, teacher, seed)
        found[name] = train_model(
            run, name, seed, model, loss_fn, examples, epochs=config.epochs, learning_rate=config.learning_rate,
            order=20_000 + seed,
        )  # fmt: skip

    learn("scratch", None, examples)
    for name, stored in stores(config, teacher).items():
        store = write(run, seed, name, stored, teacher)
        sizes[name] = store.bytes_per_label
        learn(name, stored.kind, examples | {"teacher": store[run.dataset.train.id]})
    return found, sizes


def draw(run: Run, table: Mapping[str, Any]) -> dict[str, str]:
    """Draws errors and KL divergences against bytes per label."""
    groups = {
        shown: [entry for name, entry in table.items() if name.startswith(start)]
        for start, shown in SERIES.items()
    }
    sizes = {shown: [entry["bytes_per_label"] for entry in group] for shown, group in groups.items()}
    test = len(run.dataset.test.id)
    panels = {
        label: {
            shown: np.array([entry["test"][figure] for entry in group]) * scale
            for shown, group in groups.items()
        }
        for figure, label, scale in (
            ("errors", "test errors, %", 100 / test),
            ("teacher_kl", "KL from the teacher, nats", 1.0),
        )
    }
    scratch = {
        "test errors, %": np.mean(table["scratch"]["test"]["errors"]) * 100 / test,
        "KL from the teacher, nats": np.mean(table["scratch"]["test"]["teacher_kl"]),
    }
    pictures.by_bytes(run.directory / "bytes.png", sizes, panels, levels={"scratch": scratch})
    return {
        "What students learn from a kind of labels against its bytes per label: means over seeds, bars one standard "
        "deviation; the dashed line is the student of the true labels": "bytes.png"
    }


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("label_kinds", name, config, check)
    pairs = [train_all(run, seed) for seed in range(config.seeds)]
    trained, sizes = [models for models, _ in pairs], pairs[0][1]
    found = run.evaluate(trained, run.test_logits(trained))
    for kind, size in sizes.items():
        found["models"][kind]["bytes_per_label"] = size
    errors = {name: np.mean(entry["test"]["errors"]) for name, entry in found["models"].items()}
    best = min(sizes, key=lambda name: errors[name])
    headline = (
        f"Of all kinds of labels, {best!r} gave the fewest errors, {errors[best]:.1f}, with {sizes[best]:,} bytes per "
        f"label; all logits {errors['logits, float32']:.1f} with {sizes['logits, float32']:,}, no teacher "
        f"{errors['scratch']:.1f}."
    )
    run.finish(found, draw(run, found["models"]), headline=headline, columns=COLUMNS)
    return 0


if __name__ == "__main__":
    run_main(main)

"""Makes a small network better with a large one: knowledge distillation on images.

For each seed the program trains a teacher, stores its soft labels, and trains the same student twice, from the same
initial parameters and in the same order of examples: on the labels ("scratch") and on the soft labels ("distilled").
It evaluates all models on the test set once, at the end, and writes a report with pictures.

    python experiments/kd_mnist.py                         # mnist where it can be had, else digits
    python experiments/kd_mnist.py digits                  # two minutes, no download
    python experiments/kd_mnist.py hinton2015              # Hinton, Vinyals and Dean 2015, section 3
    python experiments/kd_mnist.py --dataset my.npz        # your own images

Where the data have no config of their own, it first chooses the teacher, its labels, T and α on validation data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import optax
from harness import (
    Amount,
    Count,
    Dropout,
    Options,
    Positive,
    Run,
    Share,
    Trained,
    Whole,
    adam,
    arrays,
    choose,
    config_of_data,
    jittered,
    labelled,
    plain,
    prepare,
    read,
    results,
    run_main,
    shifted_views,
)
from harness.networks import build

from distill_jax import data, models, teachers, train


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    teacher: str = "convnet:8,16"  # teacher network, such as mlp:1200,1200 or convnet:16,32
    student: str = "mlp:256"  # student network, such as mlp:256
    members: Count = 1  # number of networks in the teacher; their probabilities are averaged
    temperature: Positive = 4.0  # temperature T that softens the predictions of teacher and student
    alpha: Share = 0.0  # weight of the labels in the loss; the soft labels have 1 - alpha
    epochs: Count = 25  # number of epochs to train each student
    learning_rate: Positive = 1e-3  # highest learning rate of the students (Adam, cosine schedule)
    batch_size: Count = 64  # number of examples per step of the students
    teacher_epochs: Count = 8  # number of epochs to train each network of the teacher
    teacher_learning_rate: Positive = 2e-3  # highest learning rate of the teacher
    teacher_batch_size: Count = 128  # number of examples per step of the teacher
    dropout: Dropout = 0.2  # fraction of the teacher's hidden units that is dropped in training
    max_norm: Amount = 0.0  # largest norm of the incoming weights of a teacher's unit; 0 sets no limit
    jitter: Whole = 2  # largest random shift of the teacher's training images, in pixels
    labels: Literal["stored", "held-out", "online"] = "stored"
    """how images get soft labels; stored: once, by the teacher; held-out: once, by teachers that were trained without
    the image; online: shifted images in each step"""
    student_jitter: Whole = 2  # largest random shift of images that are labelled online, in pixels
    force: bool = False  # with the config choose, distil even if no teacher leads
    patient: bool = False  # also train a student on shifted images that the teacher labels
    patient_views: Whole = 0  # number of shifts per image, whose labels are stored; 0: any, labelled online
    omit_classes: tuple[int, ...] = ()  # also distil without these classes, then shift their bias
    devices: Count = 1  # number of devices that share each batch (on a CPU: one per core)
    check: bool = False  # exit with status 1 unless distillation lowers the test errors


# Chosen on validation data; the documentation has the figures.
MNIST = Config(dataset="mnist")
DIGITS = Config(
    dataset="digits", student="mlp:128", members=3, epochs=100, learning_rate=1e-2, jitter=1,
    teacher="convnet:16,32", teacher_epochs=100, teacher_batch_size=64, student_jitter=1,
)  # fmt: skip
HINTON_2015 = Config(
    dataset="mnist", seeds=3, teacher="mlp:1200,1200", student="mlp:800,800", temperature=20.0, epochs=30,
    teacher_epochs=120, teacher_learning_rate=1e-3, dropout=0.4, max_norm=1.5, validation=2000, patient=True,
    omit_classes=(3,),
)  # fmt: skip
CHOOSE = Config(dataset="fashion_mnist")
CONFIGS = {
    "mnist": ("MNIST; one or two minutes per seed on two cores.", MNIST),
    "digits": ("The digits embedded in scikit-learn, without download; two minutes.", DIGITS),
    "hinton2015": ("The networks of Hinton et al. 2015, section 3, on MNIST; one or two hours.", HINTON_2015),
    "choose": ("Other data; what you leave at its default is chosen on validation data.", CHOOSE),
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    for name in ("batch_size", "teacher_batch_size"):
        whole = getattr(config, name) % config.devices == 0
        config.need(name, whole, f"be a multiple of --devices, {config.devices}")
    for kind in ("teacher", "student"):
        build(config, dataset, kind, 0)
    kept = int((~np.isin(dataset.train.label, config.omit_classes)).sum())
    config.at_most(kept, "batch_size", "teacher_batch_size")
    known = all(0 <= c < dataset.classes for c in config.omit_classes)
    enough = known and len(set(config.omit_classes)) < dataset.classes - 1
    config.need("omit_classes", enough, f"name some of 0 to {dataset.classes - 1} and leave at least two")


class Recipe(NamedTuple):
    """How to train one kind of model; made once, so that it is compiled once for all seeds."""

    tx: optax.GradientTransformation
    epoch: Any
    epochs: int
    batch_size: int


def recipe(run: Run, kind: str, loss_fn: train.LossFn, examples: int, transform: Any = plain) -> Recipe:
    """Makes the optimizer, the step and the epoch of the teacher or of a student."""
    config = run.config
    rate, epochs, batch_size = (
        (config.teacher_learning_rate, config.teacher_epochs, config.teacher_batch_size)
        if kind == "teacher"
        else (config.learning_rate, config.epochs, config.batch_size)
    )
    tx = adam(rate, epochs, steps=examples // batch_size)
    if kind == "teacher" and config.max_norm:
        tx = optax.chain(tx, train.max_norm(config.max_norm))
    step = train.make_train_step(loss_fn, tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=transform, sharding=run.sharding)  # many steps in one call
    return Recipe(tx, epoch, epochs, batch_size)


def train_model(
    run: Run, name: str, seed: int, model: models.Model, how: Recipe, examples: Mapping[str, Any], order: int,
    context: Any = None,
) -> Trained:  # fmt: skip
    """Trains one model, or takes it from the checkpoint of the run."""
    state = train.init_state(model, how.tx, run.key(seed, order))
    done = run.fit(
        name, seed, state, how.epoch, examples, epochs=how.epochs, batch_size=how.batch_size, order=order,
        context=context,
    )  # fmt: skip
    return run.judge(done.model, done.history, done.seconds)


def train_teacher(run: Run, seed: int, how: Recipe, rows: Any = ..., name: str = "teacher") -> Trained:
    """Trains the teacher on some rows of the training data: one network, or several that are averaged."""
    examples = {field: values[rows] for field, values in arrays(run.dataset.train).items()}
    count, members = run.config.members, []
    for number in range(seed * count, (seed + 1) * count):
        model = build(run.config, run.dataset, "teacher", number)
        own_name = f"{name}{number % count}" if count > 1 else name
        members.append(train_model(run, own_name, seed, model, how, examples, 10_000 + number))
    if count == 1:
        return members[0]
    history = {name: np.mean([m.history[name] for m in members], 0).tolist() for name in members[0].history}
    return run.judge(teachers.ensemble(*[m.model for m in members]), history, sum(m.seconds for m in members))


def held_out_labels(run: Run, seed: int, how: Recipe) -> np.ndarray:
    """Labels each training image with a teacher that was trained without it: logits ``[images, classes]``."""
    images, fold = run.dataset.train.image, choose.folds(len(run.dataset.train.label), seed)
    logits = np.empty((len(fold), run.dataset.classes), np.float32)
    for number in range(choose.FOLDS):
        teacher = train_teacher(run, seed, how, fold != number, f"teacher without fold {number}")
        logits[fold == number] = models.predict(teacher.model, images[fold == number], prepare=prepare)
    return logits


def train_students(
    run: Run, seed: int, teacher: models.Model, how: Mapping[str, Recipe]
) -> dict[str, Trained]:
    """Trains the students of one seed, all from the same initial parameters and in the same order of examples.

    The teacher labels the training images once ("stored"), or a teacher does that was trained without the image
    ("held-out"), or the teacher labels shifted images in each step ("online"). In the last case the comparison is
    with a further student, trained on the true labels of equally shifted images: "scratch, augmented".
    """
    config, examples = run.config, arrays(run.dataset.train)
    held_out = config.labels == "held-out"
    logits = held_out_labels(run, seed, how["fold"]) if held_out else run.store_labels(seed, teacher)
    soft_labels = examples | {"teacher": logits}
    student = build(config, run.dataset, "student", seed)

    def learn(name, recipe, examples, context=None):
        return train_model(run, name, seed, student, how[recipe], examples, 20_000 + seed, context)

    found = {"scratch": learn("scratch", "hard", examples)}
    if config.labels == "online":
        found["scratch, augmented"] = learn("scratch, augmented", "augmented", examples)
        found["distilled"] = learn("distilled", "online", examples, teacher)
    else:
        found["distilled"] = learn("distilled", "soft", soft_labels)
    if config.patient:
        if config.patient_views:
            views = patient_views(config)
            shifted = examples | views.fields(run.dataset.train.id)
            stored = run.store_labels(seed, teacher, views=views)
            found["patient"] = learn("patient", "views", shifted, stored)
        else:
            found["patient"] = learn("patient", "online", examples, teacher)
    if config.omit_classes:
        kept = ~np.isin(run.dataset.train.label, config.omit_classes)
        name = "without " + ", ".join(map(str, config.omit_classes))
        found[name] = learn(name, "partial", {field: values[kept] for field, values in soft_labels.items()})
        found[f"{name}, shifted"] = shift_bias(config, run, found[name])
    return found


def patient_views(config: Config) -> teachers.Views:
    """Makes the views of the images that the patient student learns from."""
    return shifted_views(config.student_jitter, max(1, config.patient_views))


def shift_bias(config: Config, run: Run, student: Trained) -> Trained:
    """Adds to the bias of the omitted classes the number that makes the fewest errors on validation data.

    The errors are constant between steps of the shift: the middle one of the best shifts is taken.
    """
    omitted = np.isin(np.arange(run.dataset.classes), config.omit_classes)
    shifts = np.linspace(-5, 20, 1001)
    label = run.dataset.validation.label
    errors = [np.sum((student.validation_logits + s * omitted).argmax(-1) != label) for s in shifts]
    best = shifts[errors == np.min(errors)]
    add = np.float32(best[len(best) // 2]) * omitted

    def shifted(params, state, x, *, key=None):
        logits, state = student.model.apply_fn(params, state, x, key=key)
        return logits + add, state

    return run.judge(student.model.replace(apply_fn=shifted), student.history, student.seconds)


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, config_of_data)
    if config.devices > 1:
        train.use_cpu_devices(config.devices)
    run = Run.start("kd_mnist", name, config, check)
    notes: list[str] = []
    if name == "choose":
        choice = choose.choose_once(run)
        if not (choice.leads or config.force):
            return run.check(False, "no teacher leads the scratch student")
        config, notes = run.config, ["Chosen on validation data:", *(f"- {line}" for line in choice.lines)]
    hard, soft = train.supervised(), train.distill(temperature=config.temperature, alpha=config.alpha)
    jitter, shifted, labels = (
        jittered(config.jitter),
        jittered(config.student_jitter),
        run.dataset.train.label,
    )
    kept = int((~np.isin(labels, config.omit_classes)).sum())
    how = {
        "teacher": recipe(run, "teacher", hard, len(labels), jitter),
        "fold": recipe(run, "teacher", hard, len(labels) - len(labels) // choose.FOLDS, jitter),
        "hard": recipe(run, "student", hard, len(labels)),
        "augmented": recipe(run, "student", hard, len(labels), shifted),
        "soft": recipe(run, "student", soft, len(labels)),
        "online": recipe(run, "student", soft, len(labels), labelled(shifted)),
        "views": recipe(run, "student", soft, len(labels), patient_views(config).transform),
        "partial": recipe(run, "student", soft, kept),
    }
    trained = []
    for seed in range(config.seeds):
        teacher = train_teacher(run, seed, how["teacher"])
        trained.append({"teacher": teacher, **train_students(run, seed, teacher.model, how)})
    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits)
    drawn = results.draw(run.directory, run.dataset, trained, logits, ("teacher", "scratch", "distilled"))
    baseline = "scratch, augmented" if config.labels == "online" else "scratch"
    method = "Distillation" if baseline == "scratch" else f"Against {baseline!r}, distillation"
    headline = results.summary(found, baseline=baseline, method=method)
    run.finish(found, drawn, headline=headline, notes=notes)
    errors = {name: np.mean(model["test"]["errors"]) for name, model in found["models"].items()}
    return run.check(
        errors["distilled"] < errors[baseline], f"the distilled student is not better than {baseline}"
    )


if __name__ == "__main__":
    run_main(main)

"""Compares distillation methods: one teacher, one student network, many methods, over seeds.

The program trains one teacher. For each seed it then trains the same student on the labels alone ("scratch") and by
each method, always from the same initial parameters and in the same order of examples. It evaluates all students on
the test set once, at the end, and measures how long a training step of each method takes. The methods, with their
losses and weights, are listed in kd_methods_table.py.

    python experiments/kd_methods.py                       # mnist where it can be had, else digits
    python experiments/kd_methods.py digits                # a smoke test of minutes, no download
    python experiments/kd_methods.py repdistiller          # the protocol of RepDistiller on CIFAR-100: for a GPU
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import (
    Count,
    Options,
    Positive,
    Run,
    Trained,
    Whole,
    adam,
    arrays,
    load,
    mnist_or_digits,
    pictures,
    prepare,
    read,
    results,
    run_main,
)
from harness.networks import build
from kd_methods_table import METHODS, Layers, choose_layers

from distill_jax import data, features, metrics, models, teachers, train


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    methods: tuple[str, ...] = ("kd", "lskd", "dkd", "nkd", "dist", "fitnet", "at", "sp", "rkd", "pkt")
    """the methods, in the order of the table; "all" means every method that there is"""
    weight: tuple[str, ...] = ("dist=8", "fitnet=10", "at=100", "pkt=30000")
    """weights of methods' losses that shall differ from those of the papers, such as at=300"""
    examples: Count | None = None  # number of training examples of the students, the first ones
    teacher: str = "vgg8:0.5"  # teacher network, such as resnet32x4, wrn40-2, vgg13:0.5 or convnet:16,32
    student: str = "vgg8:0.25"  # student network, such as resnet8x4, wrn16-2, vgg8:0.25 or convnet:2,4
    epochs: Count = 20  # number of epochs to train each student
    learning_rate: Positive = 3e-3  # highest learning rate of the students
    teacher_epochs: Count = 2  # number of epochs to train the teacher
    teacher_learning_rate: Positive = 3e-3  # highest learning rate of the teacher
    optimizer: Literal["adam", "sgd"] = "adam"
    """adam: Adam with a cosine schedule; sgd: momentum 0.9, weight decay 5e-4, and a learning rate that falls to a
    tenth after 5/8, 6/8 and 7/8 of the epochs"""
    batch_size: Count = 50  # number of examples per step
    jitter: Whole = 0  # largest random shift of training images, in pixels; the teacher sees them too
    flip: bool = False  # mirror training images at random; the teacher sees the same images


MNIST = Config(dataset="mnist", examples=2000)
DIGITS = Config(
    dataset="digits",
    teacher="convnet:16,32",
    student="convnet:2,4",
    epochs=40,
    learning_rate=1e-2,
    teacher_epochs=60,
)
REPDISTILLER = Config(
    dataset="cifar100", methods=tuple(METHODS), weight=(), teacher="resnet32x4", student="resnet8x4", epochs=240,
    learning_rate=0.05, teacher_epochs=240, teacher_learning_rate=0.05, optimizer="sgd", batch_size=64, jitter=4,
    flip=True,
)  # fmt: skip
CONFIGS = {
    "mnist": ("students of 2000 images of MNIST: half an hour on two cores", MNIST),
    "digits": ("scikit-learn's digits, a smoke test without download: minutes on two cores", DIGITS),
    "repdistiller": ("240 epochs of SGD on CIFAR-100 with crops and flips: for a GPU", REPDISTILLER),
}
COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "agreement %": results.score("agreement", percent=True),
    "ECE %": results.score("ece", percent=True),
    "t against scratch": lambda model: model.get("t"),
    "step cost": lambda model: f"{model['step_cost']:.2f}" if "step_cost" in model else None,
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    named = set(config.methods) <= set(METHODS) and len(set(config.methods)) == len(config.methods)
    config.need(
        "methods", named and bool(config.methods), f"name some of {', '.join(METHODS)}, each once, or all"
    )
    weights(config)
    config.at_most(len(dataset.train.id), "examples")
    config.at_most(config.examples or len(dataset.train.id), "batch_size")
    for kind in ("teacher", "student"):
        build(config, dataset, kind, 0)


def weights(config: Config) -> dict[str, float]:
    """Reads the weights of the methods' losses."""
    found = {name: method.weight for name, method in METHODS.items()}
    for entry in config.weight:
        name, _, value = entry.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in METHODS or not 0 <= found[name] < float("inf"):
            raise ValueError(f"--weight must be such as at=300, of a method there is; got {entry!r}")
    return found


def optimizer(config: Config, learning_rate: float, epochs: int, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer for a number of epochs with a number of steps per epoch."""
    if config.optimizer == "adam":
        return adam(learning_rate, epochs, steps)
    schedule = in_steps(learning_rate, epochs * steps)
    return optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(schedule, momentum=0.9))


def in_steps(learning_rate: float, steps: int) -> optax.Schedule:
    """Makes RepDistiller's schedule: a tenth each time at 150, 180 and 210 of 240 epochs."""
    return optax.piecewise_constant_schedule(
        learning_rate, {steps * eighths // 8: 0.1 for eighths in (5, 6, 7)}
    )


def augmented(config: Config, *, online: bool) -> Callable[..., dict[str, Any]]:
    """Makes the ``transform`` of an epoch: augments and prepares a batch, and labels it if ``online``.

    The context is the teacher, None where it is not needed.
    """

    def transform(teacher, batch, key):
        first, second = jax.random.split(key)
        image = data.random_shift(first, batch["image"], config.jitter)
        if config.flip:
            image = data.random_flip(second, image)
        batch = {**batch, "image": prepare(image)}
        return teachers.label(teacher, batch) if online else batch

    return transform


def objective(
    config: Config, name: str, student: models.Model, layers: Layers, seed: int
) -> tuple[models.Model, train.LossFn]:
    """Makes the loss of a method, and the student with the parameters that the loss trains beside it."""
    if name == "scratch":
        return student, train.supervised()
    method = METHODS[name]
    parts, pairs = [(weights(config)[name], method.part())], layers.pairs[method.layers]
    attached = train.attach_learned(
        jax.random.fold_in(jax.random.key(seed), 2), student, parts, pairs=pairs,
        student_shapes=layers.shapes[0], teacher_shapes=layers.shapes[1],
    )  # fmt: skip
    return attached, train.distill_features(parts, pairs=pairs, hard_weight=method.hard)


def train_model(
    run: Run, name: str, seed: int, model: models.Model, loss_fn: train.LossFn, examples: Mapping[str, Any], *,
    epochs: int, learning_rate: float, order: int, transform: Any, context: Any = None,
) -> Trained:  # fmt: skip
    """Trains one model, or takes it from the checkpoint of the run."""
    config: Config = run.config
    tx = optimizer(config, learning_rate, epochs, len(examples["label"]) // config.batch_size)
    step = train.make_train_step(loss_fn, tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=transform)  # many steps in one call
    state = train.init_state(model, tx, run.key(seed, order))
    done = run.fit(
        name,
        seed,
        state,
        epoch,
        examples,
        epochs=epochs,
        batch_size=config.batch_size,
        order=order,
        context=context,
    )
    learned = name in METHODS
    return run.judge(train.detach_learned(done.model) if learned else done.model, done.history, done.seconds)


def step_costs(config: Config, layers: Layers, student: models.Model, batch: Any) -> dict[str, float]:
    """Times a training step of each method, in turn, and divides by that of "scratch": medians of ratios."""
    calls = {}
    for name in ("scratch", *config.methods):
        model, loss_fn = objective(config, name, student, layers, 0)
        tx = optax.sgd(1e-3)
        step = jax.jit(train.make_train_step(loss_fn, tx), compiler_options=train.compiler_options())
        calls[name] = functools.partial(step, train.init_state(model, tx, jax.random.key(0)), batch)
    seconds = dict(zip(calls, metrics.timings(list(calls.values()), repeats=45).T, strict=True))
    return {name: float(np.median(seconds[name] / seconds["scratch"])) for name in calls}


def main() -> None:
    """Runs the experiment."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    if config.methods == ("all",):
        config = replace(config, methods=tuple(METHODS))
    dataset = load(config)
    if len(dataset.test.id) < 1000:
        print("Smoke test: this data set is too small to compare methods; it shows that they run.")
    run = Run.start("kd_methods", name, config, check, dataset)
    examples = arrays(run.dataset.train)
    few = {field: values[: config.examples] for field, values in examples.items()}

    teacher = train_model(
        run, "teacher", 0, build(config, run.dataset, "teacher", 0), train.supervised(), examples,
        epochs=config.teacher_epochs, learning_rate=config.teacher_learning_rate, order=10_000,
        transform=augmented(config, online=False),
    )  # fmt: skip
    student = build(config, run.dataset, "student", 0)
    layers = choose_layers(student, teacher.model, prepare(examples["image"][: config.batch_size]))
    captured = features.capture(teacher.model, layers.teacher)  # also returns the values of its layers
    online = bool(config.jitter or config.flip)  # else each image stays the same, and is labelled once
    labelled: dict[str, Any] = few
    if not online:
        logits, values = models.predict(captured, few["image"], prepare=prepare)
        labelled = few | {"teacher": {"logits": logits, "features": values}}

    trained: list[dict[str, Trained]] = []
    for seed in range(config.seeds):
        trained.append({"teacher": teacher})
        student = build(config, run.dataset, "student", seed)
        for method in ("scratch", *config.methods):
            learns = method != "scratch"
            model, loss_fn = objective(config, method, student, layers, seed)
            trained[-1][method] = train_model(
                run, method, seed, model, loss_fn, labelled if learns else few, epochs=config.epochs,
                learning_rate=config.learning_rate, order=20_000 + seed,
                transform=augmented(config, online=online and learns), context=captured if online and learns else None,
            )  # fmt: skip

    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits)
    found["dataset"]["train"] = len(few["label"])
    batch = jax.tree.map(lambda x: jnp.asarray(x[: config.batch_size]), labelled)
    batch = batch | {"image": prepare(batch["image"])}
    costs = step_costs(config, layers, student, teachers.label(captured, batch) if online else batch)
    errors = {method: found["models"][method]["test"]["errors"] for method in costs}
    for method, cost in costs.items():
        found["models"][method]["step_cost"] = cost
        if method != "scratch" and config.seeds > 2:
            t = results.paired(errors["scratch"], errors[method]).t
            found["models"][method]["t"] = f"{t:.1f}".replace("-", "−")
    best = min(config.methods, key=lambda name: np.mean(found["models"][name]["validation"]["errors"]))
    pictures.comparison(run.directory / "methods.png", errors, baseline="scratch")
    drawn = {
        "Test errors of each method. Dots: one per seed. Upright marks: means, with a line of one standard error to "
        "each side. Grey: no clear difference from scratch, whose mean is the line across": "methods.png",
        **results.draw(run.directory, run.dataset, trained, logits, ("teacher", "scratch", best)),
    }
    note = (
        f"Of the methods, {best} made the fewest errors on validation data. t (from three seeds on): the mean over "
        "seeds of the difference from scratch, divided by its standard error. Step cost: the time of a training step "
        "divided by that of plain training, where the teacher's outputs are at hand."
    )
    run.finish(
        found, drawn, headline=results.summary(found, model=best, method=best), notes=[note], columns=COLUMNS
    )


if __name__ == "__main__":
    run_main(main)

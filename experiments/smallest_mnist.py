"""Classifies digits by as few bytes as possible, the decoder counted.

For each seed the program trains a teacher and several small networks whose weights are small integers (the rounding is
in place while they learn from the teacher). An entropy coder packs the integers, and each network becomes one Python
program that contains them, their decoder and the classifier; it needs Python and NumPy alone. The smallest program
within a limit of validation errors is chosen. Beside it stands a well-known MLP, pruned, distilled and packed in the
same way. At the end each program classifies the test images in a fresh process.

    python experiments/smallest_mnist.py           # mnist where it can be had, else digits
    python experiments/smallest_mnist.py digits    # scikit-learn's digits, no download
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
import smallest_mnist_network as network
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
    jittered,
    mnist_or_digits,
    read,
    run_main,
)
from harness.runs import file_name
from smallest_mnist_report import COLUMNS, draw, notes, verdict

from distill_jax import data, models, train
from distill_jax.compress import sparsity

TEACHER, ORIGINAL, PACKED = "teacher", "original", "original, packed"


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    networks: tuple[str, ...] = ("8,16,32@3", "12,24,48@3", "16,32,64@3", "24,48,96@1")
    """the small networks: widths of their convolutions before the last one, and the largest integer, as in 8,16,32@3"""
    kernels: tuple[Count, ...] = (5, 3, 3, 3)
    """sizes of the kernels of the convolutions; the last one must leave one pixel"""
    strides: tuple[Count, ...] = (2, 2, 1, 1)  # strides of the convolutions
    ranks: tuple[Count, ...] = (4, 1, 1, 1)  # number of spatial kernels for each of their input channels
    teacher: tuple[Count, ...] = (24, 48, 96)  # widths of the teacher, whose kernels are full and floats
    teacher_epochs: Count = 10  # number of epochs to train the teacher
    teacher_jitter: Whole = 2  # largest random shift of the teacher's images, in pixels
    original: tuple[Count, ...] = (300, 100)  # widths of the hidden layers of the MLP that is packed
    original_epochs: Count = 15  # number of epochs to train the MLP
    packed_epochs: Count = 40  # number of epochs to train the packed MLP
    packed_learning_rate: Positive = 4e-3  # highest learning rate of the packed MLP
    limit: Count = 3  # largest integer of the packed MLP
    zeros: Dropout = 0.9  # fraction of the kernels of the packed MLP that is pruned during training
    epochs: Count = 35  # number of epochs to train each small network
    learning_rate: Positive = 1e-2  # highest learning rate of the small networks (Adam, cosine schedule)
    other_learning_rate: Positive = 2e-3  # that of teacher and MLP
    batch_size: Count = 128  # number of examples per step
    jitter: Whole = 1
    """largest random shift of training images, in pixels; the teacher labels them unshifted"""
    temperature: Positive = 3.0  # temperature T that softens the predictions
    alpha: Share = 0.1  # weight of the labels; the teacher's predictions have 1 - alpha
    rate: Amount = 0.1
    """weight of the estimated size in the loss of the small networks: nats per 1,000 bytes"""
    original_rate: Amount = 0.002  # the same for the packed MLP
    most_errors: Share = 0.0095  # largest share of validation errors that the chosen network may have
    goal_errors: Share = 0.01  # share of test errors that the check allows
    goal_bytes: Count = 2800  # number of bytes that the check allows for the chosen program
    goal_ratio: Positive = 40.0  # how many times smaller the packed MLP must be for the check
    check: bool = False
    """exit with status 1 if a goal is missed, a packed MLP that errs more than the MLP included"""


CONFIGS = {
    "mnist": ("MNIST: three quarters of an hour on one core", Config()),
    "digits": ("small networks for scikit-learn's digits, which need no download", Config(
        dataset="digits", networks=("8,16@3", "16,32@3", "24,48@3"), kernels=(3, 3, 4), strides=(1, 1, 1),
        ranks=(4, 1, 1), teacher=(16, 32), teacher_epochs=40, teacher_jitter=1, original=(64, 64), original_epochs=60,
        packed_epochs=60, packed_learning_rate=2e-3, zeros=0.6, epochs=120, batch_size=32, most_errors=0.04,
        goal_errors=0.05, goal_ratio=10.0,
        temperature=2.0, alpha=0.5, rate=0.05,
    )),
}  # fmt: skip


def layers_of(config: Config, dataset: data.Dataset, description: str) -> tuple[list[network.Layer], int]:
    """Reads the description of a small network: its layers, and the largest integer."""
    widths, _, limit = description.partition("@")
    try:
        outputs = [*map(int, widths.split(",")), dataset.classes]
        layers = [*map(network.Layer, config.kernels, config.strides, outputs, config.ranks)]
        good = len(outputs) == len(config.kernels) and min(outputs) > 0 and int(limit) > 0
    except ValueError:
        good = False
    expected = f"be like 8,16@3, with {len(config.kernels) - 1} widths before the largest integer"
    config.need("networks", good, expected)
    return layers, int(limit)


def mlp(config: Config, dataset: data.Dataset) -> list[network.Layer]:
    """Lists the layers of the MLP: a full kernel that sees the whole image, then kernels of one pixel."""
    first, *others = (*config.original, dataset.classes)
    return [network.Layer(dataset.image_shape[0], 1, first, 0), *(network.Layer(1, 1, n, 0) for n in others)]


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size")
    height, width, _ = dataset.image_shape
    config.need(
        "dataset", dataset.train.image.dtype == np.uint8 and height == width, "have square images of uint8"
    )
    for name in ("strides", "ranks"):
        config.need(name, len(getattr(config, name)) == len(config.kernels), "be as many as --kernels")
    config.need(
        "teacher", len(config.teacher) == len(config.kernels) - 1, "be as many as --kernels, less one"
    )
    config.need(
        "networks",
        len(set(config.networks)) == len(config.networks) > 0,
        "be names that differ, at least one",
    )
    for size, stride in zip(config.kernels, config.strides, strict=True):
        height = (height - size) // stride + 1
        config.need("kernels", height > 0, "leave one pixel")
    config.need("kernels", height == 1 and config.strides[-1] == 1, "leave one pixel, the last with stride 1")
    for description in config.networks:
        layers_of(config, dataset, description)


def fit(
    run: Run, name: str, seed: int, model: models.Model, order: int, *, epochs: int, learning_rate: float, jitter: int,
    labels: np.ndarray | None = None, rate: float = 0.0, zeros: float = 0.0,
) -> Trained:  # fmt: skip
    """Trains one network, on stored predictions where there are any.

    Args:
      run: the run.
      name: the name of the network.
      seed: the number of the repetition.
      model: the network.
      order: the seed of the shuffling.
      epochs: the number of epochs.
      learning_rate: the highest learning rate.
      jitter: the largest random shift of the images.
      labels: the teacher's logits for the training images.
      rate: the weight of the estimated size in the loss.
      zeros: the fraction of the kernels that is pruned.
    """
    config, examples = run.config, arrays(run.dataset.train)
    loss_fn: Any = train.supervised()
    if labels is not None:
        examples["teacher"] = labels
        loss_fn = train.distill(temperature=config.temperature, alpha=config.alpha)

    def objective(model, batch, *, key, step):
        loss, (state, metrics) = loss_fn(model, batch, key=key, step=step)
        return loss + rate * network.size_of(model.params), (state, metrics)

    steps = len(examples["label"]) // config.batch_size
    tx: optax.GradientTransformation = adam(learning_rate, epochs, steps)
    if zeros:
        # Half of the training prunes, the other half recovers
        first, last = epochs * steps // 10, epochs * steps // 2
        every = max(1, (last - first) // 50)
        tx = sparsity.sparsify(
            tx, sparsity.polynomial(zeros, begin=first, end=last, every=every), ranking="global"
        )
    step = train.make_train_step(objective if rate else loss_fn, tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=jittered(jitter))  # many steps in one call
    done = run.fit(
        name, seed, train.init_state(model, tx, run.key(seed, order)), epoch, examples, epochs=epochs,
        batch_size=config.batch_size, order=order,
    )  # fmt: skip
    # The best epoch may be one before the last weight was pruned
    model = done.state.model if zeros else done.model
    return run.judge(network.freeze(model) if labels is not None else model, done.history, done.seconds)


def train_all(run: Run, seed: int) -> dict[str, Trained]:
    """Trains the networks of one seed."""
    config, dataset = run.config, run.dataset
    channels, key = dataset.image_shape[-1], jax.random.key(seed)
    wide = [
        network.Layer(size, stride, outputs, 0)
        for size, stride, outputs in zip(
            config.kernels, config.strides, (*config.teacher, dataset.classes), strict=True
        )
    ]
    first: dict[str, Any] = {"learning_rate": config.other_learning_rate, "jitter": config.teacher_jitter}
    teacher = network.make(wide, None, channels, jax.random.fold_in(key, 0))
    made = {TEACHER: fit(run, TEACHER, seed, teacher, 10_000 + seed, epochs=config.teacher_epochs, **first)}
    labels = run.store_labels(seed, made[TEACHER].model)
    small: dict[str, Any] = {
        "epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "rate": config.rate,
    }
    for number, name in enumerate(config.networks):
        model = network.make(*layers_of(config, dataset, name), channels, jax.random.fold_in(key, 1 + number))
        order = 20_000 + 1000 * number + seed
        made[name] = fit(run, name, seed, model, order, jitter=config.jitter, labels=labels, **small)
    first["epochs"] = config.original_epochs
    described = "mlp:" + ",".join(map(str, config.original))
    model = models.build(described, dataset.image_shape, dataset.classes, jax.random.fold_in(key, 100))
    made[ORIGINAL] = fit(run, ORIGINAL, seed, model, 30_000 + seed, **first)
    model = network.make(mlp(config, dataset), config.limit, channels, jax.random.fold_in(key, 101))
    made[PACKED] = fit(
        run, PACKED, seed, model, 30_000 + seed, labels=labels, zeros=config.zeros, rate=config.original_rate,
        jitter=config.teacher_jitter, epochs=config.packed_epochs, learning_rate=config.packed_learning_rate,
    )  # fmt: skip
    return made


def choose(
    config: Config, trained: list[dict[str, Trained]], sizes: dict[str, float], label: np.ndarray
) -> str:
    """Returns the smallest network within the limit of validation errors, or the one of fewest errors."""
    wrong = {
        name: float(np.mean([np.mean(of[name].validation_logits.argmax(1) != label) for of in trained]))
        for name in config.networks
    }
    good = [name for name in config.networks if wrong[name] <= config.most_errors]
    return min(good, key=lambda name: sizes[name]) if good else min(wrong, key=lambda name: wrong[name])


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("smallest_mnist", name, config, check)
    channels = run.dataset.image_shape[-1]
    trained: list[dict[str, Trained]] = []
    files: list[dict[str, network.File]] = []
    for seed in range(config.seeds):
        trained.append(train_all(run, seed))
        files.append({n: network.write(trained[-1][n].model, channels) for n in (*config.networks, PACKED)})
    sizes = {n: float(np.mean([len(of[n].program) for of in files])) for n in files[0]}
    chosen = choose(config, trained, sizes, run.dataset.validation.label)

    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits, reference=TEACHER) | {"chosen": chosen}
    for n, entry in found["models"].items():
        if n not in sizes:
            continue
        entry["bytes"] = sizes[n]
        entry["parameters"] = sum(array.size for array in network.arrays_of(trained[0][n].model))
        for part in ("weights", "decoder"):
            entry[part] = float(np.mean([len(getattr(of[n], part)) for of in files]))
        entry["differences"] = 0
        for seed, (of, outputs) in enumerate(zip(files, logits, strict=True)):
            path = run.directory / f"seed{seed}" / "programs" / f"{file_name(n)}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(of[n].program)
            classes = network.classify(of[n].program, run.dataset.test.image)
            entry["differences"] += int(np.sum(classes != outputs[n].argmax(1)))
            # It is the program that is judged
            wrong = classes != run.dataset.test.label
            entry["test"]["errors"][seed] = float(wrong.sum())
            entry["test"]["accuracy"][seed] = float(1 - wrong.mean())
    found["ratio"] = found["models"][ORIGINAL]["bytes"] / sizes[PACKED]
    drawn = draw(run, found, config.networks)
    run.finish(found, drawn, headline=verdict(found), notes=notes(found), columns=COLUMNS)
    errors = {n: np.mean(entry["test"]["errors"]) for n, entry in found["models"].items()}
    ok = (
        errors[chosen] <= config.goal_errors * len(run.dataset.test.label)
        and sizes[chosen] <= config.goal_bytes
        and found["ratio"] >= config.goal_ratio
        and errors[PACKED] <= errors[ORIGINAL]
    )
    return run.check(bool(ok), verdict(found))


if __name__ == "__main__":
    run_main(main)

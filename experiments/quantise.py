"""Turns a network into integers, with and without training, and asks what each kind costs.

For each seed the program trains a network, the original, and quantises it after training: weights of 8 bits, of 4 bits
with the scales of the largest weights ("absmax") and of least squares, and weights and activations of 8 bits. Then it
trains with the rounding in place, weights of 4 bits, on the original's predictions ("trained").

    python experiments/quantise.py                # mnist where it can be had, else digits
    python experiments/quantise.py digits         # a minute, no download
    python experiments/quantise.py mnist_convnet  # a convnet in the place of the MLP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from harness import (
    Count,
    Positive,
    Run,
    Share,
    Trained,
    adam,
    arrays,
    jittered,
    labelled,
    mnist_or_digits,
    pictures,
    prepare,
    read,
    results,
    run_main,
)
from harness.networks import OriginalOptions, build_original, train_original

from distill_jax import data, models, train
from distill_jax.compress import quantisation


@dataclass(frozen=True)
class Config(OriginalOptions):
    """The options of the experiment."""

    examples: Count = 1024
    """number of training images, without labels, that say which ranges activations have"""
    epochs: Count = 6  # number of epochs to train with the rounding in place
    learning_rate: Positive = 3e-4  # highest learning rate of that training (Adam, cosine schedule)
    temperature: Positive = 4.0  # temperature T that softens the predictions of both networks
    alpha: Share = 0.0  # weight of the labels; the original's predictions have 1 - alpha
    check: bool = False
    """exit with status 1 if 8 bits, or 4 bits and training, cost more than 0.5 points of accuracy"""


MNIST = Config(dataset="mnist", dropout=0.0)  # dropout would disturb the training with the rounding, too
CONVNET: dict[str, Any] = {"original": "convnet:16,32", "original_learning_rate": 2e-3}
DIGITS = Config(
    dataset="digits", original="mlp:64,64", original_epochs=100, original_learning_rate=5e-3, epochs=30, batch_size=64,
    learning_rate=1e-3, jitter=1, dropout=0.0,
)  # fmt: skip
CONFIGS = {
    "mnist": ("an MLP on MNIST", MNIST),
    "mnist_convnet": ("a convnet on MNIST", replace(MNIST, original_epochs=8, **CONVNET)),
    "digits": ("an MLP on scikit-learn's digits, which need no download: seconds per seed", DIGITS),
    "digits_convnet": ("a convnet on scikit-learn's digits", replace(DIGITS, **CONVNET)),
}
POINTS = 0.5
INT8, BOTH, TRAINED = "8 bits", "8 bits, activations too", "4 bits, trained"
AT_ONCE: Mapping[str, dict[str, Any]] = {
    INT8: {"bits": 8},
    BOTH: {"bits": 8, "activations": True},
    "4 bits, absmax": {"bits": 4, "scale": "absmax"},
    "4 bits": {"bits": 4},
}
COLUMNS: Mapping[str, results.Column] = {
    "bytes": results.count("bytes"),
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "agreement %": results.score("agreement", percent=True),
    "KL from original": results.score("teacher_kl"),
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    build_original(config, dataset, 0)


def quantise(config: Config, run: Run, seed: int, original: models.Model) -> dict[str, Trained]:
    """Makes all networks of integers of one original."""
    examples = arrays(run.dataset.train)
    rows = np.random.default_rng(seed).permutation(len(examples["label"]))[: config.examples]
    batches = [prepare(examples["image"][rows])]
    made = {
        name: run.judge(quantisation.quantise(original, batches, **options))
        for name, options in AT_ONCE.items()
    }
    tx = adam(config.learning_rate, config.epochs, len(examples["label"]) // config.batch_size)
    objective = train.distill(temperature=config.temperature, alpha=config.alpha)
    step = train.make_train_step(objective, tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=labelled(jittered(config.jitter)))  # many steps in one call
    order = 20_000 + seed
    state = train.init_state(quantisation.simulate(original, batches, bits=4), tx, run.key(seed, order))
    done = run.fit(
        TRAINED, seed, state, epoch, examples, epochs=config.epochs, batch_size=config.batch_size, order=order,
        context=original,
    )  # fmt: skip
    made[TRAINED] = run.judge(quantisation.freeze(done.model), done.history, done.seconds)
    return made


def lost(found: Mapping[str, Any], name: str) -> float:
    """Computes how many points of accuracy a network of integers loses, in the mean over seeds."""
    before, after = (np.mean(found["models"][model]["test"]["accuracy"]) for model in ("original", name))
    return 100 * float(before - after)


def verdict(found: Mapping[str, Any]) -> str:
    """Says what each kind of integers loses, and how small the network is."""
    whole = found["models"]["original"]["bytes"]
    parts = ", ".join(
        f"{name}: {100 * found['models'][name]['bytes'] / whole:.1f} % of the bytes, {-lost(found, name):+.2f} points"
        for name in (INT8, BOTH, "4 bits", TRAINED)
    )
    return f"Change of the test accuracy by integers ({parts}).".replace("-", "−")


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("quantise", name, config, check)
    trained = []
    for seed in range(config.seeds):
        original = train_original(run, seed)
        trained.append({"original": original, **quantise(config, run, seed, original.model)})
    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits, reference="original")
    histories = {name: [seed[name].history for seed in trained] for name in ("original", TRAINED)}
    pictures.learning_curves(
        run.directory / "learning_curves.png", histories, validation_size=len(run.dataset.validation.id)
    )
    drawn = {"Training of the original, and of 4 bits on its predictions": "learning_curves.png"}
    run.finish(found, drawn, headline=verdict(found), columns=COLUMNS)
    worst = max(lost(found, name) for name in (INT8, BOTH, TRAINED))
    return run.check(worst <= POINTS, f"integers cost {worst:.2f} points of accuracy, over {POINTS}")


if __name__ == "__main__":
    run_main(main)

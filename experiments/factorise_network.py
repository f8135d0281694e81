"""Makes a network thinner by low-rank factors, and fine-tunes it on its own predictions.

For each seed the program trains a network, the original, and replaces each of its kernels by two thin factors: the
nearest ones to the kernel ("SVD"), and those that lose least on the data ("whitened SVD"). The ranks are chosen for a
budget of parameters or operations. The whitened factors are then fine-tuned on the original's predictions
("fine-tuned").

    python experiments/factorise_network.py                # mnist where it can be had, else digits
    python experiments/factorise_network.py digits         # a minute, no download
    python experiments/factorise_network.py mnist_convnet  # a convnet in the place of the MLP
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

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

from distill_jax import data, metrics, models, train
from distill_jax.compress import low_rank


@dataclass(frozen=True)
class Config(OriginalOptions):
    """The options of the experiment."""

    budget: Positive = 0.15  # share of its parameters (or operations) that the factorised network keeps
    of: Literal["parameters", "flops"] = "parameters"  # what the budget counts
    epochs: Count = 6  # number of epochs to fine-tune the factorised network
    learning_rate: Positive = 1e-3  # highest learning rate of fine-tuning (Adam, cosine schedule)
    temperature: Positive = 4.0  # temperature T that softens the predictions of both networks in fine-tuning
    alpha: Share = 0.0  # weight of the labels in fine-tuning; the original's predictions have 1 - alpha
    check: bool = False  # exit with status 1 if factorising costs more than 0.15 points of accuracy


MNIST = Config(dataset="mnist")
MNIST_CONVNET = replace(
    MNIST, original="convnet:16,32", budget=0.3, original_epochs=8, original_learning_rate=2e-3
)
DIGITS = Config(
    dataset="digits", original="mlp:128,128", original_epochs=100, original_learning_rate=5e-3, budget=0.3, epochs=60,
    batch_size=64, jitter=1,
)  # fmt: skip
DIGITS_CONVNET = replace(DIGITS, original="convnet:16,32", original_learning_rate=2e-3)
CONFIGS = {
    "mnist": ("an MLP on MNIST: ten minutes per seed on two cores", MNIST),
    "mnist_convnet": ("a convnet on MNIST: ten minutes per seed on two cores", MNIST_CONVNET),
    "digits": ("an MLP on scikit-learn's digits, which need no download: seconds per seed", DIGITS),
    "digits_convnet": ("a convnet on scikit-learn's digits: seconds per seed", DIGITS_CONVNET),
}
POINTS = 0.15
TUNED = "whitened SVD, fine-tuned"
COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "FLOPs": results.count("flops"),
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "agreement %": results.score("agreement", percent=True),
    "KL from original": results.score("teacher_kl"),
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.need("budget", config.budget <= 1, "be at most 1")
    config.at_most(len(dataset.train.id), "batch_size")
    build_original(config, dataset, 0)


def train_model(
    run: Run, name: str, seed: int, model: models.Model, loss_fn: train.LossFn, *, epochs: int, learning_rate: float,
    order: int, transform: Any, context: Any = None,
) -> Trained:  # fmt: skip
    """Trains one model, or takes it from the checkpoint of the run."""
    examples, size = arrays(run.dataset.train), run.config.batch_size
    tx = adam(learning_rate, epochs, len(examples["label"]) // size)
    step = train.make_train_step(loss_fn, tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=transform)  # many steps in one call
    state = train.init_state(model, tx, run.key(seed, order))
    done = run.fit(
        name, seed, state, epoch, examples, epochs=epochs, batch_size=size, order=order, context=context
    )
    return run.judge(done.model, done.history, done.seconds)


def factorise(config: Config, run: Run, seed: int, original: models.Model) -> dict[str, Trained]:
    """Replaces kernels by thin factors, from a plain and from a whitened SVD, and fine-tunes the latter."""
    images = prepare(run.dataset.train.image[:4096])
    kernels = low_rank.kernels(original, images[:1])
    whitened = low_rank.layer_roots(original, images, batch=1024)
    made: dict[str, Trained] = {}
    for name, roots in {"SVD": None, "whitened SVD": whitened}.items():
        ranks = low_rank.allocate(original, kernels, config.budget, of=config.of, roots=roots)
        made[name] = run.judge(low_rank.factorise(original, kernels, ranks, roots=roots))
    made[TUNED] = train_model(
        run, TUNED, seed, made["whitened SVD"].model, train.distill(temperature=config.temperature, alpha=config.alpha),
        epochs=config.epochs, learning_rate=config.learning_rate, order=20_000 + seed,
        transform=labelled(jittered(config.jitter)), context=original,
    )  # fmt: skip
    return made


def verdict(found: Mapping[str, Any]) -> str:
    """Says what the factors keep and lose, and how fast the network is with them."""
    model, original = found["models"][TUNED], found["models"]["original"]
    lost = points(found, TUNED)
    return (
        f"Factorised to {100 * model['parameters'] / original['parameters']:.1f} % of its parameters and fine-tuned, "
        f"the network {'gains' if lost < 0 else 'loses'} {abs(lost):.2f} points of accuracy (before fine-tuning "
        f"{points(found, 'whitened SVD'):.2f} with whitened SVD, {points(found, 'SVD'):.2f} with plain SVD), and is "
        f"{model['times_as_fast']['1']:.2f} times as fast at batch 1, {model['times_as_fast']['256']:.2f} times at 256."
    )


def points(found: Mapping[str, Any], name: str) -> float:
    """Computes how many points of accuracy a factorised network loses, in the mean over seeds."""
    before, after = (np.mean(found["models"][model]["test"]["accuracy"]) for model in ("original", name))
    return 100 * float(before - after)


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("factorise_network", name, config, check)
    trained = []
    for seed in range(config.seeds):
        original = train_original(run, seed)
        trained.append({"original": original, **factorise(config, run, seed, original.model)})
    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits, reference="original")
    small, large = trained[0][TUNED].model, trained[0]["original"].model
    example = prepare(run.dataset.test.image[0])
    faster = {str(batch): metrics.speed_ratio(small, large, example, batch=batch) for batch in (1, 256)}
    found["models"][TUNED] |= {"ranks": low_rank.ranks_of(small), "times_as_fast": faster}
    histories = {name: [seed[name].history for seed in trained] for name in ("original", TUNED)}
    pictures.learning_curves(
        run.directory / "learning_curves.png", histories, validation_size=len(run.dataset.validation.id)
    )
    spread = (
        f", mean over {config.seeds} seeds; band: one standard deviation"
        if config.seeds > 1
        else ", one seed"
    )
    drawn = {f"Training of the original, and fine-tuning of its factors{spread}": "learning_curves.png"}
    ranks = ", ".join(f"{path} {rank}" for path, rank in low_rank.ranks_of(small).items())
    notes = [f"Ranks of the factors (seed 1): {ranks}. All other parameters are as they were."]
    run.finish(found, drawn, headline=verdict(found), notes=notes, columns=COLUMNS)
    lost = points(found, TUNED)
    return run.check(lost <= POINTS, f"factorising costs {lost:.2f} points of accuracy, over {POINTS}")


if __name__ == "__main__":
    run_main(main)

"""Measures the loss on the straight line between two networks, before and after their units are aligned.

For each seed the program trains two networks of one shape, from different initial parameters and in different orders of
examples. On the straight line between their parameters the loss rises over a barrier. The program then reorders the
units of the second network so that their weights, or their activations, are nearest to the first network's, and walks
along the line again. BatchNorm's statistics are estimated anew at each point of the line.

    python experiments/barrier_mnist.py                    # mnist where it can be had, else digits
    python experiments/barrier_mnist.py digits             # two minutes, no download
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from harness import (
    Count,
    Options,
    Positive,
    Run,
    Trained,
    adam,
    arrays,
    mnist_or_digits,
    pictures,
    plain,
    prepare,
    read,
    results,
    run_main,
)
from harness.runs import file_name

from distill_jax import data, models, train, weights
from distill_jax.compress import units

WAYS = ("as trained", "aligned by weights", "aligned by activations")


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    networks: tuple[str, ...] = ("mlp:512,512,512", "convnet:16,32")
    """the networks, such as mlp:512 or convnet:16,32; a convnet has BatchNorm"""
    epochs: Count = 8  # number of epochs to train each network
    learning_rate: Positive = 1e-3  # highest learning rate (Adam, cosine schedule)
    batch_size: Count = 128  # number of examples per step
    points: Count = 11  # number of points on the line, with its two ends
    examples: Count = 500  # number of training images for activations and BatchNorm's statistics
    check: bool = False  # exit with status 1 unless alignment by weights lowers the first barrier by 60 %


MNIST = Config(dataset="mnist", seeds=3)
DIGITS = Config(dataset="digits", seeds=3, epochs=60, batch_size=32)
CONFIGS = {
    "mnist": ("MNIST: minutes on two cores", MNIST),
    "digits": ("scikit-learn's digits, which need no download: two minutes", DIGITS),
}
COLUMNS: Mapping[str, results.Column] = {
    "barrier, nats": lambda model: results.mean_sd(model["barrier"]) if "barrier" in model else None,
    "errors": results.score("errors"),
    "NLL": results.score("nll"),
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    config.need("points", config.points >= 3, "be at least 3")
    config.need("points", config.points % 2 == 1, "be odd, so that one point is in the middle")
    different = len(set(config.networks)) == len(config.networks) > 0
    config.need("networks", different, "name at least one network, each once")
    for description in config.networks:
        build(description, dataset, 0)


def build(description: str, dataset: data.Dataset, seed: int) -> models.Model:
    """Builds a network; a convnet with BatchNorm."""
    options = {"batch_norm": True} if description.partition(":")[0] == "convnet" else {}
    return models.build(description, dataset.image_shape, dataset.classes, jax.random.key(seed), **options)


def train_network(config: Config, run: Run, description: str, seed: int, number: int) -> Trained:
    """Trains the first (number 0) or the second network (1) of a pair, or takes it from the checkpoint of the run."""
    own = 2 * seed + number  # initial parameters and an order of examples of its own
    model = build(description, run.dataset, own)
    examples = arrays(run.dataset.train)
    tx = adam(config.learning_rate, config.epochs, len(examples["label"]) // config.batch_size)
    step = train.make_train_step(train.supervised(), tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=plain)  # many steps in one call
    state = train.init_state(model, tx, run.key(seed, own))
    name = f"{description}, network {number + 1}"
    done = run.fit(
        name, seed, state, epoch, examples, epochs=config.epochs, batch_size=config.batch_size, order=own
    )
    return run.judge(done.model, done.history, done.seconds)


def align(first: models.Model, second: models.Model, images: Any) -> dict[str, models.Model]:
    """Returns the second network as it is, and with its units in the orders that suit the first network."""
    graph = units.trace(first, images[:1])
    whole = units.trace(first, images)  # the same units, for as many examples as are compared
    orders: tuple[Any, ...] = (
        {}, units.match_weights(graph, second, first), units.match_activations(whole, second, first, images)
    )  # fmt: skip
    return {way: units.permute(graph, second, order) for way, order in zip(WAYS, orders, strict=True)}


def walk(
    config: Config, run: Run, first: models.Model, second: models.Model
) -> tuple[dict[str, list[float]], dict[str, Trained]]:
    """Walks from the first network to the second in each way.

    Returns:
      The validation losses in nats, one per point, and the network in the middle of the line.
    """
    images = prepare(run.dataset.train.image[: config.examples])
    validate = train.make_validation(arrays(run.dataset.validation), prepare=prepare)
    refresh = functools.partial(weights.recalibrate, batches=[{"image": images}])
    losses, middles = {}, {}
    for way, end in align(first, second, images).items():
        points = weights.along(validate, first, end, np.linspace(0, 1, config.points), refresh=refresh)
        losses[way] = [point["validation_nll"] for point in points]
        middles[way] = run.judge(refresh(weights.lerp(first, end, 0.5)))
    return losses, middles


def verdict(description: str, barriers: Mapping[str, list[float]]) -> str:
    """Says in one sentence how high the barrier of a network is in each way."""
    before, *after = (np.mean(barriers[way]) for way in WAYS)
    parts = [
        f"{results.mean_sd(barriers[way])} {way} ({100 * (mean / before - 1):+.0f} %)"
        for way, mean in zip(WAYS[1:], after, strict=True)
    ]
    return (
        f"{description}: the barrier of the validation loss is {results.mean_sd(barriers[WAYS[0]])} nats "
        f"{WAYS[0]}, {', '.join(parts)}."
    ).replace("-", "−")


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("barrier_mnist", name, config, check)
    trained: list[dict[str, Trained]] = [{} for _ in range(config.seeds)]
    ts = np.linspace(0, 1, config.points)
    barriers: dict[str, dict[str, list[float]]] = {}
    lines: dict[str, dict[str, list[list[float]]]] = {}
    for description in config.networks:
        lines[description] = {way: [] for way in WAYS}
        for seed in range(config.seeds):
            pair = [train_network(config, run, description, seed, number) for number in (0, 1)]
            losses, middles = walk(config, run, pair[0].model, pair[1].model)
            trained[seed][description] = pair[0]
            for way in WAYS:
                lines[description][way].append(losses[way])
                trained[seed][f"{description}, midpoint, {way}"] = middles[way]
        barriers[description] = {
            way: [weights.barrier(ts, np.asarray(row)) for row in rows]
            for way, rows in lines[description].items()
        }

    found = run.evaluate(trained, run.test_logits(trained), reference=config.networks[0])
    found |= {"barriers": barriers, "line": {"t": ts.tolist(), **lines}}
    drawn = {}
    spread = f"mean and standard deviation over {config.seeds} seeds" if config.seeds > 1 else "one seed"
    for description in config.networks:
        for way, values in barriers[description].items():
            found["models"][f"{description}, midpoint, {way}"]["barrier"] = values
        file = f"line-{file_name(description)}.png"
        series = {way: np.asarray(rows) for way, rows in lines[description].items()}
        pictures.curves(
            run.directory / file, ts, series, xlabel="first network → second network",
            ylabel="validation loss, nats",
        )  # fmt: skip
        drawn[f"Validation loss on the straight line between two networks {description}: {spread}"] = file
    sentences = [verdict(description, barriers[description]) for description in config.networks]
    run.finish(found, drawn, headline=sentences[0], notes=sentences[1:], columns=COLUMNS)
    before, after, _ = (np.mean(barriers[config.networks[0]][way]) for way in WAYS)
    return run.check(bool(after <= 0.4 * before), "alignment by weights lowers the barrier by less than 60 %")


if __name__ == "__main__":
    run_main(main)

"""The straight line between two networks trained from different starts, before and after alignment.

Pairs of networks of one shape learn the same task, each from its own initial parameters and in its own
order of examples. On the line between them the loss rises over a barrier; the units of the one are then
put into the order in which its weights, or its activations, are nearest to the other's, and the line is
walked again. BatchNorm's statistics are re-estimated at each point.

    python experiments/barrier_mnist.py            # minutes on a laptop
"""

from __future__ import annotations

import functools
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from harness import pictures, report, runs, study  # fmt: skip
from harness.options import Count, Options, Positive, parse
from harness.study import Trained
from harness.training import Lab, adam, arrays, begin, prepare, work

from distill_jax import _files, data, models, train, weights
from distill_jax.compress import units

WAYS = ("as trained", "aligned by weights", "aligned by activations")


@dataclass(frozen=True)
class Config(Options):
    """Options. The defaults shown are those of MNIST."""

    seeds: Count = 3
    """how many pairs of each network"""
    models: tuple[str, ...] = ("mlp:512,512,512", "convnet:16,32")
    """such as mlp:512 or convnet:16,32 (that with BatchNorm)"""
    epochs: Count = 8
    """of all networks"""
    learning_rate: Positive = 1e-3
    """at its highest: a rise over one epoch, then a cosine to 0 (Adam)"""
    batch_size: Count = 128
    """examples a step"""
    points: int = 11
    """on the line, its ends included"""
    examples: Count = 500
    """training images on which activations are compared and BatchNorm's statistics estimated"""
    check: bool = False
    """exit 1 unless alignment by weights takes at least 60 % off the first model's barrier"""


DEFAULTS: dict[tuple[str, bool], dict[str, Any]] = {("", True): {"epochs": 60, "batch_size": 32}}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses values that cannot be meant, before anything is trained or written."""
    config.fit(len(dataset.train.id), "batch_size", "examples")
    config.need("points", config.points >= 3, "be at least 3")
    config.need("points", config.points % 2 == 1, "be odd, to have one in the middle")
    different = len(set(config.models)) == len(config.models) > 0
    config.need("models", different, "be at least one, and different")
    for description in config.models:
        build(description, dataset, 0)


def build(description: str, dataset: data.Dataset, seed: int) -> models.Model:
    """Builds a network."""
    options = {"batch_norm": True} if description.startswith("convnet") else {}
    shape: Any = dataset.train.image.shape[1:]
    return models.build(description, shape, dataset.classes, jax.random.key(seed), **options)


def train_pair(config: Config, lab: Lab, description: str, seed: int, unit: float) -> list[Trained]:
    """Two networks, from starts and in orders of their own."""
    pair = []
    for i in (0, 1):
        model = build(description, lab.dataset, 2 * seed + i)
        name = re.sub(r"\W+", "-", description)
        pair.append(
            lab.train(
                f"{name}-{i}",
                seed,
                model,
                train.supervised(model.apply_fn),
                arrays(lab.dataset.train),
                epochs=config.epochs,
                tx=adam(config.learning_rate, config.epochs),
                batch_size=config.batch_size,
                order_seed=2 * seed + i,
                unit=unit,
            )
        )
    return pair


def aligned(config: Config, lab: Lab, pair: list[Trained]) -> dict[str, tuple[Any, Any]]:
    """The second network as it is, and in the orders of units that suit the first."""
    first, second = ({"params": p, "state": s} for p, s in (each.variables for each in pair))
    image = prepare(lab.dataset.train.image[: config.examples])

    def traced(x):
        return units.trace(lambda p, x: pair[0].apply_fn(p["params"], p["state"], x)[0], first, x)

    graph = traced(image[:1])
    by_weights = units.match_weights(graph, second["params"], first["params"])
    by_activations = units.match_activations(traced(image), second, first, image)
    found = {}
    for name, orders in zip(WAYS, ({}, by_weights, by_activations), strict=True):
        tree = units.permute(graph, second, orders)
        found[name] = tree["params"], tree["state"]
    return found


def walk(config: Config, lab: Lab, pair: list[Trained]) -> tuple[dict[str, list[float]], Any]:
    """The line, each way: validation losses in nats, and the network in its middle."""
    apply_fn, start = pair[0].apply_fn, pair[0].variables
    validate = train.make_validation(apply_fn, arrays(lab.dataset.validation), prepare=prepare)
    batches = [{"image": prepare(lab.dataset.train.image[: config.examples])}]
    refresh = functools.partial(weights.recalibrate, apply_fn, batches=batches)
    if not jax.tree.leaves(start[1]):
        refresh = None  # type: ignore[assignment]
    losses, middles = {}, {}
    ts = np.linspace(0, 1, config.points)
    for name, end in aligned(config, lab, pair).items():
        figures = weights.along(validate, start, end, ts, refresh=refresh)
        losses[name] = [figure["validation_nll"] for figure in figures]
        params, state = weights.lerp(start, end, 0.5)
        state = refresh(params, state) if refresh else state
        middles[name] = lab.judge(apply_fn, (params, state), {}, 0.0)
    return losses, middles


def verdict(barriers: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """A sentence for each network."""
    texts = []
    for description, ways in barriers.items():
        before = np.mean(ways[WAYS[0]])
        parts = [
            f"{report.mean_sd(ways[name])} {name} ({100 * (np.mean(ways[name]) / before - 1):+.0f} %)"
            for name in WAYS[1:]
        ]
        texts.append(
            f"{description}: the barrier of the validation loss, nats, is "
            f"{report.mean_sd(ways[WAYS[0]])} {WAYS[0]}, {', '.join(parts)}.".replace("-", "−")
        )
    return texts


def main() -> int:
    """Runs the experiment; returns the exit status."""
    started = time.monotonic()
    config, dataset = parse(Config, __doc__, DEFAULTS)
    check(config, dataset)
    out = begin("barrier_mnist", config, dataset)
    # The unit of work is an epoch of the first network
    works = [work(build(name, dataset, 0), dataset) for name in config.models]
    total = 2 * config.seeds * config.epochs * sum(works) / works[0]
    lab = Lab(dataset, out, runs.Progress(total), config.seeds, save_seconds=config.save_seconds)
    trained: list[dict[str, Trained]] = [{} for _ in range(config.seeds)]
    lines: dict[str, dict[str, list[list[float]]]] = {}
    ts = np.linspace(0, 1, config.points)
    for description, cost in zip(config.models, works, strict=True):
        lines[description] = {name: [] for name in WAYS}
        for seed in range(config.seeds):
            pair = train_pair(config, lab, description, seed, cost / works[0])
            losses, middles = walk(config, lab, pair)
            trained[seed][description] = pair[0]
            for name in WAYS:
                lines[description][name].append(losses[name])
                trained[seed][f"{description}, midpoint, {name}"] = middles[name]
    lab.progress.close()

    barriers = {
        description: {name: [weights.barrier(ts, row) for row in rows] for name, rows in ways.items()}
        for description, ways in lines.items()
    }
    results = study.results(
        "barrier_mnist",
        dataset,
        trained,
        config=config,
        seconds={"total": time.monotonic() - started},
        prepare=prepare,
        reference=config.models[0],
    )
    results |= {"barriers": barriers, "line": {"t": ts.tolist(), **lines}}
    for description in config.models:
        for name, values in barriers[description].items():
            results["models"][f"{description}, midpoint, {name}"]["barrier"] = values
    _files.write_json(out / "results.json", _files.plain(results, "results"))
    drawn = {}
    for description, ways in lines.items():
        picture = f"line-{re.sub(r'[^a-z0-9]+', '-', description)}.png"
        series = {name: np.asarray(rows) for name, rows in ways.items()}
        pictures.curves(out / picture, ts, series, xlabel="one → the other", ylabel="validation loss, nats")
        drawn[f"Validation loss on the straight line between two networks {description}"] = picture
    columns = {
        "barrier, nats": lambda model: report.mean_sd(model["barrier"]) if "barrier" in model else None,
        "errors": report.score("errors"),
        "NLL": report.score("nll"),
    }
    sentences = verdict(barriers)
    ends = [f"{config.models[0]}, midpoint, {name}" for name in WAYS]
    report.write_report(
        out, results, drawn, sentences, columns=columns,
        baseline=ends[0], model=ends[1], method="Alignment of units before averaging",
    )  # fmt: skip
    print()
    print(report.table(results, columns))
    print()
    print("\n".join(sentences))
    print(f"Report with pictures: {out / 'report.md'}")
    before, after = (np.mean(barriers[config.models[0]][name]) for name in WAYS[:2])
    if config.check and after > 0.4 * before:
        print("check failed: alignment takes less than 60 % off the barrier", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    runs.run_main(main)

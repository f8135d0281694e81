"""Makes a small fast file of a trained network: prunes it, distils it, exports it, and chooses by what files measure.

For each seed an original is trained, and exported as it is. At each share of its units it is pruned, trained on
the labels of the data and of the original, and exported. A fresh process loads each file and measures how long
it takes for a batch. Of the shares that lose at most so many points of validation accuracy, the one with the
fastest file is chosen, and its files get model cards. The test set is used for the report only.

    python experiments/compress_to_file.py                # mnist where it can be had, else digits
    python experiments/compress_to_file.py digits --original convnet:16,32
    python experiments/compress_to_file.py digits --original my_package.my_module:my_network

A network of your own is a function (shape, classes, key) that returns a Model. With --runtime onnx, the smaller
networks become ONNX files (pip install 'distill_jax[onnx]').
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from harness import (
    Amount,
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
    plain,
    prepare,
    read,
    results,
    run_main,
)
from harness.networks import OriginalOptions, build_original, train_original

from distill_jax import data, export, metrics, models, train
from distill_jax.compress import units


@dataclass(frozen=True)
class Config(OriginalOptions):
    """The options of the experiment."""

    seeds: Count = 3  # number of repetitions, each with its own original
    shares: tuple[float, ...] = (0.5, 0.25, 0.12)  # shares of the units to keep, falling
    tuning_epochs: Count = 20  # number of epochs to train each smaller network
    learning_rate: Positive = 1e-3  # highest learning rate of the smaller networks (Adam, cosine schedule)
    temperature: Positive = 4.0  # temperature T that softens the original's predictions
    alpha: Share = 0.1  # weight of the labels in the loss; the original's predictions have 1 - alpha
    points: Amount = 0.3  # points of validation accuracy that the chosen network may lose
    runtime: Literal["stablehlo", "onnx"] = "stablehlo"
    """what the smaller networks are exported to; the original is always exported to StableHLO"""
    batch: Count = 1  # batch size for which latency is measured
    threads: Count = 1  # number of threads that the runtime may use
    seconds: Positive = 1.0  # how long each file is called
    check: bool = (
        False  # exit with status 1 unless a smaller network is within the points, and its file is faster
    )


DIGITS = Config(
    dataset="digits", original="mlp:256,256", original_epochs=60, tuning_epochs=60, batch_size=32, jitter=0
)
CONFIGS = {
    "mnist": ("MNIST, a network of 784-1200-1200-10", Config()),
    "digits": ("scikit-learn's digits, which need no download", DIGITS),
}


def from_files(key: str) -> results.Column:
    """Makes a column of what was measured of the files."""
    return lambda model: results.mean_sd([each[key] for each in model["files"]])


COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.COLUMNS["parameters"],
    "bytes of the file": from_files("bytes"),
    "ms from the file": from_files("latency_ms"),
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "ECE %": results.score("ece", percent=True),
    "agreement %": results.score("agreement", percent=True),
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size")
    config.at_most(len(dataset.train.id), "batch")
    falling = all(a > b for a, b in itertools.pairwise((1.0, *config.shares, 0.0)))
    config.need("shares", bool(config.shares) and falling, "fall and lie between 0 and 1")
    has_onnx = all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime")))
    config.need(
        "runtime",
        config.runtime != "onnx" or has_onnx,
        "be stablehlo without pip install 'distill_jax[onnx]'",
    )
    graph = units.trace(build_original(config, dataset, 0), prepare(dataset.train.image[:1]))
    config.need(
        "original", any(group.free for group in graph.groups.values()), "have units that can be removed"
    )


def prune(config: Config, run: Run, original: models.Model, share: float) -> models.Model:
    """Keeps a share of a network's units, those with the largest weights, ranked within their groups."""
    graph = units.trace(original, prepare(run.dataset.train.image[:1]))
    kept = units.prune(graph, units.scores.l1(graph, original), share, across="group")
    return units.keep(graph, original, kept)


def tune(
    config: Config, run: Run, name: str, seed: int, small: models.Model, original: models.Model
) -> Trained:
    """Trains a smaller network on the labels of the data and of the original."""
    context: Any = original
    examples, transform = arrays(run.dataset.train), labelled(jittered(config.jitter))
    if not config.jitter:  # the original sees the same images in each epoch
        examples["teacher"], context, transform = run.store_labels(seed, original), None, plain
    tx = adam(config.learning_rate, config.tuning_epochs, len(examples["label"]) // config.batch_size)
    soft = train.distill(temperature=config.temperature, alpha=config.alpha)
    epoch = train.make_epoch(train.make_train_step(soft, tx), transform=transform)
    state = train.init_state(small, tx, run.key(seed, 20_000 + seed))
    done = run.fit(
        name, seed, state, epoch, examples, epochs=config.tuning_epochs, batch_size=config.batch_size,
        order=20_000 + seed, context=context,
    )  # fmt: skip
    return run.judge(done.model, done.history, done.seconds)


def measured(config: Config, run: Run, name: str, seed: int, model: models.Model) -> dict[str, Any]:
    """Exports a network, and measures its file in a fresh process."""
    is_onnx = config.runtime == "onnx" and name != "original"
    path = run.directory / f"seed{seed}" / f"{name.replace(' ', '_')}.{'onnx' if is_onnx else 'model'}"
    x = prepare(run.dataset.train.image[: max(config.batch, 8)])
    (export.onnx if is_onnx else export.stablehlo)(
        path, model, x, labels=[str(i) for i in range(run.dataset.classes)],
        preprocessing="grey values or colours as numbers from 0 to 1",
        provenance={"original": config.original, "data": run.dataset.name, "network": name, "seed": seed},
    )  # fmt: skip
    found = export.latency(path, x[: config.batch], threads=config.threads, seconds=config.seconds)
    return {**found, "file": str(path.relative_to(run.directory))}


def choose(
    config: Config, run: Run, trained: Sequence[Mapping[str, Trained]], files: Mapping[str, Sequence[Any]]
) -> str:
    """Names the network with the fastest file among those that lose few points of validation accuracy."""
    label = run.dataset.validation.label
    accuracy = {
        name: np.mean([metrics.figures(seed[name].validation_logits, label)["accuracy"] for seed in trained])
        for name in files
    }
    limit = accuracy["original"] - config.points / 100 - 1e-9
    fitting = [name for name in files if accuracy[name] >= limit]
    return min(fitting, key=lambda name: np.mean([each["latency_ms"] for each in files[name]]))


def write_cards(config: Config, run: Run, found: Mapping[str, Any]) -> list[Path]:
    """Writes the cards of the chosen network's files."""
    entry = found["models"][found["chosen"]]
    return [
        export.card(
            run.directory / file["file"],
            title=f"{config.original} on {run.dataset.name}, {found['chosen']}",
            origin=f"{found['chosen']} of {config.original}, by experiments/compress_to_file.py",
            data=f"{len(run.dataset.test.label)} test examples of {run.dataset.name}, {run.dataset.source}",
            figures={name: values[seed] for name, values in entry["test"].items()},
            latencies=[file],
        )
        for seed, file in enumerate(entry["files"])
    ]


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("compress_to_file", name, config, check)
    trained: list[dict[str, Trained]] = []
    files: dict[str, list[Any]] = {}
    for seed in range(config.seeds):
        original = train_original(run, seed)
        of = {"original": original}
        for share in config.shares:
            small = prune(config, run, original.model, share)
            of[f"pruned to {share:g}"] = tune(
                config, run, f"pruned to {share:g}", seed, small, original.model
            )
        for network, each in of.items():
            files.setdefault(network, []).append(measured(config, run, network, seed, each.model))
        trained.append(of)
    chosen = choose(config, run, trained, files)
    found = run.evaluate(trained, run.test_logits(trained), reference="original") | {"chosen": chosen}
    for network, entry in found["models"].items():
        entry["files"] = files[network]
    write_cards(config, run, found)
    best, first = (found["models"][network] for network in (chosen, "original"))
    faster, smaller = (
        float(np.mean([a[key] for a in first["files"]]) / np.mean([b[key] for b in best["files"]]))
        for key in ("latency_ms", "bytes")
    )
    found |= {"faster": faster, "smaller": smaller}
    lost = results.points(first["test"]["accuracy"], best["test"]["accuracy"])
    headline = (
        f"Chosen: {chosen}. Its file is {faster:.1f} times as fast at batch {config.batch} and {smaller:.1f} times as "
        f"small as the original's, at {lost} points of test accuracy."
    )
    runtimes = {network: each[0]["runtime"] for network, each in files.items()}
    notes = [
        f"Measured from the files by {runtimes['original']} (original) and {runtimes[chosen]} (chosen), "
        f"{config.threads} threads, on {files['original'][0]['machine']}."
    ]
    series = {network: entry["test"]["accuracy"] for network, entry in found["models"].items()}
    pictures.comparison(
        run.directory / "errors.png",
        {network: [100 * (1 - accuracy) for accuracy in each] for network, each in series.items()},
        baseline="original",
    )
    run.finish(found, {"Test errors, %": "errors.png"}, headline=headline, notes=notes, columns=COLUMNS)
    return run.check(
        chosen != "original" and faster > 1, "no smaller network is as good as asked for, and faster"
    )


if __name__ == "__main__":
    run_main(main)

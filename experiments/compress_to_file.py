"""Makes a small fast file of a trained network: prunes, distils, quantises and exports it, and chooses by its files.

For each seed an original is trained. Candidates keep a share of its units, and of the operations in its residual
blocks, as floats or with weights and activations of 8 bits. Each is exported and its file measured; what is over a
budget, by default a tenth of the bytes and a fifth of the time of the original under XLA, is left out. The others are
trained on the labels of the data and of the original in rounds, after each of which the better part goes on. The chosen
file and the original's are measured once more, and the chosen one gets a model card. The test set is used for the
report only: the chosen file itself is run on it.

    python experiments/compress_to_file.py              # mlp on mnist where it can be had, else digits
    python experiments/compress_to_file.py resnet --aim latency --most-lost 0.2
    python experiments/compress_to_file.py mlp --most-bytes 100000 --most-ms 0.02
    python experiments/compress_to_file.py digits --original my_package.my_module:my_network

A network of your own is a function (shape, classes, key) that returns a Model.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
from compress_to_file_report import COLUMNS, described, draw, headline, lost, notes, run_file, write_card
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
    plain,
    prepare,
    read,
    run_main,
)
from harness.networks import OriginalOptions, build_original, train_original

from distill_jax import data, export, metrics, models, teachers, train
from distill_jax._checks import BudgetError
from distill_jax.compress import quantisation, search, units

HAS_ONNX = all(map(importlib.util.find_spec, ("jax2onnx", "onnxruntime")))
DEFAULTS = {
    "most_bytes": "most_bytes is by default a tenth of the original's bytes under XLA",
    "most_ms": "most_ms is by default a fifth of the original's time under XLA",
}
SUFFIXES = {"onnx": ".onnx", "stablehlo": ".model"}


@dataclass(frozen=True)
class Config(OriginalOptions):
    """The options of the experiment."""

    seeds: Count = 3  # number of repetitions, each with its own original
    widths: tuple[Share, ...] = (0.5, 0.35, 0.25, 0.18)  # shares of the units that candidates keep
    depths: tuple[Share, ...] = (1.0,)
    """shares of the operations that are left when residual blocks are removed, before units are; 1 removes none"""
    bits: tuple[int, ...] = (32, 8)  # 32: floats; 8: weights and activations of 8 bits, after training
    rounds: tuple[Count, ...] = (2, 4, 8)  # numbers of epochs of the rounds in which candidates are trained
    keep: Share = 0.5  # share of the candidates that goes on to the next round
    learning_rate: Positive = 1e-3  # highest learning rate of a round (Adam, cosine schedule)
    temperature: Positive = 4.0  # temperature T that softens the original's predictions
    alpha: Share = 0.1  # weight of the labels in the loss; the original's predictions have 1 - alpha
    examples: Count = 512
    """number of training images by which blocks are judged and the ranges of activations are found"""
    aim: Literal["bytes", "latency", "quality"] = "quality"
    """what is chosen within the budgets: the smallest file, the fastest one, or the one of the highest accuracy"""
    most_bytes: Count | None = None
    """size of the largest file that may be chosen (default: a tenth of the original's under XLA)"""
    most_ms: Positive | None = None
    """longest time of a call that may be chosen, in milliseconds (default: a fifth of the original's under XLA)"""
    most_lost: Amount | None = None
    """points of validation accuracy that the chosen file may lose (default: any)"""
    runtime: Literal["onnx", "stablehlo"] = "onnx" if HAS_ONNX else "stablehlo"
    """what candidates are exported to (default: onnx where pip install 'distill_jax[onnx]' is done)"""
    batch: Count = 1  # batch size for which latency is measured
    threads: Count = 1  # number of threads that the runtime may use
    seconds: Positive = 0.5  # how long each file is called
    check: bool = False
    """exit with status 1 unless the chosen files are 5 times as fast and 10 times as small as the original's, and lose
    at most 0.3 points of test accuracy"""


MLP = Config()
DEEP = replace(MLP, original_epochs=6, original_learning_rate=2e-3, rounds=(1, 2, 4), dropout=0.0, jitter=0)
CONFIGS = {
    "mlp": ("784-1200-1200-10 on MNIST", replace(MLP, widths=(0.35, 0.18, 0.12, 0.08))),
    "convnet": ("two convolutions and a dense layer on MNIST", replace(DEEP, original="convnet:16,32")),
    "vgg": ("VGG-8 of a quarter width on MNIST", replace(DEEP, original="vgg8:0.25")),
    "resnet": ("ResNet-14 on MNIST", replace(
        DEEP, original="resnet14", original_epochs=4, widths=(0.5, 0.35, 0.25), depths=(1.0, 0.7),
    )),
    "mobilenetv2": ("MobileNetV2 of half width on MNIST", replace(
        DEEP, original="mobilenetv2:0.5", original_epochs=4, widths=(0.5, 0.35), depths=(1.0, 0.7), rounds=(1, 3),
    )),
    "transformer": ("a vision transformer of six blocks on MNIST", replace(
        DEEP, original="vit6-7:0.5", original_epochs=10, widths=(0.7, 0.5, 0.35), depths=(1.0, 0.5), rounds=(2, 4, 8),
    )),
    "digits": ("64-1200-1200-10 on scikit-learn's digits, which need no download: minutes", replace(
        MLP, dataset="digits", original_epochs=30, batch_size=32, jitter=0, rounds=(20, 40), widths=(0.25, 0.12, 0.06),
    )),
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    config.need("batch", config.batch <= config.examples, f"be at most --examples, {config.examples}")
    for name in ("widths", "depths"):
        config.need(name, bool(values := getattr(config, name)) and min(values) > 0, "be shares above 0")
    config.need("bits", bool(config.bits) and {*config.bits} <= {8, 32}, "be from 8, 32")
    for name in ("widths", "depths", "bits"):
        config.need(name, len({*(values := getattr(config, name))}) == len(values), "differ from each other")
    config.need("rounds", bool(config.rounds), "be at least one number of epochs")
    config.need("keep", config.keep > 0, "lie in (0, 1]")
    config.need(
        "aim", config.aim == "quality" or config.most_lost is not None, "be quality without --most-lost"
    )
    needed = "be stablehlo without pip install 'distill_jax[onnx]'"
    config.need("runtime", config.runtime != "onnx" or HAS_ONNX, needed)
    graph = units.trace(build_original(config, dataset, 0), prepare(dataset.train.image[:1]))
    free = any(group.free for group in graph.groups.values())
    config.need("original", free, "have units that can be removed")
    shallow = min(config.depths) == 1 or units.blocks(graph)
    config.need("depths", bool(shallow), "be 1 for a network without residual blocks")


class Tools:
    """What makes, trains, finishes and judges the candidates of one seed."""

    def __init__(self, config: Config, run: Run, seed: int, original: models.Model):
        self.config, self.run, self.seed, self.original = config, run, seed, original
        rows = np.random.default_rng(seed).permutation(len(run.dataset.train.label))[: config.examples]
        self.x = prepare(run.dataset.train.image[rows])
        self.made = functools.cache(self._make)  # bits make no difference before the end
        # Made once, so that networks of the same shapes are compiled once
        self.recipe = functools.cache(self._recipe)
        self.data, self.context = arrays(run.dataset.train), original if config.jitter else None
        if not config.jitter:  # the original sees the same images in each epoch
            self.data["teacher"] = run.store_labels(seed, original)

    def make(self, original: models.Model, settings: search.Settings) -> models.Model | None:
        """Removes blocks and units."""
        return self.made(settings.get("depth", 1.0), settings["width"])

    def _make(self, depth: float, width: float) -> models.Model | None:
        model = self.original
        graph = units.trace(model, self.x[:1])
        if depth < 1:
            influence = units.block_influence(graph, model, [self.x], how="kl")
            try:
                gone = units.prune_blocks(graph, influence, depth)
            except BudgetError:
                return None  # too few blocks
            model = units.drop_blocks(graph, model, gone)
            graph = units.trace(model, self.x[:1])
        exact = {name for name, group in graph.groups.items() if group.free and group.exact_shrunk}
        scores = {name: each for name, each in units.scores.l2(graph, model).items() if name in exact}
        return units.keep(graph, model, units.prune(graph, scores, width, across="group"))

    def _recipe(self, epochs: int) -> tuple[optax.GradientTransformation, Any]:
        """Makes the optimizer and the epoch of a training on the labels of the data and of the original."""
        config = self.config
        tx = adam(config.learning_rate, epochs, len(self.data["label"]) // config.batch_size)
        step = train.make_train_step(train.distill(temperature=config.temperature, alpha=config.alpha), tx)
        return tx, train.make_epoch(
            step, transform=labelled(jittered(config.jitter)) if config.jitter else plain
        )

    def tune(self, model: models.Model, settings: search.Settings, epochs: int) -> models.Model:
        """Trains for so many epochs; what is trained already, with other bits, is taken from the run."""
        run = self.run
        start = teachers.fingerprint((model.params, model.state))[:8]
        name = (
            " ".join(f"{k} {v}" for k, v in settings.items() if k != "bits")
            + f", {epochs} epochs from {start}"
        )
        tx, epoch = self.recipe(epochs)
        order = 20_000 + self.seed
        done = run.fit(
            name, self.seed, train.init_state(model, tx, run.key(self.seed, order)), epoch, self.data, epochs=epochs,
            batch_size=self.config.batch_size, order=order, context=self.context,
        )  # fmt: skip
        return done.model

    def finish(self, model: models.Model, settings: search.Settings) -> models.Model:
        """Turns weights and activations into integers, if 8 bits are asked for."""
        return quantisation.quantise(model, [self.x], activations=True) if settings["bits"] == 8 else model

    def accuracy(self, model: models.Model) -> float:
        """Computes the accuracy on the validation images."""
        label = self.run.dataset.validation.label
        return metrics.figures(self.run.judge(model).validation_logits, label)["accuracy"]

    def latency(self, path: Path) -> dict[str, Any]:
        """Measures a file in a fresh process."""
        config = self.config
        return export.latency(path, self.x[: config.batch], threads=config.threads, seconds=config.seconds)


def settings_of(config: Config) -> list[dict[str, Any]]:
    """Lists the candidates."""
    deep = len(config.depths) > 1 or config.depths[0] < 1
    return [
        ({"depth": depth} if deep else {}) | {"width": width, "bits": bits}
        for depth, width, bits in itertools.product(config.depths, config.widths, config.bits)
    ]


def compress(config: Config, run: Run, seed: int) -> tuple[dict[str, Trained], dict[str, Any]]:
    """Trains an original, finds the best file, and measures both again: the networks, and what the files measure."""
    original = train_original(run, seed)
    tools = Tools(config, run, seed, original.model)
    facts: dict[str, Any] = {
        "labels": [str(name) for name in run.dataset.class_names],
        "preprocessing": "grey values or colours as numbers from 0 to 1",
        "provenance": {"original": config.original, "data": run.dataset.name, "seed": seed},
    }
    least = None
    if config.most_lost is not None:
        least = tools.accuracy(original.model) - config.most_lost / 100 - 1e-9
    directory = run.directory / f"seed{seed}" / "files"
    directory.mkdir(parents=True, exist_ok=True)
    first = directory / "original.model"
    export.stablehlo(first, original.model, tools.x, **facts)
    whole = tools.latency(first)
    try:
        found = search.best_file(
            original.model, tools.make, settings_of(config), tools.x, tune=tools.tune, quality=tools.accuracy,
            directory=directory, epochs=config.rounds, finish=tools.finish,
            write=functools.partial(getattr(export, config.runtime), **facts), suffix=SUFFIXES[config.runtime],
            aim=config.aim, most_bytes=config.most_bytes or whole["bytes"] // 10,
            most_ms=config.most_ms or whole["latency_ms"] / 5, least_quality=least, keep=config.keep,
            batch=config.batch, threads=config.threads, seconds=config.seconds,
        )  # fmt: skip
    except BudgetError as error:
        origins = [DEFAULTS[name] for name in error.budgets if name in DEFAULTS and not getattr(config, name)]
        raise ValueError("; ".join([str(error), *origins])) from None
    assert found.chosen.path is not None
    assert found.chosen.model is not None
    turns = [(tools.latency(first), tools.latency(found.chosen.path)) for _ in range(2)]
    before, after = (min(each, key=lambda one: one["latency_ms"]) for each in zip(*turns, strict=True))
    measured = {
        "chosen": found.chosen.name, "file": str(found.chosen.path.relative_to(run.directory)),
        "original": before, "small": after, "faster": before["latency_ms"] / after["latency_ms"],
        "smaller": before["bytes"] / after["bytes"], "candidates": described(found),
    }  # fmt: skip
    return {"original": original, "chosen": run.judge(found.chosen.model)}, measured


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, lambda given: {"mnist": "mlp"}.get(n := mnist_or_digits(given), n))
    run = Run.start("compress_to_file", name, config, check)
    trained, files = [], []
    for seed in range(config.seeds):
        networks, measured = compress(config, run, seed)
        trained.append(networks)
        files.append(measured)
        jax.clear_caches()  # the programs of one seed serve no other one, and a process cannot hold those of many
    logits = run.test_logits(trained)
    for of, file in zip(logits, files, strict=True):
        network = of["chosen"].argmax(-1)
        of["chosen"] = run_file(run.directory / file["file"], run.dataset.test.image)
        file["other classes"] = int((of["chosen"].argmax(-1) != network).sum())
    found: Any = run.evaluate(trained, logits, reference="original")
    for network, entry in found["models"].items():
        entry["files"] = [file["original" if network == "original" else "small"] for file in files]
    for seed, file in enumerate(files):
        file["points lost"] = lost(found, seed)
        write_card(config, run, seed, file, found["models"]["chosen"])
    found["seeds"] = files
    run.finish(
        found, draw(run, files), headline=headline(config, files), notes=notes(config, files), columns=COLUMNS
    )
    good = all(
        file["faster"] >= 5 and file["smaller"] >= 10 and file["points lost"] <= 0.3 + 1e-9 for file in files
    )
    return run.check(
        good, "a file is not 5 times as fast and 10 times as small, or loses more than 0.3 points"
    )


if __name__ == "__main__":
    run_main(main)

"""Makes a small fast file of a trained network: prunes, distils, quantises and exports it, and chooses by its files.

For each seed an original is trained. Candidates keep a share of its residual blocks, of its units, and of the
multiplications of its kernels, which become products of two thin matrices. Their numbers are floats, weights of 8 or 4
bits, or weights and activations of 8 bits, rounded after the training or during it. Each is exported and its file
measured; what is over a budget, by default a tenth of the bytes and a fifth of the time of the original under XLA, is
left out. The others are trained on the labels of the data and of the original in rounds, after each of which the better
part goes on. The chosen file and the original's are measured once more, and the chosen one gets a model card. The test
set is used for the report only: the chosen file itself is run on it, and compared with the network in memory.

    python experiments/compress_to_file.py              # mlp on mnist where it can be had, else digits
    python experiments/compress_to_file.py resnet --aim latency --most-lost 0.2
    python experiments/compress_to_file.py mlp --most-bytes 100000 --most-ms 0.02
    python experiments/compress_to_file.py digits --original my_package.my_module:my_network

A network of your own is a function (shape, classes, key) that returns a Model.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
from compress_to_file_candidates import NUMBERS, Tools, settings_of
from compress_to_file_report import (
    COLUMNS,
    FAILED,
    compared,
    described,
    draw,
    headline,
    is_good,
    lost,
    notes,
    run_file,
    write_card,
)
from harness import Amount, Count, Positive, Run, Share, Trained, mnist_or_digits, prepare, read, run_main
from harness.networks import OriginalOptions, build_original, train_original

from distill_jax import data, export
from distill_jax._checks import BudgetError
from distill_jax.compress import search, units

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
    multiple: Count = 1
    """number of which the sizes of layers are multiples, rounded up; ONNX Runtime's convolutions are fast with
    multiples of 8 channels; a width that gives the same network as another one is left out"""
    ranks: tuple[Share, ...] = (1.0,)
    """shares of the multiplications that are left when kernels become products of two thin matrices, after units are
    removed; 1 leaves kernels as they are"""
    numbers: tuple[str, ...] = ("int8-weights", "int8")
    """float; int8-weights and int4-weights: weights of 8 or 4 bits in the file, with which ONNX Runtime computes as
    floats; int8: weights and activations of 8 bits, with which it computes as integers. Numbers are rounded after the
    training. With "-trained" at the end of a name, such as int4-weights-trained, networks are trained with rounded
    numbers; that is for 4 bits that lose too much otherwise"""
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
    """exit with status 1 unless the chosen files are 5 times as fast and 10 times as small as the original's, lose at
    most 0.3 points of test accuracy, and compute what the networks in memory do"""


MLP = Config()
DEEP = replace(
    MLP, original_learning_rate=2e-3, numbers=("int8-weights",), rounds=(2, 8), dropout=0.0, jitter=0,
)  # fmt: skip
CONFIGS = {
    "mlp": ("784-1200-1200-10 on MNIST", replace(
        MLP, original_epochs=12, widths=(0.4, 0.32, 0.25), rounds=(4, 24),
    )),
    "convnet": ("convolutions of 32 and 64 channels and a dense layer on MNIST", replace(
        DEEP, original="convnet:32,64", original_epochs=4, widths=(0.375, 0.25), multiple=8,
    )),
    "vgg": ("VGG-8 of half width on MNIST", replace(
        DEEP, multiple=8, original="vgg8:0.5", original_epochs=3, widths=(0.5, 0.25), rounds=(1, 8),
    )),
    "resnet": ("ResNet-14 on MNIST; its training is slow on a CPU", replace(
        DEEP, multiple=8, original="resnet14", original_epochs=8, widths=(0.7, 0.5), depths=(0.7,), rounds=(2, 10),
    )),
    "mobilenetv2": ("MobileNetV2 of half width with expansion 2 on MNIST; its training is slow on a CPU", replace(
        DEEP, original="mobilenetv2-t2:0.5", original_epochs=6, widths=(0.45,), rounds=(2, 10),
    )),
    "transformer": ("a vision transformer of six blocks and 3/4 of the width on MNIST; slow on a CPU", replace(
        DEEP, original="vit6-7:0.75", original_epochs=12, original_learning_rate=1e-3, widths=(0.5,),
        depths=(0.5, 0.34), rounds=(2, 16), jitter=1,
    )),
    "digits": ("64-1200-1200-10 on scikit-learn's digits, which need no download: minutes", replace(
        MLP, dataset="digits", original_epochs=30, batch_size=32, jitter=0, rounds=(20, 40), widths=(0.25, 0.12, 0.06),
    )),
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    config.need("batch", config.batch <= config.examples, f"be at most --examples, {config.examples}")
    for name in ("widths", "depths", "ranks"):
        config.need(name, bool(values := getattr(config, name)) and min(values) > 0, "be shares above 0")
    config.among("numbers", tuple(NUMBERS))
    config.need("numbers", bool(config.numbers), f"be from {', '.join(NUMBERS)}")
    for name in ("widths", "depths", "ranks", "numbers"):
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
    whole = min((tools.latency(first) for _ in range(3)), key=lambda one: one["latency_ms"])
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
    if config.runtime != "stablehlo":  # the other runtime is compared too
        export.stablehlo(directory / "chosen.model", found.chosen.model, tools.x, **facts)
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
    for networks, of, file in zip(trained, logits, files, strict=True):
        path, images = run.directory / file["file"], prepare(run.dataset.test.image)
        paths = [path] if config.runtime == "stablehlo" else [path, path.with_name("chosen.model")]
        file["compared"] = [row for each in paths for row in compared(each, networks["chosen"].model, images)]
        of["chosen"] = run_file(path, images)
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
    return run.check(all(map(is_good, files)), FAILED)


if __name__ == "__main__":
    run_main(main)

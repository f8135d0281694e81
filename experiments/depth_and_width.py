"""Makes a trained residual network smaller by fewer blocks, by narrower ones, or by both, and fine-tunes what is left.

For each seed an original is trained. At each share of its operations, units are removed ("width"), residual blocks
are removed ("depth"), or first blocks, as far as the root of the share, and then units ("both"). Units are scored by
their weights, blocks by how much the predictions change without them. Each smaller network is judged as it is,
after fine-tuning on the labels, and after distillation from the original for as many epochs. The report has errors
against operations and against measured time. The test set is used for the report only.

    python experiments/depth_and_width.py             # mnist where it can be had, else digits
    python experiments/depth_and_width.py digits      # ResNet-20 on scikit-learn's digits
    python experiments/depth_and_width.py mnist       # ResNet-20 on MNIST
    python experiments/depth_and_width.py transformer # a vision transformer on digits
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from harness import (
    Count,
    Options,
    Positive,
    Run,
    Share,
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

from distill_jax import data, models, train
from distill_jax.compress import units

WAYS = ("width", "depth", "both")
TUNINGS = ("labels", "distilled")


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    original: str = "resnet20:0.5"  # residual network to make smaller, such as resnet20 or vit6-4
    epochs: Count = 12  # number of epochs to train the original
    learning_rate: Positive = 2e-3  # highest learning rate of the original (Adam, cosine schedule)
    tuning_epochs: Count = 5  # number of epochs to fine-tune each smaller network
    tuning_rate: Positive = 1e-3  # highest learning rate of the fine-tuning
    batch_size: Count = 128  # number of examples per step
    shares: tuple[float, ...] = (0.75, 0.5, 0.35)  # shares of the operations to keep, falling
    ways: tuple[str, ...] = WAYS  # what is removed: width, depth, both
    examples: Count = 512  # number of training images on which the influence of blocks is measured
    influence: str = "kl"
    """influence of blocks: kl (change of the predictions) or cosine (angle, as in ShortGPT)"""
    temperature: Positive = 4.0  # temperature T that softens the predictions in the distillation
    alpha: Share = 0.1  # weight of the labels in the distillation; the original's labels have 1 - alpha
    check: bool = False
    """exit with status 1 unless the distilled networks of the largest share lose at most a point of test accuracy"""


CONFIGS = {
    "mnist": ("ResNet-20 of half width on MNIST", Config(dataset="mnist")),
    "digits": ("ResNet-20 of half width on scikit-learn's digits, which need no download", Config(
        dataset="digits", epochs=30, tuning_epochs=15, batch_size=32, examples=256,
    )),
    "transformer": ("a vision transformer of six blocks on scikit-learn's digits", Config(
        dataset="digits", original="vit6-2:0.334", epochs=60, tuning_epochs=20, batch_size=32, examples=256,
    )),
}  # fmt: skip


def share_of(cost: str) -> results.Column:
    """Makes the column of a share of the original's cost."""
    return lambda model: f"{100 * model[cost]:.0f}" if cost in model else None


COLUMNS = {
    "FLOPs %": share_of("share of FLOPs"),
    "time % at 256": share_of("share of time"),
    "parameters": results.COLUMNS["parameters"],
    "blocks": results.count("blocks"),
    **{name: results.COLUMNS[name] for name in ("errors", "accuracy %", "agreement %")},
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    config.among("ways", WAYS)
    config.need("influence", config.influence in ("kl", "cosine"), "be kl or cosine")
    falling = all(a > b for a, b in itertools.pairwise((1.0, *config.shares, 0.0)))
    config.need("shares", bool(config.shares) and falling, "fall and lie between 0 and 1")
    graph = units.trace(build(config, dataset, 0), prepare(dataset.train.image[:1]))
    config.need("original", bool(units.blocks(graph)), "be a residual network, such as resnet20 or vit6-4")


def build(config: Config, dataset: data.Dataset, seed: int) -> models.Model:
    """Builds the original with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return models.build(config.original, dataset.image_shape, dataset.classes, key)


def smaller(config: Config, run: Run, seed: int, original: models.Model) -> dict[str, models.Model]:
    """Makes all smaller networks of one original: way and share → network.

    A way is left out at a share that it cannot reach, which depends on the original's architecture alone.
    """
    rows = np.random.default_rng(seed).permutation(len(run.dataset.train.label))[: config.examples]
    x = prepare(run.dataset.train.image[rows])
    graph = units.trace(original, x[:1])
    whole = units.costs.flops(graph, {})
    how: Any = config.influence
    influence = units.block_influence(graph, original, [x], how=how)
    found = {}
    for share, way in itertools.product(config.shares, config.ways):
        model, left = original, graph
        try:
            if way != "width":
                part = share if way == "depth" else share**0.5
                model = units.drop_blocks(graph, model, units.prune_blocks(graph, influence, part))
                left = units.trace(model, x[:1])
            if way != "depth":
                exact = {name for name, group in left.groups.items() if group.free and group.exact_shrunk}
                scores = {n: s for n, s in units.scores.l2(left, model).items() if n in exact}
                kept = units.prune(left, scores, share * whole, of=units.costs.flops)
                model = units.keep(left, model, kept)
        except ValueError as error:
            if not str(error).startswith("budget"):
                raise
            print(f"{way}, {share:g}: cannot be reached ({error})")
            continue
        found[f"{way}, {share:g}"] = model
    return found


class Recipe(NamedTuple):
    """How to train; made once, so that networks of the same shapes are compiled once."""

    tx: optax.GradientTransformation
    epoch: Any
    epochs: int


def recipe(config: Config, run: Run, loss_fn: train.LossFn, learning_rate: float, epochs: int) -> Recipe:
    """Makes the optimizer, the step and the epoch of a training."""
    tx = adam(learning_rate, epochs, steps=len(run.dataset.train.label) // config.batch_size)
    step = train.make_train_step(loss_fn, tx)  # (state, batch) -> (state, metrics)
    return Recipe(tx, train.make_epoch(step, transform=plain), epochs)


def fit(
    run: Run, name: str, seed: int, model: models.Model, how: Recipe, order: int, **labels: Any
) -> Trained:
    """Trains one network on the images and their labels, and on further arrays such as the original's labels."""
    state = train.init_state(model, how.tx, run.key(seed, order))
    done = run.fit(
        name, seed, state, how.epoch, {**arrays(run.dataset.train), **labels}, epochs=how.epochs,
        batch_size=run.config.batch_size, order=order,
    )  # fmt: skip
    return run.judge(done.model, done.history, done.seconds)


def count_blocks(run: Run, model: models.Model) -> int:
    """Counts the residual blocks that can be removed from a network."""
    return len(units.blocks(units.trace(model, prepare(run.dataset.train.image[:1]))))


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("depth_and_width", name, config, check)
    first = recipe(config, run, train.supervised(), config.learning_rate, config.epochs)
    soft = train.distill(temperature=config.temperature, alpha=config.alpha)
    tunings = {
        tuning: recipe(config, run, loss_fn, config.tuning_rate, config.tuning_epochs)
        for tuning, loss_fn in zip(TUNINGS, (train.supervised(), soft), strict=True)
    }
    trained: list[dict[str, Trained]] = []
    blocks: dict[str, list[int]] = {}
    for seed in range(config.seeds):
        original = fit(run, "original", seed, build(config, run.dataset, seed), first, 10_000 + seed)
        of = {"original": original}
        blocks.setdefault("original", []).append(count_blocks(run, original.model))
        labels = run.store_labels(seed, original.model)
        for made, model in smaller(config, run, seed, original.model).items():
            of[made] = run.judge(model)
            blocks.setdefault(made, []).append(count_blocks(run, model))
            for tuning, how in tunings.items():
                more = {"teacher": labels} if tuning == "distilled" else {}
                of[f"{made}, {tuning}"] = fit(
                    run, f"{made}, {tuning}", seed, model, how, 20_000 + seed, **more
                )
        trained.append(of)
        # The programs of one seed's networks serve no other seed; a process cannot hold those of all seeds
        jax.clear_caches()
    found = run.evaluate(trained, run.test_logits(trained), reference="original")
    whole = found["models"]["original"]
    for name, entry in found["models"].items():
        entry["share of FLOPs"] = entry["flops"] / whole["flops"]
        entry["share of time"] = entry["latency_ms"]["256"] / whole["latency_ms"]["256"]
        entry["blocks"] = float(np.mean(blocks[", ".join(name.split(", ")[:2])]))
    run.finish(found, draw(config, run, found), headline=headline(config, found), columns=COLUMNS)
    lost = [
        np.mean(whole["test"]["accuracy"]) - np.mean(entry["test"]["accuracy"])
        for name, entry in found["models"].items()
        if name.endswith(f", {config.shares[0]:g}, distilled")
    ]
    return run.check(max(lost) <= 0.01, "a distilled network of the largest share loses more than a point")


def headline(config: Config, found: dict[str, Any]) -> str:
    """Names the best way at the smallest share that all ways reach."""
    entries = found["models"]
    common = [s for s in config.shares if all(f"{way}, {s:g}" in entries for way in config.ways)]
    share = (common or config.shares)[-1]
    names = [f"{way}, {share:g}, distilled" for way in config.ways if f"{way}, {share:g}" in entries]
    parts = ", ".join(f"{n.partition(',')[0]} {results.mean_sd(entries[n]['test']['errors'])}" for n in names)
    return f"Distilled at {share:g} of the operations, test errors by what was removed: {parts}."


def draw(config: Config, run: Run, found: dict[str, Any]) -> dict[str, str]:
    """Draws the test error against operations and time, a line for each way and tuning."""
    entries = found["models"]
    series = {
        f"{way}, {tuning}": [
            entries[name] for s in config.shares if (name := f"{way}, {s:g}, {tuning}") in entries
        ]
        for way, tuning in itertools.product(config.ways, TUNINGS)
    }
    series = {name: each for name, each in series.items() if each}
    costs = {"share of the FLOPs": "share of FLOPs", "share of the time at batch 256": "share of time"}

    def error(entry: dict[str, Any]) -> np.ndarray:
        return 100 - 100 * np.array(entry["test"]["accuracy"])

    pictures.tradeoffs(
        run.directory / "tradeoffs.png",
        {"test error": {name: np.array([error(e) for e in each]) for name, each in series.items()}},
        {shown: {n: np.array([e[key] for e in each]) for n, each in series.items()} for shown, key in costs.items()},
        ({"test error": float(error(entries["original"]).mean())}, dict.fromkeys(costs, 1.0)),
    )  # fmt: skip
    seeds = (
        f"mean over {config.seeds} seeds; bars: one standard deviation" if config.seeds > 1 else "one seed"
    )
    return {f"Test error against the costs that are left, {seeds}; cross: the original": "tradeoffs.png"}


if __name__ == "__main__":
    run_main(main)

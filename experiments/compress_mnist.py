"""Makes a trained network smaller: removes or merges its units, and fine-tunes what is left.

The original is trained. Then the search goes round: edit, fine-tune by distillation from the original, compute the
validation loss, choose the next edit. At each share of the units it applies every operator to the original at
once, some of them also step by step ("iterative", each network from the one before), and trains a network of
the same size from random initial parameters ("fresh"). It refines the shares where the budget of validation
loss ends, and names the smallest network within it. The test set is used for the report only.

    python experiments/compress_mnist.py                # mnist where it can be had, else digits
    python experiments/compress_mnist.py wide           # 784-1200-1200-10 on MNIST
    python experiments/compress_mnist.py convnet        # two convolutions and a dense layer on MNIST
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from compress_mnist_report import COLUMNS, FRESH, claims, describe_chosen, draw, headline
from harness.experiment import Run, Trained, adam, arrays, jittered, labelled, mnist_or_digits, plain, prepare
from harness.options import Amount, Count, Dropout, Options, Positive, Share, Whole, read
from harness.runs import run_main

from distill_jax import data, metrics, models, train
from distill_jax.compress import search, units

OPERATORS = ("prune", "merge", "select", "prune+merge", FRESH)
SCORES = ("l1", "l2", "apoz", "mean_activation", "fpgm", "lamp")


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    seeds: Count = 3  # number of repetitions, each with its own original
    original: str = "mlp:128"  # network to make smaller, such as mlp:128, mlp:1200,1200 or convnet:16,32
    epochs: Count = 15  # number of epochs to train the original
    tuning_epochs: Count = 20  # number of epochs to fine-tune each smaller network
    dropout: Dropout = 0.2  # fraction of the original's hidden units that is dropped in training
    learning_rate: Positive = 3e-3  # highest learning rate (Adam, cosine schedule)
    batch_size: Count = 128  # number of examples per step
    jitter: Whole = 0
    """largest random shift of the training images, in pixels; the original labels the shifted images"""
    operators: tuple[str, ...] = OPERATORS  # operators to try: prune, merge, select, prune+merge, fresh
    iterative: tuple[str, ...] = ("prune", "merge")  # operators that are also applied step by step
    shares: tuple[float, ...] = (0.5, 0.3, 0.18, 0.11, 0.065)  # shares of the units to keep, falling
    multiple: Count = 1
    """widths are rounded up to multiples of this number, for 49 units need not be faster than 56"""
    refinements: Whole = 2
    """number of further shares, between the smallest network within the budget and the next smaller one"""
    budget: Amount = 0.02  # number of nats by which the mean validation loss may exceed the original's
    score: str = "l1"
    """score by which units are pruned, and weighted when they are merged: l1, l2, apoz, mean_activation, fpgm
    or lamp"""
    examples: Count = 1024  # number of training examples on which units are scored and compared
    temperature: Positive = 4.0  # temperature T that softens the predictions in the fine-tuning
    alpha: Share = 0.1  # weight of the labels in the fine-tuning loss; the original's labels have 1 - alpha
    check: bool = False
    """exit with status 1 unless a smaller network is within the budget, and one with half of the units loses at
    most 0.3 points of test accuracy"""


CONFIGS = {
    "mnist": ("MNIST, 784-128-10: twenty minutes on two cores", Config()),
    "digits": ("scikit-learn's digits, which need no download: three minutes", Config(
        dataset="digits", epochs=60, tuning_epochs=40, batch_size=32,
    )),
    "wide": ("MNIST, 784-1200-1200-10, trained on shifted images: hours", Config(
        original="mlp:1200,1200", jitter=2, learning_rate=1e-3, epochs=20, tuning_epochs=40,
        operators=("prune", FRESH), iterative=(), shares=(0.5, 0.18), refinements=0,
    )),
    "convnet": ("MNIST, two convolutions and a dense layer: an hour", Config(
        original="convnet:16,32", epochs=8, learning_rate=2e-3, tuning_epochs=8,
        operators=("prune", "merge", FRESH), iterative=(), shares=(0.5, 0.25), refinements=0,
    )),
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    config.among("operators", OPERATORS)
    config.among("iterative", OPERATORS[:-1])
    config.among("score", SCORES)
    config.need("operators", bool(set(config.operators) - {FRESH}), "name at least one besides fresh")
    falling = all(a > b for a, b in itertools.pairwise((0.999, *config.shares, 0.0)))
    config.need("shares", bool(config.shares) and falling, "fall and lie between 0 and 1")
    kind = config.original.partition(":")[0]
    config.need("original", kind in ("mlp", "convnet"), "be an MLP or a ConvNet, such as mlp:128")
    try:
        widths_at(config, dataset, config.shares[-1])
    except ValueError as error:
        raise ValueError(f"--shares {config.shares[-1]:g} is too little: {error}") from None


def build(config: Config, dataset: data.Dataset, seed: int, widths: Sequence[int] = ()) -> models.Model:
    """Builds the original, or a network of its kind whose hidden layers have the given widths."""
    name, options = config.original, {"dropout": config.dropout}
    if widths:
        kind = name.partition(":")[0]
        dense: dict[str, Any] = {"hidden": widths[-1]} if kind == "convnet" else {}
        layers = widths[:-1] if dense else widths
        name, options = f"{kind}:{','.join(map(str, layers))}", {"dropout": 0.0, **dense}
    key = jax.random.fold_in(jax.random.key(seed), bool(widths))
    return models.build(name, dataset.image_shape, dataset.classes, key, **options)


def widths_at(config: Config, dataset: data.Dataset, share: float) -> list[int]:
    """Computes the widths of the hidden layers, in their order, with a share of the original's units.

    Each layer keeps at least two: a single unit is no group, which a further step could make smaller.
    """
    graph = units.trace(build(config, dataset, 0), prepare(dataset.train.image[:1]))
    equal = {name: np.zeros(group.size) for name, group in graph.groups.items() if group.free}
    kept = units.prune(graph, equal, share, across="group", multiple=config.multiple)
    return [max(2, len(indices)) for indices in kept.values()]


def edit(
    config: Config, dataset: data.Dataset, operator: str, widths: Sequence[int], model: models.Model, seed: int
) -> models.Model:  # fmt: skip
    """Applies an operator to a network: returns one whose hidden layers have the given widths."""
    small = build(config, dataset, seed, widths)
    if operator == FRESH:
        return small
    rows = np.random.default_rng(seed).permutation(len(dataset.train.label))[: config.examples]
    x = prepare(dataset.train.image[rows])
    graph = units.trace(model, x)
    names = [name for name, group in graph.groups.items() if group.free]
    if operator == "prune+merge":
        sizes = [graph.groups[name].size for name in names]
        halfway = [round((n * w) ** 0.5) for n, w in zip(sizes, widths, strict=True)]
        half = edit(config, dataset, "prune", halfway, model, seed)
        return edit(config, dataset, "merge", widths, half, seed)
    target = units.trace(small, x)
    if operator == "select":
        kept = units.select(graph, target)
    else:
        inputs = (x,) if config.score in ("apoz", "mean_activation") else ()
        scores = getattr(units.scores, config.score)(graph, model, *inputs)
        kept = units.select(graph, target, how=scores)
    if operator == "merge":
        values = units.activations(graph, model, x)
        likeness = {name: values[name].T for name in names}
        each = dict(zip(names, widths, strict=True))
        model, kept = units.merge(graph, model, each, likeness=likeness, scores=scores)
    # The function of the new network drops no units in training
    return units.keep(graph, model, kept).replace(apply_fn=small.apply_fn)


class Recipe(NamedTuple):
    """How to train; made once, so that networks of the same shapes are compiled once."""

    tx: optax.GradientTransformation
    epoch: Any
    epochs: int


def recipe(config: Config, run: Run, loss_fn: train.LossFn, epochs: int, transform: Any) -> Recipe:
    """Makes the optimizer, the step and the epoch of a training."""
    tx = adam(config.learning_rate, epochs, steps=len(run.dataset.train.label) // config.batch_size)
    step = train.make_train_step(loss_fn, tx)  # (state, batch) -> (state, metrics)
    return Recipe(tx, train.make_epoch(step, transform=transform), epochs)


def train_model(
    run: Run, name: str, seed: int, model: models.Model, how: Recipe, order: int, original: Any = None
) -> Trained:
    """Trains one network, on the labels of the original as well where one is given.

    The original's labels for the training images are stored; where the images are shifted at random, the
    original labels each batch.
    """
    examples, context = arrays(run.dataset.train), original if run.config.jitter else None
    if original is not None and not run.config.jitter:
        examples["teacher"] = run.store_labels(seed, original)
    state = train.init_state(model, how.tx, run.key(seed, order))
    done = run.fit(
        name, seed, state, how.epoch, examples, epochs=how.epochs, batch_size=run.config.batch_size,
        order=order, context=context,
    )  # fmt: skip
    return run.judge(done.model, done.history, done.seconds)


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("compress_mnist", name, config, check)
    shifted = jittered(config.jitter) if config.jitter else plain
    first = recipe(config, run, train.supervised(), config.epochs, shifted)
    soft = train.distill(temperature=config.temperature, alpha=config.alpha)
    tuning = recipe(config, run, soft, config.tuning_epochs, labelled(shifted) if config.jitter else plain)
    trained = []
    for seed in range(config.seeds):
        model = build(config, run.dataset, seed)
        trained.append({"original": train_model(run, "original", seed, model, first, 10_000 + seed)})
    edited: list[dict[str, Trained]] = [{} for _ in trained]  # the same networks before fine-tuning

    def loss_and_size(name: str) -> tuple[float, int]:
        label = run.dataset.validation.label
        losses = [metrics.figures(of[name].validation_logits, label)["nll"] for of in trained]
        return float(np.mean(losses)), sum(x.size for x in jax.tree.leaves(trained[0][name].model.params))

    def attempt(wanted: search.Edit) -> tuple[float, int]:
        widths = widths_at(config, run.dataset, wanted.share)
        for seed, of in enumerate(trained):
            model = edit(config, run.dataset, wanted.operator, widths, of[wanted.start].model, seed)
            edited[seed][wanted.name] = run.judge(model)
            original = of["original"].model
            of[wanted.name] = train_model(run, wanted.name, seed, model, tuning, 20_000 + seed, original)
        return loss_and_size(wanted.name)

    done = search.find_smallest(
        attempt, loss_and_size("original"), operators=config.operators, shares=config.shares,
        iterative=config.iterative, budget=config.budget, refinements=config.refinements,
        baselines=[operator for operator in config.operators if operator == FRESH],
    )  # fmt: skip

    found = run.evaluate(trained, run.test_logits(trained), reference="original") | {"chosen": done.chosen}
    before = run.test_logits(edited)
    for name, entry in found["models"].items():
        entry["validation"]["nll"] = loss_and_size(name)[0]
        if name in done.trials:
            wanted = done.trials[name].edit
            entry |= {"operator": wanted.operator, "iterative": wanted.iterative, "share": wanted.share}
            figures = [metrics.figures(of[name], run.dataset.test.label) for of in before]
            entry["untuned"] = {"accuracy": [each["accuracy"] for each in figures]}
    found["claims"] = claims(found["models"])
    notes = [describe_chosen(config, found)] + [
        f"With {c['claim']} ({c['model']}): {abs(c['points']):.2f} points of test accuracy "
        f"{'lost' if c['points'] >= 0 else 'gained'}, "
        f"{100 * c['flops']:.0f} % of the FLOPs, {c['time']:.2f} of the time at batch 256."
        for c in found["claims"]
    ]
    run.finish(found, draw(config, run, found), headline=headline(found), notes=notes, columns=COLUMNS)
    lost = [c["points"] for c in found["claims"] if c["claim"] == "half of the units"]
    good = done.chosen != "original" and lost and round(lost[0], 6) <= 0.3
    return run.check(bool(good), "no smaller network is as good as asked for")


if __name__ == "__main__":
    run_main(main)

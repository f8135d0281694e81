"""Trains a network with a group lasso, so that units become superfluous, and prunes it: against plain scores.

For each seed an original is trained as usual, and others with a group lasso of several strengths, from the same
initial parameters, on the same batches, for as many epochs. At each share of its units the usual one is pruned by
the length of a unit's weights ("l2") and by the Fisher information ("fisher"), those with a lasso by the length
("lasso"). Then all are fine-tuned on the labels for the same number of epochs. The strength of the lasso is chosen for
each seed and share by validation. A network of that size that starts at random ("fresh") is trained for the
epochs of both trainings. The test set is used for the report only.

    python experiments/group_lasso.py             # mnist where it can be had, else digits
    python experiments/group_lasso.py digits      # scikit-learn's digits, an MLP
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
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
    rise_and_fall,
    run_main,
)

from distill_jax import data, models, train
from distill_jax.compress import units

METHODS = ("l2", "fisher", "lasso", "fresh")


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    original: str = "mlp:256,256"  # network to prune, such as mlp:256,256 or convnet:16,32
    epochs: Count = 8  # number of epochs to train each original
    learning_rate: Positive = 2e-3  # highest learning rate of the originals (Adam, cosine schedule)
    strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """weights of the lasso's penalty, rising; Adam's steps are about the learning rate, so they stay below 1"""
    tuning_epochs: Count = 4  # number of epochs to fine-tune each pruned network
    tuning_rate: Positive = 1e-3  # highest learning rate of the fine-tuning
    batch_size: Count = 128  # number of examples per step
    shares: tuple[float, ...] = (0.5, 0.25, 0.1)  # shares of each layer's units to keep, falling
    examples: Count = 1024  # number of training images for the Fisher information


CONFIGS = {
    "mnist": ("an MLP on MNIST", Config(dataset="mnist")),
    "digits": ("an MLP on scikit-learn's digits, which need no download", Config(
        dataset="digits", original="mlp:64,64", epochs=60, tuning_epochs=30, batch_size=32,
    )),
}  # fmt: skip
COLUMNS: Mapping[str, results.Column] = {
    name: results.COLUMNS[name] for name in ("parameters", "errors", "accuracy %")
} | {"NLL": results.score("nll")}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    falling = all(a > b for a, b in itertools.pairwise((1.0, *config.shares, 0.0)))
    config.need("shares", bool(config.shares) and falling, "fall and lie between 0 and 1")
    rising = all(a < b for a, b in itertools.pairwise((0.0, *config.strengths, 1.0)))
    config.need("strengths", bool(config.strengths) and rising, "rise and lie between 0 and 1")
    build(config, dataset, 0)


def build(config: Config, dataset: data.Dataset, seed: int) -> models.Model:
    """Builds the original with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return models.build(config.original, dataset.image_shape, dataset.classes, key)


class Trainer:
    """Trains the networks of one seed; a recipe is made once, so that networks of equal shapes share a program."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        self.examples = arrays(run.dataset.train)
        self.steps = len(self.examples["label"]) // self.config.batch_size
        self.recipes: dict[Any, Any] = {}

    def __call__(
        self,
        name: str,
        seed: int,
        model: models.Model,
        epochs: int,
        learning_rate: float,
        penalty: optax.GradientTransformation | None = None,
    ) -> Trained:
        """Trains a network on the labels; ``penalty`` follows the optimizer."""
        made = epochs, learning_rate, penalty
        if made not in self.recipes:
            tx = adam(learning_rate, epochs, self.steps)
            tx = tx if penalty is None else optax.chain(tx, penalty)
            step = train.make_train_step(train.supervised(), tx)  # (state, batch) -> (state, metrics)
            self.recipes[made] = tx, train.make_epoch(step, transform=plain)
        tx, epoch = self.recipes[made]
        order = 10_000 + seed
        state = train.init_state(model, tx, self.run.key(seed, order))
        done = self.run.fit(
            name, seed, state, epoch, self.examples, epochs=epochs, batch_size=self.config.batch_size, order=order,
        )  # fmt: skip
        return self.run.judge(done.model, done.history, done.seconds)


def penalties(config: Config, run: Run) -> dict[float, optax.GradientTransformation]:
    """Makes the lasso of each strength; its steps follow the learning rate."""
    model = build(config, run.dataset, 0)
    graph = units.trace(model, prepare(run.dataset.train.image[:1]))
    steps = len(run.dataset.train.label) // config.batch_size
    rates = {s: rise_and_fall(s * config.learning_rate, config.epochs, steps) for s in config.strengths}
    return {strength: units.group_lasso(graph, rate) for strength, rate in rates.items()}


def fisher(config: Config, run: Run, seed: int, graph: units.UnitGraph, model: models.Model) -> Any:
    """Scores units by the Fisher information of their weights."""
    rows = np.random.default_rng(seed).permutation(len(run.dataset.train.label))[: config.examples]
    examples = prepare(run.dataset.train.image[rows]), run.dataset.train.label[rows]

    def loss(model: models.Model, example: Any) -> jax.Array:
        image, label = example
        return optax.softmax_cross_entropy_with_integer_labels(model(image[None]), label[None]).mean()

    return units.scores.fisher(graph, model, units.scores.squared_gradients(loss, model, examples))


def accuracy(run: Run, trained: Trained) -> float:
    """Computes the validation accuracy."""
    return float((trained.validation_logits.argmax(-1) == run.dataset.validation.label).mean())


def of_one_seed(
    config: Config, run: Run, fit: Trainer, seed: int, lassos: Mapping[float, Any]
) -> tuple[dict[str, Trained], dict[str, float]]:
    """Trains, prunes and fine-tunes all networks of a seed; also returns the chosen strength of each share."""
    start = build(config, run.dataset, seed)
    of = {"original": fit("original", seed, start, config.epochs, config.learning_rate)}
    for strength, penalty in lassos.items():
        name = f"lasso of {strength:g}"
        of[name] = fit(name, seed, start, config.epochs, config.learning_rate, penalty)
    graph = units.trace(start, prepare(run.dataset.train.image[:1]))
    information = fisher(config, run, seed, graph, of["original"].model)
    strengths: dict[str, float] = {}

    def pruned(name: str, original: models.Model, scores: Any, share: float) -> tuple[Trained, Trained]:
        kept = units.prune(graph, scores, share, across="group")
        small = run.judge(units.keep(graph, original, kept))
        return small, fit(f"{name}, {share:g}", seed, small.model, config.tuning_epochs, config.tuning_rate)

    for share in config.shares:
        original = of["original"].model
        made = {
            "l2": pruned("l2", original, units.scores.l2(graph, original), share),
            "fisher": pruned("fisher", original, information, share),
        }
        tried = {}
        for strength in lassos:
            model = of[f"lasso of {strength:g}"].model
            tried[strength] = pruned(f"lasso of {strength:g}", model, units.scores.l2(graph, model), share)
        chosen = max(tried, key=lambda strength: accuracy(run, tried[strength][1]))
        strengths[f"{share:g}"], made["lasso"] = chosen, tried[chosen]
        kept = units.prune(graph, units.scores.l2(graph, start), share, across="group")
        fresh = fit(
            f"fresh, {share:g}", seed, units.keep(graph, start, kept), config.epochs + config.tuning_epochs,
            config.learning_rate,
        )  # fmt: skip
        for name, (small, tuned) in made.items():
            of |= {f"{name}, {share:g}, as pruned": small, f"{name}, {share:g}, tuned": tuned}
        of[f"fresh, {share:g}, tuned"] = fresh
    return of, strengths


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("group_lasso", name, config, check)
    fit, lassos = Trainer(run), penalties(config, run)
    done = [of_one_seed(config, run, fit, seed, lassos) for seed in range(config.seeds)]
    trained = [of for of, _ in done]
    found = run.evaluate(trained, run.test_logits(trained), reference="original")
    found["strengths"] = {f"{s:g}": [chosen[f"{s:g}"] for _, chosen in done] for s in config.shares}
    entries = found["models"]
    series = {
        f"{method}, {state}": [entries[f"{method}, {share:g}, {state}"] for share in config.shares]
        for method, state in itertools.product(METHODS, ("as pruned", "tuned"))
        if (method, state) != ("fresh", "as pruned")
    }
    for state in ("as pruned", "tuned"):
        errors = {
            name: 100 - 100 * np.array([e["test"]["accuracy"] for e in each]).T
            for name, each in series.items() if name.endswith(state)
        }  # fmt: skip
        pictures.curves(
            run.directory / f"{state.replace(' ', '_')}.png", config.shares, errors, ylabel="test error, %",
            xlabel="share of the units that is left",
        )  # fmt: skip
    seeds = (
        f"mean over {config.seeds} seeds; band: one standard deviation" if config.seeds > 1 else "one seed"
    )
    drawn = {
        f"Test error of the networks as they are pruned, {seeds}": "as_pruned.png",
        f"Test error after fine-tuning, {seeds}": "tuned.png",
    }
    print(
        "Strengths chosen by validation: " + "; ".join(f"at {s} {c}" for s, c in found["strengths"].items())
    )
    run.finish(found, drawn, headline=headline(config, entries), columns=COLUMNS)
    return 0


def headline(config: Config, entries: Mapping[str, Any]) -> str:
    """Says what the lasso gains over the length of the weights, at each share."""
    parts = []
    for share in config.shares:
        a, b = (np.array(entries[f"{m}, {share:g}, tuned"]["test"]["accuracy"]) for m in ("lasso", "l2"))
        parts.append(f"{results.mean_sd(list(a - b), percent=True)} at {share:g}")
    return f"After fine-tuning, points of accuracy that the lasso gains over l2: {', '.join(parts)}."


if __name__ == "__main__":
    run_main(main)

"""Makes a trained network smaller without training, and asks what least squares takes back of what pruning loses.

For each seed an original is trained. At each share of its units it is pruned by weights ("pruned"), corrected by least
squares on training images without their labels ("least squares"), or its units are merged ("merged"). At the same
share of its single weights it is pruned by magnitude, by Wanda, and by SparseGPT, which look at the same
images. Nothing is trained after that. The test set is used for the report only.

    python experiments/prune_without_training.py             # mnist where it can be had, else digits
    python experiments/prune_without_training.py digits      # scikit-learn's digits, an MLP
    python experiments/prune_without_training.py transformer # digits, row by row, by a transformer of two blocks
    python experiments/prune_without_training.py pixels      # digits: the MLP looks at fewer pixels
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import (
    Amount,
    Count,
    Dropout,
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

from distill_jax import data, metrics, models, train
from distill_jax.compress import one_shot, units


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    original: str = "mlp:128,128"  # network to prune: such as mlp:128,128 or convnet:16,32, or transformer
    epochs: Count = 8  # number of epochs to train the original
    learning_rate: Positive = 2e-3  # highest learning rate (Adam, cosine schedule)
    batch_size: Count = 128  # number of examples per step
    dropout: Dropout = 0.0  # fraction of the hidden units that is dropped in training
    shares: tuple[float, ...] = (0.75, 0.5, 0.25)  # shares of the units or weights to keep, falling
    pixels: bool = False  # whether an MLP's pixels are units, too; then scores are weights times mean values
    groups: str = "."  # regular expression for the names of the groups of units that are pruned
    examples: Count = 1024  # number of training images for least squares, merging, Wanda and SparseGPT
    damping: Amount = 0.01
    """how strongly least squares holds the weights where they are, as a share of the inputs' mean square"""
    check: bool = False  # exit with status 1 unless least squares takes back half of what pruning loses


DIGITS = Config(dataset="digits", original="mlp:64,64", epochs=60, batch_size=32)
CONFIGS = {
    "mnist": ("an MLP on MNIST", Config(dataset="mnist")),
    "digits": ("an MLP on scikit-learn's digits, which need no download: a minute", DIGITS),
    "digits_convnet": ("a ConvNet on scikit-learn's digits", replace(DIGITS, original="convnet:16,32")),
    "transformer": ("a transformer on scikit-learn's digits: heads and hidden units go", replace(
        DIGITS, original="transformer", groups=r"\.(q|up)$",
    )),
    "pixels": ("an MLP on scikit-learn's digits that looks at fewer pixels", replace(
        DIGITS, pixels=True, groups="^features",
    )),
}  # fmt: skip
METHODS = ("pruned", "least squares", "merged", "magnitude", "Wanda", "SparseGPT")
WIDTH, HEADS, SIZE, HIDDEN, BLOCKS = 32, 4, 8, 64, 2
COLUMNS: Mapping[str, results.Column] = {
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "agreement %": results.score("agreement", percent=True),
    "NLL": results.score("nll"),
}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size", "examples")
    falling = all(a > b for a, b in itertools.pairwise((1.0, *config.shares, 0.0)))
    config.need("shares", bool(config.shares) and falling, "fall and lie between 0 and 1")
    mlp = config.original.startswith("mlp")
    config.need("pixels", mlp or not config.pixels, "be false where the original is no MLP")
    try:
        re.compile(config.groups)
    except re.error as error:
        raise ValueError(f"--groups must be a regular expression, got {config.groups!r}: {error}") from None
    graph = units.trace(build(config, dataset, 0), prepare(dataset.train.image[:1]))
    config.need("groups", bool(chosen(config, graph)), f"name some of {', '.join(graph.groups)}")


def build(config: Config, dataset: data.Dataset, seed: int) -> models.Model:
    """Builds the original with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), 0)
    if config.original == "transformer":
        return transformer(dataset.image_shape, dataset.classes, key)
    model = models.build(config.original, dataset.image_shape, dataset.classes, key, dropout=config.dropout)
    return by_pixels(model, dataset.image_shape) if config.pixels else model


def by_pixels(model: models.Model, shape: tuple[int, ...]) -> models.Model:
    """Makes the pixels of an MLP's images units."""
    seeing: Any = units.input_features(model, jax.ShapeDtypeStruct((1, math.prod(shape)), jnp.float32))
    return seeing.replace(apply_fn=flattened(seeing.apply_fn))


@functools.cache
def flattened(apply_fn: models.ApplyFn) -> Any:
    """Makes a function of images of one of vectors."""
    return lambda params, state, x, *, key=None: apply_fn(params, state, x.reshape(len(x), -1), key=key)


def transformer(shape: tuple[int, ...], classes: int, key: jax.Array) -> models.Model:
    """Builds a transformer that reads an image row by row."""
    rows, columns = shape[0], shape[1] * shape[2]
    norm = {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}
    shapes: dict[str, Any] = {"embed": (columns, WIDTH), "place": (rows, WIDTH), "out": (WIDTH, classes)}
    block = {
        **dict.fromkeys("qkv", (WIDTH, HEADS, SIZE)), "o": (HEADS, SIZE, WIDTH), "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }  # fmt: skip
    shapes["blocks"] = [block] * BLOCKS
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    sizes = [shape[0] * shape[1] if len(shape) == 3 and shape[2] == WIDTH else shape[0] for shape in leaves]
    keys = jax.random.split(key, len(leaves))
    drawn = [jax.random.normal(k, s) / n**0.5 for k, s, n in zip(keys, leaves, sizes, strict=True)]
    params: Any = jax.tree.unflatten(structure, drawn)
    for each in params["blocks"]:
        each |= {"hidden": jnp.zeros(HIDDEN), "norm1": norm, "norm2": norm}
    return models.from_function(apply_transformer, params | {"norm": norm, "bias": jnp.zeros(classes)})


def apply_transformer(params: Any, x: jax.Array) -> jax.Array:
    """Computes logits of images ``[n, rows, columns, channels]``."""
    x = x.reshape(*x.shape[:2], -1) @ params["embed"] + params["place"]
    for p in params["blocks"]:
        h = normalised(p["norm1"], x)
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bqhk,bthk->bhqt", q, k) / SIZE**0.5)
        x = x + jnp.einsum("bqhk,hkd->bqd", jnp.einsum("bhqt,bthk->bqhk", weights, v), p["o"])
        h = normalised(p["norm2"], x)
        x = x + jax.nn.relu(h @ p["up"] + p["hidden"]) @ p["down"]
    return normalised(params["norm"], x).mean(1) @ params["out"] + params["bias"]


def normalised(p: Any, x: jax.Array) -> jax.Array:
    """Applies layer normalisation."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def chosen(config: Config, graph: units.UnitGraph) -> list[str]:
    """Lists the groups that are pruned: those that can be removed exactly and are asked for."""
    exact = [name for name, group in graph.groups.items() if group.free and group.exact]
    return [name for name in exact if re.search(config.groups, name)]


def prune(config: Config, run: Run, seed: int, original: models.Model) -> dict[str, Trained]:
    """Makes all smaller networks of one original: method and share → network."""
    rows = np.random.default_rng(seed).permutation(len(run.dataset.train.label))[: config.examples]
    x = prepare(run.dataset.train.image[rows])
    graph = units.trace(original, x)
    names = chosen(config, graph)
    values = units.scores.mean_activation(graph, original, x) if config.pixels else {}
    weights = units.scores.l2(graph, original)
    scores = {name: weights[name] * values.get(name, 1.0) for name in names}
    made: dict[str, Trained] = {}
    for share in config.shares:
        kept = units.prune(graph, scores, share, across="group")
        fixed = units.compensate(graph, original, kept, [x], damping=config.damping, by=units.keep).model
        merged, stays = merge(graph, original, x, kept)
        options: dict[str, Any] = {"sparsity": 1 - share}
        wanda = one_shot.wanda(original, [x], **options)
        networks = {
            "pruned": units.keep(graph, original, kept),
            "least squares": units.keep(graph, fixed, kept),
            "merged": units.keep(graph, merged, stays),
            "magnitude": original.replace(params=by_magnitude(original.params, wanda.masks, share)),
            "Wanda": wanda.model,
            "SparseGPT": one_shot.sparsegpt(original, [x], **options).model,
        }
        made |= {f"{name}, {share:g}": run.judge(networks[name]) for name in METHODS}
    return made


def merge(
    graph: units.UnitGraph, model: models.Model, x: jax.Array, kept: Mapping[str, list[int]]
) -> tuple[models.Model, dict[str, list[int]]]:
    """Merges units that are alike; groups that cannot be merged are pruned."""
    values, stays = units.activations(graph, model, x), dict(kept)
    for name, indices in kept.items():
        try:
            model, found = units.merge(
                graph,
                model,
                {name: len(indices)},
                likeness={name: values[name].T} if name in values else None,
            )
        except ValueError:
            continue
        stays |= found
    return model, stays


def by_magnitude(params: Any, masks: Any, share: float) -> Any:
    """Sets the smallest weights of each kernel to zero."""

    def one(w: jax.Array, mask: Any) -> jax.Array:
        if isinstance(mask, optax.MaskedNode):
            return w
        return jnp.where(jnp.abs(w) >= jnp.quantile(jnp.abs(w), 1 - share), w, 0)

    return jax.tree.map(one, params, masks)


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("prune_without_training", name, config, check)
    examples = arrays(run.dataset.train)
    tx = adam(config.learning_rate, config.epochs, len(examples["label"]) // config.batch_size)
    step = train.make_train_step(train.supervised(), tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=plain)
    trained = []
    for seed in range(config.seeds):
        state = train.init_state(build(config, run.dataset, seed), tx, run.key(seed, 10_000 + seed))
        done = run.fit(
            "original", seed, state, epoch, examples, epochs=config.epochs, batch_size=config.batch_size,
            order=10_000 + seed,
        )  # fmt: skip
        original = run.judge(done.model, done.history, done.seconds)
        trained.append({"original": original, **prune(config, run, seed, original.model)})
    found = run.record(evaluated(run, trained), original=[each["original"].seconds for each in trained])
    found["taken back"] = back = taken_back(config, found["models"])
    series = {
        method: [found["models"][f"{method}, {share:g}"] for share in config.shares] for method in METHODS
    }
    accuracies = {
        name: 100 * np.array([e["test"]["accuracy"] for e in each]).T for name, each in series.items()
    }
    pictures.curves(
        run.directory / "accuracy.png", config.shares, accuracies, xlabel="share of units or weights left",
        ylabel="test accuracy without training, %",
    )  # fmt: skip
    seeds = f"mean over {config.seeds} seeds" if config.seeds > 1 else "one seed"
    drawn = {
        f"Test accuracy against the share that is left, {seeds}; band: one standard deviation": "accuracy.png"
    }
    parts = ", ".join(f"{100 * part:.0f} % at {share}" for share, part in back.items())
    headline = f"Without training, least squares takes back of the accuracy that pruning loses: {parts}."
    run.finish(found, drawn, headline=headline, columns=COLUMNS)
    return run.check(
        min(back.values()) >= 0.5, "least squares takes back less than half of what pruning loses"
    )


def evaluated(run: Run, trained: list[dict[str, Trained]]) -> dict[str, Any]:
    """Evaluates all networks of all seeds on the test set."""
    logits, label = run.test_logits(trained), run.dataset.test.label
    table = {}
    for name in trained[0]:
        figures = [
            metrics.figures(seed[name], label, None if name == "original" else seed["original"])
            for seed in logits
        ]
        table[name] = {"test": {figure: [f[figure] for f in figures] for figure in figures[0]}}
    return table


def taken_back(config: Config, entries: Mapping[str, Any]) -> dict[str, float]:
    """Computes which part of the accuracy that pruning loses least squares takes back, from the means over seeds."""

    def accuracy(name: str) -> float:
        return float(np.mean(entries[name]["test"]["accuracy"]))

    found = {}
    for share in config.shares:
        lost = accuracy("original") - accuracy(f"pruned, {share:g}")
        gained = accuracy(f"least squares, {share:g}") - accuracy(f"pruned, {share:g}")
        found[f"{share:g}"] = gained / lost if lost > 0 else 1.0
    return found


if __name__ == "__main__":
    run_main(main)

"""Prints the bytes of a label of each kind, and what a step costs with stored labels and with stored views.

The variants of a step are timed in turn, round after round, so their ratios hold whatever else the machine does:

- stored: the images as they are, with one label each;
- stored, shifted: images that are shifted by the step's key, with the same labels (what the augmentation alone costs);
- views: a view of each image, drawn and made again from its key, with the label of this view;
- online: the same views, labelled by the teacher in the step.

    python experiments/benchmarks/bench_labels.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from distill_jax import _files, data, models, teachers, train
from distill_jax.teachers import kinds

CLASSES, PIXELS = 10, 2
# Teacher, student, image shape, batch size
PAIRS = {
    "mlp": ("mlp:1200,1200", "mlp:800,800", (28, 28, 1), 128),
    "vgg": ("vgg8:0.5", "vgg8:0.25", (32, 32, 1), 128),
}


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    pairs: tuple[str, ...] = ("mlp", "vgg")  # which teachers and students
    classes: tuple[int, ...] = (10, 62, 1000, 32_000)  # numbers of classes for the table of bytes
    views: int = 8  # number of views per image
    examples: int = 1024  # number of images
    seconds: float = 0.5  # length of one timing
    rounds: int = 9  # number of timings of each variant; 0 prints the bytes alone
    out: Path | None = None  # JSON file for the figures


def bytes_per_label(classes: int) -> dict[str, int]:
    """Writes a store of each kind, and returns the number of bytes that it reports per label."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, classes)).astype(np.float32)
    hidden = rng.normal(size=(4, 256)).astype(np.float32)
    made: dict[str, tuple[kinds.Kind, Any]] = {
        "Logits()": (kinds.Logits(), logits),
        "Top(5)": (kinds.Top(5), logits),
        "Top(50)": (kinds.Top(min(50, classes)), logits),
        "Sampled(20)": (kinds.Sampled(20), logits),
        "Sampled(50)": (kinds.Sampled(50), logits),
        "Hidden, 256 units": (kinds.Hidden(np.ones((256, classes), np.float32)), hidden),
        "Features, 256 units": (kinds.Features(), {"logits": logits, "features": {"hidden": hidden}}),
    }
    found = {}
    for dtype in ("float32", "bfloat16"):
        for name, (kind, given) in made.items():
            with tempfile.TemporaryDirectory() as folder:
                store = teachers.write_labels(
                    folder, np.arange(4), lambda rows, g=given: g, fingerprint={}, kind=kind, dtype=dtype
                )
                found[f"{name}, {dtype}"] = store.bytes_per_label
    return found


def shift(key: jax.Array, image: jax.Array) -> jax.Array:
    """Shifts one image by up to two pixels."""
    return data.random_shift(key, image[None], PIXELS)[0]


def variants(pair: str, config: Config) -> dict[str, Callable[[np.ndarray], Any]]:
    """Builds the timed functions: each makes one step per row of ``order`` and waits for them."""
    *descriptions, shape, _ = PAIRS[pair]
    teacher, student = (
        models.build(name, shape, CLASSES, jax.random.key(seed)) for seed, name in enumerate(descriptions)
    )
    rng, n, views = (np.random.default_rng(0), config.examples, teachers.Views(shift, config.views))
    image = rng.random((n, *shape), np.float32)
    labels = rng.normal(size=(n, config.views, CLASSES)).astype(np.float32) * 3
    tx = optax.sgd(0.01, momentum=0.9)
    step = train.make_train_step(train.distill(alpha=0.0), tx)

    def shifted(context, batch, key):
        return {**batch, "image": data.random_shift(key, batch["image"], PIXELS)}

    def steps_of(examples, transform=None, context=None):
        epoch = train.make_epoch(step, transform=transform)
        state = train.init_state(student, tx, jax.random.key(0))
        examples, context = jax.tree.map(jnp.asarray, (examples, context))

        def run(order):
            nonlocal state
            state, _ = jax.block_until_ready(epoch(state, examples, order, context))

        return run

    one = {"image": image, "teacher": labels[:, 0]}
    viewed = {"image": image} | views.fields(np.arange(n))
    return {
        "stored": steps_of(one),
        "stored, shifted": steps_of(one, shifted),
        "views": steps_of(viewed, views.transform, labels),
        "online": steps_of(viewed, views.transform, teacher),
    }


def measure(pair: str, config: Config) -> dict[str, np.ndarray]:
    """Times the variants of a pair: milliseconds per step, ``[rounds]`` each."""
    runs, batch = variants(pair, config), PAIRS[pair][-1]
    orders = {}
    for name, run in runs.items():
        order = train.epoch_order(0, 0, config.examples, batch)
        run(order)
        start = time.perf_counter()
        run(order)
        times = max(1, round(config.seconds / (time.perf_counter() - start)))
        orders[name] = np.tile(order, (times, 1))
        run(orders[name])
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(orders[name])
            milliseconds[name].append((time.perf_counter() - start) / len(orders[name]) * 1e3)
    return {name: np.array(values) for name, values in milliseconds.items()}


def main() -> None:
    """Prints the tables."""
    config = tyro.cli(Config, description=__doc__)
    if min(config.views, config.examples, *config.classes) < 1 or config.rounds < 0:
        sys.exit("error: --views, --examples and --classes must be positive, --rounds not negative")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    if unknown := set(config.pairs) - PAIRS.keys():
        sys.exit(f"error: --pairs must be some of {', '.join(PAIRS)}, got {', '.join(sorted(unknown))}")
    sizes = [bytes_per_label(classes) for classes in config.classes]
    print(f"| bytes per label, classes: | {' | '.join(f'{classes:,}' for classes in config.classes)} |")
    print("| --- |" + " ---: |" * len(sizes))
    for name in sizes[0]:
        print(f"| {name} | {' | '.join(f'{size[name]:,}' for size in sizes)} |")
    bytes_of = {str(classes): size for classes, size in zip(config.classes, sizes, strict=True)}
    report: dict[str, Any] = {"bytes_per_label": bytes_of, "milliseconds": {}}
    if config.rounds:
        print("\n| step | ms | over stored, median (range) |\n| --- | ---: | ---: |", flush=True)
    for pair in config.pairs if config.rounds else ():
        found = measure(pair, config)
        report["milliseconds"][pair] = {name: times.tolist() for name, times in found.items()}
        for name, times in found.items():
            ratios = times / found["stored"]
            print(
                f"| {pair}, {name} | {np.median(times):.2f} | "
                f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) |",
                flush=True,
            )
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

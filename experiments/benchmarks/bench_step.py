"""Measures the cost of a training step: plain, distilled from stored labels, distilled online.

All variants of a pair of networks are timed in turn, round after round, in one process. So what else the machine does
falls on all of them, and ratios that are taken round by round hold.

    python experiments/benchmarks/bench_step.py
    python experiments/benchmarks/bench_step.py --peer torch --out bench.json    # where PyTorch is installed
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

from distill_jax import _files, models, teachers, train

PAIRS = {"mlp": ("mlp:1200,1200", "mlp:800,800"), "convnet": ("convnet:32,64", "convnet:8,16")}
CLASSES, SHAPE, EXAMPLES, LEARNING_RATE, MOMENTUM = 10, (28, 28, 1), 4096, 0.01, 0.9
VARIANTS = ("plain", "stored", "online", "teacher forward")


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    pair: Literal["mlp", "convnet", "both"] = "both"
    """which teacher and student: MLPs of 1200-1200 and 800-800 units, convnets of 32-64 and 8-16 channels, or both"""
    batch_size: int = 128  # number of examples per step
    steps: int = 40  # number of steps in one timing
    rounds: int = 9  # number of timings of each variant
    peer: Literal["none", "torch"] = "none"  # also time the same steps in PyTorch, eager and compiled
    out: Path | None = None  # JSON file for the figures


def make_arrays() -> dict[str, np.ndarray]:
    """Draws random examples; the cost of a step does not depend on their values."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.random((EXAMPLES, *SHAPE), np.float32),
        "label": rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
        "teacher": rng.normal(size=(EXAMPLES, CLASSES)).astype(np.float32) * 3,
    }


def jax_variants(pair: str, order: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Builds the timed functions: each makes ``len(order)`` steps and waits for them."""
    teacher, student = (
        models.build(name, SHAPE, CLASSES, jax.random.key(i)) for i, name in enumerate(PAIRS[pair])
    )
    arrays = jax.tree.map(jnp.asarray, make_arrays())
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    soft = train.distill(temperature=4.0, alpha=0.0)

    def steps_of(step, state, transform=None, context=None):
        epoch = train.make_epoch(step, transform=transform)

        def run():
            nonlocal state
            state, _ = jax.block_until_ready(epoch(state, arrays, order, context))

        return run

    def steps_of_student(loss_fn, **options):
        state = train.init_state(student, tx, jax.random.key(0))
        return steps_of(train.make_train_step(loss_fn, tx), state, **options)

    def forward(state, batch):
        return state, {"mean": jnp.mean(teachers.label(state.model, batch)["teacher"])}

    def online(teacher, batch, key):
        return teachers.label(teacher, batch)

    return {
        "plain": steps_of_student(train.supervised()),
        "stored": steps_of_student(soft),
        "online": steps_of_student(soft, transform=online, context=teacher),
        "teacher forward": steps_of(forward, train.init_state(teacher, optax.identity(), jax.random.key(0))),
    }


def torch_variants(pair: str, order: np.ndarray, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Builds the same in PyTorch, written as its users write it."""
    import torch
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    def network(description):
        family, _, sizes = description.partition(":")
        widths = [int(size) for size in sizes.split(",")]
        if family == "mlp":
            widths = [int(np.prod(SHAPE)), *widths]
            layers: list[Any] = [nn.Flatten()]
            for a, b in itertools.pairwise(widths):
                layers += [nn.Linear(a, b), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES))
        channels, layers = [SHAPE[2], *widths], []
        for a, b in itertools.pairwise(channels):
            layers += [nn.Conv2d(a, b, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        flat = (SHAPE[0] >> len(widths)) * (SHAPE[1] >> len(widths)) * widths[-1]
        dense = [nn.Flatten(), nn.Linear(flat, 128), nn.ReLU(), nn.Linear(128, CLASSES)]
        return nn.Sequential(*layers, *dense)

    arrays = {name: torch.from_numpy(values) for name, values in make_arrays().items()}
    images = arrays["image"].permute(0, 3, 1, 2).contiguous()
    labels = arrays["label"].long()
    batches = [torch.from_numpy(rows).long() for rows in order]
    teacher = network(PAIRS[pair][0]).eval()

    def kl(logits, targets, temperature=4.0):
        student = F.log_softmax(logits / temperature, -1)
        target = F.log_softmax(targets / temperature, -1)
        kl_div = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return temperature**2 * kl_div

    def variant(name):
        student = network(PAIRS[pair][1])
        optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE, momentum=MOMENTUM)

        def loss_of(x, y, stored):
            if name == "plain":
                return F.cross_entropy(student(x), y)
            if name == "online":
                with torch.no_grad():
                    stored = teacher(x)
            return kl(student(x), stored)

        loss_of = torch.compile(loss_of) if compiled else loss_of

        def run():
            for rows in batches:
                optimizer.zero_grad(set_to_none=True)
                loss_of(images[rows], labels[rows], arrays["teacher"][rows]).backward()
                optimizer.step()

        return run

    forward = torch.compile(teacher) if compiled else teacher

    def run_teacher():
        with torch.no_grad():
            for rows in batches:
                forward(images[rows]).mean()

    return {**{name: variant(name) for name in VARIANTS[:3]}, "teacher forward": run_teacher}


def measure(variants: dict[str, Callable[[], Any]], config: Config) -> dict[str, np.ndarray]:
    """Times every variant in turn: milliseconds per step, ``[rounds]`` each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for name in tqdm.tqdm(variants, desc="compiling", leave=False, disable=None):
        variants[name]()
    for _ in tqdm.trange(config.rounds, desc="rounds", leave=False, disable=None):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / config.steps * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def ratios(times: dict[str, np.ndarray], systems: list[str]) -> dict[str, np.ndarray]:
    """Takes the ratios that are wanted, round by round."""
    t = times
    result = {
        "stored / plain": t["jax stored"] / t["jax plain"],
        "online / (plain + teacher forward)": t["jax online"] / (t["jax plain"] + t["jax teacher forward"]),
    }
    for system in systems:
        for name in VARIANTS:
            result[f"{system} / jax, {name}"] = t[f"{system} {name}"] / t[f"jax {name}"]
    return result


def main() -> None:
    """Runs the benchmark."""
    config = tyro.cli(Config, description=__doc__)
    if min(config.batch_size, config.steps, config.rounds) < 1 or config.batch_size > EXAMPLES:
        sys.exit(f"error: --batch-size must be 1 to {EXAMPLES}, --steps and --rounds at least 1")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    systems: list[str] = []
    if config.peer == "torch":
        try:
            import torch
        except ImportError:
            sys.exit("error: --peer torch needs PyTorch: pip install torch")
        systems = ["torch eager", "torch compile"]
        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    rng = np.random.default_rng(0)
    order = rng.integers(0, EXAMPLES, (config.steps, config.batch_size)).astype(np.int32)
    report: dict[str, Any] = {
        "environment": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "pairs": {},
    }
    for pair in PAIRS if config.pair == "both" else (config.pair,):
        timed = {f"jax {name}": run for name, run in jax_variants(pair, order).items()}
        for system in systems:
            variants = torch_variants(pair, order, compiled=system == "torch compile")
            timed |= {f"{system} {name}": run for name, run in variants.items()}
        times = measure(timed, config)
        compared = ratios(times, systems)
        teacher, student = PAIRS[pair]
        print(f"\n{teacher} → {student}, batch {config.batch_size}: ms per step, median (min to max)")
        for name, values in times.items():
            print(f"  {name:30} {np.median(values):8.2f}  ({values.min():.2f} to {values.max():.2f})")
        print("ratios, median of rounds (min to max)")
        for name, values in compared.items():
            print(f"  {name:36} {np.median(values):6.2f}  ({values.min():.2f} to {values.max():.2f})")
        report["pairs"][pair] = {
            "milliseconds": {name: values.tolist() for name, values in times.items()},
            "ratios": {name: values.tolist() for name, values in compared.items()},
        }
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

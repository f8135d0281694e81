"""Measures the cost of a training step: plain, distilled from stored labels, distilled online.

All variants of a pair of networks are timed in turn, round after round, in one process. So what else the machine does
falls on all of them, and ratios that are taken round by round hold.

    python experiments/benchmarks/bench_step.py
    python experiments/benchmarks/bench_step.py --peer torch --out bench.json    # where PyTorch is installed
"""

from __future__ import annotations

import itertools
import os
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
from flax import nnx

from distill_jax import _files, metrics, models, teachers, train

CLASSES, EXAMPLES, LEARNING_RATE, MOMENTUM = 10, 1024, 0.01, 0.9
VARIANTS = ("plain", "stored", "online", "teacher forward")
# Pair → teacher, student, image shape, batch size
PAIRS = {
    "mlp": ("mlp:1200,1200", "mlp:800,800", (28, 28, 1), 128),
    "characters": ("characters:512,128", "characters:512", (32, 32, 1), 128),
    "vgg": ("vgg8:0.5", "vgg8:0.25", (32, 32, 1), 128),
    "resnet": ("resnet32x4", "resnet8x4", (32, 32, 3), 32),
    "transformer": ("transformer:256,4", "transformer:128,2", (32, 32, 1), 128),
}


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    pair: Literal["mlp", "characters", "vgg", "resnet", "transformer", "all"] = "all"
    """which teacher and student: MLPs of 1200-1200 and 800-800 units; two convolutions (32, 64) and dense layers; VGG-8
    of half and a quarter of its width; ResNet-32×4 and 8×4; transformers of 4 and 2 layers, or all of them"""
    batch_size: int | None = None  # number of examples per step; None for the pair's own
    seconds: float = 0.5  # length of one timing; its number of steps follows from the first ones
    rounds: int = 9  # number of timings of each variant
    peer: Literal["none", "torch-eager", "torch"] = "none"  # also time PyTorch: eager, or eager and compiled
    out: Path | None = None  # JSON file for the figures


class Block(nnx.Module):
    """A transformer layer: attention and two dense layers, each after a normalisation and with a shortcut."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=width, decode=False, rngs=rngs)
        self.dense = nnx.List(
            nnx.Linear(a, b, rngs=rngs) for a, b in ((width, 4 * width), (4 * width, width))
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, width]`` to the same shape."""
        x = x + self.attention(self.norms[0](x))
        return x + self.dense[1](nnx.relu(self.dense[0](self.norms[1](x))))


class Transformer(nnx.Module):
    """Rows of an image as tokens, transformer layers, and a dense layer on the mean over tokens."""

    def __init__(self, shape: tuple[int, int, int], sizes: list[int], rngs: nnx.Rngs):
        width, depth = sizes
        self.embed = nnx.Linear(shape[1] * shape[2], width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs) for _ in range(depth))
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = self.embed(x.reshape(*x.shape[:2], -1))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def build(description: str, shape: tuple[int, int, int], seed: int) -> models.Model:
    """Builds a network of a pair."""
    family, _, sizes = description.partition(":")
    if family != "transformer":
        return models.build(description, shape, CLASSES, jax.random.key(seed))
    return models.from_nnx(Transformer(shape, [int(size) for size in sizes.split(",")], nnx.Rngs(seed)))


def make_arrays(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Draws random examples; the cost of a step does not depend on their values."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.random((EXAMPLES, *shape), np.float32),
        "label": rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
        "teacher": rng.normal(size=(EXAMPLES, CLASSES)).astype(np.float32) * 3,
    }


def jax_variants(pair: str) -> dict[str, Callable[[np.ndarray], Any]]:
    """Builds the timed functions: each makes one step per row of ``order`` and waits for them."""
    *descriptions, shape, _ = PAIRS[pair]
    teacher, student = (build(name, shape, seed) for seed, name in enumerate(descriptions))
    arrays = jax.tree.map(jnp.asarray, make_arrays(shape))
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    soft = train.distill(temperature=4.0, alpha=0.0)

    def steps_of(step, state, transform=None, context=None):
        epoch = train.make_epoch(step, transform=transform)
        state = jax.tree.map(jnp.copy, state)  # each variant donates its own

        def run(order):
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


def torch_network(description: str, shape: tuple[int, int, int]) -> Any:
    """Builds the same network in PyTorch, written as its users write it."""
    from torch import nn
    from torch.nn import functional as F  # noqa: N812

    def dense(*sizes):
        layers: list[Any] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return layers[:-1]

    def unit(a, b, stride=1, bias=False):
        return [nn.Conv2d(a, b, 3, stride, 1, bias=bias), nn.BatchNorm2d(b), nn.ReLU()]

    class Residual(nn.Module):
        def __init__(self, a, b, stride):
            super().__init__()
            self.body = nn.Sequential(*unit(a, b, stride), *unit(b, b)[:-1])
            self.shortcut = nn.Identity()
            if stride != 1 or a != b:
                self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

        def forward(self, x):
            return F.relu(self.body(x) + self.shortcut(x))

    class Rows(nn.Module):
        def __init__(self, width, depth):
            super().__init__()
            self.embed, self.head = nn.Linear(shape[1], width), nn.Linear(width, CLASSES)
            self.blocks = nn.Sequential(
                *(
                    nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
                    for _ in range(depth)
                )
            )

        def forward(self, x):
            return self.head(self.blocks(self.embed(x[:, 0])).mean(1))

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    family, _, sizes = description.partition(":")
    height, width, channels = shape
    if family.startswith("vgg"):
        widths = [round(c * float(sizes)) for c in (64, 128, 256, 512, 512)]
        layers: list[Any] = []
        for i, (a, b) in enumerate(zip([channels, *widths], widths, strict=False)):
            layers += [*([nn.MaxPool2d(2)] if 1 <= i <= 3 else []), *unit(a, b, bias=True)]
        return nn.Sequential(*layers, Mean(), nn.Linear(widths[-1], CLASSES))
    if family.startswith("resnet"):
        layers, a = unit(channels, 32), 32
        for i, b in enumerate((64, 128, 256)):
            for j in range((int(family[6:-2]) - 2) // 6):
                layers.append(Residual(a, b, 2 if i and not j else 1))
                a = b
        return nn.Sequential(*layers, Mean(), nn.Linear(a, CLASSES))
    numbers = [int(size) for size in sizes.split(",")]
    if family == "mlp":
        return nn.Sequential(nn.Flatten(), *dense(height * width * channels, *numbers, CLASSES))
    if family == "transformer":
        return Rows(*numbers)
    convolutions = [
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
    ]
    flat = height // 2 * (width // 2) * 64
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *dense(flat, *numbers, CLASSES))


def torch_variants(pair: str, compiled: bool) -> dict[str, Callable[[np.ndarray], Any]]:
    """Builds the timed functions in PyTorch."""
    import torch
    from torch.nn import functional as F  # noqa: N812

    *descriptions, shape, _ = PAIRS[pair]
    arrays = {name: torch.from_numpy(values) for name, values in make_arrays(shape).items()}
    images = arrays["image"].permute(0, 3, 1, 2).contiguous()
    labels = arrays["label"].long()
    teacher = torch_network(descriptions[0], shape).eval()

    def kl(logits, targets, temperature=4.0):
        student = F.log_softmax(logits / temperature, -1)
        target = F.log_softmax(targets / temperature, -1)
        kl_div = F.kl_div(student, target, reduction="batchmean", log_target=True)
        return temperature**2 * kl_div

    def variant(name):
        student = torch_network(descriptions[1], shape)
        optimizer = torch.optim.SGD(student.parameters(), LEARNING_RATE, momentum=MOMENTUM)

        def loss_of(x, y, stored):
            if name == "plain":
                return F.cross_entropy(student(x), y)
            if name == "online":
                with torch.no_grad():
                    stored = teacher(x)
            return kl(student(x), stored)

        loss_of = torch.compile(loss_of) if compiled else loss_of

        def run(order):
            for rows in torch.from_numpy(order).long():
                optimizer.zero_grad(set_to_none=True)
                loss_of(images[rows], labels[rows], arrays["teacher"][rows]).backward()
                optimizer.step()

        return run

    forward = torch.compile(teacher) if compiled else teacher

    def run_teacher(order):
        with torch.no_grad():
            for rows in torch.from_numpy(order).long():
                forward(images[rows]).mean()

    return {**{name: variant(name) for name in VARIANTS[:3]}, "teacher forward": run_teacher}


def machine_limits() -> dict[str, float]:
    """Measures what the machine can do at most: matrix products (GFLOP/s) and copies (GB/s read and written)."""
    matrix, vector, product = jnp.ones((2048, 2048)), jnp.ones(2**25), jax.jit(jnp.matmul)
    seconds = metrics.timings([lambda: product(matrix, matrix), lambda: jnp.copy(vector)], repeats=7).min(0)
    return {"gflops": 2 * 2048**3 / seconds[0] / 1e9, "gigabytes": 2 * vector.nbytes / seconds[1] / 1e9}


def ideal_milliseconds(pair: str, batch: int, gflops: float) -> dict[str, float]:
    """The time per step if all products ran at the machine's rate: a gradient costs twice the forward pass."""
    *descriptions, shape, _ = PAIRS[pair]
    x = jnp.zeros((batch, *shape))

    def ideal(description: str) -> float:
        program = jax.jit(lambda model, x: model(x)).lower(build(description, shape, 0), x).compile()
        costs: Any = program.cost_analysis()
        return costs["flops"] / gflops / 1e6

    teacher, student = map(ideal, descriptions)
    return {
        "plain": 3 * student,
        "stored": 3 * student,
        "online": 3 * student + teacher,
        "teacher forward": teacher,
    }


def measure(
    variants: dict[str, Callable[[np.ndarray], Any]], batch: int, config: Config
) -> dict[str, np.ndarray]:
    """Times every variant in turn: milliseconds per step, ``[rounds]`` each."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in variants}
    orders = {}
    for name in tqdm.tqdm(variants, desc="compiling", leave=False, disable=None):
        order = rng.integers(0, EXAMPLES, (1, batch)).astype(np.int32)
        variants[name](order)
        start = time.perf_counter()
        variants[name](order)
        steps = max(1, round(config.seconds / (time.perf_counter() - start)))
        orders[name] = rng.integers(0, EXAMPLES, (steps, batch)).astype(np.int32)
        variants[name](orders[name])
    for _ in tqdm.trange(config.rounds, desc="rounds", leave=False, disable=None):
        for name, run in variants.items():
            time.sleep(0.05)  # PyTorch's threads spin for a while after their work
            start = time.perf_counter()
            run(orders[name])
            times[name].append((time.perf_counter() - start) / len(orders[name]) * 1e3)
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
    if not 1 <= (config.batch_size or 1) <= EXAMPLES or config.rounds < 1 or config.seconds <= 0:
        sys.exit(f"error: --batch-size must be 1 to {EXAMPLES}, --rounds at least 1, --seconds above 0")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    systems: list[str] = []
    versions = {"jax": jax.__version__}
    if config.peer != "none":
        try:
            import torch
        except ImportError:
            sys.exit(f"error: --peer {config.peer} needs PyTorch: pip install torch")
        systems = ["torch eager", "torch compile"] if config.peer == "torch" else ["torch eager"]
        versions |= {"torch": torch.__version__, "torch threads": torch.get_num_threads()}
    limits = machine_limits()
    print(", ".join(f"{name} {version}" for name, version in versions.items()), end="; ")
    print(f"products {limits['gflops']:.0f} GFLOP/s, copies {limits['gigabytes']:.0f} GB/s")
    environment = {**versions, "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    report: dict[str, Any] = {"environment": environment, "limits": limits, "pairs": {}}
    for pair in PAIRS if config.pair == "all" else (config.pair,):
        teacher, student, _, batch = PAIRS[pair]
        batch = config.batch_size or batch
        timed = {f"jax {name}": run for name, run in jax_variants(pair).items()}
        for system in systems:
            variants = torch_variants(pair, compiled=system == "torch compile")
            timed |= {f"{system} {name}": run for name, run in variants.items()}
        times = measure(timed, batch, config)
        compared = ratios(times, systems)
        ideal = ideal_milliseconds(pair, batch, limits["gflops"])
        print(
            f"\n{teacher} → {student}, batch {batch}: ms per step, median (min to max), share of the products' limit"
        )
        for name, values in times.items():
            share = ideal[next(v for v in VARIANTS if name.endswith(v))] / np.median(values)
            spread = f"({values.min():.2f} to {values.max():.2f})"
            print(f"  {name:30} {np.median(values):8.2f}  {spread:22} {share:6.1%}")
        print("ratios, median of rounds (min to max)")
        for name, values in compared.items():
            print(f"  {name:36} {np.median(values):6.2f}  ({values.min():.2f} to {values.max():.2f})")
        report["pairs"][pair] = {
            "milliseconds": {name: values.tolist() for name, values in times.items()},
            "ratios": {name: values.tolist() for name, values in compared.items()},
            "ideal milliseconds": ideal,
        }
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

"""Measures the cost of a training step: plain, distilled from stored labels, distilled online.

All variants of a pair of networks are timed in turn, round after round. So what else the machine does falls on all of
them, and ratios that are taken round by round hold. Each system has a process of its own, set up as its users have it.
The examples are in memory, every system gets the same batches, and its networks are written as its users write them:

- distill_jax: one call of an epoch of ``train.make_epoch`` (``teacher forward``: the logits alone; ``captured``:
  these and the values of a layer in the middle), after ``train.keep_memory`` as in the experiments, unless
  ``--no-keep-memory``.
- torch-eager, torch-compile: a loop of loss, ``backward`` and ``optimizer.step``, PyTorch's usual formula of KL.
- keras: ``fit`` of ``keras.distillation.Distiller`` with ``LogitsDistillation``, on Keras' JAX backend, from a
  generator of batches, online only. It is slower with ``train_on_batch``, and no faster from whole arrays.
- torchdistill: a loop of ``DistillationBox.forward_process`` and ``post_forward_process`` with ``KDLoss``, online only,
  without torchdistill's own data loader.

The losses of the last two have other factors than ours. That changes what is learnt, and not what a step costs.

    python experiments/benchmarks/bench_step.py
    python experiments/benchmarks/bench_step.py --peers torch-eager keras --out step.json
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx

from distill_jax import _files, features, metrics, models, teachers, train

CLASSES, EXAMPLES, LEARNING_RATE, MOMENTUM = 10, 1024, 0.01, 0.9
VARIANTS = ("plain", "stored", "online", "teacher forward")
OURS = "distill_jax"
# Peer → its package, and what pip installs
PEERS = {
    "torch-eager": ("torch", "torch"),
    "torch-compile": ("torch", "torch"),
    "keras": ("keras", "keras"),
    "torchdistill": ("torchdistill", "torchdistill torchvision"),
}
Variants = dict[str, Callable[[np.ndarray], Any]]  # name → makes a step for each row of numbers of examples
Timed = dict[str, Callable[[np.ndarray], float]]  # system and name → the seconds that these steps take
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
    peers: tuple[Literal["torch-eager", "torch-compile", "keras", "torchdistill"], ...] = ()
    """other systems to time beside ours"""
    keep_memory: bool = True  # whether our process keeps freed memory, as experiments do
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


def jax_variants(pair: str) -> Variants:
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

    def captured(state, batch):
        logits, values = state.model(batch["image"])
        return state, {"mean": jnp.mean(logits), "value": jnp.mean(values[middle][0])}

    shapes = features.layer_shapes(teacher, arrays["image"][:1])
    middle = list(shapes)[len(shapes) // 2]
    capturing = features.capture(teacher, middle)

    def online(teacher, batch, key):
        return teachers.label(teacher, batch)

    return {
        "plain": steps_of_student(train.supervised()),
        "stored": steps_of_student(soft),
        "online": steps_of_student(soft, transform=online, context=teacher),
        "teacher forward": steps_of(forward, train.init_state(teacher, optax.identity(), jax.random.key(0))),
        "captured": steps_of(captured, train.init_state(capturing, optax.identity(), jax.random.key(0))),
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


def torch_variants(pair: str, compiled: bool) -> Variants:
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


def torchdistill_variants(pair: str) -> Variants:
    """Builds the timed function in torchdistill, whose configuration is a dict."""
    import torch
    from torchdistill.core.distillation import DistillationBox

    teacher, student, shape, _ = PAIRS[pair]
    arrays = make_arrays(shape)
    images = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(arrays["label"]).long()
    where = {
        f"{kind}_module_{part}": value
        for kind in ("student", "teacher")
        for part, value in (("path", "."), ("io", "output"))
    }
    loss = {"key": "KDLoss", "kwargs": {**where, "temperature": 4.0, "alpha": 0.0}}
    box = DistillationBox(
        torch_network(teacher, shape).eval(),
        torch_network(student, shape),
        dataset_dict={},
        train_config={
            "num_epochs": 1,
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "SGD", "kwargs": {"lr": LEARNING_RATE, "momentum": MOMENTUM}},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}},
            },
        },
        device=torch.device("cpu"),
        device_ids=None,
        distributed=False,
        lr_factor=1.0,
    )

    def run(order):
        box.pre_epoch_process(epoch=0)
        for rows in torch.from_numpy(order).long():
            box.post_forward_process(box.forward_process(images[rows], labels[rows], supp_dict={}))

    return {"online": run}


def keras_network(description: str, shape: tuple[int, int, int]) -> Any:
    """Builds the same network in Keras."""
    import keras
    from keras import layers

    def unit(x, width, stride=1, bias=False):
        x = layers.Conv2D(width, 3, stride, padding="same", use_bias=bias)(x)
        return layers.BatchNormalization()(x)

    family, _, sizes = description.partition(":")
    x = inputs = keras.Input(shape)
    if family.startswith("vgg"):
        for i, width in enumerate(round(c * float(sizes)) for c in (64, 128, 256, 512, 512)):
            x = layers.MaxPooling2D()(x) if 1 <= i <= 3 else x
            x = layers.ReLU()(unit(x, width, bias=True))
        x = layers.GlobalAveragePooling2D()(x)
    elif family.startswith("resnet"):
        x = layers.ReLU()(unit(x, 32))
        for i, width in enumerate((64, 128, 256)):
            for j in range((int(family[6:-2]) - 2) // 6):
                stride = 2 if i and not j else 1
                body = unit(layers.ReLU()(unit(x, width, stride)), width)
                if not j:
                    x = layers.Conv2D(width, 1, stride, use_bias=False)(x)
                    x = layers.BatchNormalization()(x)
                x = layers.ReLU()(layers.Add()([x, body]))
        x = layers.GlobalAveragePooling2D()(x)
    elif family == "transformer":
        width, depth = (int(size) for size in sizes.split(","))
        x = layers.Dense(width)(layers.Reshape((shape[0], shape[1] * shape[2]))(x))
        for _ in range(depth):
            y = layers.LayerNormalization()(x)
            x = layers.Add()([x, layers.MultiHeadAttention(4, width // 4)(y, y)])
            y = layers.Dense(4 * width, "relu")(layers.LayerNormalization()(x))
            x = layers.Add()([x, layers.Dense(width)(y)])
        x = layers.GlobalAveragePooling1D()(x)
    else:
        if family == "characters":
            for width in (32, 64):
                x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Flatten()(x)
        for size in sizes.split(","):
            x = layers.Dense(int(size), "relu")(x)
    return keras.Model(inputs, layers.Dense(CLASSES)(x))


def keras_variants(pair: str) -> Variants:
    """Builds the timed function in Keras."""
    import keras

    *descriptions, shape, _ = PAIRS[pair]
    arrays = make_arrays(shape)
    distiller = keras.distillation.Distiller(
        *(keras_network(description, shape) for description in descriptions),
        keras.distillation.LogitsDistillation(temperature=4.0),
        student_loss_weight=0.0,
    )
    distiller.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )

    def run(order):
        batches = ((arrays["image"][rows], arrays["label"][rows]) for rows in order)
        distiller.fit(batches, steps_per_epoch=len(order), shuffle=False, verbose=0)

    return {"online": run}


def variants_of(system: str, pair: str) -> Variants:
    """Builds the timed functions of a system."""
    if system == OURS:
        return jax_variants(pair)
    if system == "keras":
        return keras_variants(pair)
    if system == "torchdistill":
        return torchdistill_variants(pair)
    return torch_variants(pair, compiled=system == "torch-compile")


def complaint(error: Exception) -> str:
    """Says in one line what an error says, of whatever library it is."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def serve(connection: Connection, system: str, pair: str, batch: int, keep_memory: bool) -> None:
    """Runs in the process of a system: builds its timed functions, and then times whichever is asked for."""
    try:
        if keep_memory:
            train.keep_memory()
        variants = variants_of(system, pair)
        for run in variants.values():
            run(np.zeros((1, batch), np.int32))
    except Exception as error:
        connection.send(complaint(error))
        return
    connection.send(list(variants))
    for name, order in iter(connection.recv, None):
        start = time.perf_counter()
        variants[name](order)
        connection.send(time.perf_counter() - start)


def received(connection: Connection, what: str) -> Any:
    """Waits for what a process sends; where it has ended instead, so does the benchmark. Earlier pairs are kept."""
    try:
        return connection.recv()
    except EOFError:
        sys.exit(f"error: the process that worked on {what} has ended: leave that system or pair out")


@contextmanager
def systems_at_work(systems: Iterable[str], pair: str, batch: int, keep_memory: bool) -> Iterator[Timed]:
    """Starts a process for each system, and gives the functions that time its variants; one that fails is named."""
    context = multiprocessing.get_context("spawn")
    workers: list[tuple[Connection, Any]] = []
    timed: Timed = {}
    try:
        for system in tqdm.tqdm(systems, desc="compiling", leave=False, disable=None):
            ours, theirs = context.Pipe()
            arguments = theirs, system, pair, batch, keep_memory and system == OURS
            worker = context.Process(target=serve, args=arguments, daemon=True)
            worker.start()
            theirs.close()
            workers.append((ours, worker))
            answer = received(ours, system)
            if isinstance(answer, str):
                if system == OURS:
                    sys.exit(f"error: {answer}")
                tqdm.tqdm.write(f"{system} is left out: {answer}", file=sys.stderr)
                continue

            def seconds(order: np.ndarray, name: str, connection: Connection = ours) -> float:
                connection.send((name, order))
                return received(connection, name)

            timed |= {f"{system} {name}": functools.partial(seconds, name=name) for name in answer}
        yield timed
    finally:
        for connection, worker in workers:
            if worker.is_alive():
                connection.send(None)
            worker.join()


def import_peers(peers: Iterable[str]) -> dict[str, str]:
    """Looks for the peers, and names those that are not installed: peer → version."""
    versions = {}
    for peer in peers:
        package, packages = PEERS[peer]
        try:
            versions[peer] = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            print(f"{peer} is left out: pip install {packages}", file=sys.stderr)
    return versions


def machine_limits() -> dict[str, float]:
    """Measures what the machine can do at most: matrix products (GFLOP/s) and copies (GB/s read and written)."""
    matrix, vector, product = jnp.ones((2048, 2048)), jnp.ones(2**25), jax.jit(jnp.matmul)
    seconds = metrics.timings([lambda: product(matrix, matrix), lambda: jnp.copy(vector)], repeats=7).min(0)
    return {"gflops": 2 * 2048**3 / seconds[0] / 1e9, "gigabytes": 2 * vector.nbytes / seconds[1] / 1e9}


def ideal_milliseconds(pair: str, batch: int, gflops: float) -> dict[str, float]:
    """The time per step if the operations of logits and of gradients ran at the machine's rate of products."""
    teacher, student = (build(description, PAIRS[pair][2], 0) for description in PAIRS[pair][:2])
    x = jnp.zeros((batch, *PAIRS[pair][2]))

    def ideal(fn: Callable[..., Any], model: models.Model) -> float:
        costs: Any = jax.jit(fn).lower(model, x).compile().cost_analysis()
        return costs["flops"] / gflops / 1e6

    def gradient(model: models.Model, x: jax.Array) -> Any:
        return jax.grad(lambda params: jnp.sum(model.replace(params=params)(x) ** 2))(model.params)

    step, forward = ideal(gradient, student), ideal(lambda model, x: model(x), teacher)
    return {"plain": step, "stored": step, "online": step + forward, "teacher forward": forward}


def measure(variants: Timed, batch: int, config: Config) -> dict[str, np.ndarray]:
    """Times every variant in turn: milliseconds per step, ``[rounds]`` each."""
    rng = np.random.default_rng(0)
    orders = {}
    for name, run in tqdm.tqdm(variants.items(), desc="warming up", leave=False, disable=None):
        steps = 1
        for _ in range(2):  # one step tells too much of what a call costs
            order = rng.integers(0, EXAMPLES, (steps, batch)).astype(np.int32)
            run(order)
            steps = max(1, round(config.seconds * steps / run(order)))
        orders[name] = rng.integers(0, EXAMPLES, (steps, batch)).astype(np.int32)
        run(orders[name])
    times: dict[str, list[float]] = {name: [] for name in orders}
    for _ in tqdm.trange(config.rounds, desc="rounds", leave=False, disable=None):
        for name, order in orders.items():
            time.sleep(0.05)  # PyTorch's threads spin for a while after their work
            times[name].append(variants[name](order) / len(order) * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def ratios(times: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Takes the ratios that are wanted, round by round: our own, and each time of a peer over ours."""
    ours = {name: times[f"{OURS} {name}"] for name in VARIANTS}
    result = {
        "stored / plain": ours["stored"] / ours["plain"],
        "online / (plain + teacher forward)": ours["online"] / (ours["plain"] + ours["teacher forward"]),
        "captured / teacher forward": times[f"{OURS} captured"] / ours["teacher forward"],
    }
    for key, values in times.items():
        peer, _, name = key.partition(" ")
        if peer != OURS:
            result[f"{key} / {OURS}"] = values / ours[name]
    return result


HEAD = f"""\
Milliseconds per step, median; in brackets the share of the rate of matrix products of this machine; then, as a multiple
of the time of {OURS}: median of the rounds (least to largest).

| networks, batch | system | {" | ".join(VARIANTS)} |
| --- | --- | {" | ".join(["---:"] * len(VARIANTS))} |"""


def table_rows(found: Mapping[str, Any]) -> list[str]:
    """Writes the rows of one pair of networks; ``found`` is its entry in the report."""

    def spread(values: Any) -> str:
        return f"{np.median(values):.2f} ({np.min(values):.2f} to {np.max(values):.2f})"

    rows, title = [], found["networks"]
    for system in dict.fromkeys(key.partition(" ")[0] for key in found["milliseconds"]):
        cells = []
        for name in VARIANTS:
            key = f"{system} {name}"
            values = found["milliseconds"].get(key)
            if values is None:
                cells.append("")
                continue
            share = found["ideal milliseconds"][name] / np.median(values)
            ratio = found["ratios"].get(f"{key} / {OURS}")
            cells.append(
                f"{np.median(values):.2f} ({share:.0%})"
                + (f" × {spread(ratio)}" if ratio is not None else "")
            )
        rows.append(f"| {title} | {system} | {' | '.join(cells)} |")
        title = ""
    own = [f"{name}: {spread(values)}" for name, values in found["ratios"].items() if not name.endswith(OURS)]
    return [*rows, f"| | ratios of {OURS} | | {' | '.join(own)} |"]


def main() -> None:
    """Runs the benchmark."""
    config = tyro.cli(Config, description=__doc__)
    if not 1 <= (config.batch_size or 1) <= EXAMPLES or config.rounds < 1 or config.seconds <= 0:
        sys.exit(f"error: --batch-size must be 1 to {EXAMPLES}, --rounds at least 1, --seconds above 0")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    peers = import_peers(config.peers)
    os.environ["KERAS_BACKEND"] = "jax"
    versions = {"jax": f"jax {jax.__version__}", **peers}
    limits = machine_limits()
    environment = {**versions, "device": jax.devices()[0].device_kind, "cores": os.cpu_count()}
    print(*dict.fromkeys(versions.values()), f"{environment['cores']} cores", sep=", ", end="; ")
    print(
        f"products {limits['gflops']:.0f} GFLOP/s, copies {limits['gigabytes']:.0f} GB/s.\n\n{HEAD}",
        flush=True,
    )
    report: dict[str, Any] = {"environment": environment, "limits": limits, "pairs": {}}
    for pair in PAIRS if config.pair == "all" else (config.pair,):
        teacher, student, _, batch = PAIRS[pair]
        batch = config.batch_size or batch
        with systems_at_work([OURS, *peers], pair, batch, config.keep_memory) as timed:
            times = measure(timed, batch, config)
        report["pairs"][pair] = {
            "networks": f"{teacher} → {student}, {batch}",
            "milliseconds": {name: values.tolist() for name, values in times.items()},
            "ratios": {name: values.tolist() for name, values in ratios(times).items()},
            "ideal milliseconds": ideal_milliseconds(pair, batch, limits["gflops"]),
        }
        print(*table_rows(report["pairs"][pair]), sep="\n", flush=True)
        if config.out is not None:
            _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

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
import tqdm
import tyro
from step_ours import EXAMPLES, PAIRS, VARIANTS, Variants, build, jax_variants
from step_peers import PEERS, keras_variants, torch_variants, torchdistill_variants

from distill_jax import _files, metrics, models, train

OURS = "distill_jax"
Timed = dict[str, Callable[[np.ndarray], float]]  # system and name → the seconds that these steps take


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

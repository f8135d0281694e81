"""Measures what many students cost as one program, against the same trainings one after another.

Each student is distilled from stored logits with its own temperature, α and learning rate (Adam). The images are drawn
at random. Three ways are timed in turn, compilation counted: all students in one program ("together"); one after
another in one compiled program that takes the hyper-parameters as arguments ("one program"); and one after another,
each compiled anew, as separate processes would ("own programs"). Of the last, some are timed and stand for all; the
time in which a process starts is not counted. The persistent compilation cache is off. Beside the seconds of the wall
clock stand those of the processors, on which other work on the machine weighs less.

    python experiments/benchmarks/bench_sweep.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from distill_jax import _files, models, train
from distill_jax.train import sweeps


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    sizes: tuple[str, ...] = ("8x8,mlp:32", "8x8,mlp:128", "28x28,mlp:32", "28x28,mlp:128")
    """image size and network of the student; ten classes"""
    students: int = 32  # number of students
    compiled: int = 4  # number of students that are compiled anew, and stand for all
    steps: int = 1000  # number of steps of each student
    batch_size: int = 32  # number of examples per step
    own_batches: bool = False  # each student has its own order of examples, not one for all
    rounds: int = 3  # number of timings of each way
    out: Path | None = None  # JSON file for the figures


def tx(learning_rate: Any = 1.0) -> optax.GradientTransformation:
    """Makes the optimizer of one student."""
    return optax.chain(optax.adam(1.0), optax.scale(learning_rate))


def make_step(temperature: Any, alpha: Any, learning_rate: Any) -> train.Step:
    """Makes the step of one student."""
    return train.make_train_step(train.distill(temperature=temperature, alpha=alpha), tx(learning_rate))


def ways(config: Config, size: str) -> dict[str, Callable[[], Any]]:
    """Makes the trainings to be timed: name → a call that compiles, trains and returns the parameters."""
    image, network = size.split(",", 1)
    height, width = map(int, image.split("x"))
    shape, count = (height, width, 1), config.students
    rng = np.random.default_rng(0)
    data = {
        "image": jnp.asarray(rng.uniform(size=(2000, *shape)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, 2000), jnp.int32),
        "teacher": jnp.asarray(rng.normal(size=(2000, 10)) * 3, jnp.float32),
    }
    seeds = range(count) if config.own_batches else [0] * count
    orders = np.stack(
        [
            np.random.default_rng(s).integers(0, 2000, (config.steps, config.batch_size), np.int32)
            for s in seeds
        ],
        1,
    )
    values = {
        "temperature": np.linspace(1, 8, count, dtype=np.float32),
        "alpha": np.linspace(0, 1, count, dtype=np.float32),
        "learning_rate": np.geomspace(3e-4, 3e-3, count).astype(np.float32),
    }
    networks = [models.build(network, shape, 10, jax.random.key(i)) for i in range(count)]
    states = sweeps.init_states(sweeps.stack(networks), tx(), jax.random.split(jax.random.key(0), count))

    def together():
        jax.clear_caches()
        epoch = sweeps.make_epoch(make_step)
        students = jax.tree.map(jnp.copy, sweeps.Students(states, values))  # the epoch uses its own up
        order = orders if config.own_batches else orders[:, 0]
        return epoch(students, data, order)[0].model.params

    def alone(state: Any, values: Mapping[str, Any], order: Any) -> Any:
        def step(state, rows):
            return make_step(**values)(state, jax.tree.map(lambda x: x[rows], data))[0], None

        return jax.lax.scan(step, state, order)[0].model.params

    def one_after_another(numbers: range, anew: bool) -> Any:
        jax.clear_caches()
        run, found = jax.jit(alone), []
        for i in numbers:
            if anew:
                jax.clear_caches()
                run = jax.jit(alone)
            found.append(run(*sweeps.take((states, values), i), orders[:, i]))
        return sweeps.stack(jax.block_until_ready(found))

    return {
        "together": together,
        "one program": lambda: one_after_another(range(count), False),
        "own programs": lambda: one_after_another(range(config.compiled), True),
    }


def main() -> None:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    jax.config.update("jax_enable_compilation_cache", False)
    print(
        f"{config.students} students, {config.steps} steps of batch {config.batch_size}; seconds of the wall clock / "
        f"of the processors, medians of {config.rounds}; ratios to together of the processors' seconds\n"
    )
    print("| images, student | together | one program | own programs | ratios | largest difference |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    report = {}
    for size in config.sizes:
        calls, results = ways(config, size), {}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(config.rounds):
            for name, call in calls.items():
                begun = time.perf_counter(), time.process_time()
                results[name] = jax.block_until_ready(call())
                took = time.perf_counter() - begun[0], time.process_time() - begun[1]
                scale = config.students / config.compiled if name == "own programs" else 1
                times[name].append((scale * took[0], scale * took[1]))
        median = {name: np.median(values, 0) for name, values in times.items()}
        pairs = zip(*(jax.tree.leaves(results[name]) for name in ("together", "one program")), strict=True)
        difference = max(float(np.abs(x - y).max()) for x, y in pairs)
        ratios = " / ".join(
            f"{median[n][1] / median['together'][1]:.1f}" for n in ("one program", "own programs")
        )
        cells = " | ".join(f"{wall:.1f} / {processors:.1f}" for wall, processors in median.values())
        print(f"| {size} | {cells} | {ratios} | {difference:.0e} |", flush=True)
        report[size] = {"wall, processors": times, "difference": difference}
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

"""Measures what a sweep of the transfer coefficient λ costs as one program, against the same runs one after another.

The networks are of 784-128-10 units, the images are drawn at random in the size of MNIST's, the optimizer is SGD. The
two ways are timed in turn, so that what else the machine does falls on both.

    python experiments/benchmarks/bench_sweep.py
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from distill_jax import models, train
from distill_jax.train import interpolation


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    points: int = 21  # number of values of λ, from 0 to 1
    seeds: int = 3  # number of pairs of networks at each value
    steps: int = 50  # number of steps in one timing
    batch_size: int = 100  # number of examples per step
    rounds: int = 5  # number of timings of both ways


def readings() -> dict[str, tuple[Any, Any]]:
    """Returns for both kinds of interpolation: λ → step, and the state before the first step of two networks."""
    tx = optax.sgd(0.01)
    split, supervised = interpolation.split_tx(tx, tx), train.supervised()
    hard = train.make_train_step(supervised, tx)

    def through(rate):
        return train.make_train_step(interpolation.through(supervised, rate, teacher_loss=supervised), split)

    def pair(student, teacher, key):
        return interpolation.Pair(*(train.init_state(model, tx, key) for model in (teacher, student)))

    def joint(student, teacher, key):
        return train.init_state(interpolation.join(student, teacher, 0.0), split, key)

    return {"pull": (lambda rate: interpolation.pull(hard, hard, rate), pair), "through": (through, joint)}


def student_of(state: Any) -> Any:
    """Returns the student's parameters of a state of either kind."""
    return state.model.params if isinstance(state, interpolation.Pair) else state.model.params["student"]


def measure(config: Config, make: Any, start: Any, networks: Any, batches: Any) -> dict[str, Any]:
    """Times both ways: seconds per round of each, and the largest difference of what they train."""
    rates = jnp.linspace(0, 1, config.points)
    key = jax.random.key(0)

    def epoch(step, state):
        return jax.lax.scan(lambda state, batch: (step(state, batch)[0], None), state, batches)[0]

    @jax.jit
    def together(networks):
        def one(student, teacher):
            states = interpolation.repeat(start(student, teacher, key), config.points)
            return student_of(epoch(interpolation.sweep(make, rates), states))

        return jax.vmap(one)(*networks)

    @jax.jit
    def alone(student, teacher, rate):
        return student_of(epoch(make(rate), start(student, teacher, key)))

    def one_after_another():
        pairs = [jax.tree.map(lambda x, i=i: x[i], networks) for i in range(config.seeds)]
        return [[alone(*pair, rate) for rate in rates] for pair in pairs]

    times: dict[str, list[float]] = {"together": [], "one after another": []}
    for number in range(config.rounds + 1):  # the first round compiles
        for name, run in {
            "together": lambda: together(networks),
            "one after another": one_after_another,
        }.items():
            begun = time.perf_counter()
            done = jax.block_until_ready(run())
            if number:
                times[name].append(time.perf_counter() - begun)
            if name == "together":
                whole = done
    differences = [
        jnp.abs(x[i, j] - y).max()
        for i, row in enumerate(done)
        for j, params in enumerate(row)
        for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True)
    ]
    return {**times, "difference": float(max(differences))}


def main() -> None:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    made = [
        [models.build("mlp:128", (28, 28, 1), 10, jax.random.key(2 * i + t)) for i in range(config.seeds)]
        for t in (0, 1)
    ]
    # The networks of one kind share a function, so that their arrays can be stacked into one model
    networks = [
        jax.tree.map(lambda *x: jnp.stack(x), *[m.replace(apply_fn=made[0][0].apply_fn) for m in ms])
        for ms in made
    ]
    rng = np.random.default_rng(0)
    batches = {
        "image": jnp.asarray(rng.uniform(size=(config.steps, config.batch_size, 28, 28, 1)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, (config.steps, config.batch_size)), jnp.int32),
    }
    print(
        f"{config.points} λ × {config.seeds} seeds, {config.steps} steps; seconds, median of rounds (min to max)"
    )
    for name, (make, start) in readings().items():
        found = measure(config, make, start, networks, batches)
        for way in ("together", "one after another"):
            print(
                f"{name}, {way}: {np.median(found[way]):.2f} ({min(found[way]):.2f} to {max(found[way]):.2f})"
            )
        ratio = np.median(np.divide(found["together"], found["one after another"]))
        print(f"{name}: ratio {ratio:.2f}, largest difference of a parameter {found['difference']:.1e}")


if __name__ == "__main__":
    main()

"""What a sweep of λ costs as one program, against the same runs one after another.

Drawn images of MNIST's size, two networks 784-128-10, SGD. The two ways alternate (A B A B), so that
what else the machine does falls on both.

    python experiments/bench_sweep.py
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
from harness import report, runs

from distill_jax import models, train
from distill_jax.train import interpolation


@dataclass(frozen=True)
class Config:
    """Options."""

    points: int = 21
    """values of λ from 0 to 1"""
    seeds: int = 3
    """networks at each"""
    steps: int = 50
    """timed steps"""
    batch_size: int = 100
    """examples a step"""
    rounds: int = 5
    """how often both ways are timed"""


def readings(apply_fn: Any) -> dict[str, tuple[Any, Any]]:
    """Both: λ → step, and the state before the first one from two networks' parameters."""
    tx = optax.sgd(0.01)
    split, supervised = interpolation.split_tx(tx, tx), train.supervised(apply_fn)
    hard = train.make_train_step(supervised, tx)

    def through(rate):
        loss_fn = interpolation.through(supervised, rate, teacher_loss=supervised)
        return train.make_train_step(loss_fn, split)

    def pair(student, teacher, key):
        return interpolation.Pair(*(train.init_state(params, tx, key) for params in (teacher, student)))

    def joint(student, teacher, key):
        params, state = interpolation.join((student, {}), (teacher, {}))
        return train.init_state(params, split, key, state)

    return {"pull": (lambda rate: interpolation.pull(hard, hard, rate), pair), "through": (through, joint)}


def measure(config: Config, make: Any, start: Any, networks: Any, batches: Any) -> dict[str, Any]:
    """Times both ways: seconds a round of each, and the largest difference of what they train."""
    rates = jnp.linspace(0, 1, config.points)
    key = jax.random.key(0)

    def epoch(step, state):
        return jax.lax.scan(lambda state, batch: (step(state, batch)[0], None), state, batches)[0]

    @jax.jit
    def together(networks):
        def one(student, teacher):
            states = interpolation.repeat(start(student, teacher, key), config.points)
            return epoch(interpolation.sweep(make, rates), states).params

        return jax.vmap(one)(*networks)

    @jax.jit
    def alone(student, teacher, rate):
        return epoch(make(rate), start(student, teacher, key)).params

    def one_after_another():
        return [
            [alone(*jax.tree.map(lambda x, i=i: x[i], networks), rate) for rate in rates]
            for i in range(config.seeds)
        ]

    times: dict[str, list[float]] = {"together": [], "one after another": []}
    for number in range(config.rounds + 1):  # the first one compiles
        for name, run in {
            "together": lambda: together(networks),
            "one after another": one_after_another,
        }.items():
            begun = time.perf_counter()
            done = jax.block_until_ready(run())
            if number:
                times[name].append(time.perf_counter() - begun)
            if name == "together":
                whole = done["student"]
    difference = max(
        float(jnp.abs(x[i, j] - y).max())
        for i, row in enumerate(done)
        for j, params in enumerate(row)
        for x, y in zip(jax.tree.leaves(whole), jax.tree.leaves(params["student"]), strict=True)
    )
    return {**times, "difference": difference}


def main() -> int:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    made = [
        [models.build("mlp:128", (28, 28, 1), 10, jax.random.key(2 * i + t)) for i in range(config.seeds)]
        for t in (0, 1)
    ]
    networks = [jax.tree.map(lambda *x: jnp.stack(x), *[m.params for m in ms]) for ms in made]
    rng = np.random.default_rng(0)
    batches = {
        "image": jnp.asarray(rng.uniform(size=(config.steps, config.batch_size, 28, 28, 1)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 10, (config.steps, config.batch_size)), jnp.int32),
    }
    print(f"{config.points} λ × {config.seeds} seeds, {config.steps} steps; seconds, mean ± sd of rounds")
    for name, (make, start) in readings(made[0][0].apply_fn).items():
        found = measure(config, make, start, networks, batches)
        ratios = np.divide(found["together"], found["one after another"])
        print(
            f"{name}: together {report.mean_sd(found['together'])}, one after another "
            f"{report.mean_sd(found['one after another'])}, median ratio {np.median(ratios):.2f}, "
            f"largest difference of a parameter {found['difference']:.1e}"
        )
    return 0


if __name__ == "__main__":
    runs.run_main(main)

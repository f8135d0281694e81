"""Measures a convolution and its gradients on this machine, shape by shape: JAX's own way and this library's.

All ways are timed in turn, round after round, so what else the machine does falls on all of them. Run it on a new
version of JAX: where JAX's own weight gradient has become the faster one, ``models.conv_general_dilated`` has lost
its use.

    python experiments/benchmarks/bench_conv.py
    python experiments/benchmarks/bench_conv.py --rounds 5 --out conv.json
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from distill_jax import _files, metrics, models

# Side of the image, inputs, outputs, side of the kernel, stride: the reference networks' shapes
SHAPES = [
    (32, 1, 32, 3, 1), (32, 32, 64, 3, 1), (16, 16, 32, 3, 1), (8, 32, 64, 3, 1), (4, 64, 128, 3, 1),
    (4, 128, 128, 3, 1), (16, 128, 128, 3, 1), (8, 256, 256, 3, 1), (32, 64, 128, 3, 2), (32, 64, 128, 1, 2),
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    batch_size: int = 128  # number of images
    rounds: int = 9  # number of timings of each way
    out: Path | None = None  # JSON file for the figures


def patches(x: jax.Array, dy: jax.Array, *, kernel: int, stride: int) -> jax.Array:
    """The weight gradient as one product with the patches of all images."""
    values = jax.lax.conv_general_dilated_patches(
        x, (kernel, kernel), (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.lax.dot_general(values, dy, (((0, 1, 2), (0, 1, 2)), ((), ())))


def ways(shape: tuple[int, ...]) -> dict[str, Callable[[jax.Array, jax.Array, jax.Array], Any]]:
    """Builds the timed functions of images, kernel and gradient of the outputs."""
    _, _, _, kernel, stride = shape
    options: dict[str, Any] = {
        "window_strides": (stride, stride),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }

    def jaxs(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, **options)

    def ours(x: jax.Array, w: jax.Array) -> jax.Array:
        return models.conv_general_dilated(x, w, **options)

    return {
        "forward": lambda x, w, dy: jaxs(x, w),
        "input gradient": lambda x, w, dy: jax.vjp(lambda x: jaxs(x, w), x)[1](dy),
        "weight gradient, JAX": lambda x, w, dy: jax.vjp(lambda w: jaxs(x, w), w)[1](dy),
        "weight gradient, ours": lambda x, w, dy: jax.vjp(lambda w: ours(x, w), w)[1](dy),
        "weight gradient, patches": lambda x, w, dy: patches(x, dy, kernel=kernel, stride=stride),
    }


def main() -> None:
    """Runs the benchmark."""
    config = tyro.cli(Config, description=__doc__)
    if min(config.batch_size, config.rounds) < 1:
        sys.exit("error: --batch-size and --rounds must be at least 1")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    matrix, product = jnp.ones((2048, 2048)), jax.jit(jnp.matmul)
    rate = 2 * 2048**3 / metrics.timings([lambda: product(matrix, matrix)], repeats=7).min() / 1e9
    print(
        f"jax {jax.__version__}; matrix products run at {rate:.0f} GFLOP/s. Milliseconds (share of that rate)"
    )
    report: dict[str, Any] = {"jax": jax.__version__, "gflops": rate, "shapes": []}
    for shape in SHAPES:
        side, inputs, outputs, kernel, stride = shape
        places = side // stride
        keys = jax.random.split(jax.random.key(0), 3)
        x, w, dy = (
            jax.random.normal(key, size)
            for key, size in zip(
                keys,
                [
                    (config.batch_size, side, side, inputs),
                    (kernel, kernel, inputs, outputs),
                    (config.batch_size, places, places, outputs),
                ],
                strict=True,
            )
        )
        programs = {name: jax.jit(way) for name, way in ways(shape).items()}
        calls = [functools.partial(program, x, w, dy) for program in programs.values()]
        times = metrics.timings(calls, repeats=config.rounds) * 1e3
        gflop = 2e-9 * config.batch_size * places**2 * kernel**2 * inputs * outputs
        print(f"{inputs}→{outputs}, {kernel}×{kernel}, stride {stride}, {side}×{side}: {gflop:.2f} GFLOP")
        for name, values in zip(programs, times.T, strict=True):
            median = np.median(values)
            print(f"  {name:26} {median:8.2f}  ({gflop / median * 1e3 / rate:.0%})")
        figures = {name: values.tolist() for name, values in zip(programs, times.T, strict=True)}
        report["shapes"].append({"shape": shape, "gflop": gflop, "milliseconds": figures})
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

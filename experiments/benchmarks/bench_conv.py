"""Measures convolutions and their gradients on a CPU, shape by shape, as JAX compiles them and with our options.

Both are timed in turn, round after round, so what else the machine does falls on both. Run it on a new version of
JAX: where the default has become the faster one, ``train.compiler_options`` has lost its use.

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

from distill_jax import _files, metrics, train

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


def ways(stride: int) -> dict[str, Callable[[jax.Array, jax.Array, jax.Array], Any]]:
    """Builds the timed functions of images, kernel and gradient of the outputs."""

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "SAME", dimension_numbers=names)

    return {
        "forward": lambda x, w, dy: convolve(x, w),
        "input gradient": lambda x, w, dy: jax.vjp(lambda x: convolve(x, w), x)[1](dy),
        "weight gradient": lambda x, w, dy: jax.vjp(lambda w: convolve(x, w), w)[1](dy),
    }


def main() -> None:
    """Runs the benchmark."""
    config = tyro.cli(Config, description=__doc__)
    if min(config.batch_size, config.rounds) < 1:
        sys.exit("error: --batch-size and --rounds must be at least 1")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    options = train.compiler_options()
    if options is None:
        sys.exit("there is nothing to compare: on this platform, programs are compiled as JAX compiles them")
    train.keep_memory()
    matrix, product = jnp.ones((2048, 2048)), jax.jit(jnp.matmul)
    rate = 2 * 2048**3 / metrics.timings([lambda: product(matrix, matrix)], repeats=7).min() / 1e9
    print(f"jax {jax.__version__}; matrix products run at {rate:.0f} GFLOP/s.")
    print("Milliseconds by default, and with our options (share of the products' rate); their ratio")
    report: dict[str, Any] = {"jax": jax.__version__, "gflops": rate, "shapes": []}
    for shape in SHAPES:
        side, inputs, outputs, kernel, stride = shape
        places = side // stride
        sizes = (
            (config.batch_size, side, side, inputs),
            (kernel, kernel, inputs, outputs),
            (config.batch_size, places, places, outputs),
        )
        keys = jax.random.split(jax.random.key(0), 3)
        arrays = [jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True)]
        programs = {
            f"{name}, {how}": jax.jit(way, compiler_options=chosen)
            for name, way in ways(stride).items()
            for how, chosen in (("default", None), ("ours", options))
        }
        calls = [functools.partial(program, *arrays) for program in programs.values()]
        times = dict(zip(programs, metrics.timings(calls, repeats=config.rounds).T * 1e3, strict=True))
        gflop = 2e-9 * config.batch_size * places**2 * kernel**2 * inputs * outputs
        print(f"{inputs}→{outputs}, {kernel}×{kernel}, stride {stride}, {side}×{side}: {gflop:.2f} GFLOP")
        for name in ways(stride):
            default, ours = times[f"{name}, default"], times[f"{name}, ours"]
            middle = np.median(ours)
            print(
                f"  {name:16} {np.median(default):8.2f} {middle:8.2f} ({gflop / middle * 1e3 / rate:4.0%})"
                f" {np.median(default / ours):6.2f}"
            )
        figures = {name: values.tolist() for name, values in times.items()}
        report["shapes"].append({"shape": shape, "gflop": gflop, "milliseconds": figures})
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

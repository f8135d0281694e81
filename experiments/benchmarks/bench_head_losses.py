r"""Measures losses from hidden states in chunks of tokens against the formula on the logits of all tokens.

Value and gradients of a mean over tokens, for the student's hidden states and kernel: memory of the compiled program
(arguments, results and temporaries, by XLA's analysis), time, and the largest errors against the formula in float64,
relative to the largest number. "each" has one value per token, "mean" is computed with reduce="mean". All are timed in
turn, round after round, in one process, and a ratio is the median of the rounds' ratios.

    python experiments/benchmarks/bench_head_losses.py
    python experiments/benchmarks/bench_head_losses.py --tokens 8192 --hidden 4096 --vocabulary 128256 \
        --dtype bfloat16 --rounds 0
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from bench_losses import LOSSES, timings

from distill_jax import _files, losses


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    losses: tuple[str, ...] = ("kl",)  # which losses
    tokens: int = 512  # number of tokens
    hidden: int = 512  # width of the hidden states of both networks
    vocabulary: int = 32000  # number of classes
    dtype: Literal["float32", "bfloat16"] = "float32"  # of hidden states and kernels
    chunk: int | None = None  # number of tokens in a chunk; the library's own choice by default
    temperature: float = 1.0  # T
    deviation: float = 1.0  # standard deviation of the logits
    rounds: int = 5  # number of timings of each; 0 only compiles
    milliseconds: float = 1.0  # about how long one timing takes, one call at least
    out: Path | None = None  # JSON file for the figures


def forms(name: str, config: Config) -> dict[str, Any]:
    """Programs of student and teacher, each a pair of hidden states and kernel → value and gradients."""
    formula, loss, scaled = LOSSES[name]
    if name in ("cross_entropy", "label_smoothing"):
        sys.exit(f"error: --losses {name} has no teacher: choose among losses between two networks")

    def plain(student, teacher):
        dtype = jnp.promote_types(student[0].dtype, jnp.float32)
        logits = (
            jnp.matmul(*x, preferred_element_type=dtype) / config.temperature for x in (student, teacher)
        )
        return jnp.mean(formula(*logits)) * (config.temperature**2 if scaled else 1.0)

    def chunked(reduce, student, teacher):
        values = losses.tokens.chunked(loss, chunk=config.chunk, reduce=reduce)(
            student[0][None], teacher[0][None], student_kernel=student[1], teacher_kernel=teacher[1],
            temperature=config.temperature,
        )  # fmt: skip
        return jnp.mean(values)

    values: dict[str, Any] = {
        "plain": plain,
        "each": functools.partial(chunked, None),
        "mean": functools.partial(chunked, "mean"),
    }
    return {label: jax.jit(jax.value_and_grad(value)) for label, value in values.items()}


def error(found: Any, exact: Any) -> dict[str, float]:
    """Largest error of the value and of the gradients, relative to the largest number of each."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True))
    errors = [
        float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(np.asarray(b)).max()) for a, b in pairs
    ]
    return {"value": errors[0], "gradient": max(errors[1:])}


def measure(name: str, config: Config) -> dict[str, dict[str, Any]]:
    """Compares the forms of a loss."""
    shapes = (config.tokens, config.hidden), (config.hidden, config.vocabulary)
    network = tuple(jax.ShapeDtypeStruct(shape, config.dtype) for shape in shapes)
    programs = {label: form.lower(network, network).compile() for label, form in forms(name, config).items()}
    report: dict[str, dict[str, Any]] = {}
    for label, program in programs.items():
        sizes = program.memory_analysis()
        parts = sizes.argument_size_in_bytes, sizes.output_size_in_bytes, sizes.temp_size_in_bytes
        report[label] = {"bytes": sum(parts)}
    if config.rounds:
        rng = np.random.default_rng(0)
        scales = 1.0, config.deviation / config.hidden**0.5
        draw = [
            [rng.normal(size=s) * scale for s, scale in zip(shapes, scales, strict=True)] for _ in range(2)
        ]
        arrays = jax.tree.map(lambda x: jnp.asarray(x, config.dtype), tuple(map(tuple, draw)))
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: np.asarray(x).astype(np.float64), arrays)
            exact = jax.device_get(forms(name, config)["plain"](*wide))
        times = timings(programs, arrays, config)  # type: ignore[arg-type]
        for label, program in programs.items():
            report[label] |= {"seconds": times[label].tolist(), "error": error(program(*arrays), exact)}
    return report


def main() -> None:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    unknown = sorted(set(config.losses) - set(LOSSES))
    if unknown:
        sys.exit(f"error: --losses has no {', '.join(unknown)}: choose among {', '.join(LOSSES)}")
    if min(config.tokens, config.hidden, config.vocabulary) < 2 or config.rounds < 0:
        sys.exit("error: --tokens, --hidden and --vocabulary must be at least 2, --rounds at least 0")
    if not min(config.temperature, config.deviation) > 0:
        sys.exit("error: --temperature and --deviation must be positive")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    report: dict[str, Any] = {
        "environment": {"jax": jax.__version__, "device": jax.devices()[0].device_kind},
        "losses": {name: measure(name, config) for name in config.losses},
    }
    print("| loss | form | GB | times plain | ms | times plain | error of the value | of the gradients |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, found in report["losses"].items():
        plain = found["plain"]
        for label, row in found.items():
            cells = [f"{row['bytes'] / 1e9:.2f}", f"{row['bytes'] / plain['bytes']:.3f}"]
            if config.rounds:
                seconds = np.array(row["seconds"])
                cells += [f"{np.median(seconds) * 1e3:.0f}", f"{np.median(seconds / plain['seconds']):.2f}"]
                cells += [f"{row['error'][part]:.1e}" for part in ("value", "gradient")]
            print(f"| {name} | {label} | {' | '.join(cells + [''] * (6 - len(cells)))} |")
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

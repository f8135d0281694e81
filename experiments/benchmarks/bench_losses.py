"""Measures what a logit loss costs and how accurate it is, against the formula as it is usually written.

Value and gradient for the student, compiled: time and compiled temporaries as a multiple of the plain formula's
(jax.nn.log_softmax and a sum), and the largest relative error against the same formula in float64. Both are timed in
turn, round after round, in one process, and the ratio is the median of the rounds' ratios.

    python experiments/benchmarks/bench_losses.py
    python experiments/benchmarks/bench_losses.py --losses kl dkd --sizes 128x10 --out losses.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro
from jax.nn import log_softmax

from distill_jax import _files, losses

Values = Callable[
    [Any, Any], jax.Array
]  # student and teacher, divided by the temperature → one value per example
SHARE, WEIGHT, SMOOTHING = 0.1, 8.0, 0.1


def kl(student, teacher):
    """KL(p‖q)."""
    q, p = log_softmax(student), log_softmax(teacher)
    return jnp.sum(jnp.exp(p) * (p - q), -1)


def mixed(student, teacher, share):
    """Computes KL(p‖m) and KL(q‖m) with m = share·p + (1 − share)·q."""
    q, p = log_softmax(student), log_softmax(teacher)
    m = jnp.logaddexp(p + np.log(share), q + np.log1p(-share))
    return jnp.sum(jnp.exp(p) * (p - m), -1), jnp.sum(jnp.exp(q) * (q - m), -1)


def label(logits):
    """Labels of all classes in turn."""
    return jnp.arange(logits.shape[0]) % logits.shape[1]


def dkd(student, teacher):
    """Decoupled distillation, as in mdistiller."""
    y = jax.nn.one_hot(label(student), student.shape[1], dtype=student.dtype)
    q, p = (jnp.sum(jax.nn.softmax(x) * y, -1) for x in (student, teacher))
    binary = p * (jnp.log(p) - jnp.log(q)) + (1 - p) * (jnp.log1p(-p) - jnp.log1p(-q))
    return binary + WEIGHT * kl(student - 1000 * y, teacher - 1000 * y)


def cross_entropy(student, teacher):
    """Cross-entropy with labels."""
    return -jnp.take_along_axis(log_softmax(student), label(student)[:, None], -1)[:, 0]


def smoothed(student, teacher):
    """Cross-entropy with smoothed labels."""
    return (1 - SMOOTHING) * cross_entropy(student, teacher) - SMOOTHING * jnp.mean(log_softmax(student), -1)


# The formula as it is usually written; ours; whether its value has the factor T².
LOSSES: dict[str, tuple[Values, Callable[..., jax.Array], bool]] = {
    "kl": (kl, losses.kl, True),
    "reverse_kl": (lambda s, t: kl(t, s), losses.reverse_kl, True),
    "jensen_shannon": (lambda s, t: sum(mixed(s, t, 0.5)) / 2, losses.jensen_shannon, True),
    "skew_kl": (lambda s, t: mixed(s, t, SHARE)[0], losses.skew_kl, True),
    "dkd": (dkd, lambda s, t, **o: losses.dkd(s, t, label(s), beta=WEIGHT, **o), True),
    "cross_entropy": (cross_entropy, lambda s, t, temperature: losses.cross_entropy(s, label(s)), False),
    "label_smoothing": (
        smoothed,
        lambda s, t, temperature: losses.cross_entropy(s, label(s), label_smoothing=SMOOTHING),
        False,
    ),
    "soft_cross_entropy": (
        lambda s, t: -jnp.sum(jax.nn.softmax(t) * log_softmax(s), -1),
        losses.soft_cross_entropy,
        True,
    ),
    "total_variation": (
        lambda s, t: jnp.sum(jnp.abs(jax.nn.softmax(t) - jax.nn.softmax(s)), -1) / 2,
        losses.total_variation,
        False,
    ),
}


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    losses: tuple[str, ...] = tuple(LOSSES)  # which losses
    sizes: tuple[str, ...] = ("128x10", "128x1000", "256x32000")  # examples x classes
    temperature: float = 4.0  # T; cross-entropy with labels has none
    gap: float = 1.0  # standard deviation of student − teacher; the teacher's logits have 3
    rounds: int = 9  # number of timings of each
    milliseconds: float = 40.0  # about how long one timing takes
    out: Path | None = None  # JSON file for the figures


def timings(programs: dict[str, Any], arrays: Any, config: Config) -> dict[str, np.ndarray]:
    """Times compiled programs in turn: seconds per call, ``[rounds]`` each."""
    start = time.perf_counter()
    for run in programs.values():
        jax.block_until_ready(run(*arrays))
    once = (time.perf_counter() - start) / len(programs)
    calls = max(1, round(config.milliseconds / 1e3 / once))
    times: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(config.rounds):
        for name, run in programs.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = run(*arrays)
            jax.block_until_ready(result)
            times[name].append((time.perf_counter() - start) / calls)
    return {name: np.array(values) for name, values in times.items()}


def relative(found: Any, expected: Any) -> float:
    """Largest error over the rows, relative to the largest number of the row."""
    found, expected = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (found, expected))
    return float((np.abs(found - expected).max(1) / np.abs(expected).max(1)).max())


def measure(name: str, shape: tuple[int, int], config: Config) -> dict[str, Any]:
    """Compares a loss of one size with its formula."""
    formula, loss, scaled = LOSSES[name]
    temperature = config.temperature if scaled or name == "total_variation" else 1.0

    def plain(student, teacher):
        value = formula(student / temperature, teacher / temperature)
        return value * temperature**2 if scaled else value

    def ours(student, teacher):
        return loss(student, teacher, temperature=temperature)

    def program(values):
        def both(student, teacher):
            value, pull = jax.vjp(lambda s: values(s, teacher), student)
            return value, *pull(jnp.ones_like(value))

        return jax.jit(both)

    rng = np.random.default_rng(0)
    teacher = rng.normal(size=shape).astype(np.float32) * 3
    student = (teacher + config.gap * rng.normal(size=shape)).astype(np.float32)
    with jax.enable_x64(True):
        exact = program(plain)(student.astype(float), teacher.astype(float))
        exact = [np.asarray(x) for x in exact]
    arrays = jnp.asarray(student), jnp.asarray(teacher)
    programs = {n: program(f).lower(*arrays).compile() for n, f in (("plain", plain), ("ours", ours))}
    temporaries = {n: p.memory_analysis().temp_size_in_bytes for n, p in programs.items()}
    times = timings(programs, arrays, config)
    return {
        "seconds": {n: values.tolist() for n, values in times.items()},
        "time_ratio": float(np.median(times["ours"] / times["plain"])),
        "temporaries": temporaries,
        "temporaries_ratio": temporaries["ours"] / temporaries["plain"],
        "error": {
            n: {
                part: relative(a, b)
                for part, a, b in zip(("value", "gradient"), p(*arrays), exact, strict=True)
            }
            for n, p in programs.items()
        },
    }


def main() -> None:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    unknown = sorted(set(config.losses) - set(LOSSES))
    if unknown:
        sys.exit(f"error: --losses has no {', '.join(unknown)}: choose among {', '.join(LOSSES)}")
    try:
        sizes = [tuple(int(n) for n in size.split("x")) for size in config.sizes]
        if any(len(size) != 2 or min(size) < 2 for size in sizes):
            raise ValueError
    except ValueError:
        sys.exit(f"error: --sizes must be EXAMPLESxCLASSES, such as 128x10, got {' '.join(config.sizes)}")
    if config.rounds < 1 or not config.temperature > 0 or not config.milliseconds > 0:
        sys.exit("error: --rounds, --temperature and --milliseconds must be positive")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    environment = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    report: dict[str, Any] = {"environment": environment, "losses": {}}
    work = [(name, shape) for name in config.losses for shape in sizes]
    print("Value and gradient as a multiple of the plain formula; largest relative errors, plain → ours.\n")
    print("| loss | size | ms | time | memory | value | gradient |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    for name, shape in tqdm.tqdm(work, leave=False, disable=None):
        found = report["losses"].setdefault(name, {})["x".join(map(str, shape))] = measure(
            name, shape, config
        )
        errors = [[found["error"][n][part] for n in ("plain", "ours")] for part in ("value", "gradient")]
        cells = [f"{np.median(found['seconds']['ours']) * 1e3:.3f}", f"{found['time_ratio']:.2f}"]
        cells += [f"{found['temporaries_ratio']:.2f}", *(f"{a:.1e} → {b:.1e}" for a, b in errors)]
        tqdm.tqdm.write(f"| {name} | {'x'.join(map(str, shape))} | {' | '.join(cells)} |")
    if config.out is not None:
        _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

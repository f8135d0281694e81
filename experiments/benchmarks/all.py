"""Runs all benchmarks, one after the other, and writes one page of tables and one file with all figures.

Each is a process of its own; where one fails, the page says so, and the others go on.

    python experiments/benchmarks/all.py --out results                           # results/benchmarks.md and .json
    python experiments/benchmarks/all.py --out results --peers torch-eager keras     # where these are installed
    python experiments/benchmarks/all.py --out results --only step store --quick
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import tyro

from distill_jax import _files


class Part(NamedTuple):
    """A benchmark: the title of its section, and the options of a full and of a quick run."""

    title: str
    full: Sequence[str] = ()
    quick: Sequence[str] = ()


Name = Literal["step", "conv", "losses", "head_losses", "labels", "store", "start", "sweep"]
PARTS: dict[Name, Part] = {
    "step": Part("Training steps", quick=("--rounds", "2", "--seconds", "0.05")),
    "conv": Part("Convolutions with and without the compiler options", quick=("--rounds", "1")),
    "losses": Part("Losses", quick=("--rounds", "2", "--sizes", "128x10", "--milliseconds", "5")),
    "head_losses": Part(
        "Losses from hidden states",
        quick=("--rounds", "2", "--tokens", "64", "--hidden", "16", "--vocabulary", "1000"),
    ),
    "labels": Part("Kinds of labels", quick=("--rounds", "1", "--seconds", "0.05")),
    "store": Part("The store of soft labels", quick=("--rounds", "1", "--megabytes", "5")),
    "start": Part("Imports and starts", quick=("--rounds", "1")),
    "sweep": Part(
        "Many students in one program",
        full=("--steps", "500", "--sizes", "8x8,mlp:32", "28x28,mlp:32"),
        quick=(
            "--steps",
            "20",
            "--sizes",
            "8x8,mlp:32",
            "--students",
            "4",
            "--compiled",
            "1",
            "--rounds",
            "1",
        ),
    ),
}


@dataclass(frozen=True)
class Config:
    """The options."""

    out: Path  # directory for benchmarks.md and benchmarks.json
    only: tuple[Name, ...] = get_args(Name)  # which benchmarks
    peers: tuple[Literal["torch-eager", "torch-compile", "keras", "torchdistill"], ...] = ()
    """other systems whose steps are timed as well"""
    quick: bool = False  # few and short rounds, to see that all works: the figures mean little


def command(part: Name, config: Config, out: Path) -> list[str]:
    """Makes the command line of a benchmark."""
    program = str(Path(__file__).with_name(f"bench_{part}.py"))
    options = PARTS[part].quick if config.quick else PARTS[part].full
    peers = ("--peers", *config.peers) if part == "step" and config.peers else ()
    return [sys.executable, program, *options, *peers, "--out", str(out)]


def run(part: Name, config: Config) -> dict[str, Any]:
    """Runs a benchmark, shows what it prints, and returns that with its figures and its command."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        arguments = command(part, config, out)
        start, lines = time.monotonic(), []
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
        return {
            "command": " ".join(["python", f"experiments/benchmarks/bench_{part}.py", *arguments[2:-2]]),
            "seconds": time.monotonic() - start,
            "status": process.returncode,
            "text": "".join(lines),
            "figures": json.loads(out.read_text()) if out.exists() else None,
        }


def page(report: Mapping[str, Any]) -> str:
    """Writes the page of all benchmarks that have run."""
    environment = ", ".join(f"{name} {value}" for name, value in report["environment"].items())
    sections = ["# Benchmarks", f"{environment}. Timings take turns within each table."]
    for part, found in report["parts"].items():
        sections += [f"## {PARTS[part].title}", f"`{found['command']}`, {found['seconds']:.0f} s"]
        if found["status"]:
            sections.append(
                f"**It failed with exit status {found['status']}:** what follows is not complete."
            )
        sections.append(found["text"].strip())
    return "\n\n".join(sections) + "\n"


def main() -> int:
    """Runs the benchmarks; returns 1 if one failed."""
    config = tyro.cli(Config, description=__doc__)
    config.out.mkdir(parents=True, exist_ok=True)
    environment = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("distill_jax", "jax")},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
    }
    report: dict[str, Any] = {"environment": environment, "quick": config.quick, "parts": {}}
    for number, part in enumerate(config.only, 1):
        print(f"{number}/{len(config.only)} {PARTS[part].title}", flush=True)
        report["parts"][part] = found = run(part, config)
        print(f"bench_{part}: {found['seconds']:.0f} s, exit status {found['status']}\n", flush=True)
        # After each part, so that nothing is lost
        _files.write_atomically(
            config.out / "benchmarks.md", lambda path: path.write_text(page(report), encoding="utf-8")
        )
        _files.write_json(config.out / "benchmarks.json", report)
    print(f"The tables: {config.out / 'benchmarks.md'}")
    return int(any(found["status"] for found in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())

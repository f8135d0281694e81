"""Measures how long a start takes: imports, and an experiment up to its first training step. And peak memory.

Every timing is a process of its own, and the kinds of processes take turns, round after round.

- ``import jax``, ``import distill_jax`` (whose modules are imported at their first use), and the import of the modules
  that a training uses.
- ``kd_mnist.py digits`` up to the end of its first training step, with an empty directory for compiled programs ("first
  start") and once more with what that left there ("second start"). The clock runs from the start of the process.

Beside the seconds stand those that the first step took by itself, and of these XLA's compilation, or the reading of
the compiled program; and the largest memory that the process had.

    python experiments/benchmarks/bench_start.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tqdm
import tyro

EXPERIMENT = Path(__file__).parents[1] / "kd_mnist.py"
IMPORTS = {
    "import jax": "import jax",
    "import distill_jax": "import distill_jax",
    "import of all that trains": "from distill_jax import data, losses, models, teachers, train",
}
STARTS = ("first start", "second start")

# Each child prints one line of JSON at its end. Memory in kB as Linux counts it: getrusage would count the parent's.
REPORT = """
import json, sys, time
def report(**figures):
    figures["end"] = time.time()
    if sys.platform == "linux":
        lines = open("/proc/self/status").read().splitlines()
        figures["megabytes"] = next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM"))
    print(json.dumps(figures), file=sys.__stdout__, flush=True)
"""
# The experiment as it is; only its first epoch is cut to one step, after which the process ends.
START = (
    REPORT
    + """
import os, runpy
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import jax
from distill_jax import train
compiling = []
def listen(event, seconds, **_):
    if event == "/jax/core/compile/backend_compile_duration":
        compiling.append(seconds)
jax.monitoring.register_event_duration_secs_listener(listen)
make_epoch = train.make_epoch
def make(*arguments, **options):
    epoch = make_epoch(*arguments, **options)
    def first_step(state, data, order, context=None):
        compiling.clear()
        start = time.perf_counter()
        jax.block_until_ready(epoch(state, data, order[:1], context))
        report(step=time.perf_counter() - start, compiling=sum(compiling))
        os._exit(0)
    return first_step
train.make_epoch = make
runpy.run_path(sys.argv[0], run_name="__main__")
"""
)


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    rounds: int = 5  # number of timings of each
    out: Path | None = None  # JSON file for the figures


def child(program: str, *arguments: str, **environment: str) -> dict[str, float]:
    """Runs a program in a new process: ``seconds`` from its start to its report, and what it reports."""
    removed = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    inherited = {name: value for name, value in os.environ.items() if name not in removed}
    root = str(EXPERIMENT.parents[1])
    paths = os.pathsep.join([root, *filter(None, [inherited.get("PYTHONPATH")])])
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=inherited | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments) or program} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": found.pop("end") - start, **found}


def measure(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Times all kinds of starts in turn: name → what each of its processes reported."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*IMPORTS, *STARTS)}
    for _ in tqdm.trange(rounds, desc="rounds", leave=False, disable=None):
        for name, program in IMPORTS.items():
            found[name].append(child(f"{program}\n{REPORT}report()"))
        with tempfile.TemporaryDirectory() as folder:
            for name in STARTS:
                run = ("digits", "--out", f"{folder}/{name}")
                found[name].append(child(START, str(EXPERIMENT), *run, XDG_CACHE_HOME=f"{folder}/cache"))
    return found


HEAD = """\
| process | seconds, median (least to largest) | × `import jax` | first step, s | of it compiling, s | memory, MB |
| --- | ---: | ---: | ---: | ---: | ---: |"""


def table_rows(found: Mapping[str, list[dict[str, float]]]) -> list[str]:
    """Writes the rows of the table; ``found`` is what :func:`measure` returns."""
    rows = []
    reference = np.array([each["seconds"] for each in found["import jax"]])
    for name, processes in found.items():
        seconds = np.array([each["seconds"] for each in processes])
        ratio = f"{np.median(seconds / reference):.2f}"
        cells = [f"{np.median(seconds):.2f} ({seconds.min():.2f} to {seconds.max():.2f})", ratio]
        for key, digits in (("step", 2), ("compiling", 2), ("megabytes", 0)):
            values = [each[key] for each in processes if key in each]
            cells.append(f"{np.median(values):.{digits}f}" if values else "")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    if config.rounds < 1:
        sys.exit(f"error: --rounds must be at least 1, got {config.rounds}")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    found = measure(config.rounds)
    print(HEAD, *table_rows(found), sep="\n")
    if config.out is not None:
        config.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

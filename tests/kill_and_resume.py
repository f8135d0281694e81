"""Kills an experiment with SIGKILL again and again, and compares its end with an undisturbed run's.

    python tests/kill_and_resume.py --kills 10 -- digits --seeds 2

What follows ``--`` is passed to experiments/kd_mnist.py. The two runs must end with the same
results.json, timings aside, bit-identical checkpoints and identical soft labels.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

EXPERIMENT = Path(__file__).parents[1] / "experiments" / "kd_mnist.py"


def start(out: Path, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(EXPERIMENT), *arguments, "--out", str(out)]
    with (out.parent / f"{out.name}.log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def finish(out: Path, arguments: list[str]) -> None:
    if start(out, arguments).wait():
        raise AssertionError((out.parent / f"{out.name}.log").read_text())


def stage(out: Path) -> str:
    """Names the part of the run that was under way: the directory changed last."""
    parts = sorted(out.glob("seed*/*"), key=lambda path: path.stat().st_mtime_ns)
    return parts[-1].name.rstrip("0123456789") if parts else "start"


def kill_at(out: Path, arguments: list[str], seconds: float, appears: str | None) -> str | None:
    """Starts the run and kills it after some seconds of work, or as soon as a path appears.

    Returns what was under way, or None if the run ended before.
    """
    before = time.monotonic()
    process = start(out, arguments)
    began = None
    while process.poll() is None:
        if began is None and (out / "config.json").exists():
            began = time.monotonic()
        after = None if began is None else time.monotonic() - began
        if list(out.glob(appears)) if appears else after is not None and after > seconds:
            process.kill()
            process.wait()
            return stage(out)
        if time.monotonic() - before > 1800:
            process.kill()
            raise AssertionError("the run takes longer than half an hour")
        time.sleep(0.001)
    if process.returncode:
        raise AssertionError((out.parent / f"{out.name}.log").read_text())
    return None


def comparable(results: dict) -> dict:
    models = {
        name: {key: value for key, value in model.items() if key != "latency_ms"}
        for name, model in results["models"].items()
    }
    return {**{k: v for k, v in results.items() if k not in ("seconds", "command")}, "models": models}


def final_arrays(out: Path) -> dict[str, np.ndarray]:
    """Reads everything a run leaves: the last checkpoint of each stage, and the soft labels."""
    arrays = {}
    for directory in sorted(out.glob("seed*/*")):
        name = f"{directory.parent.name}/{directory.name}"
        if (directory / "store.json").exists():
            for file in sorted(directory.iterdir()):
                arrays[f"{name}/{file.name}"] = np.frombuffer(file.read_bytes(), np.uint8)
            continue
        steps = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
        tree = directory.absolute() / str(max(steps)) / "tree"
        restored = ocp.StandardCheckpointer().restore(tree)
        arrays |= {f"{name}/{path}": np.asarray(x) for path, x in restored.items()}
    return arrays


def compare(calm: Path, killed: Path) -> int:
    """Raises AssertionError where two finished runs differ; returns how many arrays were compared."""
    first, second = (json.loads((out / "results.json").read_text()) for out in (calm, killed))
    assert comparable(first) == comparable(second), "results.json differs"
    a, b = final_arrays(calm), final_arrays(killed)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert a[path].tobytes() == b[path].tobytes(), path
    return len(a)


def torture(directory: Path, kills: int, arguments: list[str], seed: int = 0) -> str:
    """Runs the experiment twice, the second time with kills; returns what was done."""
    arguments = [*arguments, "--save-seconds", "0"]
    calm, killed = directory / "calm", directory / "killed"
    began = time.monotonic()
    finish(calm, arguments)
    length = time.monotonic() - began
    rng = random.Random(seed)
    stages: Counter[str] = Counter()
    # At random moments one seldom meets the store's writing, which is soon over, nor the last student
    last = max(path.name for path in calm.glob("seed*"))
    triggers = {0: "seed0/labels", kills - 1: f"{last}/distilled"}
    while sum(stages.values()) < kills:
        trigger = triggers.get(sum(stages.values()))
        done = kill_at(killed, arguments, rng.uniform(0, 1.5 * length / kills), trigger)
        if done is None:
            break
        stages[done] += 1
    assert sum(stages.values()) == kills, f"the run ended before {kills} kills: {dict(stages)}"
    assert {"labels", "distilled"} <= stages.keys(), f"stages killed: {dict(stages)}"
    finish(killed, arguments)
    count = compare(calm, killed)
    done = f"{sum(stages.values())} kills ({dict(stages)})"
    return f"{done}; {count} arrays and results.json are the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="*", help="passed to experiments/kd_mnist.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(torture(Path(directory), options.kills, options.arguments, options.seed))


if __name__ == "__main__":
    main()

"""Small runs of all experiments: how they are started, and whether two finished ones are the same."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

FOLDER = Path(__file__).parents[2] / "experiments"
# Half a minute each. A checkpoint after each epoch, except where an epoch is a single step.
SETTINGS = {
    "kd_mnist": (
        "digits --seeds 2 --members 2 --teacher convnet:4 --student mlp:8 --teacher-epochs 20 --epochs 40 "
        "--patient --omit-classes 3"
    ),
    "kd_methods": (
        "digits --seeds 1 --methods kd fitnet rkd --teacher convnet:4,8 --student convnet:2,4 --examples 400 "
        "--teacher-epochs 10 --epochs 20"
    ),
    "label_kinds": (
        "digits --seeds 1 --teacher 16 --student 8 --teacher-epochs 20 --epochs 20 --top 2 --draws 4"
    ),
    "kd_characters": (
        "smoke --seeds 2 --teacher mlp:16 --teacher-epochs 30 --epochs 30 --curve 50 --temperatures 1 4"
    ),
    "federated": (
        "digits --seeds 1 --clients 3 --rounds 4 --steps 5 --hidden 8 4 --mixed mlp:8,4 mlp:6 --widths 1 0.5 "
        "--central-epochs 4 --public 50 --server-batch-size 25 --methods FedAvg FedDF FedMD co-distilled alone "
        "unequal-widths-different-initial-parameters-matched"
    ),
    "kd_text": (
        "smoke --length 16 --prompt 4 --teacher 8 1 2 8 --student 8 1 2 8 --steps 4 --batch-size 8 --samples 40 "
        "--teacher-rounds 4 --rounds 2 --evaluated 16 --time-rounds 4 2 2 2 2 3 3 3 3 3"
    ),
    "kd_embeddings": ("smoke --sentences 256 --evaluated 40 --epochs 4 --axes 4 --losses cosine relational"),
    "kd_pronounce": (
        "smoke --words 96 --evaluated 16 --batch-size 16 --teacher 4 8 --student 2 4 --teacher-epochs 4 --epochs 4"
    ),
    "kd_vgg": (
        "digits --seeds 1 --teacher mlp:16 --student convnet:4,4 --teacher-epochs 20 --epochs 20 "
        "--fine-tune-epochs 10 --prune-every 3"
    ),
    "compress_mnist": (
        "digits --seeds 2 --original mlp:8 --epochs 20 --tuning-epochs 10 --shares 0.5 0.25 "
        "--operators merge fresh --iterative prune --refinements 1 --examples 64"
    ),
    "inject_mnist": (
        "digits --seeds 2 --teacher mlp:12,8 --student mlp:6,4 --labels 20 40 --epochs 20 --batch-size 10 "
        "--teacher-epochs 20 --learning-rates 0.01 0.03 --scores l2 --scales 0.5 --examples 64"
    ),
    "interpolate_mnist": (
        "digits_study --seeds 2 --hidden 8 --wide 12 --epochs 10 --few 100 --few-epochs 10 --points 3 "
        "--batch-size 50"
    ),
    "sweep_mnist": (
        "digits --seeds 2 --teacher mlp:8 --student mlp:4 --examples 100 --epochs 20 --teacher-epochs 10 "
        "--temperatures 1 4 --alphas 0 0.5 1 --rungs 5 10 --chunk 5"
    ),
    "barrier_mnist": (
        "digits --seeds 1 --networks mlp:32 convnet:4 --epochs 20 --points 5 --examples 200 --batch-size 50"
    ),
    "linear_code": (
        "matrix --inputs 8 --outputs 4 --examples 2000 --ranks 1 2 3 --epochs 400 --save-seconds 0.2"
    ),
    "factorise_network": "digits --seeds 2 --original mlp:32,32 --original-epochs 20 --epochs 20 --budget 0.5",
    "quantise": "digits --seeds 2 --original mlp:32,32 --original-epochs 20 --epochs 20",
    "split_network": (
        "digits --seeds 1 --original mlp:16 --feature dense.0 --encoder mlp:4 --original-epochs 20 "
        "--stage-epochs 8 --codes 4x2 --widths 2"
    ),
}
TIMES = (
    "seconds",
    "command",
    "latency_ms",
    "step_cost",
    "time",
    "times_as_fast",
)  # differ between equal runs


def arguments(name: str) -> list[str]:
    """Lists the small settings of an experiment, as words of a command line."""
    words = SETTINGS[name].split()
    return words if "--save-seconds" in words else [*words, "--save-seconds", "0"]


def start(name: str, out: Path, words: list[str], **environment: str) -> subprocess.Popen:
    """Starts an experiment; what it prints is added to the file ``<out>.log``."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), *words, "--out", str(out)]
    with log_file(out).open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment})


def log_file(out: Path) -> Path:
    return out.parent / f"{out.name}.log"


def finish(name: str, out: Path, words: list[str]) -> float:
    """Runs an experiment to its end; returns the seconds that it took."""
    began = time.monotonic()
    if start(name, out, words).wait(1800):
        raise AssertionError(log_file(out).read_text())
    return time.monotonic() - began


def without_times(value: Any) -> Any:
    """Takes what may differ between equal runs from JSON values."""
    if isinstance(value, dict):
        return {key: without_times(x) for key, x in value.items() if key not in TIMES}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def final_arrays(out: Path) -> dict[str, np.ndarray]:
    """Reads everything a run leaves: the last checkpoint of each training, and the soft labels."""
    arrays = {}
    for directory in sorted({path.parent for path in [*out.glob("*/*/*"), *out.glob("*/*/*/*")]}):
        name = directory.relative_to(out).as_posix()
        if (directory / "store.json").exists():
            for file in sorted(directory.iterdir()):
                arrays[f"{name}/{file.name}"] = np.frombuffer(file.read_bytes(), np.uint8)
        steps = [
            int(p.parent.name) for p in directory.glob("*/_CHECKPOINT_METADATA") if p.parent.name.isdigit()
        ]
        if steps:
            last = directory.absolute() / str(max(steps))
            restored = ocp.StandardCheckpointer().restore(last / "tree")
            arrays |= {f"{name}/{path}": np.asarray(x) for path, x in restored.items()}
            info = without_times(json.loads((last / "json" / "metadata").read_text())["info"])
            arrays[f"{name}/info"] = np.frombuffer(json.dumps(info, sort_keys=True).encode(), np.uint8)
    return arrays


def compare(calm: Path, other: Path) -> int:
    """Raises AssertionError where two finished runs differ; returns how many arrays were compared."""
    first, second = (json.loads((out / "results.json").read_text()) for out in (calm, other))
    assert without_times(first) == without_times(second), "results.json differs"
    a, b = final_arrays(calm), final_arrays(other)
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert a[path].tobytes() == b[path].tobytes(), path
    assert a, "no arrays were found"
    return len(a)

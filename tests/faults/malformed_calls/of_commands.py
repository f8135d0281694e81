"""Wrong command lines of the experiments, in this process and in processes of their own."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from faults.malformed_calls.material import ROOT, Case, Outcome, fresh

# fmt: off

# Wrong command lines: experiment, words of the message, the options after the config
COMMANDS = """
kd_mnist | config must be one of | no_such_config
kd_mnist | --seeds must be at least 1 | digits --seeds 0
kd_mnist | --seeds must be at least 1 | digits --seeds -3
kd_mnist | --alpha must lie in | digits --alpha 1.5
kd_mnist | --alpha must lie in | digits --alpha nan
kd_mnist | --temperature must be positive | digits --temperature 0
kd_mnist | --temperature must be positive | digits --temperature inf
kd_mnist | --epochs must be at least 1 | digits --epochs 0
kd_mnist | --batch-size must be at least 1 | digits --batch-size 0
kd_mnist | --batch-size must be at most | digits --batch-size 100000
kd_mnist | got 'mlp:0' | digits --teacher mlp:0
kd_mnist | got 'transformer' | digits --student transformer
kd_mnist | --members must be at least 1 | digits --members 0
kd_mnist | --dropout must lie in | digits --dropout 1
kd_mnist | --omit-classes must | digits --omit-classes 10
kd_mnist | --omit-classes must | digits --omit-classes -1
kd_mnist | validation must be | digits --validation 1000000
kd_mnist | --validation must be at least 1 | digits --validation 0
kd_mnist | no_such_data | digits --dataset no_such_data
kd_mnist | must be an existing folder | digits --dataset mnist --data-dir no/such/folder
kd_mnist | no file | digits --dataset absent.npz
kd_mnist | --save-seconds must not be negative | digits --save-seconds -1
kd_mnist | --jitter must not be negative | digits --jitter -1
kd_mnist | --devices must be at least 1 | digits --devices 0
kd_vgg | --seeds must be at least 1 | digits --seeds 0
kd_vgg | depth must be one of | digits --student vgg7
kd_vgg | --temperature must be positive | digits --temperature nan
kd_vgg | --sparsity must lie in | digits --sparsity 1
kd_vgg | --pattern must | digits --pattern 2-4
kd_vgg | --dense-leaves must | digits --dense-leaves (
kd_vgg | --train-examples must be at most | digits --train-examples 5000000
kd_methods | --methods must name | digits --methods no_such
kd_methods | --weight must | digits --weight at:3
kd_methods | --epochs must be at least 1 | digits --epochs -1
kd_methods | --examples must be at most | digits --examples 99999999
compress_mnist | --budget must not be negative | digits --budget -1
compress_mnist | --shares must | digits --shares 1.5
compress_mnist | --shares must | digits --shares nan
compress_mnist | --operators must | digits --operators crop
compress_mnist | --score must | digits --score size
compress_mnist | --multiple must be at least 1 | digits --multiple 0
inject_mnist | --student must | digits --student mlp:0
inject_mnist | --labels must | digits --labels 0
inject_mnist | --scores must | digits --scores size
inject_mnist | --learning-rates must be positive | digits --learning-rates 0
inject_mnist | --examples must | digits --examples 0
inject_mnist | --examples must | digits --examples -5
inject_mnist | --scales must | digits --scales nan
interpolate_mnist | --rate must lie in | digits --rate 1.5
interpolate_mnist | --points must be at least 2 | digits --points 1
interpolate_mnist | --wide must exceed | digits --wide 1
sweep_mnist | --temperatures must be positive | digits --temperatures 0
sweep_mnist | --alphas must lie in | digits --alphas 2
sweep_mnist | --rungs must rise | digits --rungs 20 10
barrier_mnist | --points must | digits --points 1
barrier_mnist | got 'nope' | digits --networks nope
barrier_mnist | --networks must | digits --networks
label_kinds | --top must be at most | digits --top 99
label_kinds | --draws must be at least 1 | digits --draws 0
kd_characters | --labelled must be below | smoke --labelled 100000
kd_characters | --curve must be at most | smoke --curve 10 100000
kd_characters | --temperatures must be positive | smoke --temperatures 1 0
kd_characters | --students must name | smoke --students mlp:8 mlp:8
kd_characters | --teacher-distortion must be at most | smoke --teacher-distortion 9
federated | --clients must be at least 1 | digits --clients 0
federated | --public must leave | digits --public 1000000
federated | --methods must be from | digits --methods FedSGD
linear_code | --ranks must be at least 1 | matrix --ranks 0
linear_code | --ranks must be at most | matrix --ranks 1000000
linear_code | --condition must be at least 1 | matrix --condition 0.5
linear_code | --tolerance must be below 1 | matrix --tolerance 1
prune_without_training | --shares must | digits --shares 0.5 0.75
prune_without_training | --groups must | digits --groups nope
factorise_network | --budget must be positive | digits --budget 0
factorise_network | --budget must be at most 1 | digits --budget 2
quantise | --examples must | digits --examples 0
split_network | bits | digits --codes 8x17
split_network | --codes must | digits --codes 8-4
split_network | --encoder must|got 'mlp:0' | digits --encoder mlp:0
split_network | --feature must | digits --feature head
split_network | --patience must be at least 1 | digits --patience 0
kd_mnist | seeds | digits --seeds 1.5
kd_mnist | seeds | digits --seeds many
kd_mnist | no-such-option | digits --no-such-option 1
kd_vgg | score | digits --score size
"""


def of_commands() -> Iterator[Case]:
    for line in COMMANDS.strip().splitlines():
        name, words, options = line.split(" | ")
        yield Case(f"{name} {options}", words.replace("(", "\\("),
                   lambda n=name, o=options: command_line(n, o.split()))


def command_line(name: str, arguments: list[str]) -> Any:
    """Runs an experiment in this process: raises what it printed, if it ended with status 2 and one line."""
    if str(ROOT / "experiments") not in sys.path:
        sys.path.insert(0, str(ROOT / "experiments"))
    import importlib

    from harness import runs

    experiment = importlib.import_module(name)
    before, sys.argv = (
        sys.argv,
        [f"{name}.py", *arguments, *(["--out", str(fresh())] if "--out" not in arguments else [])],
    )
    errors, prints = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(prints):
            runs.run_main(experiment.main)
        status: Any = 0
    except SystemExit as exit_:
        status = exit_.code
    finally:
        sys.argv = before
    return outcome(status, errors.getvalue())


def outcome(status: Any, errors: str) -> "Outcome":
    """What a wrong command line ended with: our one line, or the few in which tyro says what it cannot read."""
    text = errors.strip()
    if status == 2 and text.startswith("error: "):
        return Outcome(text)
    read = status == 2 and "Traceback" not in text and len(text.splitlines()) < 12
    return Outcome(" ".join(text.split()), raw=not read)


def of_processes() -> Iterator[Case]:
    """The first wrong command line of each experiment, in a process of its own."""
    lines = [line.split(" | ") for line in COMMANDS.strip().splitlines()]
    for name, words, options in {line[0]: line for line in reversed(lines)}.values():
        yield Case(f"python {name}.py {options}", words, lambda n=name, o=options: process(n, o.split()))


def process(name: str, arguments: list[str]) -> "Outcome":
    """Runs an experiment as a process."""
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / f"{name}.py", *arguments, "--out", fresh()],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )
    return outcome(done.returncode, done.stderr)

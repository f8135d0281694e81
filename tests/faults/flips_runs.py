"""Damages each file of a run that is read back: checkpoints, config.json and choice.json.

    python tests/faults/flips_runs.py --flips 60           # of each file

Of a damaged checkpoint, the one before must be taken with a warning that names it ("found"); or the damage is where it
changes nothing that is read ("harmless").
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from faults.damage import Tally, damages, outcome
from harness import choose, runs

from distill_jax import _files, train
from distill_jax.models import build

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what it raises as well


def equal(a: Any, b: Any) -> bool:
    """Compares two results of a restore bit by bit."""
    leaves = [jax.tree.leaves(x[0]) for x in (a, b)]
    return a[1] == b[1] and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(*leaves, strict=True)
    )


def restore(directory: Path, like: Any) -> Any:
    with train.Checkpoints(directory) as checkpoints:
        return checkpoints.restore(like)


def flip_checkpoints(directory: Path, flips: int, tally: Tally) -> None:
    """Saves two checkpoints of a small training state, and damages each file of the newer one.

    Args:
      directory: an empty directory.
      flips: the number of changes of each file.
      tally: counts what became of them.
    """
    model = build("mlp:16", (8, 8, 1), 10, jax.random.key(0))
    state = train.init_state(model, optax.adam(1e-3), jax.random.key(1, impl="rbg"))
    states = [jax.tree.map(lambda x, i=i: x + i if x.dtype == np.float32 else x, state) for i in (1, 2)]
    states = [state._replace(key=jax.random.key_data(state.key)) for state in states]
    with train.Checkpoints(directory) as checkpoints:
        for i, each in enumerate(states):
            checkpoints.save(i + 1, each, {"epoch": i + 1, "history": {"loss": [0.25] * (i + 1)}})
    newest = restore(directory, states[0])
    (directory / "2").rename(directory.parent / "2")
    older = restore(directory, states[0])
    (directory.parent / "2").rename(directory / "2")
    assert (newest[1]["epoch"], older[1]["epoch"]) == (2, 1)

    def read():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = restore(directory, states[0])
        messages = [str(warning.message) for warning in caught if "passed over" in str(warning.message)]
        if messages and found is not None and equal(found, older):
            raise ValueError(messages[0])  # refused in one line, and the one before taken
        return found

    assert outcome(read, lambda found: equal(found, newest)) == ("harmless", "")
    files = sorted(path for path in (directory / "2").rglob("*") if path.is_file())
    for file in files:
        name = file.relative_to(directory / "2").as_posix()
        parts = ["<32 digits>" if len(part) == 32 else part for part in name.split("/")]
        for kind in damages(file, flips):
            result = outcome(read, lambda found: equal(found, newest), names=str(directory))
            tally.add("checkpoint/" + "/".join(parts), kind, result)


@dataclasses.dataclass
class Options:
    force: bool = False
    temperature: float = 4.0


def flip_files(directory: Path, flips: int, tally: Tally) -> None:
    """Damages config.json and choice.json of a run."""
    config = {"temperature": 4.0, "omit_classes": [3, 5], "dataset": "digits", "data": "0f" * 8}
    runs.open_run(directory, config)
    file = directory / "config.json"

    def content() -> dict[str, Any]:
        runs.open_run(directory, config)
        return _files.unseal(json.loads(file.read_bytes()))

    for kind in damages(file, flips):
        if kind != "delete":  # then it is an empty directory, in which a new run begins
            tally.add(
                "config.json",
                kind,
                outcome(content, lambda x: x == {runs.MARK: 1, **config}, names=str(directory)),
            )

    choice = choose.Choice(
        {"temperature": 2.0}, True, [{"stage": "teacher", "validation_errors": 4}], ["So."]
    )
    file = directory / "choice.json"
    _files.write_json(file, _files.seal(choice._asdict()))
    run = types.SimpleNamespace(directory=directory, dataset=None, config=Options())
    for kind in damages(file, flips):
        if kind != "delete":
            found = outcome(lambda: choose.choose_once(run), lambda x: x == choice, names=str(file))
            tally.add("choice.json", kind, found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=60, help="of each file")
    parser.add_argument("--only", choices=("checkpoints", "files"), help="files: config.json and choice.json")
    options = parser.parse_args()
    tally = Tally()
    with tempfile.TemporaryDirectory() as directory:
        for name in ("checkpoints", "run"):
            (Path(directory) / name).mkdir()
        if options.only != "files":
            flip_checkpoints(Path(directory) / "checkpoints", options.flips, tally)
        if options.only != "checkpoints":
            flip_files(Path(directory) / "run", options.flips, tally)
    print(tally)
    raise SystemExit(bool(tally.bad))


if __name__ == "__main__":
    main()

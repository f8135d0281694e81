"""The report of compress_to_file: its columns, its picture, and what it says of each seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import Run, pictures, results

from distill_jax import export, models
from distill_jax.compress import search

if TYPE_CHECKING:
    from compress_to_file import Config


def from_files(key: str) -> results.Column:
    """Makes a column of what was measured of the files."""
    return lambda model: results.mean_sd([each[key] for each in model["files"]])


BATCHES = 1, 7, 256  # sizes of the batches in which files are compared with networks in memory
FAILED = (
    "a file is not 5 times as fast or 10 times as small, loses over 0.3 points, or computes something else"
)
COLUMNS: Mapping[str, results.Column] = {
    "bytes of the file": from_files("bytes"),
    "ms from the file": from_files("latency_ms"),
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "ECE %": results.score("ece", percent=True),
    "agreement %": results.score("agreement", percent=True),
}


def described(found: search.BestFile) -> list[dict[str, Any]]:
    """Lists what the files of all candidates measure, and the validation errors of those that were trained, in %."""
    return [
        {
            "name": c.name, "numbers": c.settings.get("numbers", "float"), "bytes": c.bytes, "ms": c.latency_ms,
            "epochs": c.epochs,
        }
        | ({"error": 100 - 100 * c.quality} if math.isfinite(c.quality) else {})
        for c in found.candidates.values()
    ]  # fmt: skip


def run_file(path: Path, images: np.ndarray, batch: int = 500) -> np.ndarray:
    """Runs an exported file on inputs ``[examples, ...]``, batch by batch: its logits ``[examples, classes]``."""
    if path.suffix != ".onnx":
        return models.predict(models.load(path), images, batch_size=batch)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    parts = (images[i : i + batch] for i in range(0, len(images), batch))
    return np.concatenate([session.run(None, {given.name: part})[0] for part in parts])


def compared(path: Path, model: models.Model, images: np.ndarray) -> list[dict[str, Any]]:
    """Compares a file with its network in memory, for inputs in batches of several sizes.

    Returns:
      For each size the largest difference of logits, as a share of the largest logit; the share of inputs of which both
      name the same class; and whether this is good: exact for StableHLO, differences up to 1e-5 for ONNX, and 99.9 % of
      the classes for ONNX with integers as activations.
    """
    integers = export.describe(path)["integers"]
    rounded = any(each["inputs"] for each in integers.values())
    limit = 0.0 if path.suffix != ".onnx" else math.inf if rounded else 1e-5
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        ours, theirs = models.predict(model, images, batch_size=batch), run_file(path, images, batch)
        difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
        same = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
        good = difference <= limit and same >= 0.999
        rows.append(
            {"file": path.suffix, "batch": batch, "difference": difference, "same": same, "good": good}
        )
    return rows


def is_good(file: Mapping[str, Any]) -> bool:
    """Says whether what was measured of a seed's chosen file is what the experiment is for; else see ``FAILED``."""
    kept = file["faster"] >= 5 and file["smaller"] >= 10 and file["points lost"] <= 0.3 + 1e-9
    return kept and all(row["good"] for row in file["compared"])


def lost(found: Mapping[str, Any], seed: int) -> float:
    """Computes how many points of test accuracy the chosen file of a seed loses."""
    before, after = (found["models"][name]["test"]["accuracy"][seed] for name in ("original", "chosen"))
    return 100 * (before - after)


def headline(config: Config, files: Sequence[Mapping[str, Any]]) -> str:
    """Says what the chosen files are to the original under XLA."""
    faster, smaller, points = (
        results.mean_sd([f[key] for f in files]) for key in ("faster", "smaller", "points lost")
    )
    return (
        f"The chosen files are {faster} times as fast at batch {config.batch} and {smaller} times as small as the "
        f"original under XLA, and lose {points.replace('-', '−')} points of test accuracy."
    )


def notes(config: Config, files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Gives the three figures of each seed, and says what was measured, and where."""
    rows = [["seed", "chosen", "times as fast", "times as small", "points lost"]]
    for seed, file in enumerate(files):
        figures = [f"{file[key]:.2f}" for key in ("faster", "smaller", "points lost")]
        rows.append([str(seed), file["chosen"], *figures])
    judged = (
        "All test figures of what was chosen are those of the exported file, run on the test images. These, in batches "
        "of three sizes, compare it with the network in memory: the largest difference of a logit as a share of the "
        "largest logit, and the images of which both name the same class, the worst of all seeds."
    )
    same = [["file", "batch", "difference", "same class %"]]
    for of in zip(*(file["compared"] for file in files), strict=True):
        difference, classes = max(row["difference"] for row in of), min(row["same"] for row in of)
        same.append([of[0]["file"], str(of[0]["batch"]), f"{difference:.1g}", f"{100 * classes:.2f}"])
    runtimes = " and ".join(dict.fromkeys(files[0][name]["runtime"] for name in ("original", "small")))
    measured = (
        f"Measured from the files by {runtimes}, {config.threads} threads, on {files[0]['small']['machine']}; original "
        "and chosen file by turns, twice, in fresh processes; the shorter times are given."
    )
    return [results.markdown(rows), judged, results.markdown(same), measured]


def draw(run: Run, files: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Draws the validation error against bytes and time, a point for each candidate that was trained."""

    def points(of: Sequence[Mapping[str, Any]]) -> np.ndarray:
        rows = [[each["bytes"], each["ms"], each["error"]] for each in of if "error" in each]
        return np.array(rows, np.float64).reshape(-1, 3)

    every = [each for file in files for each in file["candidates"]]
    small = [each for each in every if each["name"] != "original"]
    kinds = {name: [e for e in small if e["numbers"] == name] for name in {e["numbers"]: 0 for e in small}}
    chosen = [each for file in files for each in file["candidates"] if each["name"] == file["chosen"]]
    pictures.front(
        run.directory / "front.png", {name: points(of) for name, of in kinds.items()}, ("bytes of the file", "ms"),
        ylabel="validation error, %", chosen=points(chosen),
        original=points([each for each in every if each["name"] == "original"]),
    )  # fmt: skip
    return {
        "Validation error against what the files measure, all seeds; candidates that did not go on to the last round "
        "with the error that they had": "front.png"
    }


def write_card(
    config: Config, run: Run, seed: int, file: Mapping[str, Any], entry: Mapping[str, Any]
) -> Path:
    """Writes the card of a chosen file."""
    return export.card(
        run.directory / file["file"],
        title=f"{config.original} on {run.dataset.name}, {file['chosen']}",
        origin=f"{file['chosen']} of {config.original}, by experiments/compress_to_file.py",
        data=f"{len(run.dataset.test.label)} test examples of {run.dataset.name}, {run.dataset.source}",
        figures={name: values[seed] for name, values in entry["test"].items()},
        latencies=[file["small"]],
    )

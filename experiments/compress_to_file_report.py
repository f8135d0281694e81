"""The report of compress_to_file: its columns, its picture, and what it says of each seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import Run, pictures, prepare, results

from distill_jax import export, models
from distill_jax.compress import search

if TYPE_CHECKING:
    from compress_to_file import Config


def from_files(key: str) -> results.Column:
    """Makes a column of what was measured of the files."""
    return lambda model: results.mean_sd([each[key] for each in model["files"]])


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
        {"name": c.name, "bits": c.settings.get("bits", 32), "bytes": c.bytes, "ms": c.latency_ms, "epochs": c.epochs}
        | ({"error": 100 - 100 * c.quality} if math.isfinite(c.quality) else {})
        for c in found.candidates.values()
    ]  # fmt: skip


def run_file(path: Path, images: np.ndarray) -> np.ndarray:
    """Runs an exported file on images: its logits ``[examples, classes]``."""
    if path.suffix != ".onnx":
        return models.predict(models.load(path), images, prepare=prepare)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    parts = np.array_split(images, math.ceil(len(images) / 500))
    return np.concatenate([session.run(None, {given.name: prepare(part)})[0] for part in parts])


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
    rows = [["seed", "chosen", "times as fast", "times as small", "points lost", "other classes"]]
    for seed, file in enumerate(files):
        figures = [f"{file[key]:.2f}" for key in ("faster", "smaller", "points lost")]
        rows.append([str(seed), file["chosen"], *figures, str(file["other classes"])])
    judged = (
        "All test figures of what was chosen are those of the exported file, run on the test images. 'Other classes' "
        "counts the test images of which the file names another class than the network that it was made from."
    )
    runtimes = " and ".join(dict.fromkeys(files[0][name]["runtime"] for name in ("original", "small")))
    measured = (
        f"Measured from the files by {runtimes}, {config.threads} threads, on {files[0]['small']['machine']}; original "
        "and chosen file by turns, twice, in fresh processes; the shorter times are given."
    )
    return [results.markdown(rows), judged, measured]


def draw(run: Run, files: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Draws the validation error against bytes and time, a point for each candidate that was trained."""

    def points(of: Sequence[Mapping[str, Any]]) -> np.ndarray:
        rows = [[each["bytes"], each["ms"], each["error"]] for each in of if "error" in each]
        return np.array(rows, np.float64).reshape(-1, 3)

    every = [each for file in files for each in file["candidates"]]
    small = [each for each in every if each["name"] != "original"]
    kinds = {
        f"{bits} bits": [e for e in small if e["bits"] == bits] for bits in {e["bits"]: 0 for e in small}
    }
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

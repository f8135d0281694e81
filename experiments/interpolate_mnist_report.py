"""What the report of interpolate_mnist.py says and shows: mixing, aligning, barriers, and the sweep of λ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import Run, pictures, results

if TYPE_CHECKING:
    from interpolate_mnist import Config


def headline(config: Config, found: Mapping[str, Any], labels: int) -> str:
    """Says what mixing and aligning did, with all labels and a teacher of the student's width."""
    of = {
        entry["method"]: entry
        for entry in found["models"].values()
        if entry["teacher_hidden"] == config.hidden and entry["labels"] == labels
    }
    ways = {
        "pull": "Pulling the student towards its teacher",
        "through": "Training through the interpolation",
    }
    sentences = [
        results.summary({"models": of}, model=way, method=f"{method} (λ = {config.rate:g})")
        for way, method in ways.items()
    ]
    trained, aligned = (f"{np.mean(line['barrier']):.2g}" for line in found["lines"][:2])
    return " ".join(sentences) + (
        " With the teacher's units in the order nearest to the student's, the barrier of the validation loss "
        f"between the two was {aligned} nats instead of {trained}."
    )


def notes(found: Mapping[str, Any]) -> list[str]:
    """Explains the names of the models, and describes the lines between teacher and student."""
    texts = [
        f"{results.mean_sd(line['barrier'])} (teacher of {line['teacher_hidden']} units, "
        f"{'aligned' if line['aligned'] else 'as trained'}, cosine {results.mean_sd(line['cosine'])})"
        for line in found["lines"]
    ]
    return [
        "In brackets: the number of hidden units of the teacher, and of labelled examples.",
        "Barrier of the validation loss on the straight line from the teacher to the student from scratch, in "
        f"nats, and cosine between their parameters: {'; '.join(texts)}.",
    ]


def draw(run: Run, found: Mapping[str, Any]) -> dict[str, str]:
    """Draws the pictures: caption → file name."""
    drawn, band = {}, f"mean of {run.config.seeds} seeds; band: one standard deviation"
    series = {
        f"{each['teacher_hidden']} units, {'aligned' if each['aligned'] else 'as trained'}": each[
            "validation_loss"
        ]
        for each in found["lines"]
    }
    pictures.curves(
        run.directory / "line.png", found["lines"][0]["t"], series,
        xlabel="from teacher (0) to student (1)", ylabel="validation loss, nats",
    )  # fmt: skip
    drawn[
        "Validation loss on the straight line from the teacher to the student from scratch, with the teacher's "
        f"units as trained, and in the order nearest to the student's; {band}"
    ] = "line.png"
    series = dict(found["sweep"])
    rate = series.pop("rate")
    if len(rate):
        pictures.curves(run.directory / "sweep.png", rate, series, xlabel="λ", ylabel="test errors")
        drawn[f"Test errors against λ, the teacher's share of the mixed parameters; {band}"] = "sweep.png"
    return drawn

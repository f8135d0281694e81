"""What the report of smallest_mnist.py says and shows: sizes, errors, and what others have published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from harness import Run, pictures, results

# Bytes and test error in per cent, as the papers give them; weights alone, without a decoder
PUBLISHED = {
    "LeNet-300-100, Deep Compression (Han et al. 2016)": (27_000, 1.58),
    "LeNet-5, Deep Compression (Han et al. 2016)": (44_000, 0.74),
    "LeNet-300-100, Oktay et al. 2020": (8_560, 1.9),
    "LeNet-5, Oktay et al. 2020": (2_840, 0.9),
    "LeNet-5, MIRACLE (Havasi et al. 2019)": (1_520, 0.96),
}
COLUMNS: Mapping[str, results.Column] = {
    "bytes": results.count("bytes"),
    "weights": results.count("weights"),
    "decoder": results.count("decoder"),
    "parameters": results.count("parameters"),
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "validation errors": lambda model: results.mean_sd(model["validation"]["errors"]),
    "agreement %": results.score("agreement", percent=True),
}


def percent(entry: Mapping[str, Any]) -> str:
    """Writes the test error of a model in per cent."""
    return results.mean_sd([1 - accuracy for accuracy in entry["test"]["accuracy"]], percent=True)


def verdict(found: Mapping[str, Any]) -> str:
    """Says how small the chosen program and the packed MLP are, and how often they err."""
    models = found["models"]
    chosen, packed, original = (models[name] for name in (found["chosen"], "original, packed", "original"))
    return (
        f"{chosen['bytes']:,.0f} bytes, decoder included, classify with {percent(chosen)} % test error; the MLP "
        f"becomes {found['ratio']:.0f} times smaller, {packed['bytes']:,.0f} bytes, with {percent(packed)} % "
        f"instead of {percent(original)} %."
    )


def notes(found: Mapping[str, Any]) -> list[str]:
    """Says what is counted, and whether the programs agree with the networks in memory."""
    programs = [entry for entry in found["models"].values() if "differences" in entry]
    seeds = len(programs[0]["test"]["errors"])
    different = sum(entry["differences"] for entry in programs)
    return [
        "Bytes of a small network: the whole Python program, which needs Python and NumPy alone. Weights: the coded "
        "integers in it. Decoder: its source as zlib compresses it, which decodes the weights and classifies. "
        "What remains is what Python needs to read both. Bytes of teacher and original: their parameters in float32.",
        f"Chosen on validation data: {found['chosen']}.",
        f"The {len(programs) * seeds} programs, each in a fresh process, and the networks in memory differ in the "
        f"class of {different} test images.",
    ]


def draw(run: Run, found: Mapping[str, Any], networks: Sequence[str]) -> dict[str, str]:
    """Draws test errors against bytes; returns caption → file name."""
    models = found["models"]
    series = {
        "small networks": networks,
        "MLP, packed": ["original, packed"],
        "MLP": ["original"],
        "chosen": [found["chosen"]],
    }
    measured = {
        name: (
            np.array([models[n]["bytes"] for n in names]),
            np.array([[100 * (1 - a) for a in models[n]["test"]["accuracy"]] for n in names]),
        )
        for name, names in series.items()
    }
    pictures.frontier(
        run.directory / "frontier.png", measured, PUBLISHED if run.config.dataset == "mnist" else {}
    )
    caption = "Test error against bytes, mean over seeds; bars: one standard deviation"
    if run.config.dataset == "mnist":
        caption += ". Crosses: published sizes, which leave the decoder out"
    return {caption: "frontier.png"}

"""What the report of split_network.py says and shows: bytes that are sent, costs on the device, what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from harness import Run, Trained, pictures, prepare, results

COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "FLOPs": results.count("flops"),
    "bytes of code": results.count("bytes_sent"),
    "device FLOPs %": lambda m: f"{100 * m['device_flops']:.1f}" if "device_flops" in m else None,
    "errors": results.score("errors"),
    "accuracy %": results.score("accuracy", percent=True),
    "agreement %": results.score("agreement", percent=True),
    "KL from original": results.score("teacher_kl"),
    "pixels' squared error": results.score("inputs_error"),
    "epochs of stages": lambda m: results.stage_epochs(m["stages"][0]) if "stages" in m else None,
}


def describe(found: Mapping[str, Any], name: str) -> str:
    """Says in one sentence what a compressed network sends, computes on the device, and loses."""
    model, original = found["models"][name], found["models"]["original"]
    lost = 100 * (np.mean(original["test"]["accuracy"]) - np.mean(model["test"]["accuracy"]))
    return (
        f"{name}: it sends {model['bytes_sent']} B per example, computes {100 * model['device_flops']:.1f} % of the "
        f"original's FLOPs on the device, and {'gains' if lost < 0 else 'loses'} {abs(lost):.2f} points of accuracy."
    )


def examples(run: Run, logits: Mapping[str, np.ndarray]) -> str:
    """Lists what the original and some compressed networks predict for five test examples."""
    test, names = run.dataset.test, run.dataset.class_names
    lines = ["Test examples (seed 1), with the predicted class and its probability:"]
    for i in range(5):
        probabilities = {name: np.asarray(jax.nn.softmax(values[i])) for name, values in logits.items()}
        parts = [f"{name}: {names[p.argmax()]} ({p.max():.3f})" for name, p in probabilities.items()]
        lines.append("    " + "; ".join([f"true {names[test.label[i]]}", *parts]))
    return "\n".join(lines)


def draw(
    run: Run, trained: Sequence[Mapping[str, Trained]], found: Mapping[str, Any], splits: Sequence[str],
    kept: Mapping[str, np.ndarray],
) -> dict[str, str]:  # fmt: skip
    """Draws the pictures: caption → file name."""
    seeds, dataset = len(trained), run.dataset
    spread = f", mean over {seeds} seeds; band or bars: one standard deviation" if seeds > 1 else ""
    histories = {"original": [seed["original"].history for seed in trained]}
    pictures.learning_curves(
        run.directory / "learning_curves.png", histories, validation_size=len(dataset.validation.id)
    )
    drawn = {f"Training of the original{spread}": "learning_curves.png"}
    if splits:
        order = sorted(splits, key=lambda name: found["models"][name]["bytes_sent"])
        wrong = {
            n: 100 * (1 - np.array(found["models"][n]["test"]["accuracy"])) for n in ("original", *order)
        }
        pictures.code_widths(
            run.directory / "bytes.png", [found["models"][name]["bytes_sent"] for name in order],
            {"split": [wrong[name] for name in order]}, ylabel="test error, %", xlabel="bytes sent per example",
            levels={"original": float(wrong["original"].mean())},
        )  # fmt: skip
        drawn[f"Test error of split networks against the number of bytes sent per example{spread}"] = (
            "bytes.png"
        )
    if kept:
        rows = {"test images": prepare(dataset.test.image[:12]), **kept}
        pictures.reconstructions(run.directory / "reconstructions.png", rows)
        caption = f"Test images, and what the autoencoders make of their codes (seed 1 of {seeds})"
        drawn[caption] = "reconstructions.png"
    return drawn

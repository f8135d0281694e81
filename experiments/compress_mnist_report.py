"""What the report of compress_mnist.py says and shows: costs, claims, and the network that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import Run, pictures, results

if TYPE_CHECKING:
    from compress_mnist import Config

FRESH = "fresh"  # the operator that starts at random


def untuned(model: Mapping[str, Any]) -> str | None:
    """Makes the cell of the accuracy before fine-tuning."""
    return results.mean_sd(model["untuned"]["accuracy"], percent=True) if "untuned" in model else None


COLUMNS = {
    **{name: results.COLUMNS[name] for name in ("parameters", "errors", "accuracy %", "F1 %")},
    "accuracy % before fine-tuning": untuned,
    "validation NLL": lambda model: f"{model['validation']['nll']:.4f}",
    "ms at 1 / 256": results.COLUMNS["ms at 1 / 256"],
}


def claims(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Says what half of the units, and a tenth of the operations, cost, for the best network by validation.

    Returns:
      Records of ``claim``, ``model``, ``points`` of test accuracy lost (mean over seeds), and ``flops`` and
      ``time`` (at batch 256) as shares of the original's.
    """
    found, original = [], entries["original"]
    edited = {name: e for name, e in entries.items() if e.get("operator", FRESH) != FRESH}
    flops = {name: e["flops"] / original["flops"] for name, e in edited.items()}
    for claim, names in {
        "half of the units": [name for name, entry in edited.items() if entry["share"] == 0.5],
        "a tenth of the operations": [name for name in edited if flops[name] <= 0.1],
    }.items():
        for best in sorted(names, key=lambda name: edited[name]["validation"]["nll"])[:1]:
            lost = np.mean(original["test"]["accuracy"]) - np.mean(edited[best]["test"]["accuracy"])
            time = edited[best]["latency_ms"]["256"] / original["latency_ms"]["256"]
            record = {"claim": claim, "model": best, "points": 100 * float(lost), "flops": flops[best]}
            found.append(record | {"time": time})
    return found


def describe_chosen(config: Config, found: Mapping[str, Any]) -> str:
    """Says in one sentence which network was chosen, and what it costs."""
    best, original = (found["models"][name] for name in (found["chosen"], "original"))
    budget = f"{config.budget:g} nats of the original's validation loss, {original['validation']['nll']:.4f}"
    if best is original:
        return f"No smaller network is within {budget}."
    accuracy = [results.mean_sd(each["test"]["accuracy"], percent=True) for each in (best, original)]
    return (
        f"Chosen: {found['chosen']}, the smallest within {budget} ({best['validation']['nll']:.4f}): "
        f"{best['parameters']:,} of {original['parameters']:,} parameters, test accuracy {accuracy[0]} % "
        f"(original: {accuracy[1]} %)."
    )


def headline(found: Mapping[str, Any]) -> str:
    """Compares the chosen network with one of its size that started at random, or with the original."""
    chosen, entries = found["chosen"], found["models"]
    if chosen == "original":
        return "Compression found no smaller network within the budget."
    twin = (FRESH, entries[chosen]["share"])
    twins = [name for name, e in entries.items() if (e.get("operator"), e.get("share")) == twin]
    method = f"Compression ({chosen})"
    if twins:
        method = f"Starting from units of the original ({chosen}), not at random ({twins[0]}),"
    return results.summary(found, baseline=[*twins, "original"][0], model=chosen, method=method)


def draw(config: Config, run: Run, found: Mapping[str, Any]) -> dict[str, str]:
    """Draws accuracy against costs after fine-tuning, and accuracy against the share before it."""
    original, *smaller = found["models"].values()
    of = {(entry["operator"], entry["iterative"], entry["share"]): entry for entry in smaller}
    series: dict[str, list[Any]] = {}
    for (operator, iterative, _), entry in of.items():
        # The first step of an iterative series is one of those at once
        first = [of[operator, False, config.shares[0]]] if iterative else []
        series.setdefault(f"{operator}, iterative" if iterative else operator, first).append(entry)
    accuracies = {name: 100 * np.array([e["test"]["accuracy"] for e in es]) for name, es in series.items()}
    level = 100 * float(np.mean(original["test"]["accuracy"]))
    costs: dict[str, Callable[[Any], float]] = {
        "parameters": lambda entry: entry["parameters"],
        "FLOPs of one example": lambda entry: entry["flops"],
    }
    pictures.tradeoffs(
        run.directory / "tradeoffs.png", {"test accuracy": accuracies},
        {cost: {n: np.array([f(e) for e in es]) for n, es in series.items()} for cost, f in costs.items()},
        ({"test accuracy": level}, {cost: f(original) for cost, f in costs.items()}),
    )  # fmt: skip
    seeds = f"{config.seeds} seeds" if config.seeds > 1 else "one seed"
    drawn = {
        f"Test accuracy against costs after fine-tuning, mean over {seeds}; bars: one standard deviation; "
        "cross: the original": "tradeoffs.png"
    }
    at_once = {
        operator: [of[operator, False, share] for share in config.shares]
        for operator in config.operators
        if operator != FRESH
    }
    pictures.curves(
        run.directory / "untuned.png", config.shares,
        {n: 100 * np.array([e["untuned"]["accuracy"] for e in es]).T for n, es in at_once.items()},
        xlabel="share of the units left", ylabel="accuracy before fine-tuning, %",
    )  # fmt: skip
    drawn[
        f"Test accuracy before any fine-tuning against the share of the units left, mean over {seeds}; "
        "band: one standard deviation"
    ] = "untuned.png"
    return drawn

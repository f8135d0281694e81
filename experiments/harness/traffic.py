"""What methods reach and what they send: evaluation of clients and servers, and the comparison with FedAvg."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from distill_jax import metrics, models
from distill_jax.train import federated, sweeps
from harness import results
from harness.experiment import Run, prepare

COLUMNS: Mapping[str, results.Column] = {
    "accuracy %": results.score("accuracy", percent=True),
    "clients' own": lambda m: results.mean_sd(m["clients"], percent=True) if "clients" in m else None,
    "their ensemble's": lambda m: results.mean_sd(m["ensemble"], percent=True) if "ensemble" in m else None,
    "minus FedAvg's": lambda m: m.get("difference"),
    "clients' minus FedAvg's": lambda m: m.get("clients_difference"),
    "validation % after round 1": lambda m: results.mean_sd(m["rounds"][0]) if "rounds" in m else None,
    "after the last": lambda m: results.mean_sd(m["rounds"][-1]) if "rounds" in m else None,
    "MB up": lambda m: f"{m['sent'][0] / 1e6:.3g}" if "sent" in m else None,
    "MB down": lambda m: f"{m['sent'][1] / 1e6:.3g}" if "sent" in m else None,
    "of FedAvg's bytes": lambda m: m.get("share"),
    "of those in float16": lambda m: m.get("share_float16"),
    "clients left out of rounds": lambda m: f"{m['left_out']:g}" if m.get("left_out") else None,
}


class Trained(NamedTuple):
    """What a method made."""

    model: Mapping[str, Any]  # as in State; a server that learned from predictions is added
    sent: tuple[float, float] | None  # bytes up and down
    history: Mapping[str, Any]  # figures for each round


def evaluate(run: Run, trained: Sequence[Mapping[str, Trained]]) -> dict[str, Any]:
    """Evaluates all methods on the test set; without a server, the mean over the clients counts."""
    split, table = run.dataset.test, {}

    def figures(logits):
        return metrics.figures(logits, split.label)

    for name in trained[0]:
        entry: dict[str, Any] = {"test": {}}
        for each in (seed[name] for seed in trained):
            stacks = [
                models.predict(sweeps.as_one(stack), split.image, prepare=prepare).swapaxes(0, 1)
                for stack in each.model.get("clients", ())
            ]
            if stacks:
                logits = np.concatenate(stacks)
                own = [figures(one) for one in logits]
                shown = {n: float(np.mean([f[n] for f in own])) for n in own[0]}
                together = figures(federated.average_predictions(logits, of="probabilities"))
                entry.setdefault("clients", []).append(shown["accuracy"])
                entry.setdefault("ensemble", []).append(together["accuracy"])
            if "server" in each.model:
                shown = figures(models.predict(each.model["server"], split.image, prepare=prepare))
            for figure, value in shown.items():
                entry["test"].setdefault(figure, []).append(value)
        histories = [seed[name].history for seed in trained]
        if once := [seed[name].sent for seed in trained if seed[name].sent is not None]:
            entry["sent"] = np.mean(np.asarray(once, float), 0).tolist()
        if histories[0]:
            wrong = np.array([h["validation_errors"] for h in histories])
            right = 100 - 100 * wrong / len(run.dataset.validation.label)
            entry["rounds"] = right.T.tolist()  # [rounds][seeds]
            sent = [np.add(h["bytes_up"], h["bytes_down"]) for h in histories]
            entry["bytes_sent"] = np.cumsum(sent, 1).mean(0)
            entry["left_out"] = sum(np.sum(h["left_out"]) for h in histories)
        table[name] = entry
    return compare(table)


def compare(table: dict[str, Any]) -> dict[str, Any]:
    """Adds to each entry how it differs from FedAvg: accuracy by seed, and bytes."""
    if "FedAvg" not in table:
        return table
    accuracy, whole = table["FedAvg"]["test"]["accuracy"], sum(table["FedAvg"]["sent"])
    for entry in table.values():
        if entry is not table["FedAvg"]:
            entry["difference"] = results.points(accuracy, entry["test"]["accuracy"])
            if "clients" in entry:
                entry["clients_difference"] = results.points(accuracy, entry["clients"])
        if part := sum(entry.get("sent", [])):
            entry["share"], entry["share_float16"] = times(part, whole), times(2 * part, whole)
    return table


def differences(table: Mapping[str, Any], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """Compares pairs of methods seed by seed, second minus first; a paragraph for the report, or none."""
    told = []
    for first, second in pairs:
        if first in table and second in table:
            a, b = table[first], table[second]
            said = f"{second} minus {first}: {results.points(a['test']['accuracy'], b['test']['accuracy'])}"
            if "clients" in a and "clients" in b:
                said += f", of the clients' own {results.points(a['clients'], b['clients'])}"
            if "rounds" in a and "rounds" in b:
                begun = [np.divide(entry["rounds"][0], 100) for entry in (a, b)]
                said += f", of validation images after round 1 {results.points(*begun)}"
            told.append(said)
    return [f"Points of test accuracy, ± the standard error over seeds: {'; '.join(told)}."] if told else []


def headline(table: Mapping[str, Any]) -> str:
    """Says what each method that sends predictions does against FedAvg, and its share of FedAvg's bytes."""
    accuracy = {name: 100 * np.mean(entry["test"]["accuracy"]) for name, entry in table.items()}
    central = f"{accuracy['central']:.2f} %"
    told = [
        f"{name} with {entry['share']} of its bytes ({entry['share_float16']} of those in float16): the clients "
        f"{entry['clients_difference']} points, a network of the server {entry['difference']}"
        for name, entry in table.items()
        if "clients_difference" in entry and "share" in entry
    ]
    if not told:
        return f"Central training: {central} of the test images."
    return (
        f"FedAvg: {accuracy['FedAvg']:.2f} % of the test images. Against it, {'; '.join(told)}. All images in one "
        f"place: {central}."
    )


def times(part: float, whole: float) -> str:
    """Writes a ratio of bytes: "1/25", or "3.2 times" where there are more.

    >>> times(4, 100), times(250, 100)
    ('1/25', '2.5 times')
    """
    if part == whole:
        return "1"
    return f"1/{whole / part:.3g}" if part < whole else f"{part / whole:.3g} times"

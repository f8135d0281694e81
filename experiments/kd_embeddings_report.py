"""What the experiment on sentence embeddings measures and reports: see kd_embeddings.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import pictures, results, sentences

from distill_jax import metrics, models

if TYPE_CHECKING:
    from kd_embeddings import Config, Lesson

COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "FLOPs per sentence": results.count("flops"),
    "same neighbours %": lambda model: results.mean_sd(model["overlap"], percent=True),
    "rank correlation": lambda model: results.mean_sd(model["correlation"]),
    "right book or file %": lambda model: results.mean_sd(model["accuracy"], percent=True),
    "sentences per second": lambda model: f"{model['time']['network']:,.0f}" if "time" in model else None,
    "with the tokenizer": lambda model: f"{model['time']['whole']:,.0f}" if "time" in model else None,
}


def evaluate(lesson: Lesson, trained: Sequence[Mapping[str, models.Model]]) -> dict[str, Any]:
    """Evaluates all models on the held-out sentences: the ``models`` of results.json."""
    test, config = lesson.data.test, lesson.config
    every: dict[str, list[models.Model]] = {"teacher": [lesson.teacher]}
    for name in config.students:
        every[f"{name}, untrained"] = [lesson.start(name)]
        every[name] = [seed[name] for seed in trained]
    found = {name: [lesson.embed(model, test) for model in each] for name, each in every.items()}
    similarities = {name: [x @ x.T for x in each] for name, each in found.items()}
    vocabulary = len(lesson.encoder.params["embedding"])
    similarities["bag of words"] = [sentences.bag_similarities(test, lesson.data.train, vocabulary)]
    truth = similarities["teacher"][0]
    table = {
        name: {
            "overlap": [sentences.overlap(s, truth, config.neighbours) for s in each],
            "correlation": [sentences.rank_correlation(s, truth) for s in each],
            "accuracy": [sentences.centroid_accuracy(s, test.label) for s in each],
        }
        for name, each in similarities.items()
    }
    first = {name: each[0] for name, each in every.items()}
    for name, entry in speeds(first, lesson.data, lesson.tokenizer).items():
        table[name] |= entry
    return table


def speeds(
    every: Mapping[str, models.Model], data: sentences.Corpus, tokenizer: sentences.Tokenizer
) -> dict[str, Any]:
    """Measures parameters, FLOPs and sentences per second, the models in turn; alone, and with the tokenizer."""
    words = data.words[:64]
    x = jax.tree.map(jnp.asarray, tokenizer(words))
    programs = {name: jax.jit(lambda m, x: m(x)).lower(model, x).compile() for name, model in every.items()}
    calls = [functools.partial(program, every[name], x) for name, program in programs.items()]
    *seconds, splitting = np.median(
        metrics.timings([*calls, lambda: tokenizer(words)["tokens"]], repeats=15), 0
    )
    return {
        name: {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(every[name].params)),
            "flops": float((program.cost_analysis() or {}).get("flops", 0)) / len(words),
            "time": {"network": len(words) / second, "whole": len(words) / (second + splitting)},
        }
        for (name, program), second in zip(programs.items(), seconds, strict=True)
    }


def draw(lesson: Lesson) -> dict[str, str]:
    """Draws the rank correlation on validation data against the epoch; returns caption → file name."""
    found = {
        name: np.array([history["validation_correlation"] for history in histories]).T
        for name, histories in lesson.histories.items()
    }
    curves = {name: (np.arange(1, len(values) + 1), values) for name, values in found.items()}
    levels = {
        f"{name}, untrained": lesson.validate(lesson.start(name))["validation_correlation"]
        for name in lesson.config.students
    }
    pictures.against(
        lesson.run.directory / "epochs.png",
        curves,
        xlabel="epoch",
        ylabel="validation rank correlation",
        levels=levels,
    )
    caption = "Rank correlation with the teacher's similarities on validation data"
    return {f"{caption}: means over seeds, bands one standard deviation": "epochs.png"}


def verdict(config: Config, found: Mapping[str, Any]) -> str:
    """Says how fast the students are, and how well they agree with the teacher."""
    table, told = found["models"], []
    for name in config.students:
        times = table[name]["time"]["network"] / table["teacher"]["time"]["network"]
        after, before = (
            results.mean_sd(table[key]["overlap"], percent=True) for key in (name, f"{name}, untrained")
        )
        told.append(
            f"The {name} student ({found['choice'][name]['loss']}) is {times:,.0f} times as fast as the teacher, and "
            f"{after} % of a sentence's {config.neighbours} neighbours are the teacher's (before training {before} %)."
        )
    return " ".join(told)


def explain(choice: Mapping[str, Any]) -> str:
    """Lists what validation says of the losses."""
    tried = (
        f"{name}: {', '.join(f'{loss} {value:.3f}' for loss, value in each['validation'].items())}"
        for name, each in choice.items()
    )
    return f"Rank correlation on validation data by loss, in the first seed: {'; '.join(tried)}."


def not_better(config: Config, found: Mapping[str, Any]) -> list[str]:
    """Lists the students that agree with the teacher no better than before training."""
    mean = {name: np.mean(entry["overlap"]) for name, entry in found["models"].items()}
    return [name for name in config.students if mean[name] <= mean[f"{name}, untrained"]]

"""What the experiment on language models measures and reports: see kd_text.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from harness import Run, language, pictures
from harness.language import BITS

from distill_jax import models, train

if TYPE_CHECKING:
    from kd_text import Lesson, Students


def evaluate(
    lesson: Lesson, trained: Sequence[Students], longer: models.Model, choice: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluates all models on the held-out texts: the ``models`` of results.json."""
    config, sampler = lesson.config, lesson.sampler
    examples = lesson.data.test.examples()
    measure = train.make_measure(train.next_token(), examples, batch_size=100)
    image = {name: values[:: 1 + len(values) // 500] for name, values in examples["image"].items()}
    prompts = {n: values[:32] for n, values in lesson.data.test.prompts(config.prompt).items()}

    @jax.jit
    def exposure(student, teacher, rows):
        return train.exposure(student, teacher, rows, sampler, prompt=config.prompt, key=jax.random.key(0))

    def about(model):
        speed = language.generation_speed(model, prompts, config.length + 1 - config.prompt)
        return {"parameters": sum(x.size for x in jax.tree.leaves(model.params)), "time": speed}

    def bits(model):
        return BITS * measure(model)["validation_loss"]

    student = about(trained[0][0]["scratch"].best)
    table = {
        "teacher": {**about(lesson.teacher), "bits": [[bits(lesson.teacher)], []]},
        "scratch, long": {**student, "bits": [[bits(longer)], []], "rounds": [config.long_rounds]},
    }
    for name, method in lesson.methods.items():
        best = [[seed[column][name].best for seed in trained] for column in (0, 1)]
        exposed = [[jax.device_get(exposure(m, lesson.teacher, image)) for m in column] for column in best]
        ms = 1000 * choice["seconds"]["round"][name] / config.steps
        table[name] = {
            **student,
            "time": {**student["time"], "step_ms": ms},
            "bits": [list(map(bits, column)) for column in best],
            "rounds": [config.rounds, choice["rounds"][name]],
            "rate": lesson.rates[name],
            "seconds": choice["seconds"]["spent"][name][-1],
            "exposure": [{k: [BITS * float(e[k]) for e in column] for k in column[0]} for column in exposed],
            "bytes_per_token": lesson.stored[method.stored].bytes,
        }
    return table


def draw(run: Run, trained: Sequence[Students], choice: Mapping[str, Any]) -> dict[str, str]:
    """Draws bits per byte of the validation data against tokens and against processor time."""
    config = run.config
    of_round = config.steps * config.batch_size * config.length / 1e6
    files = {
        "tokens.png": ("million bytes", "what they have read, at equal tokens"),
        "time.png": ("processor time, s", "the time that they have taken, at equal time"),
    }
    for column, (file, (label, _)) in enumerate(files.items()):
        curves = {}
        for name in trained[0][column]:
            found = np.array([seed[column][name].history["validation_loss"] for seed in trained]).T * BITS
            rounds, seconds = np.arange(1, len(found) + 1), choice["seconds"]
            curves[name] = (seconds["spent"][name] if column else rounds * of_round, found)
        pictures.against(run.directory / file, curves, xlabel=label, ylabel="validation bits per byte")
    ending = "means over seeds, bands one standard deviation"
    return {f"Students' bits per byte against {words}: {ending}": file for file, (_, words) in files.items()}


def mean_bits(found: Mapping[str, Any]) -> dict[str, list[float]]:
    """Computes the mean bits per byte of each model over seeds, at equal tokens and at equal time."""
    return {
        name: [float(np.mean(each)) for each in entry["bits"] if each]
        for name, entry in found["models"].items()
    }


def lead_and_cost(found: Mapping[str, Any]) -> tuple[float, float]:
    """Computes by how many bits the teacher leads, and by how many per cent top-k labels are worse than all logits."""
    bits = mean_bits(found)
    lead = bits["scratch, long"][0] - bits["teacher"][0]
    return lead, 100 * (bits["top-k, OTHER from text"][0] / bits["KL"][0] - 1)


def headline(lesson: Lesson, found: Mapping[str, Any]) -> str:
    """Says which method is the best, by how much the teacher leads, and what top-k labels cost."""
    config, bits, told = lesson.config, mean_bits(found), []
    for column, words in enumerate(("tokens", "time")):
        best = min(lesson.methods, key=lambda name: bits[name][column])
        told.append(f"at equal {words}: {best}, {bits[best][column]:.3f} bits per byte")
        told[-1] += f" (scratch {bits['scratch'][column]:.3f})" if best != "scratch" else ""
    lead, cost = lead_and_cost(found)
    return (
        f"Best {'; '.join(told)}. The teacher has {bits['teacher'][0]:.3f}, {lead:.3f} less than a student from "
        f"scratch after {config.long_rounds} rounds. Top-{config.top} labels, with OTHER from the text, of "
        f"{lesson.stored['top'].bytes} bytes per token instead of all logits change the bits by {cost:+.2f} %."
    )

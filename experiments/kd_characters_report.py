"""What the report of kd_characters.py says and shows: each student's gain, what must be known to compare, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import Run, Trained, pictures, readers, results

from distill_jax import data

if TYPE_CHECKING:
    from kd_characters import Config

CONTROL = "scratch, teacher's recipe"  # a student's model in the report


def prefix_of(config: Config, network: str) -> str:
    """Returns what the names of a student's models begin with."""
    return f"{network}, " if len(config.students) > 1 else ""


def share(scratch: Sequence[float], distilled: Sequence[float], teacher: Sequence[float]) -> str:
    """Writes how much of the teacher's lead a student makes up, with the standard error of this ratio of means."""
    gain, lead = np.subtract(distilled, scratch), np.subtract(teacher, scratch)
    if lead.mean() <= 0:
        return "the teacher does not lead"
    part, error = gain.mean() / lead.mean(), ""
    if len(gain) > 1:
        spread = (gain - part * lead).std(ddof=1) / lead.mean() / np.sqrt(len(gain))
        error = f" ± {100 * spread:.0f}"
    return f"{100 * part:.0f}{error} % of its distance to the teacher".replace("-", "−")


def verdict(config: Config, found: Mapping[str, Any], chosen: Mapping[str, float]) -> str:
    """Says what distillation did to the test accuracy of each student."""
    accuracy = {name: model["test"]["accuracy"] for name, model in found["models"].items()}
    said = []
    for network in config.students:
        prefix = prefix_of(config, network)
        scratch, distilled = accuracy[f"{prefix}scratch"], accuracy[f"{prefix}distilled"]
        own, all_ = (found["models"][name]["parameters"] for name in (f"{prefix}distilled", "teacher"))
        said.append(
            f"Distillation at T = {chosen[f'{prefix}distilled']:g} changed the test accuracy of {network} (parameters: "
            f"{100 * own / all_:.3g} % of the teacher's) by {results.points(scratch, distilled)} points "
            f"({share(scratch, distilled, accuracy['teacher'])})."
        )
        if config.control:
            gain = results.points(accuracy[f"{prefix}{CONTROL}"], distilled)
            said.append(f"Against the same student from scratch with the teacher's recipe: {gain} points.")
        if config.patient:
            fair = CONTROL if config.control else "scratch"
            gain = results.points(accuracy[f"{prefix}{fair}"], accuracy[f"{prefix}patient"])
            said.append(
                f"With the teacher's labels of distorted pictures (patient), against {fair}: {gain} points."
            )
        if config.labelled:
            hard = accuracy[f"{prefix}hard labels"]
            clear = "yes" if results.paired(hard, distilled).t > 2 else "no"
            if config.seeds == 1:
                clear = "not known from one seed"
            said.append(
                f"Soft labels against the teacher's hard labels: {results.points(hard, distilled)} points "
                f"(better by more than two standard errors: {clear})."
            )
    if config.seeds > 1:
        said.append("Here ± is the standard error over seeds, of paired differences.")
    return " ".join(said)


def explain(config: Config, dataset: data.Dataset) -> list[str]:
    """Says, in paragraphs for the report, what must be known to compare its rows."""
    faces, unit = len(np.unique(readers.origins(dataset, dataset.train))), readers.unit(dataset)
    about = round(len(dataset.train.id) * config.labelled / faces) or len(dataset.train.id)
    said = [
        f"The temperatures were chosen on {len(dataset.validation.id):,} labelled validation examples; nothing was "
        f"chosen for students from scratch, which learn from {about:,} labelled training examples."
    ]
    if not config.control and config.recipe() != config.recipe("teacher_"):
        said.append(
            "Epochs, learning rate or distortion of the teacher are not those of the students, so its lead is not "
            "that of its size alone: --control trains students from scratch with its recipe."
        )
    if config.labelled:
        said.append(
            f"The teacher has learned the true labels of all {unit}, also of those that are unlabelled to the "
            f'students. "True labels, all faces" is the student that knows them too.'
        )
    if config.distortion:
        said.append("Students see distorted pictures, with the teacher's labels of the undistorted ones.")
    return said


def not_better(config: Config, found: Mapping[str, Any]) -> list[str]:
    """Lists the students whose mean test accuracy is not higher distilled than from scratch."""

    def accuracy(network, kind):
        return np.mean(found["models"][prefix_of(config, network) + kind]["test"]["accuracy"])

    return [name for name in config.students if accuracy(name, "distilled") <= accuracy(name, "scratch")]


def lead(config: Config, found: Mapping[str, Any]) -> str:
    """Says how far the teacher leads the students before anything is distilled, on validation data."""
    errors = {name: np.mean(model["validation"]["errors"]) for name, model in found["models"].items()}

    def students(kind):
        return ", ".join(f"{n} {errors[f'{prefix_of(config, n)}{kind}']:.1f}" for n in config.students)

    said = f"Mean validation errors: teacher {errors['teacher']:.1f}; from scratch {students('scratch')}"
    if config.control:
        said += f"; from scratch with the teacher's recipe {students(CONTROL)}"
    return f"{said}."


def draw(
    run: Run,
    trained: Sequence[Mapping[str, Trained]],
    logits: Sequence[Mapping[str, np.ndarray]],
    people: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, str]:
    """Draws the pictures of the teacher and of the first student; returns caption → file name."""
    dataset, prefix = run.dataset, prefix_of(run.config, run.config.students[0])
    shown = "teacher", f"{prefix}scratch", f"{prefix}distilled"
    test = dataset.test._replace(image=readers.upright(dataset, dataset.test.image))
    drawn = results.draw(run.directory, dataset._replace(test=test), trained, logits, shown)
    return (
        drawn | readers.draw(run.directory, dataset, logits, people, prefix) | draw_curve(run, logits, prefix)
    )


def draw_curve(run: Run, logits: Sequence[Mapping[str, np.ndarray]], prefix: str) -> dict[str, str]:
    """Draws the errors of a student against the number of faces, if that was wanted; returns caption → file name."""
    dataset, unit = run.dataset, readers.unit(run.dataset)
    faces = len(np.unique(readers.origins(dataset, dataset.train)))
    counts = sorted(run.config.curve, key=lambda n: n or faces)
    if not counts:
        return {}

    def errors(name):
        return [100 * np.mean(seed[prefix + name].argmax(-1) != dataset.test.label) for seed in logits]

    series = {
        name: np.transpose([errors(f"{name} on {n or 'all'}") for n in counts])
        for name in ("scratch", "distilled")
    }
    series[f"teacher's labels, all {unit}"] = np.transpose([errors("distilled")] * len(counts))
    pictures.curves(
        run.directory / "faces.png", [n or faces for n in counts], series, xlabel=unit, ylabel="test errors, %",
        log_x=True,
    )  # fmt: skip
    return {f"Test errors of the first student against the number of {unit} that it learns from": "faces.png"}

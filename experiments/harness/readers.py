"""What is measured and drawn of networks that read characters, printed or spoken."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from distill_jax import data, metrics
from distill_jax.models import predict
from harness import results
from harness.experiment import Trained, prepare

LOOKALIKES = ("0Oo", "1lI", "cC", "sS", "vV", "wW", "xX", "zZ")  # characters that look alike in print
WORST = 10  # number of faces that are left out of one of the columns
FEW_GROUPS = 10  # test data of fewer groups of fonts say nothing about others
COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "accuracy %": results.score("accuracy", percent=True),
    "by group %": results.score("group_accuracy", percent=True),
    f"without {WORST} worst faces %": results.score("readable_accuracy", percent=True),
    "people %": results.score("people_accuracy", percent=True),
    "agreement %": results.score("agreement", percent=True),
    "ECE %": results.score("ece", percent=True),
    "look-alikes": results.score("lookalikes"),
}


def origins(dataset: data.Dataset, split: data.Split) -> np.ndarray:
    """Returns the number of each example's face (or voice); where these are not known, the example's own."""
    return split.id if dataset.origins is None else dataset.origins.of[split.id]


def is_small(dataset: data.Dataset) -> bool:
    """Says whether the data only show that a program runs: digits, or fonts of a few families."""
    groups = (
        0
        if dataset.origins is None
        else len(np.unique(dataset.origins.group[origins(dataset, dataset.test)]))
    )
    return dataset.name == "digits" or (dataset.name == "glyphs" and groups < FEW_GROUPS)


def lookalikes(dataset: data.Dataset) -> list[str]:
    """Lists the groups of characters that look alike, as far as they are classes of the data."""
    return [group for group in LOOKALIKES if set(group) <= set(dataset.class_names)]


def mistaken(dataset: data.Dataset, logits: np.ndarray) -> int:
    """Counts test pictures that are taken for another character of their group of look-alikes."""
    names = np.array(dataset.class_names)
    true, said = names[dataset.test.label], names[logits.argmax(-1)]
    return sum(
        int((np.isin(true, list(g)) & np.isin(said, list(g)) & (true != said)).sum())
        for g in lookalikes(dataset)
    )


def by_face(
    dataset: data.Dataset, found: Mapping[str, Any], logits: Sequence[Mapping[str, np.ndarray]]
) -> list[str]:
    """Adds to each model's test figures the mean accuracy over groups, and that without the worst faces.

    The worst faces are those that the teachers of all seeds together read worst.

    Returns:
      The names of the worst faces, none where there are no more faces than these.
    """
    assert dataset.origins is not None
    faces, of = np.unique(dataset.origins.of[dataset.test.id], return_inverse=True)
    groups, group = np.unique(dataset.origins.group[faces], return_inverse=True)
    right = {
        name: [seed[name].argmax(-1) == dataset.test.label for seed in logits] for name in found["models"]
    }
    read = np.bincount(of, np.mean(right["teacher"], 0)) / np.bincount(of)
    worst = np.argsort(read, kind="stable")[: WORST if len(faces) > WORST else 0]
    for name, seeds in right.items():
        figures = found["models"][name]["test"]
        figures["group_accuracy"] = [
            float(np.mean(np.bincount(group[of], x, len(groups)) / np.bincount(group[of]))) for x in seeds
        ]
        if len(worst):
            figures["readable_accuracy"] = [float(x[~np.isin(of, worst)].mean()) for x in seeds]
    return [dataset.origins.names[faces[i]] for i in worst]


def on_people(
    dataset: data.Dataset, found: Mapping[str, Any], trained: Sequence[Mapping[str, Trained]]
) -> None:
    """Adds the accuracy on recordings of people to each model's test figures."""
    people = dataset.people
    if people is None:
        return
    for name, entry in found["models"].items():
        said = [predict(seed[name].model, people.image, prepare=prepare).argmax(-1) for seed in trained]
        entry["test"]["people_accuracy"] = [float((x == people.label).mean()) for x in said]


def add_figures(
    dataset: data.Dataset,
    found: Mapping[str, Any],
    trained: Sequence[Mapping[str, Trained]],
    logits: Sequence[Mapping[str, np.ndarray]],
) -> list[str]:
    """Adds to each model's test figures what the data allow: accuracy by group, on people, look-alikes.

    Args:
      dataset: the data.
      found: the contents of results.json, with the models' entries.
      trained: for each seed, name → model.
      logits: for each seed, name → logits for the test pictures.

    Returns:
      Paragraphs for the report that explain the figures.
    """
    notes = []
    on_people(dataset, found, trained)
    if dataset.people is not None:
        notes.append(f"People: {len(dataset.people.label)} recordings of real people.")
    if dataset.origins is not None:
        worst = by_face(dataset, found, logits)
        groups = len(np.unique(dataset.origins.group[origins(dataset, dataset.test)]))
        notes.append(f"By group: mean over the {groups} groups of the test data.")
        if worst:
            notes.append(f"The {WORST} that the teachers read worst: {'; '.join(worst)}.")
    if alike := lookalikes(dataset):
        for model, entry in found["models"].items():
            entry["test"]["lookalikes"] = [mistaken(dataset, seed[model]) for seed in logits]
        notes.append(f"Look-alikes: test pictures taken for another character of {', '.join(alike)}.")
    return notes


def draw(
    directory: Path, dataset: data.Dataset, logits: Sequence[Mapping[str, np.ndarray]], of: str
) -> dict[str, str]:
    """Draws which look-alikes are taken for which, and where the teacher hesitates.

    Args:
      directory: where the pictures are written.
      dataset: the data.
      logits: for each seed, name → logits for the test pictures.
      of: what the names of the student's models begin with.

    Returns:
      Caption → file name.
    """
    from harness import pictures  # here, as Matplotlib takes its time, and a training need not wait for it

    drawn, test, names = {}, dataset.test, dataset.class_names
    if alike := lookalikes(dataset):
        counts = {
            name.removeprefix(of): np.mean([metrics.confusion(seed[name], test.label) for seed in logits], 0)
            for name in ("teacher", f"{of}scratch", f"{of}distilled")
        }
        pictures.lookalikes(directory / "lookalikes.png", counts, names, alike)
        drawn["How often a test picture of the row's character is taken for the column's, per cent"] = (
            "lookalikes.png"
        )
    probabilities = np.asarray(jax.nn.softmax(logits[0]["teacher"]))
    pictures.hesitation(directory / "hesitation.png", test.image, test.label, probabilities, names)
    caption = "The test pictures on which the first teacher hesitates most, with its two likeliest classes, per cent"
    return {**drawn, caption: "hesitation.png"}

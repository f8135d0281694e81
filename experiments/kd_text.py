"""Makes a small language model better with a large one: byte models of real text, method beside method.

The texts are split by book or by file. One teacher is trained and kept for all methods and seeds. Each student begins
with the same parameters and is trained twice: with as many rows of the same length as the others ("equal tokens"), and
for as much processor time as the slowest method takes for these ("equal time"), what the teacher stores included. In
rows that a model has written the prompt is read but not learned: 97 tokens of 128 are, with the default sizes, so
sequence-level distillation learns from 24 % fewer tokens than the others, and on-policy from 12 % fewer. One student
from scratch is trained far longer, until it has converged: the teacher must be better than that. The figures are those
of texts that no training and no choice has seen. "Renormalised" are the teacher's k probabilities alone: the student's
are still of all tokens.

    python experiments/kd_text.py smoke                    # a minute, on the sources of Python's library
    python experiments/kd_text.py python                   # the same sources, two hours
    python experiments/kd_text.py bible                    # the World English Bible (apt-get install sword-text-web)
    python experiments/kd_text.py python --dataset FOLDER  # your own texts
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from harness import Count, Positive, Run, RunOptions, Share, language, pictures, read, run_main
from harness.language import BITS

from distill_jax import _files, losses, models, teachers, train
from distill_jax.data.text import VOCABULARY
from distill_jax.losses.tokens import bucketed
from distill_jax.teachers import kinds


@dataclass(frozen=True)
class Config(RunOptions):
    """The options of the experiment."""

    dataset: str = "stdlib"  # texts: stdlib, python-doc, bible, a folder or a file
    data_dir: Path | None = None  # where the files of a named text are, if not in their usual place
    seeds: Count = 3  # number of repetitions, each with its own initial parameters of the students
    length: Count = 128  # number of bytes of a row
    teacher: tuple[Count, Count, Count, Count] = (96, 3, 4, 256)  # width, layers, heads, feed-forward units
    student: tuple[Count, Count, Count, Count] = (32, 2, 2, 80)  # the same of a student
    steps: Count = 250  # number of steps of a round, after which there is a validation
    teacher_rounds: Count = 12  # number of rounds of the teacher
    rounds: Count = 2  # number of rounds of each student, at equal tokens
    long_rounds: Count = (
        16  # number of rounds of a student from scratch that is trained until it has converged
    )
    time_rounds: tuple[Count, ...] = ()  # number of rounds of each method at equal time; none: measured
    batch_size: Count = 32  # number of rows per step
    learning_rate: Positive = 1e-2  # highest learning rate of the students (Adam, cosine schedule)
    teacher_learning_rate: Positive = 3e-3  # highest learning rate of the teacher
    top: Count = 12  # number of bytes of a top-k label, besides OTHER
    draws: Count = 16  # number of draws of a sampled label
    beta: Share = 0.5  # of the Jensen-Shannon divergence
    prompt: Count = 32  # number of bytes of a row from which a model goes on
    samples: Count = 12_288  # number of texts of the teacher for sequence-level distillation
    share: Share = 0.5  # probability that a batch is the student's own, on-policy
    rows: Count = 32_000  # number of training rows at most
    evaluated: Count = 2000  # number of rows of the validation data, and of the test data, at most
    check: bool = False
    """exit with status 1 unless the teacher leads and top-k labels are as good as all logits"""


CONFIGS = {
    "smoke": ("The sources of Python's library, a minute; shows that all works, and nothing else.", Config(
        seeds=1, length=48, teacher=(48, 2, 4, 128), student=(16, 1, 2, 32), steps=20, teacher_rounds=6, rounds=2,
        long_rounds=4, batch_size=16, prompt=16, samples=320, rows=512, evaluated=64,
    )),
    "python": ("The sources of Python's library; two hours on one core.", Config()),
    "bible": ("The World English Bible; two hours on one core.", Config(dataset="bible")),
}  # fmt: skip


class Method(NamedTuple):
    """How a student learns."""

    loss_fn: train.LossFn
    transform: Callable[..., Any] | None = None  # with which the teacher takes part in each step
    stored: str = ""  # what the teacher has made before: labels, or texts


def online(teacher: models.Model, batch: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """Labels a batch: the ``transform`` of word-level distillation."""
    return teachers.label(teacher, batch)


def make_sampler(config: Config) -> Callable[..., Any]:
    """Makes the function by which students go on from prompts."""
    return functools.partial(models.generate, length=config.length + 1 - config.prompt)


def methods(config: Config) -> dict[str, Method]:
    """Lists the methods by name."""
    next_token, kl = train.next_token(), train.distill_tokens()
    jsd = functools.partial(losses.jensen_shannon, beta=config.beta)
    top_k = train.distill_tokens(soft=bucketed(losses.kl))
    own = train.on_policy(make_sampler(config), prompt=config.prompt, share=config.share)
    return {
        "scratch": Method(next_token),
        "KL": Method(kl, online),
        "reverse KL": Method(train.distill_tokens(soft=losses.reverse_kl), online),
        "JSD": Method(train.distill_tokens(soft=jsd), online),
        "on-policy": Method(kl, own),
        "sequence-level": Method(next_token, stored="texts"),
        "top-k, OTHER": Method(top_k, stored="top"),
        "top-k, renormalised": Method(top_k, stored="renormalised"),
        "sampled": Method(top_k, stored="sampled"),
    }


def check(config: Config, dataset: language.TextRows) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    rows, least, names = len(dataset.train.id), config.steps * config.batch_size, list(methods(config))
    config.need("steps", least <= rows, f"be at most {rows // config.batch_size}, as there are {rows} rows")
    enough = least <= config.samples < rows
    config.need("samples", enough, f"lie between {least} and {rows - 1}, one less than the rows")
    config.need("prompt", config.prompt <= config.length, "be at most --length")
    config.need("top", config.top < VOCABULARY, f"be below {VOCABULARY}")
    fits = len(config.time_rounds) in (0, len(names))
    config.need("time_rounds", fits, f"be none, or {len(names)} numbers: {', '.join(names)}")
    for sizes in (config.teacher, config.student):
        language.network(sizes, jax.random.key(0))


class Lesson:
    """The teacher, what it has stored, and the programs that train: made once for all seeds."""

    def __init__(self, run: Run, data: language.TextRows):
        self.run, self.data, self.config, self.methods = run, data, run.config, methods(run.config)
        config, rows, self.programs = run.config, data.train, dict[Any, Any]()
        self.measure = train.make_measure(train.next_token(), data.validation.examples(), batch_size=100)
        plain = language.Stored(rows.examples(), lambda: 0.0)
        start = language.network(config.teacher, jax.random.key(0))
        rounds, rate = config.teacher_rounds, config.teacher_learning_rate
        self.teacher = self.fit("teacher", 0, start, self.methods["scratch"], rounds, rate, plain).best
        folder = run.directory / "seed0" / "labels"
        author = language.Author(self.teacher, rows, folder, 2 * config.batch_size)
        top = author.labels("top", kinds.Top(config.top))
        without_other = top.examples | {"teacher": language.renormalised(top.examples["teacher"])}
        self.stored = {
            "": plain,
            "top": top,
            "renormalised": top._replace(examples=without_other),
            "sampled": author.labels("sampled", kinds.Sampled(config.draws)),
            "texts": author.texts("texts", config.samples, config.prompt),
        }

    def fit(self, name: str, seed: int, model: models.Model, method: Method, rounds: int, rate: float,
            given: language.Stored) -> train.Fit:  # fmt: skip
        """Trains one model, or takes it from the checkpoint of the run."""
        config = self.config
        tx = language.adam(rate, rounds * config.steps, warmup=config.steps)
        program = method.loss_fn, method.transform, rate
        if program not in self.programs:
            step = train.make_train_step(method.loss_fn, tx)  # (state, batch) -> (state, metrics)
            epoch = train.make_epoch(step, transform=method.transform)  # many steps in one call
            self.programs[program] = language.rounds_of(epoch, config.steps)
        return self.run.fit(
            name, seed, train.init_state(model, tx, self.run.key(seed, 0)), self.programs[program], given.examples,
            epochs=rounds, batch_size=config.batch_size, order=seed, validate=self.measure,
            best_by="validation_loss", context=self.teacher if method.transform else None,
        )  # fmt: skip

    def student(self, name: str, seed: int, rounds: int, suffix: str = "") -> train.Fit:
        """Trains the student of one method."""
        method, start = self.methods[name], language.network(self.config.student, jax.random.key(1000 + seed))
        rate, given = self.config.learning_rate, self.stored[self.methods[name].stored]
        return self.fit(name + suffix, seed, start, method, rounds, rate, given)

    def equal_time(self, done: Mapping[str, train.Fit]) -> dict[str, Any]:
        """Computes how many rounds of each method take as long as those of the dearest, once for the run."""
        file, config = self.run.directory / "choice.json", self.config
        if file.exists():
            return _files.unseal(json.loads(file.read_bytes()))
        stored = {name: given.seconds() for name, given in self.stored.items()}
        before = {name: stored[method.stored] for name, method in self.methods.items()}
        one = {name: config.steps * language.step_seconds(fit.history) for name, fit in done.items()}
        most = max(before[name] + config.rounds * one[name] for name in done)
        rounds = {name: round((most - before[name]) / one[name]) for name in done}
        if config.time_rounds:
            rounds = dict(zip(done, config.time_rounds, strict=True))
        found = {"rounds": rounds, "seconds": {"round": one, "stored": before, "all": most}}
        _files.write_json(file, _files.seal(found))
        return found


Students = tuple[Mapping[str, train.Fit], Mapping[str, train.Fit]]  # at equal tokens, at equal time


def train_seed(lesson: Lesson, seed: int, choice: dict[str, Any]) -> Students:
    """Trains all students of one seed; ``choice`` gets what :meth:`Lesson.equal_time` finds."""
    tokens = {name: lesson.student(name, seed, lesson.config.rounds) for name in lesson.methods}
    choice.update(choice or lesson.equal_time(tokens))
    times = {
        name: tokens[name]
        if rounds == lesson.config.rounds
        else lesson.student(name, seed, rounds, ", equal time")
        for name, rounds in choice["rounds"].items()
    }
    return tokens, times


def evaluate(
    lesson: Lesson, trained: Sequence[Students], longer: models.Model, choice: Mapping[str, Any]
) -> dict[str, Any]:
    """Evaluates all models on the held-out texts: the ``models`` of results.json."""
    config, sampler = lesson.config, make_sampler(lesson.config)
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
        "scratch, converged": {**student, "bits": [[bits(longer)], []]},
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
            spent = seconds["stored"][name] + rounds * seconds["round"][name]
            curves[name] = (spent if column else rounds * of_round, found)
        pictures.against(run.directory / file, curves, xlabel=label, ylabel="validation bits per byte")
    ending = "means over seeds, bands one standard deviation"
    return {f"Students' bits per byte against {words}: {ending}": file for file, (_, words) in files.items()}


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, "smoke")
    rows = language.load(config.dataset, config.data_dir, config.length, config.rows, config.evaluated)
    run = Run.start("kd_text", name, config, check, rows)
    lesson, choice = Lesson(run, rows), dict[str, Any]()
    trained = [train_seed(lesson, seed, choice) for seed in range(config.seeds)]
    longer = lesson.student("scratch", 0, config.long_rounds, ", converged").best
    found = run.record(evaluate(lesson, trained, longer, choice))
    bits = {
        name: [np.mean(b) if b else 0.0 for b in entry["bits"]] for name, entry in found["models"].items()
    }
    told = []
    for column, words in enumerate(("tokens", "time")):
        best = min(lesson.methods, key=lambda name: bits[name][column])
        told.append(f"at equal {words}: {best}, {bits[best][column]:.3f} bits per byte")
        told[-1] += f" (scratch {bits['scratch'][column]:.3f})" if best != "scratch" else ""
    lead = bits["scratch, converged"][0] - bits["teacher"][0]
    loss = 100 * (bits["top-k, OTHER"][0] / bits["KL"][0] - 1)
    headline = (
        f"Best {'; '.join(told)}. The teacher has {bits['teacher'][0]:.3f}, {lead:.3f} less than a student from "
        f"scratch after {config.long_rounds} rounds. Top-{config.top} labels with OTHER of "
        f"{lesson.stored['top'].bytes} bytes per token instead of all logits change the bits by {loss:+.2f} %."
    )
    run.finish(found, draw(run, trained, choice), headline=headline, columns=language.COLUMNS)
    return run.check(
        lead >= 0.3 and loss <= 1, "the teacher leads by under 0.3 bits, or top-k labels cost over 1 %"
    )


if __name__ == "__main__":
    run_main(main)

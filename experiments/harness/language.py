"""Rows of text for experiments on language models: the data of a run, the pace of a training, and what is measured."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import models, teachers, train
from distill_jax.data import text
from distill_jax.losses.tokens import TopK
from distill_jax.teachers import kinds
from harness import logs, results

BITS = 1 / math.log(2)  # per nat


class Rows(NamedTuple):
    """Packed rows of one split.

    Attributes:
      id: int64 ``[rows]``.
      tokens: int32 ``[rows, length]``.
      segments: int32 ``[rows, length]``, see :func:`distill_jax.data.text.pack`.
    """

    id: np.ndarray
    tokens: np.ndarray
    segments: np.ndarray

    def examples(self, first: int = 1) -> dict[str, Any]:
        """Makes the arrays of training and evaluation; tokens before the position ``first`` do not count."""
        image = {"tokens": self.tokens, "segments": self.segments}
        counts = np.broadcast_to(np.arange(self.tokens.shape[1]) >= first, self.tokens.shape)
        return {"image": image, "counts": counts, "weight": np.asarray(train.token_weight(image, counts))}

    def prompts(self, length: int) -> dict[str, np.ndarray]:
        """Takes the first tokens of the rows that are long enough, the input of a transformer."""
        whole = self.segments[:, length - 1] != 0
        return {"tokens": self.tokens[whole, :length], "segments": self.segments[whole, :length]}


class TextRows(NamedTuple):
    """Texts of bytes as the data of a run: a name, a source, and rows in three splits."""

    name: str
    source: str
    train: Rows
    validation: Rows
    test: Rows


def load(name: str, data_dir: Path | None, length: int, learned: int, evaluated: int) -> TextRows:
    """Loads texts and packs them.

    Args:
      name: which texts, as in :func:`distill_jax.data.text.load`.
      data_dir: as there.
      length: the number of tokens of a row that are predicted at most.
      learned: how many rows of the training data are taken at most, spread over all texts.
      evaluated: the same of the validation and of the test data.
    """
    found = text.load(name, data_dir=data_dir)

    def rows(documents: text.Documents, most: int) -> Rows:
        packed = text.pack([text.to_tokens(each) for each in documents.texts], length + 1)
        count = len(packed["tokens"])
        chosen = np.arange(min(most, count)) * count // min(most, count)
        return Rows(chosen.astype(np.int64), packed["tokens"][chosen], packed["segments"][chosen])

    held_out = (rows(documents, evaluated) for documents in (found.validation, found.test))
    return TextRows(found.name, f"{found.source} ({found.licence})", rows(found.train, learned), *held_out)


def network(sizes: tuple[int, ...], key: jax.Array) -> models.Model:
    """Builds a transformer of bytes from its width, layers, heads and feed-forward units."""
    width, layers, heads, hidden = sizes
    config = models.TransformerConfig(
        vocabulary=text.VOCABULARY, width=width, layers=layers, heads=heads, hidden=hidden, qk_norm=True
    )
    return models.build_transformer(config, key)


class Pace(NamedTuple):
    """Where a training is: the numbers of steps made, and of all."""

    step: jax.Array
    total: jax.Array


def adam(rate: float, total: int, warmup: float) -> optax.GradientTransformation:
    """Makes Adam with a rate that rises, and falls as a cosine to 0.

    The number of steps is part of the state, so trainings of all lengths share a program.

    Args:
      rate: the highest learning rate.
      total: the number of steps.
      warmup: the share of the steps in which the rate rises.
    """

    def update(updates: Any, state: Pace, params: Any = None) -> tuple[Any, Pace]:
        rise = jnp.minimum(1.0, (state.step + 1) / (warmup * state.total))
        now = rate * rise * 0.5 * (1 + jnp.cos(jnp.pi * state.step / state.total))
        return jax.tree.map(lambda u: -now * u, updates), state._replace(step=state.step + 1)

    pace = optax.GradientTransformation(lambda _: Pace(jnp.int32(0), jnp.int32(total)), update)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), pace)


def rounds_of(epoch: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """Makes of an epoch a round of fewer steps, which also measures its processor time.

    Args:
      epoch: from :func:`distill_jax.train.make_epoch`.
      steps: the number of steps of a round.

    Returns:
      An epoch whose metrics have ``"seconds"``, the processor time of a step.
    """

    def one_round(state: Any, data: Any, order: np.ndarray, context: Any = None) -> Any:
        began = time.process_time()
        state, metrics = jax.block_until_ready(epoch(state, data, order[:steps], context))
        seconds = (time.process_time() - began) / steps
        return state, {**metrics, "seconds": jnp.full(steps, seconds)}

    return one_round


def step_seconds(history: Mapping[str, Any]) -> float:
    """Computes the processor time of a step from the rounds of a training, without the one that compiled the most."""
    rounds = sorted(history["seconds"])
    return float(np.median(rounds[: max(1, len(rounds) - 1)]))


def processor_seconds(call: Callable[[], Any]) -> float:
    """Measures the processor time of a call, the second one, which compiles nothing."""
    jax.block_until_ready(call())
    began = time.process_time()
    jax.block_until_ready(call())
    return time.process_time() - began


def generation_speed(model: models.Model, prompts: Mapping[str, Any], length: int) -> dict[str, float]:
    """Measures tokens per second of processor time, with the cache of keys and values and without."""
    tokens = len(prompts["tokens"]) * length
    return {
        name: tokens / processor_seconds(
            functools.partial(
                models.generate, model, prompts, key=jax.random.key(0), length=length, cached=cached
            )
        )
        for name, cached in (("cached", True), ("uncached", False))
    }  # fmt: skip


class Stored(NamedTuple):
    """What a teacher has made once, before its students are trained.

    Attributes:
      examples: the training arrays.
      seconds: measures the processor time that the teacher takes for one row of it.
      bytes: bytes per token; None for texts.
    """

    examples: dict[str, Any]
    seconds: Callable[[], float]
    bytes: int | None = None


class Author:
    """A teacher that labels the bytes of rows once, and writes texts.

    Args:
      teacher: the teacher.
      rows: the training rows.
      folder: where the stores are.
      batch_size: the number of rows that it works on at once.
    """

    def __init__(self, teacher: models.Model, rows: Rows, folder: Path, batch_size: int):
        self.teacher, self.rows, self.folder, self.batch_size = teacher, rows, folder, batch_size
        self.described = {
            "teacher": teachers.fingerprint(teacher),
            "data": teachers.fingerprint(rows._asdict()),
        }

    def logits(self, positions: np.ndarray) -> np.ndarray:
        """Computes the logits of some rows."""
        image = {"tokens": self.rows.tokens[positions], "segments": self.rows.segments[positions]}
        return models.predict(self.teacher, image, batch_size=self.batch_size)

    def labels(self, name: str, kind: kinds.Kind) -> Stored:
        """Stores a label for each byte of the training rows."""
        rows, size, length = self.rows, self.batch_size, self.rows.tokens.shape[1]
        store = teachers.write_token_labels(
            self.folder / name, rows.id, self.logits, length=length, fingerprint=self.described, kind=kind,
            dtype="bfloat16", shard_rows=size, progress=logs.counter(f"labels, {name}"),
        )  # fmt: skip

        def label() -> Any:
            some = self.logits(np.arange(size)).reshape(size * length, -1)
            return kind.encode(some, dtype="bfloat16", ids=np.arange(len(some)))

        given = rows.examples() | {"teacher": store[teachers.token_ids(rows.id, length)]}
        return Stored(given, lambda: processor_seconds(label) / size, store.bytes_per_label)

    def texts(self, name: str, count: int, prompt: int) -> Stored:
        """Stores texts that go on from the first bytes of some rows."""
        rows, size = self.rows, min(4 * self.batch_size, count)  # a token of a text is little work
        prompts = rows.prompts(prompt)
        chosen = np.random.default_rng(0).permutation(len(prompts["tokens"]))[:count]
        prompts = {key: values[chosen] for key, values in prompts.items()}
        sampler = functools.partial(models.generate, self.teacher, length=rows.tokens.shape[1] - prompt)
        store = teachers.write_samples(
            self.folder / name, prompts, sampler, vocabulary=text.VOCABULARY, fingerprint=self.described,
            batch_size=size, progress=logs.counter("texts of the teacher"),
        )  # fmt: skip
        first = {key: values[:size] for key, values in prompts.items()}
        return Stored(
            Rows(chosen, **store[np.arange(len(chosen))]).examples(first=prompt),
            lambda: processor_seconds(lambda: sampler(first, key=jax.random.key(0))) / size,
        )


def renormalised(labels: TopK) -> TopK:
    """Leaves out OTHER: the teacher's k probabilities alone sum to 1; the student's are still of all tokens."""
    kept: Any = labels.log_probs[..., :-1]
    kept = kept - np.logaddexp.reduce(kept, -1, keepdims=True)
    none = np.full_like(kept[..., :1], -np.inf)
    return TopK(labels.indices, np.append(kept, none, -1), labels.temperature)


def figure(find: Callable[[Any], Sequence[float]]) -> results.Column:
    """Makes the column of a student's figure with one value per seed."""
    return lambda model: results.mean_sd(find(model)) if "exposure" in model else None


def excess(exposure: Mapping[str, Sequence[float]]) -> list[float]:
    """Computes by how many per cent the student's errors grow in its own texts."""
    return [100 * (own / data - 1) for own, data in zip(exposure["on_own"], exposure["on_data"], strict=True)]


COLUMNS: Mapping[str, results.Column] = {
    "parameters": results.count("parameters"),
    "bits per byte, equal tokens": lambda model: results.mean_sd(model["bits"][0]),
    "equal time": figure(lambda model: model["bits"][1]),
    "rounds": lambda model: " / ".join(map(str, model["rounds"])) if "rounds" in model else None,
    "learning rate": lambda model: f"{model['rate']:g}" if "rate" in model else None,
    "seconds, equal time": lambda model: f"{model['seconds']:,.0f}" if "seconds" in model else None,
    "ms per step": lambda model: f"{model['time']['step_ms']:.1f}" if "step_ms" in model["time"] else None,
    "bytes per token": lambda model: str(model["bytes_per_token"]) if model.get("bytes_per_token") else None,
    "bits to the teacher": figure(lambda model: model["exposure"][0]["on_data"]),
    "in its own texts": figure(lambda model: model["exposure"][0]["on_own"]),
    "excess %": figure(lambda model: excess(model["exposure"][0])),
    "excess %, equal time": figure(lambda model: excess(model["exposure"][1])),
    "tokens/s with the cache": lambda model: f"{model['time']['cached']:,.0f}",
    "without": lambda model: f"{model['time']['uncached']:,.0f}",
}

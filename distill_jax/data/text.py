"""Text as tokens: real texts in three splits, tokens of bytes, and rows of packed texts of any tokens.

>>> rows = pack([to_tokens(b"abcd"), to_tokens(b"xy")], 5)
>>> print(rows["tokens"], rows["segments"])
[[  0  97  98  99 100]
 [  0 120 121   0   0]] [[1 1 1 1 1]
 [1 1 1 0 0]]
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_fraction, check_integers, is_integer, shown
from distill_jax.data._cache import Arrays, cached, folder_of
from distill_jax.data._errors import DataError, need
from distill_jax.data._texts import SOURCES, below, common, is_text, read, read_files

BEGIN = 0  # the token before the first byte of a text: NUL, a byte that no text has
VOCABULARY = 256
_VERSION = 1  # of the arrays that are made of the files; a part of the cache's key


class Documents(NamedTuple):
    """The texts of one split.

    Attributes:
      id: int64 ``[n]``, unique over the splits of a text: positions in the order of all names.
      names: the names of the books or files.
      texts: the texts, as they were read, in the order of ``id``.
    """

    id: np.ndarray
    names: tuple[str, ...]
    texts: tuple[bytes, ...]


class Text(NamedTuple):
    """Texts in three splits. No book or file is in two of them.

    Attributes:
      name: the name of the texts.
      source: one line that says where they came from.
      licence: their licence.
      train: the training data.
      validation: data for choosing.
      test: the test data.
    """

    name: str
    source: str
    licence: str
    train: Documents
    validation: Documents
    test: Documents


def load(
    name: str | Path = "stdlib",
    *,
    data_dir: str | Path | None = None,
    validation: float = 0.05,
    test: float = 0.1,
    cache_dir: str | Path | None = None,
) -> Text:
    """Loads texts, split by book or by file.

    Which split a file is in follows from a checksum of its name, so it does not depend on the other files' order. Of
    equal texts only the first is taken.

    Args:
      name: which texts.

        - ``"stdlib"``: the sources of Python's standard library, without its tests and its tables of encodings: on
          any machine with Python.
        - ``"python-doc"``: Python's documentation as reStructuredText, from Debian's ``python3-doc``.
        - ``"bible"``: the World English Bible by book, from Debian's ``sword-text-web``; of its markup, paragraphs
          and lines of verse stay, as line breaks.
        - a folder: each file in it, and in the folders below it, that is UTF-8.
        - a file: a single text, which is cut into three parts at line ends.
      data_dir: where the files of a named text are, if they are not in their usual place: the folder of the library, of
        the reStructuredText files, or the one with SWORD's ``modules``.
      validation: the share of bytes that become validation data, above 0 and below 1. Whole books or files are taken
        until there are so many.
      test: the same of the test data.
      cache_dir: where the texts that have a name are kept in one file, with a checksum; by default ``distill_jax`` in
        ``XDG_CACHE_HOME`` or ``~/.cache``.

    Returns:
      The texts.

    Raises:
      ValueError: for an argument that is not valid, and as :class:`distill_jax.data.DataError` for texts that were not
        found, are damaged, or are fewer than three.
    """
    for share in ("validation", "test"):
        check_fraction(share, validation if share == "validation" else test)
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError(
            f"validation and test must be above 0 and together below 1, got {validation} and {test}"
        )
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if str(name) in SOURCES:
        source = SOURCES[str(name)]
        if folder is not None and not folder.is_dir():
            raise ValueError(f"data_dir must be an existing folder, got {str(folder)!r}")
        files = source.files(folder)
        where = "" if folder is None else f" in {folder}"
        if not files:
            raise DataError(f"the text {name} was not found{where}: {source.install}")
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        build = functools.partial(_arrays, source.read, files)
        arrays = cached(folder_of(cache_dir), f"text/{name}", json.dumps([_VERSION, stats]), build)
        found = list(zip(arrays["names"].tolist(), _cut(arrays), strict=True))
        return _split(str(name), common(files), source.licence, found, validation, test)
    if folder is not None:
        raise ValueError(f"data_dir must not be given for {str(name)!r}, a path; got {str(folder)!r}")
    path = Path(name).expanduser()
    if path.is_file():
        return _one_file(path, validation, test)
    if not path.is_dir():
        raise DataError(
            f"the text must be one of {', '.join(SOURCES)}, or the path of a folder or a file, got {str(name)!r}"
        )
    found = list(read_files(below(path, "*")))
    return _split(path.name, path, "that of your files", found, validation, test)


def to_tokens(text: bytes | str) -> np.ndarray:
    """Turns a text into tokens, one for each byte of its UTF-8.

    Args:
      text: the text.

    Returns:
      int32 ``[bytes]``, from 1 to 255. A model of bytes has a vocabulary of 256, since :func:`pack` puts the token 0
      before each text.

    Raises:
      ValueError: if ``text`` is neither, or has a byte 0.
    """
    if isinstance(text, str):
        text = text.encode()
    if not isinstance(text, bytes):
        raise ValueError(f"text must be bytes or a string, got {shown(text)}")
    if b"\0" in text:
        raise ValueError("text must not have a byte 0, which is the token before each text: it is no text")
    return np.frombuffer(text, np.uint8).astype(np.int32)


def to_bytes(tokens: ArrayLike) -> bytes:
    """Turns tokens of bytes back into a text, without the token 0.

    Args:
      tokens: integers ``[n]``.

    Returns:
      The text.

    Raises:
      ValueError: if they are no bytes.

    >>> to_bytes([0, 104, 105])
    b'hi'
    """
    check_integers("tokens", tokens)
    tokens = np.asarray(tokens)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < VOCABULARY:
        raise ValueError(f"tokens must be bytes, from 0 to 255, got {tokens.min()} to {tokens.max()}")
    return tokens[tokens != BEGIN].astype(np.uint8).tobytes()


def pack(
    texts: Sequence[ArrayLike], length: int, *, begin: int | None = BEGIN, pad: int = 0
) -> dict[str, np.ndarray]:
    """Packs texts into rows of one length, in which they do not see each other.

    Each row is filled up with the beginning of the next text, under a segment of its own. A text that goes on in the
    next row begins there with its last token of the row before. So each token is predicted exactly once: a row has as
    many predictions as pairs of neighbours of one segment.

    Args:
      texts: the tokens of each text, integers ``[tokens]``.
      length: the number of tokens of a row, at least 2.
      begin: the token that is put before each text; None puts none, and then its first token is never predicted.
      pad: the token that fills up the last row.

    Returns:
      ``"tokens"`` and ``"segments"``, int32 ``[rows, length]``: the input of a
      :func:`distill_jax.models.build_transformer`. Segments count from 1 in each row; 0 is padding.

    Raises:
      ValueError: if an argument is not of that form, or no text has a token to predict.
    """
    check_count("length", length, least=2)
    for label, token in (("begin", begin), ("pad", pad)):
        if token is not None and (not is_integer(token) or token < 0):
            raise ValueError(f"{label} must be a token, an integer from 0, got {shown(token)}")
    head = np.array([] if begin is None else [begin], np.int32)
    pieces: list[tuple[np.ndarray, int]] = []  # tokens, and the segment: 1 begins a row
    room, segment = 0, 0
    for number, text in enumerate(texts):
        check_integers(f"texts[{number}]", text)
        given = np.asarray(text)
        if given.ndim != 1 or (given.size and not 0 <= given.min() <= given.max() < 2**31):
            raise ValueError(
                f"texts[{number}] must be tokens [tokens], from 0 to 2³¹ − 1, got shape {given.shape}"
                + (f", {given.min()} to {given.max()}" if given.size else "")
            )
        given = np.concatenate([head, given.astype(np.int32)])
        at = 0
        while at < len(given) - 1:
            if room < 2:  # a single token in a row would predict nothing
                pieces.append((np.full(room, pad, np.int32), 0))
                room, segment = length, 0
            segment += 1
            part = given[at : at + room]
            pieces.append((part, segment))
            room -= len(part)
            at += len(part) - 1
    if not pieces:
        raise ValueError("texts must hold at least one text with a token to predict, got none")
    pieces.append((np.full(room, pad, np.int32), 0))
    tokens = np.concatenate([part for part, _ in pieces])
    segments = np.repeat([number for _, number in pieces], [len(part) for part, _ in pieces])
    return {"tokens": tokens.reshape(-1, length), "segments": segments.astype(np.int32).reshape(-1, length)}


def _split(
    name: str, where: Path, licence: str, found: list[tuple[str, bytes]], validation: float, test: float
) -> Text:
    """Deals texts out to the splits, by a checksum of their names."""
    seen: set[bytes] = set()
    texts = []
    for title, text in sorted(found):
        digest = hashlib.sha256(text).digest()
        if text.strip() and digest not in seen:
            seen.add(digest)
            texts.append((title, text))
    need(len(texts) >= 3, name, "at least 3 different texts, to train, validate and test", len(texts))
    total = sum(len(text) for _, text in texts)
    order = sorted(range(len(texts)), key=lambda i: hashlib.sha256(texts[i][0].encode()).digest())
    parts: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    taken, i = 0, 0
    for part, share in (("test", test), ("validation", validation)):
        bound = taken + share * total
        while taken < bound and (not parts[part] or i < len(order) - 2):
            parts[part].append(order[i])
            taken += len(texts[order[i]][1])
            i += 1
    parts["train"] = order[i:]

    def documents(rows: list[int]) -> Documents:
        rows = sorted(rows)
        return Documents(np.array(rows, np.int64), *zip(*(texts[row] for row in rows), strict=True))

    source = f"{len(texts)} texts of {total:,} bytes from {where}"
    return Text(name, source, licence, *(documents(parts[part]) for part in ("train", "validation", "test")))


def _one_file(path: Path, validation: float, test: float) -> Text:
    """Cuts a file into its beginning, to train, what follows, to validate, and its end, to test."""
    text = read(path)
    need(is_text(text), path, "a text in UTF-8", "other bytes")
    cuts = [0]
    for share in (1 - validation - test, 1 - test):
        line = text.find(b"\n", max(int(share * len(text)), cuts[-1]))
        cuts.append(line + 1 if line >= 0 else len(text))
    cuts.append(len(text))
    parts = [text[start:end] for start, end in itertools.pairwise(cuts)]
    need(all(part.strip() for part in parts), path, "enough lines for three parts", f"{len(text)} bytes")
    splits = [
        Documents(np.array([i]), (f"{path.name}, part {i + 1}",), (part,)) for i, part in enumerate(parts)
    ]
    return Text(path.name, f"{len(text):,} bytes in {path}", "that of your file", *splits)


def _arrays(reader: Callable[[list[Path]], Iterable[tuple[str, bytes]]], files: list[Path]) -> Arrays:
    found = list(reader(files))
    need(found, common(files), "files in UTF-8", "none")
    names, texts = zip(*found, strict=True)
    lengths = np.array([len(text) for text in texts], np.int64)
    return {"names": np.array(names), "text": np.frombuffer(b"".join(texts), np.uint8), "lengths": lengths}


def _cut(arrays: Arrays) -> Iterator[bytes]:
    ends = np.cumsum(arrays["lengths"])
    for length, end in zip(arrays["lengths"], ends, strict=True):
        yield arrays["text"][end - length : end].tobytes()

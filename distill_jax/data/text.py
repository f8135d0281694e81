"""Text as tokens: real texts in three splits, tokens of bytes or of a byte-pair encoding, and packing into rows.

>>> rows = pack([to_tokens(b"abcd"), to_tokens(b"xy")], 5)
>>> print(rows["tokens"], rows["segments"])
[[  0  97  98  99 100]
 [  0 120 121   0   0]] [[1 1 1 1 1]
 [1 1 1 0 0]]
"""

import functools
import hashlib
import html
import itertools
import json
import re
import struct
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_fraction, check_integers, is_integer, shown
from distill_jax.data._cache import Arrays, cached, folder_of
from distill_jax.data._errors import DataError, need, one_line

BEGIN = 0  # the token before the first byte of a text: NUL, a byte that no text has
VOCABULARY = 256
_VERSION = 1  # of what is made of the files; part of what the cache is known by
_BOOK = re.compile(rb'<div [^>]*?osisID="(\w+)" sID=[^>]*?type="book"/>')
_BREAK = re.compile(
    r'<div [^>]*sID="[^"]*" type="(?:x-p|x-m|section|book|paragraph)"/>|<lg\b[^>]*>|<l\b[^>]*>|<chapter[^>]*>'
)
_PYTHON_DOC = "/usr/share/doc"


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


class _Source(NamedTuple):
    """A text that has a name: its licence, where its files are by default, and how they are read."""

    licence: str
    files: Callable[[Path | None], list[Path]]
    read: Callable[[list[Path]], Iterable[tuple[str, bytes]]]
    install: str


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
    if str(name) in _SOURCES:
        source = _SOURCES[str(name)]
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
        return _split(str(name), _common(files), source.licence, found, validation, test)
    if folder is not None:
        raise ValueError(f"data_dir must not be given for {str(name)!r}, a path; got {str(folder)!r}")
    path = Path(name).expanduser()
    if path.is_file():
        return _one_file(path, validation, test)
    if not path.is_dir():
        raise DataError(
            f"the text must be one of {', '.join(_SOURCES)}, or the path of a folder or a file, got {str(name)!r}"
        )
    found = list(_read_files(_below(path, "*")))
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
        given = np.concatenate([head, np.asarray(text, np.int32).reshape(-1)])
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
    text = _read(path)
    need(_is_text(text), path, "a text in UTF-8", "other bytes")
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


def _arrays(read: Callable[[list[Path]], Iterable[tuple[str, bytes]]], files: list[Path]) -> Arrays:
    names, texts = zip(*read(files), strict=True)
    lengths = np.array([len(text) for text in texts], np.int64)
    return {"names": np.array(names), "text": np.frombuffer(b"".join(texts), np.uint8), "lengths": lengths}


def _cut(arrays: Arrays) -> Iterator[bytes]:
    ends = np.cumsum(arrays["lengths"])
    for length, end in zip(arrays["lengths"], ends, strict=True):
        yield arrays["text"][end - length : end].tobytes()


def _common(files: list[Path]) -> Path:
    shared = files[0].parent if files else Path()
    while not all(shared in path.parents for path in files):
        shared = shared.parent
    return shared


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read, {one_line(error)}") from error


def _below(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def _read_files(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    shared = _common(files)
    for path in files:
        text = _read(path)
        if _is_text(text):
            yield path.relative_to(shared).as_posix(), text


def _library_files(folder: Path | None) -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    return [path for path in _below(folder, "*.py") if not left_out & set(path.relative_to(folder).parts)]


def _documentation_files(folder: Path | None) -> list[Path]:
    if folder is not None:
        return _below(folder, "*.rst*")
    places = sorted(Path(_PYTHON_DOC).glob("python3*/html/_sources"))
    return _below(places[-1], "*.rst.txt") if places else []


def _sword_files(folder: Path | None) -> list[Path]:
    root = Path("/usr/share/sword") if folder is None else folder
    found = sorted(root.glob("modules/texts/ztext/engWEB*/ot.bzs"))
    return (
        [found[-1].with_name(f"{part}.bz{kind}") for part in ("ot", "nt") for kind in "sz"] if found else []
    )


def _books(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Reads the blocks of a SWORD module in order, and cuts them at the beginnings of books."""
    marked = b""
    for index, blocks in zip(files[::2], files[1::2], strict=True):
        data = _read(blocks)
        for place, size, length in struct.iter_unpack("<III", _whole_entries(index)):
            try:
                block = zlib.decompress(data[place : place + size]) if size else b""
            except zlib.error as error:
                raise DataError(
                    f"{blocks} is damaged, {one_line(error)}: install the package again"
                ) from error
            need(len(block) == length, blocks, f"a block of {length} bytes", f"{len(block)}: it is damaged")
            marked += block
    starts = list(_BOOK.finditer(marked))
    need(starts, files[0].parent, "the beginnings of books", "none")
    ends = [*(match.start() for match in starts[1:]), len(marked)]
    for start, end in zip(starts, ends, strict=True):
        yield start[1].decode(), _plain(marked[start.start() : end].decode()).encode()


def _whole_entries(index: Path) -> bytes:
    entries = _read(index)
    need(len(entries) % 12 == 0, index, "entries of 12 bytes", f"{len(entries)} bytes: it is damaged")
    return entries


def _plain(marked: str) -> str:
    """Turns OSIS into plain text: notes are left out, paragraphs and lines become line breaks."""
    text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", "", marked, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", "", _BREAK.sub("\n", text)))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


_SOURCES: dict[str, Any] = {
    "stdlib": _Source("PSF-2.0", _library_files, _read_files, "give the folder of Python's library, data_dir"),
    "python-doc": _Source("PSF-2.0", _documentation_files, _read_files, "apt-get install python3-doc"),
    "bible": _Source("public domain", _sword_files, _books, "apt-get install sword-text-web"),
}  # fmt: skip

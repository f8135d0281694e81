"""The texts that have a name: where their files are, and how these are read."""

import html
import re
import struct
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from distill_jax.data._errors import DataError, need, one_line

_BOOK = re.compile(rb'<div [^>]*?osisID="(\w+)" sID=[^>]*?type="book"/>')
_BREAK = re.compile(
    r'<div [^>]*sID="[^"]*" type="(?:x-p|x-m|section|book|paragraph)"/>|<lg\b[^>]*>|<l\b[^>]*>|<chapter[^>]*>'
)


class Source(NamedTuple):
    """A text that has a name: its licence, where its files are by default, and how they are read."""

    licence: str
    files: Callable[[Path | None], list[Path]]
    read: Callable[[list[Path]], Iterable[tuple[str, bytes]]]
    install: str


def common(files: list[Path]) -> Path:
    """Returns the folder that all files are in, or below."""
    shared = files[0].parent if files else Path()
    while not all(shared in path.parents for path in files):
        shared = shared.parent
    return shared


def is_text(text: bytes) -> bool:
    """Says whether bytes are UTF-8 without NUL."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return b"\0" not in text


def read(path: Path) -> bytes:
    """Reads a file, or raises :class:`DataError`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read, {one_line(error)}") from error


def below(folder: Path, pattern: str) -> list[Path]:
    """Lists the files in a folder and in those below it."""
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def read_files(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Reads the files that are texts: pairs of name and text."""
    shared = common(files)
    for path in files:
        text = read(path)
        if is_text(text):
            yield path.relative_to(shared).as_posix(), text


def _library_files(folder: Path | None) -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    return [path for path in below(folder, "*.py") if not left_out & set(path.relative_to(folder).parts)]


def _documentation_files(folder: Path | None) -> list[Path]:
    if folder is not None:
        return below(folder, "*.rst*")
    places = sorted(Path("/usr/share/doc").glob("python3*/html/_sources"))
    return below(places[-1], "*.rst.txt") if places else []


def _sword_files(folder: Path | None) -> list[Path]:
    root = Path("/usr/share/sword") if folder is None else folder
    found = sorted(root.glob("modules/texts/ztext/engWEB*/ot.bzs"))
    files = (
        [found[-1].with_name(f"{part}.bz{kind}") for part in ("ot", "nt") for kind in "sz"] if found else []
    )
    return files if all(file.is_file() for file in files) else []


def _books(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Reads the blocks of a SWORD module in order, and cuts them at the beginnings of books."""
    marked = b""
    for index, blocks in zip(files[::2], files[1::2], strict=True):
        data = read(blocks)
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
    entries = read(index)
    need(len(entries) % 12 == 0, index, "entries of 12 bytes", f"{len(entries)} bytes: it is damaged")
    return entries


def _plain(marked: str) -> str:
    """Turns OSIS into plain text: notes are left out, paragraphs and lines become line breaks."""
    text = re.sub(r"<note\b.*?</note>|<title\b.*?</title>", "", marked, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]*>", "", _BREAK.sub("\n", text)))
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line) + "\n"


SOURCES: Mapping[str, Source] = {
    "stdlib": Source("PSF-2.0", _library_files, read_files, "give the folder of Python's library, data_dir"),
    "python-doc": Source("PSF-2.0", _documentation_files, read_files, "apt-get install python3-doc"),
    "bible": Source("public domain", _sword_files, _books, "apt-get install sword-text-web"),
}  # fmt: skip

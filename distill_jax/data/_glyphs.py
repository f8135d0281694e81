"""Renders the characters 0-9, A-Z and a-z from font files, and drops the faces that do not show all of them."""

import functools
import hashlib
import importlib.util
import itertools
import json
import os
import re
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._files import write_atomically
from distill_jax.data._cache import Arrays, cached, file_name
from distill_jax.data._errors import DataError, need, one_line
from distill_jax.data._groups import join

CHARACTERS = tuple(string.digits + string.ascii_uppercase + string.ascii_lowercase)
SIZE = 32  # pixels, by default
_ENDINGS = (".ttf", ".otf", ".ttc", ".otc")
_VERSION = 3  # to be raised when other pictures or groups come from the same fonts
# Parts of a picture's height: capital letters, and the base line, from above
_CAPITAL, _BASE = 18 / 32, 23 / 32
_TEST = 0.2  # the share of the groups
_FEW = 20  # groups: with fewer of them accuracy on unseen fonts says little
# Letters whose small form is another shape and not only a smaller capital
_SHAPES = "ABDEGHNQRT"
# Limits that were set by looking at 1,900 faces
_SMALL_CAPITALS = 0.88  # correlation of the shapes of capital and small letters; the next other face has 0.83
_READABLE = 7  # letters of 52 that resemble the same letter of other fonts; dingbats have up to 6
_SAME = 1.0  # grey levels of 255, mean difference of the pictures of two faces
_NEAR = 0.98  # correlation of the pictures of two faces; copies of one design have more, other designs less
_LETTERS = CHARACTERS[10:]
# Letters that many designs draw alike count as one kind
_KIND = np.array([ord("i" if c in "Il" else c.lower()) for c in _LETTERS], np.int32)


class Face(NamedTuple):
    """One face of a font file."""

    path: Path
    number: int  # in the file
    family: str
    style: str

    def __str__(self) -> str:
        return f"{self.family} {self.style} ({self.path.name})"


class _UnusableError(Exception):
    """Says why a face is dropped."""


def find(data_dir: Path | None, cache: Path, size: int) -> tuple[str, Arrays]:
    """Renders the fonts of a folder, by default the system's; where these are too few, matplotlib's.

    Returns:
      One line about the source, and the arrays: the usual ones, ``origin`` (the number of the face, by
      example id), ``origins`` (the faces' names), ``group`` (the faces' groups), ``groups`` (their names) and
      ``dropped`` (lines).

    Raises:
      DataError: if there are no fonts, or fewer than three groups of families.
      ModuleNotFoundError: if Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the data set glyphs is rendered with Pillow: pip install 'distill_jax[data]'"
        ) from error
    if data_dir is not None:
        return _read([data_dir], str(data_dir), cache, size)
    try:
        return _read(system_folders(), "the system's fonts", cache, size)
    except DataError as error:
        package = importlib.util.find_spec("matplotlib")
        if package is None or not package.submodule_search_locations:
            raise DataError(
                f"{error}. Install fonts (on Debian: python experiments/data/fonts.py), or pass a folder of fonts "
                "as data_dir; matplotlib has three designs"
            ) from None
        folder = Path(package.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
        source, arrays = _read([folder], "matplotlib's fonts", cache, size)
        return f"{source} ({error})", arrays


def system_folders() -> list[Path]:
    """Lists the folders in which this system keeps its fonts."""
    if sys.platform == "win32":
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts"]
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or home / ".local/share"
    return [Path(own) / "fonts", home / ".fonts", *(Path(folder) / "fonts" for folder in shared.split(":"))]


def font_files(folders: Iterable[Path]) -> list[Path]:
    """Lists the font files in folders and below them, each once, in the order of their paths."""
    found = {
        path.resolve()
        for folder in folders
        for root, _, names in os.walk(folder)
        for name in names
        if (path := Path(root, name)).suffix.lower() in _ENDINGS and path.is_file()
    }
    return sorted(found)


def _read(folders: list[Path], where: str, cache: Path, size: int) -> tuple[str, Arrays]:
    """Renders the fonts of folders, or takes the pictures from the cache while the list of fonts is the same."""
    from PIL import __version__, features

    files = font_files(folders)
    need(files, where, f"font files ({', '.join(_ENDINGS)})", f"none in {', '.join(map(str, folders))}")
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    version = json.dumps([_VERSION, __version__, features.version("freetype2"), stats])
    what = f"glyphs/{size} {' '.join(map(str, folders))}"
    arrays = cached(cache, what, version, functools.partial(render, files, where, size))
    note = _note(cache / file_name(what), arrays["dropped"])
    faces, groups = len(arrays["origins"]), len(arrays["groups"])
    lost = len(arrays["dropped"])
    source = f"{faces} faces of {groups} groups of families, from {where}; {lost} were dropped{note}"
    if groups < _FEW:
        source += f"; {groups} groups are a smoke test, not a benchmark"
    return source, arrays


def _note(beside: Path, dropped: np.ndarray) -> str:
    """Writes the list of what was dropped beside the cache."""
    try:
        path = beside.with_suffix(".dropped.txt").expanduser()
        text = "".join(f"{line}\n" for line in dropped)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except (OSError, RuntimeError):  # the cache, which is written first, has given a warning
        return ""
    return f", listed in {path}"


def render(files: Sequence[Path], where: str, size: int) -> Arrays:
    """Renders all usable faces of font files.

    Args:
      files: the font files.
      where: names them, for messages.
      size: height and width of a picture, in pixels.

    Returns:
      The arrays that :func:`find` describes.

    Raises:
      DataError: if fewer than three groups of families are usable.
    """
    dropped: list[str] = []
    faces: list[Face] = []
    pictures: list[np.ndarray] = []
    for face in sorted(
        _faces(files, dropped), key=lambda f: (f.family, f.style, f.path.name, f.number, f.path)
    ):
        try:
            pictures.append(_checked(_pictures(face, size)))
            faces.append(face)
        except _UnusableError as why:
            dropped.append(f"{face}: {why}")
    kept, names = _compared(faces, pictures, dropped)
    faces, pictures = [faces[i] for i in kept], [pictures[i] for i in kept]
    groups = sorted(set(names))
    listed = f"; dropped: {'; '.join(dropped[:3])}" if dropped else ""
    need(
        len(groups) >= 3, where, "fonts of at least 3 groups of families, to train, validate and test",
        f"{len(groups)} in {len(files)} files{listed}",
    )  # fmt: skip
    # The hash of a group's name decides, so that fonts of other groups do not move it
    order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
    low = sum(hashlib.sha256(name.encode()).digest()[0] < 256 * _TEST for name in groups)
    test = set(order[: min(max(low, 1), len(groups) - 2)])
    rows = sorted(range(len(faces)), key=lambda i: names[i] in test)  # stable: by family within a split
    cut = len(CHARACTERS) * sum(name not in test for name in names)
    image = np.concatenate([pictures[i] for i in rows])[..., None]
    label = np.tile(np.arange(len(CHARACTERS), dtype=np.int32), len(rows))
    return {
        "train_image": image[:cut], "train_label": label[:cut],
        "test_image": image[cut:], "test_label": label[cut:],
        "origin": np.repeat(np.arange(len(rows), dtype=np.int32), len(CHARACTERS)),
        "origins": np.array([str(faces[i]) for i in rows]),
        "group": np.array([groups.index(names[i]) for i in rows], np.int32),
        "groups": np.array(groups),
        "dropped": np.array(dropped, np.str_),
    }  # fmt: skip


def _faces(files: Iterable[Path], dropped: list[str]) -> Iterator[Face]:
    """Opens font files, and notes in ``dropped`` those that cannot be read."""
    from PIL import ImageFont

    for path in files:
        collection = path.suffix.lower() in (".ttc", ".otc")
        for index in itertools.count() if collection else (0,):
            try:
                family, style = ImageFont.truetype(path, 20, index=index).getname()
            except Exception as error:  # OSError from FreeType, and others for names that cannot be decoded
                if not index:
                    dropped.append(f"{path.name}: it cannot be read, {one_line(error)}")
                break
            yield Face(path, index, " ".join((family or path.stem).split()), " ".join((style or "").split()))


def _pictures(face: Face, size: int) -> np.ndarray:
    """Draws the characters of a face, white on black, uint8 ``[characters, size, size]``.

    All characters stand on one base line and have one scale, so that 0 and O, or o and O, differ as they do in
    print. The scale gives the capital H its height; a face with a character that is then too large for the
    picture is scaled down. Pictures are drawn larger and averaged, so that no hinting distorts them.
    """
    from PIL import Image, ImageDraw, ImageFont

    finer = max(4, -(-128 // size))

    def load(points: float) -> Any:
        return ImageFont.truetype(face.path, points, index=face.number, layout_engine=ImageFont.Layout.BASIC)

    try:
        font = load(100)
        boxes = np.array([font.getbbox(c, anchor="ls") for c in CHARACTERS])
        absent = "\U0010fffe"  # no character, so that fonts show what they show for those they lack
        box, ink = font.getbbox(absent, anchor="ls"), bytes(font.getmask(absent))
        for c, its in zip(CHARACTERS, boxes, strict=True):
            if tuple(its) == tuple(box) and bytes(font.getmask(c)) == ink:
                raise _UnusableError(f"symbol or incomplete, it has no {c}")
        left, top, right, bottom = boxes.T
        capital = -top[CHARACTERS.index("H")]
        blank = [
            c for c, w, h in zip(CHARACTERS, right - left, bottom - top, strict=True) if w <= 0 or h <= 0
        ]
        if blank or capital <= 0:
            raise _UnusableError(f"blank, {(blank or 'H')[0]} has no picture")
        room = np.array([size - 1, _BASE * size - 0.5, (1 - _BASE) * size - 0.5])
        needed = np.array([max(right - left), max(-top), max(bottom)])
        scale = min(1.0, *(room / np.maximum(needed, 1e-9) * capital / (_CAPITAL * size)))
        if scale < 0.6:
            raise _UnusableError("too large, a character is far larger than the capital H")
        font = load(100 * finer * scale * _CAPITAL * size / capital)
        pictures = []
        for c in CHARACTERS:
            left, _, right, _ = font.getbbox(c, anchor="ls")
            image = Image.new("L", (size * finer, size * finer))
            place = ((size * finer - left - right) / 2, round(_BASE * size * finer))
            ImageDraw.Draw(image).text(place, c, fill=255, font=font, anchor="ls")
            pictures.append(np.asarray(image.reduce(finer)))
    except _UnusableError:
        raise
    except Exception as error:  # OSError from FreeType, ValueError and MemoryError from Pillow
        raise _UnusableError(f"it cannot be rendered, {one_line(error)}") from error
    return np.stack(pictures)


def _checked(pictures: np.ndarray) -> np.ndarray:
    """Returns the pictures of a face, unless they are blank or do not tell its characters apart."""
    of = dict(zip(CHARACTERS, pictures, strict=True))
    faint = [c for c, picture in of.items() if picture.max() < 64]
    if faint:
        raise _UnusableError(f"blank, {faint[0]} has almost no ink")
    same = [c for c in string.ascii_uppercase if _difference(of[c], of[c.lower()]) < _SAME]
    alike = [_correlation(_shape(of[c]), _shape(of[c.lower()])) for c in _SHAPES]
    if len(same) > 3 or np.median(alike) > _SMALL_CAPITALS:
        raise _UnusableError("unicase, its small letters look like capital letters")
    for kind in (string.digits, string.ascii_uppercase, string.ascii_lowercase):
        first: dict[bytes, str] = {}
        for c in kind:
            other = first.setdefault(of[c].tobytes(), c)
            if other != c:
                raise _UnusableError(f"symbol or incomplete, {other} and {c} have the same picture")
    return pictures


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b).mean())


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _shape(picture: np.ndarray, side: int = 12, *, columns: bool = False) -> np.ndarray:
    """The ink of a picture (or the columns with ink), resized to ``[side, side]``, whatever its size was."""
    from PIL import Image

    image = Image.fromarray(picture)
    ink = picture > 48
    x, y = (np.flatnonzero(ink.any(axis)).tolist() for axis in (0, 1))
    top, bottom = (0, len(picture)) if columns else (y[0], y[-1] + 1)
    box = (x[0], top, x[-1] + 1, bottom)
    return np.asarray(image.resize((side, side), Image.Resampling.BOX, box), np.float32)


def _compared(
    faces: Sequence[Face], pictures: Sequence[np.ndarray], dropped: list[str]
) -> tuple[list[int], list[str]]:
    """Compares the faces: drops duplicates and what does not show characters, and finds the groups.

    Two families are in one group if the first words of their names are the same, such as DejaVu Sans and DejaVu
    Serif, or if a face of one is almost a copy of a face of the other: many foundries have drawn the same design,
    and a foundry's own name in a font file is seldom there and often spelt in several ways.

    Returns:
      The positions of the usable faces, and the name of each one's group.
    """
    if not faces:
        return [], []
    stacked = _standard(np.stack([_pooled(face) for face in pictures])).reshape(len(faces), -1)
    near = np.asarray(jnp.dot(stacked, stacked.T, precision="highest")) > _NEAR * len(CHARACTERS)
    words = [re.split(r"[\s_-]", face.family)[0].casefold() for face in faces]
    alike: list[tuple[str, str]] = []  # first words of faces with the same or nearly the same pictures
    kept: list[int] = []
    for i, face in enumerate(faces):
        same = (j for j in kept if near[i, j] and _difference(pictures[i], pictures[j]) < _SAME)
        twin = next(same, None)
        if twin is None:
            kept.append(i)
        else:
            dropped.append(f"{face}: duplicate, the same pictures as {faces[twin]}")
            alike.append((words[i], words[twin]))
    readable = _readable([pictures[i] for i in kept], [words[i] for i in kept])
    for i, count in zip(kept, readable, strict=True):
        if count < _READABLE:
            dropped.append(
                f"{faces[i]}: symbol or hardly readable, only {count} of its {len(_LETTERS)} letters resemble the "
                "same letter of other fonts"
            )
    kept = [i for i, count in zip(kept, readable, strict=True) if count >= _READABLE]

    alike += [(words[kept[i]], words[kept[j]]) for i, j in np.argwhere(np.triu(near[np.ix_(kept, kept)]))]
    group_of = join(words, alike)
    return kept, [group_of[words[i]] for i in kept]


def _pooled(pictures: np.ndarray) -> np.ndarray:
    """Halves the resolution of a face's pictures and flattens them, float32 ``[characters, pixels]``."""
    n, size = len(pictures), pictures.shape[1] // 2
    even = pictures[:, : 2 * size, : 2 * size].reshape(n, size, 2, size, 2)
    return even.mean((2, 4), dtype=np.float32).reshape(n, -1)


def _standard(pictures: np.ndarray) -> np.ndarray:
    """Brings each flattened picture to mean 0 and norm 1, so that products are correlations."""
    centred = pictures - pictures.mean(-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-6)


def _readable(pictures: Sequence[np.ndarray], words: Sequence[str]) -> np.ndarray:
    """Counts the letters of each face whose nearest picture in other fonts is of the same kind.

    Widths are made equal first. The other fonts are one face of each of up to 40 first words; faces that these
    do not show to be readable are compared with up to 200.
    """
    shapes = np.stack([[_shape(p, 16, columns=True).ravel() for p in face[10:]] for face in pictures])
    shapes = _standard(shapes)
    _, others, names = np.unique(words, return_index=True, return_inverse=True)
    count = np.zeros(len(shapes), int)
    unsure = np.arange(len(shapes))
    for most in (40, 200):
        chosen = others[np.unique(np.linspace(0, len(others) - 1, most).astype(int))]
        kind = _nearest_kind(shapes[unsure], names[unsure], shapes[chosen], names[chosen])
        count[unsure] = (np.asarray(kind) == _KIND).sum(1)
        unsure = unsure[count[unsure] < 4 * _READABLE]
    return count


@jax.jit
def _nearest_kind(
    shapes: jax.Array, words: jax.Array, others: jax.Array, their_words: jax.Array
) -> jax.Array:
    """Finds the kind of the nearest letter of other words' faces, for letters ``[faces, letters, pixels]``."""

    def compare(nearest, other):
        best, kind = nearest
        letters, word = other
        products = jnp.einsum("flp,kp->flk", shapes, letters, precision="highest")
        value = products.max(-1)
        better = (value > best) & (words != word)[:, None]
        return (
            jnp.where(better, value, best),
            jnp.where(better, jnp.asarray(_KIND)[products.argmax(-1)], kind),
        ), None

    start = jnp.full(shapes.shape[:2], -2.0), jnp.full(shapes.shape[:2], -1, jnp.int32)
    return jax.lax.scan(compare, start, (others, their_words))[0][1]

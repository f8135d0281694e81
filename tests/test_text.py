"""Texts as data: what is read, how it is split and packed, and what is said where something is missing."""

import itertools
import struct
import zlib

import jax
import numpy as np
import pytest

from distill_jax import models
from distill_jax.data import DataError, text

TEXTS = [b"abcd", b"", b"xyz", b"0123456789", b"k"]


def test_every_byte_is_predicted_once_within_its_own_text():
    rows = text.pack([text.to_tokens(t) for t in TEXTS], 5, pad=9)
    tokens, segments = rows["tokens"], rows["segments"]
    assert tokens.shape == segments.shape == (5, 5)
    pairs = [
        (int(tokens[i, j]), int(tokens[i, j + 1]))
        for i, j in np.ndindex(len(tokens), 4)
        if segments[i, j] == segments[i, j + 1] != 0
    ]
    expected = [[text.BEGIN, *given] for given in TEXTS]
    assert pairs == [pair for t in expected for pair in itertools.pairwise(t)]
    assert (tokens[segments == 0] == 9).all()
    for row in segments:  # a segment's tokens stand together
        assert (np.diff([n for n in row if n]) >= 0).all()


def test_packed_texts_do_not_see_each_other():
    config = models.TransformerConfig(vocabulary=text.VOCABULARY, width=8, layers=1, heads=2, hidden=8)
    model = models.build_transformer(config, jax.random.key(0))
    rows = text.pack([text.to_tokens(t) for t in TEXTS[2:4]], 8)
    compute = jax.jit(lambda x: model(x))
    logits = np.asarray(compute(rows))
    other = {**rows, "tokens": rows["tokens"].copy()}
    assert rows["segments"][0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    other["tokens"][0, 1] = 7
    changed = np.asarray(compute(other))
    np.testing.assert_array_equal(changed[0, 4:], logits[0, 4:])
    assert (changed[0, 1:4] != logits[0, 1:4]).any()
    alone = {name: rows[name][:1, [4, 5, 6, 7, 4, 5, 6, 7]] for name in rows}
    alone["segments"] = np.array([[1, 1, 1, 1, 0, 0, 0, 0]], np.int32)
    np.testing.assert_allclose(np.asarray(compute(alone))[0, :4], logits[0, 4:], atol=1e-6)


def write_tree(folder, count=12, size=200):
    for i in range(count):
        (folder / f"part{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part{i % 3}" / f"{i}.txt").write_bytes(bytes([97 + i]) * size)
    return folder


def test_own_files_are_split_whole(tmp_path):
    folder = write_tree(tmp_path / "books")
    (folder / "copy.txt").write_bytes(b"a" * 200)
    (folder / "picture").write_bytes(b"\xff\xfe\0")
    found = text.load(folder, validation=0.2, test=0.2)
    splits = found.train, found.validation, found.test
    ids = np.concatenate([split.id for split in splits])
    assert sorted(ids) == list(range(12))
    assert [len(split.names) for split in splits] == [6, 3, 3]
    assert not set(found.train.texts) & {*found.validation.texts, *found.test.texts}
    assert found.licence == "that of your files"
    # Which split a file is in does not depend on where the folder is
    again = text.load(folder.rename(tmp_path / "elsewhere"), validation=0.2, test=0.2)
    assert [split.names for split in again[3:]] == [split.names for split in splits]


def test_a_single_file_is_cut_at_line_ends(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(f"line {i}\n" for i in range(100)))
    found = text.load(file)
    parts = [split.texts[0] for split in (found.train, found.validation, found.test)]
    assert b"".join(parts) == file.read_bytes()
    assert all(part.endswith(b"\n") for part in parts)
    assert len(parts[0]) > 4 * (len(parts[1]) + len(parts[2]))


def sword(folder, books):
    """Writes a SWORD module as the package has it: an index of blocks, and the blocks, compressed."""
    place = folder / "modules" / "texts" / "ztext" / "engWEB9"
    place.mkdir(parents=True)
    for part in ("ot", "nt"):
        index = data = b""
        for name, body in books[part]:
            marked = f'<div canonical="true" osisID="{name}" sID="g" type="book"/>{body}'.encode()
            for block in (marked[:40], marked[40:]):
                packed = zlib.compress(block)
                index += struct.pack("<III", len(data), len(packed), len(block))
                data += packed
        (place / f"{part}.bzs").write_bytes(index)
        (place / f"{part}.bzz").write_bytes(data)
    return place


BOOKS = {
    "ot": [("Gen", '<title>Genesis</title><div sID="a" type="x-p"/>In the <note n="1">Or a</note>begin&amp;ning.')],
    "nt": [("Matt", "<l>one</l><l>two</l>"), ("Mark", "three")],
}  # fmt: skip


def test_the_bible_is_read_by_book_and_kept(tmp_path):
    place = sword(tmp_path / "sword", BOOKS)
    options = {"data_dir": tmp_path / "sword", "cache_dir": tmp_path / "kept", "validation": 0.3, "test": 0.3}
    found = text.load("bible", **options)
    splits = found.train, found.validation, found.test
    texts = {n: t for split in splits for n, t in zip(split.names, split.texts, strict=True)}
    assert texts == {"Gen": b"In the begin&ning.\n", "Matt": b"one\ntwo\n", "Mark": b"three\n"}
    assert found.licence == "public domain"
    kept = list((tmp_path / "kept").glob("text-*.npz"))
    assert len(kept) == 1
    # A damaged copy is made anew, and so is that of changed files
    kept[0].write_bytes(kept[0].read_bytes()[:100])
    assert text.load("bible", **options).train.texts == found.train.texts
    assert kept[0].stat().st_size > 100
    data = bytearray((place / "ot.bzz").read_bytes())
    data[5] ^= 1
    (place / "ot.bzz").write_bytes(data)
    with pytest.raises(DataError, match=r"ot\.bzz is damaged, .*install the package again"):
        text.load("bible", **options)
    (place / "nt.bzs").unlink()
    with pytest.raises(DataError, match=r"bible was not found in .*apt-get install"):
        text.load("bible", **options)


def test_the_standard_library_without_its_tests(tmp_path):
    write_tree(tmp_path / "lib", 6)
    for file in (tmp_path / "lib").rglob("*.txt"):
        file.rename(file.with_suffix(".py"))
    for folder in ("test", "site-packages"):
        (tmp_path / "lib" / folder).mkdir()
        (tmp_path / "lib" / folder / "a.py").write_text("not this one")
    found = text.load("stdlib", data_dir=tmp_path / "lib", cache_dir=tmp_path / "kept")
    names = [n for split in (found.train, found.validation, found.test) for n in split.names]
    assert sorted(names) == sorted(f"part{i % 3}/{i}.py" for i in range(6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: text.load("nope"), "must be one of stdlib, python-doc, bible, or the path of a folder"),
        (lambda path: text.load("bible", data_dir=path), "apt-get install sword-text-web"),
        (lambda path: text.load("bible", data_dir=path / "none"), "data_dir must be an existing folder"),
        (lambda path: text.load(path), "at least 3 different texts, to train, validate and test, found 0"),
        (lambda path: text.load(path, data_dir=path), "data_dir must not be given"),
        (lambda path: text.load(path, validation=0.5, test=0.5), "together below 1"),
        (lambda path: text.pack([np.array([0.5])], 4), "must be integers"),
        (lambda path: text.pack([[1, 2]], 1), "length"),
        (
            lambda path: text.pack([text.to_tokens(b"")], 4, begin=None),
            "at least one text with a token to predict",
        ),
        (lambda path: text.pack([[1]], 4, begin=-1), "begin must be a token"),
        (
            lambda path: text.pack([[1], [-3, 7]], 4),
            r"texts\[1\] must be tokens .*, got shape \(2,\), -3 to 7",
        ),
        (lambda path: text.pack([np.array([2**32 + 5, 7])], 4), "from 0 to 2³¹ − 1, .* 7 to 4294967301"),
        (lambda path: text.pack([[[1, 2], [3, 4]]], 6), r"got shape \(2, 2\)"),
        (lambda path: text.to_tokens(3), "text must be bytes or a string"),
        (lambda path: text.to_tokens("a\0"), "must not have a byte 0"),
        (lambda path: text.to_bytes([256]), "tokens must be bytes, from 0 to 255, got 256 to 256"),
    ],
)
def test_what_is_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(tmp_path)
    assert "\n" not in str(error.value)

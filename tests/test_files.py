"""Files that are whole or not there."""

import json
import math

import numpy as np
import pytest

from distill_jax import _files


def test_json_is_strict_and_plain(tmp_path):
    results = {"a": np.float32(0.5), "b": np.arange(2), "c": (None, True, "σ"), "d": {}}
    _files.write_json(tmp_path / "r.json", results)
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": 0.5, "b": [0, 1], "c": [None, True, "σ"], "d": {}}
    assert "σ" in text


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (math.nan, "is nan"),
        (-math.inf, "is -inf"),
        (np.float32("inf"), "is inf"),
        (np.array(math.nan), "is nan"),
        ({1: 2}, "is {1: 2}"),
        (1j, "is 1j"),
    ],
)
def test_json_refuses_and_keeps_the_old_file(tmp_path, bad, message):
    file = tmp_path / "results.json"
    _files.write_json(file, {"old": 1})
    with pytest.raises(ValueError, match=message) as error:
        _files.write_json(file, {"models": {"teacher": {"test": {"nll": [0.1, bad]}}}})
    assert str(error.value).startswith("models.teacher.test.nll[1] is ")
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    _files.write_json(file, {"old": 1})

    def fail(path, text, **options):
        path.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "write_text", fail)
    with pytest.raises(OSError, match="No space"):
        _files.write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_a_failed_write_leaves_nothing(tmp_path):
    def fails(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        _files.write_atomically(tmp_path / "x", fails)
    assert list(tmp_path.iterdir()) == []

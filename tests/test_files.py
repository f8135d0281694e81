"""Files that are whole or not there."""

import json
import math
import os
from pathlib import Path

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
        (np.ma.masked, "is masked"),
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


def test_a_full_disk_is_named_by_the_file(tmp_path):
    def fails(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*results\.json'$"):
        _files.write_atomically(tmp_path / "results.json", fails)


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    def write(path):
        path.write_text("first half, ")
        _files.write_json(tmp_path / "x", "the other's")
        path.write_text(path.read_text() + "second half")

    _files.write_atomically(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "first half, second half"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_file_and_directory_are_on_the_disk_before_the_return(tmp_path, monkeypatch):
    """What a power cut leaves cannot be tested; the order of the calls that guard against it can."""
    calls = []
    monkeypatch.setattr(os, "fsync", lambda file: calls.append(Path(os.readlink(f"/proc/self/fd/{file}"))))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: calls.append("replace") or replace(a, b))
    _files.write_json(tmp_path / "x", 1)
    (file, moved, directory) = calls
    assert file.name.startswith(".x.")
    assert (moved, directory) == ("replace", tmp_path)


def test_a_directory_that_cannot_be_opened_does_no_harm(tmp_path, monkeypatch):
    open_ = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: open_(path, flags | os.O_RDWR))  # no directory can be
    _files.write_json(tmp_path / "x", 1)
    assert (tmp_path / "x").read_text() == "1\n"


def test_a_lock_keeps_others_out_and_is_gone_afterwards(tmp_path):
    for _ in range(2):
        with (
            _files.locked(tmp_path),
            pytest.raises(ValueError, match="another process is writing in"),
            _files.locked(tmp_path),
        ):
            pass
        assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_its_holder_removed_meanwhile_is_none(tmp_path, monkeypatch):
    lock = _files._lock

    def removed_meanwhile(descriptor):
        (tmp_path / ".lock").unlink()
        return lock(descriptor)

    monkeypatch.setattr(_files, "_lock", removed_meanwhile)
    with pytest.raises(ValueError, match="another process is writing in"), _files.locked(tmp_path):
        pass

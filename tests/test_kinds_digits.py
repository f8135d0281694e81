"""The comparison of kinds of labels: a small run."""

import json

import label_kinds
import pytest
from harness import runs

EXPERIMENT = label_kinds

SMALL = [
    *("digits", "--seeds", "1", "--teacher", "8", "--student", "4", "--epochs", "1", "--teacher-epochs", "1"),
    *("--top", "2", "--draws", "3", "--save-seconds", "0"),
]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    status, printed, error = run("--out", out)
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())["models"]
    kinds = [
        "logits, float32",
        "logits, bfloat16",
        "top 2",
        "sampled 3",
        "hidden, bfloat16",
        "features, bfloat16",
    ]
    assert list(results) == ["teacher", "scratch", *kinds]
    assert [results[name]["bytes_per_label"] for name in kinds] == [40, 20, 2 + 6, 6, 16, 20 + 16]
    # The same labels but for their rounding
    first, second = (results[name]["test"]["teacher_kl"][0] for name in (kinds[0], kinds[4]))
    assert first == pytest.approx(second, rel=1e-2)
    assert "gave the fewest errors" in printed
    assert (out / "bytes.png").stat().st_size > 500
    stored = [path for path in (out / "seed0" / "labels").rglob("*") if path.is_file()]
    assert len(stored) == len(kinds) * 3 + 1
    assert all(
        runs.WRITTEN.fullmatch(str(path.relative_to(out))) for path in stored
    )  # --restart may delete them


def test_more_classes_than_there_are_are_refused(tmp_path, run):
    status, _, error = run("--top", 11, "--out", tmp_path / "run")
    assert status == 2
    assert "--top must be at most 10" in error
    assert len(error.strip().splitlines()) == 1

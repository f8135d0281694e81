"""Interpolation of teacher and student: a small run of everything, its resume, and bad input."""

import json
import shutil

import interpolate_mnist
import numpy as np
import pytest

EXPERIMENT = interpolate_mnist

SMALL = [
    *("digits_study", "--seeds", "2", "--hidden", "8", "--wide", "12"),
    *("--epochs", "2", "--few", "1050", "--few-epochs", "2", "--points", "3", "--save-seconds", "0"),
    *("--batch-size", "50"),
]
FEW, ALL = 1050, 1081  # as many batches, so the programs are the same


def test_a_whole_run_and_its_resume(tmp_path, monkeypatch, run):
    out = tmp_path / "run"
    status, printed, error = run("--out", out)
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    models = results["models"]
    of = {
        (entry["method"], entry["aligned"], entry["teacher_hidden"], entry["labels"]): entry
        for entry in models.values()
    }
    assert len(of) == len(models) == 2 * (6 + 9)
    for hidden in (8, 12):
        for labels in (FEW, ALL):
            for method in ("teacher", "scratch", "pull", "through", "soft labels", "soft labels + pull"):
                entry = of[method, False, hidden, labels]
                assert len(entry["test"]["errors"]) == 2
                width = hidden if method == "teacher" else 8
                assert entry["parameters"] == 64 * width + width + 10 * width + 10
    assert ("pull", True, 12, FEW) in of
    assert ("pull", True, 8, FEW) not in of
    # The student from scratch never sees a teacher
    for labels in (FEW, ALL):
        a, b = (of["scratch", False, hidden, labels]["test"] for hidden in (8, 12))
        assert a == b
    # At λ = 0 both ways of mixing are the student alone
    sweep = results["sweep"]
    assert sweep["rate"] == [0, 0.5, 1]
    first = [np.asarray(sweep[name])[:, 0].tolist() for name in ("pull", "through")]
    assert first[0] == first[1] == of["scratch", False, 8, FEW]["test"]["errors"]
    # The others are the models of the same λ
    for method in ("pull", "through"):
        middle = np.asarray(sweep[method])[:, 1].tolist()
        assert middle == of[method, False, 8, FEW]["test"]["errors"]
    # The line ends where it must, and alignment moves no end
    lines = {(each["teacher_hidden"], each["aligned"]): each for each in results["lines"]}
    for hidden in (8, 12):
        before, after = (lines[hidden, aligned] for aligned in (False, True))
        ends = [np.asarray(each["validation_loss"])[:, [0, -1]] for each in (before, after)]
        np.testing.assert_allclose(*ends, rtol=1e-4)
        assert (np.asarray(after["cosine"]) > before["cosine"]).all()
    sentence = "Pulling the student towards its teacher (λ = 0.5)"
    assert sentence in printed
    assert sentence in (out / "report.md").read_text()
    for file in ("line.png", "sweep.png"):
        assert (out / file).stat().st_size > 500

    # As if killed in the middle
    for name in ("soft-labels-12-units-1-081-labels-", "through-at-all-lambda"):
        shutil.rmtree(out / "all_seeds" / name)
    monkeypatch.setattr(interpolate_mnist, "draw", lambda *given: {})
    assert run("--out", out)[0] == 0
    again = json.loads((out / "results.json").read_text())
    assert again["models"] == models
    assert again["sweep"] == sweep


OPTIONS = {
    "rate above one": ("--rate 1.5", "--rate must lie in [0, 1], got 1.5"),
    "a teacher narrower than the student": ("--wide 4", "--wide must exceed --hidden, 8"),
    "fewer labels than a batch": ("--few 20", "--few must be from --batch-size"),
    "one point": ("--points 1", "--points must be at least 2, or 0"),
    "no learning rate": ("--learning-rate 0", "--learning-rate must be positive"),
    "batch larger than the data": (
        "--batch-size 9999 --few 0",
        "--batch-size must be at most the number of training examples, 1081",
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name])

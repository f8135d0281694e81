"""System S3 whole: a small run with everything in it, its resume, and what it says to bad input."""

import json
import shutil

import interpolate_mnist
import numpy as np
import pytest

EXPERIMENT = interpolate_mnist

SMALL = [
    *("--dataset", "digits", "--preset", "study", "--seeds", "2", "--hidden", "8", "--wide", "12"),
    *("--epochs", "2", "--few", "100", "--few-epochs", "2", "--points", "3", "--save-seconds", "0"),
    *("--batch-size", "50"),
]


def test_a_whole_run_and_its_resume(tmp_path, run):
    out = tmp_path / "run"
    status, printed, error = run("--out", out)
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    settings = results["settings"]
    assert settings == [
        "equal widths, 100 labels", "equal widths, all labels",
        "unequal widths, 100 labels", "unequal widths, all labels",
    ]  # fmt: skip
    models = results["models"]
    for name in ("teacher", "scratch", "pull", "through", "soft labels", "soft labels + pull"):
        for setting in settings:
            assert len(models[name]["test"][setting]) == 2
    assert "pull, aligned" in models
    # The student from scratch never sees a teacher
    for count in ("100 labels", "all labels"):
        a, b = (
            models["scratch"]["test"][f"{width}, {count}"] for width in ("equal widths", "unequal widths")
        )
        assert a == b
    # At λ = 0 both readings are the student alone
    sweep = results["sweep"]
    assert sweep["rate"] == [0, 0.5, 1]
    first = [np.asarray(sweep[name])[:, 0].tolist() for name in ("pull", "through")]
    assert first[0] == first[1] == models["scratch"]["test"]["equal widths, 100 labels"]
    # The line ends where it must, and alignment moves no end
    line = results["line"]
    for width in ("equal widths", "unequal widths"):
        before, after = (np.asarray(line[f"{width}, {name}"]) for name in ("as trained", "aligned"))
        np.testing.assert_allclose(before[:, [0, -1]], after[:, [0, -1]], rtol=1e-4)
        far, near = (results["cosines"][f"{width}, {name}"] for name in ("as trained", "aligned"))
        assert (np.asarray(near) > far).all()
    text = (out / "report.md").read_text()
    assert "At λ = 0.5 a reading" in printed
    assert "At λ = 0.5 a reading" in text

    # As if killed in the middle
    for name in ("unequal widths-all labels-soft labels", "sweep-through at all λ"):
        shutil.rmtree(out / name.replace(" ", "-"))
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
def test_bad_options(name, tmp_path, run):
    arguments, message = OPTIONS[name]
    out = tmp_path / "run"
    status, _, error = run("--out", out, *arguments.split())
    assert status == 2
    assert message in error
    assert not out.exists()

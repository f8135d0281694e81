"""Integers of a network: a small run, its figures, a resume, and what it says to bad input."""

import json
import shutil

import pytest
import quantise

EXPERIMENT = quantise
SMALL = [
    *("digits", "--seeds", "1", "--original", "mlp:16", "--original-epochs", "2", "--epochs", "2"),
    *("--save-seconds", "0"),
]


def test_a_whole_run_and_its_resume(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    assert status == 0
    models = json.loads((out / "results.json").read_text())["models"]
    assert list(models) == ["original", *quantise.AT_ONCE, quantise.TRAINED]
    weights, outputs = 64 * 16 + 160, 26
    assert models["original"]["bytes"] == 4 * (weights + outputs)
    assert models[quantise.INT8]["bytes"] == weights + 4 * 2 * outputs
    assert models[quantise.BOTH]["bytes"] == weights + 4 * (2 * outputs + 4)
    assert models[quantise.TRAINED]["bytes"] == weights / 2 + 4 * 2 * outputs
    assert models[quantise.INT8]["test"]["agreement"][0] > 0.97
    assert (out / "learning_curves.png").stat().st_size > 500
    assert printed.strip().splitlines()[-2] in (out / "report.md").read_text()

    # As if killed before the training with the rounding in place
    shutil.rmtree(out / "seed0" / "4-bits-trained")
    assert run("--out", out)[0] == 0
    again = json.loads((out / "results.json").read_text())["models"]
    for name, model in models.items():
        assert again[name]["test"] == model["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--learning-rate -1", "--learning-rate must be positive and finite, got -1"),
        ("--examples 5000", "number of training examples, 1081, got 5000"),
        ("--original nope", "a model is described by a family"),
    ],
)
def test_bad_options(arguments, message, check_refused):
    check_refused(arguments, message)

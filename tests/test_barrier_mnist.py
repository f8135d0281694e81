"""Barriers before and after alignment: a small run, and what it says to bad input."""

import json

import barrier_mnist
import numpy as np
import pytest

EXPERIMENT = barrier_mnist

SMALL = [
    *("digits", "--seeds", "1", "--networks", "mlp:32", "convnet:4", "--epochs", "20"),
    *("--points", "3", "--save-seconds", "0", "--examples", "200", "--batch-size", "50"),
]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    status, printed, error = run("--out", out, "--check")
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    for description in ("mlp:32", "convnet:4"):
        ways = results["line"][description]
        ends = [np.asarray(ways[name])[:, [0, -1]] for name in barrier_mnist.WAYS]
        for other in ends[1:]:  # alignment moves no end
            np.testing.assert_allclose(other, ends[0], rtol=1e-4)
        before, by_weights, _ = (results["barriers"][description][n] for n in barrier_mnist.WAYS)
        assert by_weights[0] < before[0]
        assert (out / f"line-{description.replace(':', '-')}.png").stat().st_size > 1000
        assert f"{description}: the barrier" in printed
    assert "aligned by weights" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--points 4", "--points must be odd"),
        ("--points 1", "--points must be at least 3, got 1"),
        ("--examples 0", "--examples must be at least 1, got 0"),
        ("--batch-size 5000", "--batch-size must be at most the number of training examples"),
        ("--learning-rate 0", "--learning-rate must be positive and finite, got 0.0"),
        ("--networks mlp:8 mlp:8", "--networks must name at least one network, each once, got mlp:8 mlp:8"),
        ("--networks mlp:x", "a model is described by"),
    ],
)
def test_bad_options(arguments, message, check_refused):
    check_refused(arguments, message)

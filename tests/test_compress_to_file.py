"""Compression to a file: a small run with its files and cards, and what it says to bad input."""

import json

import compress_to_file
import numpy as np
import pytest
from sklearn.datasets import load_digits

from distill_jax import models

EXPERIMENT = compress_to_file
SMALL = [
    *("digits", "--seeds", "1", "--original", "mlp:12", "--original-epochs", "2", "--tuning-epochs", "1"),
    *("--shares", "0.5", "--seconds", "0.05", "--points", "100", "--save-seconds", "0"),
]


def small_network(shape, classes, key):
    """A network of one's own, by module:function."""
    return models.build("mlp:12", shape, classes, key)


def test_a_whole_run_with_a_network_of_ones_own(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out, "--original", "test_compress_to_file:small_network")
    assert status == 0
    found = json.loads((out / "results.json").read_text())
    assert list(found["models"]) == ["original", "pruned to 0.5"]
    small = found["models"]["pruned to 0.5"]
    assert small["parameters"] == 64 * 6 + 6 + 6 * 10 + 10
    latencies = {name: each["files"][0]["latency_ms"] for name, each in found["models"].items()}
    assert found["chosen"] == min(latencies, key=latencies.get)  # all may be chosen, with 100 points to lose
    assert f"Chosen: {found['chosen']}." in printed
    model = models.load(out / small["files"][0]["file"])
    digits = load_digits()
    wrong = (np.argmax(model(digits.images[..., None].astype(np.float32) / 16), -1) != digits.target).mean()
    assert wrong == pytest.approx(1 - small["test"]["accuracy"][0], abs=0.1)
    (card,) = (out / "seed0").glob("*.md")
    assert found["models"][found["chosen"]]["files"][0]["file"] == f"seed0/{card.name.removesuffix('.md')}"
    assert "test examples of digits" in card.read_text()


OPTIONS = {
    "shares that rise": ("--shares 0.5 0.75", "--shares must fall and lie between 0 and 1"),
    "no such module": ("--original nowhere:network", "--original nowhere:network cannot be imported"),
    "no model": ("--original test_compress_to_file:len", "cannot be imported"),
    "a batch that is too large": ("--batch 5000", "number of training examples, 1081, got 5000"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, tmp_path, run):
    arguments, message = OPTIONS[name]
    out = tmp_path / "run"
    status, _, error = run(*arguments.split(), "--out", out)
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()

"""Pruning without training: a small run with its figures and files, and what it says to bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import prune_without_training
import pytest

from distill_jax import models
from distill_jax.compress import units

EXPERIMENT = prune_without_training
SMALL = [
    *("digits", "--seeds", "1", "--original", "mlp:8", "--epochs", "2", "--shares", "0.5"),
    *("--save-seconds", "0", "--check"),
]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    found = json.loads((out / "results.json").read_text())
    assert list(found["models"]) == ["original", *(f"{name}, 0.5" for name in prune_without_training.METHODS)]
    accuracy = {name: entry["test"]["accuracy"][0] for name, entry in found["models"].items()}
    lost, back = accuracy["original"] - accuracy["pruned, 0.5"], found["taken back"]["0.5"]
    assert back == pytest.approx((accuracy["least squares, 0.5"] - accuracy["pruned, 0.5"]) / lost)
    assert lost > 0
    assert status == (back < 0.5)
    assert f"{100 * back:.0f} % at 0.5" in printed
    assert (out / "accuracy.png").stat().st_size > 500


def test_pixels_are_units():
    model = models.build("mlp:4", (3, 5, 1), 2, jax.random.key(0))
    seeing = prune_without_training.by_pixels(model, (3, 5, 1))
    x = jnp.linspace(0, 1, 30).reshape(2, 3, 5, 1)
    graph = units.trace(seeing, x)
    small = units.keep(graph, seeing, {"features.x": [1, 7, 14]})
    whole = model.params["dense"][0]["kernel"]
    np.testing.assert_array_equal(small.params["dense"][0]["kernel"], whole[jnp.array([1, 7, 14])])
    np.testing.assert_allclose(seeing(x), model(x), rtol=1e-6)
    assert units.verify(graph, seeing, {"features.x": [1, 7, 14]}, x) < 1e-6


OPTIONS = {
    "shares that rise": ("--shares 0.5 0.75", "--shares must fall and lie between 0 and 1"),
    "no such group": ("--groups nope", "--groups must name some of"),
    "no expression": ("--groups (", "--groups must be a regular expression"),
    "pixels of a convnet": ("--pixels --original convnet:4", "--pixels must be false"),
    "more examples than there are": ("--examples 5000", "number of training examples, 1081, got 5000"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name])

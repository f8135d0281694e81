"""Pruning during distillation: a small run, its sparsity, a resume, and what it says to bad input."""

import json
import shutil

import jax
import jax.numpy as jnp
import kd_vgg
import numpy as np
import optax
import pytest

EXPERIMENT = kd_vgg

SMALL = [
    *("digits", "--seeds", "1", "--teacher", "mlp:16", "--student", "mlp:16"),
    *("--train-examples", "320", "--teacher-epochs", "2", "--epochs", "6", "--save-seconds", "0"),
    *("--fine-tune-epochs", "2", "--prune-every", "3", "--sparsity", "0.8"),
]
WEIGHTS = 64 * 16 + 16 * 10


def test_a_whole_run_and_its_resume(tmp_path, monkeypatch, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    assert status == 0
    results = json.loads((out / "results.json").read_text())
    models = results["models"]
    assert list(models) == [
        "teacher", "scratch", "distilled", kd_vgg.DENSE, "cut afterwards", "sparse", kd_vgg.SPARSE,
    ]  # fmt: skip
    removed = round(0.8 * WEIGHTS)
    for name, model in models.items():
        assert model["parameters"] == WEIGHTS + 26
        pruned = name in ("cut afterwards", "sparse", kd_vgg.SPARSE)
        # A weight of an input that is always zero, or a bias, may be zero by chance
        limit = model["parameters"] - (removed if pruned else 0)
        assert limit - 26 <= model["nonzero"] <= limit
        assert {"accuracy", "precision"} <= model["test"].keys()
    assert models["sparse"]["test"] != models["distilled"]["test"]
    assert "Pruning during distillation: without 80 % of its weights" in printed
    assert "Distillation with fine-tuning" in printed
    assert printed.strip().splitlines()[-2] in (out / "report.md").read_text()

    # As if killed before fine-tuning, which must find the masks in the checkpoint
    shutil.rmtree(out / "seed0" / "sparse-fine-tuned")
    monkeypatch.setattr(kd_vgg.results, "draw", lambda *arguments: {})
    assert run("--out", out)[0] == 0
    again = json.loads((out / "results.json").read_text())["models"]
    for name in models:
        assert again[name]["test"] == models[name]["test"]


def test_the_verdict():
    results = {
        "config": {"sparsity": 0.8},
        "models": {
            kd_vgg.DENSE: {"test": {"accuracy": [0.96, 0.98]}},
            kd_vgg.SPARSE: {"test": {"accuracy": [0.958, 0.974]}},
        },
    }
    assert "test accuracy changes by −0.40 ± 0.20 points" in kd_vgg.verdict(results)


OPTIONS = {
    "sparsity of one": ("--sparsity 1", "--sparsity must lie in [0, 1), got 1.0"),
    "unknown score": ("--score size", "score"),
    "malformed pattern": ("--pattern 2-4", "--pattern must be two numbers such as 2:4, got 2-4"),
    "pattern and sparsity": ("--pattern 2:4", "the first one smaller, of sparsity 0.8, got 2:4"),
    "pattern that removes nothing": ("--pattern 4:2 --sparsity 0.5", "the first one smaller"),
    "pattern that does not divide": ("--pattern 2:5 --sparsity 0.6", "must be a multiple of pattern's M=5"),
    "unknown leaf": ("--dense-leaves head tail", "--dense-leaves must each be found in some path of"),
    "malformed leaf": ("--dense-leaves (", "--dense-leaves must be regular expressions, such as head, got ("),
    "pruning ends before it begins": (
        "--prune-begin 0.7",
        "--prune-begin must be less than --prune-end, 0.6, got 0.7",
    ),
    "no time to prune": ("--epochs 1 --batch-size 320", "too few to prune in"),
    "more examples than there are": (
        "--train-examples 9999",
        "must be at most the number of training examples, 1081",
    ),
    "batch larger than the data": ("--batch-size 400", "number of training examples, 320, got 400"),
    "no fine-tuning": ("--fine-tune-epochs 0", "--fine-tune-epochs must be at least 1"),
    "alpha above one": ("--fine-tune-alpha 2", "--fine-tune-alpha must lie in [0, 1]"),
    "unknown teacher": ("--teacher nope:3", "a model is described by a family"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, tmp_path, run):
    arguments, message = OPTIONS[name]
    out = tmp_path / "run"
    status, _, error = run("--out", out, *arguments.split())
    assert status == 2
    assert message in error
    assert name == "unknown score" or len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_after_the_schedule_the_sparsity_is_reached_whatever_the_length():
    """Fractions of the run become steps that the run makes."""
    for epochs, examples, begin, end in [(1, 128, 0.0, 1.0), (3, 200, 0.1, 0.6), (2, 64, 0.5, 1.0)]:
        config = kd_vgg.Config(epochs=epochs, prune_begin=begin, prune_end=end, batch_size=64)
        tx = kd_vgg.pruning(config, optax.sgd(0.1), kd_vgg.schedule(config, examples))
        params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(10, 10)))}
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(epochs * (examples // 64)):
            updates, state = update(params, state, params)
            params = optax.apply_updates(params, updates)
        assert int((params["w"] == 0).sum()) == 80

"""Low-rank factors: a small run, its figures and files, a resume, and what it says to bad input."""

import json
import shutil

import factorise_network
import pytest

EXPERIMENT = factorise_network

SMALL = [
    *("digits", "--seeds", "1", "--original", "mlp:16", "--original-epochs", "2", "--epochs", "2"),
    *("--budget", "0.5", "--save-seconds", "0"),
]


def test_a_whole_run_and_its_resume(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    assert status == 0
    models = json.loads((out / "results.json").read_text())["models"]
    tuned = factorise_network.TUNED
    assert list(models) == ["original", "SVD", "whitened SVD", tuned]
    whole = 64 * 16 + 16 + 160 + 10
    assert models["original"]["parameters"] == whole
    for name in ("SVD", tuned):
        assert models[name]["parameters"] <= 0.5 * whole
        assert models[name]["flops"] < 0.6 * models["original"]["flops"]
    assert models[tuned]["ranks"]
    assert set(models[tuned]["times_as_fast"]) == {"1", "256"}
    assert (out / "learning_curves.png").stat().st_size > 500
    assert printed.strip().splitlines()[-2] in (out / "report.md").read_text()

    # As if killed before fine-tuning
    shutil.rmtree(out / "seed0" / "whitened-SVD-fine-tuned")
    assert run("--out", out)[0] == 0
    again = json.loads((out / "results.json").read_text())["models"]
    for name, model in models.items():
        assert again[name]["test"] == model["test"]


OPTIONS = {
    "diverging original": ("--original-learning-rate 1e30", "use a smaller learning rate"),
    "negative rate": ("--learning-rate -1", "--learning-rate must be positive and finite, got -1"),
    "budget of zero": ("--budget 0", "--budget must be positive and finite, got 0"),
    "budget above one": ("--budget 2", "--budget must be at most 1, got 2"),
    "batch larger than the data": ("--batch-size 5000", "number of training examples, 1081, got 5000"),
    "unknown network": ("--original nope", "a model is described by a family"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name], written=name.startswith("diverging"))

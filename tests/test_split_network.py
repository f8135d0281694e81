"""Split networks and autoencoders: a small run, its figures and files, a resume, and what it says to bad input."""

import json
import shutil

import pytest
import split_network

EXPERIMENT = split_network

SMALL = [
    *("digits", "--seeds", "1", "--original", "mlp:16", "--feature", "dense.0", "--encoder", "mlp:4"),
    *(
        "--original-epochs",
        "2",
        "--stage-epochs",
        "2",
        "--codes",
        "4x2",
        "--widths",
        "2",
        "--save-seconds",
        "0",
    ),
]


def test_a_whole_run_and_its_resume(tmp_path, monkeypatch, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    assert status == 0
    models = json.loads((out / "results.json").read_text())["models"]
    assert list(models) == ["original", "split, 4 × 2 bits", "autoencoder, 2"]
    assert models["original"]["parameters"] == 64 * 16 + 16 + 160 + 10
    split = models["split, 4 × 2 bits"]
    assert split["bytes_sent"] == 1
    assert split["parameters"] == (64 * 4 + 4 + 16 + 4) + (4 * 16 + 16) + (160 + 10)
    assert 0 < split["device_flops"] < 0.4
    assert models["autoencoder, 2"]["bytes_sent"] == 8
    assert models["autoencoder, 2"]["test"]["inputs_error"][0] < 0.2
    for name in ("split, 4 × 2 bits", "autoencoder, 2"):
        (stages,) = models[name]["stages"]
        levels = [stages[0]["before"], *(stage["after"] for stage in stages)]
        assert levels == sorted(levels, reverse=True)
    for file in ("learning_curves.png", "bytes.png", "reconstructions.png"):
        assert (out / file).stat().st_size > 500
    assert "with the predicted class and its probability" in printed
    assert "1 B per example" in (out / "report.md").read_text()

    # As if killed before the last stage
    shutil.rmtree(out / "seed0" / "split-4x2" / "joint")
    monkeypatch.setattr(split_network, "draw", lambda *arguments: {})
    assert run("--out", out)[0] == 0
    again = json.loads((out / "results.json").read_text())["models"]
    for name, model in models.items():
        assert again[name]["test"] == model["test"]


OPTIONS = {
    "diverging original": ("--original-learning-rate 1e30", "use a smaller learning rate"),
    "negative rate": (
        "--stage-learning-rate -1",
        "--stage-learning-rate must be positive and finite, got -1",
    ),
    "malformed code": ("--codes 8-4", "--codes must be width x bits such as 16x8"),
    "too many bits": ("--codes 8x17", "of up to 16 bits, got '8x17'"),
    "code wider than the layer": ("--codes 17x4", "be no wider than dense.0, 16, got"),
    "no code at all": ("--codes --widths", "--codes must name at least one code where there are no --widths"),
    "tolerance of one": ("--tolerance 1", "--tolerance must be below 1, got 1"),
    "unknown layer": ("--feature head", "--feature must be one of dropout.0, dense.0"),
    "unknown network": ("--original nope", "a model is described by a family"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name], written=name.startswith("diverging"))

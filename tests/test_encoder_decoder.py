"""System S4 whole: a small run of each kind, its figures and files, a resume, and bad input."""

import json
import shutil

import encoder_decoder
import pytest

EXPERIMENT, SMALL = encoder_decoder, ()

LINE = "--inputs 1 --outputs 1 --examples 500"
LINEAR = "--inputs 6 --outputs 3 --examples 1000 --ranks 1 3"
NETWORK = (
    "--original mlp --dataset digits --seeds 1 --model mlp:16 --feature dense.0 --encoder mlp:4 "
    "--original-epochs 2 --epochs 2 --stage-epochs 2 --budget 0.5 --codes 4x2 --images 2 "
    "--save-seconds 0"
)


def test_a_linear_original(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run(*LINEAR.split(), "--check", "--out", out)
    assert status == 0
    rows = json.loads((out / "results.json").read_text())["widths"]
    assert [row["width"] for row in rows] == [1, 3]
    for row in rows:
        assert row["excess"] <= 1e-3
        assert abs(row["closed form's excess"]) <= 1e-10
        assert row["parameters"] == row["width"] * 9 + 3
        assert row["bytes"] == 4 * row["width"]
        assert [stage["name"] for stage in row["stages"]] == ["encoder", "decoder", "joint"]
    assert rows[0]["optimum"] > 0.01
    assert rows[1]["error"] < 1e-9
    assert (out / "widths.png").stat().st_size > 500
    report = (out / "report.md").read_text()
    assert all(line in report for line in printed.strip().splitlines()[-7:-1])


def test_the_tutorials_line(tmp_path, run):
    status, printed, _ = run(*LINE.split(), "--out", tmp_path / "run")
    assert status == 0
    (line,) = [line for line in printed.splitlines() if "y = wx + b" in line]
    w, w_learned, b, b_learned = (float(x) for x in line.replace(",", "").split() if "." in x)
    assert abs(w - w_learned) < 1e-5
    assert abs(b - b_learned) < 1e-5


def test_a_network_and_its_resume(tmp_path, monkeypatch, run):
    out = tmp_path / "run"
    status, printed, _ = run(*NETWORK.split(), "--out", out)
    assert status == 0
    results = json.loads((out / "results.json").read_text())
    models = results["models"]
    assert list(models) == [
        "original", "SVD", "whitened SVD", encoder_decoder.TUNED,
        "split, 4 × 2 bits", "autoencoder, 2",
    ]  # fmt: skip
    whole = 64 * 16 + 16 + 160 + 10
    assert models["original"]["parameters"] == whole
    for name in ("SVD", encoder_decoder.TUNED):
        assert models[name]["parameters"] <= 0.5 * whole
        assert models[name]["flops"] < 0.6 * models["original"]["flops"]
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
    assert "Test examples, predicted class" in printed
    assert "1 B an example" in (out / "report.md").read_text()

    # As if killed before the last stage
    shutil.rmtree(out / "seed0" / "split-4x2" / "joint")
    monkeypatch.setattr(encoder_decoder, "draw", lambda *arguments: {})
    assert run(*NETWORK.split(), "--out", out)[0] == 0
    again = json.loads((out / "results.json").read_text())["models"]
    for name, model in models.items():
        assert again[name]["test"] == model["test"]


OPTIONS = {
    "too wide a code": (f"{LINEAR} --ranks 4", "--ranks must be at most 3, got 4"),
    "no rank": (f"{LINEAR} --ranks 0", "--ranks must be at least 1, got 0"),
    "too few examples": (f"{LINEAR} --examples 6", "--examples must exceed --inputs, 6, got 6"),
    "diverging": (f"{LINEAR} --stage-learning-rate 1e30", "use a smaller learning rate"),
    "diverging original": (f"{NETWORK} --original-learning-rate 1e30", "use a smaller learning rate"),
    "negative rate": ("--learning-rate -1", "--learning-rate must be positive and finite, got -1"),
    "budget of zero": (f"{NETWORK} --budget 0", "--budget must be positive and finite, got 0"),
    "malformed code": (f"{NETWORK} --codes 8-4", "--codes must be width x bits such as 16x8"),
    "too many bits": (f"{NETWORK} --codes 8x17", "of up to 16 bits, got '8x17'"),
    "code wider than the layer": (f"{NETWORK} --codes 17x4", "be no wider than dense.0, 16, got"),
    "unknown layer": (f"{NETWORK} --feature head", "--feature must be one of dropout.0, dense.0"),
    "unknown network": (f"{NETWORK} --model nope", "a model is described by a family"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, tmp_path, run):
    arguments, message = OPTIONS[name]
    out = tmp_path / "run"
    status, _, error = run(*arguments.split(), "--out", out)
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert name.startswith("diverging") or not out.exists()

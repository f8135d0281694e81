"""Networks as small programs: a program computes what the network does, a small run, and what it says to bad input."""

import json
import shutil

import jax
import numpy as np
import pytest
import smallest_mnist
import smallest_mnist_network as network
from harness import runs

from distill_jax import data
from distill_jax.compress import entropy_codes

EXPERIMENT = smallest_mnist
SMALL = [
    *("digits", "--seeds", "1", "--networks", "4,6@3", "--teacher", "4", "6", "--original", "8"),
    *("--teacher-epochs", "1", "--original-epochs", "2", "--packed-epochs", "2", "--epochs", "2"),
    *("--save-seconds", "0"),
]
LAYERS = {
    "factors": ((network.Layer(3, 1, 5, 2), network.Layer(3, 2, 6, 1), network.Layer(2, 1, 10, 1)), 3),
    "full": ((network.Layer(8, 1, 9, 0), network.Layer(1, 1, 10, 0)), 7),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_program_computes_what_the_network_does(kind):
    layers, limit = LAYERS[kind]
    images = data.load("digits").test.image[:64].copy()
    images[0] = 0
    rng = np.random.default_rng(0)
    model = network.make(layers, limit, 1, jax.random.key(0))
    for leaves in model.params["layers"]:
        leaves["bias"]["weight"] = np.float32(0.05 * rng.normal(size=leaves["bias"]["weight"].shape))
    with pytest.raises(ValueError, match="model must be one from freeze"):
        network.write(model)
    model = network.freeze(model)
    logits = jax.jit(lambda model, x: model(x))(model, images.astype("f4") / 255)
    file = network.write(model)
    assert len(np.unique(logits.argmax(1))) > 1
    np.testing.assert_array_equal(network.classify(file.program, images), logits.argmax(1))

    arrays = network.arrays_of(model)
    assert [a.shape for a in arrays[-1:]] == [(10,)]
    assert 1 < max(np.abs(a).max() for a in arrays) <= limit
    again = entropy_codes.decode(file.weights, [a.size for a in arrays], limit=limit, check=0)
    for a, b in zip(arrays, again, strict=True):
        np.testing.assert_array_equal(a.ravel(), b)
    assert (
        len(file.weights) + len(file.decoder)
        < len(file.program)
        < len(file.weights) + len(file.decoder) + 150
    )


def test_every_byte_can_stand_in_a_program():
    """Bytes that end a line or a text in Python's source are escaped."""
    parts = bytes(range(256)) + b"\x001\\'\r\n"
    literal = "".join(network.ESCAPES.get(c, c) for c in parts.decode("latin-1"))
    source = b"#coding:l1\nfound='" + literal.encode("latin-1") + b"'.encode('l1')"
    names: dict[str, bytes] = {}
    exec(compile(source, "program", "exec"), names)
    assert names["found"] == parts


def test_a_whole_run_and_its_resume(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    assert status == 0
    found = json.loads((out / "results.json").read_text())
    models = found["models"]
    assert list(models) == ["teacher", "4,6@3", "original", "original, packed"]
    assert found["chosen"] == "4,6@3"
    for name, file in {"4,6@3": "4-6-3.py", "original, packed": "original-packed.py"}.items():
        assert models[name]["bytes"] == (out / "seed0" / "programs" / file).stat().st_size
    assert models["4,6@3"]["differences"] == 0
    # This MLP has hardly been trained, and gives some images two equal largest outputs, which rounding puts in an order
    assert models["original, packed"]["differences"] < 6
    assert models["4,6@3"]["parameters"] == (9 * 4 + 4 * 4 + 4) + (9 * 4 + 4 * 6 + 6) + (16 * 6 + 6 * 10 + 10)
    assert models["original"]["bytes"] == 4 * (64 * 8 + 8 + 80 + 10)
    assert (out / "frontier.png").stat().st_size > 500
    assert printed.strip().splitlines()[-2] in (out / "report.md").read_text()

    assert runs.files_of_run(out)[1] == []

    # As if killed before the training of the small network
    shutil.rmtree(out / "seed0" / "4-6-3")
    assert run("--out", out)[0] == 0
    again = json.loads((out / "results.json").read_text())["models"]
    for name, model in models.items():
        assert again[name]["test"] == model["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--networks 4,6", "--networks must be like 8,16@3, with 2 widths before the largest integer"),
        ("--networks 4@1", "with 2 widths"),
        ("--networks 4,6@1 4,6@1", "be names that differ"),
        ("--kernels 3 3 3", "--kernels must leave one pixel"),
        ("--strides 1 1", "--strides must be as many as --kernels"),
        ("--teacher 4", "--teacher must be as many as --kernels, less one"),
        ("--batch-size 5000", "number of training examples, 1081, got 5000"),
    ],
)
def test_bad_options(arguments, message, check_refused):
    check_refused(arguments, message)

"""Compression to a file: a small run with its files and cards, and what it says to bad input."""

import json
from types import SimpleNamespace

import compress_to_file
import compress_to_file_report
import jax
import numpy as np
import pytest
from compress_to_file_candidates import Tools, settings_of
from harness import prepare, read, runs

from distill_jax import data, export, models
from distill_jax.compress import quantisation

EXPERIMENT = compress_to_file
SMALL = [
    *("digits", "--seeds", "1", "--original", "mlp:12", "--original-epochs", "2", "--rounds", "1", "1"),
    *("--widths", "0.5", "--ranks", "1", "0.5", "--save-seconds", "0", "--runtime", "stablehlo"),
    *("--multiple", "4"),
    *("--numbers", "float", "int8"),
    *("--aim", "bytes", "--most-lost", "100", "--most-bytes", "9999999", "--most-ms", "999"),
]  # fmt: skip

GOOD = {"faster": 5, "smaller": 10, "points lost": 0.3}


def small_network(shape, classes, key):
    """A network of one's own, by module:function."""
    return models.build("mlp:12", shape, classes, key)


def test_a_whole_run_with_a_network_of_ones_own(tmp_path, run, monkeypatch):
    calls = []

    def latency(path, x, *, threads, seconds):
        """Starts no process: the time of a file is that of its bytes."""
        calls.append(path.name)
        size = path.stat().st_size
        about = {"quartiles_ms": [1, 2], "runtime": "none", "machine": "none", "threads": threads}
        return {"bytes": size, "latency_ms": size / 1e4, "batch": len(x), **about}

    monkeypatch.setattr(export, "latency", latency)
    out = tmp_path / "run"
    status, printed, error = run("--out", out, "--original", "test_compress_to_file:small_network")
    assert status == 0, error
    found = json.loads((out / "results.json").read_text())
    (seed,) = found["seeds"]
    candidates = {each["name"]: each for each in seed["candidates"]}
    assert [*candidates] == [
        "original", "width=0.5,rank=1.0,numbers=float", "width=0.5,rank=1.0,numbers=int8",
        "width=0.5,rank=0.5,numbers=float", "width=0.5,rank=0.5,numbers=int8",
    ]  # fmt: skip
    smallest = min(candidates, key=lambda name: candidates[name]["bytes"])
    assert seed["chosen"] == smallest  # all may be chosen, with 100 points to lose
    assert sorted(each["epochs"] for each in candidates.values()) == [0, 1, 1, 2, 2]
    assert calls[-4:] == 2 * ["original.model", f"{smallest}.model"]
    assert seed["smaller"] == seed["original"]["bytes"] / candidates[smallest]["bytes"]
    assert f"{smallest} | " in printed
    path = out / seed["file"]
    model = models.load(path)
    assert {leaf.shape for leaf in jax.tree.leaves(model.params)} >= {
        (4,),
        (10,),
    }  # 4 of 12 units: 6 is no multiple
    test = data.load("digits").test
    wrong = np.argmax(model(prepare(test.image)), -1) != test.label
    assert found["models"]["chosen"]["test"]["errors"] == [wrong.sum()]
    rows = [(row["file"], row["batch"], row["difference"], row["same"]) for row in seed["compared"]]
    assert rows == [(".model", batch, 0, 1) for batch in (1, 7, 256)]
    assert ".model | 256 | 0 | 100.00 |" in " ".join(printed.split())
    accuracy = found["models"]["chosen"]["test"]["accuracy"][0]
    before = found["models"]["original"]["test"]["accuracy"][0]
    assert seed["points lost"] == pytest.approx(100 * (before - accuracy))
    assert "test examples of digits" in path.with_name(f"{path.name}.md").read_text()
    assert (out / "front.png").exists()
    assert runs.files_of_run(out)[1] == []  # --restart knows all of them
    del calls[:]
    # Run again, with a runtime that gives each class the logits of the one before
    logits = compress_to_file.run_file
    for module in (compress_to_file, compress_to_file_report):
        monkeypatch.setattr(module, "run_file", lambda *given: np.roll(logits(*given), 1, -1))
    assert run("--out", out, "--original", "test_compress_to_file:small_network")[0] == 0
    found = json.loads((out / "results.json").read_text())
    (seed,) = found["seeds"]
    right = (np.argmax(np.roll(model(prepare(test.image)), 1, -1), -1) == test.label).mean()
    assert seed["points lost"] == pytest.approx(100 * (before - right))
    assert [row["good"] for row in seed["compared"]] == [False] * 3
    assert (
        len(calls) == 7
    )  # what was found is not measured again, but for the original (three times) and the end
    status, _, error = run("--out", tmp_path / "budget", small=SMALL[:-2])
    assert status == 2
    assert "error: most_ms: no file is within" in error
    assert error.endswith("; most_ms is by default a fifth of the original's time under XLA\n")


def candidates(*given):
    """The tools of a run with the digits, which is not begun, and its original."""
    _, config = read(compress_to_file.CONFIGS, "", "digits", [*SMALL, "--jitter", "1", *given])
    dataset = data.load("digits")
    original = small_network(dataset.train.image.shape[1:], 10, jax.random.key(0))
    return Tools(config, SimpleNamespace(dataset=dataset), 0, original), original


def test_networks_that_a_multiple_makes_equal_are_candidates_once(capsys):
    tools, original = candidates("--widths", "0.5", "0.4", "0.1", "--ranks", "1", "--multiple", "4")
    made = [tools.make(original, settings) for settings in settings_of(tools.config)]
    # 4 of 12 units by both of the first widths, with two kinds of numbers; a tenth would be less than one multiple
    assert [model is None for model in made] == [False, False, True, True, True, True]
    printed = capsys.readouterr().out
    assert "width=0.4,numbers=int8 is left out: it is the same network as width=0.5,numbers=int8" in printed
    assert "0.1," not in printed


@pytest.mark.parametrize("numbers", ["int4-weights", "int8"])
def test_numbers_are_rounded_in_training(numbers):
    tools, original = candidates("--ranks", "1", "--numbers", numbers, f"{numbers}-trained", "float")
    (after, during, floats), made = settings_of(tools.config), {}
    tools.run.key = lambda *numbers: jax.random.key(0)
    trainings = {}

    def fit(name, seed, state, epoch, examples, *, epochs, batch_size, order, context):
        if name not in trainings:
            rows = np.arange(8 * batch_size).reshape(8, batch_size)
            trainings[name] = epoch(state, examples, rows, context)[0].model
        return SimpleNamespace(model=trainings[name])

    tools.run.fit = fit
    for settings in (after, during, floats):
        model = tools.make(original, settings)
        made[settings["numbers"]] = [
            tools.finish(each, settings) for each in (model, tools.tune(model, settings, 1))
        ]
    (plain, plain_trained), (rounded, rounded_trained), _ = made.values()
    np.testing.assert_array_equal(plain(tools.x), rounded(tools.x))  # before training they are the same
    assert np.abs(plain_trained(tools.x) - rounded_trained(tools.x)).max() > 0
    assert np.abs(rounded_trained(tools.x) - rounded(tools.x)).max() > 0
    assert jax.tree.structure(rounded.params) == jax.tree.structure(plain.params)
    # Numbers that are rounded afterwards share the training of floats
    simple, simulated = trainings.values()
    assert "ratio" not in str(simple.params)
    ratios = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(simulated.params)
        if "ratio" in str(path[-1])
    ]
    assert ratios
    assert all(np.abs(ratio - 1).max() > 0 for ratio in ratios)  # scales are learned


@pytest.mark.parametrize("name", GOOD)
def test_a_file_is_good_if_it_is_fast_and_small_and_right(name):
    rows = [{"good": True}, {"good": True}]
    assert compress_to_file.is_good({**GOOD, "compared": rows})
    worse = {"faster": 4.9, "smaller": 9.9, "points lost": 0.31}[name]
    assert not compress_to_file.is_good({**GOOD, name: worse, "compared": rows})
    assert not compress_to_file.is_good({**GOOD, "compared": [*rows, {"good": False}]})


def test_the_help_says_what_the_budgets_are(run):
    printed = " ".join(run("--help", small=["digits"])[1].split())
    for words in (
        "points of validation accuracy that the chosen",
        "longest time of a call",
        "size of the largest file",
    ):
        assert words in printed


def test_an_onnx_file_is_run_on_images(tmp_path):
    pytest.importorskip("jax2onnx")
    test = data.load("digits").test
    model = small_network(test.image.shape[1:], 10, jax.random.key(0))
    export.onnx(tmp_path / "m.onnx", model, prepare(test.image[:2]))
    images = prepare(test.image)
    found = compress_to_file.run_file(tmp_path / "m.onnx", images)
    np.testing.assert_allclose(found, model(images), atol=1e-5)
    small = quantisation.quantise(model, [images], activations=True)
    export.onnx(tmp_path / "s.onnx", small, images[:64])
    for name, of in {"m": model, "s": small}.items():
        rows = compress_to_file.compared(tmp_path / f"{name}.onnx", of, images)
        assert [(row["batch"], row["good"]) for row in rows] == [(1, True), (7, True), (256, True)]
    # The numbers that integers mean are not what the file computes, but nearly
    (row, *_) = compress_to_file.compared(tmp_path / "m.onnx", quantisation.dequantise(small), images)
    assert 1e-4 < row["difference"] < 0.1
    assert not row["good"]


OPTIONS = {
    "no such module": ("--original nowhere:network", "--original nowhere:network cannot be imported"),
    "no model": ("--original test_compress_to_file:len", "cannot be imported"),
    "a batch that is too large": ("--batch 5000", "--batch must be at most --examples, 512, got 5000"),
    "equal widths": ("--widths 0.5 0.5", "--widths must differ from each other, got 0.5 0.5"),
    "equal depths": ("--depths 1 1", "--depths must differ from each other, got 1.0 1.0"),
    "equal numbers": ("--numbers int8 int8", "--numbers must differ from each other, got int8 int8"),
    "equal ranks": ("--ranks 1 0.5 0.5", "--ranks must differ from each other, got 1.0 0.5 0.5"),
    "a width of 0": ("--widths 0.5 0", "--widths must be shares above 0"),
    "a rank of 0": ("--ranks 0", "--ranks must be shares above 0"),
    "other numbers": (
        "--numbers int4",
        "--numbers must be from float, int8-weights, int4-weights, int8, int8-weights-trained, "
        "int4-weights-trained, int8-trained, got int4",
    ),
    "an aim without a budget": ("--aim latency", "--aim must be quality without --most-lost"),
    "no blocks": ("--depths 1 0.5", "--depths must be 1 for a network without residual blocks"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, tmp_path, run):
    arguments, message = OPTIONS[name]
    out = tmp_path / "run"
    status, _, error = run(*arguments.split(), "--out", out, small=["digits"])
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()

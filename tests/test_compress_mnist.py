"""The compression experiment on digits: a small run, a resume, its operators, and bad input."""

import dataclasses
import json

import compress_mnist
import jax
import numpy as np
import pytest
from harness import study, training

from distill_jax import data, models
from distill_jax.compress import units

EXPERIMENT = compress_mnist

SMALL = [
    *("--dataset", "digits", "--seeds", "2", "--original", "mlp:8", "--epochs", "3"),
    *("--tuning-epochs", "1", "--shares", "0.5", "0.25", "--operators", "merge"),
    *("--iterative", "prune", "--refinements", "1", "--examples", "64", "--save-seconds", "0"),
]


def test_a_network_of_no_units_of_the_original_is_not_chosen(monkeypatch):
    search = object.__new__(compress_mnist.Search)
    search.config = compress_mnist.Config(budget=0.1)
    search.tried = {
        "fresh 0.1": ("fresh", False, 0.1),
        "prune 0.5": ("prune", False, 0.5),
        "merge 0.3": ("merge", False, 0.3),
    }
    losses = {"original": 1.0, "fresh 0.1": 1.0, "prune 0.5": 1.05, "merge 0.3": 1.2}
    sizes = {"original": 10, "fresh 0.1": 1, "prune 0.5": 5, "merge 0.3": 3}
    monkeypatch.setattr(search, "loss", losses.get, raising=False)
    monkeypatch.setattr(search, "size", sizes.get, raising=False)
    assert search.chosen() == "prune 0.5"
    losses["prune 0.5"] = 1.2
    assert search.chosen() == "original"


def test_a_whole_run_and_a_resume(tmp_path, run):
    out = tmp_path / "run"
    options = ["--out", out, "--budget", 10]  # all are within it: the smallest is chosen
    status, printed, _ = run(*options)
    assert status == 0
    results = json.loads((out / "results.json").read_text())
    names = ["merge 0.5", "merge 0.25", "prune 0.5", "prune, iterative 0.25"]
    assert list(results["models"]) == ["original", *names]
    widths = dict(zip(names, (4, 2, 4, 2), strict=True)) | {"original": 8}
    for name, model in results["models"].items():
        assert model["parameters"] == 64 * widths[name] + widths[name] * 11 + 10
        assert len(model["test"]["f1"]) == 2
        assert f"{model['validation']['nll']:.4f}" in printed
    assert widths[results["chosen"]] == 2
    assert f"Chosen: {results['chosen']}, the smallest within 10 nats" in printed
    half = results["claims"]["half of the units"]
    assert half["model"] in ("prune 0.5", "merge 0.5")
    accuracy = {n: np.mean(m["test"]["accuracy"]) for n, m in results["models"].items()}
    lost = 100 * (accuracy["original"] - accuracy[half["model"]])
    np.testing.assert_allclose(half["points"], lost, atol=1e-9)
    assert results["before_tuning"].keys() == set(names)
    for file in ("report.md", "tradeoffs.png", "untuned.png"):
        assert (out / file).stat().st_size > 500
    assert "Chosen:" in (out / "report.md").read_text()

    (out / "results.json").unlink()
    assert run(*options)[0] == 0
    repeated = json.loads((out / "results.json").read_text())
    for name, model in results["models"].items():
        assert repeated["models"][name]["test"] == model["test"]
    assert repeated["before_tuning"] == results["before_tuning"]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize("original", ["mlp:12,8", "convnet:4,6"])
def test_all_operators_give_networks_of_one_size(original, digits):
    config = compress_mnist.Config(dataset="digits", original=original, examples=32, score="l2")
    model = compress_mnist.build(config, digits, original, 0)
    widths = compress_mnist.widths_at(config, digits, 0.5)
    shapes = set()
    for operator in ("prune+merge", "merge", "select", "fresh", "prune"):
        params, state = compress_mnist.edit(config, digits, operator, widths, model.apply_fn, model[1:], 0)
        shapes.add(str(jax.tree.map(np.shape, params)))
        assert jax.tree.structure(params) == jax.tree.structure(model.params)
    assert len(shapes) == 1
    logits, _ = model.apply_fn(params, state, compress_mnist.prepare(digits.test.image[:2]))
    graph = compress_mnist.graph_of(model.apply_fn, model[1:], digits.test.image[:2])
    sizes = [group.size for group in graph.groups.values() if group.free]
    kept = units.prune(graph, units.scores.l2(graph, model.params), 0.5, across="group")
    assert [len(i) for i in kept.values()] == [n // 2 for n in sizes]
    silenced = units.silence(graph, {"params": model.params, "state": model.model_state}, kept)
    expected, _ = model.apply_fn(
        silenced["params"], silenced["state"], compress_mnist.prepare(digits.test.image[:2])
    )
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_widths_are_shares_multiples_and_never_one(digits):
    def widths(share, **options):
        config = compress_mnist.Config(original="mlp:20,12", **options)
        return compress_mnist.widths_at(config, digits, share)

    assert widths(0.5) == [10, 6]
    assert widths(0.5, multiple=8) == [8, 8]
    assert widths(0.08) == [2, 2]


def test_merging_gives_a_doubled_network_back(digits):
    config = compress_mnist.Config(original="mlp:8", examples=32, score="l2")
    small = compress_mnist.build(config, digits, "mlp:4", 0)
    dense = small.params["dense"]
    twice = {
        0: {k: np.repeat(v, 2, -1) for k, v in dense[0].items()},
        1: {"kernel": np.repeat(dense[1]["kernel"], 2, 0) / 2, "bias": dense[1]["bias"]},
    }
    model = compress_mnist.build(config, digits, "mlp:8", 0)
    variables = {**model.params, "dense": twice}, model.model_state
    merged, state = compress_mnist.edit(config, digits, "merge", [4], model.apply_fn, variables, 0)
    images = compress_mnist.prepare(digits.test.image[:4])
    np.testing.assert_allclose(
        model.apply_fn(merged, state, images)[0], small.apply_fn(*small[1:], images)[0],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_shifted_images_are_labelled_as_they_are_shifted(digits):
    config = compress_mnist.Config(original="mlp:8", jitter=1)
    model = compress_mnist.build(config, digits, "mlp:8", 0)
    search = object.__new__(compress_mnist.Search)
    search.config = config
    search.trained = [{"original": study.Trained(model.apply_fn, model[1:], {}, 0.0, None, None)}]
    how = search.labelling(0)
    batch = {"image": digits.train.image[:16], "label": digits.train.label[:16]}
    made = how["transform"](how["context"], batch, jax.random.key(0))
    assert np.abs(made["image"] - compress_mnist.prepare(batch["image"])).max() > 0.1
    expected, _ = model.apply_fn(*model[1:], made["image"])
    np.testing.assert_allclose(made["teacher"], expected, rtol=1e-6)
    search.config = dataclasses.replace(config, jitter=0)
    assert search.labelling(0) == {}


def test_original_and_fine_tuning_see_shifted_images(tmp_path, monkeypatch, run):
    shifts = []

    def jittered(pixels):
        shifts.append(pixels)
        return training.jittered(pixels)

    monkeypatch.setattr(compress_mnist, "jittered", jittered)
    options = ["--jitter", 1, "--seeds", 1, "--shares", 0.5, "--iterative", "--refinements", 0]
    status, printed, _ = run(*options, "--out", tmp_path / "run")
    assert status == 0
    assert shifts == [1, 1]  # the original's, and the merged network's
    assert "merge 0.5" in printed
    assert not (tmp_path / "run" / "seed0" / "labels").exists()


@pytest.mark.parametrize("score", compress_mnist.SCORES)
def test_every_score(score, digits):
    config = compress_mnist.Config(original="mlp:8", examples=32, score=score)
    model = models.build("mlp:8", (8, 8, 1), 10, jax.random.key(0))
    batch = compress_mnist.arrays(digits.train)
    batch = {name: values[:32] for name, values in batch.items()}
    graph = compress_mnist.graph_of(model.apply_fn, model[1:], batch["image"])
    found = compress_mnist.score(config, graph, model.apply_fn, model[1:], batch, 0)
    assert {name: x.shape for name, x in found.items()} == {"params.dense.0.kernel": (8,)}
    assert np.std(found["params.dense.0.kernel"]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"alpha": 2.0}, "--alpha must lie in"),
        ({"budget": -1.0}, "--budget must not be negative"),
        ({"budget": float("nan")}, "--budget must not be negative"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"operators": ("crush",)}, "--operators must be of prune"),
        ({"operators": ()}, "--operators must name"),
        ({"iterative": ("fresh",)}, "--iterative must be of prune"),
        ({"shares": (0.5, 0.5)}, "--shares must fall"),
        ({"shares": (1.5,)}, "--shares must fall"),
        ({"shares": (0.9995,)}, "--shares must fall"),
        ({"shares": ()}, "--shares must fall"),
        ({"shares": (0.001,)}, "--shares 0.001 is too little: .* with 1 of the units"),
        ({"score": "beauty"}, "--score must be one of l1"),
        ({"original": "resnet8"}, "--original must be mlp"),
        ({"original": "mlp:0"}, "sizes ≥ 1"),
        ({"examples": 10**6}, "--examples must be at most the number"),
    ],
)
def test_bad_input(changes, message, digits):
    config = dataclasses.replace(compress_mnist.Config(dataset="digits"), **changes)

    def examine():
        config.verify()
        compress_mnist.check(config, digits)

    with pytest.raises(ValueError, match=message):
        examine()

"""The compression experiment on digits: a small run, a resume, its operators, and bad input."""

import dataclasses
import json
from types import SimpleNamespace

import compress_mnist
import jax
import numpy as np
import pytest
from harness import experiment
from harness.experiment import Run, prepare

from distill_jax import data
from distill_jax.compress import units

EXPERIMENT = compress_mnist

SMALL = [
    *("digits", "--seeds", "2", "--original", "mlp:8", "--epochs", "3"),
    *("--tuning-epochs", "1", "--shares", "0.5", "0.25", "--operators", "merge"),
    *("--iterative", "prune", "--refinements", "1", "--examples", "64", "--save-seconds", "0"),
]


def test_a_whole_run_and_a_resume(tmp_path, run):
    out = tmp_path / "run"
    options = ["--out", out, "--budget", 10]  # all are within it: the smallest is chosen
    status, printed, error = run(*options)
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    names = ["merge 0.5", "merge 0.25", "prune 0.5", "prune, iterative 0.25"]
    assert list(results["models"]) == ["original", *names]
    facts = [("merge", False, 0.5), ("merge", False, 0.25), ("prune", False, 0.5), ("prune", True, 0.25)]
    widths = dict(zip(names, (4, 2, 4, 2), strict=True)) | {"original": 8}
    for name, model in results["models"].items():
        assert model["parameters"] == 64 * widths[name] + widths[name] * 11 + 10
        assert len(model["test"]["f1"]) == 2
        assert f"{model['validation']['nll']:.4f}" in printed
        if name != "original":
            fact = model["operator"], model["iterative"], model["share"]
            assert fact == facts[names.index(name)]
            assert len(model["untuned"]["accuracy"]) == 2
    assert widths[results["chosen"]] == 2
    assert f"Chosen: {results['chosen']}, the smallest within 10 nats" in printed
    half = next(each for each in results["claims"] if each["claim"] == "half of the units")
    assert half["model"] in ("prune 0.5", "merge 0.5")
    accuracy = {n: np.mean(m["test"]["accuracy"]) for n, m in results["models"].items()}
    lost = 100 * (accuracy["original"] - accuracy[half["model"]])
    np.testing.assert_allclose(half["points"], lost, atol=1e-9)
    for file in ("report.md", "tradeoffs.png", "untuned.png"):
        assert (out / file).stat().st_size > 500
    assert "Chosen:" in (out / "report.md").read_text()

    (out / "results.json").unlink()
    assert run(*options)[0] == 0
    repeated = json.loads((out / "results.json").read_text())
    for name, model in results["models"].items():
        assert repeated["models"][name]["test"] == model["test"]
        assert repeated["models"][name].get("untuned") == model.get("untuned")


def test_the_smallest_is_held_against_a_random_start(tmp_path, run):
    out = tmp_path / "run"
    options = ["--operators", "prune", "fresh", "--shares", 0.25, "--iterative", "--refinements", 0]
    status, printed, error = run("--out", out, *options, "--budget", 10)
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    assert list(results["models"]) == ["original", "prune 0.25", "fresh 0.25"]
    assert results["chosen"] == "prune 0.25"
    assert "(prune 0.25), not at random (fresh 0.25)," in printed
    assert run("--out", out, *options, "--budget", 10, "--check")[0] == 1  # none has half of the units


def test_no_smaller_network_may_be_good_enough(tmp_path, run):
    options = ["--shares", 0.25, "--iterative", "--refinements", 0, "--budget", 0, "--seeds", 1]
    status, printed, error = run("--out", tmp_path / "run", *options)
    assert status == 0, error
    assert "No smaller network is within 0 nats of the original's validation loss" in printed


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize("original", ["mlp:12,8", "convnet:4,6"])
def test_all_operators_give_networks_of_one_size(original, digits):
    config = compress_mnist.Config(dataset="digits", original=original, examples=32, score="l2")
    model = compress_mnist.build(config, digits, 0)
    widths = compress_mnist.widths_at(config, digits, 0.5)
    shapes = set()
    for operator in ("prune+merge", "merge", "select", "fresh", "prune"):
        edited = compress_mnist.edit(config, digits, operator, widths, model, 0)
        shapes.add(str(jax.tree.map(np.shape, edited.params)))
        assert jax.tree.structure(edited.params) == jax.tree.structure(model.params)
    assert len(shapes) == 1
    images = prepare(digits.test.image[:2])
    graph = units.trace(model, images)
    sizes = [group.size for group in graph.groups.values() if group.free]
    kept = units.prune(graph, units.scores.l2(graph, model), 0.5, across="group")
    assert [len(i) for i in kept.values()] == [n // 2 for n in sizes]
    expected = units.silence(graph, model, kept)(images)
    np.testing.assert_allclose(edited(images), expected, rtol=1e-4, atol=1e-5)
    # Nothing is dropped in training
    np.testing.assert_allclose(
        edited.apply(images, key=jax.random.key(0))[0], edited(images), rtol=1e-4, atol=1e-5
    )


def test_widths_are_shares_multiples_and_never_one(digits):
    def widths(share, **options):
        config = compress_mnist.Config(original="mlp:20,12", **options)
        return compress_mnist.widths_at(config, digits, share)

    assert widths(0.5) == [10, 6]
    assert widths(0.5, multiple=8) == [8, 8]
    assert widths(0.08) == [2, 2]


def test_merging_gives_a_doubled_network_back(digits):
    config = compress_mnist.Config(original="mlp:8", examples=32, score="l2")
    small = compress_mnist.build(config, digits, 0, [4])
    dense = small.params["dense"]
    twice = {
        0: {k: np.repeat(v, 2, -1) for k, v in dense[0].items()},
        1: {"kernel": np.repeat(dense[1]["kernel"], 2, 0) / 2, "bias": dense[1]["bias"]},
    }
    model = compress_mnist.build(config, digits, 0)
    model = model.replace(params={**model.params, "dense": twice})
    merged = compress_mnist.edit(config, digits, "merge", [4], model, 0)
    images = prepare(digits.test.image[:4])
    np.testing.assert_allclose(merged(images), small(images), rtol=1e-4, atol=1e-5)


def test_shifted_images_are_labelled_as_they_are_shifted(digits, tmp_path, monkeypatch):
    batch = {"image": digits.train.image[:16], "label": digits.train.label[:16]}
    seen = {}
    for jitter in (1, 0):
        config = compress_mnist.Config(original="mlp:8", jitter=jitter)
        original = compress_mnist.build(config, digits, 0)
        run = Run("x", config, digits, tmp_path, 0.0)

        def fit(name, seed, state, epoch, examples, *, context, model=original, **options):
            seen.update(examples=examples, context=context)
            return SimpleNamespace(model=model, history={}, seconds=0.0)

        monkeypatch.setattr(run, "fit", fit)
        how = compress_mnist.Recipe(compress_mnist.adam(0.1, 1, 1), None, 1)
        compress_mnist.train_model(run, "a", 0, original, how, 0, original)
        if jitter:
            transform = compress_mnist.labelled(compress_mnist.jittered(jitter))
            made = transform(seen["context"], batch, jax.random.key(0))
            assert np.abs(made["image"] - prepare(batch["image"])).max() > 0.1
            np.testing.assert_allclose(made["teacher"], original(made["image"]), rtol=1e-6)
            assert "teacher" not in seen["examples"]
    assert seen["context"] is None
    expected = original(prepare(digits.train.image))
    np.testing.assert_allclose(seen["examples"]["teacher"], expected, rtol=1e-4, atol=1e-5)


def test_original_and_fine_tuning_see_shifted_images(tmp_path, monkeypatch, run):
    shifts = []

    def jittered(pixels):
        shifts.append(pixels)
        return experiment.jittered(pixels)

    monkeypatch.setattr(compress_mnist, "jittered", jittered)
    labelled = []
    monkeypatch.setattr(
        compress_mnist, "labelled", lambda how: labelled.append(how) or experiment.labelled(how)
    )
    options = ["--jitter", 1, "--seeds", 1, "--shares", 0.5, "--iterative", "--refinements", 0]
    status, printed, _ = run(*options, "--out", tmp_path / "run")
    assert status == 0
    assert shifts == [1]
    assert len(labelled) == 1
    assert "merge 0.5" in printed
    assert not (tmp_path / "run" / "seed0" / "labels").exists()


@pytest.mark.parametrize("score", compress_mnist.SCORES)
def test_every_score(score, digits):
    config = compress_mnist.Config(original="mlp:8", examples=32, score=score)
    model = compress_mnist.build(config, digits, 0)
    small = compress_mnist.edit(config, digits, "prune", [5], model, 0)
    x = prepare(digits.train.image[np.random.default_rng(0).permutation(len(digits.train.label))[:32]])
    graph = units.trace(model, x)
    inputs = (x,) if score in ("apoz", "mean_activation") else ()
    (scores,) = getattr(units.scores, score)(graph, model, *inputs).values()
    best = np.sort(np.argsort(-scores, kind="stable")[:5])
    np.testing.assert_array_equal(small.params["dense"][0]["bias"], model.params["dense"][0]["bias"][best])
    np.testing.assert_array_equal(
        small.params["dense"][0]["kernel"], model.params["dense"][0]["kernel"][:, best]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"alpha": 2.0}, "--alpha must lie in"),
        ({"budget": -1.0}, "--budget must not be negative"),
        ({"budget": float("nan")}, "--budget must not be negative"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"operators": ("crush",)}, "--operators must be from prune"),
        ({"operators": ()}, "--operators must name at least one besides fresh, got none"),
        ({"operators": ("fresh",)}, "--operators must name at least one besides fresh"),
        ({"iterative": ("fresh",)}, "--iterative must be from prune"),
        ({"shares": (0.5, 0.5)}, "--shares must fall"),
        ({"shares": (1.5,)}, "--shares must fall"),
        ({"shares": (0.9995,)}, "--shares must fall"),
        ({"shares": ()}, "--shares must fall"),
        ({"shares": (0.001,)}, "--shares 0.001 is too little: .* with 1 unit per group"),
        ({"score": "beauty"}, "--score must be one of l1"),
        ({"original": "resnet8"}, "--original must be an MLP"),
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

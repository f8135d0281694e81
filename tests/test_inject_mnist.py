"""Students that start from a teacher's units, on digits: a run, its resume, its starts, bad input."""

import dataclasses
import json
import shutil

import inject_mnist
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness.experiment import Run, adam, arrays, plain, prepare

from distill_jax import data, models, train
from distill_jax.train import sweeps

EXPERIMENT = inject_mnist

SMALL = [
    *("digits", "--seeds", "2", "--teacher", "mlp:12,8", "--student", "mlp:6,4"),
    *("--labels", "20", "40", "--epochs", "2", "--batch-size", "10", "--teacher-epochs", "2"),
    *("--learning-rates", "0.01", "0.03", "--scores", "l2", "--scales", "0.5"),
    *("--examples", "64"),
]
CONFIG = inject_mnist.Config(
    dataset="digits", seeds=2, teacher="mlp:12,8", student="mlp:6,4", labels=(20, 40), epochs=2,
    batch_size=10, learning_rates=(0.01,), scores=("l2",), scales=(0.0, 0.5), examples=64,
)  # fmt: skip


def test_a_whole_run_its_resume_and_its_check(tmp_path, monkeypatch, run):
    out = tmp_path / "run"
    status, printed, error = run("--out", out, "--soft")
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    models = {(e["start"], e.get("labels"), e.get("soft")): e for e in results["models"].values()}
    assert len(models) == 1 + 2 * 2 * len(inject_mnist.STARTS)
    facts = ("start", "score", "scale", "learning_rate", "labels", "soft", "validation")
    for labels, soft in ((20, False), (40, False), (20, True), (40, True)):
        for start in inject_mnist.STARTS:
            model = models[start, labels, soft]
            tried = [
                (np.sum(row["validation"]["errors"]), row)
                for row in results["tried"]
                if (row["labels"], row["soft"], row["start"]) == (labels, soft, start)
            ]
            best, row = min(tried, key=lambda pair: pair[0])
            assert np.sum(model["validation"]["errors"]) == best
            assert {name: model[name] for name in facts} == row
            assert len(model["test"]["errors"]) == 2
            assert np.shape(model["curve"]) == (2, 3)
            # The curve ends where the student was judged: digits have fewer than WATCHED examples
            assert np.asarray(model["curve"])[:, -1].tolist() == model["validation"]["errors"]
            random = models["random", labels, soft]["test"]["errors"]
            assert model["change"] == np.subtract(model["test"]["errors"], random).tolist()
            assert model["parameters"] == 64 * 6 + 6 + 6 * 4 + 4 + 4 * 10 + 10
    assert "Starting from units of the teacher (" in printed
    for file in ("report.md", "labels.png", "soft-labels.png", "epochs.png"):
        assert (out / file).stat().st_size > 500

    # As if killed in the middle
    shutil.rmtree(out / "all_seeds" / "40-labels-uniform-p-=-0.5")
    status, printed, error = run("--out", out, "--soft", "--check")
    again = json.loads((out / "results.json").read_text())
    assert again["models"] == results["models"]
    assert again["tried"] == results["tried"]
    # The check is about the start from selected units that is better on validation data
    pair = [models[start, 40, False] for start in inject_mnist.SELECTED]
    chosen = min(pair, key=lambda entry: sum(entry["validation"]["errors"]))
    random = models["random", 40, False]["test"]["errors"]
    t = inject_mnist.results.paired(random, chosen["test"]["errors"]).t
    assert f"({chosen['start']}; 40 labels)" in printed
    assert status == (0 if t < -2 else 1)
    assert ("check failed: Starting from units" in error) == (status == 1)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_starts_are_the_teachers_numbers(digits):
    teacher = inject_mnist.build(CONFIG, digits, "teacher", 0)
    found = inject_mnist.begin(CONFIG, digits, teacher, 0)
    assert list(found) == inject_mnist.all_starts(CONFIG)
    Start = inject_mnist.Start
    fresh = inject_mnist.build(CONFIG, digits, "student", 0).params
    found = {start: model.params for start, model in found.items()}
    for start, params in found.items():
        assert jax.tree.structure(params) == jax.tree.structure(fresh), start
        assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, fresh), start
    jax.tree.map(np.testing.assert_array_equal, found[Start("random")], fresh)

    large = teacher.params["dense"]
    first, second = np.arange(6) * 2, np.arange(4) * 2
    uniform = found[Start("uniform")]["dense"]
    np.testing.assert_array_equal(uniform[1]["kernel"], large[1]["kernel"][np.ix_(first, second)])
    np.testing.assert_array_equal(uniform[2]["bias"], large[2]["bias"])
    scaled = found[Start("uniform", "", 0.5)]["dense"]
    np.testing.assert_array_equal(scaled[0]["kernel"], uniform[0]["kernel"])
    np.testing.assert_allclose(scaled[2]["kernel"], uniform[2]["kernel"] * 2**0.5, rtol=1e-6)

    # The first layer's units of the largest norms, of weights that enter and leave
    norms = np.square(large[0]["kernel"]).sum(0) + np.square(large[1]["kernel"]).sum(1)
    norms += np.square(large[0]["bias"])
    best = np.sort(np.argsort(-norms)[:6])
    scored = found[Start("by score", "l2")]["dense"]
    np.testing.assert_array_equal(scored[0]["kernel"], large[0]["kernel"][:, best])

    shuffled = found[Start("shuffled")]["dense"]
    assert not np.array_equal(shuffled[0]["kernel"], uniform[0]["kernel"])
    np.testing.assert_array_equal(
        np.sort(np.ravel(shuffled[0]["kernel"])), np.sort(np.ravel(uniform[0]["kernel"]))
    )


def test_a_teacher_of_doubled_units_merges_into_its_original(digits):
    small = models.build("mlp:6,4", (8, 8, 1), 10, jax.random.key(5))
    doubled = []
    for i, layer in enumerate(small.params["dense"].values()):
        kernel, bias = layer["kernel"], layer["bias"]
        if i:
            kernel = jnp.repeat(kernel, 2, 0) / 2
        if i < 2:
            kernel, bias = jnp.repeat(kernel, 2, 1), jnp.repeat(bias, 2)
        doubled.append({"kernel": kernel, "bias": bias})
    teacher = inject_mnist.build(CONFIG, digits, "teacher", 0)
    params = {**teacher.params, "dense": dict(enumerate(doubled))}
    found = inject_mnist.begin(CONFIG, digits, teacher.replace(params=params), 0)
    images = prepare(digits.test.image[:8])
    merged = found[inject_mnist.Start("merged")]
    np.testing.assert_allclose(merged(images), small(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
def test_students_side_by_side_learn_as_if_alone(soft, tmp_path, digits):
    config = dataclasses.replace(CONFIG, learning_rates=(0.001, 0.02))
    rows = np.stack([np.random.default_rng(s).permutation(100)[:40] for s in range(2)])
    run = Run("x", config, digits, tmp_path, 0.0)
    students, teachers = (
        [inject_mnist.build(config, digits, kind, seed) for seed in range(2)]
        for kind in ("student", "teacher")
    )
    starts = {inject_mnist.Start("random"): sweeps.stack(students)}
    setting = inject_mnist.Setting(40, soft)
    found = inject_mnist.train_students(config, run, setting, rows, sweeps.stack(teachers), starts)[1]
    assert found["learning_rate"] == 0.02

    tx = adam(0.02, 2, 4)
    loss_fn = train.distill(temperature=4.0, alpha=0.1) if soft else train.supervised()
    epoch = train.make_epoch(train.make_train_step(loss_fn, tx), transform=plain)
    state = train.init_state(students[1], tx, jax.random.key(3))
    alone = {name: values[rows[1]] for name, values in arrays(digits.train).items()}
    if soft:
        alone["teacher"] = np.asarray(teachers[1](prepare(alone["image"])))
    for number in range(2):
        state, _ = epoch(state, alone, train.epoch_order(0, number, 40, 10))
    for ours, theirs in zip(jax.tree.leaves(found["model"]), jax.tree.leaves(state.model), strict=True):
        np.testing.assert_allclose(ours[1], theirs, rtol=1e-3, atol=1e-5)
    assert found["curve"][1, 2] == found["validation"]["errors"][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"learning_rates": ()}, "--learning-rates must name at least one"),
        ({"learning_rates": (0.1, float("nan"))}, "--learning-rates must be positive"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"alpha": 2.0}, "--alpha must lie in"),
        ({"scales": (float("inf"),)}, "--scales must be finite"),
        ({"scores": ("beauty",)}, "--scores must be from l1"),
        ({"labels": (40, 20)}, "--labels must rise"),
        ({"labels": (5,)}, "--labels must rise from at least --batch-size, 10"),
        ({"teacher_labels": 30}, "--labels must rise"),
        ({"teacher_labels": 50}, "--teacher-labels must lie between --teacher-batch-size"),
        ({"examples": 1}, "--examples must lie between 2"),
        ({"student": "convnet:4,6"}, "--student must be an MLP"),
        ({"student": "mlp:6"}, "--student must be as deep as the teacher"),
        ({"student": "mlp:20,4"}, "has 20 units where the teacher's"),
    ],
)
def test_bad_input(changes, message, digits):
    config = dataclasses.replace(CONFIG, **changes)

    def examine():
        config.verify()
        inject_mnist.check(config, digits)

    with pytest.raises(ValueError, match=message):
        examine()

"""Students that start from a teacher's units, on digits: a run, its resume, its starts, bad input."""

import dataclasses
import json
import shutil

import inject_mnist
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import lanes, runs
from harness.training import adam, prepare

from distill_jax import data, models, train

EXPERIMENT = inject_mnist

SMALL = [
    *("--dataset", "digits", "--seeds", "2", "--teacher", "mlp:12,8", "--student", "mlp:6,4"),
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
    status, printed, error = run("--out", out)
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    settings = ["20 labels", "40 labels"]
    assert results["settings"] == settings
    for kind in inject_mnist.STARTS:
        model = results["models"][kind]
        for setting in settings:
            tried = [
                (np.sum(row["validation_errors"]), row)
                for row in results["tried"]
                if row["setting"] == setting and row["kind"] == kind
            ]
            best, row = min(tried, key=lambda pair: pair[0])
            assert np.sum(model["validation"][setting]) == best
            assert model["chosen"][setting].items() <= row.items()
            assert len(model["test"][setting]) == 2
            assert np.shape(model["curve"][setting]) == (2, 3)
            # The curve ends where the student was judged: digits have fewer than WATCHED examples
            ends = np.asarray(model["curve"][setting])[:, -1]
            assert ends.tolist() == model["validation"][setting]
        assert model["test"]["errors"] == model["test"]["40 labels"]
        assert model["parameters"] == 64 * 6 + 6 + 6 * 4 + 4 + 4 * 10 + 10
    assert "With 40 labels, starting from selected units (" in printed
    for file in ("report.md", "labels.png", "epochs-40-labels.png"):
        assert (out / file).stat().st_size > 500

    # As if killed in the middle
    shutil.rmtree(out / "40-labels-uniform-p-=-0.5")
    monkeypatch.setattr(inject_mnist, "selected", lambda table, name: inject_mnist.RANDOM)
    status, _, error = run("--out", out, "--check")
    assert status == 1
    assert "check failed: With 40 labels" in error
    again = json.loads((out / "results.json").read_text())
    assert again["models"] == results["models"]
    assert again["tried"] == results["tried"]


def test_the_check_asks_for_two_standard_errors():
    def table(uniform):
        wrong = {"random": [50, 60, 70], "uniform": uniform, "by score": [90, 90, 90]}
        return {kind: {"test": {"9 labels": x}, "validation": {"9 labels": x}} for kind, x in wrong.items()}

    assert inject_mnist.selected(table([40, 50, 60]), "9 labels") == "uniform"
    assert "(uniform) cut the test errors" in inject_mnist.sentence(table([40, 50, 60]), "9 labels")
    assert "no clear difference" in inject_mnist.sentence(table([10, 60, 80]), "9 labels")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_starts_are_the_teachers_numbers(digits):
    teacher = inject_mnist.build(CONFIG, digits, "teacher", 0)
    found = inject_mnist.begun(CONFIG, digits, teacher, 0)
    assert list(found) == inject_mnist.all_starts(CONFIG)
    Start = inject_mnist.Start
    fresh = inject_mnist.build(CONFIG, digits, "student", 0).params
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
    merged = inject_mnist.begun(CONFIG, digits, teacher._replace(params=params), 0)[
        inject_mnist.Start("merged")
    ]
    images = prepare(digits.test.image[:8])
    np.testing.assert_allclose(
        small.apply_fn(merged, {}, images)[0], small.apply_fn(small.params, {}, images)[0],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


@pytest.mark.parametrize("soft", [False, True])
def test_a_lane_is_a_student_trained_alone(soft, tmp_path, digits):
    config = dataclasses.replace(CONFIG, learning_rates=(0.001, 0.02))
    rows = np.stack([np.random.default_rng(s).permutation(100)[:40] for s in range(2)])
    progress = runs.Progress(1.0)
    place = lanes.Lanes(digits, rows, tmp_path, progress, config.batch_size)
    students = [inject_mnist.build(config, digits, "student", seed) for seed in range(2)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *[student.params for student in students])
    taught = jax.random.normal(jax.random.key(4), (2, 40, 10)) * 9 if soft else None
    bench = inject_mnist.Bench(config, place, "a", taught)
    found = bench.train(inject_mnist.Start("random"), params)
    progress.close()
    lane = found[1]
    assert lane.learning_rate == 0.02

    student, chosen = students[1], rows[1]
    tx = adam(0.02, 2)(4)
    loss_fn = train.supervised(student.apply_fn)
    if soft:
        loss_fn = train.distill(student.apply_fn, temperature=4.0, alpha=0.1)
    step = train.make_train_step(loss_fn, tx)

    def transform(context, batch, key):
        return {**batch, "image": prepare(batch["image"])}

    run = train.make_epoch(step, transform=transform)
    state = train.init_state(student.params, tx, jax.random.key(3))
    examples = {"image": digits.train.image[chosen], "label": digits.train.label[chosen]}
    if taught is not None:
        examples["teacher"] = np.asarray(taught[1])
    for number in range(2):
        state, _ = run(state, examples, train.epoch_order(0, number, 40, 10))
    for ours, alone in zip(jax.tree.leaves(lane.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(ours[1], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"learning_rates": ()}, "--learning-rates must name at least one"),
        ({"learning_rates": (0.1, float("nan"))}, "--learning-rates must be positive"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"alpha": 2.0}, "--alpha must lie in"),
        ({"scales": (float("inf"),)}, "--scales must be finite"),
        ({"scores": ("beauty",)}, "--scores must be of l1"),
        ({"labels": (40, 20)}, "--labels must rise"),
        ({"labels": (5,)}, "--labels must rise from at least --batch-size, 10"),
        ({"teacher_labels": 30}, "--labels must rise"),
        ({"teacher_labels": 50}, "--teacher-labels must lie between --teacher-batch-size"),
        ({"examples": 1}, "--examples must lie in 2"),
        ({"student": "convnet:4,6"}, "--student must be mlp"),
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

"""Metrics against scikit-learn and against counts made by hand."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sk

from distill_jax import metrics
from distill_jax.models import build, from_function


def draw(n=300, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)) + 2 * np.eye(classes)[labels]
    return logits.astype(np.float32), labels


def test_against_scikit_learn():
    logits, labels = draw()
    predicted = logits.argmax(-1)
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    result = metrics.figures(logits, labels)
    assert result["errors"] == (predicted != labels).sum()
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    for name, score in [
        ("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score),
    ]:  # fmt: skip
        assert result[name] == pytest.approx(score(labels, predicted, average="macro"), rel=1e-6)
    assert result["nll"] == pytest.approx(
        sk.log_loss(labels, probabilities / probabilities.sum(-1, keepdims=True)), rel=1e-5
    )
    brier = ((probabilities - np.eye(7)[labels]) ** 2).sum(-1).mean()
    assert result["brier"] == pytest.approx(brier, rel=1e-5)
    np.testing.assert_array_equal(metrics.confusion(logits, labels), sk.confusion_matrix(labels, predicted))


def test_classes_without_examples_or_predictions():
    """Class 0 is never predicted; class 3 neither occurs nor is predicted."""
    logits, labels = np.eye(4)[[1, 1, 2, 2]], np.array([0, 1, 2, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [
            score(labels, logits.argmax(-1), average="macro", zero_division=0)
            for score in (sk.precision_score, sk.recall_score, sk.f1_score)
        ]
    result = metrics.figures(logits, labels)
    np.testing.assert_allclose([result[k] for k in ("precision", "recall", "f1")], expected)


def test_calibration_has_bins_of_equal_mass():
    logits, labels = draw(100)
    confidence, accuracy, count = metrics.calibration_bins(logits, labels)
    assert len(count) == 15
    assert set(count) == {6, 7}
    assert count.sum() == 100
    assert (np.diff(confidence) >= 0).all()
    assert np.average(accuracy, weights=count) == pytest.approx((logits.argmax(-1) == labels).mean())
    assert len(metrics.calibration_bins(logits[:4], labels[:4])[2]) == 4


def test_calibration_error_of_known_confidence():
    """Confidence ¾ everywhere: ECE is the distance of the accuracy from it."""
    logits = np.tile([np.log(3.0), 0.0], (400, 1))
    for right, error in [(300, 0.0), (200, 0.25), (400, 0.25)]:
        labels = np.random.default_rng(0).permutation(np.arange(400) >= right).astype(int)
        one_bin = metrics.expected_calibration_error(logits, labels, bins=1)
        assert one_bin == pytest.approx(error, abs=1e-6)


def test_fidelity_to_the_teacher():
    logits, labels = draw()
    teacher, _ = draw(seed=1)
    result = metrics.figures(logits, labels, teacher)
    assert result["agreement"] == pytest.approx((logits.argmax(-1) == teacher.argmax(-1)).mean())
    p, q = (np.asarray(jax.nn.softmax(z), np.float64) for z in (teacher, logits))
    assert result["teacher_kl"] == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-5)
    same = metrics.figures(logits, labels, logits)
    assert (same["agreement"], same["teacher_kl"]) == (1, 0)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.array([0, 1]), r"expected logits \[n, classes\] and labels \[n\]"),
        (np.zeros((0, 2)), np.zeros(0, int), "n ≥ 1"),
        (np.zeros((2, 2)), np.array([0, 2]), r"labels must lie in \[0, 2\), got 0 to 2"),
        (np.array([[0, np.nan], [0, 1]]), np.array([0, 1]), "1 of 2 examples have NaN logits"),
    ],
)
def test_bad_input_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.figures(logits, labels)


def test_a_model_is_evaluated_on_a_data_set():
    """In batches that do not divide it, against the figures of the logits of one call."""
    student, teacher = (build(f"mlp:{n}", (4, 4, 1), 3, jax.random.key(n), dropout=0.5) for n in (4, 8))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (53, 4, 4, 1), np.uint8)
    labels = rng.integers(0, 3, 53)

    def prepare(x):
        return x / 255.0

    options = {"prepare": prepare, "batch_size": 20}
    ours, theirs = (np.asarray(model(prepare(images))) for model in (student, teacher))
    for expected, result in [
        (metrics.figures(ours, labels), metrics.evaluate(student, images, labels, **options)),
        (
            metrics.figures(ours, labels, theirs),
            metrics.evaluate(student, images, labels, teacher=teacher, **options),
        ),
    ]:
        assert result.keys() == expected.keys()
        np.testing.assert_allclose(list(result.values()), list(expected.values()), rtol=1e-5)
    assert {"agreement", "teacher_kl"} <= result.keys()
    assert metrics.evaluate(student, images, labels, teacher=student, **options)["agreement"] == 1
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\), got 0 to 3"):
        metrics.evaluate(student, images, np.where(labels == 2, 3, labels), **options)


def test_costs_count_the_state_of_a_model_in_bytes_alone():
    model = build("resnet8:0.5", (4, 4, 1), 3, jax.random.key(0))
    (cost,) = metrics.costs([model], jnp.zeros((4, 4, 1)), repeats=1)
    params, state = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (model.params, model.state))
    assert state > 0
    assert cost["parameters"] == params
    assert cost["bytes"] == 4 * (params + state)


def test_no_flops_where_xla_counts_a_loop_once():
    def fn(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0]

    (cost,) = metrics.costs([from_function(fn, jnp.ones((5, 8, 8)))], jnp.zeros(8), repeats=1)
    assert cost["parameters"] == 320
    assert "flops" not in cost


def test_cost_of_a_dense_net():
    model = build("mlp:40", (8, 8, 1), 10, jax.random.key(0))
    other = build("mlp:2", (8, 8, 1), 10, jax.random.key(0))
    small, cost = metrics.costs([other, model], jnp.zeros((8, 8, 1)))
    assert small["parameters"] == 64 * 2 + 2 + 2 * 10 + 10
    assert small["flops"] < cost["flops"]
    parameters = 64 * 40 + 40 + 40 * 10 + 10
    assert cost["parameters"] == parameters
    assert cost["bytes"] == parameters * 4
    products = 2 * (64 * 40 + 40 * 10)
    assert products <= cost["flops"] <= 1.1 * products
    assert 0 < cost["latency_ms"]["1"] < 1000
    assert 0 < cost["latency_ms"]["256"] < 1000


def test_a_ratio_above_one_says_the_first_model_is_faster(monkeypatch):
    nets = [build(name, (8, 8, 1), 10, jax.random.key(0)) for name in ("mlp:2", "mlp:40")]
    names = []

    def timings(calls, *, repeats):
        names.extend(call.args[0].params["dense"][0]["kernel"].shape[1] for call in calls)
        return np.array([[1.0, 3.0], [2.0, 8.0], [1.0, 2.0]])

    monkeypatch.setattr(metrics, "timings", timings)
    small, large = nets
    assert metrics.speed_ratio(small, large, jnp.zeros((8, 8, 1)), batch=2) == 3.0
    assert names == [2, 40]


def test_calls_are_timed_in_turn_after_three_that_do_not_count(monkeypatch):
    made, clock = [], [0.0]

    def call(name, seconds):
        made.append(name)
        clock[0] += 100 if len(made) <= 6 else seconds  # three rounds of compilation, say

    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    calls = [lambda: call("a", 1), lambda: call("b", 2)]
    np.testing.assert_array_equal(metrics.timings(calls, repeats=4), [[1, 2]] * 4)
    assert made == ["a", "b"] * 7

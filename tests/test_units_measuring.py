"""Measured scores: they say what the loss rises by, for each group in the same unit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_units_architectures import shapes

from distill_jax import models
from distill_jax.compress import units
from distill_jax.compress.units.scores import measured

X = 2 * np.random.default_rng(0).normal(size=(40, 3))


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def network(p, x):
    return jnp.tanh(jnp.tanh(x @ p["a"] + p["c"]) @ p["b"] + p["d"]) @ p["e"]


def given():
    model = models.from_function(network, shapes(a=(3, 6), c=(6,), b=(6, 4), d=(4,), e=(4, 2)))
    graph = units.trace(model, X)
    return model, graph, units.scores.l2(graph, model)


def distance(model, whole):
    return float(np.mean((np.asarray(model(X)) - whole) ** 2))


def lowest(scores):
    return np.argsort(scores)[: len(scores) // 2]


def test_the_scores_of_the_removed_half_sum_to_what_the_loss_rises_by():
    model, graph, scores = given()
    whole = np.asarray(model(X))
    found = measured(graph, model, scores, lambda model: 7 + distance(model, whole))
    assert set(found) == {"a", "b"}
    for name, each in found.items():
        gone = lowest(scores[name])
        kept = {name: np.setdiff1d(np.arange(len(each)), gone).tolist()}
        risen = distance(units.keep(graph, model, kept), whole)
        np.testing.assert_allclose(each[gone].sum(), risen, rtol=1e-9)
        np.testing.assert_allclose(each / each[0], scores[name] / scores[name][0])


def test_scores_per_cost():
    model, graph, scores = given()
    whole = np.asarray(model(X))
    found, costly = (
        measured(graph, model, scores, lambda model: distance(model, whole), of=of)
        for of in (None, units.costs.parameters)
    )
    for name, weights in (("a", 3 + 1 + 4), ("b", 6 + 1 + 2)):
        np.testing.assert_allclose(costly[name], found[name] / weights)


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_what_is_left_is_corrected_as_compensate_does(damping):
    model, graph, scores = given()
    seen = []
    measured(
        graph,
        model,
        scores,
        lambda model: seen.append(model) or len(seen),
        batches=[X[:9], X[9:]],
        damping=damping,
    )
    for name, smaller in zip(scores, seen[1:], strict=True):
        kept = {name: np.setdiff1d(np.arange(len(scores[name])), lowest(scores[name])).tolist()}
        done = units.compensate(graph, model, kept, [X], damping=damping)
        small = units.keep(graph, done.model, kept)
        np.testing.assert_allclose(smaller(X), small(X), rtol=1e-6, atol=1e-6)
        assert np.abs(units.keep(graph, model, kept)(X) - small(X)).max() > 0.1


def test_kernels_of_convolutions_are_corrected_as_compensate_does():
    def convolution(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def fn(p, x):
        hidden = jnp.tanh(convolution(x, p["a"]) + p["c"])
        return convolution(hidden, p["b"]) + p["d"]

    x = np.random.default_rng(1).normal(size=(30, 5, 5, 2))
    model = models.from_function(fn, shapes(a=(3, 3, 2, 6), c=(6,), b=(3, 3, 6, 2), d=(2,)))
    graph = units.trace(model, x)
    scores = {"a": units.scores.l2(graph, model)["a"]}
    seen = []
    measured(graph, model, scores, lambda model: seen.append(model) or len(seen), batches=[x[:9], x[9:]])
    kept = {"a": np.setdiff1d(np.arange(6), lowest(scores["a"])).tolist()}
    small = units.keep(graph, units.compensate(graph, model, kept, [x]).model, kept)
    np.testing.assert_allclose(seen[1](x), small(x), rtol=1e-6, atol=1e-6)
    assert np.abs(units.keep(graph, model, kept)(x) - small(x)).max() > 0.1


def test_a_batch_norm_takes_the_place_of_a_bias():
    def fn(params, state, x, key=None):
        h = jnp.tanh(x @ params["a"]) @ params["b"]
        return (h - state["mean"]) @ params["c"], state

    p = shapes(a=(3, 6), b=(6, 4), c=(4, 2), mean=(4,))
    model = models.Model(fn, {name: p[name] for name in "abc"}, {"mean": p["mean"]})
    graph = units.trace(model, X)
    scores = {"a": units.scores.l2(graph, model)["a"]}
    seen = []
    measured(graph, model, scores, lambda model: seen.append(model) or len(seen), batches=[X])
    kept = {"a": np.setdiff1d(np.arange(6), lowest(scores["a"])).tolist()}
    done = units.compensate(graph, model, kept, [X])
    assert done.model.state["mean"].tolist() != p["mean"].tolist()
    np.testing.assert_allclose(seen[1](X), units.keep(graph, done.model, kept)(X), rtol=1e-6, atol=1e-6)


def test_units_that_do_not_count_keep_their_order():
    model, graph, scores = given()
    scores = {"a": np.array([0.0, 3, 1, 2, 0, 0]), "b": np.array([0.0, 0, 0, 1])}
    seen = []
    found = measured(graph, model, scores, lambda model: seen.append(model) or 5.0)
    assert set(found) == {"a"}
    assert np.argsort(found["a"], kind="stable").tolist() == [0, 4, 5, 2, 3, 1]
    assert found["a"].max() < 1e-50
    assert np.flatnonzero(np.abs(seen[1].params["a"]).sum(0)).tolist() == [
        1,
        3,
    ]  # half of those that have a score


def test_refusals():
    model, graph, scores = given()
    with pytest.raises(ValueError, match=r"must not be negative, got some for \['a'\]"):
        measured(graph, model, {"a": -scores["a"]}, lambda model: 1.0)
    with pytest.raises(ValueError, match="loss must give a finite number, got nan"):
        measured(graph, model, scores, lambda model: float("nan"))
    with pytest.raises(ValueError, match=r"cost does not fall when half of the units of \['a'\] go"):
        measured(graph, model, scores, lambda model: 1.0, of=lambda graph, kept: 3.0)

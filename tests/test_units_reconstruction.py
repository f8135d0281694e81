"""Scores by reconstruction: the errors of least squares, unit by unit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_units_architectures import conv, shapes

from distill_jax import models
from distill_jax.compress import units
from distill_jax.compress.units.scores import reconstruction


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def inputs(shape):
    return 2 * np.random.default_rng(0).normal(size=shape)


def mlp(p, x):
    return jnp.tanh(x @ p["a"] + p["c"]) @ p["b"] + p["d"]


def two_heads(p, x):
    h = jnp.tanh(x @ p["a"])
    return jnp.concatenate([h @ p["b"], h @ p["c"]], 1)


def convnet(p, x):
    return conv(p["b"], jax.nn.relu(conv(p["a"], x)))


CASES = {  # program, parameters, shape of the inputs, names of the kernels, whether there is a bias
    "mlp": (mlp, {"a": (3, 6), "c": (6,), "b": (6, 2), "d": (2,)}, (40, 3), "b", True),
    "two kernels": (two_heads, {"a": (3, 6), "b": (6, 2), "c": (6, 4)}, (40, 3), "bc", False),
    "convnet": (convnet, {"a": (3, 3, 2, 5), "b": (3, 3, 5, 3)}, (12, 4, 4, 2), "b", False),
}


def least_error(rows, outputs, columns):
    """The share of the outputs' squares that least squares of some columns leaves."""
    left = outputs - rows[:, columns] @ np.linalg.lstsq(rows[:, columns], outputs)[0]
    return np.sum(left**2) / np.sum(outputs**2)


@pytest.mark.parametrize("name", CASES)
def test_each_removal_adds_what_least_squares_says(name):
    fn, given, shape, kernels, biased = CASES[name]
    model, x = models.from_function(fn, shapes(**given)), inputs(shape)
    scores = reconstruction(units.trace(model, x), model, [x[:9], x[9:]], damping=1e-13)["a"]
    p, size = shapes(**given), scores.size
    jax.tree.map(np.testing.assert_array_equal, model.params, p)
    if name == "convnet":
        hidden = np.pad(jax.nn.relu(conv(p["a"], x)), ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows = np.stack(
            [hidden[:, i : i + 4, j : j + 4].reshape(-1, size) for i in range(3) for j in range(3)], 2
        ).reshape(-1, size * 9)  # channel by channel, nine taps each
        matrices = [np.transpose(p["b"], (2, 0, 1, 3)).reshape(size * 9, -1)]
    else:
        rows = np.tanh(x @ p["a"] + (p["c"] if biased else 0))
        matrices = [np.asarray(p[kernel]) for kernel in kernels]
    rows = rows - rows.mean(0) * biased
    outputs, width = [rows @ matrix for matrix in matrices], rows.shape[1] // size

    def error(gone):
        columns = [u * width + i for u in range(size) if u not in gone for i in range(width)]
        return sum(least_error(rows, each, columns) for each in outputs)

    left, gone, highest, before = set(range(size)), [], 0.0, 0.0
    while len(left) > 1:
        unit = min(left, key=lambda u: error([*gone, u]))
        added = error([*gone, unit]) - before
        highest, before = max(highest, added), before + added
        np.testing.assert_allclose(scores[unit], highest, rtol=1e-6)
        left.remove(unit)
        gone.append(unit)
    assert scores.argmax() == left.pop()
    assert len(set(scores.tolist())) == size


def test_a_copy_goes_first_and_the_others_do_its_work():
    model = models.from_function(mlp, shapes(a=(3, 6), c=(6,), b=(6, 2), d=(2,)))
    for name, axis in (("a", 1), ("c", 0)):
        value = np.array(model.params[name])
        value[(slice(None),) * axis + (4,)] = value[(slice(None),) * axis + (1,)]
        model = model.replace(params=model.params | {name: value})
    x = inputs((40, 3))
    graph = units.trace(model, x)
    kept = units.prune(graph, reconstruction(graph, model, [x], damping=1e-9), 5 / 6)
    assert not {1, 4} <= set(kept["a"])
    done = units.compensate(graph, model, kept, [x], damping=0)
    np.testing.assert_allclose(units.keep(graph, done.model, kept)(x), model(x), atol=1e-9)


def test_forgotten_units_change_no_score(monkeypatch):
    """With heads, and with two kernels, so that blocks of rows move up."""

    def fn(p, x):
        h = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, p["a"]))
        return jnp.concatenate(
            [jnp.einsum("bhd,hdo->bo", h, p["b"]), jnp.einsum("bhd,hdo->bo", h, p["c"])], 1
        )

    model = models.from_function(fn, shapes(a=(5, 60, 2), b=(60, 2, 3), c=(60, 2, 4)))
    x = np.random.default_rng(1).normal(size=(300, 5))
    graph = units.trace(model, x)
    found = reconstruction(graph, model, [x], groups=["a"])
    assert list(found) == ["a"]
    monkeypatch.setattr("distill_jax.compress.units.reconstruction._Layer.forget", lambda self, removed: None)
    again = reconstruction(graph, model, [x], groups=["a"])
    np.testing.assert_allclose(found["a"], again["a"], rtol=1e-9)
    with pytest.raises(ValueError, match=r"groups names \['e'\], which do not exist"):
        reconstruction(graph, model, [x], groups=["e"])


def test_greedy_removal_is_near_the_best_pair():
    model, x = models.from_function(mlp, shapes(a=(3, 6), c=(6,), b=(6, 2), d=(2,))), inputs((40, 3))
    graph = units.trace(model, x)
    scores = reconstruction(graph, model, [x], damping=1e-12)["a"]

    def error(kept):
        return units.compensate(graph, model, {"a": kept}, [x], damping=0).errors["b"][1]

    found = error(np.sort(np.argsort(scores)[2:]))
    every = [error(np.delete(np.arange(6), pair)) for pair in itertools.combinations(range(6), 2)]
    assert found <= 1.2 * min(every)
    assert 2 * min(every) < np.median(every)


def test_units_that_are_always_the_same_have_no_score():
    """However large their weights are: a bias makes up for them, or they are 0."""
    for fn, value in ((mlp, 9.0), (two_heads, 0.0)):
        given = {"a": (3, 6), "b": (6, 2), "c": (6, 2) if fn is two_heads else (6,), "d": (2,)}
        p = shapes(**given)
        p["a"][:, 2], p["b"][2] = 0, 100.0
        if fn is mlp:
            p["c"][2] = value
        model, x = models.from_function(fn, p), inputs((40, 3))
        scores = reconstruction(units.trace(model, x), model, [x])["a"]
        assert scores[2] == 0 < np.delete(scores, 2).min()
        dead = model.replace(params=p | {"a": 0 * p["a"]})
        assert not reconstruction(units.trace(dead, x), dead, [x])["a"].any()


def test_groups_that_no_single_kernel_uses_are_left_out():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        return h @ p["c"] + jnp.tanh(h @ p["b"]) @ p["b"].T @ p["c"]  # b is two kernels

    model, x = models.from_function(fn, shapes(a=(3, 6), b=(6, 2), c=(6, 2))), inputs((40, 3))
    assert reconstruction(units.trace(model, x), model, [x]) == {}


def test_heads_and_concatenated_groups():
    """Blocks of rows: a head of three features, and two groups side by side in one kernel."""

    def fn(p, x):
        heads = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, p["a"]))
        both = jnp.concatenate([jnp.tanh(x @ p["b"]), jnp.tanh(x @ p["c"])], 1)
        return jnp.einsum("bhd,hdo->bo", heads, p["out"]) + both @ p["d"]

    model = models.from_function(fn, shapes(a=(3, 4, 3), b=(3, 2), c=(3, 4), out=(4, 3, 5), d=(6, 5)))
    x, p = inputs((60, 3)), model.params
    scores = reconstruction(units.trace(model, x), model, [x], damping=1e-13)
    assert {name: len(each) for name, each in scores.items()} == {"a": 4, "a#1": 3, "b": 2, "c": 4}
    for name, rows, matrix, width, first in (
        ("a", np.tanh(np.einsum("bi,ihd->bhd", x, p["a"])).reshape(60, 12), p["out"].reshape(12, 5), 3, 0),
        ("c", np.tanh(np.concatenate([x @ p["b"], x @ p["c"]], 1)), p["d"], 1, 2),
    ):
        gone = [
            least_error(
                rows, rows @ matrix, np.delete(np.arange(rows.shape[1]), first + width * u + np.arange(width))
            )
            for u in range(4)
        ]
        np.testing.assert_allclose(scores[name].min(), min(gone), rtol=1e-6)
        assert scores[name].argmin() == np.argmin(gone)


def test_refusals():
    model = models.from_function(mlp, shapes(a=(3, 6), c=(6,), b=(6, 2), d=(2,)))
    x = inputs((4, 3))
    graph = units.trace(model, x)
    with pytest.raises(ValueError, match="damping"):
        reconstruction(graph, model, [x], damping=0)
    with pytest.raises(ValueError, match=r"a has shape \(3, 7\) where \(3, 6\) was traced"):
        reconstruction(graph, model.replace(params=model.params | {"a": np.ones((3, 7))}), [x])
    with pytest.raises(ValueError, match="at least one batch"):
        reconstruction(graph, model, [])
    with pytest.raises(ValueError, match="inputs of b are not finite"):
        reconstruction(graph, model.replace(params=model.params | {"a": model.params["a"] * np.nan}), [x])

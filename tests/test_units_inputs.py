"""Features of a network's inputs are units: a smaller network does not look at those that are removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from distill_jax import models
from distill_jax.compress import units
from distill_jax.models import from_function


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_a_smaller_network_does_not_look_at_features_that_are_gone():
    params = {"a": numbers(5, 6), "c": numbers(5, 6, seed=1), "b": numbers(6, 2, seed=2)}
    plain = from_function(lambda p, x: (jnp.tanh(x @ p["a"]) + x @ p["c"]) @ p["b"], params)
    x = numbers(4, 5, seed=3)
    model = units.input_features(plain, x)
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-12)
    graph = units.trace(model, x)
    group = graph.groups["features.x"]
    assert (group.removable, [s[:2] for s in group.slices]) == (
        "exactly", [("features.x", 0), ("a", 0), ("c", 0)],
    )  # fmt: skip
    kept = {"features.x": [0, 3]}
    small = units.keep(graph, model, kept)
    assert small.apply_fn == model.apply_fn
    assert jax.tree.map(np.shape, small.params) == {"a": (2, 6), "c": (2, 6), "b": (6, 2)}
    np.testing.assert_array_equal(small.state["features"]["x"], [0, 3])
    assert units.verify(graph, model, kept, x, numbers(9, 5)) < 1e-12
    other = x.copy()
    other[:, [1, 2, 4]] = np.nan
    np.testing.assert_array_equal(small(x), small(other))
    # Scores: of the rows of the first kernels, and of the values
    rows = np.sqrt((params["a"] ** 2).sum(1) + (params["c"] ** 2).sum(1))
    found = units.scores.l2(graph, model, normalise="none")["features.x"]
    np.testing.assert_allclose(found, rows, rtol=1e-6)
    np.testing.assert_allclose(units.activations(graph, model, x)["features.x"], np.concatenate([x, x]))
    # An order of its own, and no means of places
    turned = units.permute(graph, model, {"features.x": [4, 2, 0, 1, 3]})
    np.testing.assert_allclose(turned(x), model(x))
    with pytest.raises(ValueError, match=r"^sizes: .* features.x holds whole numbers"):
        units.merge(graph, model, {"features.x": 2})


class Table(linen.Module):
    """Columns, a class of each row, and a picture of two channels."""

    @linen.compact
    def __call__(self, x, train=False):
        h = linen.Dense(6)(x["columns"]) + linen.Embed(3, 6)(x["kind"])
        h = h + linen.Conv(6, (2, 2))(x["picture"]).mean((1, 2))
        h = linen.relu(linen.BatchNorm(use_running_average=not train)(h))
        return linen.Dense(2)(linen.Dropout(0.3, deterministic=not train)(h))


def test_features_of_several_inputs_in_a_module_with_widths_of_its_own():
    x = {"columns": numbers(4, 5), "kind": np.array([0, 2, 1, 1]), "picture": numbers(4, 3, 3, 2)}
    plain = models.from_linen(Table(), jax.random.key(0), x)
    model = units.input_features(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), plain), x)
    graph = units.trace(model, x)
    assert {name: graph.groups[name].size for name in graph.groups if name.startswith("features")} == {
        "features.columns": 5, "features.picture": 2,
    }  # fmt: skip
    kept = {"features.columns": [1, 2, 4], "features.picture": [1], "Dense_0.kernel": [0, 2, 3, 5]}
    assert units.verify(graph, model, kept, x, key=jax.random.key(0)) < 1e-12
    small = units.keep(graph, model, kept)
    assert small.params["Dense_0"]["kernel"].shape == (3, 4)
    done = units.compensate(graph, model, kept, [x])
    assert {"Dense_0.kernel", "Conv_0.kernel"} <= set(done.errors)


def test_inputs_without_features_are_refused():
    model = from_function(lambda p, x: p[x], numbers(7, 2))
    with pytest.raises(ValueError, match=r"^x: there is no array of floating-point numbers .* got \(4, 3\)"):
        units.input_features(model, np.zeros((4, 3), int))

"""What is left of a pruned network is corrected by least squares: the optimum, and never worse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from test_units_architectures import block, block_shapes, lstm, numbers, shapes

from distill_jax import models
from distill_jax.compress import _products, units
from distill_jax.models import Model, from_function


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def mlp(p, x):
    return jax.nn.relu(x @ p["a"] + p["c"]) @ p["b"] + p["d"]


def two_layers(inputs=5, hidden=8, outputs=3):
    model = from_function(mlp, shapes(a=(inputs, hidden), c=(hidden,), b=(hidden, outputs), d=(outputs,)))
    return model, numbers(np.zeros((60, inputs)), 1)


def square(small, model, x):
    return float(np.mean((np.asarray(small(x)) - np.asarray(model(x))) ** 2))


def test_it_is_the_least_squares_optimum():
    model, x = two_layers()
    kept = {"a": [0, 3, 4]}
    graph = units.trace(model, x)
    done = units.compensate(graph, model, kept, [x[:10], x[10:15], x[15:]], damping=0)
    small = units.keep(graph, done.model, kept)
    hidden = np.maximum(x @ model.params["a"] + model.params["c"], 0)[:, kept["a"]]
    rows = np.concatenate([hidden, np.ones((60, 1))], 1)
    best, *_ = np.linalg.lstsq(rows, np.asarray(model(x)))
    np.testing.assert_allclose(small.params["b"], best[:-1], rtol=1e-8)
    np.testing.assert_allclose(small.params["d"], best[-1], rtol=1e-8)
    outputs = np.asarray(model(x)) - model.params["d"]
    pruned = units.keep(graph, model, kept)
    for error, network in zip(done.errors["b"], (pruned, small), strict=True):
        np.testing.assert_allclose(error, square(network, model, x) / np.mean(outputs**2), rtol=1e-8)
    assert done.notes == ()
    assert jax.tree.map(np.shape, done.model.params) == jax.tree.map(np.shape, model.params)


def test_damping_holds_weights_where_they_are():
    model, x = two_layers()
    graph, kept = units.trace(model, x), {"a": [1, 2, 6]}
    moved = []
    for damping in (0.0, 0.1, 1e9):
        done = units.compensate(graph, model, kept, [x], damping=damping)
        moved.append(np.abs(np.asarray(done.model.params["b"]) - model.params["b"]).max())
        assert done.errors["b"][1] <= done.errors["b"][0]
    assert moved[0] > moved[1] > 1e-3 > moved[2]


def test_a_duplicate_is_replaced_exactly_and_few_examples_change_little():
    model, x = two_layers()
    model.params["a"][:, 5], model.params["c"][5] = model.params["a"][:, 2], model.params["c"][2]
    graph, kept = units.trace(model, x), {"a": [0, 1, 2, 3, 4, 6, 7]}
    done = units.compensate(graph, model, kept, [x], damping=0)
    assert square(units.keep(graph, done.model, kept), model, numbers(x, 2)) < 1e-20
    # Both units in one: the rest is as it was, also where fewer examples than inputs fit any change
    for rows in (60, 3):
        done = units.compensate(graph, model, kept, [x[:rows]], damping=0)
        change = np.linalg.norm(np.asarray(done.model.params["b"]) - model.params["b"])
        assert change <= np.linalg.norm(model.params["b"][5]) * (1 + 1e-9)


def test_few_examples_do_no_harm_on_new_inputs():
    model, x = two_layers(inputs=16, hidden=64, outputs=4)
    graph, kept = units.trace(model, x), {"a": range(32)}
    new = numbers(np.zeros((2000, 16)), 2)
    pruned = square(units.keep(graph, model, kept), model, new)
    for rows in (33, 60):
        done = units.compensate(graph, model, kept, [x[:rows]])
        assert square(units.keep(graph, done.model, kept), model, new) < pruned


def test_bfloat16_is_corrected_as_float32_is():
    left = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model, x = two_layers(inputs=16, hidden=240, outputs=4)
        model = model.replace(
            params=jax.tree.map(lambda p, dtype=dtype: jnp.asarray(p / 4, dtype), model.params)
        )
        x = jnp.asarray(numbers(np.zeros((600, 16)), 1), dtype)
        graph = units.trace(model, x)
        left[dtype] = units.compensate(graph, model, {"a": range(120)}, [x]).errors["b"][1]
    assert left[jnp.bfloat16] < 2 * left[jnp.float32]


class Normed(linen.Module):
    @linen.compact
    def __call__(self, x):
        for width in (6, 8):
            x = linen.Conv(width, (3, 3), use_bias=False)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        return linen.Dense(3)(x.reshape(len(x), -1))


def normed():
    x = numbers(np.zeros((12, 4, 4, 2)), 1)
    return numbers(models.from_linen(Normed(), jax.random.key(0), x)), x


def attention():
    p = shapes(**block_shapes(8, 4, 2, 3, 10), first=(5, 8), out=(8, 2))
    fn = lambda p, x: block(p, x @ p["first"], causal=True) @ p["out"]  # noqa: E731
    return from_function(fn, jax.tree.map(lambda leaf: leaf / 2, p)), numbers(np.zeros((30, 6, 5)), 1)


@pytest.mark.parametrize("make", [normed, attention])
def test_no_layer_gets_worse(make, monkeypatch):
    model, x = make()
    graph = units.trace(model, x)
    kept = units.prune(graph, units.scores.l2(graph, model), 0.6, across="group")
    traced, uses = [], _products._uses
    monkeypatch.setattr(_products, "_uses", lambda *of: traced.append(of) or uses(*of))
    done = units.compensate(graph, model, kept, [x[:5], x[5:10]])
    assert len(traced) == 4  # both networks are probed, and each has one program for all of its kernels
    changed = {
        name
        for name, a, b in zip(
            jax.tree.leaves(tuple(graph.names)), jax.tree.leaves(done.model), jax.tree.leaves(model), strict=True
        )
        if not np.array_equal(a, b)
    }  # fmt: skip
    assert all(after < before for before, after in done.errors.values())
    assert square(units.shrink(graph, done.model, kept), model, x) < 0.5 * square(
        units.shrink(graph, model, kept), model, x
    )
    if make is normed:
        # The first convolution reads the images; the second has no bias, but a mean after it
        consumers = {"Conv_1.kernel", "Dense_0.kernel"}
        assert changed == consumers | {"batch_stats.BatchNorm_1.mean", "Dense_0.bias"}
    else:
        consumers = {"q", "k", "v", "o", "gate", "up", "down", "out"}
        assert changed == consumers
        assert any("of two values" in note for note in done.notes)  # head sizes of query · key
    assert set(done.errors) == consumers


def tied(p, x):
    return jnp.tanh(p["table"][x]) @ p["table"].T


def test_what_cannot_be_corrected_is_named():
    cases = (
        (from_function(lstm, shapes(wx=(3, 20), wh=(5, 20), b=(20,), out=(5, 2))), numbers(np.zeros((4, 9, 3)))),
        (from_function(tied, shapes(table=(7, 6))), np.arange(7)),
    )  # fmt: skip
    expected = ["wh, used by scan, is no kernel", "table, used by gather, is no kernel"]
    for (model, x), note in zip(cases, expected, strict=True):
        graph = units.trace(model, x)
        name = next(group.name for group in graph.groups.values() if group.free)
        done = units.compensate(graph, model, {name: [0, 2]}, [x])
        assert note in " ".join(done.notes), done
        assert set(done.errors) == ({"out"} if note.startswith("wh") else set())


def test_biases_are_only_what_is_added_to_the_outputs_alone():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        y = h @ p["b"] + p["place"][:, None]  # one number per row, of which there are as many as outputs
        z = h @ p["c"]
        return y, z + p["d"], z  # the outputs without the bias are also used

    p = shapes(a=(4, 6), b=(6, 3), place=(3,), c=(6, 3), d=(3,))
    model, x = from_function(fn, p), numbers(np.zeros((3, 4)))
    graph = units.trace(model, x)
    done = units.compensate(graph, model, {"a": [0, 1, 2]}, [x])
    np.testing.assert_array_equal(done.model.params["place"], p["place"])
    np.testing.assert_array_equal(done.model.params["d"], p["d"])
    assert set(done.errors) == {"b", "c"}


def test_a_bias_that_is_used_elsewhere_stays_as_it_is():
    def fn(p, x):
        h = jnp.tanh(x @ p["a"])
        return h @ p["b"] + p["c"] + jnp.sin(p["c"]), h @ p["e"] + p["d"], p["d"], h @ p["f"] + p["g"]

    p = shapes(a=(4, 6), b=(6, 3), c=(3,), e=(6, 3), d=(3,), f=(6, 3), g=(3,))
    model, x = from_function(fn, p), numbers(np.zeros((9, 4)))
    done = units.compensate(units.trace(model, x), model, {"a": [0, 1, 2]}, [x])
    np.testing.assert_array_equal(done.model.params["c"], p["c"])
    np.testing.assert_array_equal(done.model.params["d"], p["d"])
    assert np.abs(done.model.params["g"] - p["g"]).max() > 1e-3
    assert set(done.errors) == {"b", "e", "f"}


def test_a_kernel_of_a_model_in_float32_is_corrected_in_float64():
    with jax.enable_x64(False):
        model = models.build("mlp:16", (6, 6, 1), 3, jax.random.key(0))
        x = numbers(np.zeros((80, 6, 6, 1)), 3).astype("f4")
        graph = units.trace(model, x)
        done = units.compensate(graph, model, {"dense.0.kernel": list(range(8))}, [x])
        before, after = done.errors["dense.1.kernel"]
        small = units.keep(graph, done.model, {"dense.0.kernel": list(range(8))})
        assert isinstance(small, Model)
        assert after < before
        outputs = np.asarray(model(x))
        assert square(small, model, x) / np.mean(outputs**2) < 1.01 * after

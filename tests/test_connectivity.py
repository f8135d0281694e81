"""Barriers between networks, and BatchNorm's statistics on the way."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from distill_jax import train, weights
from distill_jax.models import ConvNet, Model, from_function, from_linen, from_nnx

SHAPE, CLASSES = (6, 6, 1), 3


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(7)(x.reshape(x.shape[0], -1))
        x = linen.BatchNorm(use_running_average=not train, momentum=0.99)(x)
        x = linen.Dense(6)(linen.relu(x))
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(x)
        return linen.Dense(CLASSES)(x)


def linen_model(seed=0) -> Model:
    return from_linen(LinenNet(), jax.random.key(seed), jnp.zeros((1, *SHAPE)))


def nnx_model(seed=0) -> Model:
    module = ConvNet(SHAPE, CLASSES, channels=(4,), hidden=8, kernel=3, batch_norm=True, rngs=nnx.Rngs(seed))
    return from_nnx(module)


def make_data(size=96):
    """Three easy classes, far from zero mean."""
    rng = np.random.default_rng(0)
    label = np.arange(size) % CLASSES
    prototypes = rng.normal(size=(CLASSES, *SHAPE))
    image = 5 + 3 * prototypes[label] + rng.normal(size=(size, *SHAPE))
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(label, jnp.int32)}


def batches_of(data, size):
    count = len(data["label"])
    return [jax.tree.map(lambda x, i=i: x[i : i + size], data) for i in range(0, count, size)]


@pytest.mark.parametrize("make", [linen_model, nnx_model])
def test_recalibration_is_the_mean_of_the_batches_statistics(make):
    """Training mode with momentum shows them one by one: (after − m·before)/(1 − m)."""
    model, data = make(), make_data(40)
    batches = batches_of(data, 16)  # the last one has 8
    stale = model.replace(state=jax.tree.map(lambda x: x + 7, model.state))
    recalibrated = weights.recalibrate(stale, batches)
    chex.assert_trees_all_equal_structs(recalibrated, model)
    chex.assert_trees_all_equal(recalibrated.params, model.params)
    found, again = recalibrated.state, weights.recalibrate(recalibrated, batches).state
    run = jax.jit(lambda model, x: model.apply(x, key=jax.random.key(0))[1])
    zeros = model.replace(state=jax.tree.map(jnp.zeros_like, model.state))
    fresh = [run(zeros, batch["image"]) for batch in batches]
    leaves = zip(*map(jax.tree.leaves, [found, again, *fresh]), strict=True)
    paths = weights.by_path(found)
    for path, (value, twice, *parts) in zip(paths, leaves, strict=True):
        momentum = 0.5 if "BatchNorm_1" in path else 0.99
        mean = np.average(np.asarray(parts, float), 0, weights=[16, 16, 8]) / (1 - momentum)
        np.testing.assert_allclose(value, mean, rtol=2e-4, atol=1e-5)
        np.testing.assert_allclose(twice, value, rtol=2e-4, atol=1e-5)


def test_an_average_without_and_with_recalibration():
    """Two networks of a common start, averaged: with stale statistics much of the skill is gone."""
    data, tx = make_data(), optax.adam(0.02)
    step = jax.jit(train.make_train_step(train.supervised(), tx))

    def further(model, data):
        state = train.init_state(model, tx, jax.random.key(0))
        for _ in range(60):
            state, _ = step(state, data)
        return state.model

    first = further(nnx_model(), data)
    halves = jax.tree.map(lambda x: x[48:], data), jax.tree.map(lambda x: x[:48], data)
    a, b = (further(first, half) for half in halves)
    loss = jax.jit(lambda model: train.supervised()(model, data, key=None, step=0)[0])
    refresh = functools.partial(weights.recalibrate, batches=[data])
    ts = [0.0, 0.5, 1.0]
    # Statistics of before any training: what an average of parameters alone leaves behind
    stale = loss(weights.lerp(a, b, 0.5).replace(state=nnx_model().state))
    fresh = weights.along(loss, a, b, ts, refresh=refresh)
    assert fresh[1] < 0.1
    assert stale > 5 * fresh[1]
    with pytest.warns(weights.StaleStatisticsWarning) as caught:
        weights.along(loss, a, b, [0.5])
    message = str(caught[0].message)
    assert "distill_jax.weights.recalibrate" in message
    assert all(path in message for path in weights.by_path(a.state))


def test_a_network_without_statistics_needs_no_refreshing():
    start = from_function(lambda params, x: x, {"w": 0.0})
    ends = start, start.replace(params={"w": 2.0})
    assert weights.along(lambda model: float(model.params["w"]), *ends, [0.25]) == [0.5]
    assert weights.along(lambda tree: float(tree["w"]), {"w": 0.0}, {"w": 2.0}, [0.25]) == [0.5]


def test_constants_counters_and_keys_stay():
    def apply_fn(params, state, x, *, key=None):
        mean = 0.9 * state["mean"] + 0.1 * x.mean(0)
        return x, {**state, "mean": mean, "count": state["count"] + 1}

    state = {
        "mean": jnp.full(2, 9.0), "scale": jnp.arange(3.0), "count": jnp.int32(4),
        "key": jax.random.key(1),
    }  # fmt: skip
    batches = [{"image": jnp.array([[1.0, 100.0], [3.0, 300.0]])}]
    found = weights.recalibrate(Model(apply_fn, {}, state), batches).state
    np.testing.assert_allclose(found["mean"], [2, 200], rtol=1e-5)
    np.testing.assert_array_equal(found["scale"], state["scale"])
    assert found["count"] == 4
    assert found["key"] == state["key"]


def test_what_is_no_running_mean_is_named():
    def apply_fn(params, state, x, *, key=None):
        return x, {
            "sum": state["sum"] + x.mean(0), "most": jnp.maximum(state["most"], x.max(0)),
            "mean": 0.5 * state["mean"] + 0.5 * x.mean(0),
        }  # fmt: skip

    state = {name: jnp.zeros(2) for name in ("sum", "most", "mean")}
    with pytest.raises(ValueError, match=r"cannot be recalibrated: \['most', 'sum'\]"):
        weights.recalibrate(Model(apply_fn, {}, state), [{"image": jnp.array([[1.0, 2.0]])}])
    with pytest.raises(ValueError, match="batches must have at least one batch"):
        weights.recalibrate(Model(apply_fn, {}, state), [])


def test_a_model_without_state_is_returned_unchanged():
    model = Model(lambda params, state, x, *, key=None: (x @ params, state), jnp.eye(2))
    assert weights.recalibrate(model, [{"image": jnp.ones((1, 2))}]) is model


def test_the_barrier():
    ts = [0, 0.25, 0.5, 1]
    assert weights.barrier(ts, [1, 2, 1, 3]) == 0.5
    assert weights.barrier(ts, [3, 2, 1, 0]) == 0
    with pytest.raises(ValueError, match="must rise from 0 to 1"):
        weights.barrier([0, 0.5], [1, 2])
    with pytest.raises(ValueError, match="must be \\[n\\]"):
        weights.barrier([0, 1], [1, 2, 3])


def test_inputs_may_be_a_tree():
    def apply_fn(params, state, x, *, key=None):
        return x["a"], {"mean": 0.5 * state["mean"] + 0.5 * x["a"].mean()}

    batches = [{"image": {"a": jnp.full(n, value), "b": jnp.zeros(n)}} for n, value in ((3, 1.0), (1, 5.0))]
    found = weights.recalibrate(Model(apply_fn, {}, {"mean": jnp.float32(9.0)}), batches)
    np.testing.assert_allclose(found.state["mean"], 2.0, rtol=1e-5)

"""Many seeds at once: each seed sees its own examples, with the soft labels of its own teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import lanes
from harness.experiment import prepare

from distill_jax import data, metrics, models, train

ROWS = np.stack([np.random.default_rng(seed).permutation(1000)[:40] for seed in range(2)])


def test_orders_are_each_seeds_own_and_the_same_again():
    rows = lanes.orders(3, 50)
    assert rows.shape == (3, 50)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(np.sort(rows), [np.arange(50)] * 3)
    assert len(np.unique(rows, axis=0)) == 3
    np.testing.assert_array_equal(rows, lanes.orders(3, 50))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def networks():
    return [models.build("mlp:6", (8, 8, 1), 10, jax.random.key(seed)) for seed in range(2)]


def test_stacked_models_come_apart_again():
    made = networks()
    for model, again in zip(made, lanes.unstack(lanes.stack(made)), strict=True):
        assert again.apply_fn == model.apply_fn
        jax.tree.map(np.testing.assert_array_equal, again, model)


def test_logits_errors_and_figures_are_each_networks(digits):
    made = networks()
    stacked, test = lanes.stack(made), digits.test
    shared = lanes.logits(stacked, test.image)
    own = lanes.logits(stacked, lanes.examples(digits.train, ROWS)["image"], own=True)
    wrong, entry = lanes.errors(stacked, test), lanes.evaluate(stacked, test, shared)
    assert entry["parameters"] == 64 * 6 + 6 + 60 + 10
    for seed, model in enumerate(made):
        images = digits.train.image[ROWS[seed]]
        np.testing.assert_allclose(shared[:, seed], model(prepare(test.image)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own[:, seed], model(prepare(images)), rtol=1e-4, atol=1e-5)
        assert wrong[seed] == metrics.errors(shared[:, seed], test.label).sum()
        assert entry["test"]["errors"][seed] == wrong[seed]
        assert entry["test"]["agreement"][seed] == 1


def test_a_batch_is_a_seeds_examples_with_their_soft_labels(digits):
    examples = lanes.examples(digits.train, ROWS)
    examples["teacher"] = ROWS.T[..., None].astype(np.float32)  # each example's is its own number

    def step(state, batch):
        chosen = batch["teacher"][:, 0].astype(jnp.int32)
        images = prepare(jnp.asarray(digits.train.image)[chosen])
        labels = jnp.asarray(digits.train.label)[chosen]
        same = jnp.all(batch["image"] == images) & jnp.all(batch["label"] == labels)
        params = state.model.params
        params = {"seen": params["seen"].at[chosen].add(1), "wrong": params["wrong"] + ~same}
        return state._replace(model=state.model.replace(params=params)), {"loss": jnp.float32(1)}

    start = models.from_function(lambda p, x: x, {"seen": jnp.zeros((2, 1081), int), "wrong": jnp.zeros(2)})
    states = lanes.init_states(start, optax.identity())
    epoch = train.make_epoch(lanes.each_seed(step))
    done = train.fit(states, epoch, examples, epochs=3, batch_size=10, seed=0)
    assert not done.model.params["wrong"].any()
    for count, rows in zip(done.model.params["seen"], ROWS, strict=True):
        np.testing.assert_array_equal(count[rows], 3)
        assert count.sum() == 3 * 40
    assert start.params["seen"].sum() == 0  # the same start can begin another training

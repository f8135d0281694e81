"""Lanes: each seed sees its own examples, with its own teacher's soft labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import lanes, runs
from harness.training import prepare

from distill_jax import data, models
from distill_jax.train.step import TrainState


def test_orders_are_each_seeds_own_and_the_same_again():
    rows = lanes.orders(3, 50)
    assert rows.shape == (3, 50)
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(np.sort(rows), [np.arange(50)] * 3)
    assert len(np.unique(rows, axis=0)) == 3
    np.testing.assert_array_equal(rows, lanes.orders(3, 50))


@pytest.fixture
def place(tmp_path):
    digits = data.load("digits")
    rows = lanes.orders(2, len(digits.train.label))[:, :40]
    progress = runs.Progress(1.0)
    yield lanes.Lanes(digits, rows, tmp_path, progress, batch_size=10)
    progress.close()


def networks():
    made = [models.build("mlp:6", (8, 8, 1), 10, jax.random.key(seed)) for seed in range(2)]
    return made, jax.tree.map(lambda *x: jnp.stack(x), *[model.params for model in made])


def test_logits_and_soft_labels_are_each_networks(place):
    made, params = networks()
    said = place.logits(made[0].apply_fn, params, place.dataset.test)
    soft = place.soft_labels(made[0].apply_fn, params)
    for seed, model in enumerate(made):
        for images, logits in (
            (place.dataset.test.image, said[seed]),
            (place.dataset.train.image[place.rows[seed]], soft[seed]),
        ):
            expected, _ = model.apply_fn(model.params, {}, prepare(images))
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_batch_is_a_seeds_examples_with_their_soft_labels(place):
    train = place.dataset.train
    soft = jnp.asarray(place.rows[..., None], jnp.float32)  # each example's is its own number

    def step(state, batch):
        chosen = batch["teacher"][:, 0].astype(jnp.int32)
        images = prepare(jnp.asarray(train.image)[chosen])
        same = jnp.all(batch["image"] == images) & jnp.all(batch["label"] == jnp.asarray(train.label)[chosen])
        seen = state.params["seen"].at[chosen].add(1)
        wrong = state.params["wrong"] + ~same
        return state._replace(params={"seen": seen, "wrong": wrong}), {"loss": jnp.float32(1)}

    seen = jnp.zeros((2, len(train.label)), jnp.int32)
    key = jax.random.split(jax.random.key(0), 2)
    zeros = jnp.zeros(2, jnp.int32)
    states = TrainState(zeros, {"seen": seen, "wrong": zeros}, {}, {}, key)
    done = place.train("x, y", place.make_epoch(step), states, epochs=3, soft=soft)
    with pytest.raises(ValueError, match="soft must be"):
        place.train("z", place.make_epoch(step), states, epochs=1, soft=soft[:, :39])
    params = done.state.params
    assert not params["wrong"].any()
    for count, rows in zip(params["seen"], place.rows, strict=True):
        np.testing.assert_array_equal(count[rows], 3)
        assert count.sum() == 3 * 40
    assert (place.out / "x-y").is_dir()
    assert states.params["seen"].sum() == 0  # the start can begin another training

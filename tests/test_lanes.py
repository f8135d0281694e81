"""Many seeds at once: each seed sees its own examples, with the soft labels of its own teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import lanes
from harness.experiment import Run, arrays, prepare
from harness.options import Options

from distill_jax import data, metrics, models
from distill_jax.train import sweeps

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


def test_logits_errors_and_figures_are_each_networks(digits):
    made = [models.build("mlp:6", (8, 8, 1), 10, jax.random.key(seed)) for seed in range(2)]
    stacked, test = sweeps.stack(made), digits.test
    shared = lanes.logits(stacked, test.image)
    wrong, entry = lanes.errors(stacked, test), lanes.evaluate(stacked, test, shared)
    assert entry["parameters"] == 64 * 6 + 6 + 60 + 10
    for seed, model in enumerate(made):
        np.testing.assert_allclose(shared[:, seed], model(prepare(test.image)), rtol=1e-4, atol=1e-5)
        assert wrong[seed] == metrics.errors(shared[:, seed], test.label).sum()
        assert entry["test"]["errors"][seed] == wrong[seed]
        assert entry["test"]["agreement"][seed] == 1


def test_a_batch_is_a_seeds_examples_with_their_soft_labels(tmp_path, digits):
    """Of two teachers, the second gives the negative of each example's number."""
    numbers = np.arange(len(digits.train.label), dtype=np.float32)
    examples = arrays(digits.train) | {"teacher": np.stack([numbers, -numbers], 1)[..., None]}

    def step(state, batch):
        seen, sign, wrong = state.model.params
        chosen = (sign * batch["teacher"][:, 0]).astype(jnp.int32)
        images = prepare(jnp.asarray(digits.train.image)[chosen])
        labels = jnp.asarray(digits.train.label)[chosen]
        same = jnp.all(batch["image"] == images) & jnp.all(batch["label"] == labels)
        params = seen.at[chosen].add(1), sign, wrong + ~same
        return state._replace(model=state.model.replace(params=params)), {"loss": jnp.float32(1)}

    params = np.zeros((2, 1081), np.int32), np.array([1, -1]), np.zeros(2, np.int32)
    model = models.from_function(lambda p, x: x, params)
    states = sweeps.init_states(model, optax.identity(), jax.random.split(jax.random.key(0), 2))
    students = sweeps.Students(states, {"seed": np.arange(2)})
    run = Run("x", Options(dataset="digits"), digits, tmp_path, 0.0)
    epoch = sweeps.make_epoch(lanes.each_seed(step))
    done = run.fit("x", None, students, epoch, examples, epochs=3, batch_size=10, order=[0, 0], rows=ROWS)
    seen, _, wrong = done.model.params
    assert not wrong.any()
    for count, rows in zip(seen, ROWS, strict=True):
        np.testing.assert_array_equal(count[rows], 3)
        assert count.sum() == 3 * 40
    assert (tmp_path / "all_seeds" / "x").is_dir()

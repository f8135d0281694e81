"""Many students in one program: each learns what it would learn alone, however the work is divided."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import models, train
from distill_jax.train import sweeps

RNG = np.random.default_rng(0)
DATA = {
    "image": RNG.normal(size=(24, 4, 4, 1)).astype(np.float32),
    "label": RNG.integers(0, 3, 24).astype(np.int32),
    "teacher": RNG.normal(size=(24, 2, 3)).astype(np.float32),
}
VALIDATION = {name: DATA[name][:13] for name in ("image", "label")}
VALUES = {
    "temperature": np.array([1.0, 4.0, 4.0, 9.0, 2.0]),
    "alpha": np.array([0.5, 0.0, 1.0, 0.5, 0.1]),
    "learning_rate": np.array([0.03, 0.01, 0.03, 0.1, 0.01]),
    "teacher": np.array([0, 1, 0, 1, 1]),
}
SEEDS = [3, 0, 3, 1, 2]
ROWS = np.stack([RNG.permutation(24)[:18] for _ in SEEDS])


def tx(learning_rate=1.0):
    return optax.chain(optax.adam(optax.cosine_decay_schedule(1.0, 12)), optax.scale(learning_rate))


def make_step(temperature, alpha, learning_rate, teacher):
    step = train.make_train_step(train.distill(temperature=temperature, alpha=alpha), tx(learning_rate))
    return lambda state, batch: step(state, {**batch, "teacher": batch["teacher"][:, teacher]})


def noisy(context, batch, key):
    return {**batch, "image": batch["image"] + context * jax.random.normal(key, batch["image"].shape)}


def network(number, kind="mlp:6"):
    return models.build(kind, (4, 4, 1), 3, jax.random.key(number), dropout=0.3)


def key(number):
    return jax.random.key(100 + number)


def students(count=5, kind="mlp:6"):
    stacked = sweeps.stack([network(i, kind) for i in range(count)])
    keys = jnp.stack([key(i) for i in range(count)])
    values = {name: of[:count] for name, of in VALUES.items()}
    return sweeps.Students(sweeps.init_states(stacked, tx(), keys), values)


EPOCH = sweeps.make_epoch(make_step, transform=noisy)
VALIDATE = train.make_validation(VALIDATION, batch_size=5, stacked=True)


def fit(count=5, kind="mlp:6", epoch=EPOCH, **options):
    options = {"epochs": 4, "batch_size": 6, "seeds": SEEDS[:count], "context": jnp.float32(0.1)} | options
    return sweeps.fit(students(count, kind), epoch, DATA, validate=VALIDATE, **options)


ONE = train.make_validation(VALIDATION, batch_size=5)


def alone(i, kind="mlp:6", rows=None, **options):
    values = {name: of[i].item() for name, of in VALUES.items()}
    epoch = train.make_epoch(make_step(**values), transform=noisy)
    options = {"seed": SEEDS[i]} | options
    return train.fit(
        train.init_state(network(i, kind), tx(), key(i)), epoch,
        DATA if rows is None else {name: x[rows] for name, x in DATA.items()},
        epochs=4, batch_size=6, context=jnp.float32(0.1), validate=ONE, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def each_alone():
    return [alone(i) for i in range(5)]


def arrays(state):
    return state._replace(key=jax.random.key_data(state.key))


def assert_same(together, each, **tolerance):
    tolerance = tolerance or {"rtol": 2e-4, "atol": 2e-5}
    for i, one in enumerate(each):
        ours = sweeps.take(together.state.states, i)
        chex.assert_trees_all_close(arrays(ours), arrays(one.state), **tolerance)
        chex.assert_trees_all_close(sweeps.take(together.best, i), one.best, **tolerance)
        assert together.history.keys() >= one.history.keys()  # of α = 0 alone, the hard loss is not computed
        for name, values in one.history.items():
            mine = together.history[name] if name == "epoch" else together.history[name][:, i]
            np.testing.assert_allclose(mine, values, **tolerance)


WAYS = {
    "at once": {},
    "in chunks": {"chunk": 3},
    "on four devices": {"mesh": True},
    "in chunks on two devices": {"chunk": 2, "mesh": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_student_learns_what_it_learns_alone(way, each_alone):
    options = dict(WAYS[way])
    if "mesh" in options:
        options["mesh"] = train.data_mesh(4 if options["mesh"] is True else options["mesh"])
    begun = students()
    together = fit(**options)
    assert_same(together, each_alone)
    chex.assert_trees_all_equal(begun, students())
    best = np.min(together.history["validation_errors"], 0)
    np.testing.assert_array_equal(VALIDATE(together.best)["validation_errors"], best)


def test_students_with_rows_of_their_own():
    assert_same(fit(2, rows=ROWS[:2]), [alone(i, rows=ROWS[i]) for i in range(2)])


def test_students_who_share_their_batches(each_alone):
    """Their order, and with share the transformed batch, which is drawn with the key of the first."""
    assert_same(fit(2, seeds=[5, 5]), [alone(i, seed=5) for i in range(2)])
    shared = fit(2, seeds=[3, 3], epoch=sweeps.make_epoch(make_step, transform=noisy, share=True))
    assert_same(shared, each_alone[:1])
    with pytest.raises(ValueError, match="share=True needs one order for all students"):
        fit(2, epoch=sweeps.make_epoch(make_step, transform=noisy, share=True))


def test_convolutional_students_on_devices():
    """Whose steps do not run in a scan on a CPU."""
    together = fit(2, "convnet:2", mesh=train.data_mesh(2))
    assert_same(together, [alone(i, "convnet:2") for i in range(2)], rtol=1e-3, atol=1e-4)


def test_devices_do_not_wait_for_each_other():
    mesh = train.data_mesh(4)
    placed = jax.tree.map(jnp.asarray, students(4))
    placed, data = jax.device_put((placed, DATA), (train.sharded(mesh), train.replicated(mesh)))
    order = np.stack([train.epoch_order(seed, 0, 24, 6) for seed in range(4)], 1)
    step = jax.jit(lambda s, d: EPOCH(s, d, order, jnp.float32(0.1)))
    text = step.lower(placed, data).compile().as_text()
    assert "num_partitions=4" in text
    assert "all-" not in text
    assert "collective" not in text


@pytest.mark.parametrize("stop_at", [1, 7])
def test_an_interrupted_sweep_ends_as_an_undisturbed_one(tmp_path, stop_at):
    """In the first chunk, and in the second chunk of the second rung."""
    options = {"chunk": 2, "rungs": (1, 2), "directory": tmp_path, "save_seconds": 0.0}
    expected = fit(**options | {"directory": None})
    calls = []

    def on_epoch(done, figures):
        calls.append(done)
        if len(calls) == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(**options, on_epoch=on_epoch)
    before = len(calls)
    result = fit(**options, on_epoch=on_epoch)
    assert calls[before:] == sorted(calls[before:])
    states = [arrays(each.state.states) for each in (result, expected)]
    chex.assert_trees_all_equal(*states)
    chex.assert_trees_all_equal(result.best, expected.best)
    chex.assert_trees_all_equal(result.history, expected.history)
    with pytest.raises(ValueError, match="is of a run with students"):
        fit(**options | {"seeds": [9] * 5})


# The choice of students: here their parameter is what is judged, and each step adds 1 to it

QUALITY = np.array([5.0, 1.0, 4.0, 2.0, 3.0, 9.0], np.float32)


def judged(**options):
    def count_step(bad):
        def step(state, batch):
            params = jnp.where((state.step == 1) & bad, jnp.nan, state.model.params - 1)
            model = state.model.replace(params=params)
            return state._replace(model=model, step=state.step + 1), {"loss": params}

        return step

    bad = options.pop("bad", np.zeros(6, bool))
    model = models.from_function(lambda p, x: p * x, jnp.asarray(QUALITY))
    keys = jax.random.split(jax.random.key(0), 6)
    begun = sweeps.Students(sweeps.init_states(model, optax.identity(), keys), {"bad": bad})
    # What is judged is low at first where it is high at the end
    options.setdefault("validate", lambda model: {"validation_errors": np.nan_to_num(model.params)})
    return sweeps.fit(
        begun,
        sweeps.make_epoch(count_step),
        {"image": np.zeros((2, 1))},
        batch_size=2,
        seeds=[0] * 6,
        **options,
    )


def trained(done):
    return np.isfinite(done.history["loss"]).sum(0).tolist()


def test_the_worse_half_is_dropped_at_each_rung():
    done = judged(epochs=4, rungs=(1, 2), chunk=2)
    assert trained(done) == [1, 4, 1, 4, 2, 1]
    np.testing.assert_array_equal(done.model.params, QUALITY - trained(done))
    np.testing.assert_array_equal(done.history["validation_errors"][:2, 4], [2, 1])
    assert done.history["epoch"].tolist() == [1, 2, 3, 4]
    assert sweeps.halve([1, 1, 1]).tolist() == [0, 1]
    # The seeds of one setting stay together: the pairs are worth 3, 3.0 and 6 on average
    assert trained(judged(epochs=2, rungs=(1,), groups=[0, 0, 1, 1, 2, 2])) == [2, 2, 2, 2, 1, 1]


def test_a_student_that_diverges_ranks_last_and_disturbs_nobody():
    bad = QUALITY == 1
    done = judged(epochs=4, bad=bad, rungs=(2,))
    assert trained(done) == [2, 1, 4, 4, 4, 2]
    np.testing.assert_array_equal(done.model.params[[2, 3, 4]], QUALITY[[2, 3, 4]] - 4)
    assert done.best.params[1] == 0  # that of its first epoch
    with pytest.raises(ValueError, match="the loss became nan in epoch 2: the training has diverged"):
        judged(epochs=2, bad=bad, validate=None)
    with pytest.raises(ValueError, match="the loss became nan in epoch 2"):
        judged(epochs=2, bad=np.ones(6, bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [0, 1]}, r"seeds must have a first axis of 5 students, got shape \(2,\)"),
        ({"seeds": [0.5] * 5}, "seed must be an integer of at least 0, got 0.5"),
        ({"rows": np.zeros((3, 9), int)}, "rows must have a first axis of 5 students"),
        ({"groups": [0, 1]}, "groups must have a first axis of 5 students"),
        ({"rungs": (3, 2)}, r"rungs must rise from 1 to less than the 4 epochs, got \(3, 2\)"),
        ({"rungs": (4,)}, "rungs must rise from 1 to less than the 4 epochs"),
        ({"chunk": 0}, "chunk must be an integer of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(**options)


def test_rungs_without_validation_are_refused():
    with pytest.raises(ValueError, match="rungs need validate"):
        judged(epochs=2, rungs=(1,), validate=None)


def test_stacks_come_apart_again():
    made = [network(i) for i in range(2)]
    stacked = sweeps.stack(made)
    for i, model in enumerate(made):
        again = sweeps.take(stacked, i)
        assert again.apply_fn == model.apply_fn
        chex.assert_trees_all_equal(again, model)
    outputs = models.predict(sweeps.as_one(stacked), DATA["image"], batch_size=7)
    assert outputs.shape == (24, 2, 3)
    np.testing.assert_allclose(outputs[:, 1], made[1](DATA["image"]), rtol=1e-4, atol=1e-6)

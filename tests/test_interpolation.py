"""Interpolation of teacher and student: by hand, against PyTorch, and in every way a step is run."""

import json
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import data, train, weights
from distill_jax.compress import units
from distill_jax.models import Model, from_function, from_nnx
from distill_jax.train import interpolation, sweeps

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES, INPUTS, CLASSES, HIDDEN = 12, 4, 3, 5
KEY = jax.random.key(0)


def linear(params, x):
    return x @ params["w"]


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"]


def make_linear(seed):
    return from_function(linear, {"w": jax.random.normal(jax.random.key(seed), (INPUTS, CLASSES))})


def make_mlp(seed, hidden=HIDDEN):
    a, b = jax.random.split(jax.random.key(seed))
    params = {
        "a": {"kernel": jax.random.normal(a, (INPUTS, hidden)), "bias": jnp.zeros(hidden)},
        "b": {"kernel": jax.random.normal(b, (hidden, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }
    return from_function(mlp, params)


def make_batches(steps, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(steps, EXAMPLES, INPUTS)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, CLASSES, (steps, EXAMPLES)), jnp.int32),
    }


def make_batch(seed=0):
    return jax.tree.map(lambda x: x[0], make_batches(1, seed))


def gradient_of(w, batch):
    """Of the mean cross-entropy, in float64."""
    x, y = np.asarray(batch["image"], float), np.eye(CLASSES)[np.asarray(batch["label"])]
    z = np.exp(x @ w - (x @ w).max(1, keepdims=True))
    return x.T @ (z / z.sum(1, keepdims=True) - y) / len(x)


def step_of(tx):
    return train.make_train_step(train.supervised(), tx)


def make_pair(tx, make=make_linear):
    return interpolation.Pair(*(train.init_state(make(seed), tx, jax.random.key(seed)) for seed in (1, 2)))


def make_joint(tx, make=make_linear, rate=0.5):
    return train.init_state(interpolation.join(make(2), make(1), rate), tx, KEY)


# Pull


def test_pull_by_hand():
    """The teacher's step, the move, the student's step; in this order, and one loss each."""
    tx, batches = optax.sgd(0.3), make_batches(3)
    step = interpolation.pull(step_of(tx), step_of(tx), 0.25)
    pair, metrics = jax.jit(lambda p: jax.lax.scan(step, p, batches))(make_pair(tx))
    teacher, student = (np.asarray(make_linear(seed).params["w"], float) for seed in (1, 2))
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        teacher = teacher - 0.3 * gradient_of(teacher, batch)
        student = 0.25 * teacher + 0.75 * student
        student = student - 0.3 * gradient_of(student, batch)
    np.testing.assert_allclose(pair.teacher.model.params["w"], teacher, rtol=1e-5)
    np.testing.assert_allclose(pair.student.model.params["w"], student, rtol=1e-5)
    assert {"loss", "teacher_loss", "error_rate", "teacher_error_rate", "rate"} <= metrics.keys()
    np.testing.assert_array_equal(metrics["rate"], 0.25)
    assert pair.step == 3
    chex.assert_trees_all_equal(pair.model, pair.student.model)


def test_a_frozen_teacher_stays():
    tx = optax.sgd(0.3)
    pair = make_pair(tx)
    step = jax.jit(interpolation.pull(None, step_of(tx), 1.0))
    after, metrics = step(pair, make_batch())
    chex.assert_trees_all_equal(after.teacher.model, pair.teacher.model)
    w = np.asarray(pair.teacher.model.params["w"], float)
    expected = w - 0.3 * gradient_of(w, make_batch())
    np.testing.assert_allclose(after.student.model.params["w"], expected, rtol=1e-5)
    assert "teacher_loss" not in metrics


# Through


def joint_gradient(**options):
    """At λ = 0.25: that of the two parts, the one at the interpolated network, and the teacher's own."""
    loss_fn = interpolation.through(train.supervised(), 0.25, **options)
    model, batch = make_joint(optax.sgd(1.0)).model, make_batch()
    gradient = jax.jit(jax.grad(lambda m: loss_fn(m, batch, key=KEY, step=0)[0]))(model).params
    student, teacher = (np.asarray(model.params[n]["w"], float) for n in ("student", "teacher"))
    return (gradient, gradient_of(0.75 * student + 0.25 * teacher, batch), gradient_of(teacher, batch))


@pytest.mark.parametrize("together", [False, True])
def test_the_gradient_goes_through_the_interpolation(together):
    teacher_loss = train.supervised() if together else None
    gradient, mixed, own = joint_gradient(teacher_loss=teacher_loss)
    np.testing.assert_allclose(gradient["student"]["w"], 0.75 * mixed, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient["teacher"]["w"], together * own, rtol=1e-5, atol=1e-7)


def test_a_frozen_part_stays_whatever_the_optimizer():
    tx = interpolation.split_tx(optax.adamw(0.1, weight_decay=0.5))
    step = jax.jit(train.make_train_step(interpolation.through(train.supervised(), 0.5), tx))
    state = make_joint(tx)
    after, _ = step(state, make_batch())
    chex.assert_trees_all_equal(after.model.params["teacher"], state.model.params["teacher"])
    assert (after.model.params["student"]["w"] != state.model.params["student"]["w"]).all()


def test_the_interpolated_network_is_the_model():
    x = make_batch()["image"]
    for rate in (0.3, jnp.float32(0.3), {"^a": 1.0, "^b": 0.0}):
        joined = interpolation.join(make_mlp(1), make_mlp(2), rate)
        mixed = interpolation.mix(joined, rate)
        np.testing.assert_array_equal(joined(x), mixed(x))
        again = interpolation.join(make_mlp(1), make_mlp(2), rate)
        assert joined.apply_fn == again.apply_fn
        assert hash(joined.apply_fn) == hash(again.apply_fn)
        chex.assert_trees_all_equal_structs(mixed, make_mlp(1))
    chex.assert_trees_all_equal(mixed.params, {"a": make_mlp(2).params["a"], "b": make_mlp(1).params["b"]})


def test_a_schedule_belongs_to_the_objective():
    schedule = optax.linear_schedule(0.75, 0.0, 10)
    for rate in (schedule, {"": schedule}):
        with pytest.raises(ValueError, match="give a schedule to through"):
            interpolation.join(make_mlp(1), make_mlp(2), rate)


def test_through_keeps_the_states_apart():
    def counting(params, state, x, *, key=None):
        return x @ params["w"], {"mean": state["mean"] + x.mean() * params["w"].sum()}

    student, teacher = (
        Model(counting, make_linear(seed).params, {"mean": jnp.float32(start)})
        for seed, start in ((1, 0), (2, 1))
    )
    model, batch = interpolation.join(student, teacher, 0.5), make_batch()
    loss_fn = interpolation.through(train.supervised(), 0.5, teacher_loss=train.supervised())
    _, (after, metrics) = loss_fn(model, batch, key=KEY, step=0)
    mixed = interpolation.mix(model, 0.5)
    mean = batch["image"].mean()
    np.testing.assert_allclose(after["student"]["mean"], mean * mixed.params["w"].sum(), rtol=1e-5)
    expected = 1 + mean * teacher.params["w"].sum()
    np.testing.assert_allclose(after["teacher"]["mean"], expected, rtol=1e-5)
    assert mixed.state == student.state
    assert {"error_rate", "teacher_error_rate", "teacher_loss", "rate"} == metrics.keys()


def test_a_model_that_was_not_joined_is_refused():
    model, message = make_linear(1), "^expected a model from interpolation.join, got another one$"
    with pytest.raises(ValueError, match=message):
        interpolation.mix(model.replace(params={"student": model.params, "teacher": model.params}), 0.5)
    loss_fn = interpolation.through(train.supervised(), 0.5)
    with pytest.raises(ValueError, match=message):
        loss_fn(model, make_batch(), key=None, step=0)
    with pytest.raises(ValueError, match=message):
        interpolation.student_axes(train.init_state(model, optax.sgd(0.1), KEY))
    clipped = optax.chain(optax.clip(1.0), interpolation.split_tx(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"needs the optimizer of interpolation\.split_tx itself"):
        interpolation.student_axes(make_joint(clipped))


# λ


def reading(kind, tx, rate, **options):
    if kind == "pull":
        return interpolation.pull(step_of(tx), step_of(tx), rate, **options)
    supervised = train.supervised()
    loss_fn = interpolation.through(supervised, rate, teacher_loss=supervised, **options)
    return train.make_train_step(loss_fn, interpolation.split_tx(tx, tx))


def start_of(kind, tx):
    if kind == "pull":
        return make_pair(tx, make_mlp)
    return make_joint(interpolation.split_tx(tx, tx), make_mlp)


SCHEDULES = {
    "linear": optax.linear_schedule(1.0, 0.0, 4),
    "cosine": optax.cosine_decay_schedule(0.8, 4),
    "exponential": optax.exponential_decay(0.5, 1, 0.5),
}


@pytest.mark.parametrize("kind", ["pull", "through"])
def test_schedules_of_the_rate(kind):
    tx, batches = optax.sgd(0.1), make_batches(4)
    rates = {name: SCHEDULES[name] for name in SCHEDULES}
    step = reading(kind, tx, {"a.kernel": rates["linear"], "a.bias": 0.25, "^b": rates["cosine"]})
    _, metrics = jax.jit(lambda s: jax.lax.scan(step, s, batches))(start_of(kind, tx))
    np.testing.assert_allclose(metrics["rate a.kernel"], [1, 0.75, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(metrics["rate a.bias"], [0.25] * 4)
    cosine = 0.4 * (1 + np.cos(np.pi * np.arange(4) / 4))
    np.testing.assert_allclose(metrics["rate ^b"], cosine, rtol=1e-5)
    step = reading(kind, tx, rates["exponential"])
    _, metrics = jax.jit(lambda s: jax.lax.scan(step, s, batches))(start_of(kind, tx))
    np.testing.assert_allclose(metrics["rate"], 0.5 ** np.arange(1, 5), rtol=1e-6)


@pytest.mark.parametrize("kind", ["pull", "through"])
def test_a_sweep_of_rates_is_one_program(kind):
    """Mapped over λ; the teacher, which λ does not reach, is trained once for all of them."""
    tx, batches, rates = optax.sgd(0.1, momentum=0.9), make_batches(5), jnp.linspace(0, 1, 5)
    axes = interpolation.student_axes(start_of(kind, tx))
    step = sweeps.each(lambda rate: reading(kind, tx, rate), axes=axes)
    students = sweeps.Students(sweeps.repeat(start_of(kind, tx), len(rates), axes), {"rate": rates})
    (results, _), metrics = jax.jit(lambda s: jax.lax.scan(step, s, batches))(students)
    assert metrics["loss"].shape == (5, len(rates))
    chex.assert_trees_all_equal_shapes(results, students.states)
    teacher = results.teacher.model.params if kind == "pull" else results.model.params["teacher"]
    assert teacher["a"]["kernel"].ndim == 2  # one teacher
    one = jax.jit(lambda rate, s: jax.lax.scan(reading(kind, tx, rate), s, batches)[0])
    for i, rate in enumerate(rates):
        expected = one(rate, start_of(kind, tx))
        ours = sweeps.take(results, i, axes)
        chex.assert_trees_all_equal_shapes_and_dtypes(ours, expected)
        if kind == "pull":
            ours, expected = ((x.teacher.model, x.student.model) for x in (ours, expected))
        else:
            ours, expected = ours.model, expected.model
        chex.assert_trees_all_close(ours, expected, atol=1e-6)


class Misnamed(nnx.Module):
    """A network whose parts have the names that tell student and teacher apart elsewhere."""

    def __init__(self, rngs):
        self.teacher = nnx.Linear(INPUTS, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.student = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x):
        return self.student(jnp.tanh(self.norm(self.teacher(x))))


@pytest.mark.parametrize("kind", ["pull", "through"])
def test_a_sweep_knows_the_teacher_by_its_place_and_not_by_its_name(kind):
    tx, batches, rates = optax.sgd(0.1, momentum=0.9), make_batches(3), jnp.array([0.0, 0.5, 1.0])

    def make(seed):
        return from_nnx(Misnamed(nnx.Rngs(seed)))

    start = make_pair(tx, make) if kind == "pull" else make_joint(interpolation.split_tx(tx, tx), make)
    axes = interpolation.student_axes(start)
    states = sweeps.repeat(start, len(rates), axes)
    if kind == "pull":
        student, teacher = states.student.model, states.teacher.model
        assert states.student.opt_state[0].trace["teacher"]["bias"].shape == (3, 4)
        assert states.teacher.opt_state[0].trace["student"]["bias"].shape == (CLASSES,)
    else:
        student, teacher = (
            Model(make(1).apply_fn, states.model.params[n], states.model.state[n])
            for n in ("student", "teacher")
        )
        moments = states.opt_state.inner_states
        assert {x.shape[:1] for x in jax.tree.leaves(moments["student"])} == {(3,)}
        shapes = ({x.shape for x in jax.tree.leaves(tree)} for tree in (moments["teacher"], make(1).params))
        assert len(set(map(frozenset, shapes))) == 1
    chex.assert_trees_all_equal_shapes(teacher, make(1))
    chex.assert_trees_all_equal_shapes(sweeps.take(states, 1, axes), start)
    for leaf, like in zip(jax.tree.leaves(student), jax.tree.leaves(make(2)), strict=True):
        assert leaf.shape == (3, *like.shape)
    step = sweeps.each(lambda rate: reading(kind, tx, rate), axes=axes)
    students = sweeps.Students(states, {"rate": rates})
    (results, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, batches))(students)
    for i, rate in enumerate(rates):
        one = jax.jit(lambda s, rate=rate: jax.lax.scan(reading(kind, tx, rate), s, batches)[0])
        expected, ours = one(start), sweeps.take(results, i, axes)
        chex.assert_trees_all_close(ours.model, expected.model, rtol=1e-4, atol=1e-5)


# In training


def test_networks_of_other_widths_are_refused():
    tx = optax.sgd(0.1)
    pair = interpolation.Pair(
        train.init_state(make_mlp(1, 9), tx, KEY), train.init_state(make_mlp(2), tx, KEY)
    )
    with pytest.raises(ValueError) as error:
        interpolation.pull(None, step_of(tx), 0.5)(pair, make_batch())
    for path in ("a.kernel", "a.bias", "b.kernel"):
        assert path in str(error.value)
    for call in (lambda: interpolation.join(make_mlp(2), make_mlp(1, 9), 0.5),
                 lambda: interpolation.mix(pair, 0.5)):  # fmt: skip
        with pytest.raises(ValueError, match=r"in the student, .* in the teacher"):
            call()


@pytest.mark.parametrize("kind", ["pull", "through"])
def test_the_loop_takes_both_readings(kind, tmp_path):
    """With checkpoints: a run in two pieces is the run in one."""
    tx = optax.adam(0.01)
    rng = np.random.default_rng(3)
    training = {"image": rng.normal(size=(36, INPUTS)).astype("f4"), "label": np.arange(36) % 3}
    validate = train.make_validation(training)
    epoch = train.make_epoch(reading(kind, tx, 0.5))

    def run(epochs, directory=None):
        return train.fit(
            start_of(kind, tx), epoch, training, epochs=epochs, batch_size=12, seed=0,
            validate=validate, directory=directory,
        )  # fmt: skip

    whole = run(4)
    run(2, tmp_path / "checkpoints")
    pieces = run(4, tmp_path / "checkpoints")
    parts = [(x.state.teacher.model, x.model) if kind == "pull" else x.model for x in (whole, pieces)]
    chex.assert_trees_all_equal(*parts)
    assert whole.history["validation_nll"] == pieces.history["validation_nll"]
    assert whole.history["validation_nll"][-1] < whole.history["validation_nll"][0]


# Against PyTorch


def golden_data():
    """As in make_interpolation.py."""
    rng = np.random.default_rng(20240613)
    prototypes = rng.uniform(0, 160, size=(10, 784))
    labels = rng.integers(0, 10, 10_000)
    images = prototypes[labels] + rng.uniform(0, 95, size=(10_000, 784))
    return images.astype(np.uint8), labels.astype(np.int32)


def mnist():
    directory = os.environ.get("TFDS_DATA_DIR")
    if not directory or not (Path(directory) / "mnist").is_dir():
        pytest.skip("TFDS_DATA_DIR holds no MNIST")
    split = data.load("mnist", data_dir=directory).train
    return split.image[:10_000], split.label[:10_000]


@pytest.mark.parametrize(("name", "source"), [("drawn", golden_data), ("mnist", mnist)])
def test_the_tutorials_loop_corrected(name, source):
    golden = json.loads((GOLDEN / "interpolation.json").read_text())[name]
    images, labels = source()
    batches = {
        "image": jnp.asarray(images.reshape(100, 100, 784) / 255, jnp.float32),
        "label": jnp.asarray(labels.reshape(100, 100)),
    }
    tx = optax.sgd(0.01)

    def start(seed):
        rng = np.random.default_rng([20240613, seed])
        kernels = [rng.normal(size=(m, n)) * np.sqrt(2 / m) for m, n in ((784, 128), (128, 10))]
        layers = [{"kernel": jnp.asarray(k, jnp.float32), "bias": jnp.zeros(k.shape[1])} for k in kernels]
        return train.init_state(from_function(mlp, dict(zip("ab", layers, strict=True))), tx, KEY)

    step = interpolation.pull(step_of(tx), step_of(tx), 0.5)
    pair = interpolation.Pair(start(0), start(1))
    pair, metrics = jax.jit(lambda p: jax.lax.scan(step, p, batches))(pair)
    np.testing.assert_allclose(metrics["loss"], golden["loss"], atol=1e-4)
    np.testing.assert_allclose(metrics["teacher_loss"], golden["teacher_loss"], atol=1e-4)
    for i, layer in enumerate("ab"):
        for part in ("kernel", "bias"):
            flat = np.asarray(pair.model.params[layer][part], float).ravel()
            summary = [np.linalg.norm(flat), flat @ np.linspace(-1, 1, len(flat))]
            np.testing.assert_allclose(summary, golden[f"dense.{i}.{part}"], atol=1e-4)
    logits = pair.model(batches["image"][0, :2])
    np.testing.assert_allclose(np.ravel(logits), golden["logits"], atol=1e-4)


# What cannot be meant


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpolation.pull(None, None, 1.5), r"rate must lie in \[0, 1\], got 1.5"),
        (lambda: interpolation.through(None, -0.5), r"rate must lie in \[0, 1\], got -0.5"),
        (lambda: interpolation.through(None, {"a": 2.0}), r"rate\['a'\] must lie in \[0, 1\], got 2"),
        (
            lambda: interpolation.join(from_function(mlp, 1.0), from_function(mlp, 2.0), 1.5),
            r"rate must lie in \[0, 1\], got 1.5",
        ),
        (
            lambda: interpolation.join(from_function(mlp, 1.0), from_function(mlp, jnp.array(jnp.nan)), 0.5),
            "not finite in the teacher",
        ),
        (
            lambda: interpolation.pull(
                None, step_of(optax.sgd(0.1)), {"c.kernel": 0.5, "d": 0.5, "": 0.1}
            )(make_pair(optax.sgd(0.1), make_mlp), make_batch()),
            r"'c.kernel' is found in no path; 'd' is found in no path",
        ),
    ],
)  # fmt: skip
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def misuse():
    """Kind → what a user does, and all that the answer must name."""
    models = make_mlp(1), make_mlp(2, 9)
    student, wide = (model.params for model in models)
    every = ("a.kernel", "a.bias", "b.kernel", "b.bias")
    normed = models[0].replace(state={"mean": jnp.zeros(2), "var": jnp.ones(2)})

    def mixing(teacher, rate=0.5):
        def call():
            states = [
                train.init_state(from_function(mlp, p), optax.sgd(0.1), KEY) for p in (teacher, student)
            ]
            interpolation.mix(interpolation.Pair(*states), rate)

        return call

    def bringing():
        graphs = [units.trace(model, jnp.ones((1, INPUTS))) for model in models]
        units.bring(graphs[1], models[1], graphs[0], models[0])

    return {
        "other structures": (mixing({"a": student["a"], "c": student["b"]}), ("b.kernel", "c.bias")),
        "other shapes": (mixing(wide), ("a.kernel", "a.bias", "b.kernel")),
        "other dtypes": (mixing(jax.tree.map(lambda x: x.astype(jnp.bfloat16), student)), every),
        "λ outside [0, 1]": (
            mixing(student, {"a.bias": -0.5, "b.bias": 1.5, "": 0.5}), ("a.bias", "-0.5", "b.bias"),
        ),
        "NaN": (mixing(jax.tree.map(lambda x: x * jnp.nan, student)), every),
        "a student wider than its teacher": (bringing, ("a.kernel", "a.bias", "b.kernel")),
        "an unmatched pattern": (mixing(student, {"c.*": 0.5, "bais": 0.5, "": 0.5}), ("c.*", "bais")),
        "BatchNorm left stale": (
            lambda: weights.along(lambda model: 0.0, normed, normed, [0.5]),
            ("recalibrate", "mean", "var"),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("kind", misuse())
def test_misuse_is_named_with_every_path(kind):
    call, named = misuse()[kind]
    stale = kind == "BatchNorm left stale"
    expected = weights.StaleStatisticsWarning if stale else ValueError
    with pytest.warns(expected) if stale else pytest.raises(expected) as caught:
        call()
    message = str(caught[0].message if stale else caught.value)
    assert not [name for name in named if name not in message]

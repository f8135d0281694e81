"""System S3's two readings: by hand, against PyTorch, and in every way a step is run."""

import json
import os
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import data, teachers, train, weights
from distill_jax.compress import units
from distill_jax.train import interpolation  # fmt: skip

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES, INPUTS, CLASSES, HIDDEN = 12, 4, 3, 5
KEY = jax.random.key(0)


def linear(params, model_state, x, *, key=None):
    return x @ params["w"], model_state


def mlp(params, model_state, x, *, key=None):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"], model_state


def make_linear(seed):
    return {"w": jax.random.normal(jax.random.key(seed), (INPUTS, CLASSES))}


def make_mlp(seed, hidden=HIDDEN):
    a, b = jax.random.split(jax.random.key(seed))
    return {
        "a": {"kernel": jax.random.normal(a, (INPUTS, hidden)), "bias": jnp.zeros(hidden)},
        "b": {"kernel": jax.random.normal(b, (hidden, CLASSES)), "bias": jnp.zeros(CLASSES)},
    }


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


def step_of(apply_fn, tx):
    return train.make_train_step(train.supervised(apply_fn), tx)


def make_pair(tx, make=make_linear):
    return interpolation.Pair(*(train.init_state(make(seed), tx, jax.random.key(seed)) for seed in (1, 2)))


def make_joint(tx, make=make_linear, **options):
    params, model_state = interpolation.join((make(2), {}), (make(1), {}), **options)
    return train.init_state(params, tx, KEY, model_state)


# Pull


def test_pull_by_hand():
    """The teacher's step, the move, the student's step; in this order, and one loss each."""
    tx, batches = optax.sgd(0.3), make_batches(3)
    step = interpolation.pull(step_of(linear, tx), step_of(linear, tx), 0.25)
    pair, metrics = jax.jit(lambda p: jax.lax.scan(step, p, batches))(make_pair(tx))
    teacher, student = (np.asarray(make_linear(seed)["w"], float) for seed in (1, 2))
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        teacher = teacher - 0.3 * gradient_of(teacher, batch)
        student = 0.25 * teacher + 0.75 * student
        student = student - 0.3 * gradient_of(student, batch)
    np.testing.assert_allclose(pair.teacher.params["w"], teacher, rtol=1e-5)
    np.testing.assert_allclose(pair.student.params["w"], student, rtol=1e-5)
    assert {"loss", "teacher_loss", "errors", "teacher_errors", "rate"} <= metrics.keys()
    np.testing.assert_array_equal(metrics["rate"], 0.25)
    assert pair.step == 3


def test_a_frozen_teacher_stays():
    tx = optax.sgd(0.3)
    pair = make_pair(tx)
    step = jax.jit(interpolation.pull(None, step_of(linear, tx), 1.0))
    after, metrics = step(pair, make_batch())
    chex.assert_trees_all_equal(after.teacher.params, pair.teacher.params)
    w = np.asarray(pair.teacher.params["w"], float)
    expected = w - 0.3 * gradient_of(w, make_batch())
    np.testing.assert_allclose(after.student.params["w"], expected, rtol=1e-5)
    assert "teacher_loss" not in metrics


def test_pull_and_distil_from_the_teacher_of_the_moment():
    tx, batch = optax.sgd(0.3), make_batch()
    distilled = train.make_train_step(train.distill(linear, temperature=2.0, alpha=0.0), tx)
    label = teachers.make_label(linear)
    step = interpolation.pull(step_of(linear, tx), distilled, 0.5, label=label)
    pair, metrics = jax.jit(step)(make_pair(tx), batch)
    teacher, _ = jax.jit(step_of(linear, tx))(make_pair(tx).teacher, batch)
    start = make_pair(tx).student._replace(params=weights.lerp(make_linear(2), teacher.params, 0.5))
    student, expected = jax.jit(distilled)(start, label((teacher.params, {}), batch))
    chex.assert_trees_all_close(pair.student.params, student.params, rtol=1e-6)
    np.testing.assert_allclose(metrics["soft"], expected["soft"], rtol=1e-6)


# Through


def joint_gradient(**options):
    """Of S3's formula at λ = 0.25: that of the parts, and the one at the interpolated network."""
    loss_fn = interpolation.through(train.supervised(linear), 0.25, **options)
    state, batch = make_joint(optax.sgd(1.0)), make_batch()
    gradient = jax.jit(jax.grad(lambda p: loss_fn(p, state.model_state, batch, key=KEY, step=0)[0]))(
        state.params
    )
    student, teacher = (np.asarray(state.params[n]["w"], float) for n in ("student", "teacher"))
    return (gradient, gradient_of(0.75 * student + 0.25 * teacher, batch), gradient_of(teacher, batch))


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_the_gradient_goes_through_the_interpolation(flow, together):
    teacher_loss = train.supervised(linear) if together else None
    gradient, mixed, own = joint_gradient(flow=flow, teacher_loss=teacher_loss)
    np.testing.assert_allclose(gradient["student"]["w"], 0.75 * mixed, rtol=1e-5, atol=1e-7)
    expected = together * own + flow * 0.25 * mixed
    np.testing.assert_allclose(gradient["teacher"]["w"], expected, rtol=1e-5, atol=1e-7)


def test_a_frozen_part_stays_whatever_the_optimizer():
    tx = interpolation.split_tx(optax.adamw(0.1, weight_decay=0.5))
    step = jax.jit(train.make_train_step(
        interpolation.through(train.supervised(linear), 0.5), tx
    ))  # fmt: skip
    state = make_joint(tx)
    after, _ = step(state, make_batch())
    chex.assert_trees_all_equal(after.params["teacher"], state.params["teacher"])
    assert (after.params["student"]["w"] != state.params["student"]["w"]).all()


def test_the_interpolated_network_is_the_model():
    params, state = interpolation.join((make_mlp(1), {}), (make_mlp(2), {}))
    x = make_batch()["image"]
    for rate in (0.3, {"^a": 1.0, "^b": 0.0}):
        mixed = interpolation.mix(params, rate)
        outputs, _ = interpolation.interpolated(mlp, rate)(params, state, x)
        np.testing.assert_array_equal(outputs, mlp(mixed, {}, x)[0])
    chex.assert_trees_all_equal(mixed, {"a": make_mlp(2)["a"], "b": make_mlp(1)["b"]})


def test_through_keeps_the_states_apart():
    def counting(params, model_state, x, *, key=None):
        return x @ params["w"], {"mean": model_state["mean"] + x.mean() * params["w"].sum()}

    params = {"student": make_linear(1), "teacher": make_linear(2)}
    state = {"student": {"mean": jnp.zeros(())}, "teacher": {"mean": jnp.ones(())}}
    supervised, batch = train.supervised(counting), make_batch()
    loss_fn = interpolation.through(supervised, 0.5, teacher_loss=supervised)
    _, (after, metrics) = loss_fn(params, state, batch, key=KEY, step=0)
    mixed = interpolation.mix(params, 0.5)
    mean = batch["image"].mean()
    np.testing.assert_allclose(after["student"]["mean"], mean * mixed["w"].sum(), rtol=1e-5)
    expected = 1 + mean * params["teacher"]["w"].sum()
    np.testing.assert_allclose(after["teacher"]["mean"], expected, rtol=1e-5)
    assert {"errors", "teacher_errors", "teacher_loss", "rate"} == metrics.keys()


# λ


def reading(kind, tx, rate, **options):
    if kind == "pull":
        return interpolation.pull(step_of(mlp, tx), step_of(mlp, tx), rate, **options)
    supervised = train.supervised(mlp)
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
    step = interpolation.sweep(lambda rate: reading(kind, tx, rate), rates)
    states = interpolation.repeat(start_of(kind, tx), len(rates))
    results, metrics = jax.jit(lambda s: jax.lax.scan(step, s, batches))(states)
    assert metrics["loss"].shape == (5, len(rates))
    chex.assert_trees_all_equal_shapes(results, states)
    assert results.params["teacher"]["a"]["kernel"].ndim == 2  # one teacher
    one = jax.jit(lambda rate, s: jax.lax.scan(reading(kind, tx, rate), s, batches)[0])
    for i, rate in enumerate(rates):
        expected = one(rate, start_of(kind, tx))
        lane = interpolation.lane(results, i)
        chex.assert_trees_all_close(lane.params, expected.params, atol=1e-6)


def test_line_search():
    def valleys(params):  # 0.2 and, deeper, 0.83
        t = params["w"]
        return jnp.minimum((t - 0.2) ** 2, (t - 0.83) ** 2 - 0.01)

    a, b = {"w": jnp.zeros(())}, {"w": jnp.ones(())}
    t, value = jax.jit(lambda: interpolation.line_search(valleys, a, b, points=11, rounds=3))()
    np.testing.assert_allclose(t, 0.83, atol=0.2**3 / 2)
    np.testing.assert_allclose(value, valleys({"w": t}))
    for falls, end in ((lambda p: p["w"], 0.0), (lambda p: -p["w"], 1.0)):
        assert interpolation.line_search(falls, a, b, points=3, rounds=4)[0] == end
    flat, _ = interpolation.line_search(lambda p: 0.0 * p["w"], a, b)
    assert flat == 0


def test_a_rate_searched_on_validation_data():
    tx, validation = optax.sgd(0.1), make_batch(seed=7)

    def loss(params, model_state, batch):
        return train.supervised(linear)(params, model_state, batch, key=None, step=0)[0]

    # Half the teacher's way is best: the labels are those of the network there
    middle = weights.lerp(make_linear(2), make_linear(1), 0.5)
    validation["label"] = jax.nn.softmax(validation["image"] @ middle["w"])
    step = interpolation.pull(None, step_of(linear, tx), interpolation.Search(loss, rounds=4))
    _, metrics = jax.jit(step)(make_pair(tx), {**make_batch(), "validation": validation})
    np.testing.assert_allclose(metrics["rate"], 0.5, atol=0.01)
    with pytest.raises(ValueError, match="the batch has no 'validation'"):
        step(make_pair(tx), make_batch())


def test_a_rate_learned_through_the_interpolation():
    batch = make_batch()
    middle = weights.lerp(make_linear(2), make_linear(1), 0.3)
    batch["label"] = jax.nn.softmax(batch["image"] @ middle["w"])
    tx = interpolation.split_tx(optax.set_to_zero(), rate=optax.adam(0.05))
    step = train.make_train_step(interpolation.through(train.supervised(linear), None), tx)
    state = make_joint(tx, rate=0.8)

    def body(state, _):
        return step(state, batch)

    state, metrics = jax.jit(lambda s: jax.lax.scan(body, s, None, 200))(state)
    np.testing.assert_allclose(metrics["rate"][0], 0.8, rtol=1e-5)
    np.testing.assert_allclose(metrics["rate"][-1], 0.3, atol=0.01)
    chex.assert_trees_all_equal(state.params["student"], make_linear(2))
    mixed = interpolation.mix(state.params)
    chex.assert_trees_all_close(mixed, middle, atol=0.05)


# Unequal widths


def test_a_wider_teacher_is_projected():
    def first(params):
        return {
            "a": jax.tree.map(lambda x: x[..., :HIDDEN], params["a"]),
            "b": {**params["b"], "kernel": params["b"]["kernel"][:HIDDEN]},
        }

    tx = optax.sgd(0.1)
    pair = interpolation.Pair(
        train.init_state(make_mlp(1, 9), tx, KEY), train.init_state(make_mlp(2), tx, KEY)
    )
    step = interpolation.pull(None, step_of(mlp, tx), 1.0, project=first)
    after, _ = jax.jit(step)(pair, make_batch())
    expected, _ = jax.jit(step_of(mlp, tx))(pair.student._replace(params=first(make_mlp(1, 9))), make_batch())
    chex.assert_trees_all_close(after.student.params, expected.params, rtol=1e-6)
    with pytest.raises(ValueError) as error:
        interpolation.pull(None, step_of(mlp, tx), 0.5)(pair, make_batch())
    for path in ("a.kernel", "a.bias", "b.kernel"):
        assert path in str(error.value)
    params, _ = interpolation.join((make_mlp(2), {}), (make_mlp(1, 9), {}))
    with pytest.raises(ValueError, match=r"in the student, .* in the teacher"):
        interpolation.mix(params, 0.5)
    mixed = interpolation.mix(params, 1.0, project=first)
    chex.assert_trees_all_equal(mixed, first(make_mlp(1, 9)))


# In epochs and loops


@pytest.mark.parametrize("kind", ["pull", "through"])
def test_the_loop_takes_both_readings(kind, tmp_path):
    """With checkpoints: a run in two pieces is the run in one."""
    tx = optax.adam(0.01)
    rng = np.random.default_rng(3)
    training = {"image": rng.normal(size=(36, INPUTS)).astype("f4"), "label": np.arange(36) % 3}
    apply_fn = {
        "pull": train.student_of(mlp), "through": interpolation.interpolated(mlp, 0.5)
    }[kind]  # fmt: skip

    def student_fn(params, model_state, x, *, key=None):
        return apply_fn(params, model_state, x, key=key)

    validate = train.make_validation(student_fn, training)
    epoch = train.make_epoch(reading(kind, tx, 0.5))

    def run(epochs, directory=None):
        return train.fit(
            start_of(kind, tx), epoch, training, epochs=epochs, batch_size=12, seed=0,
            validate=validate, directory=directory,
        )  # fmt: skip

    whole = run(4)
    run(2, tmp_path / "checkpoints")
    pieces = run(4, tmp_path / "checkpoints")
    chex.assert_trees_all_equal(whole.state.params, pieces.state.params)
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
        return train.init_state(dict(zip("ab", layers, strict=True)), tx, KEY)

    step = interpolation.pull(step_of(mlp, tx), step_of(mlp, tx), 0.5)
    pair = interpolation.Pair(start(0), start(1))
    pair, metrics = jax.jit(lambda p: jax.lax.scan(step, p, batches))(pair)
    np.testing.assert_allclose(metrics["loss"], golden["loss"], atol=1e-4)
    np.testing.assert_allclose(metrics["teacher_loss"], golden["teacher_loss"], atol=1e-4)
    for i, layer in enumerate("ab"):
        for part in ("kernel", "bias"):
            flat = np.asarray(pair.student.params[layer][part], float).ravel()
            summary = [np.linalg.norm(flat), flat @ np.linspace(-1, 1, len(flat))]
            np.testing.assert_allclose(summary, golden[f"dense.{i}.{part}"], atol=1e-4)
    logits, _ = mlp(pair.student.params, {}, batches["image"][0, :2])
    np.testing.assert_allclose(np.ravel(logits), golden["logits"], atol=1e-4)


# What cannot be meant


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interpolation.pull(None, None, 1.5), r"rate must lie in \[0, 1\], got 1.5"),
        (lambda: interpolation.through(None, -0.5), r"rate must lie in \[0, 1\], got -0.5"),
        (lambda: interpolation.through(None, {"a": 2.0}), r"rate\['a'\] must lie in \[0, 1\], got 2"),
        (lambda: interpolation.join((1, {}), (2, {}), rate=1.0), r"rate must lie in \(0, 1\)"),
        (lambda: interpolation.mix({"student": 1.0, "teacher": 2.0}), "params has no 'rate'"),
        (
            lambda: interpolation.mix({"student": 1.0, "teacher": jnp.array(jnp.nan)}, 0.5),
            "not finite in the teacher",
        ),
        (lambda: interpolation.line_search(None, 0.0, 1.0, points=4), "points must be odd"),
        (lambda: interpolation.line_search(None, 0.0, 1.0, rounds=0), "rounds must be at least 1"),
        (
            lambda: interpolation.pull(
                None, step_of(mlp, optax.sgd(0.1)), {"c.kernel": 0.5, "d": 0.5, "": 0.1}
            )(make_pair(optax.sgd(0.1), make_mlp), make_batch()),
            r"'c.kernel' is found in no path\n'd' is found in no path",
        ),
    ],
)  # fmt: skip
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def misuse():
    """Kind → what a user does, and all that the answer must name."""
    student, wide = make_mlp(1), make_mlp(2, 9)
    graphs = [units.trace(lambda p, x: mlp(p, {}, x)[0], p, jnp.ones((1, INPUTS))) for p in (student, wide)]
    every = ("a.kernel", "a.bias", "b.kernel", "b.bias")
    statistics = {"mean": jnp.zeros(2), "var": jnp.ones(2)}

    def mixing(teacher, rate=0.5):
        return lambda: interpolation.mix({"student": student, "teacher": teacher}, rate)

    return {
        "other structures": (mixing({"a": student["a"], "c": student["b"]}), ("b.kernel", "c.bias")),
        "other shapes": (mixing(wide), ("a.kernel", "a.bias", "b.kernel")),
        "other dtypes": (mixing(jax.tree.map(lambda x: x.astype(jnp.bfloat16), student)), every),
        "λ outside [0, 1]": (
            mixing(student, {"a.bias": -0.5, "b.bias": 1.5, "": 0.5}), ("a.bias", "-0.5", "b.bias"),
        ),
        "NaN": (mixing(jax.tree.map(lambda x: x * jnp.nan, student)), every),
        "a student wider than its teacher": (
            lambda: units.bring(graphs[1], wide, graphs[0], student),
            ("a.kernel", "a.bias", "b.kernel"),
        ),
        "an unmatched pattern": (mixing(student, {"c.*": 0.5, "bais": 0.5, "": 0.5}), ("c.*", "bais")),
        "BatchNorm left stale": (
            lambda: weights.along(
                lambda *network: 0.0, (student, statistics), (student, statistics), [0.5]
            ),
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

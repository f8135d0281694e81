"""The step, the epoch and the objectives, against updates written out by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from distill_jax import data, losses, teachers, train
from distill_jax.models import MLP, ConvNet, Model, build, from_function, from_linen, from_nnx


def linear(params, x):
    return x @ params["w"]


def make_data(n=12, inputs=4, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(n, inputs)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, classes, n), jnp.int32),
        "teacher": jnp.asarray(rng.normal(size=(n, classes)) * 3, jnp.float32),
    }


PARAMS = {"w": np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)}
LINEAR = from_function(linear, PARAMS)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def test_distillation_step_by_hand():
    """Golden: w ← w − η·xᵀ[α(q − y) + (1−α)·T·(q_T − p_T)]/n, in float64."""
    batch, temperature, alpha, rate = make_data(), 3.0, 0.3, 0.5
    x, w = np.asarray(batch["image"], float), PARAMS["w"].astype(float)
    y, t = np.eye(3)[np.asarray(batch["label"])], np.asarray(batch["teacher"], float)
    z = x @ w
    residual = alpha * (softmax(z) - y)
    residual += (1 - alpha) * temperature * (softmax(z / temperature) - softmax(t / temperature))
    expected = w - rate * x.T @ residual / len(x)
    p, q = softmax(t / temperature), softmax(z / temperature)
    soft = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    hard = -np.log(softmax(z)[np.arange(len(x)), batch["label"]]).mean()

    tx = optax.sgd(rate)
    step = train.make_train_step(train.distill(temperature=3.0, alpha=alpha), tx)
    state, metrics = jax.jit(step)(train.init_state(LINEAR, tx, jax.random.key(0)), batch)
    np.testing.assert_allclose(state.model.params["w"], expected, atol=1e-6)
    np.testing.assert_allclose(metrics["soft"], soft, rtol=1e-6)
    np.testing.assert_allclose(metrics["hard"], hard, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], alpha * hard + (1 - alpha) * soft, rtol=1e-6)
    wrong = (z.argmax(-1) != np.asarray(batch["label"])).mean()
    np.testing.assert_allclose(metrics["error_rate"], wrong, rtol=1e-6)
    assert state.step == 1


def test_schedules_of_temperature_and_alpha_follow_the_step():
    tx = optax.sgd(0.0)
    loss_fn = train.distill(
        temperature=optax.linear_schedule(1.0, 5.0, 4), alpha=optax.linear_schedule(1.0, 0.0, 4)
    )
    step = jax.jit(train.make_train_step(loss_fn, tx))
    state, batch = train.init_state(LINEAR, tx, jax.random.key(0)), make_data()
    logits = batch["image"] @ PARAMS["w"]
    for number in range(5):
        state, metrics = step(state, batch)
        temperature, alpha = 1.0 + number, 1 - number / 4
        soft = losses.kl(logits, batch["teacher"], temperature=temperature).mean()
        hard = losses.cross_entropy(logits, batch["label"]).mean()
        np.testing.assert_allclose(metrics["loss"], alpha * hard + (1 - alpha) * soft, rtol=1e-5)


def test_label_smoothing_and_soft_labels():
    batch = make_data()
    state = train.init_state(LINEAR, optax.sgd(0.1), jax.random.key(0))
    step = train.make_train_step(train.supervised(label_smoothing=0.2), optax.sgd(0.1))
    smoothed = jax.nn.one_hot(batch["label"], 3) * 0.8 + 0.2 / 3
    plain = train.make_train_step(train.supervised(), optax.sgd(0.1))
    chex.assert_trees_all_close(
        step(state, batch)[0].model.params,
        plain(state, {**batch, "label": smoothed})[0].model.params,
        rtol=1e-6,
    )


def test_examples_of_weight_zero_do_not_exist():
    batch = make_data()
    shorter = jax.tree.map(lambda x: x[:9], batch)
    step = train.make_train_step(train.distill(), optax.sgd(0.1))
    state = train.init_state(LINEAR, optax.sgd(0.1), jax.random.key(0))
    weight = (jnp.arange(12) < 9).astype(jnp.float32)
    masked, metrics = step(state, {**batch, "weight": weight})
    expected, expected_metrics = step(state, shorter)
    chex.assert_trees_all_close(
        (masked.model.params, metrics), (expected.model.params, expected_metrics), rtol=1e-5
    )
    values = jnp.where(weight > 0, 1.0, jnp.nan)
    assert train.weighted_mean(values, {"weight": weight}) == 1.0


def test_any_loss_of_the_library_distils():
    state = train.init_state(LINEAR, optax.sgd(0.1), jax.random.key(0))
    batch = make_data()
    for soft, temperature in [
        (losses.reverse_kl, 2.0),
        (losses.jensen_shannon, 2.0),
        (functools.partial(losses.jensen_shannon, beta=0.2), 2.0),
        (losses.soft_cross_entropy, 2.0),
        (losses.mean_squared_logits, None),
    ]:
        loss_fn = train.distill(temperature=temperature, alpha=0.0, soft=soft)
        step = jax.jit(train.make_train_step(loss_fn, optax.sgd(0.01)))
        after, first = step(state, batch)
        _, second = step(after, batch)
        assert second["loss"] < first["loss"]
        assert "hard" not in first


def test_a_batch_without_teacher_is_refused():
    step = train.make_train_step(train.distill(), optax.sgd(0.1))
    state = train.init_state(LINEAR, optax.sgd(0.1), jax.random.key(0))
    batch = {k: v for k, v in make_data().items() if k != "teacher"}
    with pytest.raises(ValueError, match=r"no 'teacher' logits.*it has \['image', 'label'\]"):
        step(state, batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"alpha": 1.5}, r"alpha must lie in \[0, 1\]"), ({"temperature": 0.0}, "temperature must be")],
)
def test_bad_hyperparameters_are_refused_when_the_objective_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        train.distill(**options)


# --- epochs ----------------------------------------------------------------------------------


def conv_and_dense():
    dense = build("mlp:8", (6, 6, 1), 3, jax.random.key(0), dropout=0.5)
    conv = build("convnet:4", (6, 6, 1), 3, jax.random.key(0), dropout=0.5)
    return {"dense": dense, "convolution": conv}


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_an_epoch_is_its_steps(kind, monkeypatch):
    model, tx = conv_and_dense()[kind], optax.sgd(0.1, momentum=0.9)
    step = train.make_train_step(train.supervised(), tx)
    rng = np.random.default_rng(0)
    examples = {
        "image": jnp.asarray(rng.normal(size=(20, 6, 6, 1)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, 20), jnp.int32),
    }
    order = rng.permutation(20).reshape(5, 4).astype(np.int32)
    scans = []
    original = jax.lax.scan

    def transform(context, batch, key):
        return {**batch, "image": context * data.random_shift(key, batch["image"], 1)}

    epoch = train.make_epoch(step, transform=transform)
    state = train.init_state(model, tx, jax.random.key(3))
    expected = state
    for rows in order:
        batch = jax.tree.map(lambda x, rows=rows: x[rows], examples)
        batch = transform(2.0, batch, train.step_key(expected, 1))
        expected, metrics = jax.jit(step)(expected, batch)
    monkeypatch.setattr(jax.lax, "scan", lambda *a, **k: scans.append(1) or original(*a, **k))
    state, collected = epoch(state, examples, order, 2.0)
    assert bool(scans) == (kind == "dense")  # a convolution must not stand in a scan on a CPU
    chex.assert_trees_all_close(state.model.params, expected.model.params, atol=1e-6)
    np.testing.assert_allclose(collected["loss"][-1], metrics["loss"], rtol=1e-5)
    assert collected["loss"].shape == (5,)
    jax.tree.map(np.asarray, model.params)  # the step donates its state, not the model's arrays


def test_an_epoch_judges_each_program_anew(monkeypatch):
    """Arrays of the same shapes, another function: of the student, or of the teacher in the context."""

    def convolved(params, x):
        x = jax.lax.conv_general_dilated(
            x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return x.mean((1, 2))

    def dense(params, x):
        return x.mean((1, 2)) @ params[0, 0]

    kernel = np.random.default_rng(0).normal(size=(3, 3, 1, 3)).astype(np.float32)
    slow, fast = (from_function(fn, kernel) for fn in (convolved, dense))
    examples = {"image": jnp.ones((4, 5, 5, 1)), "label": jnp.arange(4) % 3}
    order, tx = np.arange(4).reshape(2, 2), optax.sgd(0.1)
    epoch = train.make_epoch(
        train.make_train_step(train.distill(), tx),
        transform=lambda teacher, batch, key: teachers.label(teacher, batch),
    )
    scans, original = [], jax.lax.scan
    monkeypatch.setattr(jax.lax, "scan", lambda *a, **k: scans.append(1) or original(*a, **k))
    for student, teacher, scanned in [(fast, fast, 1), (slow, fast, 1), (fast, slow, 1), (fast, fast, 1)]:
        epoch(train.init_state(student, tx, jax.random.key(0)), examples, order, teacher)
        assert len(scans) == scanned


def test_scan_is_fast_sees_through_jit_and_custom_rules():
    def conv(x):
        return jax.lax.conv(x, jnp.ones((1, 1, 3, 3)), (1, 1), "SAME")

    x = jnp.ones((1, 1, 4, 4))
    assert not train.scan_is_fast(lambda x: jax.jit(conv)(x) + 1, x)
    assert not train.scan_is_fast(jax.grad(lambda x: jax.checkpoint(conv)(x).sum()), x)
    assert train.scan_is_fast(lambda x: x @ x, x)


def test_a_sweep_of_seeds_is_a_vmap_of_the_epoch():
    tx = optax.adam(1e-2)
    step = train.make_train_step(train.distill(), tx)
    batches = jax.tree.map(lambda x: x.reshape(3, 4, *x.shape[1:]), make_data())

    def epoch(state):
        return jax.lax.scan(step, state, batches)

    def start(seed):
        params = {"w": jax.random.normal(jax.random.key(seed), (4, 3))}
        return train.init_state(from_function(linear, params), tx, jax.random.key(seed))

    states = jax.vmap(start)(jnp.arange(3))
    swept, _ = jax.jit(jax.vmap(epoch))(states)
    for seed in range(3):
        single, _ = jax.jit(epoch)(start(seed))
        chex.assert_trees_all_close(swept.model.params["w"][seed], single.model.params["w"], atol=1e-6)


# --- optimizer parts -------------------------------------------------------------------------


def test_max_norm_bounds_each_unit():
    tx = optax.chain(optax.sgd(10.0), train.max_norm(0.5))
    step = train.make_train_step(train.supervised(), tx)
    params = {"w": jnp.asarray(PARAMS["w"]) * jnp.array([0.01, 1.0, 1.0])}
    state, _ = step(train.init_state(from_function(linear, params), tx, jax.random.key(0)), make_data())
    free, _ = train.make_train_step(train.supervised(), optax.sgd(10.0))(
        train.init_state(from_function(linear, params), optax.sgd(10.0), jax.random.key(0)), make_data()
    )
    norms, free_norms = (np.linalg.norm(s.model.params["w"], axis=0) for s in (state, free))
    np.testing.assert_allclose(norms, np.minimum(free_norms, 0.5), rtol=1e-6)
    assert (free_norms > 0.5).any()
    with pytest.raises(ValueError, match="limit must be positive"):
        train.max_norm(0.0)


# --- models ----------------------------------------------------------------------------------


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.Dense(8)(x.reshape(x.shape[0], -1)))
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not train)(x))


def nnx_mlp():
    return from_nnx(MLP((4, 8, 3), dropout=0.5, input_dropout=0.2, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("name", ["nnx", "linen", "convnet"])
def test_training_mode_comes_with_the_key(name):
    x = make_data()["image"]
    if name == "nnx":
        model = nnx_mlp()
    elif name == "linen":
        model = from_linen(LinenMLP(), jax.random.key(0), x)
    else:
        x = x.reshape(12, 2, 2, 1)
        options = {"channels": (2,), "batch_norm": True, "dropout": 0.5}
        model = from_nnx(ConvNet((2, 2, 1), 3, **options, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda model, x, key=None: model.apply(x, key=key))
    quiet, same = run(model, x)
    chex.assert_trees_all_equal(same, model.state)
    np.testing.assert_array_equal(quiet, run(model, x)[0])
    np.testing.assert_array_equal(quiet, jax.jit(Model.__call__)(model, x))
    a, state = run(model, x, jax.random.key(1))
    b, _ = run(model, x, jax.random.key(2))
    again, _ = run(model, x, jax.random.key(1))
    np.testing.assert_array_equal(a, again)
    assert np.abs(np.asarray(a - b)).max() > 0.01
    assert jax.tree.structure(state) == jax.tree.structure(model.state)
    if name == "convnet":
        assert np.abs(np.asarray(state["norm"][0]["mean"])).max() > 0


def test_linen_and_plain_functions_train_like_nnx():
    """The same arrays in three clothes make the same step."""
    model, batch = from_nnx(MLP((4, 8, 3), rngs=nnx.Rngs(0))), make_data()
    kernels = model.params["dense"]

    class Plain(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.relu(linen.Dense(8)(x))
            return linen.Dense(3)(x)

    def plain(params, x):
        (w1, b1), (w2, b2) = params
        return jax.nn.relu(x @ w1 + b1) @ w2 + b2

    linen_model = from_linen(Plain(), jax.random.key(0), batch["image"])
    others = [
        linen_model.replace(params={"Dense_0": kernels[0], "Dense_1": kernels[1]}),
        from_function(plain, [(k["kernel"], k["bias"]) for k in kernels.values()]),
    ]
    tx = optax.adam(0.1)
    step = jax.jit(train.make_train_step(train.distill(), tx))

    def leaves_after_a_step(model):
        state, _ = step(train.init_state(model, tx, jax.random.key(0)), batch)
        return sorted(jax.tree.leaves(state.model.params), key=lambda x: (x.ndim, x.size))

    expected = leaves_after_a_step(model)
    for other in others:
        chex.assert_trees_all_close(leaves_after_a_step(other), expected, atol=1e-6)


@pytest.mark.parametrize("text", ["mlp", "mlp:", "mlp:0", "mlp:12,x", "resnet:3", ""])
def test_a_bad_description_is_refused(text):
    with pytest.raises(ValueError, match="a model is described by a family"):
        build(text, (8, 8, 1), 10, jax.random.key(0))


def test_random_shift_moves_within_bounds_and_fills_with_zero():
    images = jnp.zeros((400, 7, 7, 1), jnp.uint8).at[:, 3, 3].set(255)
    moved = np.asarray(data.random_shift(jax.random.key(0), images, 2))[..., 0]
    assert (moved.sum((1, 2)) == 255).all()
    where = np.argwhere(moved)[:, 1:] - 3
    assert {tuple(w) for w in where} == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    corner = jnp.ones((50, 4, 4, 1), jnp.uint8)
    sums = {int(x.sum()) for x in data.random_shift(jax.random.key(0), corner, 1)}
    assert sums == {16, 12, 9}


def test_random_flip_mirrors_about_half_of_the_images():
    images = np.random.default_rng(0).normal(size=(400, 3, 4, 2))
    flipped = np.asarray(data.random_flip(jax.random.key(0), images.astype(np.float32)))
    same = np.isclose(flipped, images, atol=1e-6).all((1, 2, 3))
    mirrored = np.isclose(flipped, images[:, :, ::-1], atol=1e-6).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 160 < mirrored.sum() < 240


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_nothing_is_traced_after_the_first_call(kind):
    """Epochs of other lengths than the first, other batches, and the validation: each program is traced once."""
    text = {"dense": "mlp:4", "convolution": "convnet:2"}[kind]
    model, tx = build(text, (4, 4, 1), 3, jax.random.key(0)), optax.adam(1e-3)
    data = {"image": np.ones((9, 4, 4, 1), np.float32), "label": np.zeros(9, np.int32)}
    traced = []

    def loss_fn(model, batch, *, key, step):
        traced.append(batch["image"].shape)
        return train.supervised()(model, batch, key=key, step=step)

    epoch = train.make_epoch(train.make_train_step(loss_fn, tx), transform=lambda teacher, batch, key: batch)
    measure = train.make_measure(loss_fn, data, batch_size=4)
    state = train.init_state(model, tx, jax.random.key(0))
    counts = []
    for seed in range(3):
        state, _ = epoch(state, data, train.epoch_order(0, seed, 9, 4), model)
        measure(state.model)
        counts.append(len(traced))
    assert counts[0] == counts[1] == counts[2] > 0

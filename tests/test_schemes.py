"""Schemes of teaching, against losses written out in NumPy."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import losses, teachers, train
from distill_jax.models import ConvNet, from_nnx
from distill_jax.train import several_teachers

KEY = jax.random.key(0)


def linear(params, model_state, x, *, key=None):
    return x @ params["w"], model_state


def make_params(seed, inputs=4, classes=3):
    w = np.random.default_rng(seed).normal(size=(inputs, classes))
    return {"w": jnp.asarray(w, jnp.float32)}


def make_batch(n=12, inputs=4, classes=3, seed=0, weight=True):
    rng = np.random.default_rng(seed)
    batch = {
        "image": jnp.asarray(rng.normal(size=(n, inputs)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, classes, n), jnp.int32),
    }
    if weight:
        batch["weight"] = jnp.asarray(rng.integers(0, 3, n), jnp.float32)
    return batch


def run(loss_fn, params, model_state, batch, *, key=None, step=0):
    return jax.jit(loss_fn)(params, model_state, batch, key=key, step=step)


def gradient_of(function):
    return jax.jit(jax.grad(function))


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def mean(values, batch):
    return np.average(values, weights=batch.get("weight"))


def hard(logits, batch):
    return mean(-np.log(softmax(logits)[np.arange(len(logits)), batch["label"]]), batch)


def logits_of(params, batch):
    return np.asarray(batch["image"], float) @ np.asarray(params["w"], float)


def assert_same_in_parts(loss_fn, params, model_state, batch, tx=None):
    """A step over the batch and over its halves; two steps, and two under scan under vmap."""
    tx = tx or optax.sgd(0.5)
    state = train.init_state(params, tx, KEY, model_state)
    step = train.make_train_step(loss_fn, tx)
    jitted = jax.jit(step)
    whole, metrics = jitted(state, batch)
    parts, in_parts = jax.jit(train.make_train_step(loss_fn, tx, accumulate=2))(state, batch)
    close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=1e-6)
    close((whole.params, whole.model_state, metrics), (parts.params, parts.model_state, in_parts))
    second, _ = jitted(whole, batch)
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    copies = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    scanned = jax.jit(jax.vmap(lambda state: jax.lax.scan(step, state, batches)[0]))(copies)
    for copy in range(2):
        one = jax.tree.map(lambda x, copy=copy: x[copy], scanned)
        close((one.params, one.model_state), (second.params, second.model_state))


# Several teachers


def label_of(*seeds):
    label = several_teachers.label_each(*[linear] * len(seeds))
    return functools.partial(label, tuple((make_params(seed), {}) for seed in seeds))


def test_each_teacher_by_hand():
    params, batch = make_params(1), label_of(2, 3)(make_batch())
    t, alpha, weights = 3.0, 0.3, (0.25, 1.5)
    loss_fn = several_teachers.distill_each(linear, weights=weights, temperature=t, alpha=alpha)
    loss, (_, metrics) = run(loss_fn, params, {}, batch, step=0)
    z = logits_of(params, batch)
    softs = [
        t**2 * mean(kl(softmax(logits_of(make_params(s), batch) / t), softmax(z / t)), batch) for s in (2, 3)
    ]
    soft = weights[0] * softs[0] + weights[1] * softs[1]
    np.testing.assert_allclose([metrics["soft_0"], metrics["soft_1"]], softs, rtol=1e-5)
    np.testing.assert_allclose(loss, alpha * hard(z, batch) + (1 - alpha) * soft, rtol=1e-5)
    assert_same_in_parts(loss_fn, params, {}, batch)


def test_weighted_divergences_have_the_gradient_of_the_mean_probability():
    params, raw = make_params(1), make_batch()
    members = tuple((make_params(seed), {}) for seed in (2, 3))
    several = several_teachers.distill_each(linear, temperature=1.0, alpha=0.0)
    gradient = gradient_of(lambda p: several(p, {}, label_of(2, 3)(raw), key=None, step=0)[0])(params)
    log_mean, _ = teachers.ensemble(linear, linear)(*zip(*members, strict=True), raw["image"])

    def averaged(params):
        return train.weighted_mean(losses.kl(linear(params, {}, raw["image"])[0], log_mean), raw)

    chex.assert_trees_all_close(gradient, gradient_of(averaged)(params), rtol=1e-4, atol=1e-6)


def test_several_teachers_errors():
    batch = label_of(2, 3)(make_batch())
    with pytest.raises(ValueError, match="3 weights for 2 teachers"):
        several_teachers.distill_each(linear, weights=(1, 1, 1))(make_params(1), {}, batch, key=None, step=0)
    with pytest.raises(ValueError, match="negative"):
        several_teachers.distill_each(linear, weights=(1, -1))
    single = {**batch, "teacher": jnp.zeros((12, 3))}
    with pytest.raises(ValueError, match="tuple of logits"):
        several_teachers.distill_each(linear)(make_params(1), {}, single, key=None, step=0)
    with pytest.raises(ValueError, match="temperature"):
        several_teachers.distill_gated(linear, temperature=0.0)
    with pytest.raises(ValueError, match="at least one"):
        several_teachers.label_each()


def gated_params(seed=5):
    rng = np.random.default_rng(seed)
    gate = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), several_teachers.init_gate(2, 3)
    )
    return {"student": make_params(1), "gate": gate}


def gate_of(gate, p):
    entropy = -(p * np.log(p)).sum(-1, keepdims=True)
    seen = np.concatenate([p, entropy], -1).reshape(len(p), -1)
    return softmax(seen @ np.asarray(gate["weight"], float) + np.asarray(gate["bias"], float))


def test_gated_teachers_by_hand():
    params, batch = gated_params(), label_of(2, 3)(make_batch())
    t, alpha = 2.0, 0.3
    loss_fn = several_teachers.distill_gated(linear, temperature=t, alpha=alpha)
    loss, (_, metrics) = run(loss_fn, params, {}, batch, step=0)
    z = logits_of(params["student"], batch)
    p = np.stack([softmax(logits_of(make_params(s), batch)) for s in (2, 3)], 1)
    g = gate_of(params["gate"], p)
    mixture = (g[:, :, None] * p).sum(1)
    soft = t**2 * mean(kl(softmax(np.log(mixture) / t), softmax(z / t)), batch)
    gate_loss = hard(np.log(mixture), batch)
    np.testing.assert_allclose(metrics["gate_1"], mean(g[:, 1], batch), rtol=1e-5)
    np.testing.assert_allclose(loss, alpha * hard(z, batch) + (1 - alpha) * soft + gate_loss, rtol=1e-5)
    assert_same_in_parts(loss_fn, params, {}, batch)


def test_the_gate_does_not_learn_from_the_student():
    batch = label_of(2, 3)(make_batch())
    params = gated_params()
    gradients = [
        gradient_of(
            lambda p, a=a: several_teachers.distill_gated(linear, alpha=a)(p, {}, batch, key=None, step=0)[0]
        )(params)
        for a in (0.0, 1.0)
    ]
    chex.assert_trees_all_equal(gradients[0]["gate"], gradients[1]["gate"])
    assert jnp.abs(gradients[0]["gate"]["weight"]).max() > 0


def test_the_gate_learns_who_is_right():
    """Teacher 0 is right where the first input is positive, teacher 1 elsewhere; being sure tells."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 2)).astype(np.float32)
    label = (x[:, 1] > 0).astype(np.int32)
    right = np.where(label[:, None] == np.arange(2), 3.0, -3.0)
    knows = x[:, :1] > 0
    logits = [np.where(knows, right, -0.5 * right), np.where(knows, -0.5 * right, right)]
    batch = {"image": x, "label": label, "teacher": {"logits": tuple(map(jnp.asarray, logits))}}
    batch = jax.tree.map(jnp.asarray, batch)
    params = {"student": make_params(0, 2, 2), "gate": several_teachers.init_gate(2, 2)}
    tx = optax.adam(0.05)
    step = train.make_train_step(several_teachers.distill_gated(linear, temperature=1.0), tx)
    many = jax.tree.map(lambda v: jnp.stack([v] * 300), batch)
    state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, many))(train.init_state(params, tx, KEY))
    np.testing.assert_allclose(metrics["gate_0"][0], 0.5, atol=1e-6)
    p = np.stack([softmax(np.asarray(z, float)) for z in logits], 1)
    g = gate_of(state.params["gate"], p)
    np.testing.assert_array_equal(g[:, 0] > g[:, 1], knows[:, 0])
    assert metrics["gate"][-1] < 0.5 * metrics["gate"][0]


def test_a_class_that_all_teachers_exclude():
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf]])
    batch = {
        "image": jnp.ones((1, 4)),
        "label": jnp.asarray([1]),
        "teacher": {"logits": (logits, 2 * logits)},
    }
    loss_fn = several_teachers.distill_gated(linear)
    loss, gradients = jax.jit(jax.value_and_grad(lambda p: run(loss_fn, p, {}, batch)[0]))(gated_params())
    assert jnp.isfinite(loss)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradients))


# Peers


def test_mutual_learning_by_hand():
    students = tuple(make_params(seed) for seed in (1, 2, 3))
    batch = make_batch()
    loss_fn = train.mutual([linear] * 3, weight=0.7, temperature=2.0)
    value, (_, metrics) = run(loss_fn, students, ({}, {}, {}), batch, step=0)
    z = [logits_of(p, batch) for p in students]
    expected = sum(hard(zk, batch) for zk in z)
    for k in range(3):
        for other in range(3):
            if other != k:
                p, q = softmax(z[other] / 2), softmax(z[k] / 2)
                expected += 0.7 / 2 * 4 * mean(kl(p, q), batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["hard"], np.mean([hard(zk, batch) for zk in z]), rtol=1e-5)
    assert_same_in_parts(loss_fn, students, ({}, {}, {}), batch)


def test_mutual_learning_is_symmetric_in_the_students():
    students, batch = tuple(make_params(seed) for seed in (1, 2, 3)), make_batch()
    gradient = gradient_of(lambda p: train.mutual([linear] * 3)(p, ({}, {}, {}), batch, key=None, step=0)[0])
    order = (2, 0, 1)
    permuted = gradient(tuple(students[i] for i in order))
    straight = gradient(students)
    chex.assert_trees_all_close(permuted, tuple(straight[i] for i in order), rtol=1e-5, atol=1e-6)


def test_what_peers_predict_is_a_constant():
    """Each student's gradient is T(q − p) of its own loss, not that of its peers' losses."""
    students, batch = (make_params(1), make_params(2)), make_batch(weight=False)
    gradients = gradient_of(lambda p: train.mutual([linear] * 2)(p, ({}, {}), batch, key=None, step=0)[0])(
        students
    )
    x = np.asarray(batch["image"], float)
    q, p = (softmax(logits_of(params, batch)) for params in students)
    y = np.eye(3)[np.asarray(batch["label"])]
    expected = x.T @ ((q - y) + (q - p)) / len(x)
    np.testing.assert_allclose(gradients[0]["w"], expected, rtol=1e-4, atol=1e-6)


def test_equal_peers_teach_nothing_and_draw_dropout_apart():
    model = from_nnx(ConvNet((8, 8, 1), 3, channels=(4,), dropout=0.5, rngs=nnx.Rngs(0)))
    batch = make_batch() | {"image": jnp.ones((12, 8, 8, 1))}
    pair = (model.params, model.params), (model.model_state, model.model_state)
    loss_fn = train.mutual([model.apply_fn] * 2)
    _, (_, metrics) = run(loss_fn, *pair, batch, step=0)
    np.testing.assert_allclose(metrics["soft"], 0, atol=1e-7)
    _, (_, metrics) = run(loss_fn, *pair, batch, key=KEY)
    assert metrics["soft"] > 1e-4
    with pytest.raises(ValueError, match="two students"):
        train.mutual([linear])
    with pytest.raises(ValueError, match="weight"):
        train.mutual([linear] * 2, weight=-1.0)


# Exits


def exits(params, model_state, x, *, key=None):
    hidden = jnp.tanh(x @ params["w"])
    return [hidden @ params["early"], hidden @ params["middle"], hidden @ params["late"]], model_state


def exit_params():
    names = {"w": (4, 4), "early": (4, 3), "middle": (4, 3), "late": (4, 3)}
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in names.items()}


def test_self_distillation_by_hand():
    params, batch, t, alpha = exit_params(), make_batch(), 3.0, 0.6
    loss_fn = train.self_distillation(exits, temperature=t, alpha=alpha)
    value, (_, metrics) = run(loss_fn, params, {}, batch, step=0)
    z = [np.asarray(zi, float) for zi in exits(params, {}, batch["image"])[0]]
    teacher = softmax(z[-1] / t)
    expected = hard(z[-1], batch)
    for zi in z[:-1]:
        soft = t**2 * mean(kl(teacher, softmax(zi / t)), batch)
        expected += alpha * hard(zi, batch) + (1 - alpha) * soft
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    wrong = mean(z[-1].argmax(-1) != np.asarray(batch["label"]), batch)
    np.testing.assert_allclose(metrics["errors"], wrong, rtol=1e-6)
    assert_same_in_parts(loss_fn, params, {}, batch)


def test_the_deepest_exit_learns_from_labels_alone():
    params, batch = exit_params(), make_batch()

    def gradient(**options):
        loss_fn = train.self_distillation(exits, **options)
        return gradient_of(lambda p: loss_fn(p, {}, batch, key=None, step=0)[0])(params)["late"]

    hard_alone = gradient_of(
        lambda p: train.weighted_mean(
            losses.cross_entropy(exits(p, {}, batch["image"])[0][-1], batch["label"]), batch
        )
    )(params)["late"]
    np.testing.assert_allclose(gradient(alpha=0.2), hard_alone, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="list of logits"):
        train.self_distillation(linear)(make_params(0), {}, batch, key=None, step=0)


# A running mean of oneself


def test_mean_teacher_by_hand():
    params, other, batch = make_params(1), make_params(2), make_batch()
    loss_fn = train.mean_teacher(linear, decay=0.9, weight=0.5)
    state = train.init_mean_teacher(other, {})
    value, (state, metrics) = run(loss_fn, params, state, batch, step=jnp.int32(3))
    mixed = 0.9 * np.asarray(other["w"], float) + 0.1 * np.asarray(params["w"], float)
    np.testing.assert_allclose(state["teacher"][0]["w"], mixed, rtol=1e-6)
    z, teacher = logits_of(params, batch), logits_of({"w": mixed}, batch)
    soft = mean(np.square(softmax(z) - softmax(teacher)).sum(-1), batch)
    np.testing.assert_allclose(metrics["soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(value, hard(z, batch) + 0.5 * soft, rtol=1e-5)


def test_the_mean_teacher_is_a_constant_to_the_student():
    params, batch = make_params(1), make_batch(weight=False)
    loss_fn = train.mean_teacher(linear, decay=0.5, soft=losses.kl)
    state = train.init_mean_teacher(make_params(2), {})
    gradient = gradient_of(lambda p: loss_fn(p, state, batch, key=None, step=0)[0])(params)["w"]
    x = np.asarray(batch["image"], float)
    mixed = (np.asarray(params["w"], float) + np.asarray(make_params(2)["w"], float)) / 2
    q, p = softmax(logits_of(params, batch)), softmax(logits_of({"w": mixed}, batch))
    y = np.eye(3)[np.asarray(batch["label"])]
    np.testing.assert_allclose(gradient, x.T @ (2 * q - y - p) / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_running_mean_has_its_closed_form_under_scan(accumulate):
    decay, steps = 0.8, 7
    loss_fn = train.mean_teacher(linear, decay=decay)
    tx = optax.sgd(0.3)
    step = train.make_train_step(loss_fn, tx, accumulate=accumulate)
    params = make_params(1)
    state = train.init_state(params, tx, KEY, train.init_mean_teacher(params, {}))
    batches = jax.tree.map(lambda x: jnp.stack([x] * steps), make_batch())

    def recorded(state, batch):
        new, _ = step(state, batch)
        return new, state.params["w"]

    state, history = jax.jit(lambda s: jax.lax.scan(recorded, s, batches))(state)
    history = np.asarray(history, float)  # θ₀ … θ₆, before each step
    expected = decay ** (steps - 1) * history[0]
    for t in range(1, steps):
        expected = expected + (1 - decay) * decay ** (steps - 1 - t) * history[t]
    np.testing.assert_allclose(state.model_state["teacher"][0]["w"], expected, rtol=1e-5)
    assert np.abs(history[-1] - history[0]).max() > 0.1


def test_a_schedule_of_the_decay_gives_the_plain_mean():
    loss_fn = train.mean_teacher(linear, decay=lambda t: jnp.minimum(0.99, t / (t + 1)))
    tx = optax.sgd(0.3)
    step = jax.jit(train.make_train_step(loss_fn, tx))
    params, history = make_params(1), []
    state = train.init_state(params, tx, KEY, train.init_mean_teacher(params, {}))
    for _ in range(5):
        history.append(np.asarray(state.params["w"]))
        state, _ = step(state, make_batch())
    teacher = state.model_state["teacher"][0]["w"]
    np.testing.assert_allclose(teacher, np.mean(history, 0), rtol=1e-5)


def test_mean_teacher_of_a_model_with_state():
    """BatchNorm's statistics are averaged too; bfloat16 parameters are averaged in float32."""
    net = ConvNet((8, 8, 1), 3, channels=(4,), batch_norm=True, dropout=0.5, rngs=nnx.Rngs(0))
    model = from_nnx(net)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    batch = make_batch(weight=False)
    batch["image"] = jax.random.normal(KEY, (12, 8, 8, 1))
    tx, loss_fn = optax.sgd(0.1), train.mean_teacher(model.apply_fn, decay=0.75)
    state = train.init_state(params, tx, KEY, train.init_mean_teacher(params, model.model_state))
    step = jax.jit(train.make_train_step(loss_fn, tx))
    one, _ = step(state, batch)
    two, metrics = step(one, batch)
    dtypes = {x.dtype for x in jax.tree.leaves(two.model_state["teacher"])}
    assert dtypes == {jnp.dtype("float32")}
    statistics = [s.model_state["student"]["norm"][0]["mean"] for s in (state, one)]
    expected = 0.75 * statistics[0] + 0.25 * statistics[1]
    teacher = two.model_state["teacher"][1]["norm"][0]["mean"]
    np.testing.assert_allclose(teacher, expected, rtol=1e-5)
    assert metrics["soft"] > 0
    with pytest.raises(ValueError, match="decay"):
        train.mean_teacher(linear, decay=1.5)
    with pytest.raises(ValueError, match="weight"):
        train.mean_teacher(linear, weight=-0.5)


def test_mean_teacher_in_parts():
    params = make_params(1)
    state = train.init_mean_teacher(make_params(2), {})
    assert_same_in_parts(train.mean_teacher(linear), params, state, make_batch())


# Chains


def test_a_chain_of_assistants_distils_step_by_step():
    batch, tx = make_batch(), optax.adam(0.1)
    label = teachers.make_label(linear)

    def distil(teacher, params):
        loss_fn = train.supervised(linear)
        data = batch
        if teacher is not None:
            loss_fn = train.distill(linear, temperature=1.0, alpha=0.0)
            data = label((teacher, {}), batch)
        steps = 300 if teacher is not None else 10
        many = jax.tree.map(lambda x: jnp.stack([x] * steps), data)
        step, state = train.make_train_step(loss_fn, tx), train.init_state(params, tx, KEY)
        return jax.jit(lambda s: jax.lax.scan(step, s, many)[0])(state).params

    trained = train.chain([make_params(seed) for seed in (1, 2, 3)], distil)
    assert len(trained) == 3
    # Nothing but the teacher's logits reached the last one, and they are the first one's
    before, after = (
        np.abs(softmax(logits_of(p, batch)) - softmax(logits_of(trained[0], batch)))[
            np.asarray(batch["weight"]) > 0
        ].max()
        for p in (make_params(3), trained[2])
    )
    assert after < 0.2 * before

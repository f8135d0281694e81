"""Objectives without a separate teacher, against losses written out in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import assert_same_in_parts, hard, kl, logits_of, mean, softmax
from flax import nnx

from distill_jax import losses, train
from distill_jax.models import ConvNet, from_function, from_nnx, side_by_side

KEY = jax.random.key(0)


def product(params, x):
    return x @ params["w"]


def linear(seed):
    w = np.random.default_rng(seed).normal(size=(4, 3))
    return from_function(product, {"w": jnp.asarray(w, jnp.float32)})


def make_batch(n=12, inputs=4, classes=3, seed=0, weight=True):
    rng = np.random.default_rng(seed)
    batch = {
        "image": jnp.asarray(rng.normal(size=(n, inputs)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, classes, n), jnp.int32),
    }
    if weight:
        batch["weight"] = jnp.asarray(rng.integers(0, 3, n), jnp.float32)
    return batch


def run(loss_fn, model, batch, *, key=None, step=0):
    return jax.jit(loss_fn)(model, batch, key=key, step=step)


def gradient_of(function):
    return jax.jit(jax.grad(function))


# Peers


def test_mutual_learning_by_hand():
    students = [linear(seed) for seed in (1, 2, 3)]
    batch = make_batch()
    loss_fn = train.mutual(weight=0.7, temperature=2.0)
    value, (_, metrics) = run(loss_fn, side_by_side(*students), batch)
    z = [logits_of(student, batch) for student in students]
    expected = sum(hard(zk, batch) for zk in z)
    for k in range(3):
        for other in range(3):
            if other != k:
                p, q = softmax(z[other] / 2), softmax(z[k] / 2)
                expected += 0.7 / 2 * 4 * mean(kl(p, q), batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["hard"], np.mean([hard(zk, batch) for zk in z]), rtol=1e-5)
    assert_same_in_parts(loss_fn, side_by_side(*students), batch)


def test_mutual_learning_is_symmetric_in_the_students():
    students, batch = [linear(seed) for seed in (1, 2, 3)], make_batch()
    gradient = gradient_of(lambda model: train.mutual()(model, batch, key=None, step=0)[0])
    order = (2, 0, 1)
    permuted = gradient(side_by_side(*(students[i] for i in order))).params
    straight = gradient(side_by_side(*students)).params
    chex.assert_trees_all_close(permuted, tuple(straight[i] for i in order), rtol=1e-5, atol=1e-6)


def test_what_peers_predict_is_a_constant():
    """Each student's gradient is T(q − p) of its own loss, not that of its peers' losses."""
    students, batch = (linear(1), linear(2)), make_batch(weight=False)
    gradient = gradient_of(lambda model: train.mutual()(model, batch, key=None, step=0)[0])
    gradients = gradient(side_by_side(*students)).params
    x = np.asarray(batch["image"], float)
    q, p = (softmax(logits_of(student, batch)) for student in students)
    y = np.eye(3)[np.asarray(batch["label"])]
    expected = x.T @ ((q - y) + (q - p)) / len(x)
    np.testing.assert_allclose(gradients[0]["w"], expected, rtol=1e-4, atol=1e-6)


def test_equal_peers_teach_nothing_and_draw_dropout_apart():
    model = from_nnx(ConvNet((8, 8, 1), 3, channels=(4,), dropout=0.5, rngs=nnx.Rngs(0)))
    batch = make_batch() | {"image": jnp.ones((12, 8, 8, 1))}
    pair, loss_fn = side_by_side(model, model), train.mutual()
    _, (_, metrics) = run(loss_fn, pair, batch)
    np.testing.assert_allclose(metrics["soft"], 0, atol=1e-7)
    _, (_, metrics) = run(loss_fn, pair, batch, key=KEY)
    assert metrics["soft"] > 1e-4
    for single in (side_by_side(linear(1)), linear(1)):
        with pytest.raises(
            ValueError, match=r"mutual needs .* at least two arrays of logits, one per student"
        ):
            loss_fn(single, make_batch(), key=None, step=0)
    with pytest.raises(ValueError, match="weight"):
        train.mutual(weight=-1.0)


def test_peers_keep_their_states_apart():
    """Two networks with BatchNorm: each has the statistics that it would have alone."""
    peers = [
        from_nnx(ConvNet((8, 8, 1), 3, channels=(n,), batch_norm=True, rngs=nnx.Rngs(n))) for n in (2, 3)
    ]
    batch = make_batch() | {"image": jax.random.normal(KEY, (12, 8, 8, 1))}
    _, (states, _) = run(train.mutual(), side_by_side(*peers), batch, key=KEY)
    for peer, state in zip(peers, states, strict=True):
        expected = jax.jit(lambda peer: peer.apply(batch["image"], key=KEY)[1])(peer)
        chex.assert_trees_all_close(state, expected, rtol=1e-5, atol=1e-6)


# Exits


def exits(params, x):
    hidden = jnp.tanh(x @ params["w"])
    return [hidden @ params["early"], hidden @ params["middle"], hidden @ params["late"]]


def model_with_exits():
    names = {"w": (4, 4), "early": (4, 3), "middle": (4, 3), "late": (4, 3)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in names.items()}
    return from_function(exits, params)


def test_self_distillation_by_hand():
    model, batch, t, alpha = model_with_exits(), make_batch(), 3.0, 0.6
    loss_fn = train.self_distillation(temperature=t, alpha=alpha)
    value, (_, metrics) = run(loss_fn, model, batch)
    z = [np.asarray(zi, float) for zi in model(batch["image"])]
    teacher = softmax(z[-1] / t)
    expected = hard(z[-1], batch)
    for zi in z[:-1]:
        soft = t**2 * mean(kl(teacher, softmax(zi / t)), batch)
        expected += alpha * hard(zi, batch) + (1 - alpha) * soft
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    wrong = mean(z[-1].argmax(-1) != np.asarray(batch["label"]), batch)
    np.testing.assert_allclose(metrics["error_rate"], wrong, rtol=1e-6)
    assert_same_in_parts(loss_fn, model, batch)


def test_the_deepest_exit_learns_from_labels_alone():
    model, batch = model_with_exits(), make_batch()

    def gradient(**options):
        loss_fn = train.self_distillation(**options)
        return gradient_of(lambda m: loss_fn(m, batch, key=None, step=0)[0])(model).params["late"]

    hard_alone = gradient_of(
        lambda m: train.weighted_mean(losses.cross_entropy(m(batch["image"])[-1], batch["label"]), batch)
    )(model).params["late"]
    np.testing.assert_allclose(gradient(alpha=0.2), hard_alone, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="list of at least two arrays of logits, one per exit"):
        train.self_distillation()(linear(0), batch, key=None, step=0)


# A running mean of oneself


def with_teacher(student, teacher):
    """A student in training whose mean teacher is another model at first."""
    model = train.attach_mean_teacher(student)
    return model.replace(state=train.attach_mean_teacher(teacher).state)


def test_mean_teacher_by_hand():
    model, other, batch = linear(1), linear(2), make_batch()
    loss_fn = train.mean_teacher(decay=0.9, weight=0.5)
    both = with_teacher(model, other)
    value, (state, metrics) = run(loss_fn, both, batch, step=jnp.int32(3))
    mixed = 0.9 * np.asarray(other.params["w"], float) + 0.1 * np.asarray(model.params["w"], float)
    student, averaged = train.detach_mean_teacher(both.replace(state=state))
    chex.assert_trees_all_equal(student, model)
    np.testing.assert_allclose(averaged.params["w"], mixed, rtol=1e-6)
    z, teacher = logits_of(model, batch), logits_of(averaged.replace(params={"w": mixed}), batch)
    soft = mean(np.square(softmax(z) - softmax(teacher)).sum(-1), batch)
    np.testing.assert_allclose(metrics["soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(value, hard(z, batch) + 0.5 * soft, rtol=1e-5)


def test_the_mean_teacher_is_a_constant_to_the_student():
    model, other, batch = linear(1), linear(2), make_batch(weight=False)
    loss_fn = train.mean_teacher(decay=0.5, soft=losses.kl)
    both = with_teacher(model, other)
    gradient = gradient_of(lambda p: loss_fn(both.replace(params=p), batch, key=None, step=0)[0])
    gradient = gradient(both.params)["w"]
    x = np.asarray(batch["image"], float)
    mixed = (np.asarray(model.params["w"], float) + np.asarray(other.params["w"], float)) / 2
    q, p = softmax(logits_of(model, batch)), softmax(logits_of(model.replace(params={"w": mixed}), batch))
    y = np.eye(3)[np.asarray(batch["label"])]
    np.testing.assert_allclose(gradient, x.T @ (2 * q - y - p) / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_running_mean_has_its_closed_form_under_scan(accumulate):
    decay, steps = 0.8, 7
    loss_fn = train.mean_teacher(decay=decay)
    tx = optax.sgd(0.3)
    step = train.make_train_step(loss_fn, tx, accumulate=accumulate)
    state = train.init_state(train.attach_mean_teacher(linear(1)), tx, KEY)
    batches = jax.tree.map(lambda x: jnp.stack([x] * steps), make_batch())

    def recorded(state, batch):
        new, _ = step(state, batch)
        return new, state.model.params["w"]

    state, history = jax.jit(lambda s: jax.lax.scan(recorded, s, batches))(state)
    history = np.asarray(history, float)  # θ₀ … θ₆, before each step
    expected = decay ** (steps - 1) * history[0]
    for t in range(1, steps):
        expected = expected + (1 - decay) * decay ** (steps - 1 - t) * history[t]
    _, teacher = train.detach_mean_teacher(state.model)
    np.testing.assert_allclose(teacher.params["w"], expected, rtol=1e-5)
    assert np.abs(history[-1] - history[0]).max() > 0.1


def test_a_schedule_of_the_decay_gives_the_plain_mean():
    loss_fn = train.mean_teacher(decay=lambda t: jnp.minimum(0.99, t / (t + 1)))
    tx = optax.sgd(0.3)
    step = jax.jit(train.make_train_step(loss_fn, tx))
    history: list[np.ndarray] = []
    state = train.init_state(train.attach_mean_teacher(linear(1)), tx, KEY)
    for _ in range(5):
        history.append(np.asarray(state.model.params["w"]))
        state, _ = step(state, make_batch())
    _, teacher = train.detach_mean_teacher(state.model)
    np.testing.assert_allclose(teacher.params["w"], np.mean(history, 0), rtol=1e-5)


def test_mean_teacher_of_a_model_with_state():
    """BatchNorm's statistics are averaged too; bfloat16 parameters are averaged in float32."""
    net = ConvNet((8, 8, 1), 3, channels=(4,), batch_norm=True, dropout=0.5, rngs=nnx.Rngs(0))
    model = from_nnx(net)
    model = model.replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params))
    batch = make_batch(weight=False)
    batch["image"] = jax.random.normal(KEY, (12, 8, 8, 1))
    tx, loss_fn = optax.sgd(0.1), train.mean_teacher(decay=0.75)
    state = train.init_state(train.attach_mean_teacher(model), tx, KEY)
    step = jax.jit(train.make_train_step(loss_fn, tx))
    one, _ = step(state, batch)
    two, metrics = step(one, batch)
    student, teacher = train.detach_mean_teacher(two.model)
    assert {x.dtype for x in jax.tree.leaves(teacher)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal_structs(student, model)
    statistics = [train.detach_mean_teacher(s.model)[0].state["norm"][0]["mean"] for s in (state, one)]
    expected = 0.75 * statistics[0] + 0.25 * statistics[1]
    np.testing.assert_allclose(teacher.state["norm"][0]["mean"], expected, rtol=1e-5)
    # In evaluation the model in training is the student
    np.testing.assert_array_equal(two.model(batch["image"]), student(batch["image"]))
    assert metrics["soft"] > 0
    with pytest.raises(ValueError, match="decay"):
        train.mean_teacher(decay=1.5)
    with pytest.raises(ValueError, match="weight"):
        train.mean_teacher(weight=-0.5)
    for call in (train.detach_mean_teacher, lambda m: loss_fn(m, batch, key=None, step=0)):
        with pytest.raises(ValueError, match=r"^expected a model from attach_mean_teacher, got another one$"):
            call(model)


def test_mean_teacher_in_parts():
    assert_same_in_parts(train.mean_teacher(), with_teacher(linear(1), linear(2)), make_batch())


def test_the_mean_teacher_may_see_another_view():
    model, batch = with_teacher(linear(1), linear(2)), make_batch()
    batch["weak"] = batch["image"][::-1]
    loss_fn = train.mean_teacher(decay=1.0, weight=1.0, teacher_input="weak")
    _, (_, metrics) = run(loss_fn, model, batch)
    z, teacher = logits_of(linear(1), batch), logits_of(linear(2), {"image": batch["weak"]})
    soft = mean(np.square(softmax(z) - softmax(teacher)).sum(-1), batch)
    np.testing.assert_allclose(metrics["soft"], soft, rtol=1e-5)

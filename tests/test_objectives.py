"""Distillation of features: what is trained, from what, and what is left at the end."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import features, losses, teachers, train
from distill_jax.features.capturing import capture, layer_shapes
from distill_jax.features.matching import match_layers
from distill_jax.models import MLP, ConvNet, from_nnx

KEY = jax.random.key(0)
PAIRS = [("convolution.0", "convolution.0"), ("convolution.1", "convolution.1")]


def init_projector(key, student_shapes, teacher_shapes):
    keys = jax.random.split(key, len(student_shapes))
    return [
        jax.random.normal(k, (s[-1], t[-1])) / s[-1] ** 0.5
        for k, s, t in zip(keys, student_shapes, teacher_shapes, strict=True)
    ]


def apply_projector(params, ours, theirs, *, labels=None, where=None, key=None):
    values = [
        jnp.square(s @ w - t).mean(range(1, t.ndim)) for w, s, t in zip(params, ours, theirs, strict=True)
    ]
    return sum(values)


PROJECTOR = features.Learned(init_projector, apply_projector)


def models(**options):
    student = ConvNet((8, 8, 1), 3, channels=(4, 4), hidden=8, rngs=nnx.Rngs(0), **options)
    teacher = ConvNet((8, 8, 1), 3, channels=(6, 8), hidden=8, dropout=0.5, rngs=nnx.Rngs(1))
    return from_nnx(student), from_nnx(teacher)


def make_batch(n=12, weight=True):
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(n, 8, 8, 1)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, n), jnp.int32),
    }
    if weight:
        batch["weight"] = jnp.asarray(rng.integers(0, 3, n), jnp.float32)
    return batch


def setup(learned=PROJECTOR, pairs=PAIRS, batch=None, **options):
    student, teacher = models()
    batch = batch or make_batch()
    label = teachers.make_label(capture(teacher.apply_fn, [b for _, b in PAIRS]))
    batch = jax.jit(label)((teacher.params, teacher.model_state), batch)
    params = train.init_learned(
        KEY,
        student.params,
        features,
        pairs=pairs,
        student_shapes=layer_shapes(*student, batch["image"]),
        teacher_shapes=batch["teacher"]["features"],
    )
    captured = capture(student.apply_fn, [a for a, _ in PAIRS])
    loss_fn = train.distill_features(captured, features, pairs=pairs, **options)
    return student, batch, params, loss_fn


def average(values, batch):
    return np.average(np.asarray(values, float), weights=np.asarray(batch["weight"], float))


def test_the_loss_by_hand():
    student, batch, params, loss_fn = setup(hard_weight=0.5, soft_weight=0.25, temperature=3.0)
    value, (_, metrics) = jax.jit(loss_fn)(params, {}, batch, key=None, step=0)
    captured = capture(student.apply_fn, "convolution.*")
    (logits, ours), _ = captured(params["student"], student.model_state, batch["image"])
    feature = sum(
        np.square(
            np.asarray(ours[a], float) @ np.asarray(w, float)
            - np.asarray(batch["teacher"]["features"][b], float)
        ).mean((1, 2, 3))
        for (a, b), w in zip(PAIRS, params["learned"][0], strict=True)
    )
    hard = average(losses.cross_entropy(logits, batch["label"]), batch)
    soft = average(losses.kl(logits, batch["teacher"]["logits"], temperature=3.0), batch)
    np.testing.assert_allclose(metrics["feature"], average(feature, batch), rtol=1e-5)
    expected = 0.5 * hard + 0.25 * soft + average(feature, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(metrics) == {"feature", "hard", "soft", "errors"}


def test_several_losses_with_weights_and_layers_of_their_own():
    both = [(2.0, PROJECTOR), (optax.linear_schedule(0.0, 1.0, 10), PROJECTOR, PAIRS[1:])]
    _, batch, params, loss_fn = setup(both, hard_weight=0.0)
    assert [len(part) for part in params["learned"]] == [2, 1]
    value, (_, metrics) = jax.jit(loss_fn)(params, {}, batch, key=None, step=jnp.int32(5))
    expected = 2 * metrics["feature_0"] + 0.5 * metrics["feature_1"]
    np.testing.assert_allclose([metrics["feature"], value], expected, rtol=1e-6)
    assert "hard" not in metrics and "soft" not in metrics  # noqa: PT018


def test_losses_between_examples_do_not_see_those_of_weight_zero():
    student, batch, *_ = setup()
    counts = np.asarray(batch["weight"]) > 0
    assert 0 < counts.sum() < len(counts)
    batch = {**batch, "weight": counts.astype(np.float32)}
    small = jax.tree.map(lambda x: x[counts], {k: v for k, v in batch.items() if k != "weight"})
    loss_fn = train.distill(student.apply_fn, soft=losses.dist, alpha=0.0)
    values = [loss_fn(student.params, student.model_state, b, key=None, step=0)[0] for b in (batch, small)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_student_its_pytree():
    student, batch, params, loss_fn = setup(soft_weight=1.0)
    tx = optax.adam(1e-2)
    step = jax.jit(train.make_train_step(loss_fn, tx))
    state = train.init_state(params, tx, KEY, student.model_state)
    values = []
    for _ in range(25):
        state, metrics = step(state, batch)
        values.append(float(metrics["feature"]))
    assert values[-1] < 0.5 * values[0]
    moved = jnp.abs(state.params["learned"][0][0] - params["learned"][0][0]).max()
    assert moved > 1e-3
    dropped = train.drop_learned(state.params)
    chex.assert_trees_all_equal_structs(dropped, student.params)
    chex.assert_trees_all_equal_shapes_and_dtypes(dropped, student.params)
    logits, _ = student.apply_fn(dropped, {}, batch["image"])
    again, _ = train.student_of(student.apply_fn)(state.params, {}, batch["image"])
    np.testing.assert_array_equal(logits, again)


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_equals_the_whole_batch(weighted):
    _, batch, params, loss_fn = setup([(0.3, PROJECTOR)], batch=make_batch(weight=weighted), soft_weight=1.0)
    tx = optax.sgd(0.1)
    state = train.init_state(params, tx, KEY)
    whole, metrics = jax.jit(train.make_train_step(loss_fn, tx))(state, batch)
    for options in ({}, {"accumulate_axis": "parts"}):
        step = jax.jit(train.make_train_step(loss_fn, tx, accumulate=3, **options))
        parts, in_parts = step(state, batch)
        chex.assert_trees_all_close((whole.params, metrics), (parts.params, in_parts), rtol=1e-4)


def test_nothing_of_the_teacher_is_differentiated_and_its_mode_is_evaluation():
    _, teacher = models()
    batch = make_batch()
    label = teachers.make_label(capture(teacher.apply_fn, "hidden"))

    def total(params):
        labelled = label((params, teacher.model_state), batch)["teacher"]
        return sum(x.sum() for x in jax.tree.leaves(labelled))

    gradient = jax.grad(total)(teacher.params)
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))
    labelled = label((teacher.params, teacher.model_state), batch)["teacher"]
    logits, _ = teacher.apply_fn(teacher.params, teacher.model_state, batch["image"])
    np.testing.assert_array_equal(labelled["logits"], logits)
    # The plain objective reads the logits of such a batch, too
    plain = train.distill(teacher.apply_fn)
    with_dict, _ = jax.jit(plain)(teacher.params, {}, {**batch, "teacher": labelled}, key=None, step=0)
    with_array, _ = jax.jit(plain)(teacher.params, {}, {**batch, "teacher": logits}, key=None, step=0)
    np.testing.assert_array_equal(with_dict, with_array)


def test_feature_losses_are_told_labels_and_which_examples_count():
    seen = {}

    def apply(params, ours, theirs, *, labels=None, where=None, key=None):
        seen.update(labels=labels, where=where)
        return jnp.where(where, ours[0].mean((1, 2, 3)), jnp.nan)

    part = features.Learned(lambda key, s, t: {}, apply)
    _, batch, params, loss_fn = setup(part, hard_weight=0.0)
    value, _ = loss_fn(params, {}, batch, key=None, step=0)
    np.testing.assert_array_equal(seen["where"], batch["weight"] > 0)
    np.testing.assert_array_equal(seen["labels"], batch["label"])
    assert jnp.isfinite(value)


def test_layers_may_be_matched_between_unequal_networks():
    student, teacher = models()[0], from_nnx(MLP((64, 16, 3), rngs=nnx.Rngs(2)))
    batch = make_batch()
    shapes = layer_shapes(*student, batch["image"]), layer_shapes(*teacher, batch["image"])
    pairs = match_layers(*shapes)
    assert len(pairs) == 1
    label = teachers.make_label(capture(teacher.apply_fn, [b for _, b in pairs]))
    batch = jax.jit(label)((teacher.params, teacher.model_state), batch)
    params = train.init_learned(
        KEY, student.params, PROJECTOR, pairs=pairs,
        student_shapes=shapes[0], teacher_shapes=shapes[1],
    )  # fmt: skip
    loss_fn = train.distill_features(capture(student.apply_fn, [a for a, _ in pairs]), PROJECTOR, pairs=pairs)
    assert jnp.isfinite(loss_fn(params, {}, batch, key=KEY, step=0)[0])


def test_errors_say_what_is_missing():
    student, batch, params, loss_fn = setup()
    uncaptured = train.distill_features(student.apply_fn, PROJECTOR, pairs=PAIRS)
    with pytest.raises(ValueError, match=r"capture\(apply_fn"):
        uncaptured(params, {}, batch, key=None, step=0)
    logits = batch["teacher"]["logits"]
    with pytest.raises(ValueError, match="no 'features'"):
        loss_fn(params, {}, {**batch, "teacher": logits}, key=None, step=0)
    with pytest.raises(ValueError, match="no 'teacher' logits"):
        loss_fn(params, {}, make_batch(), key=None, step=0)
    with pytest.raises(ValueError, match=r"teacher gives no value named 'nope'"):
        setup(pairs=[("convolution.0", "nope")])
    with pytest.raises(ValueError, match="pair of layers"):
        train.distill_features(student.apply_fn, PROJECTOR, pairs=[])
    with pytest.raises(ValueError, match="soft_weight"):
        train.distill_features(student.apply_fn, PROJECTOR, pairs=PAIRS, soft_weight=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        train.distill_features(student.apply_fn, PROJECTOR, pairs=PAIRS, temperature=0.0)

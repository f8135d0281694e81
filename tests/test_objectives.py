"""Objectives with teachers: features and what is trained beside the student; several teachers at once."""

import glob

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import assert_same_in_parts, hard, kl, logits_of, mean, softmax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from distill_jax import features, losses, teachers, train
from distill_jax.features.capturing import capture, layer_shapes
from distill_jax.features.matching import match_layers
from distill_jax.models import MLP, ConvNet, from_function, from_nnx

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
    """Student, labelled batch, the model in training, and its objective."""
    student, teacher = models()
    batch = batch or make_batch()
    batch = jax.jit(teachers.label)(capture(teacher, [b for _, b in PAIRS]), batch)
    model = train.attach_learned(
        KEY,
        student,
        learned,
        pairs=pairs,
        student_shapes=layer_shapes(student, batch["image"]),
        teacher_shapes=batch["teacher"]["features"],
    )
    return student, batch, model, train.distill_features(learned, pairs=pairs, **options)


def evaluated(loss_fn, model, batch, *, key=None, step=0):
    return jax.jit(loss_fn)(model, batch, key=key, step=step)


def average(values, batch):
    return np.average(np.asarray(values, float), weights=np.asarray(batch["weight"], float))


def test_the_loss_by_hand():
    student, batch, model, loss_fn = setup(hard_weight=0.5, soft_weight=0.25, temperature=3.0)
    value, (_, metrics) = evaluated(loss_fn, model, batch)
    logits, ours = capture(student, "convolution.*")(batch["image"])
    feature = sum(
        np.square(
            np.asarray(ours[a], float) @ np.asarray(w, float)
            - np.asarray(batch["teacher"]["features"][b], float)
        ).mean((1, 2, 3))
        for (a, b), w in zip(PAIRS, model.params["learned"][0], strict=True)
    )
    hard = average(losses.cross_entropy(logits, batch["label"]), batch)
    soft = average(losses.kl(logits, batch["teacher"]["logits"], temperature=3.0), batch)
    np.testing.assert_allclose(metrics["feature"], average(feature, batch), rtol=1e-5)
    expected = 0.5 * hard + 0.25 * soft + average(feature, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert set(metrics) == {"feature", "hard", "soft", "error_rate"}


def test_several_losses_with_weights_and_layers_of_their_own():
    both = [(2.0, PROJECTOR), (optax.linear_schedule(0.0, 1.0, 10), PROJECTOR, PAIRS[1:])]
    _, batch, model, loss_fn = setup(both, hard_weight=0.0)
    assert [len(part) for part in model.params["learned"]] == [2, 1]
    value, (_, metrics) = evaluated(loss_fn, model, batch, step=jnp.int32(5))
    expected = 2 * metrics["feature_0"] + 0.5 * metrics["feature_1"]
    np.testing.assert_allclose([metrics["feature"], value], expected, rtol=1e-6)
    assert "hard" not in metrics and "soft" not in metrics  # noqa: PT018


def test_losses_between_examples_do_not_see_those_of_weight_zero():
    student, batch, *_ = setup()
    counts = np.asarray(batch["weight"]) > 0
    assert 0 < counts.sum() < len(counts)
    batch = {**batch, "weight": counts.astype(np.float32)}
    small = jax.tree.map(lambda x: x[counts], {k: v for k, v in batch.items() if k != "weight"})
    loss_fn = train.distill(soft=losses.dist, alpha=0.0)
    values = [loss_fn(student, b, key=None, step=0)[0] for b in (batch, small)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_training_lowers_the_loss_and_leaves_the_student_its_pytree():
    student, batch, model, loss_fn = setup(soft_weight=1.0)
    tx = optax.adam(1e-2)
    step = jax.jit(train.make_train_step(loss_fn, tx))
    state = train.init_state(model, tx, KEY)
    values = []
    for _ in range(25):
        state, metrics = step(state, batch)
        values.append(float(metrics["feature"]))
    assert values[-1] < 0.5 * values[0]
    moved = jnp.abs(state.model.params["learned"][0][0] - model.params["learned"][0][0]).max()
    assert moved > 1e-3
    trained = train.detach_learned(state.model)
    chex.assert_trees_all_equal_structs(trained, student)  # the function, too
    chex.assert_trees_all_equal_shapes_and_dtypes(trained.params, student.params)
    assert (trained.params["convolution"][0]["kernel"] != student.params["convolution"][0]["kernel"]).any()
    np.testing.assert_array_equal(trained(batch["image"]), state.model(batch["image"]))


def test_a_student_with_state_keeps_it():
    """BatchNorm's statistics move in training, and go back with the student."""
    student, teacher = models(batch_norm=True)
    batch = jax.jit(teachers.label)(capture(teacher, "convolution.*"), make_batch(weight=False))
    shapes = layer_shapes(student, batch["image"]), batch["teacher"]["features"]
    model = train.attach_learned(
        KEY, student, PROJECTOR, pairs=PAIRS, student_shapes=shapes[0], teacher_shapes=shapes[1]
    )
    tx = optax.sgd(0.1)
    step = jax.jit(train.make_train_step(train.distill_features(PROJECTOR, pairs=PAIRS), tx))
    state, _ = step(train.init_state(model, tx, KEY), batch)
    trained = train.detach_learned(state.model)
    chex.assert_trees_all_equal_structs(trained, student)
    assert (trained.state["norm"][0]["mean"] != student.state["norm"][0]["mean"]).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_equals_the_whole_batch(weighted):
    _, batch, model, loss_fn = setup([(0.3, PROJECTOR)], batch=make_batch(weight=weighted), soft_weight=1.0)
    tx = optax.sgd(0.1)
    state = train.init_state(model, tx, KEY)
    whole, metrics = jax.jit(train.make_train_step(loss_fn, tx))(state, batch)
    parts, in_parts = jax.jit(train.make_train_step(loss_fn, tx, accumulate=3))(state, batch)
    chex.assert_trees_all_close((whole.model, metrics), (parts.model, in_parts), rtol=1e-4)


def test_nothing_of_the_teacher_is_differentiated_and_its_mode_is_evaluation():
    _, teacher = models()
    batch = make_batch()
    captured = capture(teacher, "hidden")

    def total(params):
        labelled = teachers.label(captured.replace(params=params), batch)["teacher"]
        return sum(x.sum() for x in jax.tree.leaves(labelled))

    gradient = jax.grad(total)(teacher.params)
    assert all((g == 0).all() for g in jax.tree.leaves(gradient))
    labelled = teachers.label(captured, batch)["teacher"]
    logits = teacher(batch["image"])
    np.testing.assert_array_equal(labelled["logits"], logits)
    assert list(labelled["features"]) == ["hidden"]
    # The plain objective reads the logits of such a batch, too
    plain = train.distill()
    with_dict, _ = evaluated(plain, teacher, {**batch, "teacher": labelled})
    with_array, _ = evaluated(plain, teacher, {**batch, "teacher": logits})
    np.testing.assert_array_equal(with_dict, with_array)


def test_feature_losses_are_told_labels_and_which_examples_count():
    seen = {}

    def apply(params, ours, theirs, *, labels=None, where=None, key=None):
        seen.update(labels=labels, where=where)
        return jnp.where(where, ours[0].mean((1, 2, 3)), jnp.nan)

    part = features.Learned(lambda key, s, t: {}, apply)
    _, batch, model, loss_fn = setup(part, hard_weight=0.0)
    value, _ = loss_fn(model, batch, key=None, step=0)
    np.testing.assert_array_equal(seen["where"], batch["weight"] > 0)
    np.testing.assert_array_equal(seen["labels"], batch["label"])
    assert jnp.isfinite(value)


def test_layers_may_be_matched_between_unequal_networks():
    student, teacher = models()[0], from_nnx(MLP((64, 16, 3), rngs=nnx.Rngs(2)))
    batch = make_batch()
    shapes = layer_shapes(student, batch["image"]), layer_shapes(teacher, batch["image"])
    pairs = match_layers(*shapes)
    assert len(pairs) == 1
    batch = jax.jit(teachers.label)(capture(teacher, [b for _, b in pairs]), batch)
    model = train.attach_learned(
        KEY, student, PROJECTOR, pairs=pairs, student_shapes=shapes[0], teacher_shapes=shapes[1]
    )
    loss_fn = train.distill_features(PROJECTOR, pairs=pairs)
    assert jnp.isfinite(loss_fn(model, batch, key=KEY, step=0)[0])


def test_outputs_are_a_layer_too():
    """A feature loss between the outputs needs no captured teacher; "outputs" is the name of its layer."""
    seen = {}

    def init(key, student_shapes, teacher_shapes):
        seen.update(shapes=(student_shapes, teacher_shapes))
        return {}

    def apply(params, ours, theirs, *, labels=None, where=None, key=None):
        return jnp.square(ours[0] - theirs[0]).mean(-1)

    student, teacher = models()
    part, pairs = features.Learned(init, apply), [("outputs", "outputs")]
    batch = teachers.label(teacher, make_batch())
    shapes = {"outputs": batch["teacher"]}
    model = train.attach_learned(
        KEY, student, part, pairs=pairs, student_shapes=shapes, teacher_shapes=shapes
    )
    assert seen["shapes"] == ([(12, 3)], [(12, 3)])
    loss_fn = train.distill_features(part, pairs=pairs, hard_weight=0.0)
    value, (_, metrics) = evaluated(loss_fn, model, batch)
    expected = average(np.square(student(batch["image"]) - batch["teacher"]).mean(-1), batch)
    np.testing.assert_allclose([value, metrics["feature"]], expected, rtol=1e-5)


def test_a_name_is_no_pattern():
    """A layer whose name has brackets is found by its name."""

    def fn(params, x):
        return checkpoint_name(x @ params, "layer[0]") * 2

    model = from_function(fn, jnp.eye(3))
    captured = capture(model, glob.escape("layer[0]"))
    batch = teachers.label(captured, {"image": jnp.ones((2, 3)), "label": jnp.zeros(2, jnp.int32)})
    part = features.Learned(lambda *shapes: {}, lambda params, s, t, **_: jnp.square(s[0] - t[0]).mean(-1))
    pairs = [("layer[0]", "layer[0]")]
    shapes = layer_shapes(model, batch["image"])
    student = model.replace(params=2 * jnp.eye(3))
    attached = train.attach_learned(
        KEY, student, part, pairs=pairs, student_shapes=shapes, teacher_shapes=shapes
    )
    loss_fn = train.distill_features(part, pairs=pairs, hard_weight=0.0)
    assert loss_fn(attached, batch, key=None, step=0)[0] == 1


def test_errors_say_what_is_missing():
    student, batch, model, loss_fn = setup()
    logits = batch["teacher"]["logits"]
    with pytest.raises(ValueError, match=r"no 'features'.*features.capture"):
        loss_fn(model, {**batch, "teacher": logits}, key=None, step=0)
    with pytest.raises(ValueError, match="no 'teacher' logits"):
        loss_fn(model, make_batch(), key=None, step=0)
    with pytest.raises(ValueError, match=r"teacher has no value named 'nope', only convolution.0, conv"):
        setup(pairs=[("convolution.0", "nope")])
    with pytest.raises(ValueError, match=r"student has no value named 'nope'"):
        setup(pairs=[("nope", "convolution.0")])
    absent = train.distill_features(PROJECTOR, pairs=[("nope", "convolution.0")])
    with pytest.raises(ValueError, match=r"no value is named 'nope'\. Named are: convolution\.0"):
        absent(model, batch, key=None, step=0)
    with pytest.raises(ValueError, match="pair of layers"):
        train.distill_features(PROJECTOR, pairs=[])
    with pytest.raises(ValueError, match="soft_weight"):
        train.distill_features(PROJECTOR, pairs=PAIRS, soft_weight=-1.0)
    with pytest.raises(ValueError, match="temperature"):
        train.distill_features(PROJECTOR, pairs=PAIRS, temperature=0.0)
    for wrong in (student, models()[1]):
        with pytest.raises(ValueError, match=r"^expected a model from attach_learned, got another one$"):
            train.detach_learned(wrong)
        with pytest.raises(ValueError, match=r"^distill_features needs a model from attach_learned"):
            loss_fn(wrong, batch, key=None, step=0)


# Several teachers


def product(params, x):
    return x @ params["w"]


def linear(seed):
    w = np.random.default_rng(seed).normal(size=(4, 3))
    return from_function(product, {"w": jnp.asarray(w, jnp.float32)})


def linear_batch(weight=True):
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.normal(size=(12, 4)), jnp.float32),
        "label": jnp.asarray(rng.integers(0, 3, 12), jnp.int32),
    }
    if weight:
        batch["weight"] = jnp.asarray(rng.integers(0, 3, 12), jnp.float32)
    return batch


def of_two_teachers(batch):
    return teachers.label_each([linear(2), linear(3)], batch)


def test_each_teacher_by_hand():
    model, batch = linear(1), of_two_teachers(linear_batch())
    t, alpha, weights = 3.0, 0.3, (0.25, 1.5)
    loss_fn = train.distill_each(weights=weights, temperature=t, alpha=alpha)
    loss, (_, metrics) = evaluated(loss_fn, model, batch)
    z = logits_of(model, batch)
    softs = [t**2 * mean(kl(softmax(logits_of(linear(s), batch) / t), softmax(z / t)), batch) for s in (2, 3)]
    soft = weights[0] * softs[0] + weights[1] * softs[1]
    np.testing.assert_allclose([metrics["soft_0"], metrics["soft_1"]], softs, rtol=1e-5)
    np.testing.assert_allclose(metrics["soft"], soft, rtol=1e-5)
    np.testing.assert_allclose(metrics["hard"], hard(z, batch), rtol=1e-5)
    np.testing.assert_allclose(loss, alpha * hard(z, batch) + (1 - alpha) * soft, rtol=1e-5)
    assert_same_in_parts(loss_fn, model, batch)


def test_weighted_divergences_have_the_gradient_of_the_mean_probability():
    model, raw = linear(1), linear_batch()
    several = train.distill_each(temperature=1.0, alpha=0.0)
    labelled = of_two_teachers(raw)
    gradient = jax.jit(jax.grad(lambda m: several(m, labelled, key=None, step=0)[0]))(model)
    log_mean = teachers.ensemble(linear(2), linear(3))(raw["image"])

    def averaged(model):
        return train.weighted_mean(losses.kl(model(raw["image"]), log_mean), raw)

    expected = jax.jit(jax.grad(averaged))(model)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_several_teachers_errors():
    model, batch = linear(1), of_two_teachers(linear_batch())
    with pytest.raises(ValueError, match="3 weights for 2 teachers"):
        train.distill_each(weights=(1, 1, 1))(model, batch, key=None, step=0)
    with pytest.raises(ValueError, match="negative"):
        train.distill_each(weights=(1, -1))
    for weights in (np.array([1.0, 2.0]), jnp.array([1.0, 2.0])):  # arrays are lists of numbers, too
        train.distill_each(weights=weights)
    single = {**batch, "teacher": jnp.zeros((12, 3))}
    with pytest.raises(ValueError, match="tuple of logits"):
        train.distill_each()(model, single, key=None, step=0)
    with pytest.raises(ValueError, match="temperature"):
        train.distill_each(temperature=0.0)
    with pytest.raises(ValueError, match="at least one"):
        teachers.label_each([], batch)

"""Losses over tokens against loops in NumPy float64, reference implementations, and others' faults."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden.make_tokens import draw as draw_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import losses
from distill_jax.losses import tokens
from distill_jax.models import from_function
from distill_jax.train.step import init_state, make_train_step, weighted_mean

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("tokens.json").read_text())
DIVERGENCES = {
    "kl": losses.kl,
    "reverse_kl": losses.reverse_kl,
    "jensen_shannon": losses.jensen_shannon,
    "jensen_shannon, β = 0.1": functools.partial(losses.jensen_shannon, beta=0.1),
}
LOGIT_LOSSES = {
    **DIVERGENCES,
    "soft_cross_entropy": losses.soft_cross_entropy,
    "mean_squared_logits": losses.mean_squared_logits,
}
parametrize = functools.partial(pytest.mark.parametrize, "name")


# --- the formulas, in NumPy float64 ----------------------------------------------------------


def log_softmax(x):
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def ref_divergence(name, p, q):
    """Of two distributions over the same classes, p the teacher's."""
    if name == "kl":
        return divergence(p, q)
    if name == "reverse_kl":
        return divergence(q, p)
    beta = 0.1 if "0.1" in name else 0.5
    m = beta * p + (1 - beta) * q
    return beta * divergence(p, m) + (1 - beta) * divergence(q, m)


def ref_bucket(logits, indices, temperature=1.0):
    """A token at a time, in probabilities."""
    p = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    result = np.empty((*indices.shape[:-1], indices.shape[-1] + 1))
    for i in np.ndindex(indices.shape[:-1]):
        rest = [v for v in range(p.shape[-1]) if v not in indices[i]]
        result[i] = [*p[i][indices[i]], p[i][rest].sum()]
    return result


def ref_bucketed(name, student, teacher, k, temperature):
    indices = np.argsort(-teacher, -1)[..., :k]
    q, p = (ref_bucket(x, indices, temperature) for x in (student, teacher))
    values = [ref_divergence(name, p[i], q[i]) for i in np.ndindex(indices.shape[:-1])]
    return temperature**2 * np.reshape(values, indices.shape[:-1])


def numeric_gradient(fn, x, step=1e-5):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (fn(up) - fn(down)) / (2 * step)
    return gradient


def draw(shape=(2, 5, 9), seed=0, scale=3, gap=1):
    rng = np.random.default_rng(seed)
    teacher = (rng.normal(size=shape) * scale).astype(np.float32)
    return (teacher + rng.normal(size=shape) * gap).astype(np.float32), teacher


MASK = np.array([[True, True, True, True, False], [False, True, True, False, False]])


# --- sequences -------------------------------------------------------------------------------


def test_per_sequence_is_a_loop_over_tokens():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(2, 5)), rng.uniform(size=(2, 5))
    for given_weights in (None, weights):
        for where in (None, MASK):
            means, sums, totals = [], [], []
            for i in range(2):
                used = [t for t in range(5) if where is None or where[i, t]]
                w = [1.0 if given_weights is None else weights[i, t] for t in used]
                sums.append(sum(a * values[i, t] for a, t in zip(w, used, strict=True)))
                totals.append(sum(w))
                means.append(sums[-1] / totals[-1])
            options = {"where": where, "weights": given_weights}
            np.testing.assert_allclose(tokens.per_sequence(values, **options), means, rtol=1e-6)
            value = tokens.per_sequence(values, **options, reduce="sum")
            np.testing.assert_allclose(value, sums, rtol=1e-6)
            if where is not None:
                value = tokens.sequence_weight(where, weights=given_weights)
                np.testing.assert_allclose(value, totals, rtol=1e-6)


@parametrize(["kl", "jensen_shannon", "mean_squared_logits"])
def test_padding_changes_nothing(name):
    """Whatever stands there: garbage, inf, NaN; in the value and in the gradient."""
    loss = tokens.sequence(LOGIT_LOSSES[name])
    student, teacher = draw()
    per_token = np.asarray(LOGIT_LOSSES[name](student, teacher), float)
    expected = [v[m].mean() for v, m in zip(per_token, MASK, strict=True)]

    @jax.jit
    def run(student, teacher):
        def total(*x):
            values = loss(*x, tokens=MASK)
            return values.sum(), values

        gradients, values = jax.grad(total, (0, 1), has_aux=True)(student, teacher)
        return values, gradients

    values, gradients = run(student, teacher)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    for garbage in (1e4, np.inf, -np.inf, np.nan):
        spoilt = [np.where(MASK[..., None], x, np.float32(garbage)) for x in (student, teacher)]
        other, others = run(*spoilt)
        np.testing.assert_array_equal(other, values)
        for a, b in zip(others, gradients, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(np.asarray(a)[~MASK], 0)
    longer = [np.pad(x, [(0, 0), (2, 3), (0, 0)]) for x in (student, teacher)]
    value = loss(*longer, tokens=np.pad(MASK, [(0, 0), (2, 3)]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_labels_of_padding_may_be_anything():
    student, _ = draw()
    labels = np.where(MASK, np.arange(10).reshape(2, 5) % 9, -100)
    loss = tokens.sequence(losses.cross_entropy)
    value, gradient = jax.jit(jax.value_and_grad(lambda s: loss(s, labels, tokens=MASK).sum()))(student)
    log_q = log_softmax(student)
    expected = [np.mean([-log_q[i, t, labels[i, t]] for t in range(5) if MASK[i, t]]) for i in (0, 1)]
    np.testing.assert_allclose(value, sum(expected), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_a_sequence_of_padding_alone_is_zero():
    student, teacher = draw()
    mask = MASK & np.array([[True], [False]])
    loss = tokens.sequence(losses.kl)
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher, tokens=mask)[1])(student)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)
    weights = np.where(mask, 1.0, 0.0)
    np.testing.assert_array_equal(
        loss(student, teacher, weights=weights), loss(student, teacher, tokens=mask)
    )


@pytest.mark.parametrize("loss", [losses.dist, losses.mlkd], ids=["dist", "mlkd"])
def test_a_loss_between_tokens_does_not_see_padding(loss):
    student, teacher = draw()
    counts = np.ones(student.shape[:-1], bool)
    longer = [np.concatenate([x, 9 * x[:, ::-1]], 1) for x in (student, teacher, counts)]
    longer[2] = np.concatenate([counts, ~counts], 1)
    expected = tokens.sequence(loss)(student, teacher)
    padded = tokens.sequence(loss)(longer[0], longer[1], tokens=longer[2])
    np.testing.assert_allclose(padded, expected, rtol=1e-5)
    some = np.array([True] * 3 + [False] * (student.shape[-1] - 3))[None, None]
    np.testing.assert_allclose(
        tokens.sequence(loss)(longer[0], longer[1], tokens=longer[2], where=some),
        tokens.sequence(loss)(student, teacher, where=some),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["kl", "dkd", "nkd", "wsld"])
def test_bucketed_with_the_whole_vocabulary_is_the_loss(name):
    student, teacher = draw()
    labels = [np.arange(10).reshape(2, 5) % student.shape[-1]] * (name in ("dkd", "nkd", "wsld"))
    loss = getattr(losses, name)
    top = tokens.top_k(teacher, teacher.shape[-1])
    expected = loss(student, teacher, *labels, temperature=1.0)
    np.testing.assert_allclose(tokens.bucketed(loss)(student, top, *labels), expected, rtol=2e-5, atol=1e-6)


def test_bucketed_makes_up_no_label():
    student, teacher = draw()
    labels = np.zeros((2, 5), int)
    labels[0, :2] = -100, student.shape[-1]
    values = tokens.bucketed(losses.nkd)(student, tokens.top_k(teacher, 2), labels)
    np.testing.assert_array_equal(np.isnan(values), labels != 0)
    with pytest.raises(ValueError, match="temperatures of its own"):
        tokens.bucketed(losses.mlkd)(student, tokens.top_k(teacher, 2))


def test_a_batch_and_a_single_sequence():
    student, teacher = draw()
    loss = tokens.sequence(losses.kl)
    whole = loss(student, teacher, tokens=MASK, temperature=2.0)
    single = [loss(student[i], teacher[i], tokens=MASK[i], temperature=2.0) for i in (0, 1)]
    np.testing.assert_allclose(whole, single, rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(lambda s, t, m: loss(s, t, tokens=m, temperature=2.0))(student, teacher, MASK),
        whole,
        rtol=1e-6,
    )


def toy_step(accumulate, by_tokens):
    """A linear model over sequences whose padding is spread very unequally over the batch."""
    sequence_kl = tokens.sequence(losses.kl)

    def loss_fn(model, batch, *, key, step):
        values = sequence_kl(model(batch["x"]), batch["teacher"], tokens=batch["mask"])
        return weighted_mean(values, batch), (model.state, {})

    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(8, 6, 4)).astype(np.float32),
        "teacher": rng.normal(size=(8, 6, 5)).astype(np.float32) * 3,
        "mask": np.arange(6) < np.array([[6], [6], [5], [1], [2], [1], [0], [0]]),
    }
    if by_tokens:
        batch["weight"] = tokens.sequence_weight(batch["mask"])
    params = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    model = from_function(lambda w, x: x @ w, params)
    state = init_state(model, optax.sgd(1.0), jax.random.key(0))
    step = make_train_step(loss_fn, optax.sgd(1.0), accumulate=accumulate)
    state, metrics = jax.jit(step)(state, batch)
    return params, batch, state, metrics


@pytest.mark.parametrize("by_tokens", [True, False])
def test_accumulation_is_exact(by_tokens):
    """The mean over all tokens (or sequences) of the batch, in however many parts it is computed."""
    params, batch, whole, metrics = toy_step(1, by_tokens)
    per_token = np.asarray(losses.kl(batch["x"] @ params, batch["teacher"]))
    if by_tokens:
        expected = per_token[batch["mask"]].mean()
    else:
        expected = np.mean(
            [v[m].mean() if m.any() else 0 for v, m in zip(per_token, batch["mask"], strict=True)]
        )
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    for accumulate in (2, 4):
        _, _, state, other = toy_step(accumulate, by_tokens)
        np.testing.assert_allclose(other["loss"], metrics["loss"], rtol=1e-6)
        np.testing.assert_allclose(state.model.params, whole.model.params, rtol=1e-5, atol=1e-6)


def test_padding_counted_is_a_fault_that_would_show():
    """google/tunix averages over padding too (1.521 for 1.452): a plain mean is not this loss."""
    student, teacher = draw()
    value = tokens.sequence(losses.kl)(student, teacher, tokens=MASK)
    weight = tokens.sequence_weight(MASK)
    per_token = np.asarray(losses.kl(student, teacher))
    mean = np.sum(value * weight) / np.sum(weight)
    np.testing.assert_allclose(mean, per_token[MASK].mean(), rtol=1e-6)
    assert abs(per_token.mean() / mean - 1) > 0.01
    zeroed = [np.where(MASK[..., None], x, 0) for x in (student, teacher)]
    assert losses.kl(*zeroed).mean() < 0.7 * mean  # padding of agreement dilutes instead


# --- top-k labels ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_bucket_to_six_digits(k, temperature):
    student, teacher = draw()
    labels = tokens.top_k(teacher, k, temperature=temperature)
    assert labels.indices.dtype == jnp.int32
    assert labels.log_probs.shape == (2, 5, k + 1)
    np.testing.assert_array_equal(labels.indices, np.argsort(-teacher, -1)[..., :k])
    expected = ref_bucket(teacher, np.asarray(labels.indices), temperature)
    np.testing.assert_allclose(np.exp(labels.log_probs), expected, rtol=3e-6)
    value = tokens.bucket(student, labels.indices, temperature=temperature)
    expected = ref_bucket(student, np.asarray(labels.indices), temperature)
    np.testing.assert_allclose(np.exp(value), expected, rtol=3e-6)


@parametrize(DIVERGENCES)
@pytest.mark.parametrize("k", [1, 3])
def test_bucketed_value_and_gradient_to_six_digits(name, k):
    student, teacher = draw()
    wide = teacher.astype(float)

    @jax.jit
    def run(student, temperature):
        labels = tokens.top_k(teacher, k, temperature=temperature)

        def total(student):
            values = tokens.bucketed(DIVERGENCES[name])(student, labels, temperature=temperature)
            return values.sum(), values

        return jax.grad(total, has_aux=True)(student)

    for temperature in (1.0, 4.0):
        gradient, value = run(student, temperature)
        expected = ref_bucketed(name, student.astype(float), wide, k, temperature)
        np.testing.assert_allclose(value, expected, rtol=5e-6, atol=1e-6 * expected.max())
        expected = numeric_gradient(
            lambda s, t=temperature: ref_bucketed(name, s, wide, k, t).sum(), student.astype(float)
        )
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@functools.cache
def for_every_k(name):
    """The full loss, and the bucketed one for some and for all of six tokens."""

    @jax.jit
    def run(student, teacher, temperature):
        loss = tokens.bucketed(DIVERGENCES[name])
        full = DIVERGENCES[name](student, teacher, temperature=temperature)
        labels = [tokens.top_k(teacher, k, temperature=temperature) for k in (1, 2, 4, 6)]
        return full, [loss(student, label, temperature=temperature) for label in labels]

    return run


@parametrize(DIVERGENCES)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10), temperature=st.floats(0.5, 10))
def test_a_lower_bound_of_the_full_loss_and_equal_for_all_tokens(name, seed, scale, temperature):
    """Data processing inequality: summing classes up lowers an f-divergence; fewer buckets, more."""
    student, teacher = draw((3, 6), seed, scale, scale / 2)
    full, values = map(np.asarray, for_every_k(name)(student, teacher, temperature))
    slack = 1e-5 * full + 1e-5
    assert (values[0] >= 0).all()
    assert (values[:-1] <= values[1:] + slack).all()
    np.testing.assert_allclose(values[-1], full, rtol=1e-4, atol=1e-5)


@parametrize(DIVERGENCES)
def test_all_tokens_give_the_full_gradient(name):
    student, teacher = draw()
    labels = tokens.top_k(teacher, 9, temperature=2.0)
    assert (np.asarray(labels.log_probs)[..., -1] == -np.inf).all()
    loss = tokens.bucketed(DIVERGENCES[name])

    @jax.jit
    def gradients(s):
        full = jax.grad(lambda s: DIVERGENCES[name](s, teacher, temperature=2.0).sum())(s)
        return full, jax.grad(lambda s: loss(s, labels, temperature=2.0).sum())(s)

    full, gradient = gradients(student)
    np.testing.assert_allclose(gradient, full, atol=3e-6)


@parametrize(DIVERGENCES)
def test_zero_and_flat_at_student_equals_teacher(name):
    _, teacher = draw()
    loss = tokens.bucketed(DIVERGENCES[name])
    for k in (1, 4):
        labels = tokens.top_k(teacher, k, temperature=3.0)
        value, gradient = jax.value_and_grad(lambda s, y=labels: loss(s, y, temperature=3.0).sum())(teacher)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


@parametrize(LOGIT_LOSSES)
def test_every_logit_loss_takes_buckets(name):
    student, teacher = draw()
    labels = tokens.top_k(teacher, 3)
    value = tokens.sequence(tokens.bucketed(LOGIT_LOSSES[name]))(student, labels, tokens=MASK)
    assert value.shape == (2,)
    assert np.isfinite(value).all()
    shifted = tokens.bucketed(LOGIT_LOSSES[name])(student + np.float32(7), labels)
    np.testing.assert_allclose(
        shifted, tokens.bucketed(LOGIT_LOSSES[name])(student, labels), rtol=1e-4, atol=1e-4
    )


def test_labels_are_translated_into_buckets():
    student, teacher = draw()
    labels = tokens.top_k(teacher, 3)
    truth = np.asarray(labels.indices)[..., 1].copy()
    truth[0, 0] = np.argmin(teacher[0, 0])  # not among the three
    places = tokens.bucket_labels(truth, labels.indices)
    expected = np.ones((2, 5))
    expected[0, 0] = 3
    np.testing.assert_array_equal(places, expected)

    def with_labels(student, teacher, labels):
        return losses.kl(student, teacher) + losses.cross_entropy(student, labels)

    value = tokens.bucketed(with_labels)(student, labels, truth)
    log_q = np.log(ref_bucket(student, np.asarray(labels.indices)))
    hard = -np.take_along_axis(log_q, np.asarray(places)[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        value, ref_bucketed("kl", student, teacher, 3, 1.0) + hard, rtol=1e-5, atol=1e-5
    )


def test_a_student_without_mass_on_the_top_k_has_a_large_loss():
    """tunix and maxtext renormalise the student over the same k: loss 0, and zero gradient."""
    teacher = np.array([[8.0, 8.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    student = np.array([[-8.0, -8.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    labels = tokens.top_k(teacher, 2)
    renormalised = losses.kl(student[:, :2], teacher[:, :2])
    np.testing.assert_allclose(renormalised, 0, atol=1e-6)
    value, gradient = jax.value_and_grad(lambda s: tokens.bucketed(losses.kl)(s, labels).sum())(student)
    full = divergence(np.exp(log_softmax(teacher))[0], np.exp(log_softmax(student))[0])
    assert full > 8
    np.testing.assert_allclose(value, full, rtol=1e-6)  # the rest is uniform in both
    np.testing.assert_allclose(gradient[0, :2], -0.5, atol=1e-3)


def test_softening_comes_before_bucketing():
    """DistillKit softens OTHER as one token: at T = 4 the teacher would lose half its mass there."""
    _, teacher = draw((3, 50), scale=2)
    at_four = tokens.top_k(teacher, 5, temperature=4.0)
    np.testing.assert_allclose(
        np.exp(at_four.log_probs), ref_bucket(teacher, np.asarray(at_four.indices), 4.0), rtol=3e-6
    )
    too_late = jax.nn.softmax(tokens.top_k(teacher, 5).log_probs / 4)
    assert (np.exp(at_four.log_probs)[:, -1] > 1.5 * np.asarray(too_late)[:, -1]).all()


def test_a_tiny_rest_keeps_its_digits():
    """1 − Σ p is 0 in float32 where the rest has 1e-9; and far below, where exp underflows."""
    teacher = np.array([[20.0, 0.0, 0.5, -1.0], [500.0, 0.0, 1.0, 0.0]], np.float32)
    labels = tokens.top_k(teacher, 1)
    expected = [np.log(np.exp(x[1:].astype(float)).sum()) - x[0] for x in teacher]
    np.testing.assert_allclose(labels.log_probs[:, 1], expected, rtol=1e-6)
    completed = tokens.append_other(labels.log_probs[:, :1])
    assert (np.asarray(completed)[:, 1] == -np.inf).all()


def test_append_other():
    log_probs = np.log([[0.5, 0.3], [0.6, 0.4], [0.7, 0.31]])  # the last sums to more, by rounding
    value, gradient = jax.value_and_grad(
        lambda x: jnp.where(jnp.isinf(y := tokens.append_other(x)), 0, y).sum()
    )(jnp.asarray(log_probs, jnp.float32))
    completed = np.asarray(tokens.append_other(log_probs))
    np.testing.assert_allclose(completed[0], np.log([0.5, 0.3, 0.2]), rtol=1e-6)
    assert completed[2, 2] == -np.inf
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    student, teacher = draw((3, 9))
    labels = tokens.top_k(teacher, 4)
    again = tokens.TopK(labels.indices, tokens.append_other(labels.log_probs[:, :-1]), 1)
    loss = tokens.bucketed(losses.kl)
    np.testing.assert_allclose(loss(student, again), loss(student, labels), rtol=1e-4)


def bucket_extremes():
    far = np.zeros((4, 6), np.float32)
    far[0, 0], far[1, 1], far[2, 2], far[3, 3] = 1e4, -1e4, 1e4, -1e4
    mask = np.arange(6) < 4
    normal = draw((4, 6))[0]
    one_hot = np.where(np.eye(6)[:4] > 0, 0, -np.inf).astype(np.float32)
    nothing = np.full((4, 6), -np.inf, np.float32)
    yield "gaps of 1e4", far, far[::-1].copy(), 2
    yield "masked by −inf", np.where(mask, normal, -np.inf), np.where(mask, far, -np.inf), 2
    yield "fewer tokens than k", np.where(mask, normal, -np.inf), np.where(mask, far, -np.inf), 5
    yield "one-hot teacher", normal, one_hot, 2
    yield "two tokens", normal[:, :2], far[:, :2], 1
    yield "one token", normal[:, :1], far[:, :1], 1
    yield "one row", normal[:1], far[:1], 3
    yield "no token", nothing, nothing, 2
    yield "bfloat16", jnp.asarray(normal, jnp.bfloat16), jnp.asarray(far, jnp.bfloat16), 2


CASES = {case: rest for case, *rest in bucket_extremes()}


@functools.cache
def all_losses(k):
    """Values and gradients of every logit loss, compiled once a shape."""

    def run(student, teacher):
        labels = tokens.top_k(teacher, k)
        values = {name: tokens.bucketed(f)(student, labels) for name, f in LOGIT_LOSSES.items()}
        gradients = {
            name: jax.grad(lambda s, t, f=f: tokens.bucketed(f)(s, tokens.top_k(t, k)).sum(), (0, 1))(
                student, teacher
            )
            for name, f in LOGIT_LOSSES.items()
        }
        return values, gradients

    return jax.jit(run)


@pytest.mark.parametrize("case", CASES)
def test_finite_value_and_gradient(case):
    student, teacher, k = CASES[case]
    values, gradients = all_losses(k)(student, teacher)
    for name in LOGIT_LOSSES:
        if name == "reverse_kl" and case == "one-hot teacher":
            continue  # truly infinite
        assert values[name].dtype == jnp.float32
        assert np.isfinite(values[name]).all(), name
        for gradient in gradients[name]:
            assert gradient.dtype == jnp.asarray(student).dtype
            assert np.isfinite(np.asarray(gradient, np.float32)).all(), name


def test_the_temperature_may_be_learned_or_differ():
    student, teacher = draw()
    loss = tokens.bucketed(losses.kl)
    each = np.linspace(1, 4, 10, dtype=np.float32).reshape(2, 5, 1)
    value = loss(student, tokens.top_k(teacher, 3, temperature=each), temperature=each)
    wide = [x.astype(float) for x in (student, teacher)]
    for i in np.ndindex(2, 5):
        single = ref_bucketed("kl", wide[0][i], wide[1][i], 3, float(each[i][0]))
        np.testing.assert_allclose(value[i], single, rtol=1e-5)

    def by_temperature(t):
        return loss(student, tokens.top_k(teacher, 3, temperature=t), temperature=t).sum()

    expected = [ref_bucketed("kl", *wide, 3, t).sum() for t in (2.001, 1.999)]
    slope = jax.jit(jax.grad(by_temperature))(2.0)
    np.testing.assert_allclose(slope, (expected[0] - expected[1]) / 0.002, rtol=1e-4)


def test_an_index_outside_the_vocabulary_is_never_hidden():
    logits = np.zeros((3, 4), np.float32)
    value = np.asarray(tokens.bucket(logits, np.array([[0, 4], [-1, 0], [1, 2]])))
    assert np.isnan(value[:2]).any(-1).all()
    bad = tokens.TopK(np.array([[4], [-1], [7]]), np.zeros((3, 2)), 1.0)
    assert np.isnan(tokens.bucketed(losses.kl)(logits, bad)).all()
    twice = np.asarray(tokens.bucket(logits, np.array([[1, 1], [0, 3], [3, 2]])))
    np.testing.assert_array_equal(np.isnan(twice).any(-1), [True, False, False])
    np.testing.assert_allclose(value[2], np.log([0.25, 0.25, 0.5]), rtol=1e-6)
    with_nan = np.array([[0.0, np.nan, 1.0]], np.float32)
    assert np.isnan(tokens.bucket(with_nan, np.array([[0]]))).all()


def test_labels_made_at_another_temperature_are_refused():
    student, teacher = draw()
    loss = tokens.sequence(tokens.bucketed(losses.kl))
    labels = tokens.top_k(teacher, 3, temperature=2)
    expected = loss(student, labels, tokens=MASK, temperature=2.0)

    @jax.jit
    def compiled(student, labels):
        return loss(student, labels, tokens=MASK, temperature=2.0)

    np.testing.assert_allclose(compiled(student, labels), expected, rtol=1e-6)
    for run in (compiled, lambda s, y: loss(s, y, tokens=MASK, temperature=2.0)):
        with pytest.raises(ValueError, match=r"made at temperature 1\.0, but temperature is 2\.0"):
            run(student, tokens.top_k(teacher, 3))
    # A number and its rounding to float32 are the same, as they are for arrays
    rounded = tokens.top_k(teacher, 3, temperature=np.float32(2.1))
    loss(student, rounded, tokens=MASK, temperature=2.1)
    # Where one of the two is no known number, a difference shows as NaN
    traced = jax.jit(lambda t: tokens.top_k(teacher, 3, temperature=t))(2.0)
    np.testing.assert_allclose(compiled(student, traced), expected, rtol=1e-6)
    each = jnp.asarray([2.0, 2, 2, 3, 2]).reshape(5, 1)
    unequal = tokens.bucketed(losses.kl)(student, labels, temperature=each)
    np.testing.assert_array_equal(np.isnan(unequal), np.broadcast_to(each[:, 0] == 3, (2, 5)))


def test_top_k_labels_are_a_batch_like_any_other():
    """In a batch dict, split for accumulation, with padding zeroed out."""
    student, teacher = draw()
    labels = tokens.top_k(teacher, 3)
    loss = tokens.sequence(tokens.bucketed(losses.kl))
    value = loss(student, labels, tokens=MASK)
    expected = [np.mean(ref_bucketed("kl", student[i][MASK[i]], teacher[i][MASK[i]], 3, 1.0)) for i in (0, 1)]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    spoilt = jax.tree.map(lambda x: jnp.where(MASK[..., None], x, jnp.array(-7, x.dtype)), labels)
    np.testing.assert_array_equal(loss(student, spoilt, tokens=MASK), value)
    stored = tokens.TopK(labels.indices, labels.log_probs.astype(jnp.bfloat16), labels.temperature)
    np.testing.assert_allclose(loss(student, stored, tokens=MASK), value, rtol=0.02, atol=1e-3)


# --- unequal vocabularies --------------------------------------------------------------------


@parametrize(["kl", "jensen_shannon", "mean_squared_logits"])
def test_padded_columns_change_nothing(name):
    student, teacher = draw()
    loss = LOGIT_LOSSES[name]
    wide_student = np.concatenate([student, np.full((2, 5, 3), 50, np.float32)], -1)
    wide_teacher = np.concatenate([teacher, np.full((2, 5, 7), np.nan, np.float32)], -1)

    @jax.jit
    def run(s, wide):
        def padded(s):
            return loss(*tokens.common_vocabulary(s, wide_teacher, vocabulary_size=9)).sum()

        plain = jax.value_and_grad(lambda s: loss(s, teacher).sum())
        return plain(s), jax.value_and_grad(padded)(wide)

    (expected, slope), (value, gradient) = run(student, wide_student)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[..., :9], slope, atol=1e-6)
    np.testing.assert_array_equal(gradient[..., 9:], 0)


def test_vocabularies_that_differ_are_refused():
    student, teacher = np.zeros((2, 8)), np.zeros((2, 6))
    with pytest.raises(ValueError, match="the vocabularies differ: student 5 tokens, teacher 6"):
        tokens.common_vocabulary(student, teacher, vocabulary_size=5, teacher_vocabulary_size=6)
    with pytest.raises(ValueError, match=r"\[1, 6\], the number of columns of teacher_logits, got 7"):
        tokens.common_vocabulary(student, teacher, vocabulary_size=7)
    cut = tokens.common_vocabulary(student, teacher, vocabulary_size=6, teacher_vocabulary_size=6)
    assert [x.shape for x in cut] == [(2, 6), (2, 6)]


# --- chunks ----------------------------------------------------------------------------------


def heads(shape=(2, 7), widths=(4, 6), vocabulary=11, seed=0):
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    hidden = [array(*shape, width) for width in widths]
    kernels = [array(width, vocabulary) for width in widths]
    return *hidden, *kernels, array(vocabulary)


@pytest.mark.parametrize(
    ("name", "chunk"), [*((name, 3) for name in LOGIT_LOSSES), ("kl", 1), ("kl", 7), ("kl", 100)]
)
def test_chunks_give_the_same_values_and_gradients(name, chunk):
    loss = LOGIT_LOSSES[name]
    options = {} if name == "mean_squared_logits" else {"temperature": 2.0}
    hidden_s, hidden_t, kernel_s, kernel_t, bias = heads()
    chunked = tokens.chunked(loss, chunk=chunk)
    upstream = np.random.default_rng(1).normal(size=(2, 7)).astype(np.float32)

    def plain(*x):
        return loss(x[0] @ x[2] + x[4], x[1] @ x[3], **options)

    def small(*x):
        return chunked(x[0], x[1], student_kernel=(x[2], x[4]), teacher_kernel=x[3], **options)

    arguments = (hidden_s, hidden_t, kernel_s, kernel_t, bias)

    @jax.jit
    def run(*x):
        return [
            jax.grad(lambda *x, f=f: (f(*x) * upstream).sum(), tuple(range(5)))(*x) for f in (plain, small)
        ]

    values = [jax.jit(f)(*arguments) for f in (plain, small)]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-6, atol=1e-6)
    for theirs, ours in zip(*run(*arguments), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())


def test_chunks_of_labels_top_k_and_padding():
    hidden_s, hidden_t, kernel_s, kernel_t, _ = heads()
    student, teacher = hidden_s @ kernel_s, hidden_t @ kernel_t
    mask = np.arange(7) < np.array([[7], [3]])
    chunk = functools.partial(tokens.chunked, chunk=3)
    truth = np.arange(14).reshape(2, 7) % 11
    truth[1, 3:] = -100
    value = tokens.sequence(chunk(losses.cross_entropy))(
        hidden_s, truth, student_kernel=kernel_s, tokens=mask, label_smoothing=0.1
    )
    expected = tokens.sequence(losses.cross_entropy)(student, truth, tokens=mask, label_smoothing=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    labels = tokens.top_k(teacher, 4, temperature=2.0)
    loss = tokens.bucketed(losses.reverse_kl)
    value = tokens.sequence(chunk(loss))(
        hidden_s, labels, student_kernel=kernel_s, tokens=mask, temperature=2.0
    )
    expected = tokens.sequence(loss)(student, labels, tokens=mask, temperature=2.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("batch", [(2, 512), (16, 64)])
def test_chunks_take_less_memory(batch):
    """By XLA's own account of the compiled program, value and gradient together."""
    shapes = [(*batch, 32), (*batch, 48), (32, 4096), (48, 4096)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    chunked = tokens.chunked(losses.kl, chunk=64)  # of 1024 tokens

    def plain(hs, ht, ks, kt):
        return losses.kl(hs @ ks, ht @ kt).mean()

    def small(hs, ht, ks, kt):
        return chunked(hs, ht, student_kernel=ks, teacher_kernel=kt).mean()

    def temporaries(fn):
        compiled = jax.jit(jax.value_and_grad(fn, (0, 2))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, plain = temporaries(small), temporaries(plain)
    assert plain > 2 * 512 * 4096 * 4  # the logits of one side
    assert small < plain / 10  # on a CPU 13 MB and 206 MB


def test_bfloat16_heads_keep_float32_sums():
    """Logits, and the gradient's sum over chunks, which in bfloat16 would lose the later chunks."""
    arrays = heads((1, 64), (8, 8), 16)
    low = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:4]]
    wide = [np.asarray(x, np.float32) for x in low]
    chunked = tokens.chunked(losses.kl, chunk=1)

    def small(hs, ht, ks, kt):
        return chunked(hs, ht, student_kernel=ks, teacher_kernel=kt)

    value = jax.jit(small)(*low)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, losses.kl(wide[0] @ wide[2], wide[1] @ wide[3]), rtol=1e-5)
    gradients = jax.jit(jax.grad(lambda *x: small(*x).sum(), (0, 2)))(*low)
    exact = jax.grad(lambda h, k: losses.kl(h @ k, wide[1] @ wide[3]).sum(), (0, 1))(wide[0], wide[2])
    for ours, theirs in zip(gradients, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        error = np.abs(np.asarray(ours, np.float32) - theirs)
        assert error.max() <= 2**-7 * np.abs(theirs).max()
    # The kernel's gradient is rounded once per chunk from the product of two vectors, then at the end
    error = np.abs(np.asarray(gradients[1], np.float32) - exact[1])
    assert np.sqrt((error**2).mean()) < 2**-9 * np.sqrt((np.asarray(exact[1]) ** 2).mean()) * 1.5


# --- reference implementations ---------------------------------------------------------------


class Golden:
    def __init__(self, wide):
        self.dtype = jnp.float64 if wide else jnp.float32
        student, teacher, kernels, self.labels, self.directions = draw_golden()
        self.student, self.teacher = (
            jnp.asarray(h @ k, self.dtype) for h, k in zip((student, teacher), kernels, strict=True)
        )
        arrays = (student, teacher, *kernels)
        self.hidden = [jnp.asarray(x, self.dtype) for x in arrays]
        self.mask = self.labels != -100
        self.near = 1e-10 if wide else 1e-6

    def mean(self, loss, teacher=None, mask=None):
        """The mean over the tokens of the batch, as a training step would make it."""
        mask = self.mask if mask is None else mask
        weight = tokens.sequence_weight(mask)
        teacher = self.teacher if teacher is None else teacher

        def value(student):
            values = tokens.sequence(loss)(student, teacher, tokens=mask)
            return weighted_mean(values, {"weight": weight})

        return value

    def check(self, name, fn, scale=1.0):
        value, gradient = jax.jit(jax.value_and_grad(fn))(self.student)
        expected = np.array(GOLDEN[name])
        np.testing.assert_allclose(value * scale, expected[0], rtol=self.near, err_msg=name)
        along = (np.asarray(gradient, float) * self.directions).sum((1, 2, 3)) * scale
        atol = 10 * self.near * np.abs(expected[1:]).max()
        np.testing.assert_allclose(along, expected[1:], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("wide", [True, False])
def test_trl(wide):
    """TRL has no T²; at β = 0 and 1 it gives KL and reverse KL, where GKD's Eq. 1 is 0."""
    with jax.enable_x64(wide):
        g = Golden(wide)
        for beta, loss in {
            0: losses.kl,
            0.1: functools.partial(losses.jensen_shannon, beta=0.1),
            0.5: losses.jensen_shannon,
            0.9: functools.partial(losses.jensen_shannon, beta=0.9),
            1: losses.reverse_kl,
        }.items():
            for t in (1.0, 2.0) if wide else (2.0,):
                g.check(f"trl {beta} {t}", g.mean(functools.partial(loss, temperature=t)), 1 / t**2)
        # Without labels TRL divides [batch, length, vocabulary] by the batch alone: 5 times a mean
        every = np.ones_like(g.mask)
        g.check("trl no labels", g.mean(losses.jensen_shannon, mask=every), 5.0)


@pytest.mark.parametrize("wide", [True, False])
def test_distillm(wide):
    """Its forward and skew KL are cross-entropies: the teacher's entropy is missing in the value."""

    def mixture(student, teacher, share):
        pair = [jax.nn.log_softmax(x) + jnp.log(s) for x, s in ((teacher, share), (student, 1 - share))]
        return jnp.logaddexp(*pair)

    def skew(student, teacher):
        return losses.soft_cross_entropy(mixture(student, teacher, 0.1), teacher)

    def skew_reverse(student, teacher):
        return losses.kl(mixture(student, teacher, 0.9), student)

    with jax.enable_x64(wide):
        g = Golden(wide)
        g.check("distillm forward_kl", g.mean(losses.soft_cross_entropy))
        g.check("distillm reverse_kl", g.mean(losses.reverse_kl))
        # its λ is the student's share
        beta = functools.partial(losses.jensen_shannon, beta=0.1)
        g.check("distillm js_distance", g.mean(beta))
        g.check("distillm skewed_forward_kl", g.mean(skew))
        g.check("distillm skewed_reverse_kl", g.mean(skew_reverse))


@pytest.mark.parametrize("wide", [True, False])
def test_distillkit(wide):
    """The same OTHER bucket at the labels' own temperature; a sum over tokens, without T²."""
    with jax.enable_x64(wide):
        g = Golden(wide)
        count = g.mask.sum()
        value = g.mean(tokens.bucketed(losses.kl), tokens.top_k(g.teacher, 3))
        g.check("distillkit SYMMETRIC_UNIFORM 1.0", value, count)
        # Its OTHER at T = 2, from labels at T = 1, is softened as one token: not the softened rest
        value = g.mean(
            functools.partial(tokens.bucketed(losses.kl), temperature=2.0),
            tokens.top_k(g.teacher, 3, temperature=2.0),
        )(g.student)
        assert abs(value * count / 4 / GOLDEN["distillkit SYMMETRIC_UNIFORM 2.0"][0] - 1) > 0.01
        labels = tokens.top_k(g.teacher, 3)
        late = tokens.TopK(labels.indices, labels.log_probs / 2, 2.0)
        value = g.mean(functools.partial(tokens.bucketed(losses.kl), temperature=2.0), late)
        g.check("distillkit SYMMETRIC_UNIFORM 2.0", value, count / 4)


@pytest.mark.parametrize("wide", [True, False])
def test_liger(wide):
    """Chunks of hidden states; padding is counted, and padded columns get the student's mass."""
    with jax.enable_x64(wide):
        g = Golden(wide)

        def check(name, mask=None, columns=11, **options):
            mask = np.ones_like(g.mask) if mask is None else mask
            weight = tokens.sequence_weight(mask)
            loss = tokens.sequence(tokens.chunked(losses.jensen_shannon, chunk=2))

            def value(hidden, kernel):
                values = loss(
                    hidden, g.hidden[1], student_kernel=kernel, teacher_kernel=g.hidden[3][:, :columns],
                    tokens=mask, **options,
                )  # fmt: skip
                return weighted_mean(values, {"weight": weight})

            kernel = g.hidden[2][:, :columns]
            run = jax.jit(jax.value_and_grad(value, (0, 1)))
            result, gradients = run(g.hidden[0], kernel)
            scale = options.get("temperature", 1.0) ** -2
            norms = [np.square(np.asarray(x, float) * scale).sum() for x in gradients]
            agree = np.allclose([result * scale, *norms], GOLDEN[name], rtol=5 * g.near, atol=0)
            return agree, float(result) * scale

        for name, options in {
            "liger 0.1": {"beta": 0.1},
            "liger 0.5": {},
            "liger temperature 2": {"temperature": 2.0},
        }.items():
            agree, value = check(name, **options)
            assert agree, (name, value)
        # Labels of −100 do not take a token out of its soft loss: the value does not change
        assert GOLDEN["liger padded"] == GOLDEN["liger 0.5"]
        _, value = check("liger padded", g.mask)
        np.testing.assert_allclose(value, GOLDEN["trl 0.5 1.0"][0], rtol=g.near)
        # A student of 9 columns is filled up with logits of 0: tokens that it cannot name, with mass
        agree, _ = check("liger 9 of 11 columns", columns=9)
        assert not agree


# --- misuse ----------------------------------------------------------------------------------


def test_shapes_and_values_are_checked():
    student, teacher = draw()
    with pytest.raises(ValueError, match="reduce must be 'mean' or 'sum', got 'tokens'"):
        tokens.sequence(losses.kl, reduce="tokens")
    with pytest.raises(ValueError, match="reduce must be"):
        tokens.per_sequence(np.zeros((2, 3)), reduce="none")
    with pytest.raises(ValueError, match=r"tokens must broadcast to \(2, 5\), .* got \(2, 4\)"):
        tokens.sequence(losses.kl)(student, teacher, tokens=MASK[:, :4])
    with pytest.raises(ValueError, match=r"weights must broadcast to \(2, 3\)"):
        tokens.per_sequence(np.zeros((2, 3)), weights=np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match=r"must have shape \(2, 5\) \+ \(...\)"):
        tokens.sequence(losses.kl)(student, teacher[:1], tokens=MASK)
    with pytest.raises(ValueError, match=r"k must lie in \[1, 9\], the vocabulary's size, got 10"):
        tokens.top_k(teacher, 10)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        tokens.top_k(teacher, 2, temperature=0)
    with pytest.raises(ValueError, match=r"indices must have shape \(2, 5, 'k'\)"):
        tokens.bucket(student, np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="indices must be integers"):
        tokens.bucket(student, np.zeros((2, 5, 3)))
    labels = tokens.top_k(teacher, 3)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\) for .* append_other\), got \(2, 5, 3\)"):
        tokens.bucketed(losses.kl)(student, tokens.TopK(labels.indices, labels.log_probs[..., :3], 1.0))
    with pytest.raises(ValueError, match="a TopK, got tuple"):
        tokens.bucketed(losses.kl)(student, (labels.indices, labels.log_probs))
    with pytest.raises(ValueError, match="weights must be at least 0 and finite, got -1"):
        tokens.per_sequence(np.zeros((2, 3)), weights=np.array([1, -1, 1]))


def test_misuse_of_chunks():
    hidden_s, hidden_t, kernel_s, kernel_t, bias = heads()
    with pytest.raises(ValueError, match="chunk must be an integer of at least 1, got 0"):
        tokens.chunked(losses.kl, chunk=0)
    for loss in (
        losses.dist,
        functools.partial(losses.mlkd, temperatures=(1.0,)),
        tokens.bucketed(losses.dist),
    ):
        with pytest.raises(ValueError, match="compares tokens with each other"):
            tokens.chunked(loss, chunk=3)
    loss = tokens.chunked(losses.kl, chunk=3)
    with pytest.raises(
        ValueError, match=r"student_kernel must have shape \[hidden, vocabulary\] .* \(11, 4\)"
    ):
        loss(hidden_s, hidden_t, student_kernel=kernel_s.T, teacher_kernel=kernel_t)
    with pytest.raises(ValueError, match=r"the bias of student_kernel must have shape \(11,\)"):
        loss(hidden_s, hidden_t, student_kernel=(kernel_s, bias[:3]), teacher_kernel=kernel_t)
    with pytest.raises(ValueError, match=r"shape \(2, 7\) \+ \(...\), one row per token"):
        loss(hidden_s, hidden_t[:, :5], student_kernel=kernel_s, teacher_kernel=kernel_t)
    with pytest.raises(ValueError, match="one value per token"):
        tokens.chunked(tokens.sequence(losses.kl), chunk=3)(
            hidden_s, hidden_t, student_kernel=kernel_s, teacher_kernel=kernel_t
        )
    with pytest.raises(ValueError, match=r"must have shape \[..., length, hidden\], got \(4,\)"):
        loss(hidden_s[0, 0], hidden_t[0, 0], student_kernel=kernel_s, teacher_kernel=kernel_t)

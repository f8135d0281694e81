"""Logit losses against their formulas in float64, and at the edges where others fail."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import _checks, losses

# --- the formulas, in NumPy float64 ----------------------------------------------------------


def log_softmax(x):
    x = np.asarray(x, np.float64)
    with np.errstate(invalid="ignore"):
        x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def xlogy_ratio(p, log_ratio):
    return np.where(p > 0, p * np.where(p > 0, log_ratio, 0), 0)


def ref_kl(student, teacher, temperature):
    log_q, log_p = log_softmax(student / temperature), log_softmax(teacher / temperature)
    return temperature**2 * xlogy_ratio(np.exp(log_p), log_p - log_q).sum(-1)


def ref_reverse_kl(student, teacher, temperature):
    return ref_kl(teacher, student, temperature)


def ref_jensen_shannon(student, teacher, temperature, beta=0.5):
    log_q, log_p = log_softmax(student / temperature), log_softmax(teacher / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + log_q)
    left, right = xlogy_ratio(p, log_p - log_m), xlogy_ratio(q, log_q - log_m)
    return temperature**2 * (beta * left + (1 - beta) * right).sum(-1)


def ref_soft_cross_entropy(student, teacher, temperature):
    p = np.exp(log_softmax(teacher / temperature))
    return -(temperature**2) * (p * log_softmax(student / temperature)).sum(-1)


def numeric_gradient(fn, x):
    """Central differences in float64, accurate to about 1e-9."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        step = 1e-5
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (fn(up) - fn(down)) / (2 * step)
    return gradient


REFERENCES = {
    "kl": (losses.kl, ref_kl),
    "reverse_kl": (losses.reverse_kl, ref_reverse_kl),
    "jensen_shannon": (losses.jensen_shannon, ref_jensen_shannon),
    "jensen_shannon, β = 0.1": (
        functools.partial(losses.jensen_shannon, beta=0.1),
        functools.partial(ref_jensen_shannon, beta=0.1),
    ),
    "soft_cross_entropy": (losses.soft_cross_entropy, ref_soft_cross_entropy),
}
DIVERGENCES = [name for name in REFERENCES if name != "soft_cross_entropy"]
parametrize = functools.partial(pytest.mark.parametrize, "name")


def draw(scale, gap, shape=(8, 10), seed=0):
    rng = np.random.default_rng(seed)
    teacher = (rng.normal(size=shape) * scale).astype(np.float32)
    return (teacher + rng.normal(size=shape) * gap).astype(np.float32), teacher


# --- value and gradient ----------------------------------------------------------------------


@parametrize(REFERENCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize(("scale", "gap"), [(1, 1), (5, 5), (3, 0.5), (0.3, 0.05)])
def test_value_and_gradient_to_six_digits(name, temperature, scale, gap):
    loss, reference = REFERENCES[name]
    student, teacher = draw(scale, gap)
    value = loss(student, teacher, temperature=temperature)
    expected = reference(student.astype(float), teacher.astype(float), temperature)
    np.testing.assert_allclose(value, expected, rtol=5e-6, atol=1e-6 * expected.max())

    gradient = jax.grad(lambda s: loss(s, teacher, temperature=temperature).sum())(student)
    wide = teacher.astype(float)
    expected = numeric_gradient(lambda s: reference(s, wide, temperature).sum(), student.astype(float))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * max(0.1, np.abs(expected).max()))


@parametrize(DIVERGENCES)
@pytest.mark.parametrize(("scale", "gap"), [(5, 5), (3, 1), (100, 1000)])
def test_many_examples_to_six_digits(name, scale, gap):
    loss, reference = REFERENCES[name]
    student, teacher = draw(scale, gap, (10_000, 10))
    expected = reference(student.astype(float), teacher.astype(float), 1.0)
    np.testing.assert_allclose(loss(student, teacher), expected, rtol=5e-6, atol=1e-6)


@parametrize(DIVERGENCES)
def test_small_divergences_keep_their_digits(name):
    """Summed naively in float32, KL(T = 20) here is off by a factor: the terms cancel."""
    loss, reference = REFERENCES[name]
    student, teacher = draw(3, 0.02)
    value = loss(student, teacher, temperature=20.0)
    expected = reference(student.astype(float), teacher.astype(float), 20.0)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    naive = np.exp(jax.nn.log_softmax(teacher / 20)) * (
        jax.nn.log_softmax(teacher / 20) - jax.nn.log_softmax(student / 20)
    )
    assert np.max(np.abs(400 * naive.sum(-1) / ref_kl(student.astype(float), teacher, 20) - 1)) > 1e-3


@parametrize(DIVERGENCES)
def test_zero_and_flat_at_student_equals_teacher(name):
    loss, _ = REFERENCES[name]
    _, teacher = draw(5, 0)
    value, gradient = jax.value_and_grad(lambda s: loss(s, teacher, temperature=4.0).sum())(teacher)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@functools.cache
def compiled(name):
    loss, _ = REFERENCES[name]
    return jax.jit(lambda student, teacher, temperature: loss(student, teacher, temperature=temperature))


@parametrize(REFERENCES)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), shift=st.floats(-50, 50), temperature=st.floats(0.5, 20),
    classes=st.sampled_from([2, 3, 7, 12]),  # every number is a program of its own
)  # fmt: skip
def test_invariant_to_shifts_and_order(name, seed, shift, temperature, classes):
    loss = compiled(name)
    student, teacher = draw(3, 1, (4, classes), seed)
    value = loss(student, teacher, temperature)
    assert (np.asarray(value) >= 0).all()
    moved = loss(student + np.float32(shift), teacher - np.float32(shift), temperature)
    np.testing.assert_allclose(moved, value, rtol=1e-3, atol=1e-4)
    order = np.random.default_rng(seed).permutation(classes)
    permuted = loss(student[:, order], teacher[:, order], temperature)
    np.testing.assert_allclose(permuted, value, rtol=1e-4, atol=1e-5)


@parametrize([*REFERENCES, "mean_squared_logits"])
def test_axis_and_where(name):
    loss = REFERENCES[name][0] if name in REFERENCES else losses.mean_squared_logits
    student, teacher = draw(3, 2)
    value = loss(student, teacher)
    assert value.shape == (8,)
    np.testing.assert_allclose(loss(student.T, teacher.T, axis=0), value, rtol=1e-5)
    where = np.arange(10)[None] < 7
    masked = loss(student, teacher, where=where)
    np.testing.assert_allclose(masked, loss(student[:, :7], teacher[:, :7]), rtol=1e-5)
    excluded = [np.where(where, x, -np.inf) for x in (student, teacher)]
    np.testing.assert_allclose(loss(*excluded), masked, rtol=1e-5)


@parametrize(["kl", "jensen_shannon"])
def test_a_temperature_an_example(name):
    loss = getattr(losses, name)
    student, teacher = draw(3, 2)
    temperatures = np.linspace(1, 8, 8, dtype=np.float32)
    value = loss(student, teacher, temperature=temperatures[:, None])
    single = [loss(student[i], teacher[i], temperature=t) for i, t in enumerate(temperatures)]
    np.testing.assert_allclose(value, single, rtol=1e-5)


# --- the extreme cases -----------------------------------------------------------------------


def extremes():
    far = np.zeros((4, 5), np.float32)
    far[0, 0], far[1, 1], far[2, 2], far[3, 3] = 1e4, -1e4, 1e4, -1e4
    mask = np.arange(5) < 3
    one_hot = np.where(np.eye(5)[:4] > 0, 0, -np.inf).astype(np.float32)
    normal = draw(3, 2, (4, 5))[0]
    yield "logit gaps of 1e4", far, far[::-1].copy()
    yield "masked by −inf", np.where(mask, normal, -np.inf), np.where(mask, far, -np.inf)
    yield "one-hot teacher", normal, one_hot
    yield "two classes", normal[:, :2], far[:, :2]
    yield "one example", normal[:1], far[:1]
    yield ("no valid class", np.full((4, 5), -np.inf, np.float32), np.full((4, 5), -np.inf, np.float32))
    yield "bfloat16", jnp.asarray(normal, jnp.bfloat16), jnp.asarray(far, jnp.bfloat16)
    yield "float16", jnp.asarray(normal, jnp.float16), jnp.asarray(normal[::-1], jnp.float16)


CASES = {case: (student, teacher) for case, student, teacher in extremes()}


@parametrize([*REFERENCES, "mean_squared_logits"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_finite_value_and_gradient(name, case, temperature):
    student, teacher = CASES[case]
    if name == "mean_squared_logits":
        loss = losses.mean_squared_logits
    else:
        loss = functools.partial(REFERENCES[name][0], temperature=temperature)
    if name == "reverse_kl" and case == "one-hot teacher":
        return  # truly infinite: see below
    value = loss(student, teacher)
    assert value.dtype == jnp.float32
    assert np.isfinite(value).all()
    for argument in (0, 1):
        gradient = jax.grad(lambda *x: loss(*x).sum(), argument)(jnp.asarray(student), teacher)
        assert gradient.dtype == jnp.asarray(student).dtype
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
    if name in REFERENCES:  # the temperature may be learned
        by_temperature = jax.grad(lambda t: REFERENCES[name][0](student, teacher, temperature=t).sum())(
            temperature
        )
        assert np.isfinite(by_temperature)
    if name in REFERENCES and case in ("logit gaps of 1e4", "two classes", "bfloat16", "float16"):
        wide = [np.asarray(x, np.float64) for x in (student, teacher)]
        expected = REFERENCES[name][1](*wide, temperature)
        np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-6)


def test_exclusion_by_one_side_only():
    student, teacher = np.zeros((1, 3), np.float32), np.array([[0.0, 0.0, -np.inf]], np.float32)
    assert losses.kl(teacher, student) == np.inf  # the student excludes what the teacher does not
    assert losses.reverse_kl(student, teacher) == np.inf
    assert losses.soft_cross_entropy(teacher, student) == np.inf
    np.testing.assert_allclose(losses.kl(student, teacher), np.log(1.5), rtol=1e-6)
    # p = (½, ½, 0), q = (⅓, ⅓, ⅓), m = (5/12, 5/12, 1/6)
    expected = 0.5 * np.log(6 / 5) + 0.5 * (2 / 3 * np.log(4 / 5) + 1 / 3 * np.log(2))
    np.testing.assert_allclose(losses.jensen_shannon(student, teacher), expected, rtol=1e-5)


def test_nan_is_never_hidden():
    bad = np.array([[0.0, np.nan]], np.float32)
    for loss, _ in REFERENCES.values():
        assert np.isnan(loss(bad, np.zeros((1, 2)))).all()
    assert np.isnan(losses.cross_entropy(bad, np.array([0]))).all()


def test_float64_is_kept():
    student, teacher = (x.astype(np.float64) for x in draw(3, 0.1))
    with jax.enable_x64(True):
        value = losses.kl(student, teacher, temperature=20.0)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, ref_kl(student, teacher, 20.0), rtol=1e-9)


# --- faults of other libraries, which must not be ours ----------------------------------------


def test_no_saturation_where_the_student_is_most_wrong():
    """Clipped at 1e-7, this KL is 16.118 with zero gradient (keras.distillation)."""
    student, teacher = np.array([[0.0, 60.0]], np.float32), np.array([[4.0, 0.0]], np.float32)
    value, gradient = jax.value_and_grad(lambda s: losses.kl(s, teacher).sum())(student)
    np.testing.assert_allclose(value, ref_kl(student, teacher, 1.0)[0], rtol=1e-6)
    assert value > 58
    np.testing.assert_allclose(gradient, [[-0.982014, 0.982014]], rtol=1e-5)


def test_zero_targets_and_masked_logits_have_a_gradient():
    """optax.kl_divergence: NaN gradient for zero targets, NaN with logits masked by −inf."""
    teacher = np.array([[0.0, -np.inf, 1.0]], np.float32)
    student = np.array([[0.3, 0.2, -np.inf]], np.float32)
    masked = np.array([[0.3, -np.inf, 0.1]], np.float32)
    assert np.isfinite(jax.grad(lambda s: losses.kl(s, teacher).sum())(masked)).all()
    gradient = jax.grad(lambda t: losses.jensen_shannon(student, t).sum())(teacher)
    assert np.isfinite(gradient).all()


def test_jensen_shannon_is_gkd_equation_1_at_every_beta():
    """p = (0.9, 0.1), q = (0.2, 0.8), β = 0.1: other libraries swap or share the weights."""
    p, q = np.array([0.9, 0.1]), np.array([0.2, 0.8])
    m = 0.1 * p + 0.9 * q
    expected = 0.1 * (p * np.log(p / m)).sum() + 0.9 * (q * np.log(q / m)).sum()
    value = losses.jensen_shannon(np.log(q), np.log(p), beta=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    far = np.array([[0.0, 40.0]], np.float32)
    for beta in (0.0, 1e-9, 1.0):
        loss = functools.partial(losses.jensen_shannon, beta=beta)
        value, gradient = jax.value_and_grad(lambda s, loss=loss: loss(s, far[:, ::-1]).sum())(far)
        assert abs(value) < 1e-6
        assert np.isfinite(gradient).all()
    for beta in (0.0, 1.0):
        assert abs(losses.jensen_shannon(np.log(q), np.log(p), beta=beta)) < 1e-12
    small = losses.jensen_shannon(np.log(q), np.log(p), beta=1e-3) / 1e-3
    np.testing.assert_allclose(small, losses.kl(np.log(q), np.log(p)), rtol=5e-3)


def test_small_bfloat16_divergences_are_not_rounded_away():
    """EasyDeL's bfloat16 accumulators log a KL of 0.0 here."""
    teacher = jnp.asarray(draw(1, 0)[1], jnp.bfloat16)
    student = teacher + jnp.asarray(draw(0.06, 0, seed=1)[1], jnp.bfloat16)
    expected = ref_kl(np.asarray(student, float), np.asarray(teacher, float), 1.0)
    assert 0 < expected.mean() < 0.01
    np.testing.assert_allclose(losses.kl(student, teacher), expected, rtol=1e-4)


# --- cross-entropy ---------------------------------------------------------------------------


def test_cross_entropy():
    logits, _ = draw(3, 1)
    labels = np.arange(8) % 10
    log_q = log_softmax(logits)
    expected = -log_q[np.arange(8), labels]
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-6)
    one_hot = np.eye(10)[labels]
    np.testing.assert_allclose(losses.cross_entropy(logits, one_hot), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(logits.T, labels, axis=0), expected, rtol=1e-6)
    smoothed = 0.9 * expected - 0.1 * log_q.mean(-1)
    value = losses.cross_entropy(logits, labels, label_smoothing=0.1)
    np.testing.assert_allclose(value, smoothed, rtol=1e-6)
    where = np.arange(10)[None] < 8
    value = losses.cross_entropy(logits, labels, label_smoothing=0.1, where=where)
    shorter = losses.cross_entropy(logits[:, :8], labels, label_smoothing=0.1)
    np.testing.assert_allclose(value, shorter, rtol=1e-6)
    gradient = jax.grad(lambda z: losses.cross_entropy(z, labels).sum())(logits)
    np.testing.assert_allclose(gradient, np.exp(log_q) - one_hot, atol=1e-6)


def test_cross_entropy_never_makes_up_a_number():
    logits = np.zeros((3, 4), np.float32)
    value = losses.cross_entropy(logits, np.array([-1, 4, 0]))
    np.testing.assert_allclose(value, [np.nan, np.nan, np.log(4)], rtol=1e-6)
    masked = losses.cross_entropy(logits, np.array([3, 0, 1]), where=np.arange(4)[None] < 3)
    np.testing.assert_allclose(masked, [np.inf, np.log(3), np.log(3)], rtol=1e-6)
    far = np.array([[1e4, 0.0]], np.float32)
    value, gradient = jax.value_and_grad(lambda z: losses.cross_entropy(z, np.array([1])).sum())(far)
    assert value == 1e4
    np.testing.assert_array_equal(gradient, [[1, -1]])


def test_mean_squared_logits():
    student, teacher = draw(3, 2)
    expected = ((student.astype(float) - teacher) ** 2).mean(-1)
    np.testing.assert_allclose(losses.mean_squared_logits(student, teacher), expected, rtol=1e-6)


# --- misuse ----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, -1.0, np.nan, np.inf, np.array([[1.0], [0.0]])])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
        losses.kl(np.zeros((2, 3)), np.zeros((2, 3)), temperature=temperature)


def test_shapes_and_fractions_are_checked():
    with pytest.raises(ValueError, match=r"the same shape, got \(2, 3\) and \(2, 4\)"):
        losses.kl(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 1.5"):
        losses.jensen_shannon(np.zeros((2, 3)), np.zeros((2, 3)), beta=1.5)
    with pytest.raises(
        ValueError, match=r"labels must be integers of shape \(2,\) or probabilities of shape \(2, 3\)"
    ):
        losses.cross_entropy(np.zeros((2, 3)), np.zeros((3,), int))
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.cross_entropy(np.zeros((2, 3)), np.zeros(2, int), label_smoothing=-0.1)


# --- probabilities in the place of logits ----------------------------------------------------

PROBABILITIES = np.exp(log_softmax(np.random.default_rng(0).normal(size=(8, 3)))).astype(np.float32)
LABELS = np.arange(8) % 3
CALLS = {
    "kl": lambda p: losses.kl(np.log(p), p),
    "mean_squared_logits": lambda p: losses.mean_squared_logits(np.log(p), p),
    "dkd": lambda p: losses.dkd(np.log(p), p, LABELS),
    "wsld": lambda p: losses.wsld(np.log(p), p, LABELS),
    "ranking_hinge": lambda p: losses.ranking_hinge(np.log(p), p),
    "mlkd": lambda p: losses.mlkd(np.log(p), p),
    "top_k": lambda p: losses.tokens.top_k(p, 2),
    "student": lambda p: losses.kl(p, np.log(p)),
    "cross_entropy": lambda p: losses.cross_entropy(p, LABELS),
    "standardise": lambda p: losses.standardise(p),
    "logit_adjusted": lambda p: losses.logit_adjusted(p, LABELS, prior=[1, 2, 3]),
    "class_balanced": lambda p: losses.class_balanced(p, LABELS, counts=[1, 2, 3]),
    "teacher_free": lambda p: losses.teacher_free(p, LABELS),
    "bucket": lambda p: losses.tokens.bucket(p, LABELS[:, None]),
    "bucketed": lambda p: losses.tokens.bucketed(losses.kl)(p, losses.tokens.top_k(np.log(p), 2)),
}
NAMES = dict.fromkeys(list(CALLS)[8:], "logits") | dict.fromkeys(["student", "bucketed"], "student_logits")


@pytest.mark.parametrize("name", CALLS)
def test_probabilities_given_as_logits_warn_once(name, monkeypatch):
    monkeypatch.setattr(_checks, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CALLS[name](PROBABILITIES)
        CALLS[name](PROBABILITIES)
    assert [str(w.message) for w in caught] == [
        f"{NAMES.get(name, 'teacher_logits')} look like probabilities: every row is non-negative and sums "
        "to 1. Give logits, or take the logarithm: jnp.log(p)."
    ]
    assert caught[0].filename == __file__  # the caller's line


def test_probabilities_on_another_axis_and_in_a_large_array(monkeypatch):
    large = jnp.asarray(np.tile(PROBABILITIES[:1], (3, 1 << 14, 1)))
    columns = jnp.moveaxis(large, -1, 0)
    for probabilities, axis in [
        (PROBABILITIES.T, 0),
        (large, -1),
        (columns, 0),
        (large.astype(jnp.bfloat16), 2),
    ]:
        for call in (losses.kl, jax.jit(losses.kl, static_argnames="axis")):
            monkeypatch.setattr(_checks, "_warned", set())
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call(jnp.zeros_like(probabilities), probabilities, axis=axis)
            assert len(caught) == (call is losses.kl)


def test_where_nothing_warns():
    """Warnings are errors here."""
    logits = np.random.default_rng(1).normal(size=(8, 3))
    others = {
        "sums of 1 with both signs": logits - logits.mean(-1, keepdims=True) + 1 / 3,
        "non-negative with other sums": np.abs(logits),
        "one-hot": np.eye(3)[LABELS],
        "one-hot, masked": np.where(np.eye(3)[LABELS] > 0, 1.0, -np.inf),
        "one row": PROBABILITIES[:1],
        "one class": np.ones((8, 1)),
        "integers": np.eye(3, dtype=int)[LABELS],
        "no example": np.zeros((0, 3)),
        "one of many rows": np.concatenate([PROBABILITIES, logits]),
        "NaN": np.where(PROBABILITIES > 0.5, np.nan, PROBABILITIES),
    }
    for name, x in others.items():
        assert not _checks._looks_like_probabilities(x, -1), name
        losses.kl(x, x)
    losses.teacher_free(logits, LABELS, soften="softmax", temperature=1.0)  # its own probabilities
    jax.jit(losses.kl)(PROBABILITIES, PROBABILITIES)

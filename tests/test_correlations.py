"""Standardised logits and relations within a batch, against their formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_logits import draw, log_softmax, numeric_gradient, ref_kl

from distill_jax import losses

# --- the formulas, in NumPy float64: the loss of a batch, one number -------------------------


def pearson(a, b):
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    return (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))


def ref_dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    q, p = np.exp(log_softmax(student / temperature)), np.exp(log_softmax(teacher / temperature))
    return beta * (1 - pearson(q, p)).mean() + gamma * (1 - pearson(q.T, p.T)).mean()


def ref_mlkd(student, teacher, temperatures=(2.0, 3.0, 4.0, 5.0, 6.0), weights=(1, 1, 1)):
    total = 0.0
    batch, classes = student.shape
    for t in temperatures:
        q, p = np.exp(log_softmax(student / t)), np.exp(log_softmax(teacher / t))
        total += weights[0] * ref_kl(student, teacher, t).mean()
        total += weights[1] * ((p @ p.T - q @ q.T) ** 2).sum() / batch
        total += weights[2] * ((p.T @ p - q.T @ q) ** 2).sum() / classes
    return total


def ref_standardise(logits, temperature=1.0, ddof=0):
    centred = logits - logits.mean(-1, keepdims=True)
    return centred / (temperature * logits.std(-1, ddof=ddof, keepdims=True))


def ref_lskd(student, teacher, temperature=3.0, ddof=0):
    return ref_kl(
        ref_standardise(student, ddof=ddof), ref_standardise(teacher, ddof=ddof), temperature
    ).mean()


def lskd(student, teacher, temperature=3.0, ddof=0, **options):
    standard = [losses.standardise(x, ddof=ddof, **options) for x in (student, teacher)]
    return losses.kl(*standard, temperature=temperature, **options)


RELATIONS = {
    "dist": (losses.dist, ref_dist),
    "dist, between classes": (
        functools.partial(losses.dist, gamma=0.0, temperature=4.0),
        functools.partial(ref_dist, gamma=0.0, temperature=4.0),
    ),
    "dist, within classes": (
        functools.partial(losses.dist, beta=0.0, gamma=2.0),
        functools.partial(ref_dist, beta=0.0, gamma=2.0),
    ),
    "mlkd": (losses.mlkd, ref_mlkd),
    "mlkd, of examples": (
        functools.partial(losses.mlkd, instance_weight=0, class_weight=0),
        functools.partial(ref_mlkd, weights=(0, 1, 0)),
    ),
    "mlkd, of classes": (
        functools.partial(losses.mlkd, instance_weight=0, batch_weight=0),
        functools.partial(ref_mlkd, weights=(0, 0, 1)),
    ),
}
ALL = {
    **RELATIONS,
    "kl of standardise": (lskd, ref_lskd),
    "kl of standardise, ddof = 1": (functools.partial(lskd, ddof=1), functools.partial(ref_lskd, ddof=1)),
}
EACH = ["dist", "mlkd", "kl of standardise"]  # one of each method
parametrize = functools.partial(pytest.mark.parametrize, "name")


@functools.cache
def compiled(name):
    """Values, and gradients of their mean, of a loss: one compilation a shape, for all tests."""
    loss, _ = ALL[name]

    def both(student, teacher, where=None):
        value, pull = jax.vjp(lambda *x: loss(*x, where=where), student, teacher)
        return value, *pull(jnp.full_like(value, 1 / value.size))

    return jax.jit(both)


# --- value and gradient ----------------------------------------------------------------------


@parametrize(ALL)
@pytest.mark.parametrize(("scale", "gap"), [(1, 1), (3, 3), (3, 0.5), (0.3, 0.05)])
def test_value_and_gradient_to_six_digits(name, scale, gap):
    _, reference = ALL[name]
    student, teacher = draw(scale, gap)
    wide = [x.astype(float) for x in (student, teacher)]
    value, gradient, _ = compiled(name)(student, teacher)
    np.testing.assert_allclose(value.mean(), reference(*wide), rtol=5e-6)
    expected = numeric_gradient(lambda s: reference(s, wide[1]), wide[0])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@parametrize(ALL)
def test_zero_and_flat_at_student_equals_teacher(name):
    _, teacher = draw(5, 0)
    value, gradient, _ = compiled(name)(teacher, teacher)
    np.testing.assert_allclose(value, 0, atol=1e-12)  # the square of a rounding
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


@parametrize(ALL)
def test_small_values_keep_their_digits(name):
    """As 1 − ρ, or as ‖PPᵀ − QQᵀ‖, most of them would be lost in float32."""
    _, reference = ALL[name]
    student, teacher = draw(3, 0.01)
    expected = reference(student.astype(float), teacher.astype(float))
    value, *_ = compiled(name)(student, teacher)
    np.testing.assert_allclose(value.mean(), expected, rtol=2e-4)


@parametrize(ALL)
def test_invariant_to_shifts_and_order(name):
    student, teacher = draw(3, 1)
    value, *_ = compiled(name)(student, teacher)
    assert (np.asarray(value) >= 0).all()
    moved, *_ = compiled(name)(student + np.float32(37), teacher - np.float32(11))
    np.testing.assert_allclose(moved, value, rtol=1e-3, atol=1e-4)
    order = np.random.default_rng(0).permutation(10)
    permuted, *_ = compiled(name)(student[:, order], teacher[:, order])
    np.testing.assert_allclose(permuted, value, rtol=1e-4, atol=1e-6)
    examples = np.random.default_rng(1).permutation(8)
    permuted, *_ = compiled(name)(student[examples], teacher[examples])
    np.testing.assert_allclose(permuted, value[examples], rtol=1e-4, atol=1e-6)


@parametrize(EACH)
def test_axis_and_where(name):
    loss, _ = ALL[name]
    student, teacher = draw(3, 2)
    value, *_ = compiled(name)(student, teacher)
    assert value.shape == (8,)
    if "standardise" not in name:
        turned = jax.jit(functools.partial(loss, axis=0))(student.T, teacher.T)
        np.testing.assert_allclose(turned, value, rtol=1e-5)
    blocks, *_ = compiled(name)(*(x.reshape(2, 4, 10) for x in (student, teacher)))
    np.testing.assert_allclose(blocks, value.reshape(2, 4), rtol=1e-5)
    where = np.arange(10)[None] < 7
    short, *_ = compiled(name)(student[:, :7], teacher[:, :7])
    masked, *_ = compiled(name)(student, teacher, where)
    np.testing.assert_allclose(masked, short, rtol=1e-5)
    excluded = [np.where(where, x, -np.inf) for x in (student, teacher)]
    np.testing.assert_allclose(compiled(name)(*excluded)[0], short, rtol=1e-5)


@parametrize(EACH)
def test_examples_that_do_not_count_change_nothing(name):
    student, teacher = draw(3, 2)
    alone, gradient, _ = compiled(name)(student[:6], teacher[:6])
    where = np.arange(8)[:, None] < 6
    padded = [np.where(where, x, pad).astype(np.float32) for x, pad in ((student, 1e4), (teacher, 7))]
    value, masked, _ = compiled(name)(*padded, where)
    np.testing.assert_allclose(value[:6], alone, rtol=1e-5)
    np.testing.assert_array_equal(value[6:], 0)
    np.testing.assert_allclose(masked[:6] * 8 / 6, gradient, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(masked[6:], 0)


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
    yield "one class", normal[:, :1], far[:, :1]
    yield "one example", normal[:1], far[:1]
    yield "all equal", normal * 0, normal * 0 + np.float32(0.1)
    yield "the student's all equal", normal * 0 + np.float32(0.1), normal
    yield "equal examples", np.repeat(normal[:1], 4, 0), normal
    none = np.full((4, 5), -np.inf, np.float32)
    yield "no valid class", none, none
    yield "bfloat16", jnp.asarray(normal, jnp.bfloat16), jnp.asarray(far, jnp.bfloat16)


CASES = {case: (student, teacher) for case, student, teacher in extremes()}


@parametrize(EACH)
@pytest.mark.parametrize("case", CASES)
def test_finite_value_and_gradient(name, case):
    student, teacher = CASES[case]
    value, *gradients = compiled(name)(student, teacher)
    assert value.dtype == jnp.float32
    assert np.isfinite(value).all()
    for gradient in gradients:
        assert gradient.dtype == jnp.asarray(student).dtype
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
    if case in ("all equal", "no valid class"):
        np.testing.assert_allclose(value, 0, atol=1e-12)
        np.testing.assert_allclose(gradients[0], 0, atol=1e-12)


def test_correlation_of_a_constant():
    """1 − ρ is 1 where one vector is constant, 0 where both are; the gradient is 0 in both cases."""
    normal, _ = draw(3, 0)
    for constant in (np.full((8, 10), 0.1, np.float32), np.full((8, 10), -7.3, np.float32)):
        value, *gradients = compiled("dist, between classes")(constant, normal)
        np.testing.assert_array_equal(value, 1)
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0)
    same = np.repeat(normal[:1], 8, 0)  # constant in each class
    value, *gradients = compiled("dist, within classes")(same, normal)
    np.testing.assert_allclose(value, 2, rtol=1e-6)  # γ = 2
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)
    value, *_ = compiled("dist, within classes")(same, same[::-1] * 2)
    np.testing.assert_array_equal(value, 0)


def test_improbable_classes_correlate_too():
    """Probabilities of e^-110, 0 in float32, have squares that vanish long before."""
    student, teacher = draw(1, 1)
    student[:, 3] -= 110
    teacher[:, 5] -= 60
    expected = ref_dist(student.astype(float), teacher.astype(float), beta=0.0, gamma=2.0)
    value, gradient, _ = compiled("dist, within classes")(student, teacher)
    np.testing.assert_allclose(value.mean(), expected, rtol=1e-4)
    assert np.isfinite(gradient).all()


def test_nan_is_never_hidden():
    bad, fine = draw(3, 2)
    bad[0, 0] = np.nan
    for name in EACH:
        value, *_ = compiled(name)(bad, fine)
        assert np.isnan(value[0]), name


# --- standardise -----------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
def test_standardise(ddof):
    logits, _ = draw(3, 2)
    value = losses.standardise(logits, temperature=2.0, ddof=ddof)
    expected = ref_standardise(logits.astype(float), 2.0, ddof)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        losses.standardise(logits.T, temperature=2.0, ddof=ddof, axis=0), value.T, rtol=1e-5
    )
    scaled = losses.standardise(logits * 1e30, temperature=2.0, ddof=ddof)  # no square overflows
    np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        losses.standardise(logits * 1e-30, temperature=2.0, ddof=ddof), expected, rtol=1e-5, atol=1e-6
    )
    where = np.arange(10)[None] < 7
    masked = losses.standardise(logits, ddof=ddof, where=where)
    expected = ref_standardise(logits[:, :7].astype(float), ddof=ddof)
    np.testing.assert_allclose(masked[:, :7], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(masked[:, 7:], -np.inf)


def test_standardise_makes_of_equal_logits_exactly_zero():
    rows = np.array([[0.1] * 7, [1e4] * 7, [-3.3] * 7], np.float32)
    for ddof in (0, 1):
        value, gradient = jax.value_and_grad(
            lambda z, ddof=ddof: (losses.standardise(z, ddof=ddof) ** 2).sum()
        )(rows)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(losses.standardise(rows[:, :1]), 0)  # one class


def test_float64_is_kept():
    student, teacher = (x.astype(np.float64) for x in draw(3, 0.5))
    with jax.enable_x64(True):
        for name in EACH:
            loss, reference = ALL[name]
            value = jax.jit(loss)(student, teacher)
            assert value.dtype == jnp.float64
            np.testing.assert_allclose(value.mean(), reference(student, teacher), rtol=1e-9)


# --- misuse ----------------------------------------------------------------------------------


def test_arguments_are_checked():
    logits = np.zeros((2, 3), np.float32)
    for loss in (losses.dist, losses.mlkd):
        with pytest.raises(ValueError, match=r"the same shape, got \(2, 3\) and \(3, 2\)"):
            loss(logits, logits.T)
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.dist(logits, logits, temperature=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.mlkd(logits, logits, temperatures=(1.0, -1.0))
    with pytest.raises(ValueError, match="temperatures must hold at least one temperature"):
        losses.mlkd(logits, logits, temperatures=())
    for temperatures in (2.0, "24", np.float32(2), {2.0}):
        with pytest.raises(ValueError, match="temperatures must"):
            losses.mlkd(logits, logits, temperatures=temperatures)
    with pytest.raises(ValueError, match="ddof must be an integer of at least 0, got -1"):
        losses.standardise(logits, ddof=-1)
    with pytest.raises(ValueError, match="ddof must be below the number of classes, 3, got 3"):
        losses.standardise(logits, ddof=3)

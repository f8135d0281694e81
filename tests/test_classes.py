"""Logit losses that use labels or the order of classes, against their formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_logits import draw, log_softmax, numeric_gradient, ref_kl, ref_soft_cross_entropy

from distill_jax import losses

LABELS = np.array([0, 3, 9, 3, 5, 1, 7, 2])
ROWS = np.arange(8)

# --- the formulas, in NumPy float64 ----------------------------------------------------------


def without(logits, labels):
    """The logits of all classes but the label's."""
    keep = np.arange(logits.shape[1]) != labels[:, None]
    return logits[keep].reshape(len(logits), -1)


def label_or_not(logits, labels):
    """Two logits: of the label's class, and of all others together."""
    rest = without(logits, labels)
    peak = rest.max(-1)
    total = peak + np.log(np.exp(rest - peak[:, None]).sum(-1))
    return np.stack([logits[np.arange(len(logits)), labels], total], -1)


def surprise(logits, labels):
    return np.logaddexp(0, -np.diff(label_or_not(logits, labels)[:, ::-1])[:, 0])


def ref_dkd(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0):
    s, t = student / temperature, teacher / temperature
    binary = ref_kl(label_or_not(s, labels), label_or_not(t, labels), 1)
    rest = ref_kl(without(s, labels), without(t, labels), 1)
    return temperature**2 * (alpha * binary + beta * rest)


def ref_nkd(student, teacher, labels, gamma=1.5, temperature=1.0):
    first = np.exp(-surprise(teacher, labels)) * surprise(student, labels)
    rest = ref_soft_cross_entropy(without(student, labels), without(teacher, labels), temperature)
    return first + gamma * rest


def wsld_weight(student, teacher, labels):
    return 1 - np.exp(-surprise(student, labels) / surprise(teacher, labels))


def ref_wsld(student, teacher, labels, temperature=2.0, weight=None):
    weight = wsld_weight(student, teacher, labels) if weight is None else weight
    return weight * ref_soft_cross_entropy(student, teacher, temperature)


def ref_teacher_free(
    student, labels, probability=0.99, temperature=20.0, student_temperature=None, soften="power"
):
    classes = student.shape[1]
    made_up = np.full(student.shape, (1 - probability) / (classes - 1))
    made_up[np.arange(len(student)), labels] = probability
    if soften == "power":
        made_up = made_up ** (1 / temperature)
        log_p = np.log(made_up / made_up.sum(-1, keepdims=True))
    else:
        log_p = log_softmax(made_up / temperature)
    cool = student_temperature or temperature
    log_q = log_softmax(student / cool)
    return cool**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


def over_pairs(teacher, value):
    result = []
    for row in range(len(teacher)):
        t = teacher[row]
        pairs = [(k, m) for k in range(len(t)) for m in range(len(t)) if t[k] > t[m]]
        result.append(np.mean([value(row, k, m) for k, m in pairs]))
    return np.array(result)


def ref_ranking_hinge(student, teacher, margin=None, temperature=1.0):
    q, p = np.exp(log_softmax(student / temperature)), np.exp(log_softmax(teacher / temperature))

    def hinge(i, k, m):
        wanted = p[i, k] - p[i, m] if margin is None else margin
        return max(0.0, wanted - (q[i, k] - q[i, m]))

    return over_pairs(teacher, hinge)


def ref_ranking_logistic(student, teacher):
    return over_pairs(teacher, lambda i, k, m: np.logaddexp(0, student[i, m] - student[i, k]))


WITH_LABELS = {
    "dkd": (losses.dkd, ref_dkd),
    "dkd, T = 1": (
        functools.partial(losses.dkd, alpha=0.5, beta=2.0, temperature=1.0),
        functools.partial(ref_dkd, alpha=0.5, beta=2.0, temperature=1.0),
    ),
    "dkd, the first term": (functools.partial(losses.dkd, beta=0.0), functools.partial(ref_dkd, beta=0.0)),
    "nkd": (losses.nkd, ref_nkd),
    "nkd, T = 4": (
        functools.partial(losses.nkd, gamma=0.7, temperature=4.0),
        functools.partial(ref_nkd, gamma=0.7, temperature=4.0),
    ),
    "wsld": (losses.wsld, ref_wsld),
}
# With the label only: the teacher's place is unused, so that one test serves all.
MADE_UP = {
    "teacher_free": {},
    "teacher_free, T = 1": {"probability": 0.9, "temperature": 1.0},
    "teacher_free, the authors'": {"soften": "softmax", "student_temperature": 1.0},
}
for case, options in MADE_UP.items():
    WITH_LABELS[case] = (
        lambda s, t, y, options=options: losses.teacher_free(s, y, **options),
        lambda s, t, y, options=options: ref_teacher_free(s, y, **options),
    )
RANKINGS = {
    "ranking_hinge": (losses.ranking_hinge, ref_ranking_hinge),
    "ranking_hinge, m = 0.2": (
        functools.partial(losses.ranking_hinge, margin=0.2, temperature=2.0),
        functools.partial(ref_ranking_hinge, margin=0.2, temperature=2.0),
    ),
    "ranking_logistic": (losses.ranking_logistic, ref_ranking_logistic),
}
ALL = {**WITH_LABELS, **RANKINGS}
parametrize = functools.partial(pytest.mark.parametrize, "name")


def arguments(name, labels=LABELS):
    return (labels,) if name in WITH_LABELS else ()


@functools.cache
def compiled(name):
    """Value and gradients for student and teacher of a loss: one compilation a shape, for all tests."""
    loss, _ = ALL[name]

    def both(student, teacher, *rest):
        value, pull = jax.vjp(lambda *x: loss(*x, *rest), student, teacher)
        return value, *pull(jnp.ones_like(value))

    return jax.jit(both)


# --- value and gradient ----------------------------------------------------------------------


@parametrize(ALL)
@pytest.mark.parametrize(("scale", "gap"), [(1, 1), (5, 5), (3, 0.5), (0.3, 0.05)])
def test_value_and_gradient_to_six_digits(name, scale, gap):
    _, reference = ALL[name]
    student, teacher = draw(scale, gap)
    rest = arguments(name)
    wide = [x.astype(float) for x in (student, teacher)]
    expected = reference(*wide, *rest)
    value, gradient, _ = compiled(name)(student, teacher, *rest)
    np.testing.assert_allclose(value, expected, rtol=5e-6, atol=1e-6 * expected.max())
    if name == "wsld":  # its weight is a constant to the gradient
        reference = functools.partial(ref_wsld, weight=wsld_weight(*wide, LABELS))
    expected = numeric_gradient(lambda s: reference(s, wide[1], *rest).sum(), wide[0])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * max(0.1, np.abs(expected).max()))


@parametrize(["dkd", "dkd, the first term", "dkd, T = 1"])
@pytest.mark.parametrize("gap", [0.02, 1e-3])
def test_small_values_of_dkd_keep_their_digits(name, gap):
    _, reference = ALL[name]
    student, teacher = draw(3, gap)
    expected = reference(student.astype(float), teacher.astype(float), LABELS)
    value, *_ = compiled(name)(student, teacher, LABELS)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6 * expected.max())


def test_dkd_is_kl_with_the_teachers_doubt_for_beta():
    student, teacher = draw(3, 1)
    for temperature in (1.0, 4.0):
        doubt = 1 - np.exp(-surprise(teacher.astype(float) / temperature, LABELS))
        value = losses.dkd(student, teacher, LABELS, beta=doubt, temperature=temperature)
        np.testing.assert_allclose(value, losses.kl(student, teacher, temperature=temperature), rtol=2e-5)


@parametrize(["dkd", "dkd, T = 1", "ranking_hinge"])
def test_zero_and_flat_at_student_equals_teacher(name):
    _, teacher = draw(5, 0)
    value, gradient, _ = compiled(name)(teacher, teacher, *arguments(name))
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, 0)


@parametrize(ALL)
def test_invariant_to_shifts_and_order(name):
    student, teacher = draw(3, 1)
    rest = arguments(name)
    value, *_ = compiled(name)(student, teacher, *rest)
    assert (np.asarray(value) >= 0).all()
    moved, *_ = compiled(name)(student + np.float32(37), teacher - np.float32(11), *rest)
    np.testing.assert_allclose(moved, value, rtol=1e-3, atol=1e-4)
    order = np.random.default_rng(0).permutation(10)
    place = np.argsort(order)
    permuted, *_ = compiled(name)(student[:, order], teacher[:, order], *(place[y] for y in rest))
    np.testing.assert_allclose(permuted, value, rtol=1e-5, atol=1e-6)
    examples = np.random.default_rng(1).permutation(8)
    permuted, *_ = compiled(name)(student[examples], teacher[examples], *(y[examples] for y in rest))
    np.testing.assert_allclose(permuted, value[examples], rtol=1e-6)


@parametrize(ALL)
def test_axis_and_where(name):
    loss = jax.jit(ALL[name][0])
    student, teacher = draw(3, 2)
    rest = arguments(name, LABELS % 7)
    value = loss(student, teacher, *rest)
    assert value.shape == (8,)
    np.testing.assert_allclose(
        jax.jit(axis_last(ALL[name][0], name))(student.T, teacher.T, *rest), value, rtol=1e-5
    )
    more = loss(*(x.reshape(2, 4, 10) for x in (student, teacher)), *(y.reshape(2, 4) for y in rest))
    np.testing.assert_allclose(more, value.reshape(2, 4), rtol=1e-6)
    where = np.arange(10)[None] < 7
    short = loss(student[:, :7], teacher[:, :7], *rest)
    excluded = [np.where(where, x, -np.inf) for x in (student, teacher)]
    np.testing.assert_allclose(loss(*excluded, *rest), short, rtol=1e-5)
    if name not in MADE_UP:
        np.testing.assert_allclose(
            jax.jit(functools.partial(ALL[name][0], where=where))(student, teacher, *rest), short, rtol=1e-5
        )
        # Rows without a class, as padding: nothing of them counts.
        where = np.arange(8)[:, None] < 6
        padded = np.where(where, student, 1e4)
        masked = functools.partial(ALL[name][0], where=where)
        value, gradient = jax.jit(jax.value_and_grad(lambda s: masked(s, teacher, *rest).sum()))(padded)
        np.testing.assert_allclose(value, loss(student, teacher, *rest)[:6].sum(), rtol=1e-5)
        np.testing.assert_array_equal(gradient[6:], 0)


def axis_last(loss, name):
    if name in MADE_UP:
        return lambda s, t, y: losses.teacher_free(s, y, axis=0, **MADE_UP[name])
    return functools.partial(loss, axis=0)


def test_teacher_free_where():
    student, _ = draw(3, 2)
    where = np.arange(10)[None] < 7
    value = losses.teacher_free(student, LABELS % 7, where=where)
    np.testing.assert_allclose(value, losses.teacher_free(student[:, :7], LABELS % 7), rtol=1e-5)
    np.testing.assert_array_equal(losses.teacher_free(student, LABELS * 0 + 8, where=where), np.inf)
    rows = np.arange(8)[:, None] < 6
    assert (losses.teacher_free(student, LABELS, where=rows)[6:] == 0).all()


def test_a_temperature_an_example():
    student, teacher = draw(3, 2)
    temperatures = np.linspace(1, 8, 8, dtype=np.float32)
    for loss in map(jax.jit, (losses.dkd, losses.nkd, losses.wsld)):
        value = loss(student, teacher, LABELS, temperature=temperatures[:, None])
        single = [loss(student[i], teacher[i], LABELS[i], temperature=t) for i, t in enumerate(temperatures)]
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
    yield "one-hot teacher by a gap", normal, 1e4 * np.eye(5, dtype=np.float32)[:4]
    yield "two classes", normal[:, :2], far[:, :2]
    yield "one class", normal[:, :1], far[:, :1]
    yield "one example", normal[:1], far[:1]
    yield "all equal", normal * 0, normal * 0 + 1
    none = np.full((4, 5), -np.inf, np.float32)
    yield "no valid class", none, none
    yield "bfloat16", jnp.asarray(normal, jnp.bfloat16), jnp.asarray(far, jnp.bfloat16)


CASES = {case: (student, teacher) for case, student, teacher in extremes()}


@parametrize(ALL)
@pytest.mark.parametrize("case", CASES)
def test_finite_value_and_gradient(name, case):
    student, teacher = CASES[case]
    _, reference = ALL[name]
    labels = np.arange(len(student)) % min(3, student.shape[1])
    rest = arguments(name, labels)
    value, *gradients = compiled(name)(student, teacher, *rest)
    assert value.dtype == jnp.float32
    # Without `where` a row of −inf is no padding: the student excludes the label's class
    expected = np.inf if case == "no valid class" and name in MADE_UP else 0.0
    np.testing.assert_array_equal(np.where(np.isfinite(value), 0.0, value), expected)
    for gradient in gradients:
        assert gradient.dtype == jnp.asarray(student).dtype
        assert np.isfinite(np.asarray(gradient, np.float32)).all()
    if case in ("logit gaps of 1e4", "one-hot teacher by a gap", "bfloat16") and name != "wsld":
        wide = [np.asarray(x, np.float64) for x in (student, teacher)]
        expected = reference(*wide, *rest)
        np.testing.assert_allclose(value, expected, rtol=5e-6, atol=1e-6)


def test_wsld_where_someone_is_certain():
    """The weight is 1 − exp(−log q_y / log p_y), also where one of the two is 0 or tiny."""
    certain, doubt = np.array([[1e4, 0.0]], np.float32), np.array([[0.0, 0.0]], np.float32)
    label = np.array([0])
    soft = losses.soft_cross_entropy(doubt, certain, temperature=2.0)
    np.testing.assert_allclose(losses.wsld(doubt, certain, label), soft, rtol=1e-6)  # w = 1
    assert losses.wsld(certain, doubt, label) == 0
    sure = np.array([[40.0, 0.0]], np.float32)  # 1 − q_y is lost in float32
    surer = np.array([[41.0, 0.0]], np.float32)
    weight = losses.wsld(surer, sure, label) / losses.soft_cross_entropy(surer, sure, temperature=2)
    expected = wsld_weight(surer.astype(float), sure.astype(float), label)
    np.testing.assert_allclose(weight, expected, rtol=1e-5)
    excluded = np.array([[-np.inf, 0.0]], np.float32)
    assert losses.wsld(doubt, excluded, label) == 0
    assert np.isnan(losses.wsld(excluded, excluded, label))


@pytest.mark.parametrize("logit", [-2.0, -1.0, 1.0, 2.0, 5.0])
def test_dkd_where_only_the_label_exists(logit):
    """The two terms, whatever the one logit is, since it has nothing to be compared with."""
    inf, label, options = np.inf, np.array([0]), {"temperature": 1.0, "alpha": 1.0, "beta": 0.0}
    dkd = jax.jit(jax.value_and_grad(lambda s, t: losses.dkd(s, t, label, **options)[0]))
    student, certain = np.zeros((1, 3), np.float32), np.array([[logit, -inf, -inf]], np.float32)
    value, gradient = dkd(student, certain)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)  # KL((1, 0)‖(1/3, 2/3))
    np.testing.assert_allclose(gradient, [[-2 / 3, 1 / 3, 1 / 3]], rtol=1e-6)
    assert dkd(certain, np.array([[1.0, -inf, -inf]], np.float32))[0] == 0
    student = np.array([[logit, -inf, 1.0]], np.float32)
    np.testing.assert_allclose(dkd(student, certain)[0], np.logaddexp(0, 1 - logit), rtol=1e-6)
    where = np.array([[True, False, False]])
    alone = losses.dkd(np.array([[logit, 0, 0]]), np.array([[8.0, 0, 0]]), label, where=where)
    assert alone == 0


def test_exclusion_by_the_student_only():
    student, teacher = np.array([[-np.inf, 0.0, 1.0]], np.float32), np.zeros((1, 3), np.float32)
    for loss in map(jax.jit, (losses.dkd, losses.nkd, losses.wsld)):
        for label in (0, 1):
            assert loss(student, teacher, np.array([label])) == np.inf
            assert np.isfinite(loss(teacher, student, np.array([label])))


def test_nan_and_bad_labels_are_never_hidden():
    bad, fine = np.array([[0.0, np.nan, 1.0]], np.float32), np.ones((1, 3), np.float32)
    fine[0, 0] = 2
    for name, (loss, _) in ALL.items():
        rest = arguments(name, np.array([0]))
        loss = jax.jit(loss)
        assert np.isnan(loss(bad, fine, *rest)).all(), name
        if name in WITH_LABELS:
            for label in (-1, 3):
                assert np.isnan(loss(fine, fine, np.array([label]))).all(), name


# --- faults of other libraries, which must not be ours ----------------------------------------


def test_dkd_on_extreme_logits_is_no_nan():
    """mdistiller takes log of a sum of rounded probabilities: 0·log 0."""
    student, teacher = np.array([[300.0, 0, 0]], np.float32), np.array([[0.0, 300, 0]], np.float32)
    value, gradient, _ = compiled("dkd, T = 1")(student, teacher, np.array([0]))
    expected = ALL["dkd, T = 1"][1](student.astype(float), teacher.astype(float), np.array([0]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_rankings_count_ties_once_and_not_at_all():
    student = np.array([[0.0, 1.0, 5.0]], np.float32)
    teacher = np.array([[1.0, 0.0, 1.0]], np.float32)  # 0 and 2 above 1; 0 and 2 alike
    expected = (np.logaddexp(0, 1.0) + np.logaddexp(0, -4.0)) / 2
    np.testing.assert_allclose(losses.ranking_logistic(student, teacher)[0], expected, rtol=1e-6)
    for loss in (losses.ranking_hinge, losses.ranking_logistic):
        value, gradient = jax.value_and_grad(lambda s, loss=loss: loss(s, teacher * 0).sum())(student)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_the_order_of_the_teacher_is_that_of_its_logits():
    """Probabilities that round to one value are still in order (a guard of 1e-8 drops such pairs)."""
    teacher = np.array([[100.0, 1.0, 0.0]], np.float32)
    student = np.array([[9.0, 0.0, 3.0]], np.float32)
    expected = np.mean(np.logaddexp(0, [-9.0, -6.0, 3.0]))
    np.testing.assert_allclose(losses.ranking_logistic(student, teacher)[0], expected, rtol=1e-6)


# --- misuse ----------------------------------------------------------------------------------


def test_arguments_are_checked():
    logits = np.zeros((2, 3), np.float32)
    for loss in (losses.dkd, losses.nkd, losses.wsld):
        with pytest.raises(
            ValueError, match=r"labels must be integers of shape \(2,\) for logits of shape \(2, 3\)"
        ):
            loss(logits, logits, logits)
        with pytest.raises(ValueError, match=r"the same shape, got \(2, 3\) and \(3, 2\)"):
            loss(logits, logits.T, np.zeros(2, int))
        with pytest.raises(ValueError, match="temperature must be positive"):
            loss(logits, logits, np.zeros(2, int), temperature=0)
    with pytest.raises(ValueError, match="soften must be 'power' or 'softmax', got 'log'"):
        losses.teacher_free(logits, np.zeros(2, int), soften="log")
    with pytest.raises(ValueError, match="student_temperature must be positive"):
        losses.teacher_free(logits, np.zeros(2, int), student_temperature=-1.0)
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\], got 2"):
        losses.teacher_free(logits, np.zeros(2, int), probability=2)

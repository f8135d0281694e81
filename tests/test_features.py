"""Feature losses against their formulas in float64, the reference programs, and at the edges."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import features, losses
from distill_jax.losses._space import pool_max, pool_mean

GOLDEN = Path(__file__).parent / "golden"

# --- the formulas, in NumPy float64 ----------------------------------------------------------


def flat(x):
    return x.reshape(len(x), -1)


def rows(x):
    """[batch, positions, channels]"""
    return x.reshape(len(x), -1, x.shape[-1])


def unit(x, axis):
    return x / np.sqrt((x**2).sum(axis, keepdims=True))


def ref_pool(x, bins, reduce=np.mean):
    for axis in range(1, x.ndim - 1):
        n = x.shape[axis]
        parts = []
        for i in range(bins):
            index = range(int(np.floor(i * n / bins)), int(np.ceil((i + 1) * n / bins)))
            parts.append(reduce(np.take(x, index, axis), axis=axis))
        x = np.stack(parts, axis)
    return x


def ref_hint(s, t):
    return ((flat(s) - flat(t)) ** 2).mean(-1)


def ref_attention(s, t, p=2, mean=False):
    maps = [unit((np.abs(rows(x)) ** p).sum(-1), 1) for x in (s, t)]
    squares = (maps[0] - maps[1]) ** 2
    return squares.mean(-1) if mean else np.sqrt(squares.sum(-1))


def ref_factor(s, t, p=1):
    return np.linalg.norm(unit(flat(s), 1) - unit(flat(t), 1), p, axis=1)


def ref_nst(s, t, kernel="polynomial", bandwidth=None):
    def means(a, b):
        a, b = (unit(rows(x), 1).transpose(0, 2, 1) for x in (a, b))
        products = np.einsum("nip,njp->nij", a, b)
        distances = ((a[:, :, None] - b[:, None]) ** 2).sum(-1)
        values = {
            "linear": lambda: products,
            "polynomial": lambda: products**2,
            "gaussian": lambda: np.exp(-distances / (2 * bandwidth)),
        }
        return values[kernel]().mean((1, 2))

    return means(s, s) + means(t, t) - 2 * means(s, t)


def ref_fsp(s, t, first, pool="max", mean=False):
    reduce = np.max if pool == "max" else np.mean
    bins = min(s.shape[1], first[0].shape[1])
    flows = [
        np.einsum("npi,npj->nij", rows(ref_pool(a, bins, reduce)), rows(ref_pool(b, bins, reduce)))
        / bins ** (a.ndim - 2)
        for a, b in zip((s, t), first, strict=True)
    ]
    squares = flat((flows[0] - flows[1]) ** 2)
    return squares.mean(-1) if mean else squares.sum(-1)


def ref_boundary(s, t, margin=1.0):
    return flat(np.where(t > 0, np.maximum(margin - s, 0), np.maximum(margin + s, 0)) ** 2).sum(-1)


def ref_ofd(s, t, margin):
    target = np.maximum(t, margin)
    free = (s <= target) & (target <= 0)
    return flat(np.where(free, 0, (s - target) ** 2)).sum(-1)


def ref_vid(s, t, variance):
    return flat(((t - s) ** 2 / variance + np.log(variance)) / 2).sum(-1)


def ref_hierarchical(s, t):
    loss, weights, weight = ref_hint(s, t), 1.0, 1.0
    for level in (4, 2, 1):
        if level < s.shape[1]:
            weight /= 2
            loss = loss + weight * ref_hint(ref_pool(s, level), ref_pool(t, level))
            weights += weight
    return loss / weights


def ref_cat(s, t, resolution=2):
    s, t = (unit(rows(ref_pool(x, resolution)), 1) for x in (s, t))
    return ref_hint(s, t)


def ref_cka(s, t, debiased=False):
    """Song et al.'s estimators by their sums; the value of the whole batch."""
    n = len(s)

    def hsic(k, m):
        if not debiased:
            h = np.eye(n) - 1 / n
            return np.trace(k @ h @ m @ h)
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2))
        return total - 2 / (n - 2) * (k @ m).sum()

    k, m = flat(s) @ flat(s).T, flat(t) @ flat(t).T
    return 1 - hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def numeric_gradient(fn, x):
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        gradient[index] = (fn(up) - fn(down)) / 2e-5
    return gradient


def draw(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


MAP, WIDE, SMALL = (2, 5, 5, 3), (2, 5, 5, 40), (2, 3, 3, 3)
MARGIN, VARIANCE = np.array([-0.3, -1.0, -0.1]), np.array([0.5, 2.0, 0.1])
OTHERS = draw((2, 3, 3, 4), (2, 3, 3, 4), seed=9)


def fsp_beside(s, t, where=None, **options):
    return losses.fsp((s, OTHERS[0]), (t, OTHERS[1]), where=where, **options)


def with_options(loss, reference, **options):
    return functools.partial(loss, **options), functools.partial(reference, **options)


# name: loss, reference, the shapes of student and teacher
CASES = {
    "hint": (losses.hint, ref_hint, MAP, MAP),
    "hint, flat": (losses.hint, ref_hint, (4, 7), (4, 7)),
    "attention_transfer": (losses.attention_transfer, ref_attention, MAP, WIDE),
    "attention_transfer, p = 4, mean": (
        *with_options(losses.attention_transfer, ref_attention, p=4, mean=True), MAP, WIDE,
    ),
    "attention_transfer, p = 1": (
        *with_options(losses.attention_transfer, ref_attention, p=1), MAP, MAP,
    ),
    "factor_transfer": (losses.factor_transfer, ref_factor, MAP, MAP),
    "factor_transfer, p = 2": (*with_options(losses.factor_transfer, ref_factor, p=2), MAP, MAP),
    "nst": (losses.nst, ref_nst, MAP, MAP),
    "nst, wide": (losses.nst, ref_nst, MAP, WIDE),
    "nst, linear": (*with_options(losses.nst, ref_nst, kernel="linear"), MAP, WIDE),
    "nst, gaussian": (
        *with_options(losses.nst, ref_nst, kernel="gaussian", bandwidth=0.7), MAP, MAP,
    ),
    "fsp": (fsp_beside, functools.partial(ref_fsp, first=OTHERS), MAP, MAP),
    "fsp, mean": (
        functools.partial(fsp_beside, pool="mean", mean=True),
        functools.partial(ref_fsp, first=OTHERS, pool="mean", mean=True), MAP, MAP,
    ),
    "activation_boundary": (losses.activation_boundary, ref_boundary, MAP, MAP),
    "ofd": (*with_options(losses.ofd, ref_ofd, margin=MARGIN), MAP, MAP),
    "vid": (*with_options(losses.vid, ref_vid, variance=VARIANCE), MAP, MAP),
    "hierarchical_context": (losses.hierarchical_context, ref_hierarchical, MAP, MAP),
    "cat_kd": (losses.cat_kd, ref_cat, MAP, SMALL),
}  # fmt: skip
CKA = {"cka": False, "cka, debiased": True}
ZERO_AT_TEACHER = [n for n in CASES if not n.startswith(("activation", "vid", "fsp", "cat"))]
parametrize = functools.partial(pytest.mark.parametrize, "name")


def value_and_gradient(loss, student, teacher):
    def total(s, t):
        values = loss(s, t)
        return values.sum(), values

    differentiated = jax.value_and_grad(total, has_aux=True)
    (_, values), gradient = jax.jit(differentiated)(student, teacher)
    return values, gradient


def at_the_teacher(loss, teacher):
    return value_and_gradient(loss, teacher, teacher)


@parametrize(CASES)
def test_value_and_gradient_to_six_digits(name):
    loss, reference, *shapes = CASES[name]
    student, teacher = draw(*shapes)
    values, gradient = value_and_gradient(loss, student, teacher)
    wide = teacher.astype(float)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, reference(student.astype(float), wide), rtol=1e-6)
    expected = numeric_gradient(lambda s: reference(s, wide).sum(), student.astype(float))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@parametrize(CKA)
def test_cka(name):
    reference = functools.partial(ref_cka, debiased=CKA[name])
    loss = functools.partial(losses.cka, debiased=CKA[name])
    student, teacher = draw((7, 2, 3), (7, 9))
    values, gradient = value_and_gradient(loss, student, teacher)
    wide = teacher.astype(float)
    expected = reference(student.astype(float), wide)
    np.testing.assert_allclose(values.mean(), expected, rtol=1e-6)
    assert (np.asarray(values) >= 0).all()
    measured = features.linear_cka(student, teacher, debiased=CKA[name])
    np.testing.assert_allclose(measured, 1 - expected, rtol=2e-6, atol=1e-7)
    expected = 7 * numeric_gradient(lambda s: reference(s, wide), student.astype(float))
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # rotation, scale and shift of the features change nothing; nor does the order of the examples
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0]
    moved = (5 * teacher @ turn + 3).astype(np.float32)
    np.testing.assert_allclose(loss(student, moved), values, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss(student[::-1], teacher[::-1]), values[::-1], rtol=1e-4)
    values, gradient = at_the_teacher(loss, student)
    np.testing.assert_allclose(values, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=2e-7)
    # examples that do not count
    where = np.arange(9) < 7
    padding = np.full((2, 1), np.nan, np.float32)
    longer = [np.concatenate([x.reshape(7, -1), padding * x.reshape(7, -1)[:2]])
              for x in (student, teacher)]  # fmt: skip
    masked = functools.partial(loss, where=where)
    padded, gradient = value_and_gradient(masked, *longer)
    np.testing.assert_allclose(padded[:7], loss(student, teacher), rtol=1e-5)
    np.testing.assert_array_equal(padded[7:], 0)
    np.testing.assert_array_equal(gradient[7:], 0)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_where_nothing_varies(debiased):
    _, teacher = draw((5, 3), (5, 3))
    for student in (np.zeros((5, 3), np.float32), np.full((5, 3), 1000.1, np.float32)):
        loss = functools.partial(losses.cka, debiased=debiased)
        values, gradient = value_and_gradient(loss, student, teacher)
        np.testing.assert_array_equal(values, 1)
        np.testing.assert_array_equal(gradient, 0)
        assert features.linear_cka(student, teacher, debiased=debiased) == 0
    with pytest.raises(ValueError, match="at least 4 examples, got 3"):
        losses.cka(teacher[:3], teacher[:3], debiased=True)
    assert losses.cka(teacher[:1], teacher[:1]) == 1


def test_nst_of_the_mean_distance():
    """Without a bandwidth, σ² is the mean squared distance between student's and teacher's channels."""
    student, teacher = draw(MAP, MAP)
    s, t = (unit(rows(x.astype(float)), 1).transpose(0, 2, 1) for x in (student, teacher))
    width = ((s[:, :, None] - t[:, None]) ** 2).sum(-1).mean((1, 2))
    expected = [
        ref_nst(student[i : i + 1].astype(float), teacher[i : i + 1], "gaussian", width[i])[0]
        for i in range(2)
    ]
    np.testing.assert_allclose(losses.nst(student, teacher, kernel="gaussian"), expected, rtol=1e-5)


# --- invariances, masks, edges ---------------------------------------------------------------


@parametrize(ZERO_AT_TEACHER)
def test_zero_and_flat_at_student_equals_teacher(name):
    loss, _, _, shape = CASES[name]
    (teacher,) = draw(shape)
    values, gradient = at_the_teacher(loss, teacher)
    # Means of NST's kernels cancel; factors are divided by norms, which round differently without AVX-512
    atol = 1e-6 if name.startswith(("nst", "factor_transfer")) else 1e-12
    np.testing.assert_allclose(values, 0, atol=atol)
    if name != "factor_transfer":  # a sum of absolute values, which has no slope at 0, where rounding decides
        np.testing.assert_allclose(gradient, 0, atol=2e-7)


def test_fsp_and_cat_kd_are_zero_at_the_teacher():
    first, second = draw(MAP, SMALL)
    for loss in (lambda s, t: losses.fsp((s, second), (t, second)), losses.cat_kd):
        for array in at_the_teacher(loss, first):
            np.testing.assert_allclose(array, 0, atol=1e-7)


def test_invariances():
    student, teacher = draw(MAP, WIDE)
    order = np.random.default_rng(0).permutation(25)

    def shuffle(x):
        return rows(x)[:, order].reshape(x.shape)

    def alike(loss, changed, teacher=teacher, rtol=2e-5):
        expected = loss(student, teacher)
        np.testing.assert_allclose(loss(*changed), expected, rtol=rtol, atol=1e-7)

    for loss in (losses.attention_transfer, losses.nst):
        alike(loss, (1e-3 * student, 1e4 * teacher))  # scale
        alike(loss, (1e-25 * student, 1e15 * teacher))
        alike(loss, (shuffle(student), shuffle(teacher)))  # positions
        alike(loss, (student[..., ::-1], teacher[..., ::-1]))  # channels
        alike(loss, (np.concatenate([student, student], -1), teacher))  # channels twice
    narrow = draw(MAP, seed=3)[0]
    alike(losses.factor_transfer, (1e-3 * student, 1e4 * narrow), narrow)
    alike(losses.factor_transfer, (shuffle(student), shuffle(narrow)), narrow)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0].astype(np.float32)
    alike(losses.hint, (student @ turn, narrow @ turn), narrow)
    alike(losses.cat_kd, (1e-3 * student, 1e4 * narrow), narrow)
    # the boundary does not ask how large the teacher's responses are
    alike(losses.activation_boundary, (student, 100 * narrow), narrow)


@parametrize([n for n in CASES if not n.startswith(("cat", "fsp", "hier"))])
def test_padding_changes_nothing(name):
    loss, _, s_shape, t_shape = CASES[name]
    if len(s_shape) == 2:
        s_shape = t_shape = (4, 6, 7)
    student, teacher = draw(s_shape, t_shape)
    values, gradient = value_and_gradient(loss, student, teacher)
    wide = [(0, 0)] * len(s_shape)
    wide[1] = (0, 2)
    padded = [np.pad(x, wide, constant_values=np.nan) for x in (student, teacher)]
    where = np.arange(padded[0].shape[1]) < s_shape[1]
    where = where.reshape(1, -1, *(1,) * (len(s_shape) - 3))
    masked, full = value_and_gradient(functools.partial(loss, where=where), *padded)
    np.testing.assert_allclose(masked, values, rtol=2e-6, atol=1e-9)
    inside = full[:, : s_shape[1]]
    np.testing.assert_allclose(inside, gradient, rtol=1e-5, atol=1e-6 * np.abs(gradient).max())
    np.testing.assert_array_equal(full[:, s_shape[1] :], 0)


@parametrize(CASES)
def test_examples_that_do_not_count(name):
    loss, _, *shapes = CASES[name]
    student, teacher = draw(*shapes)
    values = loss(student, teacher)
    student[0] = np.nan
    where = np.arange(len(student)) > 0
    masked, gradient = value_and_gradient(functools.partial(loss, where=where), student, teacher)
    np.testing.assert_allclose(masked[1:], values[1:], rtol=2e-6)
    assert masked[0] == 0
    np.testing.assert_array_equal(gradient[0], 0)
    assert np.isfinite(gradient).all()


@parametrize(CASES)
def test_edges_are_finite(name):
    """All-zero features, one or both; gaps of 1e4; one example; bfloat16."""
    loss, _, *shapes = CASES[name]
    one = name.startswith("fsp")  # its other layer has two examples
    student, teacher = (x if one else x[:1] for x in draw(*shapes))
    zero = np.zeros_like
    both = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).sum(), (0, 1)))
    cases = [(zero(student), teacher), (student, zero(teacher)), (zero(student), zero(teacher)),
             (1e4 * student, -1e4 * teacher)]  # fmt: skip
    for case in cases:
        value, gradients = both(*case)
        assert np.isfinite(value), case
        assert all(np.isfinite(g).all() for g in gradients)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    value, gradients = both(*half)
    expected, _ = both(*(x.astype(jnp.float32) for x in half))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert value.dtype == jnp.float32
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in gradients)


def test_hierarchical_context_of_partial_maps():
    student, teacher = draw((2, 4, 4, 3), (2, 4, 4, 3))
    where = np.ones((2, 4, 4), bool)
    where[:, 3:] = False
    student[:, 3:], teacher[:, 3:] = np.nan, np.nan
    d = (student - teacher).astype(float)[:, :3] ** 2
    pooled = [(student - teacher)[:, :2].reshape(2, 2, 2, 2, 3).mean((1, 3)),
              (student - teacher)[:, 2].reshape(2, 2, 2, 3).mean(2)]  # fmt: skip
    level2 = np.concatenate([flat(p) for p in pooled], 1)
    level1 = flat((student - teacher)[:, :3].mean((1, 2)))
    parts = [flat(d).mean(-1), (level2**2).mean(-1) / 2, (level1**2).mean(-1) / 4]
    expected = sum(parts) / 1.75
    values = losses.hierarchical_context(student, teacher, where=where)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_margins():
    gamma, beta = np.array([1.0, -0.7, 2.0, 0.5]), np.array([0.3, -0.6, 9.0, -3.0])
    rng = np.random.default_rng(0)
    x = np.abs(gamma) * rng.normal(size=(200_000, 4)) + beta
    margin = features.margin_from_batchnorm(gamma, beta)
    drawn = features.margin_from_features(x.reshape(100, 2000, 4).astype(np.float32))
    np.testing.assert_allclose(margin[jnp.array([0, 1, 3])], drawn[jnp.array([0, 1, 3])], rtol=1e-2)
    assert margin[2] < 0
    # hardly ever, or never, or always negative, or constant: E[x | x < 0] for β/σ = 9 is −0.1074·σ…
    edges = features.margin_from_batchnorm(
        np.array([1.0, 1e-6, 0.0, 0.0, 1e-3]), np.array([9.0, 1.0, 2.0, -2.0, -5.0])
    )
    np.testing.assert_allclose(edges[jnp.array([2, 3, 4])], [0, -2, -5], atol=1e-6)
    assert np.isfinite(edges).all()
    assert (np.asarray(edges) <= 0).all()
    np.testing.assert_allclose(edges[0], -0.10856, rtol=1e-2)
    far = np.array([1.9, 2.1, 5.0, 13.0, 30.0, 1e4])  # by quadrature of E[x | x < 0]
    expected = [-0.3849469, -0.3620780, -0.1865040, -0.07603856, -0.03325967, -1e-4]
    np.testing.assert_allclose(features.margin_from_batchnorm(np.ones(6), far), expected, rtol=1e-6)
    rare = features.margin_from_batchnorm(np.array([2.0]), np.array([9.0]), rare=0.001)
    np.testing.assert_allclose(rare, -6)
    teacher = draw(MAP)[0]
    np.testing.assert_array_equal(
        losses.ofd(0 * teacher, teacher),
        losses.ofd(0 * teacher, teacher, margin=features.margin_from_features(teacher)),
    )


def test_measures_hide_no_nan():
    student, teacher = draw(MAP, MAP)
    student[1, 2, 2, 0] = np.nan
    assert np.isnan(features.linear_cka(student, teacher))
    assert np.isnan(features.linear_cka(teacher, student))
    margin = features.margin_from_features(student)
    np.testing.assert_array_equal(np.isnan(margin), [True, False, False])
    assert np.isfinite(features.linear_cka(student, teacher, where=np.array([True, False])))


def test_class_activation_maps_average_to_the_logits():
    x, kernel = draw((2, 3, 4, 5), (5, 7))
    maps = features.class_activation_maps(x, kernel)
    np.testing.assert_allclose(maps.mean((1, 2)), x.mean((1, 2)) @ kernel, atol=1e-6)


@pytest.mark.parametrize(("size", "bins"), [(7, 3), (8, 4), (5, 5), (6, 4), (9, 1)])
def test_adaptive_pooling(size, bins):
    (x,) = draw((2, size, size, 3))
    np.testing.assert_allclose(pool_mean(x, (bins, bins)), ref_pool(x, bins), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(pool_max(x, (bins, bins)), ref_pool(x, bins, np.max))


# --- constants of the reference programs -----------------------------------------------------


def golden():
    path = GOLDEN / "make_features.py"
    spec = importlib.util.spec_from_file_location("make_features", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return json.loads((GOLDEN / "features.json").read_text()), module.features_inputs()


CONSTANTS, INPUTS = golden()
I = INPUTS  # noqa: E741
GOLDEN_VARIANCE = I["gamma"] ** 2 + 0.1


def torch_matrices(s):
    """torchdistill's own reduction of the matrix is another loss; half the squared sum is compared."""
    return losses.fsp((s, I["small"]), (I["teacher"], I["small_teacher"])).sum() / 2


def semckd_of_simkd(s):
    weights = np.exp(I["weights"]) / np.exp(I["weights"]).sum(-1, keepdims=True)
    hint = losses.hint
    errors = [[hint(s, I["teacher"]), hint(s, 2 * I["teacher"])],
              [hint(I["wide"], k * I["wide"]) for k in (2, 3)]]  # fmt: skip
    return sum((weights[:, i, j] * errors[i][j]).mean() / 2 for i in (0, 1) for j in (0, 1))


# What the reference computes, said with our losses: differences of scale stand here
REFERENCE_PROGRAMS = {
    "hint RepDistiller": lambda s: losses.hint(s, I["teacher"]).mean(),
    "attention torchdistill paper": lambda s: losses.attention_transfer(s, I["wide"]).mean(),
    "attention torchdistill code": lambda s: losses.attention_transfer(s, I["wide"], mean=True).mean(),
    "attention RepDistiller p=4": lambda s: losses.attention_transfer(
        pool_mean(s, (3, 3)), I["small"], p=4, mean=True
    ).mean(),
    "factor torchdistill p=1": lambda s: losses.factor_transfer(s, I["teacher"], mean=True).mean(),
    "factor torchdistill p=2": lambda s: losses.factor_transfer(s, I["teacher"], p=2).mean(),
    "nst RepDistiller": lambda s: losses.nst(s, I["wide"]).mean(),
    "nst RepDistiller few channels": lambda s: losses.nst(pool_mean(s, (3, 3)), I["small"]).mean(),
    "fsp torchdistill matrix, squared": torch_matrices,
    "fsp RepDistiller": lambda s: losses.fsp(
        (s, I["small"]), (I["teacher"], I["small_teacher"]), pool="mean", mean=True
    ).mean(),
    "boundary torchdistill": lambda s: losses.activation_boundary(s, I["teacher"], margin=0.7).mean(),
    "boundary RepDistiller first of three": lambda s: (
        losses.activation_boundary(s, I["teacher"]).mean() * 3 / 1000 / 4
    ),
    "vid torchdistill": lambda s: losses.vid(s, I["teacher"], variance=GOLDEN_VARIANCE, mean=True).mean(),
    "vid RepDistiller at the start": lambda s: losses.vid(s, I["teacher"], variance=5.0, mean=True).mean(),
    "ofd mdistiller": lambda s: losses.ofd(
        s, I["teacher"], margin=jnp.array(CONSTANTS["ofd mdistiller margin"])
    ).mean(),
    "review mdistiller": lambda s: losses.hierarchical_context(s, I["teacher"]).mean(),
    "review torchdistill": lambda s: losses.hierarchical_context(s, I["teacher"]).mean(),
    "cat CAT-KD normalise=True": lambda s: losses.cat_kd(s, I["small"]).mean(),
    "cat CAT-KD normalise=False": lambda s: losses.cat_kd(s, I["small"], normalise=False).mean(),
    "semckd SimKD": semckd_of_simkd,
}


def agrees(constants, value, gradient, rtol):
    np.testing.assert_allclose(value, constants["value"], rtol=rtol)
    gradient = np.asarray(gradient, float)
    np.testing.assert_allclose(np.linalg.norm(gradient), constants["norm"], rtol=rtol)
    entries = gradient.reshape(-1)[:: max(1, gradient.size // 6)]
    size = np.abs(gradient).max()
    np.testing.assert_allclose(entries, constants["entries"], rtol=0, atol=rtol * size)
    np.testing.assert_allclose(gradient.sum(), constants["sum"], rtol=0, atol=10 * rtol * size)


@parametrize(REFERENCE_PROGRAMS)
def test_reference_programs(name):
    value, gradient = jax.jit(jax.value_and_grad(REFERENCE_PROGRAMS[name]))(I["student"].astype(np.float32))
    agrees(CONSTANTS[name], value, gradient, 2e-6)
    if name.startswith(("cat", "nst", "ofd", "attention")):
        with jax.enable_x64(True):
            value, gradient = jax.jit(jax.value_and_grad(REFERENCE_PROGRAMS[name]))(I["student"])
            assert value.dtype == jnp.float64
            agrees(CONSTANTS[name], value, gradient, 1e-9 if name[0] != "o" else 1e-6)


def test_margins_of_mdistiller():
    margin = features.margin_from_batchnorm(I["gamma"], I["beta"], rare=0.001)
    np.testing.assert_allclose(margin, CONSTANTS["ofd mdistiller margin"], rtol=2e-6)


def test_every_constant_is_compared():
    elsewhere = {"ofd mdistiller margin", "mgd MGD"}  # above, and in test_learned.py
    assert CONSTANTS.keys() == REFERENCE_PROGRAMS.keys() | elsewhere


# --- misuse ----------------------------------------------------------------------------------


def test_errors_say_what_is_wrong():
    student, teacher, wide = draw(MAP, SMALL, WIDE)
    with pytest.raises(ValueError, match=r"spatial shape, number of channels, got shapes \(2, 5"):
        losses.hint(student, teacher)
    with pytest.raises(ValueError, match="number of channels, got shapes"):
        losses.factor_transfer(student, wide)
    with pytest.raises(ValueError, match=r"must have shape \[batch, \*spatial, channels\], got \(3,\)"):
        losses.hint(np.zeros(3), np.zeros(3))
    for where in (np.ones((5, 5), bool), np.ones((2, 5, 4), bool), np.ones((2, 5, 5), int)):
        with pytest.raises(ValueError, match=r"where must have shape|where must be bool, got dtype int64"):
            losses.hint(student, student, where=where)
    with pytest.raises(ValueError, match="margin must be positive"):
        losses.activation_boundary(student, student, margin=0.0)
    with pytest.raises(ValueError, match="margin must be a scalar or"):
        losses.ofd(student, student, margin=np.zeros(2))
    with pytest.raises(ValueError, match="variance must be a scalar or"):
        losses.vid(student, student, variance=np.ones(2))
    with pytest.raises(ValueError, match="kernel must be 'polynomial', 'linear' or 'gaussian'"):
        losses.nst(student, student, kernel="cubic")
    with pytest.raises(ValueError, match="p must be 1 or 2"):
        losses.factor_transfer(student, student, p=3)
    with pytest.raises(ValueError, match="p must be at least 1"):
        losses.attention_transfer(student, student, p=0.5)
    with pytest.raises(ValueError, match="pair of layers"):
        losses.fsp((student,), (student,))
    with pytest.raises(ValueError, match="the same numbers of channels"):
        losses.fsp((student, student), (student, wide))
    with pytest.raises(ValueError, match=r"where must have one entry per example, shape \(2,\)"):
        losses.cat_kd(student, student, where=np.ones((2, 5, 5), bool))
    with pytest.raises(ValueError, match="kernel must have shape"):
        features.class_activation_maps(student, np.zeros((4, 10)))
    with pytest.raises(ValueError, match="the same batch size"):
        losses.cka(student, student[:1])

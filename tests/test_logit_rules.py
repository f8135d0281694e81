"""What holds for every logit loss: what NaN, masks, dtypes, identity and bad arguments do, and second derivatives."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_api import LOGIT_LOSSES
from test_logits import draw

from distill_jax import losses

LABELS = np.array([0, 2, 1, 3], np.int32)
NEEDED = {"prior": np.arange(1, 6), "counts": np.arange(1, 6)}
EDGES = {  # options at the ends of their ranges, where a factor of 0 could hide a NaN
    "jensen_shannon": [{"beta": 0.0}, {"beta": 1.0}],
    "skew_kl": [{"alpha": 0.0}, {"alpha": 1.0}],
    "skew_reverse_kl": [{"alpha": 0.0}, {"alpha": 1.0}],
    "cross_entropy": [{"label_smoothing": 0.2}],
    "dkd": [{"alpha": 0.0}, {"beta": 0.0}],
    "nkd": [{"gamma": 0.0}],
    "dist": [{"beta": 0.0}, {"gamma": 0.0}],
    "mlkd": [{"instance_weight": 0.0}, {"batch_weight": 0.0, "class_weight": 0.0}],
    "ranking_hinge": [{"margin": 0.1}],
    "teacher_free": [{"probability": 1.0}],
    "class_balanced": [{"beta": 1.0}],
}
CASES = [(name, options) for name in LOGIT_LOSSES for options in [{}, *EDGES.get(name, [])]]
WITHOUT_LABELS = [
    name for name in LOGIT_LOSSES if "labels" not in inspect.signature(getattr(losses, name)).parameters
]
parametrize = functools.partial(pytest.mark.parametrize, "name")


def call(name, **options):
    """A loss as a function of logits: (student, teacher), or (logits,) for those without a teacher."""
    loss = getattr(losses, name)
    parameters = inspect.signature(loss).parameters
    options |= {n: v for n, v in NEEDED.items() if n in parameters}

    def called(*logits, labels=LABELS, **more):
        labelled = [labels] if "labels" in parameters else []
        return loss(*logits, *labelled, **options, **more)

    return called


def logits_of(name, shape=(4, 5)):
    pair = draw(2, 1, shape)
    return (
        list(pair) if "teacher_logits" in inspect.signature(getattr(losses, name)).parameters else [pair[0]]
    )


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {o}" for n, o in CASES])
def test_nan_shows_where_it_counts_and_nowhere_else(name, options):
    loss, given = call(name, **options), logits_of(name)

    @jax.jit
    def both(arrays, where):
        return jax.value_and_grad(lambda a: (v := loss(*a, where=where)).sum() + 0 * v[0])(arrays), loss(
            *arrays, where=where
        )

    everything = np.ones((4, 5), bool)
    masked = everything.copy()
    masked[1] = False  # a row that is padding
    masked[3, 4] = False  # a class of one example
    for side in range(len(given)):
        for place in ((1, 0), (1, 2), (3, 4)):
            broken = [x.copy() for x in given]
            broken[side][place] = np.nan
            _, value = both(broken, everything)
            assert np.isnan(value[place[0]]), (side, place)
    broken = [x.copy() for x in given]
    for x in broken:
        x[1], x[3, 4] = np.nan, np.nan
    (total, gradients), value = both(broken, masked)
    (expected, sound), _ = both(given, masked)
    assert value[1] == 0
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    for gradient, other in zip(gradients, sound, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(gradient[~masked], 0)


@parametrize(LOGIT_LOSSES)
def test_where_has_one_meaning(name):
    given = logits_of(name, (4, 4))
    loss = getattr(losses, name)
    needed = {n: np.arange(1, 5) for n in NEEDED if n in inspect.signature(loss).parameters}
    call_ = functools.partial(loss, *given, *([] if name in WITHOUT_LABELS else [LABELS]), **needed)
    for where in (np.ones(4, bool), np.ones((1, 4, 4), bool), np.ones((4, 3), bool), np.ones((4, 4)), True):
        with pytest.raises(
            ValueError, match=r"where must (be bool, got|have one axis per axis of the logits)"
        ):
            call_(where=where)
    for where in (np.ones((4, 1), bool), np.ones((1, 4), bool), np.ones((1, 1), bool)):
        assert jax.eval_shape(functools.partial(call_, where=where)).shape == (4,)


@parametrize(LOGIT_LOSSES)
def test_padding_and_an_empty_batch(name):
    loss, given = call(name), logits_of(name)
    labels = np.array([0, -100, 1, 3], np.int32)
    rows = (np.arange(4) != 1)[:, None]
    values, gradients = jax.jit(jax.value_and_grad(lambda a: loss(*a, labels=labels, where=rows).sum()))(
        given
    )
    assert np.isfinite(values)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[1], 0)
    assert np.any(gradients[0][0])
    assert jax.jit(loss)(*(x[:0] for x in given), labels=labels[:0]).shape == (0,)


@parametrize(LOGIT_LOSSES)
def test_dtypes(name):
    loss, given = call(name), logits_of(name)
    options = {"temperature": np.float64(2)} if name in ("kl", "dkd", "dist") else {}
    with jax.enable_x64(True):
        run = jax.jit(loss)
        narrow, wide = (run(*(x.astype(t) for x in given), **options) for t in ("float32", "float64"))
    assert (narrow.dtype, wide.dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(narrow, wide, rtol=2e-5)
    whole = [np.round(x).astype(int) for x in given]
    np.testing.assert_allclose(run(*whole), run(*(x.astype(np.float32) for x in whole)), rtol=1e-6)
    for bad in (np.complex64, bool, object, "U3"):
        with pytest.raises(ValueError, match="logits must be real numbers, got dtype"):
            loss(*(x.astype(bad) for x in given))
    with pytest.raises(ValueError, match="masked array"):
        loss(*(np.ma.masked_array(x, x > 0) for x in given))
    with pytest.raises(ValueError, match="axis must be an integer that names an axis"):
        loss(*given, axis=2)
    with pytest.raises(ValueError, match="at least one class"):
        loss(*(x[:, :0] for x in given))


BAD = {
    "temperature": [np.nan, 0.0, "2", 1j, np.ones(4), np.ones((4, 5)), np.ones((1, 4, 1))],
    "alpha": [np.nan, -1.0, "1"],
    "beta": [np.nan, -1.0, "1", np.ones((2, 4))],
    "gamma": [np.nan, -1.0, np.ones((2, 4))],
    "margin": [np.nan, -0.1, np.ones(4)],
    "tau": [np.nan, np.inf, np.ones(5)],
    "prior": [np.zeros(5), np.full(5, np.nan), np.ones(5) * 1j],
    "counts": [np.zeros(5), np.full(5, np.nan), ["a"] * 5],
    "label_smoothing": [np.nan, 2.0, np.full(4, 0.1)],
    "probability": [np.nan, 2.0, np.full(4, 0.1)],
    "student_temperature": [np.nan, -1.0, np.ones(4)],
    "instance_weight": [np.nan, -1.0, np.ones((2, 4))],
    "batch_weight": [np.nan, -1.0],
    "class_weight": [np.nan, -1.0],
}


@pytest.mark.parametrize(
    ("name", "option"),
    [(n, o) for n in LOGIT_LOSSES for o in BAD if o in inspect.signature(getattr(losses, n)).parameters],
)
def test_options_are_checked(name, option):
    loss, given = getattr(losses, name), logits_of(name)
    needed = {n: v for n, v in NEEDED.items() if n in inspect.signature(loss).parameters}
    rest = [] if name in WITHOUT_LABELS else [LABELS]
    for value in BAD[option]:
        with pytest.raises(ValueError, match=rf"^{option} must [^\n]*$"):
            loss(*given, *rest, **{**needed, option: value})


@parametrize(["kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "total_variation", "dkd",
              "mean_squared_logits", "ranking_hinge", "dist", "mlkd"])  # fmt: skip
def test_zero_and_flat_at_student_equals_teacher_under_jit(name):
    loss = call(name)
    _, teacher = draw(5, 0, (4, 5), seed=3)
    run = jax.jit(lambda s, t: (loss(s, t), jax.grad(lambda s: loss(s, t).sum())(s)))
    for given in (teacher, teacher / 7 + 100):
        value, gradient = run(given, given)
        limit = 1e-7 if name in ("dist", "mlkd") else 0.0  # sums that are rounded
        np.testing.assert_allclose(value, 0, atol=limit * limit)
        np.testing.assert_allclose(gradient, 0, atol=limit)


# --- derivatives of every order --------------------------------------------------------------


def plain(name, student, teacher, temperature, share):
    q, p = jax.nn.log_softmax(student / temperature), jax.nn.log_softmax(teacher / temperature)
    if name in ("reverse_kl", "skew_reverse_kl"):
        q, p = p, q
    m = q if name in ("kl", "reverse_kl") else jnp.logaddexp(p + jnp.log(share), q + jnp.log1p(-share))
    value = jnp.exp(p) * (p - m)
    if name == "jensen_shannon":
        value = share * value + (1 - share) * jnp.exp(q) * (q - m)
    if name == "soft_cross_entropy":
        value = -jnp.exp(p) * q
    return jnp.square(temperature) * jnp.sum(value, -1)


@parametrize(["kl", "reverse_kl", "jensen_shannon", "skew_kl", "skew_reverse_kl", "soft_cross_entropy"])
def test_second_derivatives(name):
    """The Hessian for student, teacher, temperature and share together, forward over reverse, under vmap."""
    loss = getattr(losses, name)
    option = {"jensen_shannon": "beta", "skew_kl": "alpha", "skew_reverse_kl": "alpha"}.get(name)

    def ours(x, share):
        return loss(x[:4], x[4:8], temperature=x[8], **({option: x[9]} if option else {}))

    def formula(x, share):
        return plain(name, x[:4], x[4:8], x[8], x[9])

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        points = rng.normal(size=(4, 10)) * 3
        points[1, 4:8] = points[1, :4] + 0.1 * rng.normal(size=4)
        points[2, 4:8] = points[2, :4]  # student = teacher
        points[:, 8], points[:, 9] = [1.0, 2.0, 3.0, 0.5], [0.5, 0.1, 0.3, 0.8]
        found, expected = (
            jax.jit(jax.vmap(lambda x, f=f: (jax.grad(f)(x, 0), jax.hessian(f)(x, 0), jax.jacfwd(f)(x, 0))))(
                points
            )
            for f in (ours, formula)
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


def test_second_derivatives_of_the_total_variation():
    """½·Σ |p − q| of two classes is |p₁ − q₁|; at a uniform student, q₁ = ½ has no curvature."""
    teacher = jnp.array([np.log(1.5), 0.0])
    hessian = jax.jit(jax.hessian(lambda s: losses.total_variation(s, teacher)))
    np.testing.assert_allclose(hessian(jnp.zeros(2)), np.zeros((2, 2)), atol=1e-7)
    found = hessian(jnp.array([1.0, 0.0]))[0, 0]  # |p₁ − q₁| = q₁ − p₁ there
    q = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(found, q * (1 - q) * (1 - 2 * q), rtol=1e-5)


def test_float64_has_all_its_digits():
    """Against sums in extended precision, student within 0.3 of the teacher: half a step of float64's rounding."""
    student, teacher = (x.astype(np.longdouble) for x in draw(3, 0.3))
    q, p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (student / 2, teacher / 2))
    expected = 4 * (np.exp(p) * (p - q)).sum(-1)
    with jax.enable_x64(True):
        value = losses.kl(np.asarray(student, float), np.asarray(teacher, float), temperature=2.0)
    np.testing.assert_allclose(value, expected.astype(float), rtol=3e-15)


def test_rankings_in_blocks(monkeypatch):
    """The pairs are taken a few classes at a time where there are many."""
    from distill_jax.losses import ranking

    given = logits_of("ranking_logistic", (3, 7))
    for name in ("ranking_logistic", "ranking_hinge"):
        loss = getattr(losses, name)
        both = lambda s, t, loss=loss: jax.value_and_grad(lambda s: loss(s, t).sum())(s)  # noqa: E731
        whole = jax.jit(lambda *x, both=both: both(*x))(*given)
        monkeypatch.setattr(ranking, "_PAIRS", 3 * 7 * 3)
        parts = jax.jit(both)(*given)
        monkeypatch.undo()
        for a, b in zip(whole, parts, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)

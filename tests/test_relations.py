"""Relation and contrastive losses: formulas in float64, reference code, invariances, and the edges."""

import functools
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_relations import draw as draw_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax import features, losses
from distill_jax.losses import relations
from distill_jax.losses._space import power_of_two

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("relations.json").read_text())

# --- the formulas, in NumPy float64, as loops over examples where that is plainest ------------


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def flat(*arrays):
    return [np.asarray(x, np.float64).reshape(len(x), -1) for x in arrays]


def huber(x):
    return np.where(np.abs(x) <= 1, x**2 / 2, np.abs(x) - 0.5)


def ref_similarity_preserving(student, teacher):
    s, t = (unit(x @ x.T) for x in flat(student, teacher))
    return ((t - s) ** 2).sum(1) / len(s)


def ref_rkd_distance(student, teacher, include_self=False):
    relative = []
    for x in flat(student, teacher):
        d = np.array([[math.dist(a, b) for b in x] for a in x])
        relative.append(d / (d.sum() / (len(x) * (len(x) - 1))))
    n = len(student)
    return huber(relative[0] - relative[1]).sum(1) / (n if include_self else n - 1)


def ref_rkd_angle(student, teacher, include_self=False):
    n = len(student)
    values = np.zeros(n)
    student, teacher = flat(student, teacher)
    for i, j, k in itertools.permutations(range(n), 3):
        s, t = (unit(x[i] - x[j]) @ unit(x[k] - x[j]) for x in (student, teacher))
        values[j] += huber(s - t)
    return values / (n * n if include_self else (n - 1) * (n - 2))


def ref_pkt(student, teacher, include_self=False):
    q, p = ((1 + unit(x) @ unit(x).T) / 2 for x in flat(student, teacher))
    keep = np.ones_like(p, bool) if include_self else ~np.eye(len(p), dtype=bool)
    q, p = (np.where(keep, x, 0) for x in (q, p))
    q, p = (x / x.sum(1, keepdims=True) for x in (q, p))
    return np.where(keep, p * np.log(np.where(keep, p, 1) / np.where(keep, q, 1)), 0).sum(1)


def ref_correlation_congruence(student, teacher, kernel="gaussian", gamma=0.4, order=2, normalise=True):
    def matrix(x):
        x = unit(x) if normalise else x
        if kernel == "bilinear":
            return x @ x.T
        powers = [(2 * gamma) ** p / math.factorial(p) * (x @ x.T) ** p for p in range(order + 1)]
        return math.exp(-2 * gamma) * sum(powers)

    s, t = (matrix(x) for x in flat(student, teacher))
    return ((t - s) ** 2).sum(1) / len(s)


def ref_ickd(student, teacher, normalise=True):
    values = []
    for s, t in zip(student, teacher, strict=True):
        channels = s.shape[-1]
        gram = [x.reshape(-1, channels).T @ x.reshape(-1, channels) for x in (s, t)]
        if normalise:
            gram = [unit(g) for g in gram]
        square = ((gram[0] - gram[1]) ** 2).sum()
        values.append(square / (channels if normalise else channels**2))
    return np.array(values)


def ref_info_nce(student, teacher, labels=None, temperature=0.07, symmetric=False):
    s, t = (unit(x) for x in flat(student, teacher))
    e = np.exp(s @ t.T / temperature)
    if labels is not None:
        e = np.where((labels[:, None] != labels) | np.eye(len(s), dtype=bool), e, 0)
    values = -np.log(np.diag(e) / e.sum(1))
    return (values - np.log(np.diag(e) / e.sum(0))) / 2 if symmetric else values


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


LABELS = np.array([0, 1, 0, 2, 1])
CASES = {
    "similarity_preserving": {},
    "rkd_distance": {},
    "rkd_distance, self": {"include_self": True},
    "rkd_angle": {},
    "rkd_angle, self": {"include_self": True},
    "pkt": {},
    "pkt, self": {"include_self": True},
    "correlation_congruence": {},
    "correlation_congruence, bilinear": {"kernel": "bilinear"},
    "correlation_congruence, as given": {"normalise": False, "order": 3, "gamma": 0.2},
    "ickd": {},
    "ickd, as given": {"normalise": False},
    "info_nce": {"temperature": 0.5},
    "info_nce, both": {"symmetric": True, "labels": LABELS},
}


def reference_of(name):
    return functools.partial(globals()[f"ref_{name.split(',')[0]}"], **CASES[name])


@functools.cache
def compiled(name):
    loss = functools.partial(getattr(losses, name.split(",")[0]), **CASES[name])

    def values_and_gradients(student, teacher, weights, where):
        values, pull = jax.vjp(lambda s, t: loss(s, t, where=where), student, teacher)
        return values, *pull(weights.astype(values.dtype))

    return jax.jit(values_and_gradients)


def evaluate(name, student, teacher, weights=None, where=None):
    """Values, and the gradients of Σ weights·values for student and teacher."""
    examples = len(student)
    weights = np.ones(examples, np.float32) if weights is None else weights
    where = np.ones(examples, bool) if where is None else where  # one program for both
    return compiled(name)(student, teacher, weights, where)


RELATIONS = [name for name in CASES if not name.startswith("info_nce")]
parametrize = functools.partial(pytest.mark.parametrize, "name")


def draw(name="", examples=5):
    rng = np.random.default_rng(0)
    teacher_shape = (examples, 3, 4)
    student_shape = {"ickd": (examples, 2, 4), "info_nce": teacher_shape}.get(
        name.split(",")[0], (examples, 2, 3)
    )
    teacher = rng.normal(size=teacher_shape).astype(np.float32)
    return rng.normal(size=student_shape).astype(np.float32), teacher


# --- value and gradient ----------------------------------------------------------------------


@parametrize(CASES)
def test_value_and_gradients_to_six_digits(name):
    reference = reference_of(name)
    student, teacher = draw(name)
    wide = student.astype(float), teacher.astype(float)
    weights = np.random.default_rng(1).normal(size=5)
    values, *gradients = evaluate(name, student, teacher, weights)
    expected = reference(*wide)
    np.testing.assert_allclose(values, expected, rtol=2e-6, atol=1e-6 * expected.max())
    of_student = numeric_gradient(lambda s: (weights * reference(s, wide[1])).sum(), wide[0])
    of_teacher = numeric_gradient(lambda t: (weights * reference(wide[0], t)).sum(), wide[1])
    for gradient, expected in zip(gradients, (of_student, of_teacher), strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1.5e-6 * np.abs(expected).max())


@parametrize(CASES)
def test_float64_is_kept(name):
    wide = [x.astype(np.float64) for x in draw(name)]
    loss = functools.partial(getattr(losses, name.split(",")[0]), **CASES[name])
    with jax.enable_x64(True):
        value = jax.jit(loss)(*wide)
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, reference_of(name)(*wide), rtol=1e-9)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_reference_implementations(wide):
    """RepDistiller's, mdistiller's and torchdistill's values, with their scales written out."""
    student, teacher, *_ = draw_golden(0)
    maps, pooled = (student, teacher), (student.mean((1, 2)), teacher.mean((1, 2)))
    n, of = len(student), functools.partial
    theirs = {
        "sp": (losses.similarity_preserving, maps, 1.0),
        "rkd_distance": (of(losses.rkd_distance, include_self=True), maps, 1.0),
        "rkd_angle": (of(losses.rkd_angle, include_self=True), maps, 1.0),
        "pkt": (of(losses.pkt, include_self=True), pooled, 1 / n),  # the mean over entries
        "ickd": (losses.ickd, maps, 1 / n),  # divided by the batch twice
    }
    for kernel in ("gaussian", "bilinear"):  # a norm, not squared
        loss = of(losses.correlation_congruence, kernel=kernel, order=3, normalise=False)
        theirs[f"cc_{kernel}"] = (loss, pooled, None)
    found = set()
    for name, (loss, arrays, scale) in theirs.items():
        with jax.enable_x64(wide):
            s, t = (jnp.asarray(x, jnp.float64 if wide else jnp.float32) for x in arrays)

            def total(s, loss=loss, t=t, scale=scale):
                mean = loss(s, t).mean()
                return n * jnp.sqrt(mean) if scale is None else scale * mean

            value, gradient = jax.jit(jax.value_and_grad(total))(s)
        for where in ("repdistiller", "mdistiller", "torchdistill"):
            golden = GOLDEN.get(f"{where}/{name}")
            if golden is None:
                continue
            found.add(f"{where}/{name}")
            np.testing.assert_allclose(value, golden["value"], rtol=1e-9 if wide else 1e-6)
            expected = np.array(golden["gradient"]).reshape(s.shape)
            near = (1e-9 if wide else 2e-6) * np.abs(expected).max()
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=near, err_msg=name)
    assert found == {name for name in GOLDEN if "crd" not in name}


# --- what the mathematics says ---------------------------------------------------------------


@parametrize(RELATIONS)
def test_zero_and_flat_at_student_equals_teacher(name):
    _, teacher = draw(name)
    values, *gradients = evaluate(name, teacher, teacher)
    np.testing.assert_allclose(values, 0, atol=1e-14)
    np.testing.assert_allclose(gradients, 0, atol=2e-7 if "as given" not in name else 1e-5)


@parametrize(RELATIONS)
def test_small_differences_keep_their_digits(name):
    _, teacher = draw(name)
    noise = np.random.default_rng(1).normal(size=teacher.shape)
    student = (teacher + 1e-3 * noise).astype(np.float32)
    expected = reference_of(name)(student.astype(float), teacher.astype(float))
    np.testing.assert_allclose(evaluate(name, student, teacher)[0], expected, rtol=5e-3)


@parametrize([name for name in CASES if "labels" not in CASES[name]])
@given(order=st.permutations(range(5)))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_the_order_of_examples_does_not_matter(name, order):
    order = np.array(order)
    student, teacher = draw(name)
    value = evaluate(name, student, teacher)[0]
    again = evaluate(name, student[order], teacher[order])[0]
    np.testing.assert_allclose(again, value[order], rtol=1e-4, atol=1e-7)


@parametrize([name for name in RELATIONS if not name.startswith("ickd")])
@given(seed=st.integers(0, 1000))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_rotation_of_the_features_does_not_matter(name, seed):
    student, teacher = draw(name)
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))
    rotated = (student.reshape(5, 6).astype(float) @ rotation).astype(np.float32)
    value, again = (evaluate(name, x.reshape(5, 2, 3), teacher)[0] for x in (student, rotated))
    np.testing.assert_allclose(again, value, rtol=1e-4, atol=1e-6)


@parametrize([name for name in CASES if "as given" not in name])
@given(power=st.integers(-60, 60))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_scale_of_the_features_does_not_matter(name, power):
    student, teacher = draw(name)
    factor = np.float32(2.0**power)
    value, gradient, _ = evaluate(name, student, teacher)
    scaled, of_scaled, _ = evaluate(name, student * factor, teacher)
    np.testing.assert_allclose(scaled, value, rtol=1e-5, atol=1e-8)
    expected = np.asarray(gradient, float) / factor
    np.testing.assert_allclose(of_scaled, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    scaled, *_ = evaluate(name, student, teacher * factor)
    np.testing.assert_allclose(scaled, value, rtol=1e-5, atol=1e-8)


def test_two_scalings_in_turn_divide_no_zero_by_zero():
    """On a GPU, XLA may turn x/a/b into x/(a·b): with the power of a tiny spread and that of 0, the product was 0."""
    assert power_of_two(jnp.float32(2.0**-100)) == 2.0**-100
    assert power_of_two(jnp.float32(0)) == 1


def test_examples_that_do_not_count_overflow_nowhere():
    """They are far away in units of the tiny spread of those that count."""
    student = jnp.float32([[1e10, 0], [1e10, 1e-35], [3, 4]])
    where = jnp.array([True, True, False])
    loss = functools.partial(losses.rkd_distance, teacher=student[::-1], where=where)
    gradient = jax.grad(lambda x: loss(x).sum())(student)
    assert np.isfinite(gradient).all()
    assert not gradient[2].any()


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_shift_of_the_features_does_not_matter(name):
    student, teacher = draw(name)
    value = evaluate(name, student, teacher)[0]
    np.testing.assert_allclose(evaluate(name, student + 1, teacher - 2)[0], value, rtol=1e-4)


@parametrize(CASES)
def test_padding_changes_nothing(name):
    """What is excluded is not there: the formula's value and gradient on the rest."""
    where = np.array([True, False, True, True, False])
    options = dict(CASES[name])
    if "labels" in options:
        options["labels"] = options["labels"][where]
    reference = functools.partial(reference_of(name).func, **options)
    student, teacher = draw(name)
    wide = student[where].astype(float), teacher[where].astype(float)
    student[~where], teacher[~where] = np.nan, np.inf
    values, *gradients = evaluate(name, student, teacher, where=where)
    np.testing.assert_allclose(values[where], reference(*wide), rtol=3e-6, atol=1e-7)
    np.testing.assert_array_equal(values[~where], 0)
    expected = numeric_gradient(lambda s: reference(s, wide[1]).sum(), wide[0])
    near = 2e-6 * np.abs(expected).max()
    np.testing.assert_allclose(gradients[0][where], expected, rtol=0, atol=near)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient[~where], 0)
    values, *gradients = evaluate(name, student, teacher, where=np.zeros(5, bool))
    np.testing.assert_array_equal(values, 0)
    assert not any(g.any() for g in gradients)


# --- extremes --------------------------------------------------------------------------------


@parametrize(CASES)
def test_extremes_are_finite_in_value_and_gradient(name):
    student, teacher = draw(name)
    one_zero, twins = student.copy(), student.copy()
    one_zero[1] = 0
    twins[1] = twins[0]
    inputs = {
        "all zero": np.zeros_like(student),
        "one zero": one_zero,
        "alike": np.array(np.broadcast_to(student[:1], student.shape)),
        "twins": twins,
    }
    if "as given" not in name:  # these grow with powers of the features
        inputs |= {"huge": student * np.float32(1e18), "tiny": student * np.float32(1e-18)}
    for kind, x in inputs.items():
        for t in (teacher, np.zeros_like(teacher)):
            for result in evaluate(name, x, t):
                assert np.isfinite(result).all(), kind
            if kind == "all zero":
                np.testing.assert_array_equal(evaluate(name, x, t)[1], 0)


@parametrize(CASES)
@pytest.mark.parametrize("examples", [1, 2])
def test_few_examples(name, examples):
    results = evaluate(name, *draw(name), where=np.arange(5) < examples)
    for result in results:
        assert np.isfinite(result).all()
    nothing = {1: ("rkd", "pkt", "info_nce", "similarity"), 2: ("rkd",)}[examples]
    if name.startswith(nothing) or name == "pkt":
        np.testing.assert_allclose(results[0], 0, atol=1e-14)
        np.testing.assert_allclose(results[1], 0, atol=1e-6)


@parametrize(["similarity_preserving", "rkd_distance", "rkd_angle", "pkt", "info_nce"])
def test_a_batch_of_one(name):
    for result in evaluate(name, *draw(name, 1)):
        np.testing.assert_allclose(result, 0, atol=1e-6)


@parametrize([name for name in CASES if "," not in name])
def test_bfloat16_is_computed_in_float32(name):
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in draw(name))
    value, gradient, _ = evaluate(name, student, teacher)
    assert value.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    wide = [np.asarray(x, np.float64) for x in (student, teacher)]
    np.testing.assert_allclose(value, reference_of(name)(*wide), rtol=1e-5)


@parametrize(CASES)
def test_nan_is_never_hidden(name):
    student, teacher = draw(name)
    student[1, 0, 0] = np.nan
    assert np.isnan(evaluate(name, student, teacher)[0]).any()


def test_pkt_with_opposite_features():
    """K = 0 says 'never a neighbour': +inf if the teacher says otherwise, with a finite gradient."""
    signs = np.array([[1.0], [1.0], [-1.0], [0.5], [-2.0]], np.float32)
    alike = np.ones((5, 1), np.float32)
    value, *gradients = evaluate("pkt", signs, alike)
    np.testing.assert_array_equal(value, np.full(5, np.inf))
    assert np.isfinite(gradients).all()
    assert all(np.isfinite(x).all() for x in evaluate("pkt", alike, signs))
    for kept in ([0, 1, 2, 3, 4], [0, 2], [2, 3], [1, 3, 4]):
        value, *gradients = evaluate("pkt", signs, signs, where=np.isin(np.arange(5), kept))
        np.testing.assert_array_equal(value, 0)
        assert np.isfinite(gradients).all()


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_close_examples_keep_their_distance(name):
    """From x² + y² − 2xy in float32, these distances are wrong by a factor."""
    student, teacher = draw(name)
    student = 100 + np.float32(1e-2) * student
    expected = reference_of(name)(student, teacher)
    np.testing.assert_allclose(evaluate(name, student, teacher)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_many_examples_are_compared_in_blocks(name):
    """256 × 2048 features: all differences at once would be 0.5 GB, several times over."""
    loss, x = getattr(losses, name), jax.ShapeDtypeStruct((256, 2048), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda s, t: loss(s, t).mean()))
    assert run.lower(x, x).compile().memory_analysis().temp_size_in_bytes < 0.4e9
    student, teacher = draw(name, 7)
    values = evaluate(name, student, teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relations, "_BLOCK", 200)  # two or three examples at a time
        blocks = jax.jit(lambda s, t: jax.vjp(loss, s, t)[1](np.ones(7, np.float32)))(student, teacher)
        np.testing.assert_allclose(jax.jit(loss)(student, teacher), values[0], rtol=1e-6)
    for block, whole in zip(blocks, values[1:], strict=True):
        np.testing.assert_allclose(block, whole, rtol=1e-5, atol=1e-7)


def test_info_nce_far_and_near():
    run = jax.jit(jax.value_and_grad(lambda s, t, tau: losses.info_nce(s, t, temperature=tau).mean()))
    x = np.eye(3, dtype=np.float32)
    assert run(x, x, 1e-4)[0] == 0  # e^(−10,000)
    value, gradient = run(x[[1, 2, 0]], x, 1e-4)
    np.testing.assert_allclose(value, 1e4, rtol=1e-6)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(run(x, x, 0.05)[0], np.log1p(2 * np.exp(-20)), rtol=1e-5)


# --- CRD -------------------------------------------------------------------------------------


def ref_crd(student, teacher, banks, log_z, ids, negatives, temperature=0.07):
    """Values, and log Z; banks and log_z are (student's, teacher's)."""
    examples, values, out = len(banks[0]), np.zeros(len(ids)), []
    chosen = np.concatenate([ids[:, None], negatives], 1)
    noise = negatives.shape[1] / examples
    for v, bank, z in ((student, banks[1], log_z[0]), (teacher, banks[0], log_z[1])):
        scores = np.exp(np.einsum("if,ikf->ik", unit(v), bank[chosen]) / temperature)
        z = np.log(scores.mean() * examples) if z is None else z
        p = scores / np.exp(z)
        values += -np.log(p[:, 0] / (p[:, 0] + noise)) - np.log(noise / (p[:, 1:] + noise)).sum(1)
        out.append(z)
    return values, out


def golden_crd(dtype=jnp.float32, examples=20):
    """Inputs of the golden constants; or, with other examples in the memory, of their shapes."""
    student, teacher, banks, ids, negatives = draw_golden(0)
    pooled = [jnp.asarray(x.mean((1, 2)), dtype) for x in (student, teacher)]
    if examples != 20:
        banks = np.random.default_rng(1).normal(size=(2, examples, 3))
    unset = jnp.asarray(-jnp.inf, dtype)
    state = losses.CRDState(*(jnp.asarray(b, dtype) for b in banks), unset, unset)
    return *pooled, state, ids, negatives


@jax.jit
def run_crd(student, teacher, state, ids, negatives, where, temperature):
    def values_and_state(student, state):
        return losses.crd(student, teacher, state, ids, negatives, temperature=temperature, where=where)

    (values, after), pull = jax.vjp(values_and_state, student, state)
    return values, after, *pull((jnp.ones_like(values), jax.tree.map(jnp.ones_like, after)))


def crd(student, teacher, state, ids, negatives, where=None, temperature=0.07):
    """Values, the new state, and the gradients of the sum of all for the student and the state."""
    where = np.ones(6, bool) if where is None else where
    return run_crd(student, teacher, state, np.asarray(ids), negatives, where, temperature)


@pytest.mark.parametrize("wide", [True, False], ids=["float64", "float32"])
def test_crd_is_repdistillers_over_two_steps(wide):
    with jax.enable_x64(wide):
        student, teacher, state, *rest = golden_crd(jnp.float64 if wide else jnp.float32)
        near = 1e-9 if wide else 3e-6
        for step in range(2):
            values, state, gradient, _ = crd(student, teacher, state, *rest)
            golden = GOLDEN[f"repdistiller/crd_step{step}"]
            np.testing.assert_allclose(values.mean(), golden["value"], rtol=near)
            expected = 6 * np.array(golden["gradient"]).reshape(student.shape)
            close = near * np.abs(expected).max()
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=close)
        memory = GOLDEN["repdistiller/crd_memory"]
        np.testing.assert_allclose(state.student.ravel(), memory["student"], atol=near)
        np.testing.assert_allclose(state.teacher.ravel(), memory["teacher"], atol=near)
        log_z = np.array([state.log_z_student, state.log_z_teacher])
        np.testing.assert_allclose(np.exp(log_z), memory["z"], rtol=10 * near)


@pytest.mark.parametrize("examples", [20, 200], ids=["all scores", "gathered"])
def test_crd_by_its_formula(examples):
    student, teacher, state, ids, negatives = golden_crd(examples=examples)
    banks = [np.asarray(b, float) for b in (state.student, state.teacher)]
    values, after, _, of_state = crd(student, teacher, state, ids, negatives)
    wide = np.asarray(student, float), np.asarray(teacher, float)
    expected, log_z = ref_crd(*wide, banks, (None, None), ids, negatives)
    np.testing.assert_allclose(values, expected, rtol=3e-6)
    found = np.array([after.log_z_student, after.log_z_teacher])
    np.testing.assert_allclose(found, log_z, rtol=1e-6)
    assert not any(leaf.any() for leaf in of_state)  # nothing flows into the memory, nor through it
    expected = 0.5 * banks[0][ids] + 0.5 * unit(wide[0])
    np.testing.assert_allclose(after.student[ids], unit(expected), rtol=1e-5, atol=1e-6)
    state = state._replace(log_z_student=after.log_z_student, log_z_teacher=after.log_z_teacher)
    _, again, gradient, _ = crd(student, teacher, state, ids, negatives)
    assert again.log_z_student == state.log_z_student
    expected = numeric_gradient(lambda s: ref_crd(s, wide[1], banks, log_z, ids, negatives)[0].sum(), wide[0])
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_crd_forgets_what_is_masked():
    student, teacher, state, ids, negatives = golden_crd()
    kept = np.array([0, 2, 3])
    banks = [np.asarray(b, float) for b in (state.student, state.teacher)]
    wide = (np.asarray(x, float)[kept] for x in (student, teacher))
    expected, log_z = ref_crd(*wide, banks, (None, None), ids[kept], negatives[kept])
    where = np.isin(np.arange(6), kept)
    student, teacher = (jnp.where(where[:, None], x, np.nan) for x in (student, teacher))
    ids = np.where(where, ids, ids[0])  # padding often repeats an example
    values, after, gradient, _ = crd(student, teacher, state, ids, negatives, where)
    np.testing.assert_allclose(values[kept], expected, rtol=3e-6)
    np.testing.assert_allclose(after.log_z_student, log_z[0], rtol=1e-6)
    np.testing.assert_array_equal(values[~where], 0)
    np.testing.assert_array_equal(gradient[~where], 0)
    changed = np.any(after.student != state.student, axis=1)
    np.testing.assert_array_equal(np.sort(ids[kept]), np.flatnonzero(changed))
    assert np.isfinite(after.student).all()
    values, after, *_ = crd(student, teacher, state, ids, negatives, np.zeros(6, bool))
    np.testing.assert_array_equal(values, 0)
    jax.tree.map(np.testing.assert_array_equal, after, state)  # Z is still to be set


def test_crd_of_a_divided_batch_remembers_the_whole():
    student, teacher, state, ids, negatives = golden_crd()
    where = np.array([True, True, False, True, True, False])

    def run(*inputs, axis_name=None):
        *embeddings, ids, negatives, where = inputs
        return losses.crd(*embeddings, state, ids, negatives, where=where, axis_name=axis_name)

    inputs = (student, teacher, np.asarray(ids), negatives, where)
    values, after = jax.jit(run)(*inputs)
    parts = [np.reshape(x, (3, 2, *np.shape(x)[1:])) for x in inputs]
    divided = jax.vmap(functools.partial(run, axis_name="parts"), axis_name="parts")
    part_values, part_after = jax.jit(divided)(*parts)
    np.testing.assert_allclose(part_values.ravel(), values, rtol=1e-6)
    jax.tree.map(
        lambda x, whole: np.testing.assert_allclose(x, np.stack([whole] * 3), rtol=1e-6), part_after, after
    )


def test_crd_never_makes_up_a_number():
    student, teacher, state, ids, negatives = golden_crd()
    far, none = ids.copy(), negatives.copy()
    far[1], far[2], none[3, 4], none[4, 0] = 20, -1, 20, -1
    values, after, *_ = crd(student, teacher, state, far, none)
    np.testing.assert_array_equal(np.isnan(values), [False, True, True, True, True, False])
    assert np.isfinite(after.student).all()
    changed = np.flatnonzero(np.any(after.student != state.student, axis=1))
    np.testing.assert_array_equal(changed, np.sort(ids[[0, 5]]))


@pytest.mark.parametrize("scale", [0.0, 1e18, 1e-18])
@pytest.mark.parametrize("temperature", [0.07, 1e-3])  # e^1000 is above float32
def test_crd_at_its_edges(scale, temperature):
    student, teacher, state, *rest = golden_crd()
    student = student * np.float32(scale)
    results = crd(student, teacher, state, *rest, temperature=temperature)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
    if scale:
        norms = np.linalg.norm(results[1].student[rest[0]], axis=1)
        np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_crd_of_bfloat16_is_computed_in_float32():
    student, teacher, state, *rest = golden_crd()
    values, *_ = crd(student.astype(jnp.bfloat16), teacher, state, *rest)
    assert values.dtype == jnp.float32


@pytest.mark.parametrize("labels", [None, np.arange(12) % 3])
def test_negatives_are_uniform_over_the_others(labels):
    ids = np.array([0, 7, 11])
    draw_some = jax.jit(functools.partial(losses.crd_negatives, examples=12, count=6000))
    drawn = np.asarray(draw_some(jax.random.key(0), ids, labels=labels))
    for i, row in zip(ids, drawn, strict=True):
        allowed = [j for j in range(12) if (j != i if labels is None else labels[j] != labels[i])]
        counts = np.bincount(row, minlength=12)
        assert counts.sum() == counts[allowed].sum()
        expected = 6000 / len(allowed)
        assert np.abs(counts[allowed] - expected).max() < 5 * expected**0.5
    again = draw_some(jax.random.key(0), ids, labels=labels)
    np.testing.assert_array_equal(drawn, again)


def test_no_negative_is_made_up():
    draw_some = jax.jit(losses.crd_negatives, static_argnames=("examples", "count"))
    ids = np.array([0])
    alone = draw_some(jax.random.key(0), ids, examples=1, count=3)
    alike = draw_some(jax.random.key(0), ids, examples=4, count=3, labels=np.zeros(4, int))
    np.testing.assert_array_equal(alone, [[-1, -1, -1]])
    np.testing.assert_array_equal(alike, [[-1, -1, -1]])


# --- learned ---------------------------------------------------------------------------------

PARTS = {
    "similarity_preserving": features.relation(losses.similarity_preserving),
    "rkd": features.rkd(),
    "pkt": features.relation(losses.pkt, pool=True),
    "correlation_congruence": features.correlation_congruence(features=6),
    "ickd": features.ickd(),
    "info_nce": features.info_nce(features=6, temperature=0.5),
}


def layers(examples=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [(examples, 4, 4, 3), (examples, 5)], [(examples, 8, 8, 6), (examples, 7)]
    return [[rng.normal(size=s).astype(np.float32) for s in side] for side in shapes]


def shapes_of(features, examples=None):
    return [(examples or x.shape[0], *x.shape[1:]) for x in features]


@parametrize(PARTS)
def test_learned_relations(name):
    """Any widths and resolutions, whatever the batch's size; padding counts nowhere; it is learned."""
    part = PARTS[name]
    student, teacher = layers()
    params = part.init(jax.random.key(0), shapes_of(student), shapes_of(teacher))
    other = part.init(jax.random.key(0), shapes_of(student, 1), shapes_of(teacher, 99))
    jax.tree.map(np.testing.assert_array_equal, params, other)

    def padded(features):
        return [np.concatenate([x, np.full_like(x[:2], np.nan)]) for x in features]

    where = np.arange(8) < 6

    def mean(params, student, teacher, where):
        values = part.apply(params, student, teacher, where=where)
        assert values.shape == where.shape
        assert values.dtype == jnp.float32
        return values.sum() / 6

    run = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    value, gradients = run(params, padded(student), padded(teacher), where)
    plain, expected = run(params, student, teacher, np.ones(6, bool))
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    for g, e in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-6)
    for g, e in zip(gradients[1], expected[1], strict=True):
        np.testing.assert_allclose(g[:6], e, rtol=1e-4, atol=1e-6)
    both = [params, student]
    for _ in range(30):
        _, gradients = run(both[0], both[1], teacher, np.ones(6, bool))
        size = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
        both = jax.tree.map(lambda p, g, size=size: p - 0.1 * g / size, both, list(gradients))
    assert run(both[0], both[1], teacher, np.ones(6, bool))[0] < 0.9 * plain


def test_learned_relations_add_up_over_layers():
    student, teacher = layers()
    pairs = zip(student, teacher, strict=True)
    expected = sum(losses.similarity_preserving(s, t) for s, t in pairs)
    values = PARTS["similarity_preserving"].apply({}, student, teacher)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


def test_learned_info_nce_may_use_labels():
    part = features.info_nce(features=6, other_classes=True)
    student, teacher = layers()
    params = part.init(jax.random.key(0), shapes_of(student), shapes_of(teacher))
    values = part.apply(params, student, teacher, labels=np.zeros(6, int))
    np.testing.assert_array_equal(values, 0)  # no negatives
    assert (part.apply(params, student, teacher, labels=np.arange(6)) > 0).all()
    with pytest.raises(ValueError, match="needs the batch's labels"):
        part.apply(params, student, teacher)


def test_learned_crd_learns_and_scans():
    part = features.crd(features=8, negatives=16)
    student, teacher = (side[:1] for side in layers(12))
    params = part.init(jax.random.key(0), shapes_of(student), shapes_of(teacher))
    state = part.init_state(jax.random.key(1), examples=12)
    labels = np.arange(12) % 3

    def step(carry, key):
        params, state = carry

        def loss(params):
            values, after = part.apply(params, state, student, teacher, np.arange(12), key=key, labels=labels)
            return values.mean(), after

        (value, state), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        params = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients)
        return (params, state), value

    keys = jax.random.split(jax.random.key(2), 150)
    (_, state), values = jax.lax.scan(step, (params, state), keys)
    assert np.isfinite(values).all()
    assert values[-10:].mean() < 0.5 * values[:3].mean()
    np.testing.assert_allclose(np.linalg.norm(state.student, axis=1), 1, rtol=1e-5)


# --- misuse ----------------------------------------------------------------------------------


def test_misuse_is_named():
    x = np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"the same batch size, got shapes \(4, 3\) and \(5, 3\)"):
        losses.rkd_distance(x, np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"teacher features must have shape \[batch, \*spatial, channels\]"):
        losses.pkt(x, np.zeros(4))
    with pytest.raises(ValueError, match=r"where must have one entry per example, shape \(4,\)"):
        losses.rkd_angle(x, x, where=np.ones((4, 3), bool))
    with pytest.raises(ValueError, match="the same number of channels"):
        losses.ickd(np.zeros((4, 2, 3)), np.zeros((4, 2, 5)))
    with pytest.raises(ValueError, match="kernel must be 'gaussian' or 'bilinear', got 'rbf'"):
        losses.correlation_congruence(x, x, kernel="rbf")
    with pytest.raises(ValueError, match="order must be an integer of at least 1, got 0"):
        losses.correlation_congruence(x, x, order=0)
    with pytest.raises(ValueError, match="gamma must be positive"):
        losses.correlation_congruence(x, x, gamma=0.0)
    with pytest.raises(ValueError, match="number of features, got 3 and 5: project one"):
        losses.info_nce(x, np.zeros((4, 5)))
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\)"):
        losses.info_nce(x, x, np.zeros(3, int))
    with pytest.raises(ValueError, match="temperature must be positive"):
        losses.info_nce(x, x, temperature=0)
    state = losses.crd_init(jax.random.key(0), 9, 4)
    ids, negatives = np.arange(4), np.zeros((4, 2), int)
    with pytest.raises(ValueError, match="holds 4 features per example, but the embeddings have 3"):
        losses.crd(x, x, state, ids, negatives)
    with pytest.raises(ValueError, match="momentum must lie"):
        losses.crd(x, x, state, ids, negatives, momentum=2)
    x = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"negatives \(4, m\), got \(4,\) and \(2, 4\)"):
        losses.crd(x, x, state, ids, negatives.T)
    with pytest.raises(ValueError, match="examples must be an integer of at least 1"):
        losses.crd_init(jax.random.key(0), 0, 4)
    with pytest.raises(ValueError, match=r"labels must have one entry per example, shape \(9,\)"):
        losses.crd_negatives(jax.random.key(0), ids, examples=9, count=2, labels=ids)
    part = features.crd()
    with pytest.raises(ValueError, match="crd takes one layer"):
        part.init(jax.random.key(0), [(1, 3)] * 2, [(1, 3)] * 2)
    with pytest.raises(ValueError, match="must have the same number of layers"):
        features.relation(losses.pkt).init(jax.random.key(0), [(1, 3)], [(1, 3)] * 2)

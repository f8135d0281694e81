"""The arithmetic of weights: exact at the ends, linear between, clear about what does not fit."""

import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distill_jax import models, weights

KEY = jax.random.key(0)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def make_tree(seed, dtype=jnp.float32):
    """Values of very different sizes, a counter and a mask."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(5, 7)) * 10.0 ** rng.integers(-3, 4, (5, 7))
    return {
        "dense": [{"kernel": jnp.asarray(values, dtype), "bias": jnp.asarray(values[0], dtype)}],
        "count": jnp.int32(seed),
        "mask": jnp.asarray(values[1] > 0),
    }


def largest(dtype):
    return jnp.asarray(np.array([1, -0.5, 0.3]) * float(jnp.finfo(dtype).max), dtype)


def floats(tree):
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(tree) if weights.is_float(x)]


def assert_floats_close(actual, expected, rtol=1e-6):
    for x, y in zip(floats(actual), floats(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max())


# Interpolation


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [weights.lerp, weights.slerp])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_the_ends_are_exact(function, dtype, wrap):
    a, b = make_tree(1, dtype), make_tree(2, dtype)
    a["large"], b["large"] = largest(dtype), -largest(dtype)
    function = wrap(function)
    chex.assert_trees_all_equal(function(a, b, 0.0), a)
    chex.assert_trees_all_equal(function(a, b, 1.0), b)
    middle = function(a, b, 0.3)
    chex.assert_trees_all_equal_shapes_and_dtypes(middle, a)
    assert jnp.isfinite(middle["large"]).all()
    assert middle["count"] == a["count"]
    np.testing.assert_array_equal(middle["mask"], a["mask"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_lerp_is_the_formula_under_vmap(dtype):
    a, b, ts = make_tree(1, dtype), make_tree(2, dtype), np.linspace(0, 1, 11)
    a["large"], b["large"] = largest(dtype), -largest(dtype)[::-1]
    batched = jax.jit(jax.vmap(weights.lerp, (None, None, 0)))(a, b, jnp.asarray(ts, jnp.float32))
    for x, y, z in zip(*map(floats, (a, b, batched)), strict=True):
        expected = (1 - ts[:, None]) * x.reshape(1, -1) + ts[:, None] * y.reshape(1, -1)
        eps, noise = float(jnp.finfo(dtype).eps), 3e-7 * np.abs(expected).max()
        np.testing.assert_allclose(z.reshape(11, -1), expected, rtol=eps, atol=noise)
        # Linear in t, up to the rounding of the results
        second = z[2:] - 2 * z[1:-1] + z[:-2]
        assert np.abs(second).max() <= 4 * eps * np.abs(z).max()
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[0], batched), a)


def test_lerp_commutes_and_keeps_equals():
    a, b = make_tree(1), make_tree(2)
    a["count"] = b["count"]  # what is carried comes from one side
    a["mask"] = b["mask"]
    a["large"], b["large"] = largest(jnp.float32), -largest(jnp.float32)[::-1]
    for t in (0.125, 0.25, 0.75):  # 1 − t is exact
        chex.assert_trees_all_equal(weights.lerp(a, b, t), weights.lerp(b, a, 1 - t))
    for t in (0.1, 0.5, 0.7):
        assert_floats_close(weights.lerp(a, b, t), weights.lerp(b, a, 1 - t))
        chex.assert_trees_all_equal(weights.lerp(a, a, t), a)


def test_lerp_composes():
    """From a to b by s, and from there to b by t, is from a to b by 1 − (1 − s)(1 − t)."""
    a, b = make_tree(1), make_tree(2)
    assert_floats_close(weights.lerp(weights.lerp(a, b, 0.3), b, 0.6), weights.lerp(a, b, 0.72))


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_gradients_of_lerp(t):
    a, b = ({"w": make_tree(i)["dense"][0]["kernel"]} for i in (1, 2))
    weight = jax.random.normal(KEY, (5, 7))
    loss = jax.jit(jax.grad(lambda a, b, t: jnp.sum(weight * weights.lerp(a, b, t)["w"]), argnums=(0, 1, 2)))
    for_a, for_b, for_t = loss(a, b, t)
    np.testing.assert_allclose(for_a["w"], (1 - t) * weight, rtol=1e-6)
    np.testing.assert_allclose(for_b["w"], t * weight, rtol=1e-6)
    weight, x, y = (np.asarray(v, float) for v in (weight, a["w"], b["w"]))
    expected = np.sum(weight * (y - x))
    np.testing.assert_allclose(for_t, expected, rtol=1e-4)


def test_a_scalar_for_each_path_pattern():
    a, b = make_tree(1), make_tree(2)
    given = {"kernel": 0.25, "": 1.0}
    mixed = jax.jit(weights.lerp)(a, b, given)  # jit sorts the dict: no order may matter
    expected = weights.lerp(a, b, 0.25)
    chex.assert_trees_all_equal(mixed["dense"][0]["kernel"], expected["dense"][0]["kernel"])
    chex.assert_trees_all_equal(mixed["dense"][0]["bias"], b["dense"][0]["bias"])
    gradient = jax.grad(lambda t: jnp.sum(weights.lerp(a, b, t)["dense"][0]["kernel"]))(given)
    assert gradient[""] == 0
    difference = np.sum(floats(b)[1] - floats(a)[1])
    np.testing.assert_allclose(gradient["kernel"], difference, rtol=1e-4)


def test_random_keys_are_carried():
    a, b = ({"key": jax.random.key(i), "w": jnp.ones(2)} for i in (1, 2))
    assert weights.lerp(a, b, 0.5)["key"] == a["key"]
    assert weights.lerp(a, b, 1.0)["key"] == b["key"]
    assert weights.mean([a, b])["key"] == a["key"]


def test_slerp_keeps_to_the_circle():
    x, y = np.array([3.0, 0.0, 0.0]), np.array([0.0, 3 * np.cos(0.4), 3 * np.sin(0.4)])
    a, b = {"w": jnp.asarray(x, jnp.float32)}, {"w": jnp.asarray(y, jnp.float32)}
    ts = jnp.linspace(0, 1, 9)
    path = jax.vmap(weights.slerp, (None, None, 0))(a, b, ts)["w"]
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 3, rtol=1e-6)
    angles = np.arccos(np.clip(path @ x / 9, -1, 1))
    np.testing.assert_allclose(angles, np.asarray(ts) * np.pi / 2, atol=1e-3)


def test_slerp_where_there_is_no_circle():
    a = {"w": jnp.array([1.0, 2.0]), "zero": jnp.zeros(2)}
    for b in ({"w": 2 * a["w"], "zero": a["zero"]}, {"w": -a["w"], "zero": jnp.ones(2)}):
        chex.assert_trees_all_equal(weights.slerp(a, b, 0.25), weights.lerp(a, b, 0.25))
        gradient = jax.grad(lambda a, b=b: jnp.sum(weights.slerp(a, b, 0.25)["w"]))(a)
        assert np.isfinite(gradient["w"]).all()


# Means


@pytest.mark.parametrize("dtype", DTYPES)
def test_means(dtype):
    a, b, c = (make_tree(i, dtype) for i in (1, 2, 3))
    kept = {"count": a["count"], "mask": a["mask"]}
    chex.assert_trees_all_equal(weights.mean([a]), a)
    chex.assert_trees_all_equal(weights.mean([a, b], [1, 0]), a)
    chex.assert_trees_all_equal(weights.mean([a, b], [0, 2]), {**b, **kept})
    chex.assert_trees_all_equal(weights.mean([a, b])["dense"], weights.mean([b, a])["dense"])
    eps = float(jnp.finfo(dtype).eps)
    assert_floats_close(weights.mean([a, b, c]), weights.mean([c, a, b]), 2 * eps)
    # Of means: weights add up
    pair = weights.mean([a, b], [1, 2])
    assert_floats_close(weights.mean([pair, c], [3, 1]), weights.mean([a, b, c], [1, 2, 1]), 2 * eps)
    mapped = jax.vmap(lambda w: weights.mean([a, b], w))(jnp.eye(2))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x[1], mapped), {**b, **kept})


def test_fisher_mean():
    models = [{"w": jnp.array([1.0, 1.0, 1.0])}, {"w": jnp.array([3.0, 5.0, 2.0])}]
    fishers = [{"w": jnp.array([2e-38, 0.0, 6e-38])}, {"w": jnp.array([0.0, 0.0, 2e-38])}]
    # One knows, none knows, three to one; as small as they come, and nothing is added to them
    np.testing.assert_allclose(weights.fisher_mean(models, fishers)["w"], [1, 3, 1.25], rtol=1e-6)
    equal = [{"w": jnp.full(3, 0.5)}] * 2
    chex.assert_trees_all_close(weights.fisher_mean(models, equal), weights.mean(models))
    chex.assert_trees_all_close(
        weights.fisher_mean(models, equal, [1, 3]), weights.mean(models, [1, 3]), rtol=1e-6
    )
    with pytest.raises(ValueError, match=r"fishers\[1\] must not be negative, got -1.0"):
        weights.fisher_mean(models, [fishers[0], {"w": jnp.array([1.0, -1.0, 0.0])}])


def test_greedy_soup():
    models = [{"w": jnp.float32(x)} for x in (4.0, 0.5, -1.0, 9.0)]
    asked = []

    def score(tree):
        asked.append(float(tree["w"]))
        return -abs(asked[-1])

    soup = weights.greedy_soup(models, score)
    # 0.5; with −1 it is −0.25, better; with 4 or 9 worse
    assert soup.members == (1, 2)
    assert float(soup.tree["w"]) == -0.25
    assert soup.score == -0.25
    assert len(asked) == 7
    with pytest.raises(ValueError, match="score must be a number"):
        weights.greedy_soup(models, lambda tree: float("nan"))


def test_ema_and_swa_have_their_closed_forms():
    series = [make_tree(i) for i in range(1, 7)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *series)

    def run(join):
        def body(carry, item):
            average, step = carry
            return (join(average, item, step), step + 1), None

        start = jax.tree.map(jnp.ones_like, series[0])
        return jax.jit(lambda: jax.lax.scan(body, (start, 1), stacked)[0][0])()

    plain = run(lambda average, tree, step: weights.ema(average, tree, 0.8))
    corrected = run(lambda average, tree, step: weights.ema(average, tree, 0.8, step=step))
    uniform = run(lambda average, tree, step: weights.swa(average, tree, step - 1))
    powers = 0.8 ** np.arange(5, -1, -1)
    for i, (x, y, z) in enumerate(zip(*map(floats, (plain, corrected, uniform)), strict=True)):
        values = np.stack([floats(tree)[i] for tree in series])
        weighted = np.tensordot(powers, values, 1)
        scale = np.abs(values).max()
        np.testing.assert_allclose(x, 0.8**6 + 0.2 * weighted, atol=1e-6 * scale)
        np.testing.assert_allclose(y, weighted / powers.sum(), atol=1e-6 * scale)
        np.testing.assert_allclose(z, values.mean(0), atol=1e-6 * scale)
    assert plain["count"] == uniform["count"] == 6  # the newest
    chex.assert_trees_all_equal(weights.ema(series[0], series[1], 0.9, step=1), series[1])
    chex.assert_trees_all_equal(weights.ema(series[0], series[1], 1.0), series[0])
    chex.assert_trees_all_equal(weights.swa(series[0], series[1], 0), series[1])


def test_a_mean_in_float32_of_bfloat16():
    average, tree = {"w": jnp.ones(2)}, {"w": jnp.full(2, 2.0, jnp.bfloat16)}
    for step in range(1, 4):
        average = weights.ema(average, tree, 0.999)
        np.testing.assert_allclose(average["w"], 2 - 0.999**step, rtol=1e-6)


# Task vectors


@pytest.mark.parametrize("dtype", DTYPES)
def test_task_arithmetic(dtype):
    base, tuned = make_tree(1, dtype), make_tree(2, dtype)
    vector = weights.task_vector(base, tuned)
    eps = float(jnp.finfo(dtype).eps)
    back = weights.add(base, vector)
    assert_floats_close(back, tuned, eps)
    chex.assert_trees_all_equal_shapes_and_dtypes(back, base)
    assert back["count"] == base["count"]
    chex.assert_trees_all_equal(weights.add(base, vector, 0.0), base)
    assert_floats_close(weights.add(base, vector, 0.3), weights.lerp(base, tuned, 0.3), 2 * eps)
    one = weights.add(base, vector, {"kernel": 1.0, "": 0.0})
    chex.assert_trees_all_equal(one["dense"][0]["bias"], base["dense"][0]["bias"])


def test_ties_by_hand():
    rng = np.random.default_rng(0)
    values = [rng.normal(size=20) for _ in range(3)]
    vectors = [
        {"a": jnp.asarray(v[:8], jnp.float32), "b": jnp.asarray(v[8:].reshape(3, 4), jnp.float32)}
        for v in values
    ]
    trimmed = []
    for v in values:
        v = v.copy()
        v[np.argsort(np.abs(v))[:12]] = 0  # 40 % of 20 stay, of both leaves together
        trimmed.append(v)
    trimmed = np.array(trimmed)
    sign = np.sign(trimmed.sum(0))
    agree = (np.sign(trimmed) == sign) & (trimmed != 0)
    expected = np.where(agree, trimmed, 0).sum(0) / np.maximum(agree.sum(0), 1)
    merged = jax.jit(lambda *v: weights.ties(v, density=0.4))(*vectors)
    np.testing.assert_allclose(merged["a"], expected[:8], rtol=1e-6)
    np.testing.assert_allclose(merged["b"].ravel(), expected[8:], rtol=1e-6)
    chex.assert_trees_all_close(weights.ties(vectors[:1], density=1.0), vectors[0])


def test_dare():
    vector = {"w": jnp.full((200, 500), 2.0), "count": jnp.int32(3)}
    dropped = jax.jit(lambda key: weights.dare(key, vector, rate=0.75))(KEY)
    assert set(np.unique(dropped["w"])) == {0.0, 8.0}
    # The standard deviation of the mean is 2·√3/√100000
    assert abs(float(dropped["w"].mean()) - 2) < 5 * 2 * np.sqrt(3 / 1e5)
    assert dropped["count"] == 3
    chex.assert_trees_all_equal(weights.dare(KEY, vector, rate=0.0), vector)


# Measures


def test_distance_and_cosine():
    a, b = make_tree(1), make_tree(2)
    x, y = (np.concatenate([leaf.ravel() for leaf in floats(tree)]) for tree in (a, b))
    np.testing.assert_allclose(weights.distance(a, b), np.linalg.norm(x - y), rtol=1e-6)
    cosine = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    np.testing.assert_allclose(weights.cosine(a, b), cosine, atol=1e-6)
    assert weights.distance(a, a) == 0
    assert weights.cosine({"w": jnp.ones(3)}, {"w": -jnp.ones(3)}) == -1
    assert np.isnan(weights.cosine({"w": jnp.ones(3)}, {"w": jnp.zeros(3)}))
    a, b = {"w": jnp.array([3j, 1.0])}, {"w": jnp.array([0j, -3.0])}
    assert weights.distance(a, b) == 5
    assert weights.distance(a, b).dtype == jnp.float32
    assert weights.cosine(a, a) == 1
    assert weights.cosine(a, {"w": 1j * a["w"]}) == 0


# What does not fit


def test_every_difference_is_listed_by_path():
    a = {"a": jnp.ones(2), "b": [jnp.ones(3), jnp.ones(2)], "c": jnp.ones(1), "n": jnp.ones(2)}
    b = {"a": jnp.ones(3), "b": [jnp.ones(3, jnp.float16), jnp.ones(2)], "d": jnp.ones(1)}
    b["n"] = jnp.array([jnp.nan, 1.0])
    report = weights.mismatch_report(a, b)
    assert report.splitlines() == [
        "c: missing in tree_b",
        "d: missing in tree_a",
        "a: shape (2,) in tree_a, (3,) in tree_b",
        "b.0: dtype float32 in tree_a, float16 in tree_b",
        "n: 1 of 2 values not finite in tree_b",
    ]
    for function in (
        lambda: weights.lerp(a, b, 0.5),
        lambda: weights.slerp(a, b, 0.5),
        lambda: weights.distance(a, b),
        lambda: weights.cosine(a, b),
    ):
        with pytest.raises(ValueError) as error:
            function()
        assert all(line in str(error.value) for line in report.splitlines())
    for function, name in [
        (lambda: weights.mean([a, b]), "trees[1]"),
        (lambda: weights.task_vector(a, b), "tuned"),
        (lambda: weights.add(a, b), "vector"),
        (lambda: weights.ties([a, b]), "vectors[1]"),
        (lambda: weights.ema(a, b, 0.5), "tree"),
        (lambda: weights.swa(a, b, 1), "tree"),
        (lambda: weights.greedy_soup([a, b], lambda tree: 0.0), "trees[1]"),
        (lambda: weights.fisher_mean([a], [b]), "fishers[0]"),
    ]:
        with pytest.raises(ValueError) as error:
            function()
        assert f"c: missing in {name}" in str(error.value)
        assert f"1 of 2 values not finite in {name}" in str(error.value)
    assert weights.mismatch_report(a, a) == ""


def test_other_containers_and_constants_inside_jit():
    report = weights.mismatch_report({"a": [jnp.ones(1)]}, {"a": (jnp.ones(1),)})
    assert report.startswith("containers: ")
    bad = {"w": jnp.array([jnp.inf])}
    with pytest.raises(ValueError, match="w: 1 of 1 values not finite in tree_b"):
        jax.jit(lambda a: weights.lerp(a, bad, 0.5))({"w": jnp.ones(1)})


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (1.5, r"t must lie in \[0, 1\], got 1.5"),
        (-0.1, r"t must lie in \[0, 1\], got -0.1"),
        (jnp.ones(3), r"t must be a scalar, got shape \(3,\): use jax.vmap"),
        ({"kernel": 2.0, "": 0.5}, r"t\['kernel'\] must lie in \[0, 1\], got 2.0"),
        ({"kernl": 0.5, "biass": 0.5, "": 0.5}, r"'kernl' is found in no path; 'biass' is found in no"),
        ({"kernel": 0.5}, r"count: found by none.*; .*bias: found by none.*; mask: found by none"),
        ({"dense": 0.5, "kernel": 0.5, "": 0.1}, r"dense.0.kernel: found by 'dense', 'kernel'"),
    ],
)
def test_bad_values_of_t(t, message):
    with pytest.raises(ValueError, match=message):
        weights.lerp(make_tree(1), make_tree(2), t)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: weights.mean([]), "trees must have at least one entry"),
        (lambda a: weights.mean([a, a], [1, -1]), "weights must be finite, ≥ 0 and not all 0, got"),
        (lambda a: weights.mean([a, a], [0, 0]), "not all 0"),
        (
            lambda a: weights.mean([a, a], [1, 1, 1]),
            r"weights must have one entry per tree, 2, got shape \(3,\)",
        ),
        (lambda a: weights.fisher_mean([a, a], [a]), "fishers must have one entry per tree, 2, got 1"),
        (lambda a: weights.ema(a, a, 1.5), r"decay must lie in \[0, 1\], got 1.5"),
        (lambda a: weights.ema(a, a, 1.0, step=1), "got 1.0: use swa"),
        (lambda a: weights.ema(a, a, 0.5, step=0), "step must be at least 1"),
        (lambda a: weights.swa(a, a, -1), "count must not be negative, got -1"),
        (lambda a: weights.ties([a], density=0.0), r"density must lie in \(0, 1\], got 0.0"),
        (lambda a: weights.ties([]), "vectors must have at least one entry"),
        (lambda a: weights.dare(KEY, a, rate=1.0), r"rate must lie in \[0, 1\), got 1.0"),
        (lambda a: weights.add(a, a, {"nope": 1.0, "": 1.0}), "'nope' is found in no path"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call({"w": jnp.ones(2)})


# Models


class Normalised(nnx.Module):
    """A network with parameters, running statistics, a counter of calls and a random key."""

    def __init__(self, rngs, width=5):
        self.linear = nnx.Linear(3, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


def make_model(seed, width=5):
    model = models.from_nnx(Normalised(nnx.Rngs(seed), width))
    _, state = model.apply(jax.random.normal(jax.random.key(seed), (4, 3)), key=KEY)
    return model.replace(state=state)


def test_models_of_one_function_are_trees_like_others():
    a, b = make_model(1), make_model(2)
    x = jax.random.normal(KEY, (2, 3))
    for function in (weights.lerp, jax.jit(weights.lerp)):
        middle = function(a, b, 0.25)
        assert isinstance(middle, models.Model)
        chex.assert_trees_all_equal(middle.params, weights.lerp(a.params, b.params, 0.25))
        chex.assert_trees_all_equal(middle.state, weights.lerp(a.state, b.state, 0.25))
        chex.assert_trees_all_equal(function(a, b, 1.0)(x), b(x))
    halves = weights.lerp(a, b, 0.5)
    for tree in (
        weights.mean([a, b]),
        weights.ema(a, b, 0.5),
        weights.swa(a, b, 1),
        weights.slerp(a, b, 0.5),
    ):
        chex.assert_trees_all_equal_shapes_and_dtypes(tree, a)
        assert np.isfinite(tree(x)).all()
    assert_floats_close(weights.mean([a, b]), halves)
    assert_floats_close(weights.add(a, weights.task_vector(a, b)), b)
    assert weights.distance(a, b) > 0
    kernel = weights.lerp(a, b, {r"^params.*kernel": 1.0, "": 0.0})
    chex.assert_trees_all_equal(kernel.state, a.state)
    assert_floats_close(kernel.params["linear"]["kernel"], b.params["linear"]["kernel"])


def test_models_that_do_not_fit_are_named_by_path():
    with pytest.raises(
        ValueError, match=r"params.linear.kernel: shape \(3, 5\) in tree_a, \(3, 4\) in tree_b"
    ):
        weights.lerp(make_model(1), make_model(2, 4), 0.5)
    one, other = (models.from_function(lambda w, x, n=n: n * x @ w, jnp.ones((3, 2))) for n in (1, 2))
    with pytest.raises(ValueError, match=r"apply_fn: trees\[0\] and trees\[1\] are models of different"):
        weights.mean([one, other])
    chex.assert_trees_all_equal(weights.mean([one, other.replace(apply_fn=one.apply_fn)]), one)


# Several devices


def test_sharded_leaves_stay_sharded():
    """Four devices, in a process of its own; the results are those of one device."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        jax.config.update("jax_num_cpu_devices", 4)
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from distill_jax import weights
        mesh = Mesh(np.array(jax.devices()), ("data",))
        rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
        rng = np.random.default_rng(0)
        places = {"w": rows, "b": everywhere}
        host = [{"w": rng.normal(size=(8, 6)).astype("f4"), "b": rng.normal(size=6).astype("f4")}
                for _ in range(2)]
        a, b = jax.device_put(host, [places, places])
        for name, function in {
            "lerp": lambda a, b: weights.lerp(a, b, 0.3), "slerp": lambda a, b: weights.slerp(a, b, 0.3),
            "mean": lambda a, b: weights.mean([a, b]), "ema": lambda a, b: weights.ema(a, b, 0.9),
            "swa": lambda a, b: weights.swa(a, b, 3), "add": weights.add,
            "task_vector": weights.task_vector, "ties": lambda a, b: weights.ties([a, b]),
            "fisher": lambda a, b: weights.fisher_mean([a, b], jax.tree.map(jnp.square, [a, b])),
            "dare": lambda a, b: weights.dare(jax.random.key(0), a, rate=0.5),
            "distance": weights.distance, "cosine": weights.cosine,
        }.items():
            whole = function(*host)
            for wrapped in (function, jax.jit(function)):
                result = wrapped(a, b)
                jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), result, whole)
                if isinstance(result, dict) and name not in ("ties", "dare"):
                    assert result["w"].sharding.is_equivalent_to(rows, 2), (name, result["w"].sharding)
        exact = jax.jit(weights.lerp)(a, b, 1.0)
        assert (exact["w"] == b["w"]).all()
        print("done")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr

"""Scores against their definitions, element by element, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_units_architectures import conv, lstm, numbers, shapes

from distill_jax.compress import units
from distill_jax.compress.units import scores, values
from distill_jax.compress.units._trace import roles
from distill_jax.models import Model, from_function
from distill_jax.weights.structure import path_name


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]["w"] + p["a"]["b"]) @ p["b"]["w"]


def convnet(p, x):
    x = jax.nn.relu(conv(p["a"], x) * p["norm"]["scale"] + p["norm"]["bias"])
    return jnp.tanh(x.reshape(len(x), -1) @ p["w"]) @ p["v"]


CASES = {
    "mlp": (mlp, {"a": {"w": (3, 5), "b": (5,)}, "b": {"w": (5, 2)}}, (4, 3)),
    "convnet": (
        convnet,
        {"a": (3, 3, 2, 4), "norm": {"scale": (4,), "bias": (4,)}, "w": (36, 6), "v": (6, 2)},
        (2, 3, 3, 2),
    ),
    "lstm": (lstm, {"wx": (3, 20), "wh": (5, 20), "b": (20,), "out": (5, 2)}, (4, 2, 3)),
}


@pytest.fixture(params=CASES)
def case(request):
    fn, given, x = CASES[request.param]
    model, x = from_function(fn, shapes(**given)), numbers(np.zeros(x), 1)
    return fn, model, x, units.trace(model, x)


def lost(graph, tree, name, unit):
    """What goes with a unit: each element that `silence` makes zero, once."""
    others = [i for i in range(graph.groups[name].size) if i != unit]
    ones = jax.tree.map(np.ones_like, tree)
    masks = units.silence(graph, ones, {name: others})
    return jax.tree.map(lambda x, m: np.asarray(x)[np.asarray(m) == 0], tree, masks)


def reference(graph, tree, function):
    return {
        name: np.array([
            sum(function(x).sum() for x in jax.tree.leaves(lost(graph, tree, name, unit)))
            for unit in range(group.size)
        ])
        for name, group in graph.groups.items() if group.free
    }  # fmt: skip


def agree(given, expected):
    assert given.keys() == expected.keys()
    for name in given:
        np.testing.assert_allclose(given[name], expected[name], rtol=1e-12, atol=1e-14)


def test_weights_and_gradients(case):
    fn, model, x, graph = case
    params = model.params
    gradients = jax.jit(jax.grad(lambda p: (fn(p, x) ** 2).sum()))(params)
    products = jax.tree.map(lambda g, w: np.asarray(g) * w, gradients, params)
    squares = reference(graph, params, np.square)
    agree(scores.l1(graph, model, normalise="none"), reference(graph, params, np.abs))
    agree(scores.l2(graph, model, normalise="none"), {n: np.sqrt(s) for n, s in squares.items()})
    linear = reference(graph, products, lambda x: x)
    agree(scores.taylor(graph, model, gradients, normalise="none"), {n: np.abs(s) for n, s in linear.items()})
    curvature = jax.tree.map(lambda g: np.asarray(g) ** 2, gradients)
    agree(
        scores.fisher(graph, model, curvature, normalise="none"),
        {n: s / 2 for n, s in reference(graph, products, np.square).items()},
    )
    for name, given in scores.lamp(graph, model).items():
        energy = squares[name]
        agree({name: given}, {name: np.array([e / energy[energy >= e].sum() for e in energy])})


def test_the_first_order_score_is_the_derivative_of_silencing():
    fn, given, x = CASES["mlp"]
    params, x = shapes(**given), numbers(np.zeros(x), 1)
    graph = units.trace(from_function(fn, params), x)

    @jax.jit
    def loss(p):
        return (fn(p, x) ** 2).sum()

    gradients = jax.jit(jax.grad(loss))(params)
    h = 1e-6
    for unit in range(5):
        silent = units.silence(graph, params, {"a.w": [i for i in range(5) if i != unit]})
        less = jax.tree.map(lambda w, s: w + h * (s - w), params, silent)
        change = abs(loss(less) - loss(params)) / h
        score = scores.taylor(graph, params, gradients, normalise="none")["a.w"][unit]
        np.testing.assert_allclose(score, change, rtol=1e-4)


def test_squared_gradients_are_of_single_examples():
    x = numbers(np.zeros((7, 3)))
    model = from_function(lambda p, x: jnp.tanh(x @ p["a"]), shapes(a=(3, 2)))

    def loss(model, x):
        return model(x).sum()

    given = scores.squared_gradients(loss, model, x, chunk=3)
    each = jax.vmap(jax.grad(loss), (None, 0))(model, x).params
    np.testing.assert_allclose(given["a"], (each["a"] ** 2).mean(0), rtol=1e-12)


def test_activations_are_what_is_handed_on(case):
    fn, model, x, graph = case
    params = model.params
    given = units.activations(graph, model, x)
    if fn is mlp:
        h = np.maximum(x @ params["a"]["w"] + params["a"]["b"], 0)
        np.testing.assert_allclose(given["a.w"], h, rtol=1e-12)
        agree(scores.apoz(graph, model, x), {"a.w": (h > 0).mean(0)})
        mean = scores.mean_activation(graph, model, x)["a.w"]
        np.testing.assert_allclose(mean, h.mean(0) / h.mean(0).mean(), rtol=1e-12)
    elif fn is convnet:
        h = jax.nn.relu(conv(params["a"], x) * params["norm"]["scale"] + params["norm"]["bias"])
        flat = h.reshape(2, 9, 4).reshape(18, 4)
        np.testing.assert_allclose(np.sort(given["a"], 0), np.sort(flat, 0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(given["w"], np.tanh(h.reshape(2, -1) @ params["w"]), rtol=1e-6, atol=1e-9)
    else:  # after the loop the mean over time is handed on
        assert given["wx"].shape == (2, 5)


def test_fpgm_and_vectors(case):
    _, model, _, graph = case
    params, x = model.params, values.vectors(graph, model)
    for name, given in scores.fpgm(graph, model, normalise="none").items():
        expected = np.linalg.norm(x[name][:, None] - x[name], axis=-1).sum(1)
        np.testing.assert_allclose(given, expected, rtol=1e-6)
        group = graph.groups[name]
        weights = sum(np.size(leaf) for leaf in jax.tree.leaves(lost(graph, params, name, 0)))
        slices = [(s.path, s.axis) for s in group.slices]
        twice = sum((path, 0) in slices and (path, 1) in slices for path, _ in set(slices))
        assert x[name].shape[1] == weights + (4 if twice else 0)  # wh's diagonal, a gate each


def test_the_scale_of_batch_norm_counts_only_where_there_is_one():
    _, given, x = CASES["convnet"]
    model = from_function(convnet, shapes(**given))
    graph = units.trace(model, numbers(np.zeros(x)))
    agree(scores.batch_norm_scale(graph, model), {"a": np.abs(model.params["norm"]["scale"])})
    with pytest.raises(ValueError, match="no vector among the parameters that has units is called"):
        scores.batch_norm_scale(graph, model, names=["weight"])


def test_normalisation():
    x = {"a": np.array([1.0, 3.0]), "b": np.array([0.0, 0.0])}
    for normalise, expected in [
        ("mean", [0.5, 1.5]), ("max", [1 / 3, 1]), ("norm", [1 / 10**0.5, 3 / 10**0.5]),
        ("none", [1, 3]),
    ]:  # fmt: skip
        found = scores.normalised(x, normalise)
        np.testing.assert_allclose(found["a"], expected)
        np.testing.assert_array_equal(found["b"], 0)
    with pytest.raises(ValueError, match="normalise must be one of mean, max, norm, none, got 'l2'"):
        scores.normalised(x, "l2")
    with pytest.raises(ValueError, match="not finite"):
        scores.normalised({"a": np.array([np.nan, 1])}, "mean")


def test_random_scores_depend_on_the_key_alone(case):
    *_, graph = case
    a, b, c = (scores.random(jax.random.key(seed), graph) for seed in (0, 0, 1))
    agree(a, b)
    for name in a:
        assert a[name].shape == (graph.groups[name].size,)
        assert (a[name] != c[name]).all()


def test_the_state_does_not_count():
    def apply_fn(params, state, x, *, key=None):
        return jnp.tanh(x @ params["a"] / state["var"]) @ params["b"], state

    model = Model(apply_fn, shapes(a=(3, 4), b=(4, 2)), {"var": np.ones(4)})
    graph = units.trace(model, np.zeros((1, 3)))
    given = scores.l1(graph, model, normalise="none")
    agree(given, scores.l1(graph, model.params, normalise="none"))
    expected = np.abs(model.params["a"]).sum(0) + np.abs(model.params["b"]).sum(1)
    agree(given, {"a": expected})


def test_what_is_missing_or_of_another_shape_is_refused(case):
    _, model, x, graph = case
    params = model.params
    with pytest.raises(ValueError, match="gradients: expected the model that was traced, or a tree"):
        scores.taylor(graph, model, {k: params[k] for k in list(params)[:1]})
    with pytest.raises(ValueError, match=r"gradients: .* has shape .* where .* was traced"):
        scores.taylor(graph, model, jax.tree.map(lambda x: x[..., None], params))
    with pytest.raises(ValueError, match="model: expected the model that was traced"):
        scores.l1(graph, {"other": np.zeros(3)})
    with pytest.raises(
        ValueError, match=r"x: a batch of the shapes .* was traced: give batches of that size"
    ):
        units.activations(graph, model, x[:1])
    with pytest.raises(ValueError, match="must be what was traced"):
        units.activations(graph, model.replace(params={}), x)


# --- what slices are for -------------------------------------------------------------------------


def role_of(fn, name, x=(2, 3), **given):
    model = from_function(fn, shapes(**given))
    role = roles.roles(units.trace(model, numbers(np.zeros(x))))[name]
    return {s[:2] for s in role.incoming}, {s[:2] for s in role.outgoing}, role.reason


def test_incoming_and_outgoing():
    fn, given, x = CASES["lstm"]
    into, out, reason = role_of(fn, "wx", x, **given)
    assert (into, out, reason) == (
        {("wx", 1), ("wh", 1), ("b", 0)}, {("wh", 0), ("out", 0)}, "",
    )  # fmt: skip
    fn, given, x = CASES["convnet"]
    into, out, reason = role_of(fn, "a", x, **given)
    assert (into, out, reason) == (
        {("a", 3), ("norm.scale", 0), ("norm.bias", 0)}, {("w", 0)}, "",
    )  # fmt: skip

    def scanned(p, x):
        body = lambda c, w: (c + jnp.tanh(c @ w["u"]) @ w["v"].T, None)  # noqa: E731
        return jax.lax.scan(body, x, p)[0]

    into, out, reason = role_of(scanned, "u", u=(2, 3, 4), v=(2, 3, 4))
    assert (into, out, reason) == ({("u", 2)}, {("v", 2)}, "")


def test_why_units_cannot_be_merged():
    def reason(fn, name="a", **more):
        return role_of(lambda p, x: fn(x @ p["a"], p), name, a=(3, 4), **more)[2]

    b = {"b": (4, 2)}
    assert reason(lambda h, p: jax.nn.softmax(h) @ p["b"], **b) == "reduce_max over it"
    assert "two values" in reason(lambda h, p: (h @ h.T) @ h @ p["b"], **b)
    assert "two parameters" in reason(lambda h, p: jnp.tanh(h) @ p["b"] + (p["b"].T @ p["b"])[0], **b)
    assert "incoming and outgoing" in reason(lambda h, p: (h + p["b"][:, 0]) @ p["b"], **b)
    assert "two values" in reason(lambda h, p: h @ (p["b"] * 2), **b)
    # The same is done to all units, or it is not
    halves = lambda h, p: jnp.concatenate([jnp.tanh(h[:, :2]), h[:, 2:]], 1) @ p["b"]  # noqa: E731
    assert "cuts some of its units" in reason(halves, **b) or "same order" in reason(halves, **b)
    turned = lambda h, p: h[:, ::-1] @ p["b"]  # noqa: E731
    assert "same order" in reason(turned, **b)

    def diagonal(h, p):
        return jax.lax.slice(jnp.concatenate([h] * 4, 1), (0, 0), (2, 16), (1, 5)) @ p["b"]

    assert "cuts some of its units" in reason(diagonal, **b)
    assert reason(lambda h, p: jax.nn.silu(h) @ p["b"], **b) == ""
    gated = lambda h, p: (lambda g, u: g * u)(*jnp.split(h @ p["g"], 2, 1)) @ p["b"]  # noqa: E731
    assert reason(gated, "g", g=(4, 8), **b) == ""


def loss_of_example(model, example):
    x, label = example
    return -jax.nn.log_softmax(model(x[None])[0])[label]


def examples_of(shape, count):
    return numbers(np.zeros((count, *shape)), 5), jnp.arange(count) % 2


@pytest.mark.parametrize("order", [1, 2])
def test_gates_are_derivatives_of_single_examples(case, order):
    fn, model, x, graph = case
    examples = examples_of(x.shape[1:], 5)
    given = scores.gates(graph, model, loss_of_example, examples, order=order, chunk=2, normalise="none")
    outgoing = {mlp: {"a.w": ["b.w"]}, convnet: {"a": ["w"], "w": ["v"]}, lstm: {"wx": ["wh", "out"]}}[fn]
    assert given.keys() == outgoing.keys()

    @jax.jit
    def losses_at(params):
        return jax.vmap(lambda e: loss_of_example(model.replace(params=params), e))(examples)

    def gated(name, unit, gate):
        def edit(path, leaf):
            if path_name(path) not in outgoing[name]:
                return leaf
            here = np.arange(len(leaf)) % graph.groups[name].size == unit
            return np.where(here[:, None], gate, 1) * leaf

        return losses_at(jax.tree_util.tree_map_with_path(edit, model.params))

    for name, found in given.items():
        for unit in range(graph.groups[name].size):
            slopes = (gated(name, unit, 1 + 1e-5) - gated(name, unit, 1 - 1e-5)) / 2e-5
            expected = np.abs(slopes).mean() if order == 1 else (slopes**2).mean() / 2
            np.testing.assert_allclose(found[unit], expected, rtol=1e-6, atol=1e-12)


def test_kronecker_factors_against_the_full_product():
    """½ vec(W_u)ᵀ (A ⊗ G) vec(W_u), with the factors written out, for dense layers and a convolution."""
    model = from_function(convnet, shapes(**CASES["convnet"][1]))
    x, labels = examples_of((3, 3, 2), 6)
    graph = units.trace(model, x[:2])
    given = scores.kronecker(graph, model, loss_of_example, (x, labels), chunk=4)
    p = model.params

    def loss(logits):
        return -jax.nn.log_softmax(logits, -1)[jnp.arange(6), labels].sum()

    @jax.jit
    def parts(x):
        hidden = jax.nn.relu(conv(p["a"], x) * p["norm"]["scale"] + p["norm"]["bias"]).reshape(6, -1)
        outputs = jnp.tanh(hidden @ p["w"])
        g_w = jax.grad(lambda made: loss(jnp.tanh(made) @ p["v"]))(hidden @ p["w"])
        return hidden, outputs, g_w, jax.grad(loss)(outputs @ p["v"])

    hidden, outputs, g_w, g_v = map(np.asarray, parts(x))
    for name, inputs, slopes, kernel in [("a", hidden, g_w, p["w"]), ("w", outputs, g_v, p["v"])]:
        size = graph.groups[name].size
        curvature = np.kron(inputs.T @ inputs / 6, slopes.T @ slopes / 6)
        for unit in range(size):
            rows = np.arange(len(kernel)) % size == unit
            vector = np.where(rows[:, None], kernel, 0).ravel()
            np.testing.assert_allclose(given[name][unit], vector @ curvature @ vector / 2, rtol=1e-9)


def test_kronecker_factors_of_convolutions_sum_over_places():
    """With one channel after, and the same input everywhere, all is known."""

    def fn(p, x):
        return conv(p["b"], conv(p["a"], x)).sum((1, 2))

    model = from_function(
        fn, {"a": numbers(np.zeros((1, 1, 1, 3)), 1), "b": numbers(np.zeros((1, 1, 3, 1)), 2)}
    )
    x = jnp.full((2, 2, 2, 1), 3.0)
    graph = units.trace(model, x)
    given = scores.kronecker(graph, model, lambda model, x: model(x[None])[0, 0], x)["a"]
    a, b = (np.ravel(model.params[name]) for name in "ab")
    np.testing.assert_allclose(given, (3 * a) ** 2 * 4 * b**2 / 2, rtol=1e-12)


def test_heads_are_scored_as_they_are_used():
    """The kernel stands on the left of its product, and each head has several rows."""

    def fn(p, x):
        heads = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, p["a"]))
        return jnp.einsum("hdo,bhd->bo", p["b"], heads)

    model = from_function(fn, shapes(a=(3, 4, 2), b=(4, 2, 2)))
    x, labels = examples_of((3,), 1)
    graph = units.trace(model, x)
    whole = scores.kronecker(graph, model, loss_of_example, (x, labels))
    gates = scores.gates(graph, model, loss_of_example, (x, labels), order=2, normalise="none")
    assert {graph.groups[name].size for name in whole} == {4, 2}
    agree(whole, gates)  # of a single example, A ⊗ G is the Fisher matrix itself


def test_scores_of_a_loss_refuse():
    fn, given, shape = CASES["mlp"]
    model, x = from_function(fn, shapes(**given)), numbers(np.zeros(shape), 1)
    graph = units.trace(model, x)
    examples = (x, jnp.zeros(4, int))
    with pytest.raises(ValueError, match="order must be 1 or 2, got 3"):
        scores.gates(graph, model, loss_of_example, examples, order=3)
    with pytest.raises(ValueError, match="chunk must be"):
        scores.kronecker(graph, model, loss_of_example, examples, chunk=0)
    with pytest.raises(ValueError, match="not finite"):
        scores.gates(graph, model, loss_of_example, (np.full_like(x, np.nan), examples[1]))


def test_units_used_in_a_loop_have_no_kronecker_factors():
    fn, given, shape = CASES["lstm"]
    model = from_function(fn, shapes(**given))
    x, labels = examples_of(shape[1:], 3)
    assert scores.kronecker(units.trace(model, x), model, loss_of_example, (x, labels)) == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda f, e: jax.vmap(f)(jax.tree.map(lambda a: jnp.stack([a, a]), e)).mean(),
        lambda f, e: jax.lax.map(f, jax.tree.map(lambda a: jnp.stack([a, a]), e)).mean(),
        lambda f, e: jax.lax.cond(e[0].sum() > 0, f, f, e),
    ],
    ids=["vmap", "map", "cond"],
)
def test_curvature_of_calls_in_loops_is_refused(call):
    fn, given, shape = CASES["mlp"]
    model, x = from_function(fn, shapes(**given)), numbers(np.zeros(shape), 1)
    with pytest.raises(ValueError, match="outside of vmap, loops and conditions"):
        scores.kronecker(
            units.trace(model, x),
            model,
            lambda m, e: call(lambda e: loss_of_example(m, e), e),
            (x, jnp.zeros(4, int)),
        )

"""A pruned model is a model: any batch size, training mode, its own derivatives, whatever library it came from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from distill_jax import models
from distill_jax._jaxpr import primitives
from distill_jax.compress import units
from distill_jax.models import Model, from_function


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def traced(fn, x, **shapes):
    model = from_function(fn, {k: numbers(*v, seed=i) for i, (k, v) in enumerate(shapes.items())})
    return model, units.trace(model, x)


def half(graph):
    """Every second unit of each group that is removed exactly."""
    return {n: np.arange(0, g.size, 2) for n, g in graph.groups.items() if g.free and g.exact_shrunk}


def close(a, b, tolerance=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


def evaluates_as_silenced(graph, model, kept, *inputs):
    small, silent = jax.tree.map(
        jnp.asarray, (units.keep(graph, model, kept), units.silence(graph, model, kept))
    )
    run = jax.jit(lambda *networks, x: [network(x) for network in networks])
    for x in inputs:
        close(*run(small, silent, x=x))


def trains_as_silenced(graph, model, kept, x, y, steps=20, tolerance=1e-6):
    """Trains both in training mode; each step's gradient and state agree on the slices of the kept units."""
    # Code that runs by itself would draw masks of its own
    networks = units.shrink(graph, model, kept), units.silence(graph, model, kept)

    def loss(params, network, key):
        outputs, state = network.replace(params=params).apply(x, key=key)
        gaps = jax.tree.map(lambda a, b: ((a - b) ** 2).mean(), outputs, y)
        return sum(jax.tree.leaves(gaps)), state

    def step(networks, key):
        found = [jax.grad(loss, has_aux=True)(network.params, network, key) for network in networks]
        (small, state), (large, whole) = found
        kept_of_it = units.keep(
            graph, {"params": large, **({"state": whole} if jax.tree.leaves(whole) else {})}, kept
        )
        gaps = jax.tree.map(
            lambda a, b: jnp.abs(a - b).max() / (jnp.abs(b).max() + 1e-6),
            (small, state), (kept_of_it["params"], kept_of_it.get("state", whole)),
        )  # fmt: skip
        changes = small, units.silence(graph, large, kept)
        after = [
            network.replace(params=jax.tree.map(lambda p, g: p - 0.05 * g, network.params, change), state=new)
            for network, change, (_, new) in zip(networks, changes, found, strict=True)
        ]
        size = jnp.array([jnp.abs(g).max() for g in jax.tree.leaves(small)]).max()
        return tuple(after), (jnp.array(jax.tree.leaves(gaps)).max(), size)

    keys = jax.random.split(jax.random.key(0), steps)
    _, (gaps, sizes) = jax.jit(lambda networks: jax.lax.scan(step, networks, keys))(
        jax.tree.map(jnp.asarray, networks)
    )
    assert gaps.max() < tolerance, gaps
    assert sizes.min() > 1e-4


class CNN(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        for width, stride in ((6, 1), (4, 2)):
            x = linen.Conv(width, (3, 3), strides=stride)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
            x = linen.Dropout(0.3, deterministic=not train)(x)
        return linen.Dense(3)(x.reshape(x.shape[0], -1))


class Transformer(linen.Module):
    @linen.compact
    def __call__(self, tokens, train=False):
        x = linen.Embed(11, 8)(tokens)
        attention = linen.MultiHeadDotProductAttention(
            num_heads=4, qkv_features=12, dropout_rate=0.2, deterministic=not train
        )
        x = x + attention(linen.LayerNorm()(x))
        h = linen.Dropout(0.2, deterministic=not train)(linen.gelu(linen.Dense(10)(linen.LayerNorm()(x))))
        return linen.Dense(3)((x + linen.Dense(8)(h)).mean(1))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


NETWORKS = {
    "cnn": (CNN(), numbers(9, 6, 6, 2)),
    "transformer": (Transformer(), np.random.default_rng(0).integers(0, 11, (9, 5))),
}


def linen_model(name):
    module, x = NETWORKS[name]
    model = models.from_linen(module, jax.random.key(0), x[:1])
    model = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
    graph = units.trace(model, x[:2])
    return model, graph, half(graph), x


@pytest.mark.parametrize("name", NETWORKS)
def test_a_pruned_linen_model_evaluates_and_trains_at_any_batch_size(name, double):
    model, graph, kept, x = linen_model(name)
    assert len(kept) >= 2, str(graph)
    small = units.keep(graph, model, kept)
    assert small.apply_fn == units.shrink(graph, model, kept).apply_fn
    evaluates_as_silenced(graph, model, kept, x[:1], x[:2], x[:5])
    trains_as_silenced(graph, model, kept, x[:7], numbers(7, 3))


def test_pruned_models_run_under_vmap_and_from_any_dtype():
    module, x = NETWORKS["cnn"]
    model = models.from_linen(module, jax.random.key(0), x[:1].astype("f4"))
    graph = units.trace(model, x[:2].astype("f4"))
    small = units.keep(graph, model, half(graph))
    assert small.apply_fn == units.keep(units.trace(model, x[:1].astype("f4")), model, half(graph)).apply_fn
    pair = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), small)
    keys = jax.random.split(jax.random.key(1), 2)

    @jax.jit
    def both(pair, x):
        mapped = jax.vmap(lambda network, key: network.apply(x, key=key))(pair, keys)
        second = jax.tree.map(lambda leaf: leaf[1], pair)
        return jax.tree.map(lambda leaf: leaf[1], mapped), second.apply(x, key=keys[1])

    close(*both(pair, x[:3].astype("f4")), 1e-4)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    assert narrow(x[:3].astype(jnp.bfloat16)).dtype == jnp.bfloat16


@jax.custom_vjp
def gate(x, n, w):
    return jnp.cos(x * n) * w, n


def gate_forward(x, n, w):
    return gate(x, n, w), (x, w)


def gate_backward(kept, change):  # not the derivative of the gate
    x, w = kept
    return 3 * jnp.where(jnp.abs(x) < 1, change[0] * w, 0), None, (change[0] * x).sum(0)


gate.defvjp(gate_forward, gate_backward)


@jax.custom_jvp
def hinge(x, n):
    return jnp.maximum(x, 0) * n


hinge.defjvp(lambda given, changes: (hinge(*given), changes[0] * jax.nn.sigmoid(given[0])))


def test_derivatives_that_a_network_defines_are_kept():
    def fn(p, x):
        h, _ = gate(x @ p["a"], 2, p["w"])
        h = jax.checkpoint(lambda h, c: jnp.sin(hinge(h @ c, 2)))(hinge(h, 3), p["c"])
        h, _ = jax.lax.scan(lambda h, s: (jnp.tanh(gate(h @ s, 1, p["v"])[0]), None), h, p["s"])
        return jax.nn.log_softmax(h @ p["b"])

    x = numbers(5, 3, seed=9)
    model, graph = traced(fn, x, a=(3, 4), w=(4,), c=(4, 5), v=(5,), s=(2, 5, 5), b=(5, 2))
    kept = {"a": [0, 3], "c": [0, 1, 4]}
    small, silent = units.shrink(graph, model, kept), units.silence(graph, model, kept)

    @jax.jit
    def gradients(*networks):
        return [jax.grad(lambda network: (network(x) ** 2).sum())(network).params for network in networks]

    given, whole = gradients(small, silent)
    close(given, units.keep(graph, whole, kept), 1e-4)
    sizes = {name: np.abs(leaf).max() for name, leaf in given.items()}
    assert min(sizes.values()) > 1e-2, sizes
    assert {"custom_vjp_call", "custom_jvp_call", "remat2"} <= primitives(jax.make_jaxpr(small)(x))


def test_a_derivative_that_cannot_be_adapted_is_refused():
    @jax.custom_vjp
    def double(x):
        return 2 * x

    order = np.array([1, 0, 2, 3])
    double.defvjp(lambda x: (2 * x, None), lambda _, change: (jnp.sort(change, -1) * order,))
    x = numbers(5, 3)
    model, graph = traced(lambda p, x: double(x @ p["a"]) @ p["b"], x, a=(3, 4), b=(4, 2))
    small = units.shrink(graph, model, {"a": [0, 3]})
    close(small(x), units.silence(graph, model, {"a": [0, 3]})(x), 1e-5)
    with pytest.raises(
        ValueError, match="the derivative that double defines cannot be computed without the units"
    ):
        jax.grad(lambda network: small.replace(params=network)(x).sum())(small.params)


def test_a_network_keeps_its_own_function_where_that_computes_the_same():
    x = numbers(5, 3)
    kept = {"a": [0, 3]}
    model, graph = traced(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], x, a=(3, 4), b=(4, 2))
    assert units.keep(graph, model, kept).apply_fn is model.apply_fn
    model, graph = traced(lambda p, x: (x @ p["a"]).mean(-1), x, a=(3, 4))
    assert units.keep(graph, model, kept).apply_fn is model.apply_fn  # the mean of what is left, both ways
    model, graph = traced(lambda p, x: x @ p["a"] @ p["b"] / p["a"].shape[1], x, a=(3, 4), b=(4, 2))
    assert units.keep(graph, model, kept).apply_fn is not model.apply_fn
    assert units.verify(graph, model, kept, x) < 1e-6
    other = from_function(lambda p, x: 2 * (x @ p["a"] @ p["b"]) / p["a"].shape[1], model.params)
    close(units.keep(graph, other, kept)(x), units.silence(graph, other, kept)(x), 1e-5)
    whole = {"model": model, "around": Model(model.apply_fn, {"student": model.params}, {})}
    cut = units.keep(graph, whole, kept)
    assert cut["model"].apply_fn is not model.apply_fn
    assert cut["around"].apply_fn is model.apply_fn


def test_a_model_is_pruned_again_and_again():
    def fn(p, x):
        a, b = x @ p["a"], x @ p["b"]
        return jnp.concatenate([a, jnp.tanh(b)], -1) @ p["c"] / p["a"].shape[1]

    x = numbers(5, 3)
    model, graph = traced(fn, x, a=(3, 6), b=(3, 4), c=(10, 2))
    once = units.keep(graph, model, {"a": [0, 2, 3, 5], "b": [1, 2]})
    again = units.trace(once, x)
    assert {name: group.size for name, group in again.groups.items() if group.free} == {"a": 4, "b": 2}
    twice = units.keep(again, once, {"a": [1, 3]})
    at_once = {"a": [2, 5], "b": [1, 2]}
    close(twice(x), units.silence(graph, model, at_once)(x), 1e-5)
    assert twice.apply_fn == units.keep(graph, model, at_once).apply_fn


def test_ways_to_call_a_pruned_model_that_cannot_work_are_refused():
    def apply_fn(params, state, x, *, key=None):
        h = x @ params["a"]
        if key is not None and x.shape[0] == 1:
            return jnp.sort(h, -1) @ params["b"], state
        if key is not None:
            state = {**state, "seen": h.sum(0)}
        return h @ params["b"], state

    x = numbers(5, 3)
    model = Model(apply_fn, {"a": numbers(3, 4), "b": numbers(4, 2)}, {"mean": np.zeros(4)})
    graph = units.trace(model, x)
    kept = {"a": [0, 3]}
    small = units.shrink(graph, model, kept)
    with pytest.raises(ValueError, match=r"^key: in training mode the network turns its state .* into "):
        small.apply(x, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"^x: in training mode, on inputs of shapes \[\(1, 3\)\].*ordered by sort"
    ):
        small.apply(x[:1], key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"must have the shapes that keep\(graph, model, kept\) makes"):
        small.replace(params=model.params)(x)


class Twin(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(3, 6, rngs=rngs), nnx.BatchNorm(6, rngs=rngs)
        self.last = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def test_the_new_statistics_are_those_of_the_kept_units():
    model = models.from_nnx(Twin(nnx.Rngs(0)))
    x = numbers(7, 3).astype("f4")
    graph = units.trace(model, x[:1])
    kept = {"first.kernel": [0, 2, 5]}
    own, adapted = units.keep(graph, model, kept), units.shrink(graph, model, kept)
    assert own.apply_fn == model.apply_fn
    run = jax.jit(lambda *networks: [network.apply(x, key=jax.random.key(0)) for network in networks])
    given, wanted = run(adapted, own)
    close(given, wanted, 1e-5)
    assert given[1]["norm"]["mean"].shape == (3,)
    assert np.abs(given[1]["norm"]["mean"]).max() > 1e-4


def test_units_that_count_in_training_or_at_other_shapes_are_refused():
    def block(p, x, key=None):
        h = jax.nn.relu(x @ p["a"])
        assert h.shape[-1] == 4
        if key is not None:  # DropBlock's scale
            mask = jax.random.bernoulli(key, 0.9, h.shape).astype(h.dtype)
            h = h * mask * (mask.size / mask.sum())
        return h @ p["b"]

    x, kept = numbers(5, 3), {"a": [0, 3]}
    model, graph = traced(block, x, a=(3, 4), b=(4, 2))
    small = units.keep(graph, model, kept)
    close(small(x), units.silence(graph, model, kept)(x), 1e-5)
    with pytest.raises(
        ValueError, match=r"^x: in training mode, .* units that are gone would still count .*sum"
    ):
        small.apply(x, key=jax.random.key(0))

    def fourth(p, x):
        h = jnp.tanh(x @ p["a"])
        assert h.shape[-1] == 4
        return h.sum((1, 2))[:, None] / 4.0 * p["b"]

    x = numbers(2, 5, 3)
    model, graph = traced(fourth, x, a=(3, 4), b=(2,))
    small, silent = units.keep(graph, model, kept), units.silence(graph, model, kept)
    close(small(x[:, :2]), silent(x[:, :2]), 1e-5)
    with pytest.raises(ValueError, match=r"^x: in evaluation, .* would still count .*\(a mean over it\)"):
        small(x[:, :1])
    again = units.trace(small, x)
    twice = units.keep(again, small, {"a": [1]})
    close(twice(x), units.silence(graph, model, {"a": [3]})(x), 1e-5)
    with pytest.raises(ValueError, match="would still count"):
        twice(x[:, :1])


def test_a_function_that_computes_something_else_in_training_is_not_kept():
    x, kept, key = numbers(5, 3), {"a": [0, 3]}, jax.random.key(0)

    def scaled(p, x, key=None):
        h = jnp.tanh(x @ p["a"])
        return (h if key is None else h / h.shape[1]) @ p["b"]

    model, graph = traced(scaled, x, a=(3, 4), b=(4, 2))
    assert graph.groups["a"].removable == "exactly"
    small = units.keep(graph, model, kept)
    close(small.apply(x, key=key)[0], units.silence(graph, model, kept).apply(x, key=key)[0], 1e-5)

    @jax.custom_vjp
    def identity(h):
        return h

    identity.defvjp(lambda h: (h, None), lambda _, change: (change / change.shape[1],))
    model, graph = traced(lambda p, x: identity(x @ p["a"]) @ p["b"], x, a=(3, 4), b=(4, 2))
    networks = units.keep(graph, model, kept), units.silence(graph, model, kept)
    found, wanted = (jax.grad(lambda network: network(x).sum())(network).params for network in networks)
    close(found, units.keep(graph, wanted, kept), 1e-5)

    def dropped(p, x, key=None):
        h = x @ p["a"]
        return (h if key is None else jnp.where(jax.random.bernoulli(key, 0.5, h.shape), 2 * h, 0)) @ p["b"]

    model, graph = traced(dropped, x, a=(3, 4), b=(4, 2))
    assert units.keep(graph, model, kept).apply_fn is model.apply_fn  # it draws masks of its own size


def test_what_only_training_uses_gets_smaller_too(double):
    """A running sum, of which evaluation uses the average, a value that is written alone, and noise."""

    def apply_fn(params, state, x, *, key=None):
        h = x @ params["a"]
        assert h.shape[-1] == 6
        if key is None:
            return jnp.tanh(h - state["average"]) @ params["b"], state
        h = h + jnp.exp(x @ params["noise"]) * jax.random.normal(key, h.shape)
        total, steps = 0.9 * state["sum"] + 0.1 * h.mean(0), state["steps"] + 1
        new = {"sum": total, "average": total / (1 - 0.9**steps), "last": h[-1], "steps": steps}
        return jnp.tanh(h - h.mean(0)) @ params["b"], new

    params = {"a": numbers(3, 6), "noise": numbers(3, 6, seed=1), "b": numbers(6, 2, seed=2)}
    state = {name: numbers(6, seed=3) for name in ("sum", "average", "last")} | {"steps": np.float64(2)}
    model, x = Model(apply_fn, params, state), numbers(5, 3, seed=4)
    graph = units.trace(model, x[:2])
    kept = {"a": [0, 2, 3]}
    assert {s.path for s in graph.groups["a"].slices} == {"a", "noise", "b", "sum", "average", "last"}
    assert units.verify(graph, model, kept, x, key=jax.random.key(0)) < 1e-12
    assert units.verify(graph, model, kept, x) < 1e-12
    # Without a training mode there is nothing to read in it
    evaluation = model.replace(apply_fn=lambda params, state, x: apply_fn(params, state, x))
    assert {s.path for s in units.trace(evaluation, x).groups["a"].slices} == {"a", "b", "average"}


def test_a_function_that_cannot_be_adapted_is_refused():
    x, kept = numbers(5, 3), {"a": [0, 3]}
    model, graph = traced(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], x, a=(3, 4), b=(4, 2))

    def ordered(p, x):
        h = jnp.tanh(x @ p["a"])
        return h @ p["b"] / h.shape[1], jnp.sort(h, -1)[:, -1]

    small = units.keep(graph, from_function(ordered, model.params), kept)
    with pytest.raises(
        ValueError, match=r"^x: in evaluation, .* the only ones that must stay \(ordered by sort\)"
    ):
        small(x)


def test_a_program_is_not_used_again_with_other_sizes_of_named_axes():
    def centred(p, x, key=None):
        h = jnp.tanh(x @ p["a"])
        assert h.shape[-1] == 4
        return (h if key is None else h - jax.lax.pmean(h.mean(0), "batch")) @ p["b"]

    x, kept = numbers(8, 2, 3), {"a": [0, 3]}
    model, graph = traced(centred, x[0], a=(3, 4), b=(4, 2))
    networks = units.keep(graph, model, kept), units.silence(graph, model, kept)
    for n in (2, 8):
        small, silent = (
            jax.vmap(lambda x, f=network: f.apply(x, key=jax.random.key(0))[0], axis_name="batch")(x[:n])
            for network in networks
        )
        close(small, silent, 1e-5)
    fn = networks[0].apply_fn
    networks[0](x[0])
    with jax.set_mesh(jax.make_mesh((1,), ("devices",))):
        networks[0](x[0])
    assert len(fn.programs) == 1

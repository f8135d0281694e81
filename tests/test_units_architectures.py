"""Removing units equals silencing them, in float64, for networks of many kinds."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_jax import models
from distill_jax.compress import units
from distill_jax.models import from_function, mobilenet, shufflenet


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def numbers(tree, seed=0):
    """Arrays of these shapes: normal, but for what must be positive."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        array = rng.normal(size=np.shape(leaf))
        return np.abs(array) if jax.tree_util.keystr(path).endswith("var']") else array

    return jax.tree_util.tree_map_with_path(one, tree)


def shapes(**given):
    return numbers({k: np.zeros(v) if isinstance(v, tuple) else shapes(**v) for k, v in given.items()})


def compiled(fn, *args):
    """Runs a function or a model without much care for its speed: compilation is what takes the time."""
    if isinstance(fn, models.Model):
        fn, args = call, (fn, *args)
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(fn).lower(*args).compile(compiler_options=options)(*args)


def call(model, x):
    return model(x)


def random_units(graph, rng, *, only=lambda group: group.free and group.exact):
    chosen = {}
    for name, group in graph.groups.items():
        if only(group):
            count = rng.integers(1, group.size + 1)
            chosen[name] = np.sort(rng.choice(group.size, count, replace=False))
    return chosen


def pruned_equals_silenced(model, x, *, runs=1, least=1, rerun=False):
    """Returns the graph; ``rerun``: the model itself runs with the smaller arrays, and agrees."""
    graph = units.trace(model, x)
    assert sum(group.exact_shrunk for group in graph.groups.values()) >= least, str(graph)
    assert all(note.endswith("0 axes") for note in graph.notes)  # Linen's cells seed their carry
    rng = np.random.default_rng(0)
    for _ in range(runs):
        kept = random_units(graph, rng)
        if not rerun:
            kept |= random_units(graph, rng, only=lambda group: group.exact_shrunk and not group.exact)
        expected = compiled(units.silence(graph, model, kept), x)
        networks = [units.shrink(graph, model, kept)]
        if rerun:
            networks.append(units.keep(graph, model, kept))
            assert networks[1].apply_fn is model.apply_fn
        for network in networks:
            for a, b in zip(jax.tree.leaves(compiled(network, x)), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9 * np.abs(b).max())
    return graph


def dense(p, x):
    return x @ p["w"] + p["b"]


def conv(p, x, *, stride=1, groups=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, p, (stride, stride), "SAME", dimension_numbers=layout, feature_group_count=groups
    )


def test_mlp():
    p = shapes(a={"w": (5, 8), "b": (8,)}, b={"w": (8, 6), "b": (6,)}, c={"w": (6, 3), "b": (3,)})

    def fn(p, x):
        return dense(p["c"], jax.nn.sigmoid(dense(p["b"], jax.nn.relu(dense(p["a"], x)))))

    graph = pruned_equals_silenced(from_function(fn, p), numbers(np.zeros((4, 5))), runs=3, rerun=True)
    free = {name: group.size for name, group in graph.groups.items() if group.free}
    assert free == {"a.w": 8, "b.w": 6}


def test_flatten_grouped_dilated_and_transposed_convolutions():
    p = shapes(a=(3, 3, 2, 6), b=(3, 3, 2, 9), c=(3, 3, 9, 5), d=(2, 2, 5, 4), w=(64, 7), v=(7, 3))

    def fn(p, x):
        x = jnp.tanh(conv(p["b"], jax.nn.relu(conv(p["a"], x)), groups=3))
        x = jax.lax.conv_general_dilated(
            x, p["c"], (2, 2), "SAME", rhs_dilation=(2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.conv_transpose(x, p["d"], (2, 2), "SAME")
        return jax.nn.gelu(x.reshape(len(x), -1) @ p["w"]) @ p["v"]

    graph = pruned_equals_silenced(from_function(fn, p), numbers(np.zeros((2, 4, 4, 2))), runs=2)
    # Groups of channels, and places in a group: before and after the grouped convolution
    assert [graph.groups[n].size for n in ("a", "a#1", "b", "c", "d", "w")] == [3, 2, 3, 5, 4, 7]


NETWORKS = {
    "vgg8:0.05": 8, "resnet8:0.3": 8, "wrn10-1:0.3": 8, "mobilenetv2:0.12": 8, "shufflenetv2:0.05": 8,
    "convnet:3,4": 8, "characters:5": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_reference_networks(name, monkeypatch):
    monkeypatch.setattr(mobilenet, "STAGES", ((16, 1, 1), (24, 2, 2)))
    monkeypatch.setattr(shufflenet, "BLOCKS", (2, 1, 1))
    shape = (NETWORKS[name], NETWORKS[name], 2)
    model = models.build(name, shape, 3, jax.random.key(0))
    pruned_equals_silenced(numbers(model), numbers(np.zeros((2, *shape))), least=2)


def test_dense_connections_and_squeeze_and_excite():
    p = shapes(
        w=(4, 6), s1=(6, 3), s2=(3, 6), d1=(6, 4), d2=(10, 4), norm={"scale": (14,), "bias": (14,)},
        h=(14, 2),
    )  # fmt: skip

    def fn(p, x):
        x = x @ p["w"]
        x = x * jax.nn.sigmoid(jax.nn.relu(x.mean(1) @ p["s1"]) @ p["s2"])[:, None]
        y = jnp.concatenate([x, jnp.tanh(x @ p["d1"])], -1)
        y = jnp.concatenate([y, jnp.tanh(y @ p["d2"])], -1) * p["norm"]["scale"] + p["norm"]["bias"]
        return y.mean(1) @ p["h"]

    graph = pruned_equals_silenced(from_function(fn, p), numbers(np.zeros((2, 3, 4))), runs=2, rerun=True)
    assert {n: g.size for n, g in graph.groups.items() if g.free} == {"w": 6, "s1": 3, "d1": 4, "d2": 4}


def lstm(p, x):
    def cell(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros((x.shape[1], p["wh"].shape[0]))
    return jax.lax.scan(cell, (zero, zero), x)[1].mean(0) @ p["out"]


def gru(p, x):
    def cell(h, x):
        z, r = jnp.split(jax.nn.sigmoid(x @ p["wx"] + h @ p["wh"] + p["b"]), 2, -1)
        n = jnp.tanh(x @ p["wn"] + r * (h @ p["un"]))
        return (1 - z) * n + z * h, None

    zero = jnp.zeros((x.shape[1], p["wh"].shape[0]))
    return jax.lax.scan(cell, zero, x)[0] @ p["out"]


@pytest.mark.parametrize("cell", [lstm, gru])
def test_recurrent(cell):
    gates = 4 if cell is lstm else 2
    p = shapes(wx=(3, 5 * gates), wh=(5, 5 * gates), b=(5 * gates,), out=(5, 2))
    if cell is gru:
        p |= shapes(wn=(3, 5), un=(5, 5))
    graph = pruned_equals_silenced(from_function(cell, p), numbers(np.zeros((4, 2, 3))), runs=2, rerun=True)
    (group,) = [group for group in graph.groups.values() if group.free]
    assert (group.name, group.size) == ("wx", 5)
    recurrent = next(s for s in group.slices if (s.path, s.axis) == ("wh", 1))
    np.testing.assert_array_equal(recurrent.index, np.tile(np.arange(5), gates))


def layer_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def block(p, x, *, causal):
    h = layer_norm(p["norm1"], x)
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in "qkv")
    k, v = (jnp.repeat(t, q.shape[2] // k.shape[2], 2) for t in (k, v))
    logits = jnp.einsum("bqhk,bthk->bhqt", q, k) / 2
    if causal:
        length = logits.shape[-1]
        logits = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -1e9)
    x = x + jnp.einsum("bhqt,bthk,hkd->bqd", jax.nn.softmax(logits), v, p["o"])
    h = layer_norm(p["norm2"], x)
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def block_shapes(d, heads, kv, size, hidden):
    norm = {"scale": (d,), "bias": (d,)}
    return {
        "norm1": norm, "norm2": norm, "q": (d, heads, size), "k": (d, kv, size), "v": (d, kv, size),
        "o": (heads, size, d), "gate": (d, hidden), "up": (d, hidden), "down": (hidden, d),
    }  # fmt: skip


def language_model(p, tokens):
    """Tied embeddings, grouped-query attention, rematerialised blocks."""
    x = p["embedding"][tokens] + p["positions"]
    for name in ("block0", "block1"):
        x = jax.checkpoint(lambda b, x: block(b, x, causal=True))(p[name], x)
    return layer_norm(p["norm"], x) @ p["embedding"].T


def test_causal_transformer():
    each = block_shapes(6, 4, 2, 3, 7)
    norm = {"scale": (6,), "bias": (6,)}
    p = shapes(embedding=(11, 6), positions=(5, 6), block0=each, block1=each, norm=norm)
    graph = pruned_equals_silenced(from_function(language_model, p), np.arange(10).reshape(2, 5))
    sizes = {n: g.size for n, g in graph.groups.items() if n.startswith("block0") and g.free}
    # Key heads, queries a key head, size of keys, size of values, hidden units
    assert sizes == {
        "block0.q": 2, "block0.q#1": 2, "block0.q#2": 3, "block0.v": 3, "block0.gate": 7,
    }  # fmt: skip
    width = graph.groups["embedding"]
    assert (width.size, width.free, width.exact) == (6, True, False)
    assert "mean" in width.reason
    assert {s.path for s in width.slices} >= {"positions", "block1.down", "norm.scale"}


def test_inexact_groups_still_run_and_means_count_what_is_left():
    each = block_shapes(6, 4, 2, 3, 7)
    norm = {"scale": (6,), "bias": (6,)}
    p = shapes(embedding=(11, 6), positions=(5, 6), block0=each, block1=each, norm=norm)
    tokens = np.arange(10).reshape(2, 5)
    model = from_function(language_model, p)
    graph = units.trace(model, tokens)
    kept = {"embedding": [0, 2, 3, 5]}
    outputs = compiled(units.shrink(graph, model, kept), tokens)
    np.testing.assert_allclose(outputs, compiled(units.keep(graph, model, kept), tokens), rtol=1e-9)
    silenced = compiled(units.silence(graph, model, kept), tokens)
    assert np.abs(outputs - silenced).max() > 1e-2


def test_vision_transformer_with_scanned_layers():
    each = block_shapes(6, 3, 3, 2, 5)
    p = shapes(
        patch=(48, 6), token=(1, 1, 6), positions=(5, 6), head=(6, 3), norm={"scale": (6,), "bias": (6,)}
    )
    p["blocks"] = jax.tree.map(lambda *x: np.stack(x), *(shapes(**each) for _ in range(2)))

    def fn(p, x):
        patches = x.reshape(len(x), 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        x = patches.reshape(len(x), 4, 48) @ p["patch"]
        token = jnp.broadcast_to(p["token"], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([token, x], 1) + p["positions"]
        x, _ = jax.lax.scan(lambda x, b: (block(b, x, causal=False), None), x, p["blocks"])
        return layer_norm(p["norm"], x)[:, 0] @ p["head"]

    graph = pruned_equals_silenced(from_function(fn, p), numbers(np.zeros((2, 8, 8, 3))))
    free = {n: g.size for n, g in graph.groups.items() if g.free and g.exact}
    assert free == {"blocks.q": 3, "blocks.q#1": 2, "blocks.v": 2, "blocks.gate": 5}


class LinenNet(nn.Module):
    """Widths written into the module: fn cannot run with smaller arrays, the program can."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (2, 2), (2, 2)).reshape(len(x), -1, 6)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        x = x + nn.Dense(6)(nn.gelu(nn.Dense(9)(nn.RMSNorm()(x))))
        return nn.Dense(3)(nn.RNN(nn.LSTMCell(5, param_dtype=x.dtype))(x)[:, -1])


def test_linen():
    x = numbers(np.zeros((2, 4, 4, 2)))
    model = numbers(models.from_linen(LinenNet(), jax.random.key(0), x))
    graph = pruned_equals_silenced(model, x, least=4)
    kept = {name: [0] for name, group in graph.groups.items() if group.free and group.exact}
    assert units.verify(graph, model, kept, x, x[:1], by=units.keep) < 1e-12


PARTS = ("dense", "residual", "glu", "concatenate", "halves", "reshape", "norm", "transpose", "pad", "scan")


def random_network(parts):
    """A network of parts in this order, between a first and a last dense layer."""
    given, width, plan = {"first": (3, 4)}, 4, []
    for i, part in enumerate(parts):
        n = f"{i}"
        if part == "dense":
            given[n] = {"w": (width, 6), "b": (6,)}
            width = 6
        elif part == "residual":
            given[n] = {"w": (width, 5), "v": (5, width)}
        elif part == "glu":
            given[n] = {"w": (width, 8), "v": (4, width)}
        elif part == "concatenate":
            given[n] = {"w": (width, 2)}
            width += 2
        elif part == "reshape":
            given[n] = {"w": (width, 6), "s": (3,), "u": (2,)}
            width = 6
        elif part == "pad":
            given[n] = {"b": (width + 2,)}
            width += 2
        elif part == "scan":
            given[n] = {"w": (width, width), "k": (width, width)}
        else:
            given[n] = {"s": (width,)}
        plan.append((n, part))
    given["last"] = (width, 2)

    def fn(p, x):
        x = x @ p["first"]
        for n, part in plan:
            q = p[n]
            if part == "dense":
                x = jnp.tanh(dense(q, x))
            elif part == "residual":
                x = x + jax.nn.relu(x @ q["w"]) @ q["v"]
            elif part == "glu":
                a, b = jnp.split(x @ q["w"], 2, -1)
                x = x - (a * jax.nn.sigmoid(b)) @ q["v"]
            elif part == "concatenate":
                x = jnp.concatenate([x, jnp.exp(-((x @ q["w"]) ** 2))], -1)
            elif part == "halves":
                x = x * q["s"]
                x = jnp.concatenate([x[:, ::2], jnp.cos(x[:, 1::2])], -1)
            elif part == "reshape":
                y = (x @ q["w"]).reshape(len(x), 3, 2) * q["s"][:, None] * q["u"]
                x = y.swapaxes(1, 2).reshape(len(x), 6)
            elif part == "norm":
                x = x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1) * q["s"]
            elif part == "transpose":
                x = (x.T * q["s"][:, None])[::-1].T
            elif part == "pad":
                x = jnp.pad(x, ((0, 0), (1, 1))) + q["b"]
            else:
                x = jax.lax.scan(lambda h, _, q=q: (jnp.tanh(h @ q["w"]) @ q["k"], None), x, None, 2)[0]
        return x @ p["last"]

    return fn, shapes(**given)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=6))
def test_random_networks(parts):
    fn, params = random_network(parts)
    graph = pruned_equals_silenced(from_function(fn, params), numbers(np.zeros((2, 3))), least=0)
    positions = {
        (path, a): np.zeros(n, bool) for path, s in graph.shapes.items() for a, n in enumerate(s.shape)
    }
    for group in graph.groups.values():
        for s in group.slices:
            positions[s.path, s.axis] |= s.index >= 0
    assert all(found.all() for found in positions.values())

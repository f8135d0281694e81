"""Residual blocks and stacked layers that are removed: the network computes as if their branches were zero."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

from distill_jax import models
from distill_jax._jaxpr import primitives
from distill_jax.compress import units
from distill_jax.losses import kl
from distill_jax.models import from_function
from distill_jax.weights.structure import path_name


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def close(a, b, tolerance=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), a, b)


class Layer(linen.Module):
    train: bool

    @linen.compact
    def __call__(self, x, _=None):
        h = linen.BatchNorm(use_running_average=not self.train)(linen.Dense(5)(x))
        h = linen.Dropout(0.3, deterministic=not self.train)(linen.gelu(h))
        return x + linen.Dense(4, name="out")(h), None


class Stacked(linen.Module):
    """Three layers under scan, and two after it, all of them rematerialised."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(4)(x)
        layers = linen.scan(
            linen.remat(Layer), variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True, "dropout": True}, length=3,
        )  # fmt: skip
        x, _ = layers(train, name="layers")(x)
        for i in range(2):
            x, _ = linen.remat(Layer)(train, name=f"layer{i}")(x)
        return linen.Dense(3)(x)


def stack(p, x):
    """Two parts per layer; the stacked parameters are cast, and the scan goes backwards."""

    def layer(carry, w):
        x, mask = carry
        x = x + mask * (jnp.tanh(x @ w["up"]) @ w["down"])
        return (x + 0.1 * jax.nn.gelu(x @ w["mix"] + w["bias"]), mask), None

    layers = jax.tree.map(lambda w: w.astype(jnp.float64), p["layers"])
    (x, _), _ = jax.lax.scan(layer, (x @ p["first"], jnp.ones(4)), layers, reverse=True)
    return jax.nn.log_softmax(x @ p["last"])


def stacked_params():
    layers = {"up": (5, 4, 6), "down": (5, 6, 4), "mix": (5, 4, 4), "bias": (5, 4)}
    shapes = {"first": (3, 4), "last": (4, 3), "layers": layers}
    return jax.tree.map(lambda shape: numbers(*shape), shapes, is_leaf=lambda x: isinstance(x, tuple))


TOKENS = np.random.default_rng(0).integers(0, 11, (4, 5))
GPT = models.TransformerConfig(
    vocabulary=11, width=8, layers=2, heads=2, hidden=12, norm="layer", positions="learned", feed_forward="gelu",
    qkv_bias=True, output_bias=True, feed_forward_bias=True, max_length=5,
)  # fmt: skip
# Network, inputs, names of the blocks that go, and the arrays that silence them (of layers, only their rows)
NETWORKS = {
    "resnet": (
        lambda: models.build("resnet14:0.25", (4, 4, 1), 3, jax.random.key(0)), numbers(4, 4, 4, 1),
        ["stages.0.blocks.1", "stages.2.blocks.1"], {r"stages\.[02]\.blocks\.1\.norm2\.(scale|bias)": None},
    ),
    "transformer": (
        lambda: models.build_transformer(GPT, jax.random.key(0)), TOKENS,
        ["layers.0.attention", "layers.1.attention", "layers.1.feed_forward"],
        {r"layers\.(.\.attention\.output|1\.feed_forward\.down)\.": None},
    ),
    "linen": (
        lambda: models.from_linen(Stacked(), jax.random.key(0), numbers(1, 3)), numbers(4, 3),
        ["layers[1]", "layer0"], {r"layers\.out\.": [1], r"layer0\.out\.": None},
    ),
    "scan": (
        lambda: from_function(stack, stacked_params()), numbers(4, 3), ["layers[0]", "layers[3]"],
        {r"layers\.(down|mix|bias)": [0, 3]},
    ),
}  # fmt: skip


def network(name):
    make, x, blocks, zeros = NETWORKS[name]
    model = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), make())
    # All numbers differ from 0 and 1, biases and statistics too
    leaves, structure = jax.tree.flatten(model.params)
    moved = [leaf + 0.3 * numbers(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    model = model.replace(params=jax.tree.unflatten(structure, moved))

    silenced = set()

    def silence(path, leaf):
        for pattern, rows in zeros.items():
            if re.match(pattern, path_name(path)):
                silenced.add(pattern)
                leaf = leaf.at[... if rows is None else np.array(rows)].set(0)
        return leaf

    silent = model.replace(params=jax.tree_util.tree_map_with_path(silence, model.params))
    assert silenced == {*zeros}
    return model, silent, units.trace(model, x[:2]), x, blocks


@pytest.mark.parametrize("name", NETWORKS)
def test_removed_is_silenced_in_evaluation_and_in_training(name, double):
    model, silent, graph, x, blocks = network(name)
    small = units.drop_blocks(graph, model, blocks)
    assert 0 < len(jax.tree.leaves(small.params)) <= len(jax.tree.leaves(model.params))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(m.params)) for m in (small, model)]
    listed = units.blocks(graph)
    assert sizes[1] - sizes[0] == sum(listed[block].parameters for block in blocks)

    def loss(params, network, key):
        outputs, state = network.replace(params=params).apply(x[:3], key=key)
        return (outputs**2).mean(), state

    @jax.jit
    def run(*networks):
        key = jax.random.key(1)
        trained = [
            jax.value_and_grad(loss, has_aux=True)(network.params, network, key) for network in networks
        ]
        return [network(x) for network in networks], trained

    (outputs, wanted), trained = run(small, silent)
    ((value, state), gradients), ((value2, whole), all_gradients) = trained
    close((outputs, value), (wanted, value2))
    close(gradients, units.drop_blocks(graph, {"gradients": all_gradients}, blocks)["gradients"])
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1e-3
    if jax.tree.leaves(state):
        close(state, units.drop_blocks(graph, silent.replace(state=whole), blocks).state)
        assert jax.tree.structure(state) == jax.tree.structure(small.state)
    if name == "linen":
        assert "remat2" in primitives(
            jax.make_jaxpr(lambda p: loss(p, small, jax.random.key(1))[0])(small.params)
        )


def names_of(fn, x, **shapes):
    model = from_function(fn, {name: numbers(*shape) for name, shape in shapes.items()})
    return [*units.blocks(units.trace(model, x))]


def test_only_residual_branches_with_parameters_of_their_own_are_blocks():
    x = numbers(2, 4)
    square = dict.fromkeys("abc", (4, 4))

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def nested(p, x):
        def inner(x):
            return x + jnp.tanh(x @ p["b"])

        return x + inner(x @ p["a"]) @ p["c"]

    def parallel(p, x):  # both branches read the same x, one after the other is added
        h = norm(x)
        return norm((x + h @ p["a"]) + h @ p["b"]) @ p["c"]

    def twins(p, x):  # of the outer sum, both sides hold x itself
        return ((x + jnp.tanh(x @ p["a"])) + (x + jnp.tanh(x @ p["b"]))) @ p["c"]

    def after(p, x):  # the norm comes after the sum
        return norm(norm(x + x @ p["a"]) + jax.nn.gelu(x @ p["b"])) @ p["c"]

    def half(p, x):
        y = x.astype(jnp.bfloat16)
        y = (y.astype(jnp.float32) + jnp.tanh(y @ p["a"].astype(jnp.bfloat16))).astype(jnp.bfloat16)
        y = y.reshape(2, 2, 2) + (y @ p["b"].astype(jnp.bfloat16)).reshape(2, 2, 2)
        return y.reshape(2, 4) @ p["c"]

    def checkpointed(p, x):
        return jax.checkpoint(lambda x, a, b: x + jax.nn.relu(x @ a) @ b)(x, p["a"], p["b"]) @ p["c"]

    assert names_of(nested, x, **square) == ["b", "a"]
    assert names_of(parallel, x, **square) == ["a", "b"]
    assert names_of(twins, x, **square) == ["a", "b"]
    assert names_of(after, x, **square) == ["a"]  # of the second, x is no view of the first norm
    assert names_of(half, x, **square) == ["a", "b"]
    assert names_of(checkpointed, x, **square) == ["a"]
    others = {
        "GELU's cubic": lambda p, x: jax.nn.gelu(x @ p["a"]) @ p["b"] @ p["c"],
        "a logarithm of a sum": lambda p, x: jax.nn.logsumexp(x @ p["a"] @ p["b"] @ p["c"], -1),
        "a projection": lambda p, x: x @ p["a"] + jnp.tanh(x @ p["b"]) @ p["c"],
        "a scaled x": lambda p, x: 2 * x + x @ p["a"] @ p["b"] @ p["c"],
        "twice x": lambda p, x: (x + x) @ p["a"] @ p["b"] @ p["c"],
        "the same parameters again": lambda p, x: (lambda f: f(f(x)))(lambda x: x + x @ p["a"]) @ p["b"] @ p["c"],
        "a broadcast": lambda p, x: x[:1] + (x @ p["a"]) @ p["b"] @ p["c"],
    }  # fmt: skip
    for name, fn in others.items():
        assert names_of(fn, x, **square) == [], name


def test_which_layers_of_a_scan_can_go():
    x, shapes = numbers(2, 4), {"a": (3, 4, 4), "b": (4, 2)}

    def scanned(layer, *more, outputs=lambda ys: 0.0):
        def fn(p, x):
            (x, *_), ys = jax.lax.scan(layer, (x, *more), p["a"])
            return x @ p["b"] + outputs(ys)

        return fn

    def residual(carry, w):
        return (carry[0] + jnp.tanh(carry[0] @ w), *carry[1:]), carry[0].sum()

    assert names_of(scanned(residual), x, **shapes) == ["a[0]", "a[1]", "a[2]"]
    assert names_of(scanned(residual, 0.5), x, **shapes) == ["a[0]", "a[1]", "a[2]"]
    assert names_of(scanned(residual, outputs=jnp.sum), x, **shapes) == []  # one result less
    assert names_of(scanned(lambda c, w: ((jnp.tanh(c[0] + c[0] @ w),), None)), x, **shapes) == []
    assert names_of(scanned(lambda c, w: ((c[0] + c[0] @ w * c[1], c[1] + 1), None), 0.0), x, **shapes) == []

    def rounded(carry, w):
        x = carry[0].astype(jnp.bfloat16).astype(jnp.float32)
        return (x + jnp.tanh(x @ w),), None

    assert names_of(scanned(rounded), x, **shapes) == []

    def twice(p, x):
        return scanned(residual)(p, x) + p["a"][0, 0, 0]

    assert names_of(twice, x, **shapes) == []


def deep(p, x, key=None):
    """Two blocks, a stack of three layers, and dropout."""
    for block in p["blocks"]:
        x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    if key is not None:
        x = x * jax.random.bernoulli(key, 0.7, x.shape)
    x, _ = jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])
    return x @ p["last"]


def deep_model():
    block = {"up": numbers(4, 6), "down": numbers(6, 4, seed=1)}
    params = {
        "blocks": [block, {"up": -block["up"], "down": block["down"]}],
        "stack": numbers(3, 4, 4, seed=2),
    }
    params["last"] = numbers(4, 3, seed=3)
    return from_function(deep, jax.tree.map(lambda leaf: leaf.astype("f4"), params))


X = numbers(5, 4, seed=4).astype("f4")
GONE = ["blocks.1", "stack[0]"]


@pytest.fixture(scope="module")
def shallow():
    """The network, its graph, the network without GONE, and the same built by hand."""
    model = deep_model()
    graph = units.trace(model, X)
    small = units.drop_blocks(graph, model, GONE)
    by_hand = {**model.params, "blocks": model.params["blocks"][:1], "stack": model.params["stack"][1:]}
    return model, graph, small, model.replace(params=by_hand)


def test_a_network_without_blocks_is_a_model(shallow, tmp_path):
    model, graph, small, by_hand = shallow
    assert small.params["blocks"][1] == {"up": None, "down": None}
    assert small.params["stack"].shape == (2, 4, 4)
    assert small.apply_fn == units.drop_blocks(graph, model, GONE[::-1]).apply_fn
    assert small.apply_fn != units.drop_blocks(graph, model, ["blocks.0", "stack[0]"]).apply_fn
    assert units.drop_blocks(graph, model, []).apply_fn is model.apply_fn
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def mapped(*networks):
        pairs = [jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), network) for network in networks]
        return [jax.vmap(lambda n, key: n.apply(X[:3], key=key)[0])(pair, keys) for pair in pairs]

    close(*mapped(small, by_hand), 1e-5)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    assert narrow(X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    tx = optax.adam(1e-3)
    start = {"model": model, "moments": tx.init(model.params)}
    cut = units.drop_blocks(graph, start, GONE)
    assert jax.tree.structure(cut["moments"]) == jax.tree.structure(tx.init(small.params))
    assert cut["moments"][0].mu["stack"].shape == (2, 4, 4)
    models.save(tmp_path / "small.model", small, X)
    loaded = models.load(tmp_path / "small.model")
    close(loaded(X[:2]), by_hand(X[:2]), 1e-5)
    close(loaded.apply(X, key=keys[0])[0], by_hand.apply(X, key=keys[0])[0], 1e-5)


def test_networks_that_lost_other_layers_of_equal_shapes_share_no_program():
    scales = np.array([1.0, 5.0, 25.0], "f4")

    def scaled(p, x):
        return jax.lax.scan(lambda x, each: (x + each[1] * jnp.tanh(x @ each[0]), None), x, (p["w"], scales))[
            0
        ]

    model = from_function(scaled, {"w": np.stack([numbers(4, 4).astype("f4")] * 3)})
    graph = units.trace(model, X)
    run = jax.jit(lambda network: network(X))
    for row, name in enumerate(units.blocks(graph)):
        silent = {"w": np.where(np.arange(3)[:, None, None] == row, 0, model.params["w"])}
        close(run(units.drop_blocks(graph, model, [name])), run(model.replace(params=silent)), 1e-5)


def test_depth_then_width_and_width_then_depth(shallow):
    model, graph, small, by_hand = shallow
    kept = {"blocks.0.up": [0, 2, 5]}
    shallower = units.trace(small, X)
    assert [*units.blocks(shallower)] == ["blocks.0", "stack[0]", "stack[1]"]
    both = units.keep(shallower, small, kept)
    assert both.params["blocks"][0]["up"].shape == (4, 3)
    narrow = units.trace(units.keep(graph, model, kept), X)
    other = units.drop_blocks(narrow, units.keep(graph, model, kept), GONE)
    assert jax.tree.map(jnp.shape, both.params) == jax.tree.map(jnp.shape, other.params)
    wanted = units.silence(units.trace(by_hand, X), by_hand, kept)
    run = jax.jit(lambda key, *networks: [network.apply(X, key=key)[0] for network in networks])
    given = run(jax.random.key(0), both, other, wanted)
    close(given[0], given[2], 1e-5)
    close(given[1], given[2], 1e-5)


def test_influence_is_the_angle_or_what_is_lost_without_the_block(shallow):
    model, graph, _, _ = shallow
    listed = units.blocks(graph)
    branches = [lambda x, p=p: jnp.tanh(x @ p["up"]) @ p["down"] for p in model.params["blocks"]]
    branches += [lambda x, w=w: jnp.tanh(x @ w) for w in model.params["stack"]]
    stream = [*itertools.accumulate(branches, lambda x, f: x + f(x), initial=X)]
    cosines = [
        (a * b).sum(-1) / jnp.linalg.norm(a, axis=-1) / jnp.linalg.norm(b, axis=-1)
        for a, b in itertools.pairwise(stream)
    ]
    found = units.block_influence(graph, model, [X[:2], X[2:4]])
    assert [*found] == [*listed]
    np.testing.assert_allclose([*found.values()], [1 - c[:4].mean() for c in cosines], rtol=1e-4)

    def squares(model, batch):
        return (model(batch) ** 2).mean()

    without = [units.drop_blocks(graph, model, [name]) for name in listed]
    outputs = jax.jit(lambda *networks: [network(X) for network in networks])(model, *without)
    divergences = [kl(y, outputs[0]).mean() for y in outputs[1:]]
    np.testing.assert_allclose(
        [*units.block_influence(graph, model, [X], how="kl").values()], divergences, rtol=1e-4
    )
    rises = [(y**2).mean() - (outputs[0] ** 2).mean() for y in outputs[1:]]
    found = units.block_influence(graph, model, [X], how=squares)
    np.testing.assert_allclose([*found.values()], rises, rtol=1e-3, atol=1e-4)


def test_blocks_of_the_lowest_influence_per_cost_go_until_the_rest_fits(shallow):
    _, graph, _, _ = shallow
    costs = {name: (block.parameters, block.flops) for name, block in units.blocks(graph).items()}
    assert costs == {
        **dict.fromkeys(["blocks.0", "blocks.1"], (48, 2 * 5 * 48)),
        **dict.fromkeys(["stack[0]", "stack[1]", "stack[2]"], (16, 2 * 5 * 16)),
    }  # fmt: skip
    influence = {"blocks.0": 0.9, "blocks.1": 0.3, "stack[0]": 0.08, "stack[1]": 0.2, "stack[2]": 0.2}
    # Of 156 parameters; per parameter, stack[0] has the lowest influence and blocks.1 the next
    assert units.prune_blocks(graph, influence, 0.9) == ["stack[0]"]
    assert units.prune_blocks(graph, influence, 0.8, of="parameters") == ["blocks.1"]  # stack[0] comes back
    assert units.prune_blocks(graph, influence, 0.6) == ["blocks.1", "stack[0]"]
    assert units.prune_blocks(graph, influence, 1.0) == []
    helps = dict.fromkeys(influence, 0.001) | {"stack[0]": -0.9, "blocks.1": -1.0}  # blocks.1 is larger, too
    assert units.prune_blocks(graph, helps, 0.9) == ["blocks.1"]
    del influence["blocks.0"]
    with pytest.raises(
        ValueError, match=r"^budget: without 4 of 5 blocks, 0.385 of the flops are left, and 0.3"
    ):
        units.prune_blocks(graph, influence, 0.3)


def test_nested_blocks_go_with_those_around_them():
    def nested(p, x):
        h = x @ p["a"]
        return (x + (h + jnp.tanh(h @ p["b"])) @ p["c"]) @ p["d"]

    model = from_function(nested, {name: numbers(4, 4, seed=i) for i, name in enumerate("abcd")})
    graph = units.trace(model, X)
    assert {name: block.arrays for name, block in units.blocks(graph).items()} == {
        "b": ("b",),
        "a": ("a", "b", "c"),
    }
    assert units.drop_blocks(graph, model, ["b"]).params["b"] is None
    influence = {"a": 3.0, "b": 0.1}
    assert units.prune_blocks(graph, influence, 0.8) == ["b"]
    assert units.prune_blocks(graph, influence, 0.5) == ["a"]  # b goes with it


def test_bad_names_and_calls_are_refused(shallow):
    model, graph, small, _ = shallow
    with pytest.raises(
        ValueError, match=r"^names names \['blocks.7'\], which are no blocks; there are \['blocks.0'"
    ):
        units.drop_blocks(graph, model, ["blocks.7"])
    with pytest.raises(
        ValueError, match=r"must have the shapes that drop_blocks\(graph, model, names\) makes"
    ):
        small.replace(params=model.params)(X)

    alone = from_function(lambda p, x: x + jnp.tanh(x @ p["a"]), {"a": numbers(4, 4)})
    with pytest.raises(ValueError, match=r"^names are all that the network has, .*: got \['a'\]"):
        units.drop_blocks(units.trace(alone, X), alone, ["a"])

    def apply_fn(params, state, x, *, key=None):
        branch = 0 if key is not None and len(x) == 1 else x @ params["a"]
        if key is not None:
            state = {"norm": jnp.linalg.norm(params["a"])}
        return (x + branch) @ params["b"], state

    model = models.Model(apply_fn, {"a": numbers(4, 4), "b": numbers(4, 2)}, {"norm": np.float32(0)})
    small = units.drop_blocks(units.trace(model, X), model, ["a"])
    close(small(X), X @ model.params["b"], 1e-5)
    training = r"^x: in training mode, on inputs of shapes \[\(., 4\)\], the network "
    with pytest.raises(
        ValueError, match=training + r"has no blocks \['a'\] with the same parameters, only \[\]"
    ):
        small.apply(X[:1], key=jax.random.key(0))
    with pytest.raises(ValueError, match=training + r"uses \['a'\] outside of the blocks that are gone"):
        small.apply(X, key=jax.random.key(0))

    def other(params, x, key=None):  # in training mode the block of this name has more parameters
        p = params["p"]
        branch = jnp.tanh(x @ p["a"])
        return ((x + branch) @ p["b"] if key is None else x + branch @ p["b"]) @ p["c"]

    model = from_function(other, {"p": {name: numbers(4, 4) for name in "abc"}})
    small = units.drop_blocks(units.trace(model, X), model, ["p"])
    with pytest.raises(
        ValueError, match=training + r"has no blocks \['p'\] with the same parameters, only \['p'\]"
    ):
        small.apply(X, key=jax.random.key(0))


def test_batches_of_unequal_sizes_have_no_mean(shallow):
    model, graph, *_ = shallow
    with pytest.raises(ValueError, match="batches must be of one size"):
        units.block_influence(graph, model, [X[:1], X[1:4]])

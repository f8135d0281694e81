"""Intermediate values: the same program with more results."""

import functools
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.sharding import PartitionSpec

from distill_jax.features.capturing import capture, layer_shapes, resume
from distill_jax.features.matching import match_layers
from distill_jax.models import MLP, ConvNet, Model, from_function, from_linen, from_nnx

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 3)), jnp.float32)


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.conv = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.norm(self.conv(x))), x.mean()


class Net(nnx.Module):
    """Nested lists, a tuple as result, a module used twice, one inside remat, dropout."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.stages = nnx.List(nnx.List(Block(4, rngs) for _ in range(2)) for _ in range(2))
        self.shared = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x, _ = block(x)
        x = nnx.remat(lambda module, x: module(x))(self.shared, x)
        x = self.dropout(self.shared(x))
        return self.head(x.mean((1, 2)))


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.relu(linen.Conv(4, (3, 3))(x))
        x = linen.BatchNorm(use_running_average=not train)(x)
        return linen.Dropout(0.5, deterministic=not train)(x)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = LinenBlock(name="block")(x, train)
        dense = linen.Dense(4)
        x = linen.remat(linen.Dense)(4, name="again")(dense(dense(x)))
        return linen.Dense(5)(x.mean((1, 2)))


def plain(params, x, key=None):
    x = x.reshape(x.shape[0], -1)
    hidden = checkpoint_name(jnp.tanh(x @ params["a"]), "hidden")
    if key is not None:
        hidden *= jax.random.bernoulli(key, 0.5, hidden.shape)
    return checkpoint_name(hidden, "dropped") @ params["b"]


def plain_model(seed=0):
    rng = np.random.default_rng(seed)
    params = {"a": jnp.asarray(rng.normal(size=(192, 6))), "b": jnp.asarray(rng.normal(size=(6, 5)))}
    return from_function(plain, params)


@functools.cache
def models():
    return {
        "nnx": from_nnx(Net(nnx.Rngs(0))),
        "convnet": from_nnx(ConvNet((8, 8, 3), 5, dropout=0.3, batch_norm=True, rngs=nnx.Rngs(0))),
        "mlp": from_nnx(MLP((192, 16, 5), dropout=0.3, rngs=nnx.Rngs(0))),
        "linen": from_linen(LinenNet(), jax.random.key(0), X),
        "plain": plain_model(),
    }


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["nnx", "convnet", "mlp", "linen", "plain"])
def test_outputs_state_and_gradients_are_bit_identical(name, training):
    model = models()[name]
    key = jax.random.key(3) if training else None
    # All but the one value here that XLA otherwise fuses into the reduction after it: see below
    captured = capture(model, ["stem", "stages.*", "shared*", "head"] if name == "nnx" else "*")

    def loss(params, model):
        outputs, state = model.replace(params=params).apply(X, key=key)
        outputs, features = outputs if isinstance(outputs, tuple) else (outputs, {})
        return jnp.sum(jnp.square(outputs)), (outputs, state, features)

    def run(model):
        # Not the loss: XLA may fuse this test's own sum otherwise, where more values are results
        gradients, (outputs, state, features) = jax.jit(jax.grad(loss, has_aux=True))(model.params, model)
        return (outputs, state, gradients), features

    same = chex.assert_trees_all_equal
    if (name, training) == ("plain", True) and jax.__version_info__ >= (0, 11):
        # The newer XLA rounds it otherwise where the dropped values are results: see below
        same = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)
    results, features = run(captured)
    same(results, run(model)[0])
    apply = jax.jit(lambda model: model.apply(X, key=key))
    (outputs, _), state = apply(captured)
    same((outputs, state), apply(model))
    shapes = layer_shapes(model, X, key=key)
    assert set(shapes) - set(features) == ({"dropout"} if name == "nnx" else set())
    shapes = {name: shapes[name] for name in features}
    chex.assert_trees_all_equal_shapes_and_dtypes(features, shapes)


def test_a_value_inside_a_fusion_changes_rounding_alone():
    """Dropout, then a mean: compiled, it is rounded otherwise when the dropped values are results.

    The operations are the same ones, in the same order.
    """
    model, key = models()["nnx"], jax.random.key(3)
    captured = capture(model, "*")

    def operations(model):
        def walk(jaxpr):
            for eqn in jaxpr.eqns:
                if eqn.primitive.name != "name":
                    yield eqn.primitive.name, [v.aval for v in eqn.invars]
                for inner in core.jaxprs_in_params(eqn.params):
                    yield from walk(inner)

        program = jax.make_jaxpr(lambda model: model.apply(X, key=key))(model)
        return list(walk(program.jaxpr))

    assert operations(captured) == operations(model)
    apply = jax.jit(lambda model: model.apply(X, key=key))
    (outputs, _), state = apply(captured)
    chex.assert_trees_all_close((outputs, state), apply(model), rtol=1e-5, atol=1e-6)


def test_names_of_an_nnx_model():
    shapes = layer_shapes(models()["nnx"], X)
    assert list(shapes) == [
        "stem",
        *[
            f"stages.{i}.{j}.{part}"
            for i in range(2)
            for j in range(2)
            for part in ("conv", "norm", "0", "1")
        ],
        "shared",
        "shared#1",
        "dropout",
        "head",
    ]
    assert shapes["stages.0.1.1"].shape == ()
    assert shapes["shared#1"].shape == (8, 8, 8, 4)


def test_names_of_a_linen_model():
    assert list(layer_shapes(models()["linen"], X)) == [
        "block.Conv_0", "block.BatchNorm_0", "block.Dropout_0", "block",
        "Dense_0", "Dense_0#1", "again", "Dense_1",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["nnx", "linen"])
def test_values_are_those_of_the_modules(name):
    model = models()[name]
    names = {"nnx": ["stem", "head"], "linen": ["block.Conv_0", "Dense_1"]}[name]
    outputs, features = capture(model, names)(X)
    kernel = model.params["stem"] if name == "nnx" else model.params["block"]["Conv_0"]
    expected = jax.lax.conv_general_dilated(
        X, kernel["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(features[names[0]], expected + kernel["bias"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(features[names[1]], outputs)


def test_dropout_draws_once():
    """The captured value is the one that went on into the network."""
    captured = capture(plain_model(), ["hidden", "dropped"])
    (outputs, features), _ = captured.apply(X, key=jax.random.key(1))
    assert 0 < jnp.mean(features["dropped"] == 0) < 1
    np.testing.assert_array_equal(features["dropped"] @ captured.params["b"], outputs)


@pytest.mark.parametrize("name", ["convnet", "nnx", "linen", "plain"])
def test_nothing_runs_twice_and_nothing_unasked_is_kept(name):
    model, key = models()[name], jax.random.key(0)

    def cost(model):
        compiled = jax.jit(lambda model, x, key: model.apply(x, key=key)).lower(model, X, key).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis()

    shapes = layer_shapes(model, X, key=key)
    chosen = next(iter(shapes))
    flops, memory = cost(model)
    captured_flops, captured_memory = cost(capture(model, chosen))
    assert captured_flops <= 1.02 * flops
    extra = captured_memory.output_size_in_bytes - memory.output_size_in_bytes
    assert extra <= shapes[chosen].size * 4 + 16  # a pointer in the tuple of results


def test_time_of_a_captured_forward():
    """The programs are the same but for results; the bound leaves room for a busy machine."""
    model = models()["convnet"]
    x = jnp.tile(X, (4, 1, 1, 1))
    both, run = (model, capture(model, "norm.1")), jax.jit(Model.__call__)

    def seconds(model):
        start = time.perf_counter()
        jax.block_until_ready(run(model, x))
        return time.perf_counter() - start

    for model in both:
        seconds(model)
    times = np.array([[seconds(model) for model in both] for _ in range(15)]).min(0)
    assert times[1] < 1.5 * times[0]


def test_equal_captures_are_one_program():
    """Made twice, of equal models: one compilation. Another choice of names is another program."""
    traces = []

    def count(model, x):
        traces.append(1)
        return model(x)

    run = jax.jit(count)
    for seed in (0, 1):
        model = from_nnx(MLP((192, 16, 5), dropout=0.3, rngs=nnx.Rngs(seed)))
        run(capture(model, "dense.*"), X)
        run(capture(model, ("dense.*",)), X)
    assert len(traces) == 1
    run(capture(model, "*"), X)
    assert len(traces) == 2
    shape = jax.ShapeDtypeStruct(X.shape[1:], X.dtype)
    parts = [resume(plain_model(seed), "hidden", example) for seed in (0, 1) for example in (X[0], shape)]
    assert len({part.apply_fn for part in parts}) == 1
    for part, model in ((parts[0], plain_model(0)), (parts[2], plain_model(1))):
        value = capture(model, "hidden")(X)[1]["hidden"]
        np.testing.assert_allclose(run(part, value), model(X), rtol=1e-6)
    assert len(traces) == 3


def test_a_pattern_without_match_lists_the_names():
    model = models()["convnet"]
    with pytest.raises(ValueError, match=r"named 'conv9'.*convolution\.0, norm\.0"):
        capture(model, ["norm.*", "conv9"])(X)
    with pytest.raises(ValueError, match="none"):
        capture(from_function(lambda params, x: x, {}), "a")(X)
    with pytest.raises(ValueError, match="select"):
        capture(model, [])


def test_names_are_seen_in_functions_that_were_jitted_before():
    model = models()["convnet"]
    jitted = model.replace(apply_fn=jax.jit(model.apply_fn))
    outputs = jitted(X)  # traced without names
    again, features = capture(jitted, "hidden")(X)
    np.testing.assert_array_equal(outputs, again)
    assert list(features) == ["hidden"]
    program = jax.make_jaxpr(lambda x: jitted(x))(X)
    assert "distill_jax:" not in str(program)  # and none are left behind


def scanned(params, x):
    def layer(x, w):
        return checkpoint_name(jnp.tanh(x @ w), "layer"), None

    return jax.lax.scan(layer, x, params, reverse=True)[0]


def test_scan_stacks():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)), jnp.float32)
    x = jnp.ones((2, 4))
    outputs, features = jax.jit(capture(from_function(scanned, weights), "layer"))(x)
    np.testing.assert_array_equal(outputs, scanned(weights, x))
    assert features["layer"].shape == (3, 2, 4)
    np.testing.assert_array_equal(features["layer"][0], outputs)
    np.testing.assert_allclose(features["layer"][2], jnp.tanh(x @ weights[2]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["while", "cond", "custom_jvp", "custom_vjp"])
def test_what_cannot_leave_is_an_error_or_is_left_alone(kind):
    def name(x):
        return checkpoint_name(jnp.sin(x), "inside")

    if kind == "while":
        inner = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 9, name, x)  # noqa: E731
    elif kind == "cond":
        inner = lambda x: jax.lax.cond(x[0, 0] > 0, name, jnp.cos, x)  # noqa: E731
    elif kind == "custom_jvp":
        inner = jax.custom_jvp(name)
        inner.defjvp(lambda p, t: (inner(*p), 7 * t[0]))
    else:
        inner = jax.custom_vjp(name)
        inner.defvjp(lambda x: (inner(x), None), lambda _, g: (7 * g,))

    model = from_function(lambda params, x: checkpoint_name(inner(x), "outside"), {})
    x = jnp.full((2, 2), 0.3)
    with pytest.raises(ValueError, match=r"inside a '(while|cond|custom_jvp_call|custom_vjp_call)'"):
        capture(model, "inside")(x)
    assert list(layer_shapes(model, x)) == ["outside"]
    _, features = capture(model, "outside")(x)
    assert list(features) == ["outside"]
    if kind.startswith("custom"):  # the custom rule still holds
        gradient = jax.grad(lambda x: capture(model, "outside")(x)[0].sum())(x)
        np.testing.assert_array_equal(gradient, 7.0)


def test_rematerialisation_and_its_policy_are_kept():
    policy = jax.checkpoint_policies.save_only_these_names("saved")

    def fn(params, x):
        @functools.partial(jax.checkpoint, policy=policy)
        def block(x):
            return jnp.sin(checkpoint_name(jnp.sin(checkpoint_name(jnp.sin(x), "saved")), "other"))

        return block(x)

    captured = capture(from_function(fn, {}), "other")

    def program(model):
        return jax.make_jaxpr(lambda x: model(x))(jnp.ones(3)).eqns[0]

    (eqn,) = [e for e in program(captured).params.values() if hasattr(e, "eqns")]
    assert [str(e.primitive) for e in eqn.eqns].count("sin") == 3
    assert program(captured).params["policy"] is policy
    gradient = jax.grad(lambda x: captured(x)[1]["other"].sum())
    x = jnp.asarray(0.4)[None]
    np.testing.assert_allclose(gradient(x), jnp.cos(jnp.sin(x)) * jnp.cos(x), rtol=1e-6)


def test_gradients_flow_through_captured_values():
    captured = capture(models()["nnx"], "stages.1.0.conv")

    def loss(params):
        _, features = captured.replace(params=params)(X)
        return jnp.square(features["stages.1.0.conv"]).sum()

    gradients = jax.grad(loss)(captured.params)
    assert jnp.abs(gradients["stem"]["kernel"]).max() > 0
    assert jnp.abs(gradients["head"]["kernel"]).max() == 0


def test_under_vmap_scan_pmap_and_shard_map():
    captured = capture(plain_model(), "hidden")
    expected = captured(X)[1]["hidden"]

    def hidden(model, x):
        return model(x)[1]["hidden"]

    both = jax.vmap(hidden, (0, None))(jax.tree.map(lambda a: jnp.stack([a, 2 * a]), captured), X)
    np.testing.assert_allclose(both[0], expected, rtol=1e-5, atol=1e-5)
    _, scanned = jax.lax.scan(lambda c, x: (c, hidden(captured, x)), 0, X.reshape(2, 4, 8, 8, 3))
    np.testing.assert_allclose(scanned.reshape(8, -1), expected, rtol=1e-5, atol=1e-5)
    mapped = jax.pmap(hidden, in_axes=(None, 0))(captured, X.reshape(4, 2, 8, 8, 3))
    np.testing.assert_allclose(mapped.reshape(8, -1), expected, rtol=1e-5, atol=1e-5)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = PartitionSpec("batch")
    sharded = jax.shard_map(hidden, mesh=mesh, in_specs=(PartitionSpec(), batch), out_specs=batch)(
        captured, X
    )
    np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_over_devices_is_captured():
    """Collectives inside the captured program keep their axis."""
    net = ConvNet((8, 8, 3), 5, channels=(4,), batch_norm=True, axis_name="batch", rngs=nnx.Rngs(0))
    alone = ConvNet((8, 8, 3), 5, channels=(4,), batch_norm=True, rngs=nnx.Rngs(0))
    key = jax.random.key(0)
    one, many = from_nnx(alone), from_nnx(net)
    run = jax.pmap(
        lambda model, x: capture(model, "norm.0").apply(x, key=key)[0][1]["norm.0"],
        in_axes=(None, 0),
        axis_name="batch",
    )
    result = run(many, X.reshape(4, 2, 8, 8, 3))
    (_, features), _ = capture(one, "norm.0").apply(X, key=key)
    np.testing.assert_allclose(result.reshape(8, 8, 8, 4), features["norm.0"], atol=1e-5)


# Matching


def shapes(**layers):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in layers.items()}


def test_stages_are_paired_by_resolution():
    student = shapes(
        a=(2, 32, 32, 8), b=(2, 32, 32, 8), c=(2, 16, 16, 16), d=(2, 8, 8, 32), e=(2, 32), f=(2, 10)
    )
    teacher = shapes(
        s=(1, 32, 32, 4), t=(1, 16, 16, 4), u=(1, 16, 16, 4), v=(1, 8, 8, 4), w=(1, 4, 4, 4),
        x=(1, 99), y=(1, 10),
    )  # fmt: skip
    pairing = match_layers(student, teacher)
    assert pairing == [("b", "s"), ("c", "u"), ("d", "v"), ("e", "x")]
    assert isinstance(pairing, list)
    lines = str(pairing).splitlines()
    assert lines[0].split() == ["student", "shape", "depth", "teacher", "shape", "depth"]
    assert lines[1].split() == ["b", "32×32", "·8", "0.20", "s", "32×32", "·4", "0.00"]
    assert match_layers(student, teacher, count=5) == [
        ("a", "s"), ("b", "t"), ("c", "u"), ("d", "v"), ("e", "x"),
    ]  # fmt: skip
    assert len(match_layers(student, teacher, count=1)) == 1


def test_depth_decides_among_equal_resolutions():
    student = shapes(a=(2, 8, 8, 4), b=(2, 4, 4, 4), c=(2, 8, 8, 4))
    teacher = shapes(p=(2, 8, 8, 4), q=(2, 4, 4, 4), r=(2, 8, 8, 4), s=(2, 4, 4, 4))
    assert match_layers(student, teacher) == [("a", "p"), ("b", "q"), ("c", "r")]
    assert match_layers(shapes(a=(1, 8, 8, 2), b=(1, 7, 7, 2)), teacher, count=1) == [("a", "p")]


def test_more_pairs_than_stages_spread_over_the_stages():
    student = shapes(**{f"s{i}": (2, 8, 8, 4) for i in range(4)})
    teacher = shapes(**{f"t{i}": (2, 8, 8, 4) for i in range(8)})
    assert match_layers(student, teacher) == [("s3", "t7")]
    assert match_layers(student, teacher, count=2) == [("s1", "t3"), ("s3", "t7")]
    assert match_layers(student, teacher, count=4) == [
        ("s0", "t1"), ("s1", "t3"), ("s2", "t5"), ("s3", "t7"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no 5 layers"):
        match_layers(student, teacher, count=5)
    with pytest.raises(ValueError, match="count"):
        match_layers(student, teacher, count=0)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"student has a \(·4\); the teacher has b \(8×8 ·4\)"):
        match_layers(shapes(a=(2, 4)), shapes(b=(2, 8, 8, 4)), count=2)
    with pytest.raises(ValueError, match="the student has none"):
        match_layers({}, shapes(b=(2, 8, 8, 4)))
    mixed = shapes(a=(2, 8, 8, 4), n=()) | {"i": jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.int32)}
    assert match_layers(mixed, shapes(b=(2, 8, 8, 9))) == [("a", "b")]


def test_maps_and_vectors_meet_where_nothing_else_does():
    vectors = shapes(a=(2, 9), b=(2, 7))
    maps = shapes(**{f"t{i}": (2, n, n, 4) for i, n in enumerate((8, 4, 1))})
    assert match_layers(vectors, maps) == [("b", "t2")]
    assert match_layers(vectors, maps, count=2) == [("a", "t1"), ("b", "t2")]
    one_vector = maps | shapes(v=(2, 5))
    assert match_layers(vectors, one_vector) == [("b", "v")]
    assert match_layers(one_vector, vectors, count=2) == [("t2", "a"), ("v", "b")]
    sequence = shapes(c=(2, 16, 4))
    assert match_layers(sequence, maps) == [("c", "t1")]


def test_real_networks_are_matched():
    student, teacher = models()["convnet"], models()["linen"]
    pairing = match_layers(layer_shapes(student, X), layer_shapes(teacher, X))
    assert pairing[0] == ("norm.0", "again")

"""Reference networks: sizes, outputs and features of their PyTorch originals; any image; bfloat16."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from golden.make_models import CLASSES, draw, fingerprint, images, reference_name

from distill_jax import train
from distill_jax.features import capture
from distill_jax.models import VGG, Characters, build, feature_names, from_linen, from_nnx, nnx_module

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("models.json").read_text())
SMALL = [
    "vgg8:0.1",
    "vgg13:0.1",
    "resnet8:0.5",
    "resnet8x4:0.2",
    "wrn10-1:0.5",
    "mobilenetv2-t2:0.2",
    "shufflenetv1:0.2",
    "shufflenetv2:0.2",
]
ONE_OF_EACH = ["vgg8:0.1", "resnet8:0.5", "wrn10-1:0.5", *SMALL[-3:]]


class LinenCNN(linen.Module):
    """A network that is not one of ours."""

    classes: int

    @linen.compact
    def __call__(self, x, train=False):
        for width in (4, 8):
            x = linen.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return linen.Dense(self.classes)(x.mean((1, 2)))


def abstract(description, shape, classes=10, **options):
    """The module, its arrays being shapes."""
    return nnx.eval_shape(lambda: nnx_module(description, shape, classes, rngs=nnx.Rngs(0), **options))


def _recorder(cls, values, name):
    def call(self, *args):
        values[name] = cls.__call__(self, *args)
        return values[name]

    return type(cls.__name__, (cls,), {"__call__": call})


def recorded(module, names, x):
    """Logits, and what the submodules of these names return."""
    values = {}
    for name in names:
        node = module
        for part in name.split("."):
            node = node[int(part)] if part.isdecimal() else getattr(node, part)

        object.__setattr__(node, "__class__", _recorder(type(node), values, name))
    logits = module(x)
    return logits, [values[name] for name in names]


@functools.cache
def abstract_split(description, shape, options):
    """What :func:`feature_shapes` needs of a network, traced once."""
    network = abstract(description, shape, **dict(options))
    return network.feature_names(), nnx.split(network)


def feature_shapes(description, shape, *, batch=2, images=jnp.float32, **options):
    """Shapes of the features and of the logits; nothing is computed."""
    height = shape[:2] if description.startswith("vgg") else (1, 1)
    names, (definition, state) = abstract_split(description, (*height, shape[2]), tuple(options.items()))

    def run(state, x):
        logits, features = recorded(nnx.merge(definition, state), names, x)
        return [*features, logits]

    return jax.eval_shape(run, state, jax.ShapeDtypeStruct((batch, *shape), images))


@pytest.mark.parametrize("description", GOLDEN["parameters"])
def test_parameter_count(description):
    params = nnx.state(abstract(description, (32, 32, 3), 100), nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == GOLDEN["parameters"][description]


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("characters:512,128", 320 + 18_496 + 16_384 * 512 + 512 + 512 * 128 + 128 + 128 * 62 + 62),
        ("characters:512", 320 + 18_496 + 16_384 * 512 + 512 + 512 * 62 + 62),
        ("mlp:64", 69_630),  # the small students of this task
        ("convnet:8,16,24", 70_326),
    ],
)
def test_parameter_count_of_networks_for_characters(description, expected):
    params = nnx.state(abstract(description, (32, 32, 1), 62), nnx.Param)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_characters_is_two_convolutions_a_pool_and_dense_layers():
    model = build("characters:5,4", (6, 8, 2), 3, jax.random.key(0), dropout=0.5)
    x = jax.random.normal(jax.random.key(1), (2, 6, 8, 2))

    @jax.jit
    def both(model, x):
        h = x
        for layer in model.params["convolution"].values():
            h = jax.lax.conv_general_dilated(
                h, layer["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            h = jnp.maximum(h + layer["bias"], 0)
        h = h.reshape(2, 3, 2, 4, 2, 64).max((2, 4)).reshape(2, -1)
        dense = list(model.params["dense"].values())
        for layer in dense[:-1]:
            h = jnp.maximum(h @ layer["kernel"] + layer["bias"], 0)
        h = h @ dense[-1]["kernel"] + dense[-1]["bias"]
        return model(x), h, model.apply_fn(model.params, model.state, x, key=jax.random.key(2))[0]

    got, expected, dropped = both(model, x)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.allclose(dropped, expected)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 8, 1), {}, "at least 2, .* got 1×8"),
        ((8, 8, 1), {"hidden": (4, 0)}, "all ≥ 1, got"),
        ((8, 8, 1), {"dropout": 1.0}, "dropout"),
    ],
)
def test_characters_refuses(shape, options, message):
    with pytest.raises(ValueError, match=message):
        Characters(shape, 3, rngs=nnx.Rngs(0), **options)


def original_weights(description, network):
    """Our variables' arrays as the golden script draws them for the original."""
    flat = flatten_dict(nnx.to_pure_dict(nnx.state(network, (nnx.Param, nnx.BatchStat))))
    arrays = {}
    for path, like in flat.items():
        name = reference_name(description, ".".join(map(str, path)))
        if like.ndim == 4:  # OIHW
            array = draw(name, tuple(like.shape[i] for i in (3, 2, 0, 1))).transpose(2, 3, 1, 0)
        else:
            array = draw(name, like.shape[::-1]).T
        arrays[path] = jnp.asarray(array, jnp.float32)
    return unflatten_dict(arrays)


@pytest.mark.parametrize("description", GOLDEN["outputs"])
def test_outputs_and_features_are_the_originals(description):
    """With the original's weights: logits in both modes, and every feature at every place."""
    expected, shape = GOLDEN["outputs"][description], (32, 32, 3)
    weights = original_weights(description, abstract(description, shape, CLASSES))
    lists = [feature_names(description, shape, preactivation=p) for p in (False, True)]
    names = sorted({*lists[0], *lists[1]})

    @jax.jit
    def run(weights, x):
        network = nnx_module(description, shape, CLASSES, rngs=nnx.Rngs(0))
        state = nnx.state(network, (nnx.Param, nnx.BatchStat))
        nnx.replace_by_pure_dict(state, weights)
        nnx.update(network, state)
        network.eval()
        logits, features = recorded(network, names, x)
        network.train()  # after the other: it changes the statistics
        return logits, dict(zip(names, features, strict=True)), network(x)

    logits, features, training_logits = run(weights, jnp.asarray(images(), jnp.float32))
    atol = max(1e-4, 1e-6 * np.abs(expected["logits"]).max())  # ShuffleNetV2's reach 1650 here
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-4, atol=atol)
    np.testing.assert_allclose(training_logits, expected["training_logits"], rtol=1e-3, atol=1e-3)
    for kind, names in zip(("features", "preactivations"), lists, strict=True):
        ours = np.array([fingerprint(features[name]) for name in names])
        theirs = np.array(expected[kind])
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours[:, 0], theirs[:, 0], rtol=1e-5)
        # The error of a projection is that of a sum of so many values
        sizes = np.array([np.sqrt(features[name].size) for name in names])
        assert (np.abs(ours - theirs)[:, 1] < 1e-4 * theirs[:, 0] * sizes).all()


@pytest.mark.parametrize("description", ONE_OF_EACH)
def test_any_image(description):
    for shape in ((28, 28, 1), (8, 8, 1), (5, 3, 1)):
        *features, embedding, logits = feature_shapes(description, shape)
        assert logits.shape == (2, 10)
        assert embedding.shape == (2, embedding.shape[-1])
        sizes = [feature.shape[1:3] for feature in features]
        assert sizes == sorted(sizes, reverse=True)
        assert min(sizes[-1]) >= 1
        if shape[0] == 8:
            last = {"v": (1, 1), "r": (2, 2), "w": (2, 2), "m": (1, 1), "s": (1, 1)}
            assert sizes[-1] == last[description[0]]


def test_vgg_pools_large_images_once_more():
    assert [f.shape[1] for f in feature_shapes("vgg8:0.1", (64, 64, 3))[:5]] == [64, 32, 16, 8, 4]
    assert [f.shape[1] for f in feature_shapes("vgg8:0.1", (32, 32, 3))[:5]] == [32, 16, 8, 4, 4]


def test_vgg_without_batch_norm():
    network = VGG((8, 8, 1), 3, width=0.1, batch_norm=False, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(network, nnx.BatchStat))
    names = network.feature_names(preactivation=True)
    assert names[2] == "stages.1.blocks.0.conv"
    logits, features = recorded(network, names, jnp.ones((2, 8, 8, 1)))
    assert logits.shape == (2, 3)
    assert (features[2] < 0).any()


@pytest.mark.parametrize("description", ["resnet8:0.5", "shufflenetv1:0.2", "wrn10-1:0.5"])
def test_features_follow_the_relu_and_preactivations_precede_it(description):
    shape = (8, 8, 1)
    before = feature_names(description, shape, preactivation=True)[1:-1]
    after = feature_names(description, shape)[1:-1]
    follows = [name.replace("norm1", "conv1") for name in before]  # in a WRN the entry of a stage

    @jax.jit
    def run(x):
        network = nnx_module(description, shape, 3, rngs=nnx.Rngs(0))
        return recorded(network, [*before, *(follows if "wrn" in description else after)], x)[1]

    values = run(jnp.asarray(np.random.default_rng(0).normal(size=(4, *shape)), jnp.float32))
    for x, y in zip(values[: len(before)], values[len(before) :], strict=True):
        assert (x < 0).any()
        if "wrn" not in description:
            np.testing.assert_array_equal(y, jnp.maximum(x, 0))


def steps(model, shape, *, count=12, rate=2e-3):
    """The losses of steps on one batch, and the last state."""
    rng = np.random.default_rng(1)
    batch = {"image": jnp.asarray(rng.normal(size=(16, *shape)), jnp.float32), "label": jnp.arange(16) % 4}
    tx = optax.adam(rate)
    state = train.init_state(model, tx, jax.random.key(0))
    step = jax.jit(train.make_train_step(train.supervised(), tx))
    history = []
    for _ in range(count):
        state, metrics = step(state, batch)
        history.append(float(metrics["loss"]))
    return history, state


@pytest.mark.parametrize("description", [*ONE_OF_EACH, "resnet8:0.5 in bf16", "linen"])
def test_training_steps_lower_the_loss(description):
    shape = (8, 8, 1)
    name, _, low = description.partition(" in ")
    if name == "linen":
        model = from_linen(LinenCNN(4), jax.random.key(0), jnp.zeros((1, *shape)))
    else:
        options = {"dtype": jnp.bfloat16} if low else {}
        model = build(name, shape, 4, jax.random.key(0), **options)
    history, state = steps(model, shape, count=40)
    assert history[-1] < 0.7 * history[0]
    assert np.isfinite(history).all()
    for tree, like in ((state.model.params, model.params), (state.model.state, model.state)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
            lambda x: (x.shape, x.dtype), like
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("description", ONE_OF_EACH)
@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}])
def test_bfloat16(description, options):
    """Convolutions in bfloat16; embedding, logits and statistics in float32."""
    images = jnp.float32 if "dtype" in options else jnp.bfloat16
    *features, embedding, logits = feature_shapes(description, (8, 8, 1), images=images, **options)
    assert {feature.dtype for feature in features} == {jnp.dtype(jnp.bfloat16)}
    assert embedding.dtype == logits.dtype == jnp.float32
    network = abstract(description, (8, 8, 1), **options)
    kinds = {nnx.Param: options.get("param_dtype", jnp.float32), nnx.BatchStat: jnp.float32}
    for kind, dtype in kinds.items():
        assert {x.dtype for x in jax.tree.leaves(nnx.state(network, kind))} == {jnp.dtype(dtype)}


def test_batch_norm_in_bfloat16_has_statistics_of_float32():
    """Its input is rounded, and nothing else: not the moments, nor the running averages."""
    layer = nnx_module("vgg8:0.02", (8, 8, 1), 2, rngs=nnx.Rngs(0)).stem.blocks[0].norm
    x = np.random.default_rng(0).normal(size=(64, 3, 3, layer.num_features)) * 3 + 1
    x = jnp.asarray(x, jnp.bfloat16)
    wide = np.asarray(x, float)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, float), (wide - mean) / np.sqrt(var + 1e-5), rtol=2**-8)
    np.testing.assert_allclose(layer.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], 0.9 + 0.1 * var, rtol=1e-5)
    layer.eval()
    expected = (wide - 0.1 * mean) / np.sqrt(0.9 + 0.1 * var + 1e-5)
    np.testing.assert_allclose(np.asarray(layer(x), float), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("description", ["resnet8:0.5", "wrn10-1:0.5"])
def test_statistics_are_shared_over_a_named_axis(description):
    """Four shards with a named axis give what one device gives for the whole batch."""
    shape = (8, 8, 1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, *shape)), jnp.float32)
    key = jax.random.key(1)
    whole = build(description, shape, 3, jax.random.key(0))
    shared = build(description, shape, 3, jax.random.key(0), axis_name="batch")

    @jax.jit
    def shards(x):
        x = x.reshape(4, 2, *shape)
        run = lambda x: shared.apply(x, key=key)  # noqa: E731
        return jax.vmap(run, axis_name="batch", out_axes=(0, None))(x)

    run = jax.jit(lambda x: whole.apply(x, key=key))
    (logits, state), (expected, expected_state) = shards(x), run(x)
    np.testing.assert_allclose(logits.reshape(8, 3), expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, expected_state)


@pytest.mark.parametrize("description", ["vgg8:0.1", "wrn10-1:0.5"])
def test_dropout_draws_from_the_key(description):
    shape = (8, 8, 1)
    model = build(description, shape, 3, jax.random.key(0), dropout=0.5)
    x = jnp.ones((4, *shape)) * jnp.arange(4.0).reshape(4, 1, 1, 1)
    run = jax.jit(lambda key: model.apply(x, key=key)[0])
    first, second, again = (run(jax.random.key(i)) for i in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)


@pytest.mark.parametrize(
    ("description", "variance"), [("vgg8", 2 / (9 * 256)), ("shufflenetv2:2", 1 / (3 * 244))]
)
def test_initial_weights(description, variance):
    """He's fan-out, or PyTorch's default; biases 0, scales 1."""

    def draw_one():
        network = nnx_module(description, (8, 8, 1), 5, rngs=nnx.Rngs(3))
        if description == "vgg8":
            return network.stages[1].blocks[0].conv.kernel[...]
        return network.stages[1].blocks[0].conv3.kernel[...]

    kernel = np.asarray(jax.jit(draw_one)())
    np.testing.assert_allclose(kernel.var(), variance, rtol=0.02)
    model = build(description.split(":")[0] + ":0.1", (8, 8, 1), 5, jax.random.key(0))
    for path, leaf in flatten_dict(model.params).items():
        if path[-1] in ("bias", "scale"):
            assert (leaf == (path[-1] == "scale")).all()


def test_a_vision_transformer_is_its_formula():
    """Two heads, patches of 2 × 4 places, one block; and the names of its features."""
    x = np.random.default_rng(0).normal(size=(2, 8, 16, 3)).astype(np.float32)
    model = build("vit1-4:0.3", (8, 16, 3), 5, jax.random.key(0))
    names = feature_names("vit1-4:0.3", (8, 16, 3))
    assert names == ("stem", "stages.0", "pool")
    logits, (_, found) = jax.jit(lambda m, x: (m(x), capture(m, names)(x)))(model, x)
    assert [found[name].shape for name in names] == [(2, 2, 4, 64), (2, 2, 4, 64), (2, 64)]
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params)

    def norm(p, x):
        return (
            p["scale"] * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            + p["bias"]
        )

    patches = x.reshape(2, 2, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    stem = p["stem"]
    y = (
        np.einsum("bhwijc,ijcf->bhwf", patches, stem["conv"]["kernel"])
        + stem["conv"]["bias"]
        + stem["positions"]
    )
    y = y.reshape(2, 8, 64)
    block = p["stages"][0]["blocks"][0]
    parts = block["attention"]
    q, k, v = (
        np.einsum("btf,fhd->bthd", norm(block["norm1"], y), parts[name]["kernel"]) + parts[name]["bias"]
        for name in ("query", "key", "value")
    )
    weights = np.exp(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(32))
    weights /= weights.sum(-1, keepdims=True)
    y = y + np.einsum("bhts,bshd,hdf->btf", weights, v, parts["out"]["kernel"]) + parts["out"]["bias"]
    inner = norm(block["norm2"], y) @ block["up"]["kernel"] + block["up"]["bias"]
    inner = 0.5 * inner * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
    y = y + inner @ block["down"]["kernel"] + block["down"]["bias"]
    pooled = norm(p["neck"], y).mean(1)
    np.testing.assert_allclose(logits, pooled @ p["head"]["kernel"] + p["head"]["bias"], atol=1e-5)


def test_the_stages_of_a_vision_transformer():
    for depth, stages in ((1, [1]), (2, [1, 1]), (5, [2, 1, 2]), (6, [2, 2, 2])):
        found = abstract(f"vit{depth}-4", (8, 8, 1)).stages
        assert [len(stage.blocks) for stage in found] == stages
    model = build("vit1-4:0.1", (8, 8, 1), 5, jax.random.key(0), dtype=jnp.bfloat16)
    assert model(jnp.zeros((1, 8, 8, 1))).dtype == jnp.float32


def test_descriptions_of_unusual_widths():
    assert feature_shapes("shufflenetv2:0.5", (8, 8, 1))[-2].shape == (2, 1024)
    assert [f.shape[-1] for f in feature_shapes("resnet14x3", (8, 8, 1))] == [24, 48, 96, 192, 192, 10]
    assert [f.shape[-1] for f in feature_shapes("vgg8:0.001", (8, 8, 1))] == [1] * 6 + [10]
    assert feature_shapes("wrn10-1:0.001", (8, 8, 1))[-2].shape == (2, 1)
    assert feature_shapes("mobilenetv2:0.001", (8, 8, 1))[-2].shape == (2, 1280)
    for name in ("shufflenetv1:0.001", "shufflenetv2:0.001"):
        assert feature_shapes(name, (8, 8, 1))[-1].shape == (2, 10)


@pytest.mark.parametrize(
    "text", ["vgg", "vgg8:", "vgg8:0", "vgg8:-1", "vgg8:nan", "vgg8:inf", "vgg8:a", "wrn16", "resnet",
             "mobilenetv2-3", "ResNet20", "resnet20x", "vgg8:1:2"],
)  # fmt: skip
def test_a_bad_description_is_refused(text):
    with pytest.raises(ValueError, match="a model is described by a family"):
        nnx_module(text, (8, 8, 1), 10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vgg9", r"depth must be one of \[8, 11, 13, 16, 19\], got 9"),
        ("resnet21", r"6n \+ 2 .* got 21"),
        ("resnet2", r"6n \+ 2 .* got 2"),
        ("resnet8x0", "widening must be at least 1, got 0"),
        ("wrn17-2", r"6n \+ 4 .* got 17"),
        ("mobilenetv2-t0", "expansion must be at least 1, got 0"),
        ("vit0-4", "depth must be an integer of at least 1"),
        ("vit2-3", "patch must divide the height and width of an image, got 3"),
    ],
)
def test_a_network_that_is_not_there(text, message):
    with pytest.raises(ValueError, match=message):
        nnx_module(text, (8, 8, 1), 10, rngs=nnx.Rngs(0))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"shape must be .* got \(8, 8\)"):
        VGG((8, 8), 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="classes must be an integer of at least 1, got 0"):
        VGG((8, 8, 1), 0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        nnx_module("vgg8", (8, 8, 1), 3, rngs=nnx.Rngs(0), dropout=1.0)
    with pytest.raises(ValueError, match="'mlp:3' has no list of features"):
        feature_names("mlp:3", (8, 8, 1))


def test_module_of_the_small_families():
    network = nnx_module("convnet:4", (8, 8, 1), 3, rngs=nnx.Rngs(0))
    model = from_nnx(network)
    assert model(jnp.zeros((2, 8, 8, 1))).shape == (2, 3)

"""Networks that people have, pruned by half: they evaluate and train as the silenced ones do.

They are small, but for flaxmodels' ResNet-18, with random weights. Those of other libraries are skipped where the
library is missing (``pip install .[networks]``; ``pip install equimo`` and ``pip install --no-deps flaxmodels``).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_units_keep import evaluates_as_silenced, half, trains_as_silenced
from unseen_networks import UNSEEN, unseen

from distill_jax.compress import units
from distill_jax.models import Model

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20,
    "vocab_size": 30, "max_position_embeddings": 16, "num_labels": 3,
}  # fmt: skip
IMAGES = {"num_labels": 3, "layer_type": "basic", "embedding_size": 8, "depths": [1, 2]}
# Library's class → options of its configuration, its inputs, shape of its outputs
HUGGING_FACE = {
    "BertForSequenceClassification": (SIZES, "tokens"),
    "GPT2LMHeadModel": (
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 30, "n_positions": 16}, "tokens",
    ),
    "ViTForImageClassification": ({**SIZES, "image_size": 8, "patch_size": 4}, "images"),
    "ResNetForImageClassification": ({**IMAGES, "hidden_sizes": [8, 12]}, "images"),
    "RegNetForImageClassification": (
        {**IMAGES, "layer_type": "y", "hidden_sizes": [8, 16], "groups_width": 4}, "images",
    ),
    "LlamaForCausalLM": ({**SIZES, "num_key_value_heads": 2}, "tokens"),
    "GPTJForCausalLM": (
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4, "vocab_size": 30, "n_positions": 16}, "tokens",
    ),
    "WhisperForConditionalGeneration": (
        {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 20, "decoder_ffn_dim": 12, "num_mel_bins": 8,
            "max_source_positions": 10, "max_target_positions": 10, "vocab_size": 30, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        }, "speech",
    ),
}  # fmt: skip
RNG = np.random.default_rng(0)
INPUTS = {
    "tokens": RNG.integers(3, 30, (5, 6)),
    "images": RNG.normal(size=(5, 3, 8, 8)),
    "speech": (RNG.normal(size=(5, 8, 20)), RNG.integers(3, 30, (5, 4))),
}


def hugging_face(name):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    if not hasattr(transformers, "FlaxPreTrainedModel"):
        pytest.skip("this version of transformers has no Flax")
    options, kind = HUGGING_FACE[name]
    config = getattr(transformers, name.split("For")[0].removesuffix("LMHeadModel") + "Config")(**options)
    shape = {"input_shape": (1, 8, 8, 3)} if kind == "images" else {}
    network = getattr(transformers, "Flax" + name)(config, seed=0, dtype=jnp.float64, **shape)
    variables = jax.tree.map(np.asarray, network.params)
    stateful = "batch_stats" in variables

    def apply_fn(params, state, x, *, key=None):
        given = {"params": params, **state} if stateful else params
        options = {} if stateful or key is None else {"dropout_rng": key}
        if kind == "speech":
            found = network(*x, params=given, train=key is not None, **options)
        else:
            found = network(x, params=given, train=key is not None, **options)
        if stateful and key is not None:
            found, state = found
        return found.logits, dict(state)

    state = {"batch_stats": variables["batch_stats"]} if stateful else {}
    return Model(apply_fn, variables["params"] if stateful else variables, state), INPUTS[kind]


def equinox():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 4)

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        attention: eqx.nn.MultiheadAttention
        first: eqx.nn.Linear
        last: eqx.nn.Linear
        drop: eqx.nn.Dropout

        def __call__(self, x, key):
            x = jax.nn.gelu(self.conv(x)).reshape(6, -1).T
            x = self.attention(x, x, x)
            x = self.drop(jax.nn.relu(jax.vmap(self.first)(x)), key=key, inference=key is None)
            return self.last(x.mean(0))

    net = Net(
        eqx.nn.Conv2d(3, 6, 3, stride=2, key=keys[0]), eqx.nn.MultiheadAttention(2, 6, key=keys[1]),
        eqx.nn.Linear(6, 10, key=keys[2]), eqx.nn.Linear(10, 3, key=keys[3]), eqx.nn.Dropout(0.3),
    )  # fmt: skip
    params, static = eqx.partition(net, eqx.is_array)

    def apply_fn(params, state, x, *, key=None):
        module = eqx.combine(params, static)
        if key is None:
            return jax.vmap(lambda x: module(x, None))(x), state
        return jax.vmap(module)(x, jax.random.split(key, len(x))), state

    return Model(apply_fn, params, {}), INPUTS["images"]


def equimo():
    eqx, models = (pytest.importorskip(name) for name in ("equinox", "equimo.models"))
    net = models.VisionTransformer(
        img_size=8, in_channels=3, dim=16, patch_size=4, num_heads=[4], depths=[2], num_classes=3, reg_tokens=1,
        mlp_ratio=2, proj_drop=0.2, key=jax.random.key(0),
    )  # fmt: skip
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def apply_fn(params, state, x, *, key=None):
        module, keys = (
            eqx.combine(params, static),
            jax.random.split(jax.random.key(0) if key is None else key, len(x)),
        )
        return jax.vmap(lambda x, k: module(x, key=k, inference=key is None))(x, keys), state

    return Model(apply_fn, params, {}), INPUTS["images"]


def flaxmodels():
    network = pytest.importorskip("flaxmodels").ResNet18(
        "logits", None, False, num_classes=3, dtype="float64"
    )
    x = RNG.normal(size=(5, 16, 16, 3))

    def apply_fn(params, state, x, *, key=None):
        given = {"params": params, **state}
        if key is None:
            return network.apply(given, x, train=False), state
        return network.apply(given, x, train=True, mutable=["batch_stats"])

    variables = network.init(jax.random.key(0), x, train=False)
    return Model(apply_fn, variables["params"], {"batch_stats": variables["batch_stats"]}), x


def haiku():
    hk = pytest.importorskip("haiku")

    def net(x, train):
        for width in (6, 4):
            x = jax.nn.relu(hk.BatchNorm(True, True, 0.9)(hk.Conv2D(width, 3)(x), train))
            x = hk.dropout(hk.next_rng_key(), 0.2, x) if train else x
        return hk.Linear(3)(x.mean((1, 2)))

    network = hk.transform_with_state(net)

    def apply_fn(params, state, x, *, key=None):
        outputs, new = network.apply(params, state, key, x, train=key is not None)
        return outputs, state if key is None else new

    x = RNG.normal(size=(5, 6, 6, 2))
    return Model(apply_fn, *network.init(jax.random.key(0), x, train=True)), x


MAKE = {name: lambda name=name: hugging_face(name) for name in HUGGING_FACE}
MAKE |= {"equinox": equinox, "equimo": equimo, "haiku": haiku, "flaxmodels": flaxmodels}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", MAKE)
def test_half_of_a_network_evaluates_and_trains_as_the_silenced_one(name):
    with jax.enable_x64(True):
        model, x = MAKE[name]()
        model = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
        graph = units.trace(model, jax.tree.map(lambda leaf: leaf[:2], x))
        kept = half(graph)
        assert len(kept) >= 2, str(graph)
        some = jax.tree.map(lambda leaf: leaf[:3], x)
        evaluates_as_silenced(graph, model, kept, some)
        y = RNG.normal(size=jax.eval_shape(model, x).shape)
        # The BatchNorm of flaxmodels computes in float32 when it trains, whatever the dtype: over steps that grows
        options = {"steps": 1, "tolerance": 1e-3} if name == "flaxmodels" else {}
        trains_as_silenced(graph, model, kept, x, y, **options)


@pytest.mark.parametrize("name", UNSEEN)
def test_half_of_a_network_of_another_kind_evaluates_and_trains_as_the_silenced_one(name):
    with jax.enable_x64(True):
        model, batch, exact = unseen(name)
        graph = units.trace(model, batch(2))
        kept = half(graph)
        assert len(kept) == exact, str(graph)
        evaluates_as_silenced(graph, model, kept, batch(3))
        x = batch(4)
        y = jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape), jax.eval_shape(model, x))
        trains_as_silenced(graph, model, kept, x, y)

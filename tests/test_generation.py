"""Transformers: padding, packing, the cache, generation, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import features, losses, models
from distill_jax.models import TransformerConfig, generation

SIZES = {"vocabulary": 13, "width": 8, "layers": 2, "heads": 4, "kv_heads": 2, "hidden": 12}
LLAMA = TransformerConfig(**SIZES, qk_norm=True, tied=False)
GPT2 = TransformerConfig(
    **SIZES | {"kv_heads": 4}, norm="layer", positions="learned", feed_forward="gelu", max_length=12,
    qkv_bias=True, output_bias=True, feed_forward_bias=True,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 13, (2, 7)).astype(np.int32)
LEFT = np.array([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]], np.int32)


@functools.cache
def network(config, dtype="float32"):
    """A transformer whose logits are far apart: random weights of the size that trained ones have."""
    model = models.build_transformer(config, jax.random.key(0), dtype=dtype)
    return model.replace(params=jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, model.params))


both = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


@both
def test_texts_in_a_row_do_not_see_each_other_and_padding_changes_nothing(config):
    @jax.jit
    def run(model, a, b):
        packed = {
            "tokens": jnp.concatenate([a, b, jnp.zeros((1, 2), int)], 1),
            "segments": jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]]),
        }
        left = {
            "tokens": jnp.concatenate([jnp.zeros((1, 2), int), b], 1),
            "segments": jnp.array([[False] * 2 + [True] * 3]),
        }
        own = packed | {"positions": jnp.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]])}
        return model(packed), model(left), model(own), model(a), model(b)

    packed, left, own, a, b = run(network(config), TOKENS[:1, :4], TOKENS[1:, :3])
    assert np.isfinite(packed).all()
    np.testing.assert_array_equal(own, packed)
    np.testing.assert_allclose(packed[:, :4], a, atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:7], b, atol=1e-5)
    np.testing.assert_allclose(left[:, 2:], b, atol=1e-5)


@both
def test_cached_parts_are_the_whole(config):
    """Parts of 3, 1 and 3 tokens, with padding, and positions counted or given."""

    @jax.jit
    def run(model, tokens, segments):
        whole = model({"tokens": tokens, "segments": segments})
        parts, cache = [], models.init_cache(model, 2, 9)
        for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
            logits, cache = models.extend(
                model, {"tokens": tokens[:, part], "segments": segments[:, part]}, cache
            )
            parts.append(logits)
        return whole, jnp.concatenate(parts, 1), cache["length"]

    whole, parts, length = run(network(config), TOKENS, LEFT)
    assert length == 7
    np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_what_does_not_exist_is_nan_under_jit():
    """An index below 0 or above the table, and tokens beyond the end of the cache."""

    @jax.jit
    def run(model, tokens, positions):
        cache = models.init_cache(model, 1, 3)
        given = {"tokens": tokens, "positions": positions}
        logits, cache = models.extend(model, given, cache)
        return model(given), logits, models.extend(model, given, cache)[0]

    one = np.ones((1, 2), int)
    whole, first, second = run(network(GPT2), one, one)
    assert np.isfinite(whole).all()
    assert np.isfinite(first).all()
    assert np.isnan(second).all()
    for tokens, positions in (
        (one * [1, -1], one),
        (one * [1, 13], one),
        (one, one * [1, -1]),
        (one, one * [1, 12]),
    ):
        assert np.isnan(run(network(GPT2), tokens, positions)[0][0, 1]).all()


@both
def test_greedy_tokens_are_the_likeliest_and_the_cache_changes_nothing(config):
    model, prompts = network(config), {"tokens": TOKENS, "segments": LEFT}
    found = models.generate(model, prompts, length=5, temperature=0)
    plain = models.generate(model, prompts, length=5, temperature=0, cached=False)
    for name, array in found.items():
        np.testing.assert_array_equal(array, plain[name])
    np.testing.assert_array_equal(found["tokens"][:, :7], TOKENS)
    np.testing.assert_array_equal(found["positions"][0], [0, 0, 0, *range(9)])
    likeliest = jax.jit(lambda m, x: jnp.argmax(m(x), -1))(model, found)
    np.testing.assert_array_equal(likeliest[:, 6:11], found["tokens"][:, 7:])


def test_a_text_ends_at_its_stop():
    model, prompts = network(LLAMA), {"tokens": TOKENS, "segments": LEFT}
    free = np.asarray(models.generate(model, prompts, length=5, temperature=0)["tokens"])
    stop = int(free[0, 8])
    found = models.generate(model, prompts, length=5, temperature=0, stops=(stop, 12), pad=11)
    parts = [np.asarray(found[name])[:, 7:] for name in ("tokens", "segments")]
    for row, text, segments in zip(free[:, 7:], *parts, strict=True):
        ends = [i for i, token in enumerate(row) if token in (stop, 12)]
        kept = ends[0] + 1 if ends else 5
        np.testing.assert_array_equal(text, [*row[:kept], *[11] * (5 - kept)])
        np.testing.assert_array_equal(segments, np.arange(5) < kept)


def test_a_traced_or_tiny_temperature_takes_the_likeliest_too():
    model, prompts = network(LLAMA), TOKENS[:, :3]
    greedy = models.generate(model, prompts, length=4, temperature=0)["tokens"]

    @jax.jit
    def run(temperature):
        return models.generate(model, prompts, length=4, key=jax.random.key(5), temperature=temperature)

    for temperature in (0.0, 1e-40, 2e-38):
        np.testing.assert_array_equal(run(temperature)["tokens"], greedy)


def test_a_step_may_generate_and_learn():
    """No gradient passes through what was generated."""
    model = network(LLAMA)

    @jax.jit
    def step(params, key):
        def loss(params):
            student = model.replace(params=params)
            samples = models.generate(student, TOKENS[:, :3], length=2, key=key)
            return jnp.square(student(samples)).mean(), samples

        (_, samples), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        given = jax.grad(lambda params: jnp.square(model.replace(params=params)(samples)).mean())(params)
        return gradient, given

    gradient, given = step(model.params, jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, given)


def test_draws_follow_the_key_and_the_cache_changes_nothing():
    model = network(LLAMA)

    @jax.jit
    def run(model, tokens, key, temperature):
        options = {"length": 4, "temperature": temperature, "top_p": 0.8}
        return [
            models.generate(model, tokens, key=k, cached=cached, **options)["tokens"]
            for k, cached in ((key, True), (key, False), (jax.random.fold_in(key, 1), True))
        ]

    first, plain, other = run(model, TOKENS[:, :1], jax.random.key(3), 2.0)
    np.testing.assert_array_equal(first, plain)
    assert (first != other).any()


LOGITS = np.log([0.4, 0.25, 0.2, 0.1, 0.05])


@pytest.mark.parametrize(
    ("temperature", "top_p", "kept"),
    [(1.0, 1.0, 5), (0.5, 1.0, 5), (1.0, 0.64, 2), (1.0, 0.66, 3), (2.0, 0.01, 1)],
)
def test_tokens_come_as_often_as_their_probabilities_say(temperature, top_p, kept):
    """Of any model, without a cache: one whose logits are the same everywhere."""
    order = np.array([3, 0, 4, 1, 2])
    model = models.from_function(
        lambda params, x: jnp.broadcast_to(params, (*x["tokens"].shape, 5)),
        jnp.asarray(LOGITS[order], jnp.float32),
    )
    found = models.generate(
        model, np.zeros((4000, 1), int), length=1, key=jax.random.key(0), temperature=temperature,
        top_p=top_p, cached=False,
    )["tokens"][:, 1]  # fmt: skip
    expected = np.exp(LOGITS / temperature) * (np.arange(5) < kept)
    expected = (expected / expected.sum())[order]
    share = np.bincount(found, minlength=5) / 4000
    assert (share[expected == 0] == 0).all()
    np.testing.assert_allclose(share, expected, atol=4 * np.sqrt(0.25 / 4000))


def test_the_likeliest_tokens():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.25, 0.15]]))
    for top_p, kept in ((0.49, [1]), (0.51, [1, 2]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(generation._likeliest(logits, top_p))), kept)


def test_hidden_states_and_the_kernel_make_the_logits_also_in_chunks():
    model = network(dataclasses.replace(LLAMA, tied=True), "bfloat16")

    @jax.jit
    def run(model, tokens):
        hidden, kernel = models.hidden_states(model)(tokens), models.head_kernel(model)
        whole = losses.cross_entropy(model(tokens), tokens)
        chunks = losses.tokens.chunked(losses.cross_entropy, chunk=4)(hidden, tokens, student_kernel=kernel)
        return model(tokens), hidden, kernel, whole, chunks

    logits, hidden, kernel, whole, chunks = run(model, TOKENS)
    assert (logits.dtype, hidden.dtype, kernel.dtype) == (jnp.float32, jnp.bfloat16, jnp.bfloat16)
    assert (hidden.shape, kernel.shape) == ((2, 7, 8), (8, 13))
    np.testing.assert_allclose(chunks, whole, rtol=1e-5)
    exact = hidden.astype(jnp.float32) @ kernel.astype(jnp.float32)
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
    wide = model.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), model.params))
    np.testing.assert_allclose(
        logits, jax.jit(lambda m, x: m(x))(wide, TOKENS), atol=0.03 * np.abs(logits).max()
    )


def test_features_have_names_and_every_second_layer_is_a_model():
    model = network(LLAMA)
    half = model.replace(params={**model.params, "layers": model.params["layers"][::2]})
    selected = ["embedding", "layers.0", "layers.0.attention.weights", "layers.0.feed_forward", "norm"]

    @jax.jit
    def run(model, half, x):
        return model(x), features.capture(model, selected)(x), half(x)

    logits, (same, found), short = run(model, half, {"tokens": TOKENS, "segments": LEFT})
    np.testing.assert_array_equal(same, logits)
    assert found.keys() == set(selected)
    weights = found["layers.0.attention.weights"]
    assert weights.shape == (2, 4, 7, 7)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    assert (weights[0, :, 3:, :3] == 0).all()  # padding is not seen, nor what comes later
    assert (np.triu(weights[1], 1) == 0).all()
    assert not np.allclose(short, logits)


X = {"tokens": TOKENS, "segments": LEFT}


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (TOKENS[0], "tokens must have shape"),
        (TOKENS[:, :0], "tokens must have shape"),
        (TOKENS.astype(float), "tokens must be integers"),
        (TOKENS + 7, r"tokens must lie in \[0, 13\), the vocabulary, got 8 to"),
        ({"segments": LEFT}, "x must be tokens, or a dict"),
        (X | {"mask": LEFT}, "x must be tokens, or a dict"),
        (X | {"segments": LEFT[:1]}, "segments must have the shape of the tokens"),
        (X | {"segments": LEFT * 1.0}, "segments must be integers"),
        (X | {"positions": LEFT * 1.0}, "positions must be integers"),
        (X | {"positions": LEFT + 11}, r"positions must lie in \[0, 12\), the learned ones, got 11 to 12"),
        (X | {"positions": LEFT - 1}, r"positions must lie in \[0, 12\), the learned ones, got -1 to 0"),
        (np.ones((1, 13), int), "at most 12, the number of learned positions, got 13"),
    ],
)
def test_inputs_that_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        network(GPT2)(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads must be an integer of at least 1"),
        ({"kv_heads": 3}, "heads must be a multiple of kv_heads, got 4 and 3"),
        ({"width": 10}, "width must be a multiple of heads"),
        ({"head_size": 3}, "head_size must be even"),
        ({"norm": "batch"}, "norm must be one of 'rms', 'layer'"),
        ({"norm_eps": 0.0}, "norm_eps must be positive"),
        ({"tied": None}, "tied must be one of"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling must be a models.RopeScaling"),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**SIZES | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length"),
        ({"length": 6}, "at most 12, the number of learned positions, got 13"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"temperature": np.ones(2)}, "temperature must be one number"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "key": None}, "key must be a random key"),
        ({"key": 0}, "key must be one random key"),
        ({"stops": 3}, "stops must be a list of tokens"),
        ({"stops": (1.5,)}, "stops must be tokens"),
        ({"pad": -1}, "pad must be tokens"),
        ({"pad": 13}, r"pad must lie in \[0, 13\), the vocabulary"),
        (
            {"model": models.hidden_states(network(GPT2))},
            "model must return logits, got one of models.hidden_states",
        ),
        ({"prompts": X | {"segments": LEFT[:, ::-1]}}, "padded on the left"),
        ({"prompts": TOKENS + 7}, "tokens must lie in"),
        ({"model": models.from_function(lambda p, x: x, {})}, "model must be a transformer"),
    ],
)
def test_generation_refuses(changes, message):
    given = {"model": network(GPT2), "prompts": X, "length": 5, "temperature": 0.0, **changes}
    with pytest.raises(ValueError, match=message):
        models.generate(given.pop("model"), given.pop("prompts"), **given)


def test_a_cache_that_is_full_is_refused():
    model = network(GPT2)
    cache = models.init_cache(model, 2, 3)
    with pytest.raises(ValueError, match="cache has room for 3 tokens, but 0 and 7 were given"):
        models.extend(model, TOKENS, cache)
    with pytest.raises(ValueError, match="as many rows as the cache, 2, got 1"):
        models.extend(model, TOKENS[:1, :2], cache)
    with pytest.raises(ValueError, match="number of learned positions"):
        models.init_cache(model, 2, 13)


def test_what_is_no_transformer_is_refused():
    for function in (
        models.hidden_states,
        models.head_kernel,
        functools.partial(models.init_cache, batch=1, capacity=1),
    ):
        with pytest.raises(ValueError, match="model must be a transformer"):
            function(models.from_function(lambda p, x: x, {}))
    with pytest.raises(ValueError, match=r"config must be a models\.TransformerConfig"):
        models.build_transformer(SIZES, jax.random.key(0))
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        models.build_transformer(LLAMA, jax.random.key(0), dtype=jnp.float16)

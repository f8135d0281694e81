"""Rotated heads: the network stays the same, and the first dimensions of a head are the best ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from distill_jax import models
from distill_jax.compress import units

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def attention(p, x):
    """Several heads of queries may share keys and values; their sizes differ."""
    query, key, value = (
        jnp.einsum("btw,whd->bthd", x, p[part]["kernel"]) + p[part].get("bias", 0)
        for part in ("query", "key", "value")
    )
    query = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    weights = jax.nn.softmax(jnp.einsum("bqkgd,bskd->bkgqs", query, key))
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", weights, value)
    mixed = mixed.reshape(*x.shape[:2], -1, value.shape[3])
    return jnp.einsum("bthd,hdw->btw", mixed, p["output"]["kernel"]) + p["output"].get("bias", 0)


def parameters(heads=4, shared=2, size=3, value=5, width=6, biases=True):
    shapes = {
        "query": (width, heads, size), "key": (width, heads // shared, size),
        "value": (width, heads // shared, value), "output": (heads, value, width),
    }  # fmt: skip
    rng = np.random.default_rng(1)  # the same whichever tests ran before
    p = {part: {"kernel": rng.normal(size=shape)} for part, shape in shapes.items()}
    if biases:
        for part in p:
            p[part]["bias"] = rng.normal(size=(width,) if part == "output" else shapes[part][1:])
    return {"attention": p}


def network(p, x):
    return jnp.tanh(attention(p["attention"], x)) @ np.ones((6, 2))


def linen_model():
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.MultiHeadDotProductAttention(num_heads=2, param_dtype="float64", dtype="float64")(
                x, x
            )

    return models.from_linen(Network(), jax.random.key(0), jnp.ones((1, 4, 6)))


def encoder():
    config = models.EncoderConfig(vocabulary=50, width=8, layers=2, heads=2, hidden=16, max_length=4)
    return models.build_encoder(config, jax.random.key(0))


X = RNG.normal(size=(9, 4, 6)) + 1
TOKENS = {"tokens": RNG.integers(0, 50, (9, 4)), "segments": np.ones((9, 4), np.int32)}


@pytest.mark.parametrize("kind", ["biases", "no biases", "linen", "encoder"])
def test_the_network_computes_the_same(kind):
    x = TOKENS if kind == "encoder" else X
    if kind in ("linen", "encoder"):
        model = linen_model() if kind == "linen" else encoder()
    else:
        model = models.from_function(network, parameters(biases=kind == "biases"))
    graph = units.trace(model, x)
    rotated, scores = units.rotate_heads(graph, model, [x])
    tolerance = 1e-5 if kind == "encoder" else 1e-11
    np.testing.assert_allclose(rotated(x), model(x), rtol=tolerance, atol=tolerance)
    kernels = [x for x in jax.tree.leaves(model.params) if x.ndim == 3]
    turned = [x for x in jax.tree.leaves(rotated.params) if x.ndim == 3]
    assert all(np.abs(a - b).max() > 0.01 for a, b in zip(kernels, turned, strict=True))
    assert len(scores) == 2 * len(kernels) // 4
    for name, each in scores.items():
        assert graph.groups[name].size == len(each)
        assert (np.diff(each) <= 0).all()
        assert each[0] > 0


def test_the_scores_are_the_errors_of_the_best_dimensions():
    model = models.from_function(network, parameters(heads=1, shared=1))
    rotated, scores = units.rotate_heads(units.trace(model, X), model, [X[:5], X[5:]])
    p, q = model.params["attention"], rotated.params["attention"]
    of_keys, of_values = (scores[f"attention.{name}"] for name in ("query.kernel", "value.kernel"))

    def products(p, size):
        query, key = (
            X.reshape(-1, 6) @ p[part]["kernel"][:, 0, :size] + p[part]["bias"][0, :size]
            for part in ("query", "key")
        )
        return query @ (key - key.mean(0)).T

    for size in range(1, 4):
        error = np.mean((products(p, 3) - products(q, size)) ** 2)
        np.testing.assert_allclose(error, of_keys[size:].sum(), rtol=1e-6, atol=1e-9)
    # No products of two dimensions are nearer
    np.testing.assert_allclose(
        of_keys[2:].sum() * X.shape[0] ** 2 * X.shape[1] ** 2,
        np.sum(np.linalg.svd(products(p, 3), compute_uv=False)[2:] ** 2),
        rtol=1e-6, atol=1e-9,
    )  # fmt: skip

    def outputs(p, size):
        p = p | {"value": {name: x[..., :size] for name, x in p["value"].items()}}
        p["output"] = {"kernel": p["output"]["kernel"][:, :size]}
        return np.asarray(attention(p, X)).reshape(-1, 6)

    whole = outputs(p, 5)
    for size in range(1, 6):
        lost = whole - outputs(q, size)
        np.testing.assert_allclose(
            np.mean(np.sum((lost - lost.mean(0)) ** 2, 1)), of_values[size:].sum(), rtol=1e-6, atol=1e-9
        )
    left = np.linalg.svd(whole - whole.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.sum(left[3:] ** 2) / len(whole), of_values[3:].sum(), rtol=1e-6, atol=1e-9)


def test_both_kernels_of_a_dimension_are_of_one_length():
    model = models.from_function(network, parameters())
    p = units.rotate_heads(units.trace(model, X), model, [X]).model.params["attention"]
    value, output = p["value"], p["output"]["kernel"].reshape(2, 2, 5, 6)
    lengths = np.sqrt(np.sum(value["kernel"] ** 2, 0) + value["bias"] ** 2)
    np.testing.assert_allclose(lengths, np.sqrt(np.sum(output**2, (1, 3))), rtol=1e-6)


def test_dimensions_without_any_use_go_without_loss():
    p = parameters(heads=2, shared=1, size=3, value=5)
    attention = p["attention"]
    attention["key"]["kernel"][..., 2] = attention["key"]["kernel"][..., 0]  # two dimensions do the same
    attention["value"]["kernel"][..., 4] = attention["value"]["bias"][..., 4] = 0
    model = models.from_function(network, p)
    graph = units.trace(model, X)
    rotated, scores = units.rotate_heads(graph, model, [X])
    kept = {"attention.query.kernel#1": [0, 1], "attention.value.kernel": [0, 1, 2, 3]}
    assert all(scores[name][len(stay)] < 1e-9 * scores[name][0] for name, stay in kept.items())
    np.testing.assert_allclose(units.keep(graph, rotated, kept)(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [1, 2])
def test_the_scores_of_values_are_what_the_heads_outputs_lose(shared):
    """Also where two heads of queries have the same values: then each head's own error counts."""
    model = models.from_function(network, parameters(heads=2, shared=shared))
    rotated, scores = units.rotate_heads(units.trace(model, X), model, [X])
    p = rotated.params["attention"]

    def outputs(size):
        """What each head adds to the outputs: the others multiply with zero."""
        found = []
        for head in range(2):
            kernel = np.array(p["output"]["kernel"])
            kernel[1 - head], kernel[:, size:] = 0, 0
            found.append(np.asarray(attention(p | {"output": {"kernel": kernel}}, X)).reshape(-1, 6))
        return np.stack(found)

    whole = outputs(5)
    for size in range(5):
        lost = whole - outputs(size)
        lost -= lost.mean(1, keepdims=True)
        expected = scores["attention.value.kernel"][size:].sum()
        np.testing.assert_allclose(np.sum(lost**2) / whole.shape[1], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [1, 10])
def test_rotary_positions_are_refused(dtype, factor):
    """Also where attention hardly matters, and where the first batch has one position."""
    config = models.TransformerConfig(vocabulary=50, width=8, layers=2, heads=2, kv_heads=1, hidden=16)
    model = models.build_transformer(config, jax.random.key(0))
    model = model.replace(params=jax.tree.map(lambda x: jnp.asarray(factor * x, dtype), model.params))
    one = {name: values[:, :1] for name, values in TOKENS.items()}
    with pytest.raises(ValueError, match="rotary positions"):
        units.rotate_heads(units.trace(model, TOKENS), model, [one, TOKENS])


@pytest.mark.parametrize("normed", [False, True])
def test_norms_of_queries_are_refused_and_factors_of_scores_are_not(normed):
    def fn(p, x):
        query = jnp.einsum("btw,whd->bthd", x, p["query"]["kernel"])
        if normed:
            query /= jnp.sqrt(jnp.mean(query**2, -1, keepdims=True))
        key, value = (jnp.einsum("btw,whd->bthd", x, p[part]["kernel"]) for part in ("key", "value"))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(3))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return jnp.einsum("bthd,hdw->btw", mixed, p["output"]["kernel"])

    model = models.from_function(fn, parameters(shared=1, biases=False)["attention"])
    graph = units.trace(model, X)
    if normed:
        with pytest.raises(ValueError, match="more with queries and keys than to multiply them"):
            units.rotate_heads(graph, model, [X])
        return
    rotated, scores = units.rotate_heads(graph, model, [X])
    small = units.keep(graph, rotated, {name: [0, 1] for name in scores})
    silent = units.silence(graph, rotated, {name: [0, 1] for name in scores})
    np.testing.assert_allclose(small(X), silent(X), atol=1e-9)  # the network's own factor of the scores stays


def test_refusals():
    plain = models.from_function(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": np.ones((6, 3)), "b": np.ones((3, 2))}
    )
    with pytest.raises(ValueError, match="no part of its parameters is attention"):
        units.rotate_heads(units.trace(plain, X), plain, [X])
    model = models.from_function(network, parameters())
    graph = units.trace(model, X)
    with pytest.raises(ValueError, match="at least one batch"):
        units.rotate_heads(graph, model, [])
    with pytest.raises(ValueError, match="not finite"):
        units.rotate_heads(graph, model, [X * np.nan])

"""A network cut in two, a code between its halves, and codes as bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.compress import codes
from distill_jax.features import capture, resume
from distill_jax.models import build, compose

SHAPE = (8, 8, 1)
X = np.random.default_rng(0).normal(size=(40, *SHAPE)).astype("f4")


@pytest.mark.parametrize(
    ("description", "name"), [("mlp:12,7", "dense.1"), ("convnet:4,8", "hidden"), ("resnet8", "stages.1")]
)
def test_two_halves_are_the_whole(description, name):
    model = build(description, SHAPE, 10, jax.random.key(0))

    @jax.jit
    def both(x):
        outputs, values = capture(model, name)(x)
        return outputs, resume(model, name, x[0])(values[name])

    outputs, again = both(X[:3])
    np.testing.assert_allclose(outputs, again, rtol=1e-5, atol=1e-6)


def test_a_cut_that_a_connection_passes_by_is_refused():
    model = build("resnet8", SHAPE, 10, jax.random.key(0))
    inside = resume(model, "stages.1.blocks.0.conv1", X[0])
    with pytest.raises(ValueError, match=r"do not follow from 'stages.1.blocks.0.conv1' alone"):
        jax.eval_shape(inside, jax.ShapeDtypeStruct((2, 4, 4, 32), jnp.float32))
    with pytest.raises(ValueError, match="no value is named 'nope', only"):
        jax.eval_shape(resume(model, "nope", X[0]), X[:2])
    with pytest.raises(ValueError, match=r"the shape of 'head', \(2, 10\), got \(2, 4\)"):
        jax.eval_shape(resume(model, "head", X[0]), jnp.zeros((2, 4)))


def test_a_decoder_as_wide_as_the_layer_can_be_exact():
    """With the layer's principal components as the code, the outputs are the original's."""
    model = build("mlp:12,7", SHAPE, 10, jax.random.key(0))
    decoder = codes.make_decoder(model, "dense.1", X, 7)
    assert sorted(decoder.params["rest"]) == ["dense.2.bias", "dense.2.kernel"]
    outputs, values = capture(model, "dense.1")(X)
    lift = decoder.params["lift"]
    code = (values["dense.1"] - lift["bias"]) @ np.linalg.inv(lift["kernel"])
    np.testing.assert_allclose(np.std(code, 0), 0.5, rtol=1e-3)
    decoded = decoder(code)
    np.testing.assert_allclose(decoded, outputs, atol=1e-4)


def test_the_first_components_are_the_best_code():
    model = build("convnet:4,8", SHAPE, 10, jax.random.key(0))
    decoder = codes.make_decoder(model, "hidden", X, 3)
    _, values = capture(model, "hidden")(X)
    kernel = np.asarray(decoder.params["lift"]["kernel"], float)
    centred = np.asarray(values["hidden"] - decoder.params["lift"]["bias"], float)
    left = centred - centred @ np.linalg.pinv(kernel) @ kernel
    tail = np.linalg.svd(centred, compute_uv=False)[3:]
    np.testing.assert_allclose(np.sum(left**2), np.sum(tail**2), rtol=1e-4)
    with pytest.raises(ValueError, match="width must be 1 to the size of the value 'hidden', 128"):
        codes.make_decoder(model, "hidden", X, 129)
    with pytest.raises(ValueError, match="not a pattern"):
        codes.make_decoder(model, "hid*", X, 3)


def test_decoders_cut_alike_have_equal_functions():
    model = build("mlp:12,7", SHAPE, 10, jax.random.key(0))
    first, second = (codes.make_decoder(model, "dense.1", x, 4) for x in (X, X[20:]))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
    assert stacked.params["lift"]["kernel"].shape == (2, 4, 7)
    assert hash(first.apply_fn) == hash(second.apply_fn)
    assert first.apply_fn != codes.make_decoder(model, "dense.0", X, 4).apply_fn


def test_a_split_network_and_an_autoencoder_are_models():
    model = build("mlp:12,7", SHAPE, 10, jax.random.key(0))
    encoder = build("mlp:5", SHAPE, 4, jax.random.key(1))
    decoder = codes.make_decoder(model, "dense.1", X, 4)
    both = compose(encoder, decoder, code=lambda values: codes.quantise(values, bits=3))
    outputs, after = jax.jit(lambda model, x: model.apply(x))(both, X)
    assert outputs.shape == (40, 10)
    assert jax.tree.structure(after) == jax.tree.structure(both.state)
    # What is sent, as bytes, is all that the decoder needs
    code = codes.quantise(encoder(X), bits=3)
    received = codes.unpack(codes.pack(code, bits=3), (4,), bits=3)
    np.testing.assert_allclose(decoder(received), outputs, atol=1e-4)
    heads = [build(f"mlp:{h}", (1, 1, 4), n, jax.random.key(2)) for h, n in ((6, 10), (9, 64))]
    both = codes.with_inputs(*heads)
    y, x = both(code)
    assert (y.shape, x.shape) == ((40, 10), (40, 64))
    assert x.min() > 0
    assert x.max() < 1
    np.testing.assert_array_equal(codes.outputs_only(both)(code), y)


@pytest.mark.parametrize(("width", "bits"), [(4, 2), (3, 5), (16, 8), (1, 16), (5, 1)])
def test_codes_are_sent_in_as_many_bits_as_they_have(width, bits):
    values = 2 * jax.random.normal(jax.random.key(0), (50, width))
    code = codes.quantise(values, bits=bits)
    assert len(np.unique(code)) <= 2**bits
    assert np.abs(code - np.tanh(values)).max() <= 1 / (2**bits - 1) + 1e-6
    sent = codes.pack(code, bits=bits)
    assert sent.dtype == np.uint8
    assert sent.shape == (50, -(-width * bits // 8))
    np.testing.assert_allclose(codes.unpack(sent, (width,), bits=bits), code, atol=2e-7)
    half = codes.quantise(values.astype(jnp.bfloat16), bits=bits)
    np.testing.assert_allclose(
        codes.unpack(codes.pack(half, bits=bits), (width,), bits=bits), half, atol=2e-7
    )
    gradient = jax.grad(lambda v: codes.quantise(v, bits=bits).sum())(values)
    np.testing.assert_allclose(gradient, 1 - np.tanh(values) ** 2, rtol=1e-4, atol=1e-6)


def test_wrong_bits_and_bytes_are_refused():
    with pytest.raises(ValueError, match="bits must be 1 to 16, got 0"):
        codes.quantise(jnp.zeros(3), bits=0)
    with pytest.raises(ValueError, match=r"3 bytes per example, got an array of shape \(2, 4\)"):
        codes.unpack(np.zeros((2, 4), np.uint8), (6,), bits=4)
    for code in (np.full((1, 2), 1.2), np.full((1, 2), 0.1), np.full((1, 2), np.nan)):
        with pytest.raises(ValueError, match=r"what quantise\(…, bits=3\) returned"):
            codes.pack(code, bits=3)

"""A network cut in two, and a code between its halves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.compress import bottleneck, linear_codes
from distill_jax.features.capturing import capture, resume
from distill_jax.models import build

SHAPE = (8, 8, 1)
X = np.random.default_rng(0).normal(size=(40, *SHAPE)).astype("f4")


@pytest.mark.parametrize(
    ("description", "name"), [("mlp:12,7", "dense.1"), ("convnet:4,8", "hidden"), ("resnet8", "stages.1")]
)
def test_two_halves_are_the_whole(description, name):
    model = build(description, SHAPE, 10, jax.random.key(0))

    @jax.jit
    def both(x):
        (outputs, values), _ = capture(model.apply_fn, name)(*model[1:], x)
        rest = resume(model.apply_fn, name, x[0])
        return outputs, rest(*model[1:], values[name])[0]

    outputs, again = both(X[:3])
    np.testing.assert_allclose(outputs, again, rtol=1e-5, atol=1e-6)


def test_a_cut_that_a_connection_passes_by_is_refused():
    model = build("resnet8", SHAPE, 10, jax.random.key(0))
    inside = resume(model.apply_fn, "stages.1.blocks.0.conv1", X[0])
    with pytest.raises(ValueError, match=r"do not follow from 'stages.1.blocks.0.conv1' alone"):
        jax.eval_shape(inside, *model[1:], jax.ShapeDtypeStruct((2, 4, 4, 32), jnp.float32))
    with pytest.raises(ValueError, match="no value is named 'nope', only"):
        jax.eval_shape(resume(model.apply_fn, "nope", X[0]), *model[1:], X[:2])
    with pytest.raises(ValueError, match=r"the shape of 'head', \(2, 10\), got \(2, 4\)"):
        jax.eval_shape(resume(model.apply_fn, "head", X[0]), *model[1:], jnp.zeros((2, 4)))


def test_a_decoder_as_wide_as_the_layer_can_be_exact():
    """With the layer's principal components as the code, the outputs are the original's."""
    model = build("mlp:12,7", SHAPE, 10, jax.random.key(0))
    decoder = bottleneck.decoder(model, "dense.1", X, 7)
    assert sorted(decoder.params["rest"]) == ["dense.2.bias", "dense.2.kernel"]
    (outputs, values), _ = capture(model.apply_fn, "dense.1")(*model[1:], X)
    lift = decoder.params["lift"]
    code = (values["dense.1"] - lift["bias"]) @ np.linalg.inv(lift["kernel"])
    np.testing.assert_allclose(np.std(code, 0), 0.5, rtol=1e-3)
    decoded, _ = decoder.apply_fn(decoder.params, decoder.model_state, code)
    np.testing.assert_allclose(decoded, outputs, atol=1e-4)


def test_the_first_components_are_the_best_code():
    model = build("convnet:4,8", SHAPE, 10, jax.random.key(0))
    decoder = bottleneck.decoder(model, "hidden", X, 3)
    (_, values), _ = capture(model.apply_fn, "hidden")(*model[1:], X)
    kernel = np.asarray(decoder.params["lift"]["kernel"], float)
    centred = np.asarray(values["hidden"] - decoder.params["lift"]["bias"], float)
    left = centred - centred @ np.linalg.pinv(kernel) @ kernel
    tail = np.linalg.svd(centred, compute_uv=False)[3:]
    np.testing.assert_allclose(np.sum(left**2), np.sum(tail**2), rtol=1e-4)
    with pytest.raises(ValueError, match="width must be 1 to the size of the value 'hidden', 128"):
        bottleneck.decoder(model, "hidden", X, 129)
    with pytest.raises(ValueError, match="not a pattern"):
        bottleneck.decoder(model, "hid*", X, 3)


def test_a_split_network_and_an_autoencoder_are_models():
    model = build("mlp:12,7", SHAPE, 10, jax.random.key(0))
    encoder = build("mlp:5", SHAPE, 4, jax.random.key(1))
    decoder = bottleneck.decoder(model, "dense.1", X, 4)
    apply_fn = jax.jit(
        linear_codes.compose(
            encoder.apply_fn, decoder.apply_fn, code=lambda v: linear_codes.quantise(v, bits=3)
        )
    )
    params = {"encoder": encoder.params, "decoder": decoder.params}
    state = {"encoder": encoder.model_state, "decoder": decoder.model_state}
    outputs, after = apply_fn(params, state, X)
    assert outputs.shape == (40, 10)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    # What is sent, as bytes, is all that the decoder needs
    code = linear_codes.quantise(encoder.apply_fn(encoder.params, {}, X)[0], bits=3)
    received = linear_codes.unpack(linear_codes.pack(code, bits=3), (4,), bits=3)
    np.testing.assert_allclose(decoder.apply_fn(decoder.params, {}, received)[0], outputs, atol=1e-4)
    heads = [build(f"mlp:{h}", (1, 1, 4), n, jax.random.key(2)) for h, n in ((6, 10), (9, 64))]
    both = bottleneck.with_inputs(heads[0].apply_fn, heads[1].apply_fn)
    params = {"outputs": heads[0].params, "inputs": heads[1].params}
    state = {"outputs": {}, "inputs": {}}
    (y, x), _ = both(params, state, code)
    assert (y.shape, x.shape) == ((40, 10), (40, 64))
    assert x.min() > 0
    assert x.max() < 1
    only, _ = bottleneck.outputs_only(both)(params, state, code)
    np.testing.assert_array_equal(only, y)

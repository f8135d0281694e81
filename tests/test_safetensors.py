"""Arrays of models in files of safetensors: back bit for bit, and refused by name where they do not fit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from distill_jax import models
from distill_jax.compress import low_rank, quantisation
from distill_jax.models import _safetensors

safetensors = pytest.importorskip("safetensors.numpy")
BITS = np.random.default_rng(0).integers(0, 256, (4, 6, 8), np.uint8)
DTYPES = [
    dtype for name, dtype in _safetensors.DTYPES.items()
    if name != "BOOL" and jax.dtypes.canonicalize_dtype(dtype) == dtype
]  # fmt: skip


def dense(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def filled(model):
    """The same model, with other values."""
    return model.replace(
        params=jax.tree.map(jnp.zeros_like, model.params), state=jax.tree.map(jnp.zeros_like, model.state)
    )


def test_all_dtypes_and_containers_come_back_bit_for_bit(tmp_path):
    params = {
        "any": [jnp.asarray(BITS.view(dtype)) for dtype in DTYPES],
        "turned": (np.arange(6.0, dtype="f4").reshape(2, 3).T,),
        "nested": {1: {"a b": jnp.array(True), "ü": np.float32("nan")}, 2: np.zeros((0, 3), "f4"), 3: None},
    }
    assert {"bfloat16", "float8_e4m3fn", "complex64", "float16"} <= {dtype.name for dtype in DTYPES}
    model = models.Model(lambda p, s, x, *, key=None: (x, s), params, {"norm": {"mean": jnp.arange(3)}})
    path = tmp_path / "a.safetensors"
    models.save_safetensors(path, model)
    first = path.read_bytes()
    loaded = models.load_safetensors(path, filled(model))
    same((loaded.params, loaded.state), jax.tree.map(jnp.asarray, (model.params, model.state)))
    assert set(_safetensors.read(path)) >= {
        "params.any.0",
        "params.nested.1.a b",
        "state.norm.mean",
        "params.turned.0",
    }
    models.save_safetensors(path, loaded)  # over the older one
    assert path.read_bytes() == first


def test_quantised_and_factorised_models_come_back(tmp_path):
    x = np.random.default_rng(1).normal(size=(9, 4)).astype("f4")
    model = models.from_function(dense, {"a": x[:4, :3].copy(), "b": x[:3, :2].copy()})
    for small in (
        quantisation.quantise(model, [x], activations=True, bits={"a": 4, "b": 8}),
        low_rank.factorise(model, low_rank.kernels(model, x), {"a": 1}),
    ):
        models.save_safetensors(tmp_path / "m", small)
        loaded = models.load_safetensors(tmp_path / "m", filled(small))
        same(loaded, small)
        np.testing.assert_array_equal(loaded(x), small(x))
    other = quantisation.quantise(model, [x])
    with pytest.raises(ValueError, match=r"m lacks 4 tensors, such as params\.a\.scale"):
        models.load_safetensors(tmp_path / "m", other)


def test_what_does_not_fit_is_named(tmp_path):
    model = models.from_function(dense, {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))})
    path = tmp_path / "m.safetensors"
    models.save_safetensors(path, model)

    def changed(**params):
        return model.replace(params={**model.params, **params})

    for other, message in (
        (changed(c=jnp.ones(1)), r"m\.safetensors lacks 1 tensor, such as params\.c"),
        (
            model.replace(params={"a": jnp.ones((2, 3))}),
            r"holds, beyond the model, 1 tensor, such as params\.b",
        ),
        (
            changed(b=jnp.ones((2, 3))),
            r"params\.b of .*m\.safetensors is F32 \(3, 2\), expected float32 \(2, 3\)",
        ),
        (changed(b=jnp.ones((3, 2), jnp.bfloat16)), r"params\.b of .* is F32 \(3, 2\), expected bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load_safetensors(path, other)
    for wrong, message in (
        ({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, r"two arrays would have the name params\.a\.b"),
        (
            {"a": [jnp.ones(2), jnp.ones(2, ml_dtypes.int4)]},
            r"params\.a\.1 is int4, which safetensors files cannot hold",
        ),
        ({"a": jax.random.key(0)}, r"params\.a is key<fry>, which safetensors files cannot hold"),
    ):
        with pytest.raises(ValueError, match=message):
            models.save_safetensors(path, model.replace(params=wrong))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"is damaged or truncated: its tensor params\.b ends at byte 48"):
        models.load_safetensors(path, model)
    with pytest.raises(ValueError, match="does not exist"):
        models.load_safetensors(tmp_path / "none", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="exists and is no file of safetensors"):
        models.save_safetensors(tmp_path / "text", model)
    models.save_safetensors(path, model)  # over the damaged one
    assert path.read_bytes() == whole

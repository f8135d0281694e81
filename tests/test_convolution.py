"""The parts of convolutional networks that have gradients of their own: equal to the plain formulas'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distill_jax.models import convolution
from distill_jax.models.convnet import max_pool_2x2
from distill_jax.models.convolution import conv_general_dilated
from distill_jax.models.layers import BatchNorm

NHWC = ("NHWC", "HWIO", "NHWC")


def arrays(images, kernel, dtype=jnp.float32):
    a, b = jax.random.split(jax.random.key(0))
    return jax.random.normal(a, images, dtype), jax.random.normal(b, kernel, dtype)


def everything(convolve, x, w):
    """Value, gradients, second derivatives in both modes, and gradients of stacked kernels and images."""

    def loss(x, w):
        return jnp.sum(jnp.sin(convolve(x, w).astype(jnp.float32)))

    gradients = jax.grad(loss, (0, 1))

    def norm(w):
        return sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients(x, w))

    return {
        "value": convolve(x, w),
        "gradients": gradients(x, w),
        "reverse over reverse": jax.grad(norm)(w),
        "forward over reverse": jax.jvp(gradients, (x, w), (w.sum() * x, x.sum() * w))[1],
        "stacked kernels": jax.vmap(gradients, (None, 0))(x, jnp.stack([w, -w])),
        "stacked images": jax.vmap(gradients, (0, None))(jnp.stack([x, -x]), w),
    }


@pytest.mark.parametrize(
    ("images", "kernel", "options"),
    [
        ((5, 6, 6, 3), (3, 3, 3, 4), {"padding": "SAME"}),
        ((9, 5, 7, 2), (3, 2, 2, 3), {"window_strides": (2, 1), "padding": ((1, 1), (2, 0))}),
        ((3, 9, 9, 2), (3, 3, 2, 4), {"window_strides": (2, 2), "rhs_dilation": (2, 1)}),
        ((7, 6, 6, 1), (3, 3, 1, 2), {"padding": ((-1, 0), (1, 1))}),
        ((7, 6, 6, 4), (1, 1, 4, 2), {"window_strides": (2, 2)}),
        ((4, 6, 6, 4), (3, 3, 2, 2), {"feature_group_count": 2}),
        ((4, 6, 6, 2), (3, 3, 2, 2), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}),
        ((4, 6, 2), (3, 2, 2), {"dimension_numbers": ("NHC", "HIO", "NHC"), "window_strides": (1,)}),
        ((4, 2, 6, 6), (3, 3, 2, 2), {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}),
    ],
)
def test_equals_jax_in_all_derivatives(images, kernel, options, monkeypatch):
    monkeypatch.setattr(convolution, "_ROWS", 64)  # groups of a few examples, the first one not full
    monkeypatch.setattr(convolution, "_PATCH_BYTES", 4096)
    options = {"window_strides": (1, 1), "padding": "VALID", "dimension_numbers": NHWC} | options
    x, w = arrays(images, kernel)
    ours, jaxs = (
        jax.jit(functools.partial(everything, functools.partial(conv, **options)))(x, w)
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(jaxs), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * scale, err_msg=jax.tree_util.keystr(path))


def weight_gradient(x, w):
    def loss(w):
        return jnp.sum(jnp.sin(conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)))

    return jax.grad(loss)(w)


def test_is_a_sum_of_products_on_a_cpu_alone():
    x, w = arrays((130, 4, 4, 2), (3, 3, 2, 3))
    count = {
        platform: jax.jit(weight_gradient).trace(x, w).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert {name: text.count("stablehlo.convolution") for name, text in count.items()} == {
        "cpu": 1, "cuda": 2, "tpu": 2,
    }  # fmt: skip
    exported = jax.export.export(jax.jit(weight_gradient), platforms=("cpu", "cuda"))(x, w)
    np.testing.assert_allclose(exported.call(x, w), weight_gradient(x, w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_leaves_narrow_dtypes_to_jax(dtype):
    x, w = arrays((2, 4, 4, 2), (3, 3, 2, 3), dtype)
    convolve = functools.partial(conv_general_dilated, window_strides=(1, 1), padding="SAME")
    (eqn,) = jax.make_jaxpr(functools.partial(convolve, dimension_numbers=NHWC))(x, w).eqns
    assert eqn.primitive is lax.conv_general_dilated_p


def test_gradients_of_a_sharded_batch():
    x, w = arrays((12, 4, 4, 2), (3, 3, 2, 3))
    expected = jax.jit(weight_gradient)(x, w)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    sharded = jax.jit(weight_gradient)(jax.device_put(x, rows), w)
    np.testing.assert_allclose(sharded, expected, rtol=1e-5, atol=1e-5)

    def of_shard(x, w):
        w = lax.pcast(w, "batch", to="varying")
        return lax.psum(weight_gradient(x, w), "batch")

    specs = PartitionSpec("batch"), PartitionSpec()
    mapped = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))(x, w)
    np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-5)


def test_linen_takes_it():
    x, _ = arrays((2, 6, 6, 3), (1,))
    layer, usual = (linen.Conv(4, (3, 3), conv_general_dilated=conv) for conv in (conv_general_dilated, None))
    params = layer.init(jax.random.key(1), x)
    np.testing.assert_array_equal(layer.apply(params, x), usual.apply(params, x))


def both_modes(function, *arguments):
    """The gradients, and their derivative along the arguments in reverse and in forward mode."""

    def gradients(arguments):
        return jax.grad(lambda arguments: jnp.sum(jnp.sin(function(*arguments))))(arguments)

    def norm(arguments):
        return sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients(arguments)))

    return gradients(arguments), jax.grad(norm)(arguments), jax.jvp(gradients, (arguments,), (arguments,))[1]


def assert_close(ours, expected, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def test_max_pool_has_the_gradient_of_its_formula():
    def formula(x):
        x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        a, b, c, d = (x[:, i::2, j::2] for i in range(2) for j in range(2))
        return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))

    # Few values, so that there are ties of two, three and four pixels
    x = np.random.default_rng(0).integers(0, 3, (5, 7, 6, 2)).astype(np.float32)
    ours, expected = (jax.jit(functools.partial(both_modes, pool))(x) for pool in (max_pool_2x2, formula))
    assert_close(ours, expected, 1e-6)
    window = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool_2x2(x), window)


def test_batch_norm_has_the_gradient_of_its_formula():
    def run(kind, x, scale, bias):
        layer = kind(3, momentum=0.9, rngs=nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = scale, bias
        return layer(x), layer.mean[...], layer.var[...]

    x = 2 * np.random.default_rng(0).normal(size=(6, 3, 4, 3)).astype(np.float32) + 1
    arguments = x, jnp.array([1.0, 0.5, -2.0]), jnp.array([0.0, 0.3, -1.0])
    ours, expected = (
        jax.jit(lambda *a, kind=kind: (run(kind, *a), both_modes(lambda *a: run(kind, *a)[0], *a)))(
            *arguments
        )
        for kind in (BatchNorm, nnx.BatchNorm)
    )
    assert_close(ours, expected, 1e-5)

"""The parts of convolutional networks that have gradients of their own: equal to the plain formulas'."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from distill_jax.models.convnet import max_pool_2x2
from distill_jax.models.layers import BatchNorm


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

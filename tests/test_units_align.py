"""The order of units: it never changes what a network computes, and a lost one is found again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx
from test_units_architectures import (
    block,
    block_shapes,
    compiled,
    conv,
    dense,
    language_model,
    layer_norm,
    numbers,
    shapes,
)

from distill_jax import models, units


def network(model, shape):
    """A traced model: ``(fn, params with state, input)``."""

    def fn(p, x):
        return model.apply_fn(p["params"], p["state"], x)[0]

    params = numbers({"params": model.params, "state": model.model_state})
    return fn, params, numbers(np.zeros((2, *shape)), 5)


def mlp():
    return network(models.build("mlp:8,7", (3, 3, 1), 4, jax.random.key(0)), (3, 3, 1))


def convnet():
    module = models.ConvNet(
        (8, 8, 2), 3, channels=(4, 5), hidden=6, kernel=3, batch_norm=True, rngs=nnx.Rngs(0)
    )
    return network(models.from_nnx(module), (8, 8, 2))


def resnet():
    return network(models.build("resnet8:0.3", (8, 8, 2), 3, jax.random.key(0)), (8, 8, 2))


def transformer():
    norm = {"scale": (6,), "bias": (6,)}
    each = block_shapes(6, 4, 2, 3, 7)
    p = shapes(embedding=(11, 6), positions=(5, 6), block0=each, block1=each, norm=norm)
    return language_model, p, np.arange(10).reshape(2, 5)


def scanned():
    """Layers in a loop, and a recurrent kernel of which both axes are of one group."""
    p = shapes(first=(4, 6), loop={"w": (6, 5), "v": (5, 6)}, norm={"scale": (6,), "bias": (6,)})
    p |= shapes(recurrent=(6, 6), last=(6, 2))
    p["loop"] = jax.tree.map(lambda x: np.stack([x, -x[::-1]]), p["loop"])

    def fn(p, x):
        h, _ = jax.lax.scan(
            lambda h, q: (h + jnp.tanh(h @ q["w"]) @ q["v"], None), x @ p["first"], p["loop"]
        )
        h, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ p["recurrent"] + h), None), h, None, 3)
        return layer_norm(p["norm"], h) @ p["last"]

    return fn, p, numbers(np.zeros((2, 4)), 5)


def grouped():
    """A position of two groups, channels' groups and the places in them; channels first at the end."""
    p = shapes(a=(3, 3, 2, 6), b=(3, 3, 2, 9), w=(144, 7), v=(7, 3), c={"w": (7, 6), "b": (6,)})

    def fn(p, x):
        x = conv(p["b"], jnp.tanh(conv(p["a"], x)), groups=3)
        x = jnp.tanh(x.transpose(0, 3, 1, 2).reshape(len(x), -1) @ p["w"])
        gate, up = jnp.split(dense(p["c"], x), 2, -1)
        return (x @ p["v"]) * jax.nn.silu(gate) + up

    return fn, p, numbers(np.zeros((2, 4, 4, 2)), 5)


NETWORKS = {f.__name__: f for f in (mlp, convnet, resnet, transformer, scanned, grouped)}


def random_orders(graph, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: rng.permutation(graph.groups[name].size) for name in units.permutable(graph)
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_does_not_depend_on_the_order_and_a_lost_order_is_found(name):
    with jax.enable_x64(True):
        fn, params, x = NETWORKS[name]()
        graph = units.trace(fn, params, x)
        free = [name for name, group in graph.groups.items() if group.free]
        assert len(free) >= 2
        assert list(units.permutable(graph)) == free
        orders = random_orders(graph)
        shuffled = units.permute(graph, params, orders)
        expected = compiled(fn, params, x)
        np.testing.assert_allclose(
            compiled(fn, shuffled, x), expected, rtol=1e-5, atol=1e-9 * np.abs(expected).max()
        )
        changed = [
            not np.array_equal(a, b)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(shuffled), strict=True)
        ]
        assert sum(changed) > len(changed) / 2
        back = units.permute(graph, shuffled, units.match_weights(graph, shuffled, params))
        jax.tree.map(np.testing.assert_array_equal, back, params)

"""Wanda and SparseGPT: the authors' masks and weights, and what holds for any network."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_units_architectures import block, block_shapes, conv, numbers, shapes

from distill_jax.compress import one_shot, sparsity
from distill_jax.models import from_function

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("pruners.json").read_text())
METHODS = {"wanda": one_shot.wanda, "sparsegpt": one_shot.sparsegpt}


def mlp(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def amount(name):
    n, _, m = name.partition(":")
    return {"pattern": (int(n), int(m))} if m else {"sparsity": float(name)}


@pytest.mark.parametrize("method", METHODS)
def test_masks_and_weights_are_the_authors(method):
    rng = np.random.default_rng(20240626)  # as in golden/make_pruners.py
    x = (rng.normal(size=(60, 16)) @ rng.normal(size=(16, 16))).astype("f4")
    a, b = (rng.normal(size=shape).astype("f4") for shape in ((16, 24), (24, 5)))
    with jax.enable_x64(True):
        model = from_function(mlp, {"a": a.astype("f8"), "b": b.astype("f8")})
        for name, expected in GOLDEN.items():
            options = {"block": 8} if method == "sparsegpt" else {}
            done = METHODS[method](
                model, [x[:20].astype("f8"), x[20:].astype("f8")], **amount(name), **options
            )
            for path, weights in zip("ab", expected[method], strict=True):
                np.testing.assert_array_equal(
                    done.masks[path], np.array(weights) != 0, err_msg=f"{name} {path}"
                )
                np.testing.assert_allclose(done.model.params[path], weights, rtol=1e-6, atol=1e-8)


def images(p, x):
    x = jax.nn.relu(conv(p["a"], x))
    x = jax.nn.relu(conv(p["b"], x)).mean((1, 2))
    return x @ p["c"] + p["d"]


def attention(p, x):
    return block(p, x @ p["first"], causal=True) @ p["out"]


CASES = {
    "convolutions": (images, {"a": (3, 3, 2, 8), "b": (3, 3, 8, 4), "c": (4, 3), "d": (3,)}, (8, 5, 5, 2)),
    "attention": (attention, block_shapes(8, 4, 2, 4, 12) | {"first": (4, 8), "out": (8, 2)}, (10, 6, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_any_network(case):
    fn, given, shape = CASES[case]
    model, x = from_function(fn, shapes(**given)), numbers(np.zeros(shape), 1)
    model, x = jax.tree.map(lambda leaf: (leaf / 2).astype("f4"), (model, x))
    exclude = ["^a$", "c"] if case == "convolutions" else ["out"]
    errors = {}
    for name, method in METHODS.items():
        done = method(model, [x], pattern=(2, 4), exclude=exclude)
        masks = {path: m for path, m in done.masks.items() if not isinstance(m, dict | optax.MaskedNode)}
        assert set(masks) == (
            {"b"} if case == "convolutions" else set("qkvo") | {"gate", "up", "down", "first"}
        )
        for path, mask in masks.items():
            np.testing.assert_array_equal(np.asarray(done.model.params[path]) != 0, mask)
            # Neighbours along the last axis of the inputs
            axis = {"b": 2, "o": 1}.get(path, 0)
            groups = np.moveaxis(np.asarray(mask), axis, -1).reshape(-1, 4)
            np.testing.assert_array_equal(groups.sum(1), 2)
        errors[name] = done.errors
        tx = sparsity.frozen(optax.sgd(0.1), done.masks)
        state = tx.init(done.model.params)
        updates, _ = tx.update(jax.tree.map(jnp.ones_like, done.model.params), state, done.model.params)
        moved = optax.apply_updates(done.model.params, updates)
        np.testing.assert_array_equal(
            np.asarray(moved["b" if "b" in masks else "q"]) != 0, masks["b" if "b" in masks else "q"]
        )
    first = next(iter(errors["wanda"]))
    assert errors["sparsegpt"][first] < errors["wanda"][first]


def test_inputs_that_are_always_zero_are_no_loss():
    model = from_function(mlp, shapes(a=(6, 5), b=(5, 2)))
    x = numbers(np.zeros((30, 6)), 2)
    x[:, [1, 4, 5]] = 0
    for method in METHODS.values():
        done = method(model, [x], sparsity=0.5, exclude=["b"])
        assert done.errors["a"] < 1e-9
        assert not np.asarray(done.masks["a"])[[1, 4, 5]].any()

"""Thin factors for kernels: the same function at full rank, the best one below it, and really less."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from distill_jax import metrics
from distill_jax.compress import linear_codes, low_rank
from distill_jax.models import build, from_function, from_linen
from distill_jax.train.checkpoints import Checkpoints

SHAPE = (8, 8, 1)
RUN = jax.jit(lambda model, x: model(x))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Conv(6, (3, 3), strides=2)(x))
        x = linen.relu(linen.Conv(6, (3, 3), feature_group_count=2)(x))  # grouped: stays whole
        return linen.Dense(3)(x.reshape(x.shape[0], -1))


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda xw, g: (g @ xw[1].T, xw[0].T @ g))


def transposed(params, x):
    """Kernels ``[outputs, inputs]``, one on the left, one in half precision, with its own gradient."""
    x = jax.nn.tanh(jax.jit(lambda w, x: x @ w.T)(params["a"], x.reshape(x.shape[0], -1)))
    x = jax.vmap(lambda row: params["b"] @ row)(x)
    return product(x, params["c"].astype(jnp.bfloat16).astype(jnp.float32))


def plain_model():
    rng = np.random.default_rng(0)
    shapes = {"a": (20, 64), "b": (12, 20), "c": (12, 5)}
    params = {name: rng.normal(size=s).astype("f4") / 4 for name, s in shapes.items()}
    return from_function(transposed, params)


def images(n=80, seed=0):
    """Smooth images, so that their pixels are correlated."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, *SHAPE))
    for axis in (1, 2):
        x = x + np.roll(x, 1, axis) + np.roll(x, 2, axis)
    return x.astype("f4")


MODELS = {
    "mlp": lambda: build("mlp:24,16", SHAPE, 10, jax.random.key(0), dropout=0.3),
    "convnet": lambda: build("convnet:4,8", SHAPE, 10, jax.random.key(0)),
    "linen": lambda: from_linen(Linen(), jax.random.key(0), jnp.zeros((1, *SHAPE))),
    "plain": plain_model,
}
EXPECTED = {
    "mlp": [(64, 24), (24, 16), (16, 10)],
    "convnet": [(9, 4), (36, 8), (32, 128), (128, 10)],
    "linen": [(9, 6), (96, 3)],
    "plain": [(64, 20), (20, 12), (12, 5)],
}


@pytest.mark.parametrize("name", MODELS)
def test_at_full_rank_the_function_is_the_originals(name):
    """Which holds only if axes, paddings and strides are understood, of the factors and the rows."""
    model, x = MODELS[name](), images()
    kernels = low_rank.kernels(model, x)
    assert [(k.inputs, k.outputs) for k in kernels.values()] == EXPECTED[name]
    expected = RUN(model, x)
    full = {path: min(k.inputs, k.outputs) for path, k in kernels.items()}
    roots = low_rank.layer_roots(model, x, batch=48)
    for root in (None, roots):
        thin = low_rank.factorise(model, kernels, full, roots=root)
        assert low_rank.ranks_of(thin) == full
        outputs = RUN(thin, x)
        tolerance = 0.02 if name == "plain" else 1e-4  # bfloat16
        np.testing.assert_allclose(outputs, expected, atol=tolerance, rtol=tolerance)


def test_rows_times_kernel_are_the_layers_outputs():
    """Of a convolution, in the middle of a network and with its biases zero, and of a dense layer."""
    model, x = MODELS["convnet"](), images(20)
    kernels, roots = low_rank.kernels(model, x), low_rank.layer_roots(model, x)
    first = np.asarray(model.params["convolution"][0]["kernel"], float)
    values = jax.lax.conv_general_dilated(
        x, first, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    path = "convolution.0.kernel"
    energy = linear_codes.optimum(kernels[path].matrix(first), roots[path])[0]
    np.testing.assert_allclose(energy, np.mean(np.sum(np.square(values), -1)), rtol=1e-5)
    assert kernels[path].positions == 64
    assert kernels["hidden.kernel"].positions == 1
    assert roots["convolution.1.kernel"].shape == (36, 36)


def test_whitened_factors_lose_less_on_the_data():
    model, x = MODELS["mlp"](), images(300)
    kernels = low_rank.kernels(model, x)
    roots = low_rank.layer_roots(model, x)
    expected = model(x)
    for rank in (2, 5, 8):
        lost = []
        for root in (None, roots):
            thin = low_rank.factorise(model, kernels, {"dense.0.kernel": rank}, roots=root)
            factors = thin.params["dense"][0]["kernel"]
            first = [factors.encoder, factors.decoder]
            flat = x.reshape(300, -1)
            exact = flat @ model.params["dense"][0]["kernel"]
            lost.append(float(np.square(flat @ first[0] @ first[1] - exact).sum(1).mean()))
            assert RUN(thin, x).shape == expected.shape
        best = linear_codes.optimum(kernels["dense.0.kernel"].matrix(model.params["dense"][0]["kernel"]),
                             roots["dense.0.kernel"])  # fmt: skip
        np.testing.assert_allclose(lost[1], best[rank], rtol=1e-3)
        assert lost[1] < lost[0]


@pytest.mark.parametrize("of", ["parameters", "flops"])
@pytest.mark.parametrize("budget", [0.15, 0.4, 1.0])
def test_ranks_keep_the_budget_and_use_it(of, budget):
    model = build("convnet:8,16", SHAPE, 10, jax.random.key(0))
    x = images(200)
    kernels, roots = low_rank.kernels(model, x), low_rank.layer_roots(model, x)
    ranks = low_rank.allocate(model, kernels, budget, of=of, roots=roots)
    thin = low_rank.factorise(model, kernels, ranks, roots=roots)

    def size(model):
        if of == "parameters":
            return sum(leaf.size for leaf in jax.tree.leaves(model.params))
        thins = low_rank.ranks_of(model)
        return sum(
            k.positions * min(k.inputs * k.outputs, thins.get(p, 10**9) * (k.inputs + k.outputs))
            for p, k in kernels.items()
        )

    share = size(thin) / size(model)
    assert share <= budget
    dearest = max(k.positions * (k.inputs + k.outputs) for k in kernels.values())
    unit = dearest if of == "flops" else max(k.inputs + k.outputs for k in kernels.values())
    # What is left is less than a direction costs, unless a kernel would have to become whole
    assert share == 1 if budget == 1 else share >= budget - 8 * unit / size(model)
    assert all(1 <= rank < min(kernels[p].inputs, kernels[p].outputs) for p, rank in ranks.items())


def test_a_kernel_of_zeros_takes_nothing_from_the_others():
    model = plain_model()
    kernels = low_rank.kernels(model, jnp.ones((1, *SHAPE)))
    without = model.replace(params={**model.params, "b": 0 * model.params["b"]})
    ranks = low_rank.allocate(without, kernels, 0.5)
    assert ranks["b"] == 1
    assert ranks["a"] > 5


def test_flops_fall_and_gradients_reach_every_factor():
    model, x = MODELS["mlp"](), images()
    kernels = low_rank.kernels(model, x)
    thin = low_rank.factorise(model, kernels, {"dense.0.kernel": 4, "dense.1.kernel": 3})
    before, after = metrics.costs([model, thin], x[0], repeats=1)
    assert after["parameters"] == before["parameters"] - 64 * 24 - 24 * 16 + 4 * 88 + 3 * 40
    saved = 2 * (before["parameters"] - after["parameters"])
    assert abs(before["flops"] - after["flops"] - saved) < 0.1 * saved

    def loss(model, key):
        return jnp.square(model.apply(x, key=key)[0]).mean()

    key = jax.random.key(0)
    value, gradient = jax.jit(jax.value_and_grad(loss))(thin, key)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))
    assert value != jax.jit(loss)(thin, jax.random.key(1))  # dropout


def test_saved_and_reloaded_in_a_fresh_process(tmp_path):
    model, x = MODELS["convnet"](), images(4)
    kernels = low_rank.kernels(model, x)
    ranks = {"convolution.1.kernel": 3, "hidden.kernel": 5}
    thin = low_rank.factorise(model, kernels, ranks)
    with Checkpoints(tmp_path / "thin") as checkpoints:
        checkpoints.save(1, {"params": thin.params}, {"ranks": low_rank.ranks_of(thin)})
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", thin(x))
    program = """
import sys, jax, numpy as np
from pathlib import Path
from distill_jax import models
from distill_jax.compress import low_rank
from distill_jax.train.checkpoints import Checkpoints
folder = Path(sys.argv[1])
x = np.load(folder / "x.npy")
model = models.build("convnet:4,8", (8, 8, 1), 10, jax.random.key(7))
kernels = low_rank.kernels(model, x)
like = low_rank.factorise(model, kernels, {"convolution.1.kernel": 3, "hidden.kernel": 5})
with Checkpoints(folder / "thin") as checkpoints:
    tree, info = checkpoints.restore({"params": like.params})
thin = like.replace(**tree)
assert info["ranks"] == low_rank.ranks_of(thin)
np.testing.assert_allclose(thin(x), np.load(folder / "y.npy"), atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=300)


def test_a_factorised_model_can_be_factorised_further():
    model, x = MODELS["mlp"](), images(8)
    kernels = low_rank.kernels(model, x)
    once = low_rank.factorise(model, kernels, {"dense.0.kernel": 4})
    twice = low_rank.factorise(once, kernels, {"dense.1.kernel": 3})
    both = low_rank.factorise(model, kernels, {"dense.0.kernel": 4, "dense.1.kernel": 3})
    assert jax.tree.structure(twice) == jax.tree.structure(both)
    np.testing.assert_allclose(RUN(twice, x), RUN(both, x), rtol=1e-5)


def test_errors():
    model, x = MODELS["mlp"](), images(8)
    kernels = low_rank.kernels(model, x)
    with pytest.raises(ValueError, match=r"no kernel is named 'dense'"):
        low_rank.factorise(model, kernels, {"dense": 1})
    with pytest.raises(ValueError, match=r"dense.0.kernel: rank must be 1 to .* 24, got 25"):
        low_rank.factorise(model, kernels, {"dense.0.kernel": 25})
    with pytest.raises(ValueError, match="budget: ranks of 1 already exceed"):
        low_rank.allocate(model, kernels, 0.05)
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got 0"):
        low_rank.allocate(model, kernels, 0)
    broken = jax.tree.map(lambda p: p * jnp.nan, model)
    with pytest.raises(ValueError, match=r"the inputs of dense.1.kernel are not finite"):
        low_rank.layer_roots(broken, x)

    tied = from_function(lambda params, x: x @ params["w"] + params["w"].sum(), {"w": jnp.ones((4, 3))})
    assert low_rank.kernels(tied, jnp.ones((2, 4))) == {}
    forced = {"w": low_rank.Kernel((4, 3), (0, 1), 1.0)}
    thin = low_rank.factorise(tied, forced, {"w": 1})
    with pytest.raises(ValueError, match="w is used by 'reduce_sum'"):
        thin(jnp.ones((2, 4)))

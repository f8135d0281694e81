"""Models on disk: what runs in a process that has not their code, and what is refused."""

import os
import subprocess
import sys
import warnings
import zipfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from distill_jax import models, train
from distill_jax.compress import low_rank, quantisation, units

SHAPE = (8, 8, 2)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.dense, self.head = nnx.Linear(96, 12, rngs=rngs), nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.avg_pool(x, (2, 2), (2, 2)).reshape(x.shape[0], -1)
        return self.head(self.drop(nnx.relu(self.dense(x))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Conv(4, (3, 3), strides=2)(x))
        x = linen.Dropout(0.2, deterministic=not train)(linen.relu(x).reshape(x.shape[0], -1))
        return linen.Dense(3)(x)


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.relu(linen.Dense(10)(x.reshape(x.shape[0], -1))))


X = np.random.default_rng(0).normal(size=(6, *SHAPE)).astype("f4")


def pruned():
    """Half the units of an NNX convnet with BatchNorm and dropout."""
    model = models.from_nnx(NnxNet(nnx.Rngs(0)))
    graph = units.trace(model, X[:1])
    return units.keep(graph, model, units.prune(graph, units.scores.l2(graph, model), 0.5))


def shrunk():
    """Half the units of a Linen network, whose code knows its widths."""
    model = models.from_linen(LinenMLP(), jax.random.key(0), X[:1])
    graph = units.trace(model, X[:1])
    return units.keep(graph, model, units.prune(graph, units.scores.l2(graph, model), 0.5))


def factorised():
    model = models.from_nnx(NnxNet(nnx.Rngs(0)))
    return low_rank.factorise(model, low_rank.kernels(model, X), {"conv.kernel": 3, "dense.kernel": 4})


MODELS = {
    "pruned": pruned,
    "linen": lambda: models.from_linen(LinenNet(), jax.random.key(0), X[:1]),
    "shrunk": shrunk,
    "factorised": factorised,
    "quantised": lambda: quantisation.quantise(shrunk(), [X], activations=True, bits={"Dense_0": 4, "": 8}),
}

FRESH = """
import sys
import jax, numpy as np, optax
from distill_jax import models, train
folder = sys.argv[1]
x = np.load(folder + "/x.npy")
for path in sys.argv[2:]:
    model = models.load(f"{folder}/{path}.model")
    if path == "quantised":  # integers are not trained
        np.savez(f"{folder}/{path}.npz", outputs=jax.jit(lambda m, x: m(x))(model, x), two=model(x[:2]))
        continue
    tx = optax.sgd(0.1)
    step = jax.jit(train.make_train_step(train.supervised(), tx))
    state, metrics = step(train.init_state(model, tx, jax.random.key(3)), {"image": x, "label": np.arange(6) % 3})
    statistics = {f"after{i}": s for i, s in enumerate(jax.tree.leaves(state.model.state))}
    np.savez(f"{folder}/{path}.npz", outputs=jax.jit(lambda m, x: m(x))(model, x), two=model(x[:2]),
             loss=metrics["loss"], tuned=state.model(x), **statistics)
"""


@pytest.mark.filterwarnings("error")
def test_a_process_without_the_networks_code_runs_and_tunes_them(tmp_path):
    made = {name: make() for name, make in MODELS.items()}
    for name, model in made.items():
        models.save(tmp_path / f"{name}.model", model, X[:4])
    np.save(tmp_path / "x.npy", X)
    command = [sys.executable, "-c", FRESH, str(tmp_path), *made]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    tx = optax.sgd(0.1)
    step = jax.jit(train.make_train_step(train.supervised(), tx))
    for name, model in made.items():
        with np.load(tmp_path / f"{name}.npz") as file:
            found = dict(file)
        np.testing.assert_allclose(found["outputs"], model(X), rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(found["two"], model(X[:2]), rtol=1e-5, atol=1e-6)
        if name == "quantised":
            assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"int8", "uint8", "float32"}
            continue
        start = train.init_state(model, tx, jax.random.key(3))
        state, metrics = step(start, {"image": X, "label": np.arange(6) % 3})
        np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-5)  # dropout's mask, too
        np.testing.assert_allclose(found["tuned"], state.model(X), rtol=1e-4, atol=1e-5)
        assert np.abs(found["tuned"] - found["outputs"]).max() > 1e-3
        after = jax.tree.leaves(state.model.state)
        for i, statistic in enumerate(after):
            np.testing.assert_allclose(found[f"after{i}"], statistic, rtol=1e-4, atol=1e-6)
        if name != "shrunk":
            before = jax.tree.leaves(model.state)
            assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(after, before, strict=True))


def test_arrays_and_plain_containers_are_as_they_were(tmp_path):
    def fn(params, x):
        first, more = x
        small = params["list"][0].astype(jnp.float32) * params["tuple"][1][0]
        return {"y": first @ small, "pair": (more, None)}

    values = np.arange(6.0).reshape(2, 3) / 7
    params = {
        "list": [jnp.asarray(values, jnp.bfloat16), jnp.array([True, False])],
        "tuple": (jnp.arange(2, dtype=jnp.int8), [jnp.float32(2.5)], None),
        "none": {},
    }
    x = jnp.ones((3, 2)), jnp.arange(3)
    model = models.from_function(fn, params)
    models.save(tmp_path / "m", model, x)
    loaded = models.load(tmp_path / "m")
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    outputs = loaded(x)
    assert jax.tree.structure(outputs) == jax.tree.structure(model(x))
    np.testing.assert_allclose(outputs["y"], model(x)["y"], rtol=1e-6)
    # It can be saved again
    models.save(tmp_path / "m", loaded, x)
    np.testing.assert_allclose(models.load(tmp_path / "m")(x)["y"], outputs["y"], rtol=1e-6)
    with pytest.raises(ValueError, match="x must have the structure"):
        loaded(x[0])
    with pytest.raises(ValueError, match=r"x must be float32 \[batch, 2\], .* got float32 \[3, 5\]"):
        loaded((jnp.ones((3, 5)), x[1]))
    wrong = {**params, "list": [jnp.zeros((2, 4), jnp.bfloat16), params["list"][1]]}
    with pytest.raises(ValueError, match=r"\['params'\]\['list'\]\[0\] must be bfloat16 \(2, 3\)"):
        loaded.replace(params=wrong)(x)
    with pytest.raises(ValueError, match="params and state must have the structure that was saved"):
        loaded.replace(params={})(x)


def test_other_containers_become_dicts_and_keys_of_any_kind_work(tmp_path):
    model = factorised()
    models.save(tmp_path / "m", model, X)
    loaded = models.load(tmp_path / "m")
    factors = loaded.params["dense"]["kernel"]
    assert set(factors) == {"encoder", "decoder"}
    np.testing.assert_array_equal(factors["encoder"], model.params["dense"]["kernel"].encoder)
    for impl in ("threefry2x32", "rbg"):
        outputs, _ = loaded.apply(X, key=jax.random.key(1, impl=impl))
        assert outputs.shape == (6, 3)
    np.testing.assert_allclose(
        loaded.apply(X, key=jax.random.key(1))[0],
        model.apply(X, key=jax.random.key(1))[0],
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_program_of_one_batch_size_is_saved_with_a_warning(tmp_path):
    model = models.from_function(lambda w, x: x * w * float(len(x)), jnp.ones(2))
    with pytest.warns(UserWarning, match=r"saved for batches of the shapes of x, \[\(3, 2\)\]"):
        models.save(tmp_path / "m", model, jnp.ones((3, 2)))
    loaded = models.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded(jnp.ones((3, 2))), 3)
    with pytest.raises(ValueError, match=r"x must be float32 \[3, 2\]"):
        loaded(jnp.ones((4, 2)))


def test_a_pruned_model_with_statistics_is_saved_for_any_batch_size(tmp_path):
    model = models.from_linen(LinenNet(), jax.random.key(0), X[:1])
    graph = units.trace(model, X[:1])
    small = units.keep(graph, model, units.prune(graph, units.scores.l2(graph, model), 0.5))
    models.save(tmp_path / "m", small, X)
    loaded = models.load(tmp_path / "m")
    np.testing.assert_allclose(loaded(X[:5]), small(X[:5]), rtol=1e-5, atol=1e-6)
    given, wanted = (each.apply(X[:5], key=jax.random.key(1)) for each in (loaded, small))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), given, wanted)


def test_a_pruned_model_whose_examples_depend_on_each_other_is_saved_for_one_batch_size(tmp_path):
    def fn(p, x, mix):
        h = x @ p["a"]
        h = jnp.concatenate(
            [h[:, 1:], h[:, :1]], 1
        )  # with a symbolic size, JAX writes these slices as gathers
        return (jnp.cumsum(h, 0) if mix else h) @ p["b"] / p["a"].shape[1]

    x = np.ones((2, 3), "f4")
    for mix in (False, True):
        params = {"a": np.ones((3, 4), "f4"), "b": np.ones((4, 2), "f4")}
        model = models.from_function(partial(fn, mix=mix), params)
        graph = units.trace(model, x)
        small = units.keep(graph, model, {"a": [0, 2]})
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            models.save(tmp_path / "m", small, x)
        assert (
            any("the evaluation program is saved for batches" in str(each.message) for each in found) == mix
        )
        np.testing.assert_allclose(models.load(tmp_path / "m")(x), small(x), rtol=1e-6)


def test_a_model_without_a_training_mode_is_saved_without_it(tmp_path):
    def apply_fn(params, state, x, *, key=None):
        if key is not None:
            raise ValueError("no training here")
        return x * params, state

    with pytest.warns(UserWarning, match="the training program cannot be saved.*no training here"):
        models.save(tmp_path / "m", models.Model(apply_fn, jnp.ones(2)), jnp.ones((3, 2)))
    loaded = models.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded(jnp.ones((1, 2))), 1)
    with pytest.raises(ValueError, match="saved without a training mode"):
        loaded.apply(jnp.ones((1, 2)), key=jax.random.key(0))


def test_what_is_damaged_or_no_model_is_refused(tmp_path):
    path = tmp_path / "m"
    model = models.from_function(lambda w, x: x * w, jnp.arange(2.0))
    models.save(path, model, jnp.ones((1, 2)))
    models.save(path, model, jnp.ones((2, 2)))  # an older one is replaced
    whole = path.read_bytes()
    place = whole.index(np.arange(2.0, dtype=np.float32).tobytes())
    path.write_bytes(whole[:place] + b"\x01" + whole[place + 1 :])
    with pytest.raises(ValueError, match="is damaged"):
        models.load(path)
    with zipfile.ZipFile(path, "w") as archive, zipfile.ZipFile(tmp_path / "other", "w") as other:
        other.writestr("x", "y")
        for name in ("model.json", "evaluation", "training"):
            archive.writestr(name, "{}")
        archive.comment = b"0" * 64
    with pytest.raises(ValueError, match=r"the SHA-256 of model\.json is not the one"):
        models.load(path)
    (tmp_path / "text").write_text("hello")
    for name in ("text", "other", "none"):
        with pytest.raises(ValueError, match="is no saved model"):
            models.load(tmp_path / name)
    for name in ("text", "other", "."):
        with pytest.raises(ValueError, match="exists and is no saved model"):
            models.save(tmp_path / name, model, jnp.ones((1, 2)))
    assert (tmp_path / "text").read_text() == "hello"
    with pytest.raises(ValueError, match=r"\['state'\]\['key'\] is a random key"):
        models.save(tmp_path / "k", model.replace(state={"key": jax.random.key(0)}), jnp.ones((1, 2)))
    with jax.enable_x64(True):
        models.save(tmp_path / "wide", model.replace(params=np.arange(2.0)), jnp.ones((1, 2)))
        assert models.load(tmp_path / "wide").params.dtype == np.float64
    with pytest.raises(ValueError, match="float64, which JAX has disabled"):
        models.load(tmp_path / "wide")

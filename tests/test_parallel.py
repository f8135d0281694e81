"""One step, however it is run: jit, scan, sharded jit, pmap, shard_map, in parts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from distill_jax import train
from distill_jax.models import ConvNet, Model, from_function, from_linen, from_nnx

BATCH, CLASSES, SHAPE = 32, 5, (6, 6, 2)


class LinenNet(linen.Module):
    axis_name: str | None = None

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Conv(4, (3, 3))(x)
        x = linen.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        return linen.Dense(CLASSES)(linen.relu(x).mean((1, 2)))


def nnx_model(axis_name=None) -> Model:
    sizes = {"channels": (4, 4), "hidden": 8, "kernel": 3}
    module = ConvNet(SHAPE, CLASSES, **sizes, batch_norm=True, axis_name=axis_name, rngs=nnx.Rngs(0))
    return from_nnx(module)


def linen_model(axis_name=None) -> Model:
    # outside the mapped axis the name is unbound, so the arrays come from a model without it
    model = from_linen(LinenNet(), jax.random.key(0), jnp.zeros((1, *SHAPE)))
    module = LinenNet(axis_name)

    def apply_fn(params, model_state, x, *, key=None):
        variables = {"params": params, **model_state}
        if key is None:
            return module.apply(variables, x), model_state
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    return model.replace(apply_fn=apply_fn)


def plain_model(axis_name=None) -> Model:
    def apply_fn(params, model_state, x, *, key=None):
        x = x.reshape(x.shape[0], -1) @ params["w1"]
        mean, var = model_state["mean"], model_state["var"]
        if key is not None:
            mean, square = x.mean(0), jnp.square(x).mean(0)
            if axis_name:
                mean, square = jax.lax.pmean((mean, square), axis_name)
            var = square - jnp.square(mean)
            model_state = {
                name: 0.9 * model_state[name] + 0.1 * new for name, new in {"mean": mean, "var": var}.items()
            }
        x = (x - mean) * jax.lax.rsqrt(var + 1e-5)
        return jax.nn.relu(x) @ params["w2"] + params["b2"], model_state

    a, b = jax.random.split(jax.random.key(0))
    width = int(np.prod(SHAPE))
    params = {
        "w1": jax.random.normal(a, (width, 16)) / 8,
        "w2": jax.random.normal(b, (16, CLASSES)) / 4,
        "b2": jnp.zeros(CLASSES),
    }
    return Model(apply_fn, params, {"mean": jnp.zeros(16), "var": jnp.ones(16)})


MODELS = {"nnx": nnx_model, "linen": linen_model, "plain": plain_model}


def make_batch(weighted=False):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(BATCH, *SHAPE)).astype(np.float32),
        "label": rng.integers(0, CLASSES, BATCH).astype(np.int32),
        "teacher": rng.normal(size=(BATCH, CLASSES)).astype(np.float32) * 3,
    }
    if weighted:  # unequal totals in every part, and one example that does not count
        batch["weight"] = np.where(np.arange(BATCH) == 3, 0, rng.uniform(0.1, 2, BATCH)).astype("f4")
    return jax.tree.map(jnp.asarray, batch)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))


def step_and_state(name, axis_name=None, **options):
    loss_fn = train.distill(temperature=4.0, alpha=0.3)
    step = train.make_train_step(loss_fn, optimizer(), axis_name=axis_name, **options)
    return step, train.init_state(MODELS[name](axis_name), optimizer(), jax.random.key(1))


def arrays(result):
    state, metrics = result
    parts = {"params": state.model.params, "state": state.model.state}  # of functions with other axis names
    return jax.tree.map(
        np.asarray, (state._replace(model=parts, key=jax.random.key_data(state.key)), metrics)
    )


def reference(name, weighted=False):
    step, state = step_and_state(name)
    return arrays(jax.jit(step)(state, make_batch(weighted)))


def run_scan(name, weighted):
    step, state = step_and_state(name)
    batches = jax.tree.map(lambda x: x[None], make_batch(weighted))
    # Quickly compiled (conftest.py), a convolution in a loop is rounded so that a ReLU switches
    quality = {"xla_backend_optimization_level": 2}
    scan = jax.jit(lambda *xs: jax.lax.scan(step, *xs), compiler_options=quality)
    state, metrics = scan(state, batches)
    return state, jax.tree.map(lambda x: x[0], metrics)


def run_vmap(name, weighted):
    step, state = step_and_state(name)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    result = jax.jit(jax.vmap(step, in_axes=(0, None)))(states, make_batch(weighted))
    return jax.tree.map(lambda x: x[1], result)


def run_sharded_jit(name, weighted):
    step, state = step_and_state(name)
    mesh = train.data_mesh(4)
    batch = jax.device_put(make_batch(weighted), train.sharded(mesh))
    state = jax.device_put(state, train.replicated(mesh))
    return jax.jit(step)(state, batch)


def run_pmap(name, weighted):
    step, state = step_and_state(name, "batch")
    batch = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), make_batch(weighted))
    return jax.pmap(step, "batch", in_axes=(None, 0), out_axes=None)(state, batch)


def run_shard_map(name, weighted, check_vma):
    step, state = step_and_state(name, "batch")
    mapped = jax.shard_map(
        step, mesh=train.data_mesh(4), in_specs=(P(), P("batch")), out_specs=(P(), P()), check_vma=check_vma
    )
    return jax.jit(mapped)(state, make_batch(weighted))


WAYS = {
    "scan": run_scan,
    "vmap": run_vmap,
    "sharded jit": run_sharded_jit,
    "pmap": run_pmap,
    "shard_map, check_vma": lambda *args: run_shard_map(*args, check_vma=True),
    "shard_map": lambda *args: run_shard_map(*args, check_vma=False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_makes_the_same_step(name, way):
    # equal weights: with BatchNorm, statistics are taken over all examples alike
    chex.assert_trees_all_close(arrays(WAYS[way](name, False)), reference(name), atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_unequal_weights_are_exact_on_every_device(way):
    chex.assert_trees_all_close(arrays(WAYS[way]("plain", True)), reference("plain", True), atol=1e-6)


def stateless_model() -> Model:
    def fn(params, x):
        return jnp.tanh(x.reshape(x.shape[0], -1) @ params["w1"]) @ params["w2"]

    return from_function(fn, plain_model().params)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_accumulation_is_the_whole_batch(parts, weighted):
    loss_fn = train.distill(temperature=4.0, alpha=0.3)
    results = []
    for accumulate in (1, parts):
        step = train.make_train_step(loss_fn, optimizer(), accumulate=accumulate)
        state = train.init_state(stateless_model(), optimizer(), jax.random.key(1))
        results.append(arrays(jax.jit(step)(state, make_batch(weighted))))
    chex.assert_trees_all_close(*results, atol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_accumulation_on_several_devices_is_the_whole_batch(check_vma):
    loss_fn = train.distill(temperature=4.0, alpha=0.3)
    state = train.init_state(stateless_model(), optimizer(), jax.random.key(1))
    whole = jax.jit(train.make_train_step(loss_fn, optimizer()))(state, make_batch(True))
    step = train.make_train_step(loss_fn, optimizer(), axis_name="batch", accumulate=2)
    mapped = jax.shard_map(
        step, mesh=train.data_mesh(4), in_specs=(P(), P("batch")), out_specs=(P(), P()), check_vma=check_vma
    )
    chex.assert_trees_all_close(arrays(jax.jit(mapped)(state, make_batch(True))), arrays(whole), atol=1e-6)


def test_validation_with_the_model_on_several_devices():
    model, batch = plain_model(), make_batch()
    validate = train.make_validation({name: batch[name] for name in ("image", "label")}, batch_size=6)
    expected = validate(model)
    assert 0 < expected["validation_errors"] < len(batch["label"])
    spread = validate(jax.device_put(model, train.replicated(train.data_mesh(4))))
    chex.assert_trees_all_close(spread, expected, rtol=1e-6)


def test_accumulation_gives_batch_norm_its_part_only():
    """The difference that the docstring of make_train_step states."""
    step, state = step_and_state("nnx", accumulate=4)
    result = arrays(jax.jit(step)(state, make_batch()))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(result[0].model["params"], reference("nnx")[0].model["params"], atol=1e-6)


def test_devices_draw_different_dropout():
    def fn(params, x, key=None):
        return params["w"] * jax.random.uniform(key, (x.shape[0], 2))

    def loss_fn(model, batch, *, key, step):
        outputs, model_state = model.apply(batch["image"], key=key)
        return outputs.mean(), (model_state, {"spread": outputs.mean() ** 2})

    state = train.init_state(from_function(fn, {"w": jnp.ones(())}), optax.sgd(0.1), jax.random.key(0))
    step = train.make_train_step(loss_fn, optax.sgd(0.1), axis_name="batch")
    _, metrics = jax.pmap(step, "batch", in_axes=(None, 0), out_axes=None)(
        state, {"image": jnp.zeros((4, 8, 1))}
    )
    assert metrics["spread"] - metrics["loss"] ** 2 > 1e-4  # zero if all devices drew alike


def test_accumulate_must_divide_the_batch():
    step, state = step_and_state("plain", accumulate=5)
    with pytest.raises(ValueError, match="accumulate=5 must divide the batch, which has 32"):
        step(state, make_batch())

"""The one form of a model: a pytree, conversions to it, and the batched evaluator."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from distill_jax import train
from distill_jax._model import padded_batches
from distill_jax.features import layer_shapes
from distill_jax.models import (
    MLP,
    ConvNet,
    Model,
    build,
    from_function,
    from_linen,
    from_nnx,
    predict,
    side_by_side,
)

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def mlp(seed=0, sizes=(4, 8, 3), **options):
    return from_nnx(MLP(sizes, rngs=nnx.Rngs(seed), **options))


class LinenNet(linen.Module):
    width: int = 5
    rate: float = 0.5

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(self.width)(x))
        return linen.Dense(3)(linen.Dropout(self.rate, deterministic=not train)(x))


class Counter:
    """A jitted call of a model in both modes, and how often it was compiled."""

    def __init__(self):
        self.traces = 0

        def call(model, x, key=None):
            self.traces += 1
            return model.apply(x, key=key)[0]

        self.run = jax.jit(call)


# A pytree


def test_a_model_is_an_argument_and_a_result_of_jit():
    model = from_linen(LinenNet(), jax.random.key(0), X)

    @jax.jit
    def doubled(model):
        return model.replace(params=jax.tree.map(lambda x: 2 * x, model.params))

    result = doubled(model)
    assert isinstance(result, Model)
    assert result.apply_fn is model.apply_fn
    chex.assert_trees_all_equal(result.params, jax.tree.map(lambda x: 2 * x, model.params))
    chex.assert_trees_all_equal(result.state, model.state)
    leaves = jax.tree.leaves(model)
    assert len(leaves) == len(jax.tree.leaves((model.params, model.state)))
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    gradient = jax.grad(lambda model: jnp.square(model(X)).sum())(model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)


def test_stacked_models_are_mapped():
    """Several seeds in one program: outputs, and training steps."""
    several = [mlp(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    assert isinstance(stacked, Model)
    outputs = jax.jit(jax.vmap(lambda model: model(X)))(stacked)
    for model, logits in zip(several, outputs, strict=True):
        np.testing.assert_allclose(logits, model(X), rtol=1e-5, atol=1e-6)
    batch, tx = {"image": X, "label": np.arange(6) % 3}, optax.adam(0.1)
    step = train.make_train_step(train.supervised(), tx)
    start = jax.vmap(lambda model, seed: train.init_state(model, tx, jax.random.key(seed)))
    states, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(start(stacked, jnp.arange(3)), batch)
    for seed, model in enumerate(several):
        one, _ = jax.jit(step)(train.init_state(model, tx, jax.random.key(seed)), batch)
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, seed=seed: x[seed], states.model), one.model, rtol=1e-4, atol=1e-5
        )


def test_a_model_is_a_function():
    """It may itself be transformed, and be compared and hashed: by identity, as functions are."""
    model = mlp()
    np.testing.assert_allclose(jax.jit(model)(X), model(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(model)(X[:, None])[:, 0], model(X), rtol=1e-5, atol=1e-6)
    assert jax.eval_shape(model, X).shape == (6, 3)
    other = model.replace()
    assert model == model
    assert model != other
    assert len({model, model, other}) == 2


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_models_are_made_inside_vmap_and_eval_shape(kind):
    """Many seeds at once, and no seed at all; nothing of the transformation stays behind."""

    def make(key):
        if kind == "nnx":
            options = {"channels": (2,), "batch_norm": True, "dropout": 0.5}
            return from_nnx(ConvNet((2, 2, 1), 3, **options, rngs=nnx.Rngs(key)))
        return from_linen(LinenNet(), key, X)

    x = X.reshape(6, 2, 2, 1) if kind == "nnx" else X
    keys = jax.random.split(jax.random.key(0), 3)
    several = jax.vmap(make)(keys)
    for number, key in enumerate(keys):
        one = make(key)
        lane = jax.tree.map(lambda leaf, number=number: leaf[number], several)
        chex.assert_trees_all_equal_structs(lane, one)
        chex.assert_trees_all_close((lane.params, lane.state), (one.params, one.state), rtol=1e-6, atol=1e-7)
        expected = one.apply(x, key=key)
        chex.assert_trees_all_close(lane.apply(x, key=key), expected, rtol=1e-5, atol=1e-6)
    shapes = jax.eval_shape(make, keys[0])
    chex.assert_trees_all_equal_structs(shapes, one)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, one)
    names = [layer_shapes(model, x, key=keys[0]) for model in (shapes, one)]
    assert names[0] == names[1]
    assert names[0]


def test_a_module_that_draws_in_evaluation_keeps_no_seed():
    """Equal models compute the same, wherever their modules were made."""

    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.linear, self.rngs = nnx.Linear(4, 3, rngs=rngs), rngs

        def __call__(self, x):
            return self.linear(x) + jax.random.normal(self.rngs.noise(), (3,))

    def make(key):
        return from_nnx(Noisy(nnx.Rngs(params=key, noise=key)))

    keys = jax.random.split(jax.random.key(0), 2)
    several, one = jax.vmap(make)(keys), make(keys[1])
    second = jax.tree.map(lambda leaf: leaf[1], several)
    assert second.apply_fn == one.apply_fn
    np.testing.assert_allclose(second(X), one(X), rtol=1e-5, atol=1e-6)
    draws = [one.apply(X, key=key)[0] for key in keys]
    assert (draws[0] != draws[1]).all()


def test_replace_is_a_copy():
    model = from_function(lambda params, x: x * params, jnp.float32(2.0))
    assert model.state == {}
    assert model.replace(params=jnp.float32(3.0))(2.0) == 6
    assert model(2.0) == 4
    with pytest.raises(AttributeError):
        model.params = 1
    with pytest.raises(TypeError, match="variables"):
        model.replace(variables=1)


# From modules


def test_nnx_modules_of_one_structure_are_one_program():
    counter = Counter()
    first, second = mlp(0, dropout=0.5), mlp(1, dropout=0.5)
    assert first.apply_fn == second.apply_fn
    assert hash(first.apply_fn) == hash(second.apply_fn)
    for model in (first, second):
        counter.run(model, X)
    assert counter.traces == 1
    key = jax.random.key(0)
    outputs = [counter.run(model, X, key) for model in (first, second)]
    assert counter.traces == 2  # training mode is another program
    assert (outputs[0] != outputs[1]).any()
    # The program of the first model, on the arrays of the second: what the second computes alone
    np.testing.assert_allclose(outputs[1], Counter().run(second, X, key), rtol=1e-6)
    np.testing.assert_allclose(outputs[1], second.apply(X, key=key)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"dropout": 0.25},  # another constant in the program
        {"sizes": (4, 9, 3)},  # a module states its widths
        {"sizes": (4, 8, 8, 3)},
    ],
)
def test_nnx_modules_of_other_structures_are_other_programs(other):
    counter = Counter()
    first, second = mlp(dropout=0.5), mlp(**{"dropout": 0.5} | other)
    assert first.apply_fn != second.apply_fn
    for model in (first, second, first, second):
        counter.run(model, X)
    assert counter.traces == 2


def test_nnx_modules_with_other_streams_are_other_programs():
    shape = (2, 2, 1)
    nets = [
        ConvNet(shape, 3, channels=(2,), axis_name=n, batch_norm=True, rngs=nnx.Rngs(0)) for n in (None, "a")
    ]
    one, other = map(from_nnx, nets)
    assert one.apply_fn != other.apply_fn
    assert one.apply_fn != "a function"


def test_converting_a_module_does_not_change_it():
    module = ConvNet((2, 2, 1), 3, channels=(2,), batch_norm=True, dropout=0.5, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))))
    model = from_nnx(module)
    x = X.reshape(6, 2, 2, 1)
    np.testing.assert_allclose(model(x), module(x), rtol=1e-6)  # the module is left in evaluation mode
    model.apply(x, key=jax.random.key(0))
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(module, (nnx.Param, nnx.BatchStat))), before)


def test_linen_modules_of_one_structure_are_one_program():
    counter = Counter()
    first, second = (from_linen(LinenNet(), jax.random.key(seed), X) for seed in (0, 1))
    assert first.apply_fn == second.apply_fn
    assert hash(first.apply_fn) == hash(second.apply_fn)
    for model in (first, second, first):
        counter.run(model, X)
    assert counter.traces == 1
    for options in ({"rate": 0.25}, {"width": 6}):
        other = from_linen(LinenNet(**options), jax.random.key(0), X)
        assert other.apply_fn != first.apply_fn
        counter.run(other, X)
    assert counter.traces == 3


def test_a_linen_module_may_have_a_list_as_a_field():
    """Such a module has no hash of its own, and yet its models are arguments of jit."""

    class Sized(linen.Module):
        sizes: list[int]

        @linen.compact
        def __call__(self, x):
            for size in self.sizes:
                x = linen.Dense(size)(x)
            return x

    counter = Counter()
    for sizes in ([4, 3], [4, 3], [5, 3]):
        counter.run(from_linen(Sized(sizes), jax.random.key(0), X), X)
    assert counter.traces == 2


def test_a_linen_module_may_have_an_array_as_a_field():
    """Arrays have no single answer to "equal?": models of one module are one program, of two are two."""

    class Shifted(linen.Module):
        mean: np.ndarray

        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(x - self.mean)

    counter, modules = Counter(), [Shifted(X.mean(0)) for _ in range(2)]
    for module in (modules[0], modules[0], modules[1]):
        model = from_linen(module, jax.random.key(0), X)
        np.testing.assert_allclose(counter.run(model, X), model(X), rtol=1e-5)
    assert counter.traces == 2


# From functions


def test_a_function_without_and_with_a_key():
    def plain(params, x):
        return x * params

    def noisy(params, x, key=None):
        return x * params if key is None else x * params + jax.random.normal(key, x.shape)

    key, x = jax.random.key(0), jnp.arange(3.0)
    for fn in (plain, noisy):
        model = from_function(fn, 2.0)
        assert model.apply_fn == from_function(fn, 3.0).apply_fn
        assert hash(model.apply_fn) == hash(from_function(fn, 3.0).apply_fn)
        np.testing.assert_array_equal(model(x), 2 * x)
    np.testing.assert_array_equal(from_function(plain, 2.0).apply(x, key=key)[0], 2 * x)
    outputs, state = from_function(noisy, 2.0).apply(x, key=key)
    np.testing.assert_array_equal(outputs, 2 * x + jax.random.normal(key, x.shape))
    assert state == {}
    assert from_function(plain, 2.0).apply_fn != from_function(noisy, 2.0).apply_fn


def test_a_function_is_one_program():
    counter = Counter()

    def fn(params, x):
        return x @ params

    for seed in (0, 1):
        counter.run(from_function(fn, jax.random.normal(jax.random.key(seed), (4, 3))), X)
    assert counter.traces == 1


# Side by side


def test_models_side_by_side():
    pair = mlp(0), from_linen(LinenNet(), jax.random.key(0), X)
    both = side_by_side(*pair)
    outputs = both(X)
    assert isinstance(outputs, tuple)
    for model, logits in zip(pair, outputs, strict=True):
        np.testing.assert_array_equal(logits, model(X))
    chex.assert_trees_all_equal((both.params, both.state), ((pair[0].params, pair[1].params),
                                                           (pair[0].state, pair[1].state)))  # fmt: skip
    keys = jax.random.split(jax.random.key(1))
    outputs, state = both.apply(X, key=jax.random.key(1))
    for number, (model, key) in enumerate(zip(pair, keys, strict=True)):
        expected = model.apply(X, key=key)
        chex.assert_trees_all_equal((outputs[number], state[number]), expected)
    assert both.apply_fn == side_by_side(mlp(5), from_linen(LinenNet(), jax.random.key(7), X)).apply_fn
    assert both.apply_fn != side_by_side(*reversed(pair)).apply_fn
    with pytest.raises(ValueError, match="at least one model"):
        side_by_side()


# The batched evaluator


@pytest.mark.parametrize("count", [1, 7, 10, 11])
def test_predict_pads_and_cuts(count):
    x = np.random.default_rng(0).normal(size=(count, 4)).astype(np.float32)
    model = from_function(lambda params, x: x * params, jnp.float32(3.0))
    result = predict(model, x, prepare=lambda x: x + 1, batch_size=5)
    assert isinstance(result, np.ndarray)
    np.testing.assert_allclose(result, (x + 1) * 3, rtol=1e-6)


def test_predict_is_one_big_call_and_one_program():
    """Whatever the size of the batches; a model of the same form is not compiled again."""
    traces = []

    def fn(params, x):
        traces.append(x.shape)
        return jnp.tanh(x @ params)

    x = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float32)
    weights = [jax.random.normal(jax.random.key(seed), (4, 3)) for seed in (0, 1)]
    for params in weights:
        model = from_function(fn, params)
        np.testing.assert_allclose(predict(model, x, batch_size=10), np.tanh(x @ params), rtol=1e-5)
    assert traces == [(10, 4)]
    np.testing.assert_allclose(predict(model, x), np.tanh(x @ params), rtol=1e-5)
    assert traces[1:] == [(23, 4)]


def test_predict_runs_in_evaluation_mode():
    model = from_linen(LinenNet(), jax.random.key(0), X)
    np.testing.assert_allclose(predict(model, X, batch_size=4), model(X), rtol=1e-5)


def test_predict_takes_and_gives_trees():
    def fn(params, x):
        total = (x["a"] * params + x["b"]["c"][:, None]).astype(jnp.bfloat16)
        return total, {"positive": total > 0, "index": jnp.argmax(total, -1)}

    rng = np.random.default_rng(0)
    inputs = {"a": rng.normal(size=(7, 3)).astype(np.float32), "b": {"c": np.arange(7)}}
    model = from_function(fn, jnp.float32(2.0))
    result, expected = predict(model, inputs, batch_size=3), model(inputs)
    chex.assert_trees_all_equal(result, jax.tree.map(np.asarray, expected))
    assert result[0].dtype == np.float32  # floating-point numbers come in float32
    assert result[1]["positive"].dtype == bool
    assert result[1]["index"].dtype == np.int32


def test_padded_batches():
    data = {"image": np.arange(7), "more": np.arange(14).reshape(7, 2)}
    batches = list(padded_batches(data, 3))
    assert len(batches) == 3
    np.testing.assert_array_equal(batches[2][0]["image"], [6, 0, 1])
    np.testing.assert_array_equal(batches[2][0]["more"][0], [12, 13])
    np.testing.assert_array_equal([counted.sum() for _, counted in batches], [3, 3, 1])
    assert [len(counted) for _, counted in padded_batches(data, 100)] == [7]
    for wrong, size, message in [
        ({"image": np.zeros((0, 3))}, 2, r"at least one, got shapes \[\(0, 3\)\]"),
        ({}, 2, r"at least one, got shapes \[\]"),
        (data, 0, "batch_size must be an integer of at least 1, got 0"),
        (data, -1, "batch_size must be an integer of at least 1, got -1"),
        (
            {**data, "label": np.arange(6)},
            2,
            r"as many examples each, .* got shapes \[\(7,\), \(6,\), \(7, 2\)\]",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            padded_batches(wrong, size)


def test_equal_modules_share_one_function():
    """A jitted call compares the functions of its models, which takes no time where they are the same."""
    first, second, other = (
        build(name, (8, 8, 1), 3, jax.random.key(seed))
        for name, seed in (("mlp:4", 0), ("mlp:4", 1), ("mlp:4,4", 0))
    )
    assert first.apply_fn is second.apply_fn
    assert first.apply_fn is not other.apply_fn


@pytest.mark.parametrize("name", ["deterministic", "training"])
def test_a_linen_module_must_be_told_by_train(name):
    """Its dropout would else never be on, without a word."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, deterministic=True):
            return linen.Dropout(0.5, deterministic=deterministic)(x)

    class Other(linen.Module):
        @linen.compact
        def __call__(self, x, training=False):
            return linen.Dropout(0.5, deterministic=not training)(x)

    module = {"deterministic": Net, "training": Other}[name]()
    with pytest.raises(ValueError, match=f"has an argument '{name}'.* argument named train instead"):
        from_linen(module, jax.random.key(0), X)

"""Encoder, decoder, both: what stands still, what never gets worse, and where a training goes on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import losses, train
from distill_jax.models import MLP, compose, from_function, from_nnx


class Normed(nnx.Module):
    """A network with a state that training changes."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


class NormedTail(Normed):
    """The same, for the place of a decoder."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)


ENCODER = from_nnx(Normed(nnx.Rngs(0)))
DECODER = from_nnx(MLP((3, 8, 4), rngs=nnx.Rngs(1)))
BOTH = compose(ENCODER, DECODER)
OBJECTIVE = train.encoder_decoder(soft=losses.kl, alpha=0.3)


def make_data(n, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)).astype("f4")
    logits = 2 * x @ np.random.default_rng(9).normal(size=(6, 4)).astype("f4")
    return {"image": x, "teacher": logits, "label": logits.argmax(-1).astype(np.int32)}


def run(objective=OBJECTIVE, data=None, validation=None, rate=1e-2, **options):
    options = {"epochs": 6, "batch_size": 32, "seed": 0} | options
    return train.train_stages(
        jax.random.key(0), ENCODER, DECODER, objective,
        make_data(128, 0) if data is None else data,
        make_data(50, 1) if validation is None else validation,
        tx=lambda steps: optax.adamw(rate, weight_decay=0.1), **options,
    )  # fmt: skip


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_what_is_frozen_is_bit_identical(part):
    """Parameters and BatchNorm's statistics alike, with weight decay in the optimizer."""
    done = run(stages={"one": part}, epochs=3)
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    chex.assert_trees_all_equal(done.model.params[part], BOTH.params[part])
    chex.assert_trees_all_equal(done.model.state[part], BOTH.state[part])
    moved = jax.tree.map(lambda a, b: np.any(a != b), done.model.params[other], BOTH.params[other])
    assert all(jax.tree.leaves(moved))
    chex.assert_trees_all_equal_structs(done.model, BOTH)  # with nothing frozen any more


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_frozen_part_runs_in_evaluation_mode_and_gets_no_gradient(part):
    """In training the composed model takes the frozen part's running statistics, and leaves them alone."""
    normed = from_nnx(Normed(nnx.Rngs(3)))
    second = from_nnx(NormedTail(nnx.Rngs(4)))
    x, key = make_data(16, 0)["image"], jax.random.key(5)
    model = compose(normed, second, frozen=part)
    outputs, state = jax.jit(lambda m: m.apply(x, key=key))(model)
    keys = dict(zip(("encoder", "decoder"), jax.random.split(key), strict=True))
    keys[part] = None
    code, encoder_state = normed.apply(x, key=keys["encoder"])
    expected, decoder_state = second.apply(code, key=keys["decoder"])
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state, {"encoder": encoder_state, "decoder": decoder_state}, rtol=1e-5)
    chex.assert_trees_all_equal(state[part], model.state[part])
    other = {"encoder": "decoder", "decoder": "encoder"}[part]
    assert (state[other]["norm"]["mean"] != model.state[other]["norm"]["mean"]).all()
    gradient = jax.grad(lambda m: jnp.square(m.apply(x, key=key)[0]).sum())(model).params
    assert all((g == 0).all() for g in jax.tree.leaves(gradient[part]))
    assert all((g != 0).any() for g in jax.tree.leaves(gradient[other]["last"]["kernel"]))


def test_composed_models_are_equal_where_their_parts_are():
    again = compose(from_nnx(Normed(nnx.Rngs(7))), DECODER)
    assert again.apply_fn == BOTH.apply_fn
    assert hash(again.apply_fn) == hash(BOTH.apply_fn)
    assert compose(ENCODER, DECODER, frozen="encoder").apply_fn != BOTH.apply_fn
    assert compose(ENCODER, DECODER, code=jnp.tanh).apply_fn != BOTH.apply_fn
    x = make_data(5, 0)["image"]
    np.testing.assert_array_equal(BOTH(x), DECODER(ENCODER(x)))
    np.testing.assert_array_equal(compose(ENCODER, DECODER, code=jnp.tanh)(x), DECODER(jnp.tanh(ENCODER(x))))


@pytest.mark.parametrize("rate", [1e-2, 1.0])
def test_no_stage_is_worse_than_the_one_before(rate):
    """Also at a learning rate that makes things worse: then the start is kept."""
    done = run(rate=rate, tolerance=0.5, patience=1)
    assert [stage.name for stage in done.stages] == ["encoder", "decoder", "joint"]
    levels = [done.stages[0].before, *(stage.after for stage in done.stages)]
    assert levels == sorted(levels, reverse=True)
    assert [s.before for s in done.stages[1:]] == levels[1:-1]
    figures = train.make_measure(OBJECTIVE, make_data(50, 1))(done.model)
    assert figures["validation_loss"] == levels[-1]
    assert {"validation_soft", "validation_hard", "validation_errors"} <= figures.keys()
    assert len(done.history["loss"]) == sum(stage.epochs for stage in done.stages)
    assert done.history["epoch"] == list(range(1, len(done.history["loss"]) + 1))


def test_a_measure_is_the_mean_over_all_examples():
    """Over batches that do not divide them."""
    data = make_data(50, 1)
    outputs = DECODER(ENCODER(data["image"]))
    soft = losses.kl(outputs, data["teacher"]).mean()
    hard = losses.cross_entropy(outputs, data["label"]).mean()
    figures = train.make_measure(OBJECTIVE, data, batch_size=16)(BOTH)
    np.testing.assert_allclose(figures["validation_loss"], 0.3 * hard + 0.7 * soft, rtol=1e-5)
    assert figures["validation_errors"] == (outputs.argmax(-1) != data["label"]).sum()
    some = np.arange(50) % 3 > 0
    weighed = train.make_measure(OBJECTIVE, {**data, "weight": some}, batch_size=16)
    part = jax.tree.map(lambda x: x[some], data)
    alone = train.make_measure(OBJECTIVE, part)(BOTH)
    np.testing.assert_allclose(list(weighed(BOTH).values()), list(alone.values()), rtol=1e-5)


def test_an_interrupted_training_goes_on_to_the_same_end(tmp_path):
    class Killed(Exception):  # noqa: N818
        pass

    def kill(name):
        def on_epoch(done, figures):
            if (name, done) == ("decoder", 2):
                raise Killed

        return on_epoch

    options = {"tolerance": 0.02, "patience": 2, "save_seconds": 0.0}
    whole = run(**options)
    with pytest.raises(Killed):
        run(directory=tmp_path, on_stage=kill, **options)
    assert not (tmp_path / "joint").exists()
    for _ in range(2):  # and once more, when all is done
        resumed = run(directory=tmp_path, **options)
        chex.assert_trees_all_equal(resumed.model, whole.model)
        assert resumed.stages == whole.stages


def test_when_a_stage_has_converged():
    flat = {"validation_loss": [3.0, 2.0, 1.0, 0.9995, 0.9994]}
    assert train.converged(flat, tolerance=1e-3, patience=2)
    assert not train.converged(flat, tolerance=1e-4, patience=2)
    assert not train.converged(flat, tolerance=1e-3, patience=3)
    assert not train.converged(flat, tolerance=1e-3, patience=5)


def test_errors():
    bad = make_data(128, 0)
    bad["teacher"][7, 1] = np.nan
    with pytest.raises(ValueError, match="not finite for 1 of 128 examples"):
        run(data=bad)
    with pytest.raises(ValueError, match="for validation are not finite"):
        run(validation=bad)
    with pytest.raises(ValueError, match="diverged; use a smaller learning rate"):
        run(rate=1e30)
    with pytest.raises(ValueError, match="tolerance must lie in"):
        run(tolerance=1.0)
    short = make_data(128, 0)
    short["teacher"] = short["teacher"][:, :3]
    with pytest.raises(ValueError, match=r"one shape, got \(50, 4\) and \(50, 3\)"):
        run(train.encoder_decoder(), data=short, validation={k: v[:50] for k, v in short.items()})
    with pytest.raises(ValueError, match="frozen must be"):
        compose(ENCODER, DECODER, frozen="both")
    with pytest.raises(ValueError, match="frozen must be one of encoder, decoder, got 'coder'"):
        train.freeze(optax.sgd(1.0), "coder").init(BOTH.params)
    with pytest.raises(ValueError, match="decoder that returns"):
        run(train.encoder_decoder(soft=losses.kl, inputs_weight=1.0))
    with pytest.raises(ValueError, match="inputs_weight must not be negative"):
        train.encoder_decoder(inputs_weight=-1.0)


def test_an_autoencoders_loss_by_hand():
    def decoded(params, code):
        return code @ params["outputs"], jnp.tanh(code @ params["inputs"])

    rng = np.random.default_rng(0)
    params = {
        "encoder": {"kernel": rng.normal(size=(6, 2))},
        "decoder": {"outputs": rng.normal(size=(2, 4)), "inputs": rng.normal(size=(2, 6))},
    }
    data = make_data(20, 0)
    encoder = from_function(lambda params, x: x @ params["kernel"], params["encoder"])
    model = compose(encoder, from_function(decoded, params["decoder"]))
    loss_fn = train.encoder_decoder(inputs_weight=0.5)
    value, (_, figures) = loss_fn(model, data, key=None, step=0)
    code = data["image"] @ params["encoder"]["kernel"]
    soft = np.mean((code @ params["decoder"]["outputs"] - data["teacher"]) ** 2)
    inputs = np.mean((np.tanh(code @ params["decoder"]["inputs"]) - data["image"]) ** 2)
    np.testing.assert_allclose(figures["inputs"], inputs, rtol=1e-5)
    np.testing.assert_allclose(value, soft + 0.5 * inputs, rtol=1e-5)

"""Curriculum temperature: reversed gradients and their schedule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_logits import draw, numeric_gradient, ref_kl

from distill_jax import losses
from distill_jax.features import curriculum_strength, curriculum_temperature, reverse_gradient

STUDENT, TEACHER = draw(3, 2)


def loss_of(params, learned, strength=1.0, student=STUDENT):
    return losses.kl(student, TEACHER, temperature=learned.apply(params, strength)).mean()


def test_reverse_gradient():
    x = {"a": jnp.array([1.0, -2.0, 0.3]), "b": jnp.asarray(1e30)}
    np.testing.assert_array_equal(reverse_gradient(x, 0.3)["a"], x["a"])
    assert reverse_gradient(x, 0.3)["b"] == x["b"]
    for strength in (0.0, 0.3, 1.0, 1e-8):
        gradient = jax.jit(jax.grad(lambda x, s: (reverse_gradient(x, s)["a"] ** 2).sum()))(x, strength)
        np.testing.assert_array_equal(gradient["a"], -np.float32(strength) * 2 * x["a"])
    for_strength = jax.grad(lambda s: (reverse_gradient(x, s)["a"] ** 2).sum())(0.3)
    assert for_strength == 0
    assert reverse_gradient(jnp.ones(2, jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_the_temperature_is_bounded_as_in_the_paper():
    learned = curriculum_temperature()
    params = learned.init(jax.random.key(0))
    np.testing.assert_allclose(learned.apply(params, 0.5), 1 + 20 / (1 + np.exp(-1)), rtol=1e-6)
    for raw, expected in ((-1e4, 1.0), (0.0, 11.0), (1e4, 21.0)):
        value, gradient = jax.value_and_grad(learned.apply)({"raw": jnp.float32(raw)}, 1.0)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert np.isfinite(gradient["raw"])
    narrow = curriculum_temperature(lowest=2.0, width=3.0, start=0.0)
    assert narrow.apply(narrow.init(jax.random.key(1)), 1.0) == 3.5


def test_the_gradient_is_the_losses_reversed():
    learned = curriculum_temperature()
    params = learned.init(jax.random.key(0))
    wide = [x.astype(float) for x in (STUDENT, TEACHER)]

    def of_raw(raw):
        return ref_kl(*wide, 1 + 20 / (1 + np.exp(-raw[0]))).mean()

    forward = numeric_gradient(of_raw, np.ones(1))[0]
    for strength in (0.0, 0.5, 1.0):
        gradient = jax.grad(loss_of)(params, learned, strength)["raw"]
        np.testing.assert_allclose(gradient, -strength * forward, rtol=1e-4, atol=1e-7)
    plain = jax.grad(lambda s: losses.kl(s, TEACHER, temperature=learned.apply(params, 1.0)).mean())
    np.testing.assert_array_equal(
        jax.grad(lambda s: loss_of(params, learned, 1.0, s))(STUDENT), plain(STUDENT)
    )


def test_one_optimizer_lowers_the_student_and_raises_the_temperatures_loss():
    learned = curriculum_temperature(start=0.0)
    params = learned.init(jax.random.key(0))
    tx = optax.sgd(1.0)

    @jax.jit
    def step(params, opt_state):
        loss, gradient = jax.value_and_grad(loss_of)(params, learned)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state, history = tx.init(params), []
    for _ in range(20):
        params, opt_state, loss = step(params, opt_state)
        history.append(float(loss))
    assert all(after > before for before, after in itertools.pairwise(history))


def test_curriculum_strength():
    epochs = np.arange(13)
    value = jax.vmap(curriculum_strength)(epochs)
    expected = 0.5 * (1 - np.cos(np.pi * np.minimum(epochs / 10, 1)))
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
    assert curriculum_strength(3, ramp=3, most=0.5) == 0.5
    with pytest.raises(ValueError, match="ramp must be positive"):
        curriculum_strength(0, ramp=0)


def test_bounds_are_checked():
    with pytest.raises(ValueError, match="lowest must be positive and finite, got 0"):
        curriculum_temperature(lowest=0)
    with pytest.raises(ValueError, match="width must be positive and finite, got -1"):
        curriculum_temperature(width=-1)

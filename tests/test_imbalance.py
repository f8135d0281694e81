"""Cross-entropies for imbalanced classes, against their formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_logits import draw, log_softmax, numeric_gradient

from distill_jax import losses

LABELS = np.array([0, 3, 9, 3, 5, 1, 7, 2])
COUNTS = np.array([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])


def ref_adjusted(logits, labels, prior=COUNTS, tau=1.0):
    return -log_softmax(logits + tau * np.log(prior / prior.sum()))[np.arange(8), labels]


def ref_balanced(logits, labels, beta=0.9999):
    weights = (1 - beta) / (1 - beta**COUNTS) if beta < 1 else 1 / COUNTS
    weights = weights * 10 / weights.sum()
    return -weights[labels] * log_softmax(logits)[np.arange(8), labels]


ALL = {
    "logit_adjusted": (functools.partial(losses.logit_adjusted, prior=COUNTS), ref_adjusted),
    "logit_adjusted, τ = 2": (
        functools.partial(losses.logit_adjusted, prior=COUNTS / 1e5, tau=2.0),
        functools.partial(ref_adjusted, tau=2.0),
    ),
    **{
        f"class_balanced, β = {beta}": (
            functools.partial(losses.class_balanced, counts=COUNTS, beta=beta),
            functools.partial(ref_balanced, beta=beta),
        )
        for beta in (0.0, 0.9, 0.9999, 1 - 1e-9, 1.0)
    },
}
parametrize = functools.partial(pytest.mark.parametrize, "name")


@parametrize(ALL)
def test_value_and_gradient_to_six_digits(name):
    loss, reference = ALL[name]
    logits, _ = draw(3, 1)
    expected = reference(logits.astype(float), LABELS)
    value, pull = jax.vjp(jax.jit(lambda z: loss(z, LABELS)), logits)
    np.testing.assert_allclose(value, expected, rtol=2e-6, atol=1e-6 * expected.max())
    expected = numeric_gradient(lambda z: reference(z, LABELS).sum(), logits.astype(float))
    np.testing.assert_allclose(pull(jnp.ones(8))[0], expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@parametrize(ALL)
def test_axis_extremes_and_dtypes(name):
    loss, reference = ALL[name]
    logits, _ = draw(3, 1)

    @jax.jit
    def run(logits, far):
        columns = loss(logits.T, LABELS, axis=0)
        blocks = loss(logits.reshape(2, 4, 10), LABELS.reshape(2, 4))
        of_far = jax.value_and_grad(lambda z: loss(z, LABELS).sum())(far)
        half = loss(logits.astype(jnp.bfloat16), LABELS)
        return loss(logits, LABELS), columns, blocks, of_far, half, loss(logits, LABELS * 0 + 10)

    far = np.where(np.eye(10)[:8] > 0, 1e4, 0).astype(np.float32)
    value, columns, blocks, (of_far, gradient), half, bad = run(logits, far)
    np.testing.assert_allclose(columns, value, rtol=1e-6)
    np.testing.assert_allclose(blocks, value.reshape(2, 4), rtol=1e-6)
    np.testing.assert_allclose(of_far, reference(far.astype(float), LABELS).sum(), rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert half.dtype == jnp.float32
    assert np.isnan(bad).all()
    with jax.enable_x64(True):
        wide = jax.jit(lambda z: loss(z, LABELS))(logits.astype(float))
        np.testing.assert_allclose(wide, reference(logits.astype(float), LABELS), rtol=1e-9)


def test_a_class_never_seen():
    logits, _ = draw(3, 1)
    prior = COUNTS * (np.arange(10) != 9)

    @jax.jit
    def run(logits):
        total = lambda z: losses.logit_adjusted(z, LABELS % 9, prior=prior).sum()  # noqa: E731
        rest = losses.logit_adjusted(logits[:, :9], LABELS % 9, prior=prior[:9])
        return *jax.value_and_grad(total)(logits), rest.sum()

    value, gradient, rest = run(logits)
    np.testing.assert_allclose(value, rest, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, 9], 0)
    assert losses.logit_adjusted(logits[0], np.array(9), prior=prior) == np.inf


def test_traced_counts():
    logits, _ = draw(3, 1)
    run = jax.jit(lambda z, n, b: losses.class_balanced(z, LABELS, counts=n, beta=b))
    for beta in (0.0, 0.9, 1.0):
        fixed = losses.class_balanced(logits, LABELS, counts=COUNTS, beta=beta)
        np.testing.assert_allclose(run(logits, jnp.asarray(COUNTS), beta), fixed, rtol=1e-5)
    prior = jax.jit(lambda z, n: losses.logit_adjusted(z, LABELS, prior=n))(logits, COUNTS)
    np.testing.assert_allclose(prior, losses.logit_adjusted(logits, LABELS, prior=COUNTS), rtol=1e-6)


def test_arguments_are_checked():
    logits, labels = np.zeros((2, 3), np.float32), np.zeros(2, int)
    with pytest.raises(ValueError, match=r"prior must hold one number per class, shape \(3,\), got \(2,\)"):
        losses.logit_adjusted(logits, labels, prior=[1, 2])
    with pytest.raises(ValueError, match="prior must hold finite numbers"):
        losses.logit_adjusted(logits, labels, prior=[1, 2, -1])
    with pytest.raises(ValueError, match="counts must be positive and finite"):
        losses.class_balanced(logits, labels, counts=[1, 2, 0])
    with pytest.raises(ValueError, match=r"beta must lie in \[0, 1\], got 2"):
        losses.class_balanced(logits, labels, counts=[1, 2, 3], beta=2)
    with pytest.raises(ValueError, match="labels must be integers"):
        losses.class_balanced(logits, logits, counts=[1, 2, 3])

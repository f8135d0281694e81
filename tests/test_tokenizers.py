"""Distillation between two tokenizers, against loops in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.losses import tokens


def probabilities(logits, temperature):
    e = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return e / e.sum(-1, keepdims=True)


def ref_uld(student, teacher, temperature):
    values = []
    for q, p in zip(probabilities(student, temperature), probabilities(teacher, temperature), strict=True):
        size = max(len(q), len(p))
        q, p = (np.append(np.sort(x)[::-1], np.zeros(size - len(x))) for x in (q, p))
        values.append(np.abs(p - q).sum())
    return np.array(values)


@pytest.mark.parametrize("sizes", [(7, 5), (4, 6)])
def test_uld_value_and_gradient(sizes):
    rng = np.random.default_rng(0)
    student, teacher = (2 * rng.normal(size=(3, size)) for size in sizes)
    where = np.array([[True], [False], [True]])

    @jax.jit
    def run(student, teacher):
        def total(student):
            values = tokens.uld(student, teacher, temperature=2.0, where=where)
            return values.sum(), values

        return jax.grad(total, has_aux=True)(student)

    gradient, values = run(student.astype(np.float32), teacher.astype(np.float32))
    np.testing.assert_allclose(values, ref_uld(student, teacher, 2.0) * where[:, 0], rtol=1e-6)
    exact, step = np.zeros_like(student), 1e-6
    for index in np.ndindex(student.shape):
        up, down = student.copy(), student.copy()
        up[index] += step
        down[index] -= step
        exact[index] = ((ref_uld(up, teacher, 2.0) - ref_uld(down, teacher, 2.0)) * where[:, 0]).sum()
    np.testing.assert_allclose(gradient, exact / (2 * step), atol=1e-6)


def test_uld_does_not_ask_which_token():
    logits = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    padded = np.concatenate([logits[:, ::-1], np.full((2, 3), -np.inf, np.float32)], 1)
    np.testing.assert_allclose(tokens.uld(padded, logits), 0, atol=1e-6)
    opposite = tokens.uld(jnp.array([50.0, 0.0, 0.0]), jnp.zeros(4))
    np.testing.assert_allclose(opposite, 0.75 + 3 * 0.25, rtol=1e-6)


def test_tokens_are_aligned_where_the_same_text_has_been_read():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ends = [np.sort(rng.integers(0, 12, rng.integers(1, 10))) for _ in range(2)]
        pairs = tokens.align_tokens(*ends)
        expected = []
        for place in range(12):
            found = [np.flatnonzero(x == place) for x in ends]
            if all(map(len, found)):
                expected.append([x[-1] for x in found])
        np.testing.assert_array_equal(pairs, np.reshape(expected, (-1, 2)))
    assert tokens.align_tokens([1, 2], [3]).shape == (0, 2)


def test_misuse():
    for arrays, match in (
        ((np.zeros((2, 3)), np.zeros((3, 3))), "same shape up to the last axis"),
        ((np.zeros((2, 3)), np.zeros((2, 0))), "at least one class"),
    ):
        with pytest.raises(ValueError, match=match):
            tokens.uld(*arrays)
    for ends, match in (
        ([3, 2], "student_ends must not be negative or fall"),
        ([-1], "student_ends must not be negative"),
        ([[1, 2]], r"student_ends must have shape \[tokens\]"),
        ([1.0], "student_ends must be integers"),
    ):
        with pytest.raises(ValueError, match=match):
            tokens.align_tokens(ends, [1, 2])

"""Codes of linear maps against their optimum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import train
from distill_jax.compress import linear_codes
from distill_jax.models import compose


def problem(inputs, outputs, n=2000):
    """A random linear original, and correlated inputs."""
    rng = np.random.default_rng(0)
    params = {"kernel": rng.normal(size=(inputs, outputs)), "bias": rng.normal(size=outputs)}
    mixing = rng.normal(size=(inputs, inputs)) * np.geomspace(1, 0.01, inputs)
    x = rng.normal(size=(2, n, inputs)) @ mixing.T + rng.normal(size=inputs)
    return params, x


def test_a_root_is_one_of_the_second_moments_and_keeps_small_directions():
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    scales = np.geomspace(1, 1e-9, 5)
    orthonormal, _ = np.linalg.qr(rng.normal(size=(400, 5)))
    x = np.sqrt(400) * orthonormal * scales @ basis
    values = np.linalg.svd(linear_codes.root(x), compute_uv=False)
    np.testing.assert_allclose(values, scales, rtol=1e-6)  # from xᵀx the last would be noise
    centred = linear_codes.root(x + 3, centre=True)
    np.testing.assert_allclose(centred.T @ centred, np.cov(x.T, bias=True), atol=1e-12)


@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(64, 32, 500), (5, 9, 50), (12, 6, 4)])
def test_the_closed_form_has_no_excess_at_any_width(inputs, outputs, rows):
    """By Eckart and Young the error is that of the singular values left out; nothing is below it."""
    params, x = problem(inputs, outputs, n=rows)
    root, kernel = linear_codes.root(x[0], centre=True), params["kernel"]
    best = linear_codes.optimum(kernel, root)
    centred = x[0] - x[0].mean(0)
    np.testing.assert_allclose(best[0], np.mean(np.sum((centred @ kernel) ** 2, 1)), rtol=1e-10)
    rng = np.random.default_rng(1)
    for rank in range(1, min(inputs, outputs) + 1):
        factors = linear_codes.reduced_rank(kernel, root, rank)
        assert factors.encoder.shape == (inputs, rank)
        assert abs(linear_codes.error(kernel, root, factors) - best[rank]) <= 1e-10 * best[0]
        other = linear_codes.Linear(
            factors.encoder + 1e-3 * rng.normal(size=factors.encoder.shape), factors.decoder
        )
        assert linear_codes.error(kernel, root, other) >= best[rank] - 1e-12 * best[0]
        plain = linear_codes.reduced_rank(kernel, np.eye(inputs), rank)
        assert linear_codes.error(kernel, root, plain) >= best[rank] - 1e-12 * best[0]
        code = centred @ factors.encoder
        sizes = np.diag(code.T @ code) / rows
        here = sizes > 1e-6  # a direction that no input has keeps a code of size 0
        np.testing.assert_allclose(sizes[here], 1, rtol=1e-6)


def test_gradient_descent_in_three_stages_reaches_the_optimum():
    params, x = problem(10, 5)
    y = x @ params["kernel"] + params["bias"]
    frame = linear_codes.coordinates(x[0], y[0])
    fields = []
    for part in zip(x, y, strict=True):
        z, t = linear_codes.transform(frame, *part)
        fields.append({"image": z.astype("f4"), "teacher": t.astype("f4")})
    done = train.train_stages(
        jax.random.key(0),
        *linear_codes.init_linear(jax.random.key(1), 10, 2, 5),
        train.encoder_decoder(),
        *fields,
        tx=lambda steps: optax.adam(1e-2),
        epochs=1500,
        batch_size=x.shape[1],
        seed=0,
        tolerance=1e-4,
        patience=100,  # Adam swings about its goal for some dozens of epochs
    )
    pair, root = linear_codes.fold(done.model, frame).params, linear_codes.root(x[0], centre=True)
    best = linear_codes.optimum(params["kernel"], root)
    learned = linear_codes.Linear(pair["encoder"]["kernel"], pair["decoder"]["kernel"])
    excess = linear_codes.error(params["kernel"], root, learned) - best[2]
    assert -1e-9 <= excess / best[0] <= 1e-3
    losses = [done.stages[0].before, *(stage.after for stage in done.stages)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_folding_gives_the_same_function_in_the_datas_coordinates():
    params, x = problem(6, 4)
    y = x[0] @ params["kernel"] + params["bias"]
    frame = linear_codes.coordinates(x[0], y)
    np.testing.assert_allclose(np.cov((x[0] - frame.mean) @ frame.whiten, rowvar=False, bias=True),
                               np.eye(6), atol=1e-9)  # fmt: skip
    both = compose(*linear_codes.init_linear(jax.random.key(0), 6, 2, 4))
    both.params["decoder"]["bias"] += 0.3
    z, _ = linear_codes.transform(frame, x[0], y)
    inside = np.asarray(both(jnp.asarray(z)), float)
    outside = linear_codes.fold(both, frame)(x[0])
    np.testing.assert_allclose(outside, frame.offset + frame.scale * inside, atol=1e-4)


def test_errors():
    params, x = problem(6, 4)
    root = linear_codes.root(x[0])
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank must be 1 to .* 4, got {rank}"):
            linear_codes.reduced_rank(params["kernel"], root, rank)
    with pytest.raises(ValueError, match="rank must be 1 to the smaller of 6 inputs and 4"):
        linear_codes.init_linear(jax.random.key(0), 6, 7, 4)
    with pytest.raises(ValueError, match="root must be"):
        linear_codes.optimum(params["kernel"], root[:, 1:])
    with pytest.raises(ValueError, match="x must be finite, but 1 values are not"):
        linear_codes.root(np.where(x[0] == x[0].max(), np.nan, x[0]))
    with pytest.raises(ValueError, match="as many rows, got 2000 and 5"):
        linear_codes.coordinates(x[0], x[0][:5])
    with pytest.raises(ValueError, match="nothing to encode"):
        linear_codes.coordinates(x[0], np.ones((2000, 2)))
    thin = linear_codes.reduced_rank(params["kernel"], root, 2)
    with pytest.raises(ValueError, match=r"must make a \(6, 4\) kernel, got one of \(6, 1\)"):
        linear_codes.error(params["kernel"], root, thin._replace(decoder=thin.decoder[:, :1]))
    frame = linear_codes.coordinates(x[0], x[0] @ params["kernel"])
    with pytest.raises(ValueError, match=r"must be \(6, 4\) wide, got \(6, 1\)"):
        linear_codes.transform(frame, x[0], x[0][:, :1])
    with pytest.raises(ValueError, match=r"must be \[batch, 6\] .*, got \(2000, 5\)"):
        linear_codes.affine(params, x[0][:, :5])

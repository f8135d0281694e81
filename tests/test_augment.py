"""Augmentation: equal to SciPy's operations with the drawn amounts, and pure functions of a key."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from distill_jax import data

CROSS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
ALL = {
    "affine": functools.partial(data.random_affine, rotation=20, shear=0.2, scale=0.1, shift=2),
    "elastic": functools.partial(data.random_elastic, pixels=1.0, smoothness=2.0),
    "noise": functools.partial(data.random_noise, amount=0.2),
    "stroke": functools.partial(data.random_stroke, pixels=1.5),
}


def images(n=3, height=9, width=12, channels=2):
    """Random images with a dark frame, so that little is lost at the edge."""
    x = np.zeros((n, height, width, channels), np.float32)
    x[:, 2:-2, 2:-2] = np.random.default_rng(0).random((n, height - 4, width - 4, channels))
    return x


@pytest.fixture
def drawn(monkeypatch):
    """Lets the uniform numbers in an interval from −1 be given numbers instead."""

    def set_(*values):
        numbers = jnp.asarray(values, jnp.float32)

        def uniform(key, shape, minval=0.0):
            assert minval == -1.0
            return jnp.broadcast_to(numbers.reshape(-1, *[1] * (len(shape) - 1)), shape)

        monkeypatch.setattr(jax.random, "uniform", uniform)

    return set_


@pytest.mark.parametrize(
    "amounts", [(1, 0, 0, 0, 0), (0, -1, 0, 0, 0), (0, 0, 1, 0, 0), (-1, 1, -0.5, 1, -1)]
)
def test_affine_is_the_affine_map_of_scipy(drawn, amounts):
    drawn(*amounts)
    x = images()
    got = data.random_affine(jax.random.key(0), x, rotation=30, shear=0.4, scale=0.2, shift=1.5)
    angle, shear, scale = np.deg2rad(30) * amounts[0], 0.4 * amounts[1], 1 + 0.2 * amounts[2]
    turn = np.array(
        [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    )  # (y, x), counter-clockwise
    forward = scale * turn @ np.array([[1, 0], [shear, 1]])
    centre = (np.array(x.shape[1:3]) - 1) / 2
    moved = centre + 1.5 * np.array(amounts[3:])
    inverse = np.linalg.inv(forward)
    for i in range(len(x)):
        for c in range(2):
            expected = ndimage.affine_transform(
                x[i, ..., c], inverse, centre - inverse @ moved, order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(got[i, ..., c], expected, atol=1e-5)


@pytest.mark.parametrize(("amount", "times"), [(1.0, 2), (-1.0, 2), (0.5, 1), (-0.5, 1)])
def test_stroke_is_grey_dilation_and_erosion(drawn, amount, times):
    drawn(amount)
    x = images(channels=1)
    got = data.random_stroke(jax.random.key(0), x, pixels=2.0)
    operation = ndimage.grey_dilation if amount > 0 else ndimage.grey_erosion
    for image, expected in zip(got[..., 0], x[..., 0], strict=True):
        for _ in range(times):
            expected = operation(expected, footprint=CROSS, mode="nearest")
        np.testing.assert_allclose(image, expected, atol=1e-6)


def test_a_fraction_of_a_stroke_is_interpolated(drawn):
    x = images(channels=1)

    def change(amount):
        drawn(amount)
        return data.random_stroke(jax.random.key(0), x, pixels=2.0)

    np.testing.assert_allclose(change(0.25), (x + change(0.5)) / 2, atol=1e-6)
    np.testing.assert_allclose(change(-0.75), (change(-0.5) + change(-1.0)) / 2, atol=1e-6)


def test_the_displacements_of_elastic_distortion():
    """On a ramp the change of brightness is the displacement: the given deviation, smooth, 0 on average."""
    n, size, middle = 400, 24, slice(6, 18)
    ramp = np.broadcast_to(np.arange(size, dtype=np.float32), (n, size, size))
    for axis in (1, 2):
        x = np.swapaxes(ramp, 2, axis)[..., None]
        moved = np.asarray(
            jax.jit(functools.partial(data.random_elastic, pixels=1.5, smoothness=3.0))(
                jax.random.key(axis), x
            )
        )
        shift = (moved - x)[:, middle, middle, 0]
        assert abs(shift.mean()) < 0.1
        assert shift.std() == pytest.approx(1.5, rel=0.05)
        neighbours = np.corrcoef(shift[:, :, 1:].ravel(), shift[:, :, :-1].ravel())[0, 1]
        # Gaussian weights of deviation s: the correlation at distance 1 is exp(−1/(4·s²))
        assert neighbours == pytest.approx(np.exp(-1 / 36), abs=0.005)


def test_noise_has_at_most_its_strength_and_is_clipped():
    x = np.full((200, 16, 16, 1), 128, np.uint8)
    noise = np.asarray(data.random_noise(jax.random.key(0), x, amount=0.1), np.float32) - 128
    deviation = noise.std((1, 2, 3)) / 255
    assert deviation.min() < 0.01
    assert 0.09 < deviation.max() < 0.11
    white = data.random_noise(jax.random.key(0), np.full((20, 8, 8, 1), 255, np.uint8), amount=1.0)
    assert white.dtype == jnp.uint8
    assert float((white == 255).mean()) > 0.45  # half of the noise is upwards; nothing wraps around
    ones = data.random_noise(jax.random.key(0), np.ones((2, 8, 8, 1), np.float32), amount=0.5)
    assert float(ones.max()) == 1.0


@pytest.mark.parametrize("name", ALL)
def test_each_is_a_pure_function_of_its_key(name):
    """The same in a program; other keys and other images of a batch get other amounts; integers are rounded."""
    run = jax.jit(ALL[name])
    one = np.repeat(images(1, channels=1), 3, 0)
    a, b = run(jax.random.key(0), one), run(jax.random.key(1), one)
    np.testing.assert_allclose(a, ALL[name](jax.random.key(0), one), atol=2e-5)
    assert a.shape == one.shape
    assert a.dtype == one.dtype
    assert not np.allclose(a, b)
    assert not np.allclose(a[0], a[1])
    whole = np.round(one * 255).astype(np.uint8)
    expected = 255 * np.asarray(run(jax.random.key(0), (whole / 255).astype(np.float32)))
    got = run(jax.random.key(0), whole)
    assert got.dtype == jnp.uint8
    assert np.abs(np.asarray(got, np.float32) - expected).max() < 0.51


@pytest.mark.parametrize("name", ALL)
def test_an_amount_of_0_changes_nothing(name):
    x = images()
    zero = ALL[name].func(
        jax.random.key(0), x, **{k: 1.0 if k == "smoothness" else 0.0 for k in ALL[name].keywords}
    )
    np.testing.assert_allclose(zero, x, atol=1e-6)


def test_amounts_may_be_traced():
    """So a sweep can try them; only the number of steps of a stroke must be known."""
    x, key = images(), jax.random.key(0)
    run = jax.jit(lambda a: data.random_noise(key, data.random_affine(key, x, rotation=a, scale=a), amount=a))
    np.testing.assert_allclose(run(0.0), x, atol=1e-6)
    with pytest.raises(ValueError, match="pixels must be a number that is known"):
        jax.jit(lambda a: data.random_stroke(key, x, pixels=a))(1.0)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (data.random_affine, {"rotation": -1}, "rotation must not be negative, got -1"),
        (data.random_affine, {"shear": np.nan}, "shear must"),
        (data.random_affine, {"scale": 1.0}, r"scale must lie in \[0, 1\), got 1.0"),
        (data.random_affine, {"shift": "2"}, "shift must"),
        (data.random_elastic, {"pixels": -0.5}, "pixels must not be negative"),
        (data.random_elastic, {"pixels": 1, "smoothness": 0}, "smoothness must be positive"),
        (data.random_noise, {"amount": 2}, r"amount must lie in \[0, 1\]"),
        (data.random_stroke, {"pixels": 9}, "pixels must be finite and at most 8"),
        (data.random_stroke, {"pixels": np.inf}, "pixels must"),
    ],
)
def test_bad_amounts(function, options, message):
    with pytest.raises(ValueError, match=message):
        function(jax.random.key(0), images(), **options)


@pytest.mark.parametrize("name", ALL)
def test_bad_images_and_keys(name):
    with pytest.raises(ValueError, match=r"images must be an array \[batch, height, width, channels\]"):
        ALL[name](jax.random.key(0), images()[..., 0])
    with pytest.raises(ValueError, match="key"):
        ALL[name](0, images())
    if name == "noise":
        with pytest.raises(ValueError, match="images must be uint8, or floats from 0 to 1, got int32"):
            ALL[name](jax.random.key(0), np.ones((1, 4, 4, 1), np.int32))

"""Augmentation of image batches, as pure functions of a key."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import (
    check_at_most,
    check_count,
    check_fraction,
    check_key,
    check_not_negative,
    check_positive,
)

_PAD_ROWS, _PAD_COLUMNS = ((0, 0), (1, 1), (0, 0), (0, 0)), ((0, 0), (0, 0), (1, 1), (0, 0))


def random_shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Shifts each image by a whole number of pixels, at most ``pixels`` in each direction.

    The vertical and the horizontal shift are uniform and independent. Pixels that come in at the edge
    are 0.

    Args:
      key: draws the shifts.
      images: ``[batch, height, width, channels]``, any dtype.
      pixels: the largest shift, ≥ 0.

    Returns:
      The shifted images, of the same shape and dtype.

    Raises:
      ValueError: if ``pixels`` is no integer or negative, ``key`` no random key, or ``images`` no batch.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §3 (the jitter of two
      pixels).

    >>> random_shift(jax.random.key(0), jnp.ones((2, 8, 8, 1)), 2).shape
    (2, 8, 8, 1)
    """
    check_count("pixels", pixels, least=0)
    _check(key, images)
    if pixels == 0:
        return images
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * pixels + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def _check(key: jax.Array, images: jax.Array) -> None:
    check_key("key", key)
    if np.ndim(images) != 4 or not hasattr(images, "dtype"):
        got = f"shape {np.shape(images)}" if hasattr(images, "dtype") else type(images).__name__
        raise ValueError(f"images must be an array [batch, height, width, channels], got {got}")


def random_flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability ½.

    Together with :func:`random_shift` by four pixels it is the usual augmentation of CIFAR.

    Args:
      key: draws which images are mirrored.
      images: ``[batch, height, width, channels]``, any dtype.

    Returns:
      The images, of the same shape and dtype.

    References:
      He et al., `Deep Residual Learning`, 2016, §4.2 (CIFAR-10; with shifts of four pixels).

    Raises:
      ValueError: if ``key`` is no random key, or ``images`` no batch.

    >>> random_flip(jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 1)
    """
    _check(key, images)
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def random_affine(
    key: jax.Array,
    images: jax.Array,
    *,
    rotation: ArrayLike = 0.0,
    shear: ArrayLike = 0.0,
    scale: ArrayLike = 0.0,
    shift: ArrayLike = 0.0,
) -> jax.Array:
    """Rotates, shears, scales and shifts each image about its centre, by amounts that are uniform on ± the given.

    Pixels are interpolated from the four nearest. What comes in at the edge is 0.

    Args:
      key: draws the amounts, independently for each image.
      images: ``[batch, height, width, channels]``, any dtype.
      rotation: the largest angle in degrees, ≥ 0; it turns either way.
      shear: the largest shear, ≥ 0: by how many pixels one row moves against the row below it.
      scale: the largest relative change of the size, in [0, 1): 0.1 gives 90 to 110 %.
      shift: the largest shift in pixels, ≥ 0, independently up and down, and left and right.

    Returns:
      The images, of the same shape and dtype; integers are rounded.

    Raises:
      ValueError: if an amount is not of that form, ``key`` no random key, or ``images`` no batch.

    References:
      Simard, Steinkraus, Platt, `Best Practices for Convolutional Neural Networks`, 2003, §2.

    >>> random_affine(jax.random.key(0), jnp.ones((2, 8, 8, 1)), rotation=10, shear=0.1, shift=2).shape
    (2, 8, 8, 1)
    """
    _check(key, images)
    for name, amount in {"rotation": rotation, "shear": shear, "shift": shift}.items():
        check_not_negative(name, amount)
    check_fraction("scale", scale, without=1)
    batch, height, width, _ = images.shape
    angle, slant, grow, down, right = jax.random.uniform(key, (5, batch, 1, 1), minval=-1.0)
    angle, slant = angle * jnp.deg2rad(rotation), slant * shear
    grow = 1 + grow * scale
    y = jnp.arange(height)[:, None] - (height - 1) / 2 - down * shift
    x = jnp.arange(width) - (width - 1) / 2 - right * shift
    # Where a pixel of the result comes from: the inverse of shear, then rotation, then scaling
    y, x = (y * jnp.cos(angle) - x * jnp.sin(angle)) / grow, (y * jnp.sin(angle) + x * jnp.cos(angle)) / grow
    return _sample(images, y + (height - 1) / 2, x - slant * y + (width - 1) / 2)


def random_elastic(
    key: jax.Array, images: jax.Array, *, pixels: ArrayLike, smoothness: ArrayLike = 4.0
) -> jax.Array:
    """Distorts each image like rubber: each pixel moves by a random amount that changes smoothly over the image.

    Both coordinates of the displacement are normal noise, smoothed by a Gaussian and scaled to the standard
    deviation ``pixels`` at every pixel. Pixels are interpolated from the four nearest; what comes in at the
    edge is 0.

    Args:
      key: draws the displacements.
      images: ``[batch, height, width, channels]``, any dtype.
      pixels: the standard deviation of the displacement, in pixels, ≥ 0.
      smoothness: the standard deviation of the Gaussian, in pixels, above 0. Far below 1 the image dissolves;
        far above the image's size it is shifted as a whole.

    Returns:
      The images, of the same shape and dtype; integers are rounded.

    Raises:
      ValueError: if an amount is not of that form, ``key`` no random key, or ``images`` no batch.

    References:
      Simard, Steinkraus, Platt, `Best Practices for Convolutional Neural Networks`, 2003, §2 (there the noise
      is uniform and scaled by a constant).

    >>> random_elastic(jax.random.key(0), jnp.ones((2, 8, 8, 1)), pixels=1.0).shape
    (2, 8, 8, 1)
    """
    _check(key, images)
    check_not_negative("pixels", pixels)
    check_positive("smoothness", smoothness)
    batch, height, width, _ = images.shape

    def smooth(size):
        """Weights ``[size, size]`` whose rows have norm 1, so that smoothed noise keeps variance 1."""
        distance = jnp.arange(size)[:, None] - jnp.arange(size)
        weights = jnp.exp(-0.5 * jnp.square(distance / smoothness))
        return weights / jnp.linalg.norm(weights, axis=1, keepdims=True)

    noise = jax.random.normal(key, (2, batch, height, width))
    y, x = pixels * (smooth(height) @ noise @ smooth(width).T)
    return _sample(images, jnp.arange(height)[:, None] + y, jnp.arange(width) + x)


def random_noise(key: jax.Array, images: jax.Array, *, amount: ArrayLike) -> jax.Array:
    """Adds normal noise to each image, of a strength that is uniform from 0 to ``amount``.

    Args:
      key: draws each image's strength, and the noise.
      images: ``[batch, height, width, channels]``, uint8, or floats from 0 to 1.
      amount: the largest standard deviation, as a fraction of the range of the pixels, in [0, 1].

    Returns:
      The images, of the same shape and dtype, clipped to the range of the pixels.

    Raises:
      ValueError: if ``amount`` is not of that form, ``key`` no random key, or ``images`` no batch of uint8 or
        floats.

    >>> random_noise(jax.random.key(0), jnp.ones((2, 8, 8, 1)), amount=0.1).shape
    (2, 8, 8, 1)
    """
    _check(key, images)
    check_fraction("amount", amount)
    if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images must be uint8, or floats from 0 to 1, got {images.dtype}")
    most = 255 if images.dtype == jnp.uint8 else 1
    strength, noise = jax.random.split(key)
    deviation = most * amount * jax.random.uniform(strength, (len(images), 1, 1, 1))
    noisy = images.astype(jnp.float32) + deviation * jax.random.normal(noise, images.shape)
    return _as(images.dtype, jnp.clip(noisy, 0, most))


def random_stroke(key: jax.Array, images: jax.Array, *, pixels: float) -> jax.Array:
    """Thickens or thins the bright strokes of each image, by an amount that is uniform on ± ``pixels``.

    Thickening is grey dilation: each pixel becomes the brightest of itself and its four neighbours. Thinning
    is grey erosion, the darkest. A fraction of a pixel is interpolated. At the edge the image goes on as its
    last row or column.

    Args:
      key: draws the amounts.
      images: ``[batch, height, width, channels]``, any dtype.
      pixels: the largest amount, from 0 to 8; no traced value, since it sets the number of steps.

    Returns:
      The images, of the same shape and dtype; integers are rounded.

    Raises:
      ValueError: if ``pixels`` is not of that form, ``key`` no random key, or ``images`` no batch.

    >>> random_stroke(jax.random.key(0), jnp.ones((2, 8, 8, 1)), pixels=1.0).shape
    (2, 8, 8, 1)
    """
    _check(key, images)
    if isinstance(pixels, jax.core.Tracer):
        raise ValueError(
            "pixels must be a number that is known when the function is traced, got a traced value"
        )
    check_not_negative("pixels", pixels)
    check_at_most("pixels", pixels, 8)
    amount = pixels * jax.random.uniform(key, (len(images), 1, 1, 1), minval=-1.0)
    x = images.astype(jnp.float32)
    thick = thin = changed = x
    for step in range(int(np.ceil(pixels))):
        thicker, thinner = _neighbours(jnp.maximum, thick), _neighbours(jnp.minimum, thin)
        changed += jnp.clip(amount - step, 0, 1) * (thicker - thick)
        changed += jnp.clip(-amount - step, 0, 1) * (thinner - thin)
        thick, thin = thicker, thinner
    return _as(images.dtype, changed)


def _neighbours(extreme: Callable[..., jax.Array], images: jax.Array) -> jax.Array:
    """The largest or smallest of each pixel and its four neighbours."""
    rows, columns = (jnp.pad(images, pad, mode="edge") for pad in (_PAD_ROWS, _PAD_COLUMNS))
    found = extreme(images, extreme(rows[:, 2:], rows[:, :-2]))
    return extreme(found, extreme(columns[:, :, 2:], columns[:, :, :-2]))


def _sample(images: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Interpolates images ``[batch, height, width, channels]`` at the places y and x ``[batch, height, width]``."""

    def one(channel, y, x):
        return jax.scipy.ndimage.map_coordinates(channel, [y, x], order=1, mode="constant")

    y, x = jnp.broadcast_arrays(y, x)
    channels = jax.vmap(one, in_axes=(-1, None, None), out_axes=-1)
    return _as(images.dtype, jax.vmap(channels)(images.astype(jnp.float32), y, x))


def _as(dtype: np.dtype, images: jax.Array) -> jax.Array:
    """Returns images in a dtype, rounded if it is one of integers."""
    return (images if jnp.issubdtype(dtype, jnp.floating) else jnp.round(images)).astype(dtype)

"""Augmentation of log-mel pictures: speaker, microphone, background, and masks."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, check_not_negative
from distill_jax.data.sound._arguments import check_factor, check_low_high, checked_picture
from distill_jax.data.sound.mel import RANGE


def random_warp(
    key: jax.Array, image: jax.Array, *, time: float = 1.0, frequency: float = 1.0, shift: float = 0.0
) -> jax.Array:
    """Stretches each spectrogram in time and, independently of it, in frequency, and moves it in time.

    A factor is exp(u), u uniform from −ln(largest) to ln(largest). Time is stretched about the middle. Band b, from 1,
    moves to b times the factor, as it does where the vocal tract is longer or shorter, as far as the bands are spaced
    equally in Hz. Pixels are interpolated between neighbours in both directions, and what comes in at an edge is 0.

    Args:
      key: draws factors and shifts.
      image: floats ``[..., height, width, 1]``, see :func:`mel_image`.
      time: the largest factor by which the sound gets longer or shorter, ≥ 1.
      frequency: the largest factor by which its frequencies get higher or lower, ≥ 1.
      shift: by how many frames it moves at most, earlier or later, ≥ 0; also by parts of a frame.

    Returns:
      The pictures, of the same shape and dtype.

    Raises:
      ValueError: for an argument that is not valid.

    References:
      Jaitly, Hinton, `Vocal Tract Length Perturbation (VTLP) improves speech recognition`, 2013 (the stretching of
      frequency).

    >>> random_warp(jax.random.key(0), jnp.ones((2, 32, 32, 1)), time=1.2, frequency=1.1, shift=2).shape
    (2, 32, 32, 1)
    """
    check_factor("time", time)
    check_factor("frequency", frequency)
    check_not_negative("shift", shift)
    return _random_warp(key, checked_picture(key, image), time, frequency, shift)


@jax.jit
def _random_warp(key, image, time, frequency, shift):
    height, width, _ = image.shape[-3:]
    longer, higher, later = jax.random.uniform(key, (3, *image.shape[:-3], 1), minval=-1.0)
    middle = (width - 1) / 2
    column = (jnp.arange(width) - middle - later * shift) * jnp.exp(longer * jnp.log(time)) + middle
    row = jnp.arange(1, height + 1) * jnp.exp(higher * jnp.log(frequency)) - 1

    def weights(place, size):
        """The shares of the old pixels in the new ones, ``[..., new, old]``."""
        return jnp.maximum(0, 1 - jnp.abs(place[..., None] - jnp.arange(size)))

    # Products of small matrices are many times faster than gathering neighbours
    rows, columns = weights(row, height), weights(column, width)
    warped = jnp.einsum("...ab,...bt->...at", rows, image[..., 0], precision="highest")
    warped = jnp.einsum("...at,...st->...as", warped, columns, precision="highest")
    return warped[..., None].astype(image.dtype)


def random_response(key: jax.Array, image: jax.Array, decibel: float) -> jax.Array:
    """Changes the tone of each spectrogram, as another microphone, room or telephone does.

    A smooth random curve over the bands is added: four cosines, of half a period to two periods, with normal
    coefficients. Then the loudest pixel is made 1 again. Silence, pixels of 0, stays silent.

    Args:
      key: draws the curves.
      image: floats ``[..., height, width, 1]``, see :func:`mel_image`.
      decibel: the standard deviation of the curves, ≥ 0.

    Returns:
      The pictures, of the same shape and dtype.

    Raises:
      ValueError: for an argument that is not valid.

    >>> random_response(jax.random.key(0), jnp.ones((2, 32, 32, 1)), 6.0).shape
    (2, 32, 32, 1)
    """
    check_not_negative("decibel", decibel)
    return _random_response(key, checked_picture(key, image), decibel)


@jax.jit
def _random_response(key, image, decibel):
    heard = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    changed = heard + _curves(key, heard) * decibel / RANGE
    return _loudest_one(jnp.where(heard != 0, changed, -jnp.inf)).astype(image.dtype)


def _curves(key, image):
    """Draws smooth curves over the bands, ``[..., height, 1, 1]``, whose standard deviation over all bands is 1."""
    height, count = image.shape[-3], 4
    waves = np.cos(np.pi * np.arange(1, count + 1)[:, None] * (np.arange(height) + 0.5) / height)
    coefficients = jax.random.normal(key, (*image.shape[:-3], count), image.dtype)
    curves = jnp.einsum("...k,kh->...h", coefficients, waves * np.sqrt(2 / count), precision="highest")
    return curves[..., None, None]


def _loudest_one(image):
    """Moves the decibels so that the loudest pixel is 1, and cuts them off below 0; silence, −∞, becomes 0.

    Comparisons with 0 and −∞ are for equality: NaN is neither, so that it is seen in the result.
    """
    loudest = image.max((-3, -2, -1), keepdims=True)
    return jnp.maximum(0, image + jnp.where(loudest == -jnp.inf, 0, 1 - loudest))


def random_background(
    key: jax.Array, image: jax.Array, *, low: float = 20.0, high: float = 80.0, colour: float = 6.0
) -> jax.Array:
    """Adds noise to each spectrogram: powers are added, pixel by pixel.

    The noise lies below the loudest pixel by a number of decibels that is uniform. A smooth random curve over the
    bands colours it, as in :func:`random_response`, and each pixel of it fluctuates as a power does that is the sum of
    four squares (χ² of 4 degrees of freedom). Then the loudest pixel is made 1 again. Silence stays silent.

    Args:
      key: draws noise, loudness and colour.
      image: floats ``[..., height, width, 1]``, see :func:`mel_image`.
      low: how far the noise lies below the loudest pixel at least, in decibels.
      high: how far it lies below at most.
      colour: the standard deviation of the noise over the bands, in decibels, ≥ 0.

    Returns:
      The pictures, of the same shape and dtype.

    Raises:
      ValueError: for an argument that is not valid.

    >>> random_background(jax.random.key(0), jnp.ones((2, 32, 32, 1))).shape
    (2, 32, 32, 1)
    """
    check_low_high(low, high)
    check_not_negative("colour", colour)
    return _random_background(key, checked_picture(key, image), low, high, colour)


@jax.jit
def _random_background(key, image, low, high, colour):
    keys = jax.random.split(key, 3)
    heard = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    loudest = heard.max((-3, -2, -1), keepdims=True)
    below = low + (high - low) * jax.random.uniform(keys[0], loudest.shape, heard.dtype)
    noise = loudest + (_curves(keys[1], heard) * colour - below) / RANGE
    # Half the sum of two exponential numbers; jax.random.gamma takes thirty times as long
    uniform = jax.random.uniform(keys[2], (2, *heard.shape), heard.dtype, minval=jnp.finfo(heard.dtype).tiny)
    power = jnp.where(heard != 0, _power_of(heard), 0) - _power_of(noise) * jnp.log(uniform).sum(0) / 2
    mixed = jnp.where(loudest != 0, jnp.log(power) / math.log(10) * 10 / RANGE, -jnp.inf)
    return _loudest_one(mixed).astype(image.dtype)


def _power_of(image):
    return jnp.exp(image * (RANGE / 10 * math.log(10)))


def random_mask(key: jax.Array, image: jax.Array, *, time: int = 0, frequency: int = 0) -> jax.Array:
    """Silences a random run of frames and a random run of bands of each spectrogram.

    A run has 0 to so many frames or bands, all lengths being equally likely, and lies anywhere inside of the picture.

    Args:
      key: draws lengths and places.
      image: floats ``[..., height, width, 1]``, see :func:`mel_image`.
      time: the largest number of frames, ≥ 0 and at most the width.
      frequency: the largest number of bands, ≥ 0 and at most the height.

    Returns:
      The pictures, of the same shape and dtype.

    Raises:
      ValueError: for an argument that is not valid.

    References:
      Park et al., `SpecAugment`, 2019, arXiv 1904.08779, §2 (one mask each, without time warping).

    >>> random_mask(jax.random.key(0), jnp.ones((2, 32, 32, 1)), time=4, frequency=4).shape
    (2, 32, 32, 1)
    """
    image = checked_picture(key, image)
    for name, most, size in (("time", time, image.shape[-2]), ("frequency", frequency, image.shape[-3])):
        check_count(name, most, least=0)
        if most > size:
            raise ValueError(f"{name} must be at most the size of the picture, {size}, got {most}")
    return _random_mask(key, image, time, frequency)


@jax.jit
def _random_mask(key, image, time, frequency):
    def kept(key, size, most):
        keys, one = jax.random.split(key), (*image.shape[:-3], 1)
        length = jax.random.randint(keys[0], one, 0, most + 1)
        first = jax.random.randint(keys[1], one, 0, size - length + 1)
        place = jnp.arange(size)
        return (place < first) | (place >= first + length)

    keys = jax.random.split(key)
    bands, frames = kept(keys[0], image.shape[-3], frequency), kept(keys[1], image.shape[-2], time)
    return jnp.where(bands[..., :, None, None] & frames[..., None, :, None], image, 0)

"""Augmentation of waveforms: speed, place in time, loudness, noise."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, check_not_negative
from distill_jax.data.sound._arguments import check_factor, check_low_high, checked_sound


def random_speed(key: jax.Array, waveform: jax.Array, factor: float) -> jax.Array:
    """Plays each sound faster or slower, by at most a factor, which changes its pitch and its length together.

    The factor of each sound is exp(u), u uniform from −ln ``factor`` to ln ``factor``. The middle of the array
    stays where it is: zeros come in at both ends, or what does not fit is cut off at both. Samples between
    samples are sums of eight neighbours by Lanczos's kernel; what a faster sound has above ``rate`` / 2 is folded
    back, as it is not filtered out before.

    Args:
      key: draws the factors.
      waveform: floats ``[..., samples]``.
      factor: the largest factor, ≥ 1.

    Returns:
      The sounds, of the same shape and dtype.

    Raises:
      ValueError: if ``factor`` is below 1, ``key`` no random key, or ``waveform`` no array of floats.

    References:
      Ko et al., `Audio Augmentation for Speech Recognition`, 2015 (factors of 0.9 and 1.1).

    >>> random_speed(jax.random.key(0), jnp.ones((2, 8000)), 1.2).shape
    (2, 8000)
    """
    check_factor("factor", factor)
    return _random_speed(key, checked_sound(key, waveform), factor)


@jax.jit
def _random_speed(key, waveform, factor):
    samples, taps = waveform.shape[-1], np.arange(-3, 5)
    faster = jnp.expm1(
        jnp.log(factor) * jax.random.uniform(key, (*waveform.shape[:-1], 1), minval=-1, maxval=1)
    )
    # Sample i is taken from i + (i − middle) · faster. In a long sound float32 cannot hold that place, so its whole
    # part is a sum of integers: i − middle = 4096 · coarse + fine, and faster = steps / 4096 + rest
    i = jnp.arange(samples)
    coarse, fine = jnp.divmod(i - samples // 2, 4096)
    fine = fine + (0.0 if samples % 2 else 0.5)
    steps = jnp.round(4096 * faster)
    moved = fine * faster + 4096 * coarse * (faster - steps / 4096)
    before = jnp.floor(moved)
    index = (i + coarse * steps.astype(jnp.int32) + before.astype(jnp.int32))[..., None] + taps
    # The kernel sinc(d) sinc(d / 4) at the distances d = part − taps, by the sine of a difference: one pair of sines
    # per sample and not per neighbour
    part = (moved - before)[..., None]
    distance = jnp.pi * (part - taps)
    wave, slow = jnp.sin(jnp.pi * part) * np.cos(jnp.pi * taps), jnp.pi / 4
    slow = jnp.sin(slow * part) * np.cos(slow * taps) - jnp.cos(slow * part) * np.sin(slow * taps)
    near_zero = jnp.abs(distance) < 1e-3
    kernel = jnp.where(near_zero, 1, 4 * wave * slow / jnp.where(near_zero, 1, distance**2))
    weight = jnp.where((index >= 0) & (index < samples), kernel, 0)

    def take(sound, index):
        return sound[jnp.clip(index, 0, samples - 1)]

    near = jnp.vectorize(take, signature="(n),(n,k)->(n,k)")(waveform, index)
    return jnp.sum(near * weight, axis=-1).astype(waveform.dtype)


def random_shift(key: jax.Array, waveform: jax.Array, samples: int) -> jax.Array:
    """Moves each sound earlier or later by a whole number of samples, uniform up to ``samples``.

    Samples that come in at an end are 0, and what is moved past an end is lost.

    Args:
      key: draws the shifts.
      waveform: floats ``[..., samples]``.
      samples: the largest shift, ≥ 0.

    Returns:
      The sounds, of the same shape and dtype.

    Raises:
      ValueError: if ``samples`` is no integer or negative, ``key`` no random key, or ``waveform`` no array of
        floats.

    >>> random_shift(jax.random.key(0), jnp.ones((2, 8000)), 800).shape
    (2, 8000)
    """
    check_count("samples", samples, least=0)
    return _random_shift(key, checked_sound(key, waveform), samples)


@jax.jit
def _random_shift(key, waveform, most):
    shift = jax.random.randint(key, (*waveform.shape[:-1], 1), -most, most + 1)
    place = jnp.arange(waveform.shape[-1]) - shift
    inside = (place >= 0) & (place < waveform.shape[-1])
    return jnp.where(inside, jnp.take_along_axis(waveform, place * inside, axis=-1), 0)


def random_gain(key: jax.Array, waveform: jax.Array, decibel: float) -> jax.Array:
    """Makes each sound louder or softer, uniform in decibels up to ``decibel``.

    Args:
      key: draws the gains.
      waveform: floats ``[..., samples]``.
      decibel: the largest gain, ≥ 0; 20 are a factor of 10.

    Returns:
      The sounds, of the same shape and dtype. They are not clipped.

    Raises:
      ValueError: if ``decibel`` is negative, ``key`` no random key, or ``waveform`` no array of floats.

    >>> random_gain(jax.random.key(0), jnp.ones((2, 8000)), 6.0).shape
    (2, 8000)
    """
    check_not_negative("decibel", decibel)
    return _random_gain(key, checked_sound(key, waveform), decibel)


@jax.jit
def _random_gain(key, waveform, decibel):
    gain = decibel * jax.random.uniform(key, (*waveform.shape[:-1], 1), minval=-1, maxval=1)
    return (waveform * 10 ** (gain / 20)).astype(waveform.dtype)


def random_noise(
    key: jax.Array, waveform: jax.Array, *, low: float = 10.0, high: float = 40.0, tilt: float = 1.0
) -> jax.Array:
    """Adds noise to each sound, at a ratio of signal to noise that is uniform in decibels.

    The power of the noise falls with the frequency as 1/fᵃ, a uniform from 0 (white) to ``tilt`` (1 is pink).
    The ratio is that of the mean powers of the whole array, padding included. Silence stays silent.

    Args:
      key: draws ratios, tilts and noise.
      waveform: floats ``[..., samples]``.
      low: the lowest ratio, in decibels.
      high: the highest ratio, in decibels.
      tilt: the largest exponent a, ≥ 0.

    Returns:
      The sounds, of the same shape and dtype.

    Raises:
      ValueError: if ``low`` is above ``high``, ``tilt`` negative, ``key`` no random key, or ``waveform`` no array
        of floats.

    >>> random_noise(jax.random.key(0), jnp.ones((2, 8000))).shape
    (2, 8000)
    """
    check_low_high(low, high)
    check_not_negative("tilt", tilt)
    return _random_noise(key, checked_sound(key, waveform), low, high, tilt)


@jax.jit
def _random_noise(key, waveform, low, high, tilt):
    keys, one = jax.random.split(key, 3), (*waveform.shape[:-1], 1)
    sound = waveform.astype(jnp.promote_types(waveform.dtype, jnp.float32))
    white = jax.random.normal(keys[0], sound.shape, sound.dtype)
    frequency = jnp.maximum(jnp.arange(sound.shape[-1] // 2 + 1), 1)
    fall = frequency ** (-0.5 * tilt * jax.random.uniform(keys[1], one, sound.dtype))
    noise = jnp.fft.irfft(jnp.fft.rfft(white) * fall, sound.shape[-1])
    ratio = low + (high - low) * jax.random.uniform(keys[2], one, sound.dtype)
    wanted = _power(sound) * 10 ** (-ratio / 10) / _power(noise)
    heard = wanted != 0  # the root has no gradient at 0
    return (sound + noise * jnp.where(heard, jnp.sqrt(jnp.where(heard, wanted, 1)), 0)).astype(waveform.dtype)


def _power(sound):
    return jnp.square(sound).mean(-1, keepdims=True)

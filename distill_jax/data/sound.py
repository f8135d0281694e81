"""Log-mel spectrograms of waveforms, and the augmentation of sound as pure functions of a key.

All functions are jitted. A waveform is an array of floats, as a rule from −1 to 1, whose last axis is time. A picture
is what :func:`mel_image` draws: floats ``[..., height, width, 1]`` from 0 to 1, bands by frames, of 80 decibels.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import (
    check_choice,
    check_count,
    check_finite,
    check_key,
    check_not_negative,
    check_positive,
    shown,
)


def log_mel(
    waveform: ArrayLike,
    *,
    rate: float,
    n_fft: int = 512,
    hop: int = 256,
    mels: int = 32,
    frames: int | None = None,
    low: float = 0.0,
    high: float | None = None,
    scale: str = "slaney",
    area: bool = True,
    padding: str = "zeros",
    peak: bool = False,
    dynamic_range: float = 80.0,
    floor: float = 1e-10,
) -> jax.Array:
    """Computes the log-mel spectrogram: the power in bands of frequency over time, in decibels.

    Frame t is the ``n_fft`` samples around sample t · ``hop``, times a periodic Hann window. Its power
    spectrum |FFT|² is summed by triangles whose corners are equally spaced in mel, and

        dB = 10 log₁₀ max(power, floor), at least the loudest value of the sound − ``dynamic_range``.

    With f in Hz, ``"htk"`` is mel = 2595 log₁₀(1 + f/700). ``"slaney"`` is mel = 3f/200 below 1 kHz and
    15 + 27 ln(f/1000) / ln 6.4 above. The values equal ``librosa.power_to_db`` of ``librosa.feature.melspectrogram``
    with their defaults, and with ``scale="htk", area=False, padding="reflect"`` torchaudio's ``MelSpectrogram``
    and ``AmplitudeToDB``. The loudest value is that of each sound, and not of a whole batch.

    Args:
      waveform: floats ``[..., samples]``.
      rate: samples per second.
      n_fft: samples per frame.
      hop: samples from one frame to the next.
      mels: number of bands.
      frames: how many frames to return, from the first; by default all:
        1 + samples // ``hop``, for an odd ``n_fft`` 1 + (samples − 1) // ``hop``.
      low: where the lowest band begins, in Hz.
      high: where the highest band ends, in Hz; by default ``rate`` / 2.
      scale: ``"slaney"`` or ``"htk"``, how mel depends on the frequency.
      area: whether each triangle has the area 1 (in Hz); otherwise its height is 1.
      padding: what stands before the first and after the last sample: ``"zeros"``, or the sound mirrored,
        ``"reflect"``.
      peak: whether decibels count from the loudest value of the sound, which then is 0, or from a power of 1.
      dynamic_range: how far below the loudest value of the sound the spectrogram ends, in decibels.
      floor: the least power that counts.

    Returns:
      ``[..., mels, frames]`` in decibels, float64 for float64 and float32 otherwise.

    Raises:
      ValueError: for an argument that is not valid; if the sound is shorter than ``frames`` need, or than half a
        frame where it is mirrored; if a band is so narrow that no frequency of the FFT lies in it.

    References:
      Davis, Mermelstein, `Comparison of parametric representations for monosyllabic word recognition`, 1980
      (triangles on the mel scale). The two scales: Young et al., `The HTK Book`, §5.4; Slaney, `Auditory
      Toolbox`, version 2, 1998.

    >>> log_mel(jnp.zeros((2, 7936)), rate=8000).shape
    (2, 32, 32)
    """
    sound = _checked(waveform)
    numbers: dict[str, Any] = {
        "rate": rate,
        "low": low,
        "high": high,
        "dynamic_range": dynamic_range,
        "floor": floor,
    }
    for name, number in numbers.items():
        if np.ndim(number):
            raise ValueError(f"{name} must be one number, got {shown(number)}")
    check_positive("rate", rate)
    for name, count in (("n_fft", n_fft), ("hop", hop), ("mels", mels)):
        check_count(name, count)
    high = rate / 2 if high is None else high
    check_finite("low", low)
    check_finite("high", high)
    if not 0 <= low < high <= rate / 2:
        raise ValueError(
            f"low and high must be 0 ≤ low < high ≤ rate / 2 = {rate / 2:g}, got {low:g} and {high:g}"
        )
    check_choice("scale", scale, ("slaney", "htk"))
    check_choice("padding", padding, ("zeros", "reflect"))
    check_positive("dynamic_range", dynamic_range)
    check_positive("floor", floor)
    samples = sound.shape[-1]
    available = 1 + (samples + 2 * (n_fft // 2) - n_fft) // hop
    if frames is not None:
        check_count("frames", frames)
    if (frames or 1) > available:
        raise ValueError(
            f"waveform must have at least {((frames or 1) - 1) * hop + n_fft % 2} samples for {frames or 1} frames, "
            f"got {samples}: pad it with zeros"
        )
    if padding == "reflect" and samples <= n_fft // 2:
        raise ValueError(
            f"waveform must have more than n_fft // 2 = {n_fft // 2} samples to be mirrored, got {samples}"
        )
    bank = _triangles(float(rate), n_fft, mels, float(low), float(high), scale, bool(area)).astype(
        sound.dtype
    )
    return _log_mel(
        sound, bank, dynamic_range, floor,
        n_fft=n_fft, hop=hop, frames=frames or available, padding=padding, peak=bool(peak),
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("n_fft", "hop", "frames", "padding", "peak"))
def _log_mel(waveform, bank, dynamic_range, floor, *, n_fft, hop, frames, padding, peak):
    edges = [(0, 0)] * (waveform.ndim - 1) + [(n_fft // 2, n_fft // 2)]
    padded = jnp.pad(waveform, edges, mode="constant" if padding == "zeros" else "reflect")
    places = np.arange(frames)[:, None] * hop + np.arange(n_fft)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(waveform.dtype)
    spectrum = jnp.fft.rfft(padded[..., places] * window)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    power = jnp.einsum("mf,...tf->...mt", bank, power, precision="highest")
    decibel = 10 * jnp.log10(jnp.maximum(power, floor))
    loudest = decibel.max((-2, -1), keepdims=True)
    decibel = jnp.maximum(decibel, loudest - dynamic_range)
    return decibel - loudest if peak else decibel


@functools.lru_cache
def _triangles(
    rate: float, n_fft: int, mels: int, low: float, high: float, scale: str, area: bool
) -> np.ndarray:
    """The weights ``[mels, n_fft // 2 + 1]`` of the FFT's frequencies in each band."""
    lowest, highest = _mel(np.array([low, high]), scale)
    corners = _hertz(np.linspace(lowest, highest, mels + 2), scale)
    frequencies = np.arange(n_fft // 2 + 1) * rate / n_fft
    ramps = (frequencies - corners[:, None]) / np.diff(corners, append=np.inf)[:, None]
    falls = (corners[2:, None] - frequencies) / np.diff(corners)[1:, None]
    bank = np.maximum(0, np.minimum(ramps[:-2], falls))
    empty = np.flatnonzero(~bank.any(1))
    if len(empty):
        raise ValueError(
            f"mels must be few enough for n_fft: of {mels} bands from {low:g} to {high:g} Hz, {len(empty)} hold none "
            f"of the frequencies of n_fft={n_fft}, {rate / n_fft:g} Hz apart; give fewer mels or a larger n_fft"
        )
    return bank * 2 / (corners[2:] - corners[:-2])[:, None] if area else bank


_RANGE = 80.0  # decibels from 0 to 1 in a picture
# Slaney's scale is linear below 1 kHz, which is 15 mel, and logarithmic above
_LOG_STEP = math.log(6.4) / 27


def _mel(hertz: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 2595 * np.log10(1 + hertz / 700)
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + np.log(np.maximum(hertz, 1000) / 1000) / _LOG_STEP)


def _hertz(mel: np.ndarray, scale: str) -> np.ndarray:
    if scale == "htk":
        return 700 * (10 ** (mel / 2595) - 1)
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(_LOG_STEP * (np.maximum(mel, 15) - 15)))


def mel_image(waveform: ArrayLike, *, rate: float, height: int = 32, width: int = 32) -> jax.Array:
    """Draws waveforms as pictures of any size: log-mel spectrograms from 0 to 1.

    The picture spans the sound from the left edge to the right, and the frequencies from 0 to ``rate`` / 2 from
    row 0 downwards. The hop is samples // (``width`` − 1), so up to ``width`` − 2 samples lie beyond the middle of the
    last frame: of a sound that has few samples per frame, the end may be missing.

    A pixel is 1 + dB / 80, where dB counts from the loudest pixel of the sound, and 0 for what is 80 dB weaker or less.
    So the picture does not depend on how loud the sound is; that of silence is 0.
    A frame is the smallest power of two that is at least two hops long, and long enough for ``height`` bands.

    Args:
      waveform: floats ``[..., samples]``, with at least ``width`` − 1 samples.
      rate: samples per second.
      height: number of mel bands (Slaney's scale).
      width: number of frames, at least 2.

    Returns:
      ``[..., height, width, 1]`` from 0 to 1, float64 for float64 and float32 otherwise.

    Raises:
      ValueError: for an argument that is not valid, or too short a sound.

    >>> mel_image(jnp.zeros((2, 7936)), rate=8000).shape
    (2, 32, 32, 1)
    """
    sound = _checked(waveform)
    check_positive("rate", rate)
    check_count("height", height)
    check_count("width", width, least=2)
    hop = sound.shape[-1] // (width - 1)
    if hop < 1:
        raise ValueError(
            f"waveform must have at least width - 1 = {width - 1} samples, got {sound.shape[-1]}: pad it with zeros"
        )
    # The lowest band is the narrowest; its two sides must span one of the FFT's frequencies
    lowest = float(_hertz(_mel(np.array(rate / 2), "slaney") / (height + 1), "slaney"))
    n_fft = 2 ** math.ceil(math.log2(max(2 * hop, rate / lowest)))
    loudest = jnp.max(jnp.abs(sound), axis=-1, keepdims=True)
    heard = loudest != 0  # NaN is no silence, and must be seen
    sound = sound / jnp.where(heard, loudest, 1)
    decibel = log_mel(
        sound, rate=rate, n_fft=n_fft, hop=hop, mels=height, frames=width, peak=True, dynamic_range=_RANGE
    )
    return jnp.where(heard[..., None, None], 1 + decibel[..., None] / _RANGE, 0)


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
    check_positive("factor", factor)
    if not isinstance(factor, jax.core.Tracer) and factor < 1:
        raise ValueError(f"factor must be at least 1, got {factor}")
    return _random_speed(key, _drawn(key, waveform), factor)


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
    return _random_shift(key, _drawn(key, waveform), samples)


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
    return _random_gain(key, _drawn(key, waveform), decibel)


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
    check_finite("low", low)
    check_finite("high", high)
    check_not_negative("tilt", tilt)
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer) and low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    return _random_noise(key, _drawn(key, waveform), low, high, tilt)


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
    for name, factor in (("time", time), ("frequency", frequency)):
        check_positive(name, factor)
        if not isinstance(factor, jax.core.Tracer) and factor < 1:
            raise ValueError(f"{name} must be at least 1, got {factor}")
    check_not_negative("shift", shift)
    return _random_warp(key, _picture(key, image), time, frequency, shift)


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
    return _random_response(key, _picture(key, image), decibel)


@jax.jit
def _random_response(key, image, decibel):
    heard = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    changed = heard + _curves(key, heard) * decibel / _RANGE
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
    check_finite("low", low)
    check_finite("high", high)
    check_not_negative("colour", colour)
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer) and low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}")
    return _random_background(key, _picture(key, image), low, high, colour)


@jax.jit
def _random_background(key, image, low, high, colour):
    keys = jax.random.split(key, 3)
    heard = image.astype(jnp.promote_types(image.dtype, jnp.float32))
    loudest = heard.max((-3, -2, -1), keepdims=True)
    below = low + (high - low) * jax.random.uniform(keys[0], loudest.shape, heard.dtype)
    noise = loudest + (_curves(keys[1], heard) * colour - below) / _RANGE
    # Half the sum of two exponential numbers; jax.random.gamma takes thirty times as long
    uniform = jax.random.uniform(keys[2], (2, *heard.shape), heard.dtype, minval=jnp.finfo(heard.dtype).tiny)
    power = jnp.where(heard != 0, _power_of(heard), 0) - _power_of(noise) * jnp.log(uniform).sum(0) / 2
    mixed = jnp.where(loudest != 0, jnp.log(power) / math.log(10) * 10 / _RANGE, -jnp.inf)
    return _loudest_one(mixed).astype(image.dtype)


def _power_of(image):
    return jnp.exp(image * (_RANGE / 10 * math.log(10)))


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
    image = _picture(key, image)
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


def _picture(key: jax.Array, image: jax.Array) -> jax.Array:
    check_key("key", key)
    if not hasattr(image, "dtype") or not jnp.issubdtype(image.dtype, jnp.floating):
        kind = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"image must be floats, got {kind}: divide uint8 by 255")
    if image.ndim < 3 or image.shape[-1] != 1 or not image.size:
        raise ValueError(
            f"image must be [..., height, width, 1], as mel_image draws it, got shape {image.shape}"
        )
    return image


def _drawn(key: jax.Array, waveform: jax.Array) -> jax.Array:
    check_key("key", key)
    if not hasattr(waveform, "dtype"):
        raise ValueError(f"waveform must be an array [..., samples], got {type(waveform).__name__}")
    _checked(waveform)
    return waveform


def _checked(waveform: Any) -> jax.Array:
    if not hasattr(waveform, "dtype"):
        waveform = np.asarray(waveform)
    if not jnp.issubdtype(waveform.dtype, jnp.floating):
        raise ValueError(f"waveform must be floats, got {waveform.dtype}: divide 16-bit samples by 32768")
    if waveform.ndim < 1 or not waveform.size:
        raise ValueError(f"waveform must be [..., samples] and not empty, got shape {waveform.shape}")
    array = jnp.asarray(waveform)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))

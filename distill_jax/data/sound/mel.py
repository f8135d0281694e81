"""Log-mel spectrograms in decibels, and pictures of them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_choice, check_count, check_finite, check_positive, shown
from distill_jax.data.sound._arguments import checked_waveform

RANGE = 80.0  # decibels from 0 to 1 in a picture
# Slaney's scale is linear below 1 kHz, which is 15 mel, and logarithmic above
_LOG_STEP = math.log(6.4) / 27


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
    sound = checked_waveform(waveform)
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
    sound = checked_waveform(waveform)
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
        sound, rate=rate, n_fft=n_fft, hop=hop, mels=height, frames=width, peak=True, dynamic_range=RANGE
    )
    return jnp.where(heard[..., None, None], 1 + decibel[..., None] / RANGE, 0)

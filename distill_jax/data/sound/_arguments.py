"""Checks of the arguments that functions of sound share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_finite, check_key, check_positive


def check_factor(name: str, factor: Any) -> None:
    """Refuses a largest factor that is below 1."""
    check_positive(name, factor)
    if not isinstance(factor, jax.core.Tracer) and factor < 1:
        raise ValueError(f"{name} must be at least 1, got {factor}")


def check_low_high(low: Any, high: Any) -> None:
    """Refuses limits that are not finite, or exchanged."""
    check_finite("low", low)
    check_finite("high", high)
    if not isinstance(low, jax.core.Tracer) and not isinstance(high, jax.core.Tracer) and low > high:
        raise ValueError(f"low must be at most high, got {low} and {high}")


def checked_picture(key: jax.Array, image: jax.Array) -> jax.Array:
    """Returns pictures that are to be changed at random, or refuses them or the key."""
    check_key("key", key)
    if not hasattr(image, "dtype") or not jnp.issubdtype(image.dtype, jnp.floating):
        kind = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"image must be floats, got {kind}: divide uint8 by 255")
    if image.ndim < 3 or image.shape[-1] != 1 or not image.size:
        raise ValueError(
            f"image must be [..., height, width, 1], as mel_image draws it, got shape {image.shape}"
        )
    return image


def checked_sound(key: jax.Array, waveform: jax.Array) -> jax.Array:
    """Returns waveforms that are to be changed at random, or refuses them or the key."""
    check_key("key", key)
    if not hasattr(waveform, "dtype"):
        raise ValueError(f"waveform must be an array [..., samples], got {type(waveform).__name__}")
    checked_waveform(waveform)
    return waveform


def checked_waveform(waveform: Any) -> jax.Array:
    """Returns waveforms as floats of at least 32 bits, or refuses what is no waveform."""
    if not hasattr(waveform, "dtype"):
        waveform = np.asarray(waveform)
    if not jnp.issubdtype(waveform.dtype, jnp.floating):
        raise ValueError(f"waveform must be floats, got {waveform.dtype}: divide 16-bit samples by 32768")
    if waveform.ndim < 1 or not waveform.size:
        raise ValueError(f"waveform must be [..., samples] and not empty, got shape {waveform.shape}")
    array = jnp.asarray(waveform)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))

"""Log-mel spectrograms of waveforms, and the augmentation of sound as pure functions of a key.

All functions are jitted. A waveform is an array of floats, as a rule from −1 to 1, whose last axis is time. A picture
is what :func:`mel_image` draws: floats ``[..., height, width, 1]`` from 0 to 1, bands by frames, of 80 decibels.
"""

from distill_jax.data.sound.mel import log_mel, mel_image
from distill_jax.data.sound.pictures import random_background, random_mask, random_response, random_warp
from distill_jax.data.sound.waveforms import random_gain, random_noise, random_shift, random_speed

__all__ = [
    "log_mel", "mel_image", "random_background", "random_gain", "random_mask", "random_noise", "random_response",
    "random_shift", "random_speed", "random_warp",
]  # fmt: skip

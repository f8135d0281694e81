"""Image, sound and text data sets as NumPy arrays, and their augmentation as pure functions of a key."""

from distill_jax.data import sound, text
from distill_jax.data._errors import DataError
from distill_jax.data.arrays import from_arrays
from distill_jax.data.augment import (
    random_affine,
    random_elastic,
    random_flip,
    random_noise,
    random_shift,
    random_stroke,
)
from distill_jax.data.datasets import load
from distill_jax.data.splits import Dataset, Origins, Split

__all__ = [
    "DataError", "Dataset", "Origins", "Split", "from_arrays", "load", "random_affine", "random_elastic",
    "random_flip", "random_noise", "random_shift", "random_stroke", "sound", "text",
]  # fmt: skip

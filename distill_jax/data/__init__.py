"""Image data sets as NumPy arrays, and their augmentation as pure functions of a key."""

from distill_jax.data.augment import random_flip, random_shift
from distill_jax.data.datasets import DataError, Dataset, Split, load

__all__ = ["DataError", "Dataset", "Split", "load", "random_flip", "random_shift"]

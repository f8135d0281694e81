"""Random distortions of the pictures of characters, printed and spoken."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from distill_jax import data
from harness import readers
from harness.experiment import plain, prepare


def distort_print(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Distorts printed characters: width of the strokes, an affine map, and smooth displacements."""
    keys = jax.random.split(key, 3)
    x = data.random_stroke(keys[0], images, pixels=strength)
    x = data.random_affine(
        keys[1], x, rotation=10 * strength, shear=0.2 * strength, scale=0.2 * strength, shift=2 * strength
    )
    return data.random_elastic(keys[2], x, pixels=strength)


def distort_speech(key: jax.Array, images: jax.Array, strength: float) -> jax.Array:
    """Changes spectrograms as another speaker does: length of the sound, of the vocal tract, and a shift in time."""
    return data.sound.random_warp(
        key, images, time=1 + 0.25 * strength, frequency=1 + 0.15 * strength, shift=3 * strength
    )


# The distortion of pictures by the kind of the data set: (key, floats from 0 to 1, strength) -> pictures
DISTORTIONS: Mapping[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "print": distort_print, "speech": distort_speech,
}  # fmt: skip
STRONGEST = 4.0  # beyond it the change of size would be more than 80 %


def distorted(dataset: data.Dataset, strength: float) -> Callable[..., dict[str, Any]]:
    """Makes a ``transform`` that prepares the pictures of a batch and distorts each at random."""
    if not strength:
        return plain
    distort = DISTORTIONS[readers.kind(dataset)]
    return lambda context, batch, key: {**batch, "image": distort(key, prepare(batch["image"]), strength)}

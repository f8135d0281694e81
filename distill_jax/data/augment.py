"""Augmentation of image batches, as pure functions of a key."""

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, check_key


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

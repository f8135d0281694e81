"""Augmentation of image batches, as pure functions of a key."""

import jax
import jax.numpy as jnp


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
      ValueError: if ``pixels`` is negative.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §3 (the jitter of two
      pixels).

    >>> random_shift(jax.random.key(0), jnp.ones((2, 8, 8, 1)), 2).shape
    (2, 8, 8, 1)
    """
    if pixels < 0:
        raise ValueError(f"pixels must not be negative, got {pixels}")
    if pixels == 0:
        return images
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    corners = jax.random.randint(key, (batch, 2), 0, 2 * pixels + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


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

    >>> random_flip(jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 1)
    """
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)

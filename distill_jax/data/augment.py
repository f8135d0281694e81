"""Augmentation of image batches, as pure functions of a key."""

import jax
import jax.numpy as jnp


def random_shift(key: jax.Array, images: jax.Array, pixels: int) -> jax.Array:
    """Moves each image by a whole number of pixels, up to ``pixels`` in each direction.

    The vertical and the horizontal shift are uniform and independent; what comes in is 0.

    Args:
      key: draws the shifts.
      images: ``[batch, height, width, channels]``, any dtype.
      pixels: the largest shift, ≥ 0.

    Returns:
      As ``images``.

    References:
      The jitter of Hinton, Vinyals, Dean, 2015, §3 (there two pixels).
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

    With :func:`random_shift` of four pixels the standard augmentation of CIFAR.

    Args:
      key: draws which.
      images: ``[batch, height, width, channels]``, any dtype.

    Returns:
      As ``images``.

    References:
      He et al., `Deep Residual Learning`, 2016, §4.2 (CIFAR-10; shifts of four pixels there too).
    """
    mirrored = jax.random.bernoulli(key, shape=(images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)

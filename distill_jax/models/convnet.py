"""A small convolutional network."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax._checks import check_fraction
from distill_jax.models.layers import BatchNorm, check


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """Halves the resolution: the maximum of each 2×2 block of pixels. Odd edges are dropped.

    It is computed as the maximum of four strided slices, and its gradient in one pass. On a CPU the gradient
    takes a small part of the time of ``reduce_window``'s. Equal values share the gradient.

    Args:
      x: images ``[batch, height, width, channels]``.

    Returns:
      An array ``[batch, height // 2, width // 2, channels]``.
    """
    batch, height, width, channels = x.shape
    return _max_pool(jax.lax.slice(x, (0, 0, 0, 0), (batch, height // 2 * 2, width // 2 * 2, channels)))


def _quarters(x: jax.Array) -> list[jax.Array]:
    """Returns the pixels of even and odd rows and columns, by slices also where the batch has a symbolic size."""
    return [jax.lax.slice(x, (0, i, j, 0), x.shape, (1, 2, 2, 1)) for i in range(2) for j in range(2)]


@jax.custom_jvp
def _max_pool(x: jax.Array) -> jax.Array:
    a, b, c, d = _quarters(x)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))


@_max_pool.defjvp
def _max_pool_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative in blocks ``[batch, height, 2, width, 2, channels]``, whose transpose is elementwise.

    A pixel's share follows from comparisons of pixels. (A comparison with their maximum may fail for all of them where
    the compiler computes a pixel twice and rounds it differently.)
    """
    (x,), (dx,) = primals, tangents
    a, b, c, d = _quarters(x)
    above, below = jnp.maximum(a, b), jnp.maximum(c, d)

    def share(p, q):
        """The share of ``p`` in the gradient of max(p, q), for each pixel of a block."""
        return jnp.where(p > q, 1, jnp.where(p == q, 0.5, 0)).astype(x.dtype)[:, :, None, :, None]

    batch, height, width, channels = above.shape
    blocks = (batch, height, 2, width, 2, channels)
    first_row, first_column = (jax.lax.broadcasted_iota(jnp.int32, blocks, axis) == 0 for axis in (2, 4))
    row, column = share(above, below), jnp.where(first_row, share(a, b), share(c, d))
    part = jnp.where(first_row, row, 1 - row) * jnp.where(first_column, column, 1 - column)
    return jnp.maximum(above, below), (part * dx.reshape(blocks)).sum((2, 4))


class ConvNet(nnx.Module):
    """A LeNet-like network: (convolution, [BatchNorm,] ReLU, 2×2 max-pool) × n, dense, dense.

    It follows LeCun et al., `Gradient-Based Learning Applied to Document Recognition`, 1998, with ReLU in
    the place of tanh, and max-pooling in the place of trained averages.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      channels: the number of channels of each convolution.
      hidden: the number of units of the hidden dense layer.
      kernel: the height and width of the convolutions' kernels. Images are padded and keep their size.
      dropout: the fraction of the hidden dense layer's inputs and units that is dropped in training.
      batch_norm: whether to normalise after each convolution.
      axis_name: the mapped axis over which BatchNorm averages; None on one device, and under ``jit``.
      rngs: the random streams ``params`` (initial values: He normal) and ``dropout`` (masks).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        channels: Sequence[int] = (16, 32),
        hidden: int = 128,
        kernel: int = 5,
        dropout: float = 0.0,
        batch_norm: bool = False,
        axis_name: str | None = None,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, 1.0)
        check_fraction("dropout", dropout, without=1)
        height, width, features = shape
        pools = len(channels)
        if not pools or min(height, width) >> pools < 1:
            raise ValueError(
                f"channels must have 1 to {min(height, width).bit_length() - 1} entries for images "
                f"of {height}×{width} (each halves the image), got {tuple(channels)}"
            )
        he = nnx.initializers.he_normal()
        sizes = list(zip([features, *channels[:-1]], channels, strict=True))
        self.convolution = nnx.List(
            nnx.Conv(
                a, b, (kernel, kernel), padding="SAME", use_bias=not batch_norm, kernel_init=he,
                rngs=rngs,
            )
            for a, b in sizes
        )  # fmt: skip
        self.norm = nnx.List(BatchNorm(b, axis_name=axis_name, rngs=rngs) for _, b in sizes if batch_norm)
        flat = (height >> pools) * (width >> pools) * channels[-1]
        self.hidden = nnx.Linear(flat, hidden, kernel_init=he, rngs=rngs)
        self.head = nnx.Linear(hidden, classes, kernel_init=he, rngs=rngs)
        self.dropout = nnx.List(nnx.Dropout(dropout, rngs=rngs) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[batch, height, width, channels]`` to logits ``[batch, classes]``."""
        for i, convolution in enumerate(self.convolution):
            x = convolution(x)
            if self.norm:
                x = self.norm[i](x)
            x = max_pool_2x2(nnx.relu(x))
        x = self.dropout[0](x.reshape(x.shape[0], -1))
        return self.head(self.dropout[1](nnx.relu(self.hidden(x))))

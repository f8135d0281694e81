"""A convolutional network for pictures of single characters."""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx

from distill_jax._checks import check_fraction, is_integer
from distill_jax.models.convnet import max_pool_2x2
from distill_jax.models.layers import check


class Characters(nnx.Module):
    """Two 3×3 convolutions (32 and 64 channels), one 2×2 max-pool, and dense layers; ReLU between all of them.

    Of 1×32×32 pixels the pool leaves 16,384 numbers. With ``hidden=(512, 128)`` and 62 classes the network has
    8,481,598 parameters, with ``hidden=(512,)`` 8,439,742: most of them are in the first dense layer.

    Args:
      shape: ``(height, width, channels)`` of an image, height and width at least 2.
      classes: the number of classes, which is the number of outputs.
      hidden: the number of units of each hidden dense layer.
      dropout: the fraction of each hidden dense layer's units that is dropped in training.
      rngs: the random streams ``params`` (initial values: He normal) and ``dropout`` (masks).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        hidden: Sequence[int] = (512, 128),
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, 1.0)
        check_fraction("dropout", dropout, without=1)
        height, width, features = shape
        if min(height, width) < 2:
            raise ValueError(
                f"height and width must be at least 2, as the network halves both, got {height}×{width}"
            )
        if not all(map(is_integer, hidden)) or min(hidden, default=1) < 1:
            raise ValueError(f"hidden must be numbers of units, all ≥ 1, got {tuple(hidden)}")
        he = nnx.initializers.he_normal()
        self.convolution = nnx.List(
            nnx.Conv(a, b, (3, 3), padding="SAME", kernel_init=he, rngs=rngs)
            for a, b in ((features, 32), (32, 64))
        )
        sizes = (height // 2 * (width // 2) * 64, *hidden, classes)
        self.dense = nnx.List(
            nnx.Linear(a, b, kernel_init=he, rngs=rngs) for a, b in itertools.pairwise(sizes)
        )
        self.dropout = nnx.List(nnx.Dropout(dropout, rngs=rngs) for _ in hidden)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[batch, height, width, channels]`` to logits ``[batch, classes]``."""
        for convolution in self.convolution:
            x = nnx.relu(convolution(x))
        x = max_pool_2x2(x).reshape(x.shape[0], -1)
        for dense, dropout in zip(self.dense[:-1], self.dropout, strict=True):
            x = dropout(nnx.relu(dense(x)))
        return self.dense[-1](x)

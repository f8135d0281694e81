"""Vision transformers for small images."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from distill_jax._checks import check_count
from distill_jax.models.layers import Layers, Network, Stage, check, scale

HEAD = 32  # the number of features of a head


class Patches(nnx.Module):
    """A linear map of patches that do not overlap, and a learned position for each."""

    def __init__(self, layers: Layers, shape: tuple[int, int, int], patch: int, width: int):
        self.conv = nnx.Conv(
            shape[2], width, (patch, patch), patch, padding="VALID", dtype=layers.dtype,
            param_dtype=layers.param_dtype, rngs=layers.rngs,
        )  # fmt: skip
        places = (shape[0] // patch, shape[1] // patch, width)
        self.positions = nnx.Param(0.02 * jax.random.normal(layers.rngs.params(), places, layers.param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, height / patch, width / patch, features]``."""
        x = self.conv(x)
        return x + self.positions[...].astype(x.dtype)


class Block(nnx.Module):
    """Attention among all places, and a dense layer of four times the width with GELU; LayerNorm before each."""

    def __init__(self, layers: Layers, width: int):
        options: dict[str, Any] = {
            "dtype": layers.dtype,
            "param_dtype": layers.param_dtype,
            "rngs": layers.rngs,
        }
        self.norm1 = nnx.LayerNorm(width, **options)
        self.attention = nnx.MultiHeadAttention(width // HEAD, width, decode=False, **options)
        self.norm2 = nnx.LayerNorm(width, **options)
        self.up = nnx.Linear(width, 4 * width, **options)
        self.down = nnx.Linear(4 * width, width, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, features]`` to the same shape."""
        y = x.reshape(x.shape[0], -1, x.shape[-1])
        y = y + self.attention(self.norm1(y))
        y = y + self.down(nnx.gelu(self.up(self.norm2(y))))
        return y.reshape(x.shape)


class ViT(Network):
    """A vision transformer: patches with learned positions, blocks, LayerNorm, and the mean over all places.

    It takes images of ``shape`` only. There is no token of the class.

    Args:
      shape: ``(height, width, channels)`` of an image; ``patch`` divides height and width.
      classes: the number of classes, which is the number of outputs.
      depth: the number of blocks, in three stages of equal size where that is possible.
      patch: the height and width of a patch in pixels.
      width: a factor for the number of features, which is 192 times it, rounded to a multiple of 32. A head has 32.
      dropout: the fraction of the last layer's inputs that is dropped in training.
      axis_name: without effect, since no statistics are averaged over the batch.
      dtype: the dtype in which all but statistics, embedding and logits is computed; None means that of the images and
        parameters.
      param_dtype: the dtype of the parameters.
      rngs: the random streams ``params`` (initial values: Flax's defaults) and ``dropout`` (masks).

    References:
      Dosovitskiy et al., `An Image is Worth 16x16 Words`, ICLR 2021, §3.1; the mean in place of a token of the class
      after Beyer et al., `Better plain ViT baselines for ImageNet-1k`, 2022.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        depth: int = 6,
        patch: int = 4,
        width: float = 1.0,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, width)
        check_count("depth", depth)
        check_count("patch", patch)
        if shape[0] % patch or shape[1] % patch:
            raise ValueError(f"patch must divide the height and width of an image, got {patch} and {shape}")
        layers = Layers(rngs, axis_name, dtype, param_dtype)
        channels = scale(192, width, HEAD)
        stem = Patches(layers, shape, patch, channels)
        blocks = [Block(layers, channels) for _ in range(depth)]
        count = min(3, depth)
        ends = [round(i * depth / count) for i in range(count + 1)]
        stages = [Stage(blocks[i:j]) for i, j in itertools.pairwise(ends)]
        neck = nnx.LayerNorm(channels, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(layers, stem, stages, neck, channels, classes, dropout=dropout)

    def _preactivations(self) -> list[str]:
        return self._features()  # a stage ends without a nonlinearity

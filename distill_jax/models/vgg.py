"""VGG for small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.convnet import max_pool_2x2
from distill_jax.models.layers import Layers, Network, Stage, Unit, check, last_blocks, scale

CHANNELS = (64, 128, 256, 512, 512)
# Depth → convolutions in each stage. (The depth counts three dense layers, as the paper's nets have.)
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class PooledStage(Stage):
    """2×2 max-pooling, then a stage."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Halves the resolution, then runs the blocks."""
        return super().__call__(max_pool_2x2(x))


class VGG(Network):
    """Five stages of 3×3 convolutions with max-pooling between them, and one dense layer.

    The stem is the first stage; pooling stands before ``stages.0`` to ``stages.2``, and before
    ``stages.3`` for images of 64×64 and more. A pooling that would leave nothing (8×8 images shrink
    to 1×1 in three) is left out. Before the last ReLU of a stage: its last block's ``norm``, or its
    ``conv`` without BatchNorm.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: outputs.
      depth: 8, 11, 13, 16 or 19.
      width: multiplies the channels, 64 to 512.
      batch_norm: normalise after each convolution (the convolutions keep their bias, which then does
        nothing, as in the reference).
      dropout: dropped fraction of the head's inputs, in training mode.
      axis_name: the axis over which BatchNorm's statistics are shared, under ``pmap`` or
        ``shard_map``; none for one device, and none under ``jit`` with a sharded batch.
      dtype: the convolutions compute in this; by default in that of images and parameters. Statistics,
        embedding and logits are float32.
      param_dtype: the parameters'.
      rngs: ``params`` initialises (normal, He's fan-out); ``dropout`` is the stream of the masks.

    References:
      Simonyan and Zisserman, `Very Deep Convolutional Networks`, ICLR 2015, Table 1 (A, B, D, E), with
      one dense layer on the mean over space in the place of three, as in HobbitLong/RepDistiller
      ``models/vgg.py``, whose depth 8 has one convolution a stage.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        depth: int = 8,
        width: float = 1.0,
        batch_norm: bool = True,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, width)
        if depth not in CONVOLUTIONS:
            raise ValueError(f"VGG's depth must be one of {list(CONVOLUTIONS)}, got {depth}")
        layers = Layers(rngs, axis_name, dtype, param_dtype)
        channels = [scale(c, width) for c in CHANNELS]
        size = min(shape[:2])
        stages: list[Stage] = []
        inputs = shape[2]
        for i, (outputs, count) in enumerate(zip(channels, CONVOLUTIONS[depth], strict=True)):
            pooled = size >= 2 and (1 <= i <= 3 or (i == 4 and min(shape[:2]) >= 64))
            size = size // 2 if pooled else size
            units = [
                Unit(layers, a, outputs, bias=True, batch_norm=batch_norm)
                for a in [inputs, *[outputs] * (count - 1)]
            ]
            stages.append((PooledStage if pooled else Stage)(units))
            inputs = outputs
        super().__init__(layers, stages[0], stages[1:], None, channels[-1], classes, dropout=dropout)
        self.batch_norm = batch_norm

    def _preactivations(self):
        return [f"{name}.{'norm' if self.batch_norm else 'conv'}" for name in last_blocks(self)]

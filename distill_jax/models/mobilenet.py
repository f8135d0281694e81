"""MobileNetV2 for small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.layers import Layers, Network, Stage, Unit, check

# Channels, blocks and stride of each stage (the paper's Table 2, strides for small images)
STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nnx.Module):
    """1×1 convolution to more channels, a depthwise 3×3, and 1×1 to few without activation."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int, expansion: int):
        hidden = inputs * expansion
        self.conv1 = layers.conv(inputs, hidden, 1)
        self.norm1 = layers.norm(hidden)
        self.conv2 = layers.conv(hidden, hidden, stride=stride, groups=hidden)
        self.norm2 = layers.norm(hidden)
        self.conv3 = layers.conv(hidden, outputs, 1)
        self.norm3 = layers.norm(outputs)
        self.residual = stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, inputs]`` to ``[batch, height', width', outputs]``."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return x + y if self.residual else y


class MobileNetV2(Network):
    """A strided convolution, seven stages of inverted residuals, a 1×1 convolution.

    The resolution is halved four times, by the stem and by ``stages.2``, ``.3`` and ``.5``; maps of
    one pixel stay so. The stages' outputs have no ReLU: they are their own pre-activations.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: outputs.
      width: multiplies the channels (rounded down), but the last convolution's 1280 only if it is
        above 1. RepDistiller's ``MobileNetV2`` has ``width=0.5``.
      expansion: how many times as many channels a block has inside: T.
      dropout: dropped fraction of the head's inputs, in training mode.
      axis_name: the axis over which BatchNorm's statistics are shared, under ``pmap`` or
        ``shard_map``; none for one device, and none under ``jit`` with a sharded batch.
      dtype: the convolutions compute in this; by default in that of images and parameters. Statistics,
        embedding and logits are float32.
      param_dtype: the parameters'.
      rngs: ``params`` initialises (normal, He's fan-out); ``dropout`` is the stream of the masks.

    References:
      Sandler et al., `MobileNetV2`, CVPR 2018, Table 2; as in HobbitLong/RepDistiller
      ``models/mobilenetv2.py``, which departs from the paper: ReLU for ReLU6, a 1×1 convolution also in
      the first block, no stride in the second stage, channels not rounded to multiples of 8.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: float = 1.0,
        expansion: int = 6,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, width)
        if expansion < 1:
            raise ValueError(f"expansion must be at least 1, got {expansion}")
        layers = Layers(rngs, axis_name, dtype, param_dtype)
        inputs = max(1, int(32 * width))
        stem = Unit(layers, shape[2], inputs, stride=2)
        stages = []
        for i, (channels, count, stride) in enumerate(STAGES):
            outputs = max(1, int(channels * width))
            blocks = []
            for j in range(count):
                first = (stride if j == 0 else 1, expansion if i else 1)
                blocks.append(InvertedResidual(layers, inputs, outputs, *first))
                inputs = outputs
            stages.append(Stage(blocks))
        last = int(1280 * max(width, 1.0))
        neck = Unit(layers, inputs, last, 1)
        super().__init__(layers, stem, stages, neck, last, classes, dropout=dropout)

    def _features(self):
        # The last stage of each resolution, and the fourth for the third
        return [f"stages.{i}" for i in (1, 2, 4, 6)]

    _preactivations = _features

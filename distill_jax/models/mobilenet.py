"""MobileNetV2 for small images."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from distill_jax.models.layers import Layers, Network, Stage, Unit, check

# Channels, number of blocks and stride of each stage (the paper's Table 2, with strides for small images)
STAGES = ((16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))


class InvertedResidual(nnx.Module):
    """A 1×1 convolution to more channels, a depthwise 3×3, and a 1×1 to few channels without a ReLU."""

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

    The stem, ``stages.2``, ``stages.3`` and ``stages.5`` each halve the resolution, down to one pixel.
    No ReLU follows the output of a stage, so the output is also the pre-activation.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      width: a factor for the numbers of channels, which are rounded down. The last convolution has at
        least 1280 channels. RepDistiller's ``MobileNetV2`` has ``width=0.5``.
      expansion: the ratio of the number of channels inside a block to that of its input (the paper's t).
      dropout: the fraction of the last layer's inputs that is dropped in training.
      axis_name: the mapped axis over which BatchNorm averages; None on one device, and under ``jit``.
      dtype: the dtype in which the convolutions compute; None means that of the images and parameters.
      param_dtype: the dtype of the parameters.
      rngs: the random streams ``params`` (initial values: normal, He's fan-out) and ``dropout`` (masks).

    References:
      Sandler et al., `MobileNetV2`, CVPR 2018, Table 2, with the changes that HobbitLong/RepDistiller
      ``models/mobilenetv2.py`` makes: it has ReLU where the paper has ReLU6, the first block also begins
      with a 1×1 convolution, the second stage has no stride, and channels are not rounded to multiples
      of 8.
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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
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
        # The last stage of each resolution, but stages.4 in the place of stages.3
        return [f"stages.{i}" for i in (1, 2, 4, 6)]

    _preactivations = _features

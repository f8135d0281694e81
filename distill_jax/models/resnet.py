"""Residual networks for small images."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from distill_jax.models.layers import Layers, Mark, Network, Stage, Unit, check, scale


class Shortcut(nnx.Module):
    """The shortcut where a block changes the shape: a strided 1×1 convolution and BatchNorm."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int):
        self.conv = layers.conv(inputs, outputs, 1, stride=stride)
        self.norm = layers.norm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Brings a block's input to the shape of its output."""
        return self.norm(self.conv(x))


class BasicBlock(nnx.Module):
    """A residual block: relu(x + norm(conv(relu(norm(conv(x)))))). ``preactivation`` is the sum."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int):
        self.conv1 = layers.conv(inputs, outputs, stride=stride)
        self.norm1 = layers.norm(outputs)
        self.conv2 = layers.conv(outputs, outputs)
        self.norm2 = layers.norm(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else Shortcut(layers, inputs, outputs, stride)
        self.preactivation = Mark()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, inputs]`` to ``[batch, height', width', outputs]``."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nnx.relu(self.preactivation(y + (x if self.shortcut is None else self.shortcut(x))))


class ResNet(Network):
    """A convolution and three stages of residual blocks, of which the last two halve the resolution.

    It takes images of any size. The input of a stage's last ReLU is the ``preactivation`` of its last
    block.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      depth: 6n + 2 for n blocks per stage, such as 8, 14, 20, 32, 44, 56 or 110.
      widening: the k of ``resnet8x4``, here 4: the stages have 16k, 32k and 64k channels, and the stem
        has 16, or 8k where that is more.
      width: a factor for all numbers of channels.
      dropout: the fraction of the last layer's inputs that is dropped in training.
      axis_name: the mapped axis over which BatchNorm averages; None on one device, and under ``jit``.
      dtype: the dtype in which the convolutions compute; None means that of the images and parameters.
      param_dtype: the dtype of the parameters.
      rngs: the random streams ``params`` (initial values: normal, He's fan-out) and ``dropout`` (masks).

    References:
      He et al., `Deep Residual Learning for Image Recognition`, CVPR 2016, §4.2. Where a shortcut changes
      the shape it is a convolution, after HobbitLong/RepDistiller ``models/resnet.py``; the paper pads
      with zeros. ``resnet110x2`` follows DefangChen/SimKD ``models/resnet.py``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        depth: int = 20,
        widening: int = 1,
        width: float = 1.0,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, width)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"ResNet's depth must be 6n + 2 (8, 14, 20, 32, …), got {depth}")
        if widening < 1:
            raise ValueError(f"widening must be at least 1, got {widening}")
        layers = Layers(rngs, axis_name, dtype, param_dtype)
        stem = scale(max(16, 8 * widening), width)
        stages, inputs = [], stem
        for i in range(3):
            outputs = scale(16 * 2**i * widening, width)
            blocks = []
            for j in range((depth - 2) // 6):
                blocks.append(BasicBlock(layers, inputs, outputs, 2 if i and not j else 1))
                inputs = outputs
            stages.append(Stage(blocks))
        super().__init__(layers, Unit(layers, shape[2], stem), stages, None, inputs, classes, dropout=dropout)

"""Residual networks for small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from distill_jax.models.layers import Layers, Mark, Network, Stage, Unit, check, scale


class Shortcut(nnx.Module):
    """A strided 1×1 convolution and BatchNorm."""

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int):
        self.conv = layers.conv(inputs, outputs, 1, stride=stride)
        self.norm = layers.norm(outputs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Brings a block's input to the shape of its output."""
        return self.norm(self.conv(x))


class BasicBlock(nnx.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), the sum being ``preactivation``."""

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

    Works on images of any size. Before the last ReLU of a stage: its last block's ``preactivation``.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: outputs.
      depth: 6n + 2, with n blocks a stage: 8, 14, 20, 32, 44, 56, 110.
      widening: the stages have 16, 32 and 64 times so many channels (the ``x4`` of ``resnet8x4``), and
        the stem 16, or 8 times so many where that is more.
      width: multiplies all channels.
      dropout: dropped fraction of the head's inputs, in training mode.
      axis_name: the axis over which BatchNorm's statistics are shared, under ``pmap`` or
        ``shard_map``; none for one device, and none under ``jit`` with a sharded batch.
      dtype: the convolutions compute in this; by default in that of images and parameters. Statistics,
        embedding and logits are float32.
      param_dtype: the parameters'.
      rngs: ``params`` initialises (normal, He's fan-out); ``dropout`` is the stream of the masks.

    References:
      He et al., `Deep Residual Learning for Image Recognition`, CVPR 2016, §4.2, with a convolution
      where a shortcut changes shape (the paper pads with zeros), as in HobbitLong/RepDistiller
      ``models/resnet.py``; ``resnet110x2`` as in DefangChen/SimKD ``models/resnet.py``.
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
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
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

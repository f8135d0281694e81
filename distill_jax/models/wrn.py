"""Wide residual networks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from distill_jax.models.layers import Layers, Network, Stage, check, scale


class NormRelu(nnx.Module):
    """BatchNorm followed by ReLU."""

    def __init__(self, layers: Layers, channels: int):
        self.norm = layers.norm(channels)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the same shape."""
        return nnx.relu(self.norm(x))


class WideBlock(nnx.Module):
    """A pre-activated residual block: x + conv(dropout(relu(norm(conv(relu(norm(x))))))).

    No ReLU follows the sum. Where the shape changes, a 1×1 convolution of relu(norm(x)) replaces x.
    """

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int, dropout: float):
        self.norm1 = layers.norm(inputs)
        self.conv1 = layers.conv(inputs, outputs, stride=stride)
        self.norm2 = layers.norm(outputs)
        self.dropout = nnx.Dropout(dropout, rngs=layers.rngs)
        self.conv2 = layers.conv(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else layers.conv(inputs, outputs, 1, stride=stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, inputs]`` to ``[batch, height', width', outputs]``."""
        y = nnx.relu(self.norm1(x))
        if self.shortcut is not None:
            x = self.shortcut(y)
        y = nnx.relu(self.norm2(self.conv1(y)))
        return x + self.conv2(self.dropout(y))


class WideResNet(Network):
    """WRN-d-k: a convolution, three stages of pre-activated residual blocks, BatchNorm, ReLU.

    It takes images of any size. A stage's output is a sum without a ReLU. The next ReLU's input is the
    normalisation at the start of the next stage (``stages.1.blocks.0.norm1``,
    ``stages.2.blocks.0.norm1``), or ``neck.norm`` after the last stage.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      depth: 6n + 4 for n blocks per stage, such as 10, 16, 22, 28 or 40.
      widening: the k of WRN-d-k: the stages have 16k, 32k and 64k channels, the stem 16.
      width: a factor for all numbers of channels.
      dropout: the fraction of the values between a block's two convolutions that is dropped in training.
      axis_name: the mapped axis over which BatchNorm averages; None on one device, and under ``jit``.
      dtype: the dtype in which the convolutions compute; None means that of the images and parameters.
      param_dtype: the dtype of the parameters.
      rngs: the random streams ``params`` (initial values: normal, He's fan-out) and ``dropout`` (masks).

    References:
      Zagoruyko and Komodakis, `Wide Residual Networks`, BMVC 2016, Table 1, after
      HobbitLong/RepDistiller ``models/wrn.py``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        depth: int = 16,
        widening: int = 2,
        width: float = 1.0,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, width)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WRN's depth must be 6n + 4 (10, 16, 28, 40, …), got {depth}")
        if widening < 1:
            raise ValueError(f"widening must be at least 1, got {widening}")
        layers = Layers(rngs, axis_name, dtype, param_dtype)
        stem = scale(16, width)
        stages, inputs = [], stem
        for i in range(3):
            outputs = scale(16 * 2**i * widening, width)
            blocks = []
            for j in range((depth - 4) // 6):
                stride = 2 if i and not j else 1
                blocks.append(WideBlock(layers, inputs, outputs, stride, dropout))
                inputs = outputs
            stages.append(Stage(blocks))
        first, neck = layers.conv(shape[2], stem), NormRelu(layers, inputs)
        super().__init__(layers, first, stages, neck, inputs, classes)

    def _preactivations(self):
        return [*[f"stages.{i}.blocks.0.norm1" for i in (1, 2)], "neck.norm"]

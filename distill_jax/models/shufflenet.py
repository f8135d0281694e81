"""ShuffleNet V1 and V2 for small images."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from distill_jax.models.layers import (  # fmt: skip
    UNIFORM_FAN_IN,
    Layers,
    Mark,
    Network,
    Stage,
    Unit,
    check,
    scale,
)

BLOCKS = (4, 8, 4)
# Channels of the stages and of the last convolution, by width (V2's Table 5)
CHANNELS_V2 = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Interleaves the channels of several groups, by transposing ``[groups, channels / groups]``.

    Args:
      x: an array ``[..., channels]``.
      groups: the number of groups, which divides the number of channels.

    Returns:
      An array of the same shape.
    """
    channels = x.shape[-1]
    x = x.reshape(*x.shape[:-1], groups, channels // groups)
    return x.swapaxes(-1, -2).reshape(*x.shape[:-2], channels)


class GroupedBlock(nnx.Module):
    """The block of V1: a grouped 1×1, a depthwise 3×3 and a grouped 1×1 convolution, plus the input.

    The channels are shuffled after the first convolution. With stride 2 the 3×3 mean of the input is
    appended to the result, and not added. ``preactivation`` is the input of the last ReLU.
    """

    def __init__(self, layers: Layers, inputs: int, outputs: int, stride: int, groups: int, first: bool):
        outputs -= inputs if stride == 2 else 0
        hidden = outputs // 4
        self.groups = 1 if first else groups
        self.stride = stride
        self.conv1 = layers.conv(inputs, hidden, 1, groups=self.groups)
        self.norm1 = layers.norm(hidden)
        self.conv2 = layers.conv(hidden, hidden, stride=stride, groups=hidden)
        self.norm2 = layers.norm(hidden)
        self.conv3 = layers.conv(hidden, outputs, 1, groups=groups)
        self.norm3 = layers.norm(outputs)
        self.preactivation = Mark()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, inputs]`` to ``[batch, height', width', outputs]``."""
        y = shuffle(nnx.relu(self.norm1(self.conv1(x))), self.groups)
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        if self.stride == 2:
            x = nnx.avg_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
            y = jnp.concatenate([y, x], -1)
        else:
            y = y + x
        return nnx.relu(self.preactivation(y))


class ShuffleNetV1(Network):
    """A 1×1 convolution and three stages, each of which halves the resolution.

    It takes images of any size. The input of a stage's last ReLU is the ``preactivation`` of its last
    block.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      width: a factor for the stages' 240, 480 and 960 channels, which are rounded to multiples of
        4 × ``groups``. The stem has 24 channels.
      groups: the number of groups of the 1×1 convolutions. (The paper changes the numbers of channels
        with it; here they stay those of 3 groups.)
      dropout: the fraction of the last layer's inputs that is dropped in training.
      axis_name: the mapped axis over which BatchNorm averages; None on one device, and under ``jit``.
      dtype: the dtype in which the convolutions compute; None means that of the images and parameters.
      param_dtype: the dtype of the parameters.
      rngs: the random streams ``params`` (initial values: uniform on ±1/√inputs) and ``dropout`` (masks).

    References:
      Zhang et al., `ShuffleNet`, CVPR 2018, Table 1 (1×, g = 3) and Figure 2, with two changes that
      HobbitLong/RepDistiller ``models/ShuffleNetv1.py`` makes: the stem is a 1×1 convolution without
      stride or pooling, and a ReLU follows the depthwise convolution.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: float = 1.0,
        groups: int = 3,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, width)
        if groups not in (1, 2, 3, 6):
            raise ValueError(f"groups must divide the stem's 24 by 4: 1, 2, 3 or 6; got {groups}")
        layers = Layers(rngs, axis_name, dtype, param_dtype, UNIFORM_FAN_IN)
        stages, inputs = [], 24
        for i, count in enumerate(BLOCKS):
            # Each stage's first block adds channels to its input's: there must be some to add
            outputs = max(scale(240 * 2**i, width, 4 * groups), inputs + 4 * groups)
            blocks = []
            for j in range(count):
                options = (1 if j else 2, groups, i == j == 0)
                blocks.append(GroupedBlock(layers, inputs, outputs, *options))
                inputs = outputs
            stages.append(Stage(blocks))
        stem = Unit(layers, shape[2], 24, 1)
        super().__init__(layers, stem, stages, None, inputs, classes, dropout=dropout)


class SplitBlock(nnx.Module):
    """The block of V2 with stride 1: three convolutions of one half of the channels.

    The other half passes unchanged. ``preactivation`` is both halves, before the last ReLU and the
    shuffle.
    """

    def __init__(self, layers: Layers, channels: int):
        half = channels // 2
        self.conv1 = layers.conv(half, half, 1)
        self.norm1 = layers.norm(half)
        self.conv2 = layers.conv(half, half, groups=half)
        self.norm2 = layers.norm(half)
        self.conv3 = layers.conv(half, half, 1)
        self.norm3 = layers.norm(half)
        self.preactivation = Mark()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns an array of the same shape."""
        passed, y = jnp.split(x, 2, -1)
        y = nnx.relu(self.norm1(self.conv1(y)))
        y = self.norm3(self.conv3(self.norm2(self.conv2(y))))
        passed, y = jnp.split(self.preactivation(jnp.concatenate([passed, y], -1)), 2, -1)
        return shuffle(jnp.concatenate([passed, nnx.relu(y)], -1), 2)


class DownBlock(nnx.Module):
    """The block of V2 with stride 2: two branches of the whole input, concatenated and shuffled."""

    def __init__(self, layers: Layers, inputs: int, outputs: int):
        half = outputs // 2
        self.conv1 = layers.conv(inputs, inputs, stride=2, groups=inputs)
        self.norm1 = layers.norm(inputs)
        self.conv2 = layers.conv(inputs, half, 1)
        self.norm2 = layers.norm(half)
        self.conv3 = layers.conv(inputs, half, 1)
        self.norm3 = layers.norm(half)
        self.conv4 = layers.conv(half, half, stride=2, groups=half)
        self.norm4 = layers.norm(half)
        self.conv5 = layers.conv(half, half, 1)
        self.norm5 = layers.norm(half)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, inputs]`` to half the size and ``outputs`` channels."""
        left = self.norm1(self.conv1(x))
        left = nnx.relu(self.norm2(self.conv2(left)))
        right = nnx.relu(self.norm3(self.conv3(x)))
        right = self.norm4(self.conv4(right))
        right = nnx.relu(self.norm5(self.conv5(right)))
        return shuffle(jnp.concatenate([left, right], -1), 2)


class ShuffleNetV2(Network):
    """A 1×1 convolution, three stages that each halve the resolution, a 1×1 convolution.

    It takes images of any size. The input of a stage's last ReLU is the ``preactivation`` of its last
    block, whose channels are not shuffled yet.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      width: a factor for the numbers of channels. 0.5, 1, 1.5 and 2 give the paper's numbers; any other
        value multiplies those of 1 and rounds them to even numbers. The stem has 24 channels.
      dropout: the fraction of the last layer's inputs that is dropped in training.
      axis_name: the mapped axis over which BatchNorm averages; None on one device, and under ``jit``.
      dtype: the dtype in which the convolutions compute; None means that of the images and parameters.
      param_dtype: the dtype of the parameters.
      rngs: the random streams ``params`` (initial values: uniform on ±1/√inputs) and ``dropout`` (masks).

    References:
      Ma et al., `ShuffleNet V2`, ECCV 2018, Table 5 and Figure 3. The stem is a 1×1 convolution without
      stride or pooling, after HobbitLong/RepDistiller ``models/ShuffleNetv2.py``. With width 2 the first
      stage has the paper's 244 channels, where that code has 224.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: float = 1.0,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check(shape, classes, width)
        layers = Layers(rngs, axis_name, dtype, param_dtype, UNIFORM_FAN_IN)
        scaled = tuple(scale(c, width, 2) for c in CHANNELS_V2[1.0])
        channels = CHANNELS_V2.get(width, scaled)
        stages, inputs = [], 24
        for outputs, count in zip(channels, BLOCKS, strict=False):
            rest = [SplitBlock(layers, outputs) for _ in range(count - 1)]
            stages.append(Stage([DownBlock(layers, inputs, outputs), *rest]))
            inputs = outputs
        stem, neck = Unit(layers, shape[2], 24, 1), Unit(layers, inputs, channels[3], 1)
        super().__init__(layers, stem, stages, neck, channels[3], classes, dropout=dropout)

"""ShuffleNet V1 and V2 for small images."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

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
    """Interleaves the channels of the groups: a transposition of ``[groups, channels / groups]``."""
    channels = x.shape[-1]
    x = x.reshape(*x.shape[:-1], groups, channels // groups)
    return x.swapaxes(-1, -2).reshape(*x.shape[:-2], channels)


class GroupedBlock(nnx.Module):
    """V1's unit: grouped 1×1, shuffle, depthwise 3×3, grouped 1×1; summed with its input.

    With stride 2 the 3×3 mean of the input is appended instead. ``preactivation`` is what the last
    ReLU receives.
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

    Works on images of any size. Before the last ReLU of a stage: its last block's ``preactivation``.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: outputs.
      width: multiplies the stages' channels, 240, 480 and 960, rounded to multiples of 4 × ``groups``;
        the stem has 24.
      groups: of the 1×1 convolutions. (The paper has other numbers of channels for other than 3.)
      dropout: dropped fraction of the head's inputs, in training mode.
      axis_name: the axis over which BatchNorm's statistics are shared, under ``pmap`` or
        ``shard_map``; none for one device, and none under ``jit`` with a sharded batch.
      dtype: the convolutions compute in this; by default in that of images and parameters. Statistics,
        embedding and logits are float32.
      param_dtype: the parameters'.
      rngs: ``params`` initialises (uniform on ±1/√inputs); ``dropout`` is the stream of the masks.

    References:
      Zhang et al., `ShuffleNet`, CVPR 2018, Table 1 (1×, g = 3) and Figure 2; as in
      HobbitLong/RepDistiller ``models/ShuffleNetv1.py``: the stem is a 1×1 convolution without stride
      or pooling, and the depthwise convolution has a ReLU, where the paper has none.
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
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
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
    """V2's unit: one half of the channels passes, the other goes through three convolutions.

    ``preactivation`` is both, before the last ReLU and the shuffle.
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
        """Keeps the shape."""
        passed, y = jnp.split(x, 2, -1)
        y = nnx.relu(self.norm1(self.conv1(y)))
        y = self.norm3(self.conv3(self.norm2(self.conv2(y))))
        passed, y = jnp.split(self.preactivation(jnp.concatenate([passed, y], -1)), 2, -1)
        return shuffle(jnp.concatenate([passed, nnx.relu(y)], -1), 2)


class DownBlock(nnx.Module):
    """V2's unit with stride 2: two branches from the whole input, appended and shuffled."""

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

    Works on images of any size. Before the last ReLU of a stage: its last block's ``preactivation``,
    whose channels are not shuffled yet.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: outputs.
      width: 0.5, 1, 1.5 or 2 give the paper's channels; any other multiplies those of 1, rounded to
        even numbers. The stem has 24.
      dropout: dropped fraction of the head's inputs, in training mode.
      axis_name: the axis over which BatchNorm's statistics are shared, under ``pmap`` or
        ``shard_map``; none for one device, and none under ``jit`` with a sharded batch.
      dtype: the convolutions compute in this; by default in that of images and parameters. Statistics,
        embedding and logits are float32.
      param_dtype: the parameters'.
      rngs: ``params`` initialises (uniform on ±1/√inputs); ``dropout`` is the stream of the masks.

    References:
      Ma et al., `ShuffleNet V2`, ECCV 2018, Table 5 and Figure 3; as in HobbitLong/RepDistiller
      ``models/ShuffleNetv2.py`` (the stem is a 1×1 convolution without stride or pooling), but for
      width 2, where the reference's first stage has 224 channels for the paper's 244.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: float = 1.0,
        dropout: float = 0.0,
        axis_name: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
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

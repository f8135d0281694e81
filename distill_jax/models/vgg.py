"""VGG for small images."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from distill_jax.models.convnet import max_pool_2x2
from distill_jax.models.layers import Layers, Network, Stage, Unit, check, last_blocks, scale

CHANNELS = (64, 128, 256, 512, 512)
# Depth → number of convolutions in each stage. (The depth counts the paper's three dense layers.)
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class PooledStage(Stage):
    """A stage with 2×2 max-pooling before its blocks."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Halves the resolution, then runs the blocks."""
        return super().__call__(max_pool_2x2(x))


class VGG(Network):
    """Five stages of 3×3 convolutions with max-pooling between them, and one dense layer.

    The first stage is called ``stem``. The image is pooled before ``stages.0``, ``stages.1`` and
    ``stages.2``, and before ``stages.3`` if it has 64×64 pixels or more. A pooling that would leave
    nothing is left out: three poolings shrink an 8×8 image to one pixel. The input of a stage's last
    ReLU is the ``norm`` of its last block, or the ``conv`` of that block without BatchNorm.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      depth: the number of layers with weights in the paper's network: 8, 11, 13, 16 or 19.
      width: a factor for the numbers of channels, which are 64 to 512.
      batch_norm: whether to normalise after each convolution. (The convolutions have a bias in either
        case, like the reference, although BatchNorm removes it.)
      dropout: the fraction of the last layer's inputs that is dropped in training.
      axis_name: the mapped axis over which BatchNorm averages; None on one device, and under ``jit``.
      dtype: the dtype in which the convolutions compute; None means that of the images and parameters.
      param_dtype: the dtype of the parameters.
      rngs: the random streams ``params`` (initial values: normal, He's fan-out) and ``dropout`` (masks).

    References:
      Simonyan and Zisserman, `Very Deep Convolutional Networks`, ICLR 2015, Table 1 (A, B, D, E). One
      dense layer on the mean over space replaces the paper's three, and depth 8 has one convolution per
      stage, both after HobbitLong/RepDistiller ``models/vgg.py``.
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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
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

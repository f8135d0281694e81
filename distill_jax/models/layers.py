"""The parts of the convolutional reference networks.

Every reference network except ``MLP`` and ``ConvNet`` is a :class:`Network`: ``stem``, ``stages``, in some
networks ``neck``, ``pool`` and ``head``. :func:`distill_jax.features.capture` finds a layer's output by the
layer's path: ``stages.1`` is the output of a stage, ``stages.1.blocks.0`` that of a block, and ``pool`` the
embedding that the last layer receives.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from distill_jax._checks import check_count, check_fraction, check_positive, is_integer

# Normal with variance 2 / (outputs · kernel area), He et al. 2015, Eq. 14
HE_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default of convolutions and dense layers: uniform on ±1 / √(inputs · kernel area)
UNIFORM_FAN_IN = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the biased variance of each channel."""
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes)
    return mean, jnp.maximum(0.0, jnp.square(x).mean(axes) - jnp.square(mean))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    mean, variance = _statistics(x)
    return (x - mean) * (jax.lax.rsqrt(variance + epsilon) * scale) + bias


@_normalise.defjvp
def _normalise_jvp(epsilon: float, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """The derivative, written so that its transpose has two sums over the batch.

    These are the gradients of scale and bias, from which the input's gradient follows.
    """
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    axes = tuple(range(x.ndim - 1))
    mean, variance = _statistics(x)
    inverse = jax.lax.rsqrt(variance + epsilon)
    standard = (x - mean) * inverse
    factor = inverse * scale
    dbias = dbias - factor * dx.mean(axes)
    dscale = dscale - factor * (standard * dx).mean(axes)
    return (x - mean) * factor + bias, factor * dx + dbias + standard * dscale


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation that computes in float32 (or float64) and returns the dtype of its input.

    In training the gradient passes over the batch twice: once for the sums that are the gradients of scale
    and bias, once for the input's gradient. The running variance averages biased variances, like all of
    Flax; PyTorch multiplies each by n / (n − 1). The running averages of the reference networks keep 0.9 of the
    past, which is PyTorch's default.
    """

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Normalises ``[batch, ..., channels]`` over all axes except the last."""
        usual = self.axis_name is None and self.axis == -1 and self.use_fast_variance and self.dtype is None
        if args or kwargs or self.use_running_average or not usual or self.scale is None or self.bias is None:
            return super().__call__(x, *args, **kwargs).astype(x.dtype)
        scale, bias = self.scale[...], self.bias[...]
        wide = x.astype(jnp.result_type(x, scale, bias, self.mean[...], jnp.float32))
        mean, variance = _statistics(wide)
        self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
        self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * variance
        scale, bias = scale.astype(wide.dtype), bias.astype(wide.dtype)
        return _normalise(wide, scale, bias, self.epsilon).astype(x.dtype)


class Mark(nnx.Module):
    """The identity as a module: its path is a name by which its input can be captured."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns its argument."""
        return x


@dataclass(frozen=True)
class Layers:
    """Makes the convolutions and normalisations of one network, which share these options.

    Args:
      rngs: the random streams ``params`` (initial values) and ``dropout`` (masks).
      axis_name: the axis of ``pmap`` or ``shard_map`` over which BatchNorm averages its statistics. None
        on one device, and under ``jit``, where the statistics of a sharded batch are those of the whole.
      dtype: the dtype in which the convolutions compute; None means that of the images and parameters.
        Statistics, embedding and logits are float32.
      param_dtype: the dtype of the parameters.
      kernel_init: the function that makes the initial kernels.
    """

    rngs: nnx.Rngs
    axis_name: str | None = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: nnx.Initializer = HE_FAN_OUT

    def conv(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> nnx.Conv:
        """Makes a convolution that pads by half of its kernel on each side, with any stride.

        (With a stride, ``"SAME"`` would pad an even size on one side only, which is another network.)
        """
        return nnx.Conv(
            inputs, outputs, (kernel, kernel), stride, padding=kernel // 2,
            feature_group_count=groups, use_bias=bias, dtype=self.dtype,
            param_dtype=self.param_dtype, kernel_init=self.kernel_init, rngs=self.rngs,
        )  # fmt: skip

    def norm(self, channels: int) -> BatchNorm:
        """Makes a batch normalisation."""
        # Without a dtype it computes in the widest dtype of its input, its parameters and float32
        return BatchNorm(
            channels, momentum=0.9, axis_name=self.axis_name, param_dtype=self.param_dtype,
            rngs=self.rngs,
        )  # fmt: skip


class Unit(nnx.Module):
    """A convolution, BatchNorm unless ``batch_norm`` is False, and ReLU."""

    def __init__(
        self,
        layers: Layers,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        bias: bool = False,
        batch_norm: bool = True,
    ):
        self.conv = layers.conv(inputs, outputs, kernel, stride=stride, bias=bias)
        self.norm = layers.norm(outputs) if batch_norm else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, inputs]`` to ``[batch, height', width', outputs]``."""
        x = self.conv(x)
        return nnx.relu(x if self.norm is None else self.norm(x))


class Stage(nnx.Module):
    """Blocks in a chain, of which the first may change the resolution."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Runs the blocks in turn."""
        for block in self.blocks:
            x = block(x)
        return x


class GlobalPool(nnx.Module):
    """The mean over height and width, in float32 (or float64)."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, channels]``."""
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


class Network(nnx.Module):
    """The form of the reference networks: stem → stages → neck → pool → dropout → head.

    Args:
      layers: the network's shared options, which the last layer takes too.
      stem: the module that maps images to the first features.
      stages: the stages, in their order.
      neck: the module between the last stage and the pooling, or None.
      channels: the number of channels that the pooling receives.
      classes: the number of classes, which is the number of outputs.
      dropout: the fraction of the last layer's inputs that is dropped in training.
    """

    def __init__(
        self,
        layers: Layers,
        stem: nnx.Module,
        stages: Sequence[Stage],
        neck: nnx.Module | None,
        channels: int,
        classes: int,
        *,
        dropout: float = 0.0,
    ):
        check_fraction("dropout", dropout, without=1)
        self.stem = stem
        self.stages: nnx.List[Stage] = nnx.List(stages)
        self.neck = neck
        self.pool = GlobalPool()
        self.dropout = nnx.Dropout(dropout, rngs=layers.rngs)
        # Logits are float32 in whatever dtype the convolutions compute
        self.head = nnx.Linear(
            channels, classes, param_dtype=layers.param_dtype, kernel_init=UNIFORM_FAN_IN,
            rngs=layers.rngs,
        )  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images ``[batch, height, width, channels]`` to logits ``[batch, classes]``."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        if self.neck is not None:
            x = self.neck(x)
        return self.head(self.dropout(self.pool(x)))

    def feature_names(self, *, preactivation: bool = False) -> tuple[str, ...]:
        """Lists the layers that the literature distils, from shallow to deep.

        Args:
          preactivation: whether to take the values of the stages before their last ReLU, which OFD needs,
            and not after it.

        Returns:
          The names of the stem, of the stages and of the pooled embedding. RepDistiller's models return
          the values of these layers.
        """
        stages = self._preactivations() if preactivation else self._features()
        return ("stem", *stages, "pool")

    def _features(self) -> list[str]:
        return [f"stages.{i}" for i in range(len(self.stages))]

    def _preactivations(self) -> list[str]:
        """Returns the names of the values before each stage's last ReLU."""
        return [f"{name}.preactivation" for name in last_blocks(self)]


def last_blocks(network: Network) -> list[str]:
    """Returns the path of the last block of each stage."""
    return [f"stages.{i}.blocks.{len(stage.blocks) - 1}" for i, stage in enumerate(network.stages)]


def scale(channels: int, width: float, multiple: int = 1) -> int:
    """Multiplies a number of channels by a width.

    Args:
      channels: the number of channels.
      width: the factor.
      multiple: the number of which the result is a multiple.

    Returns:
      channels · width, rounded to a multiple of ``multiple``, at least ``multiple``.
    """
    return max(multiple, round(channels * width / multiple) * multiple)


def check(shape: Sequence[int], classes: int, width: float) -> None:
    """Checks the arguments that all networks have.

    Args:
      shape: ``(height, width, channels)`` of an image.
      classes: the number of outputs, at least 1.
      width: the factor for the numbers of channels, above 0.

    Raises:
      ValueError: if an argument is not of that form.
    """
    sized = isinstance(shape, Sequence) and len(shape) == 3 and all(map(is_integer, shape))
    if not sized or min(shape) < 1:
        raise ValueError(f"shape must be (height, width, channels), all ≥ 1, got {shape}")
    check_count("classes", classes)
    check_positive("width", width)

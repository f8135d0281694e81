"""What the convolutional reference networks are made of.

Every network of this package but the two small ones is a :class:`Network`: ``stem``, ``stages``,
``neck`` (some), ``pool``, ``head``. A layer's name is its path, as :mod:`distill_jax.features.capturing` has it:
``stages.1`` is a stage's output, ``stages.1.blocks.0`` a block's, ``pool`` the penultimate embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Normal with variance 2 / (outputs · kernel area), He et al. 2015, Eq. 14
HE_FAN_OUT = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default of convolutions and dense layers: uniform on ±1 / √(inputs · kernel area)
UNIFORM_FAN_IN = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class BatchNorm(nnx.BatchNorm):
    """Batch normalisation in float32 (or float64) whatever the input; the result has its dtype.

    The running variance is the mean of biased variances, as in JAX throughout; PyTorch multiplies
    each by n / (n − 1). The running averages keep 0.9 of the past, as PyTorch's default does.
    """

    def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Normalises ``[batch, ..., channels]`` over all axes but the last."""
        return super().__call__(x, *args, **kwargs).astype(x.dtype)


class Mark(nnx.Module):
    """The identity: gives a value a module's name, so that it can be captured."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns its argument."""
        return x


@dataclass(frozen=True)
class Layers:
    """Makes convolutions and normalisations with the options that all of a network's share."""

    rngs: nnx.Rngs
    axis_name: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Any = HE_FAN_OUT

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
        """A convolution that pads by half its kernel on each side, also when it strides.

        (``"SAME"`` would pad an even size on one side only, which is another network.)
        """
        return nnx.Conv(
            inputs, outputs, (kernel, kernel), stride, padding=kernel // 2,
            feature_group_count=groups, use_bias=bias, dtype=self.dtype,
            param_dtype=self.param_dtype, kernel_init=self.kernel_init, rngs=self.rngs,
        )  # fmt: skip

    def norm(self, channels: int) -> BatchNorm:
        """A batch normalisation."""
        # Without a dtype it computes in the widest of its input's, its parameters' and float32
        return BatchNorm(
            channels, momentum=0.9, axis_name=self.axis_name, param_dtype=self.param_dtype,
            rngs=self.rngs,
        )  # fmt: skip


class Unit(nnx.Module):
    """Convolution, BatchNorm (unless told otherwise), ReLU."""

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
    """Blocks one after another, the first of which may change the resolution."""

    def __init__(self, blocks: Sequence[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Runs the blocks in turn."""
        for block in self.blocks:
            x = block(x)
        return x


class GlobalPool(nnx.Module):
    """The mean over space, in float32 (or float64): any size of map becomes ``[batch, channels]``."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, channels]`` to ``[batch, channels]``."""
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))


class Network(nnx.Module):
    """``stem`` → ``stages`` → ``neck`` (or none) → ``pool`` → dropout → ``head``.

    Args:
      layers: makes the head's options agree with the rest.
      stem: from images to the first features.
      stages: each a :class:`Stage`.
      neck: what stands between the last stage and the pooling.
      channels: what the pooling receives.
      classes: outputs.
      dropout: dropped fraction of the head's inputs, in training mode.
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
        self.stem = stem
        self.stages: nnx.List[Stage] = nnx.List(stages)
        self.neck = neck
        self.pool = GlobalPool()
        self.dropout = nnx.Dropout(dropout, rngs=layers.rngs)
        # Logits are float32 however the convolutions compute
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
        """Names the layers that the literature distils, shallow to deep.

        Args:
          preactivation: the stages' values before their last ReLU instead of after it, as OFD wants.

        Returns:
          The stem, the stages, the pooled embedding: the list that RepDistiller's models return.
        """
        stages = self._preactivations() if preactivation else self._features()
        return ("stem", *stages, "pool")

    def _features(self) -> list[str]:
        return [f"stages.{i}" for i in range(len(self.stages))]

    def _preactivations(self) -> list[str]:
        """Where the last block's ``preactivation`` is marked."""
        return [f"{name}.preactivation" for name in last_blocks(self)]


def last_blocks(network: Network) -> list[str]:
    """The paths of the last block of each stage."""
    return [f"stages.{i}.blocks.{len(stage.blocks) - 1}" for i, stage in enumerate(network.stages)]


def scale(channels: int, width: float, multiple: int = 1) -> int:
    """``channels · width``, rounded to a multiple of ``multiple``, and at least that."""
    return max(multiple, round(channels * width / multiple) * multiple)


def check(shape: Sequence[int], classes: int, width: float) -> None:
    """Checks what all networks are given.

    Args:
      shape: must be ``(height, width, channels)``.
      classes: outputs, at least 1.
      width: multiplier of the channels, above 0.

    Raises:
      ValueError: otherwise.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (height, width, channels), all ≥ 1, got {tuple(shape)}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    if not 0 < width < float("inf"):
        raise ValueError(f"width multiplies the channels and must be above 0, got {width}")

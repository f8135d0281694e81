"""Models by a short description, for command lines: ``mlp:1200,1200``, ``convnet:16,32``."""

from typing import Any

import jax
from flax import nnx

from distill_jax.models.convnet import ConvNet
from distill_jax.models.functional import Model, from_nnx
from distill_jax.models.mlp import MLP


def _mlp(widths: list[int], shape: tuple[int, int, int], classes: int, **options: Any) -> MLP:
    height, width, channels = shape
    return MLP((height * width * channels, *widths, classes), **options)


def _convnet(
    widths: list[int], shape: tuple[int, int, int], classes: int, **options: Any
) -> ConvNet:
    return ConvNet(
        shape, classes, channels=widths, kernel=3 if min(shape[:2]) < 16 else 5, **options
    )


FAMILIES = {"mlp": _mlp, "convnet": _convnet}


def build(
    description: str,
    shape: tuple[int, int, int],
    classes: int,
    key: jax.Array,
    *,
    dropout: float = 0.0,
) -> Model:
    """Builds and initialises a model.

    Args:
      description: a family and its hidden sizes: ``mlp:1200,1200`` or ``convnet:16,32`` (channels of
        the convolutions).
      shape: ``(height, width, channels)`` of an image.
      classes: outputs.
      key: initialises the parameters.
      dropout: dropped fraction of hidden units, in training.

    Raises:
      ValueError: if the description is not of that form.
    """
    family, _, sizes = description.partition(":")
    try:
        widths = [int(size) for size in sizes.split(",")]
        if family not in FAMILIES or min(widths) < 1:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"a model is described by a family ({', '.join(FAMILIES)}) and sizes ≥ 1, such as "
            f"mlp:1200,1200 or convnet:16,32; got {description!r}"
        ) from None
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    return from_nnx(FAMILIES[family](widths, shape, classes, dropout=dropout, rngs=nnx.Rngs(key)))

"""Models by a short description, for command lines: ``mlp:1200,1200``, ``vgg8:0.25``, ``resnet20``."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from distill_jax._checks import check_fraction, check_key
from distill_jax._model import Model
from distill_jax.models.characters import Characters
from distill_jax.models.convert import from_nnx
from distill_jax.models.convnet import ConvNet
from distill_jax.models.layers import Network, check
from distill_jax.models.mlp import MLP
from distill_jax.models.mobilenet import MobileNetV2
from distill_jax.models.resnet import ResNet
from distill_jax.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from distill_jax.models.vgg import VGG
from distill_jax.models.vit import ViT
from distill_jax.models.wrn import WideResNet


def _mlp(widths: list[int], shape: tuple[int, int, int], classes: int, **options: Any) -> MLP:
    height, width, channels = shape
    return MLP((height * width * channels, *widths, classes), **options)


def _convnet(widths: list[int], shape: tuple[int, int, int], classes: int, **options: Any) -> ConvNet:
    return ConvNet(shape, classes, channels=widths, kernel=3 if min(shape[:2]) < 16 else 5, **options)


def _characters(widths: list[int], shape: tuple[int, int, int], classes: int, **options: Any) -> Characters:
    return Characters(shape, classes, hidden=widths, **options)


# Networks that are described by their hidden sizes
FAMILIES = {"mlp": _mlp, "convnet": _convnet, "characters": _characters}
# Networks that are described by a name and a factor for the width. A pattern's groups are the numbers in
# the name.
NAMED: dict[str, tuple[str, Callable[..., Network]]] = {
    r"vgg(?P<depth>\d+)": ("vgg8", VGG),
    r"resnet(?P<depth>\d+)(?:x(?P<widening>\d+))?": ("resnet8x4", ResNet),
    r"wrn(?P<depth>\d+)-(?P<widening>\d+)": ("wrn16-2", WideResNet),
    r"mobilenetv2(?:-t(?P<expansion>\d+))?": ("mobilenetv2", MobileNetV2),
    r"shufflenetv1": ("shufflenetv1", ShuffleNetV1),
    r"shufflenetv2": ("shufflenetv2", ShuffleNetV2),
    r"vit(?P<depth>\d+)-(?P<patch>\d+)": ("vit6-4", ViT),
}


def nnx_module(
    description: str, shape: tuple[int, int, int], classes: int, *, rngs: nnx.Rngs, **options: Any
) -> nnx.Module:
    """Makes the NNX module of a reference network from its description.

    Args:
      description: a family and its hidden sizes, ``mlp:1200,1200``, ``convnet:16,32`` (the channels of
        the convolutions) or ``characters:512,128`` (the units of the dense layers); or the name of a
        network, with or without a factor for its channels:
        ``vgg8``, ``vgg16:0.5``, ``resnet20``, ``resnet8x4``, ``wrn16-2``, ``mobilenetv2:0.5``
        (``mobilenetv2-t3:0.5`` expands 3 times instead of 6), ``shufflenetv1``, ``shufflenetv2:1.5``,
        ``vit6-4`` (6 blocks, patches of 4 × 4 pixels).
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      rngs: the random streams that initialise the parameters and draw dropout's masks.
      options: further arguments of the module: ``dropout``; for networks with a name also ``axis_name``,
        ``dtype`` (for example ``jnp.bfloat16``) and ``param_dtype``.

    Returns:
      The module, which is called as ``module(images)``.

    Raises:
      ValueError: if the description is not of that form, or there is no network of that depth.

    >>> import jax.numpy as jnp
    >>> nnx_module("mlp:16", (8, 8, 1), 10, rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """
    if not isinstance(description, str):
        raise ValueError(f"description must be a string, such as mlp:1200,1200, got {description!r}")
    check(shape, classes, 1.0)
    family, colon, size = description.partition(":")
    try:
        if family in FAMILIES:
            sizes = [int(number) for number in size.split(",")]
            if min(sizes) < 1:
                raise ValueError
        else:
            found = ((re.fullmatch(pattern, family), cls) for pattern, (_, cls) in NAMED.items())
            match, network = next((match, cls) for match, cls in found if match)
            width = float(size) if colon else 1.0
            if not 0 < width < math.inf:
                raise ValueError
    except (ValueError, StopIteration):
        names = ", ".join(name for name, _ in NAMED.values())
        raise ValueError(
            f"a model is described by a family ({', '.join(FAMILIES)}) and sizes ≥ 1, such as "
            f"mlp:1200,1200 or convnet:16,32, or by a name and perhaps a multiplier of its width > 0, "
            f"such as {names} or vgg8:0.25; got {description!r}"
        ) from None
    check_fraction("dropout", options.get("dropout", 0.0), without=1)
    if family in FAMILIES:
        return FAMILIES[family](sizes, shape, classes, rngs=rngs, **options)
    numbers = {name: int(value) for name, value in match.groupdict().items() if value}
    return network(shape, classes, width=width, rngs=rngs, **numbers, **options)


def build(
    description: str,
    shape: tuple[int, int, int],
    classes: int,
    key: jax.Array,
    *,
    dropout: float = 0.0,
    **options: Any,
) -> Model:
    """Builds and initialises a reference network as a :class:`~distill_jax.models.Model`.

    Args:
      description: such as ``mlp:1200,1200``, ``convnet:16,32``, ``vgg8:0.25`` or ``resnet20``; see
        :func:`nnx_module`.
      shape: ``(height, width, channels)`` of an image.
      classes: the number of classes, which is the number of outputs.
      key: a random key that initialises the parameters.
      dropout: the fraction of hidden units that are dropped in training, in [0, 1).
      options: further arguments of the module, see :func:`nnx_module`.

    Returns:
      The model; its inputs are images ``[batch, height, width, channels]``, its outputs logits
      ``[batch, classes]``.

    Raises:
      ValueError: if the description is not of that form, or there is no network of that depth.

    >>> import jax.numpy as jnp
    >>> build("convnet:4", (8, 8, 1), 10, jax.random.key(0))(jnp.zeros((2, 8, 8, 1))).shape
    (2, 10)
    """
    check_key("key", key)
    rngs = nnx.Rngs(key)
    return from_nnx(nnx_module(description, shape, classes, rngs=rngs, dropout=dropout, **options))


def feature_names(
    description: str, shape: tuple[int, int, int], *, preactivation: bool = False
) -> tuple[str, ...]:
    """Lists the layers of a reference network that the literature distils, from shallow to deep.

    Args:
      description: a network with a name, see :func:`nnx_module`.
      shape: ``(height, width, channels)`` of an image.
      preactivation: whether to take the values of the stages before their last ReLU, which OFD needs,
        and not after it.

    Returns:
      Names for :func:`distill_jax.features.capture`: the stem, the stages, and at the end ``pool``, the
      embedding that the last layer receives.

    Raises:
      ValueError: if the description is a family and sizes, and not the name of a network.

    >>> feature_names("resnet20", (32, 32, 3))
    ('stem', 'stages.0', 'stages.1', 'stages.2', 'pool')
    """
    network = nnx.eval_shape(lambda: nnx_module(description, shape, 2, rngs=nnx.Rngs(0)))
    if not isinstance(network, Network):
        raise ValueError(f"{description!r} has no list of features: capture its layers by their own names")
    return network.feature_names(preactivation=preactivation)

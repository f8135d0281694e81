"""Reference models (Flax NNX), and the way from a module to a function and pytrees."""

from distill_jax.models.build import build, feature_names, module
from distill_jax.models.convnet import ConvNet
from distill_jax.models.functional import Model, from_linen, from_nnx
from distill_jax.models.mlp import MLP
from distill_jax.models.mobilenet import MobileNetV2
from distill_jax.models.resnet import ResNet
from distill_jax.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from distill_jax.models.vgg import VGG
from distill_jax.models.wrn import WideResNet

__all__ = [
    "MLP",
    "VGG",
    "ConvNet",
    "MobileNetV2",
    "Model",
    "ResNet",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "WideResNet",
    "build",
    "feature_names",
    "from_linen",
    "from_nnx",
    "module",
]

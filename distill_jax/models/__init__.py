"""Reference models (Flax NNX), and the way from a module to a function and pytrees."""

from distill_jax.models.build import build
from distill_jax.models.convnet import ConvNet
from distill_jax.models.functional import Model, from_linen, from_nnx
from distill_jax.models.mlp import MLP

__all__ = ["MLP", "ConvNet", "Model", "build", "from_linen", "from_nnx"]

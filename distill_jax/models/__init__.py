"""Models: the one form that all functions of this library take, conversions to it, and reference networks."""

from distill_jax._model import ApplyFn, Model, from_function, predict
from distill_jax.models.by_name import build, feature_names, nnx_module
from distill_jax.models.cache import extend, init_cache
from distill_jax.models.characters import Characters
from distill_jax.models.convert import compose, from_linen, from_nnx, side_by_side
from distill_jax.models.convnet import ConvNet
from distill_jax.models.encoder import EncoderConfig, build_encoder, sentence_embeddings
from distill_jax.models.files import load, save
from distill_jax.models.generation import generate
from distill_jax.models.mlp import MLP
from distill_jax.models.mobilenet import MobileNetV2
from distill_jax.models.pretrained import load_pretrained, save_pretrained
from distill_jax.models.recurrent import GRUConfig, build_gru, given_source, load_gru
from distill_jax.models.resnet import ResNet
from distill_jax.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from distill_jax.models.tensors import load_safetensors, save_safetensors
from distill_jax.models.tokenizer import Tokenizer, load_tokenizer
from distill_jax.models.transformer import (
    RopeScaling,
    TransformerConfig,
    build_transformer,
    head_kernel,
    hidden_states,
)  # fmt: skip
from distill_jax.models.vgg import VGG
from distill_jax.models.vit import ViT
from distill_jax.models.wrn import WideResNet

__all__ = [
    "MLP", "VGG", "ApplyFn", "Characters", "ConvNet", "EncoderConfig", "GRUConfig", "MobileNetV2", "Model", "ResNet",
    "RopeScaling", "ShuffleNetV1", "ShuffleNetV2", "Tokenizer", "TransformerConfig", "ViT", "WideResNet", "build",
    "build_encoder", "build_gru", "build_transformer", "compose", "extend", "feature_names", "from_function",
    "from_linen", "from_nnx", "generate", "given_source", "head_kernel", "hidden_states", "init_cache", "load",
    "load_gru", "load_pretrained", "load_safetensors", "load_tokenizer", "nnx_module", "predict", "save",
    "save_pretrained", "save_safetensors", "sentence_embeddings", "side_by_side",
]  # fmt: skip

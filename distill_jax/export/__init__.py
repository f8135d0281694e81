"""Export: a network as one file that runs without this library, what the file measures, and its card."""

from distill_jax.export.cards import card
from distill_jax.export.descriptions import describe
from distill_jax.export.graphs import onnx
from distill_jax.export.measuring import latency
from distill_jax.export.programs import stablehlo

__all__ = ["card", "describe", "latency", "onnx", "stablehlo"]

"""Export: a network as one file that runs without this library."""

from distill_jax.export.descriptions import describe
from distill_jax.export.programs import stablehlo

__all__ = ["describe", "stablehlo"]

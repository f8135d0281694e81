"""Learned parts of a distillation loss: projectors and whatever else is trained beside the student."""

from distill_jax.learned.pair import Learned
from distill_jax.learned.temperature import (
    LearnedTemperature,
    curriculum_strength,
    curriculum_temperature,
    reverse_gradient,
)

__all__ = [
    "Learned",
    "LearnedTemperature",
    "curriculum_strength",
    "curriculum_temperature",
    "reverse_gradient",
]

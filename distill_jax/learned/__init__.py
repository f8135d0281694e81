"""Learned parts of a distillation loss: projectors and whatever else is trained beside the student."""

from distill_jax.learned.pair import Learned
from distill_jax.learned.relations import (
    LearnedWithState,
    correlation_congruence,
    crd,
    ickd,
    info_nce,
    pkt,
    rkd,
    similarity_preserving,
)

__all__ = [
    "Learned",
    "LearnedWithState",
    "correlation_congruence",
    "crd",
    "ickd",
    "info_nce",
    "pkt",
    "rkd",
    "similarity_preserving",
]

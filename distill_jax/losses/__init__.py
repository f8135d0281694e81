"""Losses: arrays in, one value an example out.

No loss reduces over examples, weights, stops a gradient or holds state; weighted sums are
written where they are used (see :mod:`distill_jax.objectives`).
"""

from distill_jax.losses import tokens
from distill_jax.losses.logits import (
    cross_entropy,
    jensen_shannon,
    kl,
    mean_squared_logits,
    reverse_kl,
    soft_cross_entropy,
)

__all__ = [
    "cross_entropy",
    "jensen_shannon",
    "kl",
    "mean_squared_logits",
    "reverse_kl",
    "soft_cross_entropy",
    "tokens",
]

"""Losses: arrays in, one value an example out.

No loss reduces over examples, weights, stops a gradient or holds state; weighted sums are
written where they are used (see :mod:`distill_jax.objectives`).
"""

from distill_jax.losses.contrast import CRDState, crd, crd_init, crd_negatives, info_nce
from distill_jax.losses.logits import (
    cross_entropy,
    jensen_shannon,
    kl,
    mean_squared_logits,
    reverse_kl,
    soft_cross_entropy,
)
from distill_jax.losses.relations import (
    correlation_congruence,
    ickd,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)

__all__ = [
    "CRDState",
    "correlation_congruence",
    "crd",
    "crd_init",
    "crd_negatives",
    "cross_entropy",
    "ickd",
    "info_nce",
    "jensen_shannon",
    "kl",
    "mean_squared_logits",
    "pkt",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "soft_cross_entropy",
]

"""Losses: arrays in, one value an example out.

No loss reduces over examples, weights, stops a gradient or holds state; weighted sums are
written where they are used (see :mod:`distill_jax.objectives`).
"""

from distill_jax.losses.classes import (
    dkd,
    nkd,
    ranking_hinge,
    ranking_logistic,
    teacher_free,
    wsld,
)
from distill_jax.losses.correlations import dist, mlkd, standardize
from distill_jax.losses.imbalance import class_balanced, logit_adjusted
from distill_jax.losses.logits import (
    cross_entropy,
    jensen_shannon,
    kl,
    mean_squared_logits,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)

__all__ = [
    "class_balanced",
    "cross_entropy",
    "dist",
    "dkd",
    "jensen_shannon",
    "kl",
    "logit_adjusted",
    "mean_squared_logits",
    "mlkd",
    "nkd",
    "ranking_hinge",
    "ranking_logistic",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "standardize",
    "teacher_free",
    "total_variation",
    "wsld",
]

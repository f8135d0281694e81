"""Distillation losses: functions of arrays that return one value per example.

A loss does not average over examples, does not weight them, stops no gradient and keeps no state. Average
its values, and add weighted losses, where you use them; :mod:`distill_jax.train` does so.
"""

from distill_jax.losses import tokens
from distill_jax.losses.classes import dkd, nkd, teacher_free, wsld
from distill_jax.losses.contrast import CRDState, crd, crd_init, crd_negatives, info_nce
from distill_jax.losses.correlations import dist, mlkd, standardise
from distill_jax.losses.features import activation_boundary, cat_kd, hierarchical_context, hint, ofd, vid
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
from distill_jax.losses.ranking import ranking_hinge, ranking_logistic
from distill_jax.losses.relations import (
    correlation_congruence,
    ickd,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from distill_jax.losses.summaries import attention_transfer, cka, factor_transfer, fsp, nst

__all__ = [
    "CRDState",
    "activation_boundary",
    "attention_transfer",
    "cat_kd",
    "cka",
    "class_balanced",
    "correlation_congruence",
    "crd",
    "crd_init",
    "crd_negatives",
    "cross_entropy",
    "dist",
    "dkd",
    "factor_transfer",
    "fsp",
    "hierarchical_context",
    "hint",
    "ickd",
    "info_nce",
    "jensen_shannon",
    "kl",
    "logit_adjusted",
    "mean_squared_logits",
    "mlkd",
    "nkd",
    "nst",
    "ofd",
    "pkt",
    "ranking_hinge",
    "ranking_logistic",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "skew_kl",
    "skew_reverse_kl",
    "soft_cross_entropy",
    "standardise",
    "teacher_free",
    "tokens",
    "total_variation",
    "vid",
    "wsld",
]

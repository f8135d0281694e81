"""Losses: arrays in, one value an example out.

No loss reduces over examples, weights, stops a gradient or holds state; weighted sums are
written where they are used (see :mod:`distill_jax.objectives`).
"""

from distill_jax.losses.features import (
    activation_boundary,
    cat_kd,
    class_activation_maps,
    hierarchical_context,
    hint,
    margin_from_batchnorm,
    margin_from_features,
    ofd,
    vid,
)
from distill_jax.losses.logits import (
    cross_entropy,
    jensen_shannon,
    kl,
    mean_squared_logits,
    reverse_kl,
    soft_cross_entropy,
)
from distill_jax.losses.summaries import (
    attention_transfer,
    cka,
    factor_transfer,
    fsp,
    fsp_matrix,
    linear_cka,
    nst,
)

__all__ = [
    "activation_boundary",
    "attention_transfer",
    "cat_kd",
    "cka",
    "class_activation_maps",
    "cross_entropy",
    "factor_transfer",
    "fsp",
    "fsp_matrix",
    "hierarchical_context",
    "hint",
    "jensen_shannon",
    "kl",
    "linear_cka",
    "margin_from_batchnorm",
    "margin_from_features",
    "mean_squared_logits",
    "nst",
    "ofd",
    "reverse_kl",
    "soft_cross_entropy",
    "vid",
]

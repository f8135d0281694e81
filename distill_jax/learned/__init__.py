"""Learned parts of a distillation loss: projectors and whatever else is trained beside the student."""

from distill_jax.learned.features import (
    activation_boundary,
    attention_transfer,
    cat_kd,
    cka,
    factor_transfer,
    fsp,
    hint,
    nst,
    ofd,
    vid,
)
from distill_jax.learned.networks import (
    mgd,
    review_kd,
    semckd,
    simkd,
    simkd_features,
)
from distill_jax.learned.pair import (
    Learned,
)
from distill_jax.learned.projectors import (
    project,
    project_maps,
)
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
from distill_jax.learned.temperature import (
    LearnedTemperature,
    curriculum_strength,
    curriculum_temperature,
    reverse_gradient,
)

__all__ = [
    "Learned",
    "LearnedTemperature",
    "LearnedWithState",
    "activation_boundary",
    "attention_transfer",
    "cat_kd",
    "cka",
    "correlation_congruence",
    "crd",
    "curriculum_strength",
    "curriculum_temperature",
    "factor_transfer",
    "fsp",
    "hint",
    "ickd",
    "info_nce",
    "mgd",
    "nst",
    "ofd",
    "pkt",
    "project",
    "project_maps",
    "reverse_gradient",
    "review_kd",
    "rkd",
    "semckd",
    "similarity_preserving",
    "simkd",
    "simkd_features",
    "vid",
]

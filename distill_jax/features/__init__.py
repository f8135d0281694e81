"""Learned parts of a distillation loss: projectors and whatever else is trained beside the student."""

from distill_jax.features.capturing import capture, layer_shapes, name_values, naming, resume
from distill_jax.features.curriculum import (
    LearnedTemperature,
    curriculum_strength,
    curriculum_temperature,
    reverse_gradient,
)
from distill_jax.features.learned import Learned
from distill_jax.features.matching import Layer, Pairing, match_layers
from distill_jax.features.methods import (
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
from distill_jax.features.networks import mgd, review_kd, semckd, simkd, simkd_features
from distill_jax.features.projection import project, project_maps
from distill_jax.features.relational import (
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
    "Layer",
    "Learned",
    "LearnedTemperature",
    "LearnedWithState",
    "Pairing",
    "activation_boundary",
    "attention_transfer",
    "capture",
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
    "layer_shapes",
    "match_layers",
    "mgd",
    "name_values",
    "naming",
    "nst",
    "ofd",
    "pkt",
    "project",
    "project_maps",
    "resume",
    "reverse_gradient",
    "review_kd",
    "rkd",
    "semckd",
    "similarity_preserving",
    "simkd",
    "simkd_features",
    "vid",
]

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
from distill_jax.learned.networks import mgd, review_kd, semckd, simkd, simkd_features
from distill_jax.learned.pair import Learned
from distill_jax.learned.projectors import project, project_maps

__all__ = [
    "Learned",
    "activation_boundary",
    "attention_transfer",
    "cat_kd",
    "cka",
    "factor_transfer",
    "fsp",
    "hint",
    "mgd",
    "nst",
    "ofd",
    "project",
    "project_maps",
    "review_kd",
    "semckd",
    "simkd",
    "simkd_features",
    "vid",
]

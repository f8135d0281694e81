"""Features of any two networks: capture named layers, pair them, and compare them with a loss.

- :func:`capture` makes a model also return the values of named layers; nothing in the model is edited.
- :func:`match_layers` pairs the layers of a student with those of a teacher.
- :func:`project`, :func:`project_maps` and :func:`relation` turn a loss of :mod:`distill_jax.losses` into
  one between layers of any shapes; methods with more of their own have a builder each, such as
  :func:`vid` or :func:`review_kd`. The result is a :class:`Learned`, a pair of functions.
- :func:`linear_cka`, :func:`class_activation_maps` and others measure features; they are no losses.
"""

from distill_jax.features.capturing import capture, layer_shapes, name_values, naming, resume
from distill_jax.features.curriculum import (
    LearnedTemperature,
    curriculum_strength,
    curriculum_temperature,
    reverse_gradient,
)
from distill_jax.features.learned import Learned, LearnedWithState
from distill_jax.features.matching import Layer, Pairing, match_layers
from distill_jax.features.methods import cat_kd, factor_transfer, fsp, ofd, vid
from distill_jax.features.networks import mgd, review_kd, semckd, simkd, simkd_features
from distill_jax.features.projection import project, project_maps, relation
from distill_jax.features.relational import correlation_congruence, crd, ickd, info_nce, rkd
from distill_jax.losses._measures import (
    class_activation_maps,
    fsp_matrix,
    linear_cka,
    margin_from_batchnorm,
    margin_from_features,
)

__all__ = [
    "Layer",
    "Learned",
    "LearnedTemperature",
    "LearnedWithState",
    "Pairing",
    "capture",
    "cat_kd",
    "class_activation_maps",
    "correlation_congruence",
    "crd",
    "curriculum_strength",
    "curriculum_temperature",
    "factor_transfer",
    "fsp",
    "fsp_matrix",
    "ickd",
    "info_nce",
    "layer_shapes",
    "linear_cka",
    "margin_from_batchnorm",
    "margin_from_features",
    "match_layers",
    "mgd",
    "name_values",
    "naming",
    "ofd",
    "project",
    "project_maps",
    "relation",
    "resume",
    "reverse_gradient",
    "review_kd",
    "rkd",
    "semckd",
    "simkd",
    "simkd_features",
    "vid",
]

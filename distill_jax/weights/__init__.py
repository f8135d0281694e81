"""Arithmetic of parameters: interpolation, means, task vectors, distances, and the path between networks.

All functions take any pytrees of arrays, a :class:`~distill_jax.models.Model` included, and return trees
of the same structure, shapes, dtypes and sharding. They compute in float32 at least. Leaves that are not
floating-point numbers (counters, masks, random keys) are copied and never averaged. If trees do not fit
each other, or hold values that are not finite, one error lists every path concerned. Inside ``jit`` the
values are not known and are not checked.
"""

from distill_jax.weights.connectivity import (
    StaleStatisticsWarning,
    along,
    barrier,
    recalibrate,
    warn_if_stale,
)
from distill_jax.weights.distances import cosine, distance
from distill_jax.weights.means import Soup, ema, fisher_mean, greedy_soup, lerp, mean, slerp, swa
from distill_jax.weights.structure import by_path, check, is_float, mismatch_report, path_name, scalars
from distill_jax.weights.tasks import add, dare, task_vector, ties

__all__ = [
    "Soup",
    "StaleStatisticsWarning",
    "add",
    "along",
    "barrier",
    "by_path",
    "check",
    "cosine",
    "dare",
    "distance",
    "ema",
    "fisher_mean",
    "greedy_soup",
    "is_float",
    "lerp",
    "mean",
    "mismatch_report",
    "path_name",
    "recalibrate",
    "scalars",
    "slerp",
    "swa",
    "task_vector",
    "ties",
    "warn_if_stale",
]  # fmt: skip

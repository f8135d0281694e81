"""The arithmetic of weights: pure functions on pytrees, for parameters and whatever goes with them.

Every function keeps structure, shapes, dtypes and sharding, and computes in float32 at least. Leaves
that are no floats (counters, masks, random keys) are carried over, never averaged. Trees that do not
fit, or hold values that are not finite, are one error that lists every path concerned; inside ``jit``,
where values are not known, their finiteness is not checked.
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
from distill_jax.weights.tasks import add, dare, lowest, task_vector, ties

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
    "lowest",
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

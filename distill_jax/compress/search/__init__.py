"""Searches for small networks: edit, train, validate, adjust.

:func:`smallest_model` looks for the smallest model within a budget of loss, :func:`best_file` for the best exported
file within budgets of bytes, latency and quality. Both take functions that make a model smaller, train it and
validate it, and continue after an interruption. :func:`find_smallest` decides what is tried next, and leaves all else
to the caller (:data:`Attempt`).
"""

from distill_jax.compress.search.files import BestFile, Candidate, Settings, best_file
from distill_jax.compress.search.smallest import (
    ORIGINAL,
    Attempt,
    Edit,
    Found,
    Operator,
    Smallest,
    Trial,
    find_smallest,
    number_of_parameters,
    smallest_model,
    smallest_within,
)

__all__ = [
    "ORIGINAL", "Attempt", "BestFile", "Candidate", "Edit", "Found", "Operator", "Settings", "Smallest", "Trial",
    "best_file", "find_smallest", "number_of_parameters", "smallest_model", "smallest_within",
]  # fmt: skip

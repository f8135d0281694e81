"""Compression: removing units, sparse weights, low-rank kernels, integers, narrow codes, and a search for sizes."""

from distill_jax.compress import (
    codes,
    linear_codes,
    low_rank,
    one_shot,
    quantisation,
    search,
    sparsity,
    units,
)

__all__ = ["codes", "linear_codes", "low_rank", "one_shot", "quantisation", "search", "sparsity", "units"]

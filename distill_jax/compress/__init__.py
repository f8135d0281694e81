"""Compression: units, sparse weights, low-rank kernels, integers, entropy coding, narrow codes, a search for sizes."""

from distill_jax.compress import (
    codes,
    entropy_codes,
    linear_codes,
    low_rank,
    one_shot,
    quantisation,
    search,
    sparsity,
    units,
)

__all__ = [
    "codes",
    "entropy_codes",
    "linear_codes",
    "low_rank",
    "one_shot",
    "quantisation",
    "search",
    "sparsity",
    "units",
]

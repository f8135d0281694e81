"""Compression: removing units, sparse weights, low-rank kernels and narrow codes."""

from distill_jax.compress import bottleneck, linear_codes, low_rank, sparsity, units

__all__ = ["bottleneck", "linear_codes", "low_rank", "sparsity", "units"]

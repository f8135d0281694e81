"""Learned parts of a distillation loss: projectors and whatever else is trained beside the student."""

from distill_jax.learned.pair import Learned

__all__ = ["Learned"]

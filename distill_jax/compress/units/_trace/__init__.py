"""Reads a network's program with labels in the place of numbers, to find which positions belong to one unit."""

from distill_jax.compress.units._trace import (  # noqa: F401  (they register their rules)
    device_rules,
    elementwise_rules,
    index_rules,
    layout_rules,
    loop_rules,
    random_rules,
    sum_rules,
)  # fmt: skip

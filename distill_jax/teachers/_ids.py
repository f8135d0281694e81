"""Ids of examples, and random keys that follow from them."""

from typing import Any

import jax
import numpy as np

from distill_jax._checks import check_count, check_integers

IMPL = "threefry2x32"  # also under vmap, each key gives the numbers that it gives alone
VIEWS, DRAWS = 0, 1  # streams


def as_ids(ids: Any) -> np.ndarray:
    """Converts ids to int64.

    Raises:
      ValueError: if they are no integers of at most 63 bits, or traced.
    """
    if isinstance(ids, list | tuple) and not ids:
        return np.empty(0, np.int64)  # NumPy would make floats of it
    if isinstance(ids, jax.core.Tracer):
        raise ValueError("ids must be known, got a traced array: read labels outside of jit")
    check_integers("ids", ids)
    return np.asarray(ids, np.int64)


def check_seed(seed: Any) -> None:
    """Raises ``ValueError`` unless a seed is an integer from 0 to 2³² − 1."""
    check_count("seed", seed, least=0)
    if seed >= 2**32:
        raise ValueError(f"seed must be an integer below 2**32, got {seed}")


def keys_of(seed: int, stream: int, ids: np.ndarray) -> jax.Array:
    """Derives one random key per example, a function of the seed, the stream and the id alone.

    Args:
      seed: see :func:`check_seed`.
      stream: ``VIEWS`` or ``DRAWS``: what the numbers are for.
      ids: int64 ``[n]``.

    Returns:
      Keys ``[n]``.
    """
    low, high = ((ids >> bits & 0xFFFFFFFF).astype(np.uint32) for bits in (0, 32))
    return _fold_ids(jax.random.fold_in(jax.random.key(seed, impl=IMPL), stream), high, low)


@jax.jit
def _fold_ids(root: jax.Array, high: jax.Array, low: jax.Array) -> jax.Array:
    return jax.vmap(jax.random.fold_in)(jax.vmap(jax.random.fold_in, (None, 0))(root, high), low)


@jax.jit
def fold_view(keys: jax.Array, view: jax.Array) -> jax.Array:
    """Derives from the keys of examples ``[n]`` those of their views; ``view`` is uint32, ``[]`` or ``[n]``."""
    return jax.vmap(jax.random.fold_in, (0, 0 if view.ndim else None))(keys, view)

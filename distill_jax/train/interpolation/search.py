"""The λ of the lowest loss, between two trees of parameters."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import weights

PyTree = Any


class Search(NamedTuple):
    """A λ for :func:`pull` that is found anew at each step, by :func:`line_search`.

    Attributes:
      loss: ``(params, model_state, validation) -> scalar``, of the student.
      points: of the grid.
      rounds: of refinement.
    """

    loss: Callable[[PyTree, PyTree, Any], jax.Array]
    points: int = 11
    rounds: int = 2


def line_search(
    loss: Callable[[PyTree], jax.Array], tree_a: PyTree, tree_b: PyTree, *, points: int = 11, rounds: int = 2
) -> tuple[jax.Array, jax.Array]:
    """Finds the t in [0, 1] with the lowest loss at (1 − t)·a + t·b: on a grid, then on finer ones.

    Between unaligned networks the loss has several valleys, so the first grid covers the whole way;
    each further one the two intervals around the best point. The result is never worse than either end.

    Args:
      loss: params → scalar; not NaN. All points of a grid are computed at once, by ``vmap``.
      tree_a: as in :func:`distill_jax.weights.lerp`.
      tree_b: likewise.
      points: of each grid, odd, ≥ 3.
      rounds: how many grids, ≥ 1; t is found up to (2/(points − 1))^rounds/2.

    Returns:
      ``(t, loss)``, float32 scalars; the lowest t of equals.

    Raises:
      ValueError: if ``points`` or ``rounds`` are not such.

    >>> t, value = line_search(lambda w: (w - 0.3) ** 2, 0.0, 1.0, points=5, rounds=6)
    >>> round(float(t), 2)
    0.3
    """
    if points < 3 or points % 2 == 0:
        raise ValueError(f"points must be odd and at least 3, got {points}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    # Odd, so that the best point so far is the middle of the next grid, or its end
    low, high = jnp.float32(0), jnp.float32(1)
    for _ in range(rounds):
        ts = jnp.linspace(low, high, points)
        values = jax.vmap(lambda t: loss(weights.lerp(tree_a, tree_b, t)))(ts)
        best = jnp.argmin(values)
        low, high = ts[jnp.maximum(best - 1, 0)], ts[jnp.minimum(best + 1, points - 1)]
    return ts[best], values[best]

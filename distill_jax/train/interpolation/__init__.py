"""ŷ = g(x; λθₜ + (1 − λ)θ_g): a student that shares its teacher's parameters (system S3).

Two readings of the formula:

- :func:`pull` moves the student's parameters towards the teacher's before each of its steps. The
  student is the model.
- :func:`through` takes the loss at the interpolated parameters, and its gradient goes through the
  interpolation to the student's. The interpolated network is the model: :func:`interpolated`.

λ, the transfer coefficient, is a constant or an optax schedule (``optax.linear_schedule``,
``cosine_decay_schedule``, ``exponential_decay``); one for each path pattern
(:func:`distill_jax.weights.scalars`); found on validation data (:class:`Search`); or learned. The teacher
is trained together with the student, or beforehand and frozen.
"""

from distill_jax.train.interpolation.readings import Pair, interpolated, join, mix, pull, split_tx, through
from distill_jax.train.interpolation.search import Search, line_search
from distill_jax.train.interpolation.sweeps import lane, repeat, sweep

__all__ = [
    "Pair",
    "Search",
    "interpolated",
    "join",
    "lane",
    "line_search",
    "mix",
    "pull",
    "repeat",
    "split_tx",
    "sweep",
    "through",
]

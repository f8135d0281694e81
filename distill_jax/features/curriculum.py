"""A temperature learned against the student: curriculum temperature."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.losses._numerics import check_positive


class LearnedTemperature(NamedTuple):
    """A temperature with parameters of its own, trained beside the student's and dropped at the end.

    Attributes:
      init: ``(key) -> params``.
      apply: ``(params, strength) -> temperature``, a float32 scalar; its gradient is reversed and
        multiplied by ``strength`` (λ ≥ 0), so that descent on the loss *raises* the loss through it.
    """

    init: Callable[[jax.Array], Any]
    apply: Callable[[Any, Any], jax.Array]


def reverse_gradient(x: Any, strength: Any = 1.0) -> Any:
    """x, whose gradient is multiplied by −λ: a gradient reversal layer.

    Args:
      x: a pytree of float arrays.
      strength: λ, a scalar; 0 stops the gradient. It gets no gradient itself.

    Returns:
      As ``x``.

    References:
      Ganin, Lempitsky, `Unsupervised Domain Adaptation by Backpropagation`, 2015, Eq. 8 (the
      pseudo-function of identity and −λ).

    >>> print(jax.grad(lambda x: reverse_gradient(x, 0.5) ** 2)(3.0))
    -3.0
    """
    strength = jax.lax.stop_gradient(strength)

    def reverse(leaf):
        fixed = jax.lax.stop_gradient(leaf)
        return fixed - strength * (leaf - fixed)  # the difference is 0, its derivative 1

    return jax.tree.map(reverse, x)


def curriculum_temperature(
    *, lowest: float = 1.0, width: float = 20.0, start: float = 1.0
) -> LearnedTemperature:
    """CTKD's global temperature: T = lowest + width·sigmoid(raw), learned to make the task harder.

    Use its value as the ``temperature`` of any logit loss, and give its parameters to the same
    optimizer as the student's: the reversed gradient turns descent into ascent for them alone. With
    λ from :func:`curriculum_strength` the student meets an easy task first.

    Args:
      lowest: of the temperature, > 0 (paper: 1).
      width: the temperature lies in (lowest, lowest + width), > 0 (paper: 20).
      start: ``raw`` at first; 1, as in the authors' code, is T = 15.6.

    Returns:
      A :class:`LearnedTemperature`; its parameters are ``{"raw": float32 scalar}``.

    Raises:
      ValueError: if ``lowest`` or ``width`` is not positive.

    References:
      Li et al., `Curriculum Temperature for Knowledge Distillation`, 2023 (CTKD, global version).
      The bounds are those of the authors' code, which names ``width`` "t_end", although T ends
      at lowest + width.

    >>> learned = curriculum_temperature()
    >>> params = learned.init(jax.random.key(0))
    >>> print(f'{learned.apply(params, 1.0):.3f}')
    15.621
    """
    check_positive("lowest", lowest)
    check_positive("width", width)

    def init(key):
        del key  # nothing is drawn
        return {"raw": jnp.asarray(start, jnp.float32)}

    def apply(params, strength):
        return lowest + width * jax.nn.sigmoid(reverse_gradient(params["raw"], strength))

    return LearnedTemperature(init, apply)


def curriculum_strength(epoch: Any, *, ramp: float = 10.0, most: float = 1.0) -> jax.Array:
    """CTKD's λ: most·½·(1 − cos(π·min(epoch/ramp, 1))), from 0 to ``most``.

    Args:
      epoch: how far training is, ≥ 0, a scalar; fractions and traced values too.
      ramp: the epoch at which λ is at its most, > 0.
      most: λ from then on.

    Returns:
      λ, a float32 scalar.

    Raises:
      ValueError: if ``ramp`` is not positive.

    References:
      Li et al., 2023, §"Curriculum temperature" (cosine schedule with λ_min = 0). The authors'
      code has −λ, falling from 0 to −1.

    >>> print([f'{curriculum_strength(e):.2f}' for e in (0, 5, 10, 99)])
    ['0.00', '0.50', '1.00', '1.00']
    """
    check_positive("ramp", ramp)
    done = jnp.clip(jnp.asarray(epoch, jnp.float32) / ramp, 0.0, 1.0)
    return most * jnp.square(jnp.sin(jnp.pi * done / 2))

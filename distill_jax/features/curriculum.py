"""Curriculum temperature (CTKD): a temperature that is trained to make distillation harder."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax._checks import check_positive
from distill_jax._model import PyTree


class LearnedTemperature(NamedTuple):
    """A trainable temperature, as a pair of functions ``(init, apply)``.

    Its parameters are trained beside the student's and dropped after training.

    Attributes:
      init: ``(key) -> params``.
      apply: ``(params, strength) -> temperature``, a float32 scalar. Its gradient is reversed and
        multiplied by ``strength`` (λ ≥ 0), so an optimizer that lowers the loss changes the temperature
        in the direction that *raises* the loss.
    """

    init: Callable[[jax.Array], PyTree]
    apply: Callable[[PyTree, ArrayLike], jax.Array]


def reverse_gradient(x: PyTree, strength: ArrayLike = 1.0) -> PyTree:
    """Gradient reversal layer: returns x, and multiplies its gradient by −λ.

    Args:
      x: a pytree of float arrays.
      strength: λ, a scalar; 0 stops the gradient. It gets no gradient itself.

    Returns:
      A pytree equal to ``x``.

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
    """Curriculum temperature (CTKD): T = lowest + width·sigmoid(raw), trained to make the task harder.

    Use its value as the ``temperature`` of any loss on logits, and train its parameters with the
    student's optimizer: the reversed gradient makes them alone climb. With λ from
    :func:`curriculum_strength` the task is easy at first and gets harder.

    Args:
      lowest: lower bound of the temperature, > 0 (1 in the paper).
      width: the temperature lies in (lowest, lowest + width); > 0 (20 in the paper).
      start: value of ``raw`` at the start. The authors' code has 1, which means T = 15.6.

    Returns:
      A :class:`LearnedTemperature` whose parameters are ``{"raw": float32 scalar}``.

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
        return {"raw": jnp.asarray(start, jnp.float32)}

    def apply(params, strength):
        return lowest + width * jax.nn.sigmoid(reverse_gradient(params["raw"], strength))

    return LearnedTemperature(init, apply)


def curriculum_strength(epoch: ArrayLike, *, ramp: float = 10.0, most: float = 1.0) -> jax.Array:
    """Schedule of CTKD's λ: most·½·(1 − cos(π·min(epoch/ramp, 1))), rising from 0 to ``most``.

    Args:
      epoch: number of epochs done so far, ≥ 0, a scalar; it may be a fraction, and traced.
      ramp: the epoch at which λ reaches ``most``, > 0.
      most: λ from that epoch on.

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

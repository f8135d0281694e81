"""Cross-entropies for imbalanced (long-tailed) classes: logit adjustment and class-balanced weights."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_finite, check_fraction, check_integers, check_positive, check_real
from distill_jax.losses._arguments import logits_of, mask_of, scalar
from distill_jax.losses.logits import cross_entropy


def logit_adjusted(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    prior: ArrayLike | Sequence[float],
    tau: float | ArrayLike = 1.0,
    label_smoothing: float | ArrayLike = 0.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Logit-adjusted cross-entropy for imbalanced classes: :func:`cross_entropy` of z + τ·log π.

    It trains logits z whose argmax is right when all classes are equally frequent, because the logit of a
    rare class has to win by a margin. For distillation, adjust the logits of both, as in ``kl(z + τ·log π, …)``.
    Only the ratios between the entries of π matter.

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``, or probabilities ``[..., classes]``.
      prior: π ≥ 0, ``[classes]``: how often each class occurs, as counts or as frequencies. A class with
        prior 0 has probability 0 and no gradient, as if ``where`` excluded it.
      tau: τ, a number; 1 is consistent for the balanced error.
      label_smoothing: ε in [0, 1], as in :func:`cross_entropy`.
      axis: the axis of the classes.
      where: ``bool`` with one axis per axis of the logits, each of the same size or 1: which classes exist.
        ``[1, classes]`` leaves out classes, ``[batch, 1]`` examples, such as padding. A class whose logit is
        −inf does not exist either.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input). +inf where the label's class does not exist
      or has prior 0; NaN where an integer label is outside [0, classes).

    Raises:
      ValueError: if the shapes do not fit, or a prior is negative or not finite.

    References:
      Menon et al., `Long-tail Learning via Logit Adjustment`, 2021, Eq. 10. The authors' code adds
      1e-12 to π^τ.

    >>> f'{logit_adjusted(jnp.zeros((1, 2)), jnp.array([1]), prior=[3, 1])[0]:.4f}'  # −log ¼
    '1.3863'
    """
    logits = logits_of("logits", logits, axis)
    check_finite("tau", tau)
    where = mask_of(where, logits)
    prior = _per_class("prior", prior, logits.shape, axis)
    if not isinstance(prior, jax.core.Tracer):
        concrete = np.asarray(prior)
        if not (np.isfinite(concrete).all() and (concrete >= 0).all() and concrete.any()):
            raise ValueError(
                f"prior must hold finite numbers ≥ 0 and at least one above 0, got {concrete.ravel()}"
            )
    seen = jnp.asarray(~(prior <= 0))  # a NaN, traced, is to show
    shift = scalar("tau", tau, logits.dtype) * jnp.log(jnp.where(seen, prior, 1.0)).astype(logits.dtype)
    # A class that was never seen has the logit −inf, and not `where` false: a row of such classes is no padding.
    shifted = jnp.where(seen & where, jnp.where(seen & where, logits, 0.0) + shift, -jnp.inf)
    return cross_entropy(shifted, labels, label_smoothing=label_smoothing, axis=axis, where=where)


def class_balanced(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    counts: ArrayLike | Sequence[float],
    beta: float | ArrayLike = 0.9999,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> Array:
    """Class-balanced cross-entropy: −w_y·log q_y with w_c ∝ (1 − β)/(1 − β^n_c), mean w = 1 over classes.

    n examples of a class count as (1 − β^n)/(1 − β), because each shows part of what the next one would show.
    β = 0 weights all classes equally. β → 1 weights them by 1/n, and β = 1 is that limit.

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``.
      counts: n > 0, ``[classes]``: the number of training examples per class.
      beta: β in [0, 1], a scalar. Give a Python number, since float32 loses the digits of 1 − β.
      axis: the axis of the classes.
      where: as in :func:`logit_adjusted`; it does not change the weights.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input). +inf where the label's class does not exist;
      NaN where a label is outside [0, classes).

    Raises:
      ValueError: if the shapes do not fit, the labels are not integers, a count is not positive, or β is
        outside [0, 1].

    References:
      Cui et al., `Class-Balanced Loss Based on Effective Number of Samples`, 2019, Eq. 9 (softmax
      cross-entropy), with weights scaled to a sum of C as in §4. A much-used PyTorch port
      (vandit15/Class-balanced-loss-pytorch) has a *binary* cross-entropy of the softmax in its
      place, averaged over the classes too.

    >>> value = class_balanced(jnp.zeros((1, 2)), jnp.array([1]), counts=[3, 1], beta=1.0)
    >>> f'{value[0]:.4f}'  # 1.5·log 2
    '1.0397'
    """
    logits = logits_of("logits", logits, axis)
    check_integers("labels", labels)
    check_fraction("beta", beta)
    scalar("beta", beta, logits.dtype)
    counts = _per_class("counts", counts, logits.shape, axis)
    check_positive("counts", counts)
    value = cross_entropy(logits, labels, axis=axis, where=where)
    traced = isinstance(beta, jax.core.Tracer) or isinstance(counts, jax.core.Tracer)
    xp: Any = jnp if traced else np  # NumPy computes in float64, at trace time
    b = xp.asarray(beta, float)
    inside = (b > 0) & (b < 1)
    log_beta = xp.log(xp.where(inside, b, 0.5))
    effective = xp.expm1(counts * log_beta) / xp.expm1(log_beta)
    effective = xp.where(inside, effective, xp.where(b > 0, counts, 1.0))
    weights = 1 / effective
    weights = jnp.asarray(weights / xp.mean(weights), logits.dtype).ravel()
    safe = jnp.clip(jnp.asarray(labels), 0, weights.size - 1)  # a label out of range is NaN already
    return weights[safe] * value


def _per_class(
    name: str, values: ArrayLike | Sequence[float], shape: tuple[int, ...], axis: int
) -> Array | np.ndarray:
    """Reshapes one number per class so that it broadcasts to the logits."""
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
    check_real(name, values)
    if not isinstance(values, jax.Array):
        values = values.astype(np.float64)
    axis = axis % len(shape)
    if values.shape != (shape[axis],):
        raise ValueError(f"{name} must hold one number per class, shape ({shape[axis]},), got {values.shape}")
    return values.reshape(shape[axis], *(1,) * (len(shape) - axis - 1))

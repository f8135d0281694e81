"""Cross-entropies for classes of very unequal numbers of examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses._numerics import check_fraction, check_positive, to_float
from distill_jax.losses.logits import cross_entropy

Array = jax.Array


def logit_adjusted(
    logits: Any,
    labels: Any,
    *,
    prior: Any,
    tau: Any = 1.0,
    label_smoothing: Any = 0.0,
    axis: int = -1,
    where: Any = None,
) -> Array:
    """Logit-adjusted cross-entropy: :func:`cross_entropy` of z + τ·log π.

    Trains logits whose argmax is right when all classes are equally frequent: those of a rare class
    must win by a margin. For distillation, adjust both: ``kl(z + τ·log π, …)``. Only ratios of π
    count.

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``, or probabilities ``[..., classes]``.
      prior: π, ``[classes]``: how often each class occurs, as numbers or frequencies ≥ 0. A class of
        0 has probability 0 (and the gradient never reaches it), like one masked by ``where``.
      tau: τ, a number; 1 is consistent for the balanced error.
      label_smoothing: ε in [0, 1], as in :func:`cross_entropy`.
      axis: the axis of the classes.
      where: ``bool``, broadcastable to the logits: which classes exist. A logit of −inf says the
        same of one class.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input). +inf where the label's class is not
      valid, or of prior 0; NaN where an integer label is outside [0, classes).

    Raises:
      ValueError: if the shapes do not fit, or a prior is negative or not finite.

    References:
      Menon et al., `Long-tail Learning via Logit Adjustment`, 2021, Eq. 10. The authors' code adds
      1e-12 to π^τ.

    >>> f'{logit_adjusted(jnp.zeros((1, 2)), jnp.array([1]), prior=[3, 1])[0]:.4f}'  # −log ¼
    '1.3863'
    """
    logits = to_float(logits)
    prior = _per_class("prior", prior, logits.shape, axis)
    if not isinstance(prior, jax.core.Tracer):
        concrete = np.asarray(prior)
        if not (np.isfinite(concrete).all() and (concrete >= 0).all()):
            raise ValueError(f"prior must hold finite numbers ≥ 0, got {concrete.ravel()}")
    seen = prior > 0
    shift = to_float(tau) * jnp.log(jnp.where(seen, prior, 1.0)).astype(logits.dtype)
    where = seen if where is None else seen & where
    where = jnp.broadcast_to(where, logits.shape)
    return cross_entropy(logits + shift, labels, label_smoothing=label_smoothing, axis=axis, where=where)


def class_balanced(
    logits: Any, labels: Any, *, counts: Any, beta: Any = 0.9999, axis: int = -1, where: Any = None
) -> Array:
    """Class-balanced cross-entropy: −w_y·log q_y, w_c ∝ (1 − β)/(1 − β^n_c), of mean 1 over classes.

    n examples of a class count as (1 − β^n)/(1 − β): each covers some of what the next would show.
    β = 0 weighs all classes alike; β → 1 by 1/n (and β = 1 is that limit).

    Args:
      logits: ``[..., classes]``, any float dtype.
      labels: integers ``[...]``.
      counts: n, ``[classes]``: the numbers of training examples, > 0.
      beta: β in [0, 1], a scalar; best as a Python number, as 1 − β is lost in a float32.
      axis: the axis of the classes.
      where: as in :func:`logit_adjusted`; the weights are not changed by it.

    Returns:
      ``[...]``, nats, float32 (float64 for float64 input). +inf where the label's class is not
      valid; NaN where a label is outside [0, classes).

    Raises:
      ValueError: if the shapes do not fit, a count is not positive, or β is outside [0, 1].

    References:
      Cui et al., `Class-Balanced Loss Based on Effective Number of Samples`, 2019, Eq. 9 (softmax
      cross-entropy), weights scaled to a sum of C as in §4. A much-used PyTorch port
      (vandit15/Class-balanced-loss-pytorch) has a *binary* cross-entropy of the softmax in its
      place, with the mean over classes too.

    >>> value = class_balanced(jnp.zeros((1, 2)), jnp.array([1]), counts=[3, 1], beta=1.0)
    >>> f'{value[0]:.4f}'  # 1.5·log 2
    '1.0397'
    """
    logits, labels = to_float(logits), jnp.asarray(labels)
    check_fraction("beta", beta)
    counts = _per_class("counts", counts, logits.shape, axis)
    check_positive("counts", counts)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, got {labels.dtype}: take the argmax")
    value = cross_entropy(logits, labels, axis=axis, where=where)
    traced = isinstance(beta, jax.core.Tracer) or isinstance(counts, jax.core.Tracer)
    xp: Any = jnp if traced else np  # NumPy: in float64, outside the program
    beta = xp.asarray(beta, float)
    inside = (beta > 0) & (beta < 1)
    log_beta = xp.log(xp.where(inside, beta, 0.5))
    effective = xp.expm1(counts * log_beta) / xp.expm1(log_beta)
    effective = xp.where(inside, effective, xp.where(beta > 0, counts, 1.0))
    weights = 1 / effective
    weights = jnp.asarray(weights / xp.mean(weights), logits.dtype).ravel()
    safe = jnp.clip(labels, 0, weights.size - 1)  # a label out of range is NaN already
    return weights[safe] * value


def _per_class(name: str, values: Any, shape: tuple[int, ...], axis: int) -> Any:
    """``[classes]`` as an array that broadcasts to the logits."""
    if not isinstance(values, jax.Array):
        values = np.asarray(values, np.float64)
    axis = axis % len(shape)
    if values.shape != (shape[axis],):
        raise ValueError(f"{name} must have shape ({shape[axis]},), one a class, got {values.shape}")
    return values.reshape(shape[axis], *(1,) * (len(shape) - axis - 1))

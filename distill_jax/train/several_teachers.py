"""Several teachers at once: weighted, or mixed by a gate that learns whom to trust.

Their average as a single teacher is :func:`distill_jax.teachers.ensemble`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.losses._numerics import to_float
from distill_jax.train.objectives import Schedule, at, check_options, errors, soft_mean, teacher_of
from distill_jax.train.step import LossFn, weighted_mean


def distill_each(
    apply_fn: Callable[..., Any],
    *,
    weights: Sequence[float] | None = None,
    temperature: Schedule = 4.0,
    alpha: Schedule = 0.1,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Learning from several teachers at once: the mean of α·hard + (1 − α)·Σₖ wₖ·softₖ.

    With Kullback–Leibler divergences and weights of sum 1 the gradient is that of learning from the
    weighted mean of the teachers' softened probabilities; the value is larger by their disagreement.

    Args:
      apply_fn: the student's.
      weights: wₖ ≥ 0, one a teacher, used as given; 1/(number of teachers) by default.
      temperature: as in :func:`distill_jax.train.distill`.
      alpha: likewise.
      soft: likewise.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"``, ``"soft"`` (the weighted sum), ``"soft_0"`` … (a
      teacher each) and ``"errors"``. It finds a tuple of logits in the batch: :func:`label_each`.

    Raises:
      ValueError: if a weight is negative, or there is not one for each teacher.

    References:
      Hinton, Vinyals, Dean, 2015, §2 (one teacher); You et al., `Learning from Multiple Teacher
      Networks`, 2017, §3.1 (equal weights).
    """
    if weights is not None and not all(weight >= 0 for weight in weights):
        raise ValueError(f"weights must not be negative, got {weights}")
    check_options(alpha, temperature)

    def loss_fn(params, model_state, batch, *, key, step):
        teachers = _tuple_of_logits(batch)
        shares = [1 / len(teachers)] * len(teachers) if weights is None else list(weights)
        if len(shares) != len(teachers):
            raise ValueError(f"got {len(shares)} weights for {len(teachers)} teachers: give one each")
        logits, model_state = apply_fn(params, model_state, batch["image"], key=key)
        options = {"temperature": at(temperature, step)}
        softs = [soft_mean(soft, logits, teacher, batch, **options) for teacher in teachers]
        metrics = {
            "hard": weighted_mean(losses.cross_entropy(logits, batch["label"]), batch),
            "soft": sum(share * value for share, value in zip(shares, softs, strict=True)),
            **{f"soft_{number}": value for number, value in enumerate(softs)},
            "errors": errors(logits, batch),
        }
        share = at(alpha, step)
        return share * metrics["hard"] + (1 - share) * metrics["soft"], (model_state, metrics)

    return loss_fn


def init_gate(teachers: int, classes: int) -> dict[str, jax.Array]:
    """Makes the gate of :func:`distill_gated`: zeros, so that all teachers count alike at first.

    Args:
      teachers: how many.
      classes: of each teacher.
    """
    return {"weight": jnp.zeros((teachers * (classes + 1), teachers)), "bias": jnp.zeros(teachers)}


def distill_gated(
    apply_fn: Callable[..., Any],
    *,
    temperature: Schedule = 4.0,
    alpha: Schedule = 0.1,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Learning from several teachers, mixed example by example by a gate that learns whom to trust.

    The teachers' predictions pₖ and their entropies Hₖ (how sure each is) give the weights
    g = softmax(Wᵀ[p₁; H₁; …; pₙ; Hₙ] + b), and these the mixture p = Σₖ gₖ·pₖ. The gate
    minimises −log p[label]; the student minimises α·hard + (1 − α)·soft(student, log p), which the
    gate does not see: it would else learn to please the student. The loss is the sum of the two.

    Args:
      apply_fn: the student's.
      temperature: as in :func:`distill_jax.train.distill`; pₖ and p are at temperature 1.
      alpha: likewise.
      soft: likewise.

    Returns:
      A ``loss_fn`` over ``{"student": …, "gate": …}``, the gate from :func:`init_gate`, with the
      metrics ``"hard"``, ``"soft"``, ``"gate"`` (nats), ``"gate_0"`` … (mean weight of each teacher)
      and ``"errors"``. It finds a tuple of logits in the batch: :func:`label_each`.

    References:
      Jacobs, Jordan, Nowlan, Hinton, `Adaptive Mixtures of Local Experts`, 1991, Eq. 1.3, with the
      likelihood of a class in place of a Gaussian's, and fixed experts. Weights an example are due
      to Liu et al., `Adaptive Multi-Teacher Multi-Level Knowledge Distillation`, 2020, whose gate
      is another.
    """
    check_options(alpha, temperature)

    def loss_fn(params, model_state, batch, *, key, step):
        teachers = jax.lax.stop_gradient(_tuple_of_logits(batch))
        logits, model_state = apply_fn(params["student"], model_state, batch["image"], key=key)
        log_p = jnp.stack([jax.nn.log_softmax(to_float(z)) for z in teachers], 1)
        log_g = _log_gate(params["gate"], log_p)
        mixture = _log_mixture(log_p, log_g)
        constant = jax.lax.stop_gradient(mixture)
        options = {"temperature": at(temperature, step)}
        gate_values = losses.cross_entropy(mixture, batch["label"])
        metrics = {
            "hard": weighted_mean(losses.cross_entropy(logits, batch["label"]), batch),
            "soft": weighted_mean(soft(logits, constant, **options), batch),
            "gate": weighted_mean(gate_values, batch),
            "errors": errors(logits, batch),
        }
        for number in range(len(teachers)):
            metrics[f"gate_{number}"] = weighted_mean(jnp.exp(log_g[:, number]), batch)
        share = at(alpha, step)
        loss = share * metrics["hard"] + (1 - share) * metrics["soft"] + metrics["gate"]
        return loss, (model_state, metrics)

    return loss_fn


def _tuple_of_logits(batch: Any) -> tuple[jax.Array, ...]:
    teachers = teacher_of(batch)["logits"]
    if not isinstance(teachers, list | tuple) or not teachers:
        raise ValueError(
            "batch['teacher'] must hold a tuple of logits, one a teacher, as label_each makes; got "
            f"{jax.tree.structure(teachers)}"
        )
    return tuple(teachers)


def _log_gate(gate: Mapping[str, jax.Array], log_p: jax.Array) -> jax.Array:
    p = jnp.exp(log_p)
    entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1, keepdims=True)
    seen = jnp.concatenate([p, entropy], axis=-1).reshape(p.shape[0], -1)
    return jax.nn.log_softmax(seen @ gate["weight"] + gate["bias"])


def _log_mixture(log_p: jax.Array, log_g: jax.Array) -> jax.Array:
    """The log of Σₖ gₖ·pₖ over axis 1; −inf, with gradient 0, for a class that all exclude."""
    possible = jnp.any(log_p > -jnp.inf, axis=1)
    terms = jnp.where(possible[:, None], log_p, 0.0) + log_g[..., None]
    return jnp.where(possible, jax.nn.logsumexp(terms, axis=1), -jnp.inf)

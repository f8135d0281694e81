"""Honest evaluation: errors, precision, recall, F1, calibration, fidelity to a teacher, cost.

Functions of one value an example take logits ``[n, classes]`` and integer labels ``[n]``.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import losses

Array = Any  # jax.Array or np.ndarray
Network = tuple[Callable[..., Any], Any, Any]  # apply_fn, params, model_state


def errors(logits: Array, labels: Array) -> Array:
    """1 where the top class is not the label, else 0: float32 ``[n]``."""
    return (jnp.argmax(logits, -1) != labels).astype(jnp.float32)


def brier(logits: Array, labels: Array) -> Array:
    """Squared distance of the probabilities from the one-hot label: float32 ``[n]`` in [0, 2].

    References:
      Brier, `Verification of Forecasts Expressed in Terms of Probability`, 1950, Eq. 2.

    >>> print(brier(jnp.zeros((1, 2)), jnp.array([0])))
    [0.5]
    """
    probabilities = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    return jnp.sum(jnp.square(probabilities - jax.nn.one_hot(labels, logits.shape[-1])), -1)


def agreement(student_logits: Array, teacher_logits: Array) -> Array:
    """1 where student and teacher choose the same class, else 0: float32 ``[n]``.

    References:
      Stanton et al., `Does Knowledge Distillation Really Work?`, 2021, Eq. 6.
    """
    same = jnp.argmax(student_logits, -1) == jnp.argmax(teacher_logits, -1)
    return same.astype(jnp.float32)


def confusion(logits: Any, labels: Any) -> np.ndarray:
    """Counts (true class, predicted class): int64 ``[classes, classes]``."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    classes = logits.shape[-1]
    pairs = labels * classes + logits.argmax(-1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def precision_recall_f1(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 of each class, from the :func:`confusion` matrix: ``[classes]`` each.

    A ratio 0/0 is 0 (a class never predicted has precision 0), and NaN for a class that neither
    occurs nor is predicted: it has no value, and macro averages (``np.nanmean``) leave it out.

    >>> precision_recall_f1(np.array([[3, 1], [0, 4]]))["precision"]
    array([1. , 0.8])
    """
    right = np.diag(counts).astype(float)
    predicted, true = counts.sum(0), counts.sum(1)
    absent = predicted + true == 0

    def ratio(a, b):
        return np.where(absent, np.nan, a / np.maximum(b, 1))

    return {
        "precision": ratio(right, predicted),
        "recall": ratio(right, true),
        "f1": ratio(2 * right, predicted + true),
    }


def calibration_bins(logits: Any, labels: Any, bins: int = 15) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts predictions by confidence into bins of equal mass (their counts differ by at most 1).

    Returns:
      mean confidence, accuracy (float64) and count (int64) of each bin, ``[bins]``, in rising order
      of confidence; fewer bins where there are fewer examples.
    """
    probabilities = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)), np.float64)
    confidence = probabilities.max(-1)
    right = (probabilities.argmax(-1) == np.asarray(labels)).astype(float)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return (
        np.array([confidence[part].mean() for part in parts]),
        np.array([right[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def expected_calibration_error(logits: Any, labels: Any, bins: int = 15) -> float:
    """ECE: the mean over examples of |accuracy − confidence| of their bin; equal-mass bins.

    References:
      Naeini, Cooper, Hauskrecht, 2015 (equal-width bins there); Nixon et al., `Measuring Calibration
      in Deep Learning`, 2019, §4 (equal mass, as here).
    """
    confidence, accuracy, count = calibration_bins(logits, labels, bins)
    return float(np.sum(count * np.abs(accuracy - confidence)) / count.sum())


def evaluate(logits: Any, labels: Any, teacher_logits: Any = None) -> dict[str, float]:
    """All figures of one model on one data set.

    Args:
      logits: ``[n, classes]``.
      labels: int ``[n]``, each in [0, classes).
      teacher_logits: ``[n, classes]``, or None.

    Returns:
      ``errors`` (a count), ``accuracy``, macro ``precision``, ``recall``, ``f1`` (fractions), ``nll``
      (nats), ``brier``, ``ece``; with a teacher ``agreement`` (fraction) and ``teacher_kl`` (mean
      KL(teacher‖model), nats).

    Raises:
      ValueError: if shapes or labels do not fit, or a logit is NaN.
    """
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    classes = logits.shape[-1]
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(
            f"expected logits [n, classes] and labels [n], n ≥ 1, got {logits.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got {labels.min()} to {labels.max()}")
    if np.isnan(logits).any():
        raise ValueError(
            f"{int(np.isnan(logits).any(-1).sum())} of {len(logits)} examples have NaN logits: "
            "the training has diverged; try a smaller learning rate"
        )
    per_class = precision_recall_f1(confusion(logits, labels))
    count = int(errors(logits, labels).sum())
    result = {
        "errors": float(count),
        "accuracy": 1 - count / len(labels),
        **{name: float(np.nanmean(values)) for name, values in per_class.items()},
        "nll": float(losses.cross_entropy(logits, labels).mean()),
        "brier": float(brier(logits, labels).mean()),
        "ece": expected_calibration_error(logits, labels),
    }
    if teacher_logits is not None:
        result["agreement"] = float(agreement(logits, teacher_logits).mean())
        result["teacher_kl"] = float(losses.kl(logits, teacher_logits).mean())
    return result


def timings(calls: Sequence[Callable[[], Any]], *, repeats: int) -> np.ndarray:
    """Times calls in turn, so that what else the machine does slows down all of them.

    Args:
      calls: each gives what is waited for.
      repeats: rounds, after three that are not counted.

    Returns:
      Seconds, ``[repeats, calls]``.
    """
    seconds = np.zeros((repeats + 3, len(calls)))
    for row in seconds:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            row[i] = time.perf_counter() - start
    return seconds[3:]


def costs(models: Sequence[Network], example: Any, *, repeats: int = 30) -> list[dict[str, Any]]:
    """What models cost in evaluation mode on the default device, compared with each other.

    Args:
      models: ``(apply_fn, params, model_state)`` of each, as in :class:`distill_jax.models.Model`.
      example: one input, without the batch axis.
      repeats: timed calls a batch size, see :func:`timings`.

    Returns:
      Of each model ``parameters`` (a count), ``bytes`` (of parameters and state), ``flops`` an example
      (XLA's count for the compiled program at batch 256, divided by 256; absent where XLA has none, or
      there is a loop, whose body it counts once) and ``latency_ms``, the median wall time of a call at
      batch ``"1"`` and ``"256"``, in milliseconds.
    """
    results: list[dict[str, Any]] = []
    for _, *variables in models:
        leaves = jax.tree.leaves(variables)
        results.append({
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables[0])),
            "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
            "latency_ms": {},
        })  # fmt: skip
    for batch in (1, 256):
        programs = _compiled(models, example, batch)
        medians = np.median(timings([call for call, _ in programs], repeats=repeats), 0) * 1e3
        for result, (_, program), median in zip(results, programs, medians, strict=True):
            result["latency_ms"][str(batch)] = float(median)
            flops = (program.cost_analysis() or {}).get("flops")
            if flops and " while(" not in (program.as_text() or ""):
                result["flops"] = float(flops) / batch
    return results


def speed_ratio(model: Network, other: Network, example: Any, *, batch: int, repeats: int = 100) -> float:
    """How many times as long a call of ``other`` takes: above 1, ``model`` is the faster one.

    The two are called in turn (:func:`timings`), and the median of the quotients is taken.

    Args:
      model: ``(apply_fn, params, model_state)``.
      other: likewise.
      example: one input, without the batch axis.
      batch: examples a call.
      repeats: calls of each.
    """
    calls = [call for call, _ in _compiled((model, other), example, batch)]
    seconds = timings(calls, repeats=repeats)
    return float(np.median(seconds[:, 1] / seconds[:, 0]))


def _compiled(models: Sequence[Network], example: Any, batch: int) -> list[tuple[Callable[[], Any], Any]]:
    """Each model on a batch of the example: a call without arguments, and the program."""
    inputs = jnp.repeat(jnp.asarray(example)[None], batch, 0)
    found: list[tuple[Callable[[], Any], Any]] = []
    for apply_fn, *variables in models:
        program = jax.jit(lambda *args, apply_fn=apply_fn: apply_fn(*args)[0])
        compiled = program.lower(*variables, inputs).compile()
        found.append((functools.partial(compiled, *variables, inputs), compiled))
    return found

"""Evaluation of classifiers: errors, precision, recall, F1, calibration, fidelity to a teacher, cost.

Logits are ``[n, classes]``, labels are integer classes ``[n]``.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax._checks import check_count, check_function, check_integers, check_real, check_sequence
from distill_jax._model import Model, PyTree, check_model, identity, predict


def errors(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Marks wrong predictions: 1 where the top class is not the label, else 0; float32 ``[n]``."""
    _check(logits, labels)
    return (jnp.argmax(logits, -1) != labels).astype(jnp.float32)


def _check(logits: ArrayLike, labels: ArrayLike) -> None:
    """Raises ``ValueError`` unless there are logits ``[..., n, classes]`` and integer labels ``[n]``."""
    check_real("logits", logits)
    check_integers("labels", labels)
    shape, given = np.shape(logits), np.shape(labels)
    if not given or shape[:-1][-len(given) :] != given:
        raise ValueError(f"expected logits [n, classes] and labels [n], got {shape} and {given}")


def _check_examples(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Returns logits ``[n, classes]`` and labels ``[n]`` in [0, classes), n ≥ 1, or raises ``ValueError``."""
    _check(logits, labels)
    logits, labels = np.asarray(logits, np.float32), np.asarray(labels)
    classes = logits.shape[-1]
    if logits.ndim != 2 or not len(labels):
        raise ValueError(
            f"expected logits [n, classes] and labels [n], n ≥ 1, got {logits.shape} and {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got {labels.min()} to {labels.max()}")
    return logits, labels


def brier(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Computes the Brier score: the squared distance of the probabilities from the one-hot label.

    Returns:
      One value per example in [0, 2], float32 ``[n]``.

    References:
      Brier, `Verification of Forecasts Expressed in Terms of Probability`, 1950, Eq. 2.

    >>> print(brier(jnp.zeros((1, 2)), jnp.array([0])))
    [0.5]
    """
    _check(logits, labels)
    probabilities = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    return jnp.sum(jnp.square(probabilities - jax.nn.one_hot(labels, probabilities.shape[-1])), -1)


def agreement(student_logits: ArrayLike, teacher_logits: ArrayLike) -> jax.Array:
    """Marks agreement: 1 where student and teacher choose the same class, else 0; float32 ``[n]``.

    References:
      Stanton et al., `Does Knowledge Distillation Really Work?`, 2021, Eq. 6.
    """
    check_real("student_logits", student_logits)
    check_real("teacher_logits", teacher_logits)
    if np.shape(student_logits) != np.shape(teacher_logits):
        raise ValueError(
            "student_logits and teacher_logits must have the same shape, got "
            f"{np.shape(student_logits)} and {np.shape(teacher_logits)}"
        )
    same = jnp.argmax(student_logits, -1) == jnp.argmax(teacher_logits, -1)
    return same.astype(jnp.float32)


def confusion(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Computes the confusion matrix: counts of (true class, predicted class), int64 ``[classes, classes]``."""
    logits, labels = _check_examples(logits, labels)
    classes = logits.shape[-1]
    pairs = labels * classes + logits.argmax(-1)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def precision_recall_f1(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Computes precision, recall and F1 of each class from a :func:`confusion` matrix: ``[classes]`` each.

    A ratio 0/0 is 0 (a class never predicted has precision 0), and NaN for a class that neither
    occurs nor is predicted. Such a class has no value, and macro averages (``np.nanmean``) leave it out.

    >>> precision_recall_f1(np.array([[3, 1], [0, 4]]))["precision"]
    array([1. , 0.8])
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"counts must be [classes, classes], from confusion, got shape {counts.shape}")
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


def calibration_bins(
    logits: ArrayLike, labels: ArrayLike, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorts predictions by confidence into bins of equal mass (their counts differ by at most 1).

    Returns:
      Mean confidence, accuracy (float64) and count (int64) of each bin, ``[bins]``, in rising order
      of confidence; fewer bins where there are fewer examples.
    """
    check_count("bins", bins)
    logits, labels = _check_examples(logits, labels)
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


def expected_calibration_error(logits: ArrayLike, labels: ArrayLike, bins: int = 15) -> float:
    """Computes the expected calibration error: the mean over examples of |accuracy − confidence| per bin.

    The bins have equal mass.

    References:
      Naeini, Cooper, Hauskrecht, 2015 (equal-width bins there); Nixon et al., `Measuring Calibration
      in Deep Learning`, 2019, §4 (equal mass, as here).
    """
    confidence, accuracy, count = calibration_bins(logits, labels, bins)
    return float(np.sum(count * np.abs(accuracy - confidence)) / count.sum())


def figures(
    logits: ArrayLike, labels: ArrayLike, teacher_logits: ArrayLike | None = None
) -> dict[str, float]:
    """Computes all figures of one classifier on one data set from its logits.

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
    logits, labels = _check_examples(logits, labels)
    if np.isnan(logits).any():
        raise ValueError(
            f"{int(np.isnan(logits).any(-1).sum())} of {len(logits)} examples have NaN logits: "
            "the training has diverged; try a smaller learning rate"
        )
    if teacher_logits is not None:
        check_real("teacher_logits", teacher_logits)
        teacher_logits = np.asarray(teacher_logits, np.float32)
        if teacher_logits.shape != logits.shape or np.isnan(teacher_logits).any():
            raise ValueError(
                f"teacher_logits must be of the shape of logits, {logits.shape}, and not NaN, got shape "
                f"{teacher_logits.shape} with {int(np.isnan(teacher_logits).sum())} NaN"
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


def evaluate(
    model: Model,
    inputs: PyTree,
    labels: ArrayLike,
    *,
    teacher: Model | None = None,
    prepare: Callable[[Any], Any] = identity,
    batch_size: int = 500,
) -> dict[str, float]:
    """Evaluates a classifier on a data set: runs it batch by batch and computes all :func:`figures`.

    Args:
      model: the classifier; its outputs are logits ``[batch, classes]``.
      inputs: an array or a pytree of arrays ``[n, ...]``.
      labels: integer classes, ``[n]``.
      teacher: a teacher to compare with, for agreement and KL divergence.
      prepare: applied to each batch of inputs inside the compiled program.
      batch_size: the number of examples per batch.

    Returns:
      The figures by name.

    Raises:
      ValueError: as :func:`figures` does.

    >>> from distill_jax.models import from_function
    >>> model = from_function(lambda w, x: x @ w, jnp.eye(2))
    >>> evaluate(model, jnp.eye(2), jnp.array([0, 0]))["errors"]
    1.0
    """

    def run(model: Model) -> np.ndarray:
        return predict(model, inputs, prepare=prepare, batch_size=batch_size)

    check_integers("labels", labels)
    return figures(run(model), labels, None if teacher is None else run(teacher))


def timings(calls: Sequence[Callable[[], Any]], *, repeats: int) -> np.ndarray:
    """Times several calls in turn, so that other load on the machine slows down all of them.

    Args:
      calls: functions without arguments; their results are waited for.
      repeats: the number of rounds, after three that are not counted.

    Returns:
      Seconds, ``[repeats, calls]``.
    """
    check_count("repeats", repeats)
    check_sequence("calls", calls, "functions without arguments")
    if not calls:
        raise ValueError("calls must hold at least one function, got none")
    for call in calls:
        check_function("each of calls", call, "")
    seconds = np.zeros((repeats + 3, len(calls)))
    for row in seconds:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            row[i] = time.perf_counter() - start
    return seconds[3:]


def costs(models: Sequence[Model], example: ArrayLike, *, repeats: int = 30) -> list[dict[str, Any]]:
    """Measures what models cost in evaluation mode on the default device, in comparison.

    Args:
      models: the models; their calls are timed in turn, see :func:`timings`.
      example: one input, without the batch axis.
      repeats: the number of timed calls per batch size.

    Returns:
      For each model ``parameters`` (their number), ``bytes`` (of parameters and state), ``flops`` per
      example (XLA's count for the compiled program at batch 256, divided by 256; absent where XLA has none,
      or where there is a loop, whose body it counts once) and ``latency_ms``, the median wall time of a
      call at batch ``"1"`` and ``"256"``, in milliseconds.
    """
    check_count("repeats", repeats)
    check_sequence("models", models, "models")
    for model in models:
        check_model("each of models", model)
    results: list[dict[str, Any]] = [
        {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params)),
            "bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model)),
            "latency_ms": {},
        }
        for model in models
    ]
    for batch in (1, 256):
        programs = _compiled(models, example, batch)
        medians = np.median(timings([call for call, _ in programs], repeats=repeats), 0) * 1e3
        for result, (_, program), median in zip(results, programs, medians, strict=True):
            result["latency_ms"][str(batch)] = float(median)
            flops = (program.cost_analysis() or {}).get("flops")
            if flops and " while(" not in (program.as_text() or ""):
                result["flops"] = float(flops) / batch
    return results


def speed_ratio(model: Model, other: Model, example: ArrayLike, *, batch: int, repeats: int = 100) -> float:
    """Measures the speed-up of ``model`` over ``other``: above 1, ``model`` is faster.

    The two are called in turn (:func:`timings`), and the median of the quotients is taken.

    Args:
      model: the first model.
      other: the model it is compared with.
      example: one input, without the batch axis.
      batch: the number of examples per call.
      repeats: the number of calls of each.

    Returns:
      The median of the quotients of the two times, above 0.
    """
    check_count("batch", batch)
    check_count("repeats", repeats)
    check_model("model", model)
    check_model("other", other)
    calls = [call for call, _ in _compiled((model, other), example, batch)]
    seconds = timings(calls, repeats=repeats)
    return float(np.median(seconds[:, 1] / seconds[:, 0]))


def _compiled(models: Sequence[Model], example: ArrayLike, batch: int) -> list[tuple[Callable[[], Any], Any]]:
    """Each model on a batch of the example: a call without arguments, and the program."""
    inputs = jnp.repeat(jnp.asarray(example)[None], batch, 0)
    found: list[tuple[Callable[[], Any], Any]] = []
    for model in models:
        compiled = jax.jit(lambda model, x: model(x)).lower(model, inputs).compile()
        found.append((functools.partial(compiled, model, inputs), compiled))
    return found

"""The teacher as a function from batch to batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def make_label(apply_fn: Callable[..., Any]) -> Callable[[Any, Mapping[str, Any]], dict[str, Any]]:
    """Makes a teacher's label function: ``label((params, model_state), batch) -> batch``.

    Args:
      apply_fn: the teacher's, as in :class:`distill_jax.models.Model`. It always runs in evaluation
        mode.

    Returns:
      ``label``, which adds ``"teacher"``, the logits of ``batch["image"]``; of an ``apply_fn`` that
      also gives intermediate values (:func:`distill_jax.features.capture`), the dict
      ``{"logits": …, "features": {name: …}}``. The teacher's arrays are its argument: closed over, they
      would be compiled into the program. What it adds is a constant of whatever is differentiated
      after.
    """

    def label(teacher, batch):
        outputs, _ = apply_fn(*teacher, batch["image"])
        if isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], Mapping):
            outputs = {"logits": outputs[0], "features": outputs[1]}
        return {**batch, "teacher": jax.lax.stop_gradient(outputs)}

    return label


def ensemble(*apply_fns: Callable[..., Any]) -> Callable[..., tuple[jax.Array, Any]]:
    """Averages the *probabilities* of several models: an ``apply_fn`` in their place.

    Args:
      apply_fns: one a member; the same one may stand there several times.

    Returns:
      ``apply_fn(params, model_state, x)`` over tuples of the members' params and states. It returns
      log-probabilities, log((1/n)·Σ softmax(zᵢ)), which are logits like any other.

    References:
      Hinton, Vinyals, Dean, 2015, §4 (ensembles as teachers).
    """
    if not apply_fns:
        raise ValueError("ensemble needs at least one apply_fn")

    def apply_fn(params, model_state, x, *, key=None):
        members = zip(apply_fns, params, model_state, strict=True)
        outputs = [apply(p, s, x, key=key) for apply, p, s in members]
        logits = jnp.stack([jnp.asarray(z, jnp.float32) for z, _ in outputs])
        mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - jnp.log(len(apply_fns))
        return mean, tuple(state for _, state in outputs)

    return apply_fn


def predict(
    apply_fn: Callable[..., Any],
    params: PyTree,
    model_state: PyTree,
    inputs: Any,
    *,
    prepare: Callable[[Any], Any] = lambda x: x,
    batch_size: int = 500,
) -> np.ndarray:
    """Runs a model over a data set in evaluation mode: logits float32 ``[n, classes]``.

    Args:
      apply_fn: as in :class:`distill_jax.models.Model`.
      params: its parameters.
      model_state: its state.
      inputs: ``[n, ...]``.
      prepare: applied to each batch of inputs inside the compiled program.
      batch_size: examples at a time. The last batch is padded, so the program is compiled once.
    """
    run = jax.jit(lambda p, s, x: apply_fn(p, s, prepare(x))[0])
    inputs = np.asarray(inputs)
    batch_size = min(batch_size, len(inputs))
    outputs = []
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        padded = np.concatenate([part, inputs[: batch_size - len(part)]])
        outputs.append(np.asarray(run(params, model_state, padded), np.float32)[: len(part)])
    return np.concatenate(outputs)


def label_each(*apply_fns: Callable[..., Any]) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Makes the label function of several teachers: ``label(teachers, batch) -> batch``.

    Args:
      apply_fns: one a teacher, run in evaluation mode.

    Returns:
      ``label``, which takes a tuple of ``(params, model_state)`` and adds ``"teacher"``,
      ``{"logits": (…,)}``, a tuple with one array a teacher.
    """
    if not apply_fns:
        raise ValueError("label_each needs at least one apply_fn")

    def label(teachers, batch):
        logits = tuple(
            apply_fn(*teacher, batch["image"])[0]
            for apply_fn, teacher in zip(apply_fns, teachers, strict=True)
        )
        return {**batch, "teacher": {"logits": jax.lax.stop_gradient(logits)}}

    return label

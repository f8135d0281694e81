"""The same model of many seeds, trained side by side in one compiled program.

Every array of the models has a first axis of seeds, and every array of a batch has the axes
``[examples, seeds, ...]``. The steps of small models are mostly overhead, which all seeds then share.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import data, metrics, models, train
from harness.experiment import prepare


def orders(seeds: int, examples: int) -> np.ndarray:
    """Puts the training examples into a random order for each seed: int32 ``[seeds, examples]``."""
    each = [np.random.default_rng([1, seed]).permutation(examples) for seed in range(seeds)]
    return np.stack(each).astype(np.int32)


def examples(split: data.Split, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Takes the images and labels of each seed: arrays ``[examples, seeds, ...]``.

    Args:
      split: the data.
      rows: the numbers of each seed's examples, ``[seeds, examples]``.
    """
    return {"image": split.image[rows.T], "label": split.label[rows.T]}


def stack(each: Sequence[models.Model]) -> models.Model:
    """Stacks the models of all seeds into one: its arrays have the axes ``[seeds, ...]``."""
    # By way of NumPy: arrays from another program may be bound to a device, for which a step is compiled anew
    return jax.tree.map(lambda *x: jnp.asarray(np.stack([np.asarray(v) for v in x])), *each)


def unstack(model: models.Model) -> list[models.Model]:
    """Returns the model of each seed."""
    seeds = len(jax.tree.leaves(model)[0])
    return [jax.tree.map(lambda x, i=i: x[i], model) for i in range(seeds)]


def init_states(model: models.Model, tx: optax.GradientTransformation) -> train.TrainState:
    """Makes the states of all seeds before their first step.

    Args:
      model: the stacked models.
      tx: the optimizer of each seed.
    """
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(model)[0]))
    return jax.vmap(lambda model, key: train.init_state(model, tx, key))(model, keys)


def each_seed(step: train.Step) -> train.Step:
    """Makes one step of all seeds from the step of one; it also prepares the images."""

    def steps(states, batch):
        return jax.vmap(step, in_axes=(0, 1))(states, {**batch, "image": prepare(batch["image"])})

    return steps


def logits(model: models.Model, images: np.ndarray, *, own: bool = False) -> np.ndarray:
    """Computes the logits of all seeds' models: ``[examples, seeds, classes]``.

    Args:
      model: the stacked models.
      images: uint8 ``[examples, ...]``; or ``[examples, seeds, ...]`` where each seed has its own.
      own: whether each seed has its own images.
    """
    mapped = model.replace(apply_fn=_SideBySide(model.apply_fn, own))
    return models.predict(mapped, images, prepare=prepare, batch_size=5000)


def errors(model: models.Model, split: data.Split) -> np.ndarray:
    """Counts the errors of each seed's model: int ``[seeds]``."""
    return (logits(model, split.image).argmax(-1) != split.label[:, None]).sum(0)


def evaluate(model: models.Model, split: data.Split, teacher: np.ndarray | None = None) -> dict[str, Any]:
    """Evaluates the models of all seeds: the entry of results.json.

    Args:
      model: the stacked models.
      split: the test data.
      teacher: the logits of each seed's teacher, ``[examples, seeds, classes]``.
    """
    given = logits(model, split.image)
    figures = [
        metrics.figures(given[:, i], split.label, None if teacher is None else teacher[:, i])
        for i in range(given.shape[1])
    ]
    return {
        "parameters": sum(x[0].size for x in jax.tree.leaves(model.params)),
        "test": {name: [each[name] for each in figures] for name in figures[0]},
    }


@dataclasses.dataclass(frozen=True)
class _SideBySide:
    """The ``apply_fn`` of stacked models in evaluation mode; equal where the function of one is the same."""

    apply_fn: models.ApplyFn
    own: bool

    def __call__(self, params: Any, state: Any, x: Any, *, key: Any = None) -> tuple[Any, Any]:
        def outputs(params, state, x):
            return self.apply_fn(params, state, x)[0]

        mapped = jax.vmap(outputs, in_axes=(0, 0, 1 if self.own else None), out_axes=1)
        return mapped(params, state, x), state

"""The same model of many seeds, side by side: each seed learns from its own examples and its own teacher.

The models are stacked (:mod:`distill_jax.train.sweeps`): their arrays have a first axis of seeds.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from distill_jax import data, metrics, models, train
from distill_jax.train import sweeps
from harness.experiment import prepare


def orders(seeds: int, examples: int) -> np.ndarray:
    """Puts the training examples into a random order for each seed: int32 ``[seeds, examples]``."""
    each = [np.random.default_rng([1, seed]).permutation(examples) for seed in range(seeds)]
    return np.stack(each).astype(np.int32)


def each_seed(step: train.Step) -> Callable[[Any], train.Step]:
    """Makes the step of a seed, for :func:`distill_jax.train.sweeps.make_epoch`; it also prepares the images.

    Args:
      step: the step of one seed. From soft labels ``[batch, seeds, classes]`` it gets those of its own teacher.
    """

    def make_step(seed):
        def own_step(state, batch):
            own = {name: x[:, seed] if name == "teacher" else x for name, x in batch.items()}
            return step(state, own | {"image": prepare(batch["image"])})

        return own_step

    return make_step


def logits(model: models.Model, images: np.ndarray) -> np.ndarray:
    """Computes the logits of all seeds' models for images ``[examples, ...]``: ``[examples, seeds, classes]``."""
    return models.predict(sweeps.as_one(model), images, prepare=prepare, batch_size=5000)


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

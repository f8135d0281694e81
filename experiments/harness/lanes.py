"""The same model of many seeds, trained beside each other in one program."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import train
from distill_jax.data.datasets import Dataset, Split
from harness import runs
from harness.training import prepare


def orders(seeds: int, examples: int) -> np.ndarray:
    """Puts the training examples into an order of each seed's own: int32 ``[seeds, examples]``."""
    each = [np.random.default_rng([1, seed]).permutation(examples) for seed in range(seeds)]
    return np.stack(each).astype(np.int32)


@dataclass(frozen=True)
class Lanes:
    """Trains and judges the same model of all seeds at once.

    Every array of a state has a first axis of seeds; what further axes a step maps over (rates, say)
    is its own affair. Worth it for small models, whose steps are mostly overhead.

    Attributes:
      dataset: of :func:`distill_jax.data.load`.
      rows: int32 ``[seeds, examples]``, the training examples of each seed in an order of its own.
      out: the run's directory.
      progress: the bar; its unit is the work of one example.
      batch_size: examples a step.
      save_seconds: the least time between two checkpoints.
    """

    dataset: Dataset
    rows: np.ndarray
    out: Path
    progress: runs.Progress
    batch_size: int
    save_seconds: float = 20.0

    def make_epoch(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Makes an epoch of all seeds, for :func:`distill_jax.train.fit`.

        Args:
          step: ``(state, batch) -> (state, metrics)`` of one seed.
        """
        images, labels = (jnp.asarray(self.dataset.train.image), jnp.asarray(self.dataset.train.label))

        def one(state, rows, soft, order, images, labels):
            def body(state, places):
                chosen = rows[places]
                batch = {"image": prepare(images[chosen]), "label": labels[chosen]}
                if soft is not None:
                    batch["teacher"] = soft[places]
                return step(state, batch)

            return jax.lax.scan(body, state, order)

        mapped = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None, None)), donate_argnums=0)

        def epoch(states, places, order, context):
            return mapped(states, *context, order, images, labels)

        return epoch

    def train(
        self,
        name: str,
        epoch: Callable[..., Any],
        states: Any,
        *,
        epochs: int,
        unit: float = 1.0,
        soft: Any = None,
        validate: Callable[[Any, Any], dict[str, float]] | None = None,
    ) -> train.Fit:
        """Trains, or takes from a checkpoint.

        Args:
          name: of the model; its checkpoints' directory is named after it.
          epoch: of :meth:`make_epoch`.
          states: ``[seeds, ...]``; they are copied, so the same ones can begin another training.
          epochs: how many.
          unit: the work of an example, for the bar.
          soft: what :meth:`soft_labels` gives.
          validate: as in :func:`distill_jax.train.fit`.
        """
        if soft is not None and soft.shape[:2] != self.rows.shape:
            raise ValueError(f"soft must be [seeds, examples, …] = {self.rows.shape}, got {soft.shape}")
        examples = self.rows.shape[1]
        return train.fit(
            jax.tree.map(jnp.copy, states),
            epoch,
            {"place": np.arange(examples)},
            epochs=epochs,
            batch_size=self.batch_size,
            seed=0,
            context=(jnp.asarray(self.rows), soft),
            validate=validate,
            directory=self.out / name.replace(", ", "-").replace(" ", "-"),
            save_seconds=self.save_seconds,
            on_epoch=self.progress.stage(name, unit * examples),
        )

    def soft_labels(self, apply_fn: Callable[..., Any], params: Any) -> np.ndarray:
        """What teachers say of their seeds' ``rows``: ``[seeds, examples, classes]``.

        Args:
          apply_fn: of all of them.
          params: ``[seeds, ...]``.
        """
        run, images = _forward_each(apply_fn), self.dataset.train.image
        parts = [run(params, images[self.rows[:, i : i + 5000]]) for i in range(0, self.rows.shape[1], 5000)]
        return np.concatenate(parts, 1)

    def logits(self, apply_fn: Callable[..., Any], params: Any, split: Split) -> np.ndarray:
        """What models say: ``[seeds, n, classes]``, of ``params`` with leaves ``[seeds, ...]``."""
        run = _forward(apply_fn)
        parts = [run(params, split.image[i : i + 5000]) for i in range(0, len(split.label), 5000)]
        return np.concatenate(parts, 1)


@functools.lru_cache(maxsize=8)
def _forward(apply_fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    return jax.jit(jax.vmap(lambda p, x: apply_fn(p, {}, prepare(x))[0], in_axes=(0, None)))


@functools.lru_cache(maxsize=8)
def _forward_each(apply_fn: Callable[..., Any]) -> Callable[..., jax.Array]:
    return jax.jit(jax.vmap(lambda p, x: apply_fn(p, {}, prepare(x))[0]))

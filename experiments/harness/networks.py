"""The networks of an experiment, as its options name them: teacher and student, or an original and its training."""

import importlib
import re
from dataclasses import dataclass
from typing import Any

import jax

from distill_jax import data, models, train
from harness.experiment import Run, Trained, adam, arrays, jittered
from harness.options import Count, Dropout, Options, Positive, Whole


def build(config: Any, dataset: data.Dataset, kind: str, seed: int) -> models.Model:
    """Builds the ``"teacher"`` or the ``"student"`` with the initial parameters of a seed.

    Args:
      config: the options: ``teacher`` and ``student``, the descriptions of the networks, and ``dropout``, the fraction
        of the teacher's hidden units that is dropped in training, if there is such an option.
      dataset: the data.
      kind: which of the two.
      seed: the number of the repetition.
    """
    key = jax.random.fold_in(jax.random.key(seed), kind == "student")
    dropout = getattr(config, "dropout", 0.0) if kind == "teacher" else 0.0
    return models.build(getattr(config, kind), dataset.image_shape, dataset.classes, key, dropout=dropout)


@dataclass(frozen=True)
class OriginalOptions(Options):
    """The options of an experiment that trains a network, the original, and then makes it smaller."""

    original: str = "mlp:1200,1200"  # the network to make smaller, such as mlp:1200,1200 or convnet:16,32
    original_epochs: Count = 20  # number of epochs to train the original
    original_learning_rate: Positive = 1e-3  # highest learning rate of the original (Adam, cosine schedule)
    dropout: Dropout = 0.2  # fraction of the original's hidden units that is dropped in training
    batch_size: Count = 128  # number of examples per step
    jitter: Whole = 2  # largest random shift of training images, in pixels


def build_original(config: OriginalOptions, dataset: data.Dataset, seed: int) -> models.Model:
    """Builds the original with the initial parameters of a seed: by its name, or by ``module:function``.

    The function takes the shape of an image, the number of classes and a random key, and returns a model.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0)
    if own := re.fullmatch(r"([\w.]+):([A-Za-z_]\w*)", config.original):
        try:
            function = getattr(importlib.import_module(own[1]), own[2])
        except (ImportError, AttributeError) as error:
            raise ValueError(f"--original {config.original} cannot be imported: {error}") from None
        model = function(dataset.image_shape, dataset.classes, key)
        config.need("original", isinstance(model, models.Model), "return a distill_jax.models.Model")
        return model
    return models.build(config.original, dataset.image_shape, dataset.classes, key, dropout=config.dropout)


def train_original(run: Run, seed: int) -> Trained:
    """Trains the original on the labels of shifted images, or takes it from the checkpoint of the run."""
    config, examples, order = run.config, arrays(run.dataset.train), 10_000 + seed
    steps = len(examples["label"]) // config.batch_size
    tx = adam(config.original_learning_rate, config.original_epochs, steps)
    step = train.make_train_step(train.supervised(), tx)  # (state, batch) -> (state, metrics)
    epoch = train.make_epoch(step, transform=jittered(config.jitter))  # many steps in one call
    state = train.init_state(build_original(config, run.dataset, seed), tx, run.key(seed, order))
    done = run.fit(
        "original", seed, state, epoch, examples, epochs=config.original_epochs, batch_size=config.batch_size,
        order=order,
    )  # fmt: skip
    return run.judge(done.model, done.history, done.seconds)

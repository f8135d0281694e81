"""What malformed calls are made of: a model, its data, and wrong values."""

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from distill_jax import models, train
from distill_jax.compress import low_rank, units

ROOT = Path(__file__).parents[3]
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """A malformed call.

    Attributes:
      name: what is wrong.
      words: a regular expression that is found in the message.
      call: makes the call.
    """

    name: str
    words: str
    call: Callable[[], Any]


class Outcome(NamedTuple):
    """How a command line ended."""

    text: str
    raw: bool = False


KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(8, 6)).astype(np.float32)
LABELS = RNG.integers(0, 3, 8).astype(np.int32)
LOGITS = RNG.normal(size=(8, 3)).astype(np.float32)
IMAGES = RNG.uniform(size=(8, 4, 4, 1)).astype(np.float32)
BATCH = {"image": X, "label": LABELS}
MASKED = np.ma.masked_array(LOGITS, np.isnan(LOGITS))
STRUCTURED = np.zeros(8, [("a", np.float32), ("b", np.float32)])
WRONG_NUMBERS = {
    "complex": LOGITS + 1j,
    "bool": LOGITS > 0,
    "masked": MASKED,
    "structured": STRUCTURED,
    "objects": LOGITS.astype(object),
    "strings": LOGITS.astype(str),
    "unequal rows": [[1.0, 2.0], [3.0]],
}
WRONG_LABELS = {
    "of floats": LABELS.astype(np.float32),
    "bool": LABELS > 0,
    "complex": LABELS + 1j,
    "negative": LABELS - 5,
    "beyond the classes": LABELS + 5,
    "masked": np.ma.masked_array(LABELS, LABELS > 1),
    "short": LABELS[:5],
    "strings": LABELS.astype(str),
    "objects": LABELS.astype(object),
    "a column": LABELS[:, None],
}


def params(width: int = 5) -> dict[str, Any]:
    return {"a": jnp.ones((6, width)) / 6, "b": jnp.arange(3.0 * width).reshape(width, 3) / 9}


def net(p: Any, x: Any) -> Any:
    return jnp.tanh(x @ p["a"]) @ p["b"]


def model(width: int = 5) -> models.Model:
    return models.from_function(net, params(width))


MODEL = model()
MODULE = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
LINEN = linen.Dense(3)
NO_MODELS = {
    "an NNX module": (MODULE, "from_nnx"),
    "a Linen module": (LINEN, "from_linen"),
    "a function": (net, "Model"),
    "parameters": (params(), "Model"),
    "None": (None, "Model"),
}
TX = optax.sgd(0.1)


@functools.cache
def graph() -> units.UnitGraph:
    return units.trace(MODEL, jnp.zeros((8, 6)))


@functools.cache
def scores() -> Any:
    return units.scores.l1(graph(), MODEL)


@functools.cache
def kernels() -> Any:
    return low_rank.kernels(MODEL, X)


@functools.cache
def folder() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="malformed-")
    FOLDERS.append(directory)  # kept until the end of the process
    return Path(directory.name)


FOLDERS: list[Any] = []
NUMBERS = itertools.count()


def fresh() -> Path:
    return folder() / str(next(NUMBERS))


@functools.cache
def loaded() -> models.Model:
    path = folder() / "saved.model"
    models.save(path, MODEL, X)
    return models.load(path)


def state(model: Any = MODEL, tx: Any = TX, key: Any = KEY) -> Any:
    return train.init_state(model, tx, key)


@functools.cache
def epoch() -> Any:
    return train.make_epoch(train.make_train_step(train.supervised(), TX))


def fit(**changes: Any) -> Any:
    options: dict[str, Any] = {
        "state": state(),
        "epoch": epoch(),
        "data": BATCH,
        "epochs": 1,
        "batch_size": 4,
        "seed": 0,
    }
    options |= changes
    return train.fit(options.pop("state"), options.pop("epoch"), options.pop("data"), **options)


def with_nan(x: Any) -> Any:
    x = np.array(x)
    x.flat[-1] = NAN
    return x


def step(loss_fn: Any, batch: Any, model: Any = MODEL) -> Any:
    return loss_fn(model, batch, key=None, step=jnp.int32(0))

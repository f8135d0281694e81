"""Malformed calls over the whole public interface: what each is refused with, in one line of ours.

``python tests/faults/malformed.py`` makes every call, and prints how many were refused in one line, how many
ended in an exception of another library or of Python, and how many were accepted. It ends with status 1 unless
all were refused.

A call is refused if it raises ValueError, KeyError or TypeError by a ``raise`` statement of distill_jax, with a
message of one line in which the given words are found.
"""

import argparse
import contextlib
import dis
import functools
import inspect
import io
import itertools
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from distill_jax import data, features, losses, metrics, models, teachers, train, weights
from distill_jax.compress import codes, linear_codes, low_rank, search, sparsity, units
from distill_jax.train import federated, interpolation, sweeps

ROOT = Path(__file__).parents[2]
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


def judge(case: Case) -> tuple[str, str]:
    """Makes the call: ("refused", "raw" or "accepted", the message or what was returned)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = case.call()
            jax.block_until_ready(found)
        if isinstance(found, Outcome):
            clear = not found.raw and "\n" not in found.text and re.search(case.words, found.text)
            return ("refused" if clear else "raw"), found.text
    except Exception as error:  # of any type: that is the question
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        ours = isinstance(error, ValueError | KeyError | TypeError) and raised_by_us(error)
        clear = bool(text) and "\n" not in text and re.search(case.words, text)
        return ("refused" if ours and clear else "raw"), f"{type(error).__name__}: {text}"
    return "accepted", f"{type(found).__name__}"


def raised_by_us(error: BaseException) -> bool:
    """Says whether a ``raise`` statement of this project raised an error, and not what it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    inside = any(
        Path(code.co_filename).is_relative_to(ROOT / part) for part in ("distill_jax", "experiments")
    )
    return inside and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


# --- what the calls are made of ------------------------------------------------------------------


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


# --- the calls -------------------------------------------------------------------------------------


# fmt: off
def of_models() -> Iterator[Case]:
    for name, (wrong, words) in NO_MODELS.items():
        yield Case(f"models.predict: {name}", words, lambda w=wrong: models.predict(w, X))
        yield Case(f"models.save: {name}", words, lambda w=wrong: models.save(fresh(), w, X))
        yield Case(f"models.compose: {name}", words, lambda w=wrong: models.compose(w, MODEL))
        yield Case(f"models.side_by_side: {name}", words, lambda w=wrong: models.side_by_side(MODEL, w))
        yield Case(f"teachers.label: {name}", words, lambda w=wrong: teachers.label(w, BATCH))
        yield Case(f"teachers.ensemble: {name}", words, lambda w=wrong: teachers.ensemble(MODEL, w))
        yield Case(f"train.init_state: {name}", words, lambda w=wrong: state(w))
        yield Case(f"units.trace: {name}", words, lambda w=wrong: units.trace(w, X))
        yield Case(f"features.capture: {name}", words, lambda w=wrong: features.capture(w, "a"))
        yield Case(f"low_rank.kernels: {name}", words, lambda w=wrong: low_rank.kernels(w, X))
        yield Case(f"metrics.evaluate: {name}", words, lambda w=wrong: metrics.evaluate(w, X, LABELS))
    for name, wrong in {"a string": "50", "0": 0, "negative": -1, "a fraction": 1.5, "NaN": NAN}.items():
        yield Case(f"models.predict: batch_size {name}", "batch_size",
                   lambda w=wrong: models.predict(MODEL, X, batch_size=w))
    yield Case("models.predict: no examples", "example", lambda: models.predict(MODEL, X[:0]))
    yield Case("models.predict: a scalar", "examples", lambda: models.predict(MODEL, np.float32(1)))
    yield Case("models.predict: unequal lengths", "as many", lambda: models.predict(MODEL, (X, X[:3])))
    yield Case("models.predict: prepare is a Model", "prepare", lambda: models.predict(MODEL, X, prepare=MODEL))
    yield Case("models.predict: prepare is None", "prepare", lambda: models.predict(MODEL, X, prepare=None))
    yield Case("models.from_function: a Model", "fn", lambda: models.from_function(MODEL, {}))
    yield Case("models.from_function: a module", "from_nnx", lambda: models.from_function(MODULE, {}))
    yield Case("models.from_function: parameters first", "fn", lambda: models.from_function(params(), net))
    yield Case("models.from_nnx: a Linen module", "from_linen", lambda: models.from_nnx(LINEN))
    yield Case("models.from_nnx: a Model", "Model", lambda: models.from_nnx(MODEL))
    yield Case("models.from_nnx: a class", "class", lambda: models.from_nnx(nnx.Linear))
    yield Case("models.from_linen: an NNX module", "from_nnx", lambda: models.from_linen(MODULE, KEY, X))
    yield Case("models.from_linen: a class", "class", lambda: models.from_linen(linen.Dense, KEY, X))
    yield Case("models.from_linen: x and key exchanged", "key", lambda: models.from_linen(LINEN, X, KEY))
    yield Case("models.from_linen: an integer key", "key", lambda: models.from_linen(LINEN, 0, X))
    yield Case("models.from_linen: x is None", r"\bx\b", lambda: models.from_linen(LINEN, KEY, None))
    yield Case("models.from_linen: a scalar x", r"\bx\b", lambda: models.from_linen(LINEN, KEY, 1.0))
    yield Case("models.compose: frozen unknown", "frozen", lambda: models.compose(MODEL, MODEL, frozen="both"))
    yield Case("models.compose: code is a Model", "code", lambda: models.compose(MODEL, MODEL, code=MODEL))
    yield Case("models.side_by_side: none", "at least one", lambda: models.side_by_side())
    yield Case("models.side_by_side: a list", "Model", lambda: models.side_by_side([MODEL, MODEL]))
    yield Case("models.load: absent", "no saved model", lambda: models.load(fresh()))
    yield Case("models.save: no folder", "does not exist", lambda: models.save(fresh() / "x", MODEL, X))
    yield Case("models.save: x and model exchanged", "Model", lambda: models.save(fresh(), X, MODEL))
    yield Case("a loaded model: other width", "x must be", lambda: loaded()(X[:, :4]))
    yield Case("a loaded model: other parameters", "params", lambda: loaded().replace(params={})(X))
    for wrong in ("", "mlp", "mlp:", "mlp:a", "mlp:0", "mlp:-3", "mlp:1.5", "vgg7", "resnet9", "resnet20:0",
                  "resnet20:nan", "resnet20:-1", "vgg8:", "transformer", "wrn17-2", "shufflenetv3"):
        yield Case(f"models.build: {wrong!r}", ".", lambda w=wrong: models.build(w, (8, 8, 1), 3, KEY))
    for name, call in {
        "a number": lambda: models.build(8, (8, 8, 1), 3, KEY),
        "shape of two": lambda: models.build("mlp:4", (8, 8), 3, KEY),
        "shape with 0": lambda: models.build("mlp:4", (8, 0, 1), 3, KEY),
        "shape of floats": lambda: models.build("mlp:4", (8.0, 8.5, 1), 3, KEY),
        "shape a number": lambda: models.build("mlp:4", 64, 3, KEY),
        "classes 0": lambda: models.build("mlp:4", (8, 8, 1), 0, KEY),
        "classes a float": lambda: models.build("mlp:4", (8, 8, 1), 2.5, KEY),
        "classes a float, vgg": lambda: models.build("vgg8:0.1", (8, 8, 1), 2.5, KEY),
        "dropout 1": lambda: models.build("mlp:4", (8, 8, 1), 3, KEY, dropout=1.0),
        "dropout NaN": lambda: models.build("mlp:4", (8, 8, 1), 3, KEY, dropout=NAN),
        "dropout a string": lambda: models.build("mlp:4", (8, 8, 1), 3, KEY, dropout="0.1"),
        "key an integer": lambda: models.build("mlp:4", (8, 8, 1), 3, 0.5),
        "key None": lambda: models.build("mlp:4", (8, 8, 1), 3, None),
    }.items():
        yield Case(f"models.build: {name}", "shape|classes|dropout|key|drop|description|dtype", call)
    yield Case("models.feature_names: a family", "no list", lambda: models.feature_names("mlp:4", (8, 8, 1)))
    yield Case("models.MLP: one width", "widths", lambda: models.MLP((4,), rngs=nnx.Rngs(0)))
    yield Case("models.MLP: a float width", "widths", lambda: models.MLP((4, 2.5), rngs=nnx.Rngs(0)))
    yield Case("models.MLP: dropout 2", "dropout", lambda: models.MLP((4, 2), dropout=2.0, rngs=nnx.Rngs(0)))
    yield Case("models.VGG: depth 9", "depth", lambda: models.VGG((8, 8, 1), 3, depth=9, rngs=nnx.Rngs(0)))
    yield Case("models.ResNet: widening 0", "widening",
               lambda: models.ResNet((8, 8, 1), 3, widening=0, rngs=nnx.Rngs(0)))
    yield from of_transformers()


def of_transformers() -> Iterator[Case]:
    sizes = {"vocabulary": 5, "width": 4, "layers": 1, "heads": 2, "hidden": 4}
    small = functools.cache(lambda: models.build_transformer(models.TransformerConfig(**sizes), KEY))
    text = np.ones((2, 3), np.int32)
    for name, (wrong, words) in NO_MODELS.items():
        yield Case(f"models.hidden_states: {name}", words, lambda w=wrong: models.hidden_states(w))
        yield Case(f"models.head_kernel: {name}", words, lambda w=wrong: models.head_kernel(w))
        yield Case(f"models.init_cache: {name}", words, lambda w=wrong: models.init_cache(w, 1, 1))
        yield Case(f"models.extend: {name}", words, lambda w=wrong: models.extend(w, text, {}))
        yield Case(f"models.generate: {name}", words, lambda w=wrong: models.generate(w, text, length=1, key=KEY))
        yield Case(f"models.save_pretrained: {name}", words, lambda w=wrong: models.save_pretrained(fresh(), w))
    for field in sizes:
        for name, wrong in {"0": 0, "a fraction": 1.5, "a string": "4", "True": True, "None": None}.items():
            yield Case(f"models.TransformerConfig: {field} {name}", field,
                       lambda f=field, w=wrong: models.TransformerConfig(**sizes | {f: w}))
    for field, wrong in {"norm": "batch", "positions": None, "feed_forward": "relu", "tied": "yes", "qk_norm": 2,
                         "norm_eps": NAN, "rope_theta": -1.0, "kv_heads": 3, "head_size": 1.0, "rope_scaling": 2.0,
                         "max_length": 0}.items():
        yield Case(f"models.TransformerConfig: {field} {wrong}", field,
                   lambda f=field, w=wrong: models.TransformerConfig(**sizes | {f: w}))
    yield Case("models.RopeScaling: factor 0", "factor", lambda: models.RopeScaling(factor=0))
    yield Case("models.RopeScaling: frequencies exchanged", "high_frequency must be above",
               lambda: models.RopeScaling(factor=2.0, low_frequency=4.0, high_frequency=1.0))
    yield Case("models.build_transformer: key an integer", "key",
               lambda: models.build_transformer(models.TransformerConfig(**sizes), 0))
    yield Case("models.build_transformer: config a dict", "config", lambda: models.build_transformer(sizes, KEY))
    for name, wrong in {"a word": "float", "float16": "float16", "None": None, "int32": np.int32}.items():
        yield Case(f"models.build_transformer: dtype {name}", "dtype",
                   lambda w=wrong: models.build_transformer(models.TransformerConfig(**sizes), KEY, dtype=w))
    for name, wrong in {"floats": text * 1.0, "one row": text[0], "a scalar": 3, "none": text[:, :0], "bool": text > 0,
                        "strings": text.astype(str), "objects": text.astype(object), "unequal rows": [[1], [1, 2]],
                        "a dict without tokens": {"image": text}, "beyond the vocabulary": text + 4,
                        "negative": text - 2}.items():
        yield Case(f"a transformer: tokens {name}", "tokens", lambda w=wrong: small()(w))
        yield Case(f"models.generate: prompts {name}", "tokens",
                   lambda w=wrong: models.generate(small(), w, length=1, key=KEY))
    for name, wrong in {"floats": text * 1.0, "short": text[:, :2], "a string": "left"}.items():
        for entry in ("segments", "positions"):
            yield Case(f"a transformer: {entry} {name}", entry,
                       lambda e=entry, w=wrong: small()({"tokens": text, e: w}))
    for option, wrong in {"length": 0, "temperature": NAN, "top_p": 1.5, "stops": 3, "pad": 0.5, "cached": "no",
                          "key": 3}.items():
        yield Case(f"models.generate: {option} {wrong}", option,
                   lambda o=option, w=wrong: models.generate(small(), text, **{"length": 1, "key": KEY, o: w}))
    yield Case("models.load_pretrained: absent", "no directory", lambda: models.load_pretrained(fresh()))
    yield Case("models.load_pretrained: empty", "config.json does not exist",
               lambda: models.load_pretrained(tempfile.mkdtemp()))
    yield Case("models.save_pretrained: shard_bytes 0", "shard_bytes",
               lambda: models.save_pretrained(fresh(), small(), shard_bytes=0))
    yield Case("models.save_pretrained: no folder", "does not exist",
               lambda: models.save_pretrained(fresh() / "x", small()))


def of_metrics() -> Iterator[Case]:
    for name, wrong in WRONG_NUMBERS.items():
        yield Case(f"metrics.figures: logits {name}", "logits", lambda w=wrong: metrics.figures(w, LABELS))
        yield Case(f"metrics.figures: teacher {name}", "teacher_logits",
                   lambda w=wrong: metrics.figures(LOGITS, LABELS, w))
    for name, wrong in WRONG_LABELS.items():
        yield Case(f"metrics.figures: labels {name}", "labels", lambda w=wrong: metrics.figures(LOGITS, w))
        yield Case(f"metrics.confusion: labels {name}", "labels", lambda w=wrong: metrics.confusion(LOGITS, w))
        yield Case(f"metrics.evaluate: labels {name}", "labels", lambda w=wrong: metrics.evaluate(MODEL, X, w))
    yield Case("metrics.figures: NaN", "NaN", lambda: metrics.figures(with_nan(LOGITS), LABELS))
    yield Case("metrics.figures: NaN teacher", "teacher", lambda: metrics.figures(LOGITS, LABELS, with_nan(LOGITS)))
    yield Case("metrics.figures: a vector", "logits", lambda: metrics.figures(LOGITS[0], LABELS))
    yield Case("metrics.figures: a scalar", "logits", lambda: metrics.figures(np.float32(1), LABELS))
    yield Case("metrics.figures: none", "n ≥ 1", lambda: metrics.figures(LOGITS[:0], LABELS[:0]))
    yield Case("metrics.figures: other teacher", "teacher", lambda: metrics.figures(LOGITS, LABELS, LOGITS[:, :2]))
    yield Case("metrics.figures: short teacher", "teacher", lambda: metrics.figures(LOGITS, LABELS, LOGITS[:5]))
    yield Case("metrics.errors: short labels", "labels", lambda: metrics.errors(LOGITS, LABELS[:5]))
    yield Case("metrics.errors: a column", "labels", lambda: metrics.errors(LOGITS, LABELS[:, None]))
    yield Case("metrics.brier: short labels", "labels", lambda: metrics.brier(LOGITS, LABELS[:5]))
    yield Case("metrics.brier: complex", "logits", lambda: metrics.brier(LOGITS + 1j, LABELS))
    yield Case("metrics.agreement: other length", "teacher", lambda: metrics.agreement(LOGITS, LOGITS[:5]))
    yield Case("metrics.agreement: other classes", "teacher", lambda: metrics.agreement(LOGITS, LOGITS[:, :2]))
    for wrong in (0, -1, 1.5, NAN, "15"):
        yield Case(f"metrics.calibration_bins: bins {wrong!r}", "bins",
                   lambda w=wrong: metrics.calibration_bins(LOGITS, LABELS, w))
    yield Case("metrics.ece: none", "n ≥ 1", lambda: metrics.expected_calibration_error(LOGITS[:0], LABELS[:0]))
    yield Case("metrics.precision_recall_f1: a vector", "counts", lambda: metrics.precision_recall_f1(np.ones(3)))
    yield Case("metrics.evaluate: short labels", "labels", lambda: metrics.evaluate(MODEL, X, LABELS[:5]))
    yield Case("metrics.evaluate: no module", "from_nnx", lambda: metrics.evaluate(MODEL, X, LABELS, teacher=MODULE))
    yield Case("metrics.timings: a Model", "calls", lambda: metrics.timings(MODEL, repeats=1))
    yield Case("metrics.timings: none", "calls", lambda: metrics.timings([], repeats=1))
    yield Case("metrics.timings: repeats 0", "repeats", lambda: metrics.timings([dict], repeats=0))
    yield Case("metrics.costs: one Model", "models", lambda: metrics.costs(MODEL, X[0]))
    yield Case("metrics.costs: repeats 0", "repeats", lambda: metrics.costs([MODEL], X[0], repeats=0))
    yield Case("metrics.costs: a module", "from_nnx", lambda: metrics.costs([MODULE], X[0]))
    yield Case("metrics.speed_ratio: batch 0", "batch", lambda: metrics.speed_ratio(MODEL, MODEL, X[0], batch=0))
    yield Case("metrics.speed_ratio: repeats 0", "repeats",
               lambda: metrics.speed_ratio(MODEL, MODEL, X[0], batch=1, repeats=0))


def of_data() -> Iterator[Case]:
    labels = np.arange(30) % 3
    images = RNG.uniform(size=(30, 4, 4, 1)).astype(np.float32)
    good = (images, labels, images, labels)

    def arrays(place: int, wrong: Any, **options: Any) -> Any:
        given: list[Any] = list(good)
        given[place] = wrong
        return data.from_arrays(*given, **options)

    for name, wrong in {
        "NaN": with_nan(images), "infinite": images / 0 if False else np.full_like(images, INF),
        "above 1": images * 255, "negative": images - 1, "int64": np.ones((30, 4, 4), int), "bool": images > 0.5,
        "complex": images + 1j, "masked": np.ma.masked_array(images, images > 0.9), "flat": images.reshape(30, 16),
        "none": images[:0], "short": images[:20], "five axes": images[None], "strings": images.astype(str),
        "objects": images.astype(object), "another size": images[:, :3], "a Model": MODEL, "None": None,
        "unequal rows": [[1.0], [1.0, 2.0]],
    }.items():
        for place, argument in ((0, "images"), (2, "test_images")):
            yield Case(f"data.from_arrays: {argument} {name}", "images|labels", lambda p=place, w=wrong: arrays(p, w))
    for name, wrong in {
        "floats": labels + 0.5, "negative": labels - 1, "one-hot": np.eye(3)[labels], "short": labels[:9],
        "bool": labels > 0, "strings": labels.astype(str), "a gap": labels * 2, "one class": labels * 0,
        "masked": np.ma.masked_array(labels, labels > 1), "huge": labels.astype(np.int64) + 2**40,
    }.items():
        yield Case(f"data.from_arrays: labels {name}", "labels", lambda w=wrong: arrays(1, w))
    for wrong in (0, -1, 30, 2.5, NAN, "5", True):
        yield Case(f"data.from_arrays: validation {wrong!r}", "validation",
                   lambda w=wrong: arrays(0, images, validation=w))
        yield Case(f"data.load: validation {wrong!r}", "validation",
                   lambda w=wrong: data.load("digits", validation=w if w != 30 else 10**6))
    for wrong in (-1, 1.5, NAN, "0", 2**40, None):
        yield Case(f"data.load: seed {wrong!r}", "seed", lambda w=wrong: data.load("digits", seed=w))
    yield Case("data.from_arrays: one name", "labels", lambda: arrays(0, images, class_names=["a"]))
    yield Case("data.from_arrays: names a string", "class_names", lambda: arrays(0, images, class_names="abc"))
    yield Case("data.from_arrays: names twice", "class_names", lambda: arrays(0, images, class_names=["a", "a", "b"]))
    yield Case("data.load: unknown", "no_such", lambda: data.load("no_such_data"))
    yield Case("data.load: empty", "name", lambda: data.load(""))
    yield Case("data.load: a number", "name", lambda: data.load(5))
    yield Case("data.load: None", "None", lambda: data.load(None))
    yield Case("data.load: a list", "name", lambda: data.load(["digits"]))
    yield Case("data.load: no folder", "data_dir", lambda: data.load("mnist", data_dir=fresh()))
    yield Case("data.load: digits with a folder", "data_dir", lambda: data.load("digits", data_dir=folder()))
    yield Case("data.load: an empty folder", "not found", lambda: data.load("mnist", data_dir=empty(fresh())))
    yield Case("data.load: no file", "no file", lambda: data.load(fresh().with_suffix(".npz")))

    def npz(**changes: Any) -> Any:
        path = fresh().with_suffix(".npz")
        named = dict(zip(("x_train", "y_train", "x_test", "y_test"), good, strict=True)) | changes
        np.savez(path, **{name: x for name, x in named.items() if x is not None})
        return data.load(path)

    yield Case("data.load: no y_test", "y_test", lambda: npz(y_test=None))
    yield Case("data.load: NaN in a file", "x_train", lambda: npz(x_train=with_nan(images)))
    yield Case("data.load: labels of floats", "y_train", lambda: npz(y_train=labels + 0.5))
    yield Case("data.load: complex images", "x_test", lambda: npz(x_test=images + 1j))
    yield Case("data.load: few names", "class|y_train", lambda: npz(class_names=np.array(["a"])))
    yield Case("data.load: objects", "numpy.savez", lambda: npz(x_train=images.astype(object)))

    def torn() -> Any:
        path = fresh().with_suffix(".npz")
        path.write_bytes(b"PK\x03\x04 nothing")
        return data.load(path)

    yield Case("data.load: a torn file", "cannot be read", torn)
    for wrong in (-1, 1.5, NAN, "2", None, True):
        yield Case(f"data.random_shift: {wrong!r}", "pixels", lambda w=wrong: data.random_shift(KEY, IMAGES, w))
    for name, call in {
        "shift": lambda x: data.random_shift(KEY, x, 1),
        "flip": lambda x: data.random_flip(KEY, x),
    }.items():
        yield Case(f"data.random_{name}: flat images", "images", lambda c=call: c(X))
        yield Case(f"data.random_{name}: one image", "images", lambda c=call: c(IMAGES[0]))
        yield Case(f"data.random_{name}: a list", "images", lambda c=call: c([1, 2]))
    yield Case("data.random_shift: an integer key", "key", lambda: data.random_shift(3, IMAGES, 1))
    yield Case("data.random_flip: arguments exchanged", "key", lambda: data.random_flip(IMAGES, KEY))


def of_sound() -> Iterator[Case]:
    heard = RNG.normal(size=(2, 600)).astype(np.float32)
    for argument in ("rate", "n_fft", "hop", "mels", "frames", "dynamic_range", "floor"):
        for wrong in (0, -1, NAN, "2", True, [1, 2]):
            yield Case(f"data.sound.log_mel: {argument} {wrong!r}", argument,
                       lambda a=argument, w=wrong: data.sound.log_mel(heard, **{"rate": 8000, a: w}))
    for wrong in (NAN, -1, 9000, "2", [1, 2]):
        for argument in ("low", "high"):
            yield Case(f"data.sound.log_mel: {argument} {wrong!r}", argument,
                       lambda a=argument, w=wrong: data.sound.log_mel(heard, rate=8000, **{a: w}))
    for wrong in ("bark", None, 3, []):
        yield Case(f"data.sound.log_mel: scale {wrong!r}", "scale",
                   lambda w=wrong: data.sound.log_mel(heard, rate=8000, scale=w))
        yield Case(f"data.sound.log_mel: padding {wrong!r}", "padding",
                   lambda w=wrong: data.sound.log_mel(heard, rate=8000, padding=w))
    for wrong in (0, 1, 1.5, "32", None, 4000):
        yield Case(f"data.sound.mel_image: width {wrong!r}", "width",
                   lambda w=wrong: data.sound.mel_image(heard, rate=8000, width=w))
    for name, call in {
        "log_mel": lambda x: data.sound.log_mel(x, rate=8000),
        "mel_image": lambda x: data.sound.mel_image(x, rate=8000),
        "random_speed": lambda x: data.sound.random_speed(KEY, x, 1.1),
        "random_shift": lambda x: data.sound.random_shift(KEY, x, 10),
        "random_gain": lambda x: data.sound.random_gain(KEY, x, 3.0),
        "random_noise": lambda x: data.sound.random_noise(KEY, x),
    }.items():
        for wrong in (np.zeros((2, 600), np.int16), np.zeros((2, 0), np.float32), np.zeros(600, complex), "x", None):
            yield Case(f"data.sound.{name}: {type(wrong).__name__} {getattr(wrong, 'dtype', wrong)}", "waveform",
                       lambda c=call, w=wrong: c(w))
    for wrong in (0.9, NAN, "2", None):
        yield Case(f"data.sound.random_speed: factor {wrong!r}", "factor",
                   lambda w=wrong: data.sound.random_speed(KEY, heard, w))
    for wrong in (-1, 1.5, True, None):
        yield Case(f"data.sound.random_shift: samples {wrong!r}", "samples",
                   lambda w=wrong: data.sound.random_shift(KEY, heard, w))
    for wrong in (-1.0, NAN, "2", None):
        yield Case(f"data.sound.random_gain: decibel {wrong!r}", "decibel",
                   lambda w=wrong: data.sound.random_gain(KEY, heard, w))
        yield Case(f"data.sound.random_noise: tilt {wrong!r}", "tilt",
                   lambda w=wrong: data.sound.random_noise(KEY, heard, tilt=w))
    yield Case("data.sound.random_noise: low above high", "low",
               lambda: data.sound.random_noise(KEY, heard, low=50.0))
    for name, call in {
        "random_warp": lambda x: data.sound.random_warp(KEY, x, time=1.1),
        "random_response": lambda x: data.sound.random_response(KEY, x, 3.0),
        "random_background": lambda x: data.sound.random_background(KEY, x),
        "random_mask": lambda x: data.sound.random_mask(KEY, x, time=2),
    }.items():
        for wrong in (np.zeros((2, 8, 8, 1), np.uint8), np.zeros((2, 8, 8, 3), np.float32), heard, "x", None):
            yield Case(f"data.sound.{name}: {type(wrong).__name__} {getattr(wrong, 'dtype', wrong)}", "image",
                       lambda c=call, w=wrong: c(w))
    yield Case("data.sound.random_gain: arguments exchanged", "key",
               lambda: data.sound.random_gain(heard, KEY, 3.0))


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def of_weights() -> Iterator[Case]:
    a, b = params(), params()
    for name, wrong in {
        "another structure": {"a": a["a"]}, "more": {**a, "c": a["a"]}, "another shape": params(4),
        "another dtype": jax.tree.map(lambda x: x.astype(jnp.bfloat16), a), "NaN": jax.tree.map(with_nan, a),
        "a list": list(a.values()), "None": None, "a model": MODEL, "strings": {"a": "x", "b": "y"},
        "objects": {"a": object(), "b": object()},
    }.items():
        for function in ("lerp", "slerp"):
            yield Case(f"weights.{function}: {name}", "tree_",
                       lambda f=function, w=wrong: getattr(weights, f)(a, w, 0.5))
        yield Case(f"weights.distance: {name}", "tree_", lambda w=wrong: weights.distance(a, w))
        yield Case(f"weights.cosine: {name}", "tree_", lambda w=wrong: weights.cosine(a, w))
        yield Case(f"weights.mean: {name}", "trees", lambda w=wrong: weights.mean([a, w]))
        yield Case(f"weights.task_vector: {name}", "tuned|base", lambda w=wrong: weights.task_vector(a, w))
    for name, wrong in {
        "NaN": NAN, "negative": -0.1, "above 1": 1.5, "a string": "0.5", "complex": 0.5j, "None": None,
        "bool": True, "a vector": jnp.ones(2), "an unknown path": {"c": 0.5, "": 0.1}, "no rest": {"a": 0.5},
        "a broken pattern": {"(": 0.5, "": 0.1}, "a number as a pattern": {0: 0.5}, "a list": [0.5],
    }.items():
        yield Case(f"weights.lerp: t {name}", r"\bt\b", lambda w=wrong: weights.lerp(a, b, w))
    for name, wrong in {
        "negative": [1, -1], "all 0": [0, 0], "NaN": [1, NAN], "one": [1], "a string": "ab", "complex": [1, 1j],
        "masked": np.ma.masked_array([1, 2], [0, 1]), "a number": 1.0,
    }.items():
        yield Case(f"weights.mean: weights {name}", "weights", lambda w=wrong: weights.mean([a, b], w))
    yield Case("weights.mean: none", "at least one", lambda: weights.mean([]))
    yield Case("weights.mean: a tree in the place of trees", "trees", lambda: weights.mean(a))
    yield Case("weights.mean: a model in the place of trees", "trees", lambda: weights.mean(MODEL))
    yield Case("weights.fisher_mean: negative", "fishers",
               lambda: weights.fisher_mean([a], [jax.tree.map(jnp.negative, a)]))
    yield Case("weights.fisher_mean: too few", "fishers", lambda: weights.fisher_mean([a, b], [a]))
    for wrong in (NAN, -0.5, 1.5, "0.9", None):
        yield Case(f"weights.ema: {wrong!r}", "decay", lambda w=wrong: weights.ema(a, b, w))
    for wrong in (NAN, -1, "3", None, 1j):
        yield Case(f"weights.swa: {wrong!r}", "count", lambda w=wrong: weights.swa(a, b, w))
    yield Case("weights.ema: other shapes", "tree", lambda: weights.ema(a, params(4), 0.5))
    for wrong in (0, -1, 1.5, NAN, "0.2", None):
        yield Case(f"weights.ties: density {wrong!r}", "density", lambda w=wrong: weights.ties([a, b], density=w))
    yield Case("weights.ties: none", "at least one", lambda: weights.ties([]))
    yield Case("weights.ties: a tree", "vectors", lambda: weights.ties(a))
    for wrong in (1, -0.1, NAN, "0.2", None):
        yield Case(f"weights.dare: rate {wrong!r}", "rate", lambda w=wrong: weights.dare(KEY, a, rate=w))
    yield Case("weights.dare: an integer key", "key", lambda: weights.dare(0, a, rate=0.5))
    yield Case("weights.add: scale NaN", "scale", lambda: weights.add(a, b, NAN))
    yield Case("weights.add: scale a string", "scale", lambda: weights.add(a, b, "1"))
    yield Case("weights.add: other shapes", "vector", lambda: weights.add(a, params(4)))
    yield Case("weights.greedy_soup: a tree", "trees", lambda: weights.greedy_soup(a, lambda m: 0.0))
    yield Case("weights.greedy_soup: none", "at least one", lambda: weights.greedy_soup([], lambda m: 0.0))
    yield Case("weights.greedy_soup: a Model evaluates", "function", lambda: weights.greedy_soup([a, b], MODEL))
    yield Case("weights.recalibrate: a module", "from_nnx", lambda: weights.recalibrate(MODULE, [BATCH]))
    stateful = MODEL.replace(state={"mean": jnp.zeros(3)})
    yield Case("weights.recalibrate: no batches", "batches", lambda: weights.recalibrate(stateful, []))
    yield Case("weights.recalibrate: arrays", "batch", lambda: weights.recalibrate(stateful, [X]))
    yield Case("weights.recalibrate: no image", "image", lambda: weights.recalibrate(stateful, [{"x": X}]))
    yield Case("weights.along: t above 1", r"\bt|ts", lambda: weights.along(lambda m: 0, a, b, [0, 2]))
    yield Case("weights.along: a Model evaluates", "evaluate", lambda: weights.along(MODEL, a, b, [0, 1]))
    yield Case("weights.along: ts a number", "ts", lambda: weights.along(lambda m: 0, a, b, 0.5))
    yield Case("weights.along: ts strings", "ts", lambda: weights.along(lambda m: 0, a, b, ["a"]))
    for name, wrong in {
        "NaN": [0, NAN, 1], "falling": [1, 0.5, 0], "not to 1": [0, 0.2, 0.5], "strings": "abc",
        "complex": [0, 1j, 1], "none": [],
    }.items():
        yield Case(f"weights.barrier: ts {name}", "ts", lambda w=wrong: weights.barrier(w, [1.0, 2.0, 1.0]))
    yield Case("weights.scalars: objects", r"\bt\b", lambda: weights.scalars(object(), a))


def of_training() -> Iterator[Case]:
    # labels and images of fit
    for name, wrong in {
        "negative": LABELS - 5, "beyond the classes": LABELS + 5, "floats": LABELS.astype(np.float32),
        "bool": LABELS > 0, "complex": LABELS + 1j, "strings": LABELS.astype(str), "objects": LABELS.astype(object),
        "masked": np.ma.masked_array(LABELS, LABELS > 1), "short": LABELS[:5], "a scalar": np.int32(1),
        "a column": LABELS[:, None], "other one-hot": np.eye(4, dtype=np.float32)[LABELS],
        "NaN": with_nan(np.eye(3, dtype=np.float32)[LABELS]),
    }.items():
        yield Case(f"train.fit: labels {name}", "label", lambda w=wrong: fit(data={"image": X, "label": w}))
        if name not in ("short",):
            yield Case(f"train.make_validation: labels {name}", "label",
                       lambda w=wrong: train.make_validation({"image": X, "label": w})(MODEL))
    for name, wrong in {
        "NaN": with_nan(X), "strings": X.astype(str), "objects": X.astype(object),
        "masked": np.ma.masked_array(X, X > 2), "none": X[:0], "a scalar": np.float32(1), "None": None,
    }.items():
        yield Case(f"train.fit: images {name}", "image", lambda w=wrong: fit(data={"image": w, "label": LABELS}))
    yield Case("train.fit: NaN images in validation", "image",
               lambda: train.make_validation({"image": with_nan(X), "label": LABELS})(MODEL))
    for name, wrong in {
        "negative": -np.ones(8), "NaN": np.full(8, NAN), "all 0": np.zeros(8), "a column": np.ones((8, 1)),
        "strings": np.array(["1"] * 8), "complex": np.ones(8) * 1j,
    }.items():
        yield Case(f"train.fit: weight {name}", "weight", lambda w=wrong: fit(data={**BATCH, "weight": w}))
    for name, wrong in {
        "0": 0, "negative": -1, "a fraction": 1.5, "NaN": NAN, "a string": "2", "None": None, "bool": True,
    }.items():
        yield Case(f"train.fit: epochs {name}", "epochs", lambda w=wrong: fit(epochs=w))
        yield Case(f"train.fit: batch_size {name}", "batch_size", lambda w=wrong: fit(batch_size=w))
        yield Case(f"train.make_validation: batch_size {name}", "batch_size",
                   lambda w=wrong: train.make_validation(BATCH, batch_size=w)(MODEL))
        yield Case(f"train.make_train_step: accumulate {name}", "accumulate",
                   lambda w=wrong: train.make_train_step(train.supervised(), TX, accumulate=w))
    yield Case("train.fit: batch_size above n", "batch_size", lambda: fit(batch_size=9))
    for name, wrong in {
        "negative": -1, "a float": 0.5, "NaN": NAN, "a string": "0", "None": None, "a key": KEY,
    }.items():
        yield Case(f"train.fit: seed {name}", "seed", lambda w=wrong: fit(seed=w))
    yield Case("train.fit: best_by without validate", "best_by", lambda: fit(best_by="validation_loss"))
    yield Case("train.fit: best_by unknown", "best_by",
               lambda: fit(best_by="accuracy", validate=train.make_validation(BATCH)))
    yield Case("train.fit: validate is a Model", "validate", lambda: fit(validate=MODEL))
    yield Case("train.fit: validate is data", "validate", lambda: fit(validate=BATCH))
    yield Case("train.fit: validate returns a number", "validate", lambda: fit(validate=lambda m: 3.0))
    yield Case("train.fit: validate returns None", "validate", lambda: fit(validate=lambda m: None))
    yield Case("train.fit: stop is a number", "stop", lambda: fit(stop=3))
    yield Case("train.fit: on_epoch is a string", "on_epoch", lambda: fit(on_epoch="print"))
    yield Case("train.fit: save_seconds NaN", "save_seconds", lambda: fit(save_seconds=NAN))
    yield Case("train.fit: save_seconds negative", "save_seconds", lambda: fit(save_seconds=-1))
    yield Case("train.fit: a Model as the state", "init_state", lambda: fit(state=MODEL))
    yield Case("train.fit: a module as the state", "init_state", lambda: fit(state=MODULE))
    yield Case("train.fit: a step as the epoch", "epoch",
               lambda: fit(epoch=train.make_train_step(train.supervised(), TX)))
    yield Case("train.fit: an objective as the epoch", "epoch", lambda: fit(epoch=train.supervised()))
    yield Case("train.fit: a Model as the epoch", "epoch", lambda: fit(epoch=MODEL))
    yield Case("train.fit: a tuple as data", "data", lambda: fit(data=(X, LABELS)))
    yield Case("train.fit: an array as data", "data", lambda: fit(data=X))
    yield Case("train.fit: no data", "data", lambda: fit(data={}))
    yield Case("train.fit: no label", "label", lambda: fit(data={"image": X}))
    yield Case("train.fit: no image", "image", lambda: fit(data={"x": X, "label": LABELS}))
    yield Case("train.fit: other names", "image", lambda: fit(data={"images": X, "labels": LABELS}))
    yield Case("train.fit: NaN teacher", "teacher", lambda: fit(data={**BATCH, "teacher": with_nan(LOGITS)}))
    yield Case("train.fit: complex teacher", "teacher", lambda: fit(data={**BATCH, "teacher": LOGITS + 1j}))
    yield Case("train.fit: masked teacher", "teacher", lambda: fit(data={**BATCH, "teacher": MASKED}))
    # one step
    objectives = {
        "supervised": train.supervised(), "distill": train.distill(), "distill_each": train.distill_each(),
        "encoder_decoder": train.encoder_decoder(alpha=0.5),
    }
    teacher = {"distill": LOGITS, "distill_each": {"logits": (LOGITS, LOGITS)}, "encoder_decoder": LOGITS}
    for name, objective in objectives.items():
        full = BATCH | ({"teacher": teacher[name]} if name in teacher else {})
        for missing in full:
            part = {n: v for n, v in full.items() if n != missing}
            yield Case(f"train.{name}: no {missing}", missing, lambda o=objective, p=part: step(o, p))
        yield Case(f"train.{name}: an array as the batch", "batch", lambda o=objective: step(o, X))
        if name in teacher:
            other = jax.tree.map(lambda x: x[:, :2], teacher[name])
            yield Case(f"train.{name}: other classes", "class|shape|teacher",
                       lambda o=objective, f=full, t=other: step(o, {**f, "teacher": t}))
            short = jax.tree.map(lambda x: x[:5], teacher[name])
            yield Case(f"train.{name}: a short teacher", "class|shape|teacher",
                       lambda o=objective, f=full, t=short: step(o, {**f, "teacher": t}))
        yield Case(f"train.{name}: short labels", "label",
                   lambda o=objective, f=full: step(o, {**f, "label": LABELS[:5]}))
        yield Case(f"train.{name}: weights of another length", "weight",
                   lambda o=objective, f=full: step(o, {**f, "weight": jnp.ones(5)}))
    for name, wrong in {
        "negative": -0.1, "above 1": 1.5, "NaN": NAN, "a string": "0.1", "complex": 0.5j, "None": None,
    }.items():
        yield Case(f"train.distill: alpha {name}", "alpha", lambda w=wrong: train.distill(alpha=w))
        yield Case(f"train.supervised: smoothing {name}", "label_smoothing",
                   lambda w=wrong: train.supervised(label_smoothing=w))
        yield Case(f"train.mean_teacher: decay {name}", "decay", lambda w=wrong: train.mean_teacher(decay=w))
    for name, wrong in {
        "0": 0.0, "negative": -1.0, "NaN": NAN, "infinite": INF, "a string": "4", "complex": 1j,
    }.items():
        yield Case(f"train.distill: temperature {name}", "temperature", lambda w=wrong: train.distill(temperature=w))
        yield Case(f"train.mutual: temperature {name}", "temperature", lambda w=wrong: train.mutual(temperature=w))
        yield Case(f"train.self_distillation: temperature {name}", "temperature",
                   lambda w=wrong: train.self_distillation(temperature=w))
        yield Case(f"train.max_norm: {name}", "limit", lambda w=wrong: train.max_norm(w))
    for name, wrong in {"negative": -1.0, "NaN": NAN, "a string": "1", "None": None, "infinite": INF}.items():
        yield Case(f"train.mutual: weight {name}", "weight", lambda w=wrong: train.mutual(weight=w))
        yield Case(f"train.mean_teacher: weight {name}", "weight", lambda w=wrong: train.mean_teacher(weight=w))
        yield Case(f"train.encoder_decoder: inputs_weight {name}", "inputs_weight",
                   lambda w=wrong: train.encoder_decoder(inputs_weight=w))
        yield Case(f"train.distill_features: hard_weight {name}", "hard_weight",
            lambda w=wrong: train.distill_features(features.project(losses.hint), pairs=[("a", "a")], hard_weight=w))
        yield Case(f"train.distill_each: weights {name}", "weights",
                   lambda w=wrong: train.distill_each(weights=[w, 1.0]))
    for name, call in {
        "distill": lambda w: train.distill(soft=w), "distill_each": lambda w: train.distill_each(soft=w),
        "mutual": lambda w: train.mutual(soft=w), "self_distillation": lambda w: train.self_distillation(soft=w),
        "encoder_decoder": lambda w: train.encoder_decoder(soft=w),
    }.items():
        yield Case(f"train.{name}: soft is a Model", "soft", lambda c=call: c(MODEL))
        yield Case(f"train.{name}: soft is a name", "soft", lambda c=call: c("kl"))
    yield Case("train.distill_each: weights a number", "weights", lambda: train.distill_each(weights=1.0))
    yield Case("train.distill_each: three weights for two", "weights",
               lambda: step(train.distill_each(weights=[1, 1, 1]), {**BATCH, "teacher": {"logits": (LOGITS, LOGITS)}}))
    yield Case("train.distill_each: one teacher", "tuple",
               lambda: step(train.distill_each(), {**BATCH, "teacher": LOGITS}))
    yield Case("train.mutual: one student", "side_by_side", lambda: step(train.mutual(), BATCH))
    yield Case("train.self_distillation: one exit", "exit", lambda: step(train.self_distillation(), BATCH))
    yield Case("train.mean_teacher: a plain model", "attach_mean_teacher", lambda: step(train.mean_teacher(), BATCH))
    yield Case("train.mean_teacher: no such input", "other_view",
               lambda: step(train.mean_teacher(teacher_input="other_view"), BATCH, train.attach_mean_teacher(MODEL)))
    yield Case("train.attach_mean_teacher: a module", "from_nnx", lambda: train.attach_mean_teacher(MODULE))
    yield Case("train.detach_mean_teacher: a plain model", "attach_mean_teacher",
               lambda: train.detach_mean_teacher(MODEL))
    yield Case("train.detach_mean_teacher: a module", "from_nnx", lambda: train.detach_mean_teacher(MODULE))
    yield Case("train.detach_learned: a plain model", "attach_learned", lambda: train.detach_learned(MODEL))
    hint = features.project(losses.hint)
    yield Case("train.distill_features: a loss", "Learned",
               lambda: train.distill_features(losses.hint, pairs=[("a", "b")]))
    yield Case("train.distill_features: no pairs", "pair", lambda: train.distill_features(hint, pairs=[]))
    yield Case("train.distill_features: a name", "pair", lambda: train.distill_features(hint, pairs=["stages.0"]))
    yield Case("train.distill_features: pairs a string", "pair", lambda: train.distill_features(hint, pairs="ab"))
    yield Case("train.distill_features: β negative", "weight|β",
               lambda: train.distill_features([(-1.0, hint)], pairs=[("a", "b")]))
    yield Case("train.distill_features: a plain model", "attach_learned",
               lambda: step(train.distill_features(hint, pairs=[("a", "b")]), BATCH))
    yield Case("train.attach_learned: no shapes", "no value named",
        lambda: train.attach_learned(KEY, MODEL, hint, pairs=[("a", "b")], student_shapes={}, teacher_shapes={}))
    yield Case("train.attach_learned: an integer key", "key",
        lambda: train.attach_learned(0, MODEL, hint, pairs=[("a", "b")], student_shapes={"a": X},
            teacher_shapes={"b": X}))
    # step, epoch, stages
    yield Case("train.init_state: a string key", "key", lambda: state(key="0"))
    yield Case("train.init_state: an integer key", "key", lambda: state(key=0))
    yield Case("train.init_state: several keys", "key", lambda: state(key=jax.random.split(KEY)))
    yield Case("train.init_state: no optimizer", "tx", lambda: state(tx=0.1))
    yield Case("train.init_state: an optimizer's function", "tx", lambda: state(tx=optax.adam))
    yield Case("train.make_train_step: a Model", "loss_fn", lambda: train.make_train_step(MODEL, TX))
    yield Case("train.make_train_step: a loss", "loss_fn", lambda: train.make_train_step(losses.kl, TX))
    yield Case("train.make_train_step: a builder", "loss_fn", lambda: train.make_train_step(train.supervised, TX))
    yield Case("train.make_train_step: a rate", "tx", lambda: train.make_train_step(train.supervised(), 0.1))
    yield Case("train.make_train_step: accumulate 3 of 8", "accumulate",
               lambda: train.make_train_step(train.supervised(), TX, accumulate=3)(state(), BATCH))
    yield Case("train.make_train_step: a Model as the state", "init_state",
               lambda: train.make_train_step(train.supervised(), TX)(MODEL, BATCH))
    yield Case("train.make_epoch: an objective", "step", lambda: train.make_epoch(train.supervised()))
    yield Case("train.make_epoch: a Model", "step", lambda: train.make_epoch(MODEL))
    yield Case("train.make_epoch: transform a Model", "transform",
               lambda: train.make_epoch(train.make_train_step(train.supervised(), TX), transform=MODEL))
    yield Case("an epoch: no steps", "order", lambda: epoch()(state(), BATCH, np.zeros((0, 4), np.int32)))
    yield Case("an epoch: a vector", "order", lambda: epoch()(state(), BATCH, np.arange(8)))
    yield Case("an epoch: floats", "order", lambda: epoch()(state(), BATCH, np.zeros((2, 4))))
    yield Case("an epoch: rows beyond the data", "order", lambda: epoch()(state(), BATCH, np.full((2, 4), 99)))
    yield Case("an epoch: negative rows", "order", lambda: epoch()(state(), BATCH, np.full((2, 4), -1)))
    for name, arguments in {
        "seed -1": (-1, 0, 8, 4), "seed 0.5": (0.5, 0, 8, 4), "epoch -1": (0, -1, 8, 4), "batch 0": (0, 0, 8, 0),
        "batch 9": (0, 0, 8, 9), "batch 1.5": (0, 0, 8, 1.5), "examples 0": (0, 0, 0, 1),
        "examples 8.5": (0, 0, 8.5, 2),
    }.items():
        yield Case(f"train.epoch_order: {name}", "seed|epoch|batch_size|examples",
                   lambda a=arguments: train.epoch_order(*a))
    for wrong in (0, -1, 99, 1.5, "2"):
        yield Case(f"train.data_mesh: {wrong!r}", "devices", lambda w=wrong: train.data_mesh(w))
    for wrong in (0, -1, 1.5, "2"):
        yield Case(f"train.use_cpu_devices: {wrong!r}", "count", lambda w=wrong: train.use_cpu_devices(w))
    yield Case("train.sharded: no mesh", "mesh", lambda: train.sharded(None))
    yield Case("train.freeze: unknown part", "frozen|part", lambda: train.freeze(TX, "middle").init({"encoder": X}))
    yield Case("train.freeze: no optimizer", "tx", lambda: train.freeze(0.1, "encoder"))
    yield Case("train.mean_squares: other shapes", "shape",
               lambda: train.mean_squares(jnp.ones((2, 3)), jnp.ones((2, 4))))
    yield Case("train.converged: tolerance 1", "tolerance",
               lambda: train.converged({"validation_loss": [1.0]}, tolerance=1.0, patience=1))
    yield Case("train.converged: patience 0", "patience",
               lambda: train.converged({"validation_loss": [1.0]}, tolerance=0.1, patience=0))
    yield Case("train.converged: no validation", "validation_loss",
               lambda: train.converged({"loss": [1.0]}, tolerance=0.1, patience=1))
    yield Case("train.encoder_decoder: no x̂", "inputs_weight",
               lambda: step(train.encoder_decoder(inputs_weight=1.0), {**BATCH, "teacher": LOGITS}))
    yield Case("train.weighted_mean: other length", "weight",
               lambda: train.weighted_mean(jnp.ones(8), {"weight": jnp.ones(5)}))
    yield Case("train.make_measure: a Model", "loss_fn", lambda: train.make_measure(MODEL, BATCH))
    yield Case("train.make_measure: no images", "image",
               lambda: train.make_measure(train.supervised(), {"label": LABELS}))
    yield Case("train.make_validation: no labels", "label", lambda: train.make_validation({"image": X}))
    yield Case("train.make_validation: empty", "example",
               lambda: train.make_validation({"image": X[:0], "label": LABELS[:0]})(MODEL))
    yield Case("train.make_validation: a tuple", "dict", lambda: train.make_validation((X, LABELS)))
    yield Case("a validation: a module", "from_nnx", lambda: train.make_validation(BATCH)(MODULE))
    stages = {
        "encoder": MODEL, "decoder": models.from_function(lambda p, x: x @ p, jnp.ones((3, 3))),
        "loss_fn": train.encoder_decoder(), "data": {"image": X, "teacher": LOGITS},
        "validation": {"image": X, "teacher": LOGITS}, "tx": lambda steps: TX, "epochs": 1, "batch_size": 4,
        "seed": 0, "tolerance": 0.1, "patience": 1,
    }

    def staged(**changes: Any) -> Any:
        given = stages | changes
        return train.train_stages(
            KEY,
            given.pop("encoder"),
            given.pop("decoder"),
            given.pop("loss_fn"),
            given.pop("data"),
            given.pop("validation"),
            **given,
        )

    for name, wrong in {"epochs": 0, "batch_size": 0, "seed": -1, "tolerance": 1.0, "patience": 0}.items():
        yield Case(f"train.train_stages: {name} {wrong}", name, lambda n=name, w=wrong: staged(**{n: w}))
    yield Case("train.train_stages: an optimizer", "tx", lambda: staged(tx=TX))
    yield Case("train.train_stages: a module", "from_nnx", lambda: staged(encoder=MODULE))
    yield Case("train.train_stages: NaN teacher", "not finite",
               lambda: staged(data={"image": X, "teacher": with_nan(LOGITS)}))
    yield Case("train.train_stages: no teacher in validation", "teacher", lambda: staged(validation={"image": X}))
    yield Case("train.train_stages: unknown part", "stages|frozen", lambda: staged(stages={"a": "middle"}))
    # interpolation
    for name, wrong in {
        "negative": -0.1, "above 1": 1.5, "NaN": NAN, "a string": "0.5", "None": None, "complex": 0.5j,
    }.items():
        yield Case(f"interpolation.pull: {name}", "rate",
                   lambda w=wrong: interpolation.pull(None, train.make_train_step(train.supervised(), TX), w))
        yield Case(f"interpolation.through: {name}", "rate",
                   lambda w=wrong: interpolation.through(train.supervised(), w))
        yield Case(f"interpolation.join: {name}", "rate", lambda w=wrong: interpolation.join(MODEL, MODEL, w))
    yield Case("interpolation.join: other shapes", "teacher", lambda: interpolation.join(MODEL, model(4), 0.5))
    yield Case("interpolation.join: a module", "from_nnx", lambda: interpolation.join(MODEL, MODULE, 0.5))
    yield Case("interpolation.join: a schedule", "schedule",
               lambda: interpolation.join(MODEL, MODEL, optax.constant_schedule(0.5)))
    yield Case("interpolation.join: unknown path", "rate|'c'",
               lambda: interpolation.join(MODEL, MODEL, {"c": 0.5, "": 0.1}))
    yield Case("interpolation.mix: a plain model", "join", lambda: interpolation.mix(MODEL, 0.5))
    yield Case("interpolation.mix: λ NaN", "t|rate",
               lambda: interpolation.mix(interpolation.join(MODEL, MODEL, 0.5), NAN))
    yield Case("interpolation.through: a plain model", "join",
               lambda: step(interpolation.through(train.supervised(), 0.5), BATCH))
    yield Case("interpolation.through: a Model", "loss_fn", lambda: interpolation.through(MODEL, 0.5))
    yield Case("interpolation.pull: an objective as a step", "student_step",
               lambda: interpolation.pull(None, train.supervised(), 0.5))
    yield Case("interpolation.split_tx: a number", "student", lambda: interpolation.split_tx(0.1))
    yield Case("interpolation.student_axes: a plain state", "join", lambda: interpolation.student_axes(state()))

    # sweeps
    two = sweeps.repeat(MODEL, 2)
    states = sweeps.init_states(two, TX, jax.random.split(jax.random.key(0), 2))
    students = sweeps.Students(states, {})
    sweep = sweeps.make_epoch(lambda: train.make_train_step(train.supervised(), TX))
    options = {"epochs": 1, "batch_size": 2, "seeds": [0, 0]}
    yield Case("sweeps.grid: no values", "alpha", lambda: sweeps.grid(alpha=[]))
    yield Case("sweeps.stack: none", "trees", lambda: sweeps.stack([]))
    yield Case("sweeps.repeat: 0", "count", lambda: sweeps.repeat(MODEL, 0))
    yield Case("sweeps.repeat: a fraction", "count", lambda: sweeps.repeat(MODEL, 1.5))
    yield Case("sweeps.take: beyond", "index", lambda: sweeps.take(two, 2))
    yield Case("sweeps.take: negative", "index", lambda: sweeps.take(two, -1))
    yield Case("sweeps.as_one: a module", "from_nnx", lambda: sweeps.as_one(MODULE))
    yield Case("sweeps.init_states: one key", "keys", lambda: sweeps.init_states(two, TX, jax.random.key(0)))
    yield Case("sweeps.init_states: a number", "tx",
               lambda: sweeps.init_states(two, 0.1, jax.random.split(jax.random.key(0), 2)))
    yield Case("sweeps.each: a dict", "make_step", lambda: sweeps.each({}))
    yield Case("sweeps.make_epoch: a number", "make_step", lambda: sweeps.make_epoch(1))
    yield Case("sweeps.make_epoch: transform of one", "transform",
               lambda: sweeps.make_epoch(lambda: None, transform=lambda batch: batch))
    yield Case("sweeps.halve: a matrix", "scores", lambda: sweeps.halve(np.ones((2, 2))))
    yield Case("sweeps.halve: other groups", "groups", lambda: sweeps.halve([1.0, 2.0], groups=[0]))
    for name, argument, wrong in (
        ("a TrainState", "students", {"students": states}), ("one seed", "seeds", {"seeds": 0}),
        ("a negative seed", "seed", {"seeds": [0, -1]}), ("values of three", "values",
         {"students": sweeps.Students(states, {"alpha": np.ones(3)})}), ("no epochs", "epochs", {"epochs": 0}),
        ("a chunk of none", "chunk", {"chunk": 0}), ("rungs without validation", "validate",
         {"rungs": (1,), "epochs": 2}), ("rungs beyond", "rungs", {"rungs": (1,)}),
    ):  # fmt: skip
        given = {"students": students, "epoch": sweep, "data": BATCH, **options, **wrong}
        yield Case(f"sweeps.fit: {name}", argument, functools.partial(sweeps.fit, **given))


def of_federated() -> Iterator[Case]:
    shards, labels = [np.arange(3), np.arange(3, 8)], np.arange(8) % 2
    order = {"steps": 1, "batch_size": 2, "seed": 0, "number": 0}
    divide = functools.partial(federated.dirichlet_shards, seed=0)
    yield Case("federated.dirichlet_shards: fractions", "labels", lambda: divide(labels / 2, 2, 0.1))
    yield Case("federated.dirichlet_shards: one-hot", "labels", lambda: divide(np.eye(8, dtype=int), 2, 0.1))
    yield Case("federated.dirichlet_shards: no clients", "clients", lambda: divide(labels, 0, 0.1))
    yield Case("federated.dirichlet_shards: too many clients", "labels", lambda: divide(labels, 9, 0.1))
    yield Case("federated.dirichlet_shards: concentration 0", "concentration", lambda: divide(labels, 2, 0))
    yield Case("federated.dirichlet_shards: too few each", "client", lambda: divide(labels, 4, 1e-3, least=2))
    for name, wrong in (("steps", 0), ("batch_size", 0), ("seed", -1), ("number", 0.5)):
        yield Case(f"federated.client_order: {name} {wrong}", name,
                   functools.partial(federated.client_order, shards, **{**order, name: wrong}))
    yield Case("federated.client_order: an empty shard", "client 1",
               lambda: federated.client_order([*shards[:1], np.array([], int)], **order))
    yield Case("federated.client_order: masks", "shards",
               lambda: federated.client_order([labels > 0], **order))
    yield Case("federated.make_local_training: a number", "tx",
               lambda: federated.make_local_training(lambda state, batch: None, 0.1))
    yield Case("federated.make_local_training: an objective", "step",
               lambda: federated.make_local_training(train.supervised(), TX))
    z = np.zeros((4, 3))
    for wrong in (np.nan, np.inf):
        yield Case(f"federated.average_predictions: {wrong}", "client 1 sent",
                   lambda w=wrong: federated.average_predictions([z, z + w]))
    yield Case("federated.average_predictions: other classes", "client 1",
               lambda: federated.average_predictions([z, z[:, :2]]))
    yield Case("federated.average_predictions: other examples", "client 1",
               lambda: federated.average_predictions([z, z[:3]]))
    yield Case("federated.average_predictions: class lists", "client 1",
               lambda: federated.average_predictions([z, z], class_names=["abc", "abd"]))
    yield Case("federated.average_predictions: of", "of",
               lambda: federated.average_predictions([z, z], of="scores"))
    yield Case("federated.average_predictions: no clients", "client", lambda: federated.average_predictions([]))
    yield Case("federated.average_models: NaN", "client 1 sent",
               lambda: federated.average_models([MODEL, jax.tree.map(lambda x: x * jnp.nan, MODEL)], [1, 1]))
    yield Case("federated.average_models: other widths", "client 1",
               lambda: federated.average_models([MODEL, model(7)], [1, 1]))
    yield Case("federated.average_models: no examples", "client 0",
               lambda: federated.average_models([MODEL, MODEL], [0, 1]))
    yield Case("federated.average_models: sizes of three", "sizes",
               lambda: federated.average_models([MODEL, MODEL], [1, 1, 1]))
    yield Case("federated.finite_clients: invalid", "invalid", lambda: federated.finite_clients([z], invalid="drop"))
    yield Case("federated.finite_clients: names", "names", lambda: federated.finite_clients([z], names=["a", "b"]))
    for kind, wrong in ((teachers.kinds.Top(9), z), (teachers.kinds.Logits(), z + 1e5)):
        yield Case(f"federated.encode_predictions: {kind}", "client 1",
                   functools.partial(federated.encode_predictions, [z, wrong], kind))
    train_clients = federated.make_local_training(train.make_train_step(train.supervised(), TX), TX)
    stacked, rows = sweeps.repeat(MODEL, 2), np.zeros((1, 2, 2), int)
    for name, wrong in (("rows of one client", rows[:, :1]), ("no axis of clients", rows[:, 0]), ("floats", rows / 2)):
        yield Case(f"federated.make_local_training, the call: {name}", "order",
                   functools.partial(train_clients, stacked, BATCH, wrong, KEY))
    yield Case("federated.make_local_training, the call: rows beyond the examples", "order",
               lambda: train_clients(stacked, BATCH, rows + 10**6, KEY))
    yield Case("federated.make_local_training, the call: parameters", "models",
               lambda: train_clients(stacked.params, BATCH, rows, KEY))
    yield Case("federated.dense: other classes", "labels", lambda: federated.dense(z, 4))
    yield Case("federated.with_public: 0", "batch_size", lambda: federated.with_public(0))
    yield Case("federated.with_public: no consensus", "teacher",
               lambda: federated.with_public(2)({"image": X}, BATCH, KEY))
    yield Case("federated.co_distill: weight", "weight", lambda: federated.co_distill(weight=-1))
    yield Case("federated.co_distill: temperature", "temperature", lambda: federated.co_distill(temperature=0))
    yield Case("federated.co_distill: no public examples", "public", lambda: step(federated.co_distill(), BATCH))


def of_teachers() -> Iterator[Case]:
    yield Case("teachers.label: no image", "image", lambda: teachers.label(MODEL, {"x": X}))
    yield Case("teachers.label: an array", "batch", lambda: teachers.label(MODEL, X))
    yield Case("teachers.label: arguments exchanged", "Model", lambda: teachers.label(BATCH, MODEL))
    yield Case("teachers.label_each: none", "at least one", lambda: teachers.label_each([], BATCH))
    yield Case("teachers.label_each: one model", "teachers", lambda: teachers.label_each(MODEL, BATCH))
    yield Case("teachers.label_each: a module", "from_nnx", lambda: teachers.label_each([MODEL, MODULE], BATCH))
    yield Case("teachers.label_each: no image", "image", lambda: teachers.label_each([MODEL], {}))
    yield Case("teachers.ensemble: none", "at least one", lambda: teachers.ensemble())
    yield Case("teachers.ensemble: a list", "Model", lambda: teachers.ensemble([MODEL, MODEL]))
    other = models.from_function(lambda p, x: x @ p, jnp.ones((6, 4)))
    yield Case("teachers.ensemble: other classes", "class|shape", lambda: teachers.ensemble(MODEL, other)(X))


def of_units() -> Iterator[Case]:
    def prune(budget: Any = 0.5, **options: Any) -> Any:
        return units.prune(graph(), options.pop("scores", scores()), budget, **options)

    for name, wrong in {
        "0": 0, "negative": -0.5, "above 1": 1.5, "NaN": NAN, "infinite": INF, "a string": "0.5", "None": None,
        "complex": 0.5j, "an array": np.ones(2),
    }.items():
        yield Case(f"units.prune: budget {name}", "budget", lambda w=wrong: prune(w))
    yield Case("units.prune: budget NaN parameters", "budget", lambda: prune(NAN, of=units.costs.parameters))
    yield Case("units.prune: of a name", r"\bof\b", lambda: prune(of="parameters"))
    yield Case("units.prune: of a Model", r"\bof\b", lambda: prune(of=MODEL))
    yield Case("units.prune: a cost of NaN", r"\bof\b", lambda: prune(of=lambda graph, kept: NAN))
    yield Case("units.prune: across unknown", "across", lambda: prune(across="layer"))
    for wrong in (0, -1, 1.5, "2", NAN):
        yield Case(f"units.prune: multiple {wrong!r}", "multiple", lambda w=wrong: prune(multiple=w))
    for name, wrong in {
        "none": {}, "unknown group": {"c": np.ones(5)}, "another size": {"a": np.ones(4)},
        "NaN": {"a": np.full(5, NAN)}, "complex": {"a": np.ones(5) * 1j}, "strings": {"a": np.array(list("abcde"))},
        "an array": np.ones(5), "objects": {"a": np.ones(5, object)},
        "masked": {"a": np.ma.masked_array(np.ones(5), np.arange(5) > 2)}, "bool": {"a": np.ones(5, bool)},
        "None": None, "a model": MODEL,
    }.items():
        yield Case(f"units.prune: scores {name}", "scores", lambda w=wrong: prune(scores=w))
    for name, wrong in {
        "unknown group": {"c": [0]}, "none": {"a": []}, "beyond": {"a": [0, 7]}, "negative": {"a": [-1, 0]},
        "floats": {"a": [0.0, 1.0]}, "falling": {"a": [2, 1]}, "twice": {"a": [1, 1]},
        "a mask": {"a": np.ones(5, bool)}, "a number": {"a": 3}, "a list": [0, 1], "a string": {"a": "01"},
        "None": None, "not free": {"b": [0, 1]}, "beyond, first": {"a": [7]}, "a matrix": {"a": [[0, 1]]},
    }.items():
        for function in ("keep", "silence", "shrink"):
            yield Case(f"units.{function}: kept {name}", "kept",
                       lambda f=function, w=wrong: getattr(units, f)(graph(), MODEL, w))
        yield Case(f"units.costs.parameters: kept {name}", "kept", lambda w=wrong: units.costs.parameters(graph(), w))
    yield Case("units.costs.share: unknown group", "kept", lambda: units.costs.share(graph(), {"c": [0]}))
    for name, wrong in {
        "another shape": model(4), "another structure": {"x": jnp.ones(3)}, "None": None, "a number": 3.0,
        "a module": MODULE,
    }.items():
        yield Case(f"units.keep: {name}", "tree|trace|from_nnx", lambda w=wrong: units.keep(graph(), w, {"a": [0]}))
        yield Case(f"units.scores.l1: {name}", "model|trace|from_nnx", lambda w=wrong: units.scores.l1(graph(), w))
    yield Case("units.verify: no inputs", "inputs", lambda: units.verify(graph(), MODEL, {"a": [0]}))
    yield Case("units.verify: words", "inputs", lambda: units.verify(graph(), MODEL, {"a": [0]}, "words"))
    yield Case("units.verify: NaN", "not finite", lambda: units.verify(graph(), MODEL, {"a": [0]}, with_nan(X)))
    yield Case("units.keep: a model in the place of the graph", "graph", lambda: units.keep(MODEL, MODEL, {"a": [0]}))
    yield Case("units.prune: a model in the place of the graph", "graph", lambda: units.prune(MODEL, scores(), 0.5))
    yield Case("units.scores.l1: arguments exchanged", "graph", lambda: units.scores.l1(MODEL, graph()))
    yield Case("units.scores.l1: normalise unknown", "normali[sz]e",
               lambda: units.scores.l1(graph(), MODEL, **{normalise_name(): "sum"}))
    yield Case("units.scores.l1: NaN weights", "not finite",
               lambda: units.scores.l1(graph(), jax.tree.map(with_nan, MODEL)))
    yield Case("units.scores.taylor: other gradients", "gradients",
               lambda: units.scores.taylor(graph(), MODEL, {"a": X}))
    yield Case("units.scores.taylor: NaN gradients", "not finite",
               lambda: units.scores.taylor(graph(), MODEL, jax.tree.map(with_nan, MODEL.params)))
    yield Case("units.scores.batch_norm_scale: none", "names", lambda: units.scores.batch_norm_scale(graph(), MODEL))
    yield Case("units.scores.mean_activation: another batch", "x",
               lambda: units.scores.mean_activation(graph(), MODEL, X[:3]))
    yield Case("units.scores.mean_activation: NaN", "not finite",
               lambda: units.scores.mean_activation(graph(), MODEL, with_nan(X)))
    yield Case("units.scores.random: an integer key", "key", lambda: units.scores.random(0, graph()))
    yield Case("units.scores.squared_gradients: a Model", "loss_fn",
               lambda: units.scores.squared_gradients(MODEL, MODEL, X))
    yield Case("units.scores.squared_gradients: none", "examples",
               lambda: units.scores.squared_gradients(lambda m, x: m(x).sum(), MODEL, X[:0]))
    yield Case("units.scores.squared_gradients: chunk 0", "chunk",
               lambda: units.scores.squared_gradients(lambda m, x: m(x).sum(), MODEL, X, chunk=0))
    yield Case("units.trace: a loaded model", "loaded", lambda: units.trace(loaded(), X))
    yield Case("units.trace: x is None", r"\bx\b", lambda: units.trace(MODEL, None))
    yield Case("units.trace: x and model exchanged", "Model", lambda: units.trace(X, MODEL))
    for wrong in (0, 6, -1, 1.5, "2", NAN):
        yield Case(f"units.merge: size {wrong!r}", "sizes", lambda w=wrong: units.merge(graph(), MODEL, {"a": w}))
    yield Case("units.merge: unknown group", "sizes", lambda: units.merge(graph(), MODEL, {"c": 2}))
    yield Case("units.merge: sizes a number", "sizes", lambda: units.merge(graph(), MODEL, 2))
    yield Case("units.merge: incoming unknown", "incoming",
               lambda: units.merge(graph(), MODEL, {"a": 2}, incoming="sum"))
    yield Case("units.merge: negative scores", "scores",
               lambda: units.merge(graph(), MODEL, {"a": 2}, scores={"a": -np.ones(5)}))
    yield Case("units.merge: likeness of another size", "likeness",
               lambda: units.merge(graph(), MODEL, {"a": 2}, likeness={"a": np.ones((4, 2))}))
    yield Case("units.merge: likeness NaN", "likeness",
               lambda: units.merge(graph(), MODEL, {"a": 2}, likeness={"a": np.full((5, 2), NAN)}))
    yield Case("units.merge: likeness of no group", "likeness",
               lambda: units.merge(graph(), MODEL, {"a": 2}, likeness={"c": np.ones((5, 2))}))
    wide = functools.cache(lambda: units.trace(model(8), jnp.zeros((8, 6))))
    yield Case("units.select: the student is larger", "student", lambda: units.select(graph(), wide()))
    yield Case("units.select: how unknown", "how", lambda: units.select(wide(), graph(), how="best"))
    yield Case("units.select: block beyond", "block", lambda: units.select(wide(), graph(), how="block", block=3))
    yield Case("units.select: block a fraction", "block",
               lambda: units.select(wide(), graph(), how="block", block=0.5))
    yield Case("units.select: layers a list", "layers", lambda: units.select(wide(), graph(), layers=["a"]))
    yield Case("units.select: no such layer", "layers", lambda: units.select(wide(), graph(), layers={"a": "c"}))
    yield Case("units.inject: a module", "from_nnx", lambda: units.inject(MODULE, MODEL))
    yield Case("units.inject: nothing fits", "fits",
               lambda: units.inject(MODEL, models.from_function(lambda p, x: x, {"z": X})))
    for name, wrong in {
        "unknown": {"c": [0]}, "short": {"a": [0, 1]}, "twice": {"a": [0, 0, 1, 2, 3]},
        "floats": {"a": [0.0, 1.0, 2.0, 3.0, 4.0]}, "a list": [0, 1, 2, 3, 4], "None": None, "a number": {"a": 1},
    }.items():
        yield Case(f"units.permute: {name}", "permutations|group", lambda w=wrong: units.permute(graph(), MODEL, w))
    yield Case("units.match_weights: other shapes", "reference|model",
               lambda: units.match_weights(graph(), MODEL, model(4)))
    yield Case("units.match_weights: NaN", "not finite",
               lambda: units.match_weights(graph(), MODEL, jax.tree.map(with_nan, MODEL)))
    yield Case("units.match_weights: unknown group", "group",
               lambda: units.match_weights(graph(), MODEL, MODEL, groups=["c"]))
    yield Case("units.match_weights: groups a string", "group",
               lambda: units.match_weights(graph(), MODEL, MODEL, groups="xy"))
    for wrong in (-1, 0.5, "0"):
        yield Case(f"units.match_weights: seed {wrong!r}", "seed",
                   lambda w=wrong: units.match_weights(graph(), MODEL, MODEL, seed=w))
    yield Case("units.match_activations: another batch", r"\bx\b",
               lambda: units.match_activations(graph(), MODEL, MODEL, X[:3]))
    small, first = units.keep(graph(), MODEL, {"a": [0, 2]}), {"a": [0, 2]}
    for name, wrong in {"unknown": {"c": [0]}, "twice": {"a": [0, 0]}, "falling": {"a": [2, 0]}, "a list": [0]}.items():
        yield Case(f"units.put_back: kept {name}", "kept|group|units",
                   lambda w=wrong: units.put_back(graph(), small, w, MODEL))
    yield Case("units.put_back: other widths", "small: ", lambda: units.put_back(graph(), MODEL, first, MODEL))
    yield Case("units.put_back: parameters", "small", lambda: units.put_back(graph(), small.params, first, MODEL))
    yield Case("units.put_back: a narrower model", "model", lambda: units.put_back(graph(), small, first, small))
    yield Case("units.match_widths: other widths", "small: ",
               lambda: units.match_widths(graph(), model(3), first, MODEL))
    yield Case("units.match_widths: no model to match", "reference",
               lambda: units.match_widths(graph(), small, first, MODEL.params))
    yield Case("units.match_widths: NaN", "not finite",
               lambda: units.match_widths(graph(), jax.tree.map(with_nan, small), first, MODEL))
    average = functools.partial(units.average_widths, graph(), MODEL)
    yield Case("units.average_widths: no clients", "client", lambda: average([], [], []))
    yield Case("units.average_widths: kept of one", "kept", lambda: average([small, small], [first], [1, 1]))
    yield Case("units.average_widths: one model", "clients", lambda: average(small, [first], [1]))
    yield Case("units.average_widths: other widths", "client 1: small: ",
               lambda: average([small, MODEL], [first] * 2, [1, 1]))
    yield Case("units.average_widths: sizes of one", "sizes|weights", lambda: average([small, small], [first] * 2, [1]))
    yield Case("units.average_widths: size 0 of all", "sizes|weights", lambda: average([small], [first], [0]))
    yield Case("units.average_widths: NaN", "finite", lambda: average([jax.tree.map(with_nan, small)], [first], [1]))
    yield Case("units.bring: the student is wider", "wider", lambda: units.bring(wide(), model(8), graph(), MODEL))
    yield Case("units.put_back: other units", "small: ",
               lambda: units.put_back(graph(), MODEL, {"a": [0]}, MODEL))
    yield Case("units.average_widths: kept of none", "kept",
               lambda: units.average_widths(graph(), MODEL, [MODEL], [], [1]))
    yield Case("units.average_widths: sizes of two", "weights",
               lambda: units.average_widths(graph(), MODEL, [MODEL], [{}], [1, 1]))
    yield Case("units.match_widths: a module", "from_nnx",
               lambda: units.match_widths(graph(), MODEL, {}, MODULE))
    yield Case("units.activations: a module", "from_nnx", lambda: units.activations(graph(), MODULE, X))


def normalise_name() -> str:
    import inspect

    return next(name for name in inspect.signature(units.scores.l1).parameters if name.startswith("normali"))


def of_compression() -> Iterator[Case]:
    # low rank
    for name, wrong in {
        "0": 0, "negative": -0.5, "above 1": 1.5, "NaN": NAN, "a string": "0.5", "None": None, "tiny": 1e-6,
        "complex": 1j,
    }.items():
        yield Case(f"low_rank.allocate: budget {name}", "budget",
                   lambda w=wrong: low_rank.allocate(MODEL, kernels(), w))
    yield Case("low_rank.allocate: of unknown", r"\bof\b",
               lambda: low_rank.allocate(MODEL, kernels(), 0.5, of="bytes"))
    yield Case("low_rank.allocate: no kernels", "kernels", lambda: low_rank.allocate(MODEL, {}, 0.5))
    yield Case("low_rank.allocate: other roots", "roots",
               lambda: low_rank.allocate(MODEL, kernels(), 0.9, roots={"a": np.eye(3)}))
    yield Case("low_rank.allocate: other kernels", "kernels",
               lambda: low_rank.allocate(models.from_function(net, {"c": X}), kernels(), 0.9))
    for name, wrong in {
        "0": 0, "negative": -1, "too large": 9, "a fraction": 1.5, "a string": "1", "NaN": NAN, "None": None,
        "bool": True,
    }.items():
        yield Case(f"low_rank.factorise: rank {name}", "rank",
                   lambda w=wrong: low_rank.factorise(MODEL, kernels(), {"a": w}))
        yield Case(f"linear_codes.reduced_rank: rank {name}", "rank",
                   lambda w=wrong: linear_codes.reduced_rank(np.eye(3), np.eye(3), w))
        yield Case(f"linear_codes.init_linear: rank {name}", "rank",
                   lambda w=wrong: linear_codes.init_linear(KEY, 4, w, 4))
    yield Case("low_rank.factorise: unknown path", "ranks", lambda: low_rank.factorise(MODEL, kernels(), {"c": 1}))
    yield Case("low_rank.factorise: a list", "ranks", lambda: low_rank.factorise(MODEL, kernels(), ["a"]))
    yield Case("low_rank.factorise: no roots of it", "roots",
               lambda: low_rank.factorise(MODEL, kernels(), {"a": 1}, roots={}))
    yield Case("low_rank.factorise: NaN", "a:",
               lambda: low_rank.factorise(jax.tree.map(with_nan, MODEL), kernels(), {"a": 1}))
    yield Case("low_rank.factorise: another model", "kernel",
               lambda: low_rank.factorise(model(4), kernels(), {"a": 1}))
    yield Case("low_rank.factorise: a module", "from_nnx", lambda: low_rank.factorise(MODULE, kernels(), {"a": 1}))
    yield Case("low_rank.layer_roots: batch 0", "batch", lambda: low_rank.layer_roots(MODEL, X, batch=0))
    yield Case("low_rank.layer_roots: no examples", r"\bx\b", lambda: low_rank.layer_roots(MODEL, X[:0]))
    yield Case("low_rank.layer_roots: NaN", "not finite", lambda: low_rank.layer_roots(MODEL, with_nan(X)))
    yield Case("low_rank.kernels: a loaded model", "loaded", lambda: low_rank.kernels(loaded(), X))
    # linear codes
    matrices = {
        "complex": np.eye(3) * 1j, "a vector": np.ones(3), "none": np.ones((0, 3)), "NaN": np.full((3, 3), NAN),
        "strings": [["a"]], "objects": np.eye(3).astype(object), "unequal rows": [[1.0], [1.0, 2.0]],
        "masked": np.ma.masked_array(np.eye(3), np.eye(3) > 0), "None": None,
    }
    for name, wrong in matrices.items():
        yield Case(f"linear_codes.root: {name}", r"\bx\b", lambda w=wrong: linear_codes.root(w))
        yield Case(f"linear_codes.optimum: kernel {name}", "kernel",
                   lambda w=wrong: linear_codes.optimum(w, np.eye(3)))
        yield Case(f"linear_codes.coordinates: {name}", r"\by\b",
                   lambda w=wrong: linear_codes.coordinates(np.eye(3), w))
    yield Case("linear_codes.optimum: other root", "root", lambda: linear_codes.optimum(np.eye(3), np.eye(4)))
    yield Case("linear_codes.error: other factors", "factors",
               lambda: linear_codes.error(np.eye(3), np.eye(3), linear_codes.Linear(np.ones((3, 1)), np.ones((1, 4)))))
    yield Case("linear_codes.error: inner sizes", "factors|encoder",
               lambda: linear_codes.error(np.eye(3), np.eye(3), linear_codes.Linear(np.ones((3, 2)), np.ones((1, 3)))))
    yield Case("linear_codes.error: a tuple", "factors", lambda: linear_codes.error(np.eye(3), np.eye(3), 1.0))
    yield Case("linear_codes.coordinates: constant y", "the same",
               lambda: linear_codes.coordinates(np.eye(3), np.ones((3, 2))))
    yield Case("linear_codes.init_linear: inputs 0", "inputs|rank", lambda: linear_codes.init_linear(KEY, 0, 1, 4))
    yield Case("linear_codes.init_linear: inputs 2.5", "inputs", lambda: linear_codes.init_linear(KEY, 2.5, 1, 4))
    yield Case("linear_codes.init_linear: an integer key", "key", lambda: linear_codes.init_linear(0, 4, 1, 4))
    yield Case("linear_codes.affine: another width", "x must be",
               lambda: linear_codes.affine({"kernel": jnp.eye(3)}, jnp.ones((2, 4))))
    yield Case("linear_codes.fold: a plain model", "init_linear|compose",
               lambda: linear_codes.fold(MODEL, linear_codes.coordinates(X, LOGITS)))
    # codes
    for wrong in (0, 17, -1, 1.5, "8", NAN, None, True):
        yield Case(f"codes.quantise: bits {wrong!r}", "bits", lambda w=wrong: codes.quantise(X, bits=w))
        yield Case(f"codes.pack: bits {wrong!r}", "bits", lambda w=wrong: codes.pack(np.ones((2, 3)), bits=w))
        yield Case(f"codes.unpack: bits {wrong!r}", "bits",
                   lambda w=wrong: codes.unpack(np.zeros((2, 3), np.uint8), (3,), bits=w))
    for name, wrong in WRONG_NUMBERS.items():
        yield Case(f"codes.quantise: {name}", "code", lambda w=wrong: codes.quantise(w, bits=8))
        yield Case(f"codes.pack: {name}", "code", lambda w=wrong: codes.pack(w, bits=8))
    yield Case("codes.pack: not quantised", "quantise", lambda: codes.pack(X, bits=8))
    yield Case("codes.pack: NaN", "code", lambda: codes.pack(np.full((2, 3), NAN), bits=8))
    yield Case("codes.pack: a scalar", "code", lambda: codes.pack(1.0, bits=1))
    yield Case("codes.unpack: other bytes", "bytes", lambda: codes.unpack(np.zeros((2, 5), np.uint8), (3,), bits=8))
    yield Case("codes.unpack: floats", "sent", lambda: codes.unpack(np.zeros((2, 3)), (3,), bits=8))
    yield Case("codes.unpack: a list", "sent", lambda: codes.unpack([[0, 0, 0]], (3,), bits=8))
    yield Case("codes.unpack: shape negative", "shape",
               lambda: codes.unpack(np.zeros((2, 3), np.uint8), (-3,), bits=8))
    yield Case("codes.unpack: shape of floats", "shape",
               lambda: codes.unpack(np.zeros((2, 3), np.uint8), (1.5, 2), bits=8))
    mlp = functools.cache(lambda: models.build("mlp:4", (2, 3, 1), 3, KEY))
    pictures = X.reshape(8, 2, 3, 1)
    for wrong in (0, 99, 1.5, "2", NAN):
        yield Case(f"codes.make_decoder: width {wrong!r}", "width",
                   lambda w=wrong: codes.make_decoder(mlp(), "dense.0", pictures, w))
    yield Case("codes.make_decoder: no such value", "no value is named",
               lambda: codes.make_decoder(mlp(), "dense.7", pictures, 2))
    yield Case("codes.make_decoder: a pattern", "name", lambda: codes.make_decoder(mlp(), "dense.*", pictures, 2))
    for wrong in (0.0, -1.0, NAN, "2"):
        yield Case(f"codes.make_decoder: spread {wrong!r}", "spread",
                   lambda w=wrong: codes.make_decoder(mlp(), "dense.0", pictures, 2, spread=w))
    yield Case("codes.make_decoder: NaN images", "finite",
               lambda: codes.make_decoder(mlp(), "dense.0", with_nan(pictures), 2))
    yield Case("codes.with_inputs: a module", "from_nnx", lambda: codes.with_inputs(MODEL, MODULE))
    yield Case("codes.outputs_only: one output", "pair", lambda: codes.outputs_only(MODEL)(X))
    yield Case("codes.outputs_only: a module", "from_nnx", lambda: codes.outputs_only(MODULE))
    # sparsity
    for wrong in (1.0, -0.1, NAN, "0.5", None, 0.5j):
        yield Case(f"sparsity.polynomial: final {wrong!r}", "final",
                   lambda w=wrong: sparsity.polynomial(w, begin=0, end=10))
        yield Case(f"sparsity.polynomial: initial {wrong!r}", "initial",
                   lambda w=wrong: sparsity.polynomial(0.5, begin=0, end=10, initial=w))
    for name, options in {
        "begin -1": {"begin": -1}, "begin 0.5": {"begin": 0.5}, "begin a string": {"begin": "0"},
        "end 0": {"end": 0}, "end 2.5": {"end": 2.5}, "end NaN": {"end": NAN}, "every 0": {"every": 0},
        "every 1.5": {"every": 1.5}, "power 0": {"power": 0}, "power NaN": {"power": NAN},
        "power a string": {"power": "3"},
    }.items():
        yield Case(f"sparsity.polynomial: {name}", name.split()[0],
                   lambda o=options: sparsity.polynomial(0.5, **{"begin": 0, "end": 10} | o))
    plan = sparsity.polynomial(0.5, begin=0, end=10)
    for name, options in {
        "score": {"score": "l1"}, "ranking": {"ranking": "layer"}, "decay 1": {"decay": 1.0},
        "decay NaN": {"decay": NAN}, "decay a string": {"decay": "0.9"}, "exclude": {"exclude": "a"},
        "pattern": {"pattern": (4, 2)}, "pattern one": {"pattern": 2}, "pattern three": {"pattern": (1, 2, 3)},
        "pattern of floats": {"pattern": (1.5, 3.0)}, "min_ndim": {"min_ndim": 1.5}, "axis": {"axis": 0.5},
    }.items():
        yield Case(f"sparsity.sparsify: {name}", name.split()[0], lambda o=options: sparsity.sparsify(TX, plan, **o))
    yield Case("sparsity.sparsify: pattern of another sparsity", "pattern",
               lambda: sparsity.sparsify(TX, plan, pattern=(1, 4)))
    yield Case("sparsity.sparsify: no schedule", "schedule", lambda: sparsity.sparsify(TX, 0.5))
    yield Case("sparsity.sparsify: no optimizer", "tx", lambda: sparsity.sparsify(0.1, plan))
    yield Case("sparsity.sparsify: exclude unknown", "exclude",
               lambda: sparsity.sparsify(TX, plan, exclude=("c",)).init(params()))
    yield Case("sparsity.sparsify: exclude broken", "exclude",
               lambda: sparsity.sparsify(TX, plan, exclude=("(",)).init(params()))
    yield Case("sparsity.sparsify: nothing left", "no leaf",
               lambda: sparsity.sparsify(TX, plan, min_ndim=5).init(params()))
    yield Case("sparsity.sparsify: pattern does not divide", "multiple",
               lambda: sparsity.sparsify(TX, plan, pattern=(2, 4)).init(params()))
    yield Case("sparsity.sparsify: no params", "params",
               lambda: sparsity.sparsify(TX, plan).update(params(), sparsity.sparsify(TX, plan).init(params())))
    yield Case("sparsity.frozen: other masks", "masks",
               lambda: sparsity.frozen(TX, {"a": jnp.ones(3, bool)}).init(params()))
    yield Case("sparsity.mask_of: a plain state", "sparsify", lambda: sparsity.mask_of(TX.init(params())))
    yield Case("sparsity.apply_masks: floats", "masks", lambda: sparsity.apply_masks(params(), params()))
    yield Case("sparsity.apply_masks: another structure", "masks",
               lambda: sparsity.apply_masks(params(), {"a": jnp.ones((6, 5), bool)}))
    yield Case("sparsity.apply_masks: another shape", "masks",
               lambda: sparsity.apply_masks(params(), jax.tree.map(lambda x: x > 0, params(4))))
    yield Case("sparsity.sparsity: strings", "tree", lambda: sparsity.sparsity({"a": "x"}))
    yield Case("sparsity.sparsity_at: a number", "schedule", lambda: sparsity.sparsity_at(0.5, 3))
    yield Case("sparsity.sparsity_at: a fraction of a step", "step", lambda: sparsity.sparsity_at(plan, 0.5))
    # search

    def smallest(**changes: Any) -> Any:
        given: dict[str, Any] = {
            "attempt": lambda edit: (1 / edit.share, 100 * edit.share),
            "original": (1.0, 100.0),
            "operators": ["prune"],
            "shares": [0.5, 0.25],
            "budget": 2.0,
        } | changes
        return search.find_smallest(given.pop("attempt"), given.pop("original"), **given)

    for name, wrong in {
        "budget NaN": {"budget": NAN}, "budget negative": {"budget": -1.0}, "budget a string": {"budget": "1"},
        "budget None": {"budget": None}, "shares none": {"shares": []}, "shares rising": {"shares": [0.25, 0.5]},
        "shares above 1": {"shares": [2.0]}, "shares NaN": {"shares": [NAN]}, "shares a number": {"shares": 0.5},
        "shares strings": {"shares": ["0.5"]}, "operators none": {"operators": []},
        "operators a string": {"operators": "prune"}, "operators twice": {"operators": ["prune", "prune"]},
        "iterative a string": {"iterative": "prune"},
        "baselines unknown": {"baselines": ["scratch"]}, "baselines all": {"baselines": ["prune"]},
        "refinements -1": {"refinements": -1}, "refinements 1.5": {"refinements": 1.5},
        "refinements a string": {"refinements": "1"}, "attempt a Model": {"attempt": MODEL},
        "attempt None": {"attempt": None}, "attempt returns a number": {"attempt": lambda edit: 1.0},
        "attempt returns None": {"attempt": lambda edit: None},
        "attempt returns NaN size": {"attempt": lambda edit: (1.0, NAN)}, "original a number": {"original": 1.0},
        "original NaN": {"original": (NAN, 1.0)},
    }.items():
        words = name.split()[0] if name != "baselines all" else "no baseline"
        yield Case(f"search.find_smallest: {name}", words, lambda w=wrong: smallest(**w))
    yield Case("search.smallest_within: budget NaN", "budget", lambda: search.smallest_within({}, (1.0, 1.0), NAN))


def of_features() -> Iterator[Case]:
    yield Case("features.capture: none", "select", lambda: features.capture(MODEL, []))
    yield Case("features.capture: a number", "select", lambda: features.capture(MODEL, 3))
    yield Case("features.capture: unknown", "select", lambda: features.capture(MODEL, "stages.9")(X))
    yield Case("features.capture: a loaded model", "loaded|no value is named",
               lambda: features.capture(loaded(), "a")(X))
    yield Case("features.layer_shapes: a module", "from_nnx", lambda: features.layer_shapes(MODULE, X))
    yield Case("features.resume: a module", "from_nnx", lambda: features.resume(MODULE, "a", X[0]))
    yield Case("features.resume: unknown", "name", lambda: features.resume(MODEL, "a", X[0])(X))
    yield Case("features.project: a name", "loss", lambda: features.project("hint"))
    yield Case("features.project: a Model", "loss", lambda: features.project(MODEL))
    yield Case("features.project: space unknown", "space", lambda: features.project(losses.hint, space="crop"))
    yield Case("features.relation: a Model", "loss", lambda: features.relation(MODEL))
    for wrong in (0, -1, 1.5, "2"):
        yield Case(f"features.match_layers: count {wrong!r}", "count",
                   lambda w=wrong: features.match_layers({"a": X}, {"a": X}, count=w))
        yield Case(f"features.review_kd: width {wrong!r}", "width", lambda w=wrong: features.review_kd(width=w))
        yield Case(f"features.simkd: factor {wrong!r}", "factor", lambda w=wrong: features.simkd(factor=w))
        yield Case(f"features.semckd: width {wrong!r}", "width", lambda w=wrong: features.semckd(width=w))
    yield Case("features.match_layers: no layers", "layer", lambda: features.match_layers({}, {}))
    yield Case("features.match_layers: lists", "name", lambda: features.match_layers([X], [X]))
    for wrong in (-0.1, 1.5, NAN, "0.5"):
        yield Case(f"features.mgd: masked {wrong!r}", "masked", lambda w=wrong: features.mgd(masked=w))
    yield Case("features.mgd: mask unknown", "mask", lambda: features.mgd(mask="rows"))
    yield Case("features.fsp: pool unknown", "pool", lambda: features.fsp(pool="sum"))
    for wrong in (0, -1.0, NAN, "1"):
        yield Case(f"features.semckd: temperature {wrong!r}", "temperature",
                   lambda w=wrong: features.semckd(temperature=w))
        yield Case(f"features.vid: least_variance {wrong!r}", "least_variance",
                   lambda w=wrong: features.vid(least_variance=w))
        yield Case(f"features.curriculum_temperature: lowest {wrong!r}", "lowest",
                   lambda w=wrong: features.curriculum_temperature(lowest=w))


def of_losses() -> Iterator[Case]:
    given = {
        "student_logits": LOGITS, "teacher_logits": LOGITS[::-1], "logits": LOGITS, "labels": LABELS,
        "counts": np.arange(1.0, 4), "prior": np.full(3, 1 / 3, np.float32), "student": X, "teacher": X[::-1],
        "variance": np.ones(6, np.float32), "student_kernel": np.ones((6, 3), np.float32),
        "teacher_kernel": np.ones((6, 3), np.float32), "margin": -np.ones(6, np.float32),
    }
    for name in losses.__all__:
        loss = getattr(losses, name)
        if not inspect.isfunction(loss):
            continue
        parameters = inspect.signature(loss).parameters
        needed = [n for n, p in parameters.items() if p.default is p.empty]
        if not set(needed) <= set(given) or "where" not in parameters:
            continue
        arrays = [
            n for n in needed if n in ("student_logits", "teacher_logits", "logits", "student", "teacher")
        ]
        if set(arrays) & {"student", "teacher"}:
            try:
                jax.eval_shape(lambda f=loss, n=needed: f(**{name: given[name] for name in n}))
            except ValueError:  # it needs maps, or several layers: other tests have these
                continue
        good = {n: given[n] for n in needed}
        for argument in arrays:
            for kind, wrong in WRONG_NUMBERS.items():
                yield Case(f"losses.{name}: {argument} {kind}", argument,
                           lambda f=loss, g=good, a=argument, w=wrong: f(**g | {a: w}))
            if len(arrays) > 1 or "labels" in needed:
                yield Case(f"losses.{name}: short {argument}", "shape|size|label|example|row",
                       lambda f=loss, g=good, a=argument: f(**g | {a: g[a][:5]}))
        if "labels" in needed:
            for kind in ("bool", "complex", "masked", "short", "strings", "objects"):
                yield Case(f"losses.{name}: labels {kind}", "label",
                           lambda f=loss, g=good, w=WRONG_LABELS[kind]: f(**g | {"labels": w}))
        wheres = {
            "masked": np.ma.masked_array(np.ones_like(LOGITS, bool), LOGITS > 1),
            "floats": np.ones(8, np.float32), "strings": np.array(["a"] * 8), "another length": np.ones(5, bool),
            "a higher rank": np.ones((2, 8, 1, 1), bool), "complex": np.ones(8) * 1j,
        }
        for kind, wrong in wheres.items():
            yield Case(f"losses.{name}: where {kind}", "where", lambda f=loss, g=good, w=wrong: f(**g, where=w))
        for option, parameter in parameters.items():
            if isinstance(parameter.default, float) or option in ("temperature", "beta", "alpha"):
                wrongs: dict[str, Any] = {"NaN": NAN, "negative": -1.0, "a string": "1", "complex": 1j, "None": None}
                if option == "tau":
                    del wrongs["negative"]  # it turns the adjustment round
                for kind, wrong in wrongs.items():
                    yield Case(f"losses.{name}: {option} {kind}", option,
                               lambda f=loss, g=good, o=option, w=wrong: f(**g, **{o: w}))
            elif type(parameter.default) is int and option != "axis":
                for wrong in (-1, 1.5, "1", NAN):
                    yield Case(f"losses.{name}: {option} {wrong!r}", option,
                               lambda f=loss, g=good, o=option, w=wrong: f(**g, **{o: w}))
            elif isinstance(parameter.default, str):
                yield Case(f"losses.{name}: {option} unknown", option,
                           lambda f=loss, g=good, o=option: f(**g, **{o: "no"}))


def of_stores() -> Iterator[Case]:
    ids = np.arange(8)

    def write(
        ids: Any = ids, logits: Any = lambda rows: LOGITS[rows], path: Any = None, **options: Any
    ) -> Any:
        options = {"fingerprint": {"teacher": "t"}} | options
        return teachers.write_labels(fresh() if path is None else path, ids, logits, **options)

    wrong_ids = {
        "floats": ids + 0.5, "whole floats": ids * 1.0, "NaN": ids * NAN, "complex": ids + 1j, "bool": ids > 3,
        "strings": ids.astype(str), "objects": ids.astype(object), "masked": np.ma.masked_array(ids, ids > 3),
        "beyond int64": ids.astype(np.uint64) + np.uint64(2**63), "huge": [2**70], "none": [], "twice": [1, 1],
        "a matrix": ids.reshape(2, 4), "a number": 3, "None": None,
    }
    for name, wrong in wrong_ids.items():
        yield Case(f"teachers.write_labels: ids {name}", r"\bids\b", lambda w=wrong: write(w))
        yield Case(f"teachers.import_labels: ids {name}", r"\bids\b|logits",
                   lambda w=wrong: teachers.import_labels(fresh(), w, LOGITS, source="s", data="d"))
        if name not in ("none", "twice", "a matrix", "a number"):
            yield Case(f"store[ids]: {name}", r"\bids\b", lambda w=wrong: store()[w])
    yield Case("store[ids]: unknown", "no soft label", lambda: store()[[99]])
    for name, wrong in WRONG_NUMBERS.items():
        yield Case(f"teachers.write_labels: logits {name}", "logits", lambda w=wrong: write(logits=lambda rows: w))
        yield Case(f"teachers.import_labels: logits {name}", "logits",
                   lambda w=wrong: teachers.import_labels(fresh(), ids, w, source="s", data="d"))
    wrong_logits = {
        "NaN": with_nan(LOGITS), "infinite": np.full((8, 3), INF), "all −inf": np.full((8, 3), -INF),
        "short": LOGITS[:5], "a vector": LOGITS[:, 0], "no classes": LOGITS[:, :0], "None": None,
    }
    for name, wrong in wrong_logits.items():
        yield Case(f"teachers.write_labels: logits {name}", "logits", lambda w=wrong: write(logits=lambda rows: w))
    yield Case("teachers.write_labels: an array", "outputs", lambda: write(logits=LOGITS))
    yield Case("teachers.write_labels: a Model", "outputs", lambda: write(logits=MODEL))
    yield Case("teachers.write_labels: dtype unknown", "dtype", lambda: write(dtype="int8"))
    yield Case("teachers.write_labels: dtype a type", "dtype", lambda: write(dtype=np.float32))
    for wrong in (0, -1, 1.5, "8", NAN, None):
        yield Case(f"teachers.write_labels: shard_rows {wrong!r}", "shard_rows", lambda w=wrong: write(shard_rows=w))
    for name, wrong in {
        "a string": "t", "None": None, "of numbers": {"teacher": 3}, "of arrays": {"teacher": X},
    }.items():
        yield Case(f"teachers.write_labels: fingerprint {name}", "fingerprint", lambda w=wrong: write(fingerprint=w))
    yield Case("teachers.write_labels: progress a number", "progress", lambda: write(progress=3))
    for wrong in ("top", 3, None, teachers.kinds.Top):
        yield Case(f"teachers.write_labels: kind {wrong!r}", "kind", lambda w=wrong: write(kind=w))
    for wrong in (4, "two", [0, 1], teachers.Views):
        yield Case(f"teachers.write_labels: views {wrong!r}", "views", lambda w=wrong: write(views=w))
    yield Case("store[ids, views]: unknown", "no view 3", lambda: store_of_views()[[1], 3])
    yield Case("store[ids, views]: a float", "views", lambda: store_of_views()[[1], 0.5])
    yield Case("teachers.open_labels: other views", "views_seed",
               lambda: teachers.open_labels(store_of_views().path, expect={"augmentation": "a"},
                                            views=teachers.Views(VIEWS.augment, 2, seed=1)))
    yield Case("teachers.open_labels: another augmentation", "augmentation is a, expected b",
               lambda: teachers.open_labels(store_of_views().path, expect={"augmentation": "b"}, views=VIEWS))
    yield Case("teachers.open_labels: no augmentation", "expect must have an entry 'augmentation'",
               lambda: teachers.open_labels(store_of_views().path, views=VIEWS))
    yield Case("teachers.write_labels: no augmentation", "fingerprint must have an entry 'augmentation'",
               lambda: write(views=VIEWS))
    yield Case("teachers.write_labels: less than the store says", "teacher is t, expected None",
               lambda: write(path=store().path, fingerprint={}))
    for wrong in (0, -1, 1.5, "8", NAN, None):
        yield Case(f"kinds.Top: k {wrong!r}", r"\bk\b", lambda w=wrong: teachers.kinds.Top(w))
        yield Case(f"kinds.Sampled: draws {wrong!r}", "draws", lambda w=wrong: teachers.kinds.Sampled(w))
        yield Case(f"teachers.Views: count {wrong!r}", "count", lambda w=wrong: teachers.Views(VIEWS.augment, w))
    for wrong in (0.0, -1.0, NAN, "4", None, [1.0, 2.0]):
        yield Case(f"kinds.Top: temperature {wrong!r}", "temperature",
                   lambda w=wrong: teachers.kinds.Top(2, temperature=w))
        yield Case(f"kinds.Sampled: temperature {wrong!r}", "temperature",
                   lambda w=wrong: teachers.kinds.Sampled(2, temperature=w))
    for name, wrong in WRONG_NUMBERS.items():
        yield Case(f"kinds.Hidden: kernel {name}", "kernel", lambda w=wrong: teachers.kinds.Hidden(w))
        yield Case(f"kinds.Hidden: bias {name}", "bias", lambda w=wrong: teachers.kinds.Hidden(LOGITS, w))
        yield Case(f"kinds.Features: {name}", "outputs", lambda w=wrong: teachers.kinds.Features().encode(w))
    yield Case("Views.apply: no keys", "keys", lambda: VIEWS.apply(ids, LOGITS))
    for name, wrong in {"too few": ids[:3], "floats": ids + 0.5, "strings": ids.astype(str)}.items():
        yield Case(f"Views.fingerprint: ids {name}", r"\bids\b", lambda w=wrong: VIEWS.fingerprint(w, LOGITS))
    yield Case("Views.transform: no fields", "'row'", lambda: VIEWS.transform(LOGITS, {"image": X}, jax.random.key(0)))
    yield Case("teachers.write_labels: too large for float16", "float16",
               lambda: write(logits=lambda rows: LOGITS[rows] * 1e9, dtype="float16"))
    yield Case("teachers.write_labels: other labels", "made from something else",
               lambda: write(path=store().path, fingerprint={"teacher": "u"}))
    yield Case("teachers.open_labels: absent", "no soft-label store", lambda: teachers.open_labels(fresh()))
    yield Case("teachers.open_labels: another teacher", "made from something else",
               lambda: teachers.open_labels(store().path, expect={"teacher": "u"}))
    yield Case("teachers.open_labels: expect a string", "expect",
               lambda: teachers.open_labels(store().path, expect="t"))
    yield Case("teachers.fingerprint: an object", "tree|object", lambda: teachers.fingerprint(object()))
    yield Case("teachers.fingerprint: a masked array", "masked", lambda: teachers.fingerprint(MASKED))
    yield Case("teachers.fingerprint: objects", "object", lambda: teachers.fingerprint(LOGITS.astype(object)))


@functools.cache
def store() -> teachers.LabelStore:
    path = folder() / "store"
    return teachers.write_labels(path, np.arange(8), lambda rows: LOGITS[rows], fingerprint={"teacher": "t"})


VIEWS = teachers.Views(lambda key, image: image, count=2)


@functools.cache
def store_of_views() -> teachers.LabelStore:
    path, ids, made_of = folder() / "views", np.arange(8), {"augmentation": "a"}
    return teachers.write_labels(path, ids, lambda rows, keys: LOGITS[rows], fingerprint=made_of, views=VIEWS)


# Wrong command lines: experiment, words of the message, the options after the config
COMMANDS = """
kd_mnist | config must be one of | no_such_config
kd_mnist | --seeds must be at least 1 | digits --seeds 0
kd_mnist | --seeds must be at least 1 | digits --seeds -3
kd_mnist | --alpha must lie in | digits --alpha 1.5
kd_mnist | --alpha must lie in | digits --alpha nan
kd_mnist | --temperature must be positive | digits --temperature 0
kd_mnist | --temperature must be positive | digits --temperature inf
kd_mnist | --epochs must be at least 1 | digits --epochs 0
kd_mnist | --batch-size must be at least 1 | digits --batch-size 0
kd_mnist | --batch-size must be at most | digits --batch-size 100000
kd_mnist | got 'mlp:0' | digits --teacher mlp:0
kd_mnist | got 'transformer' | digits --student transformer
kd_mnist | --members must be at least 1 | digits --members 0
kd_mnist | --dropout must lie in | digits --dropout 1
kd_mnist | --omit-classes must | digits --omit-classes 10
kd_mnist | --omit-classes must | digits --omit-classes -1
kd_mnist | validation must be | digits --validation 1000000
kd_mnist | --validation must be at least 1 | digits --validation 0
kd_mnist | no_such_data | digits --dataset no_such_data
kd_mnist | must be an existing folder | digits --dataset mnist --data-dir no/such/folder
kd_mnist | no file | digits --dataset absent.npz
kd_mnist | --save-seconds must not be negative | digits --save-seconds -1
kd_mnist | --jitter must not be negative | digits --jitter -1
kd_mnist | --devices must be at least 1 | digits --devices 0
kd_vgg | --seeds must be at least 1 | digits --seeds 0
kd_vgg | depth must be one of | digits --student vgg7
kd_vgg | --temperature must be positive | digits --temperature nan
kd_vgg | --sparsity must lie in | digits --sparsity 1
kd_vgg | --pattern must | digits --pattern 2-4
kd_vgg | --dense-leaves must | digits --dense-leaves (
kd_vgg | --train-examples must be at most | digits --train-examples 5000000
kd_methods | --methods must name | digits --methods no_such
kd_methods | --weight must | digits --weight at:3
kd_methods | --epochs must be at least 1 | digits --epochs -1
kd_methods | --examples must be at most | digits --examples 99999999
compress_mnist | --budget must not be negative | digits --budget -1
compress_mnist | --shares must | digits --shares 1.5
compress_mnist | --shares must | digits --shares nan
compress_mnist | --operators must | digits --operators crop
compress_mnist | --score must | digits --score size
compress_mnist | --multiple must be at least 1 | digits --multiple 0
inject_mnist | --student must | digits --student mlp:0
inject_mnist | --labels must | digits --labels 0
inject_mnist | --scores must | digits --scores size
inject_mnist | --learning-rates must be positive | digits --learning-rates 0
inject_mnist | --examples must | digits --examples 0
inject_mnist | --examples must | digits --examples -5
inject_mnist | --scales must | digits --scales nan
interpolate_mnist | --rate must lie in | digits --rate 1.5
interpolate_mnist | --points must be at least 2 | digits --points 1
interpolate_mnist | --wide must exceed | digits --wide 1
sweep_mnist | --temperatures must be positive | digits --temperatures 0
sweep_mnist | --alphas must lie in | digits --alphas 2
sweep_mnist | --rungs must rise | digits --rungs 20 10
barrier_mnist | --points must | digits --points 1
barrier_mnist | got 'nope' | digits --networks nope
barrier_mnist | --networks must | digits --networks
label_kinds | --top must be at most | digits --top 99
label_kinds | --draws must be at least 1 | digits --draws 0
kd_characters | --labelled must be below | smoke --labelled 100000
kd_characters | --curve must be at most | smoke --curve 10 100000
kd_characters | --temperatures must be positive | smoke --temperatures 1 0
kd_characters | --students must name | smoke --students mlp:8 mlp:8
kd_characters | --teacher-distortion must be at most | smoke --teacher-distortion 9
federated | --clients must be at least 1 | digits --clients 0
federated | --public must leave | digits --public 1000000
federated | --methods must be from | digits --methods FedSGD
linear_code | --ranks must be at least 1 | matrix --ranks 0
linear_code | --ranks must be at most | matrix --ranks 1000000
linear_code | --condition must be at least 1 | matrix --condition 0.5
linear_code | --tolerance must be below 1 | matrix --tolerance 1
factorise_network | --budget must be positive | digits --budget 0
factorise_network | --budget must be at most 1 | digits --budget 2
split_network | bits | digits --codes 8x17
split_network | --codes must | digits --codes 8-4
split_network | --encoder must|got 'mlp:0' | digits --encoder mlp:0
split_network | --feature must | digits --feature head
split_network | --patience must be at least 1 | digits --patience 0
kd_mnist | seeds | digits --seeds 1.5
kd_mnist | seeds | digits --seeds many
kd_mnist | no-such-option | digits --no-such-option 1
kd_vgg | score | digits --score size
"""


def of_commands() -> Iterator[Case]:
    for line in COMMANDS.strip().splitlines():
        name, words, options = line.split(" | ")
        yield Case(f"{name} {options}", words.replace("(", "\\("),
                   lambda n=name, o=options: command_line(n, o.split()))


def command_line(name: str, arguments: list[str]) -> Any:
    """Runs an experiment in this process: raises what it printed, if it ended with status 2 and one line."""
    if str(ROOT / "experiments") not in sys.path:
        sys.path.insert(0, str(ROOT / "experiments"))
    import importlib

    from harness import runs

    experiment = importlib.import_module(name)
    before, sys.argv = (
        sys.argv,
        [f"{name}.py", *arguments, *(["--out", str(fresh())] if "--out" not in arguments else [])],
    )
    errors, prints = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(prints):
            runs.run_main(experiment.main)
        status: Any = 0
    except SystemExit as exit_:
        status = exit_.code
    finally:
        sys.argv = before
    return outcome(status, errors.getvalue())


def outcome(status: Any, errors: str) -> "Outcome":
    """What a wrong command line ended with: our one line, or the few in which tyro says what it cannot read."""
    text = errors.strip()
    if status == 2 and text.startswith("error: "):
        return Outcome(text)
    read = status == 2 and "Traceback" not in text and len(text.splitlines()) < 12
    return Outcome(" ".join(text.split()), raw=not read)


def of_processes() -> Iterator[Case]:
    """The first wrong command line of each experiment, in a process of its own."""
    lines = [line.split(" | ") for line in COMMANDS.strip().splitlines()]
    for name, words, options in {line[0]: line for line in reversed(lines)}.values():
        yield Case(f"python {name}.py {options}", words, lambda n=name, o=options: process(n, o.split()))


def process(name: str, arguments: list[str]) -> "Outcome":
    """Runs an experiment as a process."""
    done = subprocess.run(
        [sys.executable, ROOT / "experiments" / f"{name}.py", *arguments, "--out", fresh()],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )
    return outcome(done.returncode, done.stderr)


class Outcome(NamedTuple):
    """How a command line ended."""

    text: str
    raw: bool = False


ROOMS: dict[str, Callable[[], Iterator[Case]]] = {
    "models": of_models, "metrics": of_metrics, "data": of_data, "sound": of_sound,
    "weights": of_weights, "train": of_training, "federated": of_federated, "teachers": of_teachers, "units": of_units,
    "compress": of_compression, "features": of_features, "losses": of_losses, "stores": of_stores,
    "commands": of_commands, "processes": of_processes,
}


def main() -> int:
    """Makes all calls, or those of some rooms, and prints the count of each outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", help=f"some of {', '.join(ROOMS)} (default: all)")
    parser.add_argument("--verbose", action="store_true", help="print the message of every call")
    given = parser.parse_args()
    if unknown := set(given.rooms) - set(ROOMS):
        parser.error(f"rooms must be from {', '.join(ROOMS)}, got {', '.join(sorted(unknown))}")
    total: Counter[str] = Counter()
    for room in given.rooms or ROOMS:
        counts: Counter[str] = Counter()
        for case in ROOMS[room]():
            outcome, message = judge(case)
            counts[outcome] += 1
            if given.verbose or outcome != "refused":
                print(f"{outcome:9} {case.name}: {message}", flush=True)
        total += counts
        print(f"{room}: {show(counts)}", flush=True)
    print(f"all: {show(total)}")
    return int(total["refused"] != sum(total.values()))


def show(counts: Counter[str]) -> str:
    outcomes = ("refused", "raw", "accepted")
    return f"{sum(counts.values())} tried, " + ", ".join(f"{counts[o]} {o}" for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())

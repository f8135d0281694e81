"""Malformed calls of models: conversion, networks, transformers, saving."""

import functools
import tempfile
from collections.abc import Iterator

import numpy as np
from faults.malformed_calls.material import (
    BATCH,
    KEY,
    LABELS,
    LINEN,
    MODEL,
    MODULE,
    NAN,
    NO_MODELS,
    Case,
    X,
    fresh,
    loaded,
    net,
    params,
    state,
)
from flax import linen, nnx

from distill_jax import features, metrics, models, teachers
from distill_jax.compress import low_rank, units

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
        yield Case(f"models.sentence_embeddings: {name}", words, lambda w=wrong: models.sentence_embeddings(w))
        yield Case(f"models.given_source: {name}", words, lambda w=wrong: models.given_source(w, text))
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
    yield from of_encoders(small(), sizes, text)
    yield Case("models.load_pretrained: absent", "no directory", lambda: models.load_pretrained(fresh()))
    yield Case("models.load_pretrained: empty", "config.json does not exist",
               lambda: models.load_pretrained(tempfile.mkdtemp()))
    yield Case("models.save_pretrained: shard_bytes 0", "shard_bytes",
               lambda: models.save_pretrained(fresh(), small(), shard_bytes=0))
    yield Case("models.save_pretrained: no folder", "does not exist",
               lambda: models.save_pretrained(fresh() / "x", small()))


def of_encoders(transformer: models.Model, sizes: dict[str, int], text: np.ndarray) -> Iterator[Case]:
    encoder = functools.cache(lambda: models.build_encoder(models.EncoderConfig(**sizes), KEY))
    for field, wrong in {"vocabulary": 0, "heads": 3, "types": 1.0, "max_length": "9", "norm_eps": NAN,
                         "masked_head": "yes"}.items():
        yield Case(f"models.EncoderConfig: {field} {wrong}", field,
                   lambda f=field, w=wrong: models.EncoderConfig(**sizes | {f: w}))
    yield Case("models.build_encoder: config a dict", "config", lambda: models.build_encoder(sizes, KEY))
    yield Case("models.build_encoder: key an integer", "key",
               lambda: models.build_encoder(models.EncoderConfig(**sizes), 0))
    yield Case("an encoder: types beyond the known", "types", lambda: encoder()({"tokens": text, "types": text + 1}))
    yield Case("models.sentence_embeddings: a transformer", "model", lambda: models.sentence_embeddings(transformer))
    yield Case("models.sentence_embeddings: normalise 2", "normalise",
               lambda: models.sentence_embeddings(encoder(), normalise=2))
    gru = {"source": 5, "target": 5, "width": 2, "hidden": 2}
    for field in gru:
        yield Case(f"models.GRUConfig: {field} 0", field, lambda f=field: models.GRUConfig(**gru | {f: 0}))
    yield Case("models.build_gru: config a dict", "config", lambda: models.build_gru(gru, KEY))
    yield Case("models.build_gru: key an integer", "key", lambda: models.build_gru(models.GRUConfig(**gru), 0))
    yield Case("a GRU: no source", "source", lambda: models.build_gru(models.GRUConfig(**gru), KEY)({"tokens": text}))
    yield Case("models.given_source: a transformer", "model", lambda: models.given_source(transformer, text))
    yield Case("models.load_gru: absent", "does not exist", lambda: models.load_gru(fresh()))

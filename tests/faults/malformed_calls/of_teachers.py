"""Malformed calls of teachers and their stores of labels."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from faults.malformed_calls.material import (
    BATCH,
    INF,
    LOGITS,
    MASKED,
    MODEL,
    MODULE,
    NAN,
    WRONG_NUMBERS,
    Case,
    X,
    folder,
    fresh,
    with_nan,
)

from distill_jax import models, teachers

# fmt: off

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

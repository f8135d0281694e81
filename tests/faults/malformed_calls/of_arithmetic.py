"""Malformed calls of metrics and of the arithmetic of weights."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from faults.malformed_calls.material import (
    BATCH,
    KEY,
    LABELS,
    LOGITS,
    MODEL,
    MODULE,
    NAN,
    WRONG_LABELS,
    WRONG_NUMBERS,
    Case,
    X,
    params,
    with_nan,
)

from distill_jax import metrics, weights

# fmt: off

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

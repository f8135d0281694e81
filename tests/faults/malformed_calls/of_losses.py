"""Malformed calls of losses and of feature methods."""

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from faults.malformed_calls.material import (
    LABELS,
    LOGITS,
    MODEL,
    MODULE,
    NAN,
    WRONG_LABELS,
    WRONG_NUMBERS,
    Case,
    X,
    loaded,
)

from distill_jax import features, losses

# fmt: off

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
    yield from of_chunks()


def of_chunks() -> Iterator[Case]:
    hidden, kernel, tokens = X[None], np.ones((6, 3), np.float32), losses.tokens

    def call(student: Any = hidden, teacher: Any = hidden, reduce: Any = None, **options: Any) -> Any:
        options = {"student_kernel": kernel, "teacher_kernel": kernel} | options
        return tokens.chunked(losses.kl, chunk=3, reduce=reduce)(student, teacher, **options)

    for wrong in (0, -1, 1.5, "1", NAN):
        yield Case(f"tokens.chunked: chunk {wrong!r}", "chunk", lambda w=wrong: tokens.chunked(losses.kl, chunk=w))
    for wrong in ("max", 1, True):
        yield Case(f"tokens.chunked: reduce {wrong!r}", "reduce",
                   lambda w=wrong: tokens.chunked(losses.kl, reduce=w))
    for kind, wrong in WRONG_NUMBERS.items():
        yield Case(f"tokens.chunked: student_hidden {kind}", "student_hidden", lambda w=wrong: call(w))
        yield Case(f"tokens.chunked: teacher_hidden {kind}", "teacher_hidden", lambda w=wrong: call(teacher=w))
        yield Case(f"tokens.chunked: student_kernel {kind}", "student_kernel",
                   lambda w=wrong: call(student_kernel=w))
        yield Case(f"tokens.uld: student_logits {kind}", "student_logits",
                   lambda w=wrong: tokens.uld(w, LOGITS))
    for name in ("student_softcap", "teacher_softcap", "temperature"):
        for wrong in (0.0, -1.0, NAN, "1", 1j, np.ones(3)):
            yield Case(f"tokens.chunked: {name} {wrong!r}", name, lambda n=name, w=wrong: call(**{n: w}))
    yield Case("tokens.chunked: a bias too short", "bias", lambda: call(student_kernel=(kernel, np.ones(2))))
    yield Case("tokens.chunked: a bias of bool", "bias", lambda: call(student_kernel=(kernel, np.ones(3, bool))))
    yield Case("tokens.chunked: kernels of two vocabularies", "shape", lambda: call(teacher_kernel=kernel[:, :2]))
    yield Case("tokens.chunked: short teacher", "row per token", lambda: call(teacher=hidden[:, :5]))
    yield Case("tokens.chunked: softcap without kernel", "teacher_softcap",
               lambda: call(teacher_kernel=None, teacher_softcap=3.0))
    yield Case("tokens.chunked: weights without reduce", "weights", lambda: call(weights=np.ones(8)))
    for wrong in (-np.ones(8), np.ones(5), "heavy", 1j * np.ones(8)):
        yield Case(f"tokens.chunked: weights {np.shape(wrong)}", "weights",
                   lambda w=wrong: call(reduce="sum", weights=w))
    for name, wrong in (("tokens", np.ones(5, bool)), ("tokens", np.ones(8)), ("where", np.ones((1, 3), bool)),
                        ("where", np.ones((1, 1, 3))), ("where", np.ones((1, 2, 3), bool))):
        yield Case(f"tokens.chunked: {name} {wrong.dtype} {wrong.shape}", name,
                   lambda n=name, w=wrong: call(**{n: w}))
    yield Case("tokens.uld: other texts", "same shape", lambda: tokens.uld(LOGITS, LOGITS[:5]))
    for wrong in ([2, 1], [-1], [1.5], [[1]], "12", [True]):
        yield Case(f"tokens.align_tokens: {wrong!r}", "student_ends", lambda w=wrong: tokens.align_tokens(w, [1]))

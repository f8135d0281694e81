"""Malformed calls of export: files, labels, facts, latencies, cards."""

from collections.abc import Iterator

import jax.numpy as jnp
from faults.malformed_calls.material import MODEL, NAN, NO_MODELS, Case, X, folder, fresh

from distill_jax import export, models

# fmt: off

def of_exports() -> Iterator[Case]:
    file = folder() / "exported.model"
    export.stablehlo(file, MODEL, X)
    for name, (wrong, words) in NO_MODELS.items():
        for call in (export.stablehlo, export.onnx):
            yield Case(f"export.{call.__name__}: {name}", words, lambda f=call, w=wrong: f(fresh(), w, X))
    for name, wrong in {"a scalar": 1.0, "nothing": {}, "None": None}.items():
        yield Case(f"export.stablehlo: x is {name}", "x must be a batch",
                   lambda w=wrong: export.stablehlo(fresh(), MODEL, w))
    cases = {"a string": "abc", "numbers": [0, 1, 2], "too few": ["a"], "a dict": {"a": 0}, "a number": 3}
    for name, wrong in cases.items():
        yield Case(f"export.stablehlo: labels {name}", "labels must be",
                   lambda w=wrong: export.stablehlo(fresh(), MODEL, X, labels=w))
    for name, wrong in {"a number": 3, "a list": ["a"], "NaN": {"a": NAN}, "an object": {"a": MODEL}}.items():
        for fact in ("preprocessing", "provenance"):
            yield Case(f"export.stablehlo: {fact} {name}", fact,
                       lambda f=fact, w=wrong: export.stablehlo(fresh(), MODEL, X, **{f: w}))
    yield Case("export.stablehlo: no directory", "does not exist",
               lambda: export.stablehlo(fresh() / "a" / "b", MODEL, X))
    yield Case("export.stablehlo: a directory", "is no saved model", lambda: export.stablehlo(folder(), MODEL, X))
    counting = models.Model(lambda p, s, x, *, key=None: (x, s + 1), {}, jnp.zeros(()))
    yield Case("export.stablehlo: evaluation counts", "changes the state",
               lambda: export.stablehlo(fresh(), counting, X))
    yield Case("export.describe: no file", "no saved model", lambda: export.describe(fresh()))
    yield Case("export.describe: a directory", "no saved model", lambda: export.describe(folder()))
    for name, wrong in {"0": 0, "a fraction": 1.5, "a string": "1", "True": True}.items():
        yield Case(f"export.latency: threads {name}", "threads", lambda w=wrong: export.latency(file, X, threads=w))
    for name, wrong in {"0": 0, "NaN": NAN, "a string": "1"}.items():
        yield Case(f"export.latency: seconds {name}", "seconds", lambda w=wrong: export.latency(file, X, seconds=w))
    cases = {"of another width": X[:, :3], "of another rank": X[0], "of another dtype": X > 0, "two": (X, X)}
    for name, wrong in cases.items():
        yield Case(f"export.latency: x {name}", "x must be", lambda w=wrong: export.latency(file, w))
    cases = {"a list": [1.0], "NaN": {"a": NAN}, "a string": {"a": "b"}, "an array": {"a": [1.0, 2.0]}}
    for name, wrong in cases.items():
        yield Case(f"export.card: figures {name}", "figures", lambda w=wrong: export.card(file, figures=w))
    cases = {"a number": 1.0, "a string": "1 ms", "numbers": [1.0], "of another file": [{"bytes": 1}]}
    for name, wrong in cases.items():
        yield Case(f"export.card: latencies {name}", "latencies", lambda w=wrong: export.card(file, latencies=w))

"""Malformed calls of units."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from faults.malformed_calls.material import (
    INF,
    MODEL,
    MODULE,
    NAN,
    Case,
    X,
    graph,
    loaded,
    model,
    scores,
    with_nan,
)

from distill_jax import models
from distill_jax.compress import units

# fmt: off

DEEP = models.from_function(
    lambda p, x: jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p["stack"])[0] @ p["b"],
    {"stack": jnp.ones((2, 6, 6)) / 6, "b": jnp.ones((6, 3)) / 6},
)


@functools.cache
def deep_graph() -> units.UnitGraph:
    return units.trace(DEEP, X)


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
    yield Case("units.input_features: words", "x", lambda: units.input_features(MODEL, "words"))
    yield Case("units.input_features: tokens", "x", lambda: units.input_features(MODEL, np.zeros((2, 3), int)))
    yield Case("units.input_features: no model", "model", lambda: units.input_features(None, X))
    yield Case("units.verify: no key", "key", lambda: units.verify(graph(), MODEL, {"a": [0]}, X, key=0))
    yield Case("units.verify: words", "inputs", lambda: units.verify(graph(), MODEL, {"a": [0]}, "words"))
    yield Case("units.verify: NaN", "not finite", lambda: units.verify(graph(), MODEL, {"a": [0]}, with_nan(X)))
    yield Case("units.table: a model", "graph", lambda: units.table(MODEL))
    for wrong in (None, 3, ("a",)):
        yield Case(f"units.register_rule: name {wrong!r}", "name", lambda w=wrong: units.register_rule(w, jnp.sin))
    yield Case("units.register_rule: a rule of the library", "name", lambda: units.register_rule("sin", jnp.sin))
    yield Case("units.register_rule: no function", "reference", lambda: units.register_rule("mine", "sin"))
    yield Case("units.register_rule: run a number", r"\brun\b", lambda: units.register_rule("mine", jnp.sin, run=3))
    yield Case("units.check_rule: no function", "function", lambda: units.check_rule("sin", X))
    yield Case("units.check_rule: a list", "operands", lambda: units.check_rule(jnp.sin, [1.0]))
    yield Case("units.check_rule: integers to be drawn", "operands",
               lambda: units.check_rule(jnp.sin, jax.ShapeDtypeStruct((3,), "int32")))
    yield Case("units.check_rule: programs 0", "programs", lambda: units.check_rule(jnp.sin, X, programs=0))
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
    for name, wrong in {"a string": "stack[0]", "None": None, "unknown": ["stack[7]"], "a number": 0}.items():
        yield Case(f"units.drop_blocks: {name}", "names", lambda w=wrong: units.drop_blocks(deep_graph(), DEEP, w))
    yield Case("units.drop_blocks: another tree", "tree",
               lambda: units.drop_blocks(deep_graph(), {"b": X}, ["stack[0]"]))
    yield Case("units.blocks: a model", "graph", lambda: units.blocks(DEEP))
    for name, wrong in {"0": 0, "above 1": 1.5, "NaN": NAN, "a string": "0.5", "too low": 0.01}.items():
        yield Case(f"units.prune_blocks: budget {name}", "budget",
                   lambda w=wrong: units.prune_blocks(deep_graph(), {"stack[0]": 1.0}, w))
    for name, wrong in {"a list": [1.0], "unknown": {"a": 1.0}, "NaN": {"stack[0]": NAN}}.items():
        yield Case(f"units.prune_blocks: influence {name}", "influence",
                   lambda w=wrong: units.prune_blocks(deep_graph(), w, 0.9))
    yield Case("units.prune_blocks: of unknown", r"\bof\b",
               lambda: units.prune_blocks(deep_graph(), {"stack[0]": 1.0}, 0.9, of="latency"))
    for name, wrong in {"none": [], "an array": X, "a number": 3, "words": ["words"]}.items():
        yield Case(f"units.block_influence: batches {name}", "batches",
                   lambda w=wrong: units.block_influence(deep_graph(), DEEP, w))
    yield Case("units.block_influence: NaN", "not finite",
               lambda: units.block_influence(deep_graph(), DEEP, [with_nan(X)]))
    for name, wrong in {"unknown": "angle", "a number": 3, "a Model": DEEP}.items():
        yield Case(f"units.block_influence: how {name}", "how",
                   lambda w=wrong: units.block_influence(deep_graph(), DEEP, [X], how=w))
    yield Case("units.block_influence: no model", "model", lambda: units.block_influence(deep_graph(), None, [X]))
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
    for name, wrong in {
        "most 2": {"most": 2.0}, "most NaN": {"most": NAN}, "most of unknown": {"most": {"c": 0.5}},
        "across unknown": {"across": "layer"}, "budget of unknown": {"budget": {"c": 0.5}},
        "budget of strings": {"budget": {"a": "0.5"}},
    }.items():
        yield Case(f"units.prune: {name}", name.split()[0],
                   lambda w=wrong: units.prune(graph(), {"a": np.arange(5.0)}, **{"budget": 0.5} | w))
    for wrong in (-1.0, NAN, "1"):
        yield Case(f"units.group_lasso: {wrong!r}", "strength", lambda w=wrong: units.group_lasso(graph(), w))
        yield Case(f"units.growing_decay: {wrong!r}", "growth",
                   lambda w=wrong: units.growing_decay(graph(), {"a": [0]}, w))
        yield Case(f"units.living: {wrong!r}", "above", lambda w=wrong: units.living(graph(), MODEL, above=w))
    yield Case("units.group_lasso: a group of none", "groups", lambda: units.group_lasso(graph(), 0.1, groups=["c"]))
    yield Case("units.growing_decay: an index", "kept", lambda: units.growing_decay(graph(), {"a": [9]}, 0.1))
    yield Case("units.budgets: 0", "budget", lambda: units.budgets(0.0, 2))
    yield Case("units.budgets: no round", "rounds", lambda: units.budgets(0.5, 0))
    yield Case("units.budgets: steps", "steps", lambda: units.budgets(0.5, 2, steps="slow"))
    yield Case("units.scores.average: none", "many", lambda: units.scores.average([]))
    yield Case("units.scores.average: an array", "many", lambda: units.scores.average([X]))
    for batches in ([], X, None):
        yield Case(f"units.compensate: batches {type(batches).__name__}", "batches",
                   lambda b=batches: units.compensate(graph(), MODEL, {"a": [0]}, b))
    for wrong in (-1.0, NAN, "0"):
        yield Case(f"units.compensate: damping {wrong!r}", "damping",
                   lambda w=wrong: units.compensate(graph(), MODEL, {"a": [0]}, [X], damping=w))
    yield Case("units.compensate: NaN", "not finite",
               lambda: units.compensate(graph(), MODEL, {"a": [0]}, [with_nan(X)]))
    yield Case("units.compensate: a module", "from_nnx", lambda: units.compensate(graph(), MODULE, {"a": [0]}, [X]))


def normalise_name() -> str:

    return next(name for name in inspect.signature(units.scores.l1).parameters if name.startswith("normali"))

"""Malformed calls of the other methods of compression."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from faults.malformed_calls.material import (
    KEY,
    LOGITS,
    MODEL,
    MODULE,
    NAN,
    TX,
    WRONG_NUMBERS,
    Case,
    X,
    fresh,
    kernels,
    loaded,
    model,
    net,
    params,
    with_nan,
)

from distill_jax import models
from distill_jax.compress import codes, linear_codes, low_rank, one_shot, quantisation, search, sparsity

# fmt: off

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
    # at once
    for method in (one_shot.wanda, one_shot.sparsegpt):
        name = f"one_shot.{method.__name__}"
        for options in (
            {"sparsity": 1.0}, {"sparsity": -0.5}, {"sparsity": NAN}, {"sparsity": "0.5"}, {"pattern": (4, 4)},
            {"pattern": (2, 4)}, {"pattern": 2}, {"pattern": (1.5, 3)}, {"exclude": ["c"]}, {"exclude": "a"},
            {"exclude": ["a", "b"]}, {},
        ):  # fmt: skip
            words = "pattern" if "pattern" in options else "exclude|no leaf" if "exclude" in options else "sparsity"
            given = {"sparsity": 0.5} | options if "exclude" in options else options
            yield Case(f"{name}: {options}", words, lambda m=method, o=given: m(MODEL, [X], **o))
        yield Case(f"{name}: both", "either", lambda m=method: m(MODEL, [X], sparsity=0.5, pattern=(1, 2)))
        for batches in ([], X, None, "x"):
            yield Case(f"{name}: batches {type(batches).__name__}", "batches",
                       lambda m=method, b=batches: m(MODEL, b, sparsity=0.5))
        yield Case(f"{name}: NaN", "not finite", lambda m=method: m(MODEL, [with_nan(X)], sparsity=0.5))
        yield Case(f"{name}: a module", "from_nnx", lambda m=method: m(MODULE, [X], sparsity=0.5))
        yield Case(f"{name}: no kernel", "multiplies as a matrix",
                   lambda m=method: m(models.from_function(lambda p, x: x + p, X), [X], sparsity=0.5))
    for wrong in (0.0, -1.0, NAN, "1"):
        yield Case(f"one_shot.sparsegpt: damping {wrong!r}", "damping",
                   lambda w=wrong: one_shot.sparsegpt(MODEL, [X], sparsity=0.5, damping=w))
    for wrong in (0, 2.5, "8"):
        yield Case(f"one_shot.sparsegpt: block {wrong!r}", "block",
                   lambda w=wrong: one_shot.sparsegpt(MODEL, [X], sparsity=0.5, block=w))
    yield Case("one_shot.sparsegpt: block 3", "block",
               lambda: one_shot.sparsegpt(MODEL, [X], pattern=(1, 2), block=3))
    # integers
    for method in (quantisation.quantise, quantisation.simulate):
        name = f"quantisation.{method.__name__}"
        for option, wrongs in {
            "bits": (3, 8.5, "8", None, NAN, {"a": 8}, {"c": 8, "": 4}), "group": (0, 2.5, 4, "2"),
            "scale": ("best", None), "percentile": (50, 101, NAN, "99", True), "exclude": (["c"], "a", ["a", "b"]),
        }.items():
            for wrong in wrongs:
                yield Case(f"{name}: {option} {wrong!r}", f"{option}|no leaf",
                           lambda m=method, o=option, w=wrong: m(MODEL, [X], **{o: w}))
        yield Case(f"{name}: groups and activations", "group",
                   lambda m=method: m(MODEL, [X], group=2, activations=True))
        yield Case(f"{name}: activations 8", "activations", lambda m=method: m(MODEL, [X], activations=8))
        for batches in ([], X, None, "x", [X, X[:, :3]], [X[:, :3]], [1.0], [X.astype(str)]):
            yield Case(f"{name}: batches {type(batches).__name__}", "batches",
                       lambda m=method, b=batches: m(MODEL, b, activations=True))
        yield Case(f"{name}: NaN", "not finite", lambda m=method: m(MODEL, [with_nan(X)], activations=True))
        yield Case(f"{name}: weights of NaN", "not finite",
                   lambda m=method: m(jax.tree.map(with_nan, MODEL), [X]))
        yield Case(f"{name}: a module", "from_nnx", lambda m=method: m(MODULE, [X]))
        yield Case(f"{name}: no kernel", "no kernel",
                   lambda m=method: m(models.from_function(lambda p, x: x + p, X), [X]))
        yield Case(f"{name}: a loaded model", "loaded", lambda m=method: m(loaded(), [X]))
    yield Case("quantisation.freeze: a plain model", "simulate", lambda: quantisation.freeze(MODEL))
    yield Case("quantisation.freeze: a module", "from_nnx", lambda: quantisation.freeze(MODULE))
    yield Case("quantisation.dequantise: a plain model", "quantise", lambda: quantisation.dequantise(MODEL))
    yield Case("quantisation.layers: a plain model", "quantise", lambda: quantisation.layers(MODEL))
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

    def best(**changes: Any) -> Any:
        given: dict[str, Any] = {
            "model": MODEL, "make": lambda m, settings: m, "candidates": [{"width": 0.5}], "x": X, "epochs": [1],
            "tune": lambda m, settings, epochs: m, "quality": lambda m: 1.0, "directory": fresh(), "most_bytes": 100,
        } | changes
        return search.best_file(**given)

    for name, wrong in {
        "model a module": {"model": MODULE}, "x a scalar": {"x": 1.0}, "make of one": {"make": lambda m: m},
        "tune of two": {"tune": lambda m, settings: m}, "quality a Model": {"quality": MODEL},
        "finish of one": {"finish": lambda m: m}, "write of two": {"write": lambda path, m: None},
        "candidates none": {"candidates": []}, "candidates a dict": {"candidates": {"width": 0.5}},
        "candidates numbers": {"candidates": [0.5]}, "candidates twice": {"candidates": [{"width": 0.5}] * 2},
        "candidates of slashes": {"candidates": [{"a/b": 1}]}, "candidates empty": {"candidates": [{}]},
        "epochs none": {"epochs": []}, "epochs a number": {"epochs": 3}, "epochs 0": {"epochs": [0]},
        "epochs 1.5": {"epochs": [1.5]}, "keep 0": {"keep": 0}, "keep NaN": {"keep": NAN}, "batch 0": {"batch": 0},
        "batch beyond the inputs": {"batch": 9}, "suffix without a dot": {"suffix": "onnx"},
        "suffix None": {"suffix": None},
        "aim unknown": {"aim": "size"}, "aim without least_quality": {"aim": "bytes"},
        "aim without a budget": {"most_bytes": None}, "most_bytes 0": {"most_bytes": 0},
        "most_ms NaN": {"most_ms": NAN}, "most_ms a string": {"most_ms": "1"},
        "least_quality NaN": {"least_quality": NAN},
    }.items():
        yield Case(f"search.best_file: {name}", f"^(each of )?{name.split()[0]}\\b", lambda w=wrong: best(**w))
    yield Case("search.smallest_within: budget NaN", "budget", lambda: search.smallest_within({}, (1.0, 1.0), NAN))

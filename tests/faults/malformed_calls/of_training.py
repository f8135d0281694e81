"""Malformed calls of training: fit, objectives, steps, epochs, stages, interpolation, sweeps."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from faults.malformed_calls.material import (
    BATCH,
    INF,
    KEY,
    LABELS,
    LOGITS,
    MASKED,
    MODEL,
    MODULE,
    NAN,
    TX,
    Case,
    X,
    epoch,
    fit,
    model,
    state,
    step,
    with_nan,
)

from distill_jax import features, losses, models, train
from distill_jax.train import interpolation, sweeps

# fmt: off

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

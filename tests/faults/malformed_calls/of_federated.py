"""Malformed calls of federated learning."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from faults.malformed_calls.material import BATCH, KEY, MODEL, TX, Case, X, model, step

from distill_jax import teachers, train
from distill_jax.train import federated, sweeps

# fmt: off

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

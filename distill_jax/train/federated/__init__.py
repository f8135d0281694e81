"""Federated learning: clients that keep their examples, and send parameters or predictions.

A round has three parts: the clients train on their own examples, they send something, and the server averages it.

- *Parameters* travel in FedAvg: :func:`average_models`. All clients have one architecture.
- *Predictions* for public examples without labels travel in federated distillation: :func:`average_predictions`.
  The average, the *consensus*, is what clients and server learn from next. Architectures may differ. The arrays that
  a kind of labels makes (:mod:`distill_jax.teachers.kinds`) are what is sent, and :func:`payload_bytes` counts them.

Clients of one architecture are stacked as in :mod:`distill_jax.train.sweeps` and train side by side, in one compiled
program (:func:`make_local_training`). :mod:`distill_jax.compress.units` averages clients whose units are in different
orders (``match_weights``) or whose widths differ (``average_widths``).

>>> import jax
>>> import jax.numpy as jnp
>>> import numpy as np
>>> import optax
>>> from distill_jax import models, train
>>> from distill_jax.train import sweeps
>>> data = {"image": np.eye(4, dtype=np.float32), "label": np.array([0, 0, 1, 1])}
>>> shards = [np.array([0, 2]), np.array([1, 3])]
>>> tx = optax.sgd(0.5)
>>> train_clients = make_local_training(train.make_train_step(train.supervised(), tx), tx)
>>> model = models.from_function(lambda w, x: x @ w, jnp.zeros((4, 2)))
>>> for number in range(3):
...     order = client_order(shards, steps=5, batch_size=2, seed=0, number=number)
...     clients, _ = train_clients(sweeps.repeat(model, 2), data, order, jax.random.key(number))
...     model = average_models([sweeps.take(clients, i) for i in range(2)], [2, 2])
>>> model(data["image"]).argmax(-1).tolist()
[0, 0, 1, 1]
"""

from distill_jax.train.federated.clients import (
    client_order,
    co_distill,
    dirichlet_shards,
    make_local_training,
    with_public,
)
from distill_jax.train.federated.exchange import (
    average_models,
    average_predictions,
    check_classes,
    dense,
    encode_predictions,
    finite_clients,
    payload_bytes,
)

__all__ = [
    "average_models", "average_predictions", "check_classes", "client_order", "co_distill", "dense", "dirichlet_shards",
    "encode_predictions", "finite_clients", "make_local_training", "payload_bytes", "with_public",
]  # fmt: skip

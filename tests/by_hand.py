"""Losses in NumPy, and one step in many ways: what the tests of objectives share."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import train


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def mean(values, batch):
    return np.average(values, weights=batch.get("weight"))


def hard(logits, batch):
    return mean(-np.log(softmax(logits)[np.arange(len(logits)), batch["label"]]), batch)


def logits_of(model, batch):
    """Of a linear model, in float64."""
    return np.asarray(batch["image"], float) @ np.asarray(model.params["w"], float)


def assert_same_in_parts(loss_fn, model, batch, tx=None):
    """A step over the batch and over its halves; two steps, and two under scan under vmap."""
    tx = tx or optax.sgd(0.5)
    state = train.init_state(model, tx, jax.random.key(0))
    step = train.make_train_step(loss_fn, tx)
    jitted = jax.jit(step)
    whole, metrics = jitted(state, batch)
    parts, in_parts = jax.jit(train.make_train_step(loss_fn, tx, accumulate=2))(state, batch)
    close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=1e-6)
    close((whole.model, metrics), (parts.model, in_parts))
    second, _ = jitted(whole, batch)
    batches = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    copies = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    scanned = jax.jit(jax.vmap(lambda state: jax.lax.scan(step, state, batches)[0]))(copies)
    for copy in range(2):
        close(jax.tree.map(lambda x, copy=copy: x[copy], scanned.model), second.model)

"""The networks that bench_step.py trains, and their training steps in distill_jax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from distill_jax import features, models, teachers, train

CLASSES, EXAMPLES, LEARNING_RATE, MOMENTUM = 10, 1024, 0.01, 0.9
VARIANTS = ("plain", "stored", "online", "teacher forward")
Variants = dict[str, Callable[[np.ndarray], Any]]  # name → makes a step for each row of numbers of examples
# Pair → teacher, student, image shape, batch size
PAIRS = {
    "mlp": ("mlp:1200,1200", "mlp:800,800", (28, 28, 1), 128),
    "characters": ("characters:512,128", "characters:512", (32, 32, 1), 128),
    "vgg": ("vgg8:0.5", "vgg8:0.25", (32, 32, 1), 128),
    "resnet": ("resnet32x4", "resnet8x4", (32, 32, 3), 32),
    "transformer": ("transformer:256,4", "transformer:128,2", (32, 32, 1), 128),
}


class Block(nnx.Module):
    """A transformer layer: attention and two dense layers, each after a normalisation and with a shortcut."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(num_heads=4, in_features=width, decode=False, rngs=rngs)
        self.dense = nnx.List(
            nnx.Linear(a, b, rngs=rngs) for a, b in ((width, 4 * width), (4 * width, width))
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, width]`` to the same shape."""
        x = x + self.attention(self.norms[0](x))
        return x + self.dense[1](nnx.relu(self.dense[0](self.norms[1](x))))


class Transformer(nnx.Module):
    """Rows of an image as tokens, transformer layers, and a dense layer on the mean over tokens."""

    def __init__(self, shape: tuple[int, int, int], sizes: list[int], rngs: nnx.Rngs):
        width, depth = sizes
        self.embed = nnx.Linear(shape[1] * shape[2], width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs) for _ in range(depth))
        self.head = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images to logits."""
        x = self.embed(x.reshape(*x.shape[:2], -1))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def build(description: str, shape: tuple[int, int, int], seed: int) -> models.Model:
    """Builds a network of a pair."""
    family, _, sizes = description.partition(":")
    if family != "transformer":
        return models.build(description, shape, CLASSES, jax.random.key(seed))
    return models.from_nnx(Transformer(shape, [int(size) for size in sizes.split(",")], nnx.Rngs(seed)))


def make_arrays(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Draws random examples; the cost of a step does not depend on their values."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.random((EXAMPLES, *shape), np.float32),
        "label": rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
        "teacher": rng.normal(size=(EXAMPLES, CLASSES)).astype(np.float32) * 3,
    }


def jax_variants(pair: str) -> Variants:
    """Builds the timed functions: each makes one step per row of ``order`` and waits for them."""
    *descriptions, shape, _ = PAIRS[pair]
    teacher, student = (build(name, shape, seed) for seed, name in enumerate(descriptions))
    arrays = jax.tree.map(jnp.asarray, make_arrays(shape))
    tx = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)
    soft = train.distill(temperature=4.0, alpha=0.0)

    def steps_of(step, state, transform=None, context=None):
        epoch = train.make_epoch(step, transform=transform)
        state = jax.tree.map(jnp.copy, state)  # each variant donates its own

        def run(order):
            nonlocal state
            state, _ = jax.block_until_ready(epoch(state, arrays, order, context))

        return run

    def steps_of_student(loss_fn, **options):
        state = train.init_state(student, tx, jax.random.key(0))
        return steps_of(train.make_train_step(loss_fn, tx), state, **options)

    def forward(state, batch):
        return state, {"mean": jnp.mean(teachers.label(state.model, batch)["teacher"])}

    def captured(state, batch):
        logits, values = state.model(batch["image"])
        return state, {"mean": jnp.mean(logits), "value": jnp.mean(values[middle][0])}

    shapes = features.layer_shapes(teacher, arrays["image"][:1])
    middle = list(shapes)[len(shapes) // 2]
    capturing = features.capture(teacher, middle)

    def online(teacher, batch, key):
        return teachers.label(teacher, batch)

    return {
        "plain": steps_of_student(train.supervised()),
        "stored": steps_of_student(soft),
        "online": steps_of_student(soft, transform=online, context=teacher),
        "teacher forward": steps_of(forward, train.init_state(teacher, optax.identity(), jax.random.key(0))),
        "captured": steps_of(captured, train.init_state(capturing, optax.identity(), jax.random.key(0))),
    }

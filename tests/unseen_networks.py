"""Networks of kinds that the tracer was not made on, written as their users write them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from distill_jax import models

RNG = np.random.default_rng(1)


class GraphNetwork(linen.Module):
    """Messages along the edges of a batch of graphs, attention among neighbours, one output per graph."""

    width: int = 12
    heads: int = 2
    size: int = 4
    rounds: int = 1

    @linen.compact
    def __call__(self, graph, train=False):
        senders, receivers, count = graph["senders"], graph["receivers"], graph["nodes"].shape[0]

        def gather(x):
            return jax.ops.segment_sum(x, receivers, num_segments=count)

        nodes, edges = linen.Dense(self.width)(graph["nodes"]), linen.Dense(8)(graph["edges"])
        degree = gather(jnp.ones_like(receivers, dtype=nodes.dtype))
        for _ in range(self.rounds):
            both = jnp.concatenate([edges, nodes[senders], nodes[receivers]], axis=-1)
            edges = edges + linen.Dense(8)(linen.silu(linen.Dense(10)(both)))
            q, k, v = (linen.DenseGeneral((self.heads, self.size))(nodes) for _ in range(3))
            scores = (q[receivers] * k[senders]).sum(-1) / np.sqrt(self.size)
            scores = jnp.exp(scores - jax.ops.segment_max(scores, receivers, num_segments=count)[receivers])
            weights = scores / gather(scores)[receivers]
            message = gather(weights[..., None] * v[senders]).reshape(count, -1)
            mean = gather(edges) / jnp.maximum(degree, 1)[:, None]
            nodes = nodes + linen.Dense(self.width)(jnp.concatenate([message, mean], axis=-1))
            nodes = linen.BatchNorm(use_running_average=not train)(nodes)
            nodes = linen.Dropout(0.1, deterministic=not train)(nodes)
        graphs = graph["n_node"].shape[0]
        which = jnp.repeat(jnp.arange(graphs), graph["n_node"], total_repeat_length=count)
        pooled = jax.ops.segment_sum(nodes, which, num_segments=graphs)
        return linen.Dense(2)(linen.relu(linen.Dense(9)(pooled)))


def graphs(count):
    nodes = RNG.integers(2, 5, count)
    starts = np.repeat(np.cumsum(nodes) - nodes, 3 * nodes)
    many = np.repeat(nodes, 3 * nodes)
    senders, receivers = (starts + RNG.integers(0, many) for _ in range(2))
    return {
        "nodes": RNG.normal(size=(nodes.sum(), 5)), "edges": RNG.normal(size=(len(many), 3)),
        "senders": senders, "receivers": receivers, "n_node": nodes,
    }  # fmt: skip


class Expert(linen.Module):
    hidden: int
    width: int

    @linen.compact
    def __call__(self, x, train):
        x = linen.gelu(linen.Dense(self.hidden)(x))
        return linen.Dense(self.width)(linen.Dropout(0.1, deterministic=not train)(x))


class Experts(linen.Module):
    """Each token goes to the two experts that a noisy router prefers, as far as these have room."""

    experts: int = 4
    hidden: int = 10

    @linen.compact
    def __call__(self, x, train):
        batch, length, width = x.shape
        tokens = x.reshape(-1, width)
        logits = linen.Dense(self.experts, use_bias=False, name="router")(tokens)
        spread = linen.softplus(linen.Dense(self.experts, use_bias=False, name="noise")(tokens))
        if train:
            logits = logits + spread * jax.random.normal(self.make_rng("dropout"), logits.shape)
        bias = self.variable("balance", "bias", jnp.zeros, self.experts)
        _, chosen = jax.lax.top_k(logits + bias.value, 2)
        gates = jax.nn.softmax(jnp.take_along_axis(logits, chosen, axis=-1))
        capacity = int(np.ceil(3 * len(tokens) / self.experts))
        mask = jax.nn.one_hot(chosen, self.experts, dtype=x.dtype)  # [token, choice, expert]
        first_choices_first = mask.transpose(1, 0, 2).reshape(-1, self.experts)
        place = (jnp.cumsum(first_choices_first, axis=0) - 1).reshape(2, -1, self.experts).transpose(1, 0, 2)
        place = (place * mask).sum(-1).astype(int)  # [token, choice]; out of range where an expert is full
        slots = mask[..., None] * jax.nn.one_hot(place, capacity, dtype=x.dtype)[:, :, None]
        dispatch, combine = slots.sum(1), (gates[..., None, None] * slots).sum(1)
        if train and not self.is_initializing():
            load = mask.sum((0, 1)) / mask.sum()
            bias.value = bias.value + 0.01 * jnp.sign(1 / self.experts - load)
        each = linen.vmap(
            Expert, in_axes=(0, None), variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
        )  # fmt: skip
        found = each(self.hidden, width)(jnp.einsum("nec,nd->ecd", dispatch, tokens), train)
        return jnp.einsum("nec,ecd->nd", combine, found).reshape(batch, length, width)


class MixtureOfExperts(linen.Module):
    @linen.compact
    def __call__(self, tokens, train=False):
        x = linen.Embed(13, 8)(tokens)
        mask = linen.make_causal_mask(tokens)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2)(linen.RMSNorm()(x), mask=mask)
        x = x + Experts()(linen.RMSNorm()(x), train)
        return linen.Dense(13)(linen.RMSNorm()(x))


class UNet(linen.Module):
    """Convolutions down to a quarter of the size and up again, with connections across."""

    widths: tuple = (6, 8)

    @linen.compact
    def __call__(self, x, train=False):
        def block(x, width):
            x = linen.Conv(width, (3, 3), use_bias=False)(x)
            return linen.relu(linen.BatchNorm(use_running_average=not train)(x))

        across = []
        for width in self.widths:
            x = block(x, width)
            across.append(x)
            x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = linen.swish(linen.GroupNorm(num_groups=4)(linen.Conv(12, (3, 3))(x)))
        x = linen.Dropout(0.2, deterministic=not train)(x)
        for i, width in enumerate(reversed(self.widths)):
            if i == 0:
                x = linen.ConvTranspose(width, (2, 2), strides=(2, 2))(x)
            else:
                batch, height, breadth, channels = x.shape
                x = jax.image.resize(x, (batch, 2 * height, 2 * breadth, channels), "bilinear")
                x = linen.Conv(width, (3, 3))(x)
            x = block(jnp.concatenate([across.pop(), x], axis=-1), width)
        return linen.Conv(2, (1, 1))(x)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(linen.Module):
    width: int
    heads: int

    @linen.compact
    def __call__(self, x, c, train):
        batch, length, _ = x.shape
        modulation = linen.Dense(6 * self.width, kernel_init=linen.initializers.zeros)(linen.silu(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        h = modulate(linen.LayerNorm(use_scale=False, use_bias=False)(x), shift1, scale1)
        qkv = linen.Dense(3 * self.width)(h).reshape(batch, length, 3, self.heads, -1)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        q, k = linen.RMSNorm()(q), linen.RMSNorm()(k)
        h = jax.nn.dot_product_attention(q, k, v).reshape(batch, length, self.width)
        x = x + gate1[:, None] * linen.Dense(self.width)(h)
        h = modulate(linen.LayerNorm(use_scale=False, use_bias=False)(x), shift2, scale2)
        h = linen.Dropout(0.1, deterministic=not train)(linen.gelu(linen.Dense(4 * self.width)(h)))
        return x + gate2[:, None] * linen.Dense(self.width)(h)


class DiT(linen.Module):
    """A transformer on patches that predicts noise and its variance, given a time and a class."""

    width: int = 8
    patch: int = 2
    classes: int = 3

    @linen.compact
    def __call__(self, batch, train=False):
        image, label = batch["image"], batch["label"]
        n, side = image.shape[0], image.shape[1] // self.patch
        frequencies = np.exp(-np.log(1e4) * np.arange(5) / 5)
        angles = batch["time"][:, None] * frequencies
        time = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        c = linen.Dense(self.width)(linen.silu(linen.Dense(10)(time)))
        if train:
            dropped = jax.random.bernoulli(self.make_rng("dropout"), 0.2, (n,))
            label = jnp.where(dropped, self.classes, label)
        c = c + linen.Embed(self.classes + 1, self.width)(label)
        x = linen.Conv(self.width, (self.patch, self.patch), strides=self.patch)(image)
        x = x.reshape(n, side * side, self.width)
        x = x + self.param("positions", linen.initializers.normal(0.02), (1, side * side, self.width))
        x = DiTBlock(self.width, 2)(x, c, train)
        last = linen.Dense(2 * self.width, kernel_init=linen.initializers.zeros)(linen.silu(c))
        shift, scale = jnp.split(last, 2, axis=-1)
        x = modulate(linen.LayerNorm(use_scale=False, use_bias=False)(x), shift, scale)
        x = linen.Dense(self.patch * self.patch * 2 * 2)(x)
        x = x.reshape(n, side, side, self.patch, self.patch, 4)
        x = jnp.einsum("nhwpqc->nhpwqc", x).reshape(n, side * self.patch, side * self.patch, 4)
        noise, variance = jnp.split(x, 2, axis=-1)
        return {"noise": noise, "variance": jax.nn.sigmoid(variance)}


def noisy(count):
    return {
        "image": RNG.normal(size=(count, 4, 4, 2)), "time": RNG.uniform(0, 1000, count),
        "label": RNG.integers(0, 3, count),
    }  # fmt: skip


class Recurrent(nnx.Module):
    """Two directions, then one, over sequences of different lengths."""

    def __init__(self, rngs):
        kind = {"param_dtype": jnp.result_type(float), "rngs": rngs}  # a cell makes its carry of it
        self.embed = nnx.Embed(13, 5, rngs=rngs)
        self.both = nnx.Bidirectional(nnx.RNN(nnx.LSTMCell(5, 6, **kind)), nnx.RNN(nnx.GRUCell(5, 8, **kind)))
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.top = nnx.RNN(nnx.OptimizedLSTMCell(14, 10, **kind))
        self.out = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, batch):
        x = self.drop(self.both(self.embed(batch["tokens"]), seq_lengths=batch["lengths"]))
        x = self.top(x, seq_lengths=batch["lengths"])
        last = x[jnp.arange(len(x)), batch["lengths"] - 1]
        return self.out(last)


def sequences(count):
    return {"tokens": RNG.integers(0, 13, (count, 6)), "lengths": RNG.integers(2, 7, count)}


def tokens(count):
    return RNG.integers(0, 13, (count, 5))


def images(count):
    return RNG.normal(size=(count, 8, 8, 3))


# Name → the module, what makes a batch of so many examples, and how many groups are exact: counted by hand
UNSEEN = {
    "graph": (GraphNetwork(), graphs, 7),
    "experts": (MixtureOfExperts(), tokens, 4),
    "unet": (UNet(), images, 7),
    "diffusion": (DiT(), noisy, 4),
    "recurrent": (Recurrent, sequences, 4),
}


def unseen(name):
    """The model with random weights, what makes its batches, and how many of its groups are exact."""
    module, batch, exact = UNSEEN[name]
    x = batch(2)
    if name == "recurrent":
        model = nnx.eval_shape(lambda: models.from_nnx(module(nnx.Rngs(0))))
    else:
        model = jax.eval_shape(lambda: models.from_linen(module, jax.random.key(0), x))

    def draw(path, leaf):
        # None is zero or one, as many are at the start of a training
        array = 0.5 * RNG.normal(size=leaf.shape)
        return np.abs(array) + 0.5 if jax.tree_util.keystr(path).endswith("['var']") else array

    return jax.tree_util.tree_map_with_path(draw, model), batch, exact

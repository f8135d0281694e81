"""Processor seconds of ``units.trace``, for networks of several depths and for four well-known sizes.

``python experiments/benchmarks/bench_trace.py``. Each network is a Linen module, which has its widths written
into it, or a plain function, which reads them from its arrays. No weights are allocated.
``--tables`` prints the tables of units of ResNet-50 and of a GPT that stand in the documentation.
"""

import argparse
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from distill_jax.compress import units
from distill_jax.models import Model, from_function


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values, as most code for GPT-2 and ViT has it."""

    heads: int
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        """Applies the layers."""
        width = x.shape[-1]
        shape = (*x.shape[:-1], self.heads, width // self.heads)
        q, k, v = (nn.Dense(width, name=name)(x).reshape(shape) for name in ("query", "key", "value"))
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / (width // self.heads) ** 0.5
        if self.causal:
            logits = jnp.where(jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool)), logits, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(logits), v).reshape(x.shape)
        return nn.Dense(width, name="out")(y)


class Transformer(nn.Module):
    """BERT (norms after the sums), GPT-2 and ViT (before them), with learned positions."""

    depth: int
    width: int
    heads: int
    outputs: int
    vocabulary: int = 0
    post: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, x):
        """Applies the layers."""
        if self.vocabulary:
            embed = nn.Embed(self.vocabulary, self.width)
            x = embed(x)
        else:
            x = nn.Conv(self.width, (16, 16), (16, 16))(x)
            x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(), x.shape[1:])
        for _ in range(self.depth):
            h = x if self.post else nn.LayerNorm()(x)
            x = x + Attention(self.heads, self.causal)(h)
            x = nn.LayerNorm()(x) if self.post else x
            h = x if self.post else nn.LayerNorm()(x)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(h)))
            x = nn.LayerNorm()(x) if self.post else x
        return nn.Dense(self.outputs)(nn.LayerNorm()(x))


class ResNet(nn.Module):
    """ResNet with bottleneck blocks."""

    stages: tuple[int, ...] = (3, 4, 6, 3)

    @nn.compact
    def __call__(self, x):
        """Applies the layers."""

        def norm(x):
            return nn.BatchNorm(use_running_average=True)(x)

        x = nn.relu(norm(nn.Conv(64, (7, 7), (2, 2), use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                h = nn.relu(norm(nn.Conv(64 * 2**i, (1, 1), use_bias=False)(x)))
                h = nn.relu(norm(nn.Conv(64 * 2**i, (3, 3), (stride, stride), use_bias=False)(h)))
                h = norm(nn.Conv(256 * 2**i, (1, 1), use_bias=False)(h))
                if j == 0:
                    x = norm(nn.Conv(256 * 2**i, (1, 1), (stride, stride), use_bias=False)(x))
                x = nn.relu(x + h)
        return nn.Dense(1000)(x.mean((1, 2)))


def linen(module: nn.Module, x: Any) -> Model:
    """A model of shapes alone."""
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params = variables.pop("params")

    def apply_fn(params, state, x, *, key=None):
        return module.apply({"params": params, **state}, x), state

    return Model(apply_fn, params, variables)


def plain(depth: int, width: int, heads: int) -> Model:
    """A GPT as a plain function, which reads its widths from its arrays, the size of heads for 1/√d, too."""

    def norm(p, x):
        x = x - x.mean(-1, keepdims=True)
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def fn(p, tokens):
        x = p["embedding"][tokens] + p["positions"]
        for b in p["blocks"]:
            q, k, v = (jnp.einsum("btd,dhk->bthk", norm(b["norm1"], x), b[name]) for name in "qkv")
            logits = jnp.einsum("bqhk,bthk->bhqt", q, k) / q.shape[-1] ** 0.5
            logits = jnp.where(jnp.tril(jnp.ones(logits.shape[-2:], bool)), logits, -1e9)
            x = x + jnp.einsum("bhqt,bthk,hkd->bqd", jax.nn.softmax(logits), v, b["o"])
            x = x + jax.nn.gelu(norm(b["norm2"], x) @ b["up"]) @ b["down"]
        return norm(p["norm"], x) @ p["embedding"].T

    size = width // heads
    scales = {"scale": (width,), "bias": (width,)}
    block: dict[str, Any] = dict.fromkeys("qkv", (width, heads, size)) | {"o": (heads, size, width)}
    block |= {"norm1": scales, "norm2": scales, "up": (width, 4 * width), "down": (4 * width, width)}
    shapes: Any = {
        "embedding": (50257, width), "positions": (128, width), "norm": scales, "blocks": [block] * depth,
    }  # fmt: skip
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )
    return from_function(fn, params)


def networks(depths: list[int], large: bool):
    """Yields a name, a model and its input."""
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    for depth in depths:
        module = Transformer(depth, 256, 4, 100, vocabulary=100, causal=True)
        yield f"transformer of {depth} layers, Linen", linen(module, tokens), tokens
        yield f"transformer of {depth} layers, plain function", plain(depth, 256, 4), tokens
    if large:
        bert = Transformer(12, 768, 12, 30522, vocabulary=30522, post=True)
        gpt = Transformer(12, 768, 12, 50257, vocabulary=50257, causal=True)
        yield "BERT-base, Linen", linen(bert, tokens), tokens
        yield "GPT-2 small, Linen", linen(gpt, tokens), tokens
        yield "GPT-2 small, plain function", plain(12, 768, 12), tokens
        yield "ViT-B/16, Linen", linen(Transformer(12, 768, 12, 1000), images), images
        yield "ResNet-50, Linen", linen(ResNet(), images), images


def tables() -> list[str]:
    """The tables of units of ResNet-50 and of a GPT of the size of GPT-2 small."""
    images, tokens = (
        jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),
        jax.ShapeDtypeStruct((1, 128), jnp.int32),
    )
    graphs = units.trace(linen(ResNet(), images), images), units.trace(plain(12, 768, 12), tokens)
    return [str(graph) for graph in graphs]


def main() -> None:
    """Prints one line for each network: the smallest of several times, and the groups."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="*", default=[2, 4, 8, 12, 32])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-large", dest="large", action="store_false")
    parser.add_argument(
        "--tables", action="store_true", help="print two tables of units, and measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.tables:
        print(*tables(), sep="\n\n")
        return
    print("network | processor seconds | exact / free groups")
    for name, model, x in networks(arguments.depths, arguments.large):
        times = []
        for _ in range(arguments.repeats):
            start = time.process_time()
            graph = units.trace(model, x)
            times.append(time.process_time() - start)
        free = [group for group in graph.groups.values() if group.free]
        exact = sum(getattr(group, "exact_shrunk", group.exact) for group in free)
        print(f"{name} | {min(times):.2f} | {exact} / {len(free)}", flush=True)


if __name__ == "__main__":
    main()

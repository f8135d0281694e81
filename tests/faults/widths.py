"""Random programs that read widths from their arrays in many ways, and what removing units does to them.

``python tests/faults/widths.py --programs 500``. For each group that ``units.trace`` calls exact, and random
units: the program run again with the smaller arrays (if it runs), the shrunk program and the silenced one
must give the same numbers, in float64. Groups that are removed exactly by the adapted program alone: the last two.
"""

import argparse
import collections
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.compress import units
from distill_jax.models import from_function

BATCH, TIME, FEATURES = 2, 6, 3
WIDTHS = (4, 6, 8, 9, 12)
LAYOUT = ("NWC", "WIO", "NWC")

# Each part: (width, rng) -> (shapes of its parameters, function (p, h) -> h, width after it)
PARTS: dict[str, Callable[..., Any]] = {}


def part(make):
    PARTS[make.__name__] = make
    return make


def alike(name, function):
    """Registers a part without parameters."""
    PARTS[name] = lambda width, rng: ({}, lambda p, h: function(h), width)


def shift(h, k=1):
    return jnp.pad(h, ((0, 0), (k, 0), (0, 0)))[:, : h.shape[1]]


def first(h, n):
    return h[..., :n]


alike("halves", lambda h: cat(jax.nn.relu(first(h, h.shape[-1] // 2)), jnp.tanh(h[..., h.shape[-1] // 2 :])))
alike("third", lambda h: cat(jnp.sin(first(h, h.shape[-1] // 3)), h[..., h.shape[-1] // 3 :]))
alike("most", lambda h: cat(jnp.sin(first(h, -(h.shape[-1] // 4))), h[..., -(h.shape[-1] // 4) :]))
alike("rounded", lambda h: first(h, max(2, round(h.shape[-1] * 0.6))))
alike("at_most_five", lambda h: cat(jnp.tanh(first(h, min(5, h.shape[-1]))), h[..., min(5, h.shape[-1]) :]))
alike("token_shift", lambda h: cat(shift(first(h, h.shape[-1] // 2)), h[..., h.shape[-1] // 2 :]))
alike("evens", lambda h: cat(jax.nn.relu(h[..., ::2]), jnp.sin(h[..., 1::2])))
alike("every_nth", lambda h: jnp.tanh(h[..., :: max(1, h.shape[-1] // 4)]))
alike("roll", lambda h: h + jnp.roll(h, h.shape[-1] // 2, -1))
alike("roll_one", lambda h: h + jnp.roll(h, 1, -1))
alike("backwards", lambda h: h + jnp.tanh(h[..., ::-1]))
alike("scaled", lambda h: h / h.shape[-1] ** 0.5)
alike("counted", lambda h: h / jnp.sum(jnp.ones(h.shape[-1])))
alike("power", lambda h: jnp.sin(h) ** (h.shape[-1] % 3 + 1))
alike("clipped", lambda h: jnp.clip(h, -1.0, h.shape[-1] / 8))
alike("chosen", lambda h: jnp.tanh(h) if h.shape[-1] > 5 else jnp.sin(h))
alike("parity", lambda h: jnp.tanh(h) if h.shape[-1] % 2 else jnp.sin(h))
alike("rows_by_width", lambda h: h[:, :: 1 + (h.shape[-1] > 5)][:, :3].mean(1, keepdims=True) + h)
alike("padded_time", lambda h: h + jnp.pad(h, ((0, 0), (h.shape[-1] // 3, 0), (0, 0)))[:, : h.shape[1]])
alike("pad_then_slice", lambda h: jnp.pad(h, ((0, 0), (0, 0), (2, 2)))[..., 2 : 2 + h.shape[-1]])
alike("pad_to_ten", lambda h: jnp.pad(h, ((0, 0), (0, 0), (0, max(0, 10 - h.shape[-1])))))
alike("repeat_to_twelve", lambda h: jnp.repeat(h, 12 // h.shape[-1] or 1, -1))
alike("looped", lambda h: jax.lax.fori_loop(0, h.shape[-1] // 2, lambda i, h: jnp.sin(h) + 0.1 * h, h))
alike(
    "scanned", lambda h: jax.lax.scan(lambda c, _: (jnp.sin(c) + 0.1 * c, None), h, None, h.shape[-1] // 2)[0]
)
alike("masked", lambda h: jnp.where(jnp.arange(h.shape[-1]) < h.shape[-1] // 2, h, jnp.sin(h)))
alike("ones", lambda h: h * jnp.ones(h.shape[-1]) + jnp.zeros(h.shape))
alike("summed", lambda h: h * jax.lax.rsqrt((h * h).sum(-1, keepdims=True) + 1.0))
alike("mean", lambda h: h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1.0))
alike("softmax", lambda h: jax.nn.softmax(h) * 3)
alike("cumulated", lambda h: jnp.cumsum(h, -1))
alike(
    "window_by_width",
    lambda h: jax.lax.reduce_window(h, 0.0, jax.lax.add, (1, 1 + h.shape[-1] // 4, 1), (1, 1, 1), "SAME"),
)
alike(
    "max_window_by_width",
    lambda h: h + jax.lax.reduce_window(
        h, -jnp.inf, jax.lax.max, (1, 2, 1), (1, 1, 1), ((0, 0), (h.shape[-1] % 2, 1 - h.shape[-1] % 2), (0, 0))
    ),
)  # fmt: skip
alike("dynamic", lambda h: jax.lax.dynamic_slice_in_dim(h, h.shape[-1] // 2, h.shape[-1] // 2, -1))
alike("taken", lambda h: jnp.take(h, np.arange(h.shape[-1] // 2), axis=-1))
alike("time_from_width", lambda h: h + h[:, h.shape[-1] % TIME][:, None])
alike("shuffle", lambda h: shuffled(h, 2))
alike("shuffle_by_width", lambda h: shuffled(h, h.shape[-1] // 2))
alike("folded_in_four", lambda h: jnp.tanh(folded(h, 4).cumsum(-2)).reshape(h.shape))
alike("fours", lambda h: jax.nn.softmax(h.reshape(*h.shape[:2], -1, 4)).reshape(h.shape))
alike("two_rows", lambda h: jnp.tanh(h.reshape(*h.shape[:2], 2, -1)).sum(2))
alike("transposed", lambda h: (h.swapaxes(1, 2) if h.shape[-1] > 5 else h.swapaxes(1, 2) * 2).swapaxes(1, 2))
alike("merged", lambda h: jnp.tanh(h.reshape(h.shape[0], -1)).reshape(h.shape))
alike("rotated", lambda h: cat(-h[..., h.shape[-1] // 2 :], h[..., : h.shape[-1] // 2]) + h)
alike("split", lambda h: gated(*jnp.split(h, 2, -1)))
alike("split_unevenly", lambda h: cat(*(f(x) for f, x in zip(
    (jnp.tanh, jnp.sin, jax.nn.relu), jnp.split(h, (h.shape[-1] // 4, h.shape[-1] // 2), -1), strict=True)
)))  # fmt: skip
alike("norm_without_epsilon", lambda h: h / jnp.sqrt((h * h).sum(1, keepdims=True)))
alike("angle", lambda h: jnp.arctan2(h, h - 0.1 * h**2))
alike("temporal_shift", lambda h: temporal_shift(h))
alike("groups", lambda h: grouped_norm(h, h.shape[-1] // 2))
alike("groups_of_two", lambda h: grouped_norm(h, 2))
alike(
    "in_jit",
    lambda h: jax.jit(lambda h: cat(jnp.sin(first(h, h.shape[-1] // 2)), h[..., h.shape[-1] // 2 :]))(h),
)
alike("in_checkpoint", lambda h: jax.checkpoint(lambda h: jnp.tanh(h) * (h.shape[-1] // 2))(h))
alike(
    "in_vmap",
    lambda h: jax.vmap(lambda h: cat(jnp.sin(h[..., : h.shape[-1] // 2]), h[..., h.shape[-1] // 2 :]))(h),
)
alike("in_cond", lambda h: jax.lax.cond(
    h[0, 0, 0] > 0, lambda h: cat(jnp.sin(first(h, h.shape[-1] // 2)), h[..., h.shape[-1] // 2 :]), jnp.cos, h
))  # fmt: skip


def cat(*parts):
    return jnp.concatenate(parts, -1)


def gated(a, b):
    return a * jax.nn.sigmoid(b)


def folded(h, n):
    return h.reshape(*h.shape[:2], n, -1)


def shuffled(h, groups):
    return jnp.tanh(folded(h, groups).swapaxes(-1, -2)).reshape(h.shape)


def temporal_shift(h):
    n = h.shape[-1] // 4
    ahead = jnp.pad(h[:, 1:, :n], ((0, 0), (0, 1), (0, 0)))
    return cat(ahead, shift(h[..., n : 2 * n]), h[..., 2 * n :])


def grouped_norm(h, groups):
    g = folded(h, groups)
    return (g * jax.lax.rsqrt((g * g).sum(-1, keepdims=True) + 1.0)).reshape(h.shape)


@part
def dense(width, rng):
    n = int(rng.choice(WIDTHS))
    return {"w": (width, n), "b": (n,)}, lambda p, h: jnp.tanh(h @ p["w"] + p["b"]), n


@part
def residual(width, rng):
    n = int(rng.choice(WIDTHS))
    return {"w": (width, n), "v": (n, width)}, lambda p, h: h + jax.nn.relu(h @ p["w"]) @ p["v"], width


@part
def scale(width, rng):
    return {"s": (width,)}, lambda p, h: h * p["s"][: h.shape[-1]], width


@part
def longer_scale(width, rng):
    return {"s": (width + 3,)}, lambda p, h: h * p["s"][: h.shape[-1]], width


@part
def time_parameter(width, rng):
    return {"s": (TIME + 4, width)}, lambda p, h: h + p["s"][: h.shape[1]], width


@part
def ghost(width, rng):
    n = int(rng.choice(WIDTHS))

    def fn(p, h):
        main = jnp.tanh(h @ p["w"])
        return cat(main, jnp.sin(main * p["s"]))[..., : p["out"].shape[0]] * p["out"]

    return {"w": (width, -(-n // 2)), "s": (-(-n // 2),), "out": (n,)}, fn, n


@part
def pad_to_parameter(width, rng):
    n = width + int(rng.integers(0, 4))

    def fn(p, h):
        missing = p["b"].shape[0] - h.shape[-1]
        return jnp.pad(h, ((0, 0), (0, 0), (missing // 2, missing - missing // 2))) + p["b"]

    return {"b": (n,)}, fn, n


@part
def dense_skip(width, rng):
    n = int(rng.choice(WIDTHS))
    return {"w": (width, n)}, lambda p, h: cat(h, jnp.sin(h @ p["w"])), width + n


@part
def convolution(width, rng):
    n = int(rng.choice(WIDTHS))
    how = str(rng.choice(["stride", "dilation", "padding", "window", "plain", "groups"]))

    def fn(p, h):
        n = h.shape[-1]
        stride, dilation, padding = (1,), (1,), [(1, 1)]
        if how == "stride":
            stride = (1 + (n > 5),)
        if how == "dilation":
            dilation = (max(1, n // 4),)
            padding = [(dilation[0], dilation[0])]
        if how == "padding":
            padding = [(n % 3, 2 - n % 3)]
        w = p["w"][: 3 - n % 2] if how == "window" else p["w"]
        if how == "window":
            padding = "SAME"
        y = jax.lax.conv_general_dilated(
            h, w, stride, padding, rhs_dilation=dilation, dimension_numbers=LAYOUT,
            feature_group_count=n // w.shape[1],
        )  # fmt: skip
        return jnp.tanh(y)[:, : h.shape[1]]

    if how == "groups":
        per = int(rng.choice([k for k in (1, 2, 3) if width % k == 0]))
        times = int(rng.integers(1, 3))
        return {"w": (3, per, width // per * times)}, fn, width // per * times
    return {"w": (3, width, n)}, fn, n


@part
def attention(width, rng):
    heads, size = int(rng.integers(2, 5)), int(rng.integers(2, 5))
    how = str(rng.choice(["heads", "size", "parameter", "scaled"]))

    def fn(p, h):
        def heads_of(name):
            y = h @ p[name]
            if how == "heads":
                return y.reshape(*h.shape[:2], heads, -1)
            if how == "parameter":
                return y.reshape(*h.shape[:2], *p["g"].shape) * p["g"]
            return y.reshape(*h.shape[:2], -1, size)

        q, k, v = (heads_of(name) for name in "qkv")
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        logits = logits / (q.shape[-1] ** 0.5 if how == "scaled" else 2)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v)
        return h + y.reshape(*h.shape[:2], -1) @ p["o"]

    flat = heads * size
    shapes = dict.fromkeys("qkv", (width, flat)) | {"o": (flat, width)}
    return shapes | ({"g": (heads, size)} if how == "parameter" else {}), fn, width


@part
def squeeze(width, rng):
    n = max(2, width // 2)
    given = {"a": (width, n), "b": (n, width)}
    return given, lambda p, h: h * jax.nn.sigmoid(jax.nn.relu(h.sum(1) @ p["a"]) @ p["b"])[:, None], width


@part
def recurrent(width, rng):
    n = int(rng.choice(WIDTHS[:3]))

    def fn(p, h):
        def cell(c, x):
            z, y = jnp.split(x @ p["x"] + c @ p["h"], 2, -1)
            c = jax.nn.sigmoid(z) * c + jnp.tanh(y)
            return c, c

        zero = jnp.zeros((h.shape[0], p["h"].shape[0]))
        return jax.lax.scan(cell, zero, h.swapaxes(0, 1))[1].swapaxes(0, 1)

    return {"x": (width, 2 * n), "h": (n, 2 * n)}, fn, n


@part
def two_halves_of_a_parameter(width, rng):
    n = int(rng.choice(WIDTHS[:3]))

    def fn(p, h):
        m = p["w"].shape[1] // 2
        return jnp.tanh(h @ p["w"][:, :m]) * jnp.sin(h @ p["w"][:, m:])

    return {"w": (width, 2 * n)}, fn, n


@part
def partly_used(width, rng):
    n = int(rng.choice(WIDTHS))
    return {"w": (width, n)}, lambda p, h: jnp.tanh(h @ p["w"])[..., : p["w"].shape[1] - 2], n - 2


@part
def repeated_heads(width, rng):
    kv, times, size = 2, int(rng.integers(2, 4)), int(rng.integers(2, 4))

    def fn(p, h):
        q, k = jnp.einsum("btd,dhk->bthk", h, p["q"]), jnp.einsum("btd,dhk->bthk", h, p["k"])
        k = jnp.repeat(k, q.shape[2] // k.shape[2], 2)
        return jnp.einsum("bthk,bthk,hkd->btd", q, jnp.tanh(k), p["o"])

    n = int(rng.choice(WIDTHS))
    return {"q": (width, kv * times, size), "k": (width, kv, size), "o": (kv * times, size, n)}, fn, n


@part
def weight_norm(width, rng):
    n = int(rng.choice(WIDTHS))
    return {"w": (width, n)}, lambda p, h: jnp.tanh(h @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))), n


@part
def experts(width, rng):
    n, sizes = int(rng.choice(WIDTHS)), rng.multinomial(BATCH * TIME, [0.5, 0.3, 0.2])

    def fn(p, h):
        rows = jax.lax.ragged_dot(h.reshape(-1, h.shape[-1]), p["w"], sizes)
        return jnp.tanh(rows).reshape(*h.shape[:2], -1)

    return {"w": (3, width, n)}, fn, n


@part
def scattered_parameter(width, rng):
    how, first = (
        str(rng.choice(["set", "add", "multiply", "min"])),
        jnp.cos if rng.integers(2) else jnp.asarray,
    )
    return {"s": (2, width)}, lambda p, h: getattr(h.at[:, np.array([1, 4])], how)(first(p["s"])), width


INTERLEAVED = [0, 3, 1, 4, 2, 5]
alike("stacked", lambda h: jnp.stack([-h[..., 1::2], h[..., ::2]], -1).reshape(h.shape))
alike("unstacked", lambda h: gated(*jnp.unstack(folded(h, 2), axis=2)))
alike("tiled", lambda h: jnp.tile(jnp.sin(h), (1, 1, 2)))
alike("tile_to_twelve", lambda h: jnp.tile(h, (1, 1, 12 // h.shape[-1] or 1)))
alike("set_time", lambda h: h.at[:, 1].set(jnp.cos(h[:, 0])))
alike("set_time_by_width", lambda h: h.at[:, h.shape[-1] % TIME].set(0.0))
alike("set_half", lambda h: h.at[..., : h.shape[-1] // 2].set(1.0))
alike("added", lambda h: h.at[:, np.array([0, 0, 3])].add(h[:, 1:4]))
alike("segments", lambda h: jax.vmap(lambda r: jax.ops.segment_sum(r, np.array(INTERLEAVED) // 2, TIME))(h))
alike("segments_of_units", lambda h: jax.ops.segment_sum(h.T, np.arange(h.shape[-1]) // 2, h.shape[-1]).T)
alike("spectrum", lambda h: jnp.abs(jnp.fft.fft(h, axis=1)))
alike("spectrum_of_units", lambda h: jnp.fft.fft(h).real)
alike("noise", lambda h: h + jax.random.normal(jax.random.key(0), h.shape))
alike("noise_of_units", lambda h: h * jax.random.uniform(jax.random.key(1), h.shape[-1:]))
alike(
    "filled",
    lambda h: (
        h + jnp.take(h, np.array([0, 1, 99, 3]), axis=1, mode="fill", fill_value=2.0).sum(1, keepdims=True)
    ),
)
alike("ones_before", lambda h: jnp.pad(h, ((0, 0), (1, 0), (0, 0)), constant_values=1.0)[:, :TIME])
alike("along", lambda h: jnp.take_along_axis(h, np.array(INTERLEAVED)[None, :, None], 1))


def if_odd(h, a, b):
    """What code chooses by whether the width is odd."""
    return a if h.shape[-1] % 2 else b


def gain(h):
    """A value without units, by which units may be multiplied."""
    return jnp.sin(h.sum(-1, keepdims=True))


# In these the programs for odd and even widths differ in one thing alone
alike("ordered", lambda h: (lambda a, b: if_odd(h, a - b, b - a))(jnp.sin(h), jnp.cos(h)))
alike("constant_or_value", lambda h: (
    lambda a: h * if_odd(h, a, np.full((BATCH, TIME, 1), 2.0)) + a)(gain(h)))  # fmt: skip
alike(
    "exponent_of_other_type",
    lambda h: jax.lax.pow(jnp.exp(jnp.sin(h)), np.full(h.shape, 2).view(if_odd(h, "f8", "i8"))),
)
alike("padded_evenly", lambda h: h + jnp.pad(h, ((0, 0), if_odd(h, (0, 2), (2, 0)), (0, 0)))[:, 1 : TIME + 1])
alike("shuffled_gain", lambda h: h * jax.lax.broadcast_in_dim(gain(h)[..., 0], h.shape, (0, 1)).reshape(
    BATCH, if_odd(h, 2, 3), -1, h.shape[-1]).swapaxes(1, 2).reshape(h.shape))  # fmt: skip
alike("reduced", lambda h: h * reduced(gain(h), if_odd(h, 2.0, 3.0)))
alike("scaled_in_loop", lambda h: jax.lax.fori_loop(0, 3, lambda i, h: h / h.shape[-1] ** 0.5, h))
alike("swapped", lambda h: jax.lax.fori_loop(
    0, 3, lambda i, c: (jnp.sin(c[0]), jnp.cos(c[1]))[:: if_odd(h, 1, -1)], (h, h))[0])  # fmt: skip
alike("more_parts", lambda h: h * cat(*[gain(h)] * if_odd(h, 2, 3)).sum(-1, keepdims=True))


def reduced(h, scale):
    return jax.lax.reduce(h, np.float64(0), lambda a, b: a + b * scale, (1,))[:, None]


@part
def divisible(width, rng):
    n = int(rng.choice([2, 3, 4]))

    def fn(p, h):
        if h.shape[-1] % n:
            raise ValueError("the width must be divisible")
        return h / h.shape[-1]

    return {}, fn, width


def program(rng: np.random.Generator, names: list[str] | None = None) -> tuple[Any, Any, Any, list[str]]:
    """Draws a program: its function, its parameters, an input, and the names of its parts."""
    for _ in range(100):
        try:
            return _program(rng, names or list(map(str, rng.choice([*PARTS], rng.integers(1, 4)))))
        except (TypeError, ValueError, ZeroDivisionError):  # the widths do not go with the parts
            continue
    raise RuntimeError(f"no widths go with {names}")


def _program(rng: np.random.Generator, names: list[str]) -> tuple[Any, Any, Any, list[str]]:
    width = int(rng.choice(WIDTHS))
    shapes: dict[str, Any] = {"first": {"w": (FEATURES, width)}}
    plan = []
    for i, name in enumerate(names):
        given, fn, _ = PARTS[name](width, rng)
        shapes[f"{i}_{name}"] = given
        plan.append((f"{i}_{name}", fn))
        # The widths of most parts follow from their inputs
        width = jax.eval_shape(
            fn, _like(given), jax.ShapeDtypeStruct((BATCH, TIME, width), np.float64)
        ).shape[-1]
        if i + 1 < len(names) and rng.random() < 0.5:
            n = int(rng.choice(WIDTHS))
            shapes[f"{i}_between"] = {"w": (width, n), "b": (n,)}
            plan.append((f"{i}_between", lambda p, h: h @ p["w"] + p["b"]))
            width = n
    shapes["last"] = {"w": (width, 2)}

    def fn(p, x):
        h = x @ p["first"]["w"]
        for name, one in plan:
            h = _fit(one(p.get(name, {}), h))
        return (h @ p["last"]["w"]).mean(1)

    params = jax.tree.map(lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return fn, params, rng.normal(size=(BATCH, TIME, FEATURES)), names


def _like(shapes):
    return {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in shapes.items()}


def _fit(h):
    """Makes the time axis as long as it was."""
    return h if h.shape[1] == TIME else jnp.pad(h, ((0, 0), (0, TIME - h.shape[1]), (0, 0)))


def subset(graph, rng, names):
    """Random units of some of these groups."""
    kept = {}
    for name in names:
        size = graph.groups[name].size
        if len(names) == 1 or rng.random() < 0.8:
            kept[name] = np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False))
    return kept


def check(fn, params, x, rng, *, sets=3) -> tuple[list[str], Any, int]:
    """Returns what is wrong, the graph, and how many re-runs there were."""
    model = from_function(fn, params)
    graph = units.trace(model, x)
    exact = [name for name, group in graph.groups.items() if group.free and group.exact]
    shrunk = [name for name, g in graph.groups.items() if g.free and getattr(g, "exact_shrunk", g.exact)]
    wrong: list[str] = []
    cases = []
    for i in range(sets):
        names = exact if i < sets - 1 or not exact else [str(rng.choice(exact))]
        cases.append((subset(graph, rng, names), bool(exact)))
    if set(shrunk) - set(exact):
        cases.append((subset(graph, rng, shrunk), False))
    cases = [case for case in cases if case[0]]
    silent = [units.silence(graph, model, kept) for kept, _ in cases]
    smaller = [units.keep(graph, model, kept).replace(apply_fn=model.apply_fn) for kept, _ in cases]
    shrinks = [units.shrink(graph, model, kept) for kept, _ in cases]
    reran = 0

    def everything(silent, smaller, shrinks, x):
        nonlocal reran
        found = []
        for i, (_, again) in enumerate(cases):
            rerun = None
            if again:
                try:
                    rerun = smaller[i](x)
                    reran += 1
                except Exception:  # it does not run: then nothing is claimed
                    rerun = None
            found.append((silent[i](x), rerun, shrinks[i](x)))
        return found

    try:
        results = jax.jit(everything)(silent, smaller, shrinks, x)
    except Exception as error:
        return [f"shrink fails: {str(error)[:200]}"], graph, reran
    for (kept, _), (expected, rerun, small) in zip(cases, results, strict=True):
        for what, given in (("rerun", rerun), ("shrunk", small)):
            if given is None:
                continue
            if given.shape != expected.shape:
                wrong.append(f"{what}: shape {given.shape} for {expected.shape}, {kept}")
            elif not np.isfinite(expected).all():
                wrong.append("silenced is not finite")
            elif not np.allclose(given, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max()):
                error = np.abs(given - expected).max()
                wrong.append(
                    f"{what}: off by {error:.1e}, { ({k: list(map(int, v)) for k, v in kept.items()}) }"
                )
    return wrong, graph, reran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    tally: collections.Counter[str] = collections.Counter()
    reasons: collections.Counter[str] = collections.Counter()
    culprits: collections.Counter[str] = collections.Counter()
    start = time.process_time()
    for i in range(arguments.first, arguments.first + arguments.programs):
        rng = np.random.default_rng(i)
        # Each part alone first, then random rows of them
        names = [[*PARTS][i]] if i < len(PARTS) else None
        fn, params, x, names = program(rng, names)
        wrong, graph, reran = check(fn, params, x, rng)
        free = [group for group in graph.groups.values() if group.free]
        tally["programs"] += 1
        tally["free groups"] += len(free)
        tally["exact groups"] += sum(group.exact for group in free)
        tally["exact for shrink"] += sum(getattr(group, "exact_shrunk", group.exact) for group in free)
        tally["re-runs"] += reran
        for group in free:
            if getattr(group, "exact_shrunk", False) and not group.exact:
                reasons[group.reason] += 1
        for kind in {text.split(":")[0] for text in wrong}:
            tally[f"programs with {kind}"] += 1
            culprits.update((kind, name) for name in set(names))
        if wrong:
            print(i, names, wrong[0], sep="\t")
        if arguments.verbose:
            print(i, names, "\n", graph)
    for name, count in tally.items():
        print(f"{name}: {count}")
    print("seconds:", round(time.process_time() - start))
    print(*reasons.most_common(), sep="\n")
    print(*culprits.most_common(25), sep="\n")
    return bool(culprits)


if __name__ == "__main__":
    sys.exit(main())

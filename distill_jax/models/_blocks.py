"""What transformers are made of: tables, norms, attention and feed-forward parts; and the checks of their inputs."""

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import check_integers, shown
from distill_jax._model import PyTree
from distill_jax.features.capturing import name_values, naming

DTYPES = ("float32", "bfloat16")

# --- parameters ----------------------------------------------------------------------------------


def check_dtype(name: str, dtype: DTypeLike | None) -> np.dtype:
    """Returns the dtype; raises ``ValueError`` unless it is one that parameters may have."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or found.name not in DTYPES:
        raise ValueError(f"{name} must be float32 or bfloat16, got {shown(dtype)}")
    return found


class Drawer:
    """Draws the parameters of one network: normal with standard deviation 0.02, biases 0, scales 1."""

    def __init__(self, key: Array, dtype: DTypeLike):
        self.key, self.dtype, self.numbers = key, dtype, itertools.count()

    def table(self, *shape: Any, scale: float = 1.0) -> Array:
        """Draws an array, with ``scale`` times the standard deviation."""
        normal = jax.random.normal(jax.random.fold_in(self.key, next(self.numbers)), shape)
        return (0.02 * scale * normal).astype(self.dtype)

    def linear(self, inputs: Any, outputs: Any, bias: bool = True, scale: float = 1.0) -> PyTree:
        """Draws a linear map between axes of these sizes."""
        kernel = {"kernel": self.table(*inputs, *outputs, scale=scale)}
        return kernel | ({"bias": jnp.zeros(outputs, self.dtype)} if bias else {})

    def norm(self, kind: str, size: Any) -> PyTree:
        """Makes the parameters of a norm."""
        bias = {"bias": jnp.zeros(size, self.dtype)} if kind == "layer" else {}
        return {"scale": jnp.ones(size, self.dtype)} | bias


# --- inputs --------------------------------------------------------------------------------------


def read_inputs(x: PyTree, *further: str) -> dict[str, Any]:
    """Checks the input of a transformer.

    Args:
      x: tokens, or a dict with ``"tokens"`` and perhaps ``"segments"`` and ``further`` entries.
      further: the names of the entries that the network takes beyond these two.

    Returns:
      All of these entries. Without segments there is one; a further entry that is absent is None.

    Raises:
      ValueError: if an entry is none of these, or no integers ``[batch, length]``.
    """
    entries = x if isinstance(x, Mapping) else {"tokens": x}
    names = ("tokens", "segments", *further)
    if "tokens" not in entries or entries.keys() - set(names):
        optional = " and ".join(map(repr, names[1:]))
        raise ValueError(
            f"x must be tokens, or a dict with 'tokens' and perhaps {optional}, got {sorted(entries)}"
        )
    check_integers("tokens", entries["tokens"])
    shape = np.shape(entries["tokens"])
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"tokens must have shape [batch, length] with length ≥ 1, got {shape}")
    for name, value in entries.items():
        if name != "segments" or getattr(value, "dtype", None) != np.bool_:
            check_integers(name, value)
        if np.shape(value) != shape:
            raise ValueError(f"{name} must have the shape of the tokens, {shape}, got {np.shape(value)}")
    found: dict[str, Any] = {name: jnp.asarray(entries[name]) if name in entries else None for name in names}
    segments = found["segments"]
    return found | {
        "segments": jnp.ones(shape, jnp.int32) if segments is None else segments.astype(jnp.int32)
    }


def count_positions(segments: Array) -> Array:
    """Counts from 0 in each run of equal segments, ``[batch, length]``; 0 at padding."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    # Slices and a concatenation also where the batch has a symbolic size; jnp's indexing and padding are not
    before = jax.lax.slice_in_dim(segments, 0, -1, axis=1)
    after = jax.lax.slice_in_dim(segments, 1, None, axis=1)
    begins = jnp.concatenate([jnp.zeros((segments.shape[0], 1), bool), after != before], 1)
    # float32 is exact up to 2²⁴, and ONNX Runtime has no running maximum of integers
    starts = jax.lax.cummax(jnp.where(begins, index, 0).astype(jnp.float32), axis=1).astype(index.dtype)
    return jnp.where(segments == 0, 0, index - starts)


def check_one_text(name: str, segments: Array) -> None:
    """Raises ``ValueError`` if a row holds two texts. Traced segments pass."""
    if isinstance(segments, jax.core.Tracer):
        return
    given = np.asarray(segments)
    most = np.where(given == 0, np.iinfo(given.dtype).min, given).max(1, keepdims=True)
    if ((given != 0) & (given != most)).any():
        raise ValueError(f"{name} must have one text per row, got two: give each text a row of its own")


def check_indices(name: str, index: Any, table: Array, what: str) -> None:
    """Raises ``ValueError`` if a number is no row of the table. Traced numbers pass."""
    if isinstance(index, jax.core.Tracer) or not np.size(index):
        return
    least, most = int(index.min()), int(index.max())
    if least < 0 or most >= table.shape[0]:
        raise ValueError(f"{name} must lie in [0, {table.shape[0]}), {what}, got {least} to {most}")


def check_length(positions: Array, length: int) -> None:
    """Raises ``ValueError`` if a table of learned positions is shorter than a text."""
    if length > positions.shape[0]:
        raise ValueError(
            f"the length must be at most {positions.shape[0]}, the number of learned positions, got {length}"
        )


def look_up(table: Array, index: Array) -> Array:
    """Takes rows of a table. A row that does not exist is NaN, where another one would be taken silently."""
    return table.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


# --- computation ---------------------------------------------------------------------------------


def named(name: str, x: Array) -> Array:
    """Gives a value a name for captures."""
    return name_values(name, x) if naming() else x


def wide(x: Array) -> np.dtype:
    """The dtype of norms, softmax and logits: float32 at least."""
    return jnp.promote_types(x.dtype, jnp.float32)


def put(old: Array, new: Array, start: ArrayLike) -> Array:
    """Writes ``[batch, length, ...]`` into a longer array."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


def norm(params: PyTree, x: Array, eps: float, kind: str) -> Array:
    """LayerNorm or RMSNorm over the last axis, in float32 at least."""
    y = x.astype(wide(x))
    if kind == "layer":
        y -= y.mean(-1, keepdims=True)
    y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    y *= params["scale"]
    return (y + params["bias"] if "bias" in params else y).astype(x.dtype)


def linear(params: PyTree, x: Array, equation: str) -> Array:
    """A linear map, with a bias where there is one."""
    y = jnp.einsum(equation, x, params["kernel"])
    return y + params["bias"] if "bias" in params else y


def rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    """Turns the features of heads by cosines and sines ``[batch, length, 1, head_size / 2]``."""
    cos, sin = turn
    a, b = jnp.split(x.astype(wide(x)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def attention(
    params: PyTree,
    x: Array,
    visible: Array,
    *,
    scale: float,
    name: str,
    eps: float = 0.0,
    turn: tuple[Array, Array] | None = None,
    past: tuple[Array, Array, Any] | None = None,
) -> tuple[Array, Array, Array]:
    """Attention with as many heads of keys and values as the arrays have.

    Args:
      params: ``query``, ``key``, ``value``, ``output``, and perhaps ``query_norm`` and ``key_norm``.
      x: ``[batch, length, width]``.
      visible: ``[batch, length, keys]``: which keys a token sees, at least one.
      scale: the factor of the scores.
      name: that of the part, for captures.
      eps: that of the norms of queries and keys.
      turn: rotary positions, see :func:`rotate`.
      past: earlier keys and values ``[batch, keys, kv_heads, head_size]``, and the place of the new ones.

    Returns:
      What is added to the residual stream, and all keys and values.
    """
    query, key, value = (linear(params[part], x, "btw,whd->bthd") for part in ("query", "key", "value"))
    if "query_norm" in params:
        query = norm(params["query_norm"], query, eps, "rms")
        key = norm(params["key_norm"], key, eps, "rms")
    if turn is not None:
        query, key = rotate(query, turn), rotate(key, turn)
    if past is not None:
        key, value = put(past[0], key, past[2]), put(past[1], value, past[2])
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=wide(x))
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores * scale, -jnp.inf), axis=-1)
    if naming():
        shape = (batch, heads, length, key.shape[1])
        weights = named(f"{name}.weights", weights.reshape(shape)).reshape(weights.shape)
    y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    return linear(params["output"], y.reshape(batch, length, heads, -1), "bthd,hdw->btw"), key, value


def feed_forward(params: PyTree, x: Array, *, approximate: bool = True) -> Array:
    """SwiGLU where there is a gate; otherwise GELU, with or without tanh's approximation."""
    up = linear(params["up"], x, "btw,wh->bth")
    if "gate" in params:
        inner = jax.nn.silu(linear(params["gate"], x, "btw,wh->bth")) * up
    else:
        inner = jax.nn.gelu(up, approximate=approximate)
    return linear(params["down"], inner, "bth,hw->btw")

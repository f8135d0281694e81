"""A cache of keys and values, by which a transformer computes only what is new of a text."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax._checks import check_count
from distill_jax._model import Model, PyTree
from distill_jax.models import _blocks
from distill_jax.models.transformer import forward, transformer_fn


def init_cache(model: Model, batch: int, capacity: int) -> dict[str, Any]:
    """Makes an empty cache of keys and values, for :func:`extend`.

    Args:
      model: a transformer.
      batch: the number of rows.
      capacity: the number of tokens for which each row has room.

    Returns:
      A dict: ``"keys"`` and ``"values"``, one array ``[batch, capacity, kv_heads, head_size]`` per layer in the dtype
      of the parameters; ``"segments"``, int32 ``[batch, capacity]``; ``"length"``, int32, the number of tokens so far.

    Raises:
      ValueError: if ``model`` is no transformer, a number is not positive, or there are fewer learned positions than
        ``capacity``.
    """
    transformer_fn("model", model)
    check_count("batch", batch)
    check_count("capacity", capacity)
    if "positions" in model.params:
        _blocks.check_length(model.params["positions"], capacity)
    shapes = [
        (batch, capacity, *layer["attention"]["key"]["kernel"].shape[1:]) for layer in model.params["layers"]
    ]
    dtype = model.params["embedding"].dtype
    return {
        "keys": [jnp.zeros(shape, dtype) for shape in shapes],
        "values": [jnp.zeros(shape, dtype) for shape in shapes],
        "segments": jnp.zeros((batch, capacity), jnp.int32),
        "length": jnp.zeros((), jnp.int32),
    }


def extend(model: Model, x: PyTree, cache: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
    """Computes the outputs of further tokens from those before them, whose keys and values are cached.

    The outputs are those that the model gives for these tokens in the whole text.

    Args:
      model: a transformer.
      x: the next tokens, ``[batch, length]`` with length ≥ 1, in the form that the model takes. Where there is no entry
        ``"positions"``, they are counted from 0 at the first cached token of the segment.
      cache: what :func:`init_cache` or an earlier call gave.

    Returns:
      Logits ``[batch, length, vocabulary]``, or hidden states, and the new cache.

    Raises:
      ValueError: if ``model`` is no transformer, the input is not of that form, or the cache has no room for it. (Under
        ``jit`` the length of the cache is not known: then the outputs are NaN.)

    >>> from distill_jax.models import TransformerConfig, build_transformer
    >>> config = TransformerConfig(vocabulary=50, width=8, layers=1, heads=2, hidden=16)
    >>> model = build_transformer(config, jax.random.key(0))
    >>> text = jnp.array([[7, 8, 9]])
    >>> _, cache = extend(model, text[:, :2], init_cache(model, 1, 3))
    >>> logits, cache = extend(model, text[:, 2:], cache)
    >>> bool(jnp.allclose(logits, model(text)[:, 2:], atol=1e-6))
    True
    """
    function = transformer_fn("model", model)
    inputs = _blocks.read_inputs(x, "positions")
    new, (rows, room) = inputs["tokens"].shape, cache["segments"].shape
    if new[0] != rows:
        raise ValueError(f"x must have as many rows as the cache, {rows}, got {new[0]}")
    used = 0 if isinstance(cache["length"], jax.core.Tracer) else int(cache["length"])
    if used + new[1] > room:
        raise ValueError(
            f"cache has room for {room} tokens, but {used} and {new[1]} were given: make a larger one with init_cache"
        )
    hidden, longer = forward(function.config, model.params, inputs, cache)
    return function.outputs(model.params, hidden), longer

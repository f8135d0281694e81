"""What a model keeps of a text, so that it computes only what is new: keys and values, or a recurrent state."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from distill_jax._checks import check_count
from distill_jax._model import Model, PyTree, check_model
from distill_jax.models import _blocks
from distill_jax.models.recurrent import DecoderFn, continue_text, empty_cache
from distill_jax.models.transformer import forward, transformer_fn


def init_cache(model: Model, batch: int, capacity: int) -> dict[str, Any]:
    """Makes an empty cache, for :func:`extend`: of keys and values, or of a recurrent decoder's state.

    Args:
      model: a transformer, or a recurrent decoder of :func:`given_source`.
      batch: the number of rows.
      capacity: the number of tokens for which each row has room.

    Returns:
      A dict: ``"keys"`` and ``"values"``, one array ``[batch, capacity, kv_heads, head_size]`` per layer in the dtype
      of the parameters; ``"segments"``, int32 ``[batch, capacity]``; ``"length"``, int32, the number of tokens so far.
      Of a recurrent decoder ``"state"``, ``[batch, hidden]``, and ``"segment"``, int32 ``[batch]``, that of the last
      token, 0 before the first; it has room for any number of tokens.

    Raises:
      ValueError: if ``model`` is another, a number is not positive, there are fewer learned positions than
        ``capacity``, or ``batch`` is not the number of sources.
    """
    check_count("batch", batch)
    check_count("capacity", capacity)
    check_model("model", model)
    if isinstance(model.apply_fn, DecoderFn):
        start = model.params["start"]
        if batch != len(start):
            raise ValueError(f"batch must be {len(start)}, the number of sources, got {batch}")
        return empty_cache(start)
    transformer_fn("model", model)
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
    """Computes the outputs of further tokens from what is cached of those before them.

    The outputs are those that the model gives for these tokens in the whole text.

    Args:
      model: a transformer, or a recurrent decoder of :func:`given_source`.
      x: the next tokens, ``[batch, length]`` with length ≥ 1, in the form that the model takes. Where there is no entry
        ``"positions"``, they are counted from 0 at the first cached token of the segment.
      cache: what :func:`init_cache` or an earlier call gave.

    Returns:
      Logits ``[batch, length, vocabulary]``, or hidden states, and the new cache.

    Raises:
      ValueError: if ``model`` is another, the input is not of that form, or the cache has no room for it. (Under
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
    check_model("model", model)
    if isinstance(model.apply_fn, DecoderFn):
        return continue_text(model.params["network"], model.params["start"], x, cache)
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

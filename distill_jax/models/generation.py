"""Text from a causal model: greedy, with a temperature, or from the likeliest tokens alone."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import (
    check_choice,
    check_count,
    check_fraction,
    check_key,
    check_not_negative,
    check_sequence,
    is_integer,
    shown,
)  # fmt: skip
from distill_jax._model import Model, PyTree, check_model
from distill_jax.models import _blocks
from distill_jax.models.cache import extend, init_cache
from distill_jax.models.recurrent import DecoderFn
from distill_jax.models.transformer import TransformerFn, hidden_states, transformer_fn

TINY = float(np.finfo(np.float32).tiny)  # a smaller temperature is 0


def generate(
    model: Model,
    prompts: PyTree,
    *,
    key: Array | None = None,
    length: int,
    temperature: ArrayLike = 1.0,
    top_p: ArrayLike = 1.0,
    stops: tuple[int, ...] = (),
    pad: int = 0,
    cached: bool = True,
) -> dict[str, Array]:
    """Continues a batch of prompts token by token, in one compiled program.

    The result has the form that a transformer takes as its input: ``teacher(samples)`` scores it, and
    ``samples["segments"][:, -length:] != 0`` says which new tokens count. It can be called inside ``jit``, with
    ``length``, ``stops``, ``pad`` and ``cached`` fixed, for example as a part of a training step. No gradient passes
    through.

    Args:
      model: a transformer, or a recurrent decoder of :func:`given_source`; without the cache, any model that takes
        such a dict and returns causal logits ``[batch, length, vocabulary]``.
      prompts: the input of the model, ``[batch, prompt length]``: tokens, or a dict with ``"tokens"`` and
        ``"segments"``. Shorter prompts are padded on the left, where their segments are 0 (or False). What is generated
        continues the segment and the positions of a prompt's last token.
      key: a random key for all draws. It may be None where ``temperature`` is 0.
      length: the number of tokens to generate at most.
      temperature: logits are divided by it. 0 takes the likeliest token each time (greedy).
      top_p: draws from the smallest set of likeliest tokens that has at least this probability, in (0, 1]. 1 draws
        from all. Ties with the least likely token of the set are kept.
      stops: tokens that end a text. A text keeps its stop and is padded after it; where all texts have ended,
        generation ends.
      pad: the token that fills up a text after its stop.
      cached: whether keys and values of earlier tokens, or a recurrent state, are kept. Otherwise the whole text is
        computed again for each token.

    Returns:
      A dict of int32 arrays ``[batch, prompt length + length]``: ``"tokens"``, the prompts and what follows;
      ``"segments"``, 0 where there is padding, before a prompt and after a stop; and ``"positions"``.

    Raises:
      ValueError: if an argument is not of that form, a prompt ends with padding, or a transformer has too few learned
        positions.

    References:
      Holtzman et al., `The Curious Case of Neural Text Degeneration`, 2020, Eq. 2 and 3 (top-p).

    >>> from distill_jax.models import TransformerConfig, build_transformer
    >>> config = TransformerConfig(vocabulary=50, width=8, layers=1, heads=2, hidden=16)
    >>> model = build_transformer(config, jax.random.key(0))
    >>> prompts = {"tokens": jnp.array([[0, 7], [8, 9]]), "segments": jnp.array([[0, 1], [1, 1]])}
    >>> samples = generate(model, prompts, length=3, key=jax.random.key(1), top_p=0.9)
    >>> print(samples["tokens"].shape, samples["positions"][0])
    (2, 5) [0 0 1 2 3]
    """
    check_model("model", model)
    check_choice("cached", cached, (True, False))
    function = model.apply_fn
    if cached and not isinstance(function, DecoderFn):
        transformer_fn("model", model)
    known = isinstance(function, TransformerFn)
    if isinstance(function, TransformerFn) and not function.head:
        raise ValueError("model must return logits, got one of models.hidden_states")
    inputs = _blocks.read_inputs(prompts, "positions")
    segments = inputs["segments"]
    check_count("length", length)
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if np.ndim(value):
            raise ValueError(f"{name} must be one number, got shape {np.shape(value)}")
    check_not_negative("temperature", temperature)
    check_fraction("top_p", top_p, without=0)
    greedy = not isinstance(temperature, jax.core.Tracer) and bool(np.asarray(temperature) < TINY)
    if key is not None:
        check_key("key", key)
    elif not greedy:
        raise ValueError("key must be a random key where temperature is not 0, got None")
    check_sequence("stops", stops, "tokens")
    for name, token in (*(("stops", stop) for stop in stops), ("pad", pad)):
        if not is_integer(token) or token < 0:
            raise ValueError(f"{name} must be tokens, integers from 0, got {shown(token)}")
    if not isinstance(segments, jax.core.Tracer) and (np.asarray(segments)[:, -1] == 0).any():
        raise ValueError("prompts must be padded on the left, but a prompt ends with padding (segment 0)")
    if known:
        table = model.params["embedding"]
        _blocks.check_indices("tokens", inputs["tokens"], table, "the vocabulary")
        _blocks.check_indices("pad", np.asarray(pad), table, "the vocabulary")
    if inputs["positions"] is None:
        inputs["positions"] = _blocks.count_positions(segments)
    nucleus = isinstance(top_p, jax.core.Tracer) or bool(np.asarray(top_p) < 1)
    return _generate(
        model,
        inputs,
        jax.random.key(0) if key is None else key,
        1.0 if greedy else temperature,
        top_p,
        jnp.asarray(stops, jnp.int32),
        pad,
        length=length,
        greedy=greedy,
        nucleus=nucleus,
        cached=cached,
    )


@functools.partial(jax.jit, static_argnames=("length", "greedy", "nucleus", "cached"))
def _generate(
    model: Model,
    prompts: dict[str, Array],
    key: Array,
    temperature: ArrayLike,
    top_p: ArrayLike,
    stops: Array,
    pad: ArrayLike,
    *,
    length: int,
    greedy: bool,
    nucleus: bool,
    cached: bool,
) -> dict[str, Array]:
    batch, prompt = prompts["tokens"].shape
    room = jnp.zeros((batch, length), jnp.int32)
    text = {
        name: jnp.concatenate([value.astype(jnp.int32), room + (pad if name == "tokens" else 0)], 1)
        for name, value in prompts.items()
    }
    cache = None
    if cached:
        cache = init_cache(model, batch, prompt + length)
        if prompt > 1:  # the last token of the prompt is the first that the loop computes
            before = {name: value[:, :-1] for name, value in prompts.items()}
            recurrent = isinstance(model.apply_fn, DecoderFn)
            _, cache = extend(model if recurrent else hidden_states(model), before, cache)

    segment, position = (prompts[name][:, -1] for name in ("segments", "positions"))

    def unfinished(carry: Any) -> Array:
        step, _, done, _ = carry
        return (step < length) & ~done.all()

    def one(carry: Any) -> Any:
        step, text, done, cache = carry
        here = prompt - 1 + step
        if cached:
            now = {name: jax.lax.dynamic_slice_in_dim(value, here, 1, 1) for name, value in text.items()}
            logits, cache = extend(model, now, cache)
            logits = logits[:, 0]
        else:
            logits = jax.lax.dynamic_index_in_dim(model(text), here, 1, keepdims=False)
        if greedy:
            token = jnp.argmax(logits, -1)
        else:
            # The largest is 0, so that a small temperature makes no two logits infinite
            warm = logits.astype(_blocks.wide(logits)) - logits.max(-1, keepdims=True)
            warm /= jnp.maximum(temperature, TINY)
            warm = _likeliest(warm, top_p) if nucleus else warm
            token = jax.random.categorical(jax.random.fold_in(key, step), warm)
            token = jnp.where(jnp.less(temperature, TINY), jnp.argmax(logits, -1), token)
        new = {
            "tokens": jnp.where(done, pad, token),
            "segments": jnp.where(done, 0, segment),
            "positions": jnp.where(done, 0, position + 1 + step),
        }
        text = {
            name: jax.lax.dynamic_update_slice_in_dim(
                value, new[name].astype(jnp.int32)[:, None], here + 1, axis=1
            )
            for name, value in text.items()
        }
        return step + 1, text, done | (token[:, None] == stops).any(-1), cache

    start = (jnp.zeros((), jnp.int32), text, jnp.zeros(batch, bool), cache)
    return jax.lax.while_loop(unfinished, one, start)[1]


def _likeliest(logits: Array, top_p: ArrayLike) -> Array:
    """Removes the tokens whose likelier ones have together at least the probability ``top_p``."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    shares = jax.nn.softmax(ordered, axis=-1)
    kept = jnp.cumsum(shares, axis=-1) - shares < top_p
    least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)

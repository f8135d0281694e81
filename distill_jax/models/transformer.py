"""Causal transformers for text, as Llama, Qwen2, Qwen3 and GPT-2 are built, with a cache for generation."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import (
    check_choice,
    check_count,
    check_integers,
    check_key,
    check_positive,
    shown,
)  # fmt: skip
from distill_jax._model import Model, PyTree, check_model
from distill_jax.features.capturing import name_values, naming

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How Llama 3.1 stretches rotary positions for texts longer than those of its first training.

    Slow rotations are slowed down further by ``factor``, fast ones are kept, and between the two is a smooth
    passage.

    Attributes:
      factor: by how much slow rotations are slowed down.
      low_frequency: rotations with fewer periods than this in ``length`` tokens are slow.
      high_frequency: rotations with more periods than this in ``length`` tokens are fast.
      length: the number of tokens of the texts of the first training.

    Raises:
      ValueError: if a number is not positive, or ``high_frequency`` is not above ``low_frequency``.
    """

    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    length: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_frequency", "high_frequency"):
            check_positive(name, getattr(self, name))
        check_count("length", self.length)
        if self.high_frequency <= self.low_frequency:
            raise ValueError(
                f"high_frequency must be above low_frequency, got {self.high_frequency} and {self.low_frequency}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The architecture of a causal transformer.

    The defaults are Llama's. Qwen2 has ``qkv_bias=True``, Qwen3 ``qk_norm=True``. GPT-2 has ``norm="layer"``,
    ``norm_eps=1e-5``, ``positions="learned"``, ``feed_forward="gelu"`` and all three biases.

    Attributes:
      vocabulary: the number of tokens.
      width: the number of features of a token between the layers (``hidden_size`` in transformers).
      layers: the number of layers.
      heads: the number of heads of queries.
      hidden: the number of units of each feed-forward part (``intermediate_size``).
      kv_heads: the number of heads of keys and values, of which ``heads`` is a multiple; None means ``heads``.
      head_size: the number of features of a head; None means ``width / heads``.
      norm: ``"rms"`` (RMSNorm) or ``"layer"`` (LayerNorm with a bias), before each part of a layer and at the end.
      norm_eps: what is added to the mean square before its root is taken.
      positions: ``"rotary"``, or ``"learned"``: a table that is added to the embedding.
      rope_theta: the base of the wavelengths of rotary positions.
      rope_scaling: Llama 3.1's stretching of rotary positions; None is without.
      max_length: the number of learned positions. Rotary positions have no limit; this number is only written into
        files for transformers.
      feed_forward: ``"swiglu"``, (silu(x·gate) ⊙ x·up)·down, or ``"gelu"``, gelu(x·up)·down with tanh's
        approximation.
      qk_norm: whether RMSNorm over the features of a head precedes the rotation of queries and keys.
      qkv_bias: whether queries, keys and values have biases.
      output_bias: whether the attention's output has a bias.
      feed_forward_bias: whether the feed-forward part has biases.
      tied: whether the head is the transposed embedding.

    Raises:
      ValueError: if a value is not of that form.

    References:
      Touvron et al., `LLaMA: Open and Efficient Foundation Language Models`, 2023, §2.2; Su et al., `RoFormer`,
      2021, Eq. 34 (in the order of halves); Ainslie et al., `GQA`, 2023; Shazeer, `GLU Variants Improve
      Transformer`, 2020, Eq. 6; Qwen team, `Qwen3 Technical Report`, 2025, §2; Radford et al., `Language Models are
      Unsupervised Multitask Learners`, 2019, §2.3.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    kv_heads: int | None = None
    head_size: int | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_length: int = 2048
    feed_forward: Literal["swiglu", "gelu"] = "swiglu"
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "hidden", "max_length"):
            check_count(name, getattr(self, name))
        kv_heads, head_size = self.kv_heads, self.head_size
        if kv_heads is None:
            kv_heads = self.heads
        check_count("kv_heads", kv_heads)
        if self.heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {kv_heads}")
        if head_size is None:
            if self.width % self.heads:
                raise ValueError(
                    f"width must be a multiple of heads where no head_size is given, got {self.width} and {self.heads}"
                )
            head_size = self.width // self.heads
        check_count("head_size", head_size)
        object.__setattr__(self, "kv_heads", kv_heads)  # the fields are frozen
        object.__setattr__(self, "head_size", head_size)
        check_choice("norm", self.norm, ("rms", "layer"))
        check_choice("positions", self.positions, ("rotary", "learned"))
        check_choice("feed_forward", self.feed_forward, ("swiglu", "gelu"))
        if self.positions == "rotary" and head_size % 2:
            raise ValueError(f"head_size must be even for rotary positions, got {head_size}")
        check_positive("norm_eps", self.norm_eps)
        check_positive("rope_theta", self.rope_theta)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ValueError(f"rope_scaling must be a models.RopeScaling, got {shown(self.rope_scaling)}")
        for name in ("qk_norm", "qkv_bias", "output_bias", "feed_forward_bias", "tied"):
            check_choice(name, getattr(self, name), (True, False))


def build_transformer(config: TransformerConfig, key: Array, *, dtype: DTypeLike = jnp.float32) -> Model:
    """Builds and initialises a causal transformer as a :class:`~distill_jax.models.Model`.

    The model's input is an integer array ``[batch, length]`` of tokens, or a dict of arrays ``[batch, length]``:

    - ``"tokens"``, integers;
    - ``"segments"``, integers or bool: which text a token belongs to. A token sees itself and the earlier tokens of
      its own segment. So texts that are packed into one row do not see each other, and 0 (False) marks padding, on
      whichever side. A mask of transformers, 1 for tokens and 0 for padding, can be given as it is. The tokens of a
      segment stand next to each other. Without this entry there is one segment.
    - ``"positions"``, integers: the position of a token in its text. Without this entry it is counted from 0 in
      each segment.

    The output is logits ``[batch, length, vocabulary]``, float32 for bfloat16 parameters too. Norms, the softmax of the
    attention and the logits are computed in float32, everything else in the dtype of the parameters. What padding gets
    is meaningless, and finite. There is no dropout, so training and evaluation are the same.

    Sizes are read from the arrays, so layers may be left out, and heads or units removed:
    ``model.replace(params={**model.params, "layers": model.params["layers"][::2]})`` has every second layer.
    :func:`distill_jax.features.capture` finds ``embedding``, ``layers.0``, ``layers.0.attention``,
    ``layers.0.attention.weights`` ``[batch, heads, length, length]``, ``layers.0.feed_forward`` and so on, and
    ``norm``, the hidden states that the head receives.

    Args:
      config: the architecture.
      key: a random key that initialises the parameters: normal with standard deviation 0.02, and 0.02/√(2·layers)
        for what is added to the residual stream.
      dtype: float32 or bfloat16, the dtype of the parameters.

    Returns:
      The model, without state.

    Raises:
      ValueError: if an argument is not of that form; when the model is called, if its input is not.

    >>> config = TransformerConfig(vocabulary=50, width=8, layers=1, heads=4, kv_heads=2, hidden=16)
    >>> build_transformer(config, jax.random.key(0))(jnp.array([[7, 8, 9]])).shape
    (1, 3, 50)
    """
    if not isinstance(config, TransformerConfig):
        raise ValueError(f"config must be a models.TransformerConfig, got {type(config).__name__}")
    check_key("key", key)
    return Model(TransformerFn(config), init_params(config, key, check_dtype("dtype", dtype)), {})


def hidden_states(model: Model) -> Model:
    """Makes a transformer return the hidden states that its head receives, instead of logits.

    They and :func:`head_kernel` are what :func:`distill_jax.losses.tokens.chunked` takes, which never holds the logits
    of all tokens.

    Args:
      model: a transformer.

    Returns:
      A model with the same parameters whose outputs are ``[batch, length, width]``.

    Raises:
      ValueError: if ``model`` is no transformer.
    """
    function = transformer_fn("model", model)
    return model.replace(apply_fn=dataclasses.replace(function, head=False))


def head_kernel(model: Model) -> Array:
    """Returns the kernel of a transformer's head: logits are ``hidden states @ kernel``.

    Args:
      model: a transformer.

    Returns:
      ``[width, vocabulary]``, in the dtype of the parameters; the transposed embedding where the head is tied to it.

    Raises:
      ValueError: if ``model`` is no transformer.
    """
    transformer_fn("model", model)
    return _head(model.params)


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
    config = transformer_fn("model", model).config
    check_count("batch", batch)
    check_count("capacity", capacity)
    _check_length(config, model.params, capacity)
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
        ``"positions"``, they are counted on from the cached ones.
      cache: what :func:`init_cache` or an earlier call gave.

    Returns:
      Logits ``[batch, length, vocabulary]``, or hidden states, and the new cache.

    Raises:
      ValueError: if ``model`` is no transformer, the input is not of that form, or the cache has no room for it. (Under
        ``jit`` the length of the cache is not known: then nothing is checked, and later tokens would replace the last.)

    >>> config = TransformerConfig(vocabulary=50, width=8, layers=1, heads=2, hidden=16)
    >>> model = build_transformer(config, jax.random.key(0))
    >>> text = jnp.array([[7, 8, 9]])
    >>> _, cache = extend(model, text[:, :2], init_cache(model, 1, 3))
    >>> logits, cache = extend(model, text[:, 2:], cache)
    >>> bool(jnp.allclose(logits, model(text)[:, 2:], atol=1e-6))
    True
    """
    function = transformer_fn("model", model)
    tokens, segments, positions = read_inputs(x)
    rows, room = cache["segments"].shape
    if tokens.shape[0] != rows:
        raise ValueError(f"x must have as many rows as the cache, {rows}, got {tokens.shape[0]}")
    used = 0 if isinstance(cache["length"], jax.core.Tracer) else int(cache["length"])
    if used + tokens.shape[1] > room:
        raise ValueError(
            f"cache has room for {room} tokens, but {used} and {tokens.shape[1]} were given: make a larger one with "
            "init_cache"
        )
    hidden, longer = forward(function.config, model.params, tokens, segments, positions, cache)
    return (project(model.params, hidden) if function.head else hidden), longer


# --- what the public functions, the files and the generation are made of -------------------------


@dataclasses.dataclass(frozen=True)
class TransformerFn:
    """The ``apply_fn`` of a transformer; equal for equal configurations."""

    config: TransformerConfig
    head: bool = True

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None
    ) -> tuple[Array, PyTree]:
        """Computes logits, or hidden states without the head."""
        tokens, segments, positions = read_inputs(x)
        hidden, _ = forward(self.config, params, tokens, segments, positions)
        return (project(params, hidden) if self.head else hidden), state


def transformer_fn(name: str, model: Model) -> TransformerFn:
    """Returns a transformer's function; raises ``ValueError`` unless the model is one."""
    check_model(name, model)
    if not isinstance(model.apply_fn, TransformerFn):
        raise ValueError(
            f"{name} must be a transformer, of models.build_transformer or models.load_pretrained, got a model of "
            f"{shown(model.apply_fn)}"
        )
    return model.apply_fn


def check_dtype(name: str, dtype: DTypeLike | None) -> np.dtype:
    """Returns the dtype; raises ``ValueError`` unless it is one that parameters may have."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or found.name not in DTYPES:
        raise ValueError(f"{name} must be float32 or bfloat16, got {shown(dtype)}")
    return found


def init_params(config: TransformerConfig, key: Array, dtype: DTypeLike) -> PyTree:
    """Draws the parameters of an architecture."""
    numbers = itertools.count()
    heads, kv_heads = (config.heads, config.head_size), (config.kv_heads, config.head_size)

    def draw(*shape: Any, scale: float = 1.0) -> Array:
        normal = jax.random.normal(jax.random.fold_in(key, next(numbers)), shape)
        return (0.02 * scale * normal).astype(dtype)

    def linear(inputs: tuple[Any, ...], outputs: tuple[Any, ...], bias: bool, scale: float = 1.0) -> PyTree:
        kernel = {"kernel": draw(*inputs, *outputs, scale=scale)}
        return kernel | ({"bias": jnp.zeros(outputs, dtype)} if bias else {})

    def norm(kind: str, size: Any) -> PyTree:
        bias = {"bias": jnp.zeros(size, dtype)} if kind == "layer" else {}
        return {"scale": jnp.ones(size, dtype)} | bias

    def layer() -> PyTree:
        width, hidden, last = (config.width,), (config.hidden,), (2 * config.layers) ** -0.5
        attention = {
            "query": linear(width, heads, config.qkv_bias),
            "key": linear(width, kv_heads, config.qkv_bias),
            "value": linear(width, kv_heads, config.qkv_bias),
            "output": linear(heads, width, config.output_bias, last),
        }
        if config.qk_norm:
            attention |= {f"{name}_norm": norm("rms", config.head_size) for name in ("query", "key")}
        inner = ("gate", "up") if config.feed_forward == "swiglu" else ("up",)
        return {
            "attention_norm": norm(config.norm, config.width),
            "attention": attention,
            "feed_forward_norm": norm(config.norm, config.width),
            "feed_forward": {
                **{name: linear(width, hidden, config.feed_forward_bias) for name in inner},
                "down": linear(hidden, width, config.feed_forward_bias, last),
            },
        }

    params: dict[str, Any] = {"embedding": draw(config.vocabulary, config.width)}
    if config.positions == "learned":
        params["positions"] = draw(config.max_length, config.width)
    params["layers"] = [layer() for _ in range(config.layers)]
    params["norm"] = norm(config.norm, config.width)
    if not config.tied:
        params["head"] = linear((config.width,), (config.vocabulary,), bias=False)
    return params


def read_inputs(x: PyTree) -> tuple[Array, Array, Array | None]:
    """Checks the input of a transformer, and returns tokens, segments, and positions if they are given."""
    entries = x if isinstance(x, Mapping) else {"tokens": x}
    if "tokens" not in entries or entries.keys() - {"tokens", "segments", "positions"}:
        raise ValueError(
            f"x must be tokens, or a dict with 'tokens' and perhaps 'segments' and 'positions', got {sorted(entries)}"
        )
    check_integers("tokens", entries["tokens"])
    shape = np.shape(entries["tokens"])
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"tokens must have shape [batch, length] with length ≥ 1, got {shape}")
    segments = entries.get("segments")
    if segments is not None and getattr(segments, "dtype", None) != np.bool_:
        check_integers("segments", segments)
    positions = entries.get("positions")
    if positions is not None:
        check_integers("positions", positions)
    for name, value in (("segments", segments), ("positions", positions)):
        if value is not None and np.shape(value) != shape:
            raise ValueError(f"{name} must have the shape of the tokens, {shape}, got {np.shape(value)}")
    return (
        jnp.asarray(entries["tokens"]),
        jnp.ones(shape, jnp.int32) if segments is None else jnp.asarray(segments, jnp.int32),
        None if positions is None else jnp.asarray(positions),
    )


def count_positions(segments: Array) -> Array:
    """Counts from 0 in each run of equal segments, ``[batch, length]``; 0 at padding."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(segments == 0, 0, index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1))


def forward(
    config: TransformerConfig,
    params: PyTree,
    tokens: Array,
    segments: Array,
    positions: Array | None,
    cache: dict[str, Any] | None = None,
) -> tuple[Array, dict[str, Any]]:
    """Computes hidden states ``[batch, length, width]``, and all keys and values as a cache."""
    length = tokens.shape[1]
    start: Any = 0 if cache is None else cache["length"]
    known = segments if cache is None else _put(cache["segments"], segments, start)
    if positions is None:
        positions = jax.lax.dynamic_slice_in_dim(count_positions(known), start, length, axis=1)
    order = jnp.arange(known.shape[1]) <= start + jnp.arange(length)[:, None]
    # Padding sees padding, so no token sees nothing at all, which would make its softmax NaN
    visible = order & (segments[:, :, None] == known[:, None, :])
    _check_length(config, params, length)
    check_tokens(params, tokens)
    # A token that does not exist becomes NaN, where another index would be taken silently
    x = params["embedding"].at[tokens].get(mode="fill", fill_value=jnp.nan)
    if config.positions == "learned":
        x += params["positions"].at[positions].get(mode="fill", fill_value=jnp.nan)
    turn = _turn(config, positions) if config.positions == "rotary" else None
    x = _named("embedding", x)
    keys, values = [], []
    for i, layer in enumerate(params["layers"]):
        name = f"layers.{i}"
        past = None if cache is None else (cache["keys"][i], cache["values"][i], start)
        normed = _norm(layer["attention_norm"], x, config.norm_eps, config.norm)
        attended, key, value = _attention(
            config, layer["attention"], normed, turn, visible, past, f"{name}.attention"
        )
        x += _named(f"{name}.attention", attended)
        normed = _norm(layer["feed_forward_norm"], x, config.norm_eps, config.norm)
        x += _named(f"{name}.feed_forward", _feed_forward(layer["feed_forward"], normed))
        x = _named(name, x)
        keys.append(key)
        values.append(value)
    x = _named("norm", _norm(params["norm"], x, config.norm_eps, config.norm))
    return x, {"keys": keys, "values": values, "segments": known, "length": start + length}


def project(params: PyTree, hidden: Array) -> Array:
    """Computes logits, in float32 at least."""
    return jnp.matmul(hidden, _head(params), preferred_element_type=_wide(hidden))


def _head(params: PyTree) -> Array:
    return params["head"]["kernel"] if "head" in params else params["embedding"].T


def _named(name: str, x: Array) -> Array:
    return name_values(name, x) if naming() else x


def _wide(x: Array) -> np.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _put(old: Array, new: Array, start: ArrayLike) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=1)


def _check_length(config: TransformerConfig, params: PyTree, length: int) -> None:
    if config.positions == "learned" and length > params["positions"].shape[0]:
        raise ValueError(
            f"the length must be at most {params['positions'].shape[0]}, the number of learned positions, got {length}"
        )


def check_tokens(params: PyTree, tokens: Array) -> None:
    """Raises ``ValueError`` if a token does not exist. Traced tokens pass."""
    if isinstance(tokens, jax.core.Tracer) or not tokens.size:
        return
    least, most = int(tokens.min()), int(tokens.max())
    if least < 0 or most >= params["embedding"].shape[0]:
        raise ValueError(
            f"tokens must lie in [0, {params['embedding'].shape[0]}), the vocabulary, got {least} to {most}"
        )


def _norm(params: PyTree, x: Array, eps: float, kind: str) -> Array:
    wide = x.astype(_wide(x))
    if kind == "layer":
        wide -= wide.mean(-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + eps)
    wide *= params["scale"]
    return (wide + params["bias"] if "bias" in params else wide).astype(x.dtype)


def _turn(config: TransformerConfig, positions: Array) -> tuple[Array, Array]:
    """The cosines and sines of rotary positions, ``[batch, length, 1, head_size / 2]``."""
    frequency = config.rope_theta ** (-np.arange(0, config.head_size, 2) / config.head_size)  # type: ignore[operator]
    scaling = config.rope_scaling
    if scaling is not None:
        periods = scaling.length * frequency / (2 * np.pi)
        fast = (periods - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)
        fast = np.clip(fast, 0, 1)
        frequency *= fast + (1 - fast) / scaling.factor
    angle = positions[:, :, None, None] * frequency.astype(np.float32)
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: Array, turn: tuple[Array, Array]) -> Array:
    cos, sin = turn
    a, b = jnp.split(x.astype(_wide(x)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _linear(params: PyTree, x: Array, equation: str) -> Array:
    y = jnp.einsum(equation, x, params["kernel"])
    return y + params["bias"] if "bias" in params else y


def _attention(
    config: TransformerConfig,
    params: PyTree,
    x: Array,
    turn: tuple[Array, Array] | None,
    visible: Array,
    past: tuple[Array, Array, Any] | None,
    name: str,
) -> tuple[Array, Array, Array]:
    """Returns what is added to the residual stream, and all keys and values."""
    query, key, value = (_linear(params[part], x, "btw,whd->bthd") for part in ("query", "key", "value"))
    if "query_norm" in params:
        query = _norm(params["query_norm"], query, config.norm_eps, "rms")
        key = _norm(params["key_norm"], key, config.norm_eps, "rms")
    if turn is not None:
        query, key = _rotate(query, turn), _rotate(key, turn)
    if past is not None:
        key, value = _put(past[0], key, past[2]), _put(past[1], value, past[2])
    batch, length, heads, size = query.shape
    grouped = query.reshape(batch, length, key.shape[2], heads // key.shape[2], size)
    scores = jnp.einsum("btkgd,bskd->bkgts", grouped, key, preferred_element_type=_wide(x))
    scores = jnp.where(visible[:, None, None], scores * config.head_size**-0.5, -jnp.inf)  # type: ignore[operator]
    weights = jax.nn.softmax(scores, axis=-1)
    if naming():
        shape = (batch, heads, length, key.shape[1])
        weights = _named(f"{name}.weights", weights.reshape(shape)).reshape(weights.shape)
    y = jnp.einsum("bkgts,bskd->btkgd", weights.astype(value.dtype), value)
    return _linear(params["output"], y.reshape(batch, length, heads, -1), "bthd,hdw->btw"), key, value


def _feed_forward(params: PyTree, x: Array) -> Array:
    up = _linear(params["up"], x, "btw,wh->bth")
    if "gate" in params:
        inner = jax.nn.silu(_linear(params["gate"], x, "btw,wh->bth")) * up
    else:
        inner = jax.nn.gelu(up, approximate=True)
    return _linear(params["down"], inner, "bth,hw->btw")

"""Causal transformers for text, as Llama, Qwen2, Qwen3 and GPT-2 are built."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from distill_jax._checks import check_choice, check_count, check_key, check_positive, shown
from distill_jax._model import Model, PyTree, check_model
from distill_jax.models import _blocks


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
    function = TransformerFn(config)
    return Model(function, function.init(key, _blocks.check_dtype("dtype", dtype)), {})


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
        hidden, _ = forward(self.config, params, _blocks.read_inputs(x, "positions"))
        return self.outputs(params, hidden), state

    def outputs(self, params: PyTree, hidden: Array) -> Array:
        """Computes logits in float32 at least, or returns the hidden states without the head."""
        if not self.head:
            return hidden
        return jnp.matmul(hidden, _head(params), preferred_element_type=_blocks.wide(hidden))

    def init(self, key: Array, dtype: DTypeLike) -> PyTree:
        """Draws the parameters."""
        config, draw = self.config, _blocks.Drawer(key, dtype)
        heads, kv_heads = (config.heads, config.head_size), (config.kv_heads, config.head_size)
        width, hidden, last = (config.width,), (config.hidden,), (2 * config.layers) ** -0.5

        def layer() -> PyTree:
            attention = {
                "query": draw.linear(width, heads, config.qkv_bias),
                "key": draw.linear(width, kv_heads, config.qkv_bias),
                "value": draw.linear(width, kv_heads, config.qkv_bias),
                "output": draw.linear(heads, width, config.output_bias, last),
            }
            if config.qk_norm:
                attention |= {f"{name}_norm": draw.norm("rms", config.head_size) for name in ("query", "key")}
            inner = ("gate", "up") if config.feed_forward == "swiglu" else ("up",)
            return {
                "attention_norm": draw.norm(config.norm, width),
                "attention": attention,
                "feed_forward_norm": draw.norm(config.norm, width),
                "feed_forward": {
                    **{name: draw.linear(width, hidden, config.feed_forward_bias) for name in inner},
                    "down": draw.linear(hidden, width, config.feed_forward_bias, last),
                },
            }

        params: dict[str, Any] = {"embedding": draw.table(config.vocabulary, config.width)}
        if config.positions == "learned":
            params["positions"] = draw.table(config.max_length, config.width)
        params["layers"] = [layer() for _ in range(config.layers)]
        params["norm"] = draw.norm(config.norm, width)
        if not config.tied:
            params["head"] = draw.linear(width, (config.vocabulary,), bias=False)
        return params


def transformer_fn(name: str, model: Model) -> TransformerFn:
    """Returns a transformer's function; raises ``ValueError`` unless the model is one."""
    check_model(name, model)
    if not isinstance(model.apply_fn, TransformerFn):
        raise ValueError(
            f"{name} must be a transformer, of models.build_transformer or models.load_pretrained, got a model of "
            f"{shown(model.apply_fn)}"
        )
    return model.apply_fn


def forward(
    config: TransformerConfig, params: PyTree, x: dict[str, Any], cache: dict[str, Any] | None = None
) -> tuple[Array, dict[str, Any]]:
    """Computes hidden states ``[batch, length, width]``, and all keys and values as a cache."""
    tokens, segments, positions = x["tokens"], x["segments"], x["positions"]
    length = tokens.shape[1]
    start: Any = 0 if cache is None else cache["length"]
    known = segments if cache is None else _blocks.put(cache["segments"], segments, start)
    _blocks.check_indices("tokens", tokens, params["embedding"], "the vocabulary")
    hidden = _blocks.look_up(params["embedding"], tokens)
    if config.positions == "learned":
        _blocks.check_length(params["positions"], length)
        if positions is not None:
            _blocks.check_indices("positions", positions, params["positions"], "the learned ones")
    if positions is None:
        positions = jax.lax.dynamic_slice_in_dim(_blocks.count_positions(known), start, length, axis=1)
    if config.positions == "learned":
        hidden += _blocks.look_up(params["positions"], positions)
    turn = _turn(config, positions) if config.positions == "rotary" else None
    if cache is not None:  # new keys would replace earlier ones
        hidden = jnp.where(start + length > known.shape[1], jnp.nan, hidden)
    order = jnp.arange(known.shape[1]) <= start + jnp.arange(length)[:, None]
    # Padding sees padding, so no token sees nothing at all, which would make its softmax NaN
    visible = order & (segments[:, :, None] == known[:, None, :])
    hidden = _blocks.named("embedding", hidden)
    keys, values = [], []
    for i, layer in enumerate(params["layers"]):
        name = f"layers.{i}"
        attended, key, value = _blocks.attention(
            layer["attention"],
            _blocks.norm(layer["attention_norm"], hidden, config.norm_eps, config.norm),
            visible,
            scale=config.head_size**-0.5,  # type: ignore[operator]
            name=f"{name}.attention",
            eps=config.norm_eps,
            turn=turn,
            past=None if cache is None else (cache["keys"][i], cache["values"][i], start),
        )
        hidden += _blocks.named(f"{name}.attention", attended)
        normed = _blocks.norm(layer["feed_forward_norm"], hidden, config.norm_eps, config.norm)
        hidden += _blocks.named(f"{name}.feed_forward", _blocks.feed_forward(layer["feed_forward"], normed))
        hidden = _blocks.named(name, hidden)
        keys.append(key)
        values.append(value)
    hidden = _blocks.named("norm", _blocks.norm(params["norm"], hidden, config.norm_eps, config.norm))
    return hidden, {"keys": keys, "values": values, "segments": known, "length": start + length}


def _head(params: PyTree) -> Array:
    return params["head"]["kernel"] if "head" in params else params["embedding"].T


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

"""Encoders of text, as BERT and MiniLM are built, and embeddings of sentences made from them."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from distill_jax._checks import check_choice, check_count, check_key, check_positive, shown
from distill_jax._model import Model, PyTree, check_model
from distill_jax.models import _blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The architecture of an encoder of text: BERT's.

    Attributes:
      vocabulary: the number of tokens.
      width: the number of features of a token between the layers (``hidden_size`` in transformers).
      layers: the number of layers.
      heads: the number of heads, of which ``width`` is a multiple.
      hidden: the number of units of each feed-forward part (``intermediate_size``).
      max_length: the number of learned positions.
      types: the number of kinds of tokens, such as first and second sentence (``type_vocab_size``).
      norm_eps: what is added to the variance in LayerNorm.
      masked_head: whether the outputs are logits that guess masked tokens, by a dense layer, GELU, LayerNorm and the
        transposed embedding with a bias.

    Raises:
      ValueError: if a value is not of that form.

    References:
      Devlin et al., `BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding`, 2019, §3;
      Wang et al., `MiniLM`, 2020.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    max_length: int = 512
    types: int = 2
    norm_eps: float = 1e-12
    masked_head: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "hidden", "max_length", "types"):
            check_count(name, getattr(self, name))
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        check_positive("norm_eps", self.norm_eps)
        check_choice("masked_head", self.masked_head, (True, False))


def build_encoder(config: EncoderConfig, key: Array, *, dtype: DTypeLike = jnp.float32) -> Model:
    """Builds and initialises an encoder of text as a :class:`~distill_jax.models.Model`.

    The model's input is an integer array ``[batch, length]`` of tokens, or a dict of arrays ``[batch, length]``:

    - ``"tokens"``, integers;
    - ``"segments"``, integers or bool: which text a token belongs to. A token sees all tokens of its own segment, and 0
      (False) marks padding, on whichever side. Positions are counted from 0 in each segment. Without this entry there
      is one segment. The masks of transformers and of :func:`load_tokenizer` can be given as they are.
    - ``"types"``, integers: the kind of a token. Without this entry all are 0.

    The output is the last hidden states ``[batch, length, width]``, or with ``config.masked_head`` logits
    ``[batch, length, vocabulary]``, float32 for bfloat16 parameters too. Norms and the softmax of the attention are
    computed in float32, everything else in the dtype of the parameters. What padding gets is meaningless, and finite.
    There is no dropout, so training and evaluation are the same. Sizes are read from the arrays, as in
    :func:`build_transformer`, and :func:`distill_jax.features.capture` finds the same names.

    Args:
      config: the architecture.
      key: a random key that initialises the parameters: normal with standard deviation 0.02.
      dtype: float32 or bfloat16, the dtype of the parameters.

    Returns:
      The model, without state.

    Raises:
      ValueError: if an argument is not of that form; when the model is called, if its input is not.

    >>> config = EncoderConfig(vocabulary=50, width=8, layers=1, heads=2, hidden=16, max_length=4)
    >>> build_encoder(config, jax.random.key(0))(jnp.array([[7, 8, 9]])).shape
    (1, 3, 8)
    """
    if not isinstance(config, EncoderConfig):
        raise ValueError(f"config must be a models.EncoderConfig, got {type(config).__name__}")
    check_key("key", key)
    function = EncoderFn(config)
    return Model(function, function.init(key, _blocks.check_dtype("dtype", dtype)), {})


def sentence_embeddings(model: Model, *, normalise: bool = True) -> Model:
    """Makes an encoder return one embedding per text: the mean of the last hidden states of its tokens.

    Padding (segment 0) does not count. Each row holds one text; packed rows are refused unless they are traced. With
    the weights of a sentence encoder such as MiniLM these are the embeddings of sentence-transformers, whose dot
    products are cosine similarities. Some encoders take the first token instead of the mean, as their file
    ``1_Pooling/config.json`` says; that is ``model(x)[:, 0]``.

    Args:
      model: an encoder, of :func:`build_encoder` or :func:`load_pretrained`.
      normalise: whether the embeddings are scaled to length 1.

    Returns:
      A model with the same parameters whose outputs are ``[batch, width]``, float32.

    Raises:
      ValueError: if ``model`` is no encoder.

    References:
      Reimers and Gurevych, `Sentence-BERT`, 2019, §3.

    >>> config = EncoderConfig(vocabulary=50, width=8, layers=1, heads=2, hidden=16, max_length=4)
    >>> model = sentence_embeddings(build_encoder(config, jax.random.key(0)))
    >>> model({"tokens": jnp.array([[7, 8, 0]]), "segments": jnp.array([[1, 1, 0]])}).shape
    (1, 8)
    """
    check_model("model", model)
    if not isinstance(model.apply_fn, EncoderFn):
        raise ValueError(
            "model must be an encoder, of models.build_encoder or models.load_pretrained, got a model of "
            f"{shown(model.apply_fn)}"
        )
    check_choice("normalise", normalise, (True, False))
    pooling: Any = "normalised mean" if normalise else "mean"
    return model.replace(apply_fn=dataclasses.replace(model.apply_fn, pooling=pooling))


@dataclasses.dataclass(frozen=True)
class EncoderFn:
    """The ``apply_fn`` of an encoder; equal for equal configurations."""

    config: EncoderConfig
    pooling: Literal["mean", "normalised mean"] | None = None

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None
    ) -> tuple[Array, PyTree]:
        """Computes hidden states, logits or embeddings."""
        inputs = _blocks.read_inputs(x, "types")
        hidden = self.hidden(params, inputs)
        if self.pooling is not None:
            _blocks.check_one_text("segments", inputs["segments"])
            counts = (inputs["segments"] != 0)[..., None]
            # Not a product with 0: padding need not be finite
            total = jnp.where(counts, hidden, 0).astype(_blocks.wide(hidden)).sum(1)
            mean = total / jnp.maximum(counts.sum(1), 1)
            if self.pooling == "normalised mean":
                mean /= jnp.sqrt(jnp.maximum(jnp.square(mean).sum(-1, keepdims=True), 1e-24))
            return mean, state
        if self.config.masked_head:
            head = params["head"]
            inner = jax.nn.gelu(_blocks.linear(head["dense"], hidden, "btw,wv->btv"), approximate=False)
            inner = _blocks.norm(head["norm"], inner, self.config.norm_eps, "layer")
            kernel = params["embedding"].T
            hidden = jnp.matmul(inner, kernel, preferred_element_type=_blocks.wide(inner)) + head["bias"]
        return hidden, state

    def hidden(self, params: PyTree, x: dict[str, Any]) -> Array:
        """Computes the last hidden states ``[batch, length, width]``."""
        config = self.config
        _blocks.check_indices("tokens", x["tokens"], params["embedding"], "the vocabulary")
        _blocks.check_length(params["positions"], x["tokens"].shape[1])
        positions = _blocks.count_positions(x["segments"])
        types = jnp.zeros_like(x["tokens"]) if x["types"] is None else x["types"]
        _blocks.check_indices("types", types, params["types"], "the kinds that the model knows")
        hidden = _blocks.look_up(params["embedding"], x["tokens"])
        hidden += _blocks.look_up(params["types"], types) + _blocks.look_up(params["positions"], positions)
        hidden = _blocks.norm(params["embedding_norm"], hidden, config.norm_eps, "layer")
        hidden = _blocks.named("embedding", hidden)
        visible = x["segments"][:, :, None] == x["segments"][:, None, :]
        scale = (config.width // config.heads) ** -0.5
        for i, layer in enumerate(params["layers"]):
            name = f"layers.{i}"
            added, _, _ = _blocks.attention(
                layer["attention"], hidden, visible, scale=scale, name=f"{name}.attention"
            )
            hidden += _blocks.named(f"{name}.attention", added)
            hidden = _blocks.norm(layer["attention_norm"], hidden, config.norm_eps, "layer")
            added = _blocks.feed_forward(layer["feed_forward"], hidden, approximate=False)
            hidden += _blocks.named(f"{name}.feed_forward", added)
            hidden = _blocks.norm(layer["feed_forward_norm"], hidden, config.norm_eps, "layer")
            hidden = _blocks.named(name, hidden)
        return hidden

    def init(self, key: Array, dtype: DTypeLike) -> PyTree:
        """Draws the parameters."""
        config, draw = self.config, _blocks.Drawer(key, dtype)
        width, hidden, heads = (config.width,), (config.hidden,), (config.heads, config.width // config.heads)

        def layer() -> PyTree:
            return {
                "attention": {
                    **{part: draw.linear(width, heads) for part in ("query", "key", "value")},
                    "output": draw.linear(heads, width),
                },
                "attention_norm": draw.norm("layer", width),
                "feed_forward": {"up": draw.linear(width, hidden), "down": draw.linear(hidden, width)},
                "feed_forward_norm": draw.norm("layer", width),
            }

        params = {
            "embedding": draw.table(config.vocabulary, config.width),
            "positions": draw.table(config.max_length, config.width),
            "types": draw.table(config.types, config.width),
            "embedding_norm": draw.norm("layer", width),
            "layers": [layer() for _ in range(config.layers)],
        }
        if config.masked_head:
            params["head"] = {
                "dense": draw.linear(width, width),
                "norm": draw.norm("layer", width),
                "bias": jnp.zeros(config.vocabulary, dtype),
            }
        return params

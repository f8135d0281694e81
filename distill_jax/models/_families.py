"""Architectures of Hugging Face's transformers: their ``config.json``, and the names of their tensors."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from distill_jax._checks import shown
from distill_jax.models.encoder import EncoderConfig, EncoderFn
from distill_jax.models.transformer import RopeScaling, TransformerConfig, TransformerFn


class Family(NamedTuple):
    """An architecture of transformers.

    Attributes:
      function: makes the ``apply_fn`` from a configuration.
      prefix: with which the names of all tensors but the head's begin. In files of a model without its head they may
        lack it.
      head: with which the names of the head's tensors begin.
      names: from our modules to theirs, with ``{}`` for the number of the layer. Several of ours can be parts of one,
        in this order.
      transposed: whether they store a kernel as ``[outputs, inputs]``.
      ignored: the endings of tensors that are no parameters, or of parts that are not computed here.
      copies: tensors that may be there too if they equal another.
      read: makes a configuration from the entries of ``config.json``.
      write: makes these entries from a configuration; with ``model_type`` they are all that ``read`` needs.
    """

    function: Callable[[Any], Any]
    prefix: str
    head: str
    names: dict[str, str]
    transposed: bool
    ignored: tuple[str, ...]
    copies: dict[str, str]
    read: Callable[[dict[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]


def family_of(config: Any) -> tuple[str, Family]:
    """Finds the architecture whose ``config.json`` says all of a configuration, and its ``model_type``."""
    for kind, family in FAMILIES.items():
        try:
            if family.read({"model_type": kind, **family.write(config)}) == config:
                return kind, family
        except (ValueError, AttributeError):  # a field that the other network has not
            continue
    raise ValueError(
        f"model: no known architecture of transformers ({', '.join(FAMILIES)}) has this configuration: {config}"
    )


def _fields(
    fields: Mapping[str, str], entries: Mapping[str, Any], absent: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        ours: entries.get(theirs, absent[theirs]) if theirs in absent else entries[theirs]
        for ours, theirs in fields.items()
    }


def _expect(entries: Mapping[str, Any], name: str, *known: Any) -> None:
    """Raises ``ValueError`` unless an entry is absent or has one of the values that are computed here."""
    if entries.get(name, known[0]) not in known:
        raise ValueError(f"{name} is {shown(entries[name])}: known here is {' or '.join(map(repr, known))}")


def _names(entries: Mapping[str, Any], name: str) -> list[str]:
    """Reads an entry that is a list of names, or absent."""
    found = entries.get(name) or []
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{name} is {shown(found)}: expected a list of names")
    return found


# --- Llama, Qwen2, Qwen3 -------------------------------------------------------------------------

_LLAMA_FIELDS = {
    "vocabulary": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "head_size": "head_dim",
    "hidden": "intermediate_size", "norm_eps": "rms_norm_eps", "max_length": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}  # fmt: skip
# What transformers takes where config.json has no entry
_LLAMA_ABSENT = {
    "num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}  # fmt: skip
_LLAMA3 = {
    "factor": "factor", "low_frequency": "low_freq_factor", "high_frequency": "high_freq_factor",
    "length": "original_max_position_embeddings",
}  # fmt: skip
_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "layers.{}.attention_norm": "model.layers.{}.input_layernorm",
    **{f"layers.{{}}.attention.{ours}": f"model.layers.{{}}.self_attn.{theirs}" for ours, theirs in {
        "query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj",
        "query_norm": "q_norm", "key_norm": "k_norm",
    }.items()},
    "layers.{}.feed_forward_norm": "model.layers.{}.post_attention_layernorm",
    **{f"layers.{{}}.feed_forward.{part}": f"model.layers.{{}}.mlp.{part}_proj" for part in ("gate", "up", "down")},
    "norm": "model.norm",
    "head": "lm_head",
}  # fmt: skip


def _read_rope(entries: dict[str, Any]) -> dict[str, Any]:
    """Reads the fields of rotary positions."""
    # Version 5 of transformers writes the second of these, earlier ones the first
    name = "rope_scaling" if entries.get("rope_scaling") else "rope_parameters"
    rope = entries.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name} is {shown(rope)}: expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type is {shown(kind)}: known here is 'default' or 'llama3'")
    scaling = _LLAMA3.values() if kind == "llama3" else ()
    unknown = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *scaling}
    if unknown:
        raise ValueError(f"{name} has {', '.join(sorted(unknown))}, which rope_type {kind!r} has not")
    for where in (entries, rope):
        _expect(where, "partial_rotary_factor", 1.0, None)
    return {
        "rope_theta": rope.get("rope_theta", entries.get("rope_theta", 1e4)),
        "rope_scaling": RopeScaling(**_fields(_LLAMA3, rope, {})) if scaling else None,
    }


def _read_llama(entries: dict[str, Any]) -> TransformerConfig:
    kind = entries["model_type"]
    _expect(entries, "hidden_act", "silu", "swish")
    _expect(entries, "use_sliding_window", False, None)
    _expect(entries, "quantization_config", None)
    if set(_names(entries, "layer_types")) - {"full_attention"}:
        raise ValueError(f"layer_types is {shown(entries['layer_types'])}: known here is 'full_attention'")
    bias, feed_forward_bias = entries.get("attention_bias", False), entries.get("mlp_bias", False)
    absent = _LLAMA_ABSENT | ({"head_dim": 128} if kind == "qwen3" else {})
    config = TransformerConfig(
        **_fields(_LLAMA_FIELDS, entries, absent),
        **_read_rope(entries),
        qk_norm=kind == "qwen3",
        qkv_bias=True if kind == "qwen2" else bias,
        output_bias=False if kind == "qwen2" else bias,
        feed_forward_bias=feed_forward_bias if kind == "llama" else False,
    )
    if kind == "llama" and config.width % config.heads:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads, got {config.width} and {config.heads}"
        )
    return config


def _write_llama(architecture: str) -> Callable[[TransformerConfig], dict[str, Any]]:
    def write(config: TransformerConfig) -> dict[str, Any]:
        scaling = config.rope_scaling
        rope: dict[str, Any] = {"rope_type": "default"}
        if scaling is not None:
            rope = {"rope_type": "llama3"}
            rope |= {theirs: getattr(scaling, ours) for ours, theirs in _LLAMA3.items()}
        return {
            "architectures": [architecture],
            **{theirs: getattr(config, ours) for ours, theirs in _LLAMA_FIELDS.items()},
            "hidden_act": "silu",
            # Version 5 reads the first of these, earlier ones the other two
            "rope_parameters": {"rope_theta": config.rope_theta, **rope},
            "rope_theta": config.rope_theta,
            "rope_scaling": None if scaling is None else rope,
            "attention_bias": config.output_bias,
            "mlp_bias": config.feed_forward_bias,
        }

    return write


# --- GPT-2 ---------------------------------------------------------------------------------------

_GPT2_FIELDS = {
    "vocabulary": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head", "hidden": "n_inner",
    "norm_eps": "layer_norm_epsilon", "max_length": "n_positions", "tied": "tie_word_embeddings",
}  # fmt: skip
_GPT2_ABSENT = {"n_inner": None, "layer_norm_epsilon": 1e-5, "n_positions": 1024, "tie_word_embeddings": True}
_GPT2_NAMES = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.{}.attention_norm": "transformer.h.{}.ln_1",
    **{f"layers.{{}}.attention.{part}": "transformer.h.{}.attn.c_attn" for part in ("query", "key", "value")},
    "layers.{}.attention.output": "transformer.h.{}.attn.c_proj",
    "layers.{}.feed_forward_norm": "transformer.h.{}.ln_2",
    "layers.{}.feed_forward.up": "transformer.h.{}.mlp.c_fc",
    "layers.{}.feed_forward.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}


def _read_gpt2(entries: dict[str, Any]) -> TransformerConfig:
    _expect(entries, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _expect(entries, "scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _expect(entries, name, False)
    _expect(entries, "quantization_config", None)
    values = _fields(_GPT2_FIELDS, entries, _GPT2_ABSENT)
    if values["hidden"] is None:
        values["hidden"] = 4 * values["width"]
    return TransformerConfig(
        **values, norm="layer", positions="learned", feed_forward="gelu", qkv_bias=True, output_bias=True,
        feed_forward_bias=True,
    )  # fmt: skip


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{theirs: getattr(config, ours) for ours, theirs in _GPT2_FIELDS.items()},
        "activation_function": "gelu_new",
    }


# --- BERT ----------------------------------------------------------------------------------------

_BERT_FIELDS = {
    "vocabulary": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "hidden": "intermediate_size", "max_length": "max_position_embeddings",
    "types": "type_vocab_size", "norm_eps": "layer_norm_eps",
}  # fmt: skip
_BERT_ABSENT = {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
_BERT_NAMES = {
    **{ours: f"bert.embeddings.{theirs}" for ours, theirs in {
        "embedding": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings",
        "embedding_norm": "LayerNorm",
    }.items()},
    **{f"layers.{{}}.{ours}": f"bert.encoder.layer.{{}}.{theirs}" for ours, theirs in {
        "attention.query": "attention.self.query", "attention.key": "attention.self.key",
        "attention.value": "attention.self.value", "attention.output": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm", "feed_forward.up": "intermediate.dense",
        "feed_forward.down": "output.dense", "feed_forward_norm": "output.LayerNorm",
    }.items()},
    "head.dense": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head": "cls.predictions",
}  # fmt: skip
_MASKED = ("BertForMaskedLM", "BertForPreTraining")


def _read_bert(entries: dict[str, Any]) -> EncoderConfig:
    _expect(entries, "hidden_act", "gelu")
    _expect(entries, "position_embedding_type", "absolute", None)
    for name in ("is_decoder", "add_cross_attention"):
        _expect(entries, name, False)
    _expect(entries, "quantization_config", None)
    masked = any(name in _MASKED for name in _names(entries, "architectures"))
    if masked:
        _expect(entries, "tie_word_embeddings", True)
    return EncoderConfig(**_fields(_BERT_FIELDS, entries, _BERT_ABSENT), masked_head=masked)


def _write_bert(config: EncoderConfig) -> dict[str, Any]:
    return {
        "architectures": [_MASKED[0] if config.masked_head else "BertModel"],
        **{theirs: getattr(config, ours) for ours, theirs in _BERT_FIELDS.items()},
        "hidden_act": "gelu",
    }


FAMILIES = {
    **{
        kind: Family(
            TransformerFn, "model.", "lm_head.", _LLAMA_NAMES, True, (".rotary_emb.inv_freq",),
            {"lm_head.weight": "model.embed_tokens.weight"}, _read_llama, _write_llama(architecture),
        )
        for kind, architecture in {
            "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
        }.items()
    },
    "gpt2": Family(
        TransformerFn, "transformer.", "lm_head.", _GPT2_NAMES, False, (".attn.bias", ".attn.masked_bias"),
        {"lm_head.weight": "transformer.wte.weight"}, _read_gpt2, _write_gpt2,
    ),
    "bert": Family(
        EncoderFn, "bert.", "cls.", _BERT_NAMES, True,
        # The pooler and the guess whether two sentences are neighbours are parts of other tasks
        (".position_ids", "bert.pooler.dense.weight", "bert.pooler.dense.bias", "cls.seq_relationship.weight",
         "cls.seq_relationship.bias"),
        {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
         "cls.predictions.decoder.bias": "cls.predictions.bias"},
        _read_bert, _write_bert,
    ),
}  # fmt: skip

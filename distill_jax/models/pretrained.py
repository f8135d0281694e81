"""Weights in the layout of Hugging Face's transformers: read from its files, and written for it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distill_jax import _files
from distill_jax._checks import check_count, check_mapping, shown
from distill_jax._model import Model, PyTree
from distill_jax.models import _safetensors
from distill_jax.models.transformer import (
    RopeScaling,
    TransformerConfig,
    TransformerFn,
    check_dtype,
    init_params,
    transformer_fn,
)  # fmt: skip

CONFIG = "config.json"


def load_pretrained(path: str | Path, *, dtype: DTypeLike | None = None) -> Model:
    """Reads a causal language model that transformers saved: Llama, Qwen2, Qwen3 or GPT-2.

    The logits are those of transformers. Neither transformers nor PyTorch nor safetensors needs to be installed.

    Args:
      path: a directory with ``config.json`` and ``model.safetensors``, or several files and their index, as
        ``save_pretrained`` of transformers writes it and the Hugging Face Hub has it.
      dtype: float32 or bfloat16, to which all weights are converted. None keeps the dtype of the files, which must be
        one of these two.

    Returns:
      The model, see :func:`~distill_jax.models.build_transformer`; ``model.apply_fn.config`` is its architecture.

    Raises:
      ValueError: if a file is missing, truncated or damaged; a tensor is missing, is one too many, or has another shape
        than ``config.json`` says or no floating dtype (the message names tensor and file); or the architecture is
        another, or has an option that is not known here.
    """
    directory = Path(path)
    wanted = None if dtype is None else check_dtype("dtype", dtype)
    if not directory.is_dir():
        raise ValueError(
            f"path: {directory} is no directory: expected one with {CONFIG} and {_safetensors.SINGLE}"
        )
    description = _safetensors.read_json(directory / CONFIG)
    kind = description.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"path: {directory / CONFIG} describes a model of type {shown(kind)}: known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    try:
        config = family.read(description)
    except KeyError as error:
        raise ValueError(f"path: {directory / CONFIG} lacks {error}") from None
    except (ValueError, AttributeError, TypeError) as error:  # the last two of entries of other types
        raise ValueError(f"path: {directory / CONFIG}: {error}") from None
    return Model(TransformerFn(config), _read_params(directory, family, config, wanted), {})


def save_pretrained(
    path: str | Path,
    model: Model,
    *,
    entries: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a transformer so that transformers loads it: ``AutoModelForCausalLM.from_pretrained(path)``.

    The architecture is the one that can express the configuration: Llama, Qwen2, Qwen3 or GPT-2. Sizes are those of the
    arrays, so a model with fewer layers, heads or units can be saved if all its layers are alike. ``config.json`` is
    written last: a directory without it is not complete.

    Args:
      path: a directory, which is made if it does not exist. One that already holds a model is refused.
      model: a transformer.
      entries: further entries of ``config.json``, such as ``{"eos_token_id": 2}``. Without them it says that there are
        no special tokens.
      shard_bytes: the size of a file above which the weights are spread over several.

    Raises:
      ValueError: if ``model`` is no transformer, its layers are not alike, no architecture can express it, or the
        directory holds a model already.

    >>> import tempfile
    >>> from distill_jax.models import TransformerConfig, build_transformer
    >>> config = TransformerConfig(vocabulary=50, width=8, layers=1, heads=2, hidden=16)
    >>> path = Path(tempfile.mkdtemp()) / "student"
    >>> save_pretrained(path, build_transformer(config, jax.random.key(0)))
    >>> load_pretrained(path).apply_fn.config == config
    True
    """
    config = _present_config(model)
    check_count("shard_bytes", shard_bytes)
    if entries is not None:
        check_mapping("entries", entries, "from names to values of config.json")
    family = _family_of(config)
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: {directory} is a file: expected a directory")
    if not directory.parent.is_dir():
        raise ValueError(f"path: the directory {directory.parent} does not exist: make it first")
    if (directory / CONFIG).exists() or any(directory.glob("*.safetensors")):
        raise ValueError(f"path: {directory} holds a model already: choose another directory, or remove it")
    leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(model.params)}
    dtype = leaves["embedding"].dtype.name
    description = {
        "architectures": [family.architecture], "model_type": family.model_type, "torch_dtype": dtype,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **family.write(config), **(entries or {}),
    }  # fmt: skip
    description = _files.plain(description)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, leaf in leaves.items():
        place = _place(family, config, name, leaf.shape)
        array = leaf.reshape(place.flat)
        parts.setdefault(place.tensor, {})[place.part] = array.T if place.transposed else array
    arrays = {
        name: found[0] if len(found) == 1 else np.concatenate([found[i] for i in sorted(found)], -1)
        for name, found in parts.items()
    }
    directory.mkdir(exist_ok=True)
    _safetensors.write_directory(directory, arrays, shard_bytes)
    _files.write_json(directory / CONFIG, description)


# --- the architectures ---------------------------------------------------------------------------


class Family(NamedTuple):
    """An architecture of transformers.

    Attributes:
      model_type: its name in ``config.json``.
      architecture: the name of its class.
      prefix: with which the names of all tensors but the head's begin, except in files of a model without its head.
      names: from our modules to theirs, with ``{}`` for the number of the layer. Several of ours can be parts of one.
      transposed: whether they store a kernel as ``[outputs, inputs]``.
      buffers: the endings of tensors that are no parameters.
      read: makes a configuration from the entries of ``config.json``.
      write: makes these entries from a configuration.
    """

    model_type: str
    architecture: str
    prefix: str
    names: dict[str, str]
    transposed: bool
    buffers: tuple[str, ...]
    read: Callable[[dict[str, Any]], TransformerConfig]
    write: Callable[[TransformerConfig], dict[str, Any]]


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
_GPT2_FIELDS = {
    "vocabulary": "vocab_size", "width": "n_embd", "layers": "n_layer", "heads": "n_head", "hidden": "n_inner",
    "norm_eps": "layer_norm_epsilon", "max_length": "n_positions", "tied": "tie_word_embeddings",
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "norm": "layer", "positions": "learned", "feed_forward": "gelu",
    "qkv_bias": True, "output_bias": True, "feed_forward_bias": True,
}  # fmt: skip


def _fields(
    fields: Mapping[str, str], entries: Mapping[str, Any], absent: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        ours: entries.get(theirs, absent[theirs]) if theirs in absent else entries[theirs]
        for ours, theirs in fields.items()
    }


def _expect(entries: Mapping[str, Any], name: str, *known: Any) -> None:
    """Raises ``ValueError`` unless an entry is absent, None or one of the values that are computed here."""
    if entries.get(name) not in (None, *known):
        raise ValueError(f"{name} is {shown(entries[name])}: known here is {' or '.join(map(repr, known))}")


def _read_llama(entries: dict[str, Any]) -> TransformerConfig:
    kind = entries["model_type"]
    _expect(entries, "hidden_act", "silu", "swish")
    _expect(entries, "use_sliding_window", False)
    _expect(entries, "quantization_config")
    if set(entries.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"layer_types is {shown(entries['layer_types'])}: known here is 'full_attention'")
    rope = entries.get("rope_parameters")
    if not rope:  # files of transformers before version 5
        rope = {"rope_theta": entries.get("rope_theta", 1e4)} | (entries.get("rope_scaling") or {})
    scaling, turning = None, rope.get("rope_type", rope.get("type", "default"))
    if turning == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        values = zip(dataclasses.fields(RopeScaling), names, strict=True)
        scaling = RopeScaling(**{field.name: rope[name] for field, name in values})
    elif turning != "default":
        raise ValueError(f"rope_type is {shown(turning)}: known here is 'default' or 'llama3'")
    _expect(rope, "partial_rotary_factor", 1.0)
    _expect(entries, "partial_rotary_factor", 1.0)
    bias = bool(entries.get("attention_bias", False))
    return TransformerConfig(
        **_fields(_LLAMA_FIELDS, entries, _LLAMA_ABSENT | ({"head_dim": 128} if kind == "qwen3" else {})),
        rope_theta=rope.get("rope_theta", 1e4),
        rope_scaling=scaling,
        qk_norm=kind == "qwen3",
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias and kind != "qwen2",
        feed_forward_bias=bool(entries.get("mlp_bias", False)) and kind == "llama",
    )


def _write_llama(config: TransformerConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_frequency,
            "high_freq_factor": config.rope_scaling.high_frequency,
            "original_max_position_embeddings": config.rope_scaling.length,
        }
    return {
        **{theirs: getattr(config, ours) for ours, theirs in _LLAMA_FIELDS.items()},
        "hidden_act": "silu",
        # Version 5 reads the first of these, earlier ones the other two
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling is not None else None,
        "attention_bias": config.output_bias,
        "mlp_bias": config.feed_forward_bias,
    }


def _read_gpt2(entries: dict[str, Any]) -> TransformerConfig:
    _expect(entries, "activation_function", "gelu_new", "gelu_pytorch_tanh")
    _expect(entries, "scale_attn_weights", True)
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        _expect(entries, name, False)
    _expect(entries, "quantization_config")
    absent = {"n_inner": None, "layer_norm_epsilon": 1e-5, "n_positions": 1024, "tie_word_embeddings": True}
    values = _fields(_GPT2_FIELDS, entries, absent)
    values["hidden"] = values["hidden"] or 4 * values["width"]
    return TransformerConfig(**values, **_GPT2)


def _write_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        **{theirs: getattr(config, ours) for ours, theirs in _GPT2_FIELDS.items()},
        "activation_function": "gelu_new",
    }


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
_ROTARY = (".rotary_emb.inv_freq",)
FAMILIES = {
    **{
        kind: Family(kind, name, "model.", _LLAMA_NAMES, True, _ROTARY, _read_llama, _write_llama)
        for kind, name in {
            "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
        }.items()
    },
    "gpt2": Family(
        "gpt2", "GPT2LMHeadModel", "transformer.", _GPT2_NAMES, False,
        (".attn.bias", ".attn.masked_bias"), _read_gpt2, _write_gpt2,
    ),
}  # fmt: skip


def _family_of(config: TransformerConfig) -> Family:
    """Finds the architecture whose ``config.json`` says all of a configuration."""
    for family in FAMILIES.values():
        try:
            if family.read({"model_type": family.model_type, **family.write(config)}) == config:
                return family
        except ValueError:
            continue
    raise ValueError(
        f"model: no known architecture of transformers ({', '.join(FAMILIES)}) has this configuration: {config}"
    )


def _present_config(model: Model) -> TransformerConfig:
    """Returns a transformer's configuration, with the sizes that its arrays have now."""
    config = transformer_fn("model", model).config
    layers = model.params["layers"]
    attention, up = layers[0]["attention"], layers[0]["feed_forward"]["up"]["kernel"]
    config = dataclasses.replace(
        config,
        layers=len(layers),
        heads=attention["query"]["kernel"].shape[1],
        kv_heads=attention["key"]["kernel"].shape[1],
        vocabulary=model.params["embedding"].shape[0],
        width=up.shape[0],
        hidden=up.shape[1],
    )
    dtype = model.params["embedding"].dtype
    expected = dict(_named_leaves(_like(config)))
    for name, leaf in _named_leaves(model.params):
        like = expected.pop(name, None)
        if like is None or like.shape != leaf.shape or leaf.dtype != dtype:
            raise ValueError(
                f"model: params {name} is {leaf.dtype} {leaf.shape}, but files hold layers that are all alike in one "
                f"dtype: expected {'nothing' if like is None else f'{dtype} {like.shape}'}"
            )
    if expected:
        raise ValueError(f"model: params lack {', '.join(expected)}")
    check_dtype("model: the dtype of params", dtype)
    return config


# --- the tensors ---------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an array of ours is in their files: a tensor, perhaps transposed, perhaps one of three parts."""

    tensor: str
    part: int
    parts: int
    flat: tuple[int, ...]
    transposed: bool

    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        shape = (*self.flat[:-1], self.flat[-1] * self.parts)
        return shape[::-1] if self.transposed else shape


def _place(family: Family, config: TransformerConfig, name: str, shape: tuple[int, ...]) -> Place:
    module, _, variable = name.rpartition(".")
    if variable not in ("kernel", "scale", "bias"):  # the embedding, the learned positions
        module, variable = name, "kernel"
    pieces = module.split(".")
    number = pieces[1] if pieces[0] == "layers" else ""
    general = ".".join(["layers", "{}", *pieces[2:]]) if number else module
    theirs = family.names[general]
    sharing = [ours for ours, other in family.names.items() if other == theirs]
    flat = shape
    if len(shape) > 1 + (variable == "kernel"):  # the features of heads
        flat = (-1,) if variable == "bias" else (-1, shape[2]) if pieces[-1] == "output" else (shape[0], -1)
    count = int(np.prod(shape))
    flat = tuple(count // -int(np.prod(flat)) if size == -1 else size for size in flat)
    return Place(
        f"{theirs.format(number)}.{'bias' if variable == 'bias' else 'weight'}",
        sharing.index(general),
        len(sharing),
        flat,
        variable == "kernel"
        and module not in ("embedding", "positions")
        and (family.transposed or module == "head"),
    )


def _named_leaves(params: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _like(config: TransformerConfig) -> PyTree:
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0), jnp.float32))


def _read_params(
    directory: Path, family: Family, config: TransformerConfig, wanted: np.dtype | None
) -> PyTree:
    like = _like(config)
    places = [_place(family, config, name, leaf.shape) for name, leaf in _named_leaves(like)]
    tensors = {
        name if name.startswith((family.prefix, "lm_head.")) else family.prefix + name: tensor
        for name, tensor in _safetensors.read_directory(directory).items()
        if not name.endswith(family.buffers)
    }
    head = tensors.get("lm_head.weight")
    embedding = tensors.get(f"{family.names['embedding']}.weight")
    if (
        config.tied
        and head is not None
        and embedding is not None
        and np.array_equal(head.array, embedding.array)
    ):
        del tensors["lm_head.weight"]
    expected = {place.tensor: place.shape() for place in places}
    missing, surplus = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    for words, names in (("lacks", missing), ("holds, beyond what config.json says,", surplus)):
        if names:
            first = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            raise ValueError(
                f"path: {directory} {words} {len(names)} tensor{'s' * (len(names) > 1)}: {first}"
            )
    for name, shape in expected.items():
        file, array = tensors[name]
        if array.shape != shape:
            raise ValueError(
                f"path: tensor {name} of {file} has shape {array.shape}, expected {shape}, as config.json says"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"path: tensor {name} of {file} holds {array.dtype}, expected floating-point numbers"
            )
    first = next(iter(expected))
    dtype = tensors[first].array.dtype if wanted is None else wanted
    for name in expected:
        file, array = tensors[name]
        if wanted is None and (array.dtype != dtype or dtype.name not in ("float32", "bfloat16")):
            raise ValueError(
                f"dtype: tensor {name} of {file} is {array.dtype}, and {first} is {dtype}: say into which of float32 "
                "and bfloat16 all are to be converted"
            )

    def leaf(place: Place, shape: tuple[int, ...]) -> jax.Array:
        array = tensors[place.tensor].array
        array = array.T if place.transposed else array
        if place.parts > 1:
            array = np.split(array, place.parts, axis=-1)[place.part]
        return jnp.array(array.reshape(shape), dtype)  # a copy: the file may change

    leaves = [leaf(place, x.shape) for place, x in zip(places, jax.tree.leaves(like), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)

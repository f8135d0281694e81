"""Weights in the layout of Hugging Face's transformers: read from its files, and written for it."""

import dataclasses
import math
import re
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from distill_jax import _files
from distill_jax._checks import check_count, check_mapping, shown
from distill_jax._model import Model, PyTree, check_model
from distill_jax.models import _safetensors
from distill_jax.models._blocks import DTYPES, check_dtype
from distill_jax.models._families import FAMILIES, Family, family_of
from distill_jax.models.encoder import EncoderFn
from distill_jax.models.transformer import TransformerFn

CONFIG = "config.json"
# As files name the types: those that can be converted, and those that parameters may have
FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_pretrained(path: str | Path, *, dtype: DTypeLike | None = None) -> Model:
    """Reads a network that transformers saved: a language model (Llama, Qwen2, Qwen3, GPT-2) or an encoder (BERT).

    The logits or hidden states are those of transformers, which need not be installed, nor PyTorch. The files are read
    by the package safetensors: ``pip install 'distill_jax[text]'``. A BERT's pooler is left out.

    Args:
      path: a directory with ``config.json`` and ``model.safetensors``, or several files and their index, as
        ``save_pretrained`` of transformers writes it and the Hugging Face Hub has it.
      dtype: float32 or bfloat16, to which all weights are converted. None keeps the dtype of the files, which must be
        one of these two.

    Returns:
      The model, see :func:`~distill_jax.models.build_transformer` and :func:`~distill_jax.models.build_encoder`;
      ``model.apply_fn.config`` is its architecture.

    Raises:
      ValueError: if a file is missing, truncated or damaged; a tensor is missing, is one too many, or has another shape
        than ``config.json`` says or no floating dtype (the message names tensor and file); or the architecture is
        another, or has an option that is not known here.
      ModuleNotFoundError: if safetensors is not installed.
    """
    directory = Path(path)
    wanted = None if dtype is None else check_dtype("dtype", dtype)
    if not directory.is_dir():
        raise ValueError(
            f"path: {directory} is no directory: expected one with {CONFIG} and {_safetensors.SINGLE}"
        )
    description = _safetensors.read_json(directory / CONFIG)
    kind = description.get("model_type")
    if not isinstance(kind, Hashable) or kind not in FAMILIES:
        raise ValueError(
            f"path: {directory / CONFIG} describes a model of type {shown(kind)}: known are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    try:
        function = family.function(family.read(description))
    except KeyError as error:
        raise ValueError(f"path: {directory / CONFIG} lacks {error}") from None
    except (ValueError, TypeError) as error:  # the last of entries of other types
        raise ValueError(f"path: {directory / CONFIG}: {error}") from None
    return Model(function, _read_params(directory, family, function, wanted), {})


def save_pretrained(
    path: str | Path,
    model: Model,
    *,
    entries: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a network so that transformers loads it: ``AutoModelForCausalLM.from_pretrained(path)``.

    The architecture is the one that can express the configuration: Llama, Qwen2, Qwen3, GPT-2 or BERT. Sizes are those
    of the arrays, so a model with fewer layers, heads or units can be saved if all its layers are alike.
    ``config.json`` is written last: a directory without it is not complete. A tokenizer is not written: copy the
    teacher's files (``tokenizer.json``, ``tokenizer_config.json``).

    Args:
      path: a directory, which is made if it does not exist. One that already holds a model is refused.
      model: a transformer or an encoder.
      entries: further entries of ``config.json``, such as ``{"eos_token_id": 2}``. Without them it says that there are
        no special tokens.
      shard_bytes: the size of a file above which the weights are spread over several.

    Raises:
      ValueError: if ``model`` is no transformer, its layers are not alike, no architecture can express it, ``entries``
        contradict it, or the directory holds a model already.
      ModuleNotFoundError: if the package safetensors is not installed.
    """
    function = _present(model)
    check_count("shard_bytes", shard_bytes)
    if entries is not None:
        check_mapping("entries", entries, "from names to values of config.json")
    kind, family = family_of(function.config)
    directory = Path(path)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"path: {directory} is a file: expected a directory")
    if not directory.parent.is_dir():
        raise ValueError(f"path: the directory {directory.parent} does not exist: make it first")
    if (directory / CONFIG).exists() or any(directory.glob("*.safetensors")):
        raise ValueError(f"path: {directory} holds a model already: choose another directory, or remove it")
    leaves = {name: np.asarray(leaf) for name, leaf in _named_leaves(model.params)}
    own = {
        "model_type": kind, **family.write(function.config), "torch_dtype": leaves["embedding"].dtype.name,
    }  # fmt: skip
    for name in own.keys() & (entries or {}).keys():
        raise ValueError(f"entries: {name} follows from the model, {shown(own[name])}: leave it out")
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    description = _files.plain({**own, **tokens, **(entries or {})})
    arrays = {}
    for tensor, names in _layout(family, list(leaves)).items():
        parts = [leaves[name].reshape(_flat(name, leaves[name].shape)) for name in names]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
        arrays[tensor] = whole.T if _transposed(family, names[0]) else whole
    _safetensors.package()  # before the directory is made
    directory.mkdir(exist_ok=True)
    _safetensors.write_directory(directory, arrays, shard_bytes)
    _files.write_json(directory / CONFIG, description)


def _present(model: Model) -> Any:
    """Returns a transformer's function, with the sizes that its arrays have now."""
    check_model("model", model)
    if not isinstance(model.apply_fn, TransformerFn | EncoderFn):
        raise ValueError(
            "model must be of models.build_transformer, models.build_encoder or models.load_pretrained, got a model of "
            f"{shown(model.apply_fn)}"
        )
    function: Any = model.apply_fn
    params = model.params
    if not params["layers"]:
        raise ValueError("model: params have no layers, and files hold at least one")
    attention, up = params["layers"][0]["attention"], params["layers"][0]["feed_forward"]["up"]["kernel"]
    sizes = {
        "layers": len(params["layers"]),
        "heads": attention["query"]["kernel"].shape[1],
        "kv_heads": attention["key"]["kernel"].shape[1],
        "vocabulary": params["embedding"].shape[0],
        "width": up.shape[0],
        "hidden": up.shape[1],
    }
    sizes |= {
        field: params[table].shape[0]
        for field, table in (("max_length", "positions"), ("types", "types"))
        if table in params
    }
    features = attention["query"]["kernel"].shape[2]
    if isinstance(function, EncoderFn) and sizes["heads"] * features != sizes["width"]:
        raise ValueError(
            f"model: its {sizes['heads']} heads have {features} features each, but in files of BERT the features of "
            f"all heads must add up to the width, {sizes['width']}: models without some heads cannot be saved"
        )
    known = {field.name for field in dataclasses.fields(function.config)}
    sizes = {name: size for name, size in sizes.items() if name in known}
    function = dataclasses.replace(function, config=dataclasses.replace(function.config, **sizes))
    dtype = params["embedding"].dtype
    expected = dict(_named_leaves(_like(function)))
    for name, leaf in _named_leaves(params):
        like = expected.pop(name, None)
        if like is None or like.shape != leaf.shape or leaf.dtype != dtype:
            raise ValueError(
                f"model: params {name} is {leaf.dtype} {leaf.shape}, but files hold layers that are all alike in one "
                f"dtype: expected {'nothing' if like is None else f'{dtype} {like.shape}'}"
            )
    if expected:
        raise ValueError(f"model: params lack {', '.join(expected)}")
    check_dtype("model: the dtype of params", dtype)
    return function


# --- the tensors ---------------------------------------------------------------------------------


def _named_leaves(params: PyTree) -> list[tuple[str, Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _like(function: Any) -> PyTree:
    return jax.eval_shape(lambda: function.init(jax.random.key(0), jnp.float32))


def _layout(family: Family, leaves: list[str]) -> dict[str, list[str]]:
    """From their tensors to the names of our arrays, which are joined in a tensor's last axis."""
    order = list(family.names)
    found: dict[str, list[tuple[int, str]]] = {}
    for name in leaves:
        module, _, variable = name.rpartition(".")
        if variable not in ("kernel", "scale", "bias"):  # a table
            module, variable = name, "weight"
        number = re.match(r"layers\.(\d+)", module)
        general = re.sub(r"^layers\.\d+", "layers.{}", module)
        theirs = family.names[general].format(number and number[1])
        tensor = f"{theirs}.{'bias' if variable == 'bias' else 'weight'}"
        found.setdefault(tensor, []).append((order.index(general), name))
    return {tensor: [name for _, name in sorted(group)] for tensor, group in found.items()}


def _flat(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one of our arrays without an axis of heads: ``[inputs, outputs]`` or ``[outputs]``."""
    if name.endswith("bias"):
        return (math.prod(shape),)
    if name.endswith("output.kernel"):
        return (math.prod(shape[:-1]), shape[-1])
    return (shape[0], *([math.prod(shape[1:])] if len(shape) > 1 else []))


def _transposed(family: Family, name: str) -> bool:
    return name.endswith("kernel") and (family.transposed or name.startswith("head."))


def _open_tensors(directory: Path, family: Family) -> dict[str, _safetensors.Tensor]:
    """Opens the tensors of a directory by the names that they have in files of a whole model."""
    found = _safetensors.read_directory(directory)
    tensors = {}
    for name, tensor in found.items():
        # Files of the first BERT have older names of what LayerNorm multiplies by and adds
        new = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        tensors[name if new in found else new] = tensor
    if not any(name.startswith(family.prefix) for name in tensors):
        heads = {name: tensor for name, tensor in tensors.items() if name.startswith(family.head)}
        tensors = heads | {family.prefix + n: t for n, t in tensors.items() if n not in heads}
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(family.ignored)}


def _check_names(
    directory: Path, family: Family, wanted: Collection[str], tensors: dict[str, _safetensors.Tensor]
) -> None:
    """Raises ``ValueError`` unless the files hold the tensors of the network, and copies of them at most."""
    missing, surplus = sorted(set(wanted) - tensors.keys()), sorted(tensors.keys() - set(wanted))

    def words(names: list[str]) -> str:
        return f"{len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:5])}" + (
            ", ..." if len(names) > 5 else ""
        )

    if missing:
        single = directory / _safetensors.SINGLE
        where = single if single.exists() else directory / _safetensors.INDEX
        only = family.copies.get(missing[0]) if len(missing) == 1 else None
        why = f", which {CONFIG} does not tie to {only} (tie_word_embeddings)" if only else ""
        raise ValueError(f"path: {where} lacks {words(missing)}{why}")
    for copy, original in family.copies.items():
        if copy in surplus and original in wanted:
            if not np.array_equal(tensors[copy].read(), tensors[original].read()):
                raise ValueError(
                    f"path: tensor {copy} of {tensors[copy].file} differs from {original}, to which {CONFIG} ties it "
                    "(tie_word_embeddings)"
                )
            surplus.remove(copy)
    if surplus:
        files = sorted({str(tensors[name].file) for name in surplus[:5]})
        hold = "holds" if len(files) == 1 else "hold"
        raise ValueError(f"path: {' and '.join(files)} {hold}, beyond what {CONFIG} says, {words(surplus)}")


def _read_params(directory: Path, family: Family, function: Any, wanted: np.dtype | None) -> PyTree:
    tensors = _open_tensors(directory, family)
    if function.config.layers > len(tensors):  # a damaged number could be too large to be tried
        raise ValueError(
            f"path: {directory / CONFIG} says that there are {function.config.layers} layers, but the files hold "
            f"{len(tensors)} tensors"
        )
    like = _like(function)
    shapes = {name: leaf.shape for name, leaf in _named_leaves(like)}
    layout = _layout(family, list(shapes))
    _check_names(directory, family, layout, tensors)
    flat = {tensor: [_flat(name, shapes[name]) for name in names] for tensor, names in layout.items()}
    for tensor, parts in flat.items():
        file, shape, kind, _ = tensors[tensor]
        expected = (*parts[0][:-1], sum(part[-1] for part in parts))
        expected = expected[::-1] if _transposed(family, layout[tensor][0]) else expected
        if shape != expected:
            raise ValueError(
                f"path: tensor {tensor} of {file} has shape {shape}, expected {expected}, as config.json says"
            )
        if kind not in FLOATING:
            raise ValueError(
                f"path: tensor {tensor} of {file} holds {kind}, expected one of {', '.join(FLOATING)}"
            )
    first, kind = next((tensor, tensors[tensor].dtype) for tensor in layout)
    dtype = jnp.dtype(FLOATING[kind]) if wanted is None else wanted
    for tensor in layout:
        other = tensors[tensor].dtype
        if wanted is None and (other != kind or dtype.name not in DTYPES):
            against = "" if other == kind else f", and {first} is {kind}"
            raise ValueError(
                f"dtype: tensor {tensor} of {tensors[tensor].file} is {other}{against}: say into which of float32 and "
                "bfloat16 all are to be converted"
            )
    leaves = {}
    for tensor, ours in layout.items():
        whole = tensors[tensor].read()
        whole = whole.T if _transposed(family, ours[0]) else whole
        ends = np.cumsum([part[-1] for part in flat[tensor]])[:-1]
        for name, part in zip(ours, np.split(whole, ends, axis=-1), strict=True):
            leaves[name] = jnp.array(part.reshape(shapes[name]), dtype)  # a copy: the file may change
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in shapes])

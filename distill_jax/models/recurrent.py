"""Recurrent networks from one sequence to another, such as from letters to phonemes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from distill_jax._checks import check_count, check_key, shown
from distill_jax._model import Model, PyTree, check_model
from distill_jax.models import _blocks

PARTS = ("encoder", "decoder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRUConfig:
    """The architecture of a recurrent encoder and decoder.

    Attributes:
      source: the number of tokens of the sequences that are read.
      target: the number of tokens of the sequences that are written.
      width: the number of features of an embedded token.
      hidden: the number of recurrent units, of the encoder and of the decoder.

    Raises:
      ValueError: if a value is no integer of at least 1.
    """

    source: int
    target: int
    width: int
    hidden: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_count(field.name, getattr(self, field.name))


def build_gru(config: GRUConfig, key: Array) -> Model:
    """Builds and initialises a recurrent encoder and decoder as a :class:`~distill_jax.models.Model`.

    One layer of gated recurrent units reads the source, another one begins with its last state and guesses each next
    token of the target. Its cell is PyTorch's and cuDNN's:

    r = σ(W_r x + U_r h), z = σ(W_z x + U_z h), n = tanh(W_n x + r ⊙ U_n h), h' = (1 − z) ⊙ n + z ⊙ h,

    where each W and U has a bias.

    The model's input is a dict of integer arrays:

    - ``"source"``, ``[batch, source length]``, the tokens that are read;
    - ``"source_segments"``, of that shape, integers or bool: 0 (False) marks padding, on either side. Without this
      entry there is none;
    - ``"tokens"``, ``[batch, length]``, the input of the decoder: the tokens of the target, the first one included;
    - ``"segments"``, of that shape, integers or bool: 0 (False) marks padding. The decoder begins anew with each text
      of a row, while a source has one text per row.

    The output is logits ``[batch, length, target]`` of the next tokens. Padding leaves the state as it is. There is no
    dropout, so training and evaluation are the same. :func:`distill_jax.features.capture` finds ``encoder``, the states
    ``[batch, source length, hidden]``, and ``decoder``.

    Args:
      config: the architecture.
      key: a random key that initialises the parameters: uniform on ±1/√hidden, embeddings normal.

    Returns:
      The model, without state.

    Raises:
      ValueError: if an argument is not of that form; when the model is called, if its input is not.

    References:
      Cho et al., `Learning Phrase Representations using RNN Encoder–Decoder`, 2014, §2.3, with the bias inside of r's
      product.

    >>> model = build_gru(GRUConfig(source=9, target=7, width=4, hidden=8), jax.random.key(0))
    >>> model({"source": jnp.array([[3, 4, 5]]), "tokens": jnp.array([[1, 2]])}).shape
    (1, 2, 7)
    """
    if not isinstance(config, GRUConfig):
        raise ValueError(f"config must be a models.GRUConfig, got {type(config).__name__}")
    check_key("key", key)
    keys = iter(jax.random.split(key, 12))

    def uniform(*shape: int) -> Array:
        return jax.random.uniform(next(keys), shape, minval=-1.0, maxval=1.0) * config.hidden**-0.5

    def part(vocabulary: int) -> PyTree:
        return {
            "embedding": jax.random.normal(next(keys), (vocabulary, config.width)),
            "input": {"kernel": uniform(config.width, 3, config.hidden), "bias": uniform(3, config.hidden)},
            "recurrent": {
                "kernel": uniform(config.hidden, 3, config.hidden),
                "bias": uniform(3, config.hidden),
            },
        }

    head = {"kernel": uniform(config.hidden, config.target), "bias": uniform(config.target)}
    params = {"encoder": part(config.source), "decoder": part(config.target), "head": head}
    return Model(GRUFn(), params, {})


def load_gru(path: str | Path) -> Model:
    """Reads a recurrent encoder and decoder from a NumPy file in the layout of the package g2p-en.

    Args:
      path: an ``.npz`` file with ``enc_emb``, ``enc_w_ih``, ``enc_w_hh``, ``enc_b_ih`` and ``enc_b_hh``, the same of
        ``dec_``, and ``fc_w`` and ``fc_b``: PyTorch's weights, gates in the order r, z, n.

    Returns:
      The model, see :func:`build_gru`, in float32.

    Raises:
      ValueError: if the file is missing or damaged, or an array is missing or has a shape that does not fit the others.
    """
    try:
        with Path(path).open("rb") as stream, np.load(stream) as file:
            arrays = {name: np.asarray(file[name], np.float32) for name in file.files}
    except FileNotFoundError:
        raise ValueError(f"path: {path} does not exist") from None
    except Exception as error:  # NumPy and zipfile raise errors of a dozen types for a damaged file
        raise ValueError(f"path: {path} is damaged: {' '.join(str(error).split())}") from None
    try:
        width, hidden = arrays["enc_emb"].shape[-1], arrays["fc_w"].shape[-1]
        target = len(arrays["fc_b"])
        expected: dict[str, tuple[int, ...]] = {"fc_w": (target, hidden), "fc_b": (target,)}
        for part, vocabulary in (("enc", len(arrays["enc_emb"])), ("dec", target)):
            expected[f"{part}_emb"] = (vocabulary, width)
            expected |= {f"{part}_w_ih": (3 * hidden, width), f"{part}_w_hh": (3 * hidden, hidden)}
            expected |= {f"{part}_b_{kind}": (3 * hidden,) for kind in ("ih", "hh")}
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise ValueError(
                    f"path: array {name} of {path} has shape {arrays[name].shape}, expected {shape}"
                )
    except KeyError as error:
        raise ValueError(f"path: {path} lacks array {error}") from None
    except (IndexError, TypeError):
        raise ValueError(
            f"path: enc_emb, fc_w and fc_b of {path} must have axes, but one is a single number"
        ) from None

    def gates(part: str, kind: str) -> PyTree:
        kernel, bias = arrays[f"{part}_w_{kind}"], arrays[f"{part}_b_{kind}"]
        return {
            "kernel": jnp.array(kernel.reshape(3, hidden, -1).transpose(2, 0, 1)),
            "bias": jnp.array(bias.reshape(3, hidden)),
        }

    params = {
        name: {
            "embedding": jnp.array(arrays[f"{part}_emb"]),
            "input": gates(part, "ih"),
            "recurrent": gates(part, "hh"),
        }
        for name, part in zip(PARTS, ("enc", "dec"), strict=True)
    }
    head = {"kernel": jnp.array(arrays["fc_w"].T), "bias": jnp.array(arrays["fc_b"])}
    return Model(GRUFn(), params | {"head": head}, {})


def given_source(model: Model, x: PyTree) -> Model:
    """Makes a causal model of a recurrent encoder and decoder: one that continues given sources.

    ``generate(given_source(model, x), prompts, ...)`` writes what follows from them.

    Args:
      model: of :func:`build_gru` or :func:`load_gru`.
      x: the source, ``[batch, source length]``, or a dict with ``"source"`` and perhaps ``"source_segments"``.

    Returns:
      A model whose input is tokens ``[batch, length]``, or a dict with ``"tokens"`` and perhaps ``"segments"``.

    Raises:
      ValueError: if ``model`` is another, or ``x`` is not of that form.
    """
    check_model("model", model)
    if not isinstance(model.apply_fn, GRUFn):
        raise ValueError(f"model must be of models.build_gru, got a model of {shown(model.apply_fn)}")
    state = _encode(model.params, x if isinstance(x, Mapping) else {"source": x})
    return Model(DecoderFn(), {"network": model.params, "start": state}, {})


@dataclasses.dataclass(frozen=True)
class GRUFn:
    """The ``apply_fn`` of a recurrent encoder and decoder."""

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None
    ) -> tuple[Array, PyTree]:
        """Computes logits."""
        if not isinstance(x, Mapping):
            raise ValueError(f"x must be a dict with 'source' and 'tokens', got {type(x).__name__}")
        source = {name: value for name, value in x.items() if name.startswith("source")}
        target = {name: value for name, value in x.items() if name not in source}
        return _decode(params, _encode(params, source), target), state


@dataclasses.dataclass(frozen=True)
class DecoderFn:
    """The ``apply_fn`` of a decoder whose source is given."""

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: Array | None = None
    ) -> tuple[Array, PyTree]:
        """Computes logits."""
        return _decode(params["network"], params["start"], x), state


def _encode(params: PyTree, x: Mapping[str, Any]) -> Array:
    """Returns the last state of the encoder, ``[batch, hidden]``."""
    if "source" not in x or x.keys() - {"source", "source_segments"}:
        raise ValueError(
            f"x must have 'source' and perhaps 'source_segments', 'tokens' and 'segments', got {sorted(x)}"
        )
    names = {"source": "tokens", "source_segments": "segments"}
    inputs = _blocks.read_inputs({names[name]: value for name, value in x.items()})
    _blocks.check_one_text("source_segments", inputs["segments"])
    start = jnp.zeros((inputs["tokens"].shape[0], params["encoder"]["recurrent"]["kernel"].shape[0]))
    return _run("encoder", params["encoder"], inputs, start)[1]["state"]


def _decode(params: PyTree, start: Array, x: PyTree) -> Array:
    return continue_text(params, start, x)[0]


def empty_cache(start: Array) -> dict[str, Array]:
    """Makes what :func:`continue_text` keeps of a text, before its first token."""
    return {"state": start, "segment": jnp.zeros(len(start), jnp.int32)}


def continue_text(
    params: PyTree, start: Array, x: PyTree, cache: dict[str, Array] | None = None
) -> tuple[Array, dict[str, Array]]:
    """Computes the logits of further tokens, and what is kept for those after them.

    Args:
      params: the parameters of the network.
      start: the state with which each text begins, ``[batch, hidden]``.
      x: the tokens, in the form that the decoder takes.
      cache: what was kept of the tokens before them: the state of the decoder, and the segment of its last token.

    Returns:
      Logits ``[batch, length, target]``, and what is kept now.
    """
    inputs = _blocks.read_inputs(x, "positions")  # which generation gives, and nothing here needs
    if inputs["tokens"].shape[0] != start.shape[0]:
        raise ValueError(
            f"tokens must have as many rows as the source, {start.shape[0]}, got {inputs['tokens'].shape[0]}"
        )
    hidden, cache = _run("decoder", params["decoder"], inputs, start, cache)
    return hidden @ params["head"]["kernel"] + params["head"]["bias"], cache


def _run(
    name: str, params: PyTree, inputs: dict[str, Any], start: Array, cache: dict[str, Array] | None = None
) -> tuple[Array, dict[str, Array]]:
    """Returns all states ``[batch, length, hidden]`` and what is kept. Each text of a row begins at ``start``."""
    entry = "source" if name == "encoder" else "tokens"
    _blocks.check_indices(entry, inputs["tokens"], params["embedding"], "its vocabulary")
    x = _blocks.look_up(params["embedding"], inputs["tokens"])
    given = jnp.einsum("btw,wgh->tbgh", x, params["input"]["kernel"]) + params["input"]["bias"]
    recurrent = params["recurrent"]

    def step(carry: dict[str, Array], now: tuple[Array, Array]) -> tuple[dict[str, Array], Array]:
        (h, text), (a, segment) = (carry["state"], carry["segment"]), now
        seen = segment != 0
        h = jnp.where((seen & (segment != text))[:, None], start, h)
        b = jnp.einsum("bh,hgk->bgk", h, recurrent["kernel"]) + recurrent["bias"]
        r, z = jax.nn.sigmoid(a[:, 0] + b[:, 0]), jax.nn.sigmoid(a[:, 1] + b[:, 1])
        new = (1 - z) * jnp.tanh(a[:, 2] + r * b[:, 2]) + z * h
        new = jnp.where(seen[:, None], new, h)
        return {"state": new, "segment": jnp.where(seen, segment, text)}, new

    segments = inputs["segments"].T.astype(jnp.int32)
    before = empty_cache(start) if cache is None else cache
    after, states = jax.lax.scan(step, before, (given, segments))
    return _blocks.named(name, states.swapaxes(0, 1)), after

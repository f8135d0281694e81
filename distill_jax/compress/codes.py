"""Narrow codes in the middle of a network: rounded to bits, packed into bytes, and decoded again.

:func:`quantise` rounds a code to few bits while it is trained. :func:`pack` and :func:`unpack` convert it to the
bytes that a device sends and a server receives. :func:`make_decoder` makes a decoder that continues with a
network's own layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_positive, check_real, is_integer
from distill_jax._model import ApplyFn, Model, PyTree, check_model, identity, predict
from distill_jax.compress import linear_codes
from distill_jax.features.capturing import capture, resume
from distill_jax.losses._arguments import to_float
from distill_jax.weights.structure import by_path


def quantise(code: ArrayLike, *, bits: int) -> jax.Array:
    """Rounds a code to 2^bits levels in [−1, 1], with the gradient of the values before rounding.

    q = 2·round((2^b − 1)·(tanh(code) + 1)/2)/(2^b − 1) − 1, with the straight-through estimator.

    Args:
      code: real values of any shape.
      bits: the number of bits per value, b, 1 to 16.

    Returns:
      The rounded code in the shape of ``code``, float32 (float64 for float64 input), because bfloat16
      has no 2^8 levels.

    Raises:
      ValueError: if ``bits`` is out of range.

    References:
      Bengio, Léonard, Courville, `Estimating or Propagating Gradients Through Stochastic Neurons for
      Conditional Computation`, 2013, §4 (straight-through).

    >>> print(quantise(jnp.array([-3.0, -0.1, 0.4, 3.0]), bits=1))
    [-1. -1.  1.  1.]
    """
    levels = _levels(bits)
    check_real("code", code)
    smooth = jnp.tanh(to_float(code))
    rounded = jax.lax.stop_gradient(2 * jnp.round(levels * (smooth + 1) / 2) / levels - 1)
    # In this order the value is the rounded one exactly
    return rounded + (smooth - jax.lax.stop_gradient(smooth))


def pack(code: ArrayLike, *, bits: int) -> np.ndarray:
    """Packs a quantised code into bytes, with b bits per value.

    Args:
      code: what :func:`quantise` returned, ``[n, ...]``.
      bits: the number of bits per value that it was quantised with.

    Returns:
      uint8 ``[n, ceil(values·bits/8)]``, one row per example.

    Raises:
      ValueError: if a value is not one of the 2^bits levels.

    >>> pack(jnp.array([[-1.0, 1.0, 1.0]]), bits=1)
    array([[96]], dtype=uint8)
    """
    highest = _levels(bits)
    check_real("code", code)
    if not np.ndim(code):
        raise ValueError("code must be an array [n, ...], got a single value")
    values = np.asarray(code, np.float64).reshape(len(np.asarray(code)), -1)
    levels = (values + 1) / 2 * highest
    numbers = np.rint(levels).clip(0, highest)
    if not np.all(np.abs(levels - numbers) < 0.1):  # 16 bits in float32 are off by 4e-3
        raise ValueError(f"code must be what quantise(…, bits={bits}) returned")
    places = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    digits = numbers.astype(np.uint32)[..., None] >> places & 1
    return np.packbits(digits.reshape(len(values), -1).astype(bool), axis=1)


def unpack(sent: np.ndarray, shape: tuple[int, ...], *, bits: int) -> np.ndarray:
    """Unpacks a code from the bytes that :func:`pack` returned.

    Args:
      sent: uint8 ``[n, bytes per example]``.
      shape: the shape of one example's code.
      bits: the number of bits per value.

    Returns:
      float32 ``[n, *shape]``.

    Raises:
      ValueError: if such a code has another number of bytes.
    """
    levels = _levels(bits)
    for size in shape:
        check_count("each entry of shape", size)
    if not isinstance(sent, np.ndarray) or sent.dtype != np.uint8:
        raise ValueError(f"sent must be an array of uint8, got {getattr(sent, 'dtype', type(sent).__name__)}")
    count = int(np.prod(shape)) * bits
    if sent.ndim != 2 or sent.shape[1] != -(-count // 8):
        raise ValueError(
            f"a code of shape {shape} at {bits} bits is {-(-count // 8)} bytes per example, got an "
            f"array of shape {sent.shape}"
        )
    digits = np.unpackbits(sent, axis=1)[:, :count].reshape(len(sent), -1, bits).astype(np.float64)
    numbers = digits @ np.exp2(np.arange(bits - 1, -1, -1))
    return (2 * numbers / levels - 1).astype(np.float32).reshape(len(sent), *shape)


def _levels(bits: int) -> int:
    if not is_integer(bits) or not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    return 2**bits - 1


# --- decoders ------------------------------------------------------------------------------------


def make_decoder(
    original: Model,
    name: str,
    inputs: np.ndarray | jax.Array,
    width: int,
    *,
    spread: float = 2.0,
    prepare: Callable[[Any], ArrayLike] = identity,
) -> Model:
    """Makes a decoder of a code from a network's own layers: code → value of a layer → outputs.

    A dense layer, the lift, maps the code to the value named ``name``, and the rest of the network continues
    from there. The lift starts as the value's principal components, mean + code·(spread·S·Vᵀ), so that codes
    of standard deviation 1/spread describe the variation that matters most.

    Args:
      original: the network, whose input must be one array.
      name: the name of one of its values, as :func:`distill_jax.features.layer_shapes` lists them.
      inputs: one array of examples ``[n, ...]``, from which the components are found.
      width: the width of the code, 1 to min(n − 1, size of the value).
      spread: the inverse of the codes' standard deviation; 2 suits codes in [−1, 1].
      prepare: a function that turns a batch of ``inputs`` into the network's input, which is one array.

    Returns:
      The decoder. Its parameters are ``{"lift": {"kernel", "bias"}, "rest": {path: array}}``, where ``rest``
      holds only those parameters of the network that its rest needs.

    Raises:
      ValueError: if ``width`` is out of range, a value is not finite, or the network cannot be cut there
        (see :func:`distill_jax.features.resume`).
    """
    check_positive("spread", spread)
    captured = capture(original, name)

    def value_fn(params, state, x, *, key=None):
        (_, found), state = captured.apply_fn(params, state, x, key=key)
        if name not in found:
            raise ValueError(f"name must be the name of one value, not a pattern, got {name!r}")
        return found[name], state

    values = predict(original.replace(apply_fn=value_fn), inputs, prepare=prepare)
    shape, flat = values.shape[1:], values.reshape(len(values), -1)
    if not is_integer(width) or not 1 <= width <= min(len(flat) - 1, flat.shape[1]):
        raise ValueError(
            f"width must be 1 to the size of the value {name!r}, {flat.shape[1]}, and below the number "
            f"of examples, {len(flat)}; got {width}"
        )
    root = linear_codes.root(flat, centre=True)
    components = linear_codes.reduced_rank(np.eye(flat.shape[1]), root, width)
    dtype = values.dtype
    lift = {
        "kernel": jnp.asarray(spread * components.decoder, dtype),
        "bias": jnp.asarray(flat.mean(0, dtype=np.float64), dtype),
    }
    example = jax.eval_shape(lambda x: jnp.asarray(prepare(x))[0], inputs[:1])
    rest = resume(original, name, example)
    used = _used(lambda p: rest.replace(params=p)(jnp.zeros((1, *shape), dtype)), original.params)
    likes, structure = jax.tree.flatten(jax.eval_shape(lambda p: p, original.params))
    paths = by_path(original.params)
    decode = _Decode(rest.apply_fn, shape, structure, tuple(zip(paths, likes, strict=True)))
    needed = {path: leaf for path, leaf in paths.items() if path in used}
    return Model(decode, {"lift": lift, "rest": needed}, original.state)


@dataclasses.dataclass(frozen=True)
class _Decode:
    """The ``apply_fn`` of :func:`make_decoder`; equal for equal networks, cut at values of one shape."""

    rest_fn: ApplyFn
    shape: tuple[int, ...]
    structure: jax.tree_util.PyTreeDef
    likes: tuple[tuple[str, jax.ShapeDtypeStruct], ...]

    def __call__(
        self, params: PyTree, state: PyTree, x: jax.Array, *, key: jax.Array | None = None
    ) -> tuple[PyTree, PyTree]:
        lifted = x.reshape(len(x), -1) @ params["lift"]["kernel"] + params["lift"]["bias"]
        # Parameters that only the first part of the network needs are absent, and zeros stand for them
        leaves = [
            params["rest"][path] if path in params["rest"] else jnp.zeros(like.shape, like.dtype)
            for path, like in self.likes
        ]
        whole = jax.tree.unflatten(self.structure, leaves)
        return self.rest_fn(whole, state, lifted.reshape(len(x), *self.shape), key=key)


def _used(function: Callable[[PyTree], Any], params: PyTree) -> set[str]:
    """Returns the paths of the parameters that a function's program mentions."""
    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    mentioned = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars}
    paths = by_path(params)
    return {p for p, var in zip(paths, jaxpr.invars, strict=True) if id(var) in mentioned}


def with_inputs(outputs: Model, inputs: Model) -> Model:
    """Joins two decoders of one code into an autoencoder's decoder: code → (outputs, inputs).

    Args:
      outputs: a decoder from the code to the original's outputs.
      inputs: a decoder from the code to the original's inputs. A sigmoid is applied to its outputs, so the
        inputs must lie in [0, 1].

    Returns:
      A model with params and state ``{"outputs": ..., "inputs": ...}``. The reconstructed inputs have the
      flat shape that ``inputs`` returns.
    """
    check_model("outputs", outputs)
    check_model("inputs", inputs)
    parts = {"outputs": outputs, "inputs": inputs}
    return Model(
        _WithInputs(outputs.apply_fn, inputs.apply_fn),
        {name: part.params for name, part in parts.items()},
        {name: part.state for name, part in parts.items()},
    )


@dataclasses.dataclass(frozen=True)
class _WithInputs:
    """The ``apply_fn`` of :func:`with_inputs`; equal for equal parts."""

    outputs_fn: ApplyFn
    inputs_fn: ApplyFn

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        keys = (None, None) if key is None else jax.random.split(key)
        outputs, first = self.outputs_fn(params["outputs"], state["outputs"], x, key=keys[0])
        inputs, second = self.inputs_fn(params["inputs"], state["inputs"], x, key=keys[1])
        return (outputs, jax.nn.sigmoid(inputs)), {"outputs": first, "inputs": second}


def outputs_only(model: Model) -> Model:
    """Makes a model that returns the first of two outputs, such as ŷ of an autoencoder.

    Args:
      model: a model whose outputs are a pair.

    Returns:
      A model with the same parameters and state.
    """
    check_model("model", model)
    return model.replace(apply_fn=_First(model.apply_fn))


@dataclasses.dataclass(frozen=True)
class _First:
    """The ``apply_fn`` of :func:`outputs_only`; equal for equal functions."""

    apply_fn: ApplyFn

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        outputs, state = self.apply_fn(params, state, x, key=key)
        if not isinstance(outputs, tuple) or len(outputs) != 2:
            raise ValueError(
                f"outputs_only needs a model whose outputs are a pair, got {jax.tree.structure(outputs)}"
            )
        return outputs[0], state

"""A narrow code in the middle of a network: what a device sends, and what a server makes of it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._model import Model, predict
from distill_jax.compress import linear_codes
from distill_jax.features.capturing import capture, resume
from distill_jax.weights.structure import by_path, path_name

PyTree = Any


def decoder(
    original: Model,
    name: str,
    inputs: Any,
    width: int,
    *,
    spread: float = 2.0,
    prepare: Callable[[Any], Any] = lambda x: x,
) -> Model:
    """Makes a decoder of a code and a network's own layers: code → value of a layer → outputs.

    A dense layer lifts the code to the value named ``name``, and the rest of the original goes on from
    there. The lift starts as the value's principal components, mean + code·(spread·S·Vᵀ), so that
    codes of standard deviation 1/spread are those of its variation that matter most.

    Args:
      original: the network.
      name: a value of it, as :func:`distill_jax.features.layer_shapes` lists them.
      inputs: examples ``[n, ...]`` from which the components are found.
      width: of the code, 1 to min(n − 1, the value's size).
      spread: 2 suits codes in [−1, 1].
      prepare: turns ``inputs`` into the network's.

    Returns:
      The decoder. Its parameters are ``{"lift": {"kernel", "bias"}, "rest": {path: …}}``, of the
      original's those alone that the rest needs.

    Raises:
      ValueError: if the code is wider than that, a value is not finite, or the original cannot be cut
        there (see :func:`distill_jax.features.resume`).
    """
    apply_fn, params, model_state = original
    captured = capture(apply_fn, name)

    def value_fn(params, model_state, x):
        (_, found), model_state = captured(params, model_state, x)
        if name not in found:
            raise ValueError(f"name must be one value's, not a pattern, got {name!r}")
        return found[name], model_state

    values = predict(value_fn, params, model_state, inputs, prepare=prepare)
    shape, flat = values.shape[1:], values.reshape(len(values), -1)
    if not 1 <= width <= min(len(flat) - 1, flat.shape[1]):
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
    rest_fn = resume(apply_fn, name, example)
    kept = _used(lambda p: rest_fn(p, model_state, jnp.zeros((1, *shape), dtype))[0], params)
    like = jax.eval_shape(lambda p: p, params)

    def decode(params, model_state, code, *, key=None):
        lifted = code.reshape(len(code), -1) @ params["lift"]["kernel"] + params["lift"]["bias"]
        whole = jax.tree_util.tree_map_with_path(
            lambda path, leaf: params["rest"].get(path_name(path), jnp.zeros(leaf.shape, leaf.dtype)), like
        )
        return rest_fn(whole, model_state, lifted.reshape(len(code), *shape), key=key)

    rest = {path: leaf for path, leaf in by_path(params).items() if path in kept}
    return Model(decode, {"lift": lift, "rest": rest}, model_state)


def _used(function: Callable[[PyTree], Any], params: PyTree) -> set[str]:
    """The paths of the parameters that a function's program mentions."""
    jaxpr = jax.make_jaxpr(function)(params).jaxpr
    mentioned = {id(atom) for eqn in jaxpr.eqns for atom in eqn.invars}
    paths = by_path(params)
    return {p for p, var in zip(paths, jaxpr.invars, strict=True) if id(var) in mentioned}


def with_inputs(outputs_fn: Callable[..., Any], inputs_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an autoencoder's decoder, code → (outputs, inputs), of two.

    Args:
      outputs_fn: an ``apply_fn`` from the code to the original's outputs.
      inputs_fn: likewise, to what becomes the inputs through a sigmoid: they must lie in [0, 1].

    Returns:
      An ``apply_fn`` with parameters and state ``{"outputs": …, "inputs": …}``. It returns x̂ in the
      flat shape of ``inputs_fn``.
    """

    def apply_fn(params, model_state, code, *, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        outputs, first = outputs_fn(params["outputs"], model_state["outputs"], code, key=keys[0])
        inputs, second = inputs_fn(params["inputs"], model_state["inputs"], code, key=keys[1])
        return (outputs, jax.nn.sigmoid(inputs)), {"outputs": first, "inputs": second}

    return apply_fn


def outputs_only(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an ``apply_fn`` that returns the first of two outputs, such as an autoencoder's ŷ.

    Args:
      apply_fn: one whose outputs are a pair.
    """

    def first(params, model_state, x, *, key=None):
        (outputs, _), model_state = apply_fn(params, model_state, x, key=key)
        return outputs, model_state

    return first

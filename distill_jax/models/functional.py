"""The border between model libraries and this one: a module becomes a function and pytrees.

The library sees ``apply_fn(params, model_state, x, *, key=None) -> (outputs, model_state)`` alone.
``key=None`` is evaluation: no dropout, running statistics, the state returned as it came. With a key
the model is in training mode, and everything random in it comes from that key.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx


class Model(NamedTuple):
    """A model as a function and its arrays.

    Attributes:
      apply_fn: ``(params, model_state, x, *, key=None) -> (outputs, model_state)``.
      params: the pytree that is trained.
      model_state: everything else that changes, such as BatchNorm's statistics; may be empty.
    """

    apply_fn: Callable[..., tuple[Any, Any]]
    params: Any
    model_state: Any


def from_nnx(module: nnx.Module) -> Model:
    """Splits a Flax NNX module into a :class:`Model`.

    Args:
      module: called as ``module(x)``. Its mode is set with ``module.train()`` and ``module.eval()``,
        its random streams are reseeded from the step's key; the module itself is left in evaluation
        mode.

    Returns:
      ``params`` are the ``nnx.Param``s; ``model_state`` is every other variable but random state.
    """
    # The random streams are reseeded at each training call, so what they hold is a constant.
    module.train()
    train_def, params, random_state, model_state = nnx.split(module, nnx.Param, nnx.RngState, ...)
    module.eval()
    eval_def = nnx.split(module, nnx.Param, nnx.RngState, ...)[0]
    streams = sorted({stream.tag for stream in _rng_streams(module)})

    def apply_fn(params, model_state, x, *, key=None):
        # `copy=True`, or BatchNorm under jax.grad raises TraceContextError
        if key is None:
            return nnx.merge(eval_def, params, random_state, model_state, copy=True)(x), model_state
        module = nnx.merge(train_def, params, random_state, model_state, copy=True)
        keys = jax.random.split(key, len(streams)) if streams else []
        nnx.reseed(module, **dict(zip(streams, keys, strict=True)))
        outputs = module(x)
        return outputs, nnx.split(module, nnx.Param, nnx.RngState, ...)[3]

    # Plain dicts: what is saved, compared and pruned should not depend on NNX's own containers.
    return _with_pure_trees(apply_fn, params, model_state)


def _rng_streams(module):
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.RngStream)]


def _with_pure_trees(apply_fn, params, model_state) -> Model:
    def pure_apply(pure_params, pure_state, x, *, key=None):
        outputs, state = apply_fn(
            _restore(params_like, pure_params), _restore(state_like, pure_state), x, key=key
        )
        return outputs, nnx.to_pure_dict(state)

    params_like, state_like = nnx.eval_shape(lambda: params), nnx.eval_shape(lambda: model_state)
    return Model(pure_apply, nnx.to_pure_dict(params), nnx.to_pure_dict(model_state))


def _restore(like, pure):
    state = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(state, pure)
    return state


def from_linen(module: linen.Module, key: jax.Array, x: Any) -> Model:
    """Initialises a Linen module and makes it a :class:`Model`.

    Args:
      module: called as ``module(x)``, or ``module(x, train=…)`` where it takes ``train`` (and then it
        is told).
      key: initialises the parameters.
      x: an example input, a batch; its values are not used.

    Returns:
      ``params`` is the collection of that name, ``model_state`` all other collections. Dropout draws
      from the stream ``"dropout"``.
    """
    takes_train = "train" in inspect.signature(module.__call__).parameters

    def options(train: bool) -> dict[str, bool]:
        return {"train": train} if takes_train else {}

    variables = dict(module.init(key, x, **options(False)))
    params = variables.pop("params", {})

    def apply_fn(params, model_state, x, *, key=None):
        variables = {"params": params, **model_state}
        if key is None:
            return module.apply(variables, x, **options(False)), model_state
        outputs, changed = module.apply(
            variables, x, **options(True), rngs={"dropout": key}, mutable=list(model_state)
        )
        return outputs, dict(changed)

    return Model(apply_fn, params, variables)

"""The border between model libraries and this one: a module becomes a function and pytrees.

The library sees ``apply_fn(params, model_state, x, *, key=None) -> (outputs, model_state)`` alone.
``key=None`` is evaluation: no dropout, running statistics, the state returned as it came. With a key
the model is in training mode, and everything random in it comes from that key.
"""

import contextlib
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import linen, nnx

from distill_jax.features.capturing import name_values, naming


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
      Plain nested dicts, so that what is saved and compared does not depend on NNX's containers:
      ``params`` are the ``nnx.Param``s; ``model_state`` is every other variable but random state.
    """
    kinds = (nnx.Param, nnx.RngState, ...)
    module.train()
    training: Any = nnx.split(module, *kinds)
    module.eval()
    evaluation: Any = nnx.split(module, *kinds)
    # The random streams are reseeded at each training call, so what they hold is a constant.
    random_state = training[2]
    params_like, state_like = nnx.eval_shape(lambda: (training[1], training[3]))
    nodes = nnx.iter_graph(module)
    streams = sorted({str(node.tag) for _, node in nodes if isinstance(node, nnx.RngStream)})

    def merge(definition, params, model_state):
        # `copy=True`, or BatchNorm under jax.grad raises TraceContextError
        restored = (_restore(params_like, params), random_state, _restore(state_like, model_state))
        module = nnx.merge(definition, *restored, copy=True)
        return _name_calls(module) if naming() else module

    def apply_fn(params, model_state, x, *, key=None):
        if key is None:
            return merge(evaluation[0], params, model_state)(x), model_state
        module = merge(training[0], params, model_state)
        if streams:
            keys = jax.random.split(key, len(streams))
            nnx.reseed(module, **dict(zip(streams, keys, strict=True)))
        outputs = module(x)
        after: Any = nnx.split(module, *kinds)
        return outputs, nnx.to_pure_dict(after[3])

    return Model(apply_fn, nnx.to_pure_dict(training[1]), nnx.to_pure_dict(training[3]))


def _restore(like, pure):
    state = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(state, pure)
    return state


_PATH = "_capture_path"


def _name_calls(module):
    """Makes the submodules of a module name what they return; for :mod:`distill_jax.features.capturing`."""
    for path, node in list(nnx.iter_graph(module)):
        if path and isinstance(node, nnx.Module) and callable(node):
            setattr(node, _PATH, ".".join(map(str, path)))
            object.__setattr__(node, "__class__", _naming_class(type(node)))
    return module


@functools.cache
def _naming_class(cls):
    def call(self, *args, **kwargs):
        return name_values(getattr(self, _PATH), cls.__call__(self, *args, **kwargs))

    # The path stands in an attribute, and the class is NNX's to know: transformations that take the
    # module apart and put it together again keep both.
    body = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    options = {"pytree": cls._pytree__is_pytree}
    return types.new_class(cls.__name__, (cls,), options, lambda space: space.update(body))


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

    def options(train: bool) -> dict[str, Any]:
        return {"train": train} if takes_train else {}

    variables = dict(module.init(key, x, **options(False)))
    params = variables.pop("params", {})

    def apply_fn(params, model_state, x, *, key=None):
        variables = {"params": params, **model_state}
        with linen.intercept_methods(_name_call) if naming() else contextlib.nullcontext():
            if key is None:
                return module.apply(variables, x, **options(False)), model_state
            outputs, changed = module.apply(
                variables, x, **options(True), rngs={"dropout": key}, mutable=list(model_state)
            )
        return outputs, dict(changed)

    return Model(apply_fn, params, variables)


def _name_call(function, args, kwargs, context):
    """Intercepts a Linen method: a submodule's call names what it returns."""
    outputs = function(*args, **kwargs)
    path = context.module.path if context.method_name == "__call__" else ()
    return name_values(".".join(path), outputs) if path else outputs

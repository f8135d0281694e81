"""Conversion of Flax NNX and Linen modules to :class:`~distill_jax.models.Model`."""

import contextlib
import dataclasses
import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen, nnx

from distill_jax._checks import check_choice, check_function, check_key
from distill_jax._model import ApplyFn, Model, PyTree, check_inputs, check_model, identity
from distill_jax.features.capturing import name_values, naming


def from_nnx(module: nnx.Module) -> Model:
    """Splits a Flax NNX module into a :class:`Model`.

    Args:
      module: a module that is called as ``module(x)``. Its mode is set with ``module.train()`` and
        ``module.eval()``, and its random streams are reseeded from the step's key. The module itself is
        left in evaluation mode.

    Returns:
      A model whose ``params`` are the module's ``nnx.Param`` variables and whose ``state`` is every other
      variable except random state. Both are plain nested dicts, so that what is saved or compared does
      not depend on NNX's containers. Two modules of the same structure give models with equal
      ``apply_fn``, so one compiled program serves both.

    Raises:
      ValueError: if ``module`` is something else.
    """
    _check_module(module, nnx.Module, linen.Module, "from_linen")
    kinds = (nnx.Param, nnx.RngState, ...)
    module.train()
    training: Any = nnx.split(module, *kinds)
    module.eval()
    evaluation: Any = nnx.split(module, *kinds)
    nodes = nnx.iter_graph(module)
    streams = sorted({str(node.tag) for _, node in nodes if isinstance(node, nnx.RngStream)})
    apply_fn = _known(
        _NnxFunction(
            evaluation[0],
            training[0],
            tuple(streams),
            random_state=jax.tree.map(_blank, training[2]),
            like=nnx.eval_shape(lambda: (training[1], training[3])),
        )
    )
    return Model(apply_fn, nnx.to_pure_dict(training[1]), nnx.to_pure_dict(training[3]))


def _check_module(module: Any, kind: type, other: type, instead: str) -> None:
    """Raises ``ValueError`` unless a module is of this kind of Flax; says which function takes the other."""
    if isinstance(module, kind):
        return
    got = f"the class {module.__name__}" if isinstance(module, type) else f"a {type(module).__name__}"
    advice = f": use models.{instead}" if isinstance(module, other) else ""
    raise ValueError(f"module must be an object of {kind.__module__}.{kind.__name__}, got {got}{advice}")


F = TypeVar("F", bound=ApplyFn)
_functions: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def _known(function: F) -> F:
    """Returns the function of an earlier model if it is equal, else this one.

    A jitted call compares the functions of its models. That takes no time for one and the same function,
    and a millisecond for equal ones of a large network.
    """
    found = _functions.get(hash(function))
    if found == function:
        return found
    _functions[hash(function)] = function
    return function


class _NnxFunction:
    """The ``apply_fn`` of an NNX module; equal for modules of the same structure."""

    def __init__(
        self, evaluation: Any, training: Any, streams: tuple[str, ...], random_state: Any, like: Any
    ):
        self.definitions = evaluation, training
        self.streams = streams
        self.random_state = random_state
        self.like = like
        self._hash = hash((self.definitions, streams))  # once: a jitted call asks for it each time

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, _NnxFunction) or self._hash != other._hash:
            return False
        return (self.definitions, self.streams) == (other.definitions, other.streams)

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        module: Any = self.merge(key is not None, params, state)
        if key is None:
            return module(x), state
        if self.streams:
            keys = jax.random.split(key, len(self.streams))
            nnx.reseed(module, **dict(zip(self.streams, keys, strict=True)))
        outputs = module(x)
        after: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return outputs, nnx.to_pure_dict(after[3])

    def merge(self, training: bool, params: PyTree, state: PyTree) -> nnx.Module:
        """The module with these arrays, in one of its modes."""
        params_like, state_like = self.like
        restored = (_restore(params_like, params), self.random_state, _restore(state_like, state))
        # `copy=True`, or BatchNorm under jax.grad raises TraceContextError
        module = nnx.merge(self.definitions[training], *restored, copy=True)
        return _name_calls(module) if naming() else module


def _blank(leaf: jax.Array) -> jax.Array:
    """A constant in the place of random state, which each training call reseeds.

    So models that are equal compute the same, and nothing is kept of a transformation in which the module
    was made.
    """
    with jax.ensure_compile_time_eval():
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.broadcast_to(jax.random.key(0, impl=jax.random.key_impl(leaf)), leaf.shape)


def _restore(like: Any, pure: PyTree) -> Any:
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


def from_linen(module: linen.Module, key: jax.Array, x: PyTree) -> Model:
    """Initialises a Flax Linen module and makes a :class:`Model` of it.

    Args:
      module: a module that is called as ``module(x)``, or as ``module(x, train=...)`` where its
        ``__call__`` has an argument ``train``, which is then False in evaluation and True in training.
      key: a random key that initialises the parameters.
      x: an example batch of inputs; its values are not used.

    Returns:
      A model whose ``params`` are the collection of that name and whose ``state`` holds all other
      collections, such as ``batch_stats``. Dropout draws from the stream ``"dropout"``.

    Raises:
      ValueError: if ``module`` is no Linen module, or is told of training by another argument than ``train``;
        if ``key`` is no random key, or ``x`` no batch.
    """
    _check_module(module, linen.Module, nnx.Module, "from_nnx")
    check_key("key", key)
    check_inputs("x", x)
    parameters = inspect.signature(module.__call__).parameters
    takes_train = "train" in parameters
    for name in ("deterministic", "training", "is_training"):
        if name in parameters and not takes_train:
            raise ValueError(
                f"{type(module).__name__}.__call__ has an argument {name!r}, which would never change: give it an "
                "argument named train instead, True in training and False in evaluation"
            )
    apply_fn = _known(_LinenFunction(module, takes_train))
    variables = dict(module.init(key, x, **apply_fn.mode(training=False)))
    params = variables.pop("params", {})
    return Model(apply_fn, params, variables)


@dataclasses.dataclass(frozen=True, eq=False)
class _LinenFunction:
    """The ``apply_fn`` of a Linen module; equal for equal modules."""

    module: linen.Module
    takes_train: bool

    def __hash__(self) -> int:
        return hash((type(self.module), self.takes_train))  # a module's fields need not be hashable

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _LinenFunction) or self.takes_train != other.takes_train:
            return False
        try:
            return self.module is other.module or bool(self.module == other.module)
        except ValueError:  # a field is an array, which has no single answer
            return False

    def mode(self, *, training: bool) -> dict[str, Any]:
        return {"train": training} if self.takes_train else {}

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        variables = {"params": params, **state}
        with linen.intercept_methods(_name_call) if naming() else contextlib.nullcontext():
            if key is None:
                return self.module.apply(variables, x, **self.mode(training=False)), state
            outputs, changed = self.module.apply(
                variables, x, **self.mode(training=True), rngs={"dropout": key}, mutable=list(state)
            )
        return outputs, dict(changed)


def compose(
    encoder: Model,
    decoder: Model,
    *,
    code: Callable[[jax.Array], jax.Array] = identity,
    frozen: str | None = None,
) -> Model:
    """Puts an encoder and a decoder in a row: outputs = decoder(code(encoder(x))).

    Args:
      encoder: the first model.
      decoder: the second model; its input is what ``code`` returns.
      code: applied between the two, for example :func:`distill_jax.compress.codes.quantise`.
      frozen: ``"encoder"`` or ``"decoder"``: that part always runs in evaluation mode and gets no
        gradient. None trains both.

    Returns:
      A model with params and state ``{"encoder": ..., "decoder": ...}``.

    Raises:
      ValueError: for another value of ``frozen``.
    """
    check_choice("frozen", frozen, ("encoder", "decoder", None))
    check_model("encoder", encoder)
    check_model("decoder", decoder)
    check_function("code", code, "code")
    parts = {"encoder": encoder, "decoder": decoder}
    return Model(
        _Composed(encoder.apply_fn, decoder.apply_fn, code, frozen),
        {name: part.params for name, part in parts.items()},
        {name: part.state for name, part in parts.items()},
    )


@dataclasses.dataclass(frozen=True)
class _Composed:
    """The ``apply_fn`` of :func:`compose`; equal for equal parts."""

    encoder_fn: ApplyFn
    decoder_fn: ApplyFn
    code: Callable[[jax.Array], jax.Array]
    frozen: str | None

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        keys = (None, None) if key is None else jax.random.split(key)
        code, encoder_state = self.part("encoder", self.encoder_fn, params, state, x, keys[0])
        outputs, decoder_state = self.part(
            "decoder", self.decoder_fn, params, state, self.code(code), keys[1]
        )
        return outputs, {"encoder": encoder_state, "decoder": decoder_state}

    def part(
        self, name: str, apply_fn: ApplyFn, params: PyTree, state: PyTree, x: Any, key: Any
    ) -> tuple[Any, PyTree]:
        if name == self.frozen:
            return apply_fn(jax.lax.stop_gradient(params[name]), state[name], x)
        return apply_fn(params[name], state[name], x, key=key)


def _name_call(function, args, kwargs, context):
    """Intercepts a Linen method: a submodule's call names what it returns."""
    outputs = function(*args, **kwargs)
    path = context.module.path if context.method_name == "__call__" else ()
    return name_values(".".join(path), outputs) if path else outputs


def side_by_side(*models: Model) -> Model:
    """Joins several models into one that gives all their outputs, for :func:`distill_jax.train.mutual`.

    Args:
      models: at least one model; all get the same input, and keys of their own in training.

    Returns:
      A model whose params, state and outputs are tuples with one entry per model.

    Raises:
      ValueError: if there is no model.
    """
    if not models:
        raise ValueError("side_by_side needs at least one model, got none")
    for number, model in enumerate(models):
        check_model(f"models[{number}]", model)
    apply_fn = _SideBySide(tuple(model.apply_fn for model in models))
    return Model(apply_fn, tuple(model.params for model in models), tuple(model.state for model in models))


@dataclasses.dataclass(frozen=True)
class _SideBySide:
    """The ``apply_fn`` of :func:`side_by_side`; equal for equal members."""

    members: tuple[ApplyFn, ...]

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        keys = [None] * len(self.members) if key is None else jax.random.split(key, len(self.members))
        parts = zip(self.members, params, state, keys, strict=True)
        outputs, states = zip(*(fn(p, s, x, key=k) for fn, p, s, k in parts), strict=True)
        return outputs, states

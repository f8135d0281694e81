"""The one form of a model: a function and its arrays, as a pytree."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from distill_jax._checks import check_count, check_function
from distill_jax._cpu import compiler_options

PyTree = Any


class ApplyFn(Protocol):
    """A model's function: ``(params, state, x, *, key=None) -> (outputs, state)``.

    ``key=None`` means evaluation: no dropout, running statistics, and the state comes back as it was
    given. With a key the model is in training mode, and all its randomness comes from that key.
    """

    def __call__(
        self, params: PyTree, state: PyTree, x: Any, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]: ...


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params", "state"], meta_fields=["apply_fn"]
)
@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no single answer to "equal?", and no hash
class Model:
    """A model: a function, the parameters that are trained, and the state that training changes.

    A ``Model`` is a pytree whose leaves are the arrays of ``params`` and ``state``; ``apply_fn`` is
    static. So a model can be an argument or a result of a jitted function, and be saved, sharded,
    averaged, or mapped over seeds with ``vmap``.

    Attributes:
      apply_fn: ``(params, state, x, *, key=None) -> (outputs, state)``, see :class:`ApplyFn`.
      params: the pytree of arrays that is trained.
      state: all other arrays that change in training, such as BatchNorm's running statistics.

    >>> import jax.numpy as jnp
    >>> model = Model(lambda params, state, x, *, key=None: (x @ params, state), jnp.ones((3, 2)))
    >>> model(jnp.ones((1, 3)))
    Array([[3., 3.]], dtype=float32)
    """

    apply_fn: ApplyFn
    params: PyTree
    state: PyTree = dataclasses.field(default_factory=dict)

    def __call__(self, x: Any) -> Any:
        """Computes the outputs for a batch in evaluation mode."""
        return self.apply_fn(self.params, self.state, x)[0]

    def apply(self, x: Any, *, key: jax.Array | None = None) -> tuple[Any, PyTree]:
        """Computes ``(outputs, new state)``, in training mode where a key is given."""
        return self.apply_fn(self.params, self.state, x, key=key)

    def replace(self, **changes: Any) -> "Model":
        """Returns a copy with other ``params``, ``state`` or ``apply_fn``."""
        return dataclasses.replace(self, **changes)


def check_model(name: str, model: Any) -> None:
    """Raises ``ValueError`` unless a value is a :class:`Model`; the message says how one is made of it."""
    if isinstance(model, Model):
        return
    homes = " ".join(cls.__module__ for cls in type(model).__mro__)
    got, advice = f"{type(model).__name__}", ""
    if isinstance(model, type):
        got, advice = f"the class {model.__name__}", ": make an object of it first"
    elif "flax.nnx" in homes:
        got, advice = f"the NNX module {got}", ": wrap it, models.from_nnx(module)"
    elif "flax.linen" in homes:
        got, advice = f"the Linen module {got}", ": wrap it, models.from_linen(module, key, x)"
    elif callable(model):
        got, advice = f"a {got}", ": wrap it, models.from_function(fn, params)"
    raise ValueError(f"{name} must be a models.Model, got {got}{advice}")


def from_function(fn: Callable[..., Any], params: PyTree) -> Model:
    """Makes a :class:`Model` of a plain function without state.

    Args:
      fn: ``(params, x) -> outputs``; or ``(params, x, key=None) -> outputs`` if it has a parameter named
        ``key``, which is None in evaluation and a random key in training.
      params: the pytree of arrays that is trained.

    Returns:
      The model, with an empty state.

    >>> import jax.numpy as jnp
    >>> from_function(lambda w, x: x * w, jnp.float32(2.0))(jnp.float32(3.0))
    Array(6., dtype=float32)
    """
    if isinstance(fn, Model) or ("flax" in type(fn).__module__ and not hasattr(fn, "__wrapped__")):
        raise ValueError(
            f"fn must be a function (params, x), got a {type(fn).__name__}: a Model is one already, and modules "
            "of Flax are wrapped by models.from_nnx and models.from_linen"
        )
    check_function("fn", fn, "params, x")
    return Model(_PlainFunction(fn), params, {})


@dataclasses.dataclass(frozen=True)
class _PlainFunction:
    """Gives a plain function the signature of :class:`ApplyFn`; equal where the function is the same."""

    fn: Callable[..., Any]

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        takes_key = "key" in inspect.signature(self.fn).parameters
        return self.fn(params, x, **({"key": key} if takes_key else {})), state


def identity(x: Any) -> Any:
    """Returns its argument: the ``prepare`` of inputs that are ready as they are."""
    return x


def check_inputs(name: str, x: PyTree) -> None:
    """Raises ``ValueError`` unless a value is a batch: at least one array, and each with a batch axis."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(x)]
    if not shapes or () in shapes:
        raise ValueError(f"{name} must be a batch of inputs, arrays [batch, ...], got shapes {shapes}")


def example_count(name: str, data: PyTree) -> int:
    """Returns the number of examples of arrays ``[n, ...]``, n ≥ 1.

    Raises:
      ValueError: if there is no example, or the arrays are not equally long.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(data)]
    lengths = {shape[0] for shape in shapes if shape}
    if len(lengths) != 1 or () in shapes or 0 in lengths:
        raise ValueError(f"{name} must have as many examples each, at least one, got shapes {shapes}")
    return lengths.pop()


def padded_batches(data: PyTree, batch_size: int) -> Iterator[tuple[PyTree, np.ndarray]]:
    """Splits arrays into batches of one size, so that a program on them is compiled once.

    Args:
      data: a pytree of arrays ``[n, ...]``.
      batch_size: the number of examples per batch, at least 1; at most n are used.

    Returns:
      Pairs (batch, counted), one after another. The last batch is filled up with the first examples;
      ``counted`` is bool ``[batch_size]``, False for these.

    Raises:
      ValueError: if there are no examples, the arrays are not equally long, or ``batch_size`` is not
        positive.
    """
    check_count("batch_size", batch_size)
    count = example_count("the arrays", data)
    size = min(batch_size, count)

    def batch(start: int) -> tuple[PyTree, np.ndarray]:
        rows = np.arange(start, start + size)
        chosen = slice(start, start + size) if start + size <= count else rows % count
        return jax.tree.map(lambda x: x[chosen], data), rows < count

    return map(batch, range(0, count, size))


@functools.cache
def _compiled_forward() -> Callable[..., Any]:
    def forward(model: Model, x: Any, prepare: Callable[[Any], Any]) -> Any:
        return model(prepare(x))

    return jax.jit(forward, static_argnames="prepare", compiler_options=compiler_options())


def predict(
    model: Model, inputs: PyTree, *, prepare: Callable[[Any], Any] = identity, batch_size: int = 500
) -> Any:
    """Runs a model over a data set in evaluation mode, batch by batch.

    Args:
      model: the model.
      inputs: an array or a pytree of arrays ``[n, ...]``.
      prepare: a function applied to each batch of inputs inside the compiled program. Pass the same
        function object each time: a new one is compiled anew.
      batch_size: the number of examples per batch.

    Returns:
      The model's outputs for all inputs as NumPy arrays ``[n, ...]``, floating-point numbers in float32.

    Raises:
      ValueError: if ``model`` is no :class:`Model`, there are no examples, the arrays are not equally long, or
        ``batch_size`` is not a positive integer.
    """

    def whole(*parts: Any) -> np.ndarray:
        array = np.concatenate(parts)
        floating = jax.dtypes.issubdtype(array.dtype, np.floating)
        return array.astype(np.float32) if floating else array

    check_model("model", model)
    check_function("prepare", prepare, "inputs")
    inputs = jax.tree.map(np.asarray, inputs)
    forward = _compiled_forward()
    outputs = [
        jax.tree.map(lambda y, c=counted: np.asarray(y)[: c.sum()], forward(model, batch, prepare))
        for batch, counted in padded_batches(inputs, batch_size)
    ]
    return jax.tree.map(whole, *outputs)

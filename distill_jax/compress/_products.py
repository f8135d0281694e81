"""The parameters that multiply as matrices, in any model, and the inputs that they multiply.

What factors, compensates or prunes kernels by calibration inputs shares this: which parameters are kernels,
the rows of their inputs on a batch, and the triangle that stands for all rows seen so far.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax import _jaxpr
from distill_jax._checks import check_sequence
from distill_jax._model import Model, PyTree, check_inputs
from distill_jax.weights.structure import path_name


class Kernel(NamedTuple):
    """A parameter that multiplies its layer's inputs as a matrix ``[inputs, outputs]``.

    Attributes:
      shape: the shape of the parameter.
      order: its axes in the order of the matrix: the axes of the inputs (of a convolution, the channels
        last), and then those of the outputs.
      positions: number of places of an example at which the kernel is applied; 1 for a dense layer on a
        vector.
      free: number of axes of the outputs.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    positions: float
    free: int = 1

    @property
    def summed(self) -> tuple[int, ...]:
        """The axes of the inputs."""
        return self.order[: len(self.order) - self.free]

    @property
    def made(self) -> tuple[int, ...]:
        """The axes of the outputs."""
        return self.order[len(self.order) - self.free :]

    @property
    def inputs(self) -> int:
        """Number of rows of the matrix."""
        return math.prod(self.shape[axis] for axis in self.summed)

    @property
    def outputs(self) -> int:
        """Number of columns of the matrix."""
        return math.prod(self.shape[axis] for axis in self.made)

    def matrix(self, array: ArrayLike) -> np.ndarray:
        """Returns the parameter as a float64 matrix ``[inputs, outputs]``."""
        array = np.transpose(np.asarray(array, np.float64), self.order)
        return array.reshape(-1, self.outputs)

    def array(self, matrix: np.ndarray) -> np.ndarray:
        """Returns a matrix ``[inputs, outputs]`` as an array of the parameter's shape."""
        return matrix.reshape([self.shape[axis] for axis in self.order]).transpose(np.argsort(self.order))


class Probe(NamedTuple):
    """What :func:`probe` finds.

    Attributes:
      kernels: path → the kernel, in the order of computation.
      others: path → the operation that uses a parameter of several axes otherwise.
    """

    kernels: dict[str, Kernel]
    others: dict[str, str]


def probe(model: Model, x: PyTree) -> Probe:
    """Traces a model and notes its kernels. Nothing is computed.

    Args:
      model: the model; its arrays may be ``jax.ShapeDtypeStruct``.
      x: a batch of inputs, or ``jax.ShapeDtypeStruct``.

    Returns:
      The kernels.
    """
    kernels: dict[str, Kernel] = {}
    others: dict[str, str] = {}

    def run(model: Model, x: PyTree) -> None:
        uses, rest = _uses(model, x)
        others.update(rest)
        examples = len(jax.tree.leaves(x)[0])
        for path, each in uses.items():
            kernel = each[0].kernel
            places = sum(use.output.size for use in each) / (kernel.outputs * examples)
            kernels[path] = kernel._replace(positions=places)

    jax.eval_shape(run, model, x)
    return Probe(kernels, others)


class Use(NamedTuple):
    """One use of a kernel in a program.

    Attributes:
      path: the kernel's path.
      kernel: the kernel; it does not know its number of places.
      primitive: the name of the operation.
      output: what the operation gives.
      axes: the axes of ``output`` that are the kernel's outputs.
      rows: computes ``[places, inputs]``, what the kernel multiplies.
    """

    path: str
    kernel: Kernel
    primitive: str
    output: jax.Array
    axes: tuple[int, ...]
    rows: Callable[[], jax.Array]


def watched(
    model: Model,
    use: Callable[[Use], jax.Array],
    other: Callable[[str, str], object] = lambda path, name: None,
) -> Model:
    """Returns a model that lets ``use`` look at each use of a kernel, and replace what the operation gives.

    Args:
      model: the model.
      use: is called for each use of a kernel, whenever the model is traced or run.
      other: is called with the path of a parameter of several axes and the operation that uses it otherwise.
    """

    def note(jaxpr: Any, eqn: Any, inputs: list[Any], views: list[int]) -> list[Any]:
        arrays = [v.array(v.value) if isinstance(v, _jaxpr.View) else v for v in inputs]
        outputs = _jaxpr.alone(jaxpr, eqn, arrays)
        for place in views:
            view = inputs[place]
            shape = tuple(view.value.shape)
            free = _jaxpr.outputs_axes(eqn, place, len(shape)) if len(views) == 1 else None
            if free is None:
                other(view.path, eqn.primitive.name)
                continue
            order = view.order(len(shape))
            order = tuple(order[i] for i in (*_jaxpr.summed_axes(eqn, place), *free))
            rank = outputs[0].ndim
            axes = tuple(range(rank - len(free), rank) if place else range(len(free)))
            if eqn.primitive.name == "conv_general_dilated":
                axes = (eqn.params["dimension_numbers"].out_spec[1],)
            kernel = Kernel(shape, order, 0.0, len(free))
            rows = functools.partial(_jaxpr.rows_of, eqn, arrays, place)
            outputs = [use(Use(view.path, kernel, eqn.primitive.name, outputs[0], axes, rows))]
        return outputs

    def apply_fn(
        params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[PyTree, PyTree]:
        pairs = jax.tree_util.tree_leaves_with_path(params)
        values = [_jaxpr.View(leaf, path_name(path)) if leaf.ndim > 1 else leaf for path, leaf in pairs]
        return _jaxpr.run(model.apply_fn, [params, state, x, key], values, note)

    return model.replace(apply_fn=apply_fn)


def _uses(model: Model, x: PyTree) -> tuple[dict[str, list[Use]], dict[str, str]]:
    """Runs a model, and lists the uses of each kernel, and how other parameters of several axes are used."""
    found: dict[str, list[Use]] = {}
    others: dict[str, str] = {}

    def note(use: Use) -> jax.Array:
        each = found.setdefault(use.path, [])
        if each and each[0].kernel != use.kernel:
            others.setdefault(use.path, f"{use.primitive} in several ways")
        each.append(use)
        return use.output

    watched(model, note, others.setdefault).apply_fn(model.params, model.state, x)
    return {path: each for path, each in found.items() if path not in others}, others


def _rows(uses: Sequence[Use]) -> jax.Array:
    return jnp.concatenate([use.rows() for use in uses])


@jax.jit
def _all_rows(model: Model, x: PyTree) -> dict[str, jax.Array]:
    return {path: _rows(each) for path, each in _uses(model, x)[0].items()}


@jax.jit
def _one_kernels_rows(
    model: Model, x: PyTree, wanted: dict[str, jax.Array]
) -> dict[Any, tuple[jax.Array, jax.Array]]:
    """Computes rows for each shape that rows of some kernel have, and whether they are those of the wanted kernel."""
    found: dict[Any, tuple[jax.Array, jax.Array]] = {}
    for here, uses in ((wanted[path], uses) for path, uses in _uses(model, x)[0].items() if path in wanted):
        rows = functools.partial(_rows, uses)
        like = jax.eval_shape(rows)
        kind = like.shape, str(like.dtype)
        other, seen = found.get(kind, (jnp.zeros(like.shape, like.dtype), jnp.zeros((), bool)))
        found[kind] = jax.lax.cond(here, rows, lambda other=other: other), seen | here
    return found


def rows_of(model: Model, x: PyTree) -> dict[str, np.ndarray]:
    """Computes what kernels multiply on a batch.

    Args:
      model: the model.
      x: a batch of inputs.

    Returns:
      path → float64 ``[any, inputs]``.

    Raises:
      ValueError: if a layer's inputs are not finite.
    """
    found = _all_rows(model, jax.tree.map(jnp.asarray, x))
    return {path: _finite(path, rows) for path, rows in found.items()}


def rows_of_one(model: Model, x: PyTree, kernels: Mapping[str, Kernel], path: str) -> np.ndarray:
    """Computes what one kernel multiplies on a batch, with one program for all kernels.

    Args:
      model: the model.
      x: a batch of inputs.
      kernels: all kernels of the model, from :func:`probe`.
      path: the kernel.

    Returns:
      float64 ``[any, inputs]``.

    Raises:
      ValueError: if the layer's inputs are not finite.
    """
    found = _one_kernels_rows(model, jax.tree.map(jnp.asarray, x), {name: name == path for name in kernels})
    (rows,) = (rows for rows, wanted in found.values() if wanted)
    return _finite(path, rows)


def _finite(path: str, rows: jax.Array) -> np.ndarray:
    found = np.asarray(rows, np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"the inputs of {path} are not finite: check the model's parameters and inputs")
    return found


def check_batches(batches: Any) -> None:
    """Raises ``ValueError`` unless a value is a sequence of at least one batch of inputs."""
    check_sequence("batches", batches, "batches of inputs")
    if not len(batches):
        raise ValueError("batches: give at least one batch of inputs, got none")
    for x in batches:
        check_inputs("batches", x)


def replaced(tree: PyTree, names: PyTree, new: Mapping[str, np.ndarray]) -> PyTree:
    """Replaces some arrays of a tree, in their old dtypes.

    Args:
      tree: the tree.
      names: the name of each leaf, in a tree of the same structure.
      new: name → the new array.
    """

    def edit(name: str, leaf: Any) -> Any:
        return jnp.asarray(new[name].astype(leaf.dtype)) if name in new else leaf

    return jax.tree.map(edit, names, tree)


def stacked(triangle: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Adds rows to a triangle R, so that RᵀR stays the sum of xxᵀ over all rows x.

    Rows come on top of the triangle, in float64: the moments themselves would square the condition number
    of the data.

    Args:
      triangle: R so far, or None.
      rows: ``[n, inputs]``.

    Returns:
      R, float64 ``[at most inputs, inputs]``.
    """
    return np.asarray(np.linalg.qr(rows if triangle is None else np.concatenate([triangle, rows]), mode="r"))


def is_closed(model: Model, x: PyTree) -> bool:
    """Says whether a model's program is one from a file, into which nothing can look."""
    return "call_exported" in _jaxpr.primitives(jax.make_jaxpr(lambda model, x: model(x))(model, x))

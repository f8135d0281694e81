"""The parameters that multiply as matrices, in any model, and the inputs that they multiply.

What factors, compensates or prunes kernels by calibration inputs shares this: which parameters are kernels,
the rows of their inputs on a batch, and the triangle that stands for all rows seen so far.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax import _jaxpr
from distill_jax._model import Model, PyTree
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
      rows: path → ``[any, inputs]``, what the kernel multiplies.
      others: path → the operation that uses a parameter of several axes otherwise.
    """

    kernels: dict[str, Kernel]
    rows: dict[str, Any]
    others: dict[str, str]


def probe(model: Model, x: PyTree, rows: Collection[str] | None = ()) -> Probe:
    """Runs a model and notes its kernels, and the rows that some of them multiply.

    Args:
      model: the model; its arrays may be ``jax.ShapeDtypeStruct``.
      x: a batch of inputs, or ``jax.ShapeDtypeStruct``.
      rows: the paths of the kernels whose rows are wanted, None for all. Without rows nothing is computed.

    Returns:
      The kernels and the rows.
    """
    found: dict[str, Kernel] = {}
    seen: dict[str, list[jax.Array]] = {}
    others: dict[str, str] = {}

    def note(use: Use) -> jax.Array:
        before = found.get(use.path)
        if before is not None and before[1:4:2] != use.kernel[1:4:2]:
            others.setdefault(use.path, f"{use.primitive} in several ways")
        positions = use.output.size / (use.kernel.outputs * len(batch_of))
        found[use.path] = use.kernel._replace(positions=positions + (before.positions if before else 0.0))
        if rows is None or use.path in rows:
            seen.setdefault(use.path, []).append(use.rows())
        return use.output

    def run(params, state, x):
        watched(model, note, others.setdefault).apply_fn(params, state, x)
        return {path: jnp.concatenate(parts) for path, parts in seen.items() if path not in others}

    batch_of = jax.tree.leaves(x)[0]
    wanted = rows is None or bool(rows)
    arguments = model.params, model.state, x
    collected = run(*arguments) if wanted else jax.eval_shape(run, *arguments)
    return Probe({p: kernel for p, kernel in found.items() if p not in others}, collected, others)


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


@functools.partial(jax.jit, static_argnames="paths")
def _rows(model: Model, x: PyTree, paths: tuple[str, ...] | None) -> dict[str, jax.Array]:
    return probe(model, x, paths).rows


def rows_of(model: Model, x: PyTree, paths: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Computes what kernels multiply on a batch.

    Args:
      model: the model.
      x: a batch of inputs.
      paths: the kernels; None for all.

    Returns:
      path → float64 ``[any, inputs]``.

    Raises:
      ValueError: if a layer's inputs are not finite.
    """
    found = {}
    x = jax.tree.map(jnp.asarray, x)
    for path, values in _rows(model, x, None if paths is None else tuple(paths)).items():
        found[path] = np.asarray(values, np.float64)
        if not np.isfinite(found[path]).all():
            raise ValueError(f"the inputs of {path} are not finite: check the model's parameters and inputs")
    return found


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

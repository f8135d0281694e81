"""The parameters that multiply as matrices, in any model, and the inputs that they multiply.

What factors, compensates or prunes kernels by calibration inputs shares this: which parameters are kernels,
the rows of their inputs on a batch, and the triangle that stands for all rows seen so far.
"""

import functools
import math
from collections.abc import Collection, Iterable
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

    def note(jaxpr, eqn, inputs, views):
        arrays = [v.array(v.value) if isinstance(v, _jaxpr.View) else v for v in inputs]
        outputs = _jaxpr.alone(jaxpr, eqn, arrays)
        for place in views:
            view = inputs[place]
            free = _jaxpr.outputs_axes(eqn, place, view.value.ndim) if len(views) == 1 else None
            if free is None:
                others.setdefault(view.path, eqn.primitive.name)
                continue
            axes = view.order(view.value.ndim)
            order = tuple(axes[i] for i in (*_jaxpr.summed_axes(eqn, place), *free))
            kernel = Kernel(tuple(view.value.shape), order, 0.0, len(free))
            positions = outputs[0].size / (kernel.outputs * len(batch_of))
            if view.path in found and found[view.path][1:4:2] != kernel[1:4:2]:
                others.setdefault(view.path, f"{eqn.primitive.name} in several ways")
            before = found[view.path].positions if view.path in found else 0.0
            found[view.path] = kernel._replace(positions=before + positions)
            if rows is None or view.path in rows:
                seen.setdefault(view.path, []).append(_jaxpr.rows_of(eqn, arrays, place))
        return outputs

    def run(params, state, x):
        pairs = jax.tree_util.tree_leaves_with_path(params)
        values = [_jaxpr.View(leaf, path_name(path)) if leaf.ndim > 1 else leaf for path, leaf in pairs]
        _jaxpr.run(model.apply_fn, [params, state, x, None], values, note)
        return {path: jnp.concatenate(parts) for path, parts in seen.items() if path not in others}

    batch_of = jax.tree.leaves(x)[0]
    wanted = rows is None or bool(rows)
    arguments = model.params, model.state, x
    collected = run(*arguments) if wanted else jax.eval_shape(run, *arguments)
    return Probe({p: kernel for p, kernel in found.items() if p not in others}, collected, others)


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

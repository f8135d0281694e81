"""Simplifies the program of a network whose parameters are constants, for runtimes that do not do it themselves.

What follows from constants alone is computed. A scale or a shift of each output of a matrix product or a
convolution, such as BatchNorm's in evaluation, is moved into the kernel and one bias. A maximum over all places of a
window, written as slices, becomes a pooling.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from distill_jax import _jaxpr

# A result of constants is computed if it has no more bytes than they have, or at most so many: what a broadcast
# repeats is not written out, and a kernel of int8 stays one.
SMALL = 4096


def folded(program: Any) -> Callable[..., list[Any]]:
    """Returns a function of the inputs that computes what a program computes, but for rounding.

    Args:
      program: a closed jaxpr, whose constants are the parameters.
    """

    def function(*inputs: Any) -> list[Any]:
        return list(map(_array, _run(program.jaxpr, list(map(np.asarray, program.consts)), list(inputs))))

    return function


@dataclasses.dataclass(frozen=True)
class _Product:
    """A matrix product or convolution that is not written yet: with a constant kernel, and perhaps a shift.

    Attributes:
      write: ``kernel -> outputs``.
      kernel: the constant operand.
      axis: the kernel's axis of outputs.
      shape: the shape of the outputs.
      place: their axis of channels, whose size is that of the kernel's axis.
      shift: what is added to each channel, ``[channels]``, or None.
    """

    write: Callable[[Any], jax.Array]
    kernel: np.ndarray
    axis: int
    shape: tuple[Any, ...]
    place: int
    shift: np.ndarray | None = None

    @functools.cached_property
    def array(self) -> jax.Array:
        outputs = self.write(jnp.asarray(self.kernel))
        if self.shift is None:
            return outputs
        return outputs + self.along(self.shift, len(self.shape), self.place)

    def along(self, vector: np.ndarray, rank: int, axis: int) -> np.ndarray:
        return vector.reshape([-1 if i == axis else 1 for i in range(rank)])

    def scaled(self, factor: np.ndarray) -> "_Product":
        kernel = self.kernel * self.along(factor, self.kernel.ndim, self.axis)
        shift = None if self.shift is None else self.shift * factor
        return dataclasses.replace(self, kernel=kernel.astype(self.kernel.dtype), shift=shift)

    def shifted(self, by: np.ndarray) -> "_Product":
        return dataclasses.replace(self, shift=by if self.shift is None else self.shift + by)

    def channels(self, constant: np.ndarray) -> np.ndarray | None:
        """Returns a constant as one number per channel, or None if it differs along other axes."""
        size = self.kernel.shape[self.axis]
        if constant.ndim and constant.ndim != len(self.shape):
            return None
        others = [n for i, n in enumerate(constant.shape) if i != self.place]
        return None if any(n != 1 for n in others) else np.broadcast_to(constant.reshape(-1), (size,))


@dataclasses.dataclass(frozen=True)
class _Places:
    """The maximum of some places of each window of images, whose windows are next to each other.

    Attributes:
      source: the images, ``[batch, height, width, channels]``.
      window: the size of a window along each axis.
      offsets: the places in a window of which it is the maximum.
      write: computes it as it was written.
    """

    source: jax.Array
    window: tuple[int, ...]
    offsets: frozenset[tuple[int, ...]]
    write: Callable[[], jax.Array]

    @functools.cached_property
    def array(self) -> jax.Array:
        if self.offsets != set(itertools.product(*map(range, self.window))):
            return self.write()
        # A converter may know this by its name, as ReLU
        return nnx.max_pool(self.source, window_shape=self.window[1:3], strides=self.window[1:3])


def _array(value: Any) -> Any:
    return value.array if isinstance(value, _Product | _Places) else value


def _run(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    """Runs a jaxpr on constants (NumPy arrays), products that are not written yet, and all other values."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    atoms = [*(atom for eqn in jaxpr.eqns for atom in eqn.invars), *jaxpr.outvars]
    uses = Counter(atom for atom in atoms if isinstance(atom, core.Var))

    def read(atom: Any) -> Any:
        if not isinstance(atom, core.Var):
            return np.asarray(atom.val)
        value = known[atom]
        return _array(value) if uses[atom] > 1 else value  # a product is written once

    for eqn in jaxpr.eqns:
        values = list(map(read, eqn.invars))
        if body := _jaxpr.body_of(eqn):
            outputs = _run(body[0], list(map(np.asarray, body[1])), values)
        elif _is_constant(eqn, values):
            with jax.ensure_compile_time_eval():
                outputs = list(map(np.asarray, _jaxpr.alone(jaxpr, eqn, values)))
        else:
            tried = (rule(eqn, values) for rule in (_product, _moved, _pooled))
            found = next((value for value in tried if value is not None), None)
            outputs = _jaxpr.alone(jaxpr, eqn, list(map(_array, values))) if found is None else [found]
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))


def _is_constant(eqn: Any, values: list[Any]) -> bool:
    """Says whether an equation can be computed now, and its result is not much larger than what it is made of."""
    if not all(isinstance(value, np.ndarray) for value in values) or eqn.effects:
        return False
    if eqn.primitive.name == "dim_as_value":  # the size of the batch, as a number
        return False
    results = [var.aval for var in eqn.outvars]
    if not all(isinstance(n, int) for each in results for n in each.shape):
        return False
    size = sum(math.prod(each.shape) * each.dtype.itemsize for each in results)
    return size <= max(SMALL, sum(value.nbytes for value in values))


def _product(eqn: Any, values: list[Any]) -> _Product | None:
    """Returns a product with a constant kernel of one axis of outputs, or None if the equation is none."""
    kind, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
    if kind not in ("dot_general", "conv_general_dilated"):
        return None
    kernel = values[1]
    if not isinstance(kernel, np.ndarray) or kernel.dtype not in (np.float32, np.float64):
        return None
    if kind == "dot_general":
        (_, summed), (_, batch) = eqn.params["dimension_numbers"]
        free = [axis for axis in range(kernel.ndim) if axis not in summed]
        axis, place = free[0] if len(free) == 1 and not batch else None, len(shape) - 1
    else:
        numbers = eqn.params["dimension_numbers"]
        axis, place = numbers.rhs_spec[0], numbers.out_spec[1]
        axis = None if eqn.params["batch_group_count"] > 1 else axis
    if axis is None:
        return None
    operand = _array(values[0])
    return _Product(
        lambda kernel: eqn.primitive.bind(operand, kernel, **eqn.params), kernel, axis, shape, place
    )


def _moved(eqn: Any, values: list[Any]) -> Any:
    """Returns a product that has taken in a sum or a product with one constant per channel, a ReLU, or None."""
    kind = eqn.primitive.name
    floating = jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating)
    if kind == "max" and floating and isinstance(values[1], np.ndarray) and not values[1].any():
        return jax.nn.relu(_array(values[0]))  # which a converter may know by its name
    place = next((i for i, value in enumerate(values) if isinstance(value, _Product)), None)
    if place is None or kind not in ("add", "sub", "mul", "div"):
        return None
    product, other = values[place], values[1 - place]
    vector = product.channels(other) if isinstance(other, np.ndarray) else None
    if vector is None or eqn.outvars[0].aval.shape != product.shape or (kind == "div" and place == 1):
        return None
    if kind == "mul":
        return product.scaled(vector)
    if kind == "div":
        return product.scaled(1 / vector)
    if kind == "sub" and place == 1:
        return product.scaled(np.full_like(vector, -1)).shifted(vector)
    return product.shifted(-vector if kind == "sub" else vector)


def _pooled(eqn: Any, values: list[Any]) -> Any:
    """Returns a slice of each window of images, the maximum of two such, what is sliced whole, or None."""
    if eqn.primitive.name == "max" and all(isinstance(value, _Places) for value in values):
        a, b = values
        if a.source is not b.source or a.window != b.window:
            return None
        return dataclasses.replace(
            a, offsets=a.offsets | b.offsets, write=lambda: jax.lax.max(a.write(), b.write())
        )
    if eqn.primitive.name != "slice":
        return None
    source = _array(values[0])
    start, window = tuple(eqn.params["start_indices"]), tuple(eqn.params["strides"] or [1] * source.ndim)
    whole = tuple(eqn.params["limit_indices"]) == source.shape
    if whole and not any(start) and max(window) == 1:
        return source
    if len(window) != 4 or window[0] * window[3] != 1:  # no images
        return None
    divided = all(step == 1 or n % step == 0 for n, step in zip(source.shape, window, strict=True))
    floating = jnp.issubdtype(source.dtype, jnp.floating)
    if not (whole and divided and floating and all(i < n for i, n in zip(start, window, strict=True))):
        return None
    return _Places(
        source, window, frozenset([start]), lambda: jax.lax.slice(source, start, source.shape, window)
    )

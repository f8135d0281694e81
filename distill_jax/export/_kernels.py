"""Kernels that are integers: in a model, and the same ones in a graph of the floats that they mean."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from distill_jax._model import Model
from distill_jax.weights.structure import path_name

EXACT = 1e-5  # how far a kernel of the graph may be from its integers, as a share of its largest weight


class Kernel(Protocol):
    """A kernel as integers, such as ``compress.quantisation.Quantised``, which says what its parts are."""

    @property
    def bits(self) -> int: ...
    @property
    def scale(self) -> jax.Array: ...
    @property
    def input_scale(self) -> jax.Array | None: ...
    @property
    def input_zero(self) -> jax.Array | None: ...
    @property
    def codes(self) -> jax.Array: ...
    def array(self) -> jax.Array: ...


class Match(NamedTuple):
    """A kernel of a graph.

    Attributes:
      path: its path in the model.
      place: its place among the inputs of its node.
      axis: its axis of outputs.
      codes: the integers, in the layout of the graph.
      scale: float64 ``[outputs]``; the kernel is codes·scale.
    """

    path: str
    place: int
    axis: int
    codes: np.ndarray
    scale: np.ndarray


def kernels_of(model: Model) -> dict[str, Kernel]:
    """Returns path → kernel of all kernels of a model that are integers."""
    leaves = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=_is_kernel)
    return {path_name(path): leaf for path, leaf in leaves if _is_kernel(leaf)}


def as_floats(model: Model) -> Model:
    """Puts what integers mean in the places of the integers, but for kernels with scales for groups of inputs."""

    def meant(leaf: Any) -> Any:
        return leaf.array() if _is_kernel(leaf) and not has_groups(leaf) else leaf

    return model.replace(params=jax.tree.map(meant, model.params, is_leaf=_is_kernel))


def has_groups(kernel: Kernel) -> bool:
    """Says whether an axis of a kernel has a scale for several of its indices, and not one for all."""
    return any(1 < n < size for n, size in zip(kernel.scale.shape, kernel.codes.shape, strict=True))


def _is_kernel(leaf: Any) -> bool:
    return all(hasattr(leaf, name) for name in ("codes", "scale", "bits", "input_scale", "input_zero"))


def matches(
    nodes: list[Any], arrays: Mapping[str, np.ndarray], kernels: Mapping[str, Kernel]
) -> dict[int, Match]:
    """Finds kernels in a graph by their values, whatever their names and the order of their axes.

    A kernel of the graph is the integers times one number per output, so a normalisation may have been folded into it.

    Args:
      nodes: the nodes of the graph.
      arrays: its constants by name.
      kernels: path → kernel.

    Returns:
      number of a node → its kernel.

    Raises:
      ValueError: if a kernel is not found, or cannot be told from another one with another input scale.
    """
    found: dict[int, Match] = {}
    missing = set(kernels)
    # Number of outputs → the kernels of one input in the graph, and the paths that fit them
    alone: dict[int, tuple[set[bytes], set[str]]] = {}
    codes = {path: np.asarray(kernel.codes, np.float64) for path, kernel in kernels.items()}
    for number, node in enumerate(nodes):
        place, axis = _kernel_of(node, arrays)
        if place is None or not (fitting := list(_find(arrays[node.input[place]], place, axis, codes))):
            continue
        paths = [match.path for match in fitting]
        array = arrays[node.input[place]]
        # Whatever multiplies zeros, and however it is rounded, the outputs are 0
        if array.any() and len({grid_of(kernels[path]) for path in paths}) > 1:
            raise ValueError(
                f"model: {', '.join(paths)} hold the same integers up to a factor per output, so it is not known "
                "which is which in the graph: exclude them from quantisation"
            )
        if array.size == array.shape[axis] and any(grid_of(kernels[path]) for path in paths):
            values, fit = alone.setdefault(array.size, (set(), set()))
            values.add(array.tobytes())
            fit.update(paths)
            if len(values) > len(fit):
                raise ValueError(
                    f"model: {', '.join(sorted(fit))} have one input, so any kernel of as many outputs in the graph "
                    "may be theirs, and there are more of these: exclude them from quantisation"
                )
        missing -= set(paths)
        found[number] = fitting[0]
    if missing:
        raise ValueError(
            f"model: {', '.join(sorted(missing))} not found among the kernels of the graph: exclude them from "
            "quantisation"
        )
    return found


def grid_of(kernel: Kernel) -> tuple[float, int] | None:
    """Returns the scale of what a kernel multiplies and the code of 0 as a uint8; None if that is not rounded."""
    if kernel.input_scale is None or kernel.input_zero is None:
        return None
    return float(kernel.input_scale), int(kernel.input_zero) + 128


def _kernel_of(node: Any, arrays: Mapping[str, np.ndarray]) -> tuple[int | None, int]:
    """Returns the place of the constant operand of a product, and its axis of outputs; (None, 0) if it has none."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None, 0
    options = {attribute.name: attribute for attribute in node.attribute}
    constants = [place for place in (0, 1) if node.input[place] in arrays]
    if len(constants) != 1 or arrays[node.input[constants[0]]].ndim < 2:
        return None, 0
    place = constants[0]
    rank = arrays[node.input[place]].ndim
    if node.op_type == "Conv":
        return (1, 0) if place == 1 else (None, 0)
    if node.op_type == "Gemm":
        turned = options[("transA", "transB")[place]].i if ("transA", "transB")[place] in options else 0
        plain = all(options[name].f == 1 for name in ("alpha", "beta") if name in options)
        return (place, (place + turned) % 2) if plain else (None, 0)
    return place, rank - 1 if place else rank - 2


def _find(array: np.ndarray, place: int, axis: int, kernels: Mapping[str, np.ndarray]) -> Iterator[Match]:
    """Finds all integers of which an array is a multiple, one per output."""
    wanted = array.astype(np.float64)
    others = tuple(i for i in range(array.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(array.ndim)]
    limit = EXACT * np.abs(wanted).max(initial=0)
    for path, kernel in kernels.items():
        if kernel.size != array.size:
            continue
        for codes in _layouts(kernel, array.shape):
            energy = np.sum(codes**2, others)
            scale = np.sum(wanted * codes, others) / np.maximum(energy, 1)
            if np.abs(wanted - codes * scale.reshape(shape)).max(initial=0) <= limit:
                codes = codes * np.sign(scale).reshape(shape)  # 0 where a factor of 0 was folded in
                # Where all is 0, a bias is stored in units of the scale, so this is a small one
                small = np.abs(scale).min(where=scale != 0, initial=EXACT)
                yield Match(path, place, axis, codes, np.where(scale == 0, small, np.abs(scale)))
                break


def _layouts(kernel: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields the kernel in all orders of its axes that have this shape, or can be reshaped to it."""
    for order in itertools.permutations(range(kernel.ndim)):
        turned = kernel.transpose(order)
        if turned.shape == shape or len(shape) != kernel.ndim:
            yield turned.reshape(shape)

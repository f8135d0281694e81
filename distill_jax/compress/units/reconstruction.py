"""Scores units by how well the others can stand in for them, removed one after the other."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from distill_jax._checks import check_positive
from distill_jax._model import Model, PyTree, check_model
from distill_jax.compress._products import Kernel, check_batches, probe, rows_of, stacked
from distill_jax.compress.units._trace.roles import positions, roles
from distill_jax.compress.units.compensation import find_biases
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import Slice, UnitGraph, check_graph
from distill_jax.compress.units.scoring import Normalise, Scores, normalised


def reconstruction(
    graph: UnitGraph,
    model: Model,
    batches: Sequence[PyTree],
    *,
    groups: Collection[str] | None = None,
    damping: float = 0.01,
    normalise: Normalise = "none",
) -> Scores:
    """Scores a unit by the error that its removal adds when the kernels that used it are solved anew.

    A layer multiplies its inputs x, the units of a group, by a kernel W. Without some of the units, least squares
    finds the kernel W̃ of the others whose outputs are nearest to x·W. Let H = E[xxᵀ] + λI, and let W_u be the rows of
    W that belong to the unit u: one, or those of a head or of all taps of a channel. Its removal adds the error
    tr(W_uᵀ ((H⁻¹)_uu)⁻¹ W_u), where W and H⁻¹ are those after the removals before. Units go one after the other, each
    time the one that adds least. So of two equal units one goes early, and the other one then scores high, as nothing
    can replace it. The score is the error that a unit adds, as a share of the squares of the outputs, and at least the
    score of the units that went before it. Errors of several kernels that use the unit are added up. Where a kernel
    has a bias, which makes up for means, inputs and outputs count without their means.

    The scores assume that :func:`~distill_jax.compress.units.compensate` follows. Without it, a small network may be
    worse than one that other scores choose. Shares of errors do not compare layers in which a few outputs are many
    times as large as the others, as in many transformers: there, prune with ``across="group"``, or let
    :func:`measured` make them comparable.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      batches: inputs, batch by batch, of any batch sizes. Padding counts as well, so leave it out. There should be more
        examples (times places) than a layer has inputs, or units seem to be replaceable that are not.
      groups: the groups that are scored; None: all.
      damping: λ as a share of the mean square of the inputs, above 0. It is part of the error: where inputs are few, it
        keeps large weights.
      normalise: how the scores of a group are made comparable, see the module's first lines.

    Returns:
      For each free group whose units are multiplied by kernels alone, float64 ``[size]``. Each group is scored as if
      all others stayed whole.

    Raises:
      ValueError: if the model is not the traced one, there are no batches, a group does not exist, or a layer's inputs
        are not finite.

    References:
      Kurtić, Frantar, Alistarh, `ZipLM: Inference-Aware Structured Pruning of Language Models`, 2023
      (arXiv 2302.04089), Eq. 2 and Algorithm 1.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]), "b": jnp.ones((3, 1))}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> scores = units.scores.reconstruction(units.trace(model, x), model, [x], damping=1e-6)
    >>> print(scores["a"].round(2))  # the first and the last unit can do each other's work
    [0.  0.1 0.9]
    """
    check_graph(graph)
    check_model("model", model)
    check_positive("damping", damping)
    check_batches(batches)
    if groups is not None and (unknown := [name for name in groups if name not in graph.groups]):
        raise ValueError(f"groups names {unknown}, which do not exist; there are {list(graph.groups)}")
    leaves = float_leaves(graph, model)
    given = gather(graph, model, batches, groups)
    found = {}
    for name, slices in given.used.items():
        size = graph.groups[name].size
        layers = [
            _Layer(
                s,
                size,
                given.kernels[s.path],
                leaves[s.path],
                given.triangles[s.path],
                s.path in given.biases,
                damping,
            )
            for s in slices
        ]
        found[name] = _one_by_one(layers, size)
    return normalised(found, normalise)


class Inputs(NamedTuple):
    """What :func:`gather` finds.

    Attributes:
      used: group → the slices by which its units are multiplied, if they are kernels' inputs and nothing else.
      kernels: path → the kernel.
      biases: path of a kernel → path of its bias, and whether it is added (1) or subtracted (−1).
      triangles: path of a kernel → R, where RᵀR is the sum of xxᵀ over all inputs x, with a 1 before them if there is
        a bias.
    """

    used: dict[str, tuple[Slice, ...]]
    kernels: dict[str, Kernel]
    biases: dict[str, tuple[str, int]]
    triangles: dict[str, np.ndarray]


def gather(
    graph: UnitGraph, model: Model, batches: Sequence[PyTree], groups: Collection[str] | None = None
) -> Inputs:
    """Sums up what kernels multiply, those over whose inputs units of some groups (None: of all) lie."""
    kernels = probe(model, batches[0]).kernels
    biases = find_biases(graph, kernels)

    def is_input(used: Slice, size: int) -> bool:
        return used.path in kernels and positions(used.index, size) is not None

    used = {
        name: role.outgoing
        for name, role in roles(graph, alike=False).items()
        if groups is None or name in groups
        if role.outgoing and all(is_input(s, graph.groups[name].size) for s in role.outgoing)
    }
    wanted = {s.path for slices in used.values() for s in slices}
    triangles: dict[str, np.ndarray] = {}
    for x in batches:
        for path, rows in rows_of(model, x).items():
            if path in wanted:
                ones = np.ones((len(rows), int(path in biases)))
                triangles[path] = stacked(triangles.get(path), np.concatenate([ones, rows], 1))
    return Inputs(used, kernels, biases, triangles)


class _Layer:
    """A kernel that loses units of its inputs: its matrix, and H⁻¹, as they are after each removal."""

    def __init__(
        self,
        used: Slice,
        size: int,
        kernel: Kernel,
        leaf: np.ndarray,
        triangle: np.ndarray,
        biased: bool,
        damping: float,
    ):
        self.matrix = kernel.matrix(leaf).copy()  # float64 arrays of the model would be changed
        norms = np.linalg.norm(triangle, axis=0)[int(biased) :]
        if biased:  # what R leaves below its first row, that of the ones, has no mean
            triangle = triangle[1:, 1:]
        constant = np.linalg.norm(triangle, axis=0) <= 1e-6 * norms  # rows are of float32
        self.matrix[constant] = 0  # a bias makes up for these inputs, or they are 0
        self.whole = float(np.sum((triangle @ self.matrix) ** 2)) or 1.0
        count = len(self.matrix)
        strength = damping * np.sum(triangle**2) / count or 1.0
        # Not from RᵀR, which has the square of R's condition number
        rows = np.concatenate([triangle, np.sqrt(strength) * np.eye(count)])
        inverse = solve_triangular(np.linalg.qr(rows, mode="r"), np.eye(count))
        self.inverse = inverse @ inverse.T
        self.blocks = rows_of_units(used, kernel, size)

    def errors(self, units: np.ndarray) -> np.ndarray:
        """Computes which error the removal of each of these units would add, as a share of the outputs' squares."""
        rows = self.blocks[units]
        weights = self.matrix[rows]
        inner = self.inverse[rows[:, :, None], rows[:, None, :]]
        errors = np.einsum("uio,uio->u", weights, np.linalg.solve(inner, weights)) / self.whole
        return np.maximum(errors, 0)  # rounding

    def remove(self, unit: int) -> None:
        """Removes a unit, and corrects the weights of the others."""
        rows = self.blocks[unit]
        columns = self.inverse[:, rows]
        inner = columns[rows]
        self.matrix -= columns @ np.linalg.solve(inner, self.matrix[rows])
        self.inverse -= columns @ np.linalg.solve(inner, columns.T)

    def forget(self, removed: np.ndarray) -> None:
        """Drops the rows of removed units, which are zero, and which each removal would go through again."""
        gone = self.blocks[removed].ravel()
        stay = np.delete(np.arange(len(self.matrix)), gone)
        self.matrix, self.inverse = self.matrix[stay], self.inverse[np.ix_(stay, stay)]
        self.blocks = self.blocks - np.searchsorted(np.sort(gone), self.blocks)


def rows_of_units(used: Slice, kernel: Kernel, size: int) -> np.ndarray:
    """Finds which rows of a kernel's matrix each unit has: int ``[size, rows of a unit]``."""
    shape = [-1 if axis == used.axis else 1 for axis in range(len(kernel.shape))]
    unit = np.broadcast_to(used.index.reshape(shape), kernel.shape).transpose(kernel.order)
    blocks = positions(unit.reshape(kernel.inputs, kernel.outputs)[:, 0], size)
    assert blocks is not None
    return blocks


def _one_by_one(layers: Sequence[_Layer], size: int) -> np.ndarray:
    """Removes all units of a group but one, each time the one that adds the least error: their scores."""
    left, removed, scores, highest = np.arange(size), list[int](), np.zeros(size), 0.0
    while len(left):
        errors = np.sum([layer.errors(left) for layer in layers], 0)
        place = int(errors.argmin())
        # The order of removal stays the order of the scores where errors are equal, or fall
        highest = max(highest * (1 + 1e-12), float(errors[place]))
        scores[left[place]] = highest
        if len(left) > 1:
            for layer in layers:
                layer.remove(int(left[place]))
        removed.append(int(left[place]))
        left = np.delete(left, place)
        if len(removed) > len(left) / 10 + 10:
            for layer in layers:
                layer.forget(np.array(removed))
            removed = []
    return scores

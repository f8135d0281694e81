"""Corrects what is left of a pruned network, by least squares on a few inputs and without training."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_not_negative
from distill_jax._model import Model, PyTree, check_model
from distill_jax.compress._products import Kernel, check_batches, probe, replaced, rows_of_one
from distill_jax.compress.units._trace.program import Program, Step
from distill_jax.compress.units._trace.roles import roles
from distill_jax.compress.units.averaging import put_back
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.injection import leaves_by_name
from distill_jax.compress.units.masks import Kept, position_masks, unit_masks
from distill_jax.compress.units.shrinking import shrink

Axes = tuple[int | None, ...]


class Compensated(NamedTuple):
    """What :func:`compensate` returns.

    Attributes:
      model: the model in its old shapes, with corrected weights; ``keep(graph, model, kept)`` is the corrected
        small network.
      errors: kernel → the squared error of its outputs without and with the correction, as shares of the
        outputs' squares.
      notes: what could not be corrected, one sentence each.
    """

    model: Model
    errors: dict[str, tuple[float, float]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """One line per kernel, then the notes."""
        lines = [f"{path}: error {a:.3g} → {b:.3g} of its outputs" for path, (a, b) in self.errors.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def compensate(
    graph: UnitGraph,
    model: Model,
    kept: Kept,
    batches: Sequence[PyTree],
    *,
    damping: float = 0.01,
    by: Callable[[UnitGraph, Model, Kept], Model] = shrink,
) -> Compensated:
    """Corrects the layers that used the removed units, so that the kept units do their work as well as they can.

    A layer that computed x·W + b computes x̃·W̃ + b̃ in the smaller network, where x̃ are its inputs there. W̃ and b̃
    minimise E‖x·W + b − x̃·W̃ − b̃‖² on the given inputs. Layers are corrected in the order of the network, so that
    each one also makes up for what those before it have left. Where several W̃ are as good, the one nearest to
    the pruned kernel is taken. No step of training is made.

    Corrected are all kernels (dense, of convolutions, of attention with heads) over whose inputs units were removed;
    b̃ is the bias that is added to their outputs, or the mean that a BatchNorm subtracts from them, if there is one
    that is used nowhere else.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      kept: group → the indices of the units that stay, from :func:`~distill_jax.compress.units.prune` and the like.
      batches: inputs, batch by batch. There should be more examples (times places, for a convolution) than
        a layer has inputs, or its correction fits these inputs alone.
      damping: how strongly weights are held at their pruned values: this times the mean square of the layer's
        inputs is added to the squares of each of them. The default costs nothing where there are many examples. 0
        gives the plain least-squares optimum, which is worse than no correction on new inputs where examples are few.
      by: what makes the smaller network: ``units.shrink``, or ``units.keep`` to correct what it computes for
        groups that are not exact.

    Returns:
      The corrected model in its old shapes, the errors of the corrected layers, and what could not be corrected.

    Raises:
      ValueError: if ``kept`` is not valid, there are no batches, or a layer's inputs are not finite.

    References:
      He, Zhang, Sun, `Channel Pruning for Accelerating Very Deep Neural Networks`, 2017 (arXiv 1707.06168), §3.1, with
      the inputs of the pruned network on one side and the original's outputs on the other, and with a bias.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[1.0], [1.0]])}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> x = jnp.array([[1.0], [2.0]])
    >>> graph = units.trace(model, x)
    >>> done = units.compensate(graph, model, {"a": [1]}, [x], damping=0.0)
    >>> units.keep(graph, done.model, {"a": [1]}).params["b"]  # the unit does the other one's work, half of its own
    Array([[1.5]], dtype=float32)
    """
    check_model("model", model)
    check_not_negative("damping", damping)
    check_batches(batches)
    masks = position_masks(graph, kept)
    small = jax.tree.map(jnp.asarray, by(graph, model, kept))
    original = probe(model, batches[0])
    smaller = probe(small, batches[0]).kernels
    biases = find_biases(graph, original.kernels)
    errors, notes = {}, _impossible(graph, kept, original.others)
    for path, kernel in original.kernels.items():
        lost = masks.get(path, {})
        if not lost.keys() & set(kernel.summed):
            continue
        if path not in smaller:
            notes.append(f"{path} is no kernel in the smaller network, so it stays as it is")
            continue
        stays = np.ones(kernel.outputs, bool).reshape([kernel.shape[axis] for axis in kernel.made])
        for place, axis in enumerate(kernel.made):
            if axis in lost:
                stays &= lost[axis].reshape([-1 if i == place else 1 for i in range(stays.ndim)])
        leaves = leaves_by_name(small)
        matrix = smaller[path].matrix(leaves[path])
        rows = (
            (rows_of_one(model, x, original.kernels, path), rows_of_one(small, x, smaller, path))
            for x in batches
        )
        # Rows are sums of many: float32's rounding is theirs, at most
        eps = min(float(jnp.finfo(dtype).eps) for dtype in (leaves[path].dtype, jnp.float32))
        whole = kernel.matrix(leaves_by_name(model)[path])[:, stays.ravel()]
        solved = _solve(rows, whole, matrix, path in biases, damping, eps)
        if solved is None:
            notes.append(f"{path} is applied at fewer places in the smaller network, so it stays as it is")
            continue
        change, errors[path] = solved
        new = {path: smaller[path].array(matrix + change[: len(matrix)])}
        if path in biases:
            bias, sign = biases[path]
            new[bias] = np.asarray(leaves[bias], np.float64) + sign * change[-1].reshape(leaves[bias].shape)
        params, state = replaced((small.params, small.state), tuple(graph.names), new)
        small = small.replace(params=params, state=state)
    return Compensated(put_back(graph, small, kept, model), errors, tuple(notes))


class _Sums(NamedTuple):
    """All rows seen so far of inputs X and of outputs Y to be fitted: X = QR.

    Attributes:
      triangle: R.
      products: QᵀY.
      rest: the sum of the squares of Y that no combination of the inputs makes.
    """

    triangle: np.ndarray
    products: np.ndarray
    rest: float


def _added(sums: _Sums, inputs: np.ndarray, outputs: np.ndarray) -> _Sums:
    rows, wanted = np.concatenate([sums.triangle, inputs]), np.concatenate([sums.products, outputs])
    orthogonal, triangle = np.linalg.qr(rows)
    products = orthogonal.T @ wanted
    return _Sums(triangle, products, sums.rest + float(np.sum((wanted - orthogonal @ products) ** 2)))


def _solve(
    rows: Iterable[tuple[np.ndarray, np.ndarray]],
    whole: np.ndarray,
    matrix: np.ndarray,
    bias: bool,
    damping: float,
    eps: float,
) -> tuple[np.ndarray, tuple[float, float]] | None:
    """Finds the change of a kernel ``[inputs (and 1 for a bias), outputs]``, and the errors before and after.

    Args:
      rows: batch by batch, the rows that the kernel multiplies in the original and in the smaller network.
      whole: the original's kernel, with the outputs that stay.
      matrix: the smaller network's kernel.
      bias: whether a number may be added to each output.
      damping: see :func:`compensate`.
      eps: relative rounding of the rows.

    Returns:
      None if the two networks apply the kernel at different numbers of places.
    """
    count = len(matrix) + bias
    sums, squares = _Sums(np.zeros((0, count)), np.zeros((0, matrix.shape[1])), 0.0), 0.0
    for before, inputs in rows:
        if len(before) != len(inputs):
            return None
        wanted = before @ whole
        squares += float(np.sum(wanted**2))
        ones = np.ones((len(inputs), int(bias)))
        sums = _added(sums, np.concatenate([inputs, ones], 1), wanted - inputs @ matrix)
    strength = damping * np.sum(sums.triangle[:, : len(matrix)] ** 2) / len(matrix)
    held = np.sqrt(strength) * np.eye(len(matrix), count)
    # Directions that are only rounding are not fitted
    change = np.linalg.lstsq(
        np.concatenate([sums.triangle, held]),
        np.concatenate([sums.products, np.zeros((len(held), matrix.shape[1]))]),
        rcond=eps * count,
    )[0]
    left = (sums.rest + float(np.sum(y**2)) for y in (sums.products, sums.products - sums.triangle @ change))
    before_it, after = (error / (squares or 1.0) for error in left)
    return change, (before_it, after)


def _impossible(graph: UnitGraph, kept: Kept, others: Mapping[str, str]) -> list[str]:
    """Says which uses of the removed units no kernel can make up for."""
    notes, found = [], roles(graph, alike=False)
    for name in unit_masks(graph, kept):
        role = found[name]
        if role.reason and not role.reason.endswith("at once"):
            notes.append(f"units of {name}: {role.reason}, which no weights are corrected for")
        paths = dict.fromkeys(s.path for s in role.outgoing if s.path in others)
        notes += [f"{path}, used by {others[path]}, is no kernel that can be corrected" for path in paths]
    return notes


def find_biases(graph: UnitGraph, kernels: Mapping[str, Kernel]) -> dict[str, tuple[str, int]]:
    """Finds what is added to (1) or subtracted from (−1) the outputs of each kernel, one number per output."""
    program: Program = graph.traced.program
    shapes = {number: aval.shape for number, aval in enumerate(program.avals)}
    # Arrays as they are: number → name, and which of the array's axes is which of the value's
    views: dict[int, tuple[str, Axes]] = {
        number: (name, tuple(a if n > 1 else None for a, n in enumerate(like.shape)))
        for number, (name, like) in zip(program.inputs, graph.shapes.items(), strict=False)
    }
    uses = Counter([*program.outputs, *(number for step in program.steps for number in step.inputs)])
    outputs: dict[int, tuple[str, list[int]]] = {}  # number → whose outputs it has, and on which axes
    found: dict[str, set[tuple[str, int] | None]] = {}
    # How often arrays are used in all, and as biases
    used: Counter[str] = Counter()
    added: Counter[str] = Counter()
    for step in program.steps:
        if step.inputs and step.inputs[0] in views:
            name, axes = views[step.inputs[0]]
            new = _followed(step, axes, shapes[step.inputs[0]], shapes[step.outputs[0]])
            if new is not None:
                views[step.outputs[0]] = name, new
                continue
        used.update(views[number][0] for number in step.inputs if number in views)
        for i, number in enumerate(step.inputs):
            path = views[number][0] if number in views else ""
            if path in kernels and step.name in ("dot_general", "conv_general_dilated"):
                rank, free = len(shapes[step.outputs[0]]), kernels[path].free
                places = list(range(rank - free, rank) if i else range(free))
                if step.name == "conv_general_dilated":
                    places = [step.params["dimension_numbers"].out_spec[1]]
                outputs[step.outputs[0]] = path, places
            elif number in outputs and step.name == "convert_element_type" and uses[number] == 1:
                outputs[step.outputs[0]] = outputs[number]
            elif number in outputs:
                path, places = outputs[number]
                name, axes = views.get(step.inputs[1 - i], ("", ())) if len(step.inputs) == 2 else ("", ())
                sizes = tuple(kernels[path].shape[axis] for axis in kernels[path].made)
                wanted = tuple(
                    places.index(a) if a in places and n > 1 else None for a, n in enumerate(shapes[number])
                )
                sign = 1 if step.name == "add" else -1 if step.name == "sub" and i == 0 else 0
                fits = bool(name and sign and axes == wanted and uses[number] == 1)
                fits = fits and graph.shapes[name].shape == sizes
                added[name] += fits
                found.setdefault(path, set()).add((name, sign) if fits else None)
    used.update(views[number][0] for number in program.outputs if number in views)
    single = {path: each.pop() for path, each in found.items() if len(each) == 1}
    times = Counter(single.values())
    return {
        path: bias
        for path, bias in single.items()
        if bias and times[bias] == 1 and used[bias[0]] == added[bias[0]]
    }


def _followed(step: Step, axes: Axes, old: tuple[int, ...], new: tuple[int, ...]) -> Axes | None:
    """Follows an array's axes through a step that only lays it out anew; None for another step."""
    if step.name in ("convert_element_type", "copy", "stop_gradient"):
        return axes
    if step.name == "transpose":
        return tuple(axes[a] for a in step.params["permutation"])
    if step.name == "broadcast_in_dim":
        source = {a: i for i, a in enumerate(step.params["broadcast_dimensions"])}
        return tuple(
            axes[source[a]] if a in source and old[source[a]] == n else None for a, n in enumerate(new)
        )
    if step.name in ("reshape", "squeeze") and [n for n in old if n > 1] == [n for n in new if n > 1]:
        rest = iter([axis for axis, n in zip(axes, old, strict=True) if n > 1])
        return tuple(next(rest) if n > 1 else None for n in new)
    return None

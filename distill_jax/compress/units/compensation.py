"""Corrects what is left of a pruned network, by least squares on a few inputs and without training."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_not_negative, check_sequence
from distill_jax._model import Model, PyTree, check_inputs, check_model
from distill_jax.compress._products import Kernel, probe, rows_of, stacked
from distill_jax.compress.units._trace.program import Program, Step
from distill_jax.compress.units._trace.roles import roles
from distill_jax.compress.units.averaging import put_back
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.injection import leaves_by_name
from distill_jax.compress.units.removal import Kept, position_masks, unit_masks
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
    check_sequence("batches", batches, "batches of inputs")
    if not len(batches):
        raise ValueError("batches: give at least one batch of inputs, got none")
    for x in batches:
        check_inputs("batches", x)
    masks = position_masks(graph, kept)
    small = by(graph, model, kept)
    original = probe(model, batches[0])
    smaller = probe(small, batches[0]).kernels
    biases = _biases(graph, original.kernels)
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
        whole = kernel.matrix(leaves_by_name(model)[path])[:, stays.ravel()]
        solved = _solve((model, whole), (small, smaller[path]), path, batches, path in biases, damping)
        if solved is None:
            notes.append(f"{path} is applied at fewer places in the smaller network, so it stays as it is")
            continue
        change, errors[path] = solved
        leaves = leaves_by_name(small)
        new = {path: smaller[path].array(smaller[path].matrix(leaves[path]) + change[: smaller[path].inputs])}
        if path in biases:
            bias, sign = biases[path]
            new[bias] = np.asarray(leaves[bias], np.float64) + sign * change[-1].reshape(leaves[bias].shape)
        small = _replaced(graph, small, new)
    return Compensated(put_back(graph, small, kept, model), errors, tuple(notes))


def _solve(
    original: tuple[Model, np.ndarray],
    small: tuple[Model, Kernel],
    path: str,
    batches: Sequence[PyTree],
    bias: bool,
    damping: float,
) -> tuple[np.ndarray, tuple[float, float]] | None:
    """Finds the change of a kernel ``[inputs (and 1 for a bias), outputs]``, and the errors before and after.

    None if the two networks apply the kernel at different numbers of places.
    """
    (model, whole), (smaller, kernel) = original, small
    leaf = leaves_by_name(smaller)[path]
    matrix = kernel.matrix(leaf)
    triangle, squares = None, 0.0
    for x in batches:
        wanted = rows_of(model, x, [path])[path] @ whole
        inputs = rows_of(smaller, x, [path])[path]
        if len(wanted) != len(inputs):
            return None
        squares += float(np.sum(wanted**2))
        ones = np.ones((len(inputs), int(bias)))
        triangle = stacked(triangle, np.concatenate([inputs, ones, wanted - inputs @ matrix], 1))
    assert triangle is not None
    count = kernel.inputs + bias
    left, right = triangle[:, :count], triangle[:, count:]
    strength = damping * np.sum(left[:, : kernel.inputs] ** 2) / kernel.inputs
    held = np.sqrt(strength) * np.eye(kernel.inputs, count)
    # Directions that are only rounding are not fitted. Rows are sums of many: float32's rounding is theirs, at most
    eps = min(float(jnp.finfo(dtype).eps) for dtype in (leaf.dtype, jnp.float32))
    change = np.linalg.lstsq(
        np.concatenate([left, held]), np.concatenate([right, np.zeros((len(held), right.shape[1]))]),
        rcond=eps * max(left.shape),
    )[0]  # fmt: skip
    before, after = float(np.sum(right**2)), float(np.sum((right - left @ change) ** 2))
    return change, (before / (squares or 1.0), after / (squares or 1.0))


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


def _biases(graph: UnitGraph, kernels: Mapping[str, Kernel]) -> dict[str, tuple[str, int]]:
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


def _replaced(graph: UnitGraph, model: Model, new: Mapping[str, Any]) -> Model:
    def edit(name: str, leaf: Any) -> Any:
        return jnp.asarray(new[name].astype(leaf.dtype)) if name in new else leaf

    params, state = jax.tree.map(edit, tuple(graph.names), (model.params, model.state))
    return model.replace(params=params, state=state)

"""Finds the order of units in which one network is nearest to another.

Networks trained from different starts find similar units in different orders. On the straight line between
two such networks the loss has a barrier. It becomes lower, or vanishes, when the units of one network are put
into the order of the other. Of an architecture, only the groups of its
:class:`~distill_jax.compress.units.UnitGraph` must be known.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.optimize

from distill_jax import weights
from distill_jax._checks import check_count
from distill_jax._model import Model, PyTree
from distill_jax.compress.units._trace.roles import positions
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.injection import inject, leaves_by_name
from distill_jax.compress.units.permutation import permutable_groups, permute, position_orders
from distill_jax.compress.units.removal import keep
from distill_jax.compress.units.selection import Indices, mapped_path, select
from distill_jax.compress.units.values import activations

Found = dict[str, np.ndarray]


def match_weights(
    graph: UnitGraph, model: PyTree, reference: PyTree, *, groups: Iterable[str] | None = None, seed: int = 0
) -> Found:
    """Finds the order of a network's units in which its weights are nearest to those of a reference.

    Maximises Σ ⟨θ_reference, π(θ)⟩ over all parameters, which minimises ‖θ_reference − π(θ)‖, by coordinate
    descent: one group after another, in random order, gets its best permutation given all others, until
    none increases the sum. The descent begins twice: with the order as it is, and with the best permutation
    of each group under the assumption that all others could be chosen anew for each unit. The better of the
    two ends is the result. The second start finds a permuted copy of the reference exactly.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``. The state does not count.
      reference: another model of the same structure and shapes.
      groups: the groups to reorder; None for all whose units can be reordered.
      seed: the seed of the random order in which groups are visited.

    Returns:
      group → π, for ``units.permute(graph, model, π)``.

    Raises:
      ValueError: if the two do not fit together or are not finite, or a group cannot be reordered.

    References:
      Ainsworth, Hayase, Srinivasa, `Git Re-Basin: Merging Models modulo Permutation Symmetries`, 2023,
      §3.2 and Algorithm 1.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.eye(3), "b": jnp.arange(6.0).reshape(3, 2)}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> shuffled = units.permute(graph, model, {"a": [2, 0, 1]})
    >>> match_weights(graph, shuffled, model)
    {'a': array([1, 2, 0])}
    """
    check_count("seed", seed, least=0)
    weights.check(_parameters(reference), _parameters(model), names=("the reference", "the model"))
    matching = _Matching(graph, model, reference, permutable_groups(graph, groups))
    ends = [matching.descend(start, seed) for start in (matching.identity(), matching.loose())]
    return max(ends, key=lambda end: end[1])[0]


def _parameters(tree: PyTree) -> PyTree:
    return tree.params if isinstance(tree, Model) else tree


class _Matching:
    """The parameters of two networks as arrays by name, and the sum of products between them."""

    def __init__(self, graph: UnitGraph, model: PyTree, reference: PyTree, names: Sequence[str]):
        self.graph = graph
        self.ours, self.theirs = float_leaves(graph, reference), float_leaves(graph, model)
        self.touched = {
            name: {s.path for s in graph.groups[name].slices if s.path in self.ours} for name in names
        }
        # Those of which the parameters have something
        self.names = [name for name in names if self.touched[name]]

    def identity(self) -> Found:
        return {name: np.arange(self.graph.groups[name].size) for name in self.names}

    def loose(self) -> Found:
        """Orders each group by an upper bound of a pair's gain, in which other groups may have any order."""
        axes = Counter(s.path for name in self.names for s in self.graph.groups[name].slices)
        alone = {path for path, count in axes.items() if count == 1}
        return {
            name: _assign(self.gains(name, self.theirs, lambda x, path: x if path in alone else np.sort(x)))
            for name in self.names
        }

    def gains(self, name: str, theirs: Mapping[str, np.ndarray], view: Any) -> np.ndarray:
        """⟨our unit i, their unit j⟩, summed over all slices: ``[size, size]``."""
        total: Any = 0.0
        for path, axis, index in self.graph.groups[name].slices:
            if path in self.ours:
                a, b = (_by_unit(tree[path], axis, index) for tree in (self.ours, theirs))
                total = total + view(a, path) @ view(b, path).T
        return total

    def permuted(self, orders: Found, paths: Iterable[str]) -> dict[str, np.ndarray]:
        moves = position_orders(self.graph, orders, paths)
        result = {}
        for path in paths:
            result[path] = self.theirs[path]
            for axis, order in moves.get(path, {}).items():
                result[path] = result[path].take(order, axis)
        return result

    def value(self, theirs: Mapping[str, np.ndarray]) -> float:
        return float(sum(np.vdot(self.ours[path], x) for path, x in theirs.items()))

    def descend(self, orders: Found, seed: int) -> tuple[Found, float]:
        rng = np.random.default_rng(seed)
        now = self.permuted(orders, self.ours)
        norms = [
            float(np.sqrt(sum(np.vdot(x, x) for x in tree.values()))) for tree in (self.ours, self.theirs)
        ]
        least, rises = 1e-12 * norms[0] * norms[1], True  # below it, rounding could go in circles
        while rises:
            rises = False
            for name in rng.permutation(self.names).tolist():
                best = _assign(self.gains(name, now, lambda x, path: x))
                trial = {**orders, name: orders[name][best]}
                moved = self.permuted(trial, self.touched[name])
                # Where two axes of a leaf are of one group the assignment is only a proposal
                if self.value(moved) > self.value({p: now[p] for p in moved}) + least:
                    orders, rises = trial, True
                    now.update(moved)
        return orders, self.value(now)


def match_activations(
    graph: UnitGraph, model: Model, reference: Model, x: PyTree, *, groups: Iterable[str] | None = None
) -> Found:
    """Finds the order of units in which a network's activations correlate best with those of a reference.

    Maximises, for each group by itself, the sum over units of the correlation, over examples and places,
    between the values that :func:`distill_jax.compress.units.activations` returns.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      reference: another model of the same structure and shapes.
      x: inputs of the traced shapes: trace with as many examples as are to be compared.
      groups: the groups to reorder; None for all whose units can be reordered.

    Returns:
      group → π, for ``units.permute(graph, model, π)``.

    Raises:
      ValueError: if the two do not fit together or are not finite; if a group cannot be reordered, has no
        activations outside of loops, or lies across another one on an axis.

    References:
      Li, Yosinski, Clune, Lipson, Hopcroft, `Convergent Learning`, 2016, §3.1; Ainsworth, Hayase,
      Srinivasa, 2023, §3.1.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.eye(3), "b": jnp.arange(6.0).reshape(3, 2)}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> x = jnp.sin(jnp.arange(27.0) ** 2).reshape(9, 3)
    >>> graph = units.trace(model, x)
    >>> shuffled = units.permute(graph, model, {"a": [2, 0, 1]})
    >>> match_activations(graph, shuffled, model, x)
    {'a': array([1, 2, 0])}
    """
    weights.check(
        (reference.params, reference.state), (model.params, model.state),
        names=("the reference", "the model"),
    )  # fmt: skip
    names = permutable_groups(graph, groups)
    shared: dict[tuple[str, int], set[str]] = {}
    for name in names:
        for path, axis, _ in graph.groups[name].slices:
            shared.setdefault((path, axis), set()).add(name)
    if both := next((found for found in shared.values() if len(found) > 1), None):
        raise ValueError(
            f"groups: {sorted(both)} lie across each other on one axis, as heads and places in a head "
            "do, and cannot be matched one without the other: use match_weights, or name fewer groups"
        )
    ours, theirs = (activations(graph, each, x) for each in (reference, model))
    missing = [name for name in names if name not in ours]
    if missing:
        raise ValueError(
            f"groups: no product outside of loops reads the units of {missing}: use match_weights, "
            "or name the other groups"
        )
    return {name: _assign(_standardised(ours[name]).T @ _standardised(theirs[name])) for name in names}


def _by_unit(array: np.ndarray, axis: int, index: np.ndarray) -> np.ndarray:
    """Returns the entries of each unit, in the order of its positions: ``[size, rest]``."""
    size = int(index.max()) + 1
    places = positions(index, size)
    assert places is not None, "a group whose units cannot be reordered"
    return np.moveaxis(array, axis, 0)[places].reshape(size, -1)


def _standardised(x: np.ndarray) -> np.ndarray:
    """Scales units to mean 0 and variance 1 over samples; a unit that does not vary becomes 0."""
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1.0)


def _assign(gains: Any) -> np.ndarray:
    """Finds the π with the largest sum of gains: our unit i is their unit π(i)."""
    return scipy.optimize.linear_sum_assignment(gains, maximize=True)[1]


class Brought(NamedTuple):
    """What :func:`bring` returns. ``print`` shows it.

    Attributes:
      model: the student with the teacher's numbers.
      selected: the teacher's group → the units that were selected.
      permutations: the student's group → π.
      kept: the student's array → the reason why it kept its own values.
      distance: ‖θ_student − θ‖ after the selection, and after the alignment.
      cosine: of the angle between the two, after the selection, and after the alignment.
    """

    model: Model
    selected: Indices
    permutations: Found
    kept: dict[str, str]
    distance: tuple[float, float]
    cosine: tuple[float, float]

    def __str__(self) -> str:
        """One line per group, then the distances."""
        lines = [f"{name}: {len(kept)} of the teacher's units" for name, kept in self.selected.items()]
        for name, order in self.permutations.items():
            moved = np.count_nonzero(order != np.arange(len(order)))
            lines.append(f"{name}: {moved} of {len(order)} moved")
        lines += [f"{path}: the student's own, {why}" for path, why in self.kept.items()]
        for name, (before, after) in {"distance": self.distance, "cosine": self.cosine}.items():
            lines.append(f"{name} to the student: selected {before:.4g}, aligned {after:.4g}")
        return "\n".join(lines)


def bring(
    student_graph: UnitGraph,
    student: Model,
    teacher_graph: UnitGraph,
    teacher: Model,
    *,
    how: Literal["uniform", "block"] | Mapping[str, np.ndarray] = "uniform",
    block: int = 0,
    layers: Mapping[str, str] | None = None,
    x: PyTree | None = None,
    groups: Iterable[str] | None = None,
    seed: int = 0,
) -> Brought:
    """Brings a teacher to a student's shape and as near to the student as possible, to interpolate them.

    As many of the teacher's units as the student has are selected, written into the student's structure,
    and put into the order in which they are nearest to the student's units. After that
    :func:`distill_jax.weights.lerp` and the functions of :mod:`distill_jax.train.interpolation` can be
    applied to both.

    Args:
      student_graph: the student's units, from :func:`distill_jax.compress.units.trace`.
      student: the student.
      teacher_graph: the teacher's units.
      teacher: the teacher, a network of the same kind and at least as wide.
      how: how the units are selected, see :func:`distill_jax.compress.units.select`.
      block: which block of units is selected, see there.
      layers: the student's layers → the teacher's, by the beginnings of their arrays' names.
      x: inputs of the shapes traced in ``student_graph``, to align by activations; None to align by
        weights.
      groups: the student's groups to align; None for all whose units can be reordered, ``()`` for a
        selection alone.
      seed: the seed of the random order in which groups are visited.

    Returns:
      The student with the teacher's numbers, and a report.

    Raises:
      ValueError: if the networks do not correspond; if the student is the wider one, or smaller in units
        that cannot be selected because they are not free, with the name of every such array; or in the
        cases of :func:`match_weights`.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> def net(width):
    ...     params = {"a": jnp.eye(4)[:, :width], "b": jnp.arange(2.0 * width).reshape(width, 2)}
    ...     model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    ...     return units.trace(model, jnp.ones((1, 4))), model
    >>> (graph, student), (wide, teacher) = net(2), net(4)
    >>> done = bring(graph, student, wide, teacher, how="block", block=1)
    >>> done.model.params["b"].shape, done.selected
    ((2, 2), {'a': [2, 3]})
    """
    _check_widths(student_graph, teacher_graph, layers)
    selected = select(teacher_graph, student_graph, how=how, block=block, layers=layers)
    cut = keep(teacher_graph, teacher, selected)
    _check_shapes(student, cut, layers)
    written = inject(student, cut, layers=layers)
    if x is None:
        orders = match_weights(student_graph, written.model, student, groups=groups, seed=seed)
    else:
        orders = match_activations(student_graph, written.model, student, x, groups=groups)
    model = permute(student_graph, written.model, orders)
    distance, cosine = (
        (float(measure(student.params, written.model.params)), float(measure(student.params, model.params)))
        for measure in (weights.distance, weights.cosine)
    )
    return Brought(model, selected, orders, written.kept, distance, cosine)


def _check_widths(student: UnitGraph, teacher: UnitGraph, layers: Mapping[str, str] | None) -> None:
    wider = []
    for path, own in student.shapes.items():
        theirs = teacher.shapes.get(mapped_path(path, layers))
        if theirs is not None and any(n > m for n, m in zip(own.shape, theirs.shape, strict=False)):
            wider.append(f"{path}: {own.shape} in the student, {theirs.shape} in the teacher")
    if wider:
        raise ValueError(
            "student: it is wider than the teacher, which has no units to fill it with: exchange the "
            "two, or give a narrower student; " + "; ".join(wider)
        )


def _check_shapes(student: Model, cut: Model, layers: Mapping[str, str] | None) -> None:
    """Refuses arrays that the selection has left larger: :func:`inject` would take some of their indices."""
    found = leaves_by_name(cut)
    lines = []
    for path, leaf in leaves_by_name(student).items():
        theirs = found.get(mapped_path(path, layers))
        if theirs is not None and np.shape(theirs) != np.shape(leaf):
            lines.append(f"{path}: {np.shape(leaf)} in the student, {np.shape(theirs)} selected")
    if lines:
        raise ValueError(
            "student: units in which it is smaller than the teacher are not free there (a layer of one "
            "unit, or frozen: print its graph), so none were selected; give it the teacher's size; "
            + "; ".join(lines)
        )

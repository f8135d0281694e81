"""Two networks of one shape, and the order of units in which the one is nearest to the other.

Networks trained from different starts find similar units in different orders. Between them the
straight line leads over a barrier of the loss, which becomes lower, or goes, once the units of the one
stand where those of the other do. The groups of a :class:`~distill_jax.compress.units.UnitGraph` are all that
has to be known of an architecture.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.optimize

from distill_jax import weights
from distill_jax.compress.units._trace.roles import positions
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.injection import inject
from distill_jax.compress.units.permutation import chosen, permute, position_orders
from distill_jax.compress.units.removal import keep
from distill_jax.compress.units.selection import Indices, mapped_path, select
from distill_jax.compress.units.values import activations, real_leaves

Found = dict[str, np.ndarray]


def match_weights(
    graph: UnitGraph, tree: Any, reference: Any, *, groups: Iterable[str] | None = None, seed: int = 0
) -> Found:
    """Finds the order of a network's units in which its weights are nearest to a reference's.

    Maximises Σ ⟨θ_reference, π(θ)⟩ over all float leaves, which minimises ‖θ_reference − π(θ)‖, by
    coordinate descent: one group after another, in random order, is assigned the best permutation
    given all others, until none rises the sum. Begins twice, once with the order as it is, and
    once with the best assignment of each group if all others could be chosen anew for each unit;
    the better end is the result. From the second, a permuted copy of the reference is found exactly.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      tree: parameters, or also a model's state; as in :func:`distill_jax.compress.units.keep`.
      reference: of the same structure and shapes.
      groups: which to reorder; None for all that are permutable.
      seed: of the order in which groups are visited.

    Returns:
      group → π, for :func:`distill_jax.compress.units.permute` on ``tree``.

    Raises:
      ValueError: if the two do not fit or are not finite, or a group is not permutable.

    References:
      Ainsworth, Hayase, Srinivasa, `Git Re-Basin: Merging Models modulo Permutation Symmetries`, 2023,
      §3.2 and Algorithm 1.

    >>> import jax.numpy as jnp
    >>> from distill_jax import units
    >>> params = {"a": jnp.eye(3), "b": jnp.arange(6.0).reshape(3, 2)}
    >>> graph = units.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
    >>> shuffled = units.permute(graph, params, {"a": [2, 0, 1]})
    >>> match_weights(graph, shuffled, params)
    {'a': array([1, 2, 0])}
    """
    weights.check(reference, tree, names=("the reference", "the tree"))
    matching = _Matching(graph, tree, reference, chosen(graph, groups))
    ends = [matching.descend(start, seed) for start in (matching.identity(), matching.loose())]
    return max(ends, key=lambda end: end[1])[0]


class _Matching:
    """Two trees as arrays by path, and the sum of products between them."""

    def __init__(self, graph: UnitGraph, tree: Any, reference: Any, names: Sequence[str]):
        self.graph = graph
        self.ours, self.theirs = real_leaves(graph, reference), real_leaves(graph, tree)
        self.touched = {
            name: {s.path for s in graph.groups[name].slices if s.path in self.ours} for name in names
        }
        # Those of which the trees have something
        self.names = [name for name in names if self.touched[name]]

    def identity(self) -> Found:
        return {name: np.arange(self.graph.groups[name].size) for name in self.names}

    def loose(self) -> Found:
        """Each group by the upper bound of a pair's gain: what other groups may move has any order."""
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
    graph: UnitGraph, tree: Any, reference: Any, *inputs: Any, groups: Iterable[str] | None = None
) -> Found:
    """Finds the order of a network's units in which their activations correlate with a reference's.

    Maximises the sum over units of the correlation, over examples and places, between the values that
    :func:`distill_jax.compress.units.activations` gives; each group by itself.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      tree: all that was traced, parameters and state.
      reference: likewise, of the same structure and shapes.
      inputs: of the traced shapes: trace with as many examples as shall be looked at.
      groups: which to reorder; None for all that are permutable.

    Returns:
      group → π, for :func:`distill_jax.compress.units.permute` on ``tree``.

    Raises:
      ValueError: if the two do not fit or are not finite; if a group is not permutable, has no
        activations outside of loops, or lies across another one on an axis.

    References:
      Li, Yosinski, Clune, Lipson, Hopcroft, `Convergent Learning`, 2016, §3.1; Ainsworth, Hayase,
      Srinivasa, 2023, §3.1.

    >>> import jax.numpy as jnp
    >>> from distill_jax import units
    >>> params = {"a": jnp.eye(3), "b": jnp.arange(6.0).reshape(3, 2)}
    >>> x = jnp.sin(jnp.arange(27.0) ** 2).reshape(9, 3)
    >>> graph = units.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x)
    >>> shuffled = units.permute(graph, params, {"a": [2, 0, 1]})
    >>> match_activations(graph, shuffled, params, x)
    {'a': array([1, 2, 0])}
    """
    weights.check(reference, tree, names=("the reference", "the tree"))
    names = chosen(graph, groups)
    shared: dict[tuple[str, int], set[str]] = {}
    for name in names:
        for path, axis, _ in graph.groups[name].slices:
            shared.setdefault((path, axis), set()).add(name)
    if both := next((found for found in shared.values() if len(found) > 1), None):
        raise ValueError(
            f"groups: {sorted(both)} lie across each other on one axis, as heads and places in a head "
            "do, and cannot be matched one without the other: use match_weights, or name fewer groups"
        )
    ours, theirs = (activations(graph, each, *inputs) for each in (reference, tree))
    missing = [name for name in names if name not in ours]
    if missing:
        raise ValueError(
            f"groups: no product outside of loops reads the units of {missing}: use match_weights, "
            "or name the other groups"
        )
    return {name: _assign(_standardized(ours[name]).T @ _standardized(theirs[name])) for name in names}


def _by_unit(array: np.ndarray, axis: int, index: np.ndarray) -> np.ndarray:
    """``[size, rest]``: the entries of each unit, in the order of its positions."""
    size = int(index.max()) + 1
    places = positions(index, size)
    assert places is not None, "a group that is not permutable"
    return np.moveaxis(array, axis, 0)[places].reshape(size, -1)


def _standardized(x: np.ndarray) -> np.ndarray:
    """With mean 0 and variance 1 over samples; 0 for a unit that does not vary."""
    spread = x.std(0)
    return (x - x.mean(0)) / np.where(spread > 0, spread, 1.0)


def _assign(gains: Any) -> np.ndarray:
    """π with the largest sum of gains: our unit i is their unit π(i)."""
    return scipy.optimize.linear_sum_assignment(gains, maximize=True)[1]


class Brought(NamedTuple):
    """What :func:`bring` did; ``print`` shows it.

    Attributes:
      params: the teacher's numbers, of the student's structure and shapes.
      selected: the teacher's group → the units that stayed.
      permutations: the student's group → π.
      kept: the student's leaf → why it is still the student's own.
      distance: ‖θ_student − θ‖ after the selection, and after the alignment.
      cosine: of the angle between the two, likewise.
    """

    params: Any
    selected: Indices
    permutations: Found
    kept: dict[str, str]
    distance: tuple[float, float]
    cosine: tuple[float, float]

    def __str__(self) -> str:
        """A line a group, then the distances."""
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
    student: Any,
    teacher_graph: UnitGraph,
    teacher: Any,
    *,
    how: Literal["uniform", "block"] | Mapping[str, np.ndarray] = "uniform",
    block: int = 0,
    layers: Mapping[str, str] | None = None,
    inputs: Sequence[Any] | None = None,
    groups: Iterable[str] | None = None,
    seed: int = 0,
) -> Brought:
    """Brings a teacher to a student's shape, and to its basin: what is then to be interpolated.

    As many of the teacher's units as the student has are selected, written into the student's
    structure, and put into the order in which they are nearest to the student's. After that
    :func:`distill_jax.weights.lerp`, :func:`distill_jax.train.interpolation.pull` and
    :func:`~distill_jax.train.interpolation.through` can have both.

    Args:
      student_graph: of :func:`distill_jax.compress.units.trace`.
      student: what was traced there (without its model state, if that shall not count).
      teacher_graph: of the same or a wider network of the kind.
      teacher: what was traced there, likewise.
      how: as in :func:`distill_jax.compress.units.select`.
      block: likewise.
      layers: likewise.
      inputs: to align by the activations on these, of the shapes traced in ``student_graph``; None to
        align by weights.
      groups: the student's groups to align; None for all that are permutable, none of them for a
        selection alone.
      seed: as in :func:`match_weights`.

    Returns:
      The teacher's numbers for the student, and a report.

    Raises:
      ValueError: if the networks do not correspond; if the student is the wider one, or smaller in
        units that cannot be selected (they are not free), with every path where it is; as
        :func:`match_weights` does.

    >>> import jax.numpy as jnp
    >>> from distill_jax import units
    >>> def net(width):
    ...     params = {"a": jnp.eye(4)[:, :width], "b": jnp.arange(2.0 * width).reshape(width, 2)}
    ...     def fn(p, x):
    ...         return jnp.tanh(x @ p["a"]) @ p["b"]
    ...     return units.trace(fn, params, jnp.ones((1, 4))), params
    >>> (graph, student), (wide, teacher) = net(2), net(4)
    >>> done = bring(graph, student, wide, teacher, how="block", block=1)
    >>> done.params["b"].shape, done.selected
    ((2, 2), {'a': [2, 3]})
    """
    _check_widths(student_graph, teacher_graph, layers)
    selected = select(teacher_graph, student_graph, how=how, block=block, layers=layers)
    cut = keep(teacher_graph, teacher, selected)
    _check_shapes(student, cut, layers)
    written = inject(student, cut, layers=layers)
    if inputs is None:
        orders = match_weights(student_graph, written.params, student, groups=groups, seed=seed)
    else:
        orders = match_activations(student_graph, written.params, student, *inputs, groups=groups)
    params = permute(student_graph, written.params, orders)
    distance, cosine = (
        (float(measure(student, written.params)), float(measure(student, params)))
        for measure in (weights.distance, weights.cosine)
    )
    return Brought(params, selected, orders, written.kept, distance, cosine)


def _check_widths(student: UnitGraph, teacher: UnitGraph, layers: Mapping[str, str] | None) -> None:
    wider = []
    for path, own in student.shapes.items():
        theirs = teacher.shapes.get(mapped_path(path, layers))
        if theirs is not None and any(n > m for n, m in zip(own.shape, theirs.shape, strict=False)):
            wider.append(f"{path}: {own.shape} in the student, {theirs.shape} in the teacher")
    if wider:
        raise ValueError(
            "student: it is wider than the teacher, which has no units to fill it with: exchange the "
            "two, or give a narrower student\n" + "\n".join(wider)
        )


def _check_shapes(student: Any, cut: Any, layers: Mapping[str, str] | None) -> None:
    """Of what selection has left larger, :func:`inject` would take some indices of each axis."""
    found = weights.by_path(cut)
    lines = []
    for path, leaf in weights.by_path(student).items():
        theirs = found.get(mapped_path(path, layers))
        if theirs is not None and np.shape(theirs) != np.shape(leaf):
            lines.append(f"{path}: {np.shape(leaf)} in the student, {np.shape(theirs)} selected")
    if lines:
        raise ValueError(
            "student: units in which it is smaller than the teacher are not free there (a layer of one "
            "unit, or frozen: print its graph), so none were selected; give it the teacher's size\n"
            + "\n".join(lines)
        )

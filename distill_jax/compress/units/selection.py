"""Chooses which units stay as many as a smaller network has, or makes one unit of several that are alike."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from scipy.cluster import hierarchy

from distill_jax._checks import check_count, check_mapping, check_real, is_integer
from distill_jax._model import Model, check_model
from distill_jax.compress.units._trace.roles import positions, roles
from distill_jax.compress.units.editing import map_leaves, numpy_of
from distill_jax.compress.units.graph import Group, Slice, UnitGraph, check_graph
from distill_jax.compress.units.values import vectors

Indices = dict[str, list[int]]


def merge(
    graph: UnitGraph,
    model: Model,
    sizes: Mapping[str, int],
    *,
    likeness: Mapping[str, np.ndarray] | None = None,
    scores: Mapping[str, np.ndarray] | None = None,
    incoming: Literal["mean", "best"] = "mean",
) -> tuple[Model, Indices]:
    """Makes one unit of several that are alike: averages their incoming weights, sums their outgoing ones.

    The outputs stay the same where the merged units are duplicates, with equal incoming weights and any
    outgoing ones. Units are clustered by Ward's criterion on their incoming weights.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model. BatchNorm's statistics, in its state, are averaged as weights are.
      sizes: group → the number of units that the merged group has.
      likeness: group → vectors ``[size, any]`` that are near for units that are alike, in place of the
        incoming weights; for example transposed activations.
      scores: group → ``[size]``, not negative: the weights of the mean, and which unit is the best of a
        cluster.
      incoming: whether a cluster gets the mean of the incoming weights or those of its best unit.

    Returns:
      The model with its old shapes, where one unit of each cluster does the work of all; and ``kept``, these
      units. ``keep(graph, model, kept)`` is the merged network. An optimizer's state has no sums to make:
      ``keep(graph, opt_state, kept)``.

    Raises:
      ValueError: if a group cannot be merged, with the reason: its units are summed over in another way
        than with outgoing weights, a parameter is on both sides, or the program treats units
        differently; if scores are not those of the groups, not finite or negative.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[1.0, 5.0, 1.0]]), "b": jnp.array([[1.0], [2.0], [3.0]])}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 1)))
    >>> merged, kept = units.merge(graph, model, {"a": 2})
    >>> kept, units.keep(graph, merged, kept).params["b"].ravel()
    ({'a': [0, 1]}, Array([4., 2.], dtype=float32))
    """
    check_graph(graph)
    check_model("model", model)
    check_mapping("sizes", sizes, "group → number of units")
    known = roles(graph)
    if wrong := [name for name in likeness or {} if name not in sizes]:
        raise ValueError(f"likeness: {wrong} are not among the groups of sizes, {list(sizes)}")
    for name, size in sizes.items():
        group = _free(graph, name, "sizes")
        if known[name].reason:
            raise ValueError(f"sizes: {name!r} cannot be merged: {known[name].reason}")
        made_of = [s.path for s in known[name].incoming]
        if whole := [path for path in made_of if not np.issubdtype(graph.shapes[path].dtype, np.inexact)]:
            raise ValueError(
                f"sizes: {name!r} cannot be merged: {whole[0]} holds whole numbers, which have no mean"
            )
        if not is_integer(size) or not 1 <= size <= group.size:
            raise ValueError(f"sizes[{name!r}] must lie in 1 … {group.size}, got {size}")
    if incoming not in ("mean", "best"):
        raise ValueError(f"incoming must be 'mean' or 'best', got {incoming!r}")
    if scores is not None:
        check_scores(graph, scores)
        if missing := [name for name in sizes if name not in scores]:
            raise ValueError(f"scores has none of {missing}, only of {list(scores)}")
        for name in sizes:
            if (lowest := np.min(scores[name])) < 0:
                raise ValueError(f"scores[{name!r}] must not be negative, got {lowest}")
    alike = vectors(graph, model, incoming={name: known[name].incoming for name in sizes}, state=True)
    alike |= dict(likeness or {})
    kept: Indices = {}
    plans: dict[str, list[tuple[Slice, np.ndarray, np.ndarray]]] = {}
    for name, size in sizes.items():
        group = graph.groups[name]
        cluster = _clusters(alike[name], size, group)
        weights = np.ones(group.size) if scores is None else np.asarray(scores[name], np.float64)
        members = [np.flatnonzero(cluster == c) for c in np.unique(cluster)]
        best = [each[np.argmax(weights[each])] for each in members]
        kept[name] = sorted(int(unit) for unit in best)
        made, used = np.eye(group.size), np.eye(group.size)
        for unit, each in zip(best, members, strict=True):
            used[unit, each] = 1
            if incoming == "mean":
                total = weights[each].sum()
                made[unit, each] = weights[each] / total if total > 0 else 1 / len(each)
        for matrix, slices in ((made, known[name].incoming), (used, known[name].outgoing)):
            for s in slices:
                places = positions(s.index, group.size)
                assert places is not None, (name, s)
                plans.setdefault(s.path, []).append((s, places, matrix))

    def edit(leaf: Any, name: str) -> Any:
        if name not in plans:
            return leaf
        x = np.asarray(leaf, np.float64)
        for (_, axis, _), places, matrix in plans[name]:
            x = np.moveaxis(x, axis, 0).copy()
            x[places] = np.tensordot(matrix, x[places], 1)
            x = np.moveaxis(x, 0, axis)
        return numpy_of(leaf).asarray(x, leaf.dtype)

    return map_leaves(graph, edit, model), kept


def select(
    graph: UnitGraph,
    student: UnitGraph,
    *,
    how: Literal["uniform", "block"] | Mapping[str, np.ndarray] = "uniform",
    block: int = 0,
    layers: Mapping[str, str] | None = None,
) -> Indices:
    """Chooses as many of a teacher's units as a student of the same kind has.

    ``keep(graph, teacher, kept)`` then has the student's shapes in all layers that the two share, and
    :func:`~distill_jax.compress.units.inject` writes it into the student.

    Args:
      graph: the teacher's units, from :func:`distill_jax.compress.units.trace`.
      student: the student's units.
      how: ``"uniform"`` takes evenly spaced units, ``"block"`` consecutive ones, and a mapping from group to
        scores those with the highest scores.
      block: the number of the block, counted from 0. It starts at ``block`` times the student's size.
      layers: the student's layers → the teacher's, as beginnings of names, such as
        ``{"blocks.1": "blocks.3"}``. Layers that are not named have the same name in both.

    Returns:
      The indices of the teacher's units that stay.

    Raises:
      ValueError: if the teacher does not have a layer, if widths do not correspond (for example those of a
        student of fewer layers, without ``layers``), if the student is the larger one, or if the block ends beyond the
        teacher's units.

    References:
      Xu et al., `Initializing Models with Larger Ones`, 2024, §3 (uniform and consecutive selection).

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> def net(width):
    ...     params = {"a": jnp.ones((3, width)), "b": jnp.ones((width, 2))}
    ...     model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    ...     return units.trace(model, jnp.ones((1, 3)))
    >>> units.select(net(8), net(4))
    {'a': [0, 2, 4, 6]}
    >>> units.select(net(8), net(4), how="block", block=1)
    {'a': [4, 5, 6, 7]}
    """
    check_graph(student)
    check_count("block", block, least=0)
    if layers is not None:
        check_mapping("layers", layers, "the student's layer → the teacher's")
    if isinstance(how, Mapping):
        check_scores(graph, how)
    elif how not in ("uniform", "block"):
        raise ValueError(f"how must be 'uniform', 'block' or scores by group, got {how!r}")
    sizes: dict[str, int] = {}
    ours, theirs = _by_place(student), _by_place(graph)
    paths = {path: mapped_path(path, layers) for path in student.shapes}
    for path, axis in [(p, i) for p, leaf in student.shapes.items() for i in range(len(leaf.shape))]:
        place = paths[path], axis
        widths = [(group.name, group.size) for group in ours.get((path, axis), [])]
        large = theirs.get(place, [])
        if widths and place[0] not in graph.shapes:
            raise ValueError(f"layers: the student's {path} has no counterpart {place[0]} in the teacher")
        # A single unit is no group. All its layer's arrays must be there, for a result may be one, too
        single = not widths and len(large) == 1 and student.shapes[path].shape[axis] == 1
        if single and {s.path for s in large[0].slices} <= {*paths.values()}:
            widths = [(path, 1)]
        if len(large) != len(widths):
            raise ValueError(
                f"student: {path}, axis {axis}, has groups {[name for name, _ in widths]}, but the "
                f"teacher's {place[0]} has {[g.name for g in large]}: they are of different kinds "
                "(the model's inputs and outputs, and what is frozen, have none); give layers, or a "
                "student of another shape"
            )
        for group, (name, size) in zip(large, widths, strict=True):
            if sizes.setdefault(group.name, size) != size:
                raise ValueError(
                    f"student: {name} needs {size} of the teacher's units {group.name}, another "
                    f"group of the student {sizes[group.name]}"
                )
    found: Indices = {}
    for name, size in sizes.items():
        group = _free(graph, name, "student")
        if size > group.size:
            raise ValueError(f"student: it has {size} units where the teacher's {name} has {group.size}")
        if isinstance(how, Mapping):
            if name not in how:
                raise ValueError(f"how has no scores of {name!r}, only of {list(how)}")
            found[name] = np.sort(np.argsort(-np.asarray(how[name]), kind="stable")[:size]).tolist()
        elif how == "uniform":
            found[name] = (np.arange(size) * group.size // size).tolist()
        elif 0 <= block * size <= group.size - size:
            found[name] = list(range(block * size, (block + 1) * size))
        else:
            raise ValueError(
                f"block must lie in 0 … {group.size // size - 1} for {name!r} "
                f"({size} of {group.size} units), got {block}"
            )
    return found


def mapped_path(path: str, layers: Mapping[str, str] | None) -> str:
    """Returns the name of the teacher's array that corresponds to an array of the student.

    Args:
      path: the name of the student's array.
      layers: the student's layers → the teacher's. Of the layers with which ``path`` begins, the longest
        counts.

    Returns:
      The name of the teacher's array.

    >>> mapped_path("blocks.1.kernel", {"blocks.1": "blocks.3"})
    'blocks.3.kernel'
    """
    parts = path.split(".")
    for i in range(len(parts), 0, -1):
        if (head := ".".join(parts[:i])) in (layers or {}):
            return ".".join([(layers or {})[head], *parts[i:]])
    return path


def _by_place(graph: UnitGraph) -> dict[tuple[str, int], list[Group]]:
    """Finds the free groups on each axis."""
    found: dict[tuple[str, int], list[Group]] = {}
    for group in graph.groups.values():
        for s in group.slices if group.free else ():
            groups = found.setdefault((s.path, s.axis), [])
            if group not in groups:
                groups.append(group)
    return found


def _clusters(x: np.ndarray, size: int, group: Group) -> np.ndarray:
    """Returns the cluster of each unit, ``[units]``."""
    check_real(f"likeness[{group.name!r}]", x)
    if x.shape[:1] != (group.size,) or x.ndim != 2 or not np.isfinite(x).all():
        raise ValueError(f"likeness[{group.name!r}] must be [{group.size}, any] and finite, got {x.shape}")
    if size == group.size:
        return np.arange(size)
    return hierarchy.cut_tree(hierarchy.ward(x), n_clusters=size).ravel()


def _free(graph: UnitGraph, name: str, argument: str) -> Group:
    group = graph.groups.get(name)
    if group is None:
        raise ValueError(f"{argument}: {name!r} is no group; there are {list(graph.groups)}")
    if not group.free:
        raise ValueError(f"{argument}: {name!r} is not free: {group.reason}")
    return group


def check_scores(graph: UnitGraph, scores: Mapping[str, np.ndarray]) -> None:
    """Raises ``ValueError`` unless there is one finite score for each unit of some free groups."""
    check_graph(graph)
    check_mapping("scores", scores, "group → array [size]")
    if not scores:
        raise ValueError("scores are empty: there is no group to choose from")
    for name, x in scores.items():
        size = _free(graph, name, "scores").size
        check_real(f"scores[{name!r}]", x)
        if np.shape(x) != (size,) or not np.isfinite(x).all():
            raise ValueError(
                f"scores[{name!r}] must be [{size}] and finite, got shape {np.shape(x)}"
                + ("" if np.shape(x) != (size,) else " with numbers that are not")
            )

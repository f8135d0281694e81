"""Makes scores of different groups comparable, by what the network loses without half of each group."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.linalg import solve_triangular

from distill_jax._checks import check_function, check_positive
from distill_jax._model import Model, PyTree, check_model
from distill_jax.compress._products import check_batches, replaced
from distill_jax.compress.units.costs import Cost
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.masks import Kept
from distill_jax.compress.units.reconstruction import Inputs, gather, rows_of_units
from distill_jax.compress.units.removal import silence
from distill_jax.compress.units.scoring import Scores
from distill_jax.compress.units.selection import check_scores

TINY = 1e-100  # of a loss, that scores of units that do not count keep their order


def measured(
    graph: UnitGraph,
    model: Model,
    scores: Mapping[str, np.ndarray],
    loss: Callable[[Model], float],
    *,
    of: Cost | None = None,
    batches: Sequence[PyTree] = (),
    damping: float = 0.01,
) -> Scores:
    """Makes the scores of all groups comparable: they say by how much the loss rises when a unit goes.

    Scores say which units of a group go first, but shares of errors, or magnitudes of weights, do not say which *group*
    can spare more. This function removes half of each group, alone: the units with the lowest scores. It measures by
    how much the loss rises, and multiplies the scores of the group such that those of the removed units have this sum.
    With ``of``, scores are also divided by the cost that a unit of the group saves. Then
    ``units.prune(across="network")`` removes the units that lose least for what they save: a dimension of all queries
    and keys saves more than a hidden unit.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      scores: group → ``[size]``, not negative, from the other functions here. Groups in which fewer than two units
        have a score above 0 are left out, so that they stay whole.
      loss: ``model -> number``, on data that are not used to test: the lower the better.
      of: the cost, for example ``units.costs.flops``; None: units count alike.
      batches: with inputs, the kernels that used the removed half are solved anew by least squares before the loss is
        measured, as :func:`~distill_jax.compress.units.compensate` will do, but each by itself. Groups that are not
        exact are measured without it, with their units at zero. Padding counts as well, so leave it out.
      damping: as :func:`~distill_jax.compress.units.compensate` has it.

    Returns:
      The scores, float64 ``[size]`` for each group. Where the loss does not rise, they are tiny, in the same order.

    Raises:
      ValueError: if scores do not belong to free groups or are negative; if the loss is not finite.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 2)), "c": jnp.array([[1.0], [9.0]])}
    >>> model = models.from_function(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params)
    >>> x = jnp.ones((1, 1))
    >>> scores = {"a": np.array([1.0, 2.0]), "b": np.array([1.0, 2.0])}
    >>> y = model(x)
    >>> loss = lambda model: float(jnp.abs(model(x) - y).mean())
    >>> {name: each.round(1) for name, each in measured(units.trace(model, x), model, scores, loss).items()}
    {'a': array([2.7, 5.3]), 'b': array([0.9, 1.8])}
    """
    check_scores(graph, scores)
    check_model("model", model)
    check_function("loss", loss, "model")
    if of is not None:
        check_function("of", of, "graph, kept")
    check_positive("damping", damping)
    if negative := [name for name, each in scores.items() if np.min(each) < 0]:
        raise ValueError(
            f"scores must not be negative, got some for {negative}: the loss cannot be shared out by them"
        )
    given = None
    if len(batches):
        check_batches(batches)
        given = gather(graph, model, batches, scores)
    before, whole, found = _finite(loss(model)), of(graph, {}) if of is not None else 0.0, Scores()
    for name, each in scores.items():
        each = np.asarray(each, np.float64)
        count = int(np.sum(each > 0))
        if count < 2:
            continue
        order = np.argsort(-each, kind="stable")
        stay, gone = np.sort(order[: -(-count // 2)]), order[-(-count // 2) :]
        kept = {name: stay.tolist()}
        smaller = silence(graph, model, kept)
        if given is not None and name in given.used and graph.groups[name].exact:
            smaller = _corrected(graph, model, smaller, name, stay, given, damping)
        risen = max(_finite(loss(smaller)) - before, TINY)
        found[name] = each * (risen / each[gone].sum()) / _saved(graph, of, kept, whole, len(gone))
    return found


def _saved(graph: UnitGraph, of: Cost | None, kept: Kept, whole: float, count: int) -> float:
    """Computes the cost that a unit saves; 1 where there is no cost."""
    if of is None:
        return 1.0
    saved = whole - of(graph, kept)
    if not saved > 0:
        raise ValueError(
            f"of: the cost does not fall when half of the units of {list(kept)} go, it changes by {-saved}"
        )
    return saved / count


def _finite(value: float) -> float:
    if not np.ndim(value) == 0 or not np.isfinite(value):
        raise ValueError(f"loss must give a finite number, got {value}")
    return float(value)


def _corrected(
    graph: UnitGraph, model: Model, smaller: Model, name: str, stay: np.ndarray, given: Inputs, damping: float
) -> Model:
    """Solves the kernels that use a group anew, for the units that stay, on the whole network's inputs."""
    leaves, new = float_leaves(graph, model, state=True), dict[str, np.ndarray]()
    for used in given.used[name]:
        path, kernel = used.path, given.kernels[used.path]
        triangle, matrix = given.triangles[path], kernel.matrix(leaves[path])
        units = rows_of_units(used, kernel, graph.groups[name].size)
        gone = np.delete(units, stay, axis=0)
        rows = np.setdiff1d(np.arange(len(matrix)), gone)
        biased = path in given.biases
        inputs = triangle[int(biased) :, int(biased) :]  # without means, where there is a bias
        strength = damping * np.sum(triangle[:, int(biased) + rows] ** 2) / len(rows)
        lost = inputs @ matrix - inputs[:, rows] @ matrix[rows]
        held = np.sqrt(strength) * np.eye(len(rows))
        orthogonal, right = np.linalg.qr(np.concatenate([inputs[:, rows], held]))
        change = solve_triangular(right, orthogonal[: len(lost)].T @ lost)
        solved = np.zeros_like(matrix)
        solved[rows] = matrix[rows] + change
        new[path] = kernel.array(solved)
        if biased:
            bias, sign = given.biases[path]
            mean = triangle[0, 1:] / triangle[0, 0]
            new[bias] = leaves[bias] + sign * (mean @ (matrix - solved)).reshape(np.shape(leaves[bias]))
    params, state = replaced((smaller.params, smaller.state), tuple(graph.names), new)
    return smaller.replace(params=params, state=state)

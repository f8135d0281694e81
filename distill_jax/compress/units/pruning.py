"""Chooses which units stay: those of the highest scores, within a budget.

:func:`prune` returns ``kept``, the indices that stay in each group. Arrays become smaller only by
:func:`~distill_jax.compress.units.keep`, which takes the model, the optimizer's state, or both:

    kept = units.prune(graph, units.scores.l2(graph, model), 0.5)
    model, opt_state = units.keep(graph, (model, opt_state), kept)
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np

from distill_jax._checks import (
    BudgetError,
    check_choice,
    check_count,
    check_fraction,
    check_function,
    check_positive,
)
from distill_jax.compress.units.costs import Cost, share
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.selection import Indices, check_scores


def prune(
    graph: UnitGraph,
    scores: Mapping[str, np.ndarray],
    budget: float | Mapping[str, float],
    *,
    of: Cost = share,
    across: Literal["network", "group", "isomorphic"] = "network",
    most: float | Mapping[str, float] = 1.0,
    multiple: int = 1,
) -> Indices:
    """Chooses the units to keep so that a cost fits into a budget: those of the lowest scores go.

    No more units go than the budget demands.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      scores: group → ``[size]``, from :mod:`distill_jax.compress.units.scores`. Groups that are not named
        stay whole.
      budget: the highest cost that may be left, in the unit of ``of``; or group → the share of its units that may
        be left, and groups without one stay whole.
      of: the cost: ``units.costs.share`` of the scored groups' units, ``units.costs.parameters``,
        ``units.costs.flops``, the measured ``units.costs.latency``, or any other
        ``(graph, kept) -> number`` that falls when units go.
      across: ``"network"``: all units are ranked together; ``"group"``: each group loses the same share;
        ``"isomorphic"``: units of groups of the same kind are ranked together, and each kind loses the same
        share. Groups are of one kind if their slices lie on the same axes of as many arrays: the hidden units of
        all dense layers, the heads of all attentions.
      most: the largest share of its units that a group may lose; or group → share.
      multiple: group sizes are rounded up to multiples of this number (8, for example, for a GPU). A group
        smaller than that stays whole.

    Returns:
      The indices that stay in each scored group, at least one.

    Raises:
      ValueError: if scores do not belong to free groups; if an option lies outside its bounds (a share of units lies
        in [0, 1]); if the budget is below the cost of the smallest network, which has one unit per group (or
        ``multiple``, or what ``most`` leaves).

    References:
      Fang et al., `Isomorphic Pruning for Vision Models`, 2024 (arXiv 2407.04616), §3.2 (there kinds of whole
      sub-structures, operations included).

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[1.0, -3.0, 2.0]]), "b": jnp.ones((3, 1))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 1)))
    >>> units.prune(graph, units.scores.l1(graph, model), 4, of=units.costs.parameters)
    {'a': [1, 2]}
    """
    check_scores(graph, scores)
    check_count("multiple", multiple)
    check_function("of", of, "graph, kept")
    check_choice("across", across, ("network", "group", "isomorphic"))
    if isinstance(budget, Mapping):
        if across != "network":
            raise ValueError(
                f"across: budget gives a share for each group, so leave out across, got {across!r}"
            )
        return _each(graph, scores, budget, of, most, multiple)
    if np.ndim(budget):
        raise ValueError(f"budget must be one number, got shape {np.shape(budget)}")
    (check_fraction if of is share else check_positive)("budget", budget)
    least = _least(scores, most)
    order = {name: np.argsort(-np.asarray(x), kind="stable") for name, x in scores.items()}

    def left(removed: int) -> Indices:
        found = {}
        for name, count in counts(removed).items():
            size = len(order[name])
            count = min(size, -(-max(count, least[name]) // multiple) * multiple)
            found[name] = np.sort(order[name][:count]).tolist()
        return found

    if across == "group":
        steps = max(map(len, order.values()))

        def counts(removed: int) -> dict[str, int]:
            return {name: round(len(x) * (1 - removed / steps)) for name, x in order.items()}
    else:
        kinds: dict[object, list[tuple[str, float]]] = {}
        for name, x in scores.items():
            kind = _kind(graph, name) if across == "isomorphic" else None
            units = np.sort(np.asarray(x))[: len(x) - least[name]]
            kinds.setdefault(kind, []).extend((name, score) for score in units)
        lowest = [sorted(each, key=lambda pair: pair[1]) for each in kinds.values()]
        steps = max(map(len, lowest))

        def counts(removed: int) -> dict[str, int]:
            gone = Counter(
                name for each in lowest for name, _ in each[: round(len(each) * removed / max(steps, 1))]
            )
            return {name: len(x) - gone[name] for name, x in order.items()}

    found = left(0)
    if np.isnan(whole := of(graph, found)):
        raise ValueError("of must give a number, the cost of the network, got NaN for the whole network")
    if whole <= budget:
        return found
    low, high = 0, steps
    found = left(steps)
    if not (cost := of(graph, found)) <= budget:
        bound = (
            "what most leaves" if most != 1 else f"{multiple} unit{'' if multiple == 1 else 's'} per group"
        )
        raise BudgetError(
            f"budget: the smallest network, with {bound}, still costs {cost:g}, more than {budget}: raise the "
            "budget, or score more groups",
            "budget",
        )
    while high - low > 1:  # above the budget at low, within it at high
        middle = (low + high) // 2
        trial = left(middle)
        if of(graph, trial) <= budget:
            high, found = middle, trial
        else:
            low = middle
    return found


def _each(
    graph: UnitGraph,
    scores: Mapping[str, np.ndarray],
    budget: Mapping[str, float],
    of: Cost,
    most: float | Mapping[str, float],
    multiple: int,
) -> Indices:
    """Prunes each group to its own share."""
    if of is not share:
        raise ValueError("budget: one number is needed for a cost of the whole network, got shares of groups")
    if unknown := [name for name in budget if name not in scores]:
        raise ValueError(f"budget names {unknown}, which have no scores; there are {list(scores)}")
    least = _least(scores, most)
    found = {name: list(range(len(x))) for name, x in scores.items()}
    for name, part in budget.items():
        limit = 1 - least[name] / len(scores[name])
        found |= prune(graph, {name: scores[name]}, part, most=limit, multiple=multiple)
    return found


def _least(scores: Mapping[str, np.ndarray], most: float | Mapping[str, float]) -> dict[str, int]:
    """Computes the smallest number of units that each group may have."""
    given = most if isinstance(most, Mapping) else dict.fromkeys(scores, most)
    if unknown := [name for name in given if name not in scores]:
        raise ValueError(f"most names {unknown}, which have no scores; there are {list(scores)}")
    for name, part in given.items():
        check_fraction("most" if given is not most else f"most[{name!r}]", part)
    # A share such as 0.9 of 10 units is 9, whatever rounding says
    return {name: max(1, math.ceil(len(x) * (1 - given.get(name, 1.0)) - 1e-9)) for name, x in scores.items()}


def _kind(graph: UnitGraph, name: str) -> tuple[tuple[int, int], ...]:
    """Lists the axes on which a group lies, with the number of axes of their arrays."""
    slices = graph.groups[name].slices
    return tuple(sorted((len(graph.shapes[path].shape), axis) for path, axis, _ in slices))


def budgets(
    budget: float, rounds: int, *, steps: Literal["geometric", "linear"] = "geometric"
) -> list[float]:
    """Makes the budgets of iterative pruning: score, prune and train again, round by round.

    Args:
      budget: the share of the units that is left at the end, in (0, 1].
      rounds: the number of rounds.
      steps: ``"geometric"``: each round leaves the same share of what there was; ``"linear"``: each round removes as
        many of the original's units.

    Returns:
      The share of the original's units that is left after each round. With a graph of the network of the round
      before, divide by the share before: ``budgets[i] / budgets[i - 1]``.

    >>> budgets(0.25, 2), budgets(0.25, 3, steps="linear")
    ([0.5, 0.25], [0.75, 0.5, 0.25])
    """
    check_fraction("budget", budget, without=0)
    check_count("rounds", rounds)
    check_choice("steps", steps, ("geometric", "linear"))
    parts = [i / rounds for i in range(1, rounds + 1)]
    between = [budget**part if steps == "geometric" else 1 - (1 - budget) * part for part in parts[:-1]]
    return [*between, budget]

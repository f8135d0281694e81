"""Makes a network ready for pruning while it is trained: units that are to go shrink to zero, as part of the optimizer.

Both transformations come last in a chain, for they act on the weights as the optimizer leaves them:

    tx = optax.chain(optax.adam(1e-3), units.group_lasso(graph, 1e-5))
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax._checks import check_count, check_fraction, check_not_negative
from distill_jax._model import PyTree
from distill_jax.compress.units._trace.roles import roles
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import Group, Slice, UnitGraph, check_graph
from distill_jax.compress.units.masks import Kept, position_masks

Strength = float | Callable[[jax.Array], jax.Array]


class PenaltyState(NamedTuple):
    """The state of :func:`group_lasso` and :func:`growing_decay`.

    Attributes:
      step: int32 scalar, the number of updates made.
    """

    step: jax.Array


def group_lasso(
    graph: UnitGraph, strength: Strength, *, groups: Sequence[str] | None = None
) -> optax.GradientTransformation:
    """Shortens the weights of each unit at each step, so that those of units that are not needed become zero.

    It is the proximal step of the penalty λ Σ_u √n_u ‖w_u‖, where w_u are the n_u weights of which the unit u is made
    (its incoming slices): after the optimizer's step w_u becomes w_u · max(0, 1 − η λ √n_u / ‖w_u‖). Units
    become exactly zero, and may come back. :func:`living` tells which are not.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      strength: η λ, the learning rate times the weight of the penalty; or a schedule, step → η λ. After Adam, whose
        steps are about η in each weight, it must stay below η, or all units become zero.
      groups: the groups to shorten; None for all free groups with incoming slices.

    Returns:
      A transformation that comes last in a chain. Its ``update`` needs ``params``.

    Raises:
      ValueError: if ``strength`` is negative, or a group is not free or has no weights of its own; from ``init``,
        if the parameters have another structure than the traced ones.

    References:
      Yuan, Lin, `Model Selection and Estimation in Regression with Grouped Variables`, 2006, Eq. 2.2; Wen et al.,
      `Learning Structured Sparsity in Deep Neural Networks`, 2016 (arXiv 1608.03665), by gradients and not proximal.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[0.3, 3.0], [0.4, 4.0]]), "b": jnp.ones((2, 1))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> tx = group_lasso(units.trace(model, jnp.ones((1, 2))), 1 / jnp.sqrt(2.0))
    >>> updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["a"])  # norms 0.5 and 5, of which 1 is taken
    [[0.  2.4]
     [0.  3.2]]
    """
    check_graph(graph)
    if not callable(strength):
        check_not_negative("strength", strength)
    made = _made(graph, groups)

    def shortened(leaves: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
        amount = strength(step) if callable(strength) else strength
        for group, slices in made:
            squares, count = jnp.zeros(group.size), np.zeros(group.size)
            for path, axis, index in slices:
                x = leaves[path]
                rest = tuple(a for a in range(x.ndim) if a != axis)
                sums = jnp.square(x.astype(jnp.float32)).sum(rest)
                squares = squares.at[index].add(jnp.where(index < 0, 0.0, sums))
                count += np.bincount(index[index >= 0], minlength=group.size) * (x.size / x.shape[axis])
            norm = jnp.sqrt(squares)
            factor = jnp.maximum(0, 1 - amount * np.sqrt(count) / jnp.where(norm > 0, norm, 1))
            for path, axis, index in slices:
                x = leaves[path]
                along = jnp.where(index < 0, 1.0, factor[index]).astype(x.dtype)
                leaves[path] = x * along.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        return leaves

    return _last(graph, shortened)


def growing_decay(
    graph: UnitGraph, kept: Kept, growth: float, *, every: int = 1, ceiling: float = 0.1
) -> optax.GradientTransformation:
    """Lets the weights of the units that will go decay, ever faster, so that the others take over their work.

    At step t each weight of a unit that is not in ``kept`` is multiplied by 1 − min(ceiling, growth·⌊t/every⌋), after
    the optimizer's step. Then :func:`~distill_jax.compress.units.keep` removes the units.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that will stay, for example from :func:`~distill_jax.compress.units.prune`.
      growth: what is added to the decay at a time.
      every: the number of steps between two additions.
      ceiling: the largest decay of a step, in [0, 1].

    Returns:
      A transformation that comes last in a chain. Its ``update`` needs ``params``.

    Raises:
      ValueError: if ``kept`` is not valid, or a number is out of range; from ``init``, if the parameters have another
        structure than the traced ones.

    References:
      Wang et al., `Neural Pruning via Growing Regularization`, 2021 (arXiv 2012.09243), §3.2 (GReg-1), where the decay
      is a part of the gradient; here it does not pass through the optimizer, so that Adam does not undo its size.
    """
    check_not_negative("growth", growth)
    check_count("every", every)
    check_fraction("ceiling", ceiling)
    masks = position_masks(graph, kept)

    def decayed(leaves: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
        rate = jnp.minimum(ceiling, growth * (step // every))
        for path in leaves.keys() & masks.keys():
            x, stays = leaves[path], np.ones(leaves[path].shape, bool)
            for axis, mask in masks[path].items():
                stays &= mask.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
            leaves[path] = jnp.where(stays, x, (x * (1 - rate)).astype(x.dtype))
        return leaves

    return _last(graph, decayed)


def living(graph: UnitGraph, model: PyTree, *, above: float = 0.0) -> dict[str, list[int]]:
    """Tells which units' weights are not zero.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, or a tree of the structure of its ``params``.
      above: units of norms up to this are no longer living, √(mean square) of the weights of which they are made.

    Returns:
      The indices that stay in each free group that has incoming weights, for :func:`~distill_jax.compress.units.keep`:
      at least the one of the largest weights. Units of zero weights that still have a constant value, such as
      sigmoid(0), are used by later layers; :func:`~distill_jax.compress.units.compensate` corrects these.
    """
    check_not_negative("above", above)
    leaves, found = float_leaves(graph, model), {}
    for group, slices in _made(graph, None):
        squares, count = np.zeros(group.size), np.zeros(group.size)
        for path, axis, index in slices:
            x, here = leaves[path], index >= 0
            sums = (x**2).sum(tuple(a for a in range(x.ndim) if a != axis))
            squares += np.bincount(index[here], sums[here], group.size)
            count += np.bincount(index[here], minlength=group.size) * (x.size / x.shape[axis])
        size = np.sqrt(squares / count)
        found[group.name] = np.flatnonzero(
            (size > above) | (np.arange(group.size) == np.argmax(size))
        ).tolist()
    return found


def _made(graph: UnitGraph, groups: Sequence[str] | None) -> list[tuple[Group, tuple[Slice, ...]]]:
    """Returns the groups, and the slices of parameters of which their units are made."""
    known, params = roles(graph, alike=False), set(jax.tree.leaves(graph.names.params))
    found = []
    for name in known if groups is None else groups:
        if name not in known:
            raise ValueError(f"groups: {name!r} is no free group; there are {list(known)}")
        slices = tuple(s for s in known[name].incoming if s.path in params)
        if slices:
            found.append((graph.groups[name], slices))
        elif groups is not None:
            raise ValueError(f"groups: no weights make the units of {name!r}: leave it out")
    return found


def _last(
    graph: UnitGraph, change: Callable[[dict[str, jax.Array], jax.Array], dict[str, jax.Array]]
) -> optax.GradientTransformation:
    """Makes a transformation of a change of the parameters, by name, as the update leaves them."""
    names, flat = jax.tree.flatten(graph.names.params)
    structure: Any = flat

    def init(params: PyTree) -> PenaltyState:
        if jax.tree.structure(params) != structure:
            raise ValueError(
                f"params must have the traced structure, {structure}, got {jax.tree.structure(params)}"
            )
        return PenaltyState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: PenaltyState, params: PyTree | None = None
    ) -> tuple[Any, PenaltyState]:
        if params is None:
            raise ValueError("the penalty needs the parameters: call update(updates, state, params)")
        after = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        leaves = change(dict(zip(names, jax.tree.leaves(after), strict=True)), state.step)
        new = structure.unflatten([leaves[name] for name in names])
        # What becomes zero does so exactly: p − p
        changes = jax.tree.map(lambda n, p: n - p, new, params)
        return changes, PenaltyState(optax.safe_increment(state.step))

    return optax.GradientTransformation(init, update)

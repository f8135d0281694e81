"""Finds the residual blocks of a network, and removes whole blocks and layers.

A block is the branch f(x) of a sum x + f(x), such as an attention or a feed-forward part; or one of the layers
whose parameters are stacked and that a ``scan`` goes through. :func:`blocks` lists them, :func:`drop_blocks` removes
them:

    influence = units.block_influence(graph, model, [x])
    model, opt_state = units.drop_blocks(graph, (model, opt_state), units.prune_blocks(graph, influence, 0.8))
    graph = units.trace(model, x)  # the units of what is left
"""

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from distill_jax._checks import (
    BudgetError,
    check_choice,
    check_finite,
    check_fraction,
    check_mapping,
    check_sequence,
)
from distill_jax._model import ApplyFn, PyTree
from distill_jax.compress.units._trace.branches import take_out, used
from distill_jax.compress.units._trace.program import Program
from distill_jax.compress.units._trace.work import whole_multiplications
from distill_jax.compress.units.editing import map_leaves, numpy_of
from distill_jax.compress.units.graph import UnitGraph, check_graph
from distill_jax.compress.units.shallow import RemainingArrays, ShallowFn, trace_blocks


class Block(NamedTuple):
    """A residual block, or a layer of a ``scan``.

    Attributes:
      name: what the paths of its kernels have in common, such as ``layers.0.attention``; or the path of its first
        kernel. A layer of a scan has its number in brackets, ``layers[0]``.
      arrays: the names of the parameters and of the arrays of the state that go with it, because nothing else uses
        them; of a layer, those that lose a row.
      parameters: the number of single weights that go.
      flops: the number of operations of matrix products and convolutions that go, for the traced inputs.
    """

    name: str
    arrays: tuple[str, ...]
    parameters: int
    flops: int


def blocks(graph: UnitGraph) -> dict[str, Block]:
    """Lists the residual blocks of a network, and the layers that it has stacked under ``scan``.

    A block is the branch f of a sum x + f(x). The branch must have parameters that nothing else uses, and x must be
    added as it is: a block with a projection in its shortcut is none. Blocks may lie within each other. Each
    attention and each feed-forward part of a transformer is a block by itself; drop both to remove a layer.

    A layer of a ``scan`` is listed if it only adds residual branches to what the loop carries, and the loop's
    stacked results are not used. Then the branches within its body are not listed one by one. Branches within
    other loops, choices (``cond``) and functions with derivatives of their own are not found.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.

    Returns:
      The blocks by name, in the order in which the network computes them.

    >>> import jax, jax.numpy as jnp
    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"blocks": [{"up": jnp.ones((3, 4)), "down": jnp.ones((4, 3))}] * 2, "out": jnp.ones((3, 2))}
    >>> def apply(p, x):
    ...     for block in p["blocks"]:
    ...         x = x + jnp.tanh(x @ block["up"]) @ block["down"]
    ...     return x @ p["out"]
    >>> model = models.from_function(apply, params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> list(units.blocks(graph))
    ['blocks.0', 'blocks.1']
    >>> units.drop_blocks(graph, model, ["blocks.0"]).params["blocks"][0]
    {'down': None, 'up': None}
    """
    network = Network(graph)
    names = [*graph.shapes]
    whole = whole_multiplications(network.program)
    found = {}
    for name in network.branches:
        remaining, small = network.without([name])
        arrays = [i for i in range(len(names)) if remaining.lost(i)]
        parameters = sum(remaining.lost(i) for i in arrays if i < network.count)
        flops = 2 * (whole - whole_multiplications(small))
        found[name] = Block(name, tuple(names[i] for i in arrays), parameters, flops)
    return found


class Network:
    """The traced network with its blocks.

    Args:
      graph: the network's units.
    """

    def __init__(self, graph: UnitGraph):
        check_graph(graph)
        model = graph.traced.model
        self.whole = [*graph.shapes.values()]
        self.count = len(jax.tree.leaves(model.params))
        self.parameters = sum(prod(like.shape) for like in self.whole[: self.count])
        self.program, self.branches, _ = trace_blocks(
            model.apply_fn, (model.params, model.state), graph.traced.x
        )
        self.used = used(self.program)

    def without(self, names: Collection[str]) -> tuple[RemainingArrays, Program]:
        """Takes blocks out: what is left of the arrays, and the program of the rest."""
        branches = [self.branches[name] for name in names]
        small = take_out(self.program, branches, self.program.outputs)
        gone = {i for i in self.used - used(small) if i < len(self.whole)}
        rows: dict[int, np.ndarray] = {}
        for branch in branches:
            for i in branch.inputs if branch.row is not None else ():
                if i not in gone:
                    rows.setdefault(i, np.ones(branch.layers, bool))[branch.row] = False
        return RemainingArrays(self.whole, frozenset(gone), rows), small

    def check(self, argument: str, names: Collection[str]) -> None:
        """Raises ``ValueError`` unless names are blocks."""
        if unknown := [name for name in names if name not in self.branches]:
            raise ValueError(f"{argument} names {unknown}, which are no blocks; there are {[*self.branches]}")


def drop_blocks(graph: UnitGraph, tree: PyTree, names: Sequence[str]) -> PyTree:
    """Removes residual blocks and layers: the same pytree without their arrays, and models that run.

    The network computes what it would compute if the branch of each block were zero. Parameters that only these
    blocks use are ``None`` in the result, and stacked arrays lose the rows of the layers that are gone. The
    structure is otherwise that of the original, so names of parameters stay. The model's function is the
    network's program without the blocks, traced anew for each shape and dtype of inputs and for training mode:
    it takes any batch size and trains, with the derivatives, the rematerialisation and the random numbers
    of the network.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      tree: the model; or any pytree that holds whole trees of the structure of the traced ``params`` or
        ``state``, such as a training state or an optimizer's state.
      names: the names of the blocks that go, see :func:`blocks`.

    Returns:
      A pytree of the same structure, with ``None`` in the place of the arrays that are gone. A Model in it whose
      parameters and state are the traced ones runs; called in a way in which the blocks are not found, or the
      new state needs what is gone, it raises ``ValueError``.

    Raises:
      ValueError: if a name is no block, or no parameter would be left; if nothing in the tree has the traced structure.
    """
    check_sequence("names", names, "names of blocks")
    network = Network(graph)
    network.check("names", names)
    remaining, _ = network.without({*names})
    if names and remaining.gone.issuperset(range(network.count)):
        raise ValueError(f"names are all that the network has, no parameter would be left: got {[*names]}")
    place_of = {name: i for i, name in enumerate(graph.shapes)}

    def edit(leaf: Any, name: str) -> Any:
        i = place_of[name]
        if i in remaining.rows:
            return numpy_of(leaf).take(leaf, np.flatnonzero(remaining.rows[i]), axis=0)
        return None if i in remaining.gone else leaf

    def function(apply_fn: ApplyFn) -> ApplyFn:
        gone = {name: network.branches[name] for name in names}
        return ShallowFn(apply_fn, graph, gone, remaining) if names else apply_fn

    return map_leaves(graph, edit, tree, function)


def prune_blocks(
    graph: UnitGraph,
    influence: Mapping[str, float],
    budget: float,
    *,
    of: Literal["flops", "parameters"] = "flops",
) -> list[str]:
    """Chooses the blocks that go so that a cost fits into a budget: those of the lowest influence per cost.

    Blocks are removed one after another, that of the lowest influence per operation (or parameter) first, until the
    rest is within the budget. Blocks without which the loss is lower come before all others, those with the largest
    product of gain and cost first. Those that need not have gone then come back.

    Depth and width share a budget one after the other: first blocks go until a part of it is reached, then, in the
    graph of what is left, units (:func:`~distill_jax.compress.units.prune`) until the whole is. They are not ranked
    together, since influences of blocks and scores of units have no common unit.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      influence: block → how much it matters, from :func:`~distill_jax.compress.units.block_influence`. Blocks that are
        not named stay.
      budget: the share of the cost that may be left, in (0, 1].
      of: ``"flops"``: operations of matrix products and convolutions for the traced inputs; ``"parameters"``:
        single weights.

    Returns:
      The names of the blocks that go, in the order of the network, for :func:`drop_blocks`.

    Raises:
      ValueError: if ``influence`` names what is no block, or is not finite; if the budget is no share, or below what
        is left without all named blocks.
    """
    check_mapping("influence", influence, "block → number")
    check_fraction("budget", budget, without=0)
    check_choice("of", of, ("flops", "parameters"))
    network = Network(graph)
    network.check("influence", influence)
    for name, value in influence.items():
        check_finite(f"influence[{name!r}]", value)

    def cost(names: Collection[str]) -> int:
        remaining, small = network.without(names)
        if of == "flops":
            return whole_multiplications(small)
        return network.parameters - sum(map(remaining.lost, range(network.count)))

    whole = cost([])
    saved = {name: whole - cost([name]) for name in influence}

    def rank(name: str) -> float:
        value = influence[name]
        return value / saved[name] if value > 0 else value * saved[name]

    order = sorted((name for name in influence if saved[name]), key=rank)
    gone: list[str] = []
    for name in order:
        if cost(gone) <= budget * whole:
            break
        gone.append(name)
    if cost(gone) > budget * whole:
        raise BudgetError(
            f"budget: without {len(gone)} of {len(network.branches)} blocks, {cost(gone) / whole:.3g} of the {of} are "
            f"left, and {budget} were asked for: raise the budget, name more blocks, or remove units, too",
            "budget",
        )
    for name in gone[::-1]:
        if cost(rest := [other for other in gone if other != name]) <= budget * whole:
            gone = rest
    return [name for name in network.branches if name in gone]

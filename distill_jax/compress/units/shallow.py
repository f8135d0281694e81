"""The function of a network without some of its residual blocks."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._model import ApplyFn, PyTree
from distill_jax.compress.units._trace.branches import (
    Branch,
    find,
    rows_left,
    run,
    run_layers,
    take_out,
    used,
)
from distill_jax.compress.units._trace.program import Program, Step, flatten
from distill_jax.compress.units.edited_functions import EditedFn, Key, Like, check_state, place, traced
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.weights.structure import by_path


class RemainingArrays(NamedTuple):
    """What is left of a network's arrays without some blocks.

    Attributes:
      whole: shape and dtype of each array of the whole network.
      gone: the places of the arrays that are gone.
      rows: array → bool ``[layers]``, which of its rows are left.
    """

    whole: list[Like]
    gone: frozenset[int]
    rows: dict[int, np.ndarray]

    def lost(self, i: int) -> int:
        """Counts the numbers of an array that are gone."""
        size = prod(self.whole[i].shape)
        if i in self.gone:
            return size
        return size * int((~self.rows[i]).sum()) // self.rows[i].size if i in self.rows else 0

    def shapes(self) -> list[tuple[int, ...]]:
        """Returns the shapes of the arrays that are left."""
        return [
            (int(self.rows[i].sum()), *like.shape[1:]) if i in self.rows else like.shape
            for i, like in enumerate(self.whole)
            if i not in self.gone
        ]


class ProgramWithBlocks(NamedTuple):
    """A network's program with the blocks that were found in it.

    Attributes:
      program: the steps, with calls that define derivatives as steps.
      branches: the blocks by name.
      results: the results as a pytree of shapes; outputs and state in training mode.
    """

    program: Program
    branches: dict[str, Branch]
    results: PyTree


Branches = Mapping[str, Branch]


def trace_blocks(
    apply_fn: ApplyFn, arrays: PyTree, x: PyTree, key: Key = None, wanted: Branches | None = None
) -> ProgramWithBlocks:
    """Traces a network and finds its blocks.

    Args:
      apply_fn: the function of the network.
      arrays: ``(params, state)``, as shapes.
      x: the inputs, as shapes.
      key: a random key for training mode, or None.
      wanted: blocks that must be there, with the same parameters.

    Returns:
      The program with its blocks.

    Raises:
      ValueError: if a wanted block is not found.
    """
    closed, results = traced(apply_fn, arrays, x, key)
    program = flatten(closed, calls=True)
    names = [path or "params" for path in by_path(arrays[0])]
    found = find(program, names, len(jax.tree.leaves(results if key is None else results[0])))

    missing = []
    for name, branch in (wanted or {}).items():
        inputs = found[name].inputs if name in found else ()
        if [i for i in inputs if i < len(names)] != [i for i in branch.inputs if i < len(names)]:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{place(x, key)}, the network has no blocks {missing} with the same parameters, only {[*found]}: trace "
            "the network on such inputs"
        )
    return ProgramWithBlocks(program, found, results)


class ShallowFn(EditedFn):
    """The ``apply_fn`` of a network without some of its blocks.

    Args:
      apply_fn: the function of the whole network.
      graph: the whole network's units.
      blocks: the blocks that are gone.
      remaining: what is left of the arrays.
    """

    def __init__(self, apply_fn: ApplyFn, graph: UnitGraph, blocks: Branches, remaining: RemainingArrays):
        self.blocks, self.remaining = blocks, remaining
        self.paths = [*graph.shapes]
        leaves, self.whole_structure = jax.tree.flatten(tuple(graph.names))
        kept = [None if i in remaining.gone else leaf for i, leaf in enumerate(leaves)]
        structure = jax.tree.structure(jax.tree.unflatten(self.whole_structure, kept))
        call = "drop_blocks(graph, model, names)"
        super().__init__(
            apply_fn, structure, remaining.shapes(), call, repr((sorted(blocks), remaining.whole))
        )

    def program(self, x: PyTree, key: Key, arrays: Sequence[Any]) -> Any:
        """Traces the whole network for such inputs and arrays, and takes the blocks out of its program."""
        remaining, count = self.remaining, len(self.remaining.whole)
        stays = [i for i in range(count) if i not in remaining.gone]
        # What is gone has the dtype that arrays of its dtype were cast to
        dtypes = {remaining.whole[i].dtype: array.dtype for i, array in zip(stays, arrays, strict=True)}
        whole = [Like(like.shape, dtypes.get(like.dtype, like.dtype)) for like in remaining.whole]
        tree = jax.tree.unflatten(self.whole_structure, whole)
        program, found, results = trace_blocks(self.apply_fn, tree, x, key, self.blocks)
        ends = program.outputs
        if key is not None:
            outputs, new = results
            check_state(new, tree[1])
            leaves, structure = jax.tree.flatten(new)
            first, last = count - len(leaves), len(ends) - len(leaves)
            ends = [n for i, n in enumerate(ends) if i < last or first + i - last not in remaining.gone]
            leaves = [None if first + i in remaining.gone else leaf for i, leaf in enumerate(leaves)]
            results = outputs, jax.tree.unflatten(structure, leaves)
        branches = [found[name] for name in self.blocks]
        small, rows = take_out(program, branches, ends), rows_left(branches)
        loses = {i for branch in branches if branch.row is not None for i in branch.inputs}
        if wrong := used(small) & (remaining.gone | (remaining.rows.keys() - loses)):
            raise ValueError(
                f"{place(x, key)}, the network uses {[self.paths[i] for i in sorted(wrong)]} outside of the blocks "
                "that are gone, too: keep these blocks"
            )
        structure = jax.tree.structure(results)

        def change(step: Step, operands: list[Any]) -> Any:
            return run_layers(step, operands, rows[step.outputs[0]]) if step.outputs[0] in rows else None

        def call(arrays: Sequence[Any], x: PyTree, key: Any) -> PyTree:
            values: list[Any] = [None] * count
            for i, array in zip(stays, arrays, strict=True):
                values[i] = array
            values += map(jnp.asarray, jax.tree.leaves((x, key)))
            return jax.tree.unflatten(structure, run(small, values, change))

        return call

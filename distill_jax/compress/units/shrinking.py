"""Runs a traced network with smaller arrays, whatever library it was written in."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from distill_jax._model import Model, PyTree
from distill_jax.compress.units._trace.adapted import Adapted
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.removal import Kept, keep, shapes_of, unit_masks
from distill_jax.compress.units.tracing import groups_of


def shrink(graph: UnitGraph, model: Model, kept: Kept) -> Model:
    """Makes the network of the kept units: a model that runs, with every size in its program adapted.

    It is needed where the network's code has widths written into it (the features of a Linen module or of a
    BatchNorm, the number of heads). Elsewhere :func:`~distill_jax.compress.units.keep` alone gives a model
    that runs. The result is differentiable and can be compiled. Numbers that the network computed from
    sizes, such as 1/√head_size, stay as they were, except those of a mean. Of custom derivatives only
    ReLU's is kept. For inputs of other shapes than the traced ones, such as another batch size, the network
    is traced anew.

    In training mode, with a key, the network's training program runs, with dropout masks of the smaller sizes
    and with the smaller statistics as its state. (:func:`distill_jax.models.save` stores that program for the
    batch size that it is given.)

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      kept: group → the indices of the units that stay.

    Returns:
      The smaller model; its arrays are ``keep(graph, model, kept)``.

    Raises:
      ValueError: if ``kept`` is not valid; when the result is called, if its arrays have not the shapes
        that the kept units make, or if the units are not the same for these inputs or in training mode.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> units.shrink(graph, model, {"a": [0, 3]})(jnp.ones((2, 3)))
    Array([[6., 6.],
           [6., 6.]], dtype=float32)
    """
    return keep(graph, model, kept).replace(apply_fn=ShrunkFn(graph, kept))


class ShrunkFn:
    """The ``apply_fn`` of a shrunk model; equal where the graph and the kept units are the same.

    Args:
      graph: the network's units.
      kept: the indices that stay in each group.
    """

    def __init__(self, graph: UnitGraph, kept: Kept):
        masks = unit_masks(graph, kept)
        self.kept = {name: np.flatnonzero(mask) for name, mask in masks.items()}
        self.shapes = [like.shape for like in shapes_of(graph, kept).values()]
        self.first = graph
        self.programs = {_shapes((graph.traced.x, None)): _Smaller(graph, self.kept)}
        units = sorted((name, indices.tobytes()) for name, indices in self.kept.items())
        self.identity = (id(graph), tuple(units))

    def __eq__(self, other: object) -> bool:
        """Compares the graph and the kept units, so that models shrunk alike share compiled programs."""
        return isinstance(other, ShrunkFn) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        """Computes the outputs and the state with the smaller arrays."""
        like = self.first.traced.model
        structure: Any = jax.tree.structure((like.params, like.state))
        arrays, given = jax.tree.flatten((params, state))
        if given != structure or [np.shape(leaf) for leaf in arrays] != self.shapes:
            raise ValueError(
                f"params and state must have the shapes that the kept units make, {self.shapes} in the "
                f"structure {structure}: give those of keep(graph, model, kept); got "
                f"{[np.shape(leaf) for leaf in arrays]} in {given}"
            )
        if key is not None:
            return self.program_for(x, key)(arrays, x, key)
        if any(map(export.is_symbolic_dim, (n for leaf in jax.tree.leaves(x) for n in np.shape(leaf)))):
            # For any batch size, as models.save exports it: each example by itself
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), x)
            program = self.program_for(one, None)

            def example(x: PyTree) -> PyTree:
                outputs = program(arrays, jax.tree.map(lambda leaf: leaf[None], x))
                return jax.tree.map(lambda leaf: leaf[0], outputs)

            return jax.vmap(example)(x), state
        return self.program_for(x, None)(arrays, x), state

    def program_for(self, x: PyTree, key: jax.Array | None) -> "_Smaller":
        """Returns the program for inputs of these shapes, in training mode if there is a key."""
        shapes = _shapes((x, key))
        if shapes not in self.programs:
            x, key = jax.tree.map(_like, (x, key))
            self.programs[shapes] = _Smaller(self.again(x, key), self.kept)
        return self.programs[shapes]

    def again(self, x: PyTree, key: jax.Array | None) -> UnitGraph:
        """Traces the whole network on other inputs or in training mode, and finds the groups there."""
        graph = groups_of(self.first.traced.model, x, key)
        places = {_places(group.slices): name for name, group in graph.groups.items()}
        units = {}
        for name in self.kept:
            same = places.get(_places(self.first.groups[name].slices))
            if same is None or not graph.groups[same].free:
                mode = "in evaluation" if key is None else "in training mode"
                raise ValueError(
                    f"x: {mode}, on inputs of shapes {[leaf.shape for leaf in jax.tree.leaves(x)]}, the units "
                    f"{name!r} are not the ones that were traced: trace the model on these inputs, or build "
                    "the network anew with the widths of units.architecture(graph, kept)"
                )
            units[name] = graph.traced.units[same]
        groups = {name: self.first.groups[name] for name in self.kept}
        return UnitGraph(groups, graph.shapes, graph.names, (), graph.traced._replace(units=units))


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))


def _shapes(x: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(x)
    return structure, tuple((like.shape, like.dtype) for like in map(_like, leaves))


def _places(slices: Any) -> Any:
    return tuple(sorted((path, axis, index.tobytes()) for path, axis, index in slices))


class _Smaller:
    """A program adapted to the kept units, as a function of pytrees."""

    def __init__(self, graph: UnitGraph, kept: Kept):
        self.adapted = Adapted.of(graph.traced, kept)
        self.structure = graph.traced.structure

    def __call__(self, arrays: Sequence[Any], x: PyTree, *keys: jax.Array) -> PyTree:
        """Runs the program on the smaller arrays of parameters and state, the inputs, and perhaps a key."""
        leaves = [jnp.asarray(leaf) for leaf in (*arrays, *jax.tree.leaves(x), *keys)]
        return jax.tree.unflatten(self.structure, self.adapted.run(self.adapted.program, leaves))

"""The function of a network with fewer units: its own where it can be, else its program with sizes adapted."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import _jaxpr
from distill_jax._model import ApplyFn, PyTree
from distill_jax.compress.units._trace.adapted import Adapted
from distill_jax.compress.units._trace.again import difference
from distill_jax.compress.units._trace.examples import examples_apart
from distill_jax.compress.units._trace.fitting import Exact, Masks, MisfitError, fit
from distill_jax.compress.units._trace.program import Program, flatten
from distill_jax.compress.units.edited_functions import (
    EditedFn,
    Key,
    Like,
    any_key,
    check_state,
    place,
    traced,
)
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.masks import Kept, masks_of, position_masks, shapes_of


def function_for(graph: UnitGraph, apply_fn: ApplyFn, kept: Kept) -> ApplyFn:
    """Chooses the function of a smaller network: its own where that computes what the adapted program computes.

    It does so if both programs are the same in evaluation and, but for the sizes of what is drawn at random, in
    training mode. Derivatives that the network defines are not compared: then the adapted program is chosen.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      apply_fn: a function of arrays of the traced shapes.
      kept: group → the indices of the units that stay.

    Returns:
      The function itself, or a :class:`KeptFn`.
    """
    masks = position_masks(graph, kept)
    if not masks:
        return apply_fn
    small = adapt(graph, apply_fn, kept)
    found = graph.traced
    arrays = jax.tree.unflatten(small.structure, [*shapes_of(graph, kept).values()])
    whole = [*graph.shapes.values()]

    def same(key: Like | None) -> bool:
        closed, _ = traced(apply_fn, arrays, found.x, key)
        if _derives(flatten(closed, calls=True)):
            return False
        if key is None and apply_fn == found.model.apply_fn:
            adapted = Adapted.of(found, kept)
        else:
            adapted = small.fitted(found.x, key, whole, calls=False).adapted
        return not difference(adapted, flatten(closed), draws=key is not None)

    try:
        runs = same(None) and same(any_key())
    except Exception:  # whatever the network raises: it does not run so, or cannot be compared
        runs = False
    return apply_fn if runs else small


def _derives(program: Program) -> bool:
    """Says whether there are calls with a derivative that is not JAX's own."""
    for step in program.steps:
        if step.name in ("custom_jvp_call", "custom_vjp_call"):
            source = step.params["call_jaxpr"].jaxpr.debug_info.func_filename or ""
            if f"{os.sep}jax{os.sep}_src{os.sep}" not in source:
                return True
        if any(map(_derives, step.bodies)):
            return True
    return False


def adapt(graph: UnitGraph, apply_fn: ApplyFn, kept: Kept) -> "KeptFn":
    """Makes the function of the smaller arrays that computes what the kept units compute.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      apply_fn: the function of arrays of the traced shapes.
      kept: group → the indices of the units that stay.

    Returns:
      The function, which traces the network when it is called.
    """
    masks = _all_axes(graph, position_masks(graph, kept))
    exactly = {name: units for name, units in kept.items() if graph.groups[name].exact_shrunk}
    # Of some groups not all slices are set to zero
    others = {
        name: (np.zeros(group.size, bool), [s for s in group.slices if (s.path, s.axis) not in zeroed])
        for name in exactly
        if (group := graph.groups[name]).silent and (zeroed := {(s.path, s.axis) for s in group.silent})
    }
    exact = [
        *map(Exact, _all_axes(graph, position_masks(graph, exactly)), _all_axes(graph, masks_of(others)))
    ]
    if isinstance(apply_fn, KeptFn):  # pruned before
        before = apply_fn
        exact = [
            Exact(_joined(old.masks, new.masks, stays), _joined(old.silent, new.silent, stays))
            for old, new, stays in zip(before.exact, exact, before.masks, strict=True)
        ]
        masks = [_joined(old, new, old) for old, new in zip(before.masks, masks, strict=True)]
        apply_fn = apply_fn.apply_fn
    return KeptFn(apply_fn, jax.tree.structure(tuple(graph.names)), masks, exact)


def _all_axes(graph: UnitGraph, found: Mapping[str, Mapping[int, np.ndarray]]) -> list[Masks]:
    """Returns the masks of all axes of all arrays, true where none was found."""
    return [
        [found.get(name, {}).get(a, np.ones(n, bool)) for a, n in enumerate(like.shape)]
        for name, like in graph.shapes.items()
    ]


def _joined(old: Masks, new: Masks, stays: Masks) -> list[np.ndarray]:
    """Joins masks of all positions with masks of those that stay."""
    found = [mask.copy() for mask in old]
    for mask, now, places in zip(found, new, stays, strict=True):
        mask[places] &= now
    return found


class KeptFn(EditedFn):
    """The ``apply_fn`` of a network with fewer units, whose program is adapted to the smaller arrays.

    Args:
      apply_fn: the function of the whole network.
      structure: that of ``(params, state)``.
      masks: for each array, for each of its axes, bool ``[positions]``: which of them stay.
      exact: for each array, what of it must be removed exactly.
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        structure: jax.tree_util.PyTreeDef,
        masks: Sequence[Masks],
        exact: Sequence[Exact],
    ):
        self.masks, self.exact = masks, exact
        every = [*masks, *(axes for pair in exact for axes in pair)]
        text = repr([[(mask.size, mask.tobytes()) for mask in axes] for axes in every]).encode()
        shapes = [tuple(int(mask.sum()) for mask in axes) for axes in masks]
        call = "keep(graph, model, kept)"
        super().__init__(apply_fn, structure, shapes, call, hashlib.sha256(text).hexdigest())

    def whole(self, arrays: Sequence[Any]) -> list[Like]:
        """Returns the shapes of the whole network's arrays, in the dtypes of the given ones."""
        return [
            Like(tuple(mask.size for mask in axes), array.dtype)
            for axes, array in zip(self.masks, arrays, strict=True)
        ]

    def program(self, x: PyTree, key: Key, arrays: Sequence[Any]) -> "_Fitted":
        """Traces the network for such inputs and arrays, and adapts its program."""
        return self.fitted(x, key, self.whole(arrays))

    def program_for_any_batch(self, x: PyTree, key: Key, arrays: Sequence[Any]) -> Any:
        """Makes the program for a batch whose size is a symbol."""
        try:
            return self.program(x, key, arrays)
        except MisfitError:
            # With symbols JAX writes slices as gathers. In evaluation one example after another may do, if no
            # number is computed from the size of the batch.
            one, two = (jax.tree.map(lambda y, n=n: Like((n, *y.shape[1:]), y.dtype), x) for n in (1, 2))
            batches = [False] * len(arrays) + [True] * len(jax.tree.leaves(x))
            whole = self.whole(arrays)
            if (
                key is not None
                or "dim_as_value" in _jaxpr.primitives(self.trace(x, None, whole)[0])
                or not examples_apart(self.trace(two, None, whole)[0], batches)
            ):
                raise
        program = self.program(one, None, arrays)

        def each(arrays: Sequence[Any], x: PyTree, key: None) -> PyTree:
            def example(x: PyTree) -> PyTree:
                outputs = program(arrays, jax.tree.map(lambda leaf: leaf[None], x), key)
                return jax.tree.map(lambda leaf: leaf[0], outputs)

            return jax.vmap(example)(x)

        return each

    def trace(self, x: PyTree, key: Key, whole: Sequence[Like]) -> tuple[Any, Any]:
        """Traces the whole network: its closed jaxpr, and its results as shapes."""
        return traced(self.apply_fn, jax.tree.unflatten(self.structure, whole), x, key)

    def fitted(self, x: PyTree, key: Key, whole: Sequence[Like], *, calls: bool = True) -> "_Fitted":
        """Traces the network for such inputs, and adapts its program."""
        closed, results = self.trace(x, key, whole)
        outputs: Any = results
        after: Sequence[Masks] = []
        if key is not None:
            outputs, new = results
            old = jax.tree.unflatten(self.structure, whole)[1]
            check_state(new, old)
            after = self.masks[len(self.masks) - len(jax.tree.leaves(old)) :]
        inputs = [*self.masks, *[None] * (len(closed.in_avals) - len(self.masks))]
        ends = [None] * len(jax.tree.leaves(outputs))
        try:
            adapted = fit(closed, inputs, [*ends, *after], calls=calls, exact=self.exact)
        except MisfitError as error:
            raise MisfitError(
                f"{place(x, key)}, {error}: trace the model on these inputs, build the network anew with the widths "
                "of units.architecture(graph, kept), or use units.silence"
            ) from None
        return _Fitted(adapted, jax.tree.structure(results))


class _Fitted:
    """A program adapted to the kept units, as a function of pytrees.

    Args:
      adapted: the program.
      structure: of its results.
    """

    def __init__(self, adapted: Adapted, structure: Any):
        self.adapted, self.structure = adapted, structure

    def __call__(self, arrays: Sequence[Any], x: PyTree, key: jax.Array | None) -> PyTree:
        """Runs the program on the smaller arrays of parameters and state, the inputs, and perhaps a key."""
        leaves = [*arrays, *map(jnp.asarray, jax.tree.leaves((x, key)))]
        return jax.tree.unflatten(self.structure, self.adapted.run(self.adapted.program, leaves))


def traced_function(graph: UnitGraph, kept: Kept) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """Makes the function of the smaller network in evaluation, for the traced shapes alone.

    Nothing is traced again, but derivatives that the network defines are lost: it is for measuring.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      ``(params, state, x) -> outputs``.
    """
    program = _Fitted(Adapted.of(graph.traced, kept), graph.traced.structure)
    return lambda params, state, x: program([*map(jnp.asarray, jax.tree.leaves((params, state)))], x, None)

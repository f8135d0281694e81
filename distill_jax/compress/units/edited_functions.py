"""The functions of edited networks: the network is traced when they are called, and its program edited."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.extend.core import nonempty_axis_env_DO_NOT_USE  # JAX has no other public name for it

from distill_jax import _jaxpr
from distill_jax._model import ApplyFn, Model, PyTree
from distill_jax.features.capturing import naming

Like = jax.ShapeDtypeStruct
Key = jax.Array | Like | None
# (arrays, x, key) -> outputs; outputs and state in training mode
Program = Callable[[Sequence[Any], PyTree, Any], PyTree]


class EditedFn:
    """The ``apply_fn`` of an edited network; equal where the function and the edit are the same.

    The network is traced with arrays of its own shapes, once for each shape and dtype of parameters, state and
    inputs and for each mode, and its program edited. Within ``vmap`` and ``shard_map`` with named axes, and where
    a mesh is set, it is traced at each call.

    Args:
      apply_fn: the function of the network.
      structure: that of ``(params, state)`` after the edit.
      shapes: those of the arrays after the edit.
      call: the call that makes these arrays, for messages.
      identity: what tells edits apart.
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        structure: jax.tree_util.PyTreeDef,
        shapes: Sequence[tuple[int, ...]],
        call: str,
        identity: str,
    ):
        self.apply_fn, self.structure, self.shapes, self.call = apply_fn, structure, list(shapes), call
        self.identity = identity
        self.programs: dict[Any, Program] = {}

    @abstractmethod
    def program(self, x: PyTree, key: Key, arrays: Sequence[Any]) -> Program:
        """Traces the network for such inputs and arrays, in training mode if there is a key, and edits it."""

    def program_for_any_batch(self, x: PyTree, key: Key, arrays: Sequence[Any]) -> Program:
        """Makes the program for a batch whose size is a symbol, as ``models.save`` exports it."""
        return self.program(x, key, arrays)

    def __eq__(self, other: object) -> bool:
        """Compares the network's function and the edit, so that equal models share programs."""
        if self is other or not isinstance(other, EditedFn):
            return self is other
        return (
            type(self) is type(other)
            and self.identity == other.identity
            and self.structure == other.structure
            and self.apply_fn == other.apply_fn
        )

    def __hash__(self) -> int:
        return hash(self.identity)

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        """Computes the outputs and the state with the arrays that the edit leaves."""
        arrays, given = jax.tree.flatten((params, state))
        shapes = [np.shape(leaf) for leaf in arrays]
        if given != self.structure or shapes != self.shapes:
            raise ValueError(
                f"params and state must have the shapes that {self.call} makes, {self.shapes} in the structure "
                f"{self.structure}; got {shapes} in {given}"
            )
        arrays = [jnp.asarray(leaf) for leaf in arrays]
        found = self._program(x, key, arrays)(arrays, x, key)
        return (found, state) if key is None else found

    def _program(self, x: PyTree, key: jax.Array | None, arrays: Sequence[Any]) -> Program:
        leaves, structure = jax.tree.flatten((x, key))
        x, key_like = jax.tree.map(_like, (x, key))
        # Not stored: symbols of two exports must not meet
        if any(export.is_symbolic_dim(n) for leaf in leaves for n in np.shape(leaf)):
            return self.program_for_any_batch(x, key_like, arrays)
        # What a trace depends on besides its arguments. The sizes of named axes and the mesh of devices become
        # numbers in the program, so it is not stored then
        if nonempty_axis_env_DO_NOT_USE() or not jax.sharding.get_abstract_mesh().empty:
            return self.program(x, key_like, arrays)
        options: Any = jax.config  # its type does not name them
        context = naming(), options.jax_enable_x64, options.jax_default_matmul_precision
        kind = context, structure, *((np.shape(leaf), jnp.result_type(leaf)) for leaf in (*leaves, *arrays))
        if kind not in self.programs:
            self.programs[kind] = self.program(x, key_like, arrays)
        return self.programs[kind]


def traced(apply_fn: ApplyFn, arrays: PyTree, x: PyTree, key: Key) -> tuple[Any, Any]:
    """Traces a network with ``(params, state)``, in training mode if there is a key: its program, and its results."""

    def run(params: PyTree, state: PyTree, x: PyTree, *keys: Any) -> PyTree:
        model = Model(apply_fn, params, state)
        return model.apply(x, key=keys[0]) if keys else model(x)

    params, state = arrays
    return _jaxpr.trace(run, params, state, x, *([] if key is None else [key]))


def any_key() -> Like:
    """Returns what stands for a random key in a trace."""
    return jax.eval_shape(lambda: jax.random.key(0))


def check_state(new: PyTree, old: PyTree) -> None:
    """Raises ``ValueError`` unless a state has the structure and shapes that it had before."""
    before, after = shapes_in(old), shapes_in(new)
    if after != before:
        raise ValueError(
            f"key: in training mode the network turns its state {before} into {after}: give it one that keeps its "
            "structure and shapes, or train it without the arrays that come and go"
        )


def place(x: PyTree, key: Key) -> str:
    """Says in which mode and on which inputs a network is called, for messages."""
    shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
    return f"x: in {'evaluation' if key is None else 'training mode'}, on inputs of shapes {shapes}"


def _like(leaf: Any) -> Like:
    return Like(np.shape(leaf), jnp.result_type(leaf))


def shapes_in(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
    """Returns the structure of a pytree, and the shapes of its leaves."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [np.shape(leaf) for leaf in leaves]

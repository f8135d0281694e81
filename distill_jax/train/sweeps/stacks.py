"""Stacks of students: models and training states whose arrays have a first axis of students."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax._checks import check_count, check_tx, is_key
from distill_jax._model import ApplyFn, Model, PyTree, check_model
from distill_jax.train.step import TrainState, init_state


class Students(NamedTuple):
    """Many students in training: it takes the place of a ``TrainState`` in epochs and loops.

    Attributes:
      states: the students' training states, stacked.
      values: the hyper-parameters, name → ``[students]``; they do not change in training.
    """

    states: PyTree
    values: Mapping[str, Any] = {}

    @property
    def step(self) -> jax.Array:
        """The step of each student, ``[students]``."""
        return self.states.step

    @property
    def key(self) -> jax.Array:
        """The random key of each student, ``[students]``."""
        return self.states.key

    @property
    def model(self) -> Model:
        """The stacked models."""
        return self.states.model


def grid(**values: Sequence[Any]) -> dict[str, np.ndarray]:
    """Lists all combinations of values, the last name fastest: name → ``[students]``.

    Args:
      values: name → the values to combine.

    Returns:
      The dict of arrays, the ``values`` of :class:`Students`.

    >>> grid(temperature=(1, 4), seed=(0, 1, 2))["seed"].tolist()
    [0, 1, 2, 0, 1, 2]
    """
    for name, each in values.items():
        if not len(each):
            raise ValueError(f"{name} must be at least one value, got none")
    combined = zip(*itertools.product(*values.values()), strict=True)
    return dict(zip(values, map(np.array, combined), strict=True))


def stack(trees: Sequence[PyTree]) -> PyTree:
    """Stacks pytrees of one structure, such as the models of several seeds, in the memory of the host.

    Args:
      trees: the pytrees.

    Returns:
      One pytree; its leaves are NumPy arrays ``[students, ...]``.

    Raises:
      ValueError: if there is none, or their structures or shapes differ.
    """
    if not trees:
        raise ValueError("trees must be at least one pytree, got none")
    return jax.tree.map(lambda *x: np.stack(x) if not is_key(x[0]) else jnp.stack(x), *trees)


def repeat(tree: PyTree, count: int, axes: PyTree = 0) -> PyTree:
    """Stacks copies of one pytree, such as the model that all students begin with.

    Args:
      tree: the pytree.
      count: the number of copies.
      axes: which leaves are copied: 0, and None for those that all students share, as in :func:`each`.

    Returns:
      The stacked pytree, of JAX arrays.
    """
    check_count("count", count)
    return _map(lambda x: jnp.repeat(jnp.asarray(x)[None], count, 0), axes, tree)


def take(tree: PyTree, index: int | np.ndarray, axes: PyTree = 0) -> PyTree:
    """Takes one student, or several, out of a stack.

    Args:
      tree: a stacked pytree.
      index: the number of a student; or the numbers of several, which stay stacked.
      axes: which leaves are stacked, as in :func:`each`.

    Returns:
      The student, or the stack of those chosen.

    Raises:
      ValueError: if there is no student of a number.
    """
    numbers = np.asarray(index)

    def one(x: Any) -> Any:
        if ((numbers < 0) | (numbers >= len(x))).any():
            raise ValueError(f"index must be from 0 to {len(x) - 1}, got {index}")
        return x[index]

    return _map(one, axes, tree)


def _map(function: Callable[[Any], Any], axes: PyTree, tree: PyTree) -> PyTree:
    def part(axis: int | None, branch: PyTree) -> PyTree:
        return branch if axis is None else jax.tree.map(function, branch)

    return jax.tree.map(part, axes, tree, is_leaf=lambda axis: axis is None)


def on_host(tree: PyTree) -> PyTree:
    """Copies a pytree to NumPy arrays; random keys stay what they are."""
    return jax.tree.map(lambda x: x if is_key(x) else np.array(x), tree)


def init_states(models: Model, tx: optax.GradientTransformation, keys: jax.Array) -> TrainState:
    """Makes the training states of all students before their first step, in the memory of the host.

    Args:
      models: the stacked models.
      tx: the optimizer; its state must not depend on what differs between the students.
      keys: the random key of each student, ``[students]``.

    Returns:
      The stacked states.

    Raises:
      ValueError: if there is not one key per student.
    """
    check_model("models", models)
    check_tx("tx", tx)
    count = len(jax.tree.leaves(models.params)[0])
    if not is_key(keys) or keys.shape != (count,):
        raise ValueError(f"keys must be {count} random keys, such as jax.random.split(key, {count})")
    make = jax.vmap(lambda model, key: init_state(model, tx, key))
    return on_host(jax.jit(make)(models, keys))


def as_one(models: Model) -> Model:
    """Makes one model of stacked ones, to evaluate them together: its outputs are ``[batch, students, ...]``.

    Args:
      models: the stacked models, which run in evaluation mode.

    Returns:
      The model, for :func:`distill_jax.models.predict`.
    """
    check_model("models", models)
    return models.replace(apply_fn=_Together(models.apply_fn))


@dataclasses.dataclass(frozen=True)
class _Together:
    """The ``apply_fn`` of :func:`as_one`; equal where the function of one is the same."""

    apply_fn: ApplyFn

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        outputs = jax.vmap(lambda params, state: self.apply_fn(params, state, x)[0], out_axes=1)
        return outputs(params, state), state

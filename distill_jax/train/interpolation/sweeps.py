"""The same reading at many λ, as one program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import weights
from distill_jax.train.interpolation.readings import Pair
from distill_jax.train.step import TrainState

PyTree = Any


def sweep(make: Callable[[Any], Callable[..., Any]], rates: Any) -> Callable[..., Any]:
    """Makes one step of many: the same reading at each of several λ, in one program.

    Students are mapped by ``vmap``. The teacher does not depend on λ, so it is trained once for all of
    them (not with ``flow``, where it does).

    Args:
      make: λ → step, as :func:`pull` makes it, or :func:`distill_jax.train.make_train_step` of
        :func:`through`.
      rates: ``[n]`` of λ.

    Returns:
      ``(states, batch) -> (states, metrics)`` over the states of :func:`repeat`; a batch serves all,
      and each metric is ``[n]``.
    """
    rates = jnp.asarray(rates, jnp.float32)

    def step(states, batch):
        axes = _axes(states)
        mapped = jax.vmap(lambda rate, state: make(rate)(state, batch), in_axes=(0, axes), out_axes=(axes, 0))
        return mapped(rates, states)

    return step


def repeat(state: Any, count: int) -> Any:
    """Makes the states of :func:`sweep`: ``count`` students of one, and one teacher.

    Args:
      state: a :class:`Pair`, or the ``TrainState`` of :func:`through`.
      count: how many.
    """
    return _map_students(lambda x: jnp.stack([x] * count), state)


def lane(states: Any, index: Any) -> Any:
    """Takes one of the states of :func:`sweep` out, with the teacher that all share.

    Args:
      states: of :func:`repeat`, or what a sweep made of it.
      index: which.
    """
    return _map_students(lambda x: x[index], states)


def _map_students(function: Callable[..., Any], states: Any) -> Any:
    structure: Any
    axes, structure = jax.tree.flatten(_axes(states), is_leaf=lambda axis: axis is None)
    leaves = structure.flatten_up_to(states)
    return structure.unflatten(
        [x if axis is None else function(x) for x, axis in zip(leaves, axes, strict=True)]
    )


def _axes(states: Any) -> Any:
    """For each leaf 0 if there is one for each student, None if all share it."""

    def shared(tree):
        return jax.tree.map(lambda x: None, tree)

    def split(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: None if "teacher" in weights.path_name(path).split(".") else 0, tree
        )

    if isinstance(states, Pair):
        return Pair(shared(states.teacher), _axes(states.student))
    params, opt_state, model_state = map(split, states[1:4])
    return TrainState(shared(states.step), params, opt_state, model_state, shared(states.key))

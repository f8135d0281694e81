"""The form of a loss with trainable parameters of its own: a pair of plain functions.

A projector from the student's channels to the teacher's, for instance, is trained together with the
student and dropped after training. :class:`Learned` holds the function that makes such parameters and
the function that computes the loss with them.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from distill_jax._model import PyTree

Shape = tuple[int, ...]


class Learned(NamedTuple):
    """A distillation loss with trainable parameters, as a pair of functions ``(init, apply)``.

    The parameters form a pytree of their own. They are trained beside the student's and dropped after
    training, so the student's pytree does not change. Any two functions with these signatures make a
    method; nothing needs to be inherited or registered.

    Attributes:
      init: ``(key, student_shapes, teacher_shapes) -> params``. Each list has one shape per matched
        layer, ``(batch, *spatial, channels)``; the batch size is ignored. ``params`` may be empty.
      apply: ``(params, student_features, teacher_features, *, labels=None, where=None, key=None) ->
        values``. It takes one list of arrays per network, in the shapes given to ``init``, and returns
        one value per example, float32 ``[batch]``. Methods with a random part draw it from ``key``; all
        others ignore ``key``, and most ignore ``labels``.
    """

    init: Callable[[jax.Array, Sequence[Shape], Sequence[Shape]], PyTree]
    apply: Callable[..., jax.Array]


class LearnedWithState(NamedTuple):
    """A distillation loss with trainable parameters and with a state that is updated without gradients.

    Attributes:
      init: ``(key, student_shapes, teacher_shapes) -> params``, see :class:`Learned`.
      init_state: ``(key, *, examples) -> state``, a pytree of arrays; ``examples`` is the number of
        training examples.
      apply: ``(params, state, student_features, teacher_features, ids, *, key, labels=None,
        where=None) -> (values, state)``; ``ids`` are the examples' places in the training set.
    """

    init: Callable[[jax.Array, Sequence[Shape], Sequence[Shape]], PyTree]
    init_state: Callable[..., PyTree]
    apply: Callable[..., tuple[jax.Array, PyTree]]

"""The form of a learned part."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

Shape = tuple[int, ...]


class Learned(NamedTuple):
    """A distillation loss with parameters of its own, as two plain functions.

    The parameters are trained beside the student's, in a pytree of their own, and dropped at the end:
    the student's pytree never knows of them.

    Attributes:
      init: ``(key, student_shapes, teacher_shapes) -> params``. The shapes, one a matched layer, are
        those of a batch of features, ``(batch, *spatial, channels)``; the size of the batch is never
        used. ``params`` may be empty.
      apply: ``(params, student_features, teacher_features, *, labels=None, where=None, key=None) ->
        values``: from lists of arrays of those shapes to one value an example, float32 ``[batch]``.
        ``key`` is for what is random in the loss; the others ignore it.
    """

    init: Callable[[jax.Array, Sequence[Shape], Sequence[Shape]], Any]
    apply: Callable[..., jax.Array]

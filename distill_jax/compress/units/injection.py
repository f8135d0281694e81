"""Writes a teacher's values into a student of the same or smaller shapes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax._model import Model, check_model
from distill_jax.compress.units.graph import names_of
from distill_jax.compress.units.selection import mapped_path


class Injected(NamedTuple):
    """What :func:`inject` returns.

    Attributes:
      model: the student with the teacher's values.
      taken: the student's array → the teacher's array from which its values were taken.
      kept: the student's array → the reason why it kept its own values.
    """

    model: Model
    taken: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        """One line per array."""
        lines = [f"{path}: from {source}" for path, source in self.taken.items()]
        return "\n".join(lines + [f"{path}: kept, {why}" for path, why in self.kept.items()])


def inject(student: Model, teacher: Model, *, layers: Mapping[str, str] | None = None) -> Injected:
    """Writes a teacher's values into a student of the same or smaller shapes.

    Arrays of equal shapes are taken whole. This is the case for all arrays of
    ``keep(graph, teacher, select(graph, student_graph))``, and their units belong together. From a larger
    array of the teacher, evenly spaced indices ⌊i·N/n⌋ of each axis are taken. These agree between axes of
    equal sizes, but not between an axis before a flattening and one behind it: there, select units first.
    Where the student's array is the larger one, it keeps its own values.

    Args:
      student: the model that is written into.
      teacher: the model whose values are taken.
      layers: the student's layers → the teacher's, by the beginnings of their arrays' names.

    Returns:
      The student with the teacher's values, and a report of the arrays that were taken and kept.

    Raises:
      ValueError: if nothing can be taken.

    References:
      Xu et al., `Initializing Models with Larger Ones`, 2024, §3 (uniform selection).

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> def fn(params, x):
    ...     return x * params["a"].sum()
    >>> student = models.from_function(fn, {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    >>> done = inject(student, models.from_function(fn, {"a": jnp.arange(4.0)}))
    >>> done.model.params["a"], done.taken, done.kept
    (Array([0., 2.], dtype=float32), {'a': 'a'}, {'b': 'the teacher has no b'})
    """
    check_model("student", student)
    check_model("teacher", teacher)
    found = leaves_by_name(teacher)
    taken, kept = {}, {}

    def new(path: str, leaf: Any) -> Any:
        source = mapped_path(path, layers)
        if source not in found:
            kept[path] = f"the teacher has no {source}"
            return leaf
        own, theirs = np.shape(leaf), np.shape(found[source])
        if len(own) != len(theirs) or any(n > m for n, m in zip(own, theirs, strict=True)):
            kept[path] = f"its shape {own} does not fit into the teacher's {theirs}"
            return leaf
        taken[path] = source
        values = found[source]
        for axis, (n, m) in enumerate(zip(own, theirs, strict=True)):
            values = values if n == m else values.take(np.arange(n) * m // n, axis=axis)
        return values.astype(leaf.dtype)

    params, state = jax.tree.map(new, tuple(names_of(student)), (student.params, student.state))
    if not taken:
        raise ValueError(f"teacher: nothing of it fits into the student: {kept}")
    return Injected(student.replace(params=params, state=state), taken, kept)


def leaves_by_name(model: Model) -> dict[str, Any]:
    """Returns a model's arrays by name, see :func:`~distill_jax.compress.units.graph.names_of`."""
    names = jax.tree.leaves(names_of(model))
    return dict(zip(names, jax.tree.leaves((model.params, model.state)), strict=True))

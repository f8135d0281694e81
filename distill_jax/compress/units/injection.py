"""A teacher's numbers written into a student."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from distill_jax.compress.units.selection import mapped_path
from distill_jax.weights.structure import by_path, path_name


class Injected(NamedTuple):
    """What :func:`inject` did.

    Attributes:
      params: the student's tree.
      taken: its leaf → the teacher's, for those whose values are the teacher's now.
      kept: its leaf → why it stayed the student's own.
    """

    params: Any
    taken: dict[str, str]
    kept: dict[str, str]

    def __str__(self) -> str:
        """A line a leaf."""
        lines = [f"{path}: from {source}" for path, source in self.taken.items()]
        return "\n".join(lines + [f"{path}: kept, {why}" for path, why in self.kept.items()])


def inject(student: Any, teacher: Any, *, layers: Mapping[str, str] | None = None) -> Injected:
    """Writes a teacher's values into a student of the same or smaller shapes.

    Leaves of equal shapes are taken whole: those of ``keep(graph, teacher, select(…))`` all are, and
    their units belong together. Of a larger leaf of the teacher evenly spaced indices of each axis are
    taken, ⌊i·N/n⌋: axes of equal sizes agree, but not one behind a flattening with one before it:
    there, select units first. Where the student is the larger, it keeps its own.

    Args:
      student: a pytree of arrays.
      teacher: another.
      layers: the student's layers → the teacher's, as in :func:`distill_jax.compress.units.select`.

    Returns:
      The student's tree, and what was taken and kept.

    Raises:
      ValueError: if nothing can be taken.

    References:
      Xu et al., `Initializing Models with Larger Ones`, 2024, §3 (uniform selection).

    >>> import jax.numpy as jnp
    >>> done = inject({"a": jnp.zeros(2), "b": jnp.zeros(3)}, {"a": jnp.arange(4.0)})
    >>> done.params["a"], done.taken, done.kept
    (Array([0., 2.], dtype=float32), {'a': 'a'}, {'b': 'the teacher has no b'})
    """
    found = by_path(teacher)
    taken, kept = {}, {}

    def one(key: Any, leaf: Any) -> Any:
        path = path_name(key)
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

    params = jax.tree_util.tree_map_with_path(one, student)
    if not taken:
        raise ValueError(f"teacher: nothing of it fits into the student: {kept}")
    return Injected(params, taken, kept)

"""Steps and epochs of many students at once."""

from collections.abc import Callable
from typing import Any

import jax

from distill_jax._checks import check_function
from distill_jax._model import PyTree
from distill_jax.train.epoch import in_one_call
from distill_jax.train.step import Metrics, Step, step_key
from distill_jax.train.sweeps.stacks import Students, take


def each(make_step: Callable[..., Step], *, axes: PyTree = 0) -> Step:
    """Makes one step of all students, who share a batch.

    Args:
      make_step: makes the step of one student of its hyper-parameters, by name: numbers that are traced. What
        it gives them to must take such numbers, as the objectives of :mod:`distill_jax.train` do. Optax's
        schedules do not all: scale their updates instead,
        ``optax.chain(optax.adam(schedule), optax.scale(learning_rate))``.
      axes: which leaves of the states each student has for itself: 0, and None for those that all share,
        such as a teacher in training. It may be a prefix of the states, like ``in_axes`` of ``jax.vmap``.

    Returns:
      ``(students, batch) -> (students, metrics)`` for :class:`Students`; each metric is ``[students]``.
    """
    if not callable(make_step):
        raise ValueError(f"make_step must be a function (**values) -> step, got {type(make_step).__name__}")

    def step(students: Students, batch: Any) -> tuple[Students, Metrics]:
        return _mapped(lambda values, state: make_step(**values)(state, batch), students, axes)

    return step


def _mapped(
    one: Callable[..., tuple[Any, Metrics]], students: Students, axes: PyTree = 0, rows: Any = ()
) -> tuple[Students, Metrics]:
    mapped = jax.vmap(one, in_axes=(0, axes, *[0] * len(rows)), out_axes=(axes, 0))
    states, metrics = mapped(dict(students.values), students.states, *rows)
    return students._replace(states=states), metrics


def make_epoch(
    make_step: Callable[..., Step],
    *,
    transform: Callable[[PyTree, Any, jax.Array], Any] | None = None,
    share: bool = False,
) -> Callable[..., tuple[Students, Metrics]]:
    """Makes one call of many steps of all students: ``epoch(students, data, order, context=None)``.

    Args:
      make_step: makes the step of one student of its hyper-parameters, as in :func:`each`.
      transform: ``(context, batch, key) -> batch``, as in :func:`distill_jax.train.make_epoch`, with the
        student's own key.
      share: whether the batch is transformed once for all students, with the key of the first. Students with
        equal keys then share the work of augmentation, or of a teacher that labels online.

    Returns:
      ``epoch``, which returns the students and metrics ``[steps, students]``. ``order`` is int32
      ``[steps, batch]`` where the students share their batches, or else ``[steps, students, batch]``. The
      students are donated: use those that are returned.
    """
    if not callable(make_step):
        raise ValueError(f"make_step must be a function (**values) -> step, got {type(make_step).__name__}")
    if transform is not None:
        check_function("transform", transform, "context, batch, key")

    def prepared(state, rows, data, context):
        batch = jax.tree.map(lambda x: x[rows], data)
        return batch if transform is None else transform(context, batch, step_key(state, 1))

    def step_of_all(students, rows, data, context):
        if share and rows.ndim > 1:
            raise ValueError("share=True needs one order for all students, got another one for each")
        if share:
            return each(make_step)(students, prepared(take(students.states, 0), rows, data, context))

        def one(values, state, rows=rows):
            return make_step(**values)(state, prepared(state, rows, data, context))

        return _mapped(one, students, rows=(rows,) if rows.ndim > 1 else ())

    return in_one_call(step_of_all, axes=(2, 3))

"""Many students in one compiled program: seeds and hyper-parameters side by side.

The steps of small networks are mostly overhead, which students that are trained side by side share, and the
program is compiled once for all. The students are stacked: every array of their models and training states has a
first axis of students. Hyper-parameters are arrays ``[students]`` that the program takes as arguments.

>>> import optax
>>> from distill_jax import models, train
>>> values = grid(learning_rate=(0.1, 0.3), smoothing=(0.0, 0.1))
>>> def make_step(learning_rate, smoothing):
...     objective = train.supervised(label_smoothing=lambda step: smoothing)
...     return train.make_train_step(objective, optax.sgd(learning_rate))
>>> model = models.from_function(lambda w, x: x @ w, jnp.zeros((2, 3)))
>>> keys = jax.vmap(jax.random.key)(jnp.arange(4))
>>> students = Students(init_states(repeat(model, 4), optax.sgd(0.1), keys), values)
>>> data = {"image": np.eye(2, dtype=np.float32), "label": np.arange(2)}
>>> done = fit(students, make_epoch(make_step), data, epochs=5, batch_size=2, seeds=[0] * 4)
>>> done.model.params.shape, done.history["loss"].shape
((4, 2, 3), (5, 4))

Each student learns what it would learn in a run by itself (to the rounding of float32), given its key and its
seed of the shuffling; keys must be of JAX's default implementation, since ``rbg`` draws other numbers under
``vmap``.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_function, check_tx, is_key
from distill_jax._model import ApplyFn, Model, PyTree, check_model
from distill_jax.teachers import fingerprint
from distill_jax.train._loop import Fit, check_options, checked_data, ranks, run_epochs
from distill_jax.train.epoch import epoch_order, in_one_call
from distill_jax.train.parallel import replicated, sharded
from distill_jax.train.step import Metrics, Step, TrainState, init_state, step_key


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


def _on_host(tree: PyTree) -> PyTree:
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
    return _on_host(jax.jit(make)(models, keys))


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


def halve(scores: ArrayLike, groups: ArrayLike | None = None) -> np.ndarray:
    """Chooses the better half of the students (the larger half of an odd number), in their order.

    Args:
      scores: the score of each student, lower is better, ``[students]``. Of equal ones the first is better.
      groups: int ``[students]``: students of one group, such as the seeds of one setting, are judged by the
        mean of their scores and stay together. By default each is a group by itself.

    Returns:
      The numbers of those that stay, int ``[n]``.

    >>> halve([3.0, 1.0, 2.0, 5.0]).tolist()
    [1, 2]
    >>> halve([3.0, 1.0, 2.0, 5.0], groups=[0, 0, 1, 1]).tolist()
    [0, 1]
    """
    scores = np.asarray(scores, np.float64)
    groups = np.arange(scores.size) if groups is None else np.asarray(groups)
    if scores.ndim != 1 or groups.shape != scores.shape:
        raise ValueError(f"scores and groups must be [students], got {scores.shape} and {groups.shape}")
    names = np.unique(groups)
    means = [scores[groups == name].mean() for name in names]
    kept = names[np.argsort(means, kind="stable")[: -(-len(names) // 2)]]
    return np.flatnonzero(np.isin(groups, kept))


def fit(
    students: Students,
    epoch: Callable[..., tuple[Students, Metrics]],
    data: Mapping[str, Any],
    *,
    epochs: int,
    batch_size: int,
    seeds: Sequence[int],
    rows: ArrayLike | None = None,
    context: PyTree = None,
    validate: Callable[[Model], dict[str, Any]] | None = None,
    best_by: str = "validation_errors",
    rungs: Sequence[int] = (),
    groups: ArrayLike | None = None,
    chunk: int | None = None,
    mesh: Mesh | None = None,
    directory: str | Path | None = None,
    save_seconds: float = 20.0,
    on_epoch: Callable[[int, dict[str, float]], Any] = lambda done, figures: None,
) -> Fit:
    """Trains all students; continues where an earlier, interrupted call stopped.

    Student i learns what :func:`distill_jax.train.fit` would teach it alone with the seed ``seeds[i]``, however
    the students are divided into chunks, over devices and over calls. One that diverges ranks last.

    Args:
      students: the students at the start, in the memory of the host or of a device; they are copied.
      epoch: a function from :func:`make_epoch`.
      data: name → array ``[examples, ...]``, or name → pytree of such arrays, which all students share.
      epochs: the number of epochs in all.
      batch_size: the number of examples per step of each student.
      seeds: the seed of the shuffling for each student, ``[students]``. Where all are equal (and no ``rows``
        are given) the students share their batches, which is fastest.
      rows: the rows of ``data`` from which each student learns, int ``[students, n]``; all by default.
      context: passed to ``epoch``, for its ``transform``.
      validate: ``stacked model -> figures``, each with one value per student, called after each epoch, such as
        that of ``train.make_validation(..., stacked=True)``.
      best_by: the name of the figure that is lowest in a student's best epoch.
      rungs: numbers of epochs after which only the better half of the students goes on, by the lowest figure
        so far (successive halving). With ``rungs=(2, 4, 8)`` of 16 epochs, 16 students train for 80 epochs in
        all instead of 256, and two of them reach the last. A learning rate that falls over all epochs lets
        them be judged in the middle of its schedule.
      groups: int ``[students]``: students of one group stay or go together, as in :func:`halve`.
      chunk: the number of students that are trained at a time, which bounds the memory of the device: the
        others are in that of the host. All chunks run the same compiled program. By default all at a time.
      mesh: devices over which the students are divided, from :func:`distill_jax.train.data_mesh`.
      directory: where checkpoints are kept, one folder per rung and chunk; None keeps none.
      save_seconds: the shortest time between two checkpoints, in seconds. Each chunk's last epoch is saved.
      on_epoch: called with the number of epochs that the students have done on average, and with the mean of
        each figure over the students that are being trained and have not diverged.

    Returns:
      The final states, the best models and the history, all stacked, as NumPy arrays. The figures in the
      history are ``[epochs, students]``, NaN after a student has been dropped.

    Raises:
      ValueError: if shapes or rungs do not fit; if the losses of all students trained together are no longer
        finite, or one of them where there is no ``validate``; and as :func:`distill_jax.train.fit`.

    References:
      Jamieson, Talwalkar, `Non-stochastic Best Arm Identification and Hyperparameter Optimization`, 2016,
      §3 (successive halving).
    """
    if not isinstance(students, Students):
        raise ValueError(f"students must be sweeps.Students(states, values), got {type(students).__name__}")
    orders_by, own = np.asarray(seeds), None if rows is None else np.asarray(rows)
    students = Students(_on_host(students.states), {name: np.array(v) for name, v in students.values.items()})
    count = len(jax.tree.leaves(students.states)[0])
    together = np.arange(count) if groups is None else np.asarray(groups)
    for name, tree in {**students._asdict(), "seeds": orders_by, "rows": own, "groups": together}.items():
        for shape in map(np.shape, jax.tree.leaves(tree)):
            if shape[:1] != (count,):
                raise ValueError(f"{name} must have a first axis of {count} students, got shape {shape}")
    seeds = orders_by.tolist()
    check_options(students, epoch, epochs, batch_size, seeds, validate, best_by, save_seconds, on_epoch)
    if (np.diff((0, *rungs, epochs)) < 1).any():
        raise ValueError(f"rungs must rise from 1 to less than the {epochs} epochs, got {tuple(rungs)}")
    if len(rungs) and validate is None:
        raise ValueError("rungs need validate: the better half is chosen by a validation figure")
    if chunk is not None:
        check_count("chunk", chunk)
    data, examples = checked_data(data)
    devices = 1 if mesh is None else mesh.size
    if mesh is not None:
        data, context = jax.device_put((data, context), replicated(mesh))

    def placed(state, data, order, context):
        return epoch(state if mesh is None else jax.device_put(state, sharded(mesh)), data, order, context)

    def orders(number: int, chosen: np.ndarray) -> np.ndarray:
        length = examples if own is None else own.shape[1]
        of = {seed: epoch_order(seed, number, length, batch_size) for seed in {seeds[i] for i in chosen}}
        if own is None and len(set(seeds)) == 1:
            return of[seeds[0]]
        return np.stack([of[seeds[i]] if own is None else own[i][of[seeds[i]]] for i in chosen], 1)

    best = _on_host(students.model)
    history: dict[str, np.ndarray] = {}
    alive, begun, done, seconds = np.arange(count), 0, 0, 0.0
    for rung, until in enumerate((*rungs, epochs)):
        if rung:
            score = ranks({name: values[:begun, alive] for name, values in history.items()}, best_by)
            score = np.where(score[-1] < np.inf, score.min(0), np.inf)
            alive = alive[halve(score, together[alive])]
        size = -(-min(chunk or count, len(alive)) // devices) * devices
        for first in range(0, len(alive), size):
            chosen = alive[first : first + size]
            padded = np.resize(chosen, size)

            def orders_of(number, padded=padded):
                return orders(number, padded)

            def report(number, figures, before=done, chosen=chosen, begun=begun):
                finished = before + len(chosen) * (number - begun)
                on_epoch(finished // count, {name: _mean(values) for name, values in figures.items()})

            identity = [{n: v[chosen] for n, v in students.values.items()}, chosen, np.array(seeds)[chosen]]
            identity += [] if own is None else [own[chosen]]
            past = {name: values[:begun, padded].tolist() for name, values in history.items()}
            past |= {"epoch": list(range(1, begun + 1))} if begun else {}
            state, best_yet = jax.tree.map(jnp.asarray, take((students, best), padded))
            part = run_epochs(
                Fit(state, best_yet, past, 0.0),
                placed,
                data,
                epochs=until,
                order=orders_of,
                identity={
                    "students": fingerprint(identity)[:16], "batch_size": batch_size, "examples": examples
                },
                context=context,
                validate=validate,
                best_by=best_by,
                stop=lambda history: False,
                directory=directory and Path(directory) / f"rung{rung}-chunk{first // size}",
                save_seconds=save_seconds,
                on_epoch=report,
            )  # fmt: skip
            seconds += part.seconds
            done += len(chosen) * (until - begun)
            students, best = _put((students, best), chosen, (part.state, part.best))
            for name, values in part.history.items():
                if name != "epoch":
                    new = np.asarray(values, np.float64)[:, : len(chosen)]
                    empty = np.full((epochs, count, *new.shape[2:]), np.nan)
                    history.setdefault(name, empty)[:until, chosen] = new
        begun = until
    return Fit(students, best, {"epoch": np.arange(1, epochs + 1), **history}, seconds)


def _put(whole: PyTree, chosen: np.ndarray, part: PyTree) -> PyTree:
    """Writes the arrays of some students, without those that fill up the last chunk, into those of all."""

    def one(x, y):
        if is_key(x):
            return x.at[chosen].set(y[: len(chosen)])
        x[chosen] = np.asarray(y)[: len(chosen)]
        return x

    return jax.tree.map(one, whole, part)


def _mean(values: Any) -> float:
    """Averages a figure over the students that have it."""
    values = np.asarray(values, np.float64)
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")

"""The training loop of many students: checkpoints, chunks, devices, and successive halving."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from distill_jax._checks import check_count, is_key
from distill_jax._model import Model, PyTree
from distill_jax.teachers import fingerprint
from distill_jax.train._loop import Fit, check_options, checked_data, ranks, run_epochs
from distill_jax.train.epoch import epoch_order
from distill_jax.train.parallel import replicated, sharded
from distill_jax.train.step import Metrics
from distill_jax.train.sweeps.stacks import Students, on_host, take


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
    students = Students(on_host(students.states), {name: np.array(v) for name, v in students.values.items()})
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

    best = on_host(students.model)
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

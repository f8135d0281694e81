"""Learning from peers, from one's own exits, from a running mean of oneself, and in chains.

Each scheme is a ``loss_fn`` for :func:`distill_jax.train.make_train_step`, or what goes with one; see
:mod:`distill_jax.train.objectives` for batches and their names, and
:func:`distill_jax.train.distill_each` for several teachers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses, weights
from distill_jax.losses._numerics import check_fraction, to_float
from distill_jax.train.objectives import Schedule, at, check_options, errors, soft_mean
from distill_jax.train.step import LossFn, weighted_mean


def mutual(
    apply_fns: Sequence[Callable[..., Any]],
    *,
    weight: Schedule = 1.0,
    temperature: Schedule = 1.0,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Deep mutual learning: students that learn from labels and from each other.

    Lₖ = hardₖ + w/(K − 1)·Σ_{l≠k} KL(p_l‖p_k), and the loss is Σₖ Lₖ. What others predict is a constant
    to each student, so each one's gradient is that of its own Lₖ.

    Args:
      apply_fns: one a student, at least two; the same one may stand there several times.
      weight: w ≥ 0, or a schedule of it; the paper has 1.
      temperature: as in :func:`distill_jax.train.distill`; the paper has 1.
      soft: likewise.

    Returns:
      A ``loss_fn`` over tuples of the students' params and model states, with the metrics ``"hard"``,
      ``"soft"``, ``"errors"`` (means over students) and ``"errors_0"`` …. All students take their
      step at once; the paper lets them take turns within a batch.

    Raises:
      ValueError: if there are fewer than two students, or ``weight`` is negative.

    References:
      Zhang, Xiang, Hospedales, Lu, `Deep Mutual Learning`, 2018 (the loss of K networks).
    """
    count = len(apply_fns)
    if count < 2:
        raise ValueError(f"mutual needs at least two students, got {count} apply_fns")
    if not callable(weight) and not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}")
    check_options(0.0, temperature)

    def loss_fn(params, model_state, batch, *, key, step):
        keys = [None] * count if key is None else jax.random.split(key, count)
        results = [
            apply_fn(p, s, batch["image"], key=k)
            for apply_fn, p, s, k in zip(apply_fns, params, model_state, keys, strict=True)
        ]
        logits = [z for z, _ in results]
        options = {"temperature": at(temperature, step)}
        hard: Any = 0.0
        peers: Any = 0.0
        for number, ours in enumerate(logits):
            hard += weighted_mean(losses.cross_entropy(ours, batch["label"]), batch)
            for other, theirs in enumerate(logits):
                if other != number:
                    theirs = jax.lax.stop_gradient(theirs)
                    peers += soft_mean(soft, ours, theirs, batch, **options) / (count - 1)
        wrong = [errors(z, batch) for z in logits]
        metrics = {
            "hard": hard / count,
            "soft": peers / count,
            "errors": sum(wrong) / count,
            **{f"errors_{number}": value for number, value in enumerate(wrong)},
        }
        states = tuple(state for _, state in results)
        return hard + at(weight, step) * peers, (states, metrics)

    return loss_fn


def self_distillation(
    apply_fn: Callable[..., Any],
    *,
    temperature: Schedule = 3.0,
    alpha: Schedule = 0.7,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """A network whose deepest exit teaches the earlier ones.

    The sum over exits of α·hardᵢ + (1 − α)·soft(exitᵢ, deepest); the deepest has hard alone, and
    is a constant in the other terms.

    Args:
      apply_fn: gives a list or tuple of logits, one an exit, the deepest last; an exit is whatever
        the model makes of an intermediate value.
      temperature: as in :func:`distill_jax.train.distill`.
      alpha: likewise, the labels' share in the earlier exits' loss. (The paper's α is 1 − ours.)
      soft: likewise.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"`` and ``"soft"`` (sums over exits, unweighted),
      ``"errors"`` (the deepest exit's) and ``"errors_0"`` …. The paper's third
      term, ‖Fᵢ − F_deepest‖², is what
      :func:`distill_jax.train.distill_features` computes between captured layers.

    References:
      Zhang et al., `Be Your Own Teacher`, 2019, §3.2. That the deepest exit is a constant follows the
      authors' program; the paper does not say.
    """
    check_options(alpha, temperature)

    def loss_fn(params, model_state, batch, *, key, step):
        exits, model_state = apply_fn(params, model_state, batch["image"], key=key)
        if not isinstance(exits, list | tuple) or len(exits) < 2:
            raise ValueError(
                "self_distillation needs an apply_fn that gives a list of logits, two or more, the "
                f"deepest last; got {jax.tree.structure(exits)}"
            )
        deepest, options = exits[-1], {"temperature": at(temperature, step)}
        hards = [weighted_mean(losses.cross_entropy(z, batch["label"]), batch) for z in exits]
        softs = [soft_mean(soft, z, jax.lax.stop_gradient(deepest), batch, **options) for z in exits[:-1]]
        share = at(alpha, step)
        loss = share * sum(hards[:-1]) + (1 - share) * sum(softs) + hards[-1]
        metrics = {"hard": sum(hards), "soft": sum(softs), "errors": errors(deepest, batch)}
        for number, logits in enumerate(exits):
            metrics[f"errors_{number}"] = errors(logits, batch)
        return loss, (model_state, metrics)

    return loss_fn


def init_mean_teacher(params: Any, model_state: Any) -> dict[str, Any]:
    """Makes the ``model_state`` of :func:`mean_teacher`: the teacher starts as the student.

    Args:
      params: the student's.
      model_state: the student's.

    Returns:
      ``{"student": model_state, "teacher": (params, model_state), "step"}``; the teacher in float32 at
      least, since a mean over many steps moves by less than bfloat16 can hold. ``step`` is the
      last one whose parameters are in the mean.
    """

    def precise(x):
        return to_float(x) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating) else x

    teacher = jax.tree.map(precise, (params, model_state))
    return {"student": model_state, "teacher": teacher, "step": jnp.full((), -1, jnp.int32)}


def mean_teacher(
    apply_fn: Callable[..., Any],
    *,
    decay: Schedule = 0.999,
    weight: Schedule = 1.0,
    soft: Callable[..., jax.Array] | None = None,
    teacher_input: str = "image",
) -> LossFn:
    """Learning from labels and from the running mean of oneself: the mean of hard + w·soft.

    θ′ₜ = d·θ′ₜ₋₁ + (1 − d)·θₜ, the mean of the student's parameters *before* the step, so that it
    holds all updates made so far; its float statistics (BatchNorm's) are averaged likewise. The teacher
    predicts in evaluation mode, and is a constant to the student.

    Args:
      apply_fn: the student's and the teacher's.
      decay: d in [0, 1], or a schedule of it, such as ``lambda t: jnp.minimum(0.999, t / (t + 1))``,
        the plain mean at first.
      weight: w ≥ 0, or a schedule of it (the paper ramps it up).
      soft: ``(student_logits, teacher_logits) -> [batch]``; by default the paper's, the sum over
        classes of the squared difference of probabilities.
      teacher_input: the batch's name of what the teacher sees, where that is another view than
        ``"image"``.

    Returns:
      A ``loss_fn`` whose ``model_state`` comes from :func:`init_mean_teacher`, with the metrics
      ``"hard"``, ``"soft"`` and ``"errors"``. The mean moves once a step, also where gradients are
      accumulated over parts of the batch.

    References:
      Tarvainen, Valpola, `Mean Teachers Are Better Role Models`, 2017, §2: the consistency cost J(θ)
      and the moving average, its two displayed equations. Their program averages over classes.
    """
    if not callable(decay):
        check_fraction("decay", decay)
    if not callable(weight) and not weight >= 0:
        raise ValueError(f"weight must not be negative, got {weight}")

    def loss_fn(params, model_state, batch, *, key, step):
        student_state, now = model_state["student"], jnp.asarray(step, jnp.int32)
        new = now != model_state["step"]  # false for the later parts of an accumulated batch

        current = jax.lax.stop_gradient((params, student_state))
        keep = jnp.where(new, at(decay, step), 1.0)
        teacher = weights.ema(model_state["teacher"], current, keep)
        as_model = jax.tree.map(lambda x, like: x.astype(like.dtype), teacher, current)
        theirs = jax.lax.stop_gradient(apply_fn(*as_model, batch[teacher_input])[0])
        ours, student_state = apply_fn(params, student_state, batch["image"], key=key)
        metrics = {
            "hard": weighted_mean(losses.cross_entropy(ours, batch["label"]), batch),
            "soft": soft_mean(soft or _squared_difference, ours, theirs, batch),
            "errors": errors(ours, batch),
        }
        loss = metrics["hard"] + at(weight, step) * metrics["soft"]
        state = {"student": student_state, "teacher": teacher, "step": now}
        return loss, (state, metrics)

    return loss_fn


def chain(models: Iterable[Any], train: Callable[[Any, Any], Any]) -> list[Any]:
    """Trains models in a row, each one taught by the one before: teacher assistants, generations.

    Models of falling size are teacher assistants; one architecture several times is born-again
    training, whose last step is often the ensemble of all generations
    (:func:`distill_jax.teachers.ensemble`).

    Args:
      models: whatever ``train`` understands, first the teacher's.
      train: ``(teacher, model) -> trained``, where teacher is the last one trained, None for the first.

    Returns:
      What ``train`` returned, one a model.

    References:
      Mirzadeh et al., `Improved Knowledge Distillation via Teacher Assistant`, 2020, §3; Furlanello et
      al., `Born-Again Neural Networks`, 2018, §3.

    >>> chain([30, 20, 10], lambda teacher, size: (size, teacher and teacher[0]))
    [(30, None), (20, 30), (10, 20)]
    """
    trained: list[Any] = []
    for model in models:
        trained.append(train(trained[-1] if trained else None, model))
    return trained


def _squared_difference(student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    student, teacher = (jax.nn.softmax(to_float(z)) for z in (student_logits, teacher_logits))
    return jnp.sum(jnp.square(student - teacher), axis=-1)

"""What is minimised: builders of ``loss_fn`` for :func:`distill_jax.train.make_train_step`.

Batches are dicts with ``"image"`` (the model's input), ``"label"`` (integer or soft),
``"teacher"`` (the teacher's logits, or ``{"logits": …, "features": {name: …}}``, put there by
:mod:`distill_jax.teachers.store`) and, where examples count unequally, ``"weight"``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.compress import linear_codes
from distill_jax.features.learned import Learned
from distill_jax.losses._numerics import check_fraction, check_positive, takes
from distill_jax.train.step import LossFn, weighted_mean

Schedule = float | Callable[[jax.Array], jax.Array]


def at(schedule: Schedule, step: jax.Array) -> Any:
    """The value of a schedule, or of a constant, at a step."""
    return schedule(step) if callable(schedule) else schedule


def is_zero(schedule: Schedule) -> bool:
    """Says whether a weight is the constant 0, so that its term need not be computed."""
    return isinstance(schedule, int | float) and schedule == 0


def check_options(alpha: Schedule, temperature: Schedule | None) -> None:
    """Raises ``ValueError`` if constants are given for these that they cannot have."""
    if not callable(alpha):
        check_fraction("alpha", alpha)
    if temperature is not None and not callable(temperature):
        check_positive("temperature", temperature)


def teacher_of(batch: Any) -> Any:
    """The teacher's part of a batch, as a dict with ``"logits"`` and whatever else it has.

    Raises:
      ValueError: if there is none.
    """
    if "teacher" not in batch:
        raise ValueError(
            "the batch has no 'teacher' logits: add them with a soft-label store, or with a "
            f"label function as the epoch's transform; it has {sorted(batch)}"
        )
    teacher = batch["teacher"]
    return teacher if isinstance(teacher, Mapping) else {"logits": teacher}


def soft_mean(
    soft: Callable[..., jax.Array], student: jax.Array, teacher: Any, batch: Any, **options: Any
) -> jax.Array:
    """The weighted mean of a loss between outputs.

    Examples of weight 0 are hidden from a loss that takes ``where``: one that compares examples with
    each other would otherwise see them.

    Args:
      soft: ``(student, teacher, **options) -> [batch]``.
      student: outputs ``[batch, ...]``.
      teacher: likewise.
      batch: with ``"weight"``, or without.
      options: given to ``soft``.
    """
    if "weight" in batch and takes(soft, "where"):
        counts = batch["weight"] > 0
        options["where"] = counts.reshape(counts.shape + (1,) * (student.ndim - counts.ndim))
    return weighted_mean(soft(student, teacher, **options), batch)


def supervised(apply_fn: Callable[..., Any], *, label_smoothing: Schedule = 0.0) -> LossFn:
    """Learning from labels: the mean cross-entropy.

    Args:
      apply_fn: as in :class:`distill_jax.models.Model`.
      label_smoothing: ε in [0, 1], or an optax schedule of it.

    Returns:
      A ``loss_fn`` with the metric ``"errors"``, the fraction of examples whose top class is wrong.
    """
    if not callable(label_smoothing):
        check_fraction("label_smoothing", label_smoothing)

    def loss_fn(params, model_state, batch, *, key, step):
        logits, model_state = apply_fn(params, model_state, batch["image"], key=key)
        values = losses.cross_entropy(logits, batch["label"], label_smoothing=at(label_smoothing, step))
        return weighted_mean(values, batch), (model_state, {"errors": errors(logits, batch)})

    return loss_fn


def distill(
    apply_fn: Callable[..., Any],
    *,
    temperature: Schedule | None = 4.0,
    alpha: Schedule = 0.1,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Learning from a teacher: the mean of α·hard + (1 − α)·soft.

    hard is the cross-entropy with ``batch["label"]``, soft the given loss against
    ``batch["teacher"]``; the losses of this library carry the factor T² that keeps the two
    comparable when T changes.

    Args:
      apply_fn: the student's, as in :class:`distill_jax.models.Model`.
      temperature: T > 0 or an optax schedule of it, given to ``soft`` by that name; None for a
        ``soft`` that takes none.
      alpha: the labels' share in [0, 1], or a schedule of it. At a constant 0 labels are not needed.
      soft: ``(student_logits, teacher_logits, *, temperature) -> [batch]``, any such loss.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"``, ``"soft"`` (each unweighted) and ``"errors"``.

    References:
      Hinton, Vinyals, Dean, `Distilling the Knowledge in a Neural Network`, 2015, §2.
    """
    check_options(alpha, temperature)

    def loss_fn(params, model_state, batch, *, key, step):
        teacher = teacher_of(batch)
        logits, model_state = apply_fn(params, model_state, batch["image"], key=key)
        options = {} if temperature is None else {"temperature": at(temperature, step)}
        metrics = {"soft": soft_mean(soft, logits, teacher["logits"], batch, **options)}
        share = at(alpha, step)
        loss = metrics["soft"]
        if not is_zero(alpha):
            metrics["hard"] = weighted_mean(losses.cross_entropy(logits, batch["label"]), batch)
            loss = share * metrics["hard"] + (1 - share) * metrics["soft"]
        if "label" in batch:
            metrics["errors"] = errors(logits, batch)
        return loss, (model_state, metrics)

    return loss_fn


def mean_squares(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of (output − target)² over all axes but the first: ``[batch]``.

    Args:
      outputs: ``[batch, ...]``.
      targets: of the same shape.

    Raises:
      ValueError: if the shapes differ.

    >>> print(mean_squares(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])))
    [5.]
    """
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs and targets must have one shape, got {outputs.shape} and {targets.shape}")
    return jnp.square(outputs - targets).reshape(outputs.shape[0], -1).mean(-1)


def encoder_decoder(
    encoder_fn: Callable[..., Any],
    decoder_fn: Callable[..., Any],
    *,
    code: Callable[[jax.Array], jax.Array] = lambda values: values,
    soft: Callable[..., jax.Array] = mean_squares,
    alpha: Schedule = 0.0,
    hard: Callable[..., jax.Array] = losses.cross_entropy,
    inputs_weight: Schedule = 0.0,
    frozen: str | None = None,
) -> LossFn:
    """Learning an original through a narrow code: the mean of α·hard + (1 − α)·soft + ι·inputs.

    The outputs are ŷ = decoder(code(encoder(x))); soft compares them with the original's, in
    ``batch["teacher"]``, hard with ``batch["label"]``, and inputs is the mean squared error of x
    itself, where the decoder returns ``(ŷ, x̂)``.

    Args:
      encoder_fn: an ``apply_fn`` as in :class:`distill_jax.models.Model`, from x to the code.
      decoder_fn: likewise, from the code to ŷ or to ``(ŷ, x̂)``.
      code: applied to the code on its way, such as :func:`distill_jax.compress.linear_codes.quantise`.
      soft: ``(outputs, teacher) -> [batch]``: mean squares, or a classifier's
        :func:`distill_jax.losses.kl`.
      alpha: the labels' share in [0, 1], or a schedule of it. At a constant 0 labels are not needed.
      hard: ``(outputs, labels) -> [batch]``.
      inputs_weight: ι ≥ 0, or a schedule of it.
      frozen: ``"encoder"`` or ``"decoder"``, which then runs in evaluation mode and gets no gradient;
        None trains both. (An optimizer with weight decay must be told, too: see
        :func:`distill_jax.train.only`.)

    Returns:
      A ``loss_fn`` over ``{"encoder": …, "decoder": …}``, parameters and state alike, with the metrics
      ``"soft"``, ``"hard"`` and ``"inputs"`` (each unweighted) and, where labels are classes,
      ``"errors"``.

    Raises:
      ValueError: for options outside these bounds; when traced, if shapes do not fit, or the decoder
        returns no x̂ where it is wanted.
    """
    check_options(alpha, None)
    if not callable(inputs_weight) and not inputs_weight >= 0:
        raise ValueError(f"inputs_weight must not be negative, got {inputs_weight}")
    if frozen not in (None, "encoder", "decoder"):
        raise ValueError(f"frozen must be 'encoder', 'decoder' or None, got {frozen!r}")

    def still(part_fn):
        def evaluated(params, model_state, x, *, key=None):
            return part_fn(jax.lax.stop_gradient(params), model_state, x)

        return evaluated

    apply_fn = linear_codes.compose(
        still(encoder_fn) if frozen == "encoder" else encoder_fn,
        still(decoder_fn) if frozen == "decoder" else decoder_fn,
        code=code,
    )

    def loss_fn(params, model_state, batch, *, key, step):
        teacher = teacher_of(batch)["logits"]
        outputs, model_state = apply_fn(params, model_state, batch["image"], key=key)
        outputs, inputs = outputs if isinstance(outputs, tuple) else (outputs, None)
        metrics = {"soft": soft_mean(soft, outputs, teacher, batch)}
        share = at(alpha, step)
        loss = metrics["soft"]
        if not is_zero(alpha):
            metrics["hard"] = weighted_mean(hard(outputs, batch["label"]), batch)
            loss = share * metrics["hard"] + (1 - share) * metrics["soft"]
        if not is_zero(inputs_weight):
            if inputs is None:
                raise ValueError(
                    "inputs_weight needs a decoder that returns (outputs, inputs), got outputs alone"
                )
            flat = batch["image"].reshape(inputs.shape)
            metrics["inputs"] = weighted_mean(mean_squares(inputs, flat), batch)
            loss += at(inputs_weight, step) * metrics["inputs"]
        if "label" in batch and jnp.issubdtype(batch["label"].dtype, jnp.integer):
            metrics["errors"] = errors(outputs, batch)
        return loss, (model_state, metrics)

    return loss_fn


def distill_features(
    apply_fn: Callable[..., Any],
    learned: Learned | Sequence[tuple[Any, ...]],
    *,
    pairs: Sequence[tuple[str, str]],
    hard_weight: Schedule = 1.0,
    soft_weight: Schedule = 0.0,
    temperature: Schedule | None = 4.0,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Learning from a teacher's layers: the mean of γ·hard + α·soft + Σₖ βₖ·featureₖ.

    hard and soft are those of :func:`distill`. A feature loss compares the student's values at
    the layers of ``pairs`` with the teacher's in ``batch["teacher"]["features"]``, one value an
    example. ``params`` is ``{"student": …, "learned": …}``, made by :func:`init_learned`: the student's
    own pytree stays as it is without features, and :func:`drop_learned` gives it back.

    Args:
      apply_fn: the student's, captured (:func:`distill_jax.features.capture`): its outputs are
        ``(logits, {name: array})``.
      learned: a :class:`~distill_jax.features.Learned`, with β = 1; or a list of ``(β, Learned)``,
        where β may be a schedule, or ``(β, Learned, pairs)`` for a loss between other layers. A loss
        without parameters is a ``Learned`` whose ``init`` gives none.
      pairs: ``(student_name, teacher_name)``, for instance from
        :func:`distill_jax.features.match_layers`.
      hard_weight: γ ≥ 0, or a schedule of it. At a constant 0 labels are not needed, unless by a
        feature loss.
      soft_weight: α ≥ 0, or a schedule of it. At a constant 0 the teacher's logits are not needed.
      temperature: as in :func:`distill`.
      soft: as in :func:`distill`.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"``, ``"soft"``, ``"feature"`` (the sum weighted by β; of
      several losses also each unweighted, as ``"feature_0"`` …) and ``"errors"``. Where the batch
      has weights, feature losses are given ``where``, bool ``[batch]``: the examples whose weight is
      not 0. Losses between examples see each part of an accumulated batch alone.

    Raises:
      ValueError: if there is no loss, or no pair for one; when traced, if a layer is missing.

    References:
      Romero et al., `FitNets`, 2015, Eq. 2 (hard and soft) and 3 (a feature loss). There one follows
      the other in training; the sum of the three is the protocol of RepDistiller (Tian et al.,
      `Contrastive Representation Distillation`, 2020), whose γ, α and β these are.
    """
    terms = _terms(learned, pairs)
    check_options(0.0, temperature)
    for name, weight in {"hard_weight": hard_weight, "soft_weight": soft_weight}.items():
        if not callable(weight) and not weight >= 0:
            raise ValueError(f"{name} must not be negative, got {weight}")

    def loss_fn(params, model_state, batch, *, key, step):
        teacher = teacher_of(batch)
        if "features" not in teacher:
            raise ValueError(
                "batch['teacher'] has no 'features': capture the teacher's apply_fn before it is given "
                "to targets.make_label"
            )
        outputs, model_state = apply_fn(params["student"], model_state, batch["image"], key=key)
        logits, features = _captured(outputs)
        where = batch["weight"] > 0 if "weight" in batch else None
        metrics: dict[str, Any] = {"feature": 0.0}
        for number, (weight, part, layers) in enumerate(terms):
            ours = [_layer(features, name, "student") for name, _ in layers]
            theirs = [_layer(teacher["features"], name, "teacher") for _, name in layers]
            values = part.apply(
                params["learned"][number],
                ours,
                theirs,
                labels=batch.get("label"),
                where=where,
                key=None if key is None else jax.random.fold_in(key, number),
            )
            metrics[f"feature_{number}"] = weighted_mean(values, batch)
            metrics["feature"] += at(weight, step) * metrics[f"feature_{number}"]
        if len(terms) == 1:
            del metrics["feature_0"]
        loss = metrics["feature"]
        if not is_zero(hard_weight):
            metrics["hard"] = weighted_mean(losses.cross_entropy(logits, batch["label"]), batch)
            loss += at(hard_weight, step) * metrics["hard"]
        if not is_zero(soft_weight):
            options = {} if temperature is None else {"temperature": at(temperature, step)}
            metrics["soft"] = soft_mean(soft, logits, teacher["logits"], batch, **options)
            loss += at(soft_weight, step) * metrics["soft"]
        if "label" in batch:
            metrics["errors"] = errors(logits, batch)
        return loss, (model_state, metrics)

    return loss_fn


def init_learned(
    key: jax.Array,
    params: Any,
    learned: Learned | Sequence[tuple[Any, ...]],
    *,
    pairs: Sequence[tuple[str, str]],
    student_shapes: Mapping[str, Any],
    teacher_shapes: Mapping[str, Any],
) -> dict[str, Any]:
    """Puts the parameters of the feature losses beside the student's: for :func:`distill_features`.

    Args:
      key: initialises the learned parts.
      params: the student's own parameters, kept as they are.
      learned: as given to :func:`distill_features`.
      pairs: likewise.
      student_shapes: name → anything with a ``shape``, such as :func:`distill_jax.features.layer_shapes`
        gives, or a dict of captured values.
      teacher_shapes: likewise, of the teacher.

    Returns:
      ``{"student": params, "learned": (…,)}``, the latter a tuple with one entry a loss.
    """
    terms = _terms(learned, pairs)
    keys = jax.random.split(key, len(terms))
    parts = [
        part.init(
            key,
            [tuple(_layer(student_shapes, name, "student").shape) for name, _ in layers],
            [tuple(_layer(teacher_shapes, name, "teacher").shape) for _, name in layers],
        )
        for key, (_, part, layers) in zip(keys, terms, strict=True)
    ]
    return {"student": params, "learned": tuple(parts)}


def drop_learned(params: Mapping[str, Any]) -> Any:
    """Takes the student's own parameters out of those of :func:`distill_features`."""
    return params["student"]


def student_of(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an ``apply_fn`` of a student's that finds its parameters in ``{"student": …, …}``.

    For validation while :func:`distill_features` or a scheme trains more than the student.

    Args:
      apply_fn: the student's own, uncaptured: ``(params, model_state, x, *, key=None)``.
    """

    def student_fn(params, model_state, x, *, key=None):
        return apply_fn(params["student"], model_state, x, key=key)

    return student_fn


def _terms(learned: Any, pairs: Any) -> list[tuple[Any, Learned, list[tuple[str, str]]]]:
    if isinstance(learned, Learned):
        learned = [(1.0, learned)]
    terms = [(item[0], item[1], list(item[2] if len(item) > 2 else pairs)) for item in learned]
    if not terms or not all(layers for _, _, layers in terms):
        raise ValueError(
            f"there must be a feature loss, and a pair of layers for each: got {len(terms)} losses and "
            f"pairs {[layers for _, _, layers in terms]}"
        )
    return terms


def _captured(outputs: Any) -> tuple[Any, Mapping[str, Any]]:
    if not (isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], Mapping)):
        raise ValueError(
            "apply_fn must return (logits, {name: array}), as capture(apply_fn, names) does; got "
            f"{jax.tree.structure(outputs)}"
        )
    return outputs


def _layer(features: Mapping[str, Any], name: str, whose: str) -> Any:
    if name not in features:
        raise ValueError(
            f"pairs: the {whose} gives no value named {name!r}, only {', '.join(features) or 'none'}"
        )
    return features[name]


def errors(logits: jax.Array, batch: Any) -> jax.Array:
    """The weighted fraction of examples whose top class is not the label's."""
    label = batch["label"]
    if label.ndim == logits.ndim:
        label = jnp.argmax(label, -1)
    return weighted_mean((jnp.argmax(logits, -1) != label).astype(jnp.float32), batch)

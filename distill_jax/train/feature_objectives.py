"""The objective of learning from a teacher's intermediate layers, and the parameters trained beside it."""

import dataclasses
import glob
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from distill_jax import losses
from distill_jax._checks import check_key, need
from distill_jax._model import ApplyFn, Model, PyTree, check_model
from distill_jax.features import Learned, capture
from distill_jax.train.objectives import (
    Schedule,
    at,
    check_options,
    check_weight,
    error_rate,
    is_zero,
    soft_mean,
    teacher_of,
)
from distill_jax.train.step import LossFn, weighted_mean

Pairs = Sequence[tuple[str, str]]
OUTPUTS = "outputs"  # the name of a model's outputs among its layers


def distill_features(
    learned: Learned | Sequence[tuple[Any, ...]],
    *,
    pairs: Pairs,
    hard_weight: Schedule = 1.0,
    soft_weight: Schedule = 0.0,
    temperature: Schedule | None = 4.0,
    soft: Callable[..., jax.Array] = losses.kl,
) -> LossFn:
    """Builds the objective of learning from a teacher's layers: γ·hard + α·soft + Σₖ βₖ·featureₖ.

    The hard and the soft loss are those of :func:`distill_jax.train.distill`. A feature loss compares the
    student's values at the layers of ``pairs`` with the teacher's in ``batch["teacher"]["features"]``, and
    gives one value per example. The loss is the mean over the batch.

    Args:
      learned: a :class:`~distill_jax.features.Learned` with β = 1; or a list of ``(β, Learned)``, where β may
        be a schedule, or of ``(β, Learned, pairs)`` for a loss between other layers.
      pairs: a list of ``(student_name, teacher_name)``, for example from
        :func:`distill_jax.features.match_layers`. The name ``"outputs"`` stands for a model's outputs.
      hard_weight: γ ≥ 0, or a schedule of it. With a constant 0 no labels are needed, unless a feature
        loss needs them.
      soft_weight: α ≥ 0, or a schedule of it. With a constant 0 the teacher's logits are not needed.
      temperature: T > 0, or a schedule of it, passed to ``soft``; None for a ``soft`` that takes none.
      soft: ``(student_logits, teacher_logits, *, temperature) -> values``, one value per example.

    Returns:
      A ``loss_fn`` for a model from :func:`attach_learned`, with the metrics ``"hard"``, ``"soft"``,
      ``"feature"`` (the sum weighted by β; with several losses also each unweighted, as ``"feature_0"``
      and so on) and ``"error_rate"``. Where the batch has weights, feature losses get ``where``, bool
      ``[batch]``: the examples whose weight is not 0. Losses between examples see each part of an
      accumulated batch separately.

    Raises:
      ValueError: if there is no loss, or no pair for one; when traced, if a layer is missing.

    References:
      Romero et al., `FitNets`, 2015, Eq. 2 (hard and soft) and 3 (a feature loss). There one follows
      the other in training. The sum of the three is the protocol of RepDistiller (Tian et al.,
      `Contrastive Representation Distillation`, 2020), which also uses the names γ, α and β.
    """
    terms = _terms(learned, pairs)
    names = sorted({name for _, _, layers in terms for name, _ in layers} - {OUTPUTS})
    patterns = [glob.escape(name) for name in names]
    check_options(0.0, temperature, soft)
    check_weight("hard_weight", hard_weight)
    check_weight("soft_weight", soft_weight)

    def loss_fn(model, batch, *, key, step):
        if not isinstance(model.apply_fn, _StudentPart):
            raise ValueError("distill_features needs a model from attach_learned, got another one")
        teacher = teacher_of(batch)
        need(batch, "image", *([] if is_zero(hard_weight) else ["label"]))
        if names and "features" not in teacher:
            raise ValueError(
                "batch['teacher'] has no 'features': give teachers.label a captured teacher, "
                "features.capture(teacher, names)"
            )
        if names:
            (logits, features), state = capture(model, patterns).apply(batch["image"], key=key)
        else:
            (logits, state), features = model.apply(batch["image"], key=key), {}
        ours = {**features, OUTPUTS: logits}
        theirs = {**teacher.get("features", {}), OUTPUTS: teacher["logits"]}
        where = batch["weight"] > 0 if "weight" in batch else None
        metrics: dict[str, Any] = {"feature": 0.0}
        for number, (weight, part, layers) in enumerate(terms):
            values = part.apply(
                model.params["learned"][number],
                [ours[name] for name, _ in layers],
                [_layer(theirs, name, "teacher") for _, name in layers],
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
            metrics["error_rate"] = error_rate(logits, batch)
        return loss, (state, metrics)

    return loss_fn


def attach_learned(
    key: jax.Array,
    student: Model,
    learned: Learned | Sequence[tuple[Any, ...]],
    *,
    pairs: Pairs,
    student_shapes: Mapping[str, Any],
    teacher_shapes: Mapping[str, Any],
) -> Model:
    """Puts the parameters of feature losses beside the student's, for :func:`distill_features`.

    Args:
      key: a random key that initialises the parameters of the losses.
      student: the student; its parameters are kept as they are.
      learned: the feature losses, as given to :func:`distill_features`.
      pairs: the pairs of layers, as given to :func:`distill_features`.
      student_shapes: name → anything with a ``shape``, for example from
        :func:`distill_jax.features.layer_shapes`; with an entry ``"outputs"`` where a pair names them.
      teacher_shapes: the same for the teacher's layers.

    Returns:
      A model with the parameters ``{"student": ..., "learned": (...)}``, the latter a tuple with one entry
      per loss. It computes what the student computes. :func:`detach_learned` gives the student back.

    Raises:
      ValueError: if there is no loss, no pair for one, or no shape for a layer.
    """
    check_key("key", key)
    check_model("student", student)
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
    params = {"student": student.params, "learned": tuple(parts)}
    return Model(_StudentPart(student.apply_fn), params, student.state)


def detach_learned(model: Model) -> Model:
    """Takes the student out of a model from :func:`attach_learned`, without the losses' parameters.

    Args:
      model: the model in training, or after it.

    Returns:
      The student.

    Raises:
      ValueError: if the model does not come from :func:`attach_learned`.
    """
    if not isinstance(model.apply_fn, _StudentPart):
        raise ValueError("expected a model from attach_learned, got another one")
    return Model(model.apply_fn.student_fn, model.params["student"], model.state)


@dataclasses.dataclass(frozen=True)
class _StudentPart:
    """The ``apply_fn`` of a student whose parameters are one entry of a dict."""

    student_fn: ApplyFn

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        return self.student_fn(params["student"], state, x, key=key)


def _terms(
    learned: Learned | Sequence[tuple[Any, ...]], pairs: Pairs
) -> list[tuple[Schedule, Learned, list[tuple[str, str]]]]:
    """Each loss with its weight and its pairs of layers."""
    if isinstance(learned, Learned):
        learned = [(1.0, learned)]
    listed = isinstance(learned, list | tuple) and all(
        isinstance(i, list | tuple) and len(i) > 1 for i in learned
    )
    if not listed or not all(isinstance(item[1], Learned) for item in learned):
        raise ValueError(
            "learned must be a features.Learned, such as features.project(losses.hint), or a list of (β, Learned), "
            f"got {learned!r}"
        )
    for item in learned:
        check_weight("the weight β of a feature loss", item[0])
    for layers in [pairs, *(item[2] for item in learned if len(item) > 2)]:
        if isinstance(layers, str) or not all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in layers
        ):
            raise ValueError(f"pairs must be a list of (student's name, teacher's name), got {layers!r}")
    terms = [(item[0], item[1], list(item[2] if len(item) > 2 else pairs)) for item in learned]
    if not terms or not all(layers for _, _, layers in terms):
        raise ValueError(
            f"there must be a feature loss, and a pair of layers for each: got {len(terms)} losses and "
            f"pairs {[layers for _, _, layers in terms]}"
        )
    return terms


def _layer(features: Mapping[str, Any], name: str, whose: str) -> Any:
    if name not in features:
        raise ValueError(
            f"pairs: the {whose} has no value named {name!r}, only {', '.join(features) or 'none'}"
        )
    return features[name]

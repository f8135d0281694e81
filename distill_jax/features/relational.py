"""Relation losses as learned parts: what embeds the features, and the loss of the embeddings.

Each builder returns a pair for matched layers, whose losses are *summed* over the layers. ``where`` is
``bool [batch]``. Methods of :mod:`distill_jax.losses.relations` that compare relations only need no
parameters, whatever the widths.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.features.learned import Learned, Shape
from distill_jax.features.projection import (
    check_layers,
    clear,
    dense,
    dense_init,
    example_mask,
    map_init,
    sum_layers,
)
from distill_jax.losses._numerics import to_float
from distill_jax.losses._space import pool_mean

Params = Any


def similarity_preserving() -> Learned:
    """Similarity-preserving distillation of flattened feature maps; no parameters.

    References:
      Tung, Mori, 2019, Eq. 4 (the sum over layers); see
      :func:`distill_jax.losses.similarity_preserving`.
    """
    return _without_params(losses.similarity_preserving)


def rkd(
    *, distance: float = 1.0, angle: float = 2.0, pool: bool = True, include_self: bool = False
) -> Learned:
    """Relational distillation: distance·RKD-D + angle·RKD-A; no parameters.

    Args:
      distance: the weight of the distances; RepDistiller has 25.
      angle: the weight of the angles, for which the paper takes twice that of distances; RepDistiller
        has 50.
      pool: whether feature maps are first averaged over positions, as the last features of an image
        model are; flattened otherwise.
      include_self: as in :func:`distill_jax.losses.rkd_distance`.

    References:
      Park et al., 2019, §3.2 and §4; see :func:`distill_jax.losses.rkd_angle`.
    """

    def loss(student, teacher, *, where):
        if pool:
            student, teacher = pool_mean(to_float(student), ()), pool_mean(to_float(teacher), ())
        options = {"include_self": include_self, "where": where}
        return distance * losses.rkd_distance(student, teacher, **options) + (
            angle * losses.rkd_angle(student, teacher, **options)
        )

    return _without_params(loss)


def pkt(*, pool: bool = True, include_self: bool = False) -> Learned:
    """Probabilistic knowledge transfer; no parameters.

    Args:
      pool: as in :func:`rkd`.
      include_self: as in :func:`distill_jax.losses.pkt`.

    References:
      Passalis, Tefas, 2018; see :func:`distill_jax.losses.pkt`.
    """

    def loss(student, teacher, *, where):
        if pool:
            student, teacher = pool_mean(to_float(student), ()), pool_mean(to_float(teacher), ())
        return losses.pkt(student, teacher, include_self=include_self, where=where)

    return _without_params(loss)


def correlation_congruence(
    *, features: int = 128, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2
) -> Learned:
    """Correlation congruence of linear embeddings of pooled features, one for each network.

    The teacher's embedding is trained too, as in the reference implementations. Alone, the loss has a
    trivial minimum, embeddings that are all alike: use it beside a loss on the logits.

    Args:
      features: the width of the embeddings.
      kernel: as in :func:`distill_jax.losses.correlation_congruence`.
      gamma: as there.
      order: as there.

    References:
      Peng et al., 2019, §3; see :func:`distill_jax.losses.correlation_congruence`.
    """

    def loss(student, teacher, *, labels, where):
        return losses.correlation_congruence(
            student, teacher, kernel=kernel, gamma=gamma, order=order, where=where
        )

    return _embedded(features, loss)


def ickd(*, normalize: bool = True) -> Learned:
    """Inter-channel correlation, with a linear map of the student's channels where they are unequal.

    Args:
      normalize: as in :func:`distill_jax.losses.ickd`.

    Note:
      The authors' code always maps the student's channels, and follows with BatchNorm; the division by
      the rows' lengths makes most of the latter's work unnecessary.

    References:
      Liu et al., 2021, §3.2; see :func:`distill_jax.losses.ickd`.
    """

    def init(key, student_shapes, teacher_shapes):
        return map_init(key, student_shapes, teacher_shapes, always=False)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        check_layers(student_features, teacher_features)
        values = []
        for i, (s, t) in enumerate(zip(student_features, teacher_features, strict=True)):
            if f"layer{i}" in params:
                s = dense(params[f"layer{i}"], clear(s, example_mask(where, jnp.shape(s)[0])))
            values.append(losses.ickd(s, t, normalize=normalize, where=where))
        return sum_layers(values)

    return Learned(init, apply)


def info_nce(
    *, features: int = 128, temperature: float = 0.07, symmetric: bool = False, other_classes: bool = False
) -> Learned:
    """Contrastive distillation within the batch, of linear embeddings of pooled features.

    Args:
      features: the width of the embeddings.
      temperature: as in :func:`distill_jax.losses.info_nce`.
      symmetric: as there.
      other_classes: whether ``apply`` takes its negatives from other classes only, by its ``labels``.

    References:
      van den Oord et al., 2018, Eq. 4; see :func:`distill_jax.losses.info_nce`.
    """

    def loss(student, teacher, *, labels, where):
        if other_classes and labels is None:
            raise ValueError("other_classes=True needs the batch's labels: give apply labels=")
        return losses.info_nce(
            student,
            teacher,
            labels if other_classes else None,
            temperature=temperature,
            symmetric=symmetric,
            where=where,
        )

    return _embedded(features, loss)


class LearnedWithState(NamedTuple):
    """A distillation loss with parameters, and with a state that is not trained.

    Attributes:
      init: ``(key, student_shapes, teacher_shapes) -> params``, as of
        :class:`distill_jax.features.Learned`.
      init_state: ``(key, *, examples) -> state``, a pytree of arrays.
      apply: ``(params, state, student_features, teacher_features, ids, *, key, labels=None,
        where=None) -> (values, state)``.
    """

    init: Callable[[jax.Array, Sequence[Shape], Sequence[Shape]], Params]
    init_state: Callable[..., Any]
    apply: Callable[..., tuple[jax.Array, Any]]


def crd(
    *,
    features: int = 128,
    negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
    axis_name: str | None = None,
) -> LearnedWithState:
    """Contrastive representation distillation, of linear embeddings of pooled features of one layer.

    The state, a :class:`distill_jax.losses.CRDState`, belongs where a model's BatchNorm statistics do:
    in the ``model_state`` of the train state, say as ``{"student": …, "crd": …}``. The ``loss_fn``
    takes it from there, gives it to ``apply`` and returns the new one. The batch must carry ``ids``,
    its examples' places in the training set.

    Args:
      features: the width of the embeddings.
      negatives: how many an example.
      temperature: as in :func:`distill_jax.losses.crd`.
      momentum: as there.
      axis_name: as there; without it the parts' memories would be averaged, and belong to none.

    Returns:
      A :class:`LearnedWithState`. ``apply``'s ``key`` draws the negatives; its ``labels``, if given,
      are those of the *whole training set*, ``[examples]``, and negatives are then of other classes.

    References:
      Tian et al., 2020; see :func:`distill_jax.losses.crd`.
    """
    embed = _embedded(features, lambda student, teacher, **_: (student, teacher))

    def init(key, student_shapes, teacher_shapes):
        _check_one(student_shapes, teacher_shapes)
        return embed.init(key, student_shapes, teacher_shapes)

    def init_state(key, *, examples):
        return losses.crd_init(key, examples, features)

    def apply(params, state, student_features, teacher_features, ids, *, key, labels=None, where=None):
        _check_one(student_features, teacher_features)
        ((student, teacher),) = _embeddings(params, student_features, teacher_features, where)
        examples = state.student.shape[0]
        drawn = losses.crd_negatives(key, ids, examples=examples, count=negatives, labels=labels)
        return losses.crd(
            student,
            teacher,
            state,
            ids,
            drawn,
            temperature=temperature,
            momentum=momentum,
            where=where,
            axis_name=axis_name,
        )

    return LearnedWithState(init, init_state, apply)


def _check_one(student: Sequence[Any], teacher: Sequence[Any]) -> None:
    if len(student) != 1 or len(teacher) != 1:
        raise ValueError(
            f"crd takes one layer of each network, got {len(student)} and {len(teacher)}: give each "
            "layer a pair and a state of its own"
        )


def _without_params(loss: Callable[..., jax.Array]) -> Learned:
    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes)
        return {}

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del params, labels, key
        check_layers(student_features, teacher_features)
        pairs = zip(student_features, teacher_features, strict=True)
        return sum_layers(loss(s, t, where=where) for s, t in pairs)

    return Learned(init, apply)


def _embedded(features: int, loss: Callable[..., Any]) -> Learned:
    """A loss of linear embeddings of pooled features: one for the student, one for the teacher."""

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes)
        params = {}
        for i, (s, t) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i))
            params[f"layer{i}"] = {
                "student": dense_init(keys[0], s[-1], features),
                "teacher": dense_init(keys[1], t[-1], features),
            }
        return params

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del key
        pairs = _embeddings(params, student_features, teacher_features, where)
        return sum_layers(loss(s, t, labels=labels, where=where) for s, t in pairs)

    return Learned(init, apply)


def _embeddings(
    params: Params, student_features: Any, teacher_features: Any, where: Any
) -> list[tuple[jax.Array, jax.Array]]:
    check_layers(student_features, teacher_features)

    def embed(part, x):
        counted = clear(x, example_mask(where, jnp.shape(x)[0]))
        return dense(part, pool_mean(to_float(counted), ()))

    return [
        (embed(params[f"layer{i}"]["student"], s), embed(params[f"layer{i}"]["teacher"], t))
        for i, (s, t) in enumerate(zip(student_features, teacher_features, strict=True))
    ]

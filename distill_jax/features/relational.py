"""Relation and contrastive methods for any two networks: RKD, and those with embeddings of their own.

Each builder returns a :class:`~distill_jax.features.Learned` whose values are added up over the matched
layers. ``where`` in ``apply`` is None or bool ``[batch]``. Losses that need no parameters, such as
``losses.pkt`` and ``losses.similarity_preserving``, become methods by
:func:`~distill_jax.features.relation`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax._model import PyTree
from distill_jax.features._layers import (
    check_layers,
    clear,
    dense,
    dense_init,
    init_layers,
    init_maps,
    over_pairs,
    sum_layers,
)
from distill_jax.features.learned import Learned, LearnedWithState
from distill_jax.features.projection import relation
from distill_jax.losses._arguments import to_float
from distill_jax.losses._space import example_mask, pool_mean


def rkd(
    *, distance: float = 1.0, angle: float = 2.0, pool: bool = True, include_self: bool = False
) -> Learned:
    """Relational knowledge distillation (RKD): distance·``rkd_distance`` + angle·``rkd_angle``.

    It has no parameters.

    Args:
      distance: weight of the distances; RepDistiller has 25.
      angle: weight of the angles. The paper takes twice the weight of the distances; RepDistiller has 50.
      pool: whether feature maps are first averaged over positions, as the last features of an image
        model usually are; otherwise they are flattened.
      include_self: whether pairs of an example with itself count in the means.

    Returns:
      The method.

    References:
      Park et al., `Relational Knowledge Distillation`, 2019, §3.2 and §4.
    """

    def loss(student, teacher, *, where):
        options = {"include_self": include_self, "where": where}
        return distance * losses.rkd_distance(student, teacher, **options) + (
            angle * losses.rkd_angle(student, teacher, **options)
        )

    return relation(loss, pool=pool)


def correlation_congruence(
    *, features: int = 128, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2
) -> Learned:
    """Correlation congruence (CC): ``losses.correlation_congruence`` of linear embeddings.

    Each network's features are averaged over positions and mapped to an embedding by a linear map of
    its own. The teacher's map is trained too, like in the reference implementations. Alone, the loss has a
    trivial minimum, where all embeddings are alike: use it together with a loss on the logits.

    Args:
      features: width of the embeddings.
      kernel: ``"gaussian"`` or ``"bilinear"``.
      gamma: γ > 0 of the Gaussian kernel.
      order: highest power of the Gaussian's Taylor series, at least 1.

    Returns:
      The method.

    References:
      Peng et al., `Correlation Congruence for Knowledge Distillation`, 2019, §3.
    """

    def loss(student, teacher, *, labels, where):
        return losses.correlation_congruence(
            student, teacher, kernel=kernel, gamma=gamma, order=order, where=where
        )

    return _embedded(features, loss)


def ickd(*, normalise: bool = True) -> Learned:
    """Inter-channel correlation (ICKD): ``losses.ickd`` after a linear map where channels differ.

    Args:
      normalise: whether the rows of the correlation matrices are divided by their length.

    Returns:
      The method.

    Note:
      The authors' code always maps the student's channels, and adds BatchNorm. Dividing the rows by
      their length has most of the effect of that BatchNorm.

    References:
      Liu et al., `Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation`,
      2021, §3.2.
    """

    def init(key, student_shapes, teacher_shapes):
        return init_maps(key, student_shapes, teacher_shapes, always=False)

    def value(params, student, teacher, where):
        if params is not None:
            student = dense(params, clear(student, where))
        return losses.ickd(student, teacher, normalise=normalise, where=where)

    return over_pairs(init, value)


def info_nce(
    *, features: int = 128, temperature: float = 0.07, symmetric: bool = False, other_classes: bool = False
) -> Learned:
    """Contrastive distillation within the batch: ``losses.info_nce`` of linear embeddings.

    Each network's features are averaged over positions and mapped to an embedding by a linear map of
    its own; both maps are trained.

    Args:
      features: width of the embeddings.
      temperature: τ > 0, by which the cosines are divided.
      symmetric: whether to average the loss with the one in which the teacher's embeddings choose among
        the student's.
      other_classes: whether negatives come from other classes only; then ``apply`` needs ``labels``.

    Returns:
      The method.

    Raises:
      ValueError: from ``apply``, if ``other_classes`` is set and no labels are given.

    References:
      van den Oord et al., `Representation Learning with Contrastive Predictive Coding`, 2018, Eq. 4.
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


def crd(
    *,
    features: int = 128,
    negatives: int = 16384,
    temperature: float = 0.07,
    momentum: float = 0.5,
    axis_name: str | None = None,
) -> LearnedWithState:
    """Contrastive representation distillation (CRD): ``losses.crd`` of linear embeddings of one layer.

    Keep its state, a :class:`distill_jax.losses.CRDState`, where a model's BatchNorm statistics are: in
    the model's ``state``, for instance as ``{"student": …, "crd": …}``. The ``loss_fn`` passes it to
    ``apply`` and returns the new one. The batch must contain the examples' places in the training set.

    Args:
      features: width of the embeddings.
      negatives: number of negatives per example.
      temperature: τ > 0, by which the cosines are divided.
      momentum: share of the old value when an entry of the memory is updated, in [0, 1].
      axis_name: name of the mapped axis over which a batch is spread (``pmap``, ``shard_map``); all
        devices then keep the same memory.

    Returns:
      A :class:`LearnedWithState`. ``apply`` draws the negatives from ``key``; its ``labels``, if given,
      are those of the *whole training set*, ``[examples]``, and negatives then come from other classes.

    References:
      Tian et al., `Contrastive Representation Distillation`, 2020.
    """

    def init(key, student_shapes, teacher_shapes):
        _check_one(student_shapes, teacher_shapes)
        return _init_embeddings(features, key, student_shapes, teacher_shapes)

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
            f"crd takes one layer of each network, got {len(student)} and {len(teacher)}: build one crd, "
            "with its own state, per pair of layers"
        )


def _embedded(features: int, loss: Callable[..., jax.Array]) -> Learned:
    """Makes a method of a loss between linear embeddings of pooled features, one map per network."""

    def init(key, student_shapes, teacher_shapes):
        return _init_embeddings(features, key, student_shapes, teacher_shapes)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        pairs = _embeddings(params, student_features, teacher_features, where)
        return sum_layers(loss(s, t, labels=labels, where=where) for s, t in pairs)

    return Learned(init, apply)


def _init_embeddings(features: int, key: jax.Array, student_shapes: Any, teacher_shapes: Any) -> PyTree:
    def init_layer(key, s, t):
        keys = jax.random.split(key)
        return {
            "student": dense_init(keys[0], s[-1], features),
            "teacher": dense_init(keys[1], t[-1], features),
        }

    return init_layers(key, student_shapes, teacher_shapes, init_layer)


def _embeddings(
    params: PyTree, student_features: Any, teacher_features: Any, where: Any
) -> list[tuple[jax.Array, jax.Array]]:
    check_layers(student_features, teacher_features)

    def embed(part, x):
        counted = clear(x, example_mask(where, jnp.shape(x)[0]))
        return dense(part, pool_mean(to_float(counted), ()))

    return [
        (embed(params[f"layer{i}"]["student"], s), embed(params[f"layer{i}"]["teacher"], t))
        for i, (s, t) in enumerate(zip(student_features, teacher_features, strict=True))
    ]

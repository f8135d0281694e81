"""Feature methods whose loss holds a small network: ReviewKD, SimKD, MGD, SemCKD.

As in :mod:`distill_jax.features.methods`, features may be of any shapes. The networks have biases
and no BatchNorm, where the authors' have: a learned part holds no state, and one example's value
does not depend on the others of its batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.features.learned import Learned
from distill_jax.features.projection import (
    align,
    check_layers,
    clear,
    conv,
    conv_init,
    dense,
    dense_init,
    example_mask,
    map_channels,
    map_init,
    sum_layers,
)
from distill_jax.losses._numerics import check_fraction, check_positive
from distill_jax.losses._space import common_space, direction, features_of, pool_mean, total

Array = jax.Array


def _to_space(x: Array, space: Sequence[int]) -> Array:
    """Features at another spatial shape: the nearest position, or all through their mean."""
    if x.shape[1:-1] == tuple(space):
        return x
    if len(space) == x.ndim - 2:
        return jax.image.resize(x, (x.shape[0], *space, x.shape[-1]), "nearest")
    x = pool_mean(x, ()).reshape(x.shape[0], *(1,) * len(space), x.shape[-1])
    return jnp.broadcast_to(x, (x.shape[0], *space, x.shape[-1]))


def review_kd(*, width: int = 512, levels: tuple[int, ...] = (4, 2, 1)) -> Learned:
    """Knowledge review: :func:`distill_jax.losses.hierarchical_context` of features fused downwards.

    From the deepest layer to the shallowest, attention-based fusion (ABF) mixes a student's layer
    with what was fused of the deeper ones: a linear map to ``width`` channels, two attention maps,
    a convolution to the teacher's channels. ``where`` must be ``[batch]``. The paper raises the
    weight of this loss over the first epochs; so may the ``loss_fn``.

    Args:
      width: the greatest width of the fused features; it is the deepest student layer's if smaller.
      levels: as in the loss.

    Raises:
      ValueError: if ``width`` is not positive.

    References:
      Chen et al., `Distilling Knowledge via Knowledge Review`, 2021, §3.3 (ABF) and §3.4 (HCL).
    """
    check_positive("width", width)

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes)
        middle = min(width, student_shapes[-1][-1])
        params: dict[str, Any] = {}
        for i, (s, t) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            params[f"layer{i}"] = {
                "enter": dense_init(keys[0], s[-1], middle),
                "leave": conv_init(keys[1], len(t) - 2, middle, t[-1]),
            }
            if i < len(student_shapes) - 1:
                params[f"layer{i}"]["attend"] = dense_init(keys[2], 2 * middle, 2)
        return params

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        check_layers(student_features, teacher_features)
        where = example_mask(where, jnp.shape(student_features[0])[0])
        values, deeper = [], None
        for i in reversed(range(len(student_features))):
            part = params[f"layer{i}"]
            target = clear(teacher_features[i], where)
            x = dense(part["enter"], clear(student_features[i], where))
            if deeper is not None:
                deeper = _to_space(deeper, x.shape[1:-1])
                attention = jax.nn.sigmoid(dense(part["attend"], jnp.concatenate([x, deeper], axis=-1)))
                x = x * attention[..., :1] + deeper * attention[..., 1:]
            deeper = _to_space(x, target.shape[1:-1])
            fused = conv(part["leave"], deeper)
            values.append(losses.hierarchical_context(fused, target, levels=levels, where=where))
        return sum_layers(values)

    return Learned(init, apply)


def simkd(*, factor: int = 2, rectify: bool = False) -> Learned:
    """SimKD: the mean squared error of the student's last features, projected, to the teacher's.

    The projector has a bottleneck: a linear map to 1/``factor`` of the teacher's channels, a
    convolution, a linear map to the teacher's channels, with ReLUs between. The student is then
    used *with* the projector and the teacher's classifier on what :func:`simkd_features` returns.
    Both maps meet at the smaller size.

    Args:
      factor: how many times the bottleneck is narrower than the teacher.
      rectify: a ReLU at the end too, as in the authors' program, for a teacher's features ≥ 0.

    Raises:
      ValueError: if ``factor`` is not positive.

    References:
      Chen et al., `Knowledge Distillation with the Reused Teacher Classifier`, 2022, Eq. 2.
    """
    check_positive("factor", factor)

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes)
        params = {}
        for i, (s, t) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
            middle, rank = max(1, t[-1] // factor), len(common_space(s, t))
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            params[f"layer{i}"] = {
                "enter": dense_init(keys[0], s[-1], middle),
                "middle": conv_init(keys[1], rank, middle, middle),
                "leave": dense_init(keys[2], middle, t[-1]),
            }
        return params

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        return sum_layers(
            losses.hint(
                _bottleneck(params[layer.name], layer.student, layer.where, rectify),
                layer.teacher,
                where=layer.where,
            )
            for layer in align(student_features, teacher_features, where)
        )

    return Learned(init, apply)


def _bottleneck(params: Any, x: Array, where: Array | None, rectify: bool) -> Array:
    for name, layer in (("enter", dense), ("middle", conv)):
        x = jax.nn.relu(layer(params[name], x))
        x = x if where is None else jnp.where(where[..., None], x, 0.0)
    x = dense(params["leave"], x)
    return jax.nn.relu(x) if rectify else x


def simkd_features(
    params: Any, features: Any, teacher_shape: Sequence[int], *, rectify: bool = False
) -> Array:
    """What the teacher's classifier is given of a student trained by :func:`simkd`.

    Args:
      params: of one layer, such as ``params["layer0"]``.
      features: the student's, ``[batch, *spatial, channels]``.
      teacher_shape: the shape of the teacher's features, ``(batch, *spatial, channels)``.
      rectify: as it was in :func:`simkd`.

    Returns:
      ``[batch, teacher's channels]``, the mean over positions, for the teacher's classifier.

    References:
      Chen et al., `Knowledge Distillation with the Reused Teacher Classifier`, 2022, §3.2.

    >>> part = simkd()
    >>> params = part.init(jax.random.key(0), [(1, 8, 8, 3)], [(1, 4, 4, 6)])
    >>> simkd_features(params["layer0"], jnp.ones((2, 8, 8, 3)), (1, 4, 4, 6)).shape
    (2, 6)
    """
    x = features_of("student", features)
    x = pool_mean(x, common_space(x.shape, teacher_shape))
    return pool_mean(_bottleneck(params, x, None, rectify), ())


def mgd(*, masked: float = 0.15, mask: str | None = None, mean: bool = False) -> Learned:
    """Masked generative distillation: Σ (t − G(m·s))², the teacher's features made from a part of s.

    m drops positions or channels of the student's features at random, after a linear map to the
    teacher's channels where they differ; G is two convolutions with a ReLU between. ``apply`` takes
    ``key=``, from which the masks are drawn, or ``masks=``, a list of arrays broadcastable to the
    mapped features, one a layer.

    Args:
      masked: λ in [0, 1], the probability that a position or channel is dropped.
      mask: ``"positions"``, as in the paper, or ``"channels"``, as in the authors' program for
        classification; None for positions, and channels where a layer has no space.
      mean: the mean over positions and channels instead of the sum.

    Raises:
      ValueError: if ``masked`` is outside [0, 1] or ``mask`` is unknown; from ``apply``, without a
        key and masks.

    References:
      Yang et al., `Masked Generative Distillation`, 2022, Eqs. 2 to 4 (with a weight α).
    """
    check_fraction("masked", masked)
    if mask not in (None, "positions", "channels"):
        raise ValueError(f"mask must be None, 'positions' or 'channels', got {mask!r}")

    def init(key, student_shapes, teacher_shapes):
        key, map_key = jax.random.split(key)
        params = map_init(map_key, student_shapes, teacher_shapes, always=False)
        generators = {}
        for i, (s, t) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
            keys = jax.random.split(jax.random.fold_in(key, i), 2)
            rank = len(common_space(s, t))
            generators[f"layer{i}"] = {
                name: conv_init(k, rank, t[-1], t[-1])
                for name, k in zip(("first", "second"), keys, strict=True)
            }
        return {"map": params, "generate": generators}

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None, masks=None):
        del labels
        layers = align(student_features, teacher_features, where)
        if masks is None and key is None:
            raise ValueError("mgd draws its masks from a key: give apply key=, or masks=")
        if masks is not None and len(masks) != len(layers):
            raise ValueError(f"masks must be one a layer, {len(layers)}, got {len(masks)}")
        values = []
        for i, layer in enumerate(layers):
            x = map_channels(params["map"], layer)
            if masks is None:
                by_channel = mask == "channels" or (mask is None and x.ndim == 2)
                rank = x.ndim - 2
                shape = (x.shape[0], *(1,) * rank, x.shape[-1]) if by_channel else (*x.shape[:-1], 1)
                kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - masked, shape)
            else:
                kept = jnp.asarray(masks[i])
            part, valid = params["generate"][layer.name], layer.where[..., None]
            x = jax.nn.relu(conv(part["first"], x * kept))
            x = conv(part["second"], jnp.where(valid, x, 0.0))
            squares = jnp.where(valid, jnp.square(layer.teacher - x), 0.0)
            values.append(total(squares, layer.where, mean))
        return sum_layers(values)

    return Learned(init, apply)


def semckd(*, width: int = 64, temperature: float = 1.0) -> Learned:
    """Semantic calibration: every student layer regresses every teacher layer, weighted by attention.

    1/S · Σ_i Σ_j a_ij·mean (P_ij(s_i) − t_j)²: a_i is the softmax over teacher layers of q_i·k_j/τ,
    where a query and a key are learned directions made from the pooled features of *one* example;
    P_ij is a linear map. The student's and the teacher's layers may differ in number. The authors
    make queries and keys from rows of the batch's similarity matrix, so that theirs work for one
    batch size only, and P_ij of three convolutions. ``where`` must be ``[batch]``.

    Args:
      width: the number of entries of queries and keys.
      temperature: τ > 0.

    Raises:
      ValueError: if an argument is not positive.

    References:
      Chen et al., `Cross-Layer Distillation with Semantic Calibration`, 2021, Eqs. 4 to 7.
    """
    check_positive("width", width)
    check_positive("temperature", temperature)

    def init(key, student_shapes, teacher_shapes):
        keys = jax.random.split(key, 3)
        params: dict[str, Any] = {"query": {}, "key": {}, "map": {}}
        for i, s in enumerate(student_shapes):
            params["query"][f"layer{i}"] = dense_init(jax.random.fold_in(keys[0], i), s[-1], width)
            for j, t in enumerate(teacher_shapes):
                map_key = jax.random.fold_in(jax.random.fold_in(keys[2], i), j)
                params["map"][f"layer{i}to{j}"] = dense_init(map_key, s[-1], t[-1])
        for j, t in enumerate(teacher_shapes):
            params["key"][f"layer{j}"] = dense_init(jax.random.fold_in(keys[1], j), t[-1], width)
        return params

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        where = example_mask(where, jnp.shape(student_features[0])[0])
        students = [clear(x, where) for x in student_features]
        teachers = [clear(x, where) for x in teacher_features]
        queries, keys = (
            jnp.stack(
                [
                    direction(dense(params[kind][f"layer{i}"], direction(pool_mean(x, ()), 1)), 1)
                    for i, x in enumerate(features)
                ],
                axis=1,
            )
            for kind, features in (("query", students), ("key", teachers))
        )
        scores = jnp.einsum("niw,njw->nij", queries, keys, precision=jax.lax.Precision.HIGHEST)
        attention = jax.nn.softmax(scores / temperature)
        value: Any = 0.0
        for i, s in enumerate(students):
            for j, t in enumerate(teachers):
                layer = align([s], [t], where)[0]
                mapped = dense(params["map"][f"layer{i}to{j}"], layer.student)
                error = losses.hint(mapped, layer.teacher, where=where)
                value += attention[:, i, j] * error
        return value / len(students)

    return Learned(init, apply)

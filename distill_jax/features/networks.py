"""Feature methods that train a small network of their own: ReviewKD, SimKD, MGD, SemCKD.

Features may be of any shapes, see :mod:`distill_jax.features.methods`. The small networks have biases
where the authors' have BatchNorm: so a method has no state, and the value of one example does not depend
on the other examples in the batch.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax._checks import check_count, check_fraction, check_positive
from distill_jax._model import PyTree
from distill_jax.features._layers import (
    align,
    check_layers,
    clear,
    conv,
    conv_init,
    dense,
    dense_init,
    init_layers,
    init_maps,
    map_channels,
    over_aligned,
    sum_layers,
)
from distill_jax.features.learned import Learned
from distill_jax.losses._space import common_space, direction, example_mask, features_of, pool_mean, total

Array = jax.Array


def _to_space(x: Array, space: Sequence[int]) -> Array:
    """Brings features to another spatial shape: by the nearest position, or all positions by their mean."""
    if x.shape[1:-1] == tuple(space):
        return x
    if len(space) == x.ndim - 2:
        return jax.image.resize(x, (x.shape[0], *space, x.shape[-1]), "nearest")
    x = pool_mean(x, ()).reshape(x.shape[0], *(1,) * len(space), x.shape[-1])
    return jnp.broadcast_to(x, (x.shape[0], *space, x.shape[-1]))


def review_kd(*, width: int = 512, levels: tuple[int, ...] = (4, 2, 1)) -> Learned:
    """Knowledge review (ReviewKD): ``losses.hierarchical_context`` of layers fused from deep to shallow.

    From the deepest layer to the shallowest, attention-based fusion (ABF) mixes a layer of the student
    with the result of the deeper ones: a linear map to ``width`` channels, two attention maps, and a
    convolution to the teacher's channels. ``where`` must be ``[batch]``. The paper raises the weight of
    this loss over the first epochs; use a schedule as its weight to do the same.

    Args:
      width: greatest number of channels of the fused features; the deepest student layer's number of
        channels is used if it is smaller.
      levels: resolutions to which features are pooled for comparison, after the full one.

    Returns:
      The method.

    Raises:
      ValueError: if ``width`` is not positive.

    References:
      Chen et al., `Distilling Knowledge via Knowledge Review`, 2021, §3.3 (ABF) and §3.4 (HCL).
    """
    check_count("width", width)

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes)
        middle = min(width, student_shapes[-1][-1])

        def init_layer(key, s, t):
            keys = jax.random.split(key, 3)
            return {
                "enter": dense_init(keys[0], s[-1], middle),
                "leave": conv_init(keys[1], len(t) - 2, middle, t[-1]),
                "attend": dense_init(keys[2], 2 * middle, 2),
            }

        params = init_layers(key, student_shapes, teacher_shapes, init_layer)
        del params[f"layer{len(student_shapes) - 1}"]["attend"]  # nothing is deeper than the deepest
        return params

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
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
    """SimKD: ``losses.hint`` between the student's last features, projected, and the teacher's.

    The projector has a bottleneck: a linear map to 1/``factor`` of the teacher's channels, a
    convolution, and a linear map to the teacher's channels, with ReLUs between them. After training, the
    student is used *with* the projector and the teacher's classifier, which takes what
    :func:`simkd_features` returns. Both maps are compared at the smaller spatial size.

    Args:
      factor: how many times narrower the bottleneck is than the teacher's features.
      rectify: whether a ReLU ends the projector. The authors' program has one; it suits teachers whose
        features are never negative.

    Returns:
      The method.

    Raises:
      ValueError: if ``factor`` is not positive.

    References:
      Chen et al., `Knowledge Distillation with the Reused Teacher Classifier`, 2022, Eq. 2.
    """
    check_count("factor", factor)

    def init_layer(key, s, t):
        middle, rank = max(1, t[-1] // factor), len(common_space(s, t))
        keys = jax.random.split(key, 3)
        return {
            "enter": dense_init(keys[0], s[-1], middle),
            "middle": conv_init(keys[1], rank, middle, middle),
            "leave": dense_init(keys[2], middle, t[-1]),
        }

    def value(params, layer):
        projected = _bottleneck(params[layer.name], layer.student, layer.where, rectify)
        return losses.hint(projected, layer.teacher, where=layer.where)

    return over_aligned(functools.partial(init_layers, init=init_layer), value)


def _bottleneck(params: PyTree, x: Array, where: Array | None, rectify: bool) -> Array:
    for name, layer in (("enter", dense), ("middle", conv)):
        x = jax.nn.relu(layer(params[name], x))
        x = x if where is None else jnp.where(where[..., None], x, 0.0)
    x = dense(params["leave"], x)
    return jax.nn.relu(x) if rectify else x


def simkd_features(
    params: PyTree, features: ArrayLike, teacher_shape: Sequence[int], *, rectify: bool = False
) -> Array:
    """Computes the input of the teacher's classifier from a student trained by :func:`simkd`.

    Args:
      params: the projector's parameters for one layer, such as ``params["layer0"]``.
      features: the student's features, ``[batch, *spatial, channels]``.
      teacher_shape: the shape of the teacher's features, ``(batch, *spatial, channels)``.
      rectify: the value that :func:`simkd` was given.

    Returns:
      The mean over positions, ``[batch, teacher's channels]``.

    References:
      Chen et al., `Knowledge Distillation with the Reused Teacher Classifier`, 2022, §3.2.

    >>> learned = simkd()
    >>> params = learned.init(jax.random.key(0), [(1, 8, 8, 3)], [(1, 4, 4, 6)])
    >>> simkd_features(params["layer0"], jnp.ones((2, 8, 8, 3)), (1, 4, 4, 6)).shape
    (2, 6)
    """
    x = features_of("student", features)
    x = pool_mean(x, common_space(x.shape, teacher_shape))
    return pool_mean(_bottleneck(params, x, None, rectify), ())


def mgd(*, masked: float = 0.15, mask: str | None = None, mean: bool = False) -> Learned:
    """Masked generative distillation (MGD): Σ (t − G(m·s))², the teacher's features from a part of s.

    The mask m drops positions or channels of the student's features at random, after a linear map to
    the teacher's channels where their numbers differ. The generator G is two convolutions with a ReLU
    between them. ``apply`` draws the masks from ``key``, or takes them as ``masks``: a list with one
    array per layer, broadcastable to the mapped features.

    Args:
      masked: λ in [0, 1], the probability that a position or channel is dropped.
      mask: ``"positions"`` drops positions, like the paper, and ``"channels"`` drops channels, like the
        authors' program for classification. None drops positions, or channels where a layer has no space.
      mean: whether to average over positions and channels instead of adding up.

    Returns:
      The method.

    Raises:
      ValueError: if ``masked`` is outside [0, 1] or ``mask`` is unknown; from ``apply``, without a
        key and masks.

    References:
      Yang et al., `Masked Generative Distillation`, 2022, Eqs. 2 to 4 (with a weight α).
    """
    check_fraction("masked", masked)
    if mask not in (None, "positions", "channels"):
        raise ValueError(f"mask must be None, 'positions' or 'channels', got {mask!r}")

    def init_generator(key, s, t):
        first, second = jax.random.split(key, 2)
        rank = len(common_space(s, t))
        return {
            "first": conv_init(first, rank, t[-1], t[-1]),
            "second": conv_init(second, rank, t[-1], t[-1]),
        }

    def init(key, student_shapes, teacher_shapes):
        key, map_key = jax.random.split(key)
        return {
            "map": init_maps(map_key, student_shapes, teacher_shapes, always=False),
            "generate": init_layers(key, student_shapes, teacher_shapes, init_generator),
        }

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None, masks=None):
        layers = align(student_features, teacher_features, where)
        if masks is None and key is None:
            raise ValueError("mgd draws its masks from a key: give apply key=, or masks=")
        if masks is not None and len(masks) != len(layers):
            raise ValueError(f"masks must have one entry per layer, {len(layers)} in all, got {len(masks)}")
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
    """Semantic calibration (SemCKD): each student layer learns from all teacher layers, by attention.

    1/S · Σ_i Σ_j a_ij·mean (P_ij(s_i) − t_j)² over S student layers i and all teacher layers j. a_i is
    the softmax over teacher layers of q_i·k_j/τ, where the query q_i and the key k_j are learned
    directions, computed from the pooled features of *one* example; P_ij is a linear map. The number of
    layers may differ between student and teacher. The authors compute queries and keys from rows of the
    batch's similarity matrix, which fixes the batch size, and their P_ij has three convolutions.
    ``where`` must be ``[batch]``.

    Args:
      width: number of entries of queries and keys.
      temperature: τ > 0.

    Returns:
      The method.

    Raises:
      ValueError: if an argument is not positive.

    References:
      Chen et al., `Cross-Layer Distillation with Semantic Calibration`, 2021, Eqs. 4 to 7.
    """
    check_count("width", width)
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

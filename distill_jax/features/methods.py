"""Feature distillation methods with parameters or steps of their own, for any two networks.

Each builder returns a :class:`~distill_jax.features.Learned`. Its ``apply`` takes lists of the student's
and the teacher's features, one entry per matched layer, from shallow to deep; they may be convolutional
``[batch, *spatial, channels]`` or flat ``[batch, channels]``, of different width and resolution. The
values of the layers are added without weights: to weight them, build one method per layer. The formulas
are in :mod:`distill_jax.losses`; a builder adds what the method needs around its loss.

``where`` in ``apply`` is None, bool ``[batch]`` for the examples that count, or, unless a builder says
otherwise, a list with one mask per layer, broadcastable to ``[batch, *spatial]``.
"""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax._checks import check_choice, check_positive
from distill_jax.features._layers import (
    align,
    check_layers,
    clear,
    dense,
    dense_init,
    init_layers,
    init_maps,
    map_channels,
    over_aligned,
    over_pairs,
    sum_layers,
)
from distill_jax.features.learned import Learned
from distill_jax.losses._measures import class_activation_maps
from distill_jax.losses._space import common_space, count, example_mask, features_of


def ofd(*, margin: Sequence[ArrayLike] | None = None, mean: bool = False) -> Learned:
    """Overhaul of feature distillation (OFD): ``losses.ofd`` after a linear map of the student's channels.

    Give layers *before* their activation. Every layer has a linear map (in the paper followed by
    BatchNorm), also where the numbers of channels agree.

    Args:
      margin: one per layer, a scalar or ``[channels]``, at most 0; None estimates them from each batch.
      mean: whether to average over positions and channels instead of adding up.

    Returns:
      The method.

    Raises:
      ValueError: from ``apply``, if there is not one margin per layer, or the shapes do not fit.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation`, 2019, §3.
    """

    def init(key, student_shapes, teacher_shapes):
        return init_maps(key, student_shapes, teacher_shapes, always=True)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        layers = align(student_features, teacher_features, where)
        if margin is not None and len(margin) != len(layers):
            raise ValueError(f"margin must have one entry per layer, {len(layers)} in all, got {len(margin)}")
        each = [None] * len(layers) if margin is None else margin
        return sum_layers(
            losses.ofd(map_channels(params, layer), layer.teacher, margin=m, mean=mean, where=layer.where)
            for m, layer in zip(each, layers, strict=True)
        )

    return Learned(init, apply)


def vid(*, mean: bool = False, initial_variance: float = 5.0, least_variance: float = 1e-5) -> Learned:
    """Variational information distillation (VID): ``losses.vid`` with a learned mean and variance.

    The mean μ is a linear map of the student's features (RepDistiller has three maps with ReLUs between
    them). The variance of a teacher's channel is softplus(α) + ``least_variance``, and α is trained
    together with the map. mdistiller gives α to no optimizer, so its variance never changes.

    Args:
      mean: whether to average over positions and channels instead of adding up.
      initial_variance: σ² at the start; RepDistiller's value is the default.
      least_variance: lower bound of σ², so that a constant channel cannot drive it to 0.

    Returns:
      The method.

    Raises:
      ValueError: unless initial_variance > least_variance > 0.

    References:
      Ahn et al., `Variational Information Distillation`, 2019, Eqs. 4 to 6.
    """
    check_positive("least_variance", least_variance)
    if not least_variance < initial_variance < math.inf:
        raise ValueError(
            f"initial_variance must be finite and above least_variance = {least_variance}, "
            f"got {initial_variance}"
        )
    spread = initial_variance - least_variance
    alpha = spread + math.log(-math.expm1(-spread))  # softplus⁻¹

    def init(key, student_shapes, teacher_shapes):
        params = init_maps(key, student_shapes, teacher_shapes, always=True)
        for i, shape in enumerate(teacher_shapes):
            params[f"layer{i}"]["alpha"] = jnp.full(shape[-1], alpha)
        return params

    def value(params, layer):
        variance = jax.nn.softplus(params[layer.name]["alpha"]) + least_variance
        mu = map_channels(params, layer)
        return losses.vid(mu, layer.teacher, variance=variance, mean=mean, where=layer.where)

    return over_aligned(init, value)


def factor_transfer(
    *, p: int = 1, mean: bool = False, rate: float = 0.5, reconstruction: float = 1.0
) -> Learned:
    """Factor transfer (FT): ``losses.factor_transfer`` between learned factors of both networks.

    A paraphraser compresses the teacher's channels to factors and learns from reconstruction alone. A
    translator makes factors of the student's features and learns from factor transfer alone. The paper
    trains the paraphraser first; here both are trained at the same time, and a stopped gradient keeps
    the factors from collapsing to something that is easy to match. Each is a linear map with a leaky
    ReLU of slope 0.1 (in the paper three convolutions).

    Args:
      p: the norm of the difference between factors, 1 or 2.
      mean: for p = 1, whether to average over positions and factors instead of adding up.
      rate: number of factors per teacher channel, the paper's k.
      reconstruction: weight of the paraphraser's mean squared error in the value.

    Returns:
      The method.

    Raises:
      ValueError: if ``rate`` is not positive.

    References:
      Kim, Park, Kwak, `Paraphrasing Complex Network`, 2018, Eqs. 1 and 3.
    """
    check_positive("rate", rate)
    activate = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)

    def init_layer(key, s, t):
        factors = math.ceil(rate * t[-1])
        keys = jax.random.split(key, 3)
        return {
            "translator": dense_init(keys[0], s[-1], factors),
            "paraphraser": dense_init(keys[1], t[-1], factors),
            "decoder": dense_init(keys[2], factors, t[-1]),
        }

    def value(params, layer):
        part = params[layer.name]
        factor = activate(dense(part["paraphraser"], layer.teacher))
        error = losses.hint(dense(part["decoder"], factor), layer.teacher, where=layer.where)
        translated = activate(dense(part["translator"], layer.student))
        target = jax.lax.stop_gradient(factor)
        transfer = losses.factor_transfer(translated, target, p=p, mean=mean, where=layer.where)
        return transfer + reconstruction * error

    return over_aligned(functools.partial(init_layers, init=init_layer), value)


def fsp(*, pool: str = "max", mean: bool = False) -> Learned:
    """Flow of solution procedure (FSP): ``losses.fsp`` between each layer and the next.

    This needs at least two layers. A linear map takes the student's channels to the teacher's where
    their numbers differ. Student and teacher may differ in space; a flat layer counts as one position,
    and a map next to a flat layer is averaged over all positions. ``where`` must be ``[batch]``.

    Args:
      pool: how two layers of different resolution are brought together, ``"max"`` or ``"mean"``.
      mean: whether to average over the matrix's entries instead of adding up.

    Returns:
      The method.

    Raises:
      ValueError: for another ``pool``, or fewer than two layers.

    References:
      Yim et al., `A Gift from Knowledge Distillation`, 2017, Eqs. 1 and 2.
    """
    check_choice("pool", pool, ("max", "mean"))

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes, least=2)
        return init_maps(key, student_shapes, teacher_shapes, always=False)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        check_layers(student_features, teacher_features, least=2)
        where = example_mask(where, jnp.shape(student_features[0])[0])
        mapped = [clear(x, where) for x in student_features]
        mapped = [dense(params[f"layer{i}"], x) if f"layer{i}" in params else x for i, x in enumerate(mapped)]
        pairs = zip(pairwise(mapped), pairwise(teacher_features), strict=True)
        return sum_layers(losses.fsp(s, t, pool=pool, mean=mean, where=where) for s, t in pairs)

    return Learned(init, apply)


def cat_kd(
    *, teacher_kernel: ArrayLike | None = None, resolution: int | None = 2, normalise: bool = True
) -> Learned:
    """Class attention transfer (CAT-KD): ``losses.cat_kd`` between class activation maps.

    Features with one channel per class are taken as class activation maps and compared as they are;
    this is the paper's method, and ``features.class_activation_maps`` makes such maps from a network's
    last features and its classifier. Otherwise a linear map of the student's channels takes the place
    of the classifier's kernel. Where there is only one position, as with flat layers, the scores are
    normalised over the classes. ``where`` must be ``[batch]``.

    Args:
      teacher_kernel: the kernel of the teacher's classifier, ``[channels, classes]``, which turns its
        features into class activation maps (in every layer given, so give only the last). It is a
        constant of the compiled program. None uses the teacher's channels as classes.
      resolution: number of positions along each axis to which the maps are pooled; None keeps them.
      normalise: whether each class's map is divided by its norm.

    Returns:
      The method.

    References:
      Guo et al., `Class Attention Transfer Based Knowledge Distillation`, 2023, §3.2.
    """

    def init(key, student_shapes, teacher_shapes):
        if teacher_kernel is not None:
            classes = jnp.shape(teacher_kernel)[1]
            teacher_shapes = [(*shape[:-1], classes) for shape in teacher_shapes]
        return init_maps(key, student_shapes, teacher_shapes, always=False)

    def value(params, student, teacher, where):
        s, t = clear(student, where), features_of("teacher", teacher)
        if teacher_kernel is not None:
            t = class_activation_maps(t, teacher_kernel)
        if params is not None:
            s = dense(params, s)
        size = resolution
        if count(common_space(s.shape, t.shape)) == 1:
            s, t = (x.mean(tuple(range(1, x.ndim - 1)))[..., None] for x in (s, t))
            size = None
        return losses.cat_kd(s, t, resolution=size, normalise=normalise, where=where)

    return over_pairs(init, value)

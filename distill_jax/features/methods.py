"""The feature methods for any two networks: each builds a :class:`~distill_jax.features.Learned` part.

Lists of a student's and a teacher's features, one entry a matched layer and from shallow to deep,
may be of any shapes: convolutional ``[batch, *spatial, channels]`` or flat ``[batch, channels]``,
of unequal width and resolution. The values of the layers are summed, unweighted: to weigh them,
build one part a layer. The formulas stand in :mod:`distill_jax.losses`; the builders here say what
is added to them. Methods with networks of their own are in :mod:`distill_jax.features.networks`.

``where`` in ``apply`` is None, ``[batch]`` for the examples that count, or, unless a builder says
otherwise, a list with a mask a layer, as in :func:`~distill_jax.features.align`.
"""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from distill_jax import losses
from distill_jax.features.learned import Learned
from distill_jax.features.projection import (
    align,
    check_layers,
    clear,
    dense,
    dense_init,
    example_mask,
    map_channels,
    map_init,
    project,
    project_maps,
    sum_layers,
)
from distill_jax.losses._numerics import check_positive
from distill_jax.losses._space import common_space, count, features_of


def hint(*, space: str = "pool", always: bool = False) -> Learned:
    """FitNets: :func:`distill_jax.losses.hint` after :func:`~distill_jax.features.project`.

    Args:
      space: ``"pool"`` or ``"resize"``. (The paper's regressor is a convolution whose size depends
        on both maps.)
      always: a linear map also between layers of one width.

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets`, 2015, Eq. 3.
    """
    return project(losses.hint, space=space, always=always)


def attention_transfer(*, p: float = 2.0, mean: bool = False) -> Learned:
    """Attention transfer: :func:`distill_jax.losses.attention_transfer`; maps meet at the smaller size.

    Without parameters between maps of more than one position. Where there is no space, as between
    flat layers, the attention is over units, by :func:`~distill_jax.features.project_maps`.

    Args:
      p: as in the loss.
      mean: as in the loss.

    References:
      Zagoruyko, Komodakis, `Paying More Attention to Attention`, 2017, Eq. 2.
    """
    return project_maps(functools.partial(losses.attention_transfer, p=p, mean=mean))


def nst(*, kernel: str = "polynomial", bandwidth: Any = None) -> Learned:
    """Neuron selectivity transfer: :func:`distill_jax.losses.nst`; maps meet at the smaller size.

    Without parameters between maps of more than one position. Where there is no space, the units
    take the place of positions, by :func:`~distill_jax.features.project_maps`.

    Args:
      kernel: as in the loss.
      bandwidth: as in the loss.

    References:
      Huang, Wang, `Like What You Like`, 2017, §4.
    """
    return project_maps(functools.partial(losses.nst, kernel=kernel, bandwidth=bandwidth))


def activation_boundary(*, margin: float = 1.0, mean: bool = False) -> Learned:
    """Activation boundaries: :func:`distill_jax.losses.activation_boundary` after a linear map.

    Give layers *before* their activation. The connector is linear at every layer, as in the paper
    (there with BatchNorm), also where the widths agree.

    Args:
      margin: as in the loss.
      mean: as in the loss.

    References:
      Heo et al., `Knowledge Transfer via Distillation of Activation Boundaries`, 2019.
    """
    check_positive("margin", margin)
    loss = functools.partial(losses.activation_boundary, margin=margin, mean=mean)
    return project(loss, always=True)


def ofd(*, margins: Sequence[Any] | None = None, mean: bool = False) -> Learned:
    """Overhaul of feature distillation: :func:`distill_jax.losses.ofd` after a linear map.

    Give layers *before* their activation. The connector is linear at every layer (in the paper
    followed by BatchNorm).

    Args:
      margins: one a layer, as the loss takes it; None estimates them from each batch.
      mean: as in the loss.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation`, 2019, §3.
    """

    def init(key, student_shapes, teacher_shapes):
        return map_init(key, student_shapes, teacher_shapes, always=True)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        layers = align(student_features, teacher_features, where)
        if margins is not None and len(margins) != len(layers):
            raise ValueError(f"margins must be one a layer, {len(layers)}, got {len(margins)}")
        each = [None] * len(layers) if margins is None else margins
        return sum_layers(
            losses.ofd(map_channels(params, layer), layer.teacher, margin=m, mean=mean, where=layer.where)
            for m, layer in zip(each, layers, strict=True)
        )

    return Learned(init, apply)


def vid(*, mean: bool = False, initial_variance: float = 5.0, least_variance: float = 1e-5) -> Learned:
    """Variational information distillation: :func:`distill_jax.losses.vid` with a learned variance.

    μ is a linear map of the student's features (RepDistiller: three, with ReLUs between); the
    variance of a teacher's channel is softplus(α) + least variance, with α trained beside the map.
    mdistiller hands α to no optimizer, so that its variance stays as it began.

    Args:
      mean: as in the loss.
      initial_variance: σ² at the start, as in RepDistiller.
      least_variance: its lower bound, below which a channel that is constant would draw it.

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
        params = map_init(key, student_shapes, teacher_shapes, always=True)
        for i, shape in enumerate(teacher_shapes):
            params[f"layer{i}"]["alpha"] = jnp.full(shape[-1], alpha)
        return params

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        values = []
        for layer in align(student_features, teacher_features, where):
            variance = jax.nn.softplus(params[layer.name]["alpha"]) + least_variance
            mu = map_channels(params, layer)
            values.append(losses.vid(mu, layer.teacher, variance=variance, mean=mean, where=layer.where))
        return sum_layers(values)

    return Learned(init, apply)


def factor_transfer(
    *, p: int = 1, mean: bool = False, rate: float = 0.5, reconstruction: float = 1.0
) -> Learned:
    """Factor transfer: :func:`distill_jax.losses.factor_transfer` of learned factors.

    A paraphraser compresses the teacher's channels to factors and is trained by reconstruction
    alone; a translator makes the student's factors, trained by factor transfer alone. The paper
    trains the paraphraser first; here both run side by side, kept apart by a stopped gradient, so
    that the factors cannot collapse to what is easy to match. Each is a linear map with a leaky
    ReLU of slope 0.1 (the paper: three convolutions).

    Args:
      p: as in the loss.
      mean: as in the loss.
      rate: factors per teacher channel, the paper's k.
      reconstruction: the weight of the paraphraser's mean squared error in the value.

    Raises:
      ValueError: if ``rate`` is not positive.

    References:
      Kim, Park, Kwak, `Paraphrasing Complex Network`, 2018, Eqs. 1 and 3.
    """
    check_positive("rate", rate)
    activate = functools.partial(jax.nn.leaky_relu, negative_slope=0.1)

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes)
        params = {}
        for i, (s, t) in enumerate(zip(student_shapes, teacher_shapes, strict=True)):
            factors = math.ceil(rate * t[-1])
            keys = jax.random.split(jax.random.fold_in(key, i), 3)
            params[f"layer{i}"] = {
                "translator": dense_init(keys[0], s[-1], factors),
                "paraphraser": dense_init(keys[1], t[-1], factors),
                "decoder": dense_init(keys[2], factors, t[-1]),
            }
        return params

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        values = []
        for layer in align(student_features, teacher_features, where):
            part = params[layer.name]
            factor = activate(dense(part["paraphraser"], layer.teacher))
            error = losses.hint(dense(part["decoder"], factor), layer.teacher, where=layer.where)
            translated = activate(dense(part["translator"], layer.student))
            target = jax.lax.stop_gradient(factor)
            transfer = losses.factor_transfer(translated, target, p=p, mean=mean, where=layer.where)
            values.append(transfer + reconstruction * error)
        return sum_layers(values)

    return Learned(init, apply)


def fsp(*, pool: str = "max", mean: bool = False) -> Learned:
    """Flow of solution procedure: :func:`distill_jax.losses.fsp` between each layer and the next.

    Needs at least two layers. A linear map takes the student's channels to the teacher's where they
    differ. Student and teacher need not meet in space; a flat layer is one position, and a map
    beside one is pooled globally. ``where`` must be ``[batch]``.

    Args:
      pool: as in the loss.
      mean: as in the loss.

    References:
      Yim et al., `A Gift from Knowledge Distillation`, 2017, Eqs. 1 and 2.
    """

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes, least=2)
        return map_init(key, student_shapes, teacher_shapes, always=False)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        check_layers(student_features, teacher_features, least=2)
        where = example_mask(where, jnp.shape(student_features[0])[0])
        mapped = [clear(x, where) for x in student_features]
        mapped = [dense(params[f"layer{i}"], x) if f"layer{i}" in params else x for i, x in enumerate(mapped)]
        pairs = zip(pairwise(mapped), pairwise(teacher_features), strict=True)
        return sum_layers(losses.fsp(s, t, pool=pool, mean=mean, where=where) for s, t in pairs)

    return Learned(init, apply)


def cka(*, debiased: bool = False) -> Learned:
    """Centred kernel alignment: :func:`distill_jax.losses.cka`, 1 − CKA; without parameters.

    Features of any shapes are compared as they are. ``where`` must be ``[batch]``.

    Args:
      debiased: as in the loss.

    References:
      Kornblith et al., `Similarity of Neural Network Representations Revisited`, 2019, §3.
    """

    def init(key, student_shapes, teacher_shapes):
        check_layers(student_shapes, teacher_shapes)
        return {}

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del params, labels, key
        check_layers(student_features, teacher_features)
        where = example_mask(where, jnp.shape(student_features[0])[0])
        return sum_layers(
            losses.cka(s, t, debiased=debiased, where=where)
            for s, t in zip(student_features, teacher_features, strict=True)
        )

    return Learned(init, apply)


def cat_kd(*, teacher_kernel: Any = None, resolution: int | None = 2, normalise: bool = True) -> Learned:
    """Class attention transfer: :func:`distill_jax.losses.cat_kd` between class activation maps.

    Features whose channels are the classes are class activation maps already, and are compared as
    they are: the paper's method, for which :func:`distill_jax.losses.class_activation_maps` makes
    such maps of a network's last features and its own classifier. Otherwise a linear map of the
    student's channels takes the place of its classifier's kernel. Where there is no space, as with
    flat layers, the classes' scores are normalised over the classes. ``where`` must be ``[batch]``.

    Args:
      teacher_kernel: the teacher's classifier's kernel, ``[channels, classes]``, to make class
        activation maps of its features (of every layer given, so give the last alone). It is a
        constant of the compiled program. None where the teacher's channels are to serve as classes.
      resolution: as in the loss.
      normalise: as in the loss.

    References:
      Guo et al., `Class Attention Transfer Based Knowledge Distillation`, 2023, §3.2.
    """

    def init(key, student_shapes, teacher_shapes):
        if teacher_kernel is not None:
            classes = jnp.shape(teacher_kernel)[1]
            teacher_shapes = [(*shape[:-1], classes) for shape in teacher_shapes]
        return map_init(key, student_shapes, teacher_shapes, always=False)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        check_layers(student_features, teacher_features)
        where = example_mask(where, jnp.shape(student_features[0])[0])
        values = []
        for i, (s, t) in enumerate(zip(student_features, teacher_features, strict=True)):
            s, t = clear(s, where), features_of("teacher", t)
            if teacher_kernel is not None:
                t = losses.class_activation_maps(t, teacher_kernel)
            if f"layer{i}" in params:
                s = dense(params[f"layer{i}"], s)
            size = resolution
            if count(common_space(s.shape, t.shape)) == 1:
                s, t = (x.mean(tuple(range(1, x.ndim - 1)))[..., None] for x in (s, t))
                size = None
            values.append(losses.cat_kd(s, t, resolution=size, normalise=normalise, where=where))
        return sum_layers(values)

    return Learned(init, apply)

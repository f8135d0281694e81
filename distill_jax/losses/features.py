"""Losses between features of one shape, compared unit by unit.

Features are ``[batch, *spatial, channels]``, student and teacher alike; the parts of
:mod:`distill_jax.features` bring features of other shapes together. Many papers sum over units and
many programs average: where that is so, the paper's sum is the default and ``mean=True`` the
average, which is the sum divided by the number of positions that count times the number of
channels.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from distill_jax.losses._numerics import check_fraction, check_positive, to_float
from distill_jax.losses._space import (
    common_space,
    direction,
    feature_pair,
    features_of,
    matmul,
    pool_mean,
    positions,
    total,
)

Array = jax.Array


def hint(student: Any, teacher: Any, *, where: Any = None) -> Array:
    """FitNets' hint: the mean over positions and channels of (student − teacher)².

    The paper's Eq. 3 is ½ of the sum, so ½ · positions · channels times this; RepDistiller's and
    mdistiller's ``nn.MSELoss`` is the mean over examples of this.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype, after the regressor if there is
        one.
      teacher: as ``student``.
      where: ``bool``, ``[batch]`` or broadcastable to ``[batch, *spatial]``: the positions that
        count. An example without any has value 0.

    Returns:
      ``[batch]``, squared units of the features, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ.

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets`, 2015, Eq. 3.

    >>> print(hint(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])))
    [5.]
    """
    x = feature_pair(student, teacher, where)
    return total(jnp.square(x.student - x.teacher), x.valid, mean=True)


def activation_boundary(
    student: Any, teacher: Any, *, margin: Any = 1.0, mean: bool = False, where: Any = None
) -> Array:
    """Activation boundaries (AB): Σ relu(μ − s)² where t > 0, Σ relu(μ + s)² where t ≤ 0.

    s and t are responses *before* the activation: the student is to activate the units that the
    teacher activates, by a margin, and the others not. Not zero at student = teacher unless every
    response passes the margin.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: as ``student``; only its signs matter.
      margin: μ > 0.
      mean: the mean over positions and channels instead of the sum. torchdistill's loss is the mean
        over examples of the sum; RepDistiller's is that times 3/1000 and 2^(i − layers + 1) for
        layer i.
      where: as in :func:`hint`.

    Returns:
      ``[batch]``, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes differ, or the margin is not positive.

    References:
      Heo et al., `Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden
      Neurons`, 2019, the alternative loss of its section `Method`.

    >>> print(activation_boundary(jnp.array([[0.5, 0.5]]), jnp.array([[3.0, -3.0]])))
    [2.5]
    """
    check_positive("margin", margin)
    x = feature_pair(student, teacher, where)
    margin = to_float(margin)
    missing = jnp.where(x.teacher > 0, margin - x.student, margin + x.student)
    terms = jnp.where(x.valid[..., None], jnp.square(jax.nn.relu(missing)), 0.0)
    return total(terms, x.valid, mean)


def ofd(student: Any, teacher: Any, *, margin: Any = None, mean: bool = False, where: Any = None) -> Array:
    """Overhaul of feature distillation (OFD): Σ (T − s)² but 0 where s ≤ T ≤ 0; T = max(t, m).

    t is the teacher's response before its activation, m ≤ 0 a margin a channel: a student's
    negative response is not wrong because it is more negative than the teacher's.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: as ``student``.
      margin: m, a scalar or ``[channels]``, at most 0: from :func:`margin_from_batchnorm`, or from
        :func:`margin_from_features` over much data. None estimates it from this batch.
      mean: the mean over positions and channels instead of the sum. mdistiller's loss is the mean
        over examples of the sum, over 2^(layers − i − 1) for layer i; the authors' divides by 1000
        too.
      where: as in :func:`hint`.

    Returns:
      ``[batch]``, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes do not fit.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation`, 2019, §3.2 (margin ReLU) and
      §3.4 (partial L2).

    >>> print(ofd(jnp.array([[0.0, -9.0, 0.0]]), jnp.array([[3.0, -5.0, -5.0]]), margin=-1.0))
    [10.]
    """
    x = feature_pair(student, teacher, where)
    margin = margin_from_features(teacher, where=where) if margin is None else to_float(margin)
    if margin.shape not in ((), x.teacher.shape[-1:]):
        raise ValueError(
            f"margin must be a scalar or {x.teacher.shape[-1:]}, one a channel, got {margin.shape}"
        )
    target = jnp.maximum(x.teacher, margin)
    kept = ((target > 0) | (x.student > target)) & x.valid[..., None]
    return total(jnp.where(kept, jnp.square(target - x.student), 0.0), x.valid, mean)


def margin_from_batchnorm(scale: Any, bias: Any, *, rare: float = 0.0) -> Array:
    """OFD's margin of a channel that follows BatchNorm: E[x | x < 0] for x normal.

    β − σ·φ(β/σ)/Φ(−β/σ) with σ = |γ|: φ is the normal density, Φ its distribution function. It
    tends to 0 where hardly anything is negative; for σ = 0 it is min(β, 0).

    Args:
      scale: BatchNorm's γ, ``[channels]``.
      bias: BatchNorm's β, ``[channels]``.
      rare: where Φ(−β/σ) is at most this, the margin is −3σ, as the authors' program and mdistiller
        have it with 0.001.

    Returns:
      ``[channels]``, float32 (float64 for float64 input), for the argument ``margin`` of
      :func:`ofd`.

    Raises:
      ValueError: if ``rare`` is outside [0, 1].

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation`, 2019, §3.2 and its appendix.

    >>> print(margin_from_batchnorm(jnp.array([1.0]), jnp.array([0.0])))  # −√(2/π)
    [-0.7978846]
    """
    check_fraction("rare", rare)
    sigma, bias = jnp.abs(to_float(scale)), to_float(bias)
    flat = sigma == 0
    safe = jnp.where(flat, 1.0, sigma)
    z = bias / safe
    far = z > 2  # where β − σ·φ/Φ cancels: Laplace's continued fraction
    near = jnp.where(far, 0.0, z)
    hazard = jnp.exp(-0.5 * jnp.square(near) - 0.5 * jnp.log(2 * jnp.pi) - log_ndtr(-near))
    fraction = z = jnp.where(far, z, 2.0)
    for n in range(30, 1, -1):
        fraction = z + n / fraction
    margin = safe * jnp.minimum(jnp.where(far, -1 / fraction, near - hazard), 0.0)
    if rare > 0:
        margin = jnp.where(log_ndtr(-bias / safe) <= math.log(rare), -3 * safe, margin)
    return jnp.where(flat, jnp.minimum(bias, 0.0), margin)


def margin_from_features(features: Any, *, where: Any = None) -> Array:
    """OFD's margin estimated from data: each channel's mean over its negative responses.

    Args:
      features: the teacher's responses before the activation, ``[batch, *spatial, channels]``.
      where: as in :func:`hint`.

    Returns:
      ``[channels]``, float32 (float64 for float64 input); 0 for a channel without negative
      response.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation`, 2019, §3.2.

    >>> print(margin_from_features(jnp.array([[3.0, -1.0], [1.0, -3.0]])))
    [ 0. -2.]
    """
    x = features_of("teacher", features)
    negative = (x < 0) & positions(where, x.shape)[..., None]
    axes = tuple(range(x.ndim - 1))
    return jnp.sum(jnp.where(negative, x, 0.0), axes) / jnp.maximum(jnp.sum(negative, axes), 1)


def vid(student: Any, teacher: Any, *, variance: Any = 1.0, mean: bool = False, where: Any = None) -> Array:
    """Variational information distillation (VID): −log N(t | μ, σ²) without its constant.

    Σ ½·[(t − μ)²/σ² + log σ²] over positions and channels, a variance a channel. Its least value
    over σ² is at σ² = mean of (t − μ)²; it is not bounded by 0.

    Args:
      student: μ, the prediction of the teacher's features, ``[batch, *spatial, channels]``.
      teacher: t, as ``student``.
      variance: σ² > 0, a scalar or ``[channels]``. To train it with the student, see
        :func:`distill_jax.features.vid`.
      mean: the mean over positions and channels instead of the sum, as in torchdistill,
        RepDistiller and mdistiller (which leaves the variance's parameter out of the optimizer: it
        is never trained).
      where: as in :func:`hint`.

    Returns:
      ``[batch]``, nats, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes do not fit, or a variance is not positive.

    References:
      Ahn et al., `Variational Information Distillation for Knowledge Transfer`, 2019, Eqs. 4 and 5.

    >>> print(vid(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 3.0]])))
    [5.]
    """
    check_positive("variance", variance)
    x = feature_pair(student, teacher, where)
    variance = to_float(variance)
    if variance.shape not in ((), x.teacher.shape[-1:]):
        raise ValueError(
            f"variance must be a scalar or {x.teacher.shape[-1:]}, one a channel, got {variance.shape}"
        )
    terms = 0.5 * (jnp.square(x.teacher - x.student) / variance + jnp.log(variance))
    return total(jnp.where(x.valid[..., None], terms, 0.0), x.valid, mean)


def hierarchical_context(
    student: Any, teacher: Any, *, levels: tuple[int, ...] = (4, 2, 1), where: Any = None
) -> Array:
    """ReviewKD's hierarchical context loss (HCL): squared error at several resolutions.

    Σ w_l·mean (pool_l(s) − pool_l(t))² / Σ w_l: the full resolution with weight 1, then adaptive
    average pooling to l positions along each axis with weights ½, ¼, … for those levels below the
    resolution.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: as ``student``.
      levels: the resolutions after the full one. A level is left out if it is not below the longest
        axis; along an axis shorter than it, nothing is pooled. (The programs look at the height
        alone; for square maps there is no difference.)
      where: as in :func:`hint`. Pooling divides the whole map into bins, so positions that do not
        count still shape the bins (each bin is the mean of those that do): unlike elsewhere, to
        exclude positions is not the same as to cut them off.

    Returns:
      ``[batch]``, float32 (float64 for float64 input). The mean over examples is torchdistill's and
      mdistiller's loss.

    Raises:
      ValueError: if the shapes differ, or a level is not positive.

    References:
      Chen et al., `Distilling Knowledge via Knowledge Review`, 2021, §3.4 (in words).

    >>> print(hierarchical_context(jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))))
    [1.]
    """
    if any(level < 1 for level in levels):
        raise ValueError(f"levels must be positive numbers of positions, got {levels}")
    x = feature_pair(student, teacher, where)
    space = x.student.shape[1:-1]
    difference, weight = x.student - x.teacher, 1.0  # pooling is linear
    loss, weights = total(jnp.square(difference), x.valid, mean=True), 1.0
    share = x.valid[..., None].astype(difference.dtype)
    for level in levels:
        if not space or level >= max(space):
            continue
        bins = tuple(min(level, n) for n in space)
        held = pool_mean(share, bins)
        pooled = pool_mean(difference, bins) / jnp.where(held > 0, held, 1.0)
        weight /= 2
        loss += weight * total(jnp.square(pooled), held[..., 0] > 0, mean=True)
        weights += weight
    return loss / weights


def class_activation_maps(features: Any, kernel: Any) -> Array:
    """Class activation maps: each position's features read by the classifier's kernel.

    Their mean over positions is the logits, but for the bias.

    Args:
      features: the last ones before global average pooling, ``[batch, *spatial, channels]``.
      kernel: of the classifier after it, ``[channels, classes]``.

    Returns:
      ``[batch, *spatial, classes]``, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes do not fit.

    References:
      Zhou et al., `Learning Deep Features for Discriminative Localization`, 2016, Eq. 2.

    >>> class_activation_maps(jnp.zeros((2, 7, 7, 64)), jnp.zeros((64, 10))).shape
    (2, 7, 7, 10)
    """
    x, kernel = features_of("the", features), to_float(kernel)
    if kernel.ndim != 2 or kernel.shape[0] != x.shape[-1]:
        raise ValueError(
            f"kernel must be [{x.shape[-1]}, classes] for features {x.shape}, got {kernel.shape}"
        )
    return matmul(x, kernel)


def cat_kd(
    student: Any, teacher: Any, *, resolution: int | None = 2, normalise: bool = True, where: Any = None
) -> Array:
    """Class attention transfer (CAT-KD): squared error of normalised class activation maps.

    The mean over classes and positions of (u(s) − u(t))²; u pools a map to few positions and
    divides it, class by class, by its norm over them.

    Args:
      student: class activation maps ``[batch, *spatial, classes]``, from
        :func:`class_activation_maps` or from a network whose last layer is convolutional.
      teacher: as ``student``; the spatial shape may be another.
      resolution: the maps are pooled to so many positions along each axis (fewer where a map is
        smaller); None for the smaller of the two shapes.
      normalise: whether to divide by the norm. A map that is zero everywhere stays zero.
      where: ``bool`` ``[batch]``: the examples that count.

    Returns:
      ``[batch]``, float32 (float64 for float64 input). The mean over examples is the authors' loss,
      which pools a map *up* where it is smaller than the resolution.

    Raises:
      ValueError: if the shapes do not fit, or the resolution is not positive.

    References:
      Guo et al., `Class Attention Transfer Based Knowledge Distillation`, 2023, §3.2.

    >>> print(cat_kd(jnp.ones((1, 4, 4, 3)), 7 * jnp.ones((1, 2, 2, 3))))
    [0.]
    """
    if resolution is not None and resolution < 1:
        raise ValueError(f"resolution must be a positive number of positions, got {resolution}")
    x = feature_pair(student, teacher, examples_only(where, student), space=False)
    space = common_space(x.student.shape, x.teacher.shape)
    if resolution is not None:
        space = tuple(min(resolution, n) for n in space)
    maps = [pool_mean(f, space) for f in (x.student, x.teacher)]
    if normalise:
        axes = tuple(range(1, 1 + len(space)))
        maps = [direction(m if axes else m[:, None], axes or 1) for m in maps]
    values = jnp.mean(jnp.square(maps[0] - maps[1]), tuple(range(1, maps[0].ndim)))
    return values


def examples_only(where: Any, features: Any) -> Any:
    """``where``, after a check that it names examples and not positions."""
    batch = jnp.shape(features)[:1]
    if where is not None and jnp.shape(where) != batch:
        raise ValueError(f"where must be {batch} here, one for each example, got {jnp.shape(where)}")
    return where

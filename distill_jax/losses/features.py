"""Feature losses that compare features of the same shape, unit by unit (hints, OFD, VID, ReviewKD, CAT-KD).

Features are ``[batch, *spatial, channels]`` and have the same shape for student and teacher. To compare
features of different shapes, match them first with :func:`distill_jax.features.project`. Many papers sum
over units while their programs average. Then the paper's sum is the default, and ``mean=True`` divides it
by the number of units that count: positions × channels.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_at_most, check_count, check_positive, check_sequence
from distill_jax.losses._measures import margin_from_features
from distill_jax.losses._space import (
    common_space,
    direction,
    example_mask,
    feature_pair,
    features_of,
    per_channel,
    pool_mean,
    total,
)


def hint(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """FitNets hint loss: the mean over positions and channels of (student − teacher)².

    The paper's Eq. 3 is ½ of the sum, that is, ½ · positions · channels times this value. The
    ``nn.MSELoss`` of RepDistiller and mdistiller is the mean over examples of this value.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype. If there is a regressor, this is its output.
      teacher: an array of the shape of ``student``.
      where: ``bool``, ``[batch]`` or broadcastable to ``[batch, *spatial]``: which positions count. An
        example in which none counts has value 0.

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
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    margin: float | ArrayLike = 1.0,
    mean: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Activation boundary distillation (AB): Σ relu(μ − s)² where t > 0, Σ relu(μ + s)² where t ≤ 0.

    s and t are the responses of student and teacher *before* the activation. The student learns to activate
    the units that the teacher activates and no others, each by a margin μ. The value is zero only if every
    response of the student has the right sign and passes the margin, so it may be positive at student =
    teacher.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: an array of the shape of ``student``; only its signs matter.
      margin: μ > 0.
      mean: takes the mean over positions and channels instead of the sum. torchdistill's loss is the mean
        over examples of the sum. RepDistiller's is that times 3/1000 and times 2^(i − layers + 1) for
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
    margin = per_channel("margin", margin, x.student)
    side = jnp.where(x.teacher > 0, 1.0, jnp.where(x.teacher <= 0, -1.0, jnp.nan))  # NaN where t is NaN
    missing = margin - side * x.student
    terms = jnp.where(x.valid[..., None], jnp.square(jax.nn.relu(missing)), 0.0)
    return total(terms, x.valid, mean)


def ofd(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    margin: float | ArrayLike | None = None,
    mean: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Overhaul of feature distillation (OFD): Σ (T − s)² with T = max(t, m), but 0 where s ≤ T ≤ 0.

    t is the teacher's response before its activation, and m ≤ 0 is a margin per channel. Where the teacher's
    response is negative, a student whose response is even lower makes no error.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: an array of the shape of ``student``.
      margin: m ≤ 0, a scalar or ``[channels]``, from :func:`distill_jax.features.margin_from_batchnorm`, or
        from :func:`distill_jax.features.margin_from_features` over many examples. None estimates it from
        this batch.
      mean: takes the mean over positions and channels instead of the sum. mdistiller's loss is the mean
        over examples of the sum, divided by 2^(layers − i − 1) for layer i. The authors' code also
        divides by 1000.
      where: as in :func:`hint`.

    Returns:
      ``[batch]``, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes do not fit, or a margin is above 0.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation`, 2019, §3.2 (margin ReLU) and
      §3.4 (partial L2).

    >>> print(ofd(jnp.array([[0.0, -9.0, 0.0]]), jnp.array([[3.0, -5.0, -5.0]]), margin=-1.0))
    [10.]
    """
    if margin is not None:
        check_at_most("margin", margin, 0)
    x = feature_pair(student, teacher, where)
    margin = margin_from_features(teacher, where=where) if margin is None else margin
    target = jnp.maximum(x.teacher, per_channel("margin", margin, x.teacher))
    kept = ~((x.student <= target) & (target <= 0)) & x.valid[..., None]  # a NaN is kept, to be seen
    return total(jnp.where(kept, jnp.square(target - x.student), 0.0), x.valid, mean)


def vid(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    variance: float | ArrayLike = 1.0,
    mean: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Variational information distillation (VID): −log N(t | μ, σ²) without its constant.

    The value is Σ ½·[(t − μ)²/σ² + log σ²] over positions and channels, with one variance for all channels or
    one per channel. It is least where σ² is the mean of (t − μ)², and it may be negative.

    Args:
      student: μ, the prediction of the teacher's features, ``[batch, *spatial, channels]``.
      teacher: t, an array of the shape of ``student``.
      variance: σ² > 0, a scalar or ``[channels]``. To train it together with the student, use
        :func:`distill_jax.features.vid`.
      mean: takes the mean over positions and channels instead of the sum, as torchdistill, RepDistiller
        and mdistiller do (mdistiller leaves the variance out of the optimizer, so it is never trained).
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
    variance = per_channel("variance", variance, x.teacher)
    terms = 0.5 * (jnp.square(x.teacher - x.student) / variance + jnp.log(variance))
    return total(jnp.where(x.valid[..., None], terms, 0.0), x.valid, mean)


def hierarchical_context(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    levels: tuple[int, ...] = (4, 2, 1),
    where: ArrayLike | None = None,
) -> Array:
    """ReviewKD's hierarchical context loss (HCL): squared error at several resolutions.

    The value is Σ w_l·mean (pool_l(s) − pool_l(t))² / Σ w_l. The full resolution has weight 1. Then follow
    adaptive average poolings to l positions along each axis with weights ½, ¼, …, for the levels l that are
    below the full resolution.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: an array of the shape of ``student``.
      levels: the resolutions after the full one. A level that is not below the longest axis is left out,
        and an axis shorter than the level is not pooled. (The programs look at the height alone, which
        makes no difference for square maps.)
      where: as in :func:`hint`. Pooling divides the whole map into bins, and each bin is the mean of its
        positions that count. So excluding positions is not the same as cropping them.

    Returns:
      ``[batch]``, float32 (float64 for float64 input). The mean over examples is the loss of
      torchdistill and mdistiller.

    Raises:
      ValueError: if the shapes differ, or a level is not positive.

    References:
      Chen et al., `Distilling Knowledge via Knowledge Review`, 2021, §3.4 (in words).

    >>> print(hierarchical_context(jnp.zeros((1, 2, 2, 1)), jnp.ones((1, 2, 2, 1))))
    [1.]
    """
    check_sequence("levels", levels, "numbers of positions")
    for level in levels:
        check_count("levels", level)
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


def cat_kd(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    resolution: int | None = 2,
    normalise: bool = True,
    where: ArrayLike | None = None,
) -> Array:
    """Class attention transfer (CAT-KD): mean squared error between normalised class activation maps.

    The value is the mean over classes and positions of (u(s) − u(t))². u pools a map to a few positions and
    divides it, class by class, by its norm over them.

    Args:
      student: class activation maps ``[batch, *spatial, classes]``, from
        :func:`distill_jax.features.class_activation_maps` or a network whose last layer is convolutional.
      teacher: ``[batch, *spatial, classes]``; its spatial shape may be different.
      resolution: the number of positions along each axis to which the maps are pooled (fewer where a map
        is smaller). None uses the smaller of the two shapes.
      normalise: whether to divide by the norm. A map that is zero everywhere stays zero.
      where: ``bool [batch]``: which examples count.

    Returns:
      ``[batch]``, float32 (float64 for float64 input). The mean over examples is the loss of the authors'
      code, which however pools a map *up* where it is smaller than the resolution.

    Raises:
      ValueError: if the shapes do not fit, or the resolution is not positive.

    References:
      Guo et al., `Class Attention Transfer Based Knowledge Distillation`, 2023, §3.2.

    >>> print(cat_kd(jnp.ones((1, 4, 4, 3)), 7 * jnp.ones((1, 2, 2, 3))))
    [0.]
    """
    if resolution is not None:
        check_count("resolution", resolution)
    student = features_of("student", student)
    valid = example_mask(where, student.shape[0])
    x = feature_pair(student, teacher, valid, space=False)
    space = common_space(x.student.shape, x.teacher.shape)
    if resolution is not None:
        space = tuple(min(resolution, n) for n in space)
    maps = [pool_mean(f, space) for f in (x.student, x.teacher)]
    if normalise:
        axes = tuple(range(1, 1 + len(space)))
        maps = [direction(m if axes else m[:, None], axes or 1) for m in maps]
    return jnp.mean(jnp.square(maps[0] - maps[1]), tuple(range(1, maps[0].ndim)))

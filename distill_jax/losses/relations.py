"""Relational losses: how the student's examples lie relative to each other, compared with the teacher's.

Only relations within the student's features, and within the teacher's, are compared, so the two may have
different widths. Features ``[batch, *spatial, channels]`` are flattened to one vector per example; pool
them first where a method wants pooled ones. A loss returns each example's share, and *the mean over the
examples that count* is the paper's loss, up to a constant that the docstring names.

An example that ``where`` excludes takes part in no relation. Its value and gradient are 0, and those of
the others are as in a batch without it. Where a vector is exactly zero, its direction is taken as zero,
with zero gradient; no small number is added to a norm. The contrastive losses are in
:mod:`distill_jax.losses.contrast`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import check_count, check_positive
from distill_jax.losses._numerics import kl_of
from distill_jax.losses._space import direction, flatten, norm, power_of_two, product, scaled

_BLOCK = 2**24  # numbers that are computed at a time where pairs or triplets of examples are compared


def _huber(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size <= 1, 0.5 * jnp.square(x), size - 0.5)


def _others(valid: Array) -> Array:
    """Marks the pairs of two different examples that both count, ``[batch, batch]``."""
    return valid[:, None] & valid & ~jnp.eye(valid.shape[0], dtype=bool)


def _count(valid: Array, dtype: DTypeLike) -> Array:
    return jnp.sum(valid).astype(dtype)


def _each_example(fn: Callable[..., Array], examples: Any, numbers: int) -> Array:
    """Applies a function that needs memory for so many numbers to each example, in blocks of ``_BLOCK``."""
    block = max(1, _BLOCK // max(numbers, 1))
    if block >= jax.tree.leaves(examples)[0].shape[0]:
        return jax.vmap(fn)(examples)
    return jax.lax.map(jax.checkpoint(fn), examples, batch_size=block)


def similarity_preserving(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """Similarity-preserving distillation (SP): squared difference of the batch's normalised Gram matrices.

    Example i's value is ‖g_i(teacher) − g_i(student)‖²/b with g_i = G_i/‖G_i‖₂. G = F·Fᵀ is the Gram matrix
    of the features F, ``[batch, features]``, and b is the number of examples that count. The mean over
    examples is the paper's Σ‖·‖²_F / b².

    Args:
      student: ``[batch, ..., channels]``, any float dtype; flattened. The paper takes the last feature
        maps before the pooling.
      teacher: features of the same batch; the other axes may be different.
      where: ``bool [batch]``: which examples count.

    Returns:
      ``[batch]``, no unit, at most 4/b, float32 (float64 for float64 input). The row of an example whose
      features are all zero is zero.

    Raises:
      ValueError: if the batches differ, or ``where`` is not ``[batch]``.

    Note:
      RepDistiller and mdistiller compute the same value, with gradients near 1e10 at zero features.
      torchdistill 1.1.5 divides rows by their L1 norm: the 1 in its ``normalize(x, 1)`` is p, not the
      axis.

    References:
      Tung, Mori, `Similarity-Preserving Knowledge Distillation`, 2019, Eqs. 1 to 4.

    >>> values = similarity_preserving(jnp.eye(2), jnp.array([[1.0, 0.0], [2.0, 0.0]]))
    >>> f'{values[0]:.4f}'  # rows (1, 0) and (1, 2)/√5: 1 − √⅕
    '0.5528'
    """
    student, teacher, valid = flatten(student, teacher, where)

    def rows(x):
        # Row i does not change with the scale of its left factor, nor with that of all right ones
        return direction(product(scaled(x, -1), scaled(x, None)), -1)

    squares = jnp.sum(jnp.square(rows(teacher) - rows(student)), -1)
    return jnp.where(valid, squares, 0.0) / jnp.maximum(_count(valid, squares.dtype), 1)


def rkd_distance(
    student: ArrayLike, teacher: ArrayLike, *, include_self: bool = False, where: ArrayLike | None = None
) -> Array:
    """Relational knowledge distillation of distances (RKD-D): distances, relative to their mean, should agree.

    Example i's value is the mean over the other examples j of h(d_ij(student) − d_ij(teacher)), with
    d_ij = ‖x_i − x_j‖₂/μ. μ is the mean distance of two different examples, and h is Huber's loss: x²/2 up
    to 1, |x| − 1/2 beyond. The time is that of batch²·features numbers, so pool large maps first; they are
    computed in blocks, and the memory stays small.

    Args:
      student: ``[batch, ..., channels]``, any float dtype; flattened. The paper takes the last
        embedding.
      teacher: features of the same batch; the other axes may be different.
      include_self: whether the mean also counts the zero of each example with itself (Σ_j/n instead of
        Σ_j/(n − 1)), as in the authors' code, RepDistiller, mdistiller and torchdistill.
      where: ``bool [batch]``: which examples count, also in μ.

    Returns:
      ``[batch]``, no unit, float32 (float64 for float64 input); 0 for a single example. Where all examples
      are equal, d = 0.

    Raises:
      ValueError: if the batches differ, or ``where`` is not ``[batch]``.

    Note:
      The paper writes the sum over the n·(n − 1) pairs; this is their mean, as in every implementation.
      Those take μ over distances > 0, while the paper takes it over all pairs of different examples: the
      two differ where examples coincide. Their distances are computed from x² + y² − 2xy, clamped at
      1e-12, which is inaccurate for close examples; here they are computed from differences.

    References:
      Park, Kim, Lu, Cho, `Relational Knowledge Distillation`, 2019, §3.2 (distance-wise loss).

    >>> x = jnp.array([[0.0], [1.0], [2.0]])
    >>> print(rkd_distance(x, x**2))  # d = ¾, 3/2, ¾ and ⅜, 3/2, 9/8
    [0.03515625 0.0703125  0.03515625]
    """
    student, teacher, valid = flatten(student, teacher, where)
    pairs = _others(valid)
    count = _count(valid, student.dtype)

    def relative(x):
        rows = valid[:, None]
        highest = jnp.max(x, 0, where=rows, initial=-jnp.inf)
        spread = jnp.max(highest - jnp.min(x, 0, where=rows, initial=jnp.inf), initial=0.0)
        unit = power_of_two(spread)  # d does not depend on the scale

        def distances(at: tuple[Array, Array]) -> Array:
            row, others = (
                at  # the others may lie anywhere else: what is masked afterwards could overflow before
            )
            return norm(jnp.where(others[:, None], row - x, 0.0) / unit, -1)

        distance = _each_example(distances, (x, pairs), x.size)
        mean = jnp.sum(distance) / jnp.maximum(count * (count - 1), 1)
        return distance / jnp.where(mean == 0, 1.0, mean)

    total = jnp.sum(_huber(relative(student) - relative(teacher)), -1)
    return total / jnp.maximum(count if include_self else count - 1, 1)


def rkd_angle(
    student: ArrayLike, teacher: ArrayLike, *, include_self: bool = False, where: ArrayLike | None = None
) -> Array:
    """Relational knowledge distillation of angles (RKD-A): the angles of triplets should agree.

    Example j's value is the mean over ordered pairs i ≠ k of other examples of h(c_ijk(student) −
    c_ijk(teacher)). c_ijk is the cosine of the angle at x_j between x_i and x_k, and h is Huber's loss. The
    time is that of batch²·(batch + features) numbers, computed in blocks.

    Args:
      student: ``[batch, ..., channels]``, any float dtype; flattened.
      teacher: features of the same batch; the other axes may be different.
      include_self: whether the mean also counts, as zeros, the triplets in which an example occurs twice
        (Σ/n² instead of Σ/((n − 1)·(n − 2))), as in the authors' code and its descendants.
      where: ``bool [batch]``: which examples count.

    Returns:
      ``[batch]``, no unit, float32 (float64 for float64 input); 0 for fewer than three examples. An example
      that coincides with x_j has no direction: its cosine is 0.

    Raises:
      ValueError: if the batches differ, or ``where`` is not ``[batch]``.

    Note:
      The paper writes the sum over triplets of different examples; this is their mean.

    References:
      Park, Kim, Lu, Cho, `Relational Knowledge Distillation`, 2019, §3.2 (angle-wise loss).

    >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> f'{rkd_angle(student, jnp.array([[0.0], [1.0], [2.0]]))[1]:.4f}'  # cosines √½ and −1
    '1.2071'
    """
    student, teacher, valid = flatten(student, teacher, where)
    pairs = _others(valid)
    count = _count(valid, student.dtype)

    def at_example(j):
        *rows, others = j  # of student and teacher; which examples are others

        def cosines(row, x):
            edges = direction(jnp.where(others[:, None], x - row, 0.0), -1)
            return jnp.where(others[:, None] & others & pairs, product(edges, edges), 0.0)

        return jnp.sum(_huber(cosines(rows[0], student) - cosines(rows[1], teacher)))

    total = _each_example(at_example, (student, teacher, pairs), student.size + teacher.size + pairs.size)
    number = count**2 if include_self else (count - 1) * (count - 2)
    return total / jnp.maximum(number, 1)


def pkt(
    student: ArrayLike, teacher: ArrayLike, *, include_self: bool = False, where: ArrayLike | None = None
) -> Array:
    """Probabilistic knowledge transfer (PKT): KL between the neighbours of each example, teacher and student.

    Example i's value is KL(p_i‖q_i) = Σ_j p_ij·log(p_ij/q_ij) over the other examples j. For the teacher,
    p_ij = K_ij/Σ_j K_ij with K_ij = (1 + cos(x_i, x_j))/2; q is the same for the student. The paper's loss is
    the sum over i, that is, batch times the mean.

    Args:
      student: ``[batch, ..., channels]``, any float dtype; flattened. The paper takes the last
        representation.
      teacher: features of the same batch; the other axes may be different.
      include_self: whether the example is its own neighbour, with K = 1, as in the authors' code and its
        descendants. In the paper it is not.
      where: ``bool [batch]``: which examples count.

    Returns:
      ``[batch]``, nats, float32 (float64 for float64 input). Zero features have cosine 0 with all others.
      +inf where two examples are exactly opposite for the student and not for the teacher.

    Raises:
      ValueError: if the batches differ, or ``where`` is not ``[batch]``.

    Note:
      The authors' code, RepDistiller, mdistiller and torchdistill return the mean over the *entries*
      of the matrix, 1/n of the mean of ``pkt(..., include_self=True)``, add 1e-7 to norms and
      probabilities, and have NaN gradients at zero features.

    References:
      Passalis, Tefas, `Learning Deep Representations with Probabilistic Knowledge Transfer`, 2018,
      §3 (cosine kernel; conditional probabilities; their Kullback–Leibler divergence).

    >>> student = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # K = 1, ½; 1, ½; ½, ½
    >>> f'{pkt(student, jnp.ones((3, 2)))[0]:.4f}'  # ½·log ¾ + ½·log 3/2
    '0.0589'
    """
    student, teacher, valid = flatten(student, teacher, where)
    pairs = valid[:, None] & valid if include_self else _others(valid)

    def kernel(x):
        cosine = direction(x, -1)
        return 0.5 * (1 + product(cosine, cosine))

    k_q, k_p = kernel(student), kernel(teacher)
    has_q, has_p = pairs & ~(k_q <= 0), pairs & ~(k_p <= 0)  # a NaN stays, to be seen
    k_q, k_p = jnp.where(has_q, k_q, 1.0), jnp.where(has_p, k_p, 1.0)

    both, near = has_q & has_p, jnp.all(has_q == has_p, -1, keepdims=True)
    sum_q = jnp.sum(k_q, -1, keepdims=True, where=has_q)
    sum_p = jnp.sum(k_p, -1, keepdims=True, where=has_p)
    sum_q, sum_p = jnp.where(sum_q == 0, 1.0, sum_q), jnp.where(sum_p == 0, 1.0, sum_p)
    log_q = jnp.where(has_q, jnp.log(k_q) - jnp.log(sum_q), 0.0)
    log_p = jnp.where(has_p, jnp.log(k_p) - jnp.log(sum_p), 0.0)
    ratio = jnp.where(near, _log_ratio(k_p, k_q) - _log_ratio(sum_p, sum_q), log_p - log_q)
    ratio = jnp.where(both, ratio, 0.0)
    return kl_of(log_p, log_q, ratio, has_p, has_q, -1)


def _log_ratio(a: Array, b: Array) -> Array:
    """Computes log(a/b) of positive numbers, by log1p where they are close."""
    relative = (a - b) / b
    close = jnp.abs(relative) < 0.5
    return jnp.where(close, jnp.log1p(jnp.where(close, relative, 0.0)), jnp.log(a) - jnp.log(b))


def correlation_congruence(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    kernel: str = "gaussian",
    gamma: float | ArrayLike = 0.4,
    order: int = 2,
    normalise: bool = True,
    where: ArrayLike | None = None,
) -> Array:
    """Correlation congruence (CC, CCKD): squared difference of the batch's kernel matrices.

    Example i's value is Σ_j (K_ij(teacher) − K_ij(student))²/n over the n examples j that count, i included.
    The mean is the paper's ‖K(teacher) − K(student)‖²/n². The ``"bilinear"`` kernel is ⟨x, y⟩. The
    ``"gaussian"`` kernel is e^(−γ‖x − y‖²) of unit vectors, computed by its Taylor series
    e^(−2γ)·Σ_p (2γ)^p/p!·⟨x, y⟩^p up to p = ``order``.

    Args:
      student: ``[batch, ..., channels]``, any float dtype; flattened.
      teacher: features of the same batch; the other axes may be different.
      kernel: ``"gaussian"`` or ``"bilinear"``.
      gamma: γ > 0 of the Gaussian.
      order: the highest power of the series, at least 1. The paper finds that 2 is enough.
      normalise: whether to divide features by their length first; the Gaussian's series assumes it.
      where: ``bool [batch]``: which examples count.

    Returns:
      ``[batch]``, squared kernel values, float32 (float64 for float64 input).

    Raises:
      ValueError: if the batches differ, ``where`` is not ``[batch]``, the kernel is unknown, γ is not
        positive, or the order is less than 1.

    Note:
      torchdistill 1.1.5 does not normalise, and returns ‖·‖/n² without the square. RepDistiller's
      ``Correlation`` is another loss: the mean over k of Σ|Δ_k|·|Δ_(k+1)| between *neighbours in the
      batch*, Δ = student − teacher. It changes when the batch is shuffled, and is not offered here.

    References:
      Peng et al., `Correlation Congruence for Knowledge Distillation`, 2019, §3.2 (congruence) and
      §3.3 (kernels and their Taylor series).

    >>> student, teacher = jnp.eye(2), jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> print(correlation_congruence(student, teacher, kernel="bilinear"))
    [0.5 0.5]
    """
    if kernel not in ("gaussian", "bilinear"):
        raise ValueError(f"kernel must be 'gaussian' or 'bilinear', got {kernel!r}")
    check_positive("gamma", gamma)
    check_count("order", order)
    student, teacher, valid = flatten(student, teacher, where)
    gamma = jnp.asarray(gamma, student.dtype)
    if normalise:
        student, teacher = direction(student, -1), direction(teacher, -1)
    s, t = product(student, student), product(teacher, teacher)
    difference = t - s
    if kernel == "gaussian":
        # t^p − s^p = (t − s)·Σ_k t^(p−1−k)·s^k, so that small differences keep their digits
        series, geometric, t_power = jnp.zeros_like(s), jnp.zeros_like(s), jnp.ones_like(t)
        for p in range(1, order + 1):
            geometric, t_power = geometric * s + t_power, t_power * t
            series += (2 * gamma) ** p / math.factorial(p) * geometric
        difference *= jnp.exp(-2 * gamma) * series
    squares = jnp.where(valid[:, None] & valid, jnp.square(difference), 0.0)
    return jnp.sum(squares, -1) / jnp.maximum(_count(valid, squares.dtype), 1)


def ickd(
    student: ArrayLike, teacher: ArrayLike, *, normalise: bool = True, where: ArrayLike | None = None
) -> Array:
    """Inter-channel correlation (ICKD-C): squared difference of the correlations between an example's channels.

    F ``[positions, channels]`` are the features of one example and G = FᵀF ``[channels, channels]``. The
    value is Σ_c ‖g_c(teacher) − g_c(student)‖²/channels, where g_c = G_c/‖G_c‖₂ is a row of G divided by its
    length. Each value depends on its own example alone.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: features with the same batch and number of channels, and any spatial shape.
      normalise: whether to divide rows by their length, as in the authors' code. Without it the value is
        ‖G(teacher) − G(student)‖²/channels², which grows with the fourth power of the features and is
        meaningful only for equal spatial shapes.
      where: ``bool [batch]``: which examples count.

    Returns:
      ``[batch]``, float32 (float64 for float64 input).

    Raises:
      ValueError: if the batches or the numbers of channels differ, or ``where`` is not ``[batch]``.

    Note:
      The mean over examples is the value of the authors' CIFAR code, which normalises rows. It is the
      default because the value without it depends on the features' scale and resolution. torchdistill
      1.1.5, refactored from their ImageNet code, divides by the batch twice.

    References:
      Liu et al., `Exploring Inter-Channel Correlation for Diversity-preserved Knowledge
      Distillation`, 2021, §3.2.

    >>> student, teacher = jnp.array([[[1.0, 0.0], [0.0, 1.0]]]), jnp.ones((1, 3, 2))
    >>> f'{ickd(student, teacher)[0]:.4f}'  # rows (1, 0), (0, 1) and (√½, √½): 2 − √2
    '0.5858'
    """
    flat_student, flat_teacher, valid = flatten(student, teacher, where)
    shapes = jnp.shape(student), jnp.shape(teacher)
    channels = shapes[0][-1]
    if channels != shapes[1][-1]:
        raise ValueError(
            "student and teacher must have the same number of channels, got shapes "
            f"{shapes[0]} and {shapes[1]}: project one first, for example with distill_jax.features.ickd"
        )
    batch = shapes[0][0]

    def correlations(x):
        channel_rows = jnp.swapaxes(x.reshape(batch, x.shape[1] // channels, channels), 1, 2)
        if not normalise:
            return product(channel_rows, channel_rows)
        return direction(product(scaled(channel_rows, -1), scaled(channel_rows, (-1, -2))), -1)

    squares = jnp.square(correlations(flat_teacher) - correlations(flat_student))
    values = jnp.sum(squares, (-1, -2)) / (channels if normalise else channels**2)
    return jnp.where(valid, values, 0.0)

"""Feature losses that do not depend on the number of channels: attention maps, flows, kernels, CKA.

Features are ``[batch, *spatial, channels]``. Student and teacher may differ in the number of channels
unless a docstring says otherwise. Where a vector is exactly zero, its direction is taken as zero, with
zero gradient; no small number is added to a norm.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from distill_jax._checks import check_positive
from distill_jax.losses._measures import centred_kernels, fsp_matrix
from distill_jax.losses._space import (
    direction,
    direction_difference,
    feature_pair,
    gram,
    norm,
    per_example,
    scaled,
)


def attention_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    p: float = 2.0,
    mean: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Attention transfer (AT): ‖Q_s/‖Q_s‖₂ − Q_t/‖Q_t‖₂‖₂ with Q = Σ_c |A_c|^p at each position.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: features with the same batch and spatial shape, and any number of channels.
      p: the power, at least 1.
      mean: takes the mean over positions of the squared difference instead of the norm of the difference,
        as do the authors' program, torchdistill's ``mode='code'``, RepDistiller and mdistiller (their
        ``pow(p)`` keeps the sign for odd p). The norm is the loss of the paper, there with a factor
        β/2, and of torchdistill's ``mode='paper'``.
      where: ``bool``, ``[batch]`` or broadcastable to ``[batch, *spatial]``: which positions count. An
        example in which none counts has value 0.

    Returns:
      ``[batch]``, float32 (float64 for float64 input), in [0, √2] (the norm); 0 if there is only one
      position.

    Raises:
      ValueError: if the shapes do not fit, or p is below 1.

    References:
      Zagoruyko, Komodakis, `Paying More Attention to Attention`, 2017, Eq. 2; F^p_sum of §3.1.

    >>> x = jnp.array([[[1.0], [0.0]]])  # one example, two positions, one channel
    >>> print(attention_transfer(x, x[:, ::-1], mean=True))
    [1.]
    """
    check_positive("p", p)
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}")
    x = feature_pair(student, teacher, where, channels=False)
    if x.student.shape == x.teacher.shape:  # in one stack: apart, a compiler may sum up in two orders
        a, b = jax.vmap(lambda f: _attention(f, p))(jnp.stack([x.student, x.teacher]))
    else:
        a, b = _attention(x.student, p), _attention(x.teacher, p)
    difference = direction_difference(a, b, 1)
    if not mean:
        return norm(difference, 1)
    return jnp.sum(jnp.square(difference), 1) / jnp.maximum(per_example(x.valid), 1)


def _attention(x: Array, p: float) -> Array:
    """Computes the attention map up to a factor, ``[batch, positions]``."""
    x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    x = scaled(x, (1, 2))  # no power over- or underflows, and the map's direction stays the same
    power = jnp.square(x) if p == 2 else jnp.abs(x) ** p
    return jnp.sum(power, -1)


def factor_transfer(
    student: ArrayLike, teacher: ArrayLike, *, p: int = 1, mean: bool = False, where: ArrayLike | None = None
) -> Array:
    """Factor transfer (FT): ‖F_t/‖F_t‖₂ − F_s/‖F_s‖₂‖_p over all positions and channels.

    Args:
      student: the translator's factor, ``[batch, *spatial, channels]``, any float dtype.
      teacher: the paraphraser's factor, an array of the same shape.
      p: 1 or 2.
      mean: for p = 1, takes the mean over units instead of the sum, as does torchdistill (whose loss is
        NaN if a factor is zero). RepDistiller's ``FactorTransfer`` is another loss: the mean absolute
        difference of the attention maps of :func:`attention_transfer`.
      where: as in :func:`attention_transfer`.

    Returns:
      ``[batch]``, float32 (float64 for float64 input). A zero factor has direction zero.

    Raises:
      ValueError: if the shapes differ, or p is neither 1 nor 2.

    References:
      Kim, Park, Kwak, `Paraphrasing Complex Network: Network Compression via Factor Transfer`,
      2018, Eq. 3.

    >>> print(factor_transfer(jnp.array([[3.0, 0.0]]), jnp.array([[0.0, 5.0]])))
    [2.]
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    x = feature_pair(student, teacher, where)
    axes = tuple(range(1, x.student.ndim))
    difference = direction_difference(x.student, x.teacher, axes)
    if p == 2:
        return norm(difference, axes)
    summed = per_example(jnp.where(difference == 0, 0.0, jnp.abs(difference)))  # the slope of |0| is 0
    return summed / (jnp.maximum(per_example(x.valid), 1) * difference.shape[-1]) if mean else summed


def nst(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    kernel: str = "polynomial",
    bandwidth: float | ArrayLike | None = None,
    where: ArrayLike | None = None,
) -> Array:
    """Neuron selectivity transfer (NST): the squared maximum mean discrepancy (MMD) between channels' maps.

    It is mean k(t, t′) + mean k(s, s′) − 2·mean k(s, t) over pairs of channels. A channel is its vector
    over the positions, divided by its norm.

    Args:
      student: ``[batch, *spatial, channels]``, any float dtype.
      teacher: features with the same batch and spatial shape, and any number of channels.
      kernel: ``"polynomial"``, (x·y)²; ``"linear"``, x·y; or ``"gaussian"``, exp(−‖x − y‖²/2σ²).
      bandwidth: σ² > 0 of the Gaussian. None uses the mean of ‖s − t‖² over all pairs of a student's and a
        teacher's channel, per example; no gradient flows through it.
      where: as in :func:`attention_transfer`.

    Returns:
      ``[batch]``, float32 (float64 for float64 input), at least 0 except for rounding. With the polynomial
      kernel the mean over examples is the loss of RepDistiller and mdistiller.

    Raises:
      ValueError: if the shapes do not fit, the kernel is unknown, or the bandwidth is not positive.

    References:
      Huang, Wang, `Like What You Like: Knowledge Distill via Neuron Selectivity Transfer`, 2017, §4
      (with d = 2 and c = 0 for the polynomial).

    >>> x = jnp.array([[[1.0], [0.0]]])  # one example, two positions, one channel
    >>> print(nst(x, x[:, ::-1]))
    [2.]
    """
    if kernel not in ("polynomial", "linear", "gaussian"):
        raise ValueError(f"kernel must be 'polynomial', 'linear' or 'gaussian', got {kernel!r}")
    if bandwidth is not None:
        check_positive("bandwidth", bandwidth)
    x = feature_pair(student, teacher, where, channels=False)
    batch = x.student.shape[0]
    s, t = (
        direction(f.reshape(batch, math.prod(f.shape[1:-1]), f.shape[-1]), 1) for f in (x.student, x.teacher)
    )
    if kernel == "linear":
        return jnp.sum(jnp.square(jnp.mean(s, -1) - jnp.mean(t, -1)), -1)
    if kernel == "polynomial" and s.shape[1] <= max(s.shape[-1], t.shape[-1]):
        # (x·y)² is the product of xxᵀ and yyᵀ, so this is the distance of their means: no cancellation
        outer = [
            jnp.einsum("npc,nqc->npq", f, f, precision=jax.lax.Precision.HIGHEST) / f.shape[-1]
            for f in (s, t)
        ]
        return jnp.sum(jnp.square(outer[0] - outer[1]), (1, 2))
    ss, tt, st = gram(s, s), gram(t, t), gram(s, t)
    if kernel == "gaussian":
        size_s, size_t = jnp.sum(jnp.square(s), 1), jnp.sum(jnp.square(t), 1)
        ss = size_s[:, :, None] + size_s[:, None, :] - 2 * ss
        tt = size_t[:, :, None] + size_t[:, None, :] - 2 * tt
        st = size_s[:, :, None] + size_t[:, None, :] - 2 * st
        if bandwidth is None:
            width = jax.lax.stop_gradient(jnp.mean(st, (1, 2), keepdims=True))
            width = jnp.where(width > 0, width, 1.0)
        else:
            width = jnp.asarray(bandwidth, s.dtype)
        values = [jnp.exp(-d / (2 * width)) for d in (ss, tt, st)]
    else:
        values = [jnp.square(product) for product in (ss, tt, st)]
    means = [jnp.mean(value, (1, 2)) for value in values]
    counts = jnp.any(x.valid, tuple(range(1, x.valid.ndim)))
    return jnp.where(counts, means[0] + means[1] - 2 * means[2], 0.0)


def fsp(
    student: Sequence[ArrayLike],
    teacher: Sequence[ArrayLike],
    *,
    pool: str = "max",
    mean: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """Flow of solution procedure (FSP): ‖G_t − G_s‖² of the flows G between two layers.

    G is :func:`distill_jax.features.fsp_matrix` of the two layers.

    Args:
      student: a pair of layers, each ``[batch, *spatial, channels]``, any float dtype.
      teacher: a pair of layers with the student's numbers of channels; the spatial shapes may be
        different.
      pool: as in :func:`distill_jax.features.fsp_matrix`.
      mean: takes the mean over the matrix instead of the sum, as does RepDistiller (which pools by the
        mean). torchdistill computes the same matrix, but its loss is the sum of the norms of the columns
        of G_t − G_s, not squared.
      where: as in :func:`distill_jax.features.fsp_matrix`, for all four layers.

    Returns:
      ``[batch]``, float32 (float64 for float64 input). The paper's loss is the mean over examples, summed
      over pairs of layers.

    Raises:
      ValueError: if the shapes do not fit.

    References:
      Yim et al., `A Gift from Knowledge Distillation`, 2017, Eq. 2.

    >>> one = jnp.ones((1, 2, 2, 1))
    >>> print(fsp((one, one), (one, 3 * one)))
    [4.]
    """
    if len(student) != 2 or len(teacher) != 2:
        raise ValueError(
            "student and teacher must each be a pair of layers (first, second), got "
            f"{len(student)} and {len(teacher)}"
        )
    flows = [fsp_matrix(first, second, pool=pool, where=where) for first, second in (student, teacher)]
    if flows[0].shape != flows[1].shape:
        raise ValueError(
            "student and teacher layers must have the same numbers of channels, got FSP matrices of shape "
            f"{flows[0].shape} and {flows[1].shape}: match them first, for example with "
            "distill_jax.features.fsp"
        )
    squares = jnp.square(flows[0] - flows[1])
    return jnp.mean(squares, (1, 2)) if mean else jnp.sum(squares, (1, 2))


def cka(
    student: ArrayLike, teacher: ArrayLike, *, debiased: bool = False, where: ArrayLike | None = None
) -> Array:
    """Centred kernel alignment (CKA) loss: 1 − CKA, divided among the examples.

    The value of example i is n/2 · Σ_j (K_ij/‖K‖ − L_ij/‖L‖)² ≥ 0. The mean over the n examples that count is
    exactly 1 − CKA, without cancellation near 0.

    Args:
      student: ``[batch, ..., channels]``, any float dtype; each example is flattened to a vector.
      teacher: features of the same batch; the other axes may be different.
      debiased: as in :func:`distill_jax.features.linear_cka`.
      where: ``bool [batch]``: which examples count. An example that does not count has value 0 and does
        not influence the others.

    Returns:
      ``[batch]``, float32 (float64 for float64 input). 1, with zero gradient, where CKA is undefined.

    Raises:
      ValueError: if the batches differ, or are too small for the debiased form.

    References:
      Kornblith et al., `Similarity of Neural Network Representations Revisited`, 2019, §3.

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(cka(x, x))
    [0. 0. 0.]
    """
    one, other, valid = centred_kernels(student, teacher, debiased, where)
    shares = 0.5 * jnp.sum(valid) * jnp.sum(jnp.square(one - other), 1)
    undefined = jnp.all(one == 0) | jnp.all(other == 0)
    return jnp.where(undefined, valid.astype(shares.dtype), shares)

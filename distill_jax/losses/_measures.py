"""Measures of features: alignment of representations (CKA), flows, class activation maps, OFD's margins.

None of these is a loss by itself; some losses are made of them. Features are ``[batch, *spatial, channels]``.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import log_ndtr
from jax.typing import ArrayLike

from distill_jax._checks import check_fraction
from distill_jax.losses._arguments import to_float
from distill_jax.losses._space import (
    common_space,
    direction,
    example_mask,
    feature_pair,
    features_of,
    gram,
    matmul,
    per_example,
    pool_max,
    pool_mean,
    positions,
    scaled,
)


def linear_cka(
    first: ArrayLike, second: ArrayLike, *, debiased: bool = False, where: ArrayLike | None = None
) -> Array:
    """Linear centred kernel alignment (CKA), a similarity of two representations of the same batch.

    The value is ⟨K, L⟩/(‖K‖·‖L‖) for the centred Gram matrices K and L of the examples. It is 1 for
    representations that are equal up to rotation, scale and shift.

    Args:
      first: ``[batch, ..., channels]``, any float dtype; each example is flattened to a vector.
      second: any other representation of the same examples.
      debiased: uses the U-centring of Szekely and Rizzo, with which CKA does not grow with the width. The
        value may then be negative, and at least four examples are needed.
      where: ``bool [batch]``: which examples count.

    Returns:
      A scalar, float32 (float64 for float64 input). 0 where a representation is the same for all examples,
      or where too few examples count.

    Raises:
      ValueError: if the batches differ, or are too small for the debiased form.

    References:
      Kornblith et al., `Similarity of Neural Network Representations Revisited`, 2019, §3; Nguyen
      et al., `Do Wide and Deep Networks Learn the Same Things?`, 2021 (debiased).

    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> print(linear_cka(x, 5 * x[:, ::-1] + 2).round(4))
    1.0
    """
    one, other, _ = centred_kernels(first, second, debiased, where)
    return jnp.sum(one * other)


def centred_kernels(
    first: ArrayLike, second: ArrayLike, debiased: bool, where: ArrayLike | None
) -> tuple[Array, Array, Array]:
    """Computes the centred Gram matrices of norm 1, zero in the rows and columns of excluded examples."""
    first, second = features_of("student", first), features_of("teacher", second)
    batch = first.shape[0]
    if second.shape[0] != batch:
        raise ValueError(
            f"student and teacher must have the same batch size, got {first.shape} and {second.shape}"
        )
    if debiased and batch < 4:
        raise ValueError(f"debiased CKA needs at least 4 examples, got {batch}")
    valid = example_mask(where, batch)
    return _kernel(first, valid, debiased), _kernel(second, valid, debiased), valid


def _kernel(x: Array, valid: Array, debiased: bool) -> Array:
    rows = valid[:, None]
    n = jnp.sum(valid)
    x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    # CKA ignores shift and scale, so both may be taken out as constants: one example stands at the
    # origin (representations that do not vary become exactly 0), and no square over- or underflows
    first = jnp.take(x, jnp.argmax(valid), 0) if len(x) else 0.0
    x = jnp.where(rows, x - jax.lax.stop_gradient(first), 0.0)
    varies = jnp.any(x != 0)
    x = scaled(x, None)
    x = jnp.where(rows, x - jnp.sum(x, 0) / jnp.maximum(n, 1), 0.0)
    k = matmul(x, x.T)
    if debiased:
        pairs = rows & valid & ~jnp.eye(x.shape[0], dtype=bool)
        k = jnp.where(pairs, k, 0.0)
        means = jnp.sum(k, 0) / jnp.maximum(n - 2, 1)
        means -= jnp.sum(means) / (2 * jnp.maximum(n - 1, 1))
        k = jnp.where(pairs, k - means[:, None] - means, 0.0)
        varies &= n >= 4
    return direction(jnp.where(varies, k, 0.0), (0, 1))


def fsp_matrix(
    first: ArrayLike, second: ArrayLike, *, pool: str = "max", where: ArrayLike | None = None
) -> Array:
    """FSP matrix, the flow between two layers: G_ij = mean over positions of first_i · second_j.

    Args:
      first: ``[batch, *spatial, channels]``, any float dtype.
      second: ``[batch, *spatial, channels]``. If the numbers of spatial axes differ, both are pooled
        globally.
      pool: ``"max"`` or ``"mean"``, how the larger map is pooled to the smaller spatial shape.
      where: as in :func:`attention_transfer`, but only ``[batch]`` where the spatial shapes differ.

    Returns:
      ``[batch, first's channels, second's channels]``, float32 (float64 for float64 input).

    Raises:
      ValueError: if the shapes do not fit, or ``pool`` is unknown.

    References:
      Yim et al., `A Gift from Knowledge Distillation`, 2017, Eq. 1.

    >>> fsp_matrix(jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 4, 4, 5))).shape
    (2, 3, 5)
    """
    if pool not in ("max", "mean"):
        raise ValueError(f"pool must be 'max' or 'mean', got {pool!r}")
    x = feature_pair(first, second, where, channels=False, space=False)
    space = common_space(x.student.shape, x.teacher.shape)
    pooled = [(pool_max if pool == "max" else pool_mean)(f, space) for f in (x.student, x.teacher)]
    counted = per_example(x.valid) if x.student.shape[1:-1] == space else math.prod(space)
    counted = jnp.maximum(jnp.broadcast_to(counted, pooled[0].shape[:1]), 1)
    return gram(*pooled) / counted[:, None, None]


def class_activation_maps(features: ArrayLike, kernel: ArrayLike) -> Array:
    """Class activation maps (CAM): the classifier's kernel applied to the features at each position.

    Without the bias, the mean of the maps over the positions is the logits.

    Args:
      features: the last features before global average pooling, ``[batch, *spatial, channels]``.
      kernel: the kernel of the classifier that follows, ``[channels, classes]``.

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
            f"kernel must have shape [{x.shape[-1]}, classes] for features of shape {x.shape}, got {kernel.shape}"
        )
    return matmul(x, kernel)


def margin_from_batchnorm(scale: ArrayLike, bias: ArrayLike, *, rare: float = 0.0) -> Array:
    """OFD margin of each channel from BatchNorm's parameters: E[x | x < 0] for normally distributed x.

    The margin is β − σ·φ(β/σ)/Φ(−β/σ) with σ = |γ|, where φ is the normal density and Φ its distribution
    function. It tends to 0 where hardly any response is negative. For σ = 0 it is min(β, 0).

    Args:
      scale: BatchNorm's γ, ``[channels]``.
      bias: BatchNorm's β, ``[channels]``.
      rare: where Φ(−β/σ) is at most ``rare``, the margin is −3σ. The authors' program and mdistiller do
        this with 0.001.

    Returns:
      ``[channels]``, float32 (float64 for float64 input), for :func:`distill_jax.losses.ofd`.

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
    far = z > 2  # β − σ·φ/Φ cancels there: use Laplace's continued fraction
    near = jnp.where(far, 0.0, z)
    hazard = jnp.exp(-0.5 * jnp.square(near) - 0.5 * jnp.log(2 * jnp.pi) - log_ndtr(-near))
    fraction = z = jnp.where(far, z, 2.0)
    for n in range(30, 1, -1):
        fraction = z + n / fraction
    margin = safe * jnp.minimum(jnp.where(far, -1 / fraction, near - hazard), 0.0)
    if rare > 0:
        margin = jnp.where(log_ndtr(-bias / safe) <= math.log(rare), -3 * safe, margin)
    return jnp.where(flat, jnp.minimum(bias, 0.0), margin)


def margin_from_features(features: ArrayLike, *, where: ArrayLike | None = None) -> Array:
    """OFD margin of each channel estimated from data: the mean over its negative responses.

    Args:
      features: the teacher's responses before the activation, ``[batch, *spatial, channels]``.
      where: as in :func:`hint`.

    Returns:
      ``[channels]``, float32 (float64 for float64 input); 0 for a channel that has no negative response.

    References:
      Heo et al., `A Comprehensive Overhaul of Feature Distillation`, 2019, §3.2.

    >>> print(margin_from_features(jnp.array([[3.0, -1.0], [1.0, -3.0]])))
    [ 0. -2.]
    """
    x = features_of("the", features)
    negative = ~(x >= 0) & positions(where, x.shape)[..., None]
    axes = tuple(range(x.ndim - 1))
    return jnp.sum(jnp.where(negative, x, 0.0), axes) / jnp.maximum(jnp.sum(negative, axes), 1)

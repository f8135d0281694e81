"""Narrow codes of linear maps: the best code of a given width, and an encoder and decoder to train.

A linear original y = xW + b seen through a code of width r, x → xE → xED + c, is a matrix product of rank r.
For inputs of covariance Σ the best one is known exactly, and its error is the sum of the squared singular
values of Σ^½·W from the (r+1)-th on. This is *reduced-rank regression*. It is the reference for what training
reaches, and a good start for training.

In place of Σ all functions take a *root*: any A with AᵀA = Σ, such as :func:`root` computes without squaring
the condition number of the data. These computations are NumPy in float64 on the host, whatever dtype training
uses.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_key, check_real, is_integer
from distill_jax._model import Model, check_model, from_function


class Linear(NamedTuple):
    """Two factors of a linear map, for x → x·encoder·decoder.

    Attributes:
      encoder: ``[inputs, rank]``.
      decoder: ``[rank, outputs]``.
    """

    encoder: np.ndarray
    decoder: np.ndarray


def root(x: ArrayLike, *, centre: bool = False) -> np.ndarray:
    """Computes a root of the inputs' second moments or covariance: the triangular A with AᵀA = xᵀx/n.

    It comes from a QR decomposition of the data, so that directions whose variance is 1e-8 of the largest
    keep their digits, which they would lose in Σ.

    Args:
      x: ``[n, inputs]``, n ≥ 1.
      centre: whether to subtract the mean first, for a map with a bias of its own.

    Returns:
      float64 ``[min(n, inputs), inputs]``.

    Raises:
      ValueError: if ``x`` is no matrix, is empty, or has a value that is not finite.

    >>> a = root([[1.0, 2.0], [3.0, 4.0]])
    >>> print((a.T @ a).round(12))
    [[ 5.  7.]
     [ 7. 10.]]
    """
    rows = _matrix("x", x)
    if centre:
        rows = rows - rows.mean(0)
    return np.linalg.qr(rows, mode="r") / np.sqrt(len(rows))


def reduced_rank(kernel: ArrayLike, root: ArrayLike, rank: int) -> Linear:
    """Finds the factors of a given rank that are nearest to a kernel on the data: reduced-rank regression.

    With A·W = U·S·Vᵀ, the product E·D = W·V_r·V_rᵀ minimises E‖xW − xED‖² = ‖A(W − ED)‖². Of all its factors,
    E = W·V_r/S_r and D = S_r·V_rᵀ are returned, whose code has uncorrelated entries of unit size. No inverse
    of Σ is needed, so Σ may be singular.

    Args:
      kernel: W, ``[inputs, outputs]``.
      root: A, ``[any, inputs]``, from :func:`root`; the identity for a plain SVD of the kernel.
      rank: the width of the code, 1 to min(inputs, outputs).

    Returns:
      The two factors, in float64.

    Raises:
      ValueError: if shapes do not fit, a value is not finite, or the code is wider than that.

    References:
      Izenman, `Reduced-Rank Regression for the Multivariate Linear Model`, 1975, Theorem 1, with the
      identity for Γ and y = xW (in the paper x and y are columns).

    >>> e, d = reduced_rank(np.diag([1.0, 2.0]), np.diag([3.0, 1.0]), 1)
    >>> print((e @ d).round(12))  # 1·3 is more than 2·1
    [[1. 0.]
     [0. 0.]]
    """
    kernel, values, right = _decompose(kernel, root)
    if not is_integer(rank) or not 1 <= rank <= min(kernel.shape):
        raise ValueError(
            f"rank must be 1 to the smaller side of the kernel {kernel.shape}, {min(kernel.shape)}, "
            f"got {rank}: a wider code keeps nothing more"
        )
    values, right = values[:rank], right[:rank]
    # A direction that no input has needs a code of size 0, not 0/0
    scale = np.where(values > values[0] * 1e-14, values, 1.0)
    return Linear((kernel @ right.T) / scale, scale[:, None] * right)


def optimum(kernel: ArrayLike, root: ArrayLike) -> np.ndarray:
    """Computes the least error that a code of each width can have: E‖xW − xED‖², summed over outputs.

    Args:
      kernel: W, ``[inputs, outputs]``.
      root: A, ``[any, inputs]``, from :func:`root`.

    Returns:
      float64 ``[min(inputs, outputs) + 1]``, in squared units of the outputs, for widths 0, 1, 2 and so
      on. With a centred root the first is the variance of the outputs; the last is 0.

    >>> print(optimum(np.diag([1.0, 2.0]), np.diag([3.0, 1.0])))
    [13.  4.  0.]
    """
    kernel, values, _ = _decompose(kernel, root)
    values = values[: min(kernel.shape)]
    tail = np.cumsum(np.square(values[::-1]))[::-1]
    return np.concatenate([tail, np.zeros(min(kernel.shape) + 1 - len(tail))])


def error(kernel: ArrayLike, root: ArrayLike, factors: Linear) -> float:
    """Computes the error of two factors in place of a kernel: E‖xW − xED‖², summed over outputs.

    With a centred root this is the error for the best bias, c = b + E[x](W − ED).

    Args:
      kernel: W, ``[inputs, outputs]``.
      root: A, ``[any, inputs]``, from :func:`root`.
      factors: E and D.

    Returns:
      The mean squared error, in squared units of the outputs; 0 if the factors lose nothing.

    Raises:
      ValueError: if shapes do not fit, or a value is not finite.
    """
    kernel, root = _matrix("kernel", kernel), _matrix("root", root)
    if not isinstance(factors, Linear):
        raise ValueError(f"factors must be a Linear, an encoder and a decoder, got {type(factors).__name__}")
    encoder, decoder = _matrix("encoder", factors.encoder), _matrix("decoder", factors.decoder)
    if encoder.shape[1] != len(decoder):
        raise ValueError(f"factors must have one rank, got {encoder.shape} and {decoder.shape}")
    product = encoder @ decoder
    if product.shape != kernel.shape:
        raise ValueError(f"factors must make a {kernel.shape} kernel, got one of {product.shape}")
    return float(np.sum(np.square(root @ (kernel - product))))


def _matrix(name: str, x: ArrayLike) -> np.ndarray:
    check_real(name, x)
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be a matrix that is not empty, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, but {np.sum(~np.isfinite(x))} values are not")
    return x


def _decompose(kernel: ArrayLike, root: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kernel, root = _matrix("kernel", kernel), _matrix("root", root)
    if root.shape[1] != kernel.shape[0]:
        raise ValueError(
            f"root must be [any, {kernel.shape[0]}], for the inputs of the kernel {kernel.shape}, "
            f"got {root.shape}"
        )
    _, values, right = np.linalg.svd(root @ kernel, full_matrices=len(root) < kernel.shape[0])
    return kernel, np.pad(values, (0, max(0, min(kernel.shape) - len(values)))), right


# --- a linear encoder and decoder to train ----------------------------------------------------------------------


class Coordinates(NamedTuple):
    """Whitened coordinates for training a linear encoder and decoder.

    The inputs become z = (x − mean)·whiten, and the outputs t = (y − offset)/scale.

    Attributes:
      mean: the mean of x, ``[inputs]``.
      whiten: ``[inputs, rank of the covariance]``; z has the identity as its covariance.
      offset: the mean of y, ``[outputs]``.
      scale: the standard deviation of y in its widest direction.
    """

    mean: np.ndarray
    whiten: np.ndarray
    offset: np.ndarray
    scale: float


def coordinates(x: ArrayLike, y: ArrayLike) -> Coordinates:
    """Finds whitened coordinates, in which gradient descent learns all directions at the same rate.

    In these coordinates the gradient of the loss with respect to the encoder has the condition number of
    decoder·decoderᵀ alone, which is 1 at an orthonormal start.

    Args:
      x: inputs ``[n, inputs]``.
      y: the original's outputs ``[n, outputs]``.

    Returns:
      The coordinates, in float64.

    Raises:
      ValueError: if shapes do not fit, a value is not finite, or y does not vary.
    """
    x, y = _matrix("x", x), _matrix("y", y)
    if len(x) != len(y):
        raise ValueError(f"x and y must have as many rows, got {len(x)} and {len(y)}")
    _, values, right = np.linalg.svd(root(x, centre=True), full_matrices=False)
    some = values > values[0] * max(x.shape) * np.finfo(float).eps
    scale = np.linalg.norm(root(y, centre=True), 2)
    if not scale > 0:
        raise ValueError("y is the same for all examples: there is nothing to encode")
    return Coordinates(x.mean(0), right[some].T / values[some], y.mean(0), float(scale))


def transform(coordinates: Coordinates, x: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Converts inputs and outputs to whitened coordinates, in float64.

    Args:
      coordinates: from :func:`coordinates`.
      x: inputs ``[n, inputs]``.
      y: outputs ``[n, outputs]``.

    Returns:
      z ``[n, rank of the covariance]`` and t ``[n, outputs]``, float64.

    Raises:
      ValueError: if the widths are not those of the coordinates, or a value is not finite.
    """
    x, y = _matrix("x", x), _matrix("y", y)
    widths = len(coordinates.mean), len(coordinates.offset)
    if (x.shape[1], y.shape[1]) != widths:
        raise ValueError(f"x and y must be {widths} wide, got {(x.shape[1], y.shape[1])}")
    z = (x - coordinates.mean) @ coordinates.whiten
    return z, (y - coordinates.offset) / coordinates.scale


def init_linear(key: jax.Array, inputs: int, rank: int, outputs: int) -> tuple[Model, Model]:
    """Makes a linear encoder and decoder with random orthonormal kernels; only the decoder has a bias.

    Args:
      key: the random key.
      inputs: the width of x, in the coordinates of training.
      rank: the width of the code, 1 to min(inputs, outputs).
      outputs: the width of y.

    Returns:
      The two models, for :func:`distill_jax.models.compose` or
      :func:`distill_jax.train.train_stages`. Their function is :func:`affine`.

    Raises:
      ValueError: if the code is wider than that.
    """
    check_key("key", key)
    check_count("inputs", inputs)
    check_count("outputs", outputs)
    if not is_integer(rank) or not 1 <= rank <= min(inputs, outputs):
        raise ValueError(
            f"rank must be 1 to the smaller of {inputs} inputs and {outputs} outputs, got {rank}: "
            "a wider code keeps nothing more"
        )
    first, second = jax.random.split(key)
    orthogonal = jax.nn.initializers.orthogonal()
    decoder = {"kernel": orthogonal(second, (rank, outputs)), "bias": jnp.zeros(outputs)}
    return from_function(affine, {"kernel": orthogonal(first, (inputs, rank))}), from_function(
        affine, decoder
    )


def affine(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Computes x·kernel + bias: the function of a linear model, for :func:`distill_jax.models.from_function`.

    Args:
      params: ``"kernel"`` ``[inputs, outputs]`` and, where there is a bias, ``"bias"`` ``[outputs]``.
      x: ``[batch, inputs]``.

    Returns:
      ``[batch, outputs]``.

    Raises:
      ValueError: if x is not as wide as the kernel is high.
    """
    if x.shape[-1] != len(params["kernel"]):
        raise ValueError(
            f"x must be [batch, {len(params['kernel'])}] for a kernel of {params['kernel'].shape}, got "
            f"{x.shape}"
        )
    return x @ params["kernel"] + params.get("bias", 0.0)


def fold(model: Model, coordinates: Coordinates) -> Model:
    """Converts a trained linear encoder and decoder back to the data's own coordinates.

    Args:
      model: the pair of :func:`init_linear` as :func:`distill_jax.models.compose` joins it, trained.
      coordinates: the coordinates in which it was trained.

    Returns:
      A model of the same form, with float64 NumPy arrays.

    Raises:
      ValueError: if ``model`` is another one.
    """
    check_model("model", model)
    if not isinstance(model.params, Mapping) or set(model.params) != {"encoder", "decoder"}:
        raise ValueError("model must be the pair of init_linear, joined by models.compose, got another one")
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), model.params)
    encoder = coordinates.whiten @ wide["encoder"]["kernel"]
    decoder = coordinates.scale * wide["decoder"]["kernel"]
    bias = coordinates.offset + coordinates.scale * wide["decoder"]["bias"]
    bias = bias - coordinates.mean @ encoder @ decoder
    return model.replace(
        params={"encoder": {"kernel": encoder}, "decoder": {"kernel": decoder, "bias": bias}}
    )

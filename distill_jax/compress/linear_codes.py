"""What a narrow code can keep of a linear map, and how a code is sent.

A linear original y = xW + b seen through a code of width r, x → xE → xED + c, is a matrix product of
rank r. The best one for inputs of covariance Σ is known exactly, and its error is the sum of the
squared singular values of Σ^½·W from the (r+1)-th on: *reduced-rank regression*. Here it is the
reference for what training reaches, and a start for it.

Instead of Σ all functions take a *root*, any A with AᵀA = Σ, such as :func:`root` computes without
squaring the data's condition number. The theory is NumPy in float64 on the host, whatever the dtype
that training uses.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax.losses._numerics import to_float

PyTree = Any


class Linear(NamedTuple):
    """Two factors of a linear map, for x → x·encoder·decoder.

    Attributes:
      encoder: ``[inputs, rank]``.
      decoder: ``[rank, outputs]``.
    """

    encoder: np.ndarray
    decoder: np.ndarray


def root(x: Any, *, centre: bool = False) -> np.ndarray:
    """The triangular A with AᵀA = xᵀx/n: of the inputs' second moments, or of their covariance.

    From a QR decomposition of the data, so that directions whose variance is 1e-8 of the largest
    keep their digits, which in Σ they would lose.

    Args:
      x: ``[n, inputs]``, n ≥ 1. Roots of parts, stacked, are a root of the whole (up to √parts).
      centre: subtract the mean first: for a map with a bias of its own.

    Returns:
      float64 ``[min(n, inputs), inputs]``.

    Raises:
      ValueError: if ``x`` is no matrix, is empty, or has a value that is not finite.

    >>> a = root([[1.0, 2.0], [3.0, 4.0]])
    >>> print((a.T @ a).round(12))
    [[ 5.  7.]
     [ 7. 10.]]
    """
    x = _matrix("x", x)
    if centre:
        x = x - x.mean(0)
    return np.linalg.qr(x, mode="r") / np.sqrt(len(x))


def reduced_rank(kernel: Any, root: Any, rank: int) -> Linear:
    """The factors of the given rank nearest to a kernel on the data: reduced-rank regression.

    With A·W = U·S·Vᵀ, the product E·D = W·V_r·V_rᵀ minimises E‖xW − xED‖² = ‖A(W − ED)‖²; of all
    its factors those are returned whose code has unit, uncorrelated entries, E = W·V_r/S_r and
    D = S_r·V_rᵀ. No inverse of Σ is needed, so it may be singular.

    Args:
      kernel: W, ``[inputs, outputs]``.
      root: A, ``[any, inputs]``, see :func:`root`; the identity for a plain SVD of the kernel.
      rank: width of the code, 1 to min(inputs, outputs).

    Returns:
      :class:`Linear`, float64.

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
    if not 1 <= rank <= min(kernel.shape):
        raise ValueError(
            f"rank must be 1 to the smaller side of the kernel {kernel.shape}, {min(kernel.shape)}, "
            f"got {rank}: a wider code keeps nothing more"
        )
    values, right = values[:rank], right[:rank]
    # A direction that no input has needs a code of size 0, not 0/0
    scale = np.where(values > values[0] * 1e-14, values, 1.0)
    return Linear((kernel @ right.T) / scale, scale[:, None] * right)


def optimum(kernel: Any, root: Any) -> np.ndarray:
    """The least error that a code of each width can have: E‖xW − xED‖², summed over outputs.

    Args:
      kernel: as for :func:`reduced_rank`.
      root: likewise.

    Returns:
      float64 ``[min(inputs, outputs) + 1]``, squared units of the outputs: for widths 0, 1, …; the
      first is the variance of the outputs (with a centred root), the last 0.

    >>> print(optimum(np.diag([1.0, 2.0]), np.diag([3.0, 1.0])))
    [13.  4.  0.]
    """
    kernel, values, _ = _decompose(kernel, root)
    values = values[: min(kernel.shape)]
    tail = np.cumsum(np.square(values[::-1]))[::-1]
    return np.concatenate([tail, np.zeros(min(kernel.shape) + 1 - len(tail))])


def error(kernel: Any, root: Any, factors: Linear) -> float:
    """What two factors lose of a kernel on the data: E‖xW − xED‖², summed over outputs.

    With a centred root this is the error for the best bias, c = b + E[x](W − ED).

    Args:
      kernel: as for :func:`reduced_rank`.
      root: likewise.
      factors: E and D.

    Raises:
      ValueError: if shapes do not fit, or a value is not finite.
    """
    kernel, root = _matrix("kernel", kernel), _matrix("root", root)
    product = _matrix("encoder", factors.encoder) @ _matrix("decoder", factors.decoder)
    if product.shape != kernel.shape:
        raise ValueError(f"factors must make a {kernel.shape} kernel, got one of {product.shape}")
    return float(np.sum(np.square(root @ (kernel - product))))


def _matrix(name: str, x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.size:
        raise ValueError(f"{name} must be a matrix that is not empty, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, but {np.sum(~np.isfinite(x))} values are not")
    return x


def _decompose(kernel: Any, root: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kernel, root = _matrix("kernel", kernel), _matrix("root", root)
    if root.shape[1] != kernel.shape[0]:
        raise ValueError(
            f"root must be [any, {kernel.shape[0]}], for the inputs of the kernel {kernel.shape}, "
            f"got {root.shape}"
        )
    _, values, right = np.linalg.svd(root @ kernel, full_matrices=len(root) < kernel.shape[0])
    return kernel, np.pad(values, (0, max(0, min(kernel.shape) - len(values)))), right


# --- a linear pair, trained ----------------------------------------------------------------------


class Coordinates(NamedTuple):
    """In which training a linear pair is well conditioned: z = (x − mean)·whiten, (y − offset)/scale.

    Attributes:
      mean: ``[inputs]``, of x.
      whiten: ``[inputs, rank of the covariance]``; z has the identity as covariance.
      offset: ``[outputs]``, the mean of y.
      scale: standard deviation of y in its widest direction.
    """

    mean: np.ndarray
    whiten: np.ndarray
    offset: np.ndarray
    scale: float


def coordinates(x: Any, y: Any) -> Coordinates:
    """Finds the coordinates in which gradient descent sees every input direction alike.

    In them the gradient of the loss with respect to the encoder has the condition number of
    decoder·decoderᵀ alone, 1 where that starts orthonormal.

    Args:
      x: inputs ``[n, inputs]``.
      y: the original's outputs ``[n, outputs]``.

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


def transform(coordinates: Coordinates, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Takes inputs and outputs to the coordinates of training, in float64.

    Args:
      coordinates: from :func:`coordinates`.
      x: inputs ``[n, inputs]``.
      y: outputs ``[n, outputs]``.

    Raises:
      ValueError: if they are not as wide as those of the coordinates, or a value is not finite.
    """
    x, y = _matrix("x", x), _matrix("y", y)
    widths = len(coordinates.mean), len(coordinates.offset)
    if (x.shape[1], y.shape[1]) != widths:
        raise ValueError(f"x and y must be {widths} wide, got {(x.shape[1], y.shape[1])}")
    z = (x - coordinates.mean) @ coordinates.whiten
    return z, (y - coordinates.offset) / coordinates.scale


def init_linear(key: jax.Array, inputs: int, rank: int, outputs: int) -> dict[str, dict[str, jax.Array]]:
    """Makes a linear pair for :func:`affine`: random orthonormal factors, no biases but the last.

    Args:
      key: draws them.
      inputs: width of x, in the coordinates of training.
      rank: width of the code, 1 to min(inputs, outputs).
      outputs: width of y.

    Raises:
      ValueError: if the code is wider than that.
    """
    if not 1 <= rank <= min(inputs, outputs):
        raise ValueError(
            f"rank must be 1 to the smaller of {inputs} inputs and {outputs} outputs, got {rank}: "
            "a wider code keeps nothing more"
        )
    first, second = jax.random.split(key)
    orthogonal = jax.nn.initializers.orthogonal()
    return {
        "encoder": {"kernel": orthogonal(first, (inputs, rank))},
        "decoder": {"kernel": orthogonal(second, (rank, outputs)), "bias": jnp.zeros(outputs)},
    }


def affine(params: Mapping[str, Any], model_state: Any, x: Any, *, key: Any = None) -> Any:
    """x·kernel + bias (where there is one): the ``apply_fn`` of a linear original, or of a half.

    Args:
      params: ``"kernel"`` ``[inputs, outputs]``, and perhaps ``"bias"`` ``[outputs]``.
      model_state: returned as it is.
      x: ``[batch, inputs]``.
      key: not used.

    Raises:
      ValueError: if x is not as wide as the kernel is high.
    """
    if x.shape[-1] != len(params["kernel"]):
        raise ValueError(
            f"x must be [batch, {len(params['kernel'])}] for a kernel of {params['kernel'].shape}, got "
            f"{x.shape}"
        )
    return x @ params["kernel"] + params.get("bias", 0.0), model_state


def fold(params: Mapping[str, Any], coordinates: Coordinates) -> dict[str, dict[str, np.ndarray]]:
    """Takes a trained linear pair back to the data's own coordinates: a pair of the same form.

    Args:
      params: as :func:`init_linear` makes them.
      coordinates: in which they were trained.
    """
    wide = jax.tree.map(lambda p: np.asarray(p, np.float64), dict(params))
    encoder = coordinates.whiten @ wide["encoder"]["kernel"]
    decoder = coordinates.scale * wide["decoder"]["kernel"]
    bias = coordinates.offset + coordinates.scale * wide["decoder"]["bias"]
    bias = bias - coordinates.mean @ encoder @ decoder
    return {"encoder": {"kernel": encoder}, "decoder": {"kernel": decoder, "bias": bias}}


# --- codes ---------------------------------------------------------------------------------------


def compose(
    encoder_fn: Callable[..., Any],
    decoder_fn: Callable[..., Any],
    *,
    code: Callable[[jax.Array], jax.Array] = lambda values: values,
) -> Callable[..., Any]:
    """Makes one ``apply_fn`` of two: x → encoder → code → decoder.

    Args:
      encoder_fn: ``(params, model_state, x, *, key=None) -> (code, model_state)``.
      decoder_fn: likewise, from code to outputs.
      code: applied to the code on its way, such as :func:`quantise`.

    Returns:
      An ``apply_fn`` whose parameters and state are ``{"encoder": …, "decoder": …}``.
    """

    def apply_fn(params, model_state, x, *, key=None):
        keys = (None, None) if key is None else jax.random.split(key)
        first, second = model_state["encoder"], model_state["decoder"]
        values, first = encoder_fn(params["encoder"], first, x, key=keys[0])
        outputs, second = decoder_fn(params["decoder"], second, code(values), key=keys[1])
        return outputs, {"encoder": first, "decoder": second}

    return apply_fn


def quantise(code: jax.Array, *, bits: int) -> jax.Array:
    """Rounds a code to 2^bits levels in [−1, 1]; its gradient is that of the values before rounding.

    q = 2·round((2^b − 1)·(tanh(code) + 1)/2)/(2^b − 1) − 1: the straight-through estimator.

    Args:
      code: any shape, any real values.
      bits: b, 1 to 16.

    Returns:
      The shape of ``code``, float32 (float64 for float64 input): bfloat16 has no 2^8 levels.

    Raises:
      ValueError: if there are no such bits.

    References:
      Bengio, Léonard, Courville, `Estimating or Propagating Gradients Through Stochastic Neurons for
      Conditional Computation`, 2013, §4 (straight-through).

    >>> print(quantise(jnp.array([-3.0, -0.1, 0.4, 3.0]), bits=1))
    [-1. -1.  1.  1.]
    """
    levels = _levels(bits)
    smooth = jnp.tanh(to_float(code))
    rounded = jax.lax.stop_gradient(2 * jnp.round(levels * (smooth + 1) / 2) / levels - 1)
    # In this order the value is the rounded one exactly
    return rounded + (smooth - jax.lax.stop_gradient(smooth))


def pack(code: Any, *, bits: int) -> np.ndarray:
    """Writes a quantised code as the bytes that are sent: b bits a value, an example after another.

    Args:
      code: what :func:`quantise` returned, ``[n, ...]``.
      bits: those of it.

    Returns:
      uint8 ``[n, ceil(values · bits / 8)]``.

    Raises:
      ValueError: if a value is none of the 2^bits levels.

    >>> pack(jnp.array([[-1.0, 1.0, 1.0]]), bits=1)
    array([[96]], dtype=uint8)
    """
    values = np.asarray(code, np.float64).reshape(len(code), -1)
    levels = (values + 1) / 2 * _levels(bits)
    numbers = np.rint(levels).clip(0, _levels(bits))
    if not np.all(np.abs(levels - numbers) < 0.1):  # 16 bits in float32 are off by 4e-3
        raise ValueError(f"code must be what quantise(…, bits={bits}) returned")
    places = np.arange(bits - 1, -1, -1, dtype=np.uint32)
    digits = numbers.astype(np.uint32)[..., None] >> places & 1
    return np.packbits(digits.reshape(len(values), -1).astype(bool), axis=1)


def unpack(sent: np.ndarray, shape: tuple[int, ...], *, bits: int) -> np.ndarray:
    """Reads what :func:`pack` wrote: float32 ``[n, *shape]``.

    Args:
      sent: the bytes, ``[n, bytes an example]``.
      shape: of one example's code.
      bits: of each value.

    Raises:
      ValueError: if the bytes are not as many as such a code has.
    """
    count = int(np.prod(shape)) * bits
    if sent.ndim != 2 or sent.shape[1] != -(-count // 8):
        raise ValueError(
            f"a code of shape {shape} at {bits} bits is {-(-count // 8)} bytes an example, got an "
            f"array of shape {sent.shape}"
        )
    digits = np.unpackbits(sent, axis=1)[:, :count].reshape(len(sent), -1, bits).astype(np.float64)
    numbers = digits @ np.exp2(np.arange(bits - 1, -1, -1))
    return (2 * numbers / _levels(bits) - 1).astype(np.float32).reshape(len(sent), *shape)


def _levels(bits: int) -> int:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    return 2**bits - 1

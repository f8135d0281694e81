"""Prunes single weights of a trained network at once, by what its layers see on a few inputs: Wanda and SparseGPT.

Both go through the kernels (:func:`distill_jax.compress.low_rank.kernels`, and those with several axes of outputs) in
the order of the network. Each kernel is judged by the inputs that it gets when all kernels before it are
pruned. No labels, gradients or training are needed; to go on training with the zeros in their places, give the
masks to :func:`distill_jax.compress.sparsity.frozen`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.linalg import solve_triangular

from distill_jax._checks import check_count, check_fraction, check_positive
from distill_jax._model import Model, PyTree, check_model
from distill_jax.compress._masks import check_pattern, choose_leaves
from distill_jax.compress._products import check_batches, probe, replaced, rows_of_one, stacked
from distill_jax.weights.structure import by_path, path_name

__all__ = ["Pruned", "sparsegpt", "wanda"]

# (kernel as a matrix [inputs, outputs], triangle of its inputs) -> (the new matrix, what lives)
Edit = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


class Pruned(NamedTuple):
    """What :func:`wanda` and :func:`sparsegpt` return.

    Attributes:
      model: the model with zeros, in the same shapes.
      masks: a tree of the structure of its ``params``: for each pruned kernel a bool array, true where a weight lives;
        for all other leaves ``optax.MaskedNode``.
      errors: kernel → E‖xW − xW̃‖² / E‖xW‖² on its inputs in the pruned network.
    """

    model: Model
    masks: PyTree
    errors: dict[str, float]


def wanda(
    model: Model,
    batches: Sequence[PyTree],
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    exclude: Sequence[str] = (),
) -> Pruned:
    """Removes the weights of the lowest |w|·‖x‖ from each output of each kernel; the others stay as they are.

    ‖x‖ is the norm of the input that the weight multiplies, over all examples and places.

    Args:
      model: the model.
      batches: inputs, batch by batch.
      sparsity: the share of each output's weights that becomes zero, in [0, 1).
      pattern: (N, M), such as (2, 4), in place of ``sparsity``: of M neighbours along the inputs (the
        channels of a convolution), N live.
      exclude: regular expressions. A kernel in whose path (such as ``head.kernel``) one of them is found
        stays whole.

    Returns:
      The pruned model, its masks, and the errors of its layers.

    Raises:
      ValueError: if not one of ``sparsity`` and ``pattern`` is given, an expression of ``exclude`` is found in no path,
        no kernel is left, inputs cannot be cut into groups of M, or a layer's inputs are not finite.

    References:
      Sun et al., `A Simple and Effective Pruning Approach for Large Language Models`, 2024 (arXiv 2306.11695), Eq. 1
      and §3. There all layers of a block see the block before it pruned; here each layer sees all layers before it.

    >>> from distill_jax import models
    >>> model = models.from_function(lambda params, x: x @ params["w"], {"w": jnp.array([[1.0], [2.0]])})
    >>> wanda(model, [jnp.array([[3.0, 1.0]])], sparsity=0.5).model.params["w"].ravel()  # 1·3 is more than 2·1
    Array([1., 0.], dtype=float32)
    """
    _check_amount(sparsity, pattern)

    def edit(matrix: np.ndarray, triangle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = np.abs(matrix) * np.linalg.norm(triangle, axis=0)[:, None]
        groups = scores[None] if pattern is None else scores.reshape(-1, pattern[1], scores.shape[1])
        count = round(float(sparsity or 0) * len(scores)) if pattern is None else pattern[1] - pattern[0]
        lives = ~_lowest(groups, count).reshape(scores.shape)
        return np.where(lives, matrix, 0), lives

    return _one_by_one(model, batches, edit, pattern, exclude)


def sparsegpt(
    model: Model,
    batches: Sequence[PyTree],
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    exclude: Sequence[str] = (),
    damping: float = 0.01,
    block: int = 128,
) -> Pruned:
    """Removes weights of each kernel input by input, and corrects those of later inputs for what was removed.

    With H = E[xxᵀ] + λI and the Cholesky factor U of its inverse, UᵀU = H⁻¹, the weights of the lowest
    (w/u_ii)² go, and the rest of their outputs' weights changes by −w/u_ii · u_i, the least-squares correction.

    Args:
      model: the model.
      batches: inputs, batch by batch.
      sparsity: the share of weights that becomes zero, in [0, 1), ranked together over all outputs and the
        inputs of a block.
      pattern: (N, M), such as (2, 4), in place of ``sparsity``: of M neighbours along the inputs (the
        channels of a convolution), N live.
      exclude: regular expressions. A kernel in whose path (such as ``head.kernel``) one of them is found
        stays whole.
      damping: λ as a share of the mean square of the inputs, above 0.
      block: the number of inputs whose weights are chosen at once.

    Returns:
      The pruned model, its masks, and the errors of its layers.

    Raises:
      ValueError: in the cases of :func:`wanda`, or if ``block`` is no multiple of M.

    References:
      Frantar, Alistarh, `SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot`, 2023
      (arXiv 2301.00774), Algorithm 1. Its code removes one weight more of each block than asked for.

    >>> from distill_jax import models
    >>> model = models.from_function(lambda params, x: x @ params["w"], {"w": jnp.array([[1.0], [2.0]])})
    >>> x = jnp.array([[1.0, 1.0], [2.0, 2.0]])
    >>> pruned = sparsegpt(model, [x], sparsity=0.5, damping=1e-6)
    >>> print(np.asarray(pruned.model.params["w"]).ravel().round(3))  # one does the work of both
    [0. 3.]
    """
    _check_amount(sparsity, pattern)
    check_positive("damping", damping)
    check_count("block", block)
    if pattern is not None and block % pattern[1]:
        raise ValueError(f"block must be a multiple of pattern's M={pattern[1]}, got {block}")

    def edit(matrix: np.ndarray, triangle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factor = _inverse_factor(triangle, damping)
        pivots = np.diag(factor)[:, None]
        # The weights of inputs that are always zero go first
        left, lives = (
            np.where(np.square(triangle).sum(0)[:, None] > 0, matrix, 0),
            np.ones(matrix.shape, bool),
        )
        for start in range(0, len(left), block):
            stop = min(start + block, len(left))
            if pattern is None:
                scores = (left[start:stop] / pivots[start:stop]) ** 2
                gone = _lowest(scores.reshape(1, -1, 1), round(float(sparsity or 0) * scores.size))
                lives[start:stop] = ~gone.reshape(scores.shape)
            errors = np.zeros((stop - start, left.shape[1]))
            for i in range(start, stop):
                if pattern is not None and i % pattern[1] == 0:
                    some = slice(i, i + pattern[1])
                    scores = (left[some] / pivots[some]) ** 2
                    lives[some] = ~_lowest(scores[None], pattern[1] - pattern[0])[0]
                errors[i - start] = np.where(lives[i], 0, left[i]) / factor[i, i]
                left[i:stop] -= np.outer(factor[i, i:stop], errors[i - start])
            left[stop:] -= factor[start:stop, stop:].T @ errors
        return np.where(lives, left, 0), lives

    return _one_by_one(model, batches, edit, pattern, exclude)


def _check_amount(sparsity: float | None, pattern: tuple[int, int] | None) -> None:
    if (sparsity is None) == (pattern is None):
        raise ValueError(f"give either sparsity or pattern, got sparsity={sparsity} and pattern={pattern}")
    if sparsity is not None:
        check_fraction("sparsity", sparsity, without=1)
    if pattern is not None:
        check_pattern(pattern)


def _lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """Marks the ``count`` lowest scores along axis 1, the first among equal ones: bool of the same shape."""
    order = np.argsort(scores, axis=1, kind="stable")[:, :count]
    marks = np.zeros(scores.shape, bool)
    np.put_along_axis(marks, order, True, axis=1)
    return marks


def _inverse_factor(triangle: np.ndarray, damping: float) -> np.ndarray:
    """Computes the upper U with UᵀU = (RᵀR + λI)⁻¹ from the triangle R, without squaring its condition number."""
    count = triangle.shape[1]
    strength = damping * np.sum(triangle**2) / count or 1.0
    rows = np.concatenate([triangle, np.sqrt(strength) * np.eye(count)])
    # A triangle in reversed order: its transpose, turned back, is upper, and V·Vᵀ = H
    upper = np.asarray(np.linalg.qr(rows[:, ::-1], mode="r")).T[::-1, ::-1]
    return np.asarray(solve_triangular(upper, np.eye(count)))


def _one_by_one(
    model: Model,
    batches: Sequence[PyTree],
    edit: Edit,
    pattern: tuple[int, int] | None,
    exclude: Sequence[str],
) -> Pruned:
    """Edits the kernels in the order of the network, each on the inputs that it has when those before are pruned."""
    check_model("model", model)
    check_batches(batches)
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of expressions, such as ({exclude!r},)")
    chosen = by_path(choose_leaves(model.params, exclude, 2))
    every = probe(model, batches[0]).kernels
    kernels = {path: k for path, k in every.items() if chosen[path]}
    if not kernels:
        raise ValueError(
            f"model: none of {', '.join(p for p, c in chosen.items() if c)} multiplies as a matrix"
        )
    group = pattern[1] if pattern else 1
    if wrong := [path for path, kernel in kernels.items() if kernel.shape[kernel.summed[-1]] % group]:
        raise ValueError(
            f"pattern: the inputs of {', '.join(wrong)} are no multiple of M={group}: exclude them"
        )
    masks, errors = {}, {}
    model = jax.tree.map(jnp.asarray, model)
    names = jax.tree_util.tree_map_with_path(lambda place, _: path_name(place), model.params)
    for path, kernel in kernels.items():
        matrix, triangle = kernel.matrix(by_path(model.params)[path]), None
        for x in batches:
            triangle = stacked(triangle, rows_of_one(model, x, every, path))
        assert triangle is not None
        new, lives = edit(matrix, triangle)
        errors[path] = float(
            np.sum((triangle @ (new - matrix)) ** 2) / (np.sum((triangle @ matrix) ** 2) or 1.0)
        )
        masks[path] = jnp.asarray(kernel.array(lives))
        model = model.replace(params=replaced(model.params, names, {path: kernel.array(new)}))

    def mask(path: tuple[object, ...], leaf: jax.Array) -> object:
        return masks.get(path_name(path), optax.MaskedNode())

    return Pruned(model, jax.tree_util.tree_map_with_path(mask, model.params), errors)

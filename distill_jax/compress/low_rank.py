"""Replaces kernels by low-rank factors, in any model, without editing it.

:func:`kernels` traces a model and finds the parameters that multiply as matrices: dense and convolution
kernels. :func:`factorise` replaces chosen kernels by two thin factors (:class:`Factors`). The model it returns
runs the same program with two thin products in place of each of these kernels, so that parameters, operations
and time really fall:

- x·W becomes (x·E)·D, with W ≈ E·D of rank r;
- a k×k convolution becomes one with r channels, and a 1×1 convolution after it.

The factors are the best for the inputs that the layer sees (:func:`layer_roots`), or for W alone.
:func:`allocate` chooses the ranks for a budget, by what each layer's spectrum says it would lose.
"""

import functools
import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import _jaxpr
from distill_jax._checks import BudgetError, check_choice, check_count, check_fraction, check_mapping
from distill_jax._model import ApplyFn, Model, PyTree, check_inputs, check_model, example_count
from distill_jax.compress import linear_codes
from distill_jax.compress._products import Kernel, is_closed, probe, rows_of, stacked
from distill_jax.weights.structure import by_path, path_name

__all__ = ["Factors", "Kernel", "allocate", "factorise", "kernels", "layer_roots", "ranks_of"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["encoder", "decoder"], meta_fields=["axis"])
@dataclass(frozen=True)
class Factors:
    """A kernel of rank r, as two arrays in the place of one parameter.

    Attributes:
      encoder: E, of the kernel's shape, but with r in place of the number of outputs.
      decoder: D, ``[r, outputs]``.
      axis: the axis of the kernel that holds its outputs.
    """

    encoder: jax.Array
    decoder: jax.Array
    axis: int


def kernels(model: Model, x: PyTree) -> dict[str, Kernel]:
    """Lists the parameters that can be factorised, by path, in the order of computation.

    These are the left or right sides of matrix products over all their axes but one, and the kernels of
    ungrouped convolutions. A parameter that is also used in another way is left out. Nothing is computed.

    Args:
      model: the model; its arrays may be ``jax.ShapeDtypeStruct``.
      x: a batch of inputs, or ``jax.ShapeDtypeStruct``.

    Returns:
      path → the kernel's shape, axes and number of uses per example.

    Raises:
      ValueError: if ``model`` is no Model, or one from :func:`distill_jax.models.load`, whose program is closed.
    """
    check_model("model", model)
    check_inputs("x", x)
    found = probe(model, x).kernels
    if not found and is_closed(model, x):
        raise ValueError(
            "model: it was loaded from a file, and its program is closed, so no kernel can be factorised: factorise "
            "the model before models.save"
        )
    return {path: kernel for path, kernel in found.items() if kernel.free == 1}


def layer_roots(model: Model, x: PyTree, *, batch: int = 256) -> dict[str, np.ndarray]:
    """Computes a root of the second moments of each kernel's inputs, see :func:`linear_codes.root`.

    Args:
      model: the model.
      x: inputs ``[n, ...]``. There should be more of them than inputs of the widest layer (for a
        convolution, n times the number of positions counts, against kernel area times channels). With
        fewer, the root cannot tell all directions apart.
      batch: number of examples at a time.

    Returns:
      path → float64 ``[at most inputs, inputs]``, with the inputs in the order of :class:`Kernel`.

    Raises:
      ValueError: if a layer's inputs are not finite.
    """
    check_model("model", model)
    check_count("batch", batch)
    examples = example_count("x", x)
    roots: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for start in range(0, examples, batch):
        part = jax.tree.map(lambda leaf, i=start: leaf[i : i + batch], x)
        for path, values in rows_of(model, part).items():
            roots[path] = stacked(roots.get(path), values)
            counts[path] = counts.get(path, 0) + len(values)
    return {path: root / np.sqrt(counts[path]) for path, root in roots.items()}


def allocate(
    model: Model,
    kernels: Mapping[str, Kernel],
    budget: float,
    *,
    of: Literal["parameters", "flops"] = "parameters",
    roots: Mapping[str, np.ndarray] | None = None,
) -> dict[str, int]:
    """Chooses a rank for each kernel, so that the model costs at most a given share of its cost now.

    The ranks make Π (Σ_{i≤r} s_i²)/(Σ s_i²) large, the product over kernels of the share of energy that is
    kept, where s are the singular values of root·W. The choice is greedy: each kernel has rank 1 at first, and the next
    direction is the one with the highest log gain per unit of cost. A kernel whose factors would cost as much
    as it does stays whole.

    Args:
      model: the model to be factorised.
      kernels: the kernels that may be factorised, from :func:`kernels`. All other parameters stay as they
        are.
      budget: the share of the model's cost that may be left, in (0, 1].
      of: the cost: ``"parameters"`` counts all parameters; ``"flops"`` counts the multiplications of the
        kernels alone.
      roots: from :func:`layer_roots`; None to use the kernels' own spectra.

    Returns:
      path → rank, without the kernels that stay whole.

    Raises:
      ValueError: if ``budget`` is out of range, or even ranks of 1 exceed it.
    """
    check_fraction("budget", budget, without=0)
    check_choice("of", of, ("parameters", "flops"))
    check_model("model", model)
    check_mapping("kernels", kernels, "path → Kernel, from low_rank.kernels")
    leaves = _check_kernels(model, kernels, roots, kernels)
    if not kernels:
        raise ValueError("kernels must hold at least one kernel, from low_rank.kernels, got none")
    weight = {p: k.positions if of == "flops" else 1.0 for p, k in kernels.items()}
    total = sum(weight[p] * k.inputs * k.outputs for p, k in kernels.items())
    fixed = 0
    if of == "parameters":
        fixed = sum(leaf.size for path, leaf in leaves.items() if path not in kernels)
    left = budget * (total + fixed) - fixed
    energy, ranks, steps = {}, dict.fromkeys(kernels, 0), []
    for path, kernel in kernels.items():
        root = np.eye(kernel.inputs) if roots is None else roots[path]
        tail = linear_codes.optimum(kernel.matrix(leaves[path]), root)
        energy[path] = tail[0] - tail

    def step(path):
        """Returns the next step of a kernel: (−log gain per unit of cost, path, rank, cost)."""
        kernel, rank, kept = kernels[path], ranks[path] + 1, energy[path]
        whole = rank * (kernel.inputs + kernel.outputs) >= kernel.inputs * kernel.outputs
        thin = (rank - 1) * (kernel.inputs + kernel.outputs)
        more = kernel.inputs * kernel.outputs - thin if whole else kernel.inputs + kernel.outputs
        rank = len(kept) - 1 if whole else rank
        before, after = kept[ranks[path]], kept[rank]
        # Every kernel gets its first rank; one of zeros, no more before all others are whole
        gain = math.log(after / before) if before > 0 else 0.0 if ranks[path] else math.inf
        return -gain / more, path, rank, weight[path] * more

    steps = [step(path) for path in kernels]
    heapq.heapify(steps)
    while steps:
        _, path, rank, cost = heapq.heappop(steps)
        if cost > left:
            if ranks[path] == 0:
                raise BudgetError(
                    f"budget: ranks of 1 already exceed {budget:g} of the model's {of}: allow more, "
                    "or give fewer kernels",
                    "budget",
                )
            continue
        left -= cost
        ranks[path] = rank
        if rank + 1 < len(energy[path]):
            heapq.heappush(steps, step(path))
    return {path: rank for path, rank in ranks.items() if rank + 1 < len(energy[path])}


def _check_kernels(
    model: Model, kernels: Mapping[str, Kernel], roots: Mapping[str, np.ndarray] | None, paths: Iterable[str]
) -> dict[str, Any]:
    """Returns a model's parameters by path, or raises ``ValueError`` if its kernels or roots are other ones."""
    leaves = by_path(model.params)
    for path in paths:
        shape = kernels[path].shape
        if path not in leaves or leaves[path].shape != shape:
            found = leaves[path].shape if path in leaves else "absent"
            raise ValueError(
                f"kernels: {path!r} of shape {shape} is {found} in the model: give low_rank.kernels of this model"
            )
        if roots is not None and path not in roots:
            raise ValueError(f"roots has none of {path!r}, only of {list(roots)}")
    return leaves


def factorise(
    model: Model,
    kernels: Mapping[str, Kernel],
    ranks: Mapping[str, int],
    *,
    roots: Mapping[str, np.ndarray] | None = None,
) -> Model:
    """Replaces kernels by their best low-rank factors.

    Args:
      model: the model.
      kernels: its kernels, from :func:`kernels`.
      ranks: path → rank, from :func:`allocate` or chosen by hand. Other parameters stay as they are.
      roots: from :func:`layer_roots`, for the factors that lose least on the data; None for the factors
        nearest to the kernels (a plain SVD).

    Returns:
      A model that has :class:`Factors` in the places of the kernels and runs with them, in training and
      evaluation mode, and under ``jit``, ``grad``, ``vmap`` and the like. It performs the model's
      operations, except for two products in place of one where there are factors. Each call traces it
      anew, so use it within ``jit``.

    Raises:
      ValueError: if a path is not among the kernels, or a rank does not fit; when called, if a parameter
        is used in a way in which factors cannot replace it.

    >>> from distill_jax import models
    >>> model = models.from_function(lambda params, x: jnp.tanh(x @ params["w"]), {"w": jnp.ones((3, 4))})
    >>> x = jnp.ones((2, 3))
    >>> thin = factorise(model, kernels(model, x), {"w": 1})
    >>> thin.params["w"].encoder.shape, thin.params["w"].decoder.shape
    ((3, 1), (1, 4))
    >>> bool(jnp.allclose(thin(x), model(x)))
    True
    """
    check_mapping("ranks", ranks, "path → rank")
    check_model("model", model)
    check_mapping("kernels", kernels, "path → Kernel, from low_rank.kernels")
    for path in ranks:
        if path not in kernels:
            raise ValueError(f"ranks: no kernel is named {path!r}, only {', '.join(kernels)}")
    _check_kernels(model, kernels, roots, ranks)

    def replace(path, leaf):
        path = path_name(path)
        if path not in ranks:
            return leaf
        kernel = kernels[path]
        root = np.eye(kernel.inputs) if roots is None else roots[path]
        try:
            factors = linear_codes.reduced_rank(kernel.matrix(leaf), root, ranks[path])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        inputs = [kernel.shape[axis] for axis in kernel.order[:-1]]
        encoder = factors.encoder.reshape(*inputs, ranks[path])
        encoder = encoder.transpose(np.argsort(kernel.order))
        dtype = leaf.dtype
        return Factors(jnp.asarray(encoder, dtype), jnp.asarray(factors.decoder, dtype), kernel.order[-1])

    apply_fn = model.apply_fn if isinstance(model.apply_fn, _FactoredFn) else _FactoredFn(model.apply_fn)
    return Model(apply_fn, jax.tree_util.tree_map_with_path(replace, model.params), model.state)


@dataclass(frozen=True)
class _FactoredFn:
    """An ``apply_fn`` that takes :class:`Factors` in the place of kernels; equal for equal functions."""

    apply_fn: ApplyFn

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        def whole(leaf):
            if not _is_factors(leaf):
                return leaf
            shape = list(leaf.encoder.shape)
            shape[leaf.axis] = leaf.decoder.shape[1]
            return jax.ShapeDtypeStruct(shape, leaf.encoder.dtype)

        pairs = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_factors)
        values = [_jaxpr.View(leaf, path_name(path)) if _is_factors(leaf) else leaf for path, leaf in pairs]
        like = jax.tree.map(whole, params, is_leaf=_is_factors)
        return _jaxpr.run(self.apply_fn, [like, state, x, key], values, _multiply)


def ranks_of(model: Model) -> dict[str, int]:
    """Returns the ranks of the factors in a model's parameters, by path.

    Args:
      model: a model from :func:`factorise`.

    Returns:
      path → rank, for the parameters that are :class:`Factors`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=_is_factors)
    return {path_name(path): leaf.decoder.shape[0] for path, leaf in leaves if _is_factors(leaf)}


def _is_factors(x: Any) -> bool:
    return isinstance(x, Factors)


def _multiply(jaxpr: Any, eqn: Any, inputs: list[Any], views: list[int]) -> list[Any]:
    """Multiplies by factors in place of a kernel: first by the encoder, then by the decoder."""
    place, view = views[0], inputs[views[0]]
    rank = view.value.encoder.ndim
    axes = _jaxpr.outputs_axes(eqn, place, rank) if len(views) == 1 else None
    if not axes or [view.order(rank)[axis] for axis in axes] != [view.value.axis]:
        raise ValueError(
            f"{view.path} is used by {eqn.primitive.name!r}, where factors cannot replace it: leave it whole"
        )
    operands = list(inputs)
    operands[place] = view.array(view.value.encoder)
    code = _jaxpr.product(eqn, operands)
    if eqn.primitive.name == "conv_general_dilated":
        axis = eqn.params["dimension_numbers"].out_spec[1]
    else:
        axis = code.ndim - 1 if place else 0
    decoder = view.value.decoder.astype(code.dtype)
    precision = eqn.params["precision"]
    outputs = jax.lax.dot_general(code, decoder, (((axis,), (0,)), ((), ())), precision=precision)
    return [jnp.moveaxis(outputs, -1, axis)]

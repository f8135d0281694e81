"""Low-rank factors in the place of kernels, in any model, without editing it.

:func:`kernels` traces an ``apply_fn`` and finds the parameters that multiply as matrices: dense and
convolution kernels. :func:`factorise` replaces chosen ones by :class:`Factors`, and :func:`factored`
makes an ``apply_fn`` that runs the same program with two thin products in the place of each of them, so
that parameters, FLOPs and time really fall:

- x·W becomes (x·E)·D, with W ≈ E·D of rank r;
- a k×k convolution becomes one of r channels, and a 1×1 convolution after it.

The factors are best for the layer's own inputs (:func:`layer_roots`), or for W alone, and the ranks
share out a budget by what each layer's spectrum says it would lose (:func:`allocate`).
"""

import functools
import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import _jaxpr
from distill_jax.compress import linear_codes
from distill_jax.weights.structure import by_path, path_name

PyTree = Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["encoder", "decoder"], meta_fields=["axis"])
@dataclass(frozen=True)
class Factors:
    """A kernel of rank r: one leaf of the original's parameters, now two.

    Attributes:
      encoder: the kernel's shape, but r where the outputs were.
      decoder: ``[r, outputs]``.
      axis: which of the kernel's axes the outputs were.
    """

    encoder: Any
    decoder: Any
    axis: int


class Kernel(NamedTuple):
    """A parameter that multiplies its layer's inputs as a matrix ``[inputs, outputs]``.

    Attributes:
      shape: of the parameter.
      order: its axes in the order of the matrix: those of the inputs, last that of the outputs.
      positions: at how many places of an example it is applied; 1 for a dense layer on a vector.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    positions: float

    @property
    def outputs(self) -> int:
        """Columns of the matrix."""
        return self.shape[self.order[-1]]

    @property
    def inputs(self) -> int:
        """Rows of the matrix."""
        return math.prod(self.shape) // self.outputs

    def matrix(self, array: Any) -> np.ndarray:
        """The parameter as float64 ``[inputs, outputs]``."""
        array = np.transpose(np.asarray(array, np.float64), self.order)
        return array.reshape(-1, self.outputs)


def kernels(apply_fn: Callable[..., Any], params: PyTree, model_state: PyTree, x: Any) -> dict[str, Kernel]:
    """Lists the parameters that can be factorised, by path, in the order of computation.

    Those are the right or left sides of matrix products over all their axes but one, and the kernels
    of ungrouped convolutions. A parameter that is also used otherwise is left out. Nothing is computed.

    Args:
      apply_fn: ``(params, model_state, x, *, key=None) -> (outputs, model_state)``, as in
        :class:`distill_jax.models.Model`.
      params: arrays, or ``jax.ShapeDtypeStruct``.
      model_state: likewise.
      x: likewise, a batch of inputs.
    """
    found, _ = _probe(apply_fn, params, model_state, x)
    return found


def layer_roots(
    apply_fn: Callable[..., Any], params: PyTree, model_state: PyTree, x: Any, *, batch: int = 256
) -> dict[str, np.ndarray]:
    """Computes a root of the second moments of each kernel's inputs: see :func:`codec.root`.

    Args:
      apply_fn: as for :func:`kernels`.
      params: the original's.
      model_state: likewise.
      x: inputs ``[n, ...]``: more than the widest layer's inputs (of a convolution: kernel area times
        channels, over its positions), or the root has too few rows to tell all directions.
      batch: examples at a time.

    Returns:
      path → float64 ``[at most inputs, inputs]``, the inputs in the order of :class:`Kernel`.

    Raises:
      ValueError: if a layer's inputs are not finite.
    """

    @jax.jit
    def rows(part):
        return _probe(apply_fn, params, model_state, part, rows=True)[1]

    roots: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for start in range(0, len(x), batch):
        for path, values in rows(jnp.asarray(x[start : start + batch])).items():
            values = np.asarray(values, np.float64)
            if not np.isfinite(values).all():
                raise ValueError(
                    f"the inputs of {path} are not finite: check the original's parameters and x"
                )
            count = counts.get(path, 0)
            total = counts[path] = count + len(values)
            before = [np.sqrt(count) * roots[path]] if count else []
            stacked = np.concatenate([*before, values]) / np.sqrt(total)
            roots[path] = np.asarray(np.linalg.qr(stacked, mode="r"))
    return roots


def allocate(
    params: PyTree,
    kernels: Mapping[str, Kernel],
    budget: float,
    *,
    of: Literal["parameters", "flops"] = "parameters",
    roots: Mapping[str, np.ndarray] | None = None,
) -> dict[str, int]:
    """Chooses a rank for each kernel, so that a model is at most ``budget`` of its size.

    The product over kernels of the share of energy that is kept, Π (Σ_{i≤r} s_i²)/(Σ s_i²) with s the
    singular values of root·W, is made large greedily: each kernel has rank 1 at first, and the next
    direction is the one with the highest log gain a unit of cost. A kernel whose factors would cost as
    much as it does stays whole.

    Args:
      params: the original's.
      kernels: those to factorise, from :func:`kernels`; what is not among them stays as it is.
      budget: the share of the original's cost, in (0, 1].
      of: what is counted: ``"parameters"``, all of them; or ``"flops"``, the multiplications of the
        kernels alone.
      roots: from :func:`layer_roots`; None for the kernels' own spectra.

    Returns:
      path → rank, without those that stay whole.

    Raises:
      ValueError: if even ranks of 1 exceed the budget.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget must lie in (0, 1], got {budget}")
    leaves = by_path(params)
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
        """(−log gain a unit of cost, path, rank, cost), the next for a kernel."""
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
                raise ValueError(
                    f"budget: ranks of 1 already exceed {budget:g} of the original's {of}: allow more, "
                    "or give fewer kernels"
                )
            continue
        left -= cost
        ranks[path] = rank
        if rank + 1 < len(energy[path]):
            heapq.heappush(steps, step(path))
    return {path: rank for path, rank in ranks.items() if rank + 1 < len(energy[path])}


def factorise(
    params: PyTree,
    kernels: Mapping[str, Kernel],
    ranks: Mapping[str, int],
    *,
    roots: Mapping[str, np.ndarray] | None = None,
) -> PyTree:
    """Replaces kernels by their best factors, for :func:`factored`.

    Args:
      params: the original's.
      kernels: from :func:`kernels`.
      ranks: path → rank, from :func:`allocate` or by hand; other parameters stay as they are.
      roots: from :func:`layer_roots`, for the factors that lose least on the data; None for those
        nearest to the kernels (a plain SVD).

    Returns:
      The parameters with :class:`Factors` in the kernels' places, of their dtypes.

    Raises:
      ValueError: if a path is not among the kernels, or a rank does not fit.
    """
    for path in ranks:
        if path not in kernels:
            raise ValueError(f"ranks: no kernel is named {path!r}, only {', '.join(kernels)}")

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

    return jax.tree_util.tree_map_with_path(replace, params)


def factored(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an ``apply_fn`` that takes :class:`Factors` in the place of kernels.

    Args:
      apply_fn: the original's.

    Returns:
      An ``apply_fn`` for parameters from :func:`factorise`. It runs the original's operations, but two
      products where there are factors, in training and in evaluation mode, under ``jit``, ``grad``,
      ``vmap`` and the like. It is traced anew at each call: put it under ``jit``.

    Raises:
      ValueError: when traced, if a parameter is used in a way that factors cannot stand in for.

    >>> def apply_fn(params, model_state, x, *, key=None):
    ...     return jnp.tanh(x @ params["w"]), model_state
    >>> params, x = {"w": jnp.ones((3, 4))}, jnp.ones((2, 3))
    >>> thin = factorise(params, kernels(apply_fn, params, {}, x), {"w": 1})
    >>> thin["w"].encoder.shape, thin["w"].decoder.shape
    ((3, 1), (1, 4))
    >>> bool(jnp.allclose(factored(apply_fn)(thin, {}, x)[0], apply_fn(params, {}, x)[0]))
    True
    """

    def thin_fn(params, model_state, x, *, key=None):
        def whole(leaf):
            if not isinstance(leaf, Factors):
                return leaf
            shape = list(leaf.encoder.shape)
            shape[leaf.axis] = leaf.decoder.shape[1]
            return jax.ShapeDtypeStruct(shape, leaf.encoder.dtype)

        leaves, structure = jax.tree.flatten(params, is_leaf=_is_factors)
        arguments = [jax.tree.unflatten(structure, map(whole, leaves)), model_state, x, key]
        values = [
            _jaxpr.View(leaf, path_name(path)) if _is_factors(leaf) else leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_factors)
        ]
        return _jaxpr.run(apply_fn, arguments, values, _multiply)

    return thin_fn


def ranks_of(params: PyTree) -> dict[str, int]:
    """The ranks of the factors in a model's parameters, by path.

    Args:
      params: from :func:`factorise`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_factors)
    return {path_name(path): leaf.decoder.shape[0] for path, leaf in leaves if _is_factors(leaf)}


def _is_factors(x: Any) -> bool:
    return isinstance(x, Factors)


def _multiply(jaxpr: Any, eqn: Any, inputs: list[Any], views: list[int]) -> list[Any]:
    """A product with factors: first with the encoder, then with the decoder."""
    place, view = views[0], inputs[views[0]]
    rank = view.value.encoder.ndim
    axis = _jaxpr.outputs_axis(eqn, place, rank) if len(views) == 1 else None
    if axis is None or view.order(rank)[axis] != view.value.axis:
        raise ValueError(
            f"{view.path} is used by {eqn.primitive.name!r}, where no factors can stand in for it: "
            "leave it whole"
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


def _probe(
    apply_fn: Callable[..., Any], params: PyTree, model_state: PyTree, x: Any, *, rows: bool = False
) -> tuple[dict[str, Kernel], dict[str, jax.Array]]:
    """Runs a model and notes its kernels, and if wanted the rows ``[any, inputs]`` they multiply."""
    found: dict[str, Kernel] = {}
    seen: dict[str, list[jax.Array]] = {}
    spoiled: set[str] = set()

    def note(jaxpr, eqn, inputs, views):
        arrays = [v.array(v.value) if isinstance(v, _jaxpr.View) else v for v in inputs]
        outputs = _jaxpr.alone(jaxpr, eqn, arrays)
        for place in views:
            view = inputs[place]
            axis = _jaxpr.outputs_axis(eqn, place, view.value.ndim) if len(views) == 1 else None
            if axis is None:
                spoiled.add(view.path)
                continue
            axes = view.order(view.value.ndim)
            inner = _jaxpr.summed_axes(eqn, place)
            order = tuple(axes[i] for i in (*inner, axis))
            kernel = Kernel(tuple(view.value.shape), order, 0.0)
            positions = outputs[0].size / (kernel.outputs * len(batch_of))
            if view.path in found and found[view.path].order != order:
                spoiled.add(view.path)
            before = found[view.path].positions if view.path in found else 0.0
            found[view.path] = kernel._replace(positions=before + positions)
            if rows:
                seen.setdefault(view.path, []).append(_jaxpr.rows_of(eqn, arrays, place))
        return outputs

    def run(params, model_state, x):
        pairs = jax.tree_util.tree_leaves_with_path(params)
        values = [_jaxpr.View(leaf, path_name(path)) if leaf.ndim > 1 else leaf for path, leaf in pairs]
        _jaxpr.run(apply_fn, [params, model_state, x, None], values, note)
        return {path: jnp.concatenate(parts) for path, parts in seen.items() if path not in spoiled}

    batch_of = jax.tree.leaves(x)[0]
    collected = run(params, model_state, x) if rows else jax.eval_shape(run, params, model_state, x)
    return {path: kernel for path, kernel in found.items() if path not in spoiled}, collected

"""Which parameters of a model become integers, and with which scales."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import _jaxpr
from distill_jax._checks import check_sequence
from distill_jax._model import ApplyFn, Model, PyTree, check_inputs, check_model
from distill_jax.compress import _integers
from distill_jax.compress._masks import choose_leaves
from distill_jax.compress._products import is_closed
from distill_jax.losses._arguments import to_float
from distill_jax.weights.structure import by_path, path_name

RATIOS = np.linspace(1, 0.3, 71)  # of a scale to that of the largest weight, among which the best is taken
MOST = (2**31 - 1) // (255 * 127)  # products of codes whose sum int32 holds
TINY = 2.0**-100  # the least scale, whose inverse float32 can hold


@dataclass
class Found:
    """A kernel: the axes that no use sums over, the last one that the first use sums over, and the inputs' range.

    ``terms`` is the number of products in a sum.
    """

    own: frozenset[int]
    last: int
    terms: int
    low: Any = None
    high: Any = None


def find(
    model: Model, batches: Sequence[PyTree], activations: bool, percentile: float, exclude: Sequence[str]
) -> dict[str, Found]:
    """Finds the kernels of a model in the order of computation, and the ranges of their inputs if wanted."""
    check_model("model", model)
    check_sequence("batches", batches, "batches of inputs")
    if not len(batches):
        raise ValueError("batches: give at least one batch of inputs, got none")
    if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 50 < percentile <= 100:
        raise ValueError(f"percentile must lie in (50, 100], got {percentile!r}")
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a sequence of expressions, such as ({exclude!r},)")
    for x in batches:
        check_inputs("batches", x)
    first, *others = [jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], x) for x in batches]
    for number, other in enumerate(others, 1):
        if other != first:
            raise ValueError(
                f"batches: all examples must have one shape, got {first} in batch 0 and {other} in batch {number}"
            )
    chosen = by_path(choose_leaves(model.params, exclude, 2))
    try:
        found = _kernels(model, batches[0])
    except Exception as error:  # Whatever the model raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"batches: the model does not take inputs of shape {first}: {reason}") from error
    found = {path: kernel for path, kernel in found.items() if chosen[path]}
    if not found:
        why = "none multiplies in a matrix product or convolution that can be seen"
        if is_closed(model, batches[0]):
            why = (
                "it was loaded from a file, and its program is closed: quantise the model before models.save"
            )
        raise ValueError(f"model: no kernel to quantise among {', '.join(by_path(model.params))}: {why}")
    if long := [path for path, kernel in found.items() if activations and kernel.terms > MOST]:
        raise ValueError(
            f"activations: {', '.join(long)} sums over more than {MOST:,} inputs, and its sums of integers may not fit "
            "into 32 bits: exclude it"
        )
    for number, x in enumerate(batches if activations else ()):
        for path, (low, high) in _ranges(model, x, float(percentile)).items():
            if path not in found:
                continue
            if not np.isfinite([low, high]).all():
                raise ValueError(
                    f"batches: the inputs of {path} are not finite in batch {number}: check the data and the model"
                )
            kernel = found[path]
            kernel.low = low if kernel.low is None else np.minimum(kernel.low, low)
            kernel.high = high if kernel.high is None else np.maximum(kernel.high, high)
    return found


def _kernels(model: Model, x: PyTree) -> dict[str, Found]:
    found: dict[str, Found] = {}

    def note(path: str, view: Any, eqn: Any, place: int, other: jax.Array) -> None:
        rank = view.value.ndim
        axes = [view.order(rank)[i] for i in _integers.summed_axes(eqn, place) or ()]
        own = frozenset(range(rank)) - set(axes)
        terms = math.prod(view.value.shape[axis] for axis in axes)
        first = found.setdefault(path, Found(own, axes[-1], terms))
        first.own, first.terms = first.own & own, max(first.terms, terms)

    jax.eval_shape(functools.partial(_walk, model.apply_fn, note), model.params, model.state, x)
    return found


@functools.partial(jax.jit, static_argnames="percentile")
def _ranges(model: Model, x: PyTree, percentile: float) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Computes the range of what each kernel multiplies on a batch."""
    found: dict[str, tuple[jax.Array, jax.Array]] = {}

    def note(path: str, view: Any, eqn: Any, place: int, other: jax.Array) -> None:
        other = to_float(other)
        low, high = other.min(), other.max()
        if percentile < 100:  # min and max would not tell of NaN that sorting puts last
            bounds = jnp.percentile(other, jnp.array([100 - percentile, percentile]))
            low, high = jnp.where(jnp.isfinite(low + high), bounds, jnp.nan)
        before = found.get(path, (low, high))
        found[path] = jnp.minimum(low, before[0]), jnp.maximum(high, before[1])

    _walk(model.apply_fn, note, model.params, model.state, x)
    return found


def _walk(apply_fn: ApplyFn, note: Any, params: PyTree, state: PyTree, x: PyTree) -> None:
    """Runs a model and calls ``note`` for each product of one parameter with something else."""

    def use(jaxpr: Any, eqn: Any, inputs: list[Any], views: list[int]) -> list[Any]:
        arrays = [v.array(v.value) if isinstance(v, _jaxpr.View) else v for v in inputs]
        view = inputs[views[0]]
        if len(views) == 1 and _integers.summed_axes(eqn, views[0]) is not None:
            note(view.path, view, eqn, views[0], arrays[1 - views[0]])
        return _jaxpr.alone(jaxpr, eqn, arrays)

    pairs = jax.tree_util.tree_leaves_with_path(params)
    kernels = [leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating) for _, leaf in pairs]
    values = [
        _jaxpr.View(leaf, path_name(path)) if kernel else leaf
        for (path, leaf), kernel in zip(pairs, kernels, strict=True)
    ]
    _jaxpr.run(apply_fn, [params, state, x, None], values, use)


def weight_scales(path: str, leaf: jax.Array, parts: Sequence[int], bits: int, how: str) -> jax.Array:
    """Chooses the scales of a kernel, one for each of ``parts`` along each axis."""
    weights = np.asarray(leaf, np.float64)
    if not np.isfinite(weights).all():
        raise ValueError(f"model: the weights of {path} are not finite: check the training")
    limit, rank = _integers.highest(bits), weights.ndim
    sizes = [
        size for pair in zip(parts, weights.shape, strict=True) for size in (pair[0], pair[1] // pair[0])
    ]
    blocks = weights.reshape(sizes).transpose(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
    blocks = blocks.reshape(*parts, -1)
    widest = np.maximum(np.abs(blocks).max(-1, keepdims=True) / limit, TINY)
    best, least = widest, np.full(widest.shape, np.inf)
    for ratio in RATIOS if how == "least squares" else (1.0,):
        scale = widest * ratio
        codes = np.clip(np.rint(blocks / scale), -limit, limit)
        error = np.sum((blocks - codes * scale) ** 2, -1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return jnp.asarray(best[..., 0], jnp.float32)


def input_scale(low: Any, high: Any) -> dict[str, jax.Array]:
    """Computes scale and code of 0 of a range, which is widened so that it contains 0."""
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    first, last = _integers.INT8
    scale = max((high - low) / (last - first), TINY)
    zero = np.clip(np.rint(first - low / scale), first, last) + 0.0  # not −0
    return {"input_scale": jnp.float32(scale), "input_zero": jnp.float32(zero)}

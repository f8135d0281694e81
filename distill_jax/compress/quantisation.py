"""Quantises weights to int8 or int4 and activations to int8, in any model, without editing it.

:func:`quantise` finds the kernels of matrix products and convolutions in a model's program, holds them as integers
with one scale per output, and returns a model that computes with these. Activations, the inputs of those
products, can become int8 too, by the ranges that they have on calibration data. :func:`simulate` makes the model
that is trained with the rounding in place, by distillation from the original or otherwise, and :func:`freeze` turns
that into integers with equal outputs.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import _jaxpr
from distill_jax._checks import check_choice, check_count
from distill_jax._model import ApplyFn, Model, PyTree, check_model
from distill_jax.compress import _integers, _scales
from distill_jax.weights.structure import by_path, path_name, scalars

__all__ = ["Quantised", "dequantise", "freeze", "layers", "quantise", "simulate"]

BITS = (4, 8)
LEAST_RATIO = 1 / 64  # of a learned scale to that at the start


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stored", "scale", "input_scale", "input_zero"],
    meta_fields=["shape", "bits", "dtype"],
)
@dataclass(frozen=True)
class Quantised:
    """A kernel as integers, in the place of the parameter: it means ``codes·scale``.

    Attributes:
      stored: int8 of the kernel's shape; with 4 bits uint8 ``[ceil(n/2)]``, two codes per byte in row-major order,
        the first in the low half.
      scale: float32, of as many axes as the kernel. An axis has the kernel's size if each of its indices has scales
        of its own (the outputs), size 1 if they share one, and the number of groups in between.
      input_scale: float32 scalar, the scale of what the kernel multiplies; None if that is not quantised.
      input_zero: float32 scalar, the int8 code that means 0 in what the kernel multiplies; or None.
      shape: the kernel's shape.
      bits: 4 or 8.
      dtype: the kernel's dtype before it was quantised, in which the model computes.
    """

    stored: jax.Array
    scale: jax.Array
    input_scale: jax.Array | None
    input_zero: jax.Array | None
    shape: tuple[int, ...]
    bits: int
    dtype: Any

    @property
    def codes(self) -> jax.Array:
        """The integers, int8 of the kernel's shape."""
        return _integers.unpack(self.stored, self.shape) if self.bits == 4 else self.stored

    def array(self) -> jax.Array:
        """The numbers that the integers mean, of the kernel's shape and dtype."""
        return _layer(self, None).array()


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["weight", "ratio", "input_ratio"], meta_fields=["bits"]
)
@dataclass(frozen=True)
class _Learned:
    """A kernel that is rounded wherever it is used, and its scales relative to those at the start."""

    weight: jax.Array
    ratio: jax.Array
    input_ratio: jax.Array | None
    bits: int


@dataclass(frozen=True)
class _Layer:
    """A kernel as the running program needs it: codes in a floating type, with their gradient."""

    codes: jax.Array
    scale: jax.Array
    input_scale: jax.Array | None
    input_zero: jax.Array | None
    dtype: Any

    def array(self) -> jax.Array:
        return (self.codes * _integers.spread_over(self.scale, self.codes.shape)).astype(self.dtype)


def _layer(leaf: Quantised | _Learned, start: Mapping[str, Any] | None) -> _Layer:
    """Makes a running kernel of a stored one, or of a learned one and its scales at the start."""
    if isinstance(leaf, Quantised):
        codes = leaf.codes.astype(jnp.float32)
        return _Layer(codes, leaf.scale, leaf.input_scale, leaf.input_zero, leaf.dtype)
    assert start is not None
    scale, input_scale = (
        None if ratio is None else start[name] * jnp.maximum(ratio, LEAST_RATIO)
        for name, ratio in (("scale", leaf.ratio), ("input_scale", leaf.input_ratio))
    )
    assert scale is not None
    limit = _integers.highest(leaf.bits)
    spread = _integers.spread_over(scale, leaf.weight.shape)
    codes = _integers.codes_of(leaf.weight, spread, 0.0, (-limit, limit))
    return _Layer(codes, scale, input_scale, start.get("input_zero"), leaf.weight.dtype)


def quantise(
    model: Model,
    batches: Sequence[PyTree],
    *,
    bits: int | Mapping[str, int] = 8,
    activations: bool = False,
    group: int | None = None,
    scale: Literal["least squares", "absmax"] = "least squares",
    percentile: float = 100.0,
    exclude: Sequence[str] = (),
) -> Model:
    """Turns the kernels of a trained model into integers, and its activations too if asked for. Nothing is trained.

    A kernel is rounded to q = round(w/s), limited to ±(2^(bits−1) − 1), with a scale s per output (or per output
    and group of inputs). It means q·s, and the model computes with exactly these numbers. Kernels are the parameters
    of a floating type that multiply in matrix products and convolutions, also in grouped ones. A kernel that is
    used in several ways has scales along those axes alone that no use sums over. All other parameters (biases,
    normalisation, embeddings that are only looked up, kernels inside of a ``scan``) stay as they are.

    With ``activations``, what a kernel multiplies is rounded to int8 with one scale and one code of 0 for the whole
    array, and the product is computed by int8 × int8 → int32.

    Args:
      model: the model.
      batches: inputs, batch by batch. Without ``activations`` only the shapes of the first one are used. With it,
        they are the calibration data, whose values say which ranges activations have.
      bits: 8 or 4; or one for each kernel by path pattern, such as ``{"head": 8, "": 4}``. With 4 bits, two
        weights are stored per byte.
      activations: whether the inputs of the products become int8.
      group: number of neighbouring inputs (of a convolution, channels) that share a scale, for weights alone;
        None for one scale per output.
      scale: how scales are chosen. ``"absmax"``: so that the largest weight is just representable. ``"least squares"``:
        of 71 scales between 0.3 and 1 times that, the one with the least Σ (w − q·s)².
      percentile: the share of the values of an activation, in percent, that lies below the upper end of its range, and
        above the lower end, in (50, 100]; 100 takes the extremes. The range is the widest over batches, and contains 0.
      exclude: regular expressions. A kernel in whose path (such as ``head.kernel``) one of them is found stays
        as it is.

    Returns:
      A model with :class:`Quantised` in the places of the kernels. It runs under ``jit``, ``vmap`` and the like, can be
      saved by :func:`distill_jax.models.save`, and its gradients pass the rounding of activations straight through.
      With ``activations`` each call traces the model anew, so use it within ``jit``. Where the input of a product is
      not finite, all outputs of the product are NaN.

    Raises:
      ValueError: if no kernel is found, an expression is found in no path, bits are not offered, inputs do not divide
        into groups, groups are asked for beside ``activations``, weights are not finite, batches differ in shape or do
        not fit the model, or an activation is not finite.

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference`,
      2018, §2.1 and §2.2. There weights have one scale per array and a code of 0, too.

    >>> from distill_jax import models
    >>> model = models.from_function(lambda params, x: x @ params["w"], {"w": jnp.array([[1.0, -3.0], [0.6, 4.0]])})
    >>> small = quantise(model, [jnp.ones((1, 2))], bits=4, scale="absmax")
    >>> print(layers(small)["w"].codes)
    [[ 7 -5]
     [ 4  7]]
    """
    return freeze(
        simulate(
            model,
            batches,
            bits=bits,
            activations=activations,
            group=group,
            scale=scale,
            percentile=percentile,
            exclude=exclude,
        )
    )


def simulate(
    model: Model,
    batches: Sequence[PyTree],
    *,
    bits: int | Mapping[str, int] = 8,
    activations: bool = False,
    group: int | None = None,
    scale: Literal["least squares", "absmax"] = "least squares",
    percentile: float = 100.0,
    exclude: Sequence[str] = (),
) -> Model:
    """Makes the model that is trained as it will compute when quantised; :func:`freeze` ends the training.

    Kernels keep their floating-point values, and are rounded wherever they are used. The gradient passes the rounding
    as if it were not there (straight through), except where a value lies beyond the largest code. Scales are learned
    beside the weights, so the ranges of activations follow them.

    Args:
      model: the model.
      batches: as in :func:`quantise`.
      bits: as in :func:`quantise`.
      activations: as in :func:`quantise`.
      group: as in :func:`quantise`.
      scale: as in :func:`quantise`, for the scales at the start.
      percentile: as in :func:`quantise`, for the ranges at the start.
      exclude: as in :func:`quantise`.

    Returns:
      A model for any objective of :mod:`distill_jax.train`. In the place of a kernel ``dense.kernel`` it has the
      parameters ``dense.kernel.weight``, ``dense.kernel.ratio`` and, with ``activations``,
      ``dense.kernel.input_ratio``. A ratio is that of a scale to what it was at the start, so it is 1 at first, and a
      step of Adam changes the scale by a part of it. (Keep weight decay away from ratios.) The state is
      ``{"model": state, "start": scales}``.

    Raises:
      ValueError: in the cases of :func:`quantise`.

    References:
      Bengio, Léonard, Courville, 2013 (straight-through); Esser et al., `Learned Step Size Quantization`, 2020
      (arXiv 1902.08153), Eq. 1 to 3. There the scale itself is learned and its gradient is divided by √(N·Q), which
      has no effect on Adam, and there a scale is shared by a whole array.
    """
    check_choice("scale", scale, ("least squares", "absmax"))
    if not isinstance(activations, bool):
        raise ValueError(f"activations must be True or False, got {activations!r}")
    if group is not None:
        check_count("group", group)
        if activations:
            raise ValueError(
                "group: groups are for weights alone, since a sum of int8 products has one scale per output: "
                "leave out group or activations"
            )
    found = _scales.find(model, batches, activations, percentile, exclude)
    chosen = scalars(bits, dict.fromkeys(found, 0.0), name="bits", fraction=False)
    leaves = by_path(model.params)
    ready: dict[str, _Learned] = {}
    start: dict[str, dict[str, jax.Array]] = {}
    for path, kernel in found.items():
        check_choice("bits", chosen[path], BITS)
        parts = [size if axis in kernel.own else 1 for axis, size in enumerate(leaves[path].shape)]
        if group is not None:
            size = leaves[path].shape[kernel.last]
            if size % group:
                raise ValueError(
                    f"group must divide the inputs of each kernel, got {group} for {path} with {size}: "
                    "choose another, or exclude it"
                )
            parts[kernel.last] = size // group
        first = _scales.weight_scales(path, leaves[path], parts, int(chosen[path]), scale)
        ready[path] = _Learned(jnp.asarray(leaves[path]), jnp.ones_like(first), None, int(chosen[path]))
        start[path] = {"scale": first}
        if activations:
            start[path] |= _scales.input_scale(kernel.low, kernel.high)
            ready[path] = dataclasses.replace(ready[path], input_ratio=jnp.float32(1))
    params = jax.tree_util.tree_map_with_path(lambda p, x: ready.get(path_name(p), x), model.params)
    return Model(_SimulatedFn(model.apply_fn), params, {"model": model.state, "start": start})


def freeze(model: Model) -> Model:
    """Turns a model from :func:`simulate`, trained or not, into integers with equal outputs.

    Args:
      model: the model.

    Returns:
      The model that :func:`quantise` describes.

    Raises:
      ValueError: if the model is not one from :func:`simulate`, or a weight is not finite.
    """
    check_model("model", model)
    if not isinstance(model.apply_fn, _SimulatedFn):
        raise ValueError("model: expected one from quantisation.simulate, got another one")

    def integers(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, _Learned):
            return leaf
        layer = _layer(leaf, model.state["start"][path_name(path)])
        traced = isinstance(layer.codes, jax.core.Tracer)
        if not traced and not all(np.isfinite(np.asarray(x)).all() for x in (layer.codes, layer.scale)):
            raise ValueError(
                f"model: the weights of {path_name(path)} are not finite: has the training diverged?"
            )
        stored = _integers.pack(layer.codes) if leaf.bits == 4 else layer.codes.astype(jnp.int8)
        shape = tuple(leaf.weight.shape)
        return Quantised(
            stored, layer.scale, layer.input_scale, layer.input_zero, shape, leaf.bits, layer.dtype
        )

    params = jax.tree_util.tree_map_with_path(integers, model.params, is_leaf=_is_special)
    return Model(_QuantisedFn(model.apply_fn.apply_fn), params, model.state["model"])


def layers(model: Model) -> dict[str, Quantised]:
    """Lists the quantised kernels of a model, by path: all that a file of another format needs.

    Args:
      model: a model from :func:`quantise` or :func:`freeze`.

    Returns:
      path → the integers, their scales, and the scale and code of 0 of what they multiply.

    Raises:
      ValueError: if the model is not quantised.
    """
    check_model("model", model)
    leaves = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=_is_special)
    found = {path_name(path): leaf for path, leaf in leaves if isinstance(leaf, Quantised)}
    if not found:
        raise ValueError("model: it has no quantised kernels: give one from quantisation.quantise or freeze")
    return found


def dequantise(model: Model) -> Model:
    """Puts the numbers that integers mean in the places of the integers: the model of floats that a converter takes.

    Args:
      model: a model from :func:`quantise` or :func:`freeze`.

    Returns:
      The model with the function and the parameters' shapes that it had before it was quantised. Its outputs are those
      of the quantised model if activations are not rounded.

    Raises:
      ValueError: if the model is not quantised.
    """
    layers(model)
    assert isinstance(model.apply_fn, _QuantisedFn)
    params = jax.tree.map(
        lambda leaf: leaf.array() if _is_special(leaf) else leaf, model.params, is_leaf=_is_special
    )
    return Model(model.apply_fn.apply_fn, params, model.state)


# --- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _QuantisedFn:
    """An ``apply_fn`` that takes :class:`Quantised` in the place of kernels; equal for equal functions."""

    apply_fn: ApplyFn

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        return _run(self.apply_fn, params, {}, state, x, key)


@dataclass(frozen=True)
class _SimulatedFn:
    """The ``apply_fn`` of a model from :func:`simulate`; equal for equal functions."""

    apply_fn: ApplyFn

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        start = jax.lax.stop_gradient(state["start"])
        outputs, inner = _run(self.apply_fn, params, start, state["model"], x, key)
        return outputs, {**state, "model": inner}


def _is_special(leaf: Any) -> bool:
    return isinstance(leaf, Quantised | _Learned)


def _run(
    apply_fn: ApplyFn, params: PyTree, start: Mapping[str, Any], state: PyTree, x: PyTree, key: Any
) -> tuple[Any, PyTree]:
    """Runs a model with quantised kernels: with the numbers that they mean, or with integer products."""
    pairs: Any
    pairs, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_special)
    values, whole = [], []
    for path, leaf in pairs:
        name, array = path_name(path), leaf
        if _is_special(leaf):
            layer = _layer(leaf, start.get(name))
            array = layer.array()
            leaf = array if layer.input_scale is None else _jaxpr.View(layer, name)
        values.append(leaf)
        whole.append(array)
    if not any(isinstance(value, _jaxpr.View) for value in values):
        return apply_fn(jax.tree.unflatten(structure, whole), state, x, key=key)
    return _jaxpr.run(apply_fn, [jax.tree.unflatten(structure, whole), state, x, key], values, _multiply)


def _multiply(jaxpr: Any, eqn: Any, inputs: list[Any], views: list[int]) -> list[Any]:
    """Multiplies by a kernel in integers; any other equation gets the numbers that the kernel means."""
    place, view = views[0], inputs[views[0]]
    layer = view.value
    if len(views) > 1 or _integers.summed_axes(eqn, place) is None:
        arrays = [v.array(v.value.array()) if isinstance(v, _jaxpr.View) else v for v in inputs]
        return _jaxpr.alone(jaxpr, eqn, arrays)
    turned = dataclasses.replace(view, dtype=None)
    codes = _integers.codes_of(inputs[1 - place], layer.input_scale, layer.input_zero, _integers.INT8)
    sums = _integers.product(eqn, place, codes, turned.array(layer.codes), layer.input_zero)
    scale = _integers.per_output(eqn, place, turned.array(layer.scale)) * layer.input_scale
    # An integer cannot be NaN: what is not finite would become a number
    finite = jnp.isfinite(inputs[1 - place]).all() & jnp.isfinite(layer.codes).all()
    scale = jnp.where(finite, scale, jnp.nan)
    return [(sums * scale).astype(eqn.outvars[0].aval.dtype)]

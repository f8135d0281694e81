"""What the feature methods share: linear maps, convolutions, masks, and layers brought to one space."""

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax._model import PyTree
from distill_jax.features.learned import Learned, Shape
from distill_jax.losses._space import common_space, example_mask, features_of, pool_mean, positions

Array = jax.Array
Where = ArrayLike | Sequence[ArrayLike | None] | None


class Aligned(NamedTuple):
    """One matched pair of layers in one space; positions that do not count are zero."""

    name: str  # of its parameters
    student: Array
    teacher: Array
    where: Array  # bool [batch, *spatial]; [batch] where the two layers have no common space


def dense_init(key: Array, fan_in: int, fan_out: int) -> dict[str, Array]:
    """Draws the parameters of a linear map: a normal kernel of variance 1/fan_in, and a bias of zero."""
    kernel = jax.random.normal(key, (fan_in, fan_out)) / jnp.sqrt(fan_in)
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def dense(params: PyTree, x: Array) -> Array:
    """Applies a linear map to the channels, which is a convolution of size 1."""
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def conv_init(key: Array, rank: int, fan_in: int, fan_out: int) -> dict[str, Array]:
    """Draws a convolution of size 3 along each of ``rank`` axes, He-normal for the ReLU that follows."""
    window = (3,) * rank
    scale = jnp.sqrt(2 / (3**rank * fan_in))
    kernel = scale * jax.random.normal(key, (*window, fan_in, fan_out))
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def conv(params: PyTree, x: Array) -> Array:
    """Applies a convolution with zero padding, along as many spatial axes as its kernel has."""
    rank = x.ndim - 2
    if not rank:
        return dense(params, x)
    if rank > 3:
        raise ValueError(f"features may have at most 3 spatial axes here, got shape {x.shape}")
    space = "DHW"[-rank:]
    names = (f"N{space}C", f"{space}IO", f"N{space}C")
    kernel, bias = params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, (1,) * rank, "SAME", dimension_numbers=names) + bias


def check_layers(student: Sequence[Any], teacher: Sequence[Any], least: int = 1) -> None:
    """Raises ``ValueError`` unless both lists have the same length, at least ``least``."""
    for name, layers in (("student", student), ("teacher", teacher)):
        if not isinstance(layers, list | tuple) or (layers and isinstance(layers[0], int)):
            raise ValueError(
                f"the {name}'s layers must be a list with one entry per matched layer, got "
                f"{type(layers).__name__}: put a single layer into a list"
            )
    if len(student) != len(teacher) or len(student) < least:
        raise ValueError(
            f"student and teacher must have the same number of layers, at least {least}, got "
            f"{len(student)} and {len(teacher)}"
        )


def clear(x: ArrayLike, where: Array) -> Array:
    """Returns features as floats, with zeros in the examples that do not count."""
    x = features_of("the", x)
    return jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)


def align(
    student: Sequence[ArrayLike], teacher: Sequence[ArrayLike], where: Where = None, *, space: str = "pool"
) -> list[Aligned]:
    """Brings each pair of layers to one spatial shape; the channels stay as they are.

    Args:
      student: features, one array per matched layer.
      teacher: features, one array per matched layer.
      where: None; bool ``[batch]``, True for the examples that count; or a list with one mask per layer,
        broadcastable to ``[batch, *spatial]``. A layer with a spatial mask must have the same spatial
        shape in both networks.
      space: ``"pool"`` reduces both to the smaller size along each axis by adaptive average pooling;
        ``"resize"`` brings the student to the teacher's size by linear interpolation.

    Raises:
      ValueError: if the layers do not pair up, or a mask does not fit its layer.
    """
    check_layers(student, teacher)
    if isinstance(where, list | tuple) and len(where) != len(student):
        raise ValueError(f"where must have one mask per layer, {len(student)} in all, got {len(where)}")
    layers = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        s, t = features_of("student", s), features_of("teacher", t)
        mask: Any = where[i] if isinstance(where, list | tuple) else where
        spatial = mask is not None and jnp.shape(mask) != s.shape[:1]
        if spatial and s.shape[1:-1] != t.shape[1:-1]:
            raise ValueError(
                f"layer {i}: where must have shape {s.shape[:1]}, one entry per example, because the "
                f"student's {s.shape} and the teacher's {t.shape} differ in space; got {jnp.shape(mask)}"
            )
        valid = positions(mask, s.shape)
        s = jnp.where(valid[..., None], s, 0.0)
        t = jnp.where((valid if spatial else positions(mask, t.shape))[..., None], t, 0.0)
        if space == "resize" and s.ndim == t.ndim:
            s = jax.image.resize(s, (*t.shape[:-1], s.shape[-1]), "linear")
        else:
            target = common_space(s.shape, t.shape)
            s, t = pool_mean(s, target), pool_mean(t, target)
        if not spatial:
            valid = positions(mask, s.shape)
        layers.append(Aligned(f"layer{i}", s, t, valid))
    return layers


def map_channels(params: PyTree, layer: Aligned) -> Array:
    """Applies the layer's linear map to the student's features, if the layer has one."""
    if layer.name not in params:
        return layer.student
    return jnp.where(layer.where[..., None], dense(params[layer.name], layer.student), 0.0)


def init_layers(
    key: Array,
    student_shapes: Sequence[Shape],
    teacher_shapes: Sequence[Shape],
    init: Callable[[Array, Shape, Shape], PyTree],
) -> dict[str, Any]:
    """Draws the parameters of each layer by ``init(key, student_shape, teacher_shape)``."""
    check_layers(student_shapes, teacher_shapes)
    pairs = enumerate(zip(student_shapes, teacher_shapes, strict=True))
    return {f"layer{i}": init(jax.random.fold_in(key, i), s, t) for i, (s, t) in pairs}


def init_maps(
    key: Array, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], always: bool
) -> dict[str, Any]:
    """Draws linear maps from the student's to the teacher's channels: where they differ, or always."""
    maps = init_layers(
        key,
        student_shapes,
        teacher_shapes,
        lambda key, s, t: dense_init(key, s[-1], t[-1]) if always or s[-1] != t[-1] else None,
    )
    return {name: params for name, params in maps.items() if params is not None}


def no_params(key: Array, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape]) -> dict[str, Any]:
    """Checks the layers and makes no parameters: the ``init`` of a method that needs none."""
    check_layers(student_shapes, teacher_shapes)
    return {}


def sum_layers(values: Iterable[Array]) -> Array:
    """Adds up the values of all layers, which are ``[batch]`` each."""
    return functools.reduce(operator.add, values)


def over_aligned(
    init: Callable[..., PyTree], value: Callable[[PyTree, Aligned], Array], *, space: str = "pool"
) -> Learned:
    """Makes a method that adds up ``value(params, layer)`` over layers brought to one space."""

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        layers = align(student_features, teacher_features, where, space=space)
        return sum_layers(value(params, layer) for layer in layers)

    return Learned(init, apply)


def over_pairs(init: Callable[..., PyTree], value: Callable[[PyTree, Any, Any, Array], Array]) -> Learned:
    """Makes a method that adds up ``value(layer_params, student, teacher, where)`` over matched layers.

    The layers come as they are, ``where`` as bool ``[batch]``; a layer without parameters gets None.
    """

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        check_layers(student_features, teacher_features)
        where = example_mask(where, jnp.shape(student_features[0])[0])
        pairs = enumerate(zip(student_features, teacher_features, strict=True))
        return sum_layers(value(params.get(f"layer{i}"), s, t, where) for i, (s, t) in pairs)

    return Learned(init, apply)

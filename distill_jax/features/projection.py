"""Bringing features of any two networks together: channels by a linear map, space by pooling.

Features are ``[batch, *spatial, channels]``. Where both have the same number of spatial axes, they
meet at the smaller size along each axis; where one has none, or another number of them, the other
is pooled globally. No parameter's size depends on the batch or on space.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distill_jax.features.learned import Learned, Shape
from distill_jax.losses._space import common_space, count, features_of, pool_mean, positions

Array = jax.Array
Loss = Callable[..., Array]


class Layer(NamedTuple):
    """One matched pair of layers, brought to one space; excluded positions are zero."""

    name: str  # of its parameters
    student: Array
    teacher: Array
    where: Array  # bool, [batch, *spatial], or [batch] for what has no common space


def dense_init(key: Array, fan_in: int, fan_out: int) -> dict[str, Array]:
    """A linear map's kernel, normal with variance 1/fan_in, and its bias, zero."""
    kernel = jax.random.normal(key, (fan_in, fan_out)) / jnp.sqrt(fan_in)
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def dense(params: Any, x: Array) -> Array:
    """A linear map of the channels: a convolution of size 1."""
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def conv_init(key: Array, rank: int, fan_in: int, fan_out: int) -> dict[str, Array]:
    """A convolution of size 3 along each of ``rank`` axes; He-normal for the ReLU that follows."""
    window = (3,) * rank
    scale = jnp.sqrt(2 / (3**rank * fan_in))
    kernel = scale * jax.random.normal(key, (*window, fan_in, fan_out))
    return {"kernel": kernel, "bias": jnp.zeros(fan_out)}


def conv(params: Any, x: Array) -> Array:
    """A convolution with zero padding, over however many spatial axes its kernel has."""
    rank = x.ndim - 2
    if not rank:
        return dense(params, x)
    space = "DHW"[-rank:] if rank <= 3 else None
    if space is None:
        raise ValueError(f"features may have at most 3 spatial axes here, got {x.shape}")
    names = (f"N{space}C", f"{space}IO", f"N{space}C")
    kernel, bias = params["kernel"].astype(x.dtype), params["bias"].astype(x.dtype)
    return jax.lax.conv_general_dilated(x, kernel, (1,) * rank, "SAME", dimension_numbers=names) + bias


def check_layers(student: Sequence[Any], teacher: Sequence[Any], least: int = 1) -> None:
    """Raises ``ValueError`` unless there are as many layers of the student as of the teacher."""
    for name, layers in (("student", student), ("teacher", teacher)):
        if not isinstance(layers, list | tuple) or (layers and isinstance(layers[0], int)):
            raise ValueError(
                f"the {name}'s layers must be a list, one entry a matched layer, got "
                f"{type(layers).__name__}: put a single layer into a list"
            )
    if len(student) != len(teacher) or len(student) < least:
        raise ValueError(
            f"as many student layers as teacher layers are needed, at least {least}, got "
            f"{len(student)} and {len(teacher)}"
        )


def example_mask(where: Any, batch: int) -> Array:
    """``where`` as bool ``[batch]``, for parts that rearrange space."""
    if where is None:
        return jnp.ones(batch, bool)
    if isinstance(where, list | tuple) or jnp.shape(where) != (batch,):
        raise ValueError(
            f"where must be bool ({batch},) here, one for each example: this part rearranges space"
        )
    return jnp.asarray(where)


def clear(x: Any, where: Array) -> Array:
    """Features as floats, zero in the examples that do not count, so that nothing there spreads."""
    x = features_of("the", x)
    return jnp.where(where.reshape(-1, *(1,) * (x.ndim - 1)), x, 0.0)


def align(
    student: Sequence[Any], teacher: Sequence[Any], where: Any = None, *, space: str = "pool", least: int = 1
) -> list[Layer]:
    """Brings each pair of layers to one space; the channels stay as they are.

    Args:
      student: features, one a matched layer.
      teacher: features, one a matched layer.
      where: None, ``[batch]`` for the examples that count, or a list with one mask a layer,
        broadcastable to ``[batch, *spatial]``; such a layer must have one spatial shape in both.
      space: ``"pool"``, to the smaller along each axis by adaptive average pooling; or
        ``"resize"``, the student to the teacher's by linear interpolation.
      least: how many layers there must be.

    Raises:
      ValueError: if the layers do not pair up, or a mask cannot follow its layer.
    """
    check_layers(student, teacher, least)
    if isinstance(where, list | tuple) and len(where) != len(student):
        raise ValueError(f"where must have one mask a layer, {len(student)}, got {len(where)}")
    layers = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        s, t = features_of("student", s), features_of("teacher", t)
        mask = where[i] if isinstance(where, list | tuple) else where
        spatial = mask is not None and jnp.shape(mask) != s.shape[:1]
        if spatial and s.shape[1:-1] != t.shape[1:-1]:
            raise ValueError(
                f"layer {i}: where must be {s.shape[:1]}, one for each example, as the space of the "
                f"student {s.shape} is not the teacher's {t.shape}; got {jnp.shape(mask)}"
            )
        valid = positions(mask, s.shape)
        s = jnp.where(valid[..., None], s, 0.0)
        t = jnp.where((valid if spatial else positions(mask, t.shape))[..., None], t, 0.0)
        if space == "resize" and s.ndim == t.ndim:
            s = jax.image.resize(s, (*t.shape[:-1], s.shape[-1]), "linear")
            target = t.shape[1:-1]
        else:
            target = common_space(s.shape, t.shape)
            s, t = pool_mean(s, target), pool_mean(t, target)
        if not spatial:
            valid = positions(mask, s.shape)
        layers.append(Layer(f"layer{i}", s, t, valid))
    return layers


def map_channels(params: Any, layer: Layer) -> Array:
    """The student's features through the layer's linear map, if it has one."""
    if layer.name not in params:
        return layer.student
    return jnp.where(layer.where[..., None], dense(params[layer.name], layer.student), 0.0)


def map_init(
    key: Array, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape], always: bool
) -> dict[str, Any]:
    """Linear maps from the student's to the teacher's channels, where they differ or always."""
    check_layers(student_shapes, teacher_shapes)
    return {
        f"layer{i}": dense_init(jax.random.fold_in(key, i), s[-1], t[-1])
        for i, (s, t) in enumerate(zip(student_shapes, teacher_shapes, strict=True))
        if always or s[-1] != t[-1]
    }


def project(loss: Loss, *, space: str = "pool", always: bool = False) -> Learned:
    """Any loss between features of one shape, for features of any shapes.

    The student's channels go through a linear map (a convolution of size 1) to the teacher's, where
    the numbers differ; both meet in space as :func:`align` says. Layers that agree in shape are
    compared as they are.

    Args:
      loss: ``(student, teacher, *, where) -> [batch]``.
      space: ``"pool"`` or ``"resize"``, as in :func:`align`.
      always: a linear map also where the numbers of channels agree.

    Returns:
      The loss summed over the matched layers. Its parameters are ``{"layer0": {"kernel":
      [C_student, C_teacher], "bias": [C_teacher]}, …}``, normal with variance 1/C_student.

    Raises:
      ValueError: if ``space`` is unknown; from ``apply``, if the shapes do not fit.

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets`, 2015, §2.2 (the regressor).

    >>> from distill_jax import losses
    >>> part = project(losses.hint)
    >>> student, teacher = [jnp.ones((2, 8, 8, 3))], [jnp.ones((2, 5))]
    >>> params = part.init(jax.random.key(0), [x.shape for x in student], [x.shape for x in teacher])
    >>> params["layer0"]["kernel"].shape, part.apply(params, student, teacher).shape
    ((3, 5), (2,))
    """
    if space not in ("pool", "resize"):
        raise ValueError(f"space must be pool or resize, got {space!r}")

    def init(key, student_shapes, teacher_shapes):
        return map_init(key, student_shapes, teacher_shapes, always)

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        layers = align(student_features, teacher_features, where, space=space)
        return sum_layers(
            loss(map_channels(params, layer), layer.teacher, where=layer.where) for layer in layers
        )

    return Learned(init, apply)


def project_maps(loss: Loss) -> Learned:
    """A loss between maps over space that asks for no common channels, for features of any shapes.

    Parameter-free where two layers meet in more than one position. Where they do not (one is flat,
    or of size 1), there is no map over space: the units take the place of positions. The student's
    pooled features go through a linear map to the teacher's width where it differs, and both are
    compared as maps ``[batch, units, 1]``.

    Args:
      loss: ``(student, teacher, *, where) -> [batch]``.

    Returns:
      The loss summed over the matched layers.
    """

    def init(key, student_shapes, teacher_shapes):
        params = map_init(key, student_shapes, teacher_shapes, always=False)
        pairs = enumerate(zip(student_shapes, teacher_shapes, strict=True))
        flat = {f"layer{i}" for i, pair in pairs if count(common_space(*pair)) == 1}
        return {name: value for name, value in params.items() if name in flat}

    def apply(params, student_features, teacher_features, *, labels=None, where=None, key=None):
        del labels, key
        values = []
        for layer in align(student_features, teacher_features, where):
            student, teacher, valid = layer.student, layer.teacher, layer.where
            if count(student.shape[1:-1]) == 1:
                batch = student.shape[0]
                student = map_channels(params, layer).reshape(batch, -1, 1)
                teacher, valid = teacher.reshape(batch, -1, 1), valid.reshape(batch)
            values.append(loss(student, teacher, where=valid))
        return sum_layers(values)

    return Learned(init, apply)


def sum_layers(values: Any) -> Array:
    """Σ over layers of the values an example."""
    return functools.reduce(operator.add, values)

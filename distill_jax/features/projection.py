"""General builders: turn a loss between features of one shape into one for any two networks.

- :func:`project` maps the student's channels to the teacher's where they differ: for losses that compare
  unit by unit, such as ``losses.hint``.
- :func:`project_maps` needs no common channels: for losses between maps over space, such as
  ``losses.attention_transfer``.
- :func:`relation` needs no common shape at all: for losses between relations of examples, such as
  ``losses.pkt``.

Features are ``[batch, *spatial, channels]``. Two layers with the same number of spatial axes are compared
at the smaller size along each axis; otherwise both are averaged over all positions. No parameter depends
on the batch size or the spatial size.
"""

from collections.abc import Callable

import jax
from jax.typing import ArrayLike

from distill_jax._checks import check_function
from distill_jax.features._layers import init_maps, map_channels, no_params, over_aligned, over_pairs
from distill_jax.features.learned import Learned
from distill_jax.losses._arguments import to_float
from distill_jax.losses._space import common_space, count, pool_mean

Loss = Callable[..., jax.Array]


def project(loss: Loss, *, space: str = "pool", always: bool = False) -> Learned:
    """Applies a loss between features of one shape to features of any shapes.

    A linear map (a convolution of size 1) takes the student's channels to the teacher's where their
    numbers differ, and both are brought to one spatial shape. Layers whose shapes agree are compared
    as they are.

    Args:
      loss: ``(student, teacher, *, where) -> [batch]``, such as ``losses.hint``. Give options with
        ``functools.partial``.
      space: ``"pool"`` reduces both to the smaller size along each axis by adaptive average pooling;
        ``"resize"`` brings the student to the teacher's size by linear interpolation.
      always: whether layers with the same number of channels get a linear map too.

    Returns:
      The loss summed over the matched layers, without weights. Its parameters are ``{"layer0":
      {"kernel": [C_student, C_teacher], "bias": [C_teacher]}, …}``; a kernel starts normal with
      variance 1/C_student. ``where`` in ``apply`` is None, bool ``[batch]``, or a list with one mask
      per layer.

    Raises:
      ValueError: if ``space`` is unknown; from ``apply``, if the shapes do not fit.

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets`, 2015, §2.2 (the regressor, there a convolution
      whose size depends on both maps).
      Heo et al., `Knowledge Transfer via Distillation of Activation Boundaries`, 2019 (``always=True``
      with ``losses.activation_boundary``, between layers *before* their activation).

    >>> import jax.numpy as jnp
    >>> from distill_jax import losses
    >>> learned = project(losses.hint)
    >>> student, teacher = [jnp.ones((2, 8, 8, 3))], [jnp.ones((2, 5))]
    >>> params = learned.init(jax.random.key(0), [x.shape for x in student], [x.shape for x in teacher])
    >>> params["layer0"]["kernel"].shape, learned.apply(params, student, teacher).shape
    ((3, 5), (2,))
    """
    if space not in ("pool", "resize"):
        raise ValueError(f"space must be 'pool' or 'resize', got {space!r}")
    check_function("loss", loss, "student, teacher")

    def init(key, student_shapes, teacher_shapes):
        return init_maps(key, student_shapes, teacher_shapes, always)

    def value(params, layer):
        return loss(map_channels(params, layer), layer.teacher, where=layer.where)

    return over_aligned(init, value, space=space)


def project_maps(loss: Loss) -> Learned:
    """Applies a loss between maps over space, which needs no common channels, to features of any shapes.

    Where two layers have more than one common position, this needs no parameters. Where they have only
    one (a layer is flat, or of size 1), the units take the place of positions: a linear map takes the
    student's pooled features to the teacher's width if it differs, and both are compared as maps
    ``[batch, units, 1]``.

    Args:
      loss: ``(student, teacher, *, where) -> [batch]``, such as ``losses.attention_transfer`` or
        ``losses.nst``. Give options with ``functools.partial``.

    Returns:
      The loss summed over the matched layers, without weights. ``where`` in ``apply`` is None, bool
      ``[batch]``, or a list with one mask per layer.

    References:
      Zagoruyko, Komodakis, `Paying More Attention to Attention`, 2017, Eq. 2 (maps of two sizes are
      compared at one).

    >>> from distill_jax import losses
    >>> learned = project_maps(losses.attention_transfer)
    >>> learned.init(jax.random.key(0), [(1, 8, 8, 3)], [(1, 4, 4, 5)])
    {}
    """
    check_function("loss", loss, "student, teacher, *, where")

    def init(key, student_shapes, teacher_shapes):
        params = init_maps(key, student_shapes, teacher_shapes, always=False)
        pairs = enumerate(zip(student_shapes, teacher_shapes, strict=True))
        flat = {f"layer{i}" for i, pair in pairs if count(common_space(*pair)) == 1}
        return {name: value for name, value in params.items() if name in flat}

    def value(params, layer):
        student, teacher, valid = layer.student, layer.teacher, layer.where
        if count(student.shape[1:-1]) == 1:
            batch = student.shape[0]
            student = map_channels(params, layer).reshape(batch, -1, 1)
            teacher, valid = teacher.reshape(batch, -1, 1), valid.reshape(batch)
        return loss(student, teacher, where=valid)

    return over_aligned(init, value)


def relation(loss: Loss, *, pool: bool = False) -> Learned:
    """Applies a loss between relations of examples to features of any shapes; it has no parameters.

    Such a loss compares how a batch's examples lie to one another in each network, so student and
    teacher may differ in width and resolution.

    Args:
      loss: ``(student, teacher, *, where) -> [batch]``, such as ``losses.pkt``, ``losses.cka``,
        ``losses.rkd_distance`` or ``losses.similarity_preserving``. Give options with
        ``functools.partial``.
      pool: whether feature maps are first averaged over positions, as the last features of an image
        model usually are. Otherwise the loss gets them as they are.

    Returns:
      The loss summed over the matched layers, without weights. ``where`` in ``apply`` is None or bool
      ``[batch]``.

    References:
      Tung, Mori, `Similarity-Preserving Knowledge Distillation`, 2019, Eq. 4 (the sum over layers).

    >>> import jax.numpy as jnp
    >>> from distill_jax import losses
    >>> learned = relation(losses.pkt, pool=True)
    >>> learned.apply({}, [jnp.ones((4, 8, 8, 3))], [jnp.ones((4, 5))]).shape
    (4,)
    """
    check_function("loss", loss, "student, teacher, *, where")

    def prepared(x: ArrayLike) -> ArrayLike:
        return pool_mean(to_float(x), ()) if pool else x

    def value(params, student, teacher, where):
        return loss(prepared(student), prepared(teacher), where=where)

    return over_pairs(no_params, value)

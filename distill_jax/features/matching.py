"""Pairs the layers of a student with layers of a teacher, by resolution and depth."""

import itertools
import math
import operator
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, check_mapping

ShapeAndDtype = jax.ShapeDtypeStruct | jax.Array | np.ndarray


class Layer(NamedTuple):
    """One layer in a :class:`Pairing`.

    Attributes:
      name: the layer's name, as :func:`distill_jax.features.layer_shapes` lists it.
      shape: ``(batch, *spatial, channels)``.
      depth: its place in the order of computation, from 0 (first) to 1 (last).
    """

    name: str
    shape: tuple[int, ...]
    depth: float


class Pairing(list[tuple[str, str]]):
    """A list of pairs ``(student_name, teacher_name)`` that prints as a table with shapes and depths.

    Attributes:
      layers: the pairs as :class:`Layer` tuples ``(student, teacher)``.
    """

    def __init__(self, pairs: list[tuple[Layer, Layer]]):
        super().__init__((student.name, teacher.name) for student, teacher in pairs)
        self.layers = pairs

    def __str__(self) -> str:
        rows = [("student", "shape", "depth", "teacher", "shape", "depth")]
        for student, teacher in self.layers:
            rows.append((*_columns(student), *_columns(teacher)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join(lines)


def match_layers(
    student_shapes: Mapping[str, ShapeAndDtype],
    teacher_shapes: Mapping[str, ShapeAndDtype],
    *,
    count: int | None = None,
) -> Pairing:
    """Pairs layers of two networks by spatial resolution, then by relative depth.

    A stage is a run of consecutive layers of one resolution. Its last layer represents it, as in
    FitNets, attention transfer and most later papers. Among all pairings that keep the order of both
    networks, this chooses the one with the smallest differences in resolution (in octaves); where
    several are equal, the one with the smallest differences in relative depth.

    Maps are paired with maps of the same number of axes, and vectors with vectors. Only where this gives
    no pairs (or fewer than ``count``) is a map paired with a vector, as rarely as possible; a vector then
    counts as a map of one position. If both networks end in vectors of one width, these are taken to be
    the logits and left out.

    Args:
      student_shapes: the student's layers in the order of computation, as a mapping from names to
        arrays or shapes, such as :func:`distill_jax.features.layer_shapes` returns. Shapes are ``(batch,
        *spatial, channels)``. Values with fewer than two axes, or not of floats, are left out.
      teacher_shapes: the teacher's layers, in the same form.
      count: number of pairs; by default one per stage of the network that has fewer stages. With more
        pairs than stages, further layers inside the stages are used, evenly spaced.

    Returns:
      The pairs from shallow to deep, a list of ``(student_name, teacher_name)``. ``print`` it to see
      shapes and depths.

    Raises:
      ValueError: if ``count`` is less than 1, or the two networks do not have ``count`` layers to pair.

    >>> import jax
    >>> def net(*sizes):
    ...     maps = [(f"stage{i}", (2, n, n, 8)) for i, n in enumerate(sizes)]
    ...     return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in maps}
    >>> print(match_layers(net(32, 16, 8), net(32, 32, 16, 8, 4)))
    student  shape     depth  teacher  shape     depth
    stage0   32×32 ·8  0.00   stage1   32×32 ·8  0.25
    stage1   16×16 ·8  0.50   stage2   16×16 ·8  0.50
    stage2   8×8 ·8    1.00   stage3   8×8 ·8    0.75
    """
    if count is not None:
        check_count("count", count)
    check_mapping("student_shapes", student_shapes, "name → shape, from layer_shapes")
    check_mapping("teacher_shapes", teacher_shapes, "name → shape, from layer_shapes")
    student, teacher = _layers(student_shapes), _layers(teacher_shapes)
    ends = [layers[-1].shape[1:] for layers in (student, teacher) if layers]
    if len(ends) == 2 and ends[0] == ends[1] and len(ends[0]) == 1:
        student, teacher = student[:-1], teacher[:-1]
    stages = _stages(student), _stages(teacher)
    longest = max((len(stage) for side in stages for stage in side), default=0)
    per_stages = [1] if count is None else range(1, longest + 1)
    for across, per_stage in itertools.product((False, True), per_stages):
        sides = [[x for stage in side for x in _spaced(stage, per_stage)] for side in stages]
        most = min(map(len, sides))
        for wanted in range(most, 0, -1) if count is None else [count]:
            if wanted <= most and (pairs := _align(sides[0], sides[1], wanted, across)):
                return Pairing(pairs)
    raise ValueError(
        f"no {count or 1} layers of the student can be paired with layers of the teacher: the student "
        f"has {_list(student)}; the teacher has {_list(teacher)}"
    )


def _layers(shapes: Mapping[str, ShapeAndDtype]) -> list[Layer]:
    last = max(len(shapes) - 1, 1)
    return [
        Layer(name, tuple(value.shape), place / last)
        for place, (name, value) in enumerate(shapes.items())
        if len(value.shape) >= 2 and jnp.issubdtype(value.dtype, jnp.floating)
    ]


def _stages(layers: list[Layer]) -> list[list[Layer]]:
    stages: list[list[Layer]] = []
    for layer in layers:
        if stages and stages[-1][-1].shape[1:-1] == layer.shape[1:-1]:
            stages[-1].append(layer)
        else:
            stages.append([layer])
    return stages


def _spaced(stage: list[Layer], most: int) -> list[Layer]:
    """Picks at most ``most`` layers of a stage, evenly spaced, the last one included."""
    count = min(most, len(stage))
    return [stage[(i + 1) * len(stage) // count - 1] for i in range(count)]


def _cost(student: Layer, teacher: Layer) -> tuple[float, ...]:
    """Returns whether the numbers of axes differ, the distance in octaves, and the distance in depth."""
    spatial = student.shape[1:-1], teacher.shape[1:-1]
    across = len(spatial[0]) != len(spatial[1])
    if across:
        spatial = (math.prod(spatial[0]),), (math.prod(spatial[1]),)
    octaves = [abs(math.log2(a / b)) for a, b in zip(*spatial, strict=True)]
    # Rounded, so that sums of equal resolutions compare as equal
    return across, round(sum(octaves), 6), abs(student.depth - teacher.depth)


def _align(student: list[Layer], teacher: list[Layer], count: int, across: bool) -> list[tuple[Layer, Layer]]:
    """Finds the cheapest ``count`` pairs that keep both orders, by dynamic programming; [] if none."""
    Best = tuple[tuple[float, ...], list[tuple[Layer, Layer]]]
    none: Best = ((math.inf,) * 3, [])
    # best[j]: the cheapest way to make `made` pairs of the first i student and j teacher layers
    rows: list[list[Best]] = [[((0.0,) * 3, [])] * (len(teacher) + 1)] * (len(student) + 1)
    for _ in range(count):
        new: list[list[Best]] = [[none] * (len(teacher) + 1)]
        for i, s in enumerate(student):
            row = [none]
            for j, t in enumerate(teacher):
                before, pairs = rows[i][j]
                cost = tuple(map(operator.add, before, _cost(s, t)))
                options = [new[i][j + 1], row[j], (cost, [*pairs, (s, t)])]
                row.append(min(options, key=lambda option: option[0]))
            new.append(row)
        rows = new
    total, pairs = rows[-1][-1]
    return pairs if across or total[0] == 0 else []


def _columns(layer: Layer) -> tuple[str, str, str]:
    return layer.name, _text(layer.shape), f"{layer.depth:.2f}"


def _text(shape: tuple[int, ...]) -> str:
    spatial = "×".join(map(str, shape[1:-1]))
    return f"{spatial} ·{shape[-1]}" if spatial else f"·{shape[-1]}"


def _list(layers: list[Layer]) -> str:
    return ", ".join(f"{layer.name} ({_text(layer.shape)})" for layer in layers) or "none"

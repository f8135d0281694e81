"""What a network costs without some of its units, and what describes the rest."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from distill_jax import metrics
from distill_jax.compress.units._trace.program import Program, flatten
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.removal import Kept, check, position_masks
from distill_jax.compress.units.shrinking import shrink

Cost = Callable[[UnitGraph, Kept], float]


def shapes(graph: UnitGraph, kept: Kept) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of all leaves with these units, by path.

    Args:
      graph: of :func:`distill_jax.compress.units.trace`.
      kept: as in :func:`distill_jax.compress.units.keep`.
    """
    masks = position_masks(graph, kept)
    found = {}
    for path, like in graph.shapes.items():
        axes = masks.get(path, {})
        shape = [int(axes[a].sum()) if a in axes else n for a, n in enumerate(like.shape)]
        found[path] = jax.ShapeDtypeStruct(tuple(shape), like.dtype)
    return found


def share(graph: UnitGraph, kept: Kept) -> float:
    """The share of the units that stay, of those of the groups that ``kept`` names.

    Args:
      graph: as in :func:`shapes`.
      kept: likewise.
    """
    total = sum(graph.groups[name].size for name in kept)
    return sum(len(indices) for indices in kept.values()) / max(total, 1)


def parameters(graph: UnitGraph, kept: Kept) -> int:
    """The number of parameters: as :func:`distill_jax.metrics.costs` counts them, without model state.

    If what was traced has a first key ``params``, these are the numbers below it, else all.

    Args:
      graph: as in :func:`shapes`.
      kept: likewise.

    >>> from distill_jax import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> graph = units.trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 3)))
    >>> parameters(graph, {}), parameters(graph, {"a": [0, 3]})
    (20, 10)
    """
    sizes = {path: int(np.prod(like.shape)) for path, like in shapes(graph, kept).items()}
    below = [size for path, size in sizes.items() if path.startswith("params.")]
    return sum(below or sizes.values())


def flops(graph: UnitGraph, kept: Kept) -> float:
    """Operations of a call with the traced inputs, as XLA counts them. Trace with one example.

    The body of a ``scan`` counts as often as it runs; of a ``cond``, the dearest branch.

    Args:
      graph: as in :func:`shapes`.
      kept: likewise.

    Raises:
      ValueError: if XLA has no count, or there is a ``while`` loop, of no known number of rounds.
    """
    params, inputs = _arguments(graph, kept, jax.ShapeDtypeStruct)
    return _counted(jax.make_jaxpr(shrink(graph, kept))(params, *inputs))


def _counted(closed: Any) -> float:
    lowered = jax.jit(core.jaxpr_as_fun(closed)).lower(*closed.in_avals)
    count = (lowered.cost_analysis() or {}).get("flops")
    if count is None:
        raise ValueError("graph: XLA counts no FLOPs on this device: use another cost")
    return float(count) + _uncounted(flatten(closed))


def _uncounted(program: Program) -> float:
    """The rounds of loops that XLA leaves out: it counts the body once, unrolled as it is."""
    total = 0.0
    for step in program.steps:
        if step.name == "while":
            raise ValueError(
                "graph: the network has a while loop, and how often it runs is not known: use "
                "another cost, or write it as a scan"
            )
        if step.name == "cond":
            total += max(map(_uncounted, step.bodies))
        if step.name == "scan":
            length = step.params["length"]
            unroll = step.params["unroll"] or max(length, 1)  # 0: entirely
            if rounds := length - min(length, unroll + length % unroll):
                total += rounds * _counted(step.params["jaxpr"])
            total += (length - rounds) * _uncounted(step.bodies[0])
    return total


def latency(graph: UnitGraph, kept: Kept, *, repeats: int = 30) -> float:
    """Median milliseconds of a compiled call with the traced inputs, here and now.

    Args:
      graph: as in :func:`shapes`.
      kept: likewise.
      repeats: timed calls, after three that are not counted.
    """
    return _latencies(graph, [kept], repeats)[0]


def report(graph: UnitGraph, kept: Kept, *, repeats: int = 30) -> dict[str, tuple[float, float]]:
    """What the network costs before and after.

    Args:
      graph: as in :func:`shapes`.
      kept: likewise.
      repeats: timed calls of each, in turn.

    Returns:
      ``units``, ``parameters``, ``bytes``, ``latency_ms`` and ``flops`` (absent where :func:`flops`
      has no count) of a call with the traced inputs → before, after.
    """
    free = {name: range(g.size) for name, g in graph.groups.items() if g.free}
    both: tuple[Kept, Kept] = free, free | dict(kept)
    times = _latencies(graph, both, repeats)

    def pair(of: Callable[[Kept], float]) -> tuple[float, float]:
        return of(both[0]), of(both[1])

    found = {
        "units": pair(lambda kept: sum(len(indices) for indices in kept.values())),
        "parameters": pair(lambda kept: parameters(graph, kept)),
        "bytes": pair(
            lambda kept: sum(
                int(np.prod(like.shape)) * like.dtype.itemsize for like in shapes(graph, kept).values()
            )
        ),
        "latency_ms": (times[0], times[1]),
    }
    with contextlib.suppress(ValueError):  # not known
        found["flops"] = pair(lambda kept: flops(graph, kept))
    return found


def architecture(graph: UnitGraph, kept: Kept) -> dict[str, Any]:
    """All that a fresh process must know of the smaller network, as JSON values.

    With the code of the large one, ``keep(graph, like, record["kept"])`` makes the tree of shapes
    that a checkpoint is read into, and ``shrink(graph, record["kept"])`` the function. A module whose
    widths are arguments is built anew from ``record["widths"]``.

    Args:
      graph: as in :func:`shapes`.
      kept: likewise.

    Returns:
      ``kept``: group → indices, of the groups that lost units; ``widths``: free group → units left;
      ``shapes``: path → shape.
    """
    masks = check(graph, kept)
    sizes = {name: group.size for name, group in graph.groups.items() if group.free}
    return {
        "kept": {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()},
        "widths": sizes | {name: int(mask.sum()) for name, mask in masks.items()},
        "shapes": {path: list(like.shape) for path, like in shapes(graph, kept).items()},
    }


def _arguments(graph: UnitGraph, kept: Kept, make: Callable[..., Any]) -> Any:
    """Parameters and inputs of a call: ``make(shape, dtype)`` for each."""
    traced = graph.program
    avals = [traced.program.avals[number] for number in traced.program.inputs]
    small = list(shapes(graph, kept).values())
    leaves = [make(like.shape, like.dtype) for like in [*small, *avals[len(small) :]]]
    return jax.tree.unflatten(traced.inputs, leaves)


def _latencies(graph: UnitGraph, each: Sequence[Kept], repeats: int) -> list[float]:
    """Medians, of calls in turn: what else the machine does slows down all of them."""
    calls = []
    for kept in each:
        params, inputs = _arguments(graph, kept, jnp.zeros)
        compiled = jax.jit(shrink(graph, kept)).lower(params, *inputs).compile()
        calls.append(functools.partial(compiled, params, *inputs))
    return (np.median(metrics.timings(calls, repeats=repeats), 0) * 1e3).tolist()

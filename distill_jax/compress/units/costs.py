"""What a network costs without some of its units, and a description of the smaller network."""

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
from distill_jax.compress.units.masks import Kept, shapes_of, unit_masks
from distill_jax.compress.units.running import traced_function

Cost = Callable[[UnitGraph, Kept], float]


def share(graph: UnitGraph, kept: Kept) -> float:
    """Returns the share of units that stay, among the units of the groups that ``kept`` names.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      A fraction between 0 and 1.
    """
    unit_masks(graph, kept)
    total = sum(graph.groups[name].size for name in kept)
    return sum(len(indices) for indices in kept.values()) / max(total, 1)


def parameters(graph: UnitGraph, kept: Kept) -> int:
    """Counts the parameters that are left. The model's state does not count.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      The number of single weights.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> parameters(graph, {}), parameters(graph, {"a": [0, 3]})
    (20, 10)
    """
    shapes = shapes_of(graph, kept)
    return sum(int(np.prod(shapes[name].shape)) for name in jax.tree.leaves(graph.names.params))


def flops(graph: UnitGraph, kept: Kept) -> float:
    """Counts the operations of a call with the traced inputs, as XLA counts them.

    For the operations per example, trace with one example. The body of a ``scan`` counts as often as it
    runs. Of the branches of a ``cond``, the one with the most operations counts.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      The number of operations.

    Raises:
      ValueError: if XLA has no count, or if there is a ``while`` loop, whose number of rounds is unknown.
    """
    return _counted(
        jax.make_jaxpr(traced_function(graph, kept))(*_arguments(graph, kept, jax.ShapeDtypeStruct))
    )


def _counted(closed: Any) -> float:
    lowered = jax.jit(core.jaxpr_as_fun(closed)).lower(*closed.in_avals)
    count = (lowered.cost_analysis() or {}).get("flops")
    if count is None:
        raise ValueError("graph: XLA counts no FLOPs on this device: use another cost")
    return float(count) + _uncounted(flatten(closed))


def _uncounted(program: Program) -> float:
    """Counts the rounds of loops that XLA leaves out: it counts the body once, unrolled as it is."""
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
    """Measures the median time of a compiled call with the traced inputs, on this machine.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.
      repeats: number of timed calls, after three that are not counted.

    Returns:
      The time of one call in milliseconds.
    """
    return _latencies(graph, [kept], repeats)[0]


def report(graph: UnitGraph, kept: Kept, *, repeats: int = 30) -> dict[str, tuple[float, float]]:
    """Compares what the network costs before and after units are removed.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.
      repeats: number of timed calls of each network, in turn.

    Returns:
      ``units``, ``parameters``, ``bytes``, ``latency_ms`` and ``flops`` of a call with the traced inputs
      → (before, after). ``flops`` is absent where :func:`flops` has no count.
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
                int(np.prod(like.shape)) * like.dtype.itemsize for like in shapes_of(graph, kept).values()
            )
        ),
        "latency_ms": (times[0], times[1]),
    }
    with contextlib.suppress(ValueError):  # not known
        found["flops"] = pair(lambda kept: flops(graph, kept))
    return found


def architecture(graph: UnitGraph, kept: Kept) -> dict[str, Any]:
    """Describes the smaller network in JSON values, for building it anew from the network's code.

    If the widths are arguments of the network's code, take them from ``record["widths"]``. (To write a model to a
    file and read it without its code, use :func:`distill_jax.models.save`.)

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      kept: group → the indices of the units that stay.

    Returns:
      ``kept``: group → indices, for the groups that lost units; ``widths``: free group → number of units
      left; ``shapes``: name of an array → shape.
    """
    masks = unit_masks(graph, kept)
    sizes = {name: group.size for name, group in graph.groups.items() if group.free}
    return {
        "kept": {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()},
        "widths": sizes | {name: int(mask.sum()) for name, mask in masks.items()},
        "shapes": {path: list(like.shape) for path, like in shapes_of(graph, kept).items()},
    }


def _arguments(graph: UnitGraph, kept: Kept, make: Callable[..., Any]) -> Any:
    """Makes ``(params, state, x)`` for a call, of ``make(shape, dtype)`` each."""
    traced = graph.traced
    leaves = [*shapes_of(graph, kept).values(), *jax.tree.leaves(traced.x)]
    return jax.tree.unflatten(traced.arguments, [make(like.shape, like.dtype) for like in leaves])


def _latencies(graph: UnitGraph, each: Sequence[Kept], repeats: int) -> list[float]:
    """Medians of calls in turn, so that what else the machine does slows down all of them."""
    calls = []
    for kept in each:
        arguments = _arguments(graph, kept, jnp.zeros)
        compiled = jax.jit(traced_function(graph, kept)).lower(*arguments).compile()
        calls.append(functools.partial(compiled, *arguments))
    return (np.median(metrics.timings(calls, repeats=repeats), 0) * 1e3).tolist()

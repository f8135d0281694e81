"""Rules for primitives that this library does not know, such as a user's Pallas kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._checks import check_count, shown
from distill_jax._model import PyTree, from_function
from distill_jax.compress.units._trace.adapted import ADAPTED, run_own
from distill_jax.compress.units._trace.loop_rules import own
from distill_jax.compress.units._trace.program import OWN, Own
from distill_jax.compress.units._trace.rules import RULES
from distill_jax.compress.units.shrinking import shrink
from distill_jax.compress.units.tracing import trace
from distill_jax.compress.units.verification import verify

# What each operand is made of, and each result goes through: functions that keep zeros, and one that does not
BEFORE = jnp.tanh, jnp.sin, jnp.cos
AFTER = jnp.tanh, lambda y: y, jnp.cos


def register_rule(
    name: str, reference: Callable[..., PyTree], *, run: Callable[..., PyTree] | None = None
) -> None:
    """Registers how units pass through a primitive of your own, by a plain JAX program that computes the same.

    :func:`~distill_jax.compress.units.trace` then reads the reference in the place of the primitive. The network
    itself keeps the primitive. :func:`~distill_jax.compress.units.shrink` gives it smaller operands by ``run``;
    without ``run`` it computes the reference there. Register before you trace, in each process; a second
    registration takes the place of the first. :func:`check_rule` tests what was registered.

    Args:
      name: the primitive's name, as the notes of a graph give it: ``pallas_call:`` and the name of the kernel
        (``name=`` of ``pl.pallas_call``, or that of its function), ``ffi_call:`` and the name of its target, or the
        name of a ``jax.extend.core.Primitive``.
      reference: ``(*operands, **parameters) -> result``, or a tuple of results: the operands as arrays, and the
        parameters of the primitive. Numbers that it computes from shapes stay those of the traced network.
      run: ``(*operands, **parameters) -> result``, or a tuple of results: the primitive for operands of any sizes,
        usually the function that calls it. The parameters are those of the traced call.

    Raises:
      ValueError: if ``name`` is no string, or the name of a primitive that this library has a rule for; if a
        function is none.

    >>> from jax.extend.core import Primitive
    >>> twice = Primitive("twice")
    >>> _ = twice.def_impl(lambda x: 2 * x)
    >>> _ = twice.def_abstract_eval(lambda x: x)
    >>> register_rule("twice", lambda x: 2 * x)
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = from_function(lambda p, x: twice.bind(x @ p["a"]) @ p["b"], params)
    >>> trace(model, jnp.ones((1, 3))).groups["a"].removable
    'exactly'
    """
    for argument, function in (("reference", reference), *([("run", run)] if run is not None else [])):
        if not callable(function):
            raise ValueError(
                f"{argument} must be a function, (*operands, **parameters) -> result, got {shown(function)}"
            )
    if not isinstance(name, str):
        raise ValueError(f"name: give the primitive's name as a string, got {shown(name)}")
    if name in RULES and name not in OWN:
        raise ValueError(
            f"name: the library has a rule for {name!r}; give the name of a primitive of your own"
        )
    OWN[name] = Own(reference, run)
    RULES[name], ADAPTED[name] = own, run_own


def check_rule(
    function: Callable[..., PyTree],
    *operands: jax.Array | np.ndarray | jax.ShapeDtypeStruct,
    programs: int = 16,
    seed: int = 0,
) -> dict[str, str]:
    """Tests the rules of the primitives in a function, by random programs around it.

    Each program makes the floating-point operands of parameters, with and without zeros that stay zero, and sums
    up the results, with and without weights. Random units of every group that is called exact are removed by
    :func:`~distill_jax.compress.units.shrink` and set to zero, and both must compute the same.

    Args:
      function: ``(*operands) -> result``, or a pytree of results: calls the primitive.
      operands: for each operand an array, or a ``jax.ShapeDtypeStruct`` for a floating-point one, whose numbers are
        drawn. Arrays of integers are given as they are. Sizes of 4 to 12 along axes that may have units suffice.
      programs: how many programs are tried.
      seed: of the random numbers.

    Returns:
      What can be removed: ``operand 0, axis 1`` → ``exactly``, or ``inexactly`` if it was exact in no
      program. Axes that are missing are frozen.

    Raises:
      ValueError: if an operand is no array; if a primitive in the function has no rule; if a smaller program does
        not run, or does not compute what the silenced one computes.

    >>> found = check_rule(lambda x, w: jax.nn.relu(x) @ w, jnp.ones((3, 4)), jnp.ones((4, 2)), programs=4)
    >>> sorted(found)
    ['operand 0, axis 0', 'operand 0, axis 1', 'operand 1, axis 0', 'operand 1, axis 1']
    """
    if not callable(function):
        raise ValueError(f"function must be a function, (*operands) -> result, got {shown(function)}")
    check_count("programs", programs)
    for operand in operands:
        if not hasattr(operand, "dtype") or not hasattr(operand, "shape"):
            raise ValueError(f"operands: give arrays or jax.ShapeDtypeStruct, got {shown(operand)}")
        if isinstance(operand, jax.ShapeDtypeStruct) and not jnp.issubdtype(operand.dtype, jnp.floating):
            raise ValueError(
                f"operands: only floating-point numbers are drawn, give an array of {operand.dtype}"
            )
    found: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for i in range(programs):
        model, x = _around(function, operands, rng)
        graph = trace(model, x)
        if graph.notes:
            raise ValueError(f"function: there is {graph.notes[0]}: call register_rule for it first")
        exact = {name: group for name, group in graph.groups.items() if group.exact_shrunk}
        kept = {
            n: np.sort(rng.choice(g.size, rng.integers(1, g.size + 1), replace=False))
            for n, g in exact.items()
        }
        where = f"program {i}, of units { ({n: k.tolist() for n, k in kept.items()}) }"
        error = verify(graph, model, kept, x, by=shrink) if kept else 0.0
        if error > 8 * float(jnp.finfo(x.dtype).eps) ** 0.5:
            raise ValueError(
                f"function: without some units its results differ by {error:.1e} from those with these units set to "
                f"zero: the rule is wrong; {where}"
            )
        for group in graph.groups.values():
            for path, axis, _ in group.slices if group.free else ():
                if path.startswith("operand"):
                    key = f"{path}, axis {axis}"
                    if group.exact_shrunk:
                        found[key] = "exactly"
                    found.setdefault(key, "inexactly")
    return dict(sorted(found.items()))


def _around(
    function: Callable[..., PyTree], operands: Any, rng: np.random.Generator
) -> tuple[Any, jax.Array]:
    """Makes a random program with the function in it, as a model, and its input."""
    floats = [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.floating)]
    dtype = operands[floats[0]].dtype if floats else jnp.float32
    before = {i: BEFORE[rng.integers(len(BEFORE))] for i in floats}
    results = jax.tree.leaves(jax.eval_shape(function, *operands))
    after = [AFTER[rng.integers(len(AFTER))] for _ in results]
    weighted = [bool(rng.integers(2)) for _ in results]
    shapes = {f"operand {i}": operands[i].shape for i in floats}
    shapes |= {f"weight {i}": y.shape for i, y in enumerate(results) if weighted[i]}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        given = [before[i](params[f"operand {i}"]) if i in floats else y for i, y in enumerate(operands)]
        total = x
        for i, y in enumerate(jax.tree.leaves(function(*given))):
            y = after[i](y.astype(dtype))
            total = total + (y * params[f"weight {i}"] if weighted[i] else y).sum()
        return total

    return from_function(fn, params), jnp.zeros(1, dtype)

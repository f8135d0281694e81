"""Intermediate values of a model, without editing it.

:func:`capture` traces a model to a jaxpr, finds the values that have a name there, and makes the chosen
ones further results of the same program. The rest of the program does not change: nothing runs twice,
dropout draws once, and rematerialisation, sharding and custom derivatives keep their rules.

A value has a name where the model says so with ``jax.ad_checkpoint.checkpoint_name``, and each result
of a module's call has the module's path, ``stages.1.conv``, in models that come from
:func:`distill_jax.models.from_nnx` or :func:`~distill_jax.models.from_linen`. (These write the names
down only while a capture traces them.)

- The second call of one module, and any repeated name, is ``name#1``, the third ``name#2``.
- The parts of a result that is a tuple or a dict are ``name.0``, ``name.1`` or ``name.key``.
- A value inside ``jax.lax.scan`` is stacked over the iterations, a leading axis.
"""

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import check_sequence
from distill_jax._jaxpr import CALLS, scan_with_more, trace
from distill_jax._model import ApplyFn, Model, PyTree, check_model

# Distinguishes a module's path from the names that a rematerialisation policy may speak of
_MARK = "distill_jax:"
# Part of every jit cache's key: a function traced before without names is traced anew
_naming = jax.make_user_context(False)


def naming() -> bool:
    """Says whether a capture is tracing the model, so that modules name what they return."""
    return bool(_naming.value)


def name_values(name: str, values: PyTree) -> PyTree:
    """Gives a module's result a name, by which :func:`capture` finds it.

    Args:
      name: the module's path.
      values: a pytree. A single array gets the name itself, and the leaves of a container get
        ``name.<path>``. Leaves that are not arrays of numbers get no name.

    Returns:
      The same values.
    """

    def one(path, leaf):
        if not isinstance(leaf, jax.Array) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        inner = jax.tree_util.keystr(path, simple=True, separator=".")
        return checkpoint_name(leaf, _MARK + (f"{name}.{inner}" if inner else name))

    return jax.tree_util.tree_map_with_path(one, values)


def capture(model: Model, select: str | Sequence[str]) -> Model:
    """Makes a model that also returns intermediate values, in the same forward pass.

    The new model performs the operations of the old one, each once and in the same order, so its
    outputs are the same bit for bit. Compiled, this holds for what layers compute. A value that XLA
    would have fused into the next operation (dropout's output into a mean) must now be written to
    memory, and the last bits of that operation may differ. Works under ``jit``, ``grad``, ``vmap``,
    ``scan``, ``pmap`` and ``shard_map``.

    Args:
      model: the model whose values are wanted.
      select: names, or shell patterns of names: ``"stages.*"`` selects everything below ``stages``
        (a ``*`` also matches dots), ``"stages.?"`` the stages themselves.
        :func:`layer_shapes` lists the names of a model.

    Returns:
      A model with the same parameters and state whose outputs are ``(outputs, {name: array})``, with the
      names in the order of computation.

    Raises:
      ValueError: if ``select`` is empty; or, when the model is traced, if a pattern matches no name
        (the message lists them), or a value inside a ``while``, a ``cond`` or a function with custom
        derivatives, which cannot leave it.

    >>> import jax.numpy as jnp
    >>> from distill_jax.models import from_function
    >>> def fn(params, x):
    ...     hidden = checkpoint_name(jnp.tanh(x), "hidden")
    ...     return hidden @ params
    >>> captured = capture(from_function(fn, jnp.eye(2)), "hid*")
    >>> outputs, features = captured(jnp.zeros((3, 2)))
    >>> outputs.shape, list(features)
    ((3, 2), ['hidden'])
    """
    check_model("model", model)
    if not isinstance(select, str):
        check_sequence("select", select, "names or patterns")
    patterns = (select,) if isinstance(select, str) else tuple(select)
    if not patterns:
        raise ValueError("select must name at least one value, got none: give names or patterns")

    return model.replace(apply_fn=_Captured(model.apply_fn, patterns))


@dataclasses.dataclass(frozen=True)
class _Captured:
    """The ``apply_fn`` of :func:`capture`; equal where the function and the patterns are."""

    apply_fn: ApplyFn
    patterns: tuple[str, ...]

    def __call__(self, params: PyTree, state: PyTree, x: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        program, results = _trace(self.apply_fn, params, state, x, key)
        names = _Names(lambda name: any(fnmatch.fnmatchcase(name, p) for p in self.patterns))
        jaxpr, found = names.expose(program.jaxpr)
        for pattern in self.patterns:
            if not fnmatch.filter(names.seen, pattern):
                raise ValueError(
                    f"select: no value is named {pattern!r}. Named are: "
                    f"{', '.join(names.seen) or 'none (see the docstring of distill_jax.features.capture)'}"
                )
        program = program.replace(jaxpr=jaxpr.replace(outvars=[*jaxpr.outvars, *(var for _, var in found)]))
        values = core.jaxpr_as_fun(program)(*jax.tree.leaves((params, state, x, key)))
        count = len(values) - len(found)
        outputs, state = jax.tree.unflatten(jax.tree.structure(results), values[:count])
        names_found = [name for name, _ in found]
        return (outputs, dict(zip(names_found, values[count:], strict=True))), state


def resume(model: Model, name: str, example: ArrayLike | jax.ShapeDtypeStruct) -> Model:
    """Makes the second part of a model: from a named intermediate value to the outputs.

    Together with ``capture(model, name)`` this cuts a model in two.

    Args:
      model: the whole model, whose input must be one array.
      name: the name of one value, as :func:`layer_shapes` lists them.
      example: one input of the whole model, an array without the batch axis, or its
        ``jax.ShapeDtypeStruct``. Only its shape and dtype are used.

    Returns:
      A model with the same parameters and state whose input is the value, ``[batch, ...]`` as captured.
      State that the first part would change stays as it is.

    Raises:
      ValueError: when the rest is traced, if there is no such name, if ``value`` has another shape, or
        if the outputs do not follow from it alone, as where a connection passes it by.

    >>> from distill_jax.models import from_function
    >>> model = from_function(lambda params, x: 10 * checkpoint_name(x + 1, "more"), {})
    >>> print(resume(model, "more", jnp.zeros(()))(jnp.array([5.0])))
    [50.]
    """
    check_model("model", model)
    shape, dtype = tuple(jnp.shape(example)), jnp.dtype(jnp.result_type(example))
    return model.replace(apply_fn=_Resumed(model.apply_fn, name, shape, dtype))


@dataclasses.dataclass(frozen=True)
class _Resumed:
    """The ``apply_fn`` of :func:`resume`; equal where the function, the name and the inputs' form are."""

    apply_fn: ApplyFn
    name: str
    shape: tuple[int, ...]
    dtype: DTypeLike

    def __call__(self, params: PyTree, state: PyTree, value: Any, *, key: Any = None) -> tuple[Any, PyTree]:
        x = jax.ShapeDtypeStruct((value.shape[0], *self.shape), self.dtype)
        program, results = _trace(self.apply_fn, params, state, x, key)
        names = _Names(lambda found: found == self.name)
        jaxpr, found = names.expose(program.jaxpr)
        if not found:
            raise ValueError(f"name: no value is named {self.name!r}, only {', '.join(names.seen)}")
        start = found[0][1]
        if start.aval.shape != value.shape:
            raise ValueError(
                f"value must be of the shape of {self.name!r}, {start.aval.shape}, got {value.shape}"
            )
        leaves = jax.tree.leaves((params, state))
        given, other = jaxpr.invars[: len(leaves)], jaxpr.invars[len(leaves) + 1 :]
        outside = _followers(jaxpr, jaxpr.invars[len(leaves)], start)
        outputs = list(jaxpr.outvars)
        count = len(jax.tree.leaves(results[0]))
        if any(_is_var(out) and out in outside for out in outputs[:count]):
            raise ValueError(
                f"the outputs do not follow from {self.name!r} alone: cut the model where no connection "
                "passes by, and not within jax.jit (give the function, not the jitted one)"
            )
        states = given[len(given) - len(jax.tree.leaves(state)) :]
        outputs[count:] = [
            old if _is_var(new) and new in outside else new
            for old, new in zip(states, outputs[count:], strict=True)
        ]
        kept = jaxpr.replace(
            invars=[*given, *other, start],
            outvars=outputs,
            eqns=_needed(jaxpr.eqns, outputs, start),
            debug_info=jaxpr.debug_info.with_unknown_names(),
        )
        values = core.jaxpr_as_fun(program.replace(jaxpr=kept))(*leaves, *jax.tree.leaves(key), value)
        return jax.tree.unflatten(jax.tree.structure(results), values)


def _is_var(atom: Any) -> bool:
    return isinstance(atom, core.Var)


def _followers(jaxpr: Any, source: Any, barrier: Any) -> set[Any]:
    """The variables that depend on ``source`` on a way that does not lead through ``barrier``."""
    found = {source}
    for eqn in jaxpr.eqns:
        if any(_is_var(atom) and atom in found for atom in eqn.invars):
            found |= {var for var in eqn.outvars if var is not barrier}
    return found


def _needed(eqns: Sequence[Any], outputs: Sequence[Any], given: Any) -> list[Any]:
    """The equations on which outputs depend, where the value of ``given`` is known."""
    wanted = {atom for atom in outputs if _is_var(atom)} - {given}
    kept = []
    for eqn in reversed(eqns):
        if any(var in wanted for var in eqn.outvars):
            kept.append(eqn)
            wanted |= {atom for atom in eqn.invars if _is_var(atom)} - {given}
    return kept[::-1]


def layer_shapes(model: Model, x: PyTree, *, key: jax.Array | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Lists the values that :func:`capture` can return: names and shapes, in the order of computation.

    Nothing is computed, so the arrays of the model and of ``x`` may be ``jax.ShapeDtypeStruct``. Values
    that cannot be captured, such as those inside a ``while``, are left out.

    Args:
      model: the model.
      x: a batch of inputs.
      key: a random key for training mode; None for evaluation mode.

    Returns:
      A dict from name to shape and dtype; the shapes include the batch axis.
    """
    check_model("model", model)
    program, _ = _trace(model.apply_fn, model.params, model.state, x, key)
    names = _Names(lambda name: True, strict=False)
    return {
        name: jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype)
        for name, var in names.expose(program.jaxpr)[1]
    }


def _trace(apply_fn: ApplyFn, params: PyTree, state: PyTree, x: Any, key: Any) -> tuple[Any, Any]:
    with _naming(True):
        return trace(lambda *arguments: apply_fn(*arguments[:-1], key=arguments[-1]), params, state, x, key)


class _Names:
    """Walks through a program once, numbers its names, and leads the wanted ones out of it."""

    def __init__(self, wanted: Callable[[str], bool], *, strict: bool = True):
        self.wanted = wanted
        self.strict = strict
        self.seen: list[str] = []
        self.counts: Counter[str] = Counter()

    def expose(self, jaxpr: Any, closed: str = "") -> tuple[Any, list[tuple[str, Any]]]:
        """A jaxpr in which the wanted values are variables at the top, and these.

        ``closed`` says what encloses the jaxpr, if nothing can be led out of that.
        """
        eqns, found = [], []
        for eqn in jaxpr.eqns:
            kind = eqn.primitive.name
            if kind == "name":
                name = self.number(eqn.params["name"].removeprefix(_MARK))
                if self.wanted(name) and self.allowed(name, closed):
                    if isinstance(eqn.outvars[0], core.DropVar):
                        eqn = eqn.replace(outvars=[core.Var(eqn.outvars[0].aval)])
                    found.append((name, eqn.outvars[0]))
            elif kind in _OPEN and not closed:
                place = _BODY[kind]
                inner = eqn.params[place]
                body, values = self.expose(getattr(inner, "jaxpr", inner))
                if values:
                    body = body.replace(outvars=[*body.outvars, *(var for _, var in values)])
                    inner = inner.replace(jaxpr=body) if hasattr(inner, "jaxpr") else body
                    avals = [_OPEN[kind](eqn.params, var.aval) for _, var in values]
                    params = scan_with_more(eqn.params, len(values)) | {place: inner}
                    for option, value in _UNSPECIFIED.items():
                        if option in params:
                            params[option] = (*params[option], *[value()] * len(values))
                    outer = [core.Var(aval) for aval in avals]
                    eqn = eqn.replace(params=params, outvars=[*eqn.outvars, *outer])
                    found += [(name, var) for (name, _), var in zip(values, outer, strict=True)]
            else:
                for inner in core.jaxprs_in_params(eqn.params):
                    self.expose(inner, closed or kind)
            eqns.append(eqn)
        return jaxpr.replace(eqns=eqns), found

    def number(self, name: str) -> str:
        count = self.counts[name]
        self.counts[name] += 1
        self.seen.append(f"{name}#{count}" if count else name)
        return self.seen[-1]

    def allowed(self, name: str, closed: str) -> bool:
        if closed and self.strict:
            raise ValueError(
                f"select: the value named {name!r} is computed inside a {closed!r}, which it cannot "
                "leave: choose one outside, such as the result of the whole"
            )
        return not closed


def _stacked(params: Mapping[str, Any], aval: Any) -> Any:
    return core.unmapped_aval(params["length"], 0, aval)


# Primitives whose bodies may have further results: where the body is, and how those look from outside. What
# defines its own derivative has as many results as that says.
_CALLS = {kind: place for kind, place in CALLS.items() if not kind.startswith("custom")}
_BODY = {**_CALLS, "scan": "jaxpr"}
_OPEN: dict[str, Callable[[Mapping[str, Any], Any], Any]] = {
    **dict.fromkeys(_CALLS, lambda _, aval: aval), "scan": _stacked
}  # fmt: skip


@cache
def _unspecified(option: str) -> Any:
    """What ``jit`` writes for a result of which nothing was said."""
    return jax.make_jaxpr(jax.jit(lambda x: x))(0.0).eqns[0].params[option][0]


_UNSPECIFIED = {option: partial(_unspecified, option) for option in ("out_shardings", "out_layouts")}

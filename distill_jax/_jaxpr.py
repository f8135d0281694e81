"""Programs run with something else in the place of a parameter: what :mod:`factors` is made with.

A model is traced to a jaxpr and run equation by equation. Parameters may enter as a :class:`View`; an
equation that meets one is given to a function, all others run as they are.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core


@dataclass(frozen=True)
class View:
    """A parameter on its way through a program, by then transposed or converted.

    Attributes:
      value: what stands for it.
      path: its name.
      axes: its own axes in their present order; None for the order they had.
      dtype: what it was converted to, or None.
    """

    value: Any
    path: str
    axes: tuple[int, ...] | None = None
    dtype: Any = None

    def order(self, rank: int) -> tuple[int, ...]:
        """The present order of ``rank`` axes."""
        return tuple(range(rank)) if self.axes is None else self.axes

    def array(self, x: Any) -> Any:
        """Does to an array what was done to the parameter."""
        x = x if self.axes is None else jnp.transpose(x, self.axes)
        return x if self.dtype is None else x.astype(self.dtype)


def run(apply_fn: Callable[..., Any], arguments: Any, values: list[Any], use: Any) -> Any:
    """Runs a model's program with something else in the place of its parameters.

    Args:
      apply_fn: as in :class:`distill_jax.models.Model`.
      arguments: ``[params, model_state, x, key]``, arrays or ``jax.ShapeDtypeStruct``: what is traced.
      values: in the place of the parameters' leaves, arrays or :class:`View`.
      use: ``(jaxpr, eqn, inputs, places) -> outputs``, for equations of which the inputs at ``places``
        are views.

    Returns:
      What ``apply_fn`` returns.
    """

    def fresh(params, model_state, x, key):  # a new function, so that no cache of traces answers
        return apply_fn(params, model_state, x, key=key)

    program, results = jax.make_jaxpr(fresh, return_shape=True)(*arguments)
    rest = jax.tree.leaves(arguments[1:])
    outputs = evaluate(program.jaxpr, program.consts, [*values, *rest], use)
    return jax.tree.unflatten(jax.tree.structure(results), outputs)


# Calls that compute what their body does, and where it is. What they say of derivatives and memory is
# lost where the body is written out.
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat2": "jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr",
}  # fmt: skip


def evaluate(jaxpr: Any, consts: Any, values: Any, use: Callable[..., Any]) -> list[Any]:
    """Runs a program: :func:`run` on a jaxpr."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(atom):
        return known[atom] if isinstance(atom, core.Var) else atom.val

    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        kind = eqn.primitive.name
        views = [i for i, x in enumerate(inputs) if isinstance(x, View)]
        if not views:
            outputs = alone(jaxpr, eqn, inputs)
        elif kind in CALLS:
            inner = eqn.params[CALLS[kind]]
            outputs = evaluate(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, use)
        elif kind == "transpose":
            view, axes = inputs[0], eqn.params["permutation"]
            old = view.order(len(axes))
            outputs = [dataclasses.replace(view, axes=tuple(old[i] for i in axes))]
        elif kind == "convert_element_type":
            outputs = [dataclasses.replace(inputs[0], dtype=eqn.params["new_dtype"])]
        else:
            outputs = use(jaxpr, eqn, inputs, views)
        known |= dict(zip(eqn.outvars, outputs, strict=True))
    return list(map(read, jaxpr.outvars))


def alone(jaxpr: Any, eqn: Any, inputs: list[Any]) -> list[Any]:
    """Runs one equation of a program, whatever its primitive takes."""
    places = {atom: i for i, atom in enumerate(eqn.invars) if isinstance(atom, core.Var)}
    program = jaxpr.replace(
        constvars=[], invars=list(places), eqns=[eqn], outvars=eqn.outvars, effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )  # fmt: skip
    return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*(inputs[i] for i in places.values()))


def product(eqn: Any, operands: list[Any]) -> Any:
    """Runs a product, perhaps of other sizes than it was traced with."""
    return eqn.primitive.bind(*operands, **eqn.params)


def outputs_axis(eqn: Any, place: int, rank: int) -> int | None:
    """Which axis of operand ``place`` of a product is its outputs'; None if it is no such product."""
    if eqn.primitive.name == "dot_general":
        contracted, batch = eqn.params["dimension_numbers"]
        free = set(range(rank)) - {*contracted[place], *batch[place]}
        return free.pop() if len(free) == 1 and not batch[place] else None
    if eqn.primitive.name == "conv_general_dilated" and place == 1:
        groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
        return eqn.params["dimension_numbers"].rhs_spec[0] if groups == (1, 1) else None
    return None


def summed_axes(eqn: Any, place: int) -> tuple[int, ...]:
    """The axes that are summed over, as they lie in the rows that :func:`rows_of` makes."""
    if eqn.primitive.name == "dot_general":
        return tuple(eqn.params["dimension_numbers"][0][place])
    return tuple(eqn.params["dimension_numbers"].rhs_spec[1:])


def rows_of(eqn: Any, arrays: list[Any], place: int) -> jax.Array:
    """What operand ``place`` of a product multiplies: a row ``[inputs]`` for each of its outputs."""
    if eqn.primitive.name == "dot_general":
        other, summed = arrays[1 - place], eqn.params["dimension_numbers"][0][1 - place]
        rest = [i for i in range(other.ndim) if i not in summed]
        other = jnp.transpose(other, (*rest, *summed))
        return other.reshape(-1, math.prod(other.shape[len(rest) :]))
    numbers = eqn.params["dimension_numbers"]
    patches = jax.lax.conv_general_dilated_patches(
        arrays[0],
        [arrays[1].shape[i] for i in numbers.rhs_spec[2:]],
        eqn.params["window_strides"],
        eqn.params["padding"],
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
        dimension_numbers=numbers,
    )
    axis = numbers.out_spec[1]  # channels first, then the places in the window
    return jnp.moveaxis(patches, axis, -1).reshape(-1, patches.shape[axis])

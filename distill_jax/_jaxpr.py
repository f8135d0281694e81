"""Reads a traced program (a jaxpr), and runs it with some of its inputs replaced.

Here stand the three things that every reader of a program needs: :func:`trace`, the table
:data:`CALLS` of calls that only compute what their body computes, and :func:`primitives`.

:func:`run` runs a traced model equation by equation with some parameters replaced, for example by
low-rank factors. A replaced parameter enters as a :class:`View`; an equation that uses a view is given to
a function of the caller, and all other equations run as they are.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

# Calls that compute what their body computes, and the name of the parameter that holds the body. Where a
# body is written out in place of the call, what the call says of derivatives and memory is lost.
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
    "remat2": "jaxpr", "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr", "custom_vjp_call_jaxpr": "fun_jaxpr",
}  # fmt: skip


def trace(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """Traces a function to a program, as if it had never been traced before.

    JAX remembers the trace of a function object. A new function object is traced here each time, so that
    a change that JAX does not know of (a capture that asks for names, for example) is seen.

    Args:
      function: the function.
      arguments: arrays or ``jax.ShapeDtypeStruct``, in pytrees.

    Returns:
      The closed jaxpr, and the results as a pytree of ``jax.ShapeDtypeStruct``.
    """

    def fresh(*arguments: Any) -> Any:
        return function(*arguments)

    return jax.make_jaxpr(fresh, return_shape=True)(*arguments)


def body_of(eqn: Any) -> tuple[Any, Sequence[Any]] | None:
    """Returns the body of a call, as a jaxpr and its constants; None for any other equation."""
    if eqn.primitive.name not in CALLS:
        return None
    inner = eqn.params[CALLS[eqn.primitive.name]]
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def scan_sizes(params: Mapping[str, Any]) -> tuple[int, int]:
    """Counts the constants of a scan and the values that it carries, from its parameters."""
    if "ft_in" in params:  # since JAX 0.11
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def scan_with_more(params: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Returns the parameters of a scan whose body has ``count`` more results at its end."""
    if "ft_out" not in params:
        return {**params}
    trees: Any = sys.modules[type(params["ft_out"]).__module__]  # JAX's own, of no public name
    carry, stacked = params["ft_out"].unpack()
    return {**params, "ft_out": trees.pack((carry, trees.pack((stacked, trees.nones(count)))))}


def primitives(program: Any) -> set[str]:
    """Lists the names of all primitives in a program, those of inner programs included.

    Args:
      program: a closed jaxpr, or a jaxpr.

    >>> sorted(primitives(jax.make_jaxpr(jax.jit(jax.numpy.sin))(1.0)))
    ['jit', 'sin']
    """
    found: set[str] = set()
    for eqn in getattr(program, "jaxpr", program).eqns:
        found.add(eqn.primitive.name)
        for inner in core.jaxprs_in_params(eqn.params):
            found |= primitives(inner)
    return found


@dataclass(frozen=True)
class View:
    """A replaced parameter on its way through a program, where it may have been transposed or converted.

    Attributes:
      value: what the parameter is replaced by.
      path: the parameter's name.
      axes: the parameter's axes in their present order; None for the original order.
      dtype: the dtype that the parameter was converted to, or None.
    """

    value: Any
    path: str
    axes: tuple[int, ...] | None = None
    dtype: Any = None

    def order(self, rank: int) -> tuple[int, ...]:
        """Returns the axes of a parameter of ``rank`` axes in their present order."""
        return tuple(range(rank)) if self.axes is None else self.axes

    def array(self, x: Any) -> Any:
        """Transposes and converts an array as the parameter was transposed and converted."""
        x = x if self.axes is None else jnp.transpose(x, self.axes)
        return x if self.dtype is None else x.astype(self.dtype)


def run(apply_fn: Callable[..., Any], arguments: Any, values: list[Any], use: Any) -> Any:
    """Runs a traced model with some parameters replaced, for example by low-rank factors.

    Args:
      apply_fn: as in :class:`distill_jax.models.Model`.
      arguments: ``[params, state, x, key]``, arrays or ``jax.ShapeDtypeStruct``, from which the program
        is traced.
      values: the leaves of the parameters to run with, each an array or a :class:`View`.
      use: ``(jaxpr, eqn, inputs, places) -> outputs``, called for each equation that has views among
        its inputs, at ``places``.

    Returns:
      The outputs and the state that ``apply_fn`` returns.
    """

    def function(params, state, x, key):
        return apply_fn(params, state, x, key=key)

    program, results = trace(function, *arguments)
    rest = jax.tree.leaves(arguments[1:])
    outputs = evaluate(program.jaxpr, program.consts, [*values, *rest], use)
    return jax.tree.unflatten(jax.tree.structure(results), outputs)


def evaluate(jaxpr: Any, consts: Any, values: Any, use: Callable[..., Any]) -> list[Any]:
    """Runs a jaxpr as :func:`run` does, and returns its outputs as a list."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))

    def read(atom):
        return known[atom] if isinstance(atom, core.Var) else atom.val

    for eqn in jaxpr.eqns:
        inputs = list(map(read, eqn.invars))
        kind = eqn.primitive.name
        views = [i for i, x in enumerate(inputs) if isinstance(x, View)]
        if not views:
            outputs = alone(jaxpr, eqn, inputs)
        elif body := body_of(eqn):
            outputs = evaluate(*body, inputs, use)
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
    """Runs a single equation of a program, whatever arguments its primitive takes."""
    places = {atom: i for i, atom in enumerate(eqn.invars) if isinstance(atom, core.Var)}
    program = jaxpr.replace(
        constvars=[], invars=list(places), eqns=[eqn], outvars=eqn.outvars, effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )  # fmt: skip
    return core.jaxpr_as_fun(core.ClosedJaxpr(program, ()))(*(inputs[i] for i in places.values()))


def product(eqn: Any, operands: list[Any]) -> Any:
    """Runs a product of two arrays, whose sizes may differ from the traced ones."""
    return eqn.primitive.bind(*operands, **eqn.params)


def outputs_axes(eqn: Any, place: int, rank: int) -> tuple[int, ...] | None:
    """Finds the axes of operand ``place`` that become the outputs of a matrix product or convolution.

    None if the equation is no such product, or one in groups.
    """
    if eqn.primitive.name == "dot_general":
        contracted, batch = eqn.params["dimension_numbers"]
        free = tuple(axis for axis in range(rank) if axis not in contracted[place])
        return None if batch[place] else free
    if eqn.primitive.name == "conv_general_dilated" and place == 1:
        groups = eqn.params["feature_group_count"], eqn.params["batch_group_count"]
        return (eqn.params["dimension_numbers"].rhs_spec[0],) if groups == (1, 1) else None
    return None


def summed_axes(eqn: Any, place: int) -> tuple[int, ...]:
    """Lists the axes of operand ``place`` that are summed over, in the order of :func:`rows_of`."""
    if eqn.primitive.name == "dot_general":
        return tuple(eqn.params["dimension_numbers"][0][place])
    _, channels, *window = eqn.params["dimension_numbers"].rhs_spec
    return (*window, channels)


def rows_of(eqn: Any, arrays: list[Any], place: int) -> jax.Array:
    """Returns what operand ``place`` of a product is multiplied by: one row ``[inputs]`` per output."""
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
    axis, channels = numbers.out_spec[1], arrays[1].shape[numbers.rhs_spec[1]]
    patches = jnp.moveaxis(patches, axis, -1)  # channels first, then the places in the window
    rows = patches.reshape(-1, channels, patches.shape[-1] // channels)
    return jnp.swapaxes(rows, 1, 2).reshape(len(rows), -1)

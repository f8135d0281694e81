"""Runs a traced network with smaller arrays, whatever library it was written in."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from distill_jax._model import Model, PyTree
from distill_jax.compress.units._trace.program import Program, Step, bind, evaluate
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.removal import Kept, keep, shapes_of, unit_masks
from distill_jax.compress.units.tracing import Traced, groups_of


def shrink(graph: UnitGraph, model: Model, kept: Kept) -> Model:
    """Makes the network of the kept units: a model that runs, with every size in its program adapted.

    It is needed where the network's code has widths written into it (the features of a Linen module or of a
    BatchNorm, the number of heads). Elsewhere :func:`~distill_jax.compress.units.keep` alone gives a model
    that runs. The result is differentiable and can be compiled. Numbers that the network computed from
    sizes, such as 1/√head_size, stay as they were, except those of a mean. Of custom derivatives only
    ReLU's is kept. For inputs of other shapes than the traced ones, such as another batch size, the network
    is traced anew.

    In training mode, with a key, the network's training program runs, with dropout masks of the smaller sizes
    and with the smaller statistics as its state. (:func:`distill_jax.models.save` stores that program for the
    batch size that it is given.)

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      kept: group → the indices of the units that stay.

    Returns:
      The smaller model; its arrays are ``keep(graph, model, kept)``.

    Raises:
      ValueError: if ``kept`` is not valid; when the result is called, if its arrays have not the shapes
        that the kept units make, or if the units are not the same for these inputs or in training mode.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    >>> model = models.from_function(lambda p, x: (x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 3)))
    >>> units.shrink(graph, model, {"a": [0, 3]})(jnp.ones((2, 3)))
    Array([[6., 6.],
           [6., 6.]], dtype=float32)
    """
    return keep(graph, model, kept).replace(apply_fn=ShrunkFn(graph, kept))


class ShrunkFn:
    """The ``apply_fn`` of a shrunk model; equal where the graph and the kept units are the same.

    Args:
      graph: the network's units.
      kept: the indices that stay in each group.
    """

    def __init__(self, graph: UnitGraph, kept: Kept):
        masks = unit_masks(graph, kept)
        self.kept = {name: np.flatnonzero(mask) for name, mask in masks.items()}
        self.shapes = [like.shape for like in shapes_of(graph, kept).values()]
        self.first = graph
        self.programs = {_shapes((graph.traced.x, None)): _Smaller.of(graph, self.kept)}
        units = sorted((name, indices.tobytes()) for name, indices in self.kept.items())
        self.identity = (id(graph), tuple(units))

    def __eq__(self, other: object) -> bool:
        """Compares the graph and the kept units, so that models shrunk alike share compiled programs."""
        return isinstance(other, ShrunkFn) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __call__(
        self, params: PyTree, state: PyTree, x: PyTree, *, key: jax.Array | None = None
    ) -> tuple[Any, PyTree]:
        """Computes the outputs and the state with the smaller arrays."""
        like = self.first.traced.model
        structure: Any = jax.tree.structure((like.params, like.state))
        arrays, given = jax.tree.flatten((params, state))
        if given != structure or [np.shape(leaf) for leaf in arrays] != self.shapes:
            raise ValueError(
                f"params and state must have the shapes that the kept units make, {self.shapes} in the "
                f"structure {structure}: give those of keep(graph, model, kept); got "
                f"{[np.shape(leaf) for leaf in arrays]} in {given}"
            )
        if key is not None:
            return self.program_for(x, key)(arrays, x, key)
        if any(map(export.is_symbolic_dim, (n for leaf in jax.tree.leaves(x) for n in np.shape(leaf)))):
            # For any batch size, as models.save exports it: each example by itself
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), x)
            program = self.program_for(one, None)

            def example(x: PyTree) -> PyTree:
                outputs = program(arrays, jax.tree.map(lambda leaf: leaf[None], x))
                return jax.tree.map(lambda leaf: leaf[0], outputs)

            return jax.vmap(example)(x), state
        return self.program_for(x, None)(arrays, x), state

    def program_for(self, x: PyTree, key: jax.Array | None) -> "_Smaller":
        """Returns the program for inputs of these shapes, in training mode if there is a key."""
        shapes = _shapes((x, key))
        if shapes not in self.programs:
            x, key = jax.tree.map(_like, (x, key))
            self.programs[shapes] = _Smaller.of(self.again(x, key), self.kept)
        return self.programs[shapes]

    def again(self, x: PyTree, key: jax.Array | None) -> UnitGraph:
        """Traces the whole network on other inputs or in training mode, and finds the groups there."""
        graph = groups_of(self.first.traced.model, x, key)
        places = {_places(group.slices): name for name, group in graph.groups.items()}
        units = {}
        for name in self.kept:
            same = places.get(_places(self.first.groups[name].slices))
            if same is None or not graph.groups[same].free:
                mode = "in evaluation" if key is None else "in training mode"
                raise ValueError(
                    f"x: {mode}, on inputs of shapes {[leaf.shape for leaf in jax.tree.leaves(x)]}, the units "
                    f"{name!r} are not the ones that were traced: trace the model on these inputs, or build "
                    "the network anew with the widths of units.architecture(graph, kept)"
                )
            units[name] = graph.traced.units[same]
        groups = {name: self.first.groups[name] for name in self.kept}
        return UnitGraph(groups, graph.shapes, graph.names, (), graph.traced._replace(units=units))


def _like(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))


def _shapes(x: PyTree) -> Any:
    leaves, structure = jax.tree.flatten(x)
    return structure, tuple((like.shape, like.dtype) for like in map(_like, leaves))


def _places(slices: Any) -> Any:
    return tuple(sorted((path, axis, index.tobytes()) for path, axis, index in slices))


class _Smaller:
    """A program with the sizes of every value, and each step adapted to them."""

    def __init__(self, traced: Traced, removed: Sequence[np.ndarray]):
        self.tracer = traced.tracer
        self.program = traced.program
        self.structure = traced.structure
        # One longer: NONE reads the last
        self.removed = np.zeros(traced.tracer.labels.count + 1, bool)
        for nodes in removed:
            self.removed[nodes] = True
        self.masks: dict[int, list[np.ndarray]] = {}

    @classmethod
    def of(cls, graph: UnitGraph, kept: Kept) -> "_Smaller":
        traced: Traced = graph.traced
        removed = []
        for name, indices in kept.items():
            gone = np.ones(len(traced.units[name]), bool)
            gone[np.asarray(indices)] = False
            removed.append(traced.units[name][gone])
        return cls(traced, removed)

    def __call__(self, arrays: Sequence[Any], x: PyTree, *keys: jax.Array) -> PyTree:
        """Runs the program on the smaller arrays of parameters and state, the inputs, and perhaps a key."""
        leaves = [jnp.asarray(leaf) for leaf in (*arrays, *jax.tree.leaves(x), *keys)]
        return jax.tree.unflatten(self.structure, self.run(self.program, leaves))

    def stays(self, number: int) -> list[np.ndarray]:
        """Says for each axis of a value which positions stay."""
        if number not in self.masks:
            resolve = self.tracer.labels.resolve
            self.masks[number] = [
                ~self.removed[resolve(units)].any(0) for units in self.tracer.read(number, self.program).units
            ]
        return self.masks[number]

    def shape(self, number: int) -> tuple[int, ...]:
        return tuple(int(mask.sum()) for mask in self.stays(number))

    def constant(self, number: int) -> Any:
        array = self.program.constants[number]
        for a, mask in enumerate(self.stays(number)):
            if not mask.all():
                array = jnp.take(array, np.flatnonzero(mask), axis=a)
        return array

    def changes(self, step: Step) -> bool:
        """Says whether a step has another size, or a mean with another number of terms."""
        touched = (*step.inputs, *step.outputs)
        return step.outputs[0] in self.tracer.means or not all(
            mask.all() for number in touched for mask in self.stays(number)
        )

    def run(self, program: Program, values: Sequence[Any]) -> list[Any]:
        return evaluate(program, self.step, self.constant, values)

    def step(self, step: Step, operands: list[Any]) -> Sequence[Any]:
        function = ADAPTED.get(step.name)
        if not self.changes(step):
            function = None
        results = function(self, step, operands) if function else bind(step, operands)
        for number, result in zip(step.outputs, results, strict=True):
            if np.shape(result) != self.shape(number):
                raise ValueError(
                    f"graph: {step.name} gives {np.shape(result)} where its units make "
                    f"{self.shape(number)}: please report this, with the network"
                )
        return results


def _relu(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    return [jax.nn.relu(operands[0])]


def _sized(option: str) -> Any:
    def adapted(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
        return bind(step, operands, **{option: small.shape(step.outputs[0])})

    return adapted


def _split(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    sizes = [small.shape(number)[step.params["axis"]] for number in step.outputs]
    return bind(step, operands, sizes=tuple(sizes))


def _slice(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    (x,) = operands
    strides = step.params["strides"] or (1,) * x.ndim
    cuts = zip(step.params["start_indices"], step.params["limit_indices"], strides, strict=True)
    for a, (cut, mask) in enumerate(zip(cuts, small.stays(step.inputs[0]), strict=True)):
        positions = np.arange(*cut)
        index = (np.cumsum(mask) - 1)[positions[mask[positions]]]
        gaps = np.unique(np.diff(index))
        if index.size and gaps.size <= 1:
            gap = int(gaps[0]) if gaps.size else 1
            x = jax.lax.slice_in_dim(x, int(index[0]), int(index[-1]) + 1, gap, a)
        else:
            x = jnp.take(x, index, axis=a)
    return [x]


def _pad(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    config = []
    for (low, high, interior), mask in zip(
        step.params["padding_config"], small.stays(step.outputs[0]), strict=True
    ):
        if not mask.all():
            low, high = int(mask[:low].sum()), int(mask[mask.size - high :].sum())
        config.append((low, high, interior))
    return bind(step, operands, padding_config=tuple(config))


def _gather(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    old = [mask.size for mask in small.stays(step.inputs[0])]
    new = small.shape(step.inputs[0])
    sizes = [b if size == a else size for size, a, b in zip(
        step.params["slice_sizes"], old, new, strict=True
    )]  # fmt: skip
    return bind(step, operands, slice_sizes=tuple(sizes))


def _conv(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    numbers = step.params["dimension_numbers"]
    features = small.shape(step.inputs[0])[numbers.lhs_spec[1]]
    groups = features // small.shape(step.inputs[1])[numbers.rhs_spec[1]]
    return bind(step, operands, feature_group_count=groups)


def _scaled(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    """A sum over n units that is divided by n, or multiplied by 1/n: n becomes the number that stays."""
    axes = small.tracer.means.get(step.outputs[0])
    if axes is not None:
        masks = [~small.removed[small.tracer.labels.resolve(units)].any(0) for units in axes]
        left = float(np.prod([mask.mean() for mask in masks]))
        factor = left if step.name == "div" else 1 / left
        for i, number in enumerate(step.inputs):
            count = small.tracer.number(number)
            if count is not None:
                operands[i] = np.asarray(count * factor, small.program.avals[number].dtype)
    return bind(step, operands)


def _scan(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    consts, carries = step.params["num_consts"], step.params["num_carry"]
    first, start, each = (
        operands[:consts], operands[consts : consts + carries], operands[consts + carries :],
    )  # fmt: skip

    def body(carry: Any, x: Any) -> Any:
        outputs = small.run(step.bodies[0], [*first, *carry, *x])
        return outputs[:carries], outputs[carries:]

    options = {name: step.params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = jax.lax.scan(body, start, each, **options)
    return [*carry, *outputs]


def _while(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    m, n = step.params["cond_nconsts"], step.params["body_nconsts"]
    condition, body = step.bodies
    return jax.lax.while_loop(
        lambda carry: small.run(condition, [*operands[:m], *carry])[0],
        lambda carry: small.run(body, [*operands[m : m + n], *carry]),
        operands[m + n :],
    )


def _cond(small: _Smaller, step: Step, operands: list[Any]) -> Sequence[Any]:
    branches = [lambda *values, p=program: small.run(p, values) for program in step.bodies]
    return jax.lax.switch(operands[0], branches, *operands[1:])


# Primitives that have sizes among their parameters, or programs within
ADAPTED: dict[str, Callable[[_Smaller, Step, list[Any]], Sequence[Any]]] = {
    "relu": _relu, "broadcast_in_dim": _sized("shape"), "iota": _sized("shape"),
    "random_bits": _sized("shape"), "reshape": _sized("new_sizes"),
    "dynamic_slice": _sized("slice_sizes"), "split": _split, "slice": _slice,
    "pad": _pad, "gather": _gather, "conv_general_dilated": _conv,
    "div": _scaled, "mul": _scaled, "scan": _scan, "while": _while, "cond": _cond,
}  # fmt: skip

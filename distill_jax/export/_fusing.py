"""Writes what an ONNX graph computes in many small operations as one: softmax, LayerNorm, GELU, attention, products.

A converter of JAX's primitives writes LayerNorm as some twenty operations. ONNX Runtime does not recognise them, and in
a small network an operation costs more than what it computes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

# Operations that keep the order of numbers, or repeat them
SHAPING = {"Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze"}


def fused(onnx: Any, message: Any) -> Any:
    """Returns a message in which LayerNorm, softmax, GELU, attention and products are one operation each.

    Args:
      onnx: the package.
      message: an ``onnx.ModelProto`` of opset 23 or later that computes with floats; it is not changed.
    """
    passes: tuple[dict[str, Callable[[_Graph, Any], list[Any] | None]], ...] = (
        {"Einsum": _Graph.product, "Div": _Graph.softmax, "Add": _Graph.layer_norm, "Mul": _Graph.gelu},
        {"Transpose": _Graph.attention, "Add": _Graph.bias},
        {"Reshape": _Graph.same_shape},
    )
    for rules in passes:
        # Infers the shapes of what the pass before has written
        message = onnx.shape_inference.infer_shapes(message)
        _Graph(onnx, message.graph).fuse(rules)
    del message.graph.value_info[:]
    return message


class _Graph:
    """A graph whose nodes are replaced."""

    def __init__(self, onnx: Any, graph: Any):
        self.onnx, self.graph, self.write = onnx, graph, onnx.helper.make_node
        self.arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.shapes = {  # a number, or a name such as "batch", for each axis; 0 where it is not known
            value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in graph.value_info
        }

    def fuse(self, rules: Mapping[str, Callable[["_Graph", Any], list[Any] | None]]) -> None:
        """Replaces nodes; a rule returns the nodes that compute the same as a node of its kind, or None."""
        nodes: list[Any] = []
        for node in self.graph.node:
            rule = rules.get(node.op_type)
            nodes += (rule(self, node) if rule else None) or [node]
        used = {output.name for output in self.graph.output}
        kept = []
        for node in reversed(nodes):  # what led to the replaced ones alone is left out
            inner = [name for attribute in node.attribute for name in _names(attribute.g)]
            if used.intersection(node.output):
                kept.append(node)
                used.update(node.input, inner)
        tensors = [tensor for tensor in self.graph.initializer if tensor.name in used]
        for field, left in ((self.graph.node, kept[::-1]), (self.graph.initializer, tensors)):
            del field[:]
            field.extend(left)

    # --- reading ---------------------------------------------------------------------------------

    def of(self, name: str, kind: str) -> Any:
        """Returns the node that makes a value, if it is of this kind."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def pair(self, name: str, kind: str, inner: str) -> tuple[Any, str] | None:
        """Of a sum or product, returns the operand that a node of the kind ``inner`` makes, and the other one."""
        node = self.of(name, kind)
        for one, other in (node.input, node.input[::-1]) if node is not None else ():
            if (found := self.of(one, inner)) is not None:
                return found, other
        return None

    def scaled(self, name: str, kind: str, constant: float) -> str | None:
        """Returns x where a value is x times, or plus, this constant."""
        node = self.of(name, kind)
        for one, other in (node.input, node.input[::-1]) if node is not None else ():
            if self.is_number(one, constant):
                return other
        return None

    def is_number(self, name: str, constant: float) -> bool:
        array = self.arrays.get(name)
        return array is not None and array.size == 1 and np.isclose(array.item(), constant, rtol=1e-6)

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        found = [a for a in node.attribute if a.name == name]
        return self.onnx.helper.get_attribute_value(found[0]) if found else default

    def unshaped(self, name: str, *others: str) -> str:
        """Follows a value back through operations that only reshape or repeat it, and through ``others``."""
        while (node := self.makers.get(name)) is not None and node.op_type in {*SHAPING, *others}:
            moved = [each for each in node.input if each not in self.arrays]
            if not moved:
                break
            name = moved[0]
        return name

    def axis(self, node: Any) -> int | None:
        """Returns the axis over which a node sums, if it is one."""
        axes = self.arrays.get(node.input[1]) if len(node.input) == 2 else None
        return int(axes.item()) if axes is not None and axes.size == 1 else None

    def size(self, shape: str, axis: int) -> int | None:
        """Returns the size of an axis in a shape, if it is known."""
        if shape in self.arrays:
            return int(self.arrays[shape][axis])
        node = self.of(shape, "Concat")
        size = self.arrays.get(node.input[axis]) if node is not None and axis < len(node.input) else None
        return None if size is None else int(size.item())

    # --- rules -----------------------------------------------------------------------------------

    def product(self, node: Any) -> list[Any] | None:
        """Replaces an Einsum by a MatMul, which ONNX Runtime computes faster.

        The Einsum multiplies a value by a constant kernel, as the projections of attention do with ``btd,dhk->bthk``.
        It must sum over the last axes of the value and the first axes of the kernel. Where it sums over several axes, a
        Reshape before the MatMul joins them into one; where the kernel has several other axes, a Reshape after the
        MatMul separates them again.
        """
        if len(node.input) != 2 or node.input[1] not in self.arrays:
            return None
        left, right, result = self.equation(node)
        shared = sum(letter in left for letter in right)
        rest = len(left) - shared
        if not 0 < shared < len(right) or (left[rest:], left[:rest] + right[shared:]) != (
            right[:shared],
            result,
        ):
            return None
        kernel, (value, output) = self.arrays[node.input[1]], (node.input[0], node.output[0])
        sizes = kernel.shape[shared:]
        written = []
        if shared > 1:
            # 0 keeps the size of an axis
            shape = self.constant(f"{output}.before", np.array([*[0] * rest, -1]))
            written.append(self.write("Reshape", [value, shape], [value := f"{output}.inputs"]))
        matrix = self.constant(f"{output}.kernel", kernel.reshape(-1, np.prod(sizes)))
        written.append(
            self.write("MatMul", [value, matrix], [output if len(sizes) == 1 else f"{output}.product"])
        )
        if len(sizes) > 1:
            shape = self.constant(f"{output}.after", np.array([*[0] * rest, *sizes]))
            written.append(self.write("Reshape", [f"{output}.product", shape], [output]))
        return written

    def constant(self, name: str, array: np.ndarray) -> str:
        self.graph.initializer.append(self.onnx.numpy_helper.from_array(array, name))
        self.arrays[name] = array
        return name

    def softmax(self, node: Any) -> list[Any] | None:
        """Replaces exp(x − m) / Σ exp(x − m) by a Softmax, where m is the maximum of x over the axis of the sum."""
        numerator, denominator = node.input
        exp, total = self.of(numerator, "Exp"), self.of(self.unshaped(denominator), "ReduceSum")
        if exp is None or total is None or total.input[0] != numerator:
            return None
        difference, axis = self.of(exp.input[0], "Sub"), self.axis(total)
        if difference is None or axis is None:
            return None
        x, shift = difference.input
        most = self.of(self.unshaped(shift, "Max", "Transpose"), "ReduceMax")
        # Both the sum and the maximum must be one number along the axis, and the maximum that of x
        if (
            most is None
            or self.unshaped(most.input[0], "Transpose") != self.unshaped(x, "Transpose")
            or axis != self.axis(most)
        ):
            return None
        if not all(self.is_one(name, axis) for name in (denominator, shift)):
            return None
        return [self.write("Softmax", [x], list(node.output), axis=axis)]

    def is_one(self, name: str, axis: int) -> bool:
        """Says whether a value is reshaped so that an axis has the size 1, and then perhaps repeated."""
        while (node := self.makers.get(name)) is not None and node.op_type in ("Expand", "Identity"):
            name = node.input[0]
        return node is not None and node.op_type == "Reshape" and self.size(node.input[1], axis) == 1

    def layer_norm(self, node: Any) -> list[Any] | None:
        """Replaces a LayerNorm over the last axis by one operation.

        It is (x − mean) · (scale / √(var + ε)) + shift with var = max(0, mean of x² − mean²).
        """
        if not (added := self.pair(node.output[0], "Add", "Mul")):
            return None
        product, shift = added
        if not (found := self.pair(product.output[0], "Mul", "Sub")):
            return None
        difference, factor = found
        if not (found := self.pair(factor, "Mul", "Div")):
            return None
        inverse, scale = found
        x, mean = difference.input[0], self.unshaped(difference.input[1])
        root = self.of(inverse.input[1], "Sqrt")
        inside = self.of(root.input[0], "Add") if root is not None else None
        constants = [self.arrays[name] for name in (scale, shift) if name in self.arrays]
        if inside is None or not self.is_number(inverse.input[0], 1.0) or len(constants) < 2:
            return None
        epsilon = next((name for name in inside.input if name in self.arrays), None)
        if epsilon is None or self.arrays[epsilon].size != 1:
            return None
        (variance,) = (name for name in inside.input if name != epsilon)
        parts = self.of(self.scaled(self.unshaped(variance), "Max", 0.0) or "", "Sub")
        square = self.of(parts.input[1], "Mul") if parts is not None else None
        if square is None or list(square.input) != [mean, mean]:
            return None
        size, last = constants[0].size, constants[0].ndim - 1
        if not all(c.shape == (*[1] * last, size) for c in constants):
            return None
        for used, name, kind in (
            (difference.input[1], mean, "ReduceSum"),
            (variance, parts.input[0], "ReduceSumSquare"),
        ):
            divided = self.of(name, "Div")
            total = self.of(self.unshaped(divided.input[0]), kind) if divided is not None else None
            if total is None or total.input[0] != x or self.axis(total) != last:
                return None
            wide = divided.input[0] if self.unshaped(used) == used else used
            if not (self.is_one(wide, last) and self.is_number(divided.input[1], size)):
                return None
        given = [
            self.constant(f"{node.output[0]}.{name}", c.reshape(-1))
            for name, c in zip(("scale", "shift"), constants, strict=True)
        ]
        options = {"axis": -1, "epsilon": float(self.arrays[epsilon].item())}
        return [self.write("LayerNormalization", [x, *given], list(node.output), **options)]

    def attention(self, node: Any) -> list[Any] | None:
        """Replaces softmax(scale · Q·Kᵀ)·V by an Attention, at the transpose that brings its heads together.

        Each axis has a letter. The outputs are batch, place, head, perhaps a group, unit: with groups, several heads
        of the queries share one of the keys (grouped-query attention).
        """
        order, mixed = self.untransposed(node.output[0], "Einsum")
        if order is None or mixed is None or len(order) not in (4, 5):
            return None
        *sides, axes = self.equation(mixed)
        batch, place, head, *group, unit = (axes[i] for i in order)
        for (weights, w_axes), (values, v_axes) in _both(zip(mixed.input, sides, strict=True)):
            if (softmax := self.of(weights, "Softmax")) is None:
                continue
            key = w_axes[self.attribute(softmax, "axis", -1)]
            scores, w_axes, scale = self.unscaled(softmax.input[0], w_axes)
            if scores is None or v_axes != f"{batch}{key}{head}{unit}":
                continue
            *sides, summed = self.equation(scores)
            letters = dict(zip(summed, w_axes, strict=True))
            for (queries, q_axes), (keys, k_axes) in _both(zip(scores.input, sides, strict=True)):
                q, k = ("".join(letters.get(a, "*") for a in side) for side in (q_axes, k_axes))
                sizes = [self.shapes.get(x, [])[2:] for x in (queries, keys, values)]
                known = all(each and all(isinstance(n, int) and n > 0 for n in each) for each in sizes)
                if known and (q, k) == (f"{batch}{place}{head}{''.join(group)}*", f"{batch}{key}{head}*"):
                    return self.attend(node, [queries, keys, values], sizes, scale)
        return None

    def unscaled(self, name: str, axes: str) -> tuple[Any, str, float]:
        """Follows a value back through transposes and constant factors to an Einsum: it, its axes, and the factor."""
        scale = 1.0
        while (node := self.of(name, "Mul") or self.of(name, "Transpose")) is not None:
            numbers = [x for x in node.input if x in self.arrays and self.arrays[x].size == 1]
            if node.op_type == "Transpose":
                perm = list(self.attribute(node, "perm"))
                axes = "".join(axes[perm.index(i)] for i in range(len(perm)))
            elif len(numbers) == 1:
                scale *= float(self.arrays[numbers[0]].item())
            else:
                break
            (name,) = (x for x in node.input if x not in numbers)
        return self.of(name, "Einsum"), axes, scale

    def attend(self, node: Any, given: list[str], sizes: list[Any], scale: float) -> list[Any]:
        """Writes an Attention of queries, keys and values ``[batch, place, *sizes]``, with their heads joined."""
        output = node.output[0]
        joined = self.constant(f"{output}.joined", np.array([0, 0, -1]))
        after = self.constant(f"{output}.after", np.array([0, 0, *sizes[0][:-1], sizes[2][-1]]))
        names = [f"{output}.{name}" for name in ("query", "key", "value")]
        heads = {"q_num_heads": int(np.prod(sizes[0][:-1])), "kv_num_heads": sizes[1][0]}
        return [
            *(self.write("Reshape", [x, joined], [name]) for x, name in zip(given, names, strict=True)),
            self.write("Attention", names, [f"{output}.heads"], scale=scale, **heads),
            self.write("Reshape", [f"{output}.heads", after], [output]),
        ]

    def bias(self, node: Any) -> list[Any] | None:
        """Adds a bias to a product before it is reshaped, and as a vector, which ONNX Runtime puts into the product."""
        constant = next((name for name in node.input if name in self.arrays), None)
        value = next((name for name in node.input if name not in self.arrays), None)
        if constant is None or value is None:
            return None
        shaped, bias = self.of(value, "Reshape"), self.arrays[constant]
        product = self.of(shaped.input[0] if shaped is not None else value, "MatMul")
        if product is None or product.input[1] not in self.arrays:
            return None
        shape = self.shapes.get(value, [])
        sizes = shape[len(self.shapes.get(product.output[0], ())) - 1 :]
        if (
            not sizes
            or bias.ndim > len(shape)
            or bias.size != self.arrays[product.input[1]].shape[-1]
            or bias.shape[-len(sizes) :] != (*sizes,)
        ):
            return None
        name = self.constant(f"{node.output[0]}.bias", bias.reshape(-1))
        if shaped is None:
            return [self.write("Add", [value, name], list(node.output))]
        added = self.write("Add", [product.output[0], name], [f"{node.output[0]}.plain"])
        return [added, self.write("Reshape", [f"{node.output[0]}.plain", shaped.input[1]], list(node.output))]

    def same_shape(self, node: Any) -> list[Any] | None:
        """Leaves out a Reshape to a shape that the value had before another one."""
        wanted, name = self.shapes.get(node.output[0]), node.output[0]
        while wanted and all(wanted) and (before := self.of(name, "Reshape")) is not None:
            name = before.input[0]
            if self.shapes.get(name) == wanted:
                return [self.write("Identity", [name], list(node.output))]
        return None

    def untransposed(self, name: str, kind: str) -> tuple[list[int] | None, Any]:
        """Follows a value back through transposes to a node of a kind: the order of the node's axes, and the node."""
        order: list[int] | None = None
        while (node := self.of(name, "Transpose")) is not None:
            perm = list(self.attribute(node, "perm"))
            order = perm if order is None else [perm[i] for i in order]
            name = node.input[0]
        return order, self.of(name, kind)

    def equation(self, node: Any) -> list[str]:
        """Returns the letters of the axes of an Einsum's operands, and of its result."""
        return self.attribute(node, "equation").decode().replace(" ", "").replace("->", ",").split(",")

    def gelu(self, node: Any) -> list[Any] | None:
        """Replaces x · (0.5 · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))) by a Gelu, whose form with tanh this is."""
        for x, factor in (node.input, node.input[::-1]):
            curve = self.of(self.scaled(self.scaled(factor, "Mul", 0.5) or "", "Add", 1.0) or "", "Tanh")
            if curve is None:
                continue
            inside = self.scaled(curve.input[0], "Mul", np.sqrt(2 / np.pi))
            if not (found := self.pair(inside or "", "Add", "Mul")):
                continue
            power = self.of(self.scaled(found[0].output[0], "Mul", 0.044715) or "", "Pow")
            if (
                power is not None
                and [found[1], power.input[0]] == [x, x]
                and self.is_number(power.input[1], 3)
            ):
                return [self.write("Gelu", [x], list(node.output), approximate="tanh")]
        return None


def _both(pairs: Iterable[Any]) -> tuple[Any, ...]:
    """Returns two things in both orders, or nothing if there are not two."""
    both = tuple(pairs)
    return (both, both[::-1]) if len(both) == 2 else ()


def _names(graph: Any) -> Iterator[str]:
    """Lists the values that the graph of a branch or a loop uses."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            yield from _names(attribute.g)
    yield from (output.name for output in graph.output)

"""Writes the kernels of an ONNX graph as integers, so that ONNX Runtime computes its products in int8.

What a kernel multiplies is rounded to uint8 (by default ONNX Runtime has int8 for ARM alone). The kernel's int8 become
uint8 too, 128 higher: on x86 processors without VNNI, ONNX Runtime adds pairs of products of uint8 and int8 in 16 bits,
which do not hold them. Integers of 4 bits stay signed, since their sums fit. The rounding moves up the graph over
everything that only moves or compares numbers, such as pooling and ReLU, to the product before. ONNX Runtime makes one
operation of a product between DequantizeLinear and QuantizeLinear. A convolution whose outputs are not rounded would
stay one of floats, and so becomes a ConvInteger.
"""

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from distill_jax.export._kernels import Kernel, Match, grid_of, matches
from distill_jax.export._sealed import package

ModelProto = Any  # onnx.ModelProto; onnx is imported only where it is used
Grid = tuple[float, int]  # the scale and the uint8 code of 0

# Operations that only move or compare numbers. Rounding before such an operation gives the same codes as rounding after
# it. What they move is their first input (MOVES), or all of their inputs (JOINS).
MOVES = {
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
}  # fmt: skip
JOINS = {"Concat"}
MOST = 2**30  # of a bias in the units of the sums, beside which the sum of the products still fits int32


def with_integers(message: ModelProto, kernels: Mapping[str, Kernel]) -> ModelProto:
    """Stores kernels of an ONNX graph as integers, and rounds what they multiply as the quantised model does.

    Where only weights are integers, they are turned into floats by operations on constants, which ONNX Runtime computes
    once, when it loads the file.

    Args:
      message: an ``onnx.ModelProto`` of opset 21 or later that computes with floats what the integers mean; it is not
        changed.
      kernels: path → kernel. None has scales for groups of inputs.

    Returns:
      The new message, without metadata.

    Raises:
      ValueError: if a kernel is not found in the graph, or cannot be told from another one with another input scale.
    """
    onnx = package("onnx")
    message = _tidied(onnx, message)
    nodes, outputs = list(message.graph.node), list(message.graph.output)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in message.graph.initializer}
    nodes = _with_bias(nodes, arrays, _uses(nodes, outputs))
    written = _Writer(onnx, nodes, arrays, kernels, _uses(nodes, outputs)).write(message.graph.input)
    return _message(onnx, message, *written)


def _tidied(onnx: Any, message: ModelProto) -> ModelProto:
    """Lets ONNX Runtime compute what is constant, and put scales, shifts and transposes next to products into them."""
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as directory:
        options.optimized_model_filepath = str(Path(directory) / "tidied.onnx")
        runtime.InferenceSession(message.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath)


def _uses(nodes: list[Any], outputs: list[Any]) -> Counter[str]:
    """Counts how often each value is used, also inside of branches and loops."""

    def names(node: Any) -> Iterator[str]:
        yield from node.input
        for attribute in node.attribute:
            for inner in attribute.g.node:
                yield from names(inner)
            yield from (output.name for output in attribute.g.output)

    return Counter([*(name for node in nodes for name in names(node)), *(output.name for output in outputs)])


def _with_bias(nodes: list[Any], arrays: Mapping[str, np.ndarray], uses: Counter[str]) -> list[Any]:
    """Makes a constant that is added after a Gemm the bias of the Gemm."""
    kept: list[Any] = []
    products: dict[str, Any] = {}
    for node in nodes:
        if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] in arrays:
            beta = next((attribute for attribute in node.attribute if attribute.name == "beta"), None)
            if (beta is not None and beta.f == 0) or not arrays[node.input[2]].any():
                del node.input[2]
                if beta is not None:
                    node.attribute.remove(beta)
        if node.op_type == "Gemm" and len(node.input) == 2 and uses[node.output[0]] == 1:
            products[node.output[0]] = node
        place = next((i for i, name in enumerate(node.input) if name in products), None)
        if node.op_type == "Add" and place is not None:
            product, bias = products[node.input[place]], arrays.get(node.input[1 - place])
            kernel = arrays.get(product.input[1])
            turned = any(attribute.name == "transB" and attribute.i for attribute in product.attribute)
            sizes = None if kernel is None else kernel.shape[1 - turned :][:1]
            if bias is not None and bias.ndim in (1, 2) and sizes == bias.shape[-1:] == (bias.size,):
                del products[node.input[place]]
                product.input.append(node.input[1 - place])
                product.output[0] = node.output[0]
                continue
        kept.append(node)
    return kept


class _Writer:
    """Writes the nodes of a graph with integers."""

    def __init__(
        self,
        onnx: Any,
        nodes: list[Any],
        arrays: dict[str, np.ndarray],
        kernels: Mapping[str, Kernel],
        uses: Counter[str],
    ):
        self.onnx, self.nodes, self.arrays, self.kernels, self.uses = onnx, nodes, arrays, kernels, uses
        self.matches = matches(nodes, arrays, kernels)
        self.new: list[Any] = []  # the nodes written so far
        self.made = set[str]()  # their outputs
        self.tensors: dict[str, Any] = {}  # the constants that are new
        self.grids: dict[Grid, int] = {}  # and the number of each grid among them
        self.codes: dict[tuple[str, Grid], str] = {}  # (value, grid) → the value's codes
        # value → grid → by how many of its users it is wanted in codes
        self.wanted: defaultdict[str, Counter[Grid]] = defaultdict(Counter)
        for number, match in self.matches.items():
            if grid := grid_of(kernels[match.path]):
                self.wanted[nodes[number].input[1 - match.place]][grid] += 1
        self.moved: dict[int, Grid] = {}
        for number, node in reversed(list(enumerate(nodes))):
            grid = self.rounded(node.output[0])
            if grid and (inputs := self.moving(node, grid)):
                self.moved[number] = grid
                for name in inputs:
                    self.wanted[name][grid] += 1

    def rounded(self, name: str) -> Grid | None:
        """Returns the grid to which a value is rounded for all of its users, or None."""
        grids = self.wanted.get(name, Counter())
        return next(iter(grids)) if len(grids) == 1 and grids.total() == self.uses[name] else None

    def moving(self, node: Any, grid: Grid) -> list[str]:
        """Lists the inputs of a node that may be rounded instead of its output, with equal codes; none else."""
        if len(node.output) > 1:
            return []
        if node.op_type in JOINS:
            return list(node.input)
        if node.op_type in MOVES:
            return [node.input[0]]
        return (
            [name for name in node.input if name and name not in self.arrays]
            if self.is_idle(node, grid)
            else []
        )

    def is_idle(self, node: Any, grid: Grid) -> bool:
        """Says whether a node only limits a value, and no more than the codes do, which end at 0 and 255."""
        low, high = -np.inf, np.inf
        if node.op_type == "Relu":
            low = 0.0
        elif node.op_type in ("Clip", "Max", "Min"):
            limits = [self.arrays.get(name) if name else None for name in node.input]
            known = [limit for limit in limits if limit is not None]
            missing = [name for name, limit in zip(node.input, limits, strict=True) if name and limit is None]
            if len(missing) != 1 or any(limit.size != 1 for limit in known):
                return False
            if node.op_type == "Clip":
                low, high = (
                    outer if limit is None else limit.item()
                    for limit, outer in zip([*limits[1:], None, None], (low, high), strict=False)
                )
            elif node.op_type == "Max":
                low = max(limit.item() for limit in known)
            else:
                high = min(limit.item() for limit in known)
        else:
            return False
        scale, zero = grid
        return np.rint(low / scale) + zero <= 0 and np.rint(high / scale) + zero >= 255

    # --- writing ---------------------------------------------------------------------------------

    def write(self, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
        """Writes all nodes; returns them and the constants that are new."""
        for name in [*(value.name for value in inputs), *self.arrays]:
            self.round(name)
        for number, node in enumerate(self.nodes):
            if number in self.moved:
                self.move(node, self.moved[number])
                continue
            match, outputs = self.matches.get(number), list(node.output)
            if match is None:
                self.new.append(node)
            elif grid := grid_of(self.kernels[match.path]):
                self.multiply(node, match, grid)
            else:
                node.input[match.place] = self.meant(node, match)
                self.new.append(node)
            for name in outputs:
                self.round(name)
        return self.new, self.tensors

    def add(self, kind: str, inputs: list[str], output: str, **options: Any) -> str:
        """Writes a node, once."""
        if output not in self.made:
            self.new.append(self.onnx.helper.make_node(kind, inputs, [output], name=output, **options))
            self.made.add(output)
        return output

    def constant(self, name: str, array: ArrayLike, dtype: DTypeLike) -> str:
        """Writes a constant, once."""
        if name not in self.tensors:
            self.tensors[name] = self.onnx.numpy_helper.from_array(np.asarray(array, dtype), name)
        return name

    def grid(self, grid: Grid) -> list[str]:
        """Writes the scale and the code of 0 of a grid."""
        name = f"grid{self.grids.setdefault(grid, len(self.grids))}"
        return [
            self.constant(f"{name}.scale", grid[0], np.float32),
            self.constant(f"{name}.zero", grid[1], np.uint8),
        ]

    def round(self, name: str) -> None:
        """Writes the codes of a value, for each grid in which somebody wants them."""
        for place, grid in enumerate(self.wanted.get(name, ())):
            output = f"{name}.codes{place or ''}"
            self.codes[name, grid] = self.add("QuantizeLinear", [name, *self.grid(grid)], output)

    def move(self, node: Any, grid: Grid) -> None:
        """Writes an operation that moves numbers as one that moves codes, or none where it has nothing to do."""
        if node.op_type not in MOVES | JOINS:
            (source,) = (name for name in node.input if (name, grid) in self.codes)
            self.codes[node.output[0], grid] = self.codes[source, grid]
            return
        count = len(node.input) if node.op_type in JOINS else 1
        for place in range(count):
            node.input[place] = self.codes[node.input[place], grid]
        self.codes[node.output[0], grid] = f"{node.output[0]}.codes"
        node.output[0] = f"{node.output[0]}.codes"
        self.new.append(node)

    def name(self, node: Any, match: Match) -> str:
        """Names what belongs to a kernel."""
        return f"{node.input[match.place]}.{match.axis}"

    def cast(self, node: Any, match: Match, kind: str) -> str:
        """Writes the integers of a kernel in another type, from the signed ones that are stored."""
        name, bits = self.name(node, match), self.kernels[match.path].bits
        stored = self.constant(f"{name}.integers", match.codes, jnp.int4 if bits == 4 else np.int8)
        return self.add("Cast", [stored], f"{name}.{kind}", to=getattr(self.onnx.TensorProto, kind))

    def factors(self, node: Any, match: Match) -> tuple[str, int, type[np.integer]]:
        """Writes the integers of a kernel as factors of products; returns their name, the code of 0, and the dtype."""
        if self.kernels[match.path].bits == 4:
            return self.cast(node, match, "INT8"), 0, np.int8
        codes = match.codes.astype(np.int16) + 128
        return self.constant(f"{self.name(node, match)}.integers", codes, np.uint8), 128, np.uint8

    def meant(self, node: Any, match: Match) -> str:
        """Writes what the integers of a kernel mean."""
        name, floats = self.name(node, match), self.cast(node, match, "FLOAT")
        shape = [-1 if axis == match.axis else 1 for axis in range(match.codes.ndim)]
        scale = self.constant(f"{name}.scale", match.scale.reshape(shape), np.float32)
        return self.add("Mul", [floats, scale], f"{name}.meant")

    def multiply(self, node: Any, match: Match, grid: Grid) -> None:
        """Writes a product of integers, and its constant bias as integers too, in the units of its sums."""
        unit, result = np.float64(grid[0]) * match.scale, node.output[0]
        bias = self.arrays.get(node.input[2]) if len(node.input) > 2 and match.place == 1 else None
        sums = None if bias is None else np.rint(np.broadcast_to(bias.reshape(-1), unit.shape) / unit)
        fits = sums is None or np.abs(sums).max() < MOST
        is_sum = node.op_type == "Conv" and not (fits and self.rounded(result))
        if bias is not None and (is_sum or not fits):
            del node.input[2]
            node.output[0] = f"{result}.plain"
        codes = self.codes[node.input[1 - match.place], grid]
        name = self.name(node, match)
        kernel, origin, dtype = self.factors(node, match)
        along = (-1, *[1] * (match.codes.ndim - 2)) if node.op_type == "Conv" else (-1,)
        if is_sum:
            options = {each.name: self.onnx.helper.get_attribute_value(each) for each in node.attribute}
            zero = self.constant(f"zero.{dtype.__name__}", origin, dtype)
            given = [codes, kernel, self.grid(grid)[1], zero]
            total = self.add("ConvInteger", given, f"{result}.sums", **options)
            total = self.add("Cast", [total], f"{result}.floats", to=self.onnx.TensorProto.FLOAT)
            scale = self.constant(f"{result}.unit", unit.reshape(along), np.float32)
            self.add("Mul", [total, scale], node.output[0])
        else:
            # ONNX Runtime makes no integer product where the zero points are left out
            scale = self.constant(f"{name}.scale", match.scale, np.float32)
            zero = self.constant(f"{name}.zero", np.full(unit.size, origin), dtype)
            meant = self.add("DequantizeLinear", [kernel, scale, zero], f"{name}.meant", axis=match.axis)
            node.input[match.place] = meant
            meant = self.add("DequantizeLinear", [codes, *self.grid(grid)], f"{codes}.meant")
            node.input[1 - match.place] = meant
            if sums is not None and fits:
                scale = self.constant(f"{result}.unit", unit, np.float32)
                zero = self.constant(f"{result}.zero", np.zeros(unit.size), np.int32)
                given = [self.constant(f"{result}.bias", sums, np.int32), scale, zero]
                node.input[2] = self.add("DequantizeLinear", given, f"{result}.bias.meant", axis=0)
            self.new.append(node)
        if node.output[0] != result:
            assert bias is not None
            whole = np.broadcast_to(bias.reshape(-1), unit.shape)
            shift = self.constant(f"{result}.bias", whole.reshape(along), np.float32)
            self.add("Add", [node.output[0], shift], result)


def _message(onnx: Any, old: ModelProto, nodes: list[Any], tensors: Mapping[str, Any]) -> ModelProto:
    """Makes a message of nodes and the constants that they use, in the order of their use."""
    known = {tensor.name: tensor for tensor in old.graph.initializer} | dict(tensors)
    used = dict.fromkeys(name for name in _uses(nodes, list(old.graph.output)) if name in known)
    graph = onnx.helper.make_graph(
        nodes, old.graph.name, old.graph.input, old.graph.output, [known[name] for name in used]
    )
    domains = {node.domain for node in nodes}
    opsets = [each for each in old.opset_import if each.domain in domains | {""}]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=old.ir_version)

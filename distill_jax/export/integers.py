"""Puts integers into an ONNX graph of floats: QuantizeLinear and DequantizeLinear around its products (QDQ)."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from distill_jax._checks import check_mapping
from distill_jax.export._sealed import package

ModelProto = Any  # onnx.ModelProto; onnx is imported only where it is used
EXACT = 1e-5  # how far a kernel of the graph may be from its integers, as a share of its largest weight


def with_integers(message: ModelProto, layers: Mapping[str, Any]) -> ModelProto:
    """Stores the kernels of an ONNX graph as integers, and rounds what they multiply as a quantised model does.

    The graph computes with floats what the integers mean. A kernel is recognised by its values, whatever its name:
    they are the integers times one number per output, in any order of axes, so that a normalisation may have been
    folded into it. It becomes a DequantizeLinear of integers; where the layer has an input scale, a QuantizeLinear and
    a DequantizeLinear come before the other operand. From this pattern ONNX Runtime makes operations on int8.

    Args:
      message: an ``onnx.ModelProto`` of opset 21 or later, which is not changed.
      layers: path → kernel with ``codes``, ``scale``, ``bits``, ``input_scale`` and ``input_zero``, as
        :func:`distill_jax.compress.quantisation.layers` lists them.

    Returns:
      The new message.

    Raises:
      ModuleNotFoundError: if onnx is not installed.
      ValueError: if a kernel has scales for groups of inputs, is not found in the graph, or cannot be told from another
        one with another input scale.
    """
    onnx = package("onnx")
    check_mapping("layers", layers, "path → kernel, from quantisation.layers")
    message = onnx.ModelProto.FromString(message.SerializeToString())
    facts = [entry for entry in message.metadata_props if entry.key != "sha256"]  # the digest of other bytes
    facts = [onnx.StringStringEntryProto.FromString(entry.SerializeToString()) for entry in facts]
    del message.metadata_props[:]
    message.metadata_props.extend(facts)
    graph = message.graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kernels = {path: np.asarray(layer.codes, np.float64) for path, layer in layers.items()}
    for path, layer in layers.items():
        if any(1 < n < size for n, size in zip(layer.scale.shape, kernels[path].shape, strict=True)):
            raise ValueError(f"layers: {path} has scales for groups of inputs: quantise without group")
    missing, made = set(layers), set[str]()
    nodes: list[Any] = []

    def add(kind: str, inputs: list[str], output: str, **options: Any) -> None:
        if output not in made:
            nodes.append(onnx.helper.make_node(kind, inputs, [output], name=output, **options))
            made.add(output)

    def constant(name: str, array: np.ndarray, bits: int = 0) -> str:
        if name not in arrays:
            arrays[name] = array
            tensor = onnx.numpy_helper.from_array(array, name)
            if bits == 4:
                tensor = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, array.shape, array.ravel())
            graph.initializer.append(tensor)
        return name

    for node in graph.node:
        place, axis = _kernel_of(node, arrays)
        fitting = [] if place is None else [*_find(arrays[node.input[place]], axis, kernels)]
        if place is not None and fitting:
            ranges = {_range(layers[path]) for path, *_ in fitting}
            if len(ranges) > 1:
                raise ValueError(
                    f"layers: {', '.join(path for path, *_ in fitting)} hold the same integers up to a factor per "
                    "output, so it is not known which is which in the graph: exclude them from quantisation"
                )
            path, codes, scale = fitting[0]
            layer, name = layers[path], node.input[place]
            missing -= {each for each, *_ in fitting}
            integers = constant(f"{name}.codes", codes.astype(np.int8), layer.bits)
            scales = constant(f"{name}.scale", scale.astype(np.float32))
            zeros = constant(f"{name}.zero", np.zeros(len(scale), np.int8), layer.bits)
            add("DequantizeLinear", [integers, scales, zeros], f"{name}.meant", axis=axis)
            node.input[place] = f"{name}.meant"
            if layer.input_scale is not None:
                other = node.input[1 - place]
                zero = np.asarray(layer.input_zero) + 128  # by default ONNX Runtime has int8 for ARM alone
                grid = [
                    constant(f"{path}.input_scale", np.asarray(layer.input_scale, np.float32)),
                    constant(f"{path}.input_zero", zero.astype(np.uint8)),
                ]
                add("QuantizeLinear", [other, *grid], f"{other}.{path}.codes")
                add("DequantizeLinear", [f"{other}.{path}.codes", *grid], f"{other}.{path}.meant")
                node.input[1 - place] = f"{other}.{path}.meant"
                if len(node.input) > 2 and node.input[2] in arrays and place == 1:
                    # A bias in the units of the sums, as integer products need it
                    unit = np.float64(layer.input_scale) * scale
                    name = node.input[2]
                    sums = np.rint(np.broadcast_to(arrays[name], scale.shape) / unit).clip(
                        -(2**31), 2**31 - 1
                    )
                    bias = [
                        constant(f"{name}.codes", sums.astype(np.int32)),
                        constant(f"{name}.scale", unit.astype(np.float32)),
                        constant(f"{name}.zero", np.zeros(len(unit), np.int32)),
                    ]
                    add("DequantizeLinear", bias, f"{name}.meant", axis=0)
                    node.input[2] = f"{name}.meant"
        nodes.append(node)
    if missing:
        raise ValueError(
            f"layers: {', '.join(sorted(missing))} not found among the kernels of the graph: export "
            "quantisation.dequantise of the same model"
        )
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return message


def _kernel_of(node: Any, arrays: Mapping[str, np.ndarray]) -> tuple[int | None, int]:
    """Returns the place of the constant operand of a product, and its axis of outputs; (None, 0) if it has none."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None, 0
    options = {attribute.name: attribute for attribute in node.attribute}
    constants = [place for place in (0, 1) if node.input[place] in arrays]
    if len(constants) != 1 or arrays[node.input[constants[0]]].ndim < 2:
        return None, 0
    place = constants[0]
    rank = arrays[node.input[place]].ndim
    if node.op_type == "Conv":
        return (1, 0) if place == 1 else (None, 0)
    if node.op_type == "Gemm":
        turned = options[("transA", "transB")[place]].i if ("transA", "transB")[place] in options else 0
        plain = "alpha" not in options or options["alpha"].f == 1
        return (place, (place + turned) % 2) if plain else (None, 0)
    return place, rank - 1 if place else rank - 2


def _range(layer: Any) -> tuple[float, float] | None:
    return None if layer.input_scale is None else (float(layer.input_scale), float(layer.input_zero))


def _find(
    array: np.ndarray, axis: int, kernels: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Finds all integers of which an array is a multiple, one per output: (path, integers, multiples)."""
    wanted = array.astype(np.float64)
    others = tuple(i for i in range(array.ndim) if i != axis)
    shape = [-1 if i == axis else 1 for i in range(array.ndim)]
    limit = EXACT * np.abs(wanted).max(initial=0)
    for path, kernel in kernels.items():
        if kernel.size != array.size:
            continue
        for codes in _layouts(kernel, array.shape):
            energy = np.sum(codes**2, others)
            scale = np.sum(wanted * codes, others) / np.maximum(energy, 1)
            if np.abs(wanted - codes * scale.reshape(shape)).max(initial=0) <= limit:
                signs = np.where(scale < 0, -1.0, 1.0)
                yield path, codes * signs.reshape(shape), np.where(scale == 0, 1, np.abs(scale))
                break


def _layouts(kernel: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields the kernel in all orders of its axes that have this shape, or can be reshaped to it."""
    for order in itertools.permutations(range(kernel.ndim)):
        turned = kernel.transpose(order)
        if turned.shape == shape or len(shape) != kernel.ndim:
            yield turned.reshape(shape)

"""Integers in ONNX graphs: kernels are recognised whatever their layout, and ONNX Runtime computes what JAX does."""

import jax
import numpy as np
import pytest

from distill_jax import models
from distill_jax.compress import quantisation
from distill_jax.export import with_integers

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("f4")


PARAMS = {"conv": normal(3, 3, 2, 4), "a": normal(100, 6), "b": normal(6, 3), "bias": normal(6)}
FACTOR = np.array([0.5, -2.0, 1.0, 3.0], "f4")  # a normalisation, as a converter folds it into the kernel


def network(p, x):
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, p["conv"], **CONV) * FACTOR)
    return jax.nn.relu(x.reshape(len(x), -1) @ p["a"] + p["bias"]) @ p["b"]


def graph(params):
    """The network as a converter writes it: kernels in other layouts, the factor folded in."""
    kernel = (params["conv"] * FACTOR).transpose(3, 2, 0, 1)
    constants = {
        "k": kernel, "a": params["a"].T, "bias": params["bias"], "b": params["b"], "shape": np.array([-1, 100]),
    }  # fmt: skip
    make = onnx.helper.make_node
    nodes = [
        make("Transpose", ["x"], ["x1"], perm=[0, 3, 1, 2]), make("Conv", ["x1", "k"], ["x2"], pads=[1, 1, 1, 1]),
        make("Relu", ["x2"], ["x3"]), make("Transpose", ["x3"], ["x4"], perm=[0, 2, 3, 1]),
        make("Reshape", ["x4", "shape"], ["x5"]), make("Gemm", ["x5", "a", "bias"], ["x6"], transB=1),
        make("Relu", ["x6"], ["x7"]), make("MatMul", ["x7", "b"], ["y"]),
    ]  # fmt: skip
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    made = onnx.helper.make_graph(
        nodes, "network", [value("x", kind, ["n", 5, 5, 2])], [value("y", kind, ["n", 3])],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def run(message, x):
    onnx.checker.check_model(message)
    session = runtime.InferenceSession(message.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


MODEL, X = models.from_function(network, PARAMS), normal(200, 5, 5, 2)


@pytest.mark.parametrize("options", [{"activations": True}, {"bits": 8}, {"bits": 4}], ids=str)
def test_onnx_runtime_computes_what_the_quantised_model_does(options):
    small = quantisation.quantise(MODEL, [X], **options)
    floats = graph(jax.tree.map(np.asarray, quantisation.dequantise(small).params))
    before = floats.SerializeToString()
    message = with_integers(floats, quantisation.layers(small))
    assert floats.SerializeToString() == before
    expected = np.asarray(jax.jit(lambda m, x: m(x))(small, X))
    np.testing.assert_allclose(run(message, X), expected, atol=0.01 * np.abs(expected).max())
    stored = {tensor.name: tensor for tensor in message.graph.initializer}
    assert not {"k", "a", "b"} & set(stored)
    kind = onnx.TensorProto.INT4 if options.get("bits") == 4 else onnx.TensorProto.INT8
    assert {stored[f"{name}.codes"].data_type for name in "kab"} == {kind}
    assert len(stored["a.codes"].raw_data or stored["a.codes"].int32_data) in (600, 300)
    kinds = [node.op_type for node in message.graph.node]
    assert kinds.count("QuantizeLinear") == 3 * ("activations" in options)
    assert kinds.count("DequantizeLinear") == 3 + 4 * ("activations" in options)  # and that of the bias


def test_what_is_refused():
    small = quantisation.quantise(MODEL, [X])
    with pytest.raises(ValueError, match="layers: a, b, conv not found among the kernels"):
        with_integers(graph(PARAMS), quantisation.layers(small))
    grouped = quantisation.quantise(MODEL, [X], group=2, bits=4)
    with pytest.raises(ValueError, match="has scales for groups of inputs"):
        with_integers(graph(PARAMS), quantisation.layers(grouped))


def test_kernels_that_look_alike_are_not_mixed_up():
    """With one input, each kernel is a multiple of the other, and their inputs have other ranges."""
    params = {"a": normal(1, 6), "b": normal(1, 6, seed=1)}
    model = models.from_function(lambda p, x: (x[:, :1] @ p["a"]) + (100 * x[:, 1:] @ p["b"]), params)
    small = quantisation.quantise(model, [normal(9, 2)], activations=True)
    make, value, kind = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    floats = jax.tree.map(np.asarray, quantisation.dequantise(small).params)
    made = onnx.helper.make_graph(
        [make("MatMul", ["x", "a"], ["h"]), make("MatMul", ["z", "b"], ["g"]), make("Add", ["h", "g"], ["y"])],
        "network", [value("x", kind, ["n", 1]), value("z", kind, ["n", 1])], [value("y", kind, ["n", 6])],
        [onnx.numpy_helper.from_array(array, name) for name, array in floats.items()],
    )  # fmt: skip
    message = onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(ValueError, match="a, b hold the same integers up to a factor per output"):
        with_integers(message, quantisation.layers(small))

"""Quantised models as ONNX files: small, computed in integers, and equal to the model in memory."""

import importlib.util
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from distill_jax import export, models, train
from distill_jax.compress import low_rank, quantisation
from distill_jax.export import graphs
from distill_jax.export._integers import with_integers

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
needs_converter = pytest.mark.skipif(not importlib.util.find_spec("jax2onnx"), reason="needs jax2onnx")
CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("f4")


PARAMS = {"conv": normal(3, 3, 2, 4), "a": normal(100, 6), "b": normal(6, 3), "bias": normal(6)}
FACTOR = np.array([0.5, -2.0, 0.0, 3.0], "f4")  # a normalisation, as a converter folds it into the kernel


def network(p, x):
    x = jax.nn.relu(jax.lax.conv_general_dilated(x, p["conv"], **CONV) * FACTOR)
    return jax.nn.relu(x.reshape(len(x), -1) @ p["a"] + p["bias"]) @ p["b"]


def message(nodes, constants, inputs, outputs):
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    made = onnx.helper.make_graph(
        [onnx.helper.make_node(*node, **options) for *node, options in nodes],
        "network", [value(name, kind, shape) for name, shape in inputs.items()],
        [value(name, kind, shape) for name, shape in outputs.items()],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in constants.items()],
    )  # fmt: skip
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def graph(params):
    """The network as a converter writes it: kernels in other layouts, the factor folded in."""
    constants = {
        "k": (params["conv"] * FACTOR).transpose(3, 2, 0, 1), "a": params["a"].T, "bias": params["bias"],
        "b": params["b"], "shape": np.array([-1, 100]),
    }  # fmt: skip
    nodes = [
        ("Transpose", ["x"], ["x1"], {"perm": [0, 3, 1, 2]}), ("Conv", ["x1", "k"], ["x2"], {"pads": [1, 1, 1, 1]}),
        ("Relu", ["x2"], ["x3"], {}), ("Transpose", ["x3"], ["x4"], {"perm": [0, 2, 3, 1]}),
        ("Reshape", ["x4", "shape"], ["x5"], {}), ("Gemm", ["x5", "a", "bias"], ["x6"], {"transB": 1}),
        ("Relu", ["x6"], ["x7"], {}), ("MatMul", ["x7", "b"], ["y"], {}),
    ]  # fmt: skip
    return message(nodes, constants, {"x": ["n", 5, 5, 2]}, {"y": ["n", 3]})


def run(model, x):
    return np.asarray(jax.jit(lambda m, x: m(x))(model, x))


def started(data, tmp_path):
    """A session, and the operations into which ONNX Runtime turns a graph."""
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised")
    session = runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session, Counter(node.op_type for node in onnx.load(tmp_path / "optimised").graph.node)


MODEL, X = models.from_function(network, PARAMS), normal(200, 5, 5, 2)
FLOATS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@pytest.mark.parametrize(
    "options", [{"activations": True}, {"activations": True, "bits": 4}, {}, {"bits": 4}], ids=str
)
def test_onnx_runtime_computes_what_the_quantised_model_does(tmp_path, options):
    small = quantisation.quantise(MODEL, [X], **options)
    floats = graph(jax.tree.map(np.asarray, quantisation.dequantise(small).params))
    before = floats.SerializeToString()
    made = with_integers(floats, quantisation.layers(small))
    assert floats.SerializeToString() == before
    onnx.checker.check_model(made)
    session, used = started(made.SerializeToString(), tmp_path)
    expected = run(small, X)
    rounded = "activations" in options
    difference = np.abs(session.run(None, {"x": X})[0] - expected).max()
    assert difference <= (0.01 if rounded else 1e-5) * np.abs(expected).max()
    stored = [tensor for tensor in made.graph.initializer if tensor.name.endswith(".integers")]
    kind = "INT4" if options.get("bits") == 4 else "UINT8" if rounded else "INT8"
    assert {tensor.data_type for tensor in stored} == {getattr(onnx.TensorProto, kind)}
    assert sum(len(tensor.raw_data) for tensor in stored) == 690 * options.get("bits", 8) / 8
    if rounded:
        assert not FLOATS & set(used)
        assert used["QLinearConv"] == used["QGemm"] == 1
        assert used["MatMulIntegerToFloat"] + used["QLinearMatMul"] == 1
        assert used["QuantizeLinear"] == 1  # of the inputs
    else:
        assert not {"DequantizeLinear", "MatMulNBits", "Cast"} & set(used)  # decoded when it is loaded


def residual(p, x):
    """A convolution whose outputs are also added as they are, a limit, and a bias that no int32 holds."""
    conv = jax.lax.conv_general_dilated
    x = jnp.clip(conv(x, p["a"], **CONV) + p["shift"], 0, 6)
    x = jax.nn.relu(x + conv(x, p["b"], **CONV))
    return (x.mean((1, 2)) @ p["c"] * 1e-9 + 1) @ p["d"]


@needs_converter
def test_what_is_not_rounded_is_added_as_floats(tmp_path):
    params = {"a": normal(3, 3, 1, 4), "b": normal(3, 3, 4, 4), "shift": normal(4), "c": normal(4, 5)}
    params["d"] = normal(5, 3)
    x = normal(20, 8, 8, 1)
    small = quantisation.quantise(models.from_function(residual, params), [x], activations=True)
    written = export.onnx(tmp_path / "m.onnx", small, x)
    session, used = started((tmp_path / "m.onnx").read_bytes(), tmp_path)
    assert used["ConvInteger"] == 2
    assert not FLOATS & set(used)
    found, expected = session.run(None, {"x": x})[0], run(small, x)
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    assert written["inputs"][0]["shape"][0] == "batch"


DIGITS = load_digits()
IMAGES, LABELS = (DIGITS.images[..., None] / 16).astype("f4"), DIGITS.target.astype("i4")


def trained(name):
    model, tx = models.build(name, (8, 8, 1), 10, jax.random.key(0)), optax.adam(3e-3)
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx))
    data = {"image": IMAGES[:1000], "label": LABELS[:1000]}
    return train.fit(
        train.init_state(model, tx, jax.random.key(1)), epoch, data, epochs=8, batch_size=50, seed=0
    ).model


@needs_converter
@pytest.mark.parametrize(
    ("name", "kinds"), [("mlp:32", {"QGemm": 2}), ("convnet:4,8", {"QLinearConv": 2, "QGemm": 2})]
)
def test_a_file_of_integers_classifies_as_the_model_in_memory(tmp_path, name, kinds):
    model, path = trained(name), tmp_path / "m.onnx"
    export.onnx(path, model, IMAGES[:16])
    whole = path.stat().st_size
    small = quantisation.quantise(model, [IMAGES[:500]], activations=True)
    written = export.onnx(path, small, IMAGES[:16], labels=list("0123456789"))
    assert written["bytes"] < 0.5 * whole
    assert set(map(str, written["integers"].values())) == {str({"weights": 8, "inputs": 8})}
    assert written["digest"] == export.stablehlo(tmp_path / "m.model", small, IMAGES[:16])["digest"]
    data = path.read_bytes()
    session, used = started(data, tmp_path)
    assert {kind: used[kind] for kind in kinds} == kinds
    assert not FLOATS & set(used)
    expected = run(small, IMAGES[1000:]).argmax(-1)
    for size in (1, 7, 256):
        found = [session.run(None, {"x": IMAGES[i : i + size]})[0] for i in range(1000, len(IMAGES), size)]
        assert np.mean(np.concatenate(found).argmax(-1) == expected) >= 0.999
    export.onnx(tmp_path / "again.onnx", small, IMAGES[:16], labels=list("0123456789"))
    assert data == (tmp_path / "again.onnx").read_bytes()
    path.write_bytes(data.replace(b".integers", b".integerz", 1))
    with pytest.raises(ValueError, match="is damaged"):
        export.describe(path)


@needs_converter
@pytest.mark.parametrize("name", ["mlp:32", "convnet:4,8"])
def test_low_rank_factors_are_integers_too(tmp_path, name):
    model = models.build(name, (8, 8, 1), 10, jax.random.key(0))
    kernels = low_rank.kernels(model, IMAGES[:1])
    ranks = low_rank.allocate(model, kernels, 0.6, of="flops")
    small = quantisation.quantise(low_rank.factorise(model, kernels, ranks), [IMAGES[:500]], activations=True)
    written = export.onnx(tmp_path / "m.onnx", small, IMAGES[:64])
    assert len(written["integers"]) == len(kernels) + len(ranks) > len(kernels)
    assert not FLOATS & set(started((tmp_path / "m.onnx").read_bytes(), tmp_path)[1])


@needs_converter
def test_scales_for_groups_of_inputs_become_a_file_too(tmp_path):
    small = quantisation.quantise(
        models.from_function(lambda p, x: x @ p, normal(64, 32)), [normal(1, 64)], group=8
    )
    written = export.onnx(tmp_path / "m.onnx", small, normal(3, 64))
    assert list(written["integers"].values()) == [{"weights": 8, "inputs": None}]


def test_what_is_refused():
    small = quantisation.quantise(MODEL, [X])
    with pytest.raises(ValueError, match="a, b, conv not found among the kernels"):
        with_integers(graph(PARAMS), quantisation.layers(small))


def test_kernels_that_look_alike_are_not_mixed_up():
    """With one input, each kernel is a multiple of the other, and their inputs have other ranges."""
    params = {"a": normal(1, 6), "b": normal(1, 6, seed=1)}
    model = models.from_function(lambda p, x: (x[:, :1] @ p["a"]) + (100 * x[:, 1:] @ p["b"]), params)
    small = quantisation.quantise(model, [normal(9, 2)], activations=True)
    floats = jax.tree.map(np.asarray, quantisation.dequantise(small).params)
    nodes = [
        ("MatMul", ["x", "a"], ["h"], {}),
        ("MatMul", ["z", "b"], ["g"], {}),
        ("Add", ["h", "g"], ["y"], {}),
    ]
    made = message(nodes, floats, {"x": ["n", 1], "z": ["n", 1]}, {"y": ["n", 6]})
    with pytest.raises(ValueError, match="a, b hold the same integers up to a factor per output"):
        with_integers(made, quantisation.layers(small))


def test_a_kernel_is_not_that_of_floats_which_looks_alike():
    """A kernel of one input is a multiple of any other one, also of one that is excluded from quantisation."""
    params = {"a": normal(1, 6), "b": normal(1, 6, seed=1)}
    model = models.from_function(lambda p, x: (x[:, :1] @ p["a"]) + (100 * x[:, 1:] @ p["b"]), params)
    nodes = [
        ("MatMul", ["x", "a"], ["h"], {}),
        ("MatMul", ["z", "b"], ["g"], {}),
        ("Add", ["h", "g"], ["y"], {}),
    ]
    small = quantisation.quantise(model, [normal(9, 2)], activations=True, exclude=["a"])
    floats = jax.tree.map(np.asarray, quantisation.dequantise(small).params)
    made = message(nodes, floats, {"x": ["n", 1], "z": ["n", 1]}, {"y": ["n", 6]})
    with pytest.raises(ValueError, match="b have one input"):
        with_integers(made, quantisation.layers(small))


def test_a_factor_of_zero_is_folded_into_a_whole_kernel(tmp_path):
    params = {"a": normal(4, 4), "b": normal(4, 4, seed=1)}
    model = models.from_function(lambda p, x: 100 * (x @ p["a"]) @ p["b"], params)
    small = quantisation.quantise(model, [normal(9, 4)], activations=True)
    floats = jax.tree.map(np.asarray, quantisation.dequantise(small).params)
    constants = {"a": floats["a"], "b": 0 * floats["b"], "c": normal(4)}
    nodes = [("MatMul", ["x", "a"], ["h"], {}), ("Gemm", ["h", "b", "c"], ["y"], {})]
    made = with_integers(
        message(nodes, constants, {"x": ["n", 4]}, {"y": ["n", 4]}), quantisation.layers(small)
    )
    session, _ = started(made.SerializeToString(), tmp_path)
    found = session.run(None, {"x": normal(9, 4)})[0]
    np.testing.assert_allclose(found, np.broadcast_to(constants["c"], (9, 4)), rtol=1e-3)


@needs_converter
def test_a_file_that_does_not_round_is_refused(tmp_path, monkeypatch):
    small = quantisation.quantise(MODEL, [X], activations=True)
    monkeypatch.setattr(graphs, "with_integers", lambda message, kernels: message)
    with pytest.raises(ValueError, match="differs from JAX on average by"):
        export.onnx(tmp_path / "m.onnx", small, X)


@needs_converter
@pytest.mark.filterwarnings("ignore:the ONNX file takes batches")
def test_wrong_ranges_of_activations_do_not_loosen_the_check(tmp_path, monkeypatch):
    """Quantisation changes the outputs altogether; a file that is half as wrong is wrong."""
    small = quantisation.quantise(MODEL, [X / 100], activations=True)
    export.onnx(tmp_path / "m.onnx", small, X)

    def halved(message, kernels):
        (last,) = (node for node in message.graph.node if node.output[0] == message.graph.output[0].name)
        last.output[0] = "whole"
        message.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.5), "half"))
        message.graph.node.append(
            onnx.helper.make_node("Mul", ["whole", "half"], [message.graph.output[0].name])
        )
        return message

    monkeypatch.setattr(graphs, "with_integers", halved)
    with pytest.raises(ValueError, match="differs from JAX"):
        export.onnx(tmp_path / "h.onnx", small, X)


@needs_converter
def test_kernels_of_attention_are_integers(tmp_path):
    """Their inputs and outputs have several axes, so the converter writes them as Einsum, and export as MatMul."""
    x = normal(16, 8, 8, 1)
    small = quantisation.quantise(
        models.build("vit1-4:0.25", (8, 8, 1), 10, jax.random.key(0)), [x], activations=True
    )
    written = export.onnx(tmp_path / "m.onnx", small, x)
    assert written["integers"].keys() == quantisation.layers(small).keys()
    _, used = started((tmp_path / "m.onnx").read_bytes(), tmp_path)
    assert used["MatMulIntegerToFloat"] == 6
    assert used["Attention"] == 1  # of activations with each other
    assert not FLOATS & set(used)

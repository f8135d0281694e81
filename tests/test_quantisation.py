"""Integers in the place of kernels: the codes NumPy finds, exact integer products, gradients by hand, and files."""

import os
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from distill_jax import losses, models, teachers, train
from distill_jax.compress import _integers, low_rank, quantisation
from distill_jax.compress.quantisation import dequantise, freeze, layers, quantise, simulate

RUN = jax.jit(lambda model, x: model(x))
CONV = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype("f4")


def network(p, x, key=None):
    """A grouped and strided convolution, a kernel with two axes of outputs, one on the left, one in bfloat16."""
    x = jax.lax.conv_general_dilated(x, p["conv"], (2, 2), "SAME", **CONV)
    x = jax.nn.relu(
        jax.lax.conv_general_dilated(x, p["grouped"], (1, 1), "SAME", feature_group_count=2, **CONV)
    )
    x = jax.nn.tanh(jnp.einsum("bijc,chk->bijhk", x, p["heads"]).mean((1, 2)))
    if key is not None:
        x = x + 0.01 * jax.random.normal(key, x.shape)
    x = jax.vmap(lambda row: p["left"] @ row)(x.reshape(len(x), -1)) + p["bias"]
    return jnp.tanh(x).astype(jnp.bfloat16) @ p["half"]


PARAMS = {
    "conv": normal(3, 3, 2, 4), "grouped": normal(3, 3, 2, 6), "heads": normal(6, 2, 3) / 2, "left": normal(5, 6),
    "bias": normal(5), "half": jnp.asarray(normal(5, 3), jnp.bfloat16),
}  # fmt: skip
OWN = {
    "conv": (3,),
    "grouped": (3,),
    "heads": (1, 2),
    "left": (0,),
    "half": (1,),
}  # axes with scales of their own
MODEL = models.from_function(network, PARAMS)
X = normal(8, 6, 6, 2)


def scales_by_numpy(w, own, limit, ratios):
    """The scale of the least squared error, one output after another."""
    w = np.asarray(w, np.float64)
    found = np.empty([w.shape[axis] if axis in own else 1 for axis in range(w.ndim)])
    for index in np.ndindex(found.shape):
        values = w[tuple(i if axis in own else slice(None) for axis, i in enumerate(index))]
        grid = np.abs(values).max() / limit * ratios
        errors = [np.sum((values - s * np.clip(np.round(values / s), -limit, limit)) ** 2) for s in grid]
        found[index] = grid[np.argmin(errors)]
    return found


@pytest.mark.parametrize(("bits", "how"), [(8, "absmax"), (4, "least squares")])
def test_codes_and_scales_are_those_of_numpy_and_the_outputs_what_they_mean(bits, how):
    small = quantise(MODEL, [X], bits=bits, scale=how)
    limit, meant = 2 ** (bits - 1) - 1, dict(PARAMS)
    assert set(layers(small)) == set(OWN)
    for path, layer in layers(small).items():
        w = np.asarray(PARAMS[path], np.float32)
        scale = scales_by_numpy(w, OWN[path], limit, np.linspace(1, 0.3, 71) if how[0] == "l" else np.ones(1))
        np.testing.assert_allclose(layer.scale, scale, rtol=1e-6)
        codes = np.clip(np.round(w * (1 / np.asarray(layer.scale))), -limit, limit)
        np.testing.assert_array_equal(layer.codes, codes)
        assert layer.codes.dtype == np.int8
        meant[path] = jnp.asarray(codes.astype("f4") * layer.scale, PARAMS[path].dtype)
        np.testing.assert_array_equal(layer.array(), meant[path])
    plain = dequantise(small)
    assert plain.apply_fn is MODEL.apply_fn
    jax.tree.map(np.testing.assert_array_equal, plain.params, meant)
    np.testing.assert_array_equal(RUN(small, X), RUN(plain, X))


def test_groups_of_inputs_have_scales_of_their_own():
    w = normal(6, 4)
    model = models.from_function(lambda p, x: x @ p["w"], {"w": w})
    layer = layers(quantise(model, [normal(2, 6)], bits=4, group=3, scale="absmax"))["w"]
    np.testing.assert_allclose(layer.scale, np.abs(w.reshape(2, 3, 4)).max(1) / 7, rtol=1e-6)
    expected = np.round(w.reshape(2, 3, 4) / np.asarray(layer.scale)[:, None]).reshape(6, 4)
    np.testing.assert_array_equal(layer.codes, expected)
    conv = layers(quantise(MODEL, [X], bits=4, group=2, exclude=["heads", "left", "half"]))
    assert conv["conv"].scale.shape == (1, 1, 1, 4)
    assert conv["grouped"].scale.shape == (1, 1, 1, 6)


def product_cases():
    """Products of integers: (operation on two arrays, inputs, weights, place of the weights)."""

    def dot(numbers):
        return lambda a, b: jax.lax.dot_general(a, b, numbers)

    def conv(**options):
        return lambda a, b: jax.lax.conv_general_dilated(
            a, b, **{"window_strides": (1, 1), "padding": "SAME", **CONV} | options
        )

    return {
        "matrix": (dot((((1,), (0,)), ((), ()))), (4, 7), (7, 5), 1),
        "on the left, two summed axes": (dot((((1, 3), (0, 2)), ((), ()))), (7, 4, 3), (2, 7, 5, 3), 0),
        "with a batch": (dot((((2,), (2,)), ((0,), (1,)))), (3, 4, 7), (2, 3, 7), 1),
        "convolution": (conv(), (2, 5, 6, 3), (3, 2, 3, 4), 1),
        "strides and groups": (conv(window_strides=(2, 1), feature_group_count=2), (2, 5, 6, 4), (3, 3, 2, 4), 1),
        "transposed": (conv(lhs_dilation=(2, 3), padding=((1, 2), (-1, 2))), (2, 4, 4, 3), (3, 3, 3, 4), 1),
        "dilated, channels first": (
            conv(rhs_dilation=(2, 1), dimension_numbers=("NCHW", "OIHW", "NCHW")), (2, 3, 6, 5), (4, 3, 2, 3), 1,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", product_cases())
def test_integer_products_are_exact_and_have_the_products_gradient(name):
    operation, inputs, weights, place = product_cases()[name]
    rng = np.random.default_rng(1)
    a, w = rng.integers(-128, 128, inputs).astype("f4"), rng.integers(-127, 128, weights).astype("f4")
    (eqn,) = jax.make_jaxpr(operation)(*((a, w) if place else (w, a))).eqns
    zero = jnp.float32(-37)

    def both(a, w):
        return operation(*((a, w) if place else (w, a)))

    found = jax.jit(lambda a, w: _integers.product(eqn, place, a, w, zero))(a, w)
    expected = both(jnp.asarray(a + 37, jnp.int32), jnp.asarray(w, jnp.int32))  # a + 37 is outside int8
    np.testing.assert_array_equal(found, expected)
    g = normal(*found.shape)
    _, pull = jax.vjp(lambda a, w: _integers.product(eqn, place, a, w, zero), a, w)
    _, wanted = jax.vjp(lambda a, w: both(a + 37, w), a, w)
    for one, other in zip(pull(g), wanted(g), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("platform", "kind"), [("cpu", "i8"), ("tpu", "i8"), ("cuda", "f32")])
@pytest.mark.parametrize("name", ["matrix", "on the left, two summed axes", "with a batch"])
def test_a_gpu_multiplies_no_matrices_of_integers(name, platform, kind):
    """A network with products of int8 matrices gave wrong numbers on an H200."""
    operation, inputs, weights, place = product_cases()[name]
    a, w = np.zeros(inputs, "f4"), np.zeros(weights, "f4")
    (eqn,) = jax.make_jaxpr(operation)(*((a, w) if place else (w, a))).eqns
    traced = jax.jit(lambda a, w: _integers.product(eqn, place, a, w, jnp.float32(0))).trace(a, w)
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all(line.count(f"x{kind}>") >= 2 for line in products), products


@pytest.mark.parametrize("terms", [3, 1024, 1025, 20_000, 70_000])
def test_products_by_floats_are_the_integers(terms):
    """The worst sums of each size: all of one sign, and float32 would round the last two."""
    rng = np.random.default_rng(terms)
    a = np.stack([np.full(terms, -128), rng.integers(-128, 128, terms)]).astype("i1")
    w = np.stack([np.full(terms, -127), rng.integers(-127, 128, terms)], 1).astype("i1")
    bfloat16 = jnp.bfloat16  # the factors survive even that
    found = _integers.by_floats(lambda a, w: jnp.asarray(a, bfloat16).astype("f4") @ w, a, w, terms)
    np.testing.assert_array_equal(found, a.astype(np.int64) @ w.astype(np.int64))


def dense(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def test_activations_are_those_of_numpy():
    params, x = {"a": normal(4, 6), "b": normal(6, 3)}, normal(20, 4)
    small = quantise(models.from_function(dense, params), [x[:12], x[12:]], activations=True)
    found = layers(small)
    value, hidden = x, np.maximum(x @ params["a"], 0)
    for path, seen in (("a", x), ("b", hidden)):
        layer = found[path]
        low, high = min(seen.min(), 0), max(seen.max(), 0)
        np.testing.assert_allclose(layer.input_scale, (high - low) / 255, rtol=1e-5)
        assert layer.input_zero == np.round(-128 - low / ((high - low) / 255))
        zero, s = int(layer.input_zero), np.asarray(layer.input_scale)
        codes = np.clip(np.round(value * (1 / s)) + zero, -128, 127).astype(np.int64)
        value = (codes - zero) @ np.asarray(layer.codes, np.int64) * (s * np.asarray(layer.scale))
        value = np.maximum(value, 0).astype("f4") if path == "a" else value
    assert found["b"].input_zero == -128  # behind a ReLU all codes are for positive numbers
    np.testing.assert_allclose(RUN(small, x), value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(small(x), dense(params, x), atol=0.2)


def test_percentiles_leave_out_the_rare_and_far():
    x = normal(4000, 4)
    x[7, 2] = 1e3
    model = models.from_function(dense, {"a": normal(4, 6), "b": normal(6, 3)})
    whole, most = (layers(quantise(model, [x], activations=True, percentile=p))["a"] for p in (100, 99.9))
    assert whole.input_scale > 3.9
    low, high = np.percentile(x, [0.1, 99.9])
    np.testing.assert_allclose(most.input_scale, (high - low) / 255, rtol=1e-4)


def test_the_gradient_passes_straight_through_inside_the_range():
    """By hand, of L = Σ g·ŵ: for w it is g inside; for the ratio s₀·Σ g·(q − w/s), or s₀·g·q where it is clipped."""
    w = np.array([[0.5], [-2.0], [7.4], [9.0]], "f4")  # 4 bits of scale 1: the last is beyond 7
    model = simulate(models.from_function(lambda p, x: x @ p["w"], {"w": w}), [w.T], bits=4, scale="absmax")
    model.state["start"]["w"]["scale"] = jnp.ones((1, 1))
    g = np.array([[1.0, 10.0, 100.0, 1000.0]], "f4")
    gradient = jax.grad(lambda m: m(g).sum(), allow_int=True)(model).params["w"]
    np.testing.assert_array_equal(gradient.weight.ravel(), [1, 10, 100, 0])
    np.testing.assert_allclose(gradient.ratio.ravel(), [-0.5 * 1 + 0 * 10 - 0.4 * 100 + 7 * 1000], rtol=1e-6)


def test_the_gradient_of_activations_by_hand():
    """y = 2·x̂ with x̂ = (q − zero)·s: 2 inside the range, 0 outside; the ratio's is Σ 2·(x̂ − x inside), or its end."""
    model = models.from_function(lambda p, x: x @ p["w"], {"w": np.array([[2.0]], "f4")})
    model = simulate(model, [np.array([[0.0], [25.5]], "f4")], activations=True)
    x = np.array([[3.04], [30.0], [-1.0]], "f4")  # a scale of 0.1, and 0 is the code −128
    m, dx = jax.grad(lambda m, x: m(x).sum(), argnums=(0, 1))(model, x)
    np.testing.assert_allclose(dx.ravel(), [2, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(m.params["w"].input_ratio, 2 * ((3.0 - 3.04) + 25.5 + 0), rtol=1e-4)


@pytest.mark.parametrize("activations", [False, True])
def test_distillation_aware_training_ends_in_integers_with_equal_outputs(activations):
    x = normal(64, 6, 6, 2) if activations else normal(64, 4)
    teacher = MODEL if activations else models.from_function(dense, {"a": normal(4, 6), "b": normal(6, 3)})
    student = simulate(teacher, [x], bits=4, activations=activations)
    if not activations:  # twice the best scales, from which there is something to gain
        student = student.replace(state=jax.tree.map(lambda s: 2 * s, student.state))
    integers = jax.jit(freeze)
    np.testing.assert_array_equal(RUN(student, x), RUN(integers(student), x))
    tx = optax.adam(3e-3 if activations else 1e-2)
    step = jax.jit(train.make_train_step(train.distill(alpha=0.0, temperature=1.0), tx))
    state = train.init_state(student, tx, jax.random.key(0))
    batch = teachers.label(teacher, {"image": x, "label": np.zeros(64, int)})
    for _ in range(40):
        state, _ = step(state, batch)
    trained = state.model

    def distance(model):
        return float(losses.kl(RUN(model, x).astype("f4"), batch["teacher"].astype("f4")).mean())

    assert distance(trained) < 0.8 * distance(student)
    for kernel in (
        (trained.params["heads"], trained.params["half"]) if activations else trained.params.values()
    ):
        assert np.abs(kernel.ratio - 1).max() > 1e-3
        assert activations == (kernel.input_ratio is not None and abs(kernel.input_ratio - 1) > 1e-3)
    small = integers(trained)
    np.testing.assert_array_equal(RUN(small, x), RUN(trained, x))
    if activations:
        training = jax.jit(lambda model: model.apply(x, key=jax.random.key(5))[0])
        np.testing.assert_array_equal(training(small), training(trained))
    assert small.state == teacher.state


def test_models_are_mapped_over():
    x = normal(5, 4)
    params = [{"a": normal(4, 6, seed=i), "b": normal(6, 3, seed=i)} for i in range(2)]
    small = [quantise(models.from_function(dense, p), [x], bits=4, activations=True) for p in params]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *small)
    outputs = jax.jit(jax.vmap(lambda m: m(x)))(stacked)
    for one, model in zip(outputs, small, strict=True):
        np.testing.assert_allclose(one, RUN(model, x), rtol=1e-6)


def test_tied_and_repeated_kernels_and_factors():
    """A table that is looked up and multiplies; a kernel summed over both axes in turn; low-rank factors."""

    def tied(p, x):
        h = p["table"][x] @ p["w"] @ p["w"].T
        return h @ p["table"].T

    params = {"table": normal(9, 4), "w": normal(4, 4)}
    small = quantise(models.from_function(tied, params), [np.arange(9).reshape(3, 3)], activations=True)
    assert layers(small)["table"].scale.shape == (9, 1)
    assert layers(small)["w"].scale.shape == (1, 1)
    found = RUN(small, np.arange(9)[None])
    np.testing.assert_allclose(found, tied(params, np.arange(9)[None]), atol=0.05 * np.abs(found).max())
    x = normal(5, 6)
    model = models.from_function(lambda p, x: x @ p["w"], {"w": normal(6, 7)})
    thin = low_rank.factorise(model, low_rank.kernels(model, x), {"w": 2})
    small = quantise(thin, [x], activations=True)
    assert set(layers(small)) == {"w.encoder", "w.decoder"}
    np.testing.assert_allclose(small(x), thin(x), atol=0.1)


def test_an_output_of_zeros_and_weights_too_small_to_invert():
    w = np.array([[0.0, 1e-39, 1.0], [0.0, 0.0, -1.0]], "f4")
    model = models.from_function(lambda p, x: x @ p["w"], {"w": w})
    outputs = quantise(model, [np.zeros((2, 2), "f4")], activations=True)(np.ones((1, 2), "f4"))
    np.testing.assert_array_equal(outputs, [[0, 0, 0]])


FRESH = """
import sys
import jax, numpy as np
from distill_jax import models
model = models.load(sys.argv[1] + "/small.model")
x = np.load(sys.argv[1] + "/x.npy")
np.save(sys.argv[1] + "/y.npy", np.asarray(jax.jit(lambda m, x: m(x))(model, x), np.float32))
"""


def test_a_file_holds_the_integers_and_a_fresh_process_computes_with_them(tmp_path):
    params, x = {"a": normal(64, 31), "b": normal(31, 3)}, normal(10, 64)
    small = quantise(models.from_function(dense, params), [x], bits={"a": 4, "b": 8}, activations=True)
    models.save(tmp_path / "small.model", small, x)
    np.save(tmp_path / "x.npy", x)
    command = [sys.executable, "-c", FRESH, str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), RUN(small, x), rtol=1e-6)
    with zipfile.ZipFile(tmp_path / "small.model") as file:
        sizes = sorted(info.file_size for info in file.infolist() if info.filename.startswith("arrays/"))
    scales = [4, 4, 4, 4, 4 * 3, 4 * 31]
    assert sizes == sorted([*scales, 64 * 31 // 2, 31 * 3])
    assert sum(sizes) == sum(leaf.nbytes for leaf in jax.tree.leaves(small))


def test_packing_halves_of_bytes():
    for shape in ((3, 5), (2, 4), (1,)):
        codes = np.random.default_rng(0).integers(-7, 8, shape)
        packed = _integers.pack(jnp.asarray(codes))
        assert packed.dtype == np.uint8
        assert packed.shape == (-(-codes.size // 2),)
        np.testing.assert_array_equal(_integers.unpack(packed, shape), codes)
    np.testing.assert_array_equal(_integers.pack(jnp.array([1, -2, 7])), [0xE1, 0x07])


def test_what_is_refused():
    plain = models.from_function(dense, {"a": normal(4, 6), "b": normal(6, 3)})
    x, bad = normal(5, 4), np.full((5, 4), np.nan, "f4")
    for options, words in (
        ({"bits": 3}, "bits must be one of 4, 8, got 3"),
        ({"bits": {"a": 8}}, "bits: each path must be found by one expression"),
        ({"group": 4}, "group must divide the inputs of each kernel, got 4 for b with 6"),
        ({"group": 2, "activations": True}, "leave out group or activations"),
        ({"scale": "best"}, "scale must be one of 'least squares', 'absmax'"),
        ({"percentile": 50}, r"percentile must lie in \(50, 100\], got 50"),
        ({"exclude": ["c"]}, "exclude: 'c' is found in no path"),
    ):
        with pytest.raises(ValueError, match=words):
            quantise(plain, [x], **options)
    for batches, words in (
        ([], "batches: give at least one batch of inputs, got none"),
        ([x, x[:, :3]], r"all examples must have one shape, got \(4,\) in batch 0 and \(3,\) in batch 1"),
        ([x[:, :3]], r"batches: the model does not take inputs of shape \(3,\)"),
        ([x, bad], "the inputs of a are not finite in batch 1"),
    ):
        with pytest.raises(ValueError, match=words):
            quantise(plain, batches, activations=True)
    with pytest.raises(ValueError, match="the weights of a are not finite"):
        quantise(plain.replace(params={**plain.params, "a": np.full((4, 6), np.nan, "f4")}), [x])
    table = models.from_function(lambda p, x: p["w"][x], {"w": normal(4, 6)})
    with pytest.raises(ValueError, match="no kernel to quantise among w"):
        quantise(table, [np.arange(3)])
    for call in (freeze, layers, dequantise):
        with pytest.raises(ValueError, match=r"quantisation\.(simulate|quantise)"):
            call(plain)


def test_a_loaded_model_is_refused(tmp_path):
    models.save(tmp_path / "m", models.from_function(lambda w, x: x @ w, normal(4, 2)), normal(2, 4))
    with pytest.raises(ValueError, match=r"quantise the model before models\.save"):
        quantisation.quantise(models.load(tmp_path / "m"), [normal(2, 4)])


def test_sums_that_int32_cannot_hold_are_refused():
    model = models.from_function(lambda p, x: x @ p, jnp.ones((66_312, 1)))
    with pytest.raises(ValueError, match="sums over more than 66,311 inputs"):
        quantisation.quantise(model, [jnp.ones((1, 66_312))], activations=True)


def test_what_is_not_finite_stays_so():
    model = models.from_function(lambda p, x: x @ p["w"], {"w": jnp.eye(3)})
    x = jnp.array([[1.0, 2.0, 3.0]])
    small = quantisation.quantise(model, [x], activations=True)
    assert np.isfinite(small(x)).all()
    assert np.isnan(small(x.at[0, 1].set(jnp.nan))).all()
    trained = quantisation.simulate(model, [x], activations=True)
    broken = trained.replace(params=jax.tree.map(lambda w: w * jnp.nan, trained.params))
    assert np.isnan(broken(x)).all()
    with pytest.raises(ValueError, match="the weights of w are not finite"):
        quantisation.freeze(broken)

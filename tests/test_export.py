"""Exported files: they run without this library, say what they are, and refuse what they cannot hold."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from distill_jax import _jaxpr, export, models
from distill_jax.compress import units
from distill_jax.export import _folding, _sealed

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "export.md"
SHAPE = (8, 8, 1)
X = np.random.default_rng(0).normal(size=(256, *SHAPE)).astype("f4")


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(linen.relu(linen.Dense(12)(x.reshape(x.shape[0], -1))))


def halved(model):
    graph = units.trace(model, X[:1])
    return units.keep(graph, model, units.prune(graph, units.scores.l2(graph, model), 0.5))


def made(name):
    if name == "linen, pruned":  # a KeptFn
        return halved(models.from_linen(LinenMLP(), jax.random.key(0), X[:1]))
    model = models.build(name.removesuffix(", pruned"), SHAPE, 10, jax.random.key(0))
    return halved(model) if name.endswith("pruned") else model


HAS_ONNX = all(map(importlib.util.find_spec, ("jax2onnx", "onnx", "onnxruntime")))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs distill_jax[onnx]")
EXPORTS = [export.stablehlo, pytest.param(export.onnx, marks=needs_onnx)]


@jax.jit
def run(model, x):
    return model(x)


NETWORKS = ("convnet:4", "mlp:12, pruned", "linen, pruned")

# A process that cannot import this library runs the program that the guide shows
FRESH = """
import sys
sys.modules["distill_jax"] = None
import numpy as np
program = open("program.py").read()
for i, size in ((i, size) for i in range(int(sys.argv[1])) for size in (1, 7, 256)):
    space = {"images": np.load("x.npy")[:size]}
    exec(program.replace("digits.model", f"{i}.model"), space)
    np.save(f"{i} {size}.npy", space["logits"])
"""


def shown(start):
    """The program of the guide that begins so."""
    (program,) = re.findall(rf"```python\n({start}.*?)```", GUIDE.read_text(), re.DOTALL)
    return program


def test_a_process_without_this_library_computes_exactly_the_same(tmp_path):
    found = [made(name) for name in NETWORKS]
    for i, model in enumerate(found):
        export.stablehlo(tmp_path / f"{i}.model", model, X[:2], labels=list("0123456789"))
    np.save(tmp_path / "x.npy", X)
    (tmp_path / "program.py").write_text(shown("import json"))
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(len(found))],
        cwd=tmp_path,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for i, model in enumerate(found):
        for size in (1, 7, 256):
            np.testing.assert_array_equal(np.load(tmp_path / f"{i} {size}.npy"), run(model, X[:size]))
        np.testing.assert_array_equal(models.load(tmp_path / f"{i}.model")(X[:2]), run(model, X[:2]))


def plain_model(scale=2.0):
    return models.from_function(lambda w, x: {"y": x["a"] @ w, "n": x["b"]}, scale * jnp.ones((3, 2)))


def test_a_file_says_what_it_is(tmp_path):
    x = {"a": np.ones((4, 3), "f4"), "b": np.ones((4, 1), np.int32)}
    preprocessing = {"a": {"mean": np.float32(0.5)}, "b": "as it is"}
    written = export.stablehlo(
        tmp_path / "m", plain_model(), x, preprocessing=preprocessing, provenance="drawn"
    )
    assert written == export.describe(tmp_path / "m")
    assert written["inputs"] == [
        {"name": "x.a", "shape": ["batch", 3], "dtype": "float32"},
        {"name": "x.b", "shape": ["batch", 1], "dtype": "int32"},
    ]
    assert written["outputs"] == [
        {"name": "y.n", "shape": ["batch", 1], "dtype": "int32"},
        {"name": "y.y", "shape": ["batch", 2], "dtype": "float32"},
    ]
    assert written["platforms"] == ["cpu", "cuda", "tpu"]
    assert written["preprocessing"] == {"a": {"mean": 0.5}, "b": "as it is"}
    assert (written["labels"], written["provenance"]) == (None, "drawn")
    assert written["bytes"] == (tmp_path / "m").stat().st_size
    other = export.stablehlo(tmp_path / "other", plain_model(3.0), x)
    assert len({written["digest"], other["digest"]}) == 2
    models.save(tmp_path / "saved", plain_model(), x)
    saved = export.describe(tmp_path / "saved")
    assert saved["inputs"] == written["inputs"]
    assert written["bytes"] < saved["bytes"] / 2


def test_two_exports_are_equal_and_hold_no_path(tmp_path):
    for name in ("a", "b"):
        export.stablehlo(tmp_path / name, made("mlp:12, pruned"), X[:2])
        if name == "a":
            jax.clear_caches()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        for name in archive.namelist():
            assert b".py" not in archive.read(name)


def test_a_batch_of_one_size_is_said_with_a_warning(tmp_path):
    model = models.from_function(lambda w, x: x * w * float(len(x)), jnp.ones(2))
    with pytest.warns(UserWarning, match=r"saved for batches of the shapes of x, \[\(3, 2\)\]"):
        written = export.stablehlo(tmp_path / "m", model, jnp.ones((3, 2)))
    assert written["inputs"][0]["shape"] == [3, 2]


def counting(params, state, x, *, key=None):
    return x * params, {"count": state["count"] + 1}


def noisy(params, state, x, *, key=None):
    return x * params + jax.random.normal(jax.random.key(0), x.shape), state


def printing(params, state, x, *, key=None):
    jax.debug.print("{}", params)
    return x * params, state


REFUSED = {
    counting: r"evaluation changes the state at \['count'\]",
    noisy: r"evaluation draws random numbers \(random_bits\)",
    printing: r"evaluation calls Python \(debug_",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda function: function.__name__)
@pytest.mark.parametrize("call", EXPORTS)
def test_what_no_file_can_hold_is_refused(tmp_path, function, call):
    model = models.Model(function, jnp.ones(2), {"count": jnp.zeros(())})
    with pytest.raises(ValueError, match=REFUSED[function]):
        call(tmp_path / "m", model, jnp.ones((1, 2)))
    assert not list(tmp_path.iterdir())


def test_labels_and_facts_are_checked(tmp_path):
    path, x = tmp_path / "m", X[:1]
    model = made("mlp:4")
    for labels, message in (
        (["a", "b"], r"one name for each class, got 2 for outputs of \[\(1, 10\)\]"),
        (range(10), "must be names of classes, got 0: write numbers as '0'"),
        ("abc", "must be a list of names"),
    ):
        with pytest.raises(ValueError, match=message):
            export.stablehlo(path, model, x, labels=labels)
    with pytest.raises(ValueError, match="preprocessing must be a text or a dict"):
        export.stablehlo(path, model, x, preprocessing=3)
    with pytest.raises(ValueError, match=r"provenance\.a is nan"):
        export.stablehlo(path, model, x, provenance={"a": float("nan")})


def test_files_of_other_versions_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / "m"
    export.stablehlo(path, made("mlp:4"), X[:1])
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["model.json"] = parts["model.json"].replace(b"distill_jax model 1", b"distill_jax model 9")
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = hashlib.sha256(parts["model.json"]).hexdigest().encode()
        for name, part in parts.items():
            archive.writestr(name, part)
    for read in (export.describe, models.load):
        with pytest.raises(ValueError, match=r"has the format 'distill_jax model 9', but this version reads"):
            read(path)
    for place in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            export.describe(path)


@pytest.mark.parametrize("call", EXPORTS)
def test_a_file_is_timed_in_a_process_of_its_own_and_has_a_card(tmp_path, call):
    path = tmp_path / "small.file"
    written = call(path, made("mlp:4"), X[:2], labels=list("0123456789"), provenance={"seed": 3})
    found = export.latency(path, X[:7], threads=1, seconds=0.05)
    assert 0 < found["quartiles_ms"][0] <= found["latency_ms"] <= found["quartiles_ms"][1]
    assert (found["batch"], found["threads"], found["bytes"]) == (7, 1, written["bytes"])
    assert found["calls"] >= 16
    assert found["load_s"] > found["latency_ms"] / 1e3
    assert re.match(r"(JAX|ONNX Runtime) \d", found["runtime"])
    with pytest.raises(ValueError, match=r"x must be \[\"float32 \['batch', 8, 8, 1\]\"\], .* \[7, 64\]"):
        export.latency(path, X[:7].reshape(7, 64))
    facts = {"title": "Digits | small", "figures": {"accuracy": 0.75, "own": 3}, "latencies": [found]}
    card = export.card(path, origin="mlp:8, pruned", **facts)
    text = card.read_text()
    assert card.name == "small.file.md"
    said = [
        "# Digits | small", "mlp:8, pruned", "seed: 3", "| accuracy | 0.75 |", "| own | 3 |", "**Data.** not stated",
        "## Limits\n\nnot stated", "`x`, float32 [batch, 8, 8, 1]", written["digest"], found["machine"],
        f"{written['bytes']:,} bytes", f"| 7 | 1 | {found['latency_ms']:.4g} |",
    ]  # fmt: skip
    assert not [words for words in said if words not in text]
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space = {"x": X[:7]}
    exec(program.replace("small.file", str(path)), space)
    np.testing.assert_allclose(space["outputs"][0], run(made("mlp:4"), X[:7]), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"must be results of export\.latency for this file"):
        export.card(path, latencies=[found | {"bytes": 3}])
    with pytest.raises(ValueError, match=r"figures\['accuracy'\] must be finite"):
        export.card(path, figures={"accuracy": float("nan")})


@needs_onnx
def test_an_onnx_file_says_what_it_is(tmp_path):
    model = made("mlp:4")
    options = {"labels": list("0123456789"), "preprocessing": {"½": [1.5]}, "provenance": "drawn"}
    written = export.onnx(tmp_path / "a", model, X[:3], **options)
    program = export.stablehlo(tmp_path / "p", model, X[:3], **options)
    different = {"format", "bytes", "platforms", "made by"}
    assert {k: v for k, v in written.items() if k not in different} == {
        k: v for k, v in program.items() if k not in different
    }
    jax.clear_caches()
    export.onnx(tmp_path / "b", model, X[:3], **options)
    whole = (tmp_path / "a").read_bytes()
    assert whole == (tmp_path / "b").read_bytes()
    assert b".py" not in whole
    export.onnx(tmp_path / "a", model, X[:3])  # an older one is replaced
    for place in (10, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        (tmp_path / "b").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="is damaged"):
            export.describe(tmp_path / "b")
    other = whole[: -_sealed._LENGTH].replace(b"distill_jax onnx 1", b"distill_jax onnx 9")
    (tmp_path / "b").write_bytes(_sealed.seal(other))
    with pytest.raises(ValueError, match="has the format 'distill_jax onnx 9', but this version reads"):
        export.describe(tmp_path / "b")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match=r"exists and is no file of export\.onnx"):
        export.onnx(tmp_path / "text", model, X[:3])


@needs_onnx
def test_what_is_not_converted_is_named(tmp_path):
    path = tmp_path / "m"
    x = X[:2, 0, :3, 0]

    def refused(fn, match, **options):
        with pytest.raises(ValueError, match=match):
            export.onnx(path, models.from_function(fn, jnp.eye(3)), x, **options)

    refused(lambda w, x: jax.lax.linalg.eigh(x[:, :, None] * w)[0], "the operation eigh is not converted")
    refused(lambda w, x: jnp.tanh(x @ w) + jnp.exp(x), "y differs from JAX at most by", tolerance=1e-12)
    assert not path.exists()
    model = models.from_function(lambda w, x: x @ w * float(len(x)), jnp.eye(3))
    with pytest.warns(UserWarning, match=r"takes batches of the shapes of x only, \[\(2, 3\)\]: .*_DimExpr"):
        written = export.onnx(path, model, x)
    assert written["inputs"][0]["shape"] == [2, 3]


def test_without_the_packages_it_is_said_how_to_install_them(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'distill_jax\[onnx\]'"):
        export.onnx(tmp_path / "m", made("mlp:4"), X[:2])


def test_scales_and_shifts_move_into_the_product_before_them():
    kernel, scale, shift = np.full((3, 2), 2.0, "f4"), np.array([2, 4], "f4"), np.array([1, 3], "f4")

    def fn(x, once):
        y = x @ kernel
        z = jax.nn.relu((y - shift) * jnp.sqrt(scale) / scale + shift)
        return (z if once else z + y), 3 - y if not once else z

    x = np.arange(6, dtype="f4").reshape(2, 3)
    for once, left in ((True, {"add", "dot_general"}), (False, {"add", "dot_general", "mul", "sub", "div"})):
        program = jax.make_jaxpr(partial(fn, once=once))(x)
        simpler = _folding.folded(program)
        for ours, theirs in zip(simpler(x), fn(x, once), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        used = _jaxpr.primitives(jax.make_jaxpr(simpler)(x))
        assert left == used & {"add", "dot_general", "mul", "sub", "div", "sqrt"}


def test_a_kernel_of_int8_stays_one():
    kernel, scale = jnp.ones((128, 64), jnp.int8), jnp.ones(64)
    program = jax.make_jaxpr(lambda x: x @ (kernel.astype(jnp.float32) * jnp.sqrt(scale)))(jnp.ones((2, 128)))
    simpler = jax.make_jaxpr(_folding.folded(program))(jnp.ones((2, 128)))
    assert "convert_element_type" in _jaxpr.primitives(simpler)
    assert "sqrt" not in _jaxpr.primitives(simpler)


def test_a_maximum_of_all_places_of_windows_becomes_a_pooling():
    def quarters(x):
        return [jax.lax.slice(x, (0, i, j, 0), x.shape, (1, 2, 2, 1)) for i, j in np.ndindex(2, 2)]

    def pooled(x):
        a, b, c, d = quarters(jax.lax.slice(x, (0, 0, 0, 0), x.shape))
        return (jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d)),)

    for fn, left in (
        (pooled, {"reduce_window_max"}),
        (lambda x: (quarters(x)[0],), {"slice"}),
        (lambda x: (jnp.maximum(*quarters(x)[:2]),), {"slice", "max"}),
    ):
        simpler = _folding.folded(jax.make_jaxpr(fn)(X[:2]))
        np.testing.assert_array_equal(simpler(X[:2])[0], fn(X[:2])[0])
        assert _jaxpr.primitives(jax.make_jaxpr(simpler)(X[:2])) == left


# Families of reference networks, small: name → (shape of an example, model)
ONNX_NETWORKS = (
    "mlp:12", "convnet:4", "characters:8,8", "vgg8:0.1", "resnet20:0.25", "mobilenetv2:0.25", "shufflenetv1:0.6",
    "shufflenetv2:0.5", "wrn10-1", "vit2-4:0.25", "convnet:6, pruned", "linen, pruned", "transformer",
)  # fmt: skip


@needs_onnx
@pytest.mark.parametrize("name", ONNX_NETWORKS)
def test_onnx_runtime_computes_the_same_at_any_batch_size(tmp_path, name):
    import onnxruntime

    if name == "transformer":
        config = models.TransformerConfig(vocabulary=31, width=16, layers=2, heads=2, hidden=16)
        model = models.build_transformer(config, jax.random.key(0))
        x = {"tokens": np.random.default_rng(0).integers(0, 31, (256, 6)).astype(np.int32)}
    else:
        model, x = made(name), X
    export.onnx(tmp_path / "m.onnx", model, jax.tree.map(lambda a: a[:3], x))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for size in (1, 7, 256):
        batch = jax.tree.map(lambda a, n=size: a[:n], x)
        (found,) = session.run(None, dict(zip(names, jax.tree.leaves(batch), strict=True)))
        expected = run(model, batch)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1, np.abs(expected).max()))


def normalised(x, axis=-1, of=lambda x: x, least=0.0, turned=lambda mean: mean):
    mean, squares = x.mean(axis, keepdims=True), jnp.square(of(x)).mean(axis, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.maximum(least, squares - jnp.square(mean)) + 1e-6)
    return (x - turned(mean)) * (inverse * jnp.arange(1.0, 5)) + jnp.arange(4.0)


def powers(x, axis=-1):
    powers = jnp.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def curve(x, factor):
    return x * (0.5 * (1 + jnp.tanh(factor * (x + 0.044715 * x**3))))


@needs_onnx
def test_layer_norm_softmax_gelu_and_products_are_one_operation_each(tmp_path):
    """What looks like them and is something else stays as it is; export.onnx compares the outputs of both."""
    import onnx

    same = [
        normalised,
        jax.nn.softmax,
        lambda x: curve(x, np.sqrt(2 / np.pi)),
        lambda x: jnp.einsum("btd,dhk->bthk", x, np.ones((4, 2, 3), "f4")),
    ]
    other = [
        lambda x: normalised(x, axis=1), lambda x: normalised(x, of=jnp.exp), lambda x: normalised(x, least=0.5),
        lambda x: normalised(x, turned=lambda mean: mean.reshape(mean.shape[0], 1, 4)),
        lambda x: powers(x, axis=1), lambda x: curve(x, 0.7),
        lambda x: jnp.einsum("btd,sd->bts", x, np.ones((5, 4), "f4")),
    ]  # fmt: skip
    x = np.random.default_rng(0).normal(size=(3, 4, 4)).astype("f4")
    for functions, expected in ((same, [1, 1, 1, 1]), (other, [0, 0, 0, 0])):
        model = models.from_function(lambda _, x, functions=functions: [f(x) for f in functions], {})
        export.onnx(tmp_path / "m.onnx", model, x)
        used = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
        kinds = ["LayerNormalization", "Softmax", "Gelu", "MatMul"]
        assert [used.count(kind) for kind in kinds] == expected
        assert ("Einsum" in used) == (functions is other)


def attended(x, groups=1, over="k", scale=0.7, swapped=""):
    """Attention of two heads with some groups of queries each; scores are normalised over the axis ``over``.

    The axes of heads and groups change places in what ``swapped`` names, "queries" or "outputs".
    """
    kernels = np.random.default_rng(1).normal(size=(3, 4, 2 * groups, 3)).astype("f4")
    bias = np.arange(6 * groups, dtype="f4").reshape(2 * groups, 3) / 10
    shape = (groups, 2) if swapped == "queries" else (2, groups)
    query = (jnp.einsum("btd,dhc->bthc", x, kernels[0]) + bias).reshape(*x.shape[:2], *shape, 3)
    key, value = (jnp.einsum("btd,dhc->bthc", x, k[:, :2]) for k in kernels[1:])
    axes = "bqghc" if swapped == "queries" else "bqhgc"
    scores = scale * jnp.einsum(f"{axes},bkhc->bhgqk", query, key)
    weights = jax.nn.softmax(scores, axis="bhgqk".index(over))
    mixed = jnp.einsum("bhgqk,bkhc->bqghc" if swapped == "outputs" else "bhgqk,bkhc->bqhgc", weights, value)
    return mixed.reshape(*x.shape[:2], -1)


def masked(x):
    return jax.nn.dot_product_attention(x[:, :, None], x[:, :, None], x[:, :, None], is_causal=True)


@needs_onnx
def test_attention_is_one_operation(tmp_path):
    """Other sums of the same kind, and attention with a mask, are not."""
    import onnx

    x = np.random.default_rng(0).normal(size=(3, 4, 4)).astype("f4")
    same = attended, lambda x: attended(x, groups=3), lambda x: attended(x, scale=1.0)
    swapped = [partial(attended, groups=3, swapped=what) for what in ("queries", "outputs")]
    other = lambda x: attended(x, over="q"), *swapped, masked
    for functions, expected in ((same, 3), (other, 0)):
        model = models.from_function(lambda _, x, functions=functions: [f(x) for f in functions], {})
        export.onnx(tmp_path / "m.onnx", model, x)
        used = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
        assert used.count("Attention") == expected


@needs_onnx
def test_a_bias_is_added_before_heads_are_parted_and_no_shape_is_left_and_taken_again(tmp_path):
    import onnx

    x = np.random.default_rng(0).normal(size=(3, 4, 4)).astype("f4")
    kernel, bias = np.ones((4, 2, 3), "f4"), np.arange(6, dtype="f4").reshape(2, 3)
    model = models.from_function(
        lambda _, x: (
            (jnp.einsum("btd,dhc->bthc", x, kernel) + bias).reshape(3, 4, 6) @ np.ones((6, 2), "f4") + 1
        ),
        {},
    )
    with pytest.warns(UserWarning, match="takes batches of the shapes of x only"):
        export.onnx(tmp_path / "m.onnx", model, x)
    used = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert [kind for kind in used if kind != "Identity"] == ["MatMul", "Add", "MatMul", "Add"]


def test_the_programs_of_the_guide_run(tmp_path, monkeypatch, capsys):
    """All but those whose packages are not installed."""
    monkeypatch.chdir(tmp_path)
    programs = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    space = {}
    for program in programs:
        needed = {"export.onnx": HAS_ONNX, "import onnxruntime": HAS_ONNX} | {
            name: importlib.util.find_spec(name)
            for name in ("safetensors", "litert_converter", "ai_edge_litert")
        }
        if all(found for name, found in needed.items() if name in program):
            # The loader shows JAX's export by a name of its own, so the programs run one after another
            exec(compile(program, GUIDE.name, "exec"), space)
    assert space["written"]["labels"][:2] == ["0", "1"]
    assert space["logits"].shape == (1797, 10)
    assert "| accuracy |" in capsys.readouterr().out


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_a_state_that_is_returned_through_a_call_is_unchanged(tmp_path, wrap):
    inner = wrap(
        lambda params, state, x: (x * params + state["mean"], {"mean": jax.lax.stop_gradient(state["mean"])})
    )
    model = models.Model(
        lambda params, state, x, *, key=None: inner(params, state, x), jnp.ones(2), {"mean": jnp.ones(2)}
    )
    export.stablehlo(tmp_path / "a.model", model, jnp.ones((1, 2)))
    changing = model.replace(apply_fn=lambda params, state, x, *, key=None: (x, {"mean": state["mean"] + 1}))
    with pytest.raises(ValueError, match="changes the state at"):
        export.stablehlo(tmp_path / "b.model", changing, jnp.ones((1, 2)))
    keyed = models.Model(lambda params, state, x, *, key=None: (x, state), (), jax.random.key(0))
    with pytest.raises(ValueError, match="is a random key, which a file cannot hold"):
        export.stablehlo(tmp_path / "b.model", keyed, jnp.ones((1, 2)))


def test_a_saved_model_that_can_be_trained_is_not_replaced(tmp_path):
    model, x = models.from_function(lambda p, x: x * p, jnp.ones(2)), jnp.ones((1, 2))
    models.save(tmp_path / "a.model", model, x)
    with pytest.raises(ValueError, match="is a saved model that can be trained"):
        export.stablehlo(tmp_path / "a.model", model, x)
    assert (
        jax.grad(lambda m: models.load(tmp_path / "a.model").replace(params=m)(x).sum())(jnp.ones(2)).sum()
        == 2
    )

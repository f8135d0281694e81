"""Weights of transformers: its logits, its files in both directions, and damaged files."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.make_transformers import CONFIGS, MASK, TOKENS, draw

from distill_jax import models
from distill_jax.models import TransformerConfig

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("transformers.json").read_text())
WIDE = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16, "I32": np.int32}


def write(path, arrays, kind="F32"):
    """A file of this format, written without the library."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        part = np.ascontiguousarray(array).astype(WIDE[kind]).tobytes()
        header[name] = {
            "dtype": kind,
            "shape": array.shape,
            "data_offsets": [len(data), len(data) + len(part)],
        }
        data += part
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def parse(path):
    """The tensors of a file, read without the library."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    found = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        found[name] = np.frombuffer(data[begin:end], WIDE[entry["dtype"]]).reshape(entry["shape"])
    return found


def drawn(kind):
    return {name: draw(name, tuple(shape)) for name, shape in GOLDEN[kind]["tensors"].items()}


def directory(path, kind, arrays=None, dtype="F32", **entries):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIGS[kind] | entries))
    write(path / "model.safetensors", drawn(kind) if arrays is None else arrays, dtype)
    return path


@pytest.mark.parametrize("kind", GOLDEN)
def test_logits_are_those_of_transformers_and_the_weights_come_back(kind, tmp_path):
    model = models.load_pretrained(directory(tmp_path / "theirs", kind))
    logits = jax.jit(lambda model: model({"tokens": TOKENS, "segments": MASK}))(model)
    np.testing.assert_allclose(logits[MASK == 1], GOLDEN[kind]["logits"], atol=1e-4)
    models.save_pretrained(tmp_path / "ours", model, entries={"eos_token_id": 7})
    written = parse(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == GOLDEN[kind]["tensors"].keys()
    for name, array in drawn(kind).items():
        np.testing.assert_array_equal(written[name], array)
    description = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (description["model_type"], description["eos_token_id"]) == (CONFIGS[kind]["model_type"], 7)
    for name in CONFIGS[kind].keys() & description.keys() - {"head_dim"}:
        assert description[name] == CONFIGS[kind][name]
    again = models.load_pretrained(tmp_path / "ours")
    assert again.apply_fn == model.apply_fn


def test_several_files_and_bfloat16(tmp_path):
    model = models.load_pretrained(directory(tmp_path / "theirs", "qwen3"), dtype=jnp.bfloat16)
    models.save_pretrained(tmp_path / "ours", model, shard_bytes=700)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 2 * sum(x.size for x in jax.tree.leaves(model.params))
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, file in index["weight_map"].items():
        assert parse(tmp_path / "ours" / file)[name].dtype == ml_dtypes.bfloat16
    again = models.load_pretrained(tmp_path / "ours")
    assert {x.dtype for x in jax.tree.leaves(again.params)} == {jnp.dtype(jnp.bfloat16)}
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    (tmp_path / "ours" / files[1]).unlink()
    with pytest.raises(ValueError, match=f"{files[1]} does not exist"):
        models.load_pretrained(tmp_path / "ours")


def test_files_of_a_model_without_its_head_and_with_buffers(tmp_path):
    """The names of GPT-2's own files: without the prefix, with the causal mask."""
    arrays = {name.removeprefix("transformer."): array for name, array in drawn("gpt2").items()}
    arrays["h.0.attn.bias"] = np.tri(8)[None, None]
    arrays["lm_head.weight"] = arrays["wte.weight"]
    plain = models.load_pretrained(directory(tmp_path / "plain", "gpt2", arrays))
    whole = models.load_pretrained(directory(tmp_path / "whole", "gpt2"))
    jax.tree.map(np.testing.assert_array_equal, plain.params, whole.params)


def test_a_smaller_student_is_saved_with_its_sizes(tmp_path):
    model = models.load_pretrained(directory(tmp_path / "teacher", "llama"))
    layers = jax.tree.map(lambda x: x, model.params["layers"][1:])
    for name in ("gate", "up"):
        layers[0]["feed_forward"][name]["kernel"] = layers[0]["feed_forward"][name]["kernel"][:, ::2]
    layers[0]["feed_forward"]["down"]["kernel"] = layers[0]["feed_forward"]["down"]["kernel"][::2]
    student = model.replace(params=model.params | {"layers": layers})
    models.save_pretrained(tmp_path / "student", student)
    config = models.load_pretrained(tmp_path / "student").apply_fn.config
    assert (config.layers, config.hidden) == (1, 5)
    uneven = model.replace(params=model.params | {"layers": [*layers, *model.params["layers"]]})
    with pytest.raises(
        ValueError, match=r"layers.1.feed_forward.down.kernel is float32 \(10, 12\), but .* alike"
    ):
        models.save_pretrained(tmp_path / "uneven", uneven)
    with pytest.raises(ValueError, match="holds a model already"):
        models.save_pretrained(tmp_path / "student", student)


def test_a_network_that_transformers_has_not_is_refused(tmp_path):
    config = TransformerConfig(vocabulary=5, width=4, layers=1, heads=1, hidden=4, feed_forward="gelu")
    with pytest.raises(
        ValueError, match=r"no known architecture of transformers \(llama, qwen2, qwen3, gpt2\)"
    ):
        models.save_pretrained(tmp_path / "x", models.build_transformer(config, jax.random.key(0)))


def changed(change):
    """A damaged directory: a function of (directory, tensors)."""

    def make(path):
        arrays = drawn("qwen3")
        directory(path, "qwen3")
        change(path, arrays)
        return path

    return make


def rewrite(edit, kind="F32"):
    def change(path, arrays):
        edit(arrays)
        write(path / "model.safetensors", arrays, kind)

    return changed(change)


def cut(count):
    return changed(
        lambda path, _: (path / "model.safetensors").write_bytes(
            (path / "model.safetensors").read_bytes()[:count]
        )
    )


def entry(**entries):
    return changed(
        lambda path, _: (path / "config.json").write_text(
            json.dumps({k: v for k, v in (CONFIGS["qwen3"] | entries).items() if v is not ...})
        )
    )


def header(old, new):
    def change(path, _):
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes().replace(old, new, 1))

    return changed(change)


K = "model.layers.1.self_attn.k_proj.weight"
DAMAGED = {
    "truncated": (cut(-8), r"model.safetensors is truncated: its tensor model\.\S+ ends at byte \d+, but"),
    "without its header": (cut(100), "model.safetensors is truncated, or no safetensors file"),
    "empty": (cut(0), "model.safetensors is truncated, or no safetensors file"),
    "header no JSON": (header(b'{"__m', b'["__m'), "model.safetensors is damaged: it holds no JSON object"),
    "unknown type": (header(b'"F32"', b'"F31"'), r"tensor \S+ of \S+model.safetensors has the type F31"),
    "wrong bytes": (header(b'"F32"', b'"F64"'), r"tensor \S+ of \S+model.safetensors has \d+ bytes, but F64"),
    "no offsets": (header(b"data_offsets", b"data_offzets"), "model.safetensors describes its tensor .* wrongly"),
    "one missing": (rewrite(lambda a: a.pop(K)), f"lacks 1 tensor: {K}$"),
    "one too many": (rewrite(lambda a: a.update(x=a[K])), "holds, beyond what config.json says, 1 tensor: model.x$"),
    "another head": (rewrite(lambda a: a.update({"lm_head.weight": a[K]})), "1 tensor: lm_head.weight$"),
    "another shape": (
        rewrite(lambda a: a.update({K: a[K][:-1]})),
        rf"tensor {K} of \S+model.safetensors has shape \(11, 12\), expected \(12, 12\)",
    ),
    "integers": (rewrite(lambda a: None, "I32"), r"tensor model\S+ of \S+model.safetensors holds int32"),
    "float16": (rewrite(lambda a: None, "F16"), "dtype: tensor .* is float16, .* say into which"),
    "no config": (changed(lambda path, _: (path / "config.json").unlink()), "config.json does not exist"),
    "config no JSON": (changed(lambda path, _: (path / "config.json").write_text("{")), "config.json is damaged"),
    "another model": (entry(model_type="mamba"), "config.json describes a model of type 'mamba': known are llama"),
    "no size": (entry(hidden_size=...), "config.json lacks 'hidden_size'"),
    "a size of text": (entry(hidden_size="8"), "config.json: width must be an integer"),
    "another activation": (entry(hidden_act="relu"), "config.json: hidden_act is 'relu': known here is 'silu'"),
    "another rope": (entry(rope_parameters={"rope_type": "yarn"}), "config.json: rope_type is 'yarn'"),
    "rope of text": (entry(rope_parameters="yarn"), "config.json: "),
    "a window": (entry(use_sliding_window=True), "config.json: use_sliding_window is True"),
    "no weights": (
        changed(lambda path, _: (path / "model.safetensors").unlink()),
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "no directory": (lambda path: path, "is no directory"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused_in_one_line(what, tmp_path):
    damage, message = DAMAGED[what]
    with pytest.raises(ValueError, match=message) as error:
        models.load_pretrained(damage(tmp_path / "model"))
    assert "\n" not in str(error.value)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    path = directory(tmp_path / "model", "qwen3")
    shutil.move(path / "model.safetensors", path / "model-00001-of-00001.safetensors")
    index = path / "model.safetensors.index.json"
    for text, message in (
        ("{}", "has no weight_map"),
        (
            '{"weight_map": {"x": "model-00001-of-00001.safetensors"}}',
            "lacks tensor x, which model.safetensors.index",
        ),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            models.load_pretrained(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"entries": [1]}, "entries must be a dict"),
        ({"entries": {"x": np.nan}}, "x is nan, which JSON cannot hold"),
        ({"path": "missing/model"}, "does not exist: make it first"),
    ],
)
def test_saving_refuses(options, message, tmp_path):
    config = TransformerConfig(vocabulary=5, width=4, layers=1, heads=1, hidden=4)
    model = models.build_transformer(config, jax.random.key(0))
    path = tmp_path / options.pop("path", "model")
    with pytest.raises(ValueError, match=message):
        models.save_pretrained(path, model, **options)
    assert not path.exists()

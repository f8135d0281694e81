"""Teachers, ensembles, and the soft-label store under every kind of damage."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import _checks, models, teachers
from distill_jax.models import Model

IDS = np.array([70, 3, 55, 12, 9, 1, 400, 8, 31, 2])
LOGITS = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32) * 5
MADE_OF = {"teacher": "t1", "preprocessing": "x/255", "data": "d1"}


def write(path, **changes):
    options = {"fingerprint": MADE_OF, "shard_rows": 3} | changes
    return teachers.write_labels(path, IDS, lambda rows: LOGITS[rows], **options)


def test_labels_are_found_by_id_in_any_order(tmp_path):
    write(tmp_path / "s")
    store = teachers.open_labels(tmp_path / "s", expect=MADE_OF)
    np.testing.assert_array_equal(store[IDS], LOGITS)
    shuffle = np.random.default_rng(1).permutation(10)
    np.testing.assert_array_equal(store[IDS[shuffle]], LOGITS[shuffle])
    np.testing.assert_array_equal(store[[400, 400, 3]], LOGITS[[6, 6, 1]])
    assert (store.count, store.classes) == (10, 4)
    assert isinstance(store._shards[0], np.memmap)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("bfloat16", 1 / 256), ("float16", 1e-3)])
def test_dtypes(tmp_path, dtype, tolerance):
    store = write(tmp_path / "s", dtype=dtype)
    assert store[IDS].dtype == np.float32
    np.testing.assert_allclose(store[IDS], LOGITS, rtol=tolerance)
    size = sum(file.stat().st_size for file in (tmp_path / "s").glob("*.bin"))
    assert size == 10 * 4 * (4 if dtype == "float32" else 2)


def test_unknown_ids_are_an_error(tmp_path):
    store = write(tmp_path / "s")
    for ids in ([3, 4], [401], [-1]):
        with pytest.raises(KeyError, match=r"1 of . examples have no soft label"):
            store[ids]


def test_writing_resumes_where_it_was_interrupted(tmp_path):
    calls = []

    def interrupted(rows):
        calls.append(list(rows))
        if len(calls) == 3:
            raise RuntimeError("killed")
        return LOGITS[rows]

    with pytest.raises(RuntimeError):
        teachers.write_labels(tmp_path / "s", IDS, interrupted, fingerprint=MADE_OF, shard_rows=3)
    with pytest.raises(ValueError, match="holds 6 of 10 soft labels: its writing was interrupted"):
        teachers.open_labels(tmp_path / "s")
    del calls[:]
    progress = []
    teachers.write_labels(
        tmp_path / "s", IDS, lambda rows: calls.append(list(rows)) or LOGITS[rows],
        fingerprint=MADE_OF, shard_rows=3, progress=lambda *x: progress.append(x),
    )  # fmt: skip
    assert len(calls) == 2  # only what was missing
    assert progress == [(9, 10), (10, 10)]
    np.testing.assert_array_equal(teachers.open_labels(tmp_path / "s")[IDS], LOGITS)
    write(tmp_path / "s")
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": {**MADE_OF, "teacher": "t2"}}, "teacher is t1, expected t2"),
        ({"fingerprint": {**MADE_OF, "preprocessing": "x"}}, "preprocessing is x/255, expected x"),
        ({"dtype": "float16"}, "dtype is float32, expected float16"),
    ],
)
def test_other_labels_are_refused_by_name(tmp_path, changes, message):
    write(tmp_path / "s")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "s", **changes)
    with pytest.raises(ValueError, match="data is d1, expected d2"):
        teachers.open_labels(tmp_path / "s", expect={"data": "d2"})
    np.testing.assert_array_equal(teachers.open_labels(tmp_path / "s")[IDS], LOGITS)


def test_other_ids_are_refused(tmp_path):
    write(tmp_path / "s")
    with pytest.raises(ValueError, match=r"ids is .*, expected"):
        teachers.write_labels(
            tmp_path / "s", IDS + 1, lambda rows: LOGITS[rows], fingerprint=MADE_OF, shard_rows=3
        )


@pytest.mark.parametrize("victim", ["00001.bin", "ids.npy"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_found_and_named(tmp_path, victim, damage):
    write(tmp_path / "s")
    file = tmp_path / "s" / victim
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-4])
    else:
        file.unlink()
    for reading in (teachers.open_labels, write):
        with pytest.raises(ValueError, match=f"damaged or missing in .*: {victim}"):
            reading(tmp_path / "s")


def test_a_changed_manifest_is_found(tmp_path):
    write(tmp_path / "s")
    manifest = tmp_path / "s" / "store.json"
    original = manifest.read_text()
    for change in (('"classes": 4', '"classes": 2'), ('"shard_rows": 3', '"shard_rows": 4')):
        assert change[0] in original
        manifest.write_text(original.replace(*change))
        with pytest.raises(ValueError, match="damaged or missing"):
            teachers.open_labels(tmp_path / "s")


def test_a_kill_before_the_first_manifest_is_no_obstacle(tmp_path):
    write(tmp_path / "first")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "ids.npy").write_bytes((tmp_path / "first" / "ids.npy").read_bytes())
    (tmp_path / "s" / ".store.json.tmp").write_text("{")
    write(tmp_path / "s")
    np.testing.assert_array_equal(teachers.open_labels(tmp_path / "s")[IDS], LOGITS)


def test_a_broken_manifest_and_a_foreign_directory_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no soft-label store"):
        teachers.open_labels(tmp_path / "nothing")
    write(tmp_path / "s")
    (tmp_path / "s" / "store.json").write_text("{")
    with pytest.raises(ValueError, match=r"store\.json cannot be read"):
        teachers.open_labels(tmp_path / "s")
    (tmp_path / "ids").mkdir()
    np.save(tmp_path / "ids" / "ids.npy", np.arange(3))
    with pytest.raises(ValueError, match=r"holds an ids\.npy of something else"):
        write(tmp_path / "ids")
    np.testing.assert_array_equal(np.load(tmp_path / "ids" / "ids.npy"), np.arange(3))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no label store"):
        write(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("logits", "dtype", "message"),
    [
        (np.full((10, 4), np.nan), "float32", "NaN, infinite, or too large for float32"),
        (np.full((10, 4), 1e5), "float16", "too large for float16"),
        (np.zeros(10), "float32", "expected logits"),
    ],
)
def test_unusable_logits_are_refused(tmp_path, logits, dtype, message):
    with pytest.raises(ValueError, match=message):
        teachers.write_labels(
            tmp_path / "s", IDS, lambda rows: logits[rows], fingerprint=MADE_OF, dtype=dtype
        )


def test_masked_classes_are_stored(tmp_path):
    logits = LOGITS.copy()
    logits[:, 2] = -np.inf
    store = teachers.write_labels(tmp_path / "s", IDS, lambda rows: logits[rows], fingerprint={})
    np.testing.assert_array_equal(store[IDS], logits)


def test_repeated_ids_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ids must be a non-empty list without repetition"):
        teachers.write_labels(tmp_path / "s", [1, 2, 1], lambda rows: LOGITS[rows], fingerprint={})


def test_labels_from_another_framework(tmp_path):
    log_probabilities = np.log(np.full((10, 4), 0.25))
    teachers.import_labels(tmp_path / "s", IDS, log_probabilities, source="torch net v1", data="d1")
    store = teachers.open_labels(tmp_path / "s", expect={"data": "d1"})
    np.testing.assert_allclose(store[IDS], log_probabilities, rtol=1e-6)
    assert store.fingerprint["teacher"].startswith("torch net v1 (")
    with pytest.raises(ValueError, match="teacher is torch net v1"):
        teachers.import_labels(tmp_path / "s", IDS, LOGITS, source="torch net v1", data="d1")
    with pytest.raises(ValueError, match=r"expected logits \[10, classes\], got \(9, 4\)"):
        teachers.import_labels(tmp_path / "t", IDS, LOGITS[:9], source="x", data="d1")


def test_probabilities_in_the_place_of_logits_warn_once(tmp_path, monkeypatch):
    monkeypatch.setattr(_checks, "_warned", set())
    probabilities = np.asarray(jax.nn.softmax(LOGITS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in "ab":
            teachers.import_labels(tmp_path / name, IDS, probabilities, source="net", data="d")
        write(tmp_path / "c")
    assert len(caught) == 1
    assert "the labels to store look like probabilities" in str(caught[0].message)
    assert "take the logarithm" in str(caught[0].message)
    assert caught[0].filename == __file__
    np.testing.assert_array_equal(teachers.open_labels(tmp_path / "a")[IDS], probabilities)


def scaled(params, state, x, *, key=None):
    assert key is None, "a teacher runs in evaluation mode"
    return x * params, state


def scaling(by):
    return Model(scaled, jnp.float32(by), {})


def test_a_teacher_is_a_function_from_batch_to_batch():
    batch = {"image": jnp.arange(6.0).reshape(2, 3), "label": jnp.array([0, 1])}
    labelled = jax.jit(teachers.label)(scaling(2.0), batch)
    np.testing.assert_array_equal(labelled["teacher"], batch["image"] * 2)
    np.testing.assert_array_equal(labelled["label"], batch["label"])
    assert "teacher" not in batch
    gradient = jax.grad(lambda teacher: teachers.label(teacher, batch)["teacher"].sum())(scaling(2.0))
    assert gradient.params == 0


def test_several_teachers_label_a_batch():
    batch = {"image": jnp.arange(6.0).reshape(2, 3), "label": jnp.array([0, 1])}
    labelled = jax.jit(teachers.label_each)([scaling(2.0), scaling(-1.0)], batch)
    first, second = labelled["teacher"]["logits"]
    np.testing.assert_array_equal(first, batch["image"] * 2)
    np.testing.assert_array_equal(second, -batch["image"])

    def total(each):
        return sum(x.sum() for x in teachers.label_each(each, batch)["teacher"]["logits"])

    gradients = jax.grad(total)([scaling(2.0), scaling(-1.0)])
    assert [each.params for each in gradients] == [0, 0]
    with pytest.raises(ValueError, match="at least one"):
        teachers.label_each([], batch)


def test_an_ensemble_averages_probabilities():
    x, factors = jnp.asarray(LOGITS), (1.0, -0.5, 0.1)
    ensemble = teachers.ensemble(*map(scaling, factors))
    expected = np.mean([jax.nn.softmax(x * t) for t in factors], 0)
    np.testing.assert_allclose(np.exp(ensemble(x)), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(models.predict(ensemble, x, batch_size=4)), expected, rtol=1e-5)
    labelled = teachers.label(ensemble, {"image": x})
    np.testing.assert_allclose(np.exp(labelled["teacher"]), expected, rtol=1e-5)
    assert ensemble.apply_fn == teachers.ensemble(*map(scaling, (2.0, 3.0, 4.0))).apply_fn
    with pytest.raises(ValueError, match="at least one"):
        teachers.ensemble()


def test_fingerprint_sees_values_shapes_dtypes_and_names():
    tree = {"a": np.zeros((2, 3)), "b": np.ones(2, np.int32)}
    base = teachers.fingerprint(tree)
    assert base == teachers.fingerprint({"b": jnp.ones(2, jnp.int32), "a": np.zeros((2, 3))})
    changed = np.zeros((2, 3))
    changed[1, 2] = 1e-300
    for other in (
        {**tree, "a": changed},
        {**tree, "a": np.zeros((3, 2))},
        {**tree, "b": np.ones(2, np.int64)},
        {"a": tree["a"], "c": tree["b"]},
    ):
        assert teachers.fingerprint(other) != base
    assert json.dumps(base)

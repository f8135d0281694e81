"""Teachers, ensembles, and the soft-label store under every kind of damage."""

import json
import os
import shutil
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import environment_store, flips_store, many_labels

from distill_jax import _checks, models, teachers
from distill_jax.models import Model

IDS = np.array([70, 3, 55, 12, 9, 1, 400, 8, 31, 2])
LOGITS = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32) * 5
MADE_OF = {"teacher": "t1", "preprocessing": "x/255", "data": "d1"}


def write(path, **changes):
    options = {"outputs": lambda rows: LOGITS[rows], "fingerprint": MADE_OF, "shard_rows": 3} | changes
    return teachers.write_labels(path, IDS, **options)


def test_labels_are_found_by_id_in_any_order(tmp_path):
    write(tmp_path / "s")
    store = teachers.open_labels(tmp_path / "s", expect=MADE_OF)
    np.testing.assert_array_equal(store[IDS], LOGITS)
    shuffle = np.random.default_rng(1).permutation(10)
    np.testing.assert_array_equal(store[IDS[shuffle]], LOGITS[shuffle])
    np.testing.assert_array_equal(store[[400, 400, 3]], LOGITS[[6, 6, 1]])
    assert (store.count, store.classes) == (10, 4)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0), ("bfloat16", 1 / 256), ("float16", 1e-3)])
def test_dtypes(tmp_path, dtype, tolerance):
    store = write(tmp_path / "s", dtype=dtype)
    assert store[IDS].dtype == np.float32
    np.testing.assert_allclose(store[IDS], LOGITS, rtol=tolerance)
    size = sum(file.stat().st_size for file in (tmp_path / "s").glob("*.bin"))
    assert size == 10 * 4 * (4 if dtype == "float32" else 2) + 10 * 8 + 4 * 32  # labels, ids, checksums


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


@pytest.mark.parametrize("victim", ["00001.bin", "ids.bin"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "swap"])
def test_damage_is_found_and_named_and_the_rest_is_kept(tmp_path, victim, damage):
    write(tmp_path / "s")
    file = tmp_path / "s" / victim
    content = file.read_bytes()
    flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
    other = (tmp_path / "s" / "00000.bin").read_bytes()
    file.write_bytes({"flip": flipped, "truncate": content[:-4], "swap": other}[damage])
    for reading in (teachers.open_labels, write):
        with pytest.raises(ValueError, match=f"damaged in .*: {victim}. Delete these files"):
            reading(tmp_path / "s")
    file.unlink()
    with pytest.raises(
        ValueError, match=rf"its writing was interrupted, or files were deleted \(no {victim}\)"
    ):
        teachers.open_labels(tmp_path / "s")
    assert write(tmp_path / "s").count == 10
    assert file.read_bytes() == content


@pytest.mark.parametrize("case", ["full_files", "two_processes", "killed"])
def test_stores_and_caches_where_the_system_refuses(tmp_path, case):
    """``python tests/faults/environment_store.py`` has more cases and kills."""
    environment_store.run(getattr(environment_store, case), tmp_path, kills=3)


def test_thousands_of_files_under_256_descriptors(tmp_path, monkeypatch):
    """``python tests/faults/many_labels.py`` does it with ten million labels."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # 6,000 calls may be slow, and nothing is lost here
    found = many_labels.measure(tmp_path / "s", count=8999, shard_rows=3, asked=20_000)
    assert found["files"] == 3002


def test_a_store_that_changes_while_it_is_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = write("s")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(store[IDS], LOGITS)
    shard = tmp_path / "s" / "00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:20])
    with pytest.raises(ValueError, match=r"00001\.bin is damaged: it has become shorter"):
        store[IDS]
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001\.bin cannot be read: No such file"):
        store[IDS]
    shutil.rmtree(tmp_path / "s")
    write(tmp_path / "s", outputs=lambda rows: LOGITS[rows] + 1)
    with pytest.raises(ValueError, match="s was deleted or written anew since it was opened: open it again"):
        store[IDS]


def test_no_damage_of_stores_caches_and_saved_models_is_silent(tmp_path):
    """``python tests/faults/flips_store.py`` tries thousands."""
    tally = flips_store.run(tmp_path, flips=40)
    assert not tally.bad, str(tally)
    for (what, _), counts in tally.counts.items():
        assert counts["found"] > counts.total() / 2, what


def test_a_file_of_another_store_is_damage(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", outputs=lambda rows: LOGITS[rows] + 1)
    for name in ("00001.bin", "store.json"):
        write(tmp_path / "a")
        kept = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(ValueError, match=r"damaged in .*: 0000[01]\.bin"):
            teachers.open_labels(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(kept)


def test_a_changed_manifest_is_found(tmp_path):
    write(tmp_path / "s")
    manifest = tmp_path / "s" / "store.json"
    original = manifest.read_text()
    for change in (
        ('"classes": 4', '"classes": 2'),
        ("float32", "float16"),
        ("{", "{ "),
        (original, "[" * 99999),
    ):
        assert change[0] in original
        manifest.write_text(original.replace(*change))
        for reading in (teachers.open_labels, write):
            with pytest.raises(ValueError, match=r"store\.json is damaged, or belongs to another program"):
                reading(tmp_path / "s")
    manifest.write_text(original.replace('"format": 2', '"format": 1'))
    with pytest.raises(
        ValueError, match=r"by an earlier version .* write the labels again into another directory"
    ):
        teachers.open_labels(tmp_path / "s")


def test_a_kill_before_the_first_manifest_is_no_obstacle(tmp_path):
    (tmp_path / "s").mkdir()
    for left in (".store.json.01234567.tmp", ".lock"):
        (tmp_path / "s" / left).write_text("{")
    write(tmp_path / "s")
    np.testing.assert_array_equal(teachers.open_labels(tmp_path / "s")[IDS], LOGITS)
    names = {file.name for file in (tmp_path / "s").iterdir()}
    assert names == {"store.json", "ids.bin", *(f"{i:05d}.bin" for i in range(4))}


def test_a_directory_without_a_store_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no soft-label store"):
        teachers.open_labels(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".thesis.tmp").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no label store"):
        write(tmp_path / "full")
    for file in (tmp_path / "full" / ".thesis.tmp", tmp_path / "full" / ".thesis.tmp" / "below"):
        with pytest.raises(ValueError, match=r"path must name a directory, got .* is a file"):
            write(file)
    assert (tmp_path / "full" / ".thesis.tmp").read_text() == "mine"


def test_the_second_writer_is_refused(tmp_path):
    """In another process, and within this one; a killed writer leaves no lock."""
    script = f"""
from distill_jax import teachers
import numpy as np, sys, time
def wait(rows):
    print("at work", flush=True)
    time.sleep(60)
teachers.write_labels({str(tmp_path / "s")!r}, range(10), wait, fingerprint={{}})
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "at work\n"
        with pytest.raises(ValueError, match=r"another process is writing in .*: wait for it"):
            write(tmp_path / "s")
        other.kill()

    def logits(rows):
        with pytest.raises(ValueError, match="another process is writing"):
            write(tmp_path / "s")
        return LOGITS[rows]

    teachers.write_labels(tmp_path / "s", IDS, logits, fingerprint=MADE_OF, shard_rows=3)
    np.testing.assert_array_equal(write(tmp_path / "s")[IDS], LOGITS)


@pytest.mark.parametrize(
    ("logits", "dtype", "message"),
    [
        (np.full((10, 4), np.nan), "float32", "NaN, infinite, or too large for float32"),
        (np.full((10, 4), 1e5), "float16", "too large for float16"),
        (np.full((10, 4), -1e39), "float32", "too large for float32"),
        (np.full((10, 4), np.inf), "float32", "NaN, infinite"),
        (np.full((10, 4), -np.inf), "float32", "10 of 10 examples have no class"),
        (np.zeros(10), "float32", r"expected logits of shape \[10, classes\], got \(10,\)"),
        (np.zeros((10, 0)), "float32", r"expected logits of shape \[10, classes\], got \(10, 0\)"),
        (np.zeros((10, 4), complex), "float32", "must be real numbers, got dtype complex"),
        (np.zeros((10, 4), bool), "float32", "must be real numbers, got dtype bool"),
        (np.zeros((10, 4), [("a", float)]), "float32", "must be real numbers"),
        (np.zeros((10, 4), "m8[s]"), "float32", "must be real numbers"),
        (np.ma.masked_equal(np.eye(10, 4), 1), "float32", "got a masked array"),
    ],
)
def test_unusable_logits_are_refused(tmp_path, logits, dtype, message):
    with pytest.raises(ValueError, match=message):
        teachers.write_labels(
            tmp_path / "s", IDS, lambda rows: logits[rows], fingerprint=MADE_OF, dtype=dtype
        )
    assert list(tmp_path.glob("s/*")) == []


def test_integers_and_narrow_floats_are_logits(tmp_path):
    for i, given in enumerate((np.arange(40, dtype=np.int64), jnp.arange(40, dtype=jnp.bfloat16))):
        logits = given.reshape(10, 4)
        store = teachers.write_labels(tmp_path / str(i), IDS, lambda rows, x=logits: x[rows], fingerprint={})
        np.testing.assert_array_equal(store[IDS], np.arange(40).reshape(10, 4))


class NoArray:
    def __array__(self, *args, **options):
        raise RuntimeError("boom")


NO_IDS = {
    "floats": [1.7], "NaN": [np.nan], "complex": [1j], "bool": [True], "strings": ["1"], "None": None,
    "wide": np.array([2**63], np.uint64), "wider": [2**64], "time": np.array([1], "m8[s]"), "ragged": [[1], [1, 2]],
    "masked": np.ma.array([1, 2], mask=[0, 1]), "no array": NoArray(), "a set": {1, 2}, "objects": [object()],
}  # fmt: skip


@pytest.mark.parametrize("ids", NO_IDS.values(), ids=NO_IDS)
def test_what_is_no_id_is_refused(tmp_path, ids):
    store = write(tmp_path / "s")
    calls = [
        lambda: store[ids],
        lambda: teachers.write_labels(tmp_path / "t", ids, lambda rows: LOGITS[rows], fingerprint={}),
        lambda: teachers.import_labels(tmp_path / "t", ids, LOGITS[:1], source="s", data="d"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^ids must be .*integers.*, got") as error:
            call()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "t").exists()


def test_ids_of_any_shape(tmp_path):
    store = write(tmp_path / "s")
    assert store[[]].shape == (0, 4)
    np.testing.assert_array_equal(store[3], LOGITS[1])
    np.testing.assert_array_equal(store[np.reshape(IDS, (2, 5))], LOGITS.reshape(2, 5, 4))
    np.testing.assert_array_equal(store[jnp.asarray([3, 400])], LOGITS[[1, 6]])
    huge = write(tmp_path / "huge", shard_rows=10**30)  # one file
    np.testing.assert_array_equal(huge[IDS], LOGITS)
    with pytest.raises(ValueError, match="ids must be known, got a traced array"):
        jax.jit(lambda ids: store[ids])(IDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": {"teacher": 5}}, "fingerprint must map names to strings"),
        ({"fingerprint": {1: "t"}}, "fingerprint must map names to strings"),
        ({"fingerprint": "t1"}, "fingerprint must map names to strings, got str"),
        ({"fingerprint": {"teacher": {"name": "t"}}}, "fingerprint must map names to strings"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
        ({"dtype": np.float32}, "dtype must be one of"),
        ({"shard_rows": 2.5}, "shard_rows must be an integer of at least 1"),
        ({"shard_rows": 0}, "shard_rows must be an integer of at least 1"),
        ({"progress": None}, r"progress must be a function \(done, total\), got a NoneType"),
        ({"outputs": LOGITS}, r"outputs must be a function \(positions\), got a ndarray"),
        ({"path": None}, "path must name a directory, got None"),
        ({"path": "x" * 5000}, "path must name a directory, got PosixPath.*File name too long"),
        ({"path": "\ud800"}, "path must name a directory, got PosixPath"),
        ({"dtype": np.eye(3)}, "dtype must be one of"),
        ({"path": ""}, "path must name a directory, got ''"),
    ],
)
def test_malformed_arguments_are_refused(tmp_path, changes, message):
    arguments = {
        "path": tmp_path / "s", "ids": IDS, "outputs": lambda rows: LOGITS[rows], "fingerprint": MADE_OF,
    } | changes  # fmt: skip
    with pytest.raises(ValueError, match=message) as error:
        teachers.write_labels(**arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "s").exists()
    with pytest.raises(ValueError, match="expect must map names to strings"):
        teachers.open_labels(write(tmp_path / "t").path, expect={"data": 1})
    with pytest.raises(ValueError, match="source and data must map names to strings"):
        teachers.import_labels(tmp_path / "u", IDS, LOGITS, source=None, data="d")


def test_masked_classes_are_stored(tmp_path):
    logits = LOGITS.copy()
    logits[:, 2] = -np.inf
    store = teachers.write_labels(tmp_path / "s", IDS, lambda rows: logits[rows], fingerprint={})
    np.testing.assert_array_equal(store[IDS], logits)


def test_repeated_ids_are_refused(tmp_path):
    for ids in ([1, 2, 1], [], [[1, 2]], 1):
        with pytest.raises(ValueError, match="ids must be a non-empty list without repetition"):
            teachers.write_labels(tmp_path / "s", ids, lambda rows: LOGITS[rows], fingerprint={})


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
        {**tree, "d": None},
        {**tree, "d": ""},
    ):
        assert teachers.fingerprint(other) != base
    assert json.dumps(base)
    alike = [1, np.ones(1, int), "\x01", None, "", np.zeros(0, np.uint8), jax.random.key(1), np.uint8([1])]
    assert len({teachers.fingerprint(x) for x in alike}) == len(alike)
    assert teachers.fingerprint(np.eye(3)[:, ::2]) == teachers.fingerprint(np.eye(3)[:, ::2].copy())


@pytest.mark.parametrize(
    "leaf",
    [
        object(),
        np.array([None]),
        {1, 2},
        np.ma.masked_equal([1, 2], 1),
        np.zeros(2, [("a", float)]),
        2**70,
        LOGITS.sum,
    ],
    ids=["object", "array of objects", "set", "masked", "structured", "beyond int64", "function"],
)
def test_fingerprint_refuses_what_has_no_bytes(leaf):
    with pytest.raises(ValueError, match=r"^tree\['a'\]\[0\] is .*, whose bytes are no fingerprint") as error:
        teachers.fingerprint({"a": [leaf]})
    assert "\n" not in str(error.value)

"""The loop: validation, the best epoch, checkpoints, resume."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from distill_jax import _checks, train
from distill_jax.models import Model, build, from_function
from distill_jax.train.checkpoints import digest

RNG = np.random.default_rng(0)
DATA = {
    "image": RNG.normal(size=(50, 4, 4, 1)).astype(np.float32),
    "label": RNG.integers(0, 3, 50).astype(np.int32),
}
VALIDATION = {k: v[:13] for k, v in DATA.items()}


def run(epochs=4, learning_rate=1e-2, widths="mlp:8", stop_at=None, seed=3, **options):
    seen = options.pop("seen", [])
    model = build(widths, (4, 4, 1), 3, jax.random.key(0), dropout=0.3)
    tx = optax.adam(learning_rate)
    state = train.init_state(model, tx, jax.random.key(1))
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx))

    def on_epoch(number, figures):
        seen.append(number)
        if number == stop_at:
            raise KeyboardInterrupt

    options.setdefault("validate", train.make_validation(VALIDATION, batch_size=5))
    return train.fit(state, epoch, DATA, epochs=epochs, batch_size=8, seed=seed, on_epoch=on_epoch, **options)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_an_interrupted_run_ends_as_an_undisturbed_one(tmp_path, stop_at):
    expected = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop_at=stop_at, directory=tmp_path, save_seconds=0.0)
    seen = []
    result = run(directory=tmp_path, save_seconds=0.0, seen=seen)
    chex.assert_trees_all_equal(
        *[x.state._replace(key=jax.random.key_data(x.state.key)) for x in (result, expected)]
    )
    chex.assert_trees_all_equal(result.best, expected.best)
    assert result.history == expected.history
    assert seen == list(range(stop_at, 5))  # it went on from the checkpoint


def test_a_finished_run_is_read_back(tmp_path):
    expected = run(directory=tmp_path)
    again = run(directory=tmp_path, stop_at=99)
    chex.assert_trees_all_equal(again.model, expected.model)
    assert again.history == expected.history
    assert again.seconds == expected.seconds


def test_validation_counts_every_example_once():
    """13 examples in batches of 5: the last one is padded, and the padding does not count."""
    model = build("mlp:8", (4, 4, 1), 3, jax.random.key(0))
    figures = train.make_validation(VALIDATION, batch_size=5)(model)
    logits = model(VALIDATION["image"])
    log_q = np.asarray(jax.nn.log_softmax(logits))
    assert figures["validation_errors"] == (logits.argmax(-1) != VALIDATION["label"]).sum()
    expected = -log_q[np.arange(13), VALIDATION["label"]].mean()
    assert figures["validation_nll"] == pytest.approx(expected, rel=1e-5)


def test_errors_are_whole_numbers():
    label = np.zeros(96, np.int32)
    data = {"image": np.where(np.arange(96) < 29, -1.0, 1.0).astype(np.float32)[:, None], "label": label}
    model = from_function(lambda w, x: jnp.concatenate([x * w, -x * w], -1), jnp.float32(1.0))
    for size in (7, 31, 96):
        assert train.make_validation(data, batch_size=size)(model)["validation_errors"] == 29


def test_best_is_the_latest_epoch_of_fewest_validation_errors():
    result = run(epochs=12, learning_rate=0.3)
    errors = np.array(result.history["validation_errors"])
    best = np.flatnonzero(errors == errors.min())[-1] + 1
    expected = run(epochs=int(best), learning_rate=0.3).state
    chex.assert_trees_all_equal(result.best, expected.model)
    assert best < 12  # or this test shows nothing


def test_without_validation_the_best_epoch_is_the_last_also_after_a_resume(tmp_path):
    expected = run(validate=None)
    with pytest.raises(KeyboardInterrupt):
        run(validate=None, stop_at=2, directory=tmp_path, save_seconds=0.0)
    result = run(validate=None, directory=tmp_path)
    assert "validation_errors" not in result.history
    for model in (result.best, result.model, result.state.model):
        chex.assert_trees_all_equal(model, expected.state.model)


def test_order_is_a_function_of_seed_and_epoch():
    a = train.epoch_order(1, 2, 50, 8)
    np.testing.assert_array_equal(a, train.epoch_order(1, 2, 50, 8))
    assert a.shape == (6, 8)
    assert len(set(a.ravel())) == 48
    assert (a != train.epoch_order(1, 3, 50, 8)).any()
    assert (a != train.epoch_order(2, 2, 50, 8)).any()
    for size in (0, 51):
        with pytest.raises(ValueError, match="batch_size must be 1 to the number of training"):
            train.epoch_order(1, 2, 50, size)


def test_divergence_is_an_error_and_keeps_the_checkpoint(tmp_path):
    run(epochs=1, directory=tmp_path, learning_rate=optax.constant_schedule(1e-2))
    explode = optax.piecewise_constant_schedule(1e-2, {6: 1e30})
    with pytest.raises(ValueError, match=r"the loss became .* diverged; use a smaller learning rate"):
        run(epochs=6, learning_rate=explode, directory=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_checkpoint_of_another_model_or_of_more_epochs_is_refused(tmp_path):
    run(directory=tmp_path)
    with pytest.raises(
        ValueError, match=r"of another model or optimizer: best.*kernel: float32\[8, 3\], expec"
    ):
        run(directory=tmp_path, widths="mlp:9")
    with pytest.raises(ValueError, match="of a run with seed 3, not 4"):
        run(directory=tmp_path, seed=4)
    with pytest.raises(ValueError, match="has 4 epochs, more than the 2 asked for"):
        run(directory=tmp_path, epochs=2)


def flip(file, position=-1):
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)


def largest(directory):
    return max(
        (file for file in directory.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )


@pytest.mark.parametrize("where", ["arrays", "json", "json syntax", "missing"])
def test_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, where):
    expected = run()
    run(directory=tmp_path, save_seconds=0.0)
    newest = tmp_path / "4"
    if where == "arrays":
        flip(largest(newest), -400)
    elif where == "json":
        file = newest / "json" / "metadata"
        file.write_text(file.read_text().replace('"seconds": ', '"seconds": 1'))
    elif where == "json syntax":
        (newest / "json" / "metadata").write_bytes(b"\xff{")
    else:
        largest(newest).unlink()
    damaged = {file.name: file.read_bytes() for file in newest.rglob("*") if file.is_file()}
    seen = []
    with pytest.warns(UserWarning, match=r"damaged checkpoints are passed over: 4 \(.*; 3 is taken"):
        result = run(directory=tmp_path, seen=seen)
    assert seen == [3, 4]
    chex.assert_trees_all_equal((result.model, result.best), (expected.model, expected.best))
    assert result.history == expected.history
    # What was damaged is still there, under another name, and the new checkpoint is whole
    kept, three, four = sorted(tmp_path.iterdir(), key=lambda path: -len(path.name))
    assert (kept.name.startswith("4.damaged-"), {three.name, four.name}) == (True, {"3", "4"})
    assert {file.name: file.read_bytes() for file in kept.rglob("*") if file.is_file()} == damaged
    chex.assert_trees_all_equal(run(directory=tmp_path).model, expected.model)


def test_without_a_whole_checkpoint_nothing_is_trained(tmp_path):
    run(directory=tmp_path, epochs=2, save_seconds=0.0)
    for step in "12":
        flip(tmp_path / step / "json" / "metadata", 30)
    with pytest.raises(ValueError, match=r"all checkpoints in .* are damaged: 2 \(.*\), 1 \(.*\)\. To begin"):
        run(directory=tmp_path, epochs=2)


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), ValueError("RESOURCE_EXHAUSTED: x: Too many open")]
)
def test_what_the_system_refuses_is_no_damage(tmp_path, monkeypatch, error):
    run(directory=tmp_path, epochs=1)

    def fail(*args, **options):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)
    with pytest.raises(OSError, match="a checkpoint could not be read"):
        run(directory=tmp_path, epochs=1)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.bool_, np.int8, np.float64])
@pytest.mark.parametrize("size", [0, 1, 511, 512, 5000])
def test_a_digest_changes_with_every_byte(dtype, size):
    array = RNG.normal(size=size).astype(dtype)
    first = digest(array)
    assert digest(array.copy()) == first
    data = array.view(np.uint8)
    for position in range(0, len(data), 1 + len(data) // 50):
        for change in (1, 128):
            data[position] ^= change
            assert digest(array) != first
            data[position] ^= change


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8])
def test_a_digest_changes_if_the_signs_of_a_row_change(dtype):
    """Changes of the highest bits alone must not cancel in a sum modulo a power of two."""
    array = np.ones(4096 // np.dtype(dtype).itemsize, dtype)
    first = digest(array)
    for step in (1, 2, 4, 8):
        for count in (2, 4, 64):
            changed = array.copy()
            changed[step - 1 :: step][:count] *= -1
            assert digest(changed) != first


def test_an_unfinished_save_is_deleted_before_anything_else(tmp_path):
    """Not later by a thread, which would delete what the next object saves in the same place."""
    for i in range(300):
        path = tmp_path / "1.orbax-checkpoint-tmp" / str(i)
        path.mkdir(parents=True)
        (path / "array").touch()
    with train.Checkpoints(tmp_path) as checkpoints:
        assert not [*tmp_path.iterdir()]
        checkpoints.save(1, {"a": jnp.ones(2)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_the_last_checkpoints_stay(tmp_path):
    tree = {"a": jnp.arange(3), "key": jax.random.key(5, impl="rbg"), "nested": [jnp.ones(2, jnp.bfloat16)]}
    with train.Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.restore(tree) is None
        for step in range(4):
            checkpoints.save(step, tree | {"a": jnp.arange(3) + step}, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    with train.Checkpoints(tmp_path) as checkpoints:
        found, info = checkpoints.restore(tree)
    assert info == {"step": 3}
    np.testing.assert_array_equal(found["a"], [3, 4, 5])
    assert found["key"] == tree["key"]
    assert found["nested"][0].dtype == jnp.bfloat16


def test_a_model_is_saved_and_restored_bit_by_bit(tmp_path):
    """A model on its own, with state: the arrays come back, in a model that computes the same."""
    model = build("resnet8:0.5", (8, 8, 1), 3, jax.random.key(0))
    other = build("resnet8:0.5", (8, 8, 1), 3, jax.random.key(1))
    x = RNG.normal(size=(2, 8, 8, 1)).astype(np.float32)
    with train.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, {"name": "resnet"})
    with train.Checkpoints(tmp_path) as checkpoints:
        found, info = checkpoints.restore(other)
    assert isinstance(found, Model)
    assert info == {"name": "resnet"}
    assert jax.tree.structure(found) == jax.tree.structure(other)
    chex.assert_trees_all_equal((found.params, found.state), (model.params, model.state))
    np.testing.assert_array_equal(found(x), model(x))
    assert (found(x) != other(x)).any()


@pytest.mark.parametrize("form", ["array", "dict", "several"])
def test_probabilities_of_a_teacher_are_warned_of(form, monkeypatch):
    monkeypatch.setattr(_checks, "_warned", set())
    teacher = jax.nn.softmax(RNG.normal(size=(50, 3)).astype(np.float32))
    forms = {
        "array": teacher,
        "dict": {"logits": teacher},
        "several": {"logits": (jnp.log(teacher), teacher)},
    }
    objective = train.distill_each() if form == "several" else train.distill()
    model, tx = build("mlp:8", (4, 4, 1), 3, jax.random.key(0)), optax.sgd(0.01)
    epoch = train.make_epoch(train.make_train_step(objective, tx))

    def run(teacher):
        state = train.init_state(model, tx, jax.random.key(0))
        train.fit(state, epoch, {**DATA, "teacher": teacher}, epochs=1, batch_size=10, seed=0)

    run(jax.tree.map(jnp.log, forms[form]) if form != "several" else {"logits": (jnp.log(teacher),) * 2})
    with pytest.warns(UserWarning, match=r"logits in data\['teacher'\] look like probabilities") as caught:
        run(forms[form])
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_the_best_epoch_is_by_a_figure_that_exists():
    with pytest.raises(ValueError, match=r"best_by must be one of .*validation_nll, got 'accuracy'"):
        run(best_by="accuracy")


def test_a_figure_that_is_not_a_number_is_never_the_best():
    values = iter([float("nan"), 3.0, 2.0, float("nan")])
    models = []

    def validate(model):
        models.append(jax.tree.map(jnp.copy, model))
        return {"validation_errors": next(values)}

    result = run(validate=validate)
    chex.assert_trees_all_equal(result.best.params, models[2].params)


@pytest.mark.parametrize("name", ["label", "teacher", "image"])
def test_arrays_of_unequal_length_are_refused(name):
    model, tx = build("mlp:8", (4, 4, 1), 3, jax.random.key(0)), optax.sgd(0.1)
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx))
    data = {**DATA, "teacher": np.zeros((50, 3), np.float32)}
    data[name] = data[name][:40]
    with pytest.raises(ValueError, match=f"as many examples in each array, got .*'{name}': 40"):
        train.fit(train.init_state(model, tx, jax.random.key(1)), epoch, data, epochs=1, batch_size=8, seed=0)

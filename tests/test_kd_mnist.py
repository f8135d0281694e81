"""The main job: a small run, its files, a resume, and what it says to bad input."""

import json
import resource

import jax
import kd_mnist
import numpy as np
import pytest
from faults.kills import torture
from harness import runs
from jax.experimental.compilation_cache import compilation_cache

EXPERIMENT = kd_mnist

SMALL = [
    *("digits", "--seeds", "2", "--members", "1", "--teacher", "convnet:4"),
    *("--student", "mlp:8", "--teacher-epochs", "2", "--epochs", "3", "--save-seconds", "0"),
]


def files_of(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_whole_run_repeated_and_killed(tmp_path, monkeypatch, run):
    out, options = tmp_path / "calm", ["--patient", "--patient-views", "2", "--omit-classes", "3", "5"]
    status, printed, _ = run(*options, "--out", out)
    assert status == 0
    assert "Config: digits. Data: digits, scikit-learn's embedded digits" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["dataset"] == {
        "name": "digits", "source": results["dataset"]["source"],
        "train": 1081, "validation": 216, "test": 500,
    }  # fmt: skip
    rows = ["teacher", "scratch", "distilled", "patient", "without 3, 5", "without 3, 5, shifted"]
    assert list(results["models"]) == rows
    for name, model in results["models"].items():
        errors, accuracy = model["test"]["errors"], model["test"]["accuracy"]
        assert len(errors) == 2
        np.testing.assert_allclose(accuracy, [1 - e / 500 for e in errors])
        assert ("agreement" in model["test"]) == (name != "teacher")
        assert kd_mnist.results.mean_sd(errors) in printed
    students = [results["models"][name] for name in rows[1:]]
    assert {model["parameters"] for model in students} == {64 * 8 + 8 + 80 + 10}
    for file in ("report.md", "learning_curves.png", "reliability.png", "confusion.png", "gallery.png"):
        assert (out / file).stat().st_size > 500
    assert results["command"].startswith(f"python {kd_mnist.__file__} digits --seeds 2 ")
    report = (out / "report.md").read_text()
    assert printed.strip().splitlines()[-2] in report  # the closing sentence

    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")  # as many as here, since results.json lists them
    assert "arrays and results.json are the same" in torture(
        tmp_path, "kd_mnist", [*SMALL, *options], 1, triggers={0: "seed0/distilled"}
    )

    before = {p: d for p, d in files_of(out).items() if "seed" in str(p)}
    monkeypatch.setattr(kd_mnist.results, "draw", lambda *arguments: {})
    assert run(*options, "--out", out)[0] == 0
    assert {p: d for p, d in files_of(out).items() if "seed" in str(p)} == before
    repeated = json.loads((out / "results.json").read_text())
    for name in rows:
        assert repeated["models"][name]["test"] == results["models"][name]["test"]


def test_students_differ_only_in_what_they_learn_from(tmp_path, run):
    """With alpha = 1 the distilled student learns from labels alone: it is the scratch student."""
    status, _, _ = run("--alpha", 1, "--out", tmp_path / "run", "--check")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    a, b = (results["models"][name]["test"] for name in ("scratch", "distilled"))
    assert a["errors"] == b["errors"]
    for figure in a:
        np.testing.assert_allclose(a[figure], b[figure], rtol=1e-5, err_msg=figure)
    assert status == 1  # and is no better


def test_shifting_the_bias_finds_the_omitted_class_again():
    """Class 1 was never seen: its logit is 4 too low everywhere."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    logits = (6 * np.eye(3)[labels] + rng.normal(size=(300, 3))).astype(np.float32)
    low = logits - np.array([0, 8, 0], np.float32)
    split = kd_mnist.data.Split(np.arange(300), np.zeros((300, 8, 8, 1), np.uint8), labels)
    dataset = kd_mnist.data.Dataset("x", "x", split, split, split, 3, ("a", "b", "c"))
    config = kd_mnist.Config(omit_classes=(1,))
    run = kd_mnist.Run("x", config, dataset, None, 0.0)
    model = kd_mnist.models.from_function(lambda params, x: x[:, :3, 0, 0] + params, np.zeros(3, np.float32))
    image = np.zeros((300, 8, 8, 1), np.float32)
    image[:, :3, 0, 0] = low
    split = split._replace(image=image)
    run.dataset = dataset._replace(validation=split, test=split)
    student = run.judge(model)
    np.testing.assert_allclose(student.validation_logits, low, rtol=1e-5, atol=1e-4)
    shifted = kd_mnist.shift_bias(config, run, student)
    assert (low.argmax(-1) != labels).mean() > 0.2
    (logits,) = run.test_logits([{"shifted": shifted}])
    assert (logits["shifted"].argmax(-1) != labels).mean() < 0.02
    np.testing.assert_array_equal(logits["shifted"], shifted.validation_logits)


# --- bad input: one line that says what to do, exit status 2, nothing overwritten ---------------

OPTIONS = {
    "unknown data set": ("--dataset nope", "nope"),
    "missing data directory": ("--data-dir missing-directory", "missing-directory"),
    "data directory is a file": (f"--data-dir {__file__}", "test_kd_mnist.py"),
    "too large a validation set": ("--validation 5000", "validation"),
    "no seeds": ("--seeds 0", "--seeds must be at least 1, got 0"),
    "no epochs": ("--epochs 0", "--epochs must be at least 1"),
    "temperature of zero": ("--temperature 0", "--temperature must be positive and finite, got 0"),
    "temperature not a number": ("--temperature nan", "--temperature must be positive and finite, got nan"),
    "alpha above one": ("--alpha 1.5", r"--alpha must lie in [0, 1], got 1.5"),
    "negative learning rate": ("--learning-rate -1", "--learning-rate must be positive"),
    "negative jitter": ("--jitter -1", "--jitter must not be negative"),
    "dropout of one": ("--dropout 1", "--dropout must lie in [0, 1), got 1.0"),
    "batch larger than the data": (
        "--batch-size 5000",
        "--batch-size must be at most the number of training examples, 1081",
    ),
    "batch not divisible": ("--batch-size 33 --devices 4", "--batch-size must be a multiple"),
    "too many devices": ("--devices 64 --batch-size 64", "64 CPU devices were asked for"),
    "unknown teacher": ("--teacher resnet:3", "a model is described by a family (mlp, convnet, characters)"),
    "malformed student": ("--student mlp:", "got 'mlp:'"),
    "unknown class": ("--omit-classes 11", "--omit-classes must name some of 0 to 9"),
    "all classes left out": ("--omit-classes 0 1 2 3 4 5 6 7 8", "leave at least two"),
    "divergence": ("--learning-rate 1e30", "use a smaller learning rate"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(case, tmp_path, monkeypatch, check_refused):
    monkeypatch.chdir(tmp_path)
    check_refused(*OPTIONS[case], written=case == "divergence")


def refused(run, out, *options):
    before = files_of(out) if out.is_dir() else out.read_bytes()
    status, _, error = run("--out", out, *options)
    assert status == 2
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert (files_of(out) if out.is_dir() else out.read_bytes()) == before
    return error


def test_bad_output_directories(tmp_path, run):
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file: name a directory" in refused(run, file)
    status, _, error = run("--out", file / "below")
    assert (status, "cannot be written" in error) == (2, True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    assert "is not empty and holds no run" in refused(run, foreign)
    assert "is not empty" in refused(run, foreign, "--restart")


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', "not JSON", "[1]"])
def test_restart_deletes_no_directory_that_is_no_run(config, tmp_path, run):
    """Many directories have a config.json, that of a model for example."""
    model = tmp_path / "model"
    (model / "weights").mkdir(parents=True)
    (model / "config.json").write_text(config)
    (model / "weights" / "part").write_text("mine")
    for options in ([], ["--restart"]):
        assert "not of a run of distill_jax: name another directory" in refused(run, model, *options)


def test_restart_deletes_nothing_that_the_run_did_not_write(tmp_path, run):
    out, small = tmp_path / "run", [*SMALL, "--seeds", "1", "--epochs", "1", "--teacher-epochs", "1"]
    assert run("--out", out, small=small)[0] == 0
    assert runs.files_of_run(out)[1] == []
    checkpoint = "seed0/teacher/1"
    names = ("thesis.tex", "holiday.png", "notes/today.md", "seed0/own.npy", "seed0/labels/own.npy")
    for mine in map(out.joinpath, (*names, "seed0/own/1.bin", f"{checkpoint}/own", f"{checkpoint}/tree/own")):
        new = not mine.parent.exists()
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        error = refused(run, out, "--restart")
        assert f"did not write ({mine.relative_to(out)})" in error
        mine.unlink()
        if new:
            mine.parent.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1").write_text("mine")
    for name in ("link", "seed0/teacher/7"):
        (out / name).symlink_to(elsewhere)
        assert f"did not write ({name})" in refused(run, out, "--restart")
        (out / name).unlink()
    (out / "seed0/teacher/1/json/metadata").unlink()
    assert run("--out", out, "--restart", small=small)[0] == 0
    assert (elsewhere / "1").read_text() == "mine"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"temperature": 4.0', '"temperature": 6.0', "config.json is damaged"),
        ("a run of", "a ruh of", "not of a run of distill_jax"),
        ("{", "[", "not of a run of distill_jax"),
    ],
)
def test_a_damaged_config_is_no_other_option(old, new, message, tmp_path):
    options = {"temperature": 4.0}
    runs.open_run(tmp_path, options)
    file = tmp_path / "config.json"
    runs.open_run(tmp_path, options)
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        runs.open_run(tmp_path, options)


def test_a_run_is_not_mixed_with_another(tmp_path, run):
    out, small = tmp_path / "run", [*SMALL, "--seeds", "1"]
    assert run("--out", out, small=small)[0] == 0
    error = refused(run, out, "--seeds", 1, "--temperature", 9)
    assert "temperature was 4.0 and is 9.0" in error
    assert "--restart" in error

    # a damaged store, found when the run is repeated
    shard = out / "seed0" / "labels" / "00000.bin"
    original = shard.read_bytes()
    for damaged in (original[:-8], original[:-1] + bytes([original[-1] ^ 1])):
        shard.write_bytes(damaged)
        error = refused(run, out, "--seeds", 1)
        assert "damaged in" in error
        assert "00000.bin" in error
    shard.write_bytes(original)

    # another model's checkpoint in the place of the student's
    (out / "seed0" / "scratch").rename(tmp_path / "kept")
    (out / "seed0" / "teacher").rename(out / "seed0" / "scratch")
    (tmp_path / "kept").rename(out / "seed0" / "teacher")
    assert "of another model or optimizer" in refused(run, out, "--seeds", 1)

    status, _, _ = run("--out", out, "--restart", small=small)
    assert status == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's threads
def test_a_full_disk(tmp_path, run):
    """No file may grow beyond a few kilobytes: what the system then reports is a full disk's kin."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    jax.config.update("jax_enable_compilation_cache", False)  # its files are larger than that
    compilation_cache.reset_cache()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        status, _, error = run("--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
    assert status == 2
    assert len(error.strip().splitlines()) == 1
    assert "space" in error
    status, _, _ = run("--out", tmp_path / "run")
    assert status == 0

"""Methods beside each other: a small run of every kind of method, its resume, and bad input."""

import json
import shutil

import kd_methods
import pytest

EXPERIMENT = kd_methods

SMALL = [
    *("digits", "--seeds", "3", "--teacher", "convnet:4,8", "--student"),
    *("convnet:2,4", "--examples", "200", "--teacher-epochs", "2", "--epochs", "2", "--save-seconds", "0"),
]
METHODS = ("dkd", "fitnet", "rkd")  # logits and labels, a learned part, relations


def not_again(monkeypatch):
    """Leaves out what a first run has shown: pictures, and the times of steps."""
    monkeypatch.setattr(kd_methods.results, "draw", lambda *given: {})
    monkeypatch.setattr(
        kd_methods, "step_costs", lambda config, *given: dict.fromkeys(("scratch", *config.methods), 1.0)
    )


def test_a_whole_run_and_its_resume(tmp_path, monkeypatch, run):
    out = tmp_path / "run"
    arguments = ("--out", out, "--methods", *METHODS)
    status, printed, error = run(*arguments)
    assert status == 0, error
    models = json.loads((out / "results.json").read_text())["models"]
    assert list(models) == ["teacher", "scratch", *METHODS]
    students = [models[name] for name in ("scratch", *METHODS)]
    assert len({tuple(model["test"]["nll"]) for model in students}) == len(students)
    assert len({model["parameters"] for model in students}) == 1  # nothing learned beside is left
    assert all(model["step_cost"] > 0 for model in students)
    assert "t against scratch" in printed
    assert printed.startswith("Smoke test: this data set is too small to compare methods")
    assert printed.count("conv") >= 2  # the pairing of layers
    report = (out / "report.md").read_text()
    assert all((out / name).exists() for name in ("methods.png", "gallery.png"))
    assert all(f"| {name} " in report for name in METHODS)

    shutil.rmtree(out / "seed1" / "fitnet")
    not_again(monkeypatch)
    assert run(*arguments)[0] == 0
    again = json.loads((out / "results.json").read_text())["models"]
    assert all(again[name]["test"] == models[name]["test"] for name in models)


def test_the_teacher_labels_what_the_student_sees(tmp_path, monkeypatch, run):
    not_again(monkeypatch)
    arguments = ("--out", tmp_path / "run", "--methods", "fitnet", "--jitter", "1", "--flip")
    status, _, error = run(*arguments, "--seeds", "1")
    assert status == 0, error


OPTIONS = {
    "unknown method": ("--methods kd nope", "--methods must name some of kd, lskd"),
    "a method twice": ("--methods kd kd", "each once, or all, got kd kd"),
    "malformed weight": ("--weight at:3", "--weight must be such as at=300"),
    "weight of no method": ("--weight nope=3", "of a method there is; got 'nope=3'"),
    "negative weight": ("--weight at=-1", "got 'at=-1'"),
    "more examples than there are": ("--examples 9999", "number of training examples, 1081, got 9999"),
    "batch larger than the data": ("--batch-size 400", "number of training examples, 200, got 400"),
    "negative jitter": ("--jitter -1", "--jitter must not be negative, got -1"),
    "rate of zero": ("--learning-rate 0", "--learning-rate must be positive and finite, got 0.0"),
    "unknown student": ("--student nope:3", "a model is described by a family"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name])


def test_the_schedule_of_repdistiller():
    """Its --lr_decay_epochs 150,180,210 of 240, at 782 steps an epoch."""
    rate = kd_methods.in_steps(0.05, 240 * 782)
    epochs = {0: 0.05, 149: 0.05, 150: 0.005, 179: 0.005, 180: 5e-4, 210: 5e-5, 239: 5e-5}
    for epoch, expected in epochs.items():
        # piecewise_constant_schedule counts a boundary in from the step after it
        assert rate(epoch * 782 + 1) == pytest.approx(expected)

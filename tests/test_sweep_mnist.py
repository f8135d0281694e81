"""The map of T and α: a small run, its resume, with successive halving, and bad input."""

import json
import shutil

import numpy as np
import pytest
import sweep_mnist

EXPERIMENT = sweep_mnist

SMALL = [
    *(
        "digits",
        "--seeds",
        "2",
        "--teacher",
        "mlp:8",
        "--student",
        "mlp:4",
        "--examples",
        "60",
        "--epochs",
        "4",
    ),
    *(
        "--teacher-epochs",
        "2",
        "--temperatures",
        "1",
        "4",
        "--alphas",
        "0",
        "0.5",
        "1",
        "--save-seconds",
        "0",
    ),
]


def test_a_whole_run_and_halving_with_its_resume(tmp_path, run):
    def results_of(name, *options):
        status, printed, error = run("--out", tmp_path / name, *options)
        assert status == 0, error
        return json.loads((tmp_path / name / "results.json").read_text()), printed

    results, printed = results_of("whole")
    drawn, models = results["map"], results["models"]
    errors = np.array(drawn["validation_errors"])
    assert errors.shape == (2, 3, 2)
    assert np.shape(drawn["epochs"]) == (2, 3)
    # Where the labels have all the weight, T does not matter, and the student is that from scratch
    assert errors[0, 2].tolist() == errors[1, 2].tolist() == models["scratch"]["validation"]["errors"]
    chosen = models["distilled"]
    t, a = drawn["temperature"].index(chosen["temperature"]), drawn["alpha"].index(chosen["alpha"])
    assert chosen["validation"]["errors"] == errors[t, a].tolist()
    assert errors.mean(-1).min() == errors[t, a].mean()
    assert len(chosen["test"]["errors"]) == 2
    assert {model["parameters"] for model in models.values()} == {64 * 8 + 8 + 90, 64 * 4 + 4 + 50}
    assert f"Distillation at T = {chosen['temperature']:g}" in printed
    assert (tmp_path / "whole" / "map.png").stat().st_size > 500

    # Halved, in chunks and on two devices: those that go on end as they did, and seeds stay together
    options = ["--rungs", 2, "--chunk", 5, "--devices", 2]
    halved = results_of("halved", *options)[0]
    epochs = np.array(halved["map"]["epochs"])
    assert sorted(epochs.ravel()) == [2, 2, 2, 4, 4, 4]
    np.testing.assert_array_equal(
        np.array(halved["map"]["validation_errors"])[epochs == 4], errors[epochs == 4]
    )
    assert " after 2 |" in (tmp_path / "halved" / "report.md").read_text()
    shutil.rmtree(tmp_path / "halved" / "all_seeds" / "students" / "rung1-chunk0")  # as if killed there
    again = results_of("halved", *options)[0]
    assert again["map"] == halved["map"]
    assert again["models"] == halved["models"]


OPTIONS = {
    "no temperature": ("--temperatures 0", "--temperatures must be positive"),
    "one twice": ("--alphas 0.5 0.5", "--alphas must name at least one, and none twice"),
    "too few images": ("--examples 10", "--examples must lie between --batch-size, 20, and 1081, or be 0"),
    "rungs that fall": ("--rungs 3 2", "--rungs must rise to less than --epochs, 4"),
    "a rung at the end": ("--rungs 4", "--rungs must rise to less than --epochs, 4"),
    "devices": ("--devices 3", "--teacher-batch-size must be a multiple of --devices, 3"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name])

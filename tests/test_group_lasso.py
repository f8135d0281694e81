"""Group lasso against plain scores: a small run with its figures and files, and what it says to bad input."""

import json

import group_lasso
import pytest

EXPERIMENT = group_lasso
SMALL = [
    *("digits", "--seeds", "1", "--original", "mlp:8", "--epochs", "4", "--tuning-epochs", "1"),
    *("--learning-rate", "0.02", "--shares", "0.5", "--strengths", "0.1", "0.9", "--examples", "64"),
    *("--save-seconds", "0"),
]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    assert status == 0
    found = json.loads((out / "results.json").read_text())
    entries = found["models"]
    assert len({entries[f"{m}, 0.5, tuned"]["parameters"] for m in group_lasso.METHODS}) == 1
    # The lasso of the larger strength leaves shorter weights, so its network fits less well
    losses = [entries[name]["test"]["nll"][0] for name in ("original", "lasso of 0.1", "lasso of 0.9")]
    assert losses == sorted(losses)
    (chosen,) = found["strengths"]["0.5"]
    assert f"Strengths chosen by validation: at 0.5 [{chosen:g}]" in printed
    weak, strong = (
        json.loads((out / "seed0" / f"lasso-of-{s}-0.5.jsonl").read_text().splitlines()[-1])
        for s in (0.1, 0.9)
    )
    assert chosen == 0.1
    assert weak["validation_errors"] + 20 < strong["validation_errors"]
    for name in ("as_pruned", "tuned"):
        assert (out / f"{name}.png").stat().st_size > 500


OPTIONS = {
    "shares that rise": ("--shares 0.5 0.75", "--shares must fall and lie between 0 and 1"),
    "a strength of one": ("--strengths 0.1 1", "--strengths must rise and lie between 0 and 1"),
    "more examples than there are": ("--examples 5000", "number of training examples, 1081, got 5000"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name])

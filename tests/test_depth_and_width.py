"""Depth and width: a small run with its figures and files, and what it says to bad input."""

import json

import depth_and_width
import pytest

EXPERIMENT = depth_and_width
SMALL = [
    *("digits", "--seeds", "1", "--original", "vit1-4:0.17", "--epochs", "2", "--tuning-epochs", "1"),
    *("--shares", "0.6", "--ways", "width", "both", "--save-seconds", "0"),
]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--out", out)
    assert status == 0
    found = json.loads((out / "results.json").read_text())["models"]
    made = ("width, 0.6", "both, 0.6")
    assert set(found) == {
        "original",
        *(name + tuning for name in made for tuning in ("", ", labels", ", distilled")),
    }
    for name, entry in found.items():
        assert entry["share of FLOPs"] <= (1 if name == "original" else 0.62), name
    assert found["width, 0.6"]["blocks"] == 2 > found["both, 0.6, labels"]["blocks"]
    errors = found["both, 0.6, distilled"]["test"]["errors"][0]
    assert f"both {errors:.0f}" in printed
    assert (out / "tradeoffs.png").stat().st_size > 500


OPTIONS = {
    "shares that rise": ("--shares 0.5 0.75", "--shares must fall and lie between 0 and 1"),
    "no residual network": ("--original mlp:8", "--original must be a residual network"),
    "an unknown influence": ("--influence angle", "--influence must be kl or cosine"),
    "an unknown way": ("--ways height", "--ways"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name])

"""Codes of a linear map: a small run held to the optimum, the line, and what it says to bad input."""

import json

import linear_code
import pytest

EXPERIMENT = linear_code

SMALL = ["matrix", "--inputs", "6", "--outputs", "3", "--examples", "1000", "--ranks", "1", "3"]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    status, printed, _ = run("--check", "--out", out)
    assert status == 0
    rows = json.loads((out / "results.json").read_text())["models"]
    assert list(rows) == ["width 1", "width 3"]
    for row in rows.values():
        assert row["excess"] <= 1e-3
        assert abs(row["closed form's excess"]) <= 1e-10
        assert row["parameters"] == row["width"] * 9 + 3
        assert row["bytes_sent"] == 4 * row["width"]
        assert [stage["name"] for stage in row["stages"]] == ["encoder", "decoder", "joint"]
    assert rows["width 1"]["optimum"] > 0.01
    assert rows["width 3"]["error"] < 1e-9
    assert (out / "widths.png").stat().st_size > 500
    report = (out / "report.md").read_text()
    assert all(line in report for line in printed.strip().splitlines()[-7:-1])


def test_the_tutorials_line(tmp_path, run):
    status, printed, _ = run("--out", tmp_path / "run", small=["line"])
    assert status == 0
    (line,) = [line for line in printed.splitlines() if "y = wx + b: w" in line]
    w, w_learned, b, b_learned = (float(x) for x in line.replace(",", "").split() if "." in x)
    assert abs(w - w_learned) < 1e-5
    assert abs(b - b_learned) < 1e-5


OPTIONS = {
    "too wide a code": ("--ranks 4", "--ranks must be at most 3, got 4"),
    "no rank": ("--ranks 0", "--ranks must be at least 1, got 0"),
    "too few examples": ("--examples 6", "--examples must exceed --inputs, 6, got 6"),
    "condition below one": ("--condition 0.5", "--condition must be at least 1, got 0.5"),
    "tolerance of one": ("--tolerance 1", "--tolerance must be below 1, got 1"),
    "diverging": ("--learning-rate 1e30", "use a smaller learning rate"),
    "negative rate": ("--learning-rate -1", "--learning-rate must be positive and finite, got -1"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options(name, check_refused):
    check_refused(*OPTIONS[name], written=name.startswith("diverging"))

"""The cases of ``tests/conformance`` on our losses, under ``jit``. Other libraries run by ``conformance/run.py``."""

import pytest
from conformance import libraries, run

GROUPS = run.load()
LOSSES = sorted({group["loss"] for group in GROUPS})


@pytest.fixture(scope="module")
def ours():
    return libraries.Ours()


@pytest.mark.parametrize("loss", LOSSES)
def test_every_case_is_right(ours, loss):
    outcomes = run.run(ours, [group for group in GROUPS if group["loss"] == loss])
    assert outcomes
    assert not [(group["name"], i, found) for group, i, found in outcomes if found or found is None]


def test_there_are_many_cases_of_many_kinds():
    assert sum(len(group["cases"]) for group in GROUPS) >= 200
    assert len({group["name"] for group in GROUPS}) == len(GROUPS)


@pytest.mark.parametrize(
    ("result", "found"),
    [
        ((1.0, [0.25, -0.25]), []),
        ((1.001, [0.25, -0.25]), ["value 1.001 for 1"]),
        ((float("nan"), [0.25, float("nan")]), ["value NaN", "gradient NaN"]),
        ((1.0, [0.0, 0.0]), ["gradient 0"]),
        ((1.0, [0.25, -0.26]), ["gradient off"]),
        (ValueError(), ["raises ValueError"]),
    ],
)
def test_the_judge(result, found):
    group = {"bounds": [[1e-4, 1e-5], [1e-4, 1e-5]]}
    assert run.faults(group, {"value": 1.0, "gradient": [0.25, -0.25]}, result) == found


def test_the_judge_knows_infinity():
    group = {"bounds": [[1e-4, 1e-5], [1e-4, 1e-5]]}
    case = {"value": float("inf"), "gradient": None}
    assert run.faults(group, case, (float("inf"), [1.0])) == []
    assert run.faults(group, case, (16.0, [1.0])) == ["value 16 for inf"]

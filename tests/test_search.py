"""The search for the smallest network: what it tries, in which order, and what it chooses."""

import pytest

from distill_jax.compress import search


def toy(losses):
    """Losses by operator as functions of the share; notes what was asked for."""
    asked = []

    def attempt(edit):
        asked.append(edit)
        return losses[edit.operator](edit.share) - 0.01 * edit.iterative, round(1000 * edit.share)

    return asked, attempt


SHARES = (0.5, 0.3, 0.1)


def test_the_grid_then_steps_then_refinements_then_the_baseline():
    asked, attempt = toy({"prune": lambda s: 1.1 - s / 5, "merge": lambda s: 2.0, "fresh": lambda s: 0.0})
    found = search.find_smallest(
        attempt, (1.0, 1000), operators=("prune", "merge", "fresh"), shares=SHARES, iterative=("prune",),
        budget=0.06, refinements=2, baselines=("fresh",),
    )  # fmt: skip
    # Iterative 0.3 has 1.1 − 0.06 − 0.01 = 1.03 ≤ 1.06; 0.1 has 1.07, and (0.3·0.1)^½ = 0.173 has 1.055
    assert [edit.name for edit in asked] == [
        "prune 0.5", "prune 0.3", "prune 0.1", "merge 0.5", "merge 0.3", "merge 0.1", "fresh 0.5",
        "fresh 0.3", "fresh 0.1", "prune, iterative 0.3", "prune, iterative 0.1", "prune, iterative 0.173",
        "prune, iterative 0.132", "fresh 0.173",
    ]  # fmt: skip
    assert [edit.start for edit in asked if edit.iterative] == [
        "prune 0.5", "prune, iterative 0.3", "prune, iterative 0.3", "prune, iterative 0.173",
    ]  # fmt: skip
    assert found.chosen == "prune, iterative 0.173"
    assert list(found.trials) == [edit.name for edit in asked]
    assert found.trials["fresh 0.173"].loss == 0.0  # better, but not eligible


def test_from_the_original_where_nothing_is_within_the_budget():
    asked, attempt = toy({"prune": lambda s: 1.5 - s / 2, "fresh": lambda s: 0.0})
    found = search.find_smallest(
        attempt, (1.0, 1000), operators=("prune", "fresh"), shares=SHARES, budget=0.05, refinements=5,
        baselines=("fresh",),
    )  # fmt: skip
    tried = [edit.share for edit in asked if edit.operator == "prune"]
    assert tried[3] == pytest.approx(0.5**0.5)
    assert tried[4] == pytest.approx(0.5**0.25)
    assert found.chosen == "prune 0.917"  # 1.5 − 0.917/2 = 1.04, at last
    assert asked[-1].name == "fresh 0.917"


def test_the_smallest_of_all_needs_no_refinement_and_equal_sizes_go_by_loss():
    asked, attempt = toy({"a": lambda s: 1.0, "b": lambda s: 0.9})
    found = search.find_smallest(
        attempt, (1.0, 1000), operators=("a", "b"), shares=SHARES, budget=0.0, refinements=3
    )
    assert len(asked) == 6
    assert found.chosen == "b 0.1"
    asked, attempt = toy({"a": lambda s: 2.0})
    found = search.find_smallest(attempt, (1.0, 1000), operators=("a",), shares=SHARES, budget=0.0)
    assert found.chosen == "original"


def test_what_cannot_be_searched_is_refused():
    for options in (
        {"operators": ()}, {"shares": ()}, {"shares": (0.3, 0.5)}, {"shares": (1.0,)}, {"shares": (0.5, 0.0)},
    ):  # fmt: skip
        given = {"operators": ("a",), "shares": SHARES} | options
        with pytest.raises(
            ValueError, match="expected an operator that is no baseline, and shares that fall"
        ):
            search.find_smallest(lambda edit: (1.0, 1), (1.0, 1), budget=0.1, **given)
    for baselines, message in ((("b",), "not among the operators"), (("a",), "no baseline")):
        with pytest.raises(ValueError, match=message):
            search.find_smallest(
                lambda edit: (1.0, 1),
                (1.0, 1),
                operators=("a",),
                shares=SHARES,
                budget=0.1,
                baselines=baselines,
            )
    with pytest.raises(ValueError, match="are baselines"):
        search.find_smallest(
            lambda edit: (1.0, 1), (1.0, 1), operators=("a", "b"), shares=SHARES, iterative=("a",), budget=0.1,
            baselines=("a",),
        )  # fmt: skip


def test_a_baseline_that_stands_first_takes_no_refinement():
    asked, attempt = toy({"fresh": lambda s: 9.0, "prune": lambda s: 9.0})
    search.find_smallest(
        attempt, (1.0, 1000), operators=("fresh", "prune"), shares=(0.5,), budget=0.1, refinements=1,
        baselines=("fresh",),
    )  # fmt: skip
    assert [edit.name for edit in asked] == ["fresh 0.5", "prune 0.5", "prune 0.707"]


def test_shares_that_three_digits_do_not_tell_apart_are_two_trials():
    asked, attempt = toy({"prune": lambda s: s})
    found = search.find_smallest(
        attempt, (1.0, 1000), operators=("prune",), shares=(0.5002, 0.5001), budget=0.1
    )
    assert [edit.share for edit in asked] == [0.5002, 0.5001]
    assert list(found.trials) == ["prune 0.5", "prune 0.5001"]

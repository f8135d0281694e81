"""The search for the smallest network: what it tries, in which order, and what it chooses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax.compress import low_rank, search, units
from distill_jax.models import from_function


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


X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)


def network():
    rng = np.random.default_rng(1)
    params = {
        name: jnp.asarray(rng.normal(size=n), jnp.float32) for name, n in {"a": (6, 16), "b": (16, 2)}.items()
    }
    return from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)


def prune(model, share):
    graph = units.trace(model, X)
    return units.keep(graph, model, units.prune(graph, units.scores.l2(graph, model), share, across="group"))


def factorise(model, share):
    return low_rank.factorise(model, low_rank.kernels(model, X), {"a": round(6 * share)})


class Work:
    """Functions for a search that note their calls; ``fails`` says at which call of which one the machine dies."""

    def __init__(self, original, fails=("", 0)):
        self.original, self.fails, self.calls = original, fails, {"fine_tune": [], "validate": []}

    def note(self, name, model):
        self.calls[name].append(search.number_of_parameters(model))
        if self.fails == (name, len(self.calls[name])):
            raise RuntimeError("the machine died")

    def fine_tune(self, model):
        self.note("fine_tune", model)
        return model.replace(params=jax.tree.map(lambda x: 1.01 * x, model.params))

    def validate(self, model):
        self.note("validate", model)
        return float(jnp.square(model(X) - self.original(X)).mean())

    def search(self, directory=None, **options):
        given = {"shares": (0.5, 0.25), "iterative": ["prune"], "refinements": 1, "budget": 5.0} | options
        return search.smallest_model(
            self.original, {"prune": prune, "factorise": factorise}, fine_tune=self.fine_tune,
            validate=self.validate, directory=directory, **given,
        )  # fmt: skip


def test_models_are_made_smaller_trained_and_chosen():
    work = Work(network())
    found = work.search()
    assert [*found.trials][:5] == [
        "prune 0.5", "prune 0.25", "factorise 0.5", "factorise 0.25", "prune, iterative 0.25"
    ]  # fmt: skip
    sizes = {name: trial.size for name, trial in found.trials.items()}
    # 8 and 4 of 16 units: 6 + 2 weights each; iterative: half of half of them
    assert (sizes["prune 0.5"], sizes["prune 0.25"], sizes["prune, iterative 0.25"]) == (64, 32, 32)
    assert sizes["factorise 0.5"] == 3 * (6 + 16) + 16 * 2
    assert found.models[found.chosen] is found.model
    within = [name for name, trial in found.trials.items() if trial.loss <= 5.0]
    assert 0 < len(within) < len(sizes)
    assert found.chosen == min(within, key=sizes.__getitem__)
    for name, trial in found.trials.items():
        assert trial.loss == work.validate(found.models[name])
    assert work.search(budget=0.0).chosen == "original"


@pytest.mark.parametrize("fails", [("fine_tune", 3), ("validate", 4)])
def test_a_search_resumes_after_the_last_trained_model(tmp_path, fails):
    whole = Work(network()).search()
    with pytest.raises(RuntimeError, match="died"):
        Work(network(), fails).search(tmp_path)
    again = Work(network())
    found = again.search(tmp_path)
    assert found.trials == whole.trials
    for name, model in found.models.items():
        jax.tree.map(np.testing.assert_array_equal, model.params, whole.models[name].params)
    before = 2 if fails[0] == "fine_tune" else 3  # what was trained is not trained again
    assert len(again.calls["fine_tune"]) == len(whole.trials) - before
    # A search that is complete trains nothing, and validates the original alone
    done = Work(network())
    assert done.search(tmp_path).trials == whole.trials
    assert (len(done.calls["fine_tune"]), len(done.calls["validate"])) == (0, 1)
    other = network()
    other = other.replace(params={**other.params, "b": other.params["b"] + 1})
    with pytest.raises(ValueError, match="holds another search, in which 'prune"):
        Work(other).search(tmp_path)


def test_wrong_functions_of_a_search_are_refused():
    work = Work(network())
    given = {"fine_tune": work.fine_tune, "validate": work.validate, "shares": (0.5,), "budget": 1.0}
    for operators, options, message in (
        ([prune], {}, "operators must be"),
        ({"../prune": prune}, {}, "operators: a name must be made of letters"),
        ({"prune, iterative": prune}, {}, "operators: a name must be made of letters"),
        ({"prune": lambda model: model}, {}, "prune.*model, share"),
        (
            {"prune": lambda model, share: model.params},
            {},
            r"operators\['prune'\] returns must be a models.Model",
        ),
        (
            {"prune": prune},
            {"fine_tune": lambda model: work.original},
            "fine_tune must return a model with arrays",
        ),
        ({"prune": prune}, {"validate": lambda model: model(X)}, "validate must return one number"),
    ):
        with pytest.raises(ValueError, match=message):
            search.smallest_model(work.original, operators, **given | options)


def test_an_operator_may_say_that_it_cannot(tmp_path):
    work = Work(network())
    given = {
        "fine_tune": work.fine_tune,
        "validate": work.validate,
        "shares": (0.5, 0.25, 0.2),
        "budget": 100.0,
    }
    operators = {"prune": lambda model, share: prune(model, share) if share > 0.4 else None}
    found = search.smallest_model(
        work.original, operators, **given, iterative=["prune"], refinements=1, directory=tmp_path
    )
    assert [name for name, trial in found.trials.items() if np.isinf(trial.loss)] == [
        "prune 0.25", "prune 0.2",
    ]  # fmt: skip
    assert found.chosen == "prune, iterative 0.2"  # by halves, and 0.8 of a quarter
    assert {path.name for path in tmp_path.iterdir()} == found.models.keys() - {"original"}


def test_the_function_of_a_model_is_that_of_the_operator():
    work = Work(network())

    def fine_tune(model):
        return model.replace(apply_fn=lambda params, state, x, *, key=None: (0 * x, state))

    given = {"validate": work.validate, "shares": (0.5,), "budget": 100.0}
    found = search.smallest_model(work.original, {"prune": prune}, fine_tune=fine_tune, **given)
    np.testing.assert_array_equal(found.model(X), prune(work.original, 0.5)(X))

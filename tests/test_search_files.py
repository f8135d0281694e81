"""The search for the best file: what is measured, trained, kept, chosen and refused."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill_jax import export, models
from distill_jax.compress import search

X = np.ones((4, 6), np.float32)
WIDTHS = (12, 8, 4, 2)


def network(scale=1.0):
    params = {"a": scale * jnp.ones((6, 16)), "b": jnp.ones((16, 2))}
    return models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)


def width(model):
    return model.params["a"].shape[1]


class Work:
    """Functions for a search that note their calls; ``dies`` says at which call of which one the machine dies."""

    def __init__(self, dies=("", 0), scale=1.0):
        self.original, self.dies, self.calls = network(scale), dies, []

    def note(self, name, *facts):
        self.calls.append((name, *facts))
        if self.dies == (name, sum(call[0] == name for call in self.calls)):
            raise RuntimeError("the machine died")

    def make(self, model, settings):
        count = settings["width"]
        return model.replace(params={"a": model.params["a"][:, :count], "b": model.params["b"][:count]})

    def tune(self, model, settings, epochs):
        self.note("tune", settings["width"], epochs)
        return model.replace(params=jax.tree.map(lambda leaf: leaf + 0.001 * epochs, model.params))

    def quality(self, model):
        self.note("quality", width(model))
        return width(model) + float(model.params["b"][0, 0])  # wider is better, and so is longer training

    def write(self, path, model, x):
        self.note("write", width(model))
        path.write_bytes(bytes(100 * width(model)))

    def search(self, directory, **options):
        given = {
            "candidates": [{"width": w} for w in WIDTHS], "epochs": (1, 2), "make": self.make, "tune": self.tune,
            "quality": self.quality, "write": self.write, "directory": directory,
        } | options  # fmt: skip
        return search.best_file(self.original, x=X, **given)

    def widths(self, name):
        return [call[1] for call in self.calls if call[0] == name]


@pytest.fixture(autouse=True)
def no_process(monkeypatch):
    """Files are not loaded: their time is that of their size, but for those of width 2, which are slow."""

    def latency(path, x, *, threads, seconds):
        size = path.stat().st_size
        return {"bytes": size, "latency_ms": 9.0 if size == 200 else size / 100, "batch": len(x)}

    monkeypatch.setattr(export, "latency", latency)


def test_what_is_over_a_budget_is_not_trained_and_the_better_half_goes_on(tmp_path):
    work = Work()
    found = work.search(tmp_path, most_bytes=800, aim="quality")
    # Measured: all; trained: 8, 4, 2, then the better half of them; written: the original and the two of the last round
    assert work.widths("write") == [16, *WIDTHS, 8, 4]
    assert [call[1:] for call in work.calls if call[0] == "tune"] == [(8, 1), (4, 1), (2, 1), (8, 2), (4, 2)]
    assert found.chosen.name == "width=8"
    assert found.chosen.path == tmp_path / "width=8.model"
    assert found.chosen.path.stat().st_size == found.chosen.bytes == 800
    assert found.chosen.quality == pytest.approx(9.003)
    assert found.chosen.epochs == 3
    np.testing.assert_allclose(found.chosen.model.params["b"], 1.003)
    assert found.chosen.measured["batch"] == 1
    assert {name: each.epochs for name, each in found.candidates.items()} == {
        "original": 0, "width=12": 0, "width=8": 3, "width=4": 3, "width=2": 1,
    }  # fmt: skip
    assert found.candidates["width=12"].quality == -np.inf
    assert [path.name for path in sorted(tmp_path.glob("*.model"))] == [
        "original.model", "width=4.model", "width=8.model"
    ]  # fmt: skip


def test_a_file_over_the_time_is_measured_again(tmp_path, monkeypatch):
    taken = []

    def latency(path, x, *, threads, seconds):
        size = path.stat().st_size
        taken.append(size)
        busy = size == 400 and taken.count(400) < 3  # other work slows the first two runs
        return {"bytes": size, "latency_ms": 9.0 if busy else size / 100, "batch": len(x)}

    monkeypatch.setattr(export, "latency", latency)
    options = {"candidates": [{"width": 8}, {"width": 4}], "epochs": (1,), "keep": 1.0}
    found = Work().search(tmp_path, most_ms=4.0, **options)
    assert found.chosen.name == "width=4"
    # The original, which is over the time as well, and width 8 three times; the file of width 4 once more in the end
    assert taken == [1600] * 3 + [800] * 3 + [400] * 4


def test_each_aim_chooses_its_own(tmp_path):
    options = {"least_quality": 3.0, "keep": 1.0, "epochs": (1,)}
    assert Work().search(tmp_path, aim="latency", **options).chosen.name == "width=4"
    found = Work().search(tmp_path, aim="bytes", **options)
    assert found.chosen.name == "width=2"
    # The file of width 2 is smaller than that of width 4, and slower; each other pays for its quality
    assert [each.name for each in found.front] == ["width=2", "width=4", "width=8", "width=12", "original"]
    # The smallest of those that are good enough go on first
    work = Work()
    assert work.search(tmp_path / "few", aim="bytes", least_quality=8.5).chosen.name == "width=8"
    assert work.widths("tune")[4:] == [8, 12]


def test_the_front_leaves_out_what_another_file_surpasses(tmp_path):
    work = Work()
    found = work.search(
        tmp_path, aim="bytes", least_quality=0.0, keep=1.0, quality=lambda m: 5 - width(m) % 8
    )
    assert found.candidates["width=12"].quality == 1  # fewer than width 8, which is smaller
    assert [each.name for each in found.front] == ["width=2", "width=4", "width=8"]


def test_a_search_continues_where_it_died(tmp_path):
    options = {"aim": "latency", "least_quality": 5.0, "candidates": [{"width": 8}, {"width": 4}]}
    whole = Work()
    expected = whole.search(tmp_path / "whole", **options)
    for dies in (("write", 2), ("tune", 2), ("quality", 3), ("write", 4)):
        directory = tmp_path / "-".join(map(str, dies))
        work, again, done = Work(dies), Work(), Work()
        with pytest.raises(RuntimeError, match="died"):
            work.search(directory, **options)
        found = again.search(directory, **options)
        assert found.chosen[:5] == expected.chosen[:5]
        np.testing.assert_array_equal(found.chosen.model.params["a"], expected.chosen.model.params["a"])
        # No call is made twice, but for the one at which the machine died
        assert len(work.calls) + len(again.calls) == len(whole.calls) + 1
    assert done.search(directory, **options).chosen[:5] == expected.chosen[:5]
    assert done.calls == []


def test_other_budgets_use_what_is_there(tmp_path):
    Work().search(tmp_path, most_bytes=400)
    work = Work()
    found = work.search(tmp_path, most_bytes=800)
    assert found.chosen.name == "width=8"
    assert work.widths("tune") == [8, 8]  # 4 and 2 were trained before
    fresh = Work().search(tmp_path / "fresh", most_bytes=800)
    assert {n: c[:6] for n, c in found.candidates.items()} == {n: c[:6] for n, c in fresh.candidates.items()}
    found.chosen.path.unlink()
    assert Work().search(tmp_path, most_bytes=800).chosen.path.exists()


def test_what_was_measured_otherwise_is_measured_again(tmp_path):
    options = {"aim": "latency", "least_quality": 5.0, "candidates": [{"width": 8}]}
    Work().search(tmp_path, **options)
    for other in ({"batch": 2}, {"threads": 2}, {"seconds": 0.1}, {"suffix": ".onnx"}, {}):
        work = Work()
        chosen = work.search(tmp_path, **options, **other).chosen
        assert work.widths("write") == [16, 8, 8]  # the original, and the draft and the file of the candidate
        assert not work.widths("tune")
        assert chosen.path == tmp_path / f"width=8{other.get('suffix', '.model')}"
        assert chosen.measured["batch"] == other.get("batch", 1)
        again = Work()
        assert again.search(tmp_path, **options, **other).chosen[:7] == chosen[:7]
        assert not again.calls


def test_a_network_is_finished_before_it_is_validated_and_written(tmp_path):
    def finish(model, settings):
        return model.replace(params=jax.tree.map(lambda leaf: -leaf, model.params))

    found = Work().search(tmp_path, most_bytes=800, finish=finish)
    assert found.chosen.quality == pytest.approx(8 - 1.003)
    np.testing.assert_allclose(found.chosen.model.params["b"], -1.003)
    assert found.candidates["original"].quality == 17


def test_what_cannot_be_made_is_left_out_and_what_diverges_is_last(tmp_path):
    work = Work()

    def make(model, settings):
        return None if settings["width"] == 12 else work.make(model, settings)

    def quality(model):
        return np.nan if width(model) == 8 else width(model)

    for _ in range(2):  # the second time, what was found is read from the directory
        found = work.search(tmp_path, most_bytes=800, make=make, quality=quality)
        assert "width=12" not in found.candidates
        assert found.candidates["width=8"].quality == -np.inf
        assert found.chosen.name == "width=4"


def test_what_cannot_be_written_is_left_out_with_a_warning(tmp_path):
    work = Work()

    def write(path, model, x):
        if width(model) in refused:
            raise ValueError("model: the operation tanh is not converted")
        work.write(path, model, x)

    refused = {8}
    with pytest.warns(UserWarning, match="write, for 'width=8': model: the operation tanh"):
        found = work.search(tmp_path, most_bytes=800, write=write)
    assert [*found.candidates] == ["original", "width=12", "width=4", "width=2"]
    assert found.chosen.name == "width=4"
    refused = {*WIDTHS}
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="none of them could be made"),
    ):
        work.search(tmp_path / "none", most_bytes=800, write=write)


def test_a_budget_that_no_file_keeps_is_refused_with_the_nearest(tmp_path):
    work = Work()
    for budgets, message in (
        ((1000, 0.5), "most_ms: no file is within 0.5 ms; that of 'width=4' has 400 bytes and 4 ms"),
        ((100, 20), "most_bytes: no file is within 100 bytes; that of 'width=2' has 200 bytes and 9 ms"),
        ((100, 0.5), "most_bytes, most_ms: no file is within 100 bytes and 0.5 ms"),
        ((300, 5), "most_bytes, most_ms: no file is within 300 bytes and 5 ms; that of 'width=4'"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            work.search(tmp_path, most_bytes=budgets[0], most_ms=budgets[1])
    assert work.widths("tune") == []
    message = (
        r"^least_quality: no trained file within the budgets reaches 20; that of 'width=8' .* reaches 9.003"
    )
    with pytest.raises(ValueError, match=message):
        work.search(tmp_path, most_bytes=800, least_quality=20)


def test_a_model_that_no_file_can_hold_is_refused_before_training(tmp_path):
    def random(params, state, x, *, key=None):
        return x + jax.random.normal(jax.random.key(0), x.shape), state

    def counting(params, state, x, *, key=None):
        return x, {"calls": state["calls"] + 1}

    for apply_fn, words in {random: "draws random numbers", counting: "changes the state"}.items():
        work = Work()
        work.original = models.Model(apply_fn, {}, {"calls": jnp.zeros(())})
        with pytest.raises(ValueError, match=f"'original': model: its evaluation {words}"):
            work.search(tmp_path / words, most_bytes=800, write=functools.partial(export.stablehlo))
        assert work.calls == []


def test_another_search_in_the_directory_is_refused(tmp_path):
    Work().search(tmp_path, most_bytes=800)
    for options, message in (
        ({"epochs": (2, 2)}, r"'width=8' was trained in rounds of \[1, 2\] epochs, not \[2, 2\]"),
        ({"epochs": (1,)}, r"'width=8' was trained in rounds of \[1, 2\] epochs, not \[1\]"),
        (
            {"make": lambda m, settings: Work().make(network(2.0), settings)},
            "which 'width=12' was another network",
        ),
        (
            {"make": lambda m, settings: Work().make(m, {"width": settings["width"] - 1})},
            "holds another search, in which 'width=12' was another network",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Work().search(tmp_path, most_bytes=800, **options)
    with pytest.raises(ValueError, match="in which 'original' was another network"):
        Work(scale=2.0).search(tmp_path, most_bytes=800)


def test_functions_that_return_something_else_are_refused(tmp_path):
    for options, message in (
        (
            {"make": lambda model, settings: model.params},
            "what make returns for 'width=12' must be a models.Model",
        ),
        ({"tune": lambda model, settings, epochs: network()}, "tune must return a model with arrays"),
        ({"quality": lambda model: model(X)}, "quality must return one number"),
    ):
        with pytest.raises(ValueError, match=message):
            Work().search(tmp_path / message[:4], **{"most_bytes": 800} | options)


def test_the_programs_of_the_guide_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = Path(__file__).parents[1] / "docs" / "guides" / "small_files.md"
    space, found, best_file = {}, [], search.best_file

    def kept(*given, **options):
        found.append(best_file(*given, **options))
        return found[-1]

    monkeypatch.setattr(search, "best_file", kept)
    for program in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL):
        exec(compile(program, guide.name, "exec"), space)
    assert [each.chosen.path.parent.name for each in found] == ["reader", "sequence", "plain"]
    again = space["best_file"](space["plain"], "plain").chosen  # found in the directory
    assert again[:5] == found[2].chosen[:5]
    names = [each.chosen.name for each in found[:3]]
    assert set(names) <= {"width=0.5,bits=8", "width=0.5,bits=32"}
    assert names.count("width=0.5,bits=8") >= 2  # trained with rounded numbers
    for chosen in (each.chosen for each in found[:3]):
        loaded = models.load(chosen.path)
        same = models.predict(loaded, space["images"]).argmax(-1) == chosen.model(space["images"]).argmax(-1)
        assert same.mean() >= 0.999

"""Language models of bytes: a small run, its resume, and bad input."""

import json
import shutil
from types import SimpleNamespace

import kd_text
import numpy as np
import pytest
from faults.whole_runs import compare
from harness import language, runs

from distill_jax.losses.tokens import TopK

EXPERIMENT = kd_text


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """A folder of small texts."""
    folder = tmp_path_factory.mktemp("books")
    words = ["see", "the", "cat", "and", "a", "dog", "run", "home"]
    rng = np.random.default_rng(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, 120)))
    return folder


def small(folder):
    return [
        *("smoke", "--dataset", str(folder), "--length", "16", "--prompt", "4", "--teacher", "8", "1", "2", "8"),
        *("--student", "8", "1", "2", "4", "--steps", "3", "--batch-size", "8", "--samples", "32"),
        *("--teacher-rounds", "2", "--evaluated", "16", "--save-seconds", "0"),
    ]  # fmt: skip


SMALL: list[str] = []


# One of each kind: the others differ from KL in the divergence
METHODS = (
    "scratch",
    "KL",
    "on-policy",
    "sequence-level",
    "top-k, OTHER from text",
    "top-k, renormalised",
    "sampled",
)


def test_a_whole_run_and_its_resume(tmp_path, books, run, monkeypatch):
    out = tmp_path / "run"
    options = ("--methods", *METHODS, "--rounds", "2", "--time-rounds", *"3223222", "--out", out)
    status, _, error = run(*options, small=small(books))
    assert status == 0, error
    found = json.loads((out / "results.json").read_text())["models"]
    assert list(found) == ["teacher", "scratch, long", *METHODS]
    assert found["top-k, OTHER from text"]["bytes_per_token"] == 12 + 13 * 2
    assert found["scratch"]["rounds"] == [2, 3]
    assert found["scratch"]["bits"][0] != found["scratch"]["bits"][1]
    assert found["KL"]["bits"][0] == found["KL"]["bits"][1]
    assert all(0 < model["bits"][0][0] < 9 for model in found.values())
    for picture in ("tokens.png", "time.png"):
        assert (out / picture).stat().st_size > 500
    assert "excess %" in (out / "report.md").read_text()
    assert runs.files_of_run(out)[1] == []

    # As if killed while the teacher wrote, and again at equal time
    shutil.copytree(out, tmp_path / "calm")
    for name in ("labels/texts", "sequence-level-rate-0.01", "scratch-equal-time-rate-0.01"):
        shutil.rmtree(out / "seed0" / name)
    monkeypatch.setattr(kd_text, "draw", lambda *given: {})
    assert run(*options, small=small(books))[0] == 0
    compare(tmp_path / "calm", out)


def test_equal_time_is_that_of_the_slowest_method_with_what_is_stored(tmp_path):
    seconds = {"fast": [0.1, 9.0, 0.1], "slow": [0.3, 0.3], "stored": [0.1, 0.1]}  # 9 s: it was compiled
    done = {name: SimpleNamespace(history={"seconds": each}) for name, each in seconds.items()}
    stores = [99.0, 99.0, 0.05]  # measured once, also when the run goes on
    rows = {"weight": np.ones(100)}
    lesson = SimpleNamespace(
        config=SimpleNamespace(steps=10, rounds=4, batch_size=2, time_rounds=()),
        run=SimpleNamespace(directory=tmp_path),
        methods={name: SimpleNamespace(stored="labels" if name == "stored" else "") for name in seconds},
        stored={
            "": SimpleNamespace(examples=rows, seconds=lambda: 0.0),
            "labels": SimpleNamespace(examples=rows, seconds=stores.pop),
        },
    )  # fmt: skip
    found = kd_text.Lesson.equal_time(lesson, done)
    # Rounds of 1, 3 and 1 s: four of the slowest take 12 s. A round reads 20 rows, whose labels take 1 s; all take 5 s
    assert found["rounds"] == {"fast": 12, "slow": 4, "stored": 7}
    assert found["seconds"]["all"] == pytest.approx(12)
    np.testing.assert_allclose(found["seconds"]["spent"]["stored"], [2, 4, 6, 8, 10, 11, 12])
    assert kd_text.Lesson.equal_time(lesson, done) == found
    assert len(stores) == 2


def test_the_first_seed_chooses_the_learning_rate_by_validation():
    lesson = object.__new__(kd_text.Lesson)
    lesson.config, lesson.rates = kd_text.Config(learning_rates=(0.1, 0.2, 0.3)), {}
    losses = {0.1: [3.0, 2.0], 0.2: [1.0, 1.5], 0.3: [1.2, 1.1]}

    def student(name, seed, rounds, rate):
        return SimpleNamespace(history={"validation_loss": losses[rate]}, made=(name, seed, rounds, rate))

    lesson.student = student
    assert [lesson.at_equal_tokens("KL", seed).made for seed in (0, 1)] == [
        ("KL", seed, 5, 0.2) for seed in (0, 1)
    ]


def test_the_rate_rises_and_falls_over_a_share_of_the_steps():
    tx = language.adam(1.0, 10, warmup=0.5)
    state = tx.init({"w": np.ones(())})
    sizes = []
    for _ in range(10):
        updates, state = tx.update({"w": np.float32(1e-3)}, state)
        sizes.append(-float(updates["w"]))
    shape = [min(1, (n + 1) / 5) * 0.5 * (1 + np.cos(np.pi * n / 10)) for n in range(10)]
    np.testing.assert_allclose(sizes, shape, rtol=2e-3)  # Adam's own step is 1


def test_teachers_probabilities_without_other_and_the_excess():
    labels = TopK(np.array([[3, 1]]), np.log(np.array([[0.5, 0.25, 0.25]])), 1.0)
    kept = np.exp(language.renormalised(labels).log_probs)
    np.testing.assert_allclose(kept, [[2 / 3, 1 / 3, 0]], rtol=1e-6)
    assert language.excess({"on_own": [0.3, 0.1], "on_data": [0.2, 0.2]}) == pytest.approx([50, -50])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset nope", "must be one of stdlib, python-doc, bible"),
        ("--steps 1000", "--steps must be at most"),
        ("--samples 8", "--samples must lie between --steps × --batch-size, 24, and"),
        ("--prompt 17", "--prompt must be at most --length"),
        ("--top 256", "--top must be below 256"),
        (
            "--methods scratch KL",
            "--methods must name scratch, KL, 'top-k, OTHER from text' and perhaps others",
        ),
        ("--rounds 2", "--rounds must be at least 3 without --time-rounds"),
        ("--methods KL other", "--methods must be from scratch, KL"),
        ("--time-rounds 1 2", "--time-rounds must be none, or 10 numbers: scratch, KL"),
        ("--student 6 1 4 8", "width must be a multiple of heads"),
    ],
)
def test_bad_options(tmp_path, books, run, options, message):
    status, _, error = run(*options.split(), "--out", tmp_path / "run", small=small(books))
    assert status == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1

"""Distillation of networks that read characters: small runs, what the students learn from, the figures by face."""

import dataclasses
import json
import types
from pathlib import Path

import kd_characters
import kd_characters_report
import matplotlib
import numpy as np
import pytest
from harness import distortions, experiment, pictures, readers, runs

from distill_jax import data, models

EXPERIMENT = kd_characters
SMALL = [
    *("smoke", "--teacher", "mlp:8", "--students", "mlp:4", "--temperatures", "1", "4", "--labelled", "70"),
    *("--epochs", "1", "--teacher-epochs", "1", "--save-seconds", "0", "--warmup", "2"),
]
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_whole_run_on_fonts(tmp_path, run, monkeypatch):
    pytest.importorskip("PIL")
    out = tmp_path / "run"
    monkeypatch.setattr(kd_characters_report.results, "draw", lambda *arguments: {})  # tested elsewhere
    words = (
        "few --seeds 1 --teacher mlp:8 --students mlp:4 mlp:5 --temperatures 1 4 --labelled 2 --curve 0 "
        "--epochs 1 --teacher-epochs 1 --save-seconds 0 --data-dir"
    )
    few = [*words.split(), str(FONTS)]
    status, printed, error = run("--out", out, small=few)
    assert status == 0, error
    results = json.loads((out / "results.json").read_text())
    one = ["scratch", "scratch, teacher's recipe", "labelled faces", "hard labels", "distilled"]
    one += ["distilled, T = 1", "distilled, T = 4"]
    one += ["true labels, all faces", "scratch on all", "distilled on all"]
    names = [f"{network}, {name}" for network in ("mlp:4", "mlp:5") for name in one]
    assert list(results["models"]) == ["teacher", *names]
    # The chosen temperature is one of the two
    for network in ("mlp:4", "mlp:5"):
        chosen = results["temperatures"][f"{network}, distilled"]
        same = results["models"][f"{network}, distilled, T = {chosen:g}"]["test"]
        assert results["models"][f"{network}, distilled"]["test"] == same
    for model in results["models"].values():
        assert {"group_accuracy", "lookalikes"} <= model["test"].keys()
        assert all(len(values) == 1 for values in model["test"].values())
    assert "A smoke test" in printed
    assert "better by more than two standard errors: not known from one seed" in printed
    assert (
        "The teacher has learned the true labels of all faces, also of those that are unlabelled" in printed
    )
    assert "nothing was chosen for students from scratch, which learn from 124 labelled" in printed
    # What is the same is trained once
    trained = {path.name for path in (out / "seed0").iterdir() if path.is_dir()}
    assert not [name for name in trained if "on-all" in name]
    assert len(trained) == 2 + 2 * (1 + 1 + 2 + 1 + 2 + 1)
    for name in ("lookalikes", "hesitation", "faces"):
        assert (out / f"{name}.png").stat().st_size > 500
    assert runs.files_of_run(out)[1] == []  # --restart may delete everything


def test_all_labels_known(tmp_path, run):
    """Without unlabelled examples there is nothing but scratch and distilled.

    The pictures are floats of two channels and all alike, so all models make as many errors, and --check complains.
    """
    image, label = np.full((40, 4, 4, 2), 0.5, np.float32), np.arange(40) % 2
    np.savez(tmp_path / "grey.npz", x_train=image, y_train=label, x_test=image, y_test=label)
    words = ("--dataset", tmp_path / "grey.npz", "--batch-size", "8", "--labelled", "0", "--check")
    status, _, error = run(*words, "--out", tmp_path / "run")
    assert (status, len(error.strip().splitlines())) == (2, 1)
    assert "--teacher-distortion must be 0, as it is not known whether grey is print or speech" in error
    status, printed, error = run(*words, "--teacher-distortion", "0", "--out", tmp_path / "run")
    assert status == 1
    assert error.endswith("check failed: distillation does not raise the test accuracy of mlp:4\n")
    for name in ("gallery", "hesitation"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 500
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["models"]) == [
        "teacher", "scratch", "scratch, teacher's recipe", "distilled", "patient",
    ]  # fmt: skip
    assert "hard labels" not in printed
    assert "Against the same student from scratch with the teacher's recipe" in printed
    assert "group_accuracy" not in results["models"]["teacher"]["test"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--labelled", "5000"), "--labelled must be below the number of training faces, 1081"),
        (("--curve", "3", "5000"), "--curve must be at most the number of training faces, 1081"),
        (("--curve", "0", "1081"), "--curve must name each number once"),
        (("--temperatures",), "--temperatures must name one or more"),
        (("--students", "mlp:4", "mlp:4"), "--students must name one or more, each once"),
        (("--students", "mlp:0"), "mlp:0"),
        (("--teacher-distortion", "9"), "--teacher-distortion must be at most 4"),
        (("--temperatures", "1", "1.0000001"), "--temperatures must differ in their first six digits"),
        (("--temperatures", "0"), "--temperatures must be positive"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, run, words, message):
    status, _, error = run(*words, "--out", tmp_path / "run")
    assert (status, len(error.strip().splitlines())) == (2, 1)
    assert message in error
    assert not (tmp_path / "run").exists()


def small_data(people=None):
    """Nine examples of three faces and two groups; the first six are the training data."""
    image = np.zeros((9, 2, 2, 1), np.uint8)
    label = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0], np.int32)
    parts = [data.Split(np.arange(a, b), image[a:b], label[a:b]) for a, b in ((0, 6), (6, 6), (6, 9))]
    of = np.array([0, 0, 1, 1, 2, 2, 3, 3, 4], np.int32)
    origins = data.Origins(of, tuple("abcde"), np.array([0, 1, 2, 3, 4]), tuple("ABCDE"), ())
    return data.Dataset("glyphs", "here", *parts, 2, ("0", "O"), origins, people)


class FakeTrainer:
    """Notes what each model would learn from; labels come from a teacher that always names class 1.

    The validation pictures are of class 0, and a student names it at its best temperature alone.
    """

    def __init__(self, **options):
        self.best = {"labelled faces": 1.0, "distilled": 2.0, "distilled on 2": 4.0, "patient": 4.0}
        self.config, self.given = kd_characters.Config(students=("mlp:1",), **options), {}
        self.recipes = {}
        self.run = self
        dataset = small_data()
        some = data.Split(*(x[[0, 2, 4]] for x in dataset.train))
        self.dataset = dataset._replace(validation=some)

    def __call__(self, name, seed, network, examples, temperature=None, recipe="", online=None):
        self.given[name], self.recipes[name] = examples, recipe
        assert (online == "the teacher") == (recipe == "teacher_" and temperature is not None)
        right = temperature == self.best.get(name.partition(", T =")[0])
        return experiment.Trained(
            "the " + name, {}, 0.0, np.tile([1.0, 0.0] if right else [0.0, 1.0], (3, 1))
        )

    def store_labels(self, seed, model):
        return np.tile(np.float32([0, 1]), (6, 1))


def test_what_students_learn_from():
    trainer = FakeTrainer(
        labelled=1, temperatures=(1.0, 2.0, 4.0), curve=(2, 1, 3), control=True, patient=True
    )
    found = kd_characters.train_seed(trainer, 0, chosen := {})
    given = trainer.given
    assert list(found) == [
        "teacher",
        "scratch",
        "scratch, teacher's recipe",
        "labelled faces",
        "hard labels",
        "distilled",
        "patient",
        "true labels, all faces",
        "scratch on 2",
        "distilled on 2",
        "scratch on 1",
        "distilled on 1",
        "scratch on 3",
        "distilled on 3",
    ]
    # What has been learned is not learned again under another name, and a temperature is chosen as before
    assert not [name for name in given if name.partition(", T")[0].endswith((" on 1", " on 3"))]
    assert found["scratch on 1"] is found["scratch"]
    assert found["distilled on 1"] is found["labelled faces"]
    assert found["scratch on 3"] is found["true labels, all faces"]
    assert found["distilled on 3"] is found["distilled"]
    recipes = trainer.recipes
    assert {name for name in recipes if recipes[name]} == {
        "teacher", "scratch, teacher's recipe", "patient, T = 1", "patient, T = 2", "patient, T = 4",
    }  # fmt: skip
    np.testing.assert_array_equal(given["patient, T = 1"]["image"], given["teacher"]["image"])
    np.testing.assert_array_equal(given["scratch, teacher's recipe"]["label"], given["scratch"]["label"])
    np.testing.assert_array_equal(given["true labels, all faces"]["label"], [0, 1, 0, 1, 0, 1])
    again = {"distilled on 1": 1.0, "distilled on 3": 2.0}
    assert chosen == trainer.best | again  # the fewest validation errors
    assert all(len(examples["label"]) == 6 for examples in given.values())
    # One face has the labels 0 and 1; of the others the teacher says 1
    np.testing.assert_array_equal(given["scratch"]["label"], [0, 1, 0, 1, 0, 1])
    assert sorted(given["hard labels"]["label"]) == [0, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(given["distilled, T = 1"]["label"], given["hard labels"]["label"])
    assert sorted(given["distilled on 2, T = 2"]["label"]) == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(given["teacher"]["label"], [0, 1, 0, 1, 0, 1])
    # The next seed is trained at the chosen temperature alone
    trainer.given = {}
    kd_characters.train_seed(trainer, 1, chosen)
    assert [name for name in trainer.given if "T =" in name] == [
        "labelled faces, T = 1", "distilled, T = 2", "patient, T = 4", "distilled on 2, T = 4",
    ]  # fmt: skip


def test_accuracy_by_face(monkeypatch):
    """Two test pictures of one face, d, and one of another, e; labels 0, 1, 0."""
    monkeypatch.setattr(readers, "WORST", 1)
    found = {"models": {"teacher": {"test": {}}, "scratch": {"test": {}}}}
    # The first seed's teacher reads 2 of 3 pictures, by group 3 of 4; the second's reads none of e
    teachers, scratch = np.eye(2)[[[0, 0, 0], [0, 0, 1]]], np.eye(2)[[1, 1, 1]]
    worst = readers.by_face(small_data(), found, [{"teacher": t, "scratch": scratch} for t in teachers])
    assert worst == ["d"]  # both faces are read half by the teachers, and d comes first
    assert found["models"]["teacher"]["test"] == {
        "group_accuracy": [0.75, 0.25],
        "readable_accuracy": [1.0, 0.0],
    }
    assert found["models"]["scratch"]["test"] == {
        "group_accuracy": [0.25, 0.25],
        "readable_accuracy": [0.0, 0.0],
    }


def test_lookalikes_are_counted():
    dataset = small_data()._replace(class_names=("0", "O", "o", "1"))
    assert readers.mistaken(dataset, np.eye(4)[[0, 1, 0]]) == 0
    assert readers.mistaken(dataset, np.eye(4)[[1, 3, 2]]) == 2  # 0 for O, and 0 for o, but not O for 1
    assert (
        readers.mistaken(dataset._replace(class_names=("0", "O")), np.eye(2)[[1, 1, 1]]) == 0
    )  # without "o"


def test_the_curve_and_the_lead(tmp_path, monkeypatch):
    """Errors of three test pictures, in per cent, on one face and on all three; then mean validation errors."""
    drawn = {}
    monkeypatch.setattr(pictures, "curves", lambda path, x, series, **axes: drawn.update(series, x=x))
    right, one, none = np.eye(2)[[[0, 1, 0], [0, 1, 1], [1, 0, 1]]]
    seeds = [
        {
            "scratch on 1": a,
            "scratch on all": one,
            "distilled on 1": one,
            "distilled on all": right,
            "distilled": b,
        }
        for a, b in ((none, right), (one, one))
    ]
    config = kd_characters.Config(curve=(0, 1), students=("mlp:1",))
    run = types.SimpleNamespace(config=config, dataset=small_data(), directory=tmp_path)
    assert list(kd_characters_report.draw_curve(run, seeds, "").values()) == ["faces.png"]
    third = 100 / 3
    expected = {
        "scratch": [[100, third], [third, third]], "distilled": [[third, 0], [third, 0]],
        "teacher's labels, all faces": [[0, 0], [third, third]], "x": [1, 3],
    }  # fmt: skip
    assert drawn.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(drawn[name], values, err_msg=name)
    errors = {"teacher": [3, 6], "scratch": [8, 9], "distilled": [1, 1]}
    found = {"models": {name: {"validation": {"errors": values}} for name, values in errors.items()}}
    assert (
        kd_characters_report.lead(config, found)
        == "Mean validation errors: teacher 4.5; from scratch mlp:1 8.5."
    )


def test_the_verdict():
    def entry(parameters, *accuracy):
        return {"parameters": parameters, "test": {"accuracy": list(accuracy)}}

    found = {
        "models": {
            "teacher": entry(1000, 0.9, 0.92),
            "scratch": entry(100, 0.8, 0.82),
            "hard labels": entry(100, 0.84, 0.85),
            "distilled": entry(100, 0.85, 0.88),
        }
    }
    config = kd_characters.Config(students=("mlp:1",), labelled=4, seeds=2)
    said = kd_characters_report.verdict(config, found, {"distilled": 2.0})
    assert (
        "T = 2 changed the test accuracy of mlp:1 (parameters: 10 % of the teacher's) by +5.50 ± 0.50 points"
        in said
    )
    assert "(55 ± 5 % of its distance to the teacher)" in said
    assert "hard labels: +2.00 ± 1.00 points (better by more than two standard errors: no)" in said
    found["models"]["hard labels"]["test"]["accuracy"] = [0.83, 0.859]
    said = kd_characters_report.verdict(config, found, {"distilled": 2.0})
    assert "+2.05 ± 0.05 points (better by more than two standard errors: yes)" in said
    assert "recipe" not in said
    found["models"]["scratch, teacher's recipe"] = entry(100, 0.86, 0.88)
    said = kd_characters_report.verdict(dataclasses.replace(config, control=True), found, {"distilled": 2.0})
    assert "from scratch with the teacher's recipe: −0.50 ± 0.50 points" in said
    found["models"]["patient"] = entry(100, 0.9, 0.91)
    both = dataclasses.replace(config, control=True, patient=True)
    said = kd_characters_report.verdict(both, found, {"distilled": 2.0})
    assert "(patient), against scratch, teacher's recipe: +3.50 ± 0.50 points" in said
    found["models"]["teacher"] = entry(1000, 0.8, 0.8)
    assert "(the teacher does not lead)" in kd_characters_report.verdict(config, found, {"distilled": 2.0})


def test_what_must_be_known_to_compare_is_said():
    def said(**options):
        return " ".join(kd_characters_report.explain(kd_characters.Config(**options), small_data()))

    assert "--control trains students from scratch with its recipe" in said()
    assert "--control" not in said(control=True)
    assert "--control" not in said(epochs=2, distortion=0.25)  # as the teacher has
    assert "which learn from 6 labelled training examples" in said()
    assert "which learn from 4 labelled training examples" in said(labelled=2)
    assert "of the undistorted ones" in said(distortion=0.1)
    assert "of the undistorted ones" not in said()


def small_speech():
    """Pictures of 36 characters by voices, and by two people."""
    names = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    random, label = np.random.default_rng(0), np.tile(np.arange(36), 6).astype(np.int32)
    image = random.integers(0, 255, (216, 8, 8, 1)).astype(np.uint8)
    bounds = {"train": (0, 72), "validation": (72, 108), "test": (108, 144), "people": (144, 216)}
    parts = {part: data.Split(np.arange(a, b), image[a:b], label[a:b]) for part, (a, b) in bounds.items()}
    of, voices = np.repeat(np.arange(6), 36).astype(np.int32), tuple("abcdef")
    origins = data.Origins(of, voices, np.arange(6), voices, ())
    return data.Dataset("spoken", "here", **parts, classes=36, class_names=names, origins=origins)


def test_speech_has_a_second_test_column_of_people(tmp_path, monkeypatch, run):
    monkeypatch.setattr(experiment, "load", lambda config: small_speech())
    small = [
        "spoken",
        *SMALL[1:],
        "--labelled",
        "0",
        "--batch-size",
        "36",
        "--seeds",
        "1",
        "--temperatures",
        "1",
    ]
    status, printed, error = run("--out", tmp_path / "run", small=small)
    assert status == 0, error
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for model in results["models"].values():
        assert len(model["test"]["people_accuracy"]) == 1
    assert "people %" in printed
    assert "Accuracy on 72 recordings of people, per cent, with standard errors over" in printed
    assert "By speaker (e, f): teacher " in printed
    assert "Mean validation errors: teacher " in printed
    for name in ("confusion_people", "lookalikes_people", "hesitation_people", "lookalikes"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 500


def test_speech_without_its_program_is_one_line(tmp_path, monkeypatch, run):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, _, error = run("--out", tmp_path / "run", small=["spoken"])
    assert (status, len(error.strip().splitlines())) == (2, 1)
    assert "synthesised by espeak-ng, which is not installed: apt-get install" in error


def test_standard_errors_are_over_recordings():
    """Of two recordings the models read the first, in all seeds, or in one of two."""
    first, second, label = np.eye(2)[[0, 0]], np.eye(2)[[1, 0]], np.array([0, 1])

    # By two speakers, d and e
    dataset = small_data(data.Split(np.array([7, 8]), np.zeros((2, 2, 2, 1), np.uint8), label))

    def answers(*seeds):
        return [
            models.Model(lambda params, state, x, key=None, out=out: (out, state), {}, {}) for out in seeds
        ]

    each = {
        "scratch": answers(second, first),
        "distilled": answers(first, first),
        "teacher": answers(first, first),
    }
    trained = [
        {name: experiment.Trained(seeds[i], {}, 0.0, np.zeros(0)) for name, seeds in each.items()}
        for i in (0, 1)
    ]
    found = {"models": {name: {"test": {}} for name in each}}
    (line,) = readers.on_people(dataset, found, readers.people_logits(dataset, trained))
    assert found["models"]["scratch"]["test"] == {"people_accuracy": [0.0, 0.5]}
    assert "scratch 25.0 ± 25.0; distilled 50.0 ± 50.0" in line
    assert "above scratch: distilled 25.0 ± 25.0." in line
    assert line.endswith("By speaker (d, e): scratch 50, 0; distilled 100, 0; teacher 100, 0.")
    assert readers.people_logits(small_data(), trained) == []
    assert readers.on_people(small_data(), found, []) == []


@pytest.mark.parametrize(
    ("name", "like"), [("glyphs", "emnist/byclass"), ("spoken", "speech_commands:0.0.3")]
)
def test_distortion_is_mild_and_depends_on_the_key(name, like):
    import jax

    images = np.zeros((2, 16, 16, 1), np.uint8)
    images[:, 6:10, 6:10] = 255
    batch = {"image": images, "label": np.zeros(2)}
    dataset = small_data()._replace(name=name)
    other = dataset._replace(name=like)
    moved = [
        distortions.distorted(which, 0.5)(None, batch, jax.random.key(k))["image"]
        for which, k in ((dataset, 0), (other, 0), (dataset, 1))
    ]
    np.testing.assert_array_equal(moved[0], moved[1])  # data of one kind are distorted alike
    assert np.abs(moved[0] - moved[2]).max() > 0.1
    assert 0 <= moved[0].min() <= moved[0].max() <= 1
    assert 8 < moved[0][0].sum() < 40
    np.testing.assert_array_equal(
        distortions.distorted(dataset, 0.0)(None, batch, jax.random.key(0))["image"], images / 255
    )


def test_pictures_of_characters(tmp_path):
    names, groups = list("0Oo1"), ["0Oo"]
    counts = {"scratch": np.eye(4) * 8 + 1, "distilled": np.eye(4)}
    pictures.lookalikes(tmp_path / "a.png", counts, names, groups)
    probabilities = np.full((9, 4), 0.25)
    images, labels = np.zeros((9, 8, 8, 1)), np.arange(9) % 4
    pictures.hesitation(tmp_path / "b.png", images, labels, probabilities, names)
    assert min((tmp_path / f"{name}.png").stat().st_size for name in "ab") > 500
    with pytest.raises(ValueError, match="groups must be made of class names, got 'x'"):
        pictures.lookalikes(tmp_path / "a.png", counts, names, ["0x"])
    with pytest.raises(ValueError, match=r"counts of distilled must be \[classes, classes\]"):
        pictures.lookalikes(tmp_path / "a.png", counts | {"distilled": np.eye(3)}, names, groups)
    with pytest.raises(ValueError, match=r"probabilities must be \[n, classes\]"):
        pictures.hesitation(tmp_path / "b.png", images, labels, probabilities[:, :3], names)

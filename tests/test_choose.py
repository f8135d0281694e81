"""The choice on validation data: what it picks from made-up results, where it stops, what it never reads."""

import json

import jax
import jax.numpy as jnp
import kd_mnist
import numpy as np
import pytest
from harness import adam, arrays, choose, choosing, config_of_data, many, plain
from harness.options import given_options

from distill_jax import data, train
from distill_jax.models import Model, build

EXPERIMENT = kd_mnist
SMALL = [
    *("digits", "--seeds", "1", "--members", "1", "--teacher", "convnet:4", "--student", "mlp:8"),
    *("--teacher-epochs", "1", "--epochs", "1", "--save-seconds", "0"),
]
CONFIG = kd_mnist.CHOOSE
COUNT = 200


class Untouchable:
    """A test split that must not be read."""

    def __getattribute__(self, name):
        raise AssertionError(f"the test split was read: {name}")

    def __iter__(self):
        raise AssertionError("the test split was read")


def numbered():
    """Images whose first pixel is their own number, so that made-up models know which example they see."""
    image = np.zeros((COUNT, 8, 8, 1), np.uint8)
    image[:, 0, 0, 0] = np.arange(COUNT)
    split = data.Split(np.arange(COUNT), image, np.arange(COUNT, dtype=np.int32) % 2)
    return data.Dataset("numbered", "made up", split, split, Untouchable(), 2, ("0", "1"))


def with_errors(*counts, single=False):
    """A model of students, or of a single network, that err on their first so many examples."""
    right = np.eye(2, dtype=np.float32)[np.arange(COUNT) % 2]
    tables = jnp.asarray(
        np.stack([np.where(np.arange(COUNT)[:, None] < n, 1 - right, right) for n in counts], 1)
    )
    if single:
        tables = tables[:, 0]

    def apply_fn(params, state, x, *, key=None):
        return 20 * params[jnp.round(x[:, 0, 0, 0] * 255).astype(jnp.int32)], state

    return Model(apply_fn, tables)


@pytest.fixture
def made_up(monkeypatch):
    """Puts made-up errors in the place of training."""

    def install(scratch, teacher, students):
        scratch, students = iter(scratch), iter(students)

        def train_many(student, objective, settings, examples, **options):
            return with_errors(*next(students if "alpha" in settings else scratch))

        def network(self, number, split):
            config = self.config
            options = config.teacher, config.jitter, config.teacher_epochs, config.members
            return with_errors(teacher(*options), single=True)

        monkeypatch.setattr(many, "train_many", train_many)
        monkeypatch.setattr(choosing.Choosing, "network", network)

    return install


def students(**best):
    """12 students, temperature 1, 2, 4, 8 with α 0, 0.5, 0.9 each; all make 40 errors except the ones given."""
    return [best.get(f"s{i}", 40) for i in range(12)]


def test_the_fewest_validation_errors_win(made_up):
    made_up(
        scratch=[(60, 50, 55), (52, 58, 45)],
        teacher=lambda name, jitter, *_: {("convnet:16,32", 1): 10}.get((name, jitter), 15),
        students=[students(s5=30), students(s1=31), students(s7=20, s8=25)],
    )
    choice = choose.choose(CONFIG, numbered(), say=lambda line: None)
    assert choice.leads
    expected = {
        "teacher": "convnet:16,32", "jitter": 1, "student": "mlp:128", "learning_rate": 1e-2, "labels": "online",
        "alpha": 0.5, "student_jitter": 1,
    }  # fmt: skip
    assert expected.items() <= (vars(CONFIG) | choice.chosen).items()
    assert (vars(CONFIG) | choice.chosen)["temperature"] == 4
    assert "members" not in choice.chosen
    stages = [entry["stage"] for entry in choice.tried]
    assert [stages.count(s) for s in ("scratch", "teacher", "student")] == [6, 2, 36]
    best = min((e for e in choice.tried if e["stage"] == "student"), key=lambda e: e["validation_errors"])
    assert best == {
        "stage": "student", "labels": "online", "temperature": 4.0, "alpha": 0.5, "validation_errors": 20
    }  # fmt: skip
    assert (
        "Chosen: labels online, T = 4, α = 0.5: 20 validation errors, 25 ± 5 below the bar." in choice.lines
    )
    json.dumps(choice)


def test_options_of_the_user_are_kept(made_up):
    made_up([(50,), (50,)], lambda *_: 10, [[40] * 3])
    config = kd_mnist.Config(
        teacher="mlp:9", temperature=3.0, labels="held-out", learning_rate=0.5, dropout=0.0
    )
    fixed = ("teacher", "temperature", "labels", "learning_rate", "dropout")
    choice = choose.choose(config, numbered(), fixed=fixed, say=lambda line: None)
    assert not set(fixed) & set(choice.chosen)
    assert {e["temperature"] for e in choice.tried if e["stage"] == "student"} == {3.0}
    assert {e["teacher"] for e in choice.tried if e["stage"] == "teacher"} == {"mlp:9"}


@pytest.mark.parametrize("force", [False, True])
def test_without_a_leading_teacher_it_stops(made_up, force):
    made_up([(20, 20, 20)] * 2, lambda name, jitter, epochs, _: 18 - (epochs > 40), [students()] * 3)
    choice = choose.choose(kd_mnist.Config(force=force), numbered(), say=lambda line: None)
    assert not choice.leads
    assert any(line.startswith("No teacher leads") for line in choice.lines)
    assert ("labels" in str(choice.tried)) == force
    teachers = [entry for entry in choice.tried if entry["stage"] == "teacher"]
    first, longer, three = teachers[0], *teachers[-2:]
    assert longer["teacher_epochs"] == three["teacher_epochs"] == 2 * first["teacher_epochs"]
    assert [entry["members"] for entry in teachers] == [1, 1, 1, 1, 3]


def test_more_members_can_lead(made_up):
    made_up([(30, 30, 30)] * 2, lambda *options: 5 if options[-1] == 3 else 28, [students()] * 3)
    choice = choose.choose(CONFIG, numbered(), say=lambda line: None)
    assert choice.leads
    assert choice.chosen["members"] == 3


def test_a_part_of_the_data_for_the_choice(made_up):
    made_up([(30, 30, 30)] * 2, lambda *options: 5, [students()] * 3)
    effort = choose.Effort(
        examples=100, student_images=2_000, student_epochs=(1, 99), teacher_images=800, teacher_epochs=(1, 99)
    )
    choice = choose.choose(CONFIG, numbered(), effort=effort, say=lambda line: None)
    assert choice.lines[0].startswith("The choice uses 100 of 200 training images and 200 validation images.")
    assert {e["teacher_epochs"] for e in choice.tried if e["stage"] == "teacher"} == {8}
    assert (choice.chosen["epochs"], choice.chosen["teacher_epochs"]) == (10, 4)  # for all of them


def test_a_whole_choice_reads_no_test_image():
    digits = data.load("digits")
    rows = slice(0, 150)
    small = digits._replace(
        train=data.Split(*(f[rows] for f in digits.train)), validation=data.Split(*(f[:50] for f in digits.validation)),
        test=Untouchable(),
    )  # fmt: skip
    effort = choose.Effort(
        student_images=150, student_epochs=(1, 1), teacher_images=150, teacher_epochs=(1, 1)
    )
    config = kd_mnist.Config(force=True, members=1, student="mlp:4", teacher="convnet:2", teacher_epochs=1)
    fixed = ("student", "teacher", "members", "teacher_epochs", "alpha")
    printed = []
    choice = choose.choose(config, small, fixed=fixed, effort=effort, say=printed.append)
    assert len(choice.tried) == 6 + 2 + 3 * 4
    assert [line.partition("] ")[2] for line in printed] == choice.lines


def test_students_in_one_program_learn_what_they_learn_alone():
    digits = data.load("digits")
    examples = {name: values[:128] for name, values in arrays(digits.train).items()}
    examples["teacher"] = np.random.default_rng(0).normal(size=(128, 10)).astype(np.float32)
    student = build("mlp:6", (8, 8, 1), 10, jax.random.key(0))
    settings = {"learning_rate": [1e-2, 3e-2], "temperature": [1.0, 4.0], "alpha": [0.0, 0.5]}
    options = {"epochs": 2, "batch_size": 32, "seed": 3, "transform": plain}

    def objective(setting):
        return train.distill(temperature=lambda s: setting["temperature"], alpha=lambda s: setting["alpha"])

    together = many.train_many(student, objective, settings, examples, **options)
    x = digits.validation.image[:20] / np.float32(255)
    for i in range(2):
        rate, temperature, alpha = (values[i] for values in settings.values())
        alone = many.fit(
            student,
            train.distill(temperature=temperature, alpha=alpha),
            adam(rate, 2, 4),
            examples,
            **options,
        )
        np.testing.assert_allclose(together(x)[:, i], alone(x), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("words", "config"),
    [
        (["--dataset", "digits"], "digits"),
        (["--seeds", "2", "--dataset=a.npz"], "choose"),
        (["--dataset", "mnist"], "mnist"),
    ],
)
def test_data_without_a_config_of_their_own_are_chosen_for(words, config):
    assert config_of_data(given_options(words)) == config


@pytest.fixture
def npz(tmp_path):
    digits = data.load("digits")
    path = tmp_path / "own.npz"
    train_, test = digits.train, digits.test
    np.savez(path, x_train=train_.image, y_train=train_.label, x_test=test.image, y_test=test.label)
    return path


@pytest.mark.parametrize("labels", ["online", "held-out"])
def test_the_main_job_uses_the_choice(labels, npz, tmp_path, run, monkeypatch):
    made = choose.Choice(
        {"labels": labels, "temperature": 2.0, "student_jitter": 1}, True, [{"x": 1}], ["It was so."]
    )
    monkeypatch.setattr(choose, "choose", lambda *a, **k: made)
    out = tmp_path / "run"
    command = ["--dataset", npz, "--out", out]
    assert run(*command, small=SMALL[1:])[0] == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["config"]["labels"], results["config"]["temperature"]) == (labels, 2.0)
    report = (out / "report.md").read_text()
    augmented = ["scratch, augmented"] if labels == "online" else []
    assert list(results["models"]) == ["teacher", "scratch", *augmented, "distilled"]
    assert "- It was so." in report
    assert ("Against 'scratch, augmented', distillation" in report) == (labels == "online")
    assert json.loads((out / "choice.json").read_text())["tried"] == [{"x": 1}]

    monkeypatch.setattr(choose, "choose", None)  # a run that is continued does not choose again
    assert run(*command, small=SMALL[1:])[0] == 0


def test_the_main_job_stops_where_no_teacher_leads(npz, tmp_path, run, monkeypatch):
    monkeypatch.setattr(
        choose, "choose", lambda *a, **k: choose.Choice({}, False, [], ["No teacher leads: so."])
    )
    out = tmp_path / "run"
    status, printed, _ = run("--dataset", npz, "--out", out, small=SMALL[1:])
    assert status == 0
    assert "Nothing was distilled." in printed
    assert "No teacher leads" in (out / "report.md").read_text()
    assert not (out / "seed0").exists()
    assert run("--dataset", npz, "--out", out, "--check", small=SMALL[1:])[0] == 1

"""Options: which values are refused and in which words; named configs on the command line."""

import dataclasses
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from harness import experiment, options
from harness.options import Amount, Count, Dropout, Options, Positive, Share, Whole


@dataclass(frozen=True)
class Config(Options):
    """Some options."""

    preset: Literal["quick", "long"] = "quick"
    """which"""
    epochs: Count = 5
    """how many"""
    jitter: Whole = 0
    """pixels"""
    budget: Amount = 0.5
    """nats"""
    rates: tuple[Positive, ...] = (0.1,)
    """Adam's"""
    alpha: Share = 0.5
    """of the labels"""
    dropout: Dropout = 0.0
    """of units"""
    few: Count | None = None
    """examples"""
    names: tuple[str, ...] = ("a",)
    """of units"""
    check: bool = False
    """whether to"""


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "good", "bad", "words"),
    [
        ("seeds", [1, 9], [0, -1], "--seeds must be at least 1"),
        ("validation", [None, 1], [0], "--validation must be at least 1"),
        ("save_seconds", [0.0, INF], [-1.0, NAN], "--save-seconds must not be negative"),
        ("epochs", [1], [0], "--epochs must be at least 1"),
        ("jitter", [0, 3], [-1], "--jitter must not be negative"),
        ("budget", [0.0, 1.5], [-0.1, NAN], "--budget must not be negative"),
        ("rates", [(), (1e-9, 3.0)], [(0.1, 0.0), (-1.0,), (INF,), (NAN,)], "--rates must be pos"),
        ("alpha", [0.0, 1.0], [-0.1, 1.1, NAN], r"--alpha must lie in \[0, 1\]"),
        ("dropout", [0.0, 0.9], [-0.1, 1.0, NAN], r"--dropout must lie in \[0, 1\)"),
        ("few", [None, 1], [0], "--few must be at least 1"),
    ],
)
def test_what_a_type_allows(name, good, bad, words):
    for value in good:
        Config(**{name: value}).verify()
    for value in bad:
        with pytest.raises(ValueError, match=words) as raised:
            Config(**{name: value}).verify()
        given = " ".join(map(str, value)) if isinstance(value, tuple) else value
        assert str(raised.value).endswith(f", got {given}")


def test_what_depends_on_the_data():
    config = Config(epochs=7, few=None)
    config.at_most(7, "epochs", "few")
    with pytest.raises(ValueError, match=r"--epochs must be at most the number of .* 6, got 7"):
        config.at_most(6, "few", "epochs")
    config.among("preset", ("quick", "slow"))
    Config(names=("a", "b")).among("names", ("a", "b", "c"))
    with pytest.raises(ValueError, match="--preset must be one of slow, long, got quick"):
        config.among("preset", ("slow", "long"))
    with pytest.raises(ValueError, match="--names must be from a, b, got"):
        Config(names=("a", "c")).among("names", ("a", "b"))


def test_what_a_run_is_known_by():
    recorded = Config(epochs=7, out="somewhere", check=True, dataset="mnist").recorded()
    assert recorded["epochs"] == 7
    assert set(recorded) == {
        "validation", "seeds", "preset", "epochs", "jitter", "budget", "rates", "alpha", "dropout",
        "few", "names",
    }  # fmt: skip


CONFIGS = {
    "quick": ("Takes minutes.", Config()),
    "long": ("Takes hours.", Config(preset="long", epochs=500, seeds=2, rates=(0.5, 0.25))),
}


def read(*arguments, default="quick"):
    return options.read(CONFIGS, "What it does.", default, arguments)


@pytest.mark.parametrize(
    ("arguments", "name", "changes"),
    [
        ([], "quick", {}),
        (["quick"], "quick", {}),
        (["long"], "long", {}),
        (["--epochs", "3"], "quick", {"epochs": 3}),
        (["long", "--epochs", "3", "--rates", "0.1"], "long", {"epochs": 3, "rates": (0.1,)}),
        (["long", "--rates"], "long", {"rates": ()}),
        (["quick", "--few", "9", "--check"], "quick", {"few": 9, "check": True}),
    ],
)
def test_a_config_and_its_changes(arguments, name, changes):
    assert read(*arguments) == (name, dataclasses.replace(CONFIGS[name][1], **changes))


def test_the_default_may_be_chosen_late():
    assert read("--few", "2", default=lambda given: "long" if given == {"few": "2"} else "quick")[0] == "long"
    read("quick", default=lambda given: pytest.fail("chosen although a config was named"))


@pytest.mark.parametrize("words", [["--data-dir", "here"], ["--seeds", "2", "--data-dir=here", "--check"]])
def test_the_data_directory_is_the_one_given(words, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment.data, "load", lambda name, data_dir: seen.append((name, data_dir)))
    assert experiment.mnist_or_digits(options.given_options(words)) == "mnist"
    assert seen == [("mnist", "here")]


def test_embedded_data_where_mnist_cannot_be_had(monkeypatch, capsys):
    def load(name, data_dir):
        raise experiment.data.DataError("no network")

    monkeypatch.setattr(experiment.data, "load", load)
    assert experiment.mnist_or_digits({}) == "digits"
    assert "MNIST cannot be had: no network" in capsys.readouterr().out
    with pytest.raises(experiment.data.DataError):
        experiment.mnist_or_digits({"data_dir": "here"})


def test_a_command_line_without_words_gives_no_options():
    assert options.given_options([]) == {}


def test_the_options_on_a_command_line():
    given = options.given_options(["long", "--few", "9", "--no-check", "--data-dir=a=b", "--rates", "1", "2"])
    assert given == {"few": "9", "check": "--data-dir=a=b", "data_dir": "a=b", "rates": "1"}


def test_the_main_job_reads_a_command_line_without_config(monkeypatch):
    kd_mnist = importlib.import_module("kd_mnist")
    monkeypatch.setattr(experiment.data, "load", lambda name, data_dir: None)
    seen = []

    def start(name, config_name, config, check):
        seen.append((config_name, config.seeds))
        raise KeyboardInterrupt

    monkeypatch.setattr(kd_mnist.Run, "start", start)
    for words in (["--seeds", "3"], ["--seeds", "4", "--dataset", "digits"], ["--dataset=own.npz"]):
        monkeypatch.setattr(sys, "argv", ["kd_mnist.py", *words])
        with pytest.raises(KeyboardInterrupt):
            kd_mnist.main()
    assert seen == [("mnist", 3), ("digits", 4), ("choose", 5)]


def test_an_unknown_config_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="the config must be one of quick, long, got 'slow'"):
        read("slow")


def test_a_bad_value_is_refused():
    with pytest.raises(ValueError, match="--epochs must be at least 1, got 0"):
        read("long", "--epochs", "0")


def test_help_lists_the_configs_and_their_values(capsys):
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as exit_:
            read(flag)
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
        for text in ("What it does.", "quick", "Takes hours.", "CONFIG --help"):
            assert text in shown
    with pytest.raises(SystemExit):
        read("long", "--help")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "Takes hours.",
        "shortest time between two checkpoints",
        "(default: 500)",
        "(default: 0.5 0.25)",
    ):
        assert text in shown


def test_the_data_set_is_the_options(monkeypatch):
    seen = []
    monkeypatch.setattr(experiment.data, "load", lambda *args, **more: seen.append((args, more)))
    experiment.load(Config(dataset="mnist", data_dir="here", validation=9))
    assert seen == [(("mnist",), {"data_dir": "here", "validation": 9})]


FOLDER = Path(experiment.__file__).parents[1]
EXPERIMENTS = sorted(path.stem for path in FOLDER.glob("*.py") if "run_main(main)" in path.read_text())
assert len(EXPERIMENTS) >= 10


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_option_of_every_experiment_is_explained(name, monkeypatch, capsys):
    """All configs are allowed; each option has a help text of its own, and none of the words of old."""
    module = importlib.import_module(name)
    for chosen, (line, config) in module.CONFIGS.items():
        config.verify()
        assert len(line.split()) > 2
        monkeypatch.setattr(sys, "argv", [f"{name}.py", chosen, "--help"])
        with pytest.raises(SystemExit):
            options.read(module.CONFIGS, module.__doc__, chosen)
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for field in dataclasses.fields(config):
            option = f"--{field.name.replace('_', '-')}"
            assert re.search(rf"{option}[ ,]", shown), f"{name} {chosen} does not list {option}"
        bare = [text for text in shown.split(" --")[1:] if text.split(" ", 2)[-1].startswith("(default")]
        assert not bare, f"{name} {chosen}: no help text for {bare}"
        for word in ("likewise", "the students' ", "the teacher's)", "system S"):
            assert word not in shown
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        options.read(module.CONFIGS, module.__doc__, "digits")
    assert "experiments/" in capsys.readouterr().out

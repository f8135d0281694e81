"""Options: what is refused and in which words, and which defaults a command line starts from."""

import importlib
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal, get_args, get_type_hints

import numpy as np
import pytest
from harness import options
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
    config.fit(7, "epochs", "few")
    with pytest.raises(ValueError, match=r"--epochs must be at most the number of .* 6, got 7"):
        config.fit(6, "few", "epochs")
    config.among("preset", ("quick", "slow"))
    Config(names=("a", "b")).among("names", ("a", "b", "c"))
    with pytest.raises(ValueError, match="--preset must be one of slow, long, got quick"):
        config.among("preset", ("slow", "long"))
    with pytest.raises(ValueError, match="--names must be of a, b, got"):
        Config(names=("a", "c")).among("names", ("a", "b"))


def test_what_a_run_is_known_by():
    recorded = Config(epochs=7, out="somewhere", check=True, dataset="mnist").recorded()
    assert recorded["epochs"] == 7
    assert set(recorded) == {
        "validation", "seeds", "preset", "epochs", "jitter", "budget", "rates", "alpha", "dropout",
        "few", "names",
    }  # fmt: skip


DEFAULTS = {("quick", True): {"epochs": 50}, ("long", False): {"epochs": 500, "seeds": 2, "dataset": "mnist"}}


def parse(monkeypatch, size, *arguments, **further):
    """Reads a command line, the data being images of so many pixels: the options, the data set."""
    loaded = []

    def load(config):
        loaded.append(config)
        return SimpleNamespace(train=SimpleNamespace(image=np.zeros((3, size, size, 1))))

    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    config, dataset = options.parse(Config, "What it does.", DEFAULTS, load=load, **further)
    assert dataset.train.image.shape == (3, size, size, 1)
    assert loaded[0].dataset == config.dataset
    return config


@pytest.mark.parametrize(
    ("size", "arguments", "expected"),
    [
        (28, [], {}),
        (16, [], {}),
        (15, [], {"epochs": 50}),
        (28, ["--preset", "long"], {"preset": "long", **DEFAULTS["long", False]}),
        (8, ["--preset", "long"], {"preset": "long", **DEFAULTS["long", False]}),
        (8, ["--epochs", "3"], {"epochs": 3}),
        (28, ["--preset", "long", "--seeds", "4"],
         {"preset": "long", "epochs": 500, "dataset": "mnist", "seeds": 4}),
    ],
)  # fmt: skip
def test_defaults_depend_on_preset_and_data(monkeypatch, size, arguments, expected):
    assert parse(monkeypatch, size, *arguments) == Config(**expected)


def test_defaults_by_another_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--epochs", "7"])
    defaults = {(7, False): {"seeds": 2}}
    config, none = options.parse(Config, "", defaults, by="epochs", load=lambda config: None)
    assert none is None
    assert config == Config(epochs=7, seeds=2)


def test_the_data_set_is_the_options(monkeypatch):
    seen = []
    monkeypatch.setattr(options.data, "load", lambda *args, **more: seen.append((args, more)))
    options.load(Config(dataset="mnist", data_dir="here", validation=9))
    assert seen == [(("mnist",), {"data_dir": "here", "validation": 9})]


def test_a_bad_value_is_refused_before_the_data_is_loaded(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--epochs", "0"])
    with pytest.raises(ValueError, match="--epochs must be at least 1, got 0"):
        options.parse(Config, "", {}, load=lambda config: pytest.fail("loaded"))


def test_help_says_what_all_options_are(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        options.parse(Config, "What it does.", DEFAULTS)
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in ("What it does.", "least time between two checkpoints", "of the labels", "(default"):
        assert text in shown


EXPERIMENTS = (
    "barrier_mnist", "compress_mnist", "encoder_decoder", "inject_mnist", "interpolate_mnist",
    "kd_methods", "kd_mnist", "kd_vgg",
)  # fmt: skip


class StoppedError(Exception):
    """What is read next does not matter."""


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_starts_from_defaults_that_are_allowed(name, monkeypatch):
    experiment = importlib.import_module(name)
    seen = []

    def parse(*arguments, **further):
        seen.append((arguments, further.get("by", "preset")))
        raise StoppedError

    monkeypatch.setattr(experiment, "parse", parse)
    with pytest.raises(StoppedError):
        experiment.main()
    ((arguments, by),) = seen
    assert arguments == (experiment.Config, experiment.__doc__, experiment.DEFAULTS)
    assert any(small for _, small in experiment.DEFAULTS)
    for (chosen, _), changes in experiment.DEFAULTS.items():
        config = experiment.Config(**{**changes, **({by: chosen} if chosen else {})})
        config.verify()
        hints = get_type_hints(experiment.Config)
        assert not chosen or chosen in get_args(hints[by])

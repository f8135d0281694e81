"""Options that all experiments share, their checks, and named configs on the command line."""

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_type_hints

import tyro

C = TypeVar("C", bound="RunOptions")


class Allowed(NamedTuple):
    """The values that an option may have; a part of its type, as in ``Annotated[int, Allowed(...)]``.

    Attributes:
      words: what a value must do, such as "be at least 1".
      test: says whether a value is allowed.
    """

    words: str
    test: Callable[[Any], bool]


Count = Annotated[int, Allowed("be at least 1", lambda v: v >= 1)]
Whole = Annotated[int, Allowed("not be negative", lambda v: v >= 0)]
Amount = Annotated[float, Allowed("not be negative", lambda v: v >= 0)]
Positive = Annotated[float, Allowed("be positive and finite", lambda v: 0 < v < math.inf)]
Share = Annotated[float, Allowed("lie in [0, 1]", lambda v: 0 <= v <= 1)]
Dropout = Annotated[float, Allowed("lie in [0, 1)", lambda v: 0 <= v < 1)]


@dataclass(frozen=True)
class RunOptions:
    """The options of every run: its directory and its checkpoints.

    An experiment's own options are fields of a subclass. Values of the types of this module (``Count``,
    ``Share`` and so on, also in a tuple or beside None) are checked when they are read.

    Attributes:
      PRACTICAL: options that change where and how a run works, but not its results.
    """

    out: Path | None = None
    """directory of the run (default: a directory under runs/, named after the options)"""
    restart: bool = False
    """delete the earlier run in the directory instead of continuing it"""
    save_seconds: Amount = 20.0
    """shortest time between two checkpoints, in seconds"""

    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """where the figures of each epoch go, besides .jsonl files in the run's directory"""
    profile: bool = False
    """record a profile of one epoch of the first training that has two, and print what took the most time"""

    PRACTICAL: ClassVar = ("dataset", "data_dir", "out", "restart", "save_seconds", "log", "profile", "check")

    def recorded(self) -> dict[str, Any]:
        """Lists the options on which results depend."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.PRACTICAL}

    def need(self, name: str, ok: bool, expected: str) -> None:
        """Refuses the value of an option.

        Args:
          name: the name of the field.
          ok: whether the value is allowed.
          expected: what the value must do, such as "be at least 1".

        Raises:
          ValueError: unless ``ok``.
        """
        if not ok:
            value = getattr(self, name)
            given = " ".join(map(str, value)) or "none" if isinstance(value, tuple) else value
            raise ValueError(f"--{name.replace('_', '-')} must {expected}, got {given}")

    def at_most(self, examples: int, *names: str) -> None:
        """Refuses options, such as a batch size, that exceed the number of training examples.

        Args:
          examples: the number of training examples.
          *names: the names of the fields; the value None means all examples.
        """
        for name in names:
            value = getattr(self, name)
            expected = f"be at most the number of training examples, {examples}"
            self.need(name, value is None or value <= examples, expected)

    def among(self, name: str, known: Sequence[str]) -> None:
        """Refuses an option whose value (or one of whose values) is not among the known ones."""
        value = getattr(self, name)
        given = value if isinstance(value, tuple) else (value,)
        some = "from" if isinstance(value, tuple) else "one of"
        self.need(name, set(given) <= set(known), f"be {some} {', '.join(known)}")

    def verify(self) -> None:
        """Refuses values that the types of the options do not allow.

        Raises:
          ValueError: if a value is not allowed; it names the option, what is expected, and the value.
        """
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            for rule in _rules(hint):
                self.need(name, all(map(rule.test, values)), rule.words)


@dataclass(frozen=True)
class Options(RunOptions):
    """The options of every experiment on a data set: also the data and the number of repetitions."""

    dataset: str = "mnist"
    """data set: digits, mnist, fashion_mnist, kmnist, glyphs (characters in fonts), another image
    classification data set of TensorFlow Datasets, or the path of an .npz file with x_train, y_train, x_test, y_test"""
    data_dir: Path | None = None
    """directory of the data, prepared by TensorFlow Datasets or as IDX files, or with fonts (default: TFDS_DATA_DIR)"""
    validation: Count | None = None
    """number of training examples held out for validation (default: a sixth of them, at most 5,000)"""
    seeds: Count = 5
    """number of repetitions, each with its own initial parameters and order of examples"""


def _rules(hint: Any) -> list[Allowed]:
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Allowed)]
    return own + [rule for part in get_args(hint) for rule in _rules(part)]


def given_options(arguments: Sequence[str] | None = None) -> dict[str, str]:
    """Lists the options that stand on a command line, by the names of their fields.

    Args:
      arguments: the command line; that of this process by default.

    Returns:
      Name → the word after it, or the text after its ``=``.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    pairs = zip(words, [*words[1:], ""], strict=False)  # without words, there is no pair
    return {
        word[2:].partition("=")[0].removeprefix("no-").replace("-", "_"): word.partition("=")[2] or after
        for word, after in pairs
        if word.startswith("--")
    }


def read(
    configs: Mapping[str, tuple[str, C]],
    description: str,
    default: Callable[[Mapping[str, str]], str] | str,
    arguments: Sequence[str] | None = None,
) -> tuple[str, C]:
    """Reads the command line: the name of a config, then options that change its values.

    ``--help`` lists the configs; ``NAME --help`` lists all options with the values of that config.

    Args:
      configs: name → (a line of description, the config).
      description: the description of the experiment, usually its module docstring.
      default: the config that is used where none is named, or a function that chooses it from the options
        given.
      arguments: the command line; that of this process by default.

    Returns:
      The name of the config, and the config with the changes of the command line.

    Raises:
      ValueError: if the value of an option is not allowed.
    """
    program, *given = [Path(sys.argv[0]).name, *(sys.argv[1:] if arguments is None else arguments)]
    if given and given[0].startswith("-") and {"-h", "--help"} & set(given):
        print(f"usage: {program} [CONFIG] [OPTIONS]\n\n{(description or '').strip()}\n\nConfigs:")
        width = max(map(len, configs)) + 2
        print(*(f"  {name:<{width}}{line}" for name, (line, _) in configs.items()), sep="\n")
        print(f"\n{program} CONFIG --help lists all options, with the values that they have in that config.")
        sys.exit(0)
    if given and not given[0].startswith("-"):
        name = given.pop(0)
        if name not in configs:
            raise ValueError(
                f"the config must be one of {', '.join(configs)}, got {name!r}: see {program} --help"
            )
    else:
        name = default if isinstance(default, str) else default(given_options(given))
    line, config = configs[name]
    config = tyro.cli(
        type(config), prog=f"{program} {name}", description=line, default=config, args=given,
        config=(tyro.conf.AvoidSubcommands,),
    )  # fmt: skip
    config.verify()
    return name, config

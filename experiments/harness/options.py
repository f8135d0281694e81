"""Options that the experiments share: what they may be, and how a command line becomes a config."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar, get_args, get_type_hints

import tyro

from distill_jax import data

C = TypeVar("C", bound="Options")


class Allowed(NamedTuple):
    """What an option's values may be: part of its type, as in ``Annotated[int, Allowed(…)]``.

    Attributes:
      words: what it must do, such as "be at least 1".
      test: whether a value does.
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
class Options:
    """What every experiment is told: its data, how often to repeat it, and where its run lies.

    An experiment's own options are fields of a subclass. Those whose type is one of this module's
    (``Count``, ``Share``, …; also in a tuple, or beside None) are checked when they are read.

    Attributes:
      PRACTICAL: the options that change where and how a run works, but not its results.
    """

    dataset: str = "auto"
    """auto (MNIST where it can be had, else digits), digits, mnist, fashion_mnist, kmnist, or any
    image-classification data set of TFDS"""
    data_dir: Path | None = None
    """where the data lie: prepared by TFDS, or as IDX files (default: TFDS_DATA_DIR)"""
    validation: Count | None = None
    """examples held out of the training set (default: the data set's own)"""
    seeds: Count = 5
    """how many repetitions"""
    out: Path | None = None
    """the run's directory (default: under runs/, named after the options)"""
    restart: bool = False
    """delete what an earlier run left in --out instead of going on from it"""
    save_seconds: Amount = 20.0
    """the least time between two checkpoints"""

    PRACTICAL: ClassVar = ("dataset", "data_dir", "out", "restart", "save_seconds", "check")

    def recorded(self) -> dict[str, Any]:
        """Lists the options on which results depend."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.PRACTICAL}

    def need(self, name: str, ok: bool, expected: str) -> None:
        """Refuses an option's value.

        Args:
          name: the field's.
          ok: whether the value will do.
          expected: what it must do.

        Raises:
          ValueError: unless ``ok``.
        """
        if not ok:
            value = getattr(self, name)
            given = " ".join(map(str, value)) or "none" if isinstance(value, tuple) else value
            raise ValueError(f"--{name.replace('_', '-')} must {expected}, got {given}")

    def fit(self, examples: int, *names: str) -> None:
        """Refuses a batch, or another number of training examples, of more than there are.

        Args:
          examples: how many there are.
          *names: fields; None stands for all.
        """
        for name in names:
            value = getattr(self, name)
            expected = f"be at most the number of training examples, {examples}"
            self.need(name, value is None or value <= examples, expected)

    def among(self, name: str, known: Sequence[str]) -> None:
        """Refuses names, or one, that are not known."""
        value = getattr(self, name)
        given = value if isinstance(value, tuple) else (value,)
        some = "of" if isinstance(value, tuple) else "one of"
        self.need(name, set(given) <= set(known), f"be {some} {', '.join(known)}")

    def verify(self) -> None:
        """Refuses values that their types do not allow.

        Raises:
          ValueError: naming the option, what it must do, and its value.
        """
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            for rule in _rules(hint):
                self.need(name, all(map(rule.test, values)), rule.words)


def _rules(hint: Any) -> list[Allowed]:
    own = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Allowed)]
    return own + [rule for part in get_args(hint) for rule in _rules(part)]


def load(config: Options) -> data.Dataset:
    """Loads the data set of the options."""
    return data.load(config.dataset, data_dir=config.data_dir, validation=config.validation)


def parse(
    kind: type[C],
    description: str | None,
    defaults: Mapping[tuple[str, bool], Mapping[str, Any]],
    *,
    by: str = "preset",
    load: Callable[[C], data.Dataset | None] = load,
) -> tuple[C, Any]:
    """Reads the command line; what it leaves out depends on the preset and on the data found.

    Args:
      kind: the experiment's options.
      description: for ``--help``.
      defaults: (value of the option ``by``, whether the images are smaller than 16 pixels) → what
        differs from the defaults of ``kind``. Where it has nothing for small images, what it has for
        others holds.
      by: the option that names a set of defaults; an experiment without it has the one set ``""``.
      load: gives the data set, or None where there is none.

    Returns:
      The options, and the data set.

    Raises:
      ValueError: if an option's value is not allowed.
    """

    def read(small: bool) -> C:
        chosen = getattr(first, by, "")
        changes = defaults.get((chosen, small)) or defaults.get((chosen, False), {})
        config = tyro.cli(kind, default=dataclasses.replace(kind(), **changes))
        config.verify()
        return config

    first = tyro.cli(kind, description=description)
    dataset = load(read(small=False))
    small = dataset is not None and max(dataset.train.image.shape[1:3]) < 16
    return read(small), dataset

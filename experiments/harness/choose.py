"""Chooses the options of a distillation on validation data, where the data have no config of their own.

The choice has four stages. Each is printed, and all that was tried is stored:

1. scratch students, with and without augmentation; the validation errors of the best one are the bar;
2. a teacher that makes fewer errors than the bar by more than two standard errors;
3. how this teacher labels, and 4. the temperature and α, from a small grid for each way to label.

The test images are never read. Options that the user has set are kept.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from distill_jax import _files, data
from harness.choosing import FOLDS, Choosing, Effort, folds
from harness.options import given_options

__all__ = ["FOLDS", "Choice", "Effort", "choose", "choose_once", "folds"]


class Choice(NamedTuple):
    """What was chosen.

    Attributes:
      chosen: the options that were chosen, name → value.
      leads: whether a teacher leads the scratch student on validation data.
      tried: the models that were tried, with their validation errors, as JSON values.
      lines: the account of the choice in words.
    """

    chosen: dict[str, Any]
    leads: bool
    tried: list[dict[str, Any]]
    lines: list[str]


def choose(
    config: Any, dataset: data.Dataset, *, fixed: Sequence[str] = (), effort: Effort | None = None,
    say: Callable[[str], Any] = print,
) -> Choice:  # fmt: skip
    """Chooses the teacher, the way to label, the temperature and α on validation data; see the module.

    Args:
      config: the options of ``kd_mnist``.
      dataset: the data; the test images are not read.
      fixed: the names of the options that the user has set.
      effort: the work that the choice may cost.
      say: called with each line of the account.
    """
    choosing = Choosing(config, fixed, dataset, effort or Effort(), say)
    choosing.sizes()
    bar = choosing.scratch()
    teacher, leading = choosing.teacher(bar)
    if not leading:
        choosing.note(
            "No teacher leads: none makes fewer validation errors than the scratch student by more than two "
            "standard errors, and a student learns little from such a teacher."
        )
    if leading or config.force:
        choosing.labels(teacher, bar)
    choosing.whole()
    chosen = {n: v for n, v in vars(choosing.config).items() if v != getattr(config, n)}
    return Choice(chosen, leading, choosing.tried, choosing.lines)


def choose_once(run: Any) -> Choice:
    """Makes the choice of a run, or reads it where the run is continued. The run gets the chosen options.

    Args:
      run: the run, a :class:`harness.experiment.Run`.
    """
    file = run.directory / "choice.json"
    if file.exists():
        try:
            choice = Choice(**_files.unseal(json.loads(file.read_bytes())))
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}): move it away to choose again") from None
    else:
        fixed = given_options().keys() & vars(run.config).keys()
        choice = choose(run.config, run.dataset, fixed=sorted(fixed))
        _files.write_json(file, _files.seal(_files.plain(choice._asdict())))
    if not (choice.leads or run.config.force):
        text = "\n".join(
            [f"# {run.name} on {run.dataset.name}: no teacher leads", "", *map("- {}".format, choice.lines)]
        )
        path = run.directory / "report.md"
        _files.write_atomically(path, lambda tmp: tmp.write_text(text + "\n", encoding="utf-8"))
        print(f"Nothing was distilled. --force distils all the same. Report: {path}")
    run.config = dataclasses.replace(run.config, **choice.chosen)
    return choice

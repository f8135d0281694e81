"""What an experiment writes for people: a sentence, tables, report.md.

``results`` is everywhere the contents of results.json: ``experiment``, ``dataset``, ``config``,
``environment``, ``seconds``, and for each of ``models`` its ``parameters``, ``flops``, ``bytes``,
``latency_ms`` and ``test``, lists with a value a seed.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from distill_jax import _files

Results = Mapping[str, Any]


def mean_sd(values: Sequence[float], *, percent: bool = False) -> str:
    """Mean ± sample standard deviation (ddof = 1), to two digits of the latter.

    Args:
      values: one a seed; of a single one, no deviation is printed.
      percent: multiply by 100 (the sign stands in the column's heading).

    Raises:
      ValueError: if there is no value, or one is not finite.

    >>> mean_sd([140.0, 148.0, 156.0])
    '148.0 ± 8.0'
    """
    x = np.asarray(values, np.float64) * (100 if percent else 1)
    if x.ndim != 1 or not x.size or not np.isfinite(x).all():
        raise ValueError(f"expected finite values [seeds], at least one, got {values!r}")
    mean, sd = x.mean(), x.std(ddof=1) if np.ptp(x) else 0.0
    digits = 2 if percent else 0
    if sd:
        digits = 1 - math.floor(math.log10(sd))
    elif not percent and mean % 1:
        digits = 2 - math.floor(math.log10(abs(mean)))
    digits = min(max(digits, 0), 6)
    return f"{mean:.{digits}f}" + (f" ± {sd:.{digits}f}" if len(x) > 1 else "")


class Paired(NamedTuple):
    """The mean of paired differences, its standard error, and t, their ratio."""

    mean: float
    error: float
    t: float


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Mean of b − a over seeds, its standard error sd / √seeds, and t.

    Returns:
      for one seed, NaN as error and t; where all differences are the same, t = ±∞, or 0 for 0.

    Raises:
      ValueError: if there are no values, or not as many in b as in a.

    >>> paired([10, 12, 14], [7, 8, 9]).mean
    -4.0
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"expected as many values in b as in a, got {len(a)} and {len(b)}")
    difference = np.subtract(b, a, dtype=np.float64)
    mean = float(difference.mean())
    if len(a) == 1:
        return Paired(mean, math.nan, math.nan)
    if not np.ptp(difference):
        return Paired(mean, 0.0, math.copysign(math.inf, mean) if mean else 0.0)
    error = float(difference.std(ddof=1) / math.sqrt(len(a)))
    return Paired(mean, error, mean / error)


def summary(
    results: Results, *, baseline: str = "scratch", model: str = "distilled", method: str = "Distillation"
) -> str:
    """One sentence: what ``method`` did to the test errors, seed by seed.

    A difference of up to two standard errors is called none.

    Raises:
      ValueError: if a model is not among the results.
    """
    for name in (baseline, model):
        if name not in results["models"]:
            raise ValueError(f"no model {name!r} in the results, only {list(results['models'])}")
    a, b = (results["models"][name]["test"]["errors"] for name in (baseline, model))
    mean, error, t = paired(a, b)
    before, after = (f"{np.mean(x):.1f}" if len(a) > 1 else f"{x[0]:g}" for x in (a, b))
    seeds = f"{len(a)} seeds" if len(a) > 1 else "one seed: the spread is not known"
    details = f"{mean:+g}, {seeds}"
    if any(a):
        relative = 100 * mean / np.mean(a)
        details = f"{relative:+.{1 if abs(relative) < 10 else 0}f} %, {seeds}"
    if error == 0:
        details += ", the same difference in each"
    elif error > 0:
        details += f", paired t = {t:.1f}"
    details = details.replace("-", "−")
    if mean == 0:
        return f"{method} left the test errors as they were: {after} ({seeds})."
    if abs(t) <= 2:
        return (
            f"{method} made no clear difference: {after} test errors instead of {before} "
            f"({details}, within two standard errors)."
        )
    if mean < 0:
        return f"{method} cut the test errors from {before} to {after} ({details})."
    return f"{method} did not help: the test errors rose from {before} to {after} ({details})."


Column = Callable[[Mapping[str, Any]], str | None]


def score(name: str, *, percent: bool = False) -> Column:
    """Makes the column of a test figure: :func:`mean_sd`, or None where there is none."""

    def cell(model):
        values = model["test"].get(name)
        return None if values is None or None in values else mean_sd(values, percent=percent)

    return cell


def count(name: str) -> Column:
    """Makes the column of a whole number that a model has, such as its parameters."""
    return lambda model: f"{model[name]:,.0f}" if name in model else None


def _latency(model: Mapping[str, Any]) -> str | None:
    times = model.get("latency_ms")
    return times and f"{mean_sd([times['1']])} / {mean_sd([times['256']])}"


COLUMNS: Mapping[str, Column] = {
    "parameters": count("parameters"),
    "errors": score("errors"),
    "accuracy %": score("accuracy", percent=True),
    "F1 %": score("f1", percent=True),
    "ECE %": score("ece", percent=True),
    "agreement %": score("agreement", percent=True),
    "ms at 1 / 256": _latency,
}
FURTHER_COLUMNS: Mapping[str, Column] = {
    "precision %": score("precision", percent=True),
    "recall %": score("recall", percent=True),
    "NLL": score("nll"),
    "Brier": score("brier"),
    "KL from teacher": score("teacher_kl"),
    "FLOPs": count("flops"),
    "bytes": count("bytes"),
}


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A GitHub markdown table of rows, the heading first; all but the first column stand right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    rule = ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def table(results: Results, columns: Mapping[str, Column] = COLUMNS) -> str:
    """A GitHub markdown table, a row a model, aligned so that a terminal shows it well.

    Args:
      results: see the module.
      columns: heading → function from a model's entry to its cell; None is shown as "–".
    """
    rows = [["model", *columns]]
    for name, model in results["models"].items():
        rows.append([name, *(column(model) or "–" for column in columns.values())])
    return markdown(rows)


def _properties(values: Mapping[str, Any]) -> str:
    texts = {name: json.dumps(_files.plain(x, name), ensure_ascii=False) for name, x in values.items()}
    return "\n".join(f"- {name}: `{text}`" for name, text in texts.items())


def write_report(
    directory: str | Path,
    results: Results,
    pictures: Mapping[str, str],
    notes: Sequence[str] = (),
    *,
    columns: Mapping[str, Column] = COLUMNS,
    headline: str = "",
    **comparison: str,
) -> None:
    """Writes ``report.md``: what happened, the figures, the pictures, and how to do it again.

    Args:
      directory: where to write, and where the pictures are.
      results: see the module; all numbers come from here.
      pictures: caption → file name.
      notes: paragraphs to add below the tables.
      columns: of the first table, as in :func:`table`.
      headline: what was found, in a sentence; by default what :func:`summary` says.
      **comparison: ``baseline``, ``model`` and ``method`` of that.

    Raises:
      ValueError: if a picture is not in the directory.
    """
    directory = Path(directory)
    if missing := [file for file in pictures.values() if not (directory / file).is_file()]:
        raise ValueError(f"no picture {missing[0]!r} in {directory}: draw it first")
    data, seconds = results["dataset"], results["seconds"]
    sizes = [f"{data[part]:,} {part}" for part in ("train", "validation", "test") if part in data]
    seeds = max(len(model["test"]["errors"]) for model in results["models"].values())
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    times = [f"{k} {mean_sd(np.ravel(v).tolist())}" for k, v in seconds.items()]
    sections = [
        f"# {results['experiment']} on {data['name']}",
        f"**{headline or summary(results, **comparison)}**",
        table(results, columns),
        table(results, FURTHER_COLUMNS),
        f"Test set, {spread}. Precision, recall and F1: mean over classes. ECE: bins of equal mass. "
        "Agreement: how often the class is the teacher's. NLL and KL: nats. Time: median of a call "
        "at batch 1 and 256, ms. FLOPs: of one example.",
        *notes,
        f"Data: {data['name']}, {data['source']}; {', '.join(sizes)} examples.",
        *(f"![{title}]({quote(file)})\n\n*{title}.*" for title, file in pictures.items()),
        "## Configuration",
        _properties(results["config"]),
        "## Environment",
        _properties(results["environment"]),
        f"Seconds: {', '.join(times)}.",
        "## To run it again",
        f"```sh\n{results['command']}\n```\n",
    ]
    text = "\n\n".join(sections)
    _files.write_atomically(directory / "report.md", lambda tmp: tmp.write_text(text, encoding="utf-8"))

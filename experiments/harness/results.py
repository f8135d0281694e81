"""Results of an experiment: evaluation of all models, tables, the closing sentence, report.md, pictures.

``results`` always means the contents of results.json: ``experiment``, ``dataset``, ``config``,
``environment``, ``seconds`` and ``models``. A model's entry has ``parameters``, ``flops``, ``bytes``,
``latency_ms`` and ``test``, whose figures are lists with one value per seed.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import jax
import numpy as np

from distill_jax import _files, data, metrics

Results = Mapping[str, Any]


def mean_sd(values: Sequence[float], *, percent: bool = False) -> str:
    """Formats the mean ± the sample standard deviation (ddof = 1), to two digits of the latter.

    Args:
      values: one value per seed; for a single one, no deviation is printed.
      percent: multiply by 100 (the heading of the column has the sign).

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
    """Mean of paired differences, its standard error, and t, the ratio of the two."""

    mean: float
    error: float
    t: float


def paired(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Computes the mean of b − a over seeds, its standard error sd / √seeds, and t.

    Args:
      a: one value per seed.
      b: one value per seed.

    Returns:
      For one seed, error and t are NaN. Where all differences are equal, t is ±∞, or 0 for 0.

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


def points(a: Sequence[float], b: Sequence[float]) -> str:
    """Writes the mean paired difference of accuracies b − a in points, with its standard error.

    >>> points([0.25, 0.5], [0.375, 0.5])
    '+6.25 ± 6.25'
    """
    mean, error, _ = paired(a, b)
    return (f"{100 * mean:+.2f}" + (f" ± {100 * error:.2f}" if len(a) > 1 else "")).replace("-", "−")


def summary(
    results: Results, *, baseline: str = "scratch", model: str = "distilled", method: str = "Distillation"
) -> str:
    """Writes the closing sentence: what ``method`` did to the test errors, compared seed by seed.

    A difference of at most two standard errors is called no clear difference. No t is given for two
    seeds. If the results hold a model ``"teacher"`` that is no better on validation data than the baseline,
    the sentence says so.

    Args:
      results: see the module.
      baseline: the name of the model to compare with.
      model: the name of the model that the method made.
      method: the subject of the sentence.

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
    elif error > 0 and len(a) > 2:
        details += f", paired t = {t:.1f}"
    details = details.replace("-", "−")
    if mean == 0:
        sentence = f"{method} left the test errors as they were: {after} ({seeds})."
    elif abs(t) <= 2:
        sentence = (
            f"{method} made no clear difference: {after} test errors instead of {before} "
            f"({details}, within two standard errors)."
        )
    elif mean < 0:
        sentence = f"{method} cut the test errors from {before} to {after} ({details})."
    else:
        sentence = f"{method} did not help: the test errors rose from {before} to {after} ({details})."
    return sentence + _weak_teacher(results["models"], baseline)


def _weak_teacher(models: Mapping[str, Any], baseline: str) -> str:
    """Says that the teacher is no better on validation data than the baseline, if that is so."""
    if "teacher" not in models or not all("validation" in models[n] for n in ("teacher", baseline)):
        return ""
    teacher, other = (np.mean(models[name]["validation"]["errors"]) for name in ("teacher", baseline))
    if teacher < other:
        return ""
    return (
        f" The teacher is no better than the {baseline} student: {teacher:.1f} against {other:.1f} validation "
        "errors. A student learns little from such a teacher: train it longer, or use a larger network."
    )


Column = Callable[[Mapping[str, Any]], str | None]


def score(name: str, *, percent: bool = False) -> Column:
    """Makes the column of a test figure, formatted by :func:`mean_sd`."""

    def cell(model):
        values = model.get("test", {}).get(name)
        return None if values is None or None in values else mean_sd(values, percent=percent)

    return cell


def count(name: str) -> Column:
    """Makes the column of a whole number in a model's entry, such as its number of parameters."""
    return lambda model: f"{model[name]:,.0f}" if name in model else None


def stage_epochs(stages: Sequence[Mapping[str, Any]]) -> str:
    """Writes how many epochs the stages of a pair took, and where one ended before it had converged."""
    return "+".join(f"{stage['epochs']}{'' if stage['converged'] else '*'}" for stage in stages)


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
    """Formats rows as a markdown table: the heading first, all columns but the first aligned right."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [
        [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(pairs)]
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    rule = ["-" * (width - 1) + ":" if i else "-" * width for i, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def table(results: Results, columns: Mapping[str, Column] = COLUMNS) -> str:
    """Formats a markdown table with one row per model; columns without any value are left out.

    Args:
      results: see the module.
      columns: heading → function from a model's entry to its cell; None is shown as "–".
    """
    entries = results["models"]
    cells = {heading: [column(model) for model in entries.values()] for heading, column in columns.items()}
    shown = {heading: values for heading, values in cells.items() if any(values)}
    rows = [["model", *shown]]
    for i, name in enumerate(entries):
        rows.append([name, *(values[i] or "–" for values in shown.values())])
    return markdown(rows)


def _properties(values: Mapping[str, Any]) -> str:
    texts = {name: json.dumps(_files.plain(x, name), ensure_ascii=False) for name, x in values.items()}
    return "\n".join(f"- {name}: `{text}`" for name, text in texts.items())


def write_report(
    directory: str | Path,
    results: Results,
    drawn: Mapping[str, str],
    notes: Sequence[str] = (),
    *,
    columns: Mapping[str, Column] = COLUMNS,
    headline: str,
) -> None:
    """Writes report.md: the finding, the tables, the pictures, and the command that repeats the run.

    Args:
      directory: where to write, and where the pictures are.
      results: see the module; all numbers come from here.
      drawn: caption → file name of a picture.
      notes: paragraphs to add below the tables.
      columns: the columns of the first table, as in :func:`table`.
      headline: the finding, in one sentence.

    Raises:
      ValueError: if a picture is not in the directory.
    """
    directory = Path(directory)
    if missing := [file for file in drawn.values() if not (directory / file).is_file()]:
        raise ValueError(f"no picture {missing[0]!r} in {directory}: draw it first")
    about, seconds = results["dataset"], results["seconds"]
    sizes = [f"{about[part]:,} {part}" for part in ("train", "validation", "test") if part in about]
    seeds = max(
        len(model["test"]["errors"]) if "test" in model else 0 for model in results["models"].values()
    )
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    times = [f"{k} {mean_sd(np.ravel(v).tolist())}" for k, v in seconds.items()]
    figures = [
        table(results, FURTHER_COLUMNS),
        f"Test set, {spread}. Precision, recall and F1: mean over classes. ECE: bins of equal mass. "
        "Agreement: how often the class is the teacher's. NLL and KL: nats. Time: median of a call "
        "at batch 1 and 256, ms. FLOPs: of one example.",
    ]
    sections = [
        f"# {results['experiment']} on {about['name']}",
        f"**{headline}**",
        table(results, columns),
        *(figures if seeds else []),
        *notes,
        f"Data: {about['name']}, {about['source']}; {', '.join(sizes)} examples.",
        *(f"![{title}]({quote(file)})\n\n*{title}.*" for title, file in drawn.items()),
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


def evaluate_all(
    dataset: data.Dataset,
    trained: Sequence[Mapping[str, Any]],
    logits: Sequence[Mapping[str, np.ndarray]],
    *,
    reference: str,
    prepare: Callable[[Any], Any],
) -> dict[str, Any]:
    """Evaluates all models of all seeds on the test set: the ``models`` of results.json.

    Args:
      dataset: the data.
      trained: for each seed, name → :class:`harness.experiment.Trained`.
      logits: for each seed, name → logits for the test images.
      reference: the name of the model with which the others are compared (agreement, KL divergence).
      prepare: turns images into the input of the models.
    """
    first = trained[0]
    costs = metrics.costs([entry.model for entry in first.values()], prepare(dataset.test.image[:1])[0])
    table = {}
    for name, cost in zip(first, costs, strict=True):
        figures = [
            metrics.figures(seed[name], dataset.test.label, None if name == reference else seed[reference])
            for seed in logits
        ]
        wrong = [metrics.errors(seed[name].validation_logits, dataset.validation.label) for seed in trained]
        table[name] = {
            **cost,
            "validation": {"errors": [float(values.sum()) for values in wrong]},
            "test": {figure: [f[figure] for f in figures] for figure in figures[0]},
        }
    return table


def drawable(images: np.ndarray) -> np.ndarray:
    """Turns images of any number of channels, uint8 or floats from 0 to 1, into what a picture can show.

    Returns:
      uint8 ``[n, height, width, 1 or 3]``; of other numbers of channels, the mean of the channels.
    """
    if images.dtype != np.uint8:
        images = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    return images if images.shape[-1] in (1, 3) else images.mean(-1, keepdims=True).astype(np.uint8)


def draw(
    directory: Path,
    dataset: data.Dataset,
    trained: Sequence[Mapping[str, Any]],
    logits: Sequence[Mapping[str, np.ndarray]],
    shown: Sequence[str],
) -> dict[str, str]:
    """Draws the pictures of a comparison of classifiers.

    Args:
      directory: where the pictures are written.
      dataset: the data.
      trained: as in :func:`evaluate_all`.
      logits: as in :func:`evaluate_all`.
      shown: the names of the teacher and of the students to show; the confusion matrix shows the last one.

    Returns:
      Caption → file name.
    """
    from harness import pictures  # here, as Matplotlib takes its time, and a training need not wait for it

    first, test, seeds = trained[0], dataset.test, len(trained)
    # A model that was made from another by hand shares its history
    own = {id(model.history): name for name, model in list(first.items())[::-1]}.values()
    histories = {name: [seed[name].history for seed in trained] for name in first if name in own}
    pictures.learning_curves(
        directory / "learning_curves.png", histories, validation_size=len(dataset.validation.id)
    )
    labels = np.tile(test.label, seeds)
    bins = {
        name: metrics.calibration_bins(np.concatenate([seed[name] for seed in logits]), labels)
        for name in shown
    }
    pictures.reliability(directory / "reliability.png", bins)
    last = shown[-1]
    counts = np.mean([metrics.confusion(seed[last], test.label) for seed in logits], 0)
    pictures.confusion(directory / "confusion.png", counts, dataset.class_names, last)
    probabilities = {name: np.asarray(jax.nn.softmax(logits[0][name])) for name in shown}
    hesitant = np.argsort(probabilities[shown[0]].max(-1), kind="stable")[:12]
    pictures.gallery(
        directory / "gallery.png",
        drawable(test.image[hesitant]),
        test.label[hesitant],
        probabilities[shown[0]][hesitant],
        dataset.class_names,
        {name: probabilities[name][hesitant] for name in shown[1:]},
    )
    spread = f", mean over {seeds} seeds; band: one standard deviation" if seeds > 1 else ""
    return {
        f"Validation error and training loss against the epoch{spread}": "learning_curves.png",
        f"Reliability on the test set: accuracy against confidence in 15 bins of equal mass, {seeds} seeds "
        "together; bars: 95 % intervals; open circles: bins without an error": "reliability.png",
        f"Confusion of the {last} student on the test set, mean over {seeds} seeds": "confusion.png",
        f"The 12 test images that the teacher finds hardest, with its soft labels (seed 1 of {seeds})": "gallery.png",
    }

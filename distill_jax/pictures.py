"""The pictures of a report.

PNG files, 200 dots an inch, as wide as a column (3.4 inches) or a page (7 inches) of a paper, in
colours (Okabe and Ito's) and lines that colour-blind readers and grey print keep apart.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_jax import files

# Holds while a picture is drawn, and leaves the caller's settings as they were.
_style = matplotlib.rc_context(
    {
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "axes.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "0.9",
        "grid.linewidth": 0.5,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "savefig.bbox": None,
    }
)
_LOOKS: dict[str, tuple[str, Any]] = {
    "teacher": ("#555555", (0, (1, 1))),
    "scratch": ("#D55E00", (0, (5, 1.5))),
    "distilled": ("#0072B2", "-"),
}
_OTHERS: Sequence[tuple[str, Any]] = (
    ("#009E73", (0, (5, 1, 1, 1))),
    ("#CC79A7", (0, (8, 2))),
    ("#E69F00", (0, (3, 1, 1, 1, 1, 1))),
    ("#56B4E9", (0, (2, 2))),
    ("#000000", "-"),
)


def _looks(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Gives each model a colour and a line, the same in all pictures to those of ``_LOOKS``."""
    others = itertools.cycle(_OTHERS)
    pairs = {name: _LOOKS.get(name) or next(others) for name in names}
    return {name: {"color": colour, "linestyle": line} for name, (colour, line) in pairs.items()}


def _save(path: str | Path, picture: Figure) -> None:
    files.write_atomically(path, lambda tmp: picture.savefig(tmp, format="png", dpi=200))


def _ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers for a logarithmic axis, also for one that is short."""
    if highest < 5 * lowest:
        return list(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(lowest, highest))
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    digits = (1, 2, 5) if highest / lowest < 1000 else (1,)
    return [d * 10.0**p for p in powers for d in digits]


def _check(name: str, given: tuple[int, ...], form: str, expected: tuple[int, ...]) -> None:
    if given != expected:
        raise ValueError(f"{name} must be {form} = {expected}, got {given}")


@_style
def learning_curves(
    path: str | Path,
    histories: Mapping[str, Sequence[Mapping[str, Sequence[float]]]],
    *,
    validation_size: int,
) -> None:
    """Draws validation error and training loss against the epoch, on log scales.

    Lines are means over seeds; the band is one standard deviation (below, not beyond the lowest).

    Args:
      path: of the PNG.
      histories: model → a history a seed: ``epoch``, ``loss``, ``validation_errors`` (a count).
      validation_size: the number of validation examples.

    Raises:
      ValueError: if a history is not as long as the first of its model.
    """
    picture = Figure((7, 2.7), layout="constrained")
    panels: Sequence[Axes] = picture.subplots(1, 2)
    smallest = 100 / validation_size
    for axes, key, unit, floor in zip(
        panels, ("validation_errors", "loss"), (smallest, 1.0), (smallest, 1e-6), strict=True
    ):
        lowest, highest = math.inf, floor
        for name, look in _looks(histories).items():
            epoch = histories[name][0]["epoch"]
            for i, history in enumerate(histories[name]):
                length = (len(history.get(key, ())),)
                _check(f"{key} of {name}, seed {i}", length, "[epochs]", (len(epoch),))
            values = unit * np.array([history[key] for history in histories[name]], np.float64)
            mean, sd = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
            low, high = np.maximum(mean - sd, values.min(0)), mean + sd
            axes.plot(epoch, mean, label=name, marker="" if len(epoch) > 2 else ".", **look)
            axes.fill_between(epoch, low, high, color=look["color"], alpha=0.2, linewidth=0)
            lowest, highest = min(lowest, low.min()), max(highest, high.max())
        # Logarithmic, and linear below the floor, so that 0 has a place.
        axes.set_yscale("symlog", linthresh=floor, linscale=0.3)
        axes.set_ylim(0 if lowest < floor else lowest / 1.1, highest * 1.1)
        lowest = max(lowest, floor)
        ticks = [0.0, *_ticks(lowest, highest)]
        bottom, top = axes.get_ylim()
        axes.set_yticks([y for y in ticks if bottom <= y <= top and not 0 < y < floor])
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y")
        axes.set_xlabel("epoch")
    panels[0].set_ylabel("validation error, %")
    panels[1].set_ylabel("training loss (own objective)")
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    _save(path, picture)


@_style
def reliability(
    path: str | Path, bins: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> None:
    """Draws accuracy against confidence, and below how many examples have less confidence.

    The scale is the logit's: 99 % is as far from 99.9 % as 90 % from 99 %, nearly. What lies beyond
    1 − 1/examples stands at the edge, 100 %; circles: bins without an error. Bars: Wilson's 95 %
    intervals.

    Args:
      path: of the PNG.
      bins: model → confidence, accuracy and count of bins of equal mass, ``[bins]`` each, as
        :func:`distill_jax.metrics.calibration_bins` returns.

    Raises:
      ValueError: if the three are not equally long.
    """
    for name, (confidence, accuracy, count) in bins.items():
        for array, of in ((accuracy, "accuracy"), (count, "count")):
            _check(f"{of} of {name}", np.shape(array), "[bins]", np.shape(confidence))
    picture = Figure((3.4, 4.4), layout="constrained")
    top, low = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lowest = min(min(np.min(c), np.min(a)) for c, a, _ in bins.values())
    edge = 1 - 1 / max(20, *(np.sum(count) for *_, count in bins.values()))
    limits = float(np.clip(0.9 * lowest, 0.02, 0.5)), float(edge)
    top.plot(limits, limits, color="0.6", linewidth=0.8)
    for name, look in _looks(bins).items():
        confidence, accuracy, count = (np.asarray(x, np.float64) for x in bins[name])
        ece = 100 * np.sum(count * np.abs(accuracy - confidence)) / count.sum()
        x, y, some = np.clip(confidence, *limits), np.clip(accuracy, *limits), accuracy < 1
        z2n = 1.96**2 / count
        centre = (accuracy + z2n / 2) / (1 + z2n)
        half = np.sqrt(z2n * accuracy * (1 - accuracy) + z2n**2 / 4) / (1 + z2n)
        bars = np.clip([centre - half, centre + half], *limits)[:, some]
        top.vlines(x[some], *bars, color=look["color"], linewidth=0.8, alpha=0.5)
        top.plot(x[some], y[some], "o", label=f"{name}, ECE {ece:.1f} %", markersize=3, **look)
        top.plot(x[~some], y[~some], "o", color=look["color"], markerfacecolor="white", markersize=4,
                 clip_on=False)  # fmt: skip
        low.plot(x, 100 * (np.cumsum(count) - count / 2) / count.sum(), clip_on=False, **look)
    marks = [m for m in (0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999, 0.9999)
             if limits[0] <= m and 1 - m > 1.8 * (1 - edge)]  # fmt: skip
    ticks, labels = [*marks, edge], [*(f"{100 * m:g}" for m in marks), "100"]
    top.set(xscale="logit", yscale="logit", xlim=limits, ylim=limits, ylabel="accuracy, %")
    top.set_yticks(ticks, labels)
    low.set_xticks(ticks, labels)
    low.set(ylim=(0, 100), yticks=(0, 50, 100), xlabel="confidence, %", ylabel="examples\nbelow, %")
    for axes in (top, low):
        axes.minorticks_off()
        axes.grid()
    picture.legend(
        *top.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=2.8
    )
    _save(path, picture)


@_style
def confusion(
    path: str | Path, matrix: np.ndarray, class_names: Sequence[str], title: str = ""
) -> None:
    """Draws a confusion matrix where only errors have colour; the diagonal is grey.

    Args:
      path: of the PNG.
      matrix: counts (true class, predicted class), ``[classes, classes]``.
      class_names: ``[classes]``.
      title: the model; the number of errors is added.

    Raises:
      ValueError: if the matrix does not fit the names.
    """
    counts, classes = np.asarray(matrix), len(class_names)
    _check("matrix", counts.shape, "[classes, classes]", (classes, classes))
    right = np.eye(classes, dtype=bool)
    wrong = np.where(right, 0, counts)
    width = float(np.clip(0.9 + 0.25 * classes, 3.4, 7))
    turned = max(map(len, class_names)) > 2
    cell = (60 * width - 45 * turned) / classes  # points
    picture = Figure((width, width), layout="constrained")
    axes = picture.subplots()
    axes.imshow(np.where(right, 0.88, 1), cmap="gray", vmin=0, vmax=1)
    norm = colors.PowerNorm(0.5, vmin=0, vmax=max(9, wrong.max()))
    axes.imshow(np.ma.masked_equal(wrong, 0), cmap="YlOrRd", norm=norm)
    for i, j in np.argwhere(counts if classes <= 20 else wrong):
        longest = len(str(counts.max() if i == j else max(10, wrong.max())))
        colour = "0.4" if i == j else "white" if norm(counts[i, j]) > 0.6 else "black"
        axes.text(j, i, str(counts[i, j]), size=min(8, cell / (0.75 * longest)), color=colour,
                  ha="center", va="center_baseline")  # fmt: skip
    size = min(8, 0.8 * cell)
    axes.set_xticks(range(classes), class_names, size=size, rotation=90 * turned)
    axes.set_yticks(range(classes), class_names, size=size)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.3)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel="predicted class", ylabel="true class")
    heading = f"{wrong.sum():,} errors of {counts.sum():,}"
    axes.set_title(f"{title}: {heading}" if title else heading, size=8)
    _save(path, picture)


@_style
def gallery(
    path: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    teacher_probabilities: np.ndarray,
    class_names: Sequence[str],
    students: Mapping[str, np.ndarray],
) -> None:
    """Draws images, and beside each what teacher and students make of it.

    Of each image the likeliest classes and the true one are shown, in the teacher's order. Images
    with black corners, as MNIST's, are printed as ink on white paper.

    Args:
      path: of the PNG.
      images: uint8 ``[n, height, width, 1 or 3]``; 12 to 16 are half a page.
      labels: int ``[n]``.
      teacher_probabilities: ``[n, classes]``.
      class_names: ``[classes]``.
      students: name → probabilities ``[n, classes]``.

    Raises:
      ValueError: if shapes do not fit, or probabilities do not sum to 1.
    """
    n, classes = len(labels), len(class_names)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        given = f"{images.dtype} {images.shape}"
        raise ValueError(f"images must be uint8 [n, height, width, 1 or 3], got {given}")
    _check("labels", np.shape(labels), "[n]", images.shape[:1])
    models = {"teacher": teacher_probabilities, **students}
    for name, values in models.items():
        _check(f"probabilities of {name}", np.shape(values), "[n, classes]", (n, classes))
        if np.min(values) < 0 or not np.allclose(np.sum(values, -1), 1, atol=1e-3):
            raise ValueError(f"probabilities of {name} must sum to 1: pass softmax(logits)")
    longest = min(max(map(len, class_names)), 12)
    columns, shown, looks = 4 if longest < 4 else 3, min(4, classes), _looks(models)
    rows = -(-n // columns)
    image, label, gap, height = 0.6, 0.11 + 0.055 * longest, 0.13, 1.05 * rows + 0.65  # inches
    picture = Figure((7, height))
    grid = picture.add_gridspec(
        rows, 4 * columns, left=0.01, right=0.995, top=1 - 0.3 / height, bottom=0.35 / height,
        width_ratios=[image, label, 6.9 / columns - image - label - gap, gap] * columns,
        wspace=0, hspace=0.22,
    )  # fmt: skip
    ink = images.shape[3] == 1 and np.median(images[:, [0, 0, -1, -1], [0, -1, 0, -1]]) == 0
    for i, true in enumerate(labels):
        row, column = divmod(i, columns)
        axes = picture.add_subplot(grid[row, 4 * column])
        axes.imshow(images[i], cmap="gray_r" if ink else "gray", vmin=0, vmax=255)
        axes.set(xticks=(), yticks=())
        axes.spines[:].set(visible=True, color="0.7", linewidth=0.5)
        likely = np.max([values[i] for values in models.values()], 0)
        likely[true] = 2
        chosen = np.argsort(-likely, kind="stable")[:shown]
        chosen = chosen[np.argsort(-teacher_probabilities[i][chosen], kind="stable")]
        axes = picture.add_subplot(grid[row, 4 * column + 2])
        place, bar = int(np.argmax(chosen == true)), 0.8 / len(models)
        for k, (name, values) in enumerate(models.items()):
            y = np.arange(shown) - 0.4 + bar * (k + 0.5)
            axes.barh(y, values[i][chosen], bar, color=looks[name]["color"], label=name)
        axes.axhspan(place - 0.5, place + 0.5, color="#FAF6BD", label="true class", zorder=0)
        axes.set_yticks(range(shown), [class_names[c][:12] for c in chosen], size=7)
        axes.get_yticklabels()[place].set_fontweight("bold")
        last = i + columns >= n
        axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1") if last else ("", "", ""), size=7)
        axes.set(xlim=(0, 1), ylim=(shown - 0.5, -0.5))
        axes.set_xlabel("probability" if last else "", size=7, labelpad=1)
        axes.tick_params(length=0, pad=2)
        axes.grid(axis="x")
    handles = axes.get_legend_handles_labels()
    picture.legend(*handles, loc="upper center", ncols=len(models) + 1, borderaxespad=0.2)
    _save(path, picture)


@_style
def comparison(path: str | Path, errors: Mapping[str, Sequence[float]], *, baseline: str) -> None:
    """Draws the errors of several models, best last: a point a seed, mean and standard error.

    A model whose mean differs from the baseline's by more than two standard errors of the paired
    difference is drawn in colour, others in grey.

    Args:
      path: of the PNG.
      errors: model → a value a seed, the same seeds in each.
      baseline: one of the models; its mean is a line across.

    Raises:
      ValueError: if the baseline is missing, or a model has not as many seeds as it.
    """
    if baseline not in errors:
        raise ValueError(f"baseline must be one of {list(errors)}, got {baseline!r}")
    seeds = len(errors[baseline])
    for name, values in errors.items():
        _check(f"errors of {name}", np.shape(values), "[seeds]", (seeds,))
    order = sorted(errors, key=lambda name: -np.mean(errors[name]))
    base = np.asarray(errors[baseline], np.float64)
    picture = Figure((3.4, 0.22 * len(order) + 0.55), layout="constrained")
    axes = picture.subplots()
    axes.axvline(base.mean(), color=_LOOKS["scratch"][0], linewidth=0.8, zorder=0)
    for row, name in enumerate(order):
        points = np.asarray(errors[name], np.float64)
        differences = points - base
        error = differences.std(ddof=1) / math.sqrt(seeds) if seeds > 1 else math.inf
        clear = bool(abs(differences.mean()) > 2 * error)
        colour = _LOOKS["distilled" if clear else "teacher"][0]
        colour = _LOOKS["scratch"][0] if name == baseline else colour
        spread = points.std(ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.0
        axes.plot(points, np.full(seeds, row), "o", color=colour, alpha=0.35, markersize=3, mew=0)
        axes.errorbar(
            points.mean(), row, xerr=spread, color=colour, marker="|", markersize=9, capsize=0
        )
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="test errors", ylim=(-0.7, len(order) - 0.3))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    _save(path, picture)


@_style
def code_widths(
    path: str | Path,
    widths: Sequence[float],
    curves: Mapping[str, Any],
    *,
    ylabel: str,
    xlabel: str = "width of the code",
    levels: Mapping[str, float] | None = None,
) -> None:
    """Draws an error against the width of the code, on log scales; bars are one standard deviation.

    Args:
      path: of the PNG.
      widths: ``[widths]``, rising.
      curves: name → ``[widths]``, or ``[widths, seeds]``; the first with points (joined, if it is the
        only one), others as lines. What is not above 0 is left out.
      ylabel: the error and its unit.
      xlabel: of the widths.
      levels: name → an error that depends on no width, such as the original's.

    Raises:
      ValueError: if a curve is not as long as the widths.
    """
    picture = Figure((3.4, 2.6), layout="constrained")
    axes = picture.subplots()
    for i, (name, look) in enumerate(_looks([*curves, *(levels or {})]).items()):
        if levels and name in levels:
            axes.axhline(levels[name], label=name, zorder=0, **look)
            continue
        values = np.asarray(curves[name], np.float64).reshape(len(curves[name]), -1)
        _check(name, values.shape[:1], "[widths]", (len(widths),))
        mean = np.where(values.mean(1) > 0, values.mean(1), np.nan)
        spread = values.std(1, ddof=1) if values.shape[1] > 1 else None
        if i:
            axes.plot(widths, mean, label=name, **look)
        else:
            look["linestyle"] = "none" if len(curves) > 1 else "-"
            axes.errorbar(widths, mean, spread, label=name, marker="o", markersize=3, **look)
    axes.set(yscale="log", xscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.set_xticks(shown := [w for w in widths if len(widths) < 9 or math.log2(w) % 1 == 0])
    axes.set_xticklabels([f"{w:g}" for w in shown])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    bottom, top = axes.get_ylim()
    if top < 1000 * bottom:
        axes.set_yticks([y for y in _ticks(bottom, top) if bottom <= y <= top])
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid()
    picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    _save(path, picture)


@_style
def reconstructions(path: str | Path, rows: Mapping[str, np.ndarray]) -> None:
    """Draws rows of images below each other: the originals, and what codes kept of them.

    Args:
      path: of the PNG.
      rows: name → images ``[n, height, width, 1 or 3]`` in [0, 1], as many in each row.

    Raises:
      ValueError: if a row has another shape than the first.
    """
    first = np.shape(next(iter(rows.values())))
    picture = Figure((7, 0.55 * len(rows) + 0.1))
    grid = picture.subplots(len(rows), first[0], squeeze=False)
    picture.subplots_adjust(0.16, 0.02, 0.995, 0.98, wspace=0.05, hspace=0.05)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        _check(name, np.shape(images), "[n, height, width, channels]", first)
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=(), yticks=())
            axes.spines[:].set(visible=True, color="0.8", linewidth=0.4)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", size=7)
    _save(path, picture)


@_style
def units(path: str | Path, groups: Iterable[Any]) -> None:
    """Draws how many units each group has, in the order of the program, and which can go.

    Args:
      path: of the PNG.
      groups: with ``name``, ``size``, ``free`` and ``exact``, as :class:`distill_jax.units.Group`.
    """
    rows = list(groups)
    if not rows:
        raise ValueError("groups is empty: a network without parameters has no units to draw")
    kinds = {
        "removable exactly": ("#0072B2", lambda group: group.free and group.exact),
        "removable inexactly": ("#E69F00", lambda group: group.free and not group.exact),
        "not removable": ("#BBBBBB", lambda group: not group.free),
    }
    picture = Figure(figsize=(7, 0.6 + 0.14 * len(rows)), layout="constrained")
    axes = picture.subplots()
    for label, (colour, belongs) in kinds.items():
        chosen = [i for i, group in enumerate(rows) if belongs(group)]
        sizes = [rows[i].size for i in chosen]
        axes.barh(chosen, sizes, color=colour, label=label)
        for i, size in zip(chosen, sizes, strict=True):
            axes.annotate(f" {size}", (size, i), va="center", fontsize=6)
    axes.set_yticks(range(len(rows)), [group.name for group in rows], fontsize=6)
    axes.set_xscale("log")
    axes.set_xlim(left=0.8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("units")
    axes.legend(loc="upper right", fontsize=6, frameon=True)
    _save(path, picture)


@_style
def curves(
    path: str | Path,
    x: Sequence[float] | np.ndarray,
    series: Mapping[str, np.ndarray],
    *,
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
) -> None:
    """Draws curves over one variable: means over seeds; the band is one standard deviation.

    Args:
      path: of the PNG.
      x: ``[points]``.
      series: name → values ``[seeds, points]``.
      xlabel: of the axis.
      ylabel: likewise; the axis is logarithmic where values > 0 span more than a factor of 20.
      log_x: whether x is on a logarithmic axis; then each of its points is marked.

    Raises:
      ValueError: if a series has other points.
    """
    picture = Figure((3.4, 2.7), layout="constrained")
    axes = picture.subplots()
    looks = _looks(series)
    for name, values in series.items():
        values = np.asarray(values, np.float64)
        _check(name, values.shape, "[seeds, points]", (len(values), len(x)))
        mean, sd = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
        axes.plot(x, mean, label=name, **looks[name])
        low, high = np.maximum(mean - sd, values.min(0)), mean + sd
        axes.fill_between(x, low, high, color=looks[name]["color"], alpha=0.2, linewidth=0)
    lowest, highest = (f([f(values) for values in series.values()]) for f in (np.min, np.max))
    if lowest > 0 and highest > 20 * lowest:
        axes.set_yscale("log")
    if log_x:
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y")
    handles, columns = axes.get_legend_handles_labels(), 1 if max(map(len, series)) > 18 else 2
    picture.legend(*handles, loc="outside upper center", ncols=columns)
    _save(path, picture)


@_style
def tradeoffs(
    path: str | Path,
    figures: Mapping[str, Mapping[str, np.ndarray]],
    costs: Mapping[str, Mapping[str, np.ndarray]],
    reference: tuple[Mapping[str, float], Mapping[str, float]],
) -> None:
    """Draws what models can do against what they cost: a row a figure, a column a cost.

    Points are means over seeds, bars one standard deviation, crosses the reference; lines join models
    in the order of the first cost.

    Args:
      path: of the PNG.
      figures: figure → series → values ``[models, seeds]``, in per cent.
      costs: cost → series → ``[models]``, all > 0, drawn on a logarithmic axis.
      reference: figure → value and cost → value of the model that all are held against.

    Raises:
      ValueError: if a series has not as many figures as costs.
    """
    size = (7, 0.6 + 1.5 * len(figures))
    picture = Figure(size, layout="constrained")
    grid = picture.subplots(len(figures), len(costs), sharex="col", sharey="row", squeeze=False)
    looks = _looks(next(iter(figures.values())))
    for row, (figure, series) in zip(grid, figures.items(), strict=True):
        for axes, (cost, places) in zip(row, costs.items(), strict=True):
            for name, values in series.items():
                x, y = np.asarray(places[name]), np.asarray(values, np.float64)
                _check(f"{figure} of {name}", y.shape[:1], "[models, seeds]", x.shape)
                order = np.argsort(next(iter(costs.values()))[name])
                sd = y.std(1, ddof=1) if y.shape[1] > 1 else np.zeros(len(y))
                axes.errorbar(x[order], y.mean(1)[order], sd[order], label=name, marker=".",
                              markersize=3, elinewidth=0.6, **looks[name])  # fmt: skip
            axes.plot(
                reference[1][cost], reference[0][figure], "x", color="black", label="original"
            )
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
            marks = [d * 10.0**p for p in powers for d in (1, 2, 5)]
            marks = [mark for mark in marks if low <= mark <= high]
            if len(marks) < 2:  # a narrow range: near its ends, to two digits
                marks = [float(f"{low ** (1 - t) * high**t:.2g}") for t in (0.1, 0.9)]
            axes.set_xticks(marks)
            axes.set_xlim(low, high)
            axes.xaxis.set_major_formatter(
                ticker.FuncFormatter(lambda v, _: f"{v / 1000:g}k" if v >= 1000 else f"{v:g}")
            )
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.grid(axis="y")
        row[0].set_ylabel(f"{figure}, %")
    for axes, cost in zip(grid[-1], costs, strict=True):
        axes.set_xlabel(cost)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=5)
    _save(path, picture)

"""Pictures that compare many models, or one model at several values of a setting."""

import math
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from harness.pictures.style import LOOKS, check, log_ticks, looks_of, save, style


@style
def comparison(path: str | Path, errors: Mapping[str, Sequence[float]], *, baseline: str) -> None:
    """Draws the errors of several models, best last: one point per seed, the mean and its standard error.

    A model whose mean differs from the baseline's by more than two standard errors of the paired
    difference is drawn in colour, others in grey; with fewer than three seeds, all are grey.

    Args:
      path: the PNG file.
      errors: model → one value per seed, the same seeds in each.
      baseline: one of the models; its mean is a vertical line.

    Raises:
      ValueError: if the baseline is missing, or a model has not as many seeds as it.
    """
    if baseline not in errors:
        raise ValueError(f"baseline must be one of {list(errors)}, got {baseline!r}")
    seeds = len(errors[baseline])
    for name, values in errors.items():
        check(f"errors of {name}", np.shape(values), "[seeds]", (seeds,))
    order = sorted(errors, key=lambda name: -np.mean(errors[name]))
    base = np.asarray(errors[baseline], np.float64)
    picture = Figure((3.4, 0.22 * len(order) + 0.55), layout="constrained")
    axes = picture.subplots()
    axes.axvline(base.mean(), color=LOOKS["scratch"][0], linewidth=0.8, zorder=0)
    for row, name in enumerate(order):
        points = np.asarray(errors[name], np.float64)
        differences = points - base
        error = differences.std(ddof=1) / math.sqrt(seeds) if seeds > 2 else math.inf
        clear = bool(abs(differences.mean()) > 2 * error)
        colour = LOOKS["distilled" if clear else "teacher"][0]
        colour = LOOKS["scratch"][0] if name == baseline else colour
        spread = points.std(ddof=1) / math.sqrt(seeds) if seeds > 1 else 0.0
        axes.plot(points, np.full(seeds, row), "o", color=colour, alpha=0.35, markersize=3, mew=0)
        axes.errorbar(points.mean(), row, xerr=spread, color=colour, marker="|", markersize=9, capsize=0)
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="test errors", ylim=(-0.7, len(order) - 0.3))
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    save(path, picture)


@style
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
      path: the PNG file.
      x: the values of the variable, ``[points]``.
      series: name → values ``[seeds, points]``.
      xlabel: the label of the horizontal axis.
      ylabel: the label of the vertical axis, which is logarithmic where positive values span more than a
        factor of 20.
      log_x: whether the horizontal axis is logarithmic; then each point has a tick.

    Raises:
      ValueError: if a series has other points.
    """
    picture = Figure((3.4, 2.7), layout="constrained")
    axes = picture.subplots()
    looks = looks_of(series)
    for name, values in series.items():
        values = np.asarray(values, np.float64)
        check(name, values.shape, "[seeds, points]", (len(values), len(x)))
        mean, sd = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
        axes.plot(x, mean, label=name, **looks[name])
        low, high = np.maximum(mean - sd, values.min(0)), mean + sd
        axes.fill_between(x, low, high, color=looks[name]["color"], alpha=0.2, linewidth=0)
    lowest, highest = (f([f(values) for values in series.values()]) for f in (np.min, np.max))
    if lowest > 0 and highest > 20 * lowest:
        axes.set_yscale("log")
        log_axis(axes.yaxis, *axes.get_ylim())
    if log_x:
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y")
    handles, columns = axes.get_legend_handles_labels(), 1 if max(map(len, series)) > 18 else 2
    picture.legend(*handles, loc="outside upper center", ncols=columns)
    save(path, picture)


@style
def tradeoffs(
    path: str | Path,
    figures: Mapping[str, Mapping[str, np.ndarray]],
    costs: Mapping[str, Mapping[str, np.ndarray]],
    reference: tuple[Mapping[str, float], Mapping[str, float]],
) -> None:
    """Draws what models can do against what they cost: one row per figure, one column per cost.

    Points are means over seeds, bars one standard deviation, the cross is the reference; lines join the
    models of a series in the order of the first cost.

    Args:
      path: the PNG file.
      figures: figure → series → values ``[models, seeds]``, in per cent.
      costs: cost → series → ``[models]``, all positive, drawn on a logarithmic axis.
      reference: figure → value and cost → value of the model with which all are compared.

    Raises:
      ValueError: if a series has not as many figures as costs.
    """
    picture = Figure((7, 1 + 1.6 * len(figures)), layout="constrained")
    grid = picture.subplots(len(figures), len(costs), sharex="col", sharey="row", squeeze=False)
    looks = looks_of(next(iter(figures.values())))
    for row, (figure, series) in zip(grid, figures.items(), strict=True):
        for axes, (cost, places) in zip(row, costs.items(), strict=True):
            for name, values in series.items():
                x, y = np.asarray(places[name]), np.asarray(values, np.float64)
                check(f"{figure} of {name}", y.shape[:1], "[models, seeds]", x.shape)
                order = np.argsort(next(iter(costs.values()))[name])
                sd = y.std(1, ddof=1) if y.shape[1] > 1 else np.zeros(len(y))
                axes.errorbar(x[order], y.mean(1)[order], sd[order], label=name, marker=".",
                              markersize=3, elinewidth=0.6, **looks[name])  # fmt: skip
            axes.plot(reference[1][cost], reference[0][figure], "x", color="black", label="original")
            axes.set_xscale("log")
            log_axis(axes.xaxis, *axes.get_xlim())
            axes.grid(axis="y")
        row[0].yaxis.set_major_locator(ticker.MaxNLocator(5, min_n_ticks=3))
        row[0].set_ylabel(f"{figure}, %")
    for axes, cost in zip(grid[-1], costs, strict=True):
        axes.set_xlabel(cost)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=4)
    save(path, picture)


@style
def by_bytes(
    path: str | Path,
    sizes: Mapping[str, Sequence[float]],
    figures: Mapping[str, Mapping[str, np.ndarray]],
    *,
    levels: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws figures of students against the bytes of their labels: means over seeds, bars one standard deviation.

    Args:
      path: the PNG file.
      sizes: series → bytes per label, ``[points]``, on a logarithmic axis.
      figures: label of the vertical axis → series → values ``[points, seeds]``; one panel each.
      levels: name → label of the axis → a value, drawn as a horizontal line.

    Raises:
      ValueError: if a series has not as many figures as sizes.
    """
    picture = Figure((7, 2.7), layout="constrained")
    looks = looks_of([*sizes, *levels])
    for axes, (label, series) in zip(
        picture.subplots(1, len(figures), squeeze=False)[0], figures.items(), strict=True
    ):
        for name, values in series.items():
            x, y = np.asarray(sizes[name]), np.asarray(values, np.float64)
            check(f"{label} of {name}", y.shape[:1], "[points, seeds]", x.shape)
            sd = y.std(1, ddof=1) if y.shape[1] > 1 else np.zeros(len(y))
            order = np.argsort(x)
            axes.errorbar(
                x[order], y.mean(1)[order], sd[order], label=name, marker=".", elinewidth=0.6, **looks[name]
            )
        for name, level in levels.items():
            axes.axhline(level[label], label=name, **looks[name])
        axes.set_xscale("log")
        log_axis(axes.xaxis, *axes.get_xlim())
        axes.set(xlabel="bytes per label", ylabel=label)
        axes.grid(axis="y")
    picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=6)
    save(path, picture)


def against_bytes(
    path: str | Path,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    ylabel: str,
    levels: Mapping[str, float],
) -> None:
    """Draws what a method reaches against the bytes that it has sent, as :func:`against` does."""
    megabytes = {name: (np.asarray(sent) / 1e6, values) for name, (sent, values) in curves.items()}
    against(path, megabytes, xlabel="megabytes sent", ylabel=ylabel, levels=levels)


@style
def against(
    path: str | Path,
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] = types.MappingProxyType({}),
) -> None:
    """Draws what a method reaches against what it has cost: means over seeds, bands one standard deviation.

    Args:
      path: the PNG file.
      curves: name → (the cost until then ``[points]``, all positive; values ``[points, seeds]``).
      xlabel: the label of the horizontal axis, which is logarithmic.
      ylabel: the label of the vertical axis.
      levels: name → a value, drawn as a horizontal line.

    Raises:
      ValueError: if a curve has not as many values as costs.
    """
    picture = Figure((7, 3.6), layout="constrained")
    axes = picture.subplots()
    looks = looks_of([*curves, *levels])
    for name, (cost, values) in curves.items():
        x, y = np.asarray(cost, np.float64), np.asarray(values, np.float64)
        check(name, y.shape[:1], "[points, seeds]", x.shape)
        mean, sd = y.mean(1), y.std(1, ddof=1) if y.shape[1] > 1 else np.zeros(len(y))
        axes.plot(x, mean, label=name, marker=".", markersize=3, **looks[name])
        axes.fill_between(x, mean - sd, mean + sd, color=looks[name]["color"], alpha=0.12, linewidth=0)
    for name, level in levels.items():
        axes.axhline(level, label=name, zorder=0, **looks[name])
    axes.set_xscale("log")
    log_axis(axes.xaxis, *axes.get_xlim())
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(axis="y")
    picture.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    save(path, picture)


def log_axis(axis: Any, low: float, high: float) -> None:
    """Gives a logarithmic axis from ``low`` to ``high`` at least three ticks, and keeps its limits."""
    marks = [mark for mark in log_ticks(low, high) if low <= mark <= high]
    axis.set_ticks(marks)
    axis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v / 1000:g}k" if v >= 1000 else f"{v:g}"))
    axis.set_minor_locator(ticker.NullLocator())
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})


@style
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
      path: the PNG file.
      widths: the widths of the code, ``[widths]``, rising.
      curves: name → ``[widths]``, or ``[widths, seeds]``. The first is drawn with points (joined, if it is the
        only one), the others as lines. Values that are not positive are left out.
      ylabel: the error and its unit.
      xlabel: the label of the horizontal axis.
      levels: name → an error that does not depend on the width, such as the original's.

    Raises:
      ValueError: if a curve is not as long as the widths.
    """
    picture = Figure((3.4, 2.6), layout="constrained")
    axes = picture.subplots()
    for i, (name, look) in enumerate(looks_of([*curves, *(levels or {})]).items()):
        if levels and name in levels:
            axes.axhline(levels[name], label=name, zorder=0, **look)
            continue
        values = np.asarray(curves[name], np.float64).reshape(len(curves[name]), -1)
        check(name, values.shape[:1], "[widths]", (len(widths),))
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
        axes.set_yticks([y for y in log_ticks(bottom, top) if bottom <= y <= top])
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.grid()
    picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(path, picture)


@style
def heat_map(
    path: str | Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
    label: str,
    baseline: tuple[str, float],
    chosen: tuple[int, int],
    faint: np.ndarray,
) -> None:
    """Draws a matrix of errors in colours: blue below a baseline, red above.

    Args:
      path: the PNG file.
      values: errors, ``[rows, columns]``.
      rows: the names of the rows, the first at the bottom.
      columns: the names of the columns.
      xlabel: the label of the x axis.
      ylabel: the label of the y axis.
      label: what the values are.
      baseline: the name of the baseline and its errors, which are white.
      chosen: the row and the column that get a frame.
      faint: bool ``[rows, columns]``: fields whose number is in brackets, and which have no colour.

    Raises:
      ValueError: if shapes do not fit.
    """
    values = np.asarray(values, np.float64)
    for name, array in (("values", values), ("faint", faint)):
        check(name, np.shape(array), "[rows, columns]", (len(rows), len(columns)))
    picture = Figure((3.4, 0.32 * len(rows) + 1.1), layout="constrained")
    axes = picture.subplots()
    middle = baseline[1]
    reach = max(np.abs(np.where(faint, 0, values - middle)).max(), 1e-9)
    image = axes.imshow(
        np.ma.masked_array(values, faint), cmap="RdBu_r", vmin=middle - reach, vmax=middle + reach,
        origin="lower", aspect="auto",
    )  # fmt: skip
    for (i, j), value in np.ndenumerate(values):
        dark = not faint[i, j] and abs(value - middle) > 0.6 * reach
        axes.text(
            j, i, f"({value:.3g})" if faint[i, j] else f"{value:.3g}", ha="center", va="center_baseline",
            size=7, color="0.6" if faint[i, j] else "white" if dark else "black",
        )  # fmt: skip
    for width, colour in ((3.5, "white"), (1.5, "black")):  # to be seen on every colour
        place = chosen[1] - 0.46, chosen[0] - 0.46
        axes.add_patch(Rectangle(place, 0.92, 0.92, fill=False, linewidth=width, edgecolor=colour))
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    bar = picture.colorbar(image, ax=axes, label=label)
    bar.ax.axhline(middle, color="0.3", linewidth=0.8)
    bar.ax.set_title(f"{baseline[0]} {middle:.3g}", size=7)
    save(path, picture)

"""Pictures of what classifiers learn and say."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.pictures.style import check, log_ticks, looks_of, save, style


@style
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
        for name, look in looks_of(histories).items():
            epoch = histories[name][0]["epoch"]
            for i, history in enumerate(histories[name]):
                length = (len(history.get(key, ())),)
                check(f"{key} of {name}, seed {i}", length, "[epochs]", (len(epoch),))
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
        ticks = [0.0, *log_ticks(lowest, highest)]
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
    save(path, picture)


@style
def reliability(path: str | Path, bins: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
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
            check(f"{of} of {name}", np.shape(array), "[bins]", np.shape(confidence))
    picture = Figure((3.4, 4.4), layout="constrained")
    top, low = picture.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    lowest = min(min(np.min(c), np.min(a)) for c, a, _ in bins.values())
    edge = 1 - 1 / max(20, *(np.sum(count) for *_, count in bins.values()))
    limits = float(np.clip(0.9 * lowest, 0.02, 0.5)), float(edge)
    top.plot(limits, limits, color="0.6", linewidth=0.8)
    for name, look in looks_of(bins).items():
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
    picture.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=2.8)
    save(path, picture)


def _short(value: float) -> str:
    """A count, or a mean of counts with one decimal."""
    return f"{value:.1f}".removesuffix(".0")


@style
def confusion(path: str | Path, matrix: np.ndarray, class_names: Sequence[str], title: str = "") -> None:
    """Draws a confusion matrix where only errors have colour; the diagonal is grey.

    Args:
      path: of the PNG.
      matrix: counts of (true class, predicted class), or their means over seeds, ``[classes, classes]``.
      class_names: ``[classes]``.
      title: the model; the number of errors is added.

    Raises:
      ValueError: if the matrix does not fit the names.
    """
    counts, classes = np.asarray(matrix), len(class_names)
    check("matrix", counts.shape, "[classes, classes]", (classes, classes))
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
        longest = max(2, len(_short(counts[i, j])))
        colour = "0.4" if i == j else "white" if norm(counts[i, j]) > 0.6 else "black"
        axes.text(j, i, _short(counts[i, j]), size=min(8, cell / (0.75 * longest)), color=colour,
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
    heading = f"{_short(wrong.sum())} errors of {counts.sum():,.0f}"
    axes.set_title(f"{title}: {heading}" if title else heading, size=8)
    save(path, picture)


@style
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
    check("labels", np.shape(labels), "[n]", images.shape[:1])
    models = {"teacher": teacher_probabilities, **students}
    for name, values in models.items():
        check(f"probabilities of {name}", np.shape(values), "[n, classes]", (n, classes))
        if np.min(values) < 0 or not np.allclose(np.sum(values, -1), 1, atol=1e-3):
            raise ValueError(f"probabilities of {name} must sum to 1: pass softmax(logits)")
    longest = min(max(map(len, class_names)), 12)
    columns, shown, looks = 4 if longest < 4 else 3, min(4, classes), looks_of(models)
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
    save(path, picture)

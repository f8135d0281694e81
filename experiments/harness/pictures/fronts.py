"""Pictures of files: what their networks can do against what they measure."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness.pictures.comparisons import log_axis
from harness.pictures.style import check, looks_of, save, style


@style
def front(
    path: str | Path,
    files: Mapping[str, np.ndarray],
    costs: tuple[str, ...],
    *,
    ylabel: str,
    chosen: np.ndarray,
    original: np.ndarray,
) -> None:
    """Draws an error against each of several costs, a point per file, and the line of the best.

    Args:
      path: the PNG file.
      files: kind → ``[files, costs + 1]``: the costs, all positive, drawn on logarithmic axes, and the error.
      costs: the names of the costs with their units; one panel each.
      ylabel: the label of the error.
      chosen: ``[files, costs + 1]``, those that get a ring.
      original: the same of those that get a cross.

    Raises:
      ValueError: if there are other numbers of costs.
    """
    every = {**files, "chosen": chosen, "original": original}
    for name, points in every.items():
        check(name, np.shape(points), "[files, costs + 1]", (len(points), len(costs) + 1))
    together = np.concatenate([*every.values()])
    picture = Figure((7, 2.8), layout="constrained")
    looks = looks_of(files)
    for i, axes in enumerate(picture.subplots(1, len(costs), sharey=True, squeeze=False)[0]):
        for name, points in files.items():
            axes.plot(points[:, i], points[:, -1], "o", markersize=3, color=looks[name]["color"], label=name)
        axes.plot(chosen[:, i], chosen[:, -1], "o", markersize=7, mfc="none", color="black", label="chosen")
        axes.plot(original[:, i], original[:, -1], "x", color="black", label="original")
        ordered = together[np.lexsort((together[:, -1], together[:, i]))]
        least = np.minimum.accumulate(ordered[:, -1])
        axes.step(ordered[:, i], least, where="post", color="0.6", linewidth=0.8, zorder=0)
        axes.set_xscale("log")
        log_axis(axes.xaxis, *axes.get_xlim())
        axes.set_xlabel(costs[i])
        axes.grid(axis="y")
        if not i:
            axes.set_ylabel(ylabel)
    picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    save(path, picture)


@style
def frontier(
    path: str | Path,
    measured: Mapping[str, tuple[np.ndarray, np.ndarray]],
    published: Mapping[str, tuple[float, float]],
) -> None:
    """Draws test errors against the bytes of files: means over seeds, bars one standard deviation.

    Args:
      path: the PNG file.
      measured: name of a series → (bytes ``[files]``, test errors in per cent ``[files, seeds]``).
      published: name → (bytes, test error in per cent) of others, drawn as crosses with their names.

    Raises:
      ValueError: if a series has not as many errors as bytes.
    """
    picture = Figure((7, 3.6), layout="constrained")
    axes = picture.subplots()
    for name, look in looks_of(measured).items():
        size, errors = (np.asarray(x, np.float64) for x in measured[name])
        check(f"errors of {name}", errors.shape[:1], "[files, seeds]", size.shape)
        order = np.argsort(size)
        spread = errors.std(1, ddof=1) if errors.shape[1] > 1 else np.zeros(len(errors))
        axes.errorbar(size[order], errors.mean(1)[order], spread[order], label=name, marker="o", markersize=3,
                      elinewidth=0.6, **look)  # fmt: skip
    for name, place in published.items():
        axes.plot(*place, "x", color="black", markersize=4)
        axes.annotate(name, place, (4, 4), textcoords="offset points", size=6)
    axes.set(xscale="log", xlabel="bytes", ylabel="test error, %")
    log_axis(axes.xaxis, *axes.get_xlim())
    axes.set_ylim(0, None)
    axes.grid()
    picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(path, picture)

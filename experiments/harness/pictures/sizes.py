"""A picture of what bytes buy."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from harness.pictures.style import check, log_ticks, looks_of, save, style


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
    for name, (size, error) in published.items():
        axes.plot(size, error, "x", color="black", markersize=4)
        axes.annotate(name, (size, error), (4, 4), textcoords="offset points", size=6)
    axes.set(xscale="log", xlabel="bytes", ylabel="test error, %")
    low, high = axes.get_xlim()
    axes.set_xticks([mark for mark in log_ticks(low, high) if low <= mark <= high])
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set(xlim=(low, high), ylim=(0, None))
    axes.grid()
    picture.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    save(path, picture)

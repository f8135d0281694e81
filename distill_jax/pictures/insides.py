"""Pictures of what is inside a model, or goes through it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from distill_jax.pictures.style import check, save, style


@style
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
        check(name, np.shape(images), "[n, height, width, channels]", first)
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axes.set(xticks=(), yticks=())
            axes.spines[:].set(visible=True, color="0.8", linewidth=0.4)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", size=7)
    save(path, picture)


@style
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
    save(path, picture)

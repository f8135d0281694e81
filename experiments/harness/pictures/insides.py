"""Pictures of images beside their reconstructions."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness.pictures.style import check, save, style


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

"""Pictures of single characters that are read."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from harness.pictures.style import check, save, style

SERIF = "DejaVu Serif"  # in which I and l differ


@style
def lookalikes(
    path: str | Path,
    counts: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    groups: Sequence[Sequence[str]],
) -> None:
    """Draws, for groups of characters that look alike, which is taken for which: one row of matrices per model.

    Numbers are per cent of the pictures of the row's character; what is taken for a character outside the group is
    in none of them. The diagonal is grey, errors are in colour.

    Args:
      path: of the PNG.
      counts: model → counts of (true class, predicted class), ``[classes, classes]``.
      class_names: ``[classes]``.
      groups: the groups, such as ``["0Oo", "1lI"]``, of names of classes.

    Raises:
      ValueError: if a matrix does not fit the names, or a character is not among them.
    """
    names, sizes = list(class_names), [len(group) for group in groups]
    if unknown := [name for group in groups for name in group if name not in names]:
        raise ValueError(f"groups must be made of class names, got {unknown[0]!r}")
    picture = Figure((7, 1.05 * len(counts) + 0.1))
    grid = picture.subplots(len(counts), len(groups), squeeze=False, width_ratios=[s**0.7 for s in sizes])
    picture.subplots_adjust(0.06, 0.02, 0.995, 1 - 0.2 / picture.get_figheight(), wspace=0.3, hspace=0.25)
    for line, (model, matrix) in zip(grid, counts.items(), strict=True):
        check(f"counts of {model}", np.shape(matrix), "[classes, classes]", (len(names), len(names)))
        shares = 100 * np.asarray(matrix) / np.maximum(np.sum(matrix, 1, keepdims=True), 1)
        for axes, group in zip(line, groups, strict=True):
            rows = [names.index(name) for name in group]
            part = shares[np.ix_(rows, rows)]
            right = np.eye(len(rows), dtype=bool)
            axes.imshow(np.where(right, 0.9, 1), cmap="gray", vmin=0, vmax=1)
            axes.imshow(np.ma.masked_array(part, right), cmap="YlOrRd", vmin=0, vmax=60)
            for (i, j), value in np.ndenumerate(part):
                axes.text(j, i, f"{value:.0f}", size=7, ha="center", va="center_baseline",
                          color="white" if i != j and value > 40 else "black")  # fmt: skip
            axes.set_xticks(range(len(rows)), group, size=7, family=SERIF)
            axes.set_yticks(range(len(rows)), group, size=7, family=SERIF)
            axes.tick_params(length=0, pad=2, labeltop=True, labelbottom=False)
            axes.spines[:].set_visible(False)
            axes.set_anchor("N")
        line[0].set_ylabel(model, size=8)
    save(path, picture)


@style
def hesitation(
    path: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    probabilities: np.ndarray,
    class_names: Sequence[str],
    *,
    rows: int = 4,
    columns: int = 12,
) -> None:
    """Draws the pictures whose predictions have the highest entropy, with the two likeliest classes of each.

    Above a picture stand the two classes with their probabilities in per cent, below it the true class. Of each class
    at most two pictures are shown.

    Args:
      path: of the PNG.
      images: ``[n, height, width, 1 or 3]``; of one channel, bright strokes on black.
      labels: int ``[n]``.
      probabilities: ``[n, classes]``.
      class_names: ``[classes]``.
      rows: of pictures, at most.
      columns: pictures per row.

    Raises:
      ValueError: if shapes do not fit.
    """
    classes = len(class_names)
    check("labels", np.shape(labels), "[n]", images.shape[:1])
    check("probabilities", np.shape(probabilities), "[n, classes]", (len(images), classes))
    p = np.asarray(probabilities, np.float64)
    entropy = -np.sum(p * np.log(np.maximum(p, 1e-30)), -1)
    chosen: list[int] = []
    for i in np.argsort(-entropy, kind="stable"):
        if len(chosen) < rows * columns and sum(labels[j] == labels[i] for j in chosen) < 2:
            chosen.append(i)
    used = -(-len(chosen) // columns)
    picture = Figure((7, 0.86 * used))
    grid = picture.subplots(used, columns, squeeze=False)
    picture.subplots_adjust(0.005, 0.16 / used, 0.995, 1 - 0.18 / used, wspace=0.08, hspace=0.6)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, chosen, strict=False):
        axes.imshow(images[i], cmap="gray_r")
        first, second = np.argsort(-p[i], kind="stable")[:2]
        guesses = "  ".join(f"{class_names[c]}: {100 * p[i, c]:.0f}" for c in (first, second))
        axes.set_title(guesses, size=6, pad=2, family=SERIF)
        axes.text(
            0.5, -0.05, f"true: {class_names[labels[i]]}", size=6, ha="center", va="top", family=SERIF,
            transform=axes.transAxes,
        )  # fmt: skip
    save(path, picture)

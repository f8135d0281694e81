"""The pictures of a report.

PNG files, 200 dots an inch, as wide as a column (3.4 inches) or a page (7 inches) of a paper, in
colours (Okabe and Ito's) and lines that colour-blind readers and grey print keep apart.
"""

from harness.pictures.characters import hesitation, lookalikes
from harness.pictures.classifiers import confusion, gallery, learning_curves, reliability
from harness.pictures.comparisons import (
    against,
    against_bytes,
    by_bytes,
    code_widths,
    comparison,
    curves,
    heat_map,
    tradeoffs,
)
from harness.pictures.fronts import front, frontier
from harness.pictures.insides import reconstructions

__all__ = [
    "against",
    "against_bytes",
    "by_bytes",
    "code_widths",
    "comparison",
    "confusion",
    "curves",
    "front",
    "frontier",
    "gallery",
    "heat_map",
    "hesitation",
    "learning_curves",
    "lookalikes",
    "reconstructions",
    "reliability",
    "tradeoffs",
]

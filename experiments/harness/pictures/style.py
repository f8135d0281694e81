"""What all pictures have in common: fonts, colours, ticks, and how they are written."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import ticker
from matplotlib.figure import Figure

from distill_jax import _files
from harness import runs

# Holds while a picture is drawn, and leaves the caller's settings as they were.
style = matplotlib.rc_context(
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
LOOKS: dict[str, tuple[str, Any]] = {
    "teacher": ("#555555", (0, (1, 1))),
    "scratch": ("#D55E00", (0, (5, 1.5))),
    "distilled": ("#0072B2", "-"),
}
OTHERS: Sequence[tuple[str, Any]] = (
    ("#009E73", (0, (5, 1, 1, 1))),
    ("#CC79A7", (0, (8, 2))),
    ("#E69F00", (0, (3, 1, 1, 1, 1, 1))),
    ("#56B4E9", (0, (2, 2))),
    ("#000000", "-"),
    ("#7F3C8D", (0, (1, 2))),
)


def looks_of(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Gives each model a colour and a line, the same in all pictures to those of ``LOOKS``.

    Where colours run out they are given again, with other lines.
    """
    names = list(names)
    spare = [look for name, look in LOOKS.items() if name not in names]
    again = [
        (colour, line) for (colour, _), (_, line) in zip(OTHERS, [*OTHERS[3:], *OTHERS[:3]], strict=True)
    ]
    others = itertools.cycle([*OTHERS, *spare, *again])
    pairs = {name: LOOKS.get(name) or next(others) for name in names}
    return {name: {"color": colour, "linestyle": line} for name, (colour, line) in pairs.items()}


def save(path: str | Path, picture: Figure) -> None:
    """Writes a picture as PNG."""
    metadata = {"Software": runs.MARK}  # by which --restart knows it
    _files.write_atomically(path, lambda tmp: picture.savefig(tmp, format="png", dpi=200, metadata=metadata))


def log_ticks(lowest: float, highest: float) -> list[float]:
    """Round numbers for a logarithmic axis, also for one that is short."""
    if highest < 5 * lowest:
        return list(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(lowest, highest))
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    digits = (1, 2, 5) if highest / lowest < 1000 else (1,)
    return [d * 10.0**p for p in powers for d in digits]


def check(name: str, given: tuple[int, ...], form: str, expected: tuple[int, ...]) -> None:
    """Refuses an array of another shape."""
    if given != expected:
        raise ValueError(f"{name} must be {form} = {expected}, got {given}")

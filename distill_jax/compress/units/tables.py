"""Text of tables that are 120 columns wide."""

from collections.abc import Sequence

WIDTH = 120
NAMES = 56  # of the columns, for names


def fit(places: Sequence[str], width: int) -> str:
    """Joins as many places as fit; the first is cut if it is too long by itself."""
    text = ""
    for i, place in enumerate(places):
        rest = len(places) - i - 1
        more = f" and {rest} more" if rest else ""
        longer = f"{text}, {place}" if text else place
        if len(longer) + len(more) > width:
            left = f" and {rest + 1} more" if text else more
            return (text or tail(place, max(8, width - len(more)))) + left
        text = longer
    return text


def tail(name: str, width: int = NAMES) -> str:
    """Cuts a name to its end."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def cut(text: str) -> str:
    """Cuts a line to its beginning."""
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"


def count(n: int, what: str) -> str:
    """Writes a number of things."""
    return f"{n:,} {what}" + "s" * (n != 1)


def share(total: int, left: int) -> str:
    """Writes what share of a total is not left."""
    return f"{100 * (total - left) / max(total, 1):.3g} %"


def short(n: int) -> str:
    """Writes a number with three digits, and the prefix of the unit that comes after it."""
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= scale:
            return f"{n / scale:.3g} {letter}"
    return f"{n} "

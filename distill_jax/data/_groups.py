"""Groups of what must not be torn apart by a split."""

from collections.abc import Iterable


def join(names: Iterable[str], pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Joins names that pairs link, directly or through others.

    Returns:
      For each name the first one, in alphabetical order, of its group.
    """
    leader = {name: name for name in names}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for pair in pairs:
        first, second = sorted(map(find, pair))
        leader[second] = first
    return {name: find(name) for name in leader}

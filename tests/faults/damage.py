"""Reproducible damage of files, and counts of what readers made of it: shared by the fault tests.

An outcome is one of

- ``found``: the reader refused in one line that names the file or its directory;
- ``harmless``: it read exactly what was written;
- ``silent``: it read something else without a word;
- ``raw``: it raised anything else, such as an error of the parser in several lines.
"""

import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

OUTCOMES = ("found", "harmless", "silent", "raw")


def damages(file: Path, flips: int, *, seed: int = 0, others: Sequence[Path] = ()) -> Iterator[str]:
    """Damages a file in one way after another; the file is whole again when the next damage is asked for.

    Args:
      file: the file, not empty.
      flips: the number of changes of single bits and bytes, half of each. A tenth as many times it is cut off, loses
        a block to zeros, and grows. Then it is emptied, deleted, and replaced by each of ``others``.
      seed: chooses the places.
      others: files of another content.

    Yields:
      The kind of damage, while it is there.
    """
    content, status, rng = file.read_bytes(), file.stat(), random.Random(f"{file.name} {seed}")
    place = lambda: rng.randrange(len(content))  # noqa: E731
    try:
        for kind in ["bit", "byte"] * (flips // 2) + ["truncate", "zeros", "grow"] * -(-flips // 10):
            damaged = bytearray(content)
            if kind == "bit":
                damaged[place()] ^= 1 << rng.randrange(8)
            elif kind == "byte":
                damaged[place()] ^= rng.randrange(1, 256)
            elif kind == "truncate":
                del damaged[place() :]
            elif kind == "zeros":  # as some file systems leave a file after a power cut
                start = place()
                damaged[start : start + 512] = bytes(len(damaged[start : start + 512]))
            else:
                damaged += rng.randbytes(rng.randrange(1, 64))
            file.write_bytes(damaged)
            yield kind
        file.write_bytes(b"")
        yield "empty"
        file.unlink()
        yield "delete"
        for other in others:
            file.write_bytes(other.read_bytes())
            yield "replace"
    finally:
        file.write_bytes(content)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def outcome(
    read: Callable[[], Any],
    same: Callable[[Any], bool],
    *,
    names: str = "",
    refusals: Sequence[type[Exception]] = (ValueError,),
) -> tuple[str, str]:
    """Reads what may be damaged, and says what became of it.

    Args:
      read: reads.
      same: says whether what was read is what had been written.
      names: what a refusal must name, such as the path.
      refusals: the exact types of exceptions that count as a refusal.

    Returns:
      One of ``OUTCOMES``, and the message of the exception, if any.
    """
    try:
        value = read()
    except Exception as error:
        message = str(error)
        plain = type(error) in refusals and "\n" not in message and names in message
        return "found" if plain else "raw", f"{type(error).__name__}: {message}"
    return ("harmless" if same(value) else "silent"), ""


class Tally:
    """Counts outcomes per kind of file."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.bad: Counter[str] = Counter()  # what was silent or raw

    def add(self, what: str, kind: str, result: tuple[str, str]) -> None:
        """Counts one result of :func:`outcome`, of a kind of file after a kind of damage."""
        self.counts[what, "flips" if kind in ("bit", "byte") else "other damage"][result[0]] += 1
        if result[0] in ("silent", "raw"):
            self.bad[f"{what}, {kind}: {result[0]} {result[1]}"] += 1

    def __str__(self) -> str:
        """A table with one row per kind of file and damage, and then what was bad, if anything was."""
        rows = [(*names, counts) for names, counts in self.counts.items()]
        rows.append(("all", "", sum(self.counts.values(), Counter())))
        lines = ["| file | damage | tried | " + " | ".join(OUTCOMES) + " |", "| --- | --- |" + " ---: |" * 5]
        for what, kind, counts in rows:
            row = (what, kind, counts.total(), *(counts[name] for name in OUTCOMES))
            lines.append(f"| {' | '.join(map(str, row))} |")
        return "\n".join([*lines, *(f"{count} × {line}" for line, count in self.bad.most_common(20))])

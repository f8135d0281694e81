"""Runs all fault tests, and prints one table: fault, tried, found, survived, silent.

    python tests/faults/all.py                             # about an hour on two cores
    python tests/faults/all.py --only kills interrupts

*Found*: refused in one line that says what to do. *Survived*: the result is bit for bit what it would have been.
*Silent*: anything else, a wrong result or an error that is no plain line.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = {
    "flips_store": (
        "flipped bits and bytes, cut-off and missing files: label stores, data caches, saved models",
        [],
    ),
    "flips_runs": ("the same: checkpoints, config.json, choice.json", ["--flips", "60"]),
    "kills": ("SIGKILL, all ten experiments", ["--kills", "11"]),
    "interrupts": (
        "Ctrl-C and SIGTERM from the first import to the report, five experiments",
        ["--times", "8"],
    ),
    "environment": (
        "full disk, read-only directory, 256 descriptors, two processes, no HOME, ASCII output, files of 4 kB",
        [],
    ),
    "environment_store": (
        "label stores: full disk, read-only directory, several writers, kills, no HOME",
        [],
    ),
    "malformed": ("malformed arguments", []),
}
TALLY = re.compile(r"^\| all \|  \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", re.MULTILINE)
TOTAL = re.compile(r"^tried (\d+), found (\d+), survived (\d+), silent (\d+)", re.MULTILINE)
CALLS = re.compile(r"^all: (\d+) tried, (\d+) refused, (\d+) raw, (\d+) accepted", re.MULTILINE)


def counts(printed: str) -> tuple[int, int, int, int] | None:
    """Reads what a script counted: tried, found, survived, silent."""
    if found := TALLY.search(printed):
        tried, refused, harmless, silent, raw = map(int, found.groups())
        return tried, refused, harmless, silent + raw
    if found := CALLS.search(printed):
        tried, refused, raw, accepted = map(int, found.groups())
        return tried, refused, 0, raw + accepted
    found = TOTAL.search(printed)
    return tuple(map(int, found.groups())) if found else None  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).parent
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS), metavar="NAME")
    rows, failed = [], False
    for name in parser.parse_args().only:
        what, words = SCRIPTS[name]
        began = time.monotonic()
        command = [sys.executable, str(here / f"{name}.py"), *words]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout, flush=True)
        found = counts(done.stdout)
        failed |= done.returncode != 0 or found is None
        cells = map(str, found or ("failed", "", "", ""))
        rows.append(f"| {what} | {' | '.join(cells)} | {time.monotonic() - began:.0f} |")
    print(
        "| fault | tried | found | survived | silent | seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        sep="\n",
    )
    print(*rows, sep="\n")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

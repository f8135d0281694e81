"""Malformed calls over the whole public interface: what each is refused with, in one line of ours.

``python tests/faults/malformed.py`` makes every call, and prints how many were refused in one line, how many
ended in an exception of another library or of Python, and how many were accepted. It ends with status 1 unless
all were refused.

A call is refused if it raises ValueError, KeyError or TypeError by a ``raise`` statement of distill_jax, with a
message of one line in which the given words are found.
"""

import argparse
import dis
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.malformed_calls.material import ROOT, Case, Outcome
from faults.malformed_calls.of_arithmetic import of_metrics, of_weights
from faults.malformed_calls.of_commands import of_commands, of_processes
from faults.malformed_calls.of_compression import of_compression
from faults.malformed_calls.of_data import of_data, of_sound
from faults.malformed_calls.of_exports import of_exports
from faults.malformed_calls.of_federated import of_federated
from faults.malformed_calls.of_losses import of_features, of_losses
from faults.malformed_calls.of_models import of_models
from faults.malformed_calls.of_teachers import of_stores, of_teachers
from faults.malformed_calls.of_training import of_training
from faults.malformed_calls.of_units import of_units


def judge(case: Case) -> tuple[str, str]:
    """Makes the call: ("refused", "raw" or "accepted", the message or what was returned)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = case.call()
            jax.block_until_ready(found)
        if isinstance(found, Outcome):
            clear = not found.raw and "\n" not in found.text and re.search(case.words, found.text)
            return ("refused" if clear else "raw"), found.text
    except Exception as error:  # of any type: that is the question
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        ours = isinstance(error, ValueError | KeyError | TypeError) and raised_by_us(error)
        clear = bool(text) and "\n" not in text and re.search(case.words, text)
        return ("refused" if ours and clear else "raw"), f"{type(error).__name__}: {text}"
    return "accepted", f"{type(found).__name__}"


def raised_by_us(error: BaseException) -> bool:
    """Says whether a ``raise`` statement of this project raised an error, and not what it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    inside = any(
        Path(code.co_filename).is_relative_to(ROOT / part) for part in ("distill_jax", "experiments")
    )
    return inside and code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]


ROOMS: dict[str, Callable[[], Iterator[Case]]] = {
    "models": of_models,
    "metrics": of_metrics,
    "data": of_data,
    "sound": of_sound,
    "weights": of_weights,
    "train": of_training,
    "federated": of_federated,
    "teachers": of_teachers,
    "units": of_units,
    "export": of_exports,
    "compress": of_compression,
    "features": of_features,
    "losses": of_losses,
    "stores": of_stores,
    "commands": of_commands,
    "processes": of_processes,
}


def main() -> int:
    """Makes all calls, or those of some rooms, and prints the count of each outcome."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rooms", nargs="*", help=f"some of {', '.join(ROOMS)} (default: all)")
    parser.add_argument("--verbose", action="store_true", help="print the message of every call")
    given = parser.parse_args()
    if unknown := set(given.rooms) - set(ROOMS):
        parser.error(f"rooms must be from {', '.join(ROOMS)}, got {', '.join(sorted(unknown))}")
    total: Counter[str] = Counter()
    for room in given.rooms or ROOMS:
        counts: Counter[str] = Counter()
        for case in ROOMS[room]():
            outcome, message = judge(case)
            counts[outcome] += 1
            if given.verbose or outcome != "refused":
                print(f"{outcome:9} {case.name}: {message}", flush=True)
        total += counts
        print(f"{room}: {show(counts)}", flush=True)
    print(f"all: {show(total)}")
    return int(total["refused"] != sum(total.values()))


def show(counts: Counter[str]) -> str:
    outcomes = ("refused", "raw", "accepted")
    return f"{sum(counts.values())} tried, " + ", ".join(f"{counts[o]} {o}" for o in outcomes)


if __name__ == "__main__":
    sys.exit(main())

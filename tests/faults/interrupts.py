"""Interrupts experiments by Ctrl-C and SIGTERM at random moments, from the first import to the report.

    python tests/faults/interrupts.py                      # forty times
    python tests/faults/interrupts.py --times 10 --only kd_mnist

Each time the process must end soon, with status 130 (143 after SIGTERM) and one line; a run that was interrupted again
and again must end as an undisturbed one. Every fifth time a second Ctrl-C follows the first. While Python still imports
the libraries, its own answer to Ctrl-C holds: a traceback, and the status that a shell shows as 130.
"""

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.whole_runs import SETTINGS, arguments, compare, finish, log_file, start

NAMES = ("kd_methods", "compress_mnist", "barrier_mnist", "factorise_network", "linear_code")
LIMIT = 60  # seconds from the signal to the end


class Ended(NamedTuple):
    """How a process ended: when the signal came, whether rightly, how many seconds later, and what it wrote."""

    phase: str
    right: bool
    seconds: float
    text: str


def interrupt(
    name: str, out: Path, words: list[str], after: float, number: int, again: float | None = None
) -> Ended | None:
    """Starts a run and sends it a signal after some seconds, and perhaps a second one.

    Args:
      name: the experiment.
      out: the directory of the run.
      words: its options.
      after: seconds from the start to the signal.
      number: the signal.
      again: seconds from the first to the second signal.

    Returns:
      How it ended, or None if the run was over before.
    """
    log = log_file(out)
    log.unlink(missing_ok=True)
    process = start(name, out, words, PYTHONUNBUFFERED="1")
    with contextlib.suppress(subprocess.TimeoutExpired):
        if process.wait(after) == 0:
            return None
    text = log.read_text()
    phase = "import" if not text else "start" if "Run:" not in text else "training"
    done = "Report with pictures" in text  # while Python ends, its own answer to SIGTERM holds
    phase = "report" if done or (out / "learning_curves.png").exists() else phase
    began = time.monotonic()
    process.send_signal(number)
    if again is not None:
        time.sleep(again)
        process.send_signal(number)
    try:
        status = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{name} did not end within {LIMIT} seconds") from None
    if status == 0:
        return None
    text = log.read_text()
    word = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}[signal.Signals(number)]
    line = f"{word}; the same command continues from the last checkpoint"
    plain = "Traceback" not in text and "Fatal" not in text and text.endswith(line + "\n")
    right = (status == 128 + number and plain) or (status == -number and (phase == "import" or done))
    return Ended(phase, right, time.monotonic() - began, f"status {status}: {text[-2000:]}")


def torture(
    directory: Path, name: str, words: list[str], times: int, seed: int = 0
) -> tuple[Counter[str], list[Ended]]:
    """Runs an experiment twice, the second time with interruptions.

    Returns:
      How often each phase was interrupted, and those that ended wrongly.
    """
    calm, disturbed = directory / "calm", directory / "disturbed"
    length = finish(name, calm, words)
    rng = random.Random(f"{name} {seed}")
    phases: Counter[str] = Counter()
    wrong = []
    slowest = 0.0
    while phases.total() < times:
        number = signal.SIGTERM if phases.total() % 5 == 3 else signal.SIGINT
        again = rng.uniform(0, 0.3) if phases.total() % 5 == 1 else None
        ended = interrupt(name, disturbed, words, rng.uniform(0.3, 0.8 * length), number, again)
        if ended is None:
            compare(calm, disturbed)
            disturbed = disturbed.with_name(f"{disturbed.name}-again")
            continue
        phases[ended.phase] += 1
        slowest = max(slowest, ended.seconds)
        if not ended.right:
            wrong.append(ended)
    finish(name, disturbed, words)
    count = compare(calm, disturbed)
    print(
        f"{name}: {phases.total()} interruptions ({dict(phases)}), {len(wrong)} ended wrongly, the slowest after "
        f"{slowest:.1f} s; {count} arrays and results.json are the same",
        flush=True,
    )
    for ended in wrong:
        print(f"  in {ended.phase}: {ended.text}", flush=True)
    return phases, wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=8, help="of each experiment")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=NAMES, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or a shell's background would ignore Ctrl-C
    failed = 0
    for name in options.only:
        with tempfile.TemporaryDirectory() as directory:
            failed += len(torture(Path(directory), name, arguments(name), options.times, options.seed)[1])
    tried = options.times * len(options.only)
    print(f"tried {tried}, found 0, survived {tried - failed}, silent {failed}")
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    main()

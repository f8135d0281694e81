"""Kills experiments with SIGKILL again and again, and compares their ends with those of undisturbed runs.

    python tests/faults/kills.py                           # ten kills of each experiment
    python tests/faults/kills.py --kills 30 --only kd_mnist

The two runs must end with the same results.json, timings aside, bit-identical checkpoints and identical soft labels,
and --restart must know every file that the killed processes left.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from faults.whole_runs import SETTINGS, arguments, compare, finish, log_file, start
from harness import runs


def stage(out: Path) -> str:
    """Names the part of the run that was under way: the directory changed last."""
    parts = sorted(out.glob("*/*"), key=lambda path: path.stat().st_mtime_ns)
    return parts[-1].name.rstrip("0123456789") if parts else "start"


def kill_at(name: str, out: Path, words: list[str], seconds: float, appears: str | None) -> str | None:
    """Starts the run and kills it after some seconds of work, or as soon as a path appears.

    Returns what was under way, or None if the run ended before.
    """
    before = time.monotonic()
    process = start(name, out, words)
    began = None
    while process.poll() is None:
        if began is None and (out / "config.json").exists():
            began = time.monotonic()
        after = None if began is None else time.monotonic() - began
        if list(out.glob(appears)) if appears else after is not None and after > seconds:
            process.kill()
            process.wait()
            return stage(out)
        if time.monotonic() - before > 1800:
            process.kill()
            raise AssertionError("the run takes longer than half an hour")
        time.sleep(0.001)
    if process.returncode:
        raise AssertionError(log_file(out).read_text())
    return None


def torture(
    directory: Path,
    name: str,
    words: list[str],
    kills: int,
    *,
    triggers: dict[int, str] | None = None,
    seed: int = 0,
) -> str:
    """Runs an experiment twice, the second time with kills; returns what was done.

    Args:
      directory: where both runs are, ``calm`` and ``killed``; an undisturbed run that is there is not made again.
      name: the experiment.
      words: its options.
      kills: the number of kills.
      triggers: number of a kill → pattern of a path at whose appearance it comes. All others come at random.
      seed: chooses the moments.
    """
    calm, killed = directory / "calm", directory / "killed"
    length = 0.0 if calm.exists() else finish(name, calm, words)
    assert length or len(triggers or {}) >= kills, "without the length of a run, each kill needs a trigger"
    rng = random.Random(seed)
    stages: Counter[str] = Counter()
    longest = max(length / 2, 1.5 * length / kills)
    while stages.total() < kills:
        trigger = (triggers or {}).get(stages.total())
        done = kill_at(name, killed, words, rng.uniform(0, longest), trigger)
        if done is None:  # it came to its end too early: this run counts with the kills so far
            assert trigger is None, f"{trigger} never appeared"
            compare(calm, killed)
            killed = killed.with_name(f"{killed.name}-again")
        else:
            stages[done] += 1
    finish(name, killed, words)
    _, others = runs.files_of_run(killed)
    assert not others, f"files that --restart does not know: {others}"
    count = compare(calm, killed)
    return f"{stages.total()} kills ({dict(stages)}); {count} arrays and results.json are the same"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10, help="of each experiment")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            done = torture(Path(directory), name, arguments(name), options.kills, seed=options.seed)
        print(f"{name}: {done} ({time.monotonic() - began:.0f} s)", flush=True)
    tried = options.kills * len(options.only)
    print(f"tried {tried}, found 0, survived {tried}, silent 0")


if __name__ == "__main__":
    main()

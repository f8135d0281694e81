"""Writes label stores and data caches where the system refuses something, and where processes are killed.

    python tests/faults/environment_store.py --kills 100       # as root, for the file systems that are mounted

Every refusal must be one line that names the place, leave no temporary file, and lose nothing: the same call afterwards
ends with the bytes of an undisturbed one.
"""

import argparse
import contextlib
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from distill_jax import teachers
from distill_jax.data import _cache

IDS = np.random.default_rng(0).permutation(4000)[:2000]
LOGITS = np.random.default_rng(1).normal(size=(2000, 10)).astype(np.float32)
ARRAYS = {"image": np.arange(50_000, dtype=np.uint8)}


def write(path: Path, seconds: float = 0.0) -> teachers.LabelStore:
    """Writes a store of 40 files, and waits after each."""
    pause = lambda done, total: time.sleep(seconds)  # noqa: E731
    return teachers.write_labels(
        path, IDS, lambda rows: LOGITS[rows], fingerprint={"teacher": "t"}, shard_rows=50, progress=pause
    )


def check(path: Path, calm: Path) -> None:
    """Raises AssertionError unless a store has the bytes of the undisturbed one."""
    files = [{file.name: file.read_bytes() for file in place.iterdir()} for place in (path, calm)]
    assert files[0].keys() == files[1].keys(), files[0].keys() ^ files[1].keys()
    assert files[0] == files[1]
    np.testing.assert_array_equal(teachers.open_labels(path)[IDS], LOGITS)


def refused(call: Callable[[], object], *words: str) -> None:
    """Raises AssertionError unless a call is refused in one line that holds the words."""
    try:
        call()
    except (OSError, ValueError) as error:
        message = str(error)
        assert "\n" not in message, message
        assert all(word in message for word in words), message
    else:
        raise AssertionError(f"not refused: {words}")


def not_kept(folder: Path, reason: str) -> None:
    """Raises AssertionError unless a cache there gives the right arrays with a warning of one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _cache.cached(folder, "x", "v", lambda: ARRAYS)
    np.testing.assert_array_equal(found["image"], ARRAYS["image"])
    (warning,) = caught
    message = str(warning.message)
    assert reason in message, message
    assert "\n" not in message, message


@contextlib.contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: a full disk's kin, which needs no root."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def mounted(*options: str) -> Iterator[None]:
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", options[-1]], check=True)


def full_files(folder: Path, calm: Path, kills: int) -> str:
    """A file that may not grow, for files of labels, the description and the cache."""
    sizes = (1, 1000, 12_000)
    for size in sizes:
        with file_limit(size):
            refused(
                lambda: write(folder / "store"), "File too large", str(folder / "store")
            ) if size < 2000 else None
            not_kept(folder / "cache", "File too large")
    assert not list(folder.rglob("*.tmp"))
    write(folder / "store")
    check(folder / "store", calm)
    return f"{2 * len(sizes) - 1} refusals"


def full_disk(folder: Path, calm: Path, kills: int) -> str:
    """A file system that becomes full after some of the files; as root only."""
    disk = folder / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)):
        free = (0, 10_000, 60_000)
        for room in free:
            found = os.statvfs(disk)
            (disk / "filler").write_bytes(bytes(found.f_bavail * found.f_frsize - room))
            refused(lambda: write(disk / "store"), "No space left on device", str(disk / "store"))
            not_kept(disk / "cache", "No space left on device")
            assert not list(disk.rglob("*.tmp"))
            (disk / "filler").unlink()
        write(disk / "store")
        check(disk / "store", calm)
    return f"{2 * len(free)} refusals"


def read_only(folder: Path, calm: Path, kills: int) -> str:
    """A directory that cannot be written holds no, half a, and a whole store; as root only."""
    place = folder / "place"
    (place / "half").mkdir(parents=True)
    write(place / "whole")
    for name in ("store.json", "00000.bin"):
        (place / "half" / name).write_bytes((calm / name).read_bytes())
    with mounted("--bind", str(place), str(place)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        for name in ("none", "half"):
            refused(lambda name=name: write(place / name), "Read-only file system", str(place / name))
        refused(
            lambda: teachers.open_labels(place / "half"), "holds 50 of 2000 soft labels", str(place / "half")
        )
        not_kept(place / "cache", "Read-only file system")
        write(place / "whole")
        check(place / "whole", calm)
    write(place / "half")
    check(place / "half", calm)
    return "4 refusals; a whole store is read"


def start(path: Path, seconds: float) -> subprocess.Popen:
    words = [sys.executable, __file__, "--write", str(path), "--seconds", str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def two_processes(folder: Path, calm: Path, kills: int) -> str:
    """Four processes write one store, and one cache, at the same moment."""
    ends: Counter[str] = Counter()
    for process in [start(folder / "store", 0.02) for _ in range(4)]:
        _, error = process.communicate(timeout=120)
        last = error.strip().rpartition("\n")[2]
        assert process.returncode == 0 or "ValueError: another process is writing in" in last, error
        ends["refused" if process.returncode else "done"] += 1
    assert ends["done"], ends
    check(folder / "store", calm)
    assert [file.suffix for file in (folder / "cache").iterdir()] == [".npz"]
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


def killed(folder: Path, calm: Path, kills: int) -> str:
    """A writer that is killed again and again."""
    rng, done = random.Random(0), 0
    path = folder / "store"
    while done < kills:
        process = start(path, rng.choice((0, 0.05)))  # within a file, or between two
        assert process.stdout is not None
        process.stdout.readline()  # it begins to write
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        done += process.returncode < 0
        if (path / "ids.bin").exists():  # complete: begin another one
            check(path, calm)
            path = folder / f"store {done}"
    write(path)
    check(path, calm)
    return f"{done} kills"


def nobody(folder: Path, calm: Path, kills: int) -> str:
    """A user without a name and without HOME, as in many containers; as root only."""
    rights = "+dac_override,+dac_read_search"  # or it could not read a Python in the home of root
    words = ["setpriv", "--reuid=54321", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    gone = ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")
    np.savez(folder / "own.npz", x_train=np.zeros((20, 4, 4), np.uint8), y_train=np.arange(20) % 2,
             x_test=np.zeros((2, 4, 4), np.uint8), y_test=np.arange(2))  # fmt: skip
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from faults import environment_store as here; "
        "from distill_jax import data; from pathlib import Path; data.load('digits'); data.load(sys.argv[3]); "
        "here.write(Path(sys.argv[2])); here.not_kept(Path('~/.cache/x'), 'home directory')"
    )
    arguments = [str(Path(__file__).parents[1]), str(folder / "store"), str(folder / "own.npz")]
    env = {key: value for key, value in os.environ.items() if key not in gone}
    subprocess.run([*words, sys.executable, "-c", program, *arguments], check=True, env=env)
    check(folder / "store", calm)
    return "digits, own data and a store; a cache warns that it is not kept"


CASES = (full_files, full_disk, read_only, two_processes, killed, nobody)
AS_ROOT = (full_disk, read_only, nobody)


def run(case: Callable[[Path, Path, int], str], folder: Path, kills: int) -> str:
    """Runs one case in an empty directory."""
    write(folder / "calm")
    (folder / "case").mkdir()
    return case(folder / "case", folder / "calm", kills)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        print("at work", flush=True)
        _cache.cached(Path(options.write).parent / "cache", "x", "v", lambda: ARRAYS)
        write(Path(options.write), options.seconds)
        return
    for case in CASES:
        if case in AS_ROOT and os.geteuid():
            print(f"{case.__name__}: not tried, since this is not root")
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(f"{case.__name__}: {run(case, Path(folder), options.kills)}", flush=True)


if __name__ == "__main__":
    main()

"""Runs an experiment where the system refuses something: a full disk, a read-only directory, few descriptors.

    python tests/faults/environment.py                     # as root, for the file systems that are mounted

Each case must end with status 0, or with status 2 and one line; and where it failed, the same command must afterwards,
without the fault, end as an undisturbed run does.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.whole_runs import FOLDER, compare

SMALL = {
    "kd_mnist": (
        "digits --seeds 1 --members 1 --teacher mlp:8 --student mlp:8 --teacher-epochs 2 --epochs 3 --save-seconds 0"
    ),
    "interpolate_mnist": (  # it prints λ, and names trainings after it
        "digits --seeds 1 --hidden 8 --epochs 2 --points 2 --few 100 --few-epochs 2 --save-seconds 0"
    ),
}
COUNT: Counter[str] = Counter()


def command(name: str, out: Path) -> list[str]:
    return [sys.executable, str(FOLDER / f"{name}.py"), *SMALL[name].split(), "--out", str(out)]


def run(
    name: str, out: Path, *, without: Sequence[str] = (), prefix: Sequence[str] = (), **environment: str
) -> tuple[int, str]:
    """Runs an experiment to its end.

    Args:
      name: the experiment.
      out: the directory of the run.
      without: variables to take from its environment.
      prefix: a command that runs the experiment's.
      environment: variables to add.

    Returns:
      Exit status, and what it wrote to stderr.
    """
    env = {key: value for key, value in os.environ.items() if key not in without} | environment
    words = [*prefix, *command(name, out)]
    done = subprocess.run(words, capture_output=True, env=env, timeout=600)
    return done.returncode, done.stderr.decode(errors="replace")


def limited(what: str, value: int) -> list[str]:
    """Makes the ``prefix`` by which a process may use only so much, such as 256 files (NOFILE)."""
    set_limit = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_{what}, ({value}, {value}))"
    return [sys.executable, "-c", f"{set_limit}; os.execv(sys.argv[1], sys.argv[1:])"]


def refused(status: int, error: str, message: str) -> None:
    """Raises AssertionError unless a run ended with one line that holds a message, and status 2."""
    assert status == 2, (status, error)
    assert error.startswith("error: "), error
    assert len(error.splitlines()) == 1, error
    assert message in error, error
    COUNT["refused"] += 1


def succeeded(status: int, error: str) -> None:
    assert status == 0, (status, error)
    assert "Traceback" not in error, error
    COUNT["succeeded"] += 1


@contextlib.contextmanager
def mounted(*options: str) -> Iterator[None]:
    """Mounts a file system; as root only."""
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", options[-1]], check=True)


def full_disk(directory: Path, calm: Path) -> str:
    """A file system that is full at one point of the run or another, from the first file to the last picture."""
    disk = directory / "disk"
    disk.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)):
        filler = disk / "filler"
        refusals = 0
        for free in (0, 20_000, 60_000, 120_000, 200_000, 300_000, 450_000):
            filler.write_bytes(bytes(available(disk) - free))
            status, error = run("kd_mnist", disk / "run")
            filler.unlink()
            if status == 0:  # this was enough
                break
            refused(status, error, "space")
            refusals += 1
        assert refusals > 2
        succeeded(*run("kd_mnist", disk / "run"))
        count = compare(calm, disk / "run")
    return f"{refusals} refusals at different moments, then {count} arrays and results.json are the same"


def available(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def large_file(directory: Path, calm: Path) -> str:
    """No file may grow beyond four kilobytes, which is a full disk's kin and needs no root."""
    out = directory / "limited"
    found = run("kd_mnist", out, prefix=limited("FSIZE", 4096), JAX_ENABLE_COMPILATION_CACHE="false")
    refused(*found, "space")
    succeeded(*run("kd_mnist", out))
    return f"1 refusal, then {compare(calm, out)} arrays and results.json are the same"


def read_only(directory: Path, calm: Path) -> str:
    """A directory that cannot be written, before the run and in the middle of it."""
    place = directory / "place"
    place.mkdir()
    with mounted("--bind", str(place), str(place)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        refused(*run("kd_mnist", place / "run"), "cannot be written: Read-only file system")
    process = subprocess.Popen(command("kd_mnist", place / "run"), stderr=subprocess.PIPE, text=True)
    wait_for(place / "run" / "config.json", process)
    try:
        subprocess.run(["chattr", "-R", "+i", str(place / "run")], check=True)
        _, error = process.communicate(timeout=600)
    finally:
        subprocess.run(["chattr", "-R", "-i", str(place / "run")], check=True)
    refused(process.returncode, error, "not permitted")
    succeeded(*run("kd_mnist", place / "run"))
    return f"2 refusals, then {compare(calm, place / 'run')} arrays and results.json are the same"


def wait_for(path: Path, process: subprocess.Popen) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)


def few_descriptors(directory: Path, calm: Path) -> str:
    """256 open files at most."""
    out = directory / "few"
    succeeded(*run("kd_mnist", out, prefix=limited("NOFILE", 256)))
    return f"{compare(calm, out)} arrays and results.json are the same"


def two_processes(directory: Path, calm: Path) -> str:
    """Two processes in one directory: the second one is refused."""
    out = directory / "both"
    first = subprocess.Popen(command("kd_mnist", out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out / "config.json", first)
    refused(*run("kd_mnist", out), "another process is working in")
    assert first.wait(600) == 0
    return f"1 refusal; {compare(calm, out)} arrays and results.json of the first are the same"


def nobody(directory: Path, calm: Path) -> str:
    """A user without a name and without HOME, as in many containers; as root only."""
    out = directory / "nobody"
    gone = ("HOME", "USER", "LOGNAME", "JAX_COMPILATION_CACHE_DIR")
    rights = "+dac_override,+dac_read_search"  # or it could not read a Python in the home of root
    user = ["setpriv", "--reuid=54321", "--clear-groups", f"--inh-caps={rights}", f"--ambient-caps={rights}"]
    succeeded(*run("kd_mnist", out, prefix=user, without=gone))
    return f"{compare(calm, out)} arrays and results.json are the same"


def ascii_output(directory: Path, calm: Path) -> str:
    """Output without umlauts and signs such as ±, and file names in ASCII."""
    count = 0
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for number, environment in enumerate(({"PYTHONIOENCODING": "ascii"}, plain)):
        out = directory / f"ascii{number}"
        succeeded(*run("kd_mnist", out, **environment))
        count += compare(calm, out)
        succeeded(*run("interpolate_mnist", directory / f"names{number}", **environment))
    count += compare(directory / "names0", directory / "names1")
    return f"{count} arrays and results.json are the same"


CASES = (full_disk, large_file, read_only, few_descriptors, two_processes, nobody, ascii_output)
AS_ROOT = (full_disk, read_only, nobody)


def main() -> None:
    names = [case.__name__ for case in CASES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        calm = Path(directory) / "calm"
        succeeded(*run("kd_mnist", calm))
        for case in CASES:
            if case.__name__ not in options.only:
                continue
            if case in AS_ROOT and os.geteuid():
                print(f"{case.__name__}: not tried, since this is not root")
                continue
            try:
                print(f"{case.__name__}: {case(Path(directory), calm)}", flush=True)
            except AssertionError as error:
                print(f"{case.__name__}: FAILED: {error}", flush=True)
                failed += 1
    survived = COUNT["succeeded"] - 1  # without the undisturbed run
    tried = COUNT["refused"] + survived + failed
    print(f"tried {tried}, found {COUNT['refused']}, survived {survived}, silent {failed}")
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    main()

"""Runs under faults, in short: signals, damaged files, refusals of the system. The long forms are in tests/faults."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import environment, flips_runs
from faults.damage import Tally
from harness import runs

# A main function whose last act takes half a second, like the closing of checkpoints, while a thread compiles
PROGRAM = """
import os, signal, sys, threading, time
import jax
from harness import runs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it

def compiled(x):
    for i in range(3000):
        x = jax.numpy.sin(x) * i
    return x

class Swallowing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)  # here the signal raises an exception, which Python ignores in such a place

def main():
    threading.Thread(target=lambda: jax.jit(compiled)(1.0), daemon=True).start()
    if sys.argv[1:]:
        Swallowing()
        print("lost", flush=True)
        time.sleep(60)  # the exception comes again
    try:
        print("ready ±", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)
        print("closed", flush=True)

runs.run_main(main)
"""


def program(*arguments: str) -> subprocess.Popen:
    paths = [str(Path(environment.FOLDER)), *sys.path]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("signals", "status", "word", "closed"),
    [
        ([signal.SIGINT], 130, "interrupted", True),
        ([signal.SIGTERM], 143, "terminated", True),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted", False),
    ],
)
def test_a_signal_ends_a_run_in_one_line_also_while_something_is_compiled(signals, status, word, closed):
    process = program()
    assert process.stdout.readline() == "ready \\xb1\n"
    for each in signals:
        process.send_signal(each)
        time.sleep(0.2)
    out, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert error == f"{word}; the same command continues from the last checkpoint\n"
    assert ("closed" in out) == closed


def test_a_signal_whose_exception_is_lost_ends_the_run_in_one_line():
    out, error = (process := program("swallow")).communicate(timeout=60)
    assert "lost" in out
    assert process.returncode == 130
    assert error == "interrupted; the same command continues from the last checkpoint\n"


def test_compiled_programs_that_a_killed_run_left_unfinished_are_deleted(tmp_path):
    for name in ("whole-cache", "whole-atime", "half-cache", "other"):
        (tmp_path / name).touch()
    runs._delete_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"whole-cache", "whole-atime", "other"}


def test_damaged_checkpoints_and_run_files(tmp_path):
    tally = Tally()
    for name in ("checkpoints", "run"):
        (tmp_path / name).mkdir()
    flips_runs.flip_checkpoints(tmp_path / "checkpoints", 2, tally)
    flips_runs.flip_files(tmp_path / "run", 30, tally)
    assert not tally.bad, tally
    found = sum(counts["found"] for counts in tally.counts.values())
    assert found > 80, tally


def test_ascii_few_descriptors_and_two_processes(tmp_path):
    out = tmp_path / "run"
    command = [*environment.limited("NOFILE", 256), *environment.command("kd_mnist", out)]
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    environment.wait_for(out / "config.json", first)
    environment.refused(*environment.run("kd_mnist", out), "another process is working in")
    printed, error = first.communicate(timeout=300)
    environment.succeeded(first.returncode, error.decode())
    assert b"Report with pictures" in printed
    assert (out / "report.md").exists()


def test_a_run_names_the_commit_of_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "experiments" / "harness" / "runs.py"))
    assert runs.commit() is None  # no clone
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("there is no git")
    (tmp_path / "file").write_text("one")
    for words in (["add", "file"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    named = runs.commit()
    assert named
    assert head.startswith(named)
    (tmp_path / "file").write_text("two")
    assert runs.commit() == f"{named}-dirty"

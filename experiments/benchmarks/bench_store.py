"""Measures the label store against what the disk does for the same bytes.

For each number of classes and dtype, in turn, round after round:

- write: ``write_labels`` from logits in memory, and the same bytes written to one file; both wait for the disk (fsync).
- read: all labels in order from an opened store, into float32; and the same bytes by a plain read, and through a map of
  the file (``np.memmap``) copied once. Before each the file's pages are dropped from the system's memory. Whether the
  bytes then came from the disk is taken from the system's count of blocks that were read, and stands in the table.
- verify: ``open_labels``, which computes the checksum of every file.
- random batches: labels of 128 ids drawn at random, all files in memory; beside it the same rows of a map.

A row's share is the rate of the store as a part of that of the plain file.

    python experiments/benchmarks/bench_store.py
    python experiments/benchmarks/bench_store.py --directory /mnt/data --out store.json
"""

from __future__ import annotations

import functools
import itertools
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tqdm
import tyro

from distill_jax import _files, teachers

BATCH, BATCHES, SHARD_ROWS = 128, 100, 8192
DESCRIBED = {"teacher": "random"}


@dataclass(frozen=True)
class Config:
    """The options of the benchmark."""

    classes: tuple[int, ...] = (10, 1000)  # numbers of classes
    dtypes: tuple[Literal["float16", "float32"], ...] = ("float16", "float32")  # dtypes on disk
    megabytes: float = 100.0  # size of the labels, at most --labels of them
    labels: int = 1_000_000  # largest number of labels
    rounds: int = 5  # number of timings of each
    directory: Path | None = None  # where to write; the system's directory for temporary files by default
    out: Path | None = None  # JSON file for the figures


def forget(folder: Path) -> None:
    """Drops the pages of all files from the system's memory, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(classes: int, dtype: str, folder: Path, config: Config) -> dict[str, Any]:
    """Times the store and the plain file of one kind of labels: seconds, ``[rounds]`` each."""
    count = max(BATCH, min(config.labels, round(config.megabytes * 1e6 / classes / np.dtype(dtype).itemsize)))
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, classes)).astype(np.float32) * 3
    content = logits.astype(dtype)
    ids = np.arange(count)
    batches = rng.integers(0, count, (BATCHES, BATCH))
    path, plain = folder / "store", folder / "plain" / "labels.bin"
    plain.parent.mkdir()

    def write():
        return teachers.write_labels(
            path, ids, lambda rows: logits[rows], fingerprint=DESCRIBED, dtype=dtype, shard_rows=SHARD_ROWS
        )

    def write_plain():
        with plain.open("wb") as opened:
            opened.write(content.data)
            opened.flush()
            os.fsync(opened.fileno())

    def take_batches(labels):
        return [np.asarray(labels[rows], np.float32) for rows in batches]

    times: dict[str, list[float]] = {}
    from_disk = []

    def timed(name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments)
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    for _ in tqdm.trange(config.rounds, desc="rounds", leave=False, disable=None):
        shutil.rmtree(path, ignore_errors=True)
        plain.unlink(missing_ok=True)
        timed("plain write", write_plain)
        store = timed("write", write)
        forget(plain.parent)
        timed("plain map", lambda: np.array(np.memmap(plain, dtype, mode="r")))
        for name, folder, read in (
            ("plain read", plain.parent, functools.partial(np.fromfile, plain, dtype)),
            ("read", path, functools.partial(store.__getitem__, ids)),
        ):
            forget(folder)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
            timed(name, read)
            blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before
            from_disk.append(blocks * 512 > content.nbytes / 2)
        timed("verify", teachers.open_labels, path)  # its pages are in memory now
        timed("random batches", take_batches, store)
        mapped = np.memmap(plain, dtype, mode="r", shape=content.shape)
        timed("plain random batches", take_batches, mapped)
    return {"labels": count, "bytes": content.nbytes, "from disk": all(from_disk), "seconds": times}


HEAD = """\
| labels | | labels/s | MB/s | plain file, MB/s | share |
| --- | --- | ---: | ---: | ---: | ---: |"""


def table_rows(name: str, found: Mapping[str, Any]) -> list[str]:
    """Writes the rows of one kind of labels; ``found`` is its entry in the report."""
    seconds = {key: float(np.median(values)) for key, values in found["seconds"].items()}
    count, size = found["labels"], found["bytes"] / 1e6
    milliseconds = seconds["random batches"] / BATCHES * 1e3
    where = "from the disk" if found["from disk"] else "from memory"
    rows, title = [], f"{count:,} of {name}, {size:,.0f} MB"
    for key, shown, part in (
        ("write", "write", 1.0),
        ("read", f"read, {where}", 1.0),
        ("verify", "verify", 1.0),
        ("random batches", f"random batches of {BATCH}, {milliseconds:.2f} ms each", BATCH * BATCHES / count),
    ):
        peer, share = "", ""
        if (plain := seconds.get(f"plain {key}")) is not None:
            peer, share = f"{size * part / plain:,.0f}", f"{plain / seconds[key]:.0%}"
        if key == "read":
            peer += f", mapped {size / seconds['plain map']:,.0f}"
        rate = part / seconds[key]
        rows.append(f"| {title} | {shown} | {count * rate:,.0f} | {size * rate:,.0f} | {peer} | {share} |")
        title = ""
    return rows


def main() -> None:
    """Prints the table."""
    config = tyro.cli(Config, description=__doc__)
    if min(config.rounds, config.labels, *config.classes) < 1 or config.megabytes <= 0:
        sys.exit("error: --rounds, --labels, --classes and --megabytes must be positive")
    if config.out is not None and not config.out.parent.is_dir():
        sys.exit(f"error: --out {config.out}: there is no directory {config.out.parent}")
    print(HEAD, flush=True)
    report: dict[str, Any] = {}
    for classes, dtype in itertools.product(config.classes, config.dtypes):
        with tempfile.TemporaryDirectory(dir=config.directory) as folder:
            report[f"{classes} {dtype}"] = measure(classes, dtype, Path(folder), config)
        print(*table_rows(f"{classes} {dtype}", report[f"{classes} {dtype}"]), sep="\n", flush=True)
        if config.out is not None:
            _files.write_json(config.out, report)


if __name__ == "__main__":
    main()

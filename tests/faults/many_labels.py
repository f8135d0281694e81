"""Writes, opens and reads stores of up to ten million labels, and prints seconds and memory.

    python tests/faults/many_labels.py --millions 1 2 4 8 10

The labels have ten classes in float16. Each store is made and read by a process of its own that may open 256 files;
its memory is the most that it ever held, and a store of one example says what Python and JAX alone take.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from distill_jax import teachers

CLASSES = 10


def logits_of(ids: np.ndarray) -> np.ndarray:
    """The logits of examples by their ids: each row is its own."""
    return ((ids[:, None] * 31 + np.arange(CLASSES)) % 2047).astype(np.float16)


def measure(path: Path, count: int, shard_rows: int, asked: int, descriptors: int = 256) -> dict[str, float]:
    """Writes, opens and reads a store; returns seconds, and memory in MB. Raises AssertionError at a wrong label."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, limits[1]))
    try:
        return _measure(path, count, shard_rows, asked)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _measure(path: Path, count: int, shard_rows: int, asked: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    ids = rng.permutation(count) * 3 + 1
    found: dict[str, float] = {}

    def timed(name: str, call):
        start = time.perf_counter()
        result = call()
        found[name] = time.perf_counter() - start
        unit = 2**20 if sys.platform == "darwin" else 2**10
        found[f"{name} MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return result

    def write():
        return teachers.write_labels(
            path,
            ids,
            lambda rows: logits_of(ids[rows]),
            fingerprint={},
            dtype="float16",
            shard_rows=shard_rows,
        )

    timed("write", write)
    timed("open", lambda: teachers.open_labels(path, verify=False))
    store = timed("verify", lambda: teachers.open_labels(path))
    wanted = ids[rng.integers(0, count, asked)]
    timed("100 batches", lambda: [store[wanted[i : i + 128]] for i in range(0, 12_800, 128)])
    labels = timed("read", lambda: store[wanted])
    np.testing.assert_array_equal(labels, logits_of(wanted))
    found["files"] = len(list(path.iterdir()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--millions", type=float, nargs="*", default=[1, 2, 4, 8, 10])
    parser.add_argument("--shard-rows", type=int, default=8192)
    parser.add_argument(
        "--asked", type=int, default=1_000_000, help="number of ids, drawn at random, to read"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        count = max(1, round(options.millions[0] * 1e6))
        print(
            json.dumps(
                measure(Path(options.one), count, options.shard_rows, options.asked if count > 1 else 1)
            )
        )
        return
    steps = ("write", "open", "verify", "100 batches", "read")
    print(f"| examples | files | {' | '.join(f'{step}, s | MB' for step in steps)} |")
    print("| ---: | ---: |" + " ---: |" * (2 * len(steps)))
    for millions in [0, *options.millions]:
        with tempfile.TemporaryDirectory() as folder:
            one = ["--one", f"{folder}/store", "--millions", str(millions)]
            rest = ["--shard-rows", str(options.shard_rows), "--asked", str(options.asked)]
            done = subprocess.run([sys.executable, __file__, *one, *rest], stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout)
        cells = " | ".join(f"{found[step]:.2f} | {found[step + ' MB']:.0f}" for step in steps)
        print(f"| {round(millions * 1e6):,} | {found['files']} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

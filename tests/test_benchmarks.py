"""The benchmarks: their tables of given figures, and the smallest runs."""

import json
import pathlib
import sys

import bench_start
import bench_step
import bench_store
import numpy as np
import pytest
from benchmarks import all as all_benchmarks


def test_table_of_steps():
    times = {f"distill_jax {name}": np.array([2.0, 4.0, 2.0]) for name in bench_step.VARIANTS}
    times["distill_jax captured"] = np.array([3.0, 3.0, 3.0])
    times["keras online"] = np.array([3.0, 4.0, 8.0])
    found = {
        "networks": "a → b, 32",
        "milliseconds": times,
        "ratios": bench_step.ratios(times),
        "ideal milliseconds": dict.fromkeys(bench_step.VARIANTS, 1.0),
    }
    assert bench_step.table_rows(found) == [
        "| a → b, 32 | distill_jax | 2.00 (50%) | 2.00 (50%) | 2.00 (50%) | 2.00 (50%) |",
        "|  | keras |  |  | 4.00 (25%) × 1.50 (1.00 to 4.00) |  |",
        "| | ratios of distill_jax | | stored / plain: 1.00 (1.00 to 1.00) | "
        "online / (plain + teacher forward): 0.50 (0.50 to 0.50) | captured / teacher forward: 1.50 (0.75 to 1.50) |",
    ]


def test_missing_peer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "PEERS", {"x": ("no-such-package", "such"), "y": ("numpy", "numpy")})
    assert bench_step.import_peers(["x", "y"]) == {"y": f"numpy {np.__version__}"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "x is left out: pip install such"


def test_store(tmp_path):
    config = bench_store.Config(labels=1000, rounds=2)
    found = bench_store.measure(10, "float16", tmp_path, config)
    assert found["labels"] == 1000
    assert found["bytes"] == 20_000
    assert {len(times) for times in found["seconds"].values()} == {2}


def test_table_of_the_store():
    seconds = {"plain write": [0.1], "write": [0.4], "plain read": [0.1], "read": [0.2], "plain map": [0.05]}
    seconds |= {"verify": [0.5], "random batches": [0.2], "plain random batches": [0.1]}
    found = {"labels": 25_600, "bytes": 4_000_000, "from disk": False, "seconds": seconds}
    assert bench_store.table_rows("10 float16", found) == [
        "| 25,600 of 10 float16, 4 MB | write | 64,000 | 10 | 40 | 25% |",
        "|  | read, from memory | 128,000 | 20 | 40, mapped 80 | 50% |",
        "|  | verify | 51,200 | 8 |  |  |",
        "|  | random batches of 128, 2.00 ms each | 64,000 | 10 | 20 | 50% |",
    ]


def test_table_of_starts():
    found = {
        "import jax": [{"seconds": 1.0, "megabytes": 100.0}, {"seconds": 2.0, "megabytes": 100.0}],
        "second start": [{"seconds": 3.0, "step": 0.5, "compiling": 0.1}] * 2,
    }
    assert bench_start.table_rows(found) == [
        "| import jax | 1.50 (1.00 to 2.00) | 1.00 |  |  | 100 |",
        "| second start | 3.00 (3.00 to 3.00) | 2.25 | 0.50 | 0.10 |  |",
    ]


def test_child_reports():
    program = bench_start.REPORT + "report(x=len(sys.argv))"
    found = bench_start.child(program, "an argument")
    assert found["x"] == 2
    assert 0 < found["seconds"] < 60
    with pytest.raises(RuntimeError, match="no module named"):
        bench_start.child("raise SystemExit('no module named x')")


def test_page_of_all_benchmarks(tmp_path, monkeypatch):
    program = "import sys, pathlib; print('| a |'); pathlib.Path(sys.argv[2]).write_text('{}')"

    def command(part, config, out):
        if part == "store":
            return [sys.executable, "-c", "print('| half |'); raise SystemExit(3)", "--out", str(out)]
        return [sys.executable, "-c", program, "--out", str(out)]

    monkeypatch.setattr(all_benchmarks, "command", command)
    monkeypatch.setattr(sys, "argv", ["all.py", "--out", str(tmp_path / "new"), "--only", "store", "start"])
    assert all_benchmarks.main() == 1
    page = (tmp_path / "new" / "benchmarks.md").read_text()
    assert "failed with exit status 3:** what follows is not complete.\n\n| half |\n\n## Imports" in page
    assert page.endswith("| a |\n")
    parts = json.loads((tmp_path / "new" / "benchmarks.json").read_text())["parts"]
    assert [parts[name]["figures"] for name in ("store", "start")] == [None, {}]


def test_commands_of_all_benchmarks(tmp_path):
    config = all_benchmarks.Config(out=tmp_path, peers=("keras",), quick=True)
    for part in all_benchmarks.PARTS:
        program, *options = all_benchmarks.command(part, config, tmp_path / "x.json")[1:]
        assert pathlib.Path(program).exists()
        assert options[-2:] == ["--out", str(tmp_path / "x.json")]
        assert ("keras" in options) == (part == "step")


def test_systems_work_in_processes_of_their_own(capsys):
    with bench_step.systems_at_work(["distill_jax", "keras"], "mlp", 2, keep_memory=False) as timed:
        assert {f"distill_jax {name}" for name in (*bench_step.VARIANTS, "captured")} <= set(timed)
        assert timed["distill_jax plain"](np.zeros((3, 2), np.int32)) > 0
    if "keras online" not in timed:
        assert capsys.readouterr().err.startswith("keras is left out: ModuleNotFoundError: No module named")


def test_operations_of_a_step():
    """The gradient with respect to the images is not counted: nobody computes it."""
    found = bench_step.ideal_milliseconds("mlp", 128, gflops=1.0)
    forward, first = 784 * 800 + 800 * 800 + 800 * 10, 784 * 800
    assert found["plain"] == pytest.approx(2e-6 * 128 * (3 * forward - first), rel=0.02)
    assert found["teacher forward"] == pytest.approx(2e-6 * 128 * (784 * 1200 + 1200**2 + 12000), rel=0.02)

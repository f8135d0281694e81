"""The benchmarks: their tables of given figures, and the smallest runs."""

import numpy as np
from benchmarks import bench_step


def test_table_of_steps():
    times = {f"distill_jax {name}": np.array([2.0, 4.0, 2.0]) for name in bench_step.VARIANTS}
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
        "online / (plain + teacher forward): 0.50 (0.50 to 0.50) | |",
    ]


def test_missing_peer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "PEERS", {"x": ("no_such_module", "such"), "y": ("numpy", "numpy")})
    assert bench_step.import_peers(["x", "y"]) == {"y": f"numpy {np.__version__}"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("x is left out")
    assert line.endswith("(pip install such)")

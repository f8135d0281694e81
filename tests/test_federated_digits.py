"""The comparison of federated methods: small runs."""

import json

import federated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import clients, runs

EXPERIMENT = federated

SMALL = [
    *("digits", "--seeds", "1", "--clients", "3", "--rounds", "2", "--steps", "2", "--batch-size", "4"),
    *("--hidden", "8", "4", "--mixed", "mlp:8,4", "mlp:6", "--widths", "1", "0.5", "--central-epochs", "1"),
    *("--public", "50"),
]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    methods = [
        *("alone", "FedAvg", "FedAvg, own starts, aligned", "FedMD", "co-distilled, top-k, mixed"),
        "widths, own starts, matched",
    ]
    status, printed, error = run("--out", out, "--methods", *methods)
    assert status == 0, error
    table = json.loads((out / "results.json").read_text())["models"]
    assert list(table) == [*methods, "alone, averaged", "alone, aligned, averaged", "central"]
    parameters = 4 * (64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10)  # bytes of a client
    assert table["FedAvg"]["sent"] == [2 * 3 * parameters] * 2
    assert table["FedAvg, own starts, aligned"]["sent"] == [
        2 * 3 * parameters,
        3 * parameters,
    ]  # nothing down in the first round
    assert table["FedMD"]["sent"] == [2 * 3 * 50 * 20] * 2
    assert table["co-distilled, top-k, mixed"]["sent"] == [2 * 3 * 50 * 8] * 2
    assert table["alone"]["sent"] == [0, 0]
    narrow = 4 * (64 * 4 + 4 + 4 * 2 + 2 + 2 * 10 + 10)
    once = 2 * parameters + narrow
    assert table["widths, own starts, matched"]["sent"] == [2 * once, once]
    assert np.shape(table["FedMD"]["rounds"]) == (2, 1)
    assert "with 1/" in printed
    for picture in ("bytes.png", "starts.png"):
        assert (out / picture).stat().st_size > 500
    written = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert all(runs.WRITTEN.fullmatch(path.relative_to(out).as_posix()) for path in written)


def test_a_client_that_sends_nan_is_refused_and_the_run_goes_on_without_it(tmp_path, run, monkeypatch):
    train, rounds = clients.World.train, []

    def broken(world, state, stacked, members, **options):
        rounds.append(int(state.step))
        new = train(world, state, stacked, members, **options)
        bad = (jnp.arange(len(members)) == 1) & (state.step == 1)
        return jax.tree.map(lambda x: jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x), new)

    monkeypatch.setattr(clients.World, "train", broken)
    arguments = ["--methods", "FedAvg", "co-distilled, top-k", "--out", tmp_path / "run"]
    status, _, error = run(*arguments)
    assert status == 2
    assert "client 1 sent" in error
    assert len(error.strip().splitlines()) == 1
    rounds.clear()
    status, _, error = run(*arguments, "--invalid", "leave out")
    assert status == 0, error
    assert rounds == [1, 0, 1]  # the first round of FedAvg was kept
    table = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    assert table["co-distilled, top-k"]["sent"][0] == (3 + 2) * 50 * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "FedSGD"), "--methods must be from"),
        (("--public", "100000"), "--public must leave"),
        (("--top", "11"), "--top must be at most 10"),
        (("--widths", "0.5"), "--widths must begin with 1"),
        (("--mixed", "mlp:0"), "got 'mlp:0'"),
        (("--least", "340", "--concentration", "0.001"), "fewer than 340"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, run, arguments, words):
    status, _, error = run(*arguments, "--out", tmp_path / "run")
    assert status == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1

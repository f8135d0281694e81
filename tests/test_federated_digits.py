"""The comparison of federated methods: small runs."""

import dataclasses
import json

import federated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import clients, runs

from distill_jax import data

EXPERIMENT = federated
MIXED = "co-distilled-top-k-mixed"

SMALL = [
    *("digits", "--seeds", "1", "--clients", "3", "--rounds", "2", "--steps", "2", "--batch-size", "4"),
    *("--hidden", "8", "4", "--mixed", "mlp:8,4", "mlp:6", "--widths", "1", "0.5", "--central-epochs", "1"),
    *("--public", "50"),
]


def test_a_whole_run(tmp_path, run):
    out = tmp_path / "run"
    methods = [
        *(
            "alone",
            "FedAvg",
            "FedAvg-different-initial-parameters-aligned",
            "FedMD",
            "co-distilled-top-k-mixed",
        ),
        "unequal-widths-different-initial-parameters-matched",
    ]
    status, printed, error = run("--out", out, "--methods", *methods)
    assert status == 0, error
    table = json.loads((out / "results.json").read_text())["models"]
    assert list(table) == [*methods, "alone, averaged", "alone, aligned, averaged", "central"]
    parameters = 4 * (64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10)  # bytes of a client
    assert table["FedAvg"]["sent"] == [2 * 3 * parameters] * 2
    assert table["FedAvg-different-initial-parameters-aligned"]["sent"] == [
        2 * 3 * parameters,
        3 * parameters,
    ]  # nothing down in the first round
    assert table["FedMD"]["sent"] == [2 * 3 * 50 * 20] * 2
    assert table["co-distilled-top-k-mixed"]["sent"] == [2 * 3 * 50 * 8] * 2
    assert table["alone"]["sent"] == [0, 0]
    narrow = 4 * (64 * 4 + 4 + 4 * 2 + 2 + 2 * 10 + 10)
    once = 2 * parameters + narrow
    assert table["unequal-widths-different-initial-parameters-matched"]["sent"] == [2 * once, once]
    assert np.shape(table["FedMD"]["rounds"]) == (2, 1)
    assert "with 1/" in printed
    for picture in ("bytes.png", "starts.png"):
        assert (out / picture).stat().st_size > 500
    written = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert all(runs.WRITTEN.fullmatch(path.relative_to(out).as_posix()) for path in written)


def test_a_client_that_sends_nan_is_refused_and_the_run_goes_on_without_it(tmp_path, run, monkeypatch):
    train, rounds = clients.Clients.train, []

    def broken(self, state, stacked, members, **options):
        rounds.append(int(state.step))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stacked))  # nobody keeps the NaN
        new = train(self, state, stacked, members, **options)
        bad = np.isin(members, 1) & (state.step == 1)
        return jax.tree.map(lambda x: jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x), new)

    monkeypatch.setattr(clients.Clients, "train", broken)
    arguments = ["--methods", "FedAvg", MIXED, "alone", "--rounds", "3", "--out", tmp_path / "run"]
    status, _, error = run(*arguments)
    assert status == 2
    assert "alone, seed 1, round 2: client 1 sent" in error
    assert '--invalid "leave out"' in error
    assert len(error.strip().splitlines()) == 1
    rounds.clear()
    with pytest.warns(UserWarning, match="was left out") as warned:
        status, printed, error = run(*arguments, "--invalid", "leave out")
    assert status == 0, error
    assert rounds == [1, 2, 0, 1, 2, *[0, 0, 1, 1, 2, 2]]  # the first round of "alone" was kept
    # In the mixed stacks the clients stand in the order 0, 2, 1
    told = [str(each.message) for each in warned]
    assert told == [
        f"{name}, seed 1, round 2: client 1 sent NaN, infinite or too large numbers and was left out"
        for name in ("alone", "FedAvg", MIXED)
    ]
    assert "clients left out of rounds" in printed
    table = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    assert [table[name]["left_out"] for name in ("alone", "FedAvg", MIXED)] == [1, 1, 1]
    assert table[MIXED]["sent"][0] == 3 * 3 * 50 * 8  # it did send them
    status, _, error = run(*arguments)
    assert status == 2
    assert "went on without some clients" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "FedSGD"), "--methods must be from"),
        (("--public", "100000"), "--public must leave"),
        (("--top", "11"), "--top must be at most 10"),
        (("--widths", "0.5"), "--widths must begin with 1"),
        (("--mixed", "mlp:0"), "got 'mlp:0'"),
        (("--mixed",), "--mixed must name at least one network"),
        (("--least", "340", "--concentration", "0.001"), "fewer than 340"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, run, arguments, words):
    status, _, error = run(*arguments, "--out", tmp_path / "run")
    assert status == 2
    assert words in error
    assert len(error.strip().splitlines()) == 1


def test_the_shards_of_all_seeds_are_drawn_before_anything_is_trained(monkeypatch):
    drawn = []
    monkeypatch.setattr(federated, "divide", lambda config, labels, seed: drawn.append(seed))
    config = dataclasses.replace(federated.CONFIGS["digits"][1], seeds=3)
    federated.check(config, data.load("digits"))
    assert drawn == [0, 1, 2]


def test_equal_choices_stand_for_different_clients():
    groups = clients.in_turn(5, ["a", "b", "a"])
    assert groups == [("a", [0, 3]), ("b", [1, 4]), ("a", [2])]
    assert clients.in_turn(1, ["a", "b"]) == [("a", [0])]


def test_clients_that_were_left_out_are_as_before_the_round():
    groups = [("a", [0, 2]), ("b", [1])]
    old = [{"w": jnp.zeros((2, 3))}, {"w": jnp.zeros((1, 4))}]
    new = [{"w": jnp.ones((2, 3))}, {"w": jnp.ones((1, 4))}]
    first, second = federated.go_on(groups, [0, 1], new, old)
    assert first["w"].tolist() == [[1] * 3, [0] * 3]
    assert second["w"].tolist() == [[1] * 4]


def test_public_and_private_images_are_disjoint_and_all_are_used():
    config = dataclasses.replace(federated.CONFIGS["digits"][1], public=40)
    labels = np.arange(400) % 10
    public, private, shards = clients.divide(config, labels, 1)
    assert sorted([*public, *private]) == list(range(400))
    assert sorted(np.concatenate(shards)) == list(range(360))


def test_the_headline_says_less_and_more_bytes_and_the_clients_own_accuracy():
    def entry(accuracy, sent, **more):
        return {"test": {"accuracy": [accuracy]}, "sent": sent, **more}

    central = {"test": {"accuracy": [0.95]}}
    table = {
        "FedAvg": entry(0.9, [500, 500]), "FedMD": entry(0.8, [2000, 1000], clients=[0.6]),
        "co-distilled": entry(0.85, [20, 20], clients=[0.75]), "central": central,
    }  # fmt: skip
    said = federated.headline(table)
    assert (
        "FedMD 80.00 % (its clients 60.00 %) with 3 times of its bytes, 6 times of those in float16" in said
    )
    assert "co-distilled 85.00 % (its clients 75.00 %) with 1/25 of its bytes, 1/12.5 of those in" in said
    assert federated.headline({"central": central}) == "Central training: 95.00 % of the test images."

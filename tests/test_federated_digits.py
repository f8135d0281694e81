"""The comparison of federated methods: small runs."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import federated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from harness import clients, rounds, runs, traffic

from distill_jax import data, models, train
from distill_jax.compress import units

EXPERIMENT = federated
MIXED = "co-distilled-top-k-mixed"

SMALL = [
    *("digits", "--seeds", "1", "--clients", "3", "--rounds", "2", "--steps", "2", "--batch-size", "4"),
    *("--hidden", "8", "4", "--mixed", "mlp:8,4", "mlp:6", "--widths", "1", "0.5", "--central-epochs", "1"),
    *("--public", "50", "--server-batch-size", "10", "--server-steps", "40", "--server-patience", "40"),
]


PROGRAMS = []


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """All runs of this file have the same programs, which are compiled once."""

    def make_programs(run, make=federated.make_programs):
        if not PROGRAMS:
            PROGRAMS.append(make(run))
        return PROGRAMS[0]

    monkeypatch.setattr(federated, "make_programs", make_programs)


def test_a_whole_run(tmp_path, run, monkeypatch):
    average, means = train.federated.average_predictions, []

    def recording(predictions, sizes=None, *, of="logits", **options):
        means.append((of, sizes))
        return average(predictions, sizes, of=of, **options)

    monkeypatch.setattr(train.federated, "average_predictions", recording)
    out = tmp_path / "run"
    status, printed, error = run("--out", out)
    assert status == 0, error
    table = json.loads((out / "results.json").read_text())["models"]
    once_only = ["alone, averaged", "alone, aligned, averaged", "alone, distilled once"]
    assert list(table) == [*federated.METHODS, *once_only, "central"]
    once = 3 * 4 * (64 * 8 + 8 + 8 * 4 + 4 + 4 * 10 + 10)  # bytes of the parameters of all clients
    narrow = 4 * (64 * 4 + 4 + 4 * 2 + 2 + 2 * 10 + 10)
    widths = once * 2 // 3 + narrow
    logits, top = 3 * 50 * 10 * 2, 3 * 50 * (2 * 1 + 3 * 2)
    sent = {
        "alone": [0, 0],
        "FedAvg": [2 * once] * 2,
        "FedAvg-float16": [once] * 2,
        "FedAvg-different-initial-parameters": [2 * once, once],  # nothing down in the first round
        "FedAvg-different-initial-parameters-aligned": [2 * once, once],
        "FedDF": [2 * once] * 2,
        "FedMD": [2 * logits] * 2,
        "co-distilled": [2 * logits] * 2,
        "co-distilled-top-k": [2 * top] * 2,
        MIXED: [2 * top] * 2,
        "unequal-widths": [2 * widths] * 2,
        "unequal-widths-different-initial-parameters": [2 * widths, widths],
        "unequal-widths-different-initial-parameters-matched": [2 * widths, widths],
    }
    assert {name: table[name]["sent"] for name in federated.METHODS} == sent
    assert [table[name]["sent"] for name in once_only] == [[once, 0], [once, 0], [logits, 0]]
    assert all(np.shape(table[name]["rounds"]) == (2, 1) for name in sent)
    last = {name: (out / "seed0" / f"{name}.jsonl").read_text().splitlines()[-1] for name in sent}
    assert len({json.loads(line)["loss"] for line in last.values()}) == len(sent)  # no two do the same
    # In two rounds, FedDF and FedMD average logits; co-distillation averages probabilities, whatever is sent, as do
    # "alone, distilled once" and the ensembles of five methods. Each client counts alike
    assert Counter(means) == {("logits", None): 2 * 2, ("probabilities", None): 3 * 2 + 1 + 5}
    ratios = f"with 1/{once / top:.3g} of its bytes (1/{once / 2 / top:.3g} of those in float16)"
    points = table["co-distilled-top-k"]["clients_difference"]
    assert f"co-distilled-top-k {ratios}: the clients {points} points, a network" in printed
    report = (out / "report.md").read_text()
    assert "Each client makes 4 steps of 4 private images. FedMD's clients make 2 more" in report
    assert f"to deliver them to all clients takes {3 * 50 * 64 / 1e6:.3g} MB" in report
    assert all(f"{second} minus {first}: " in report for first, second in federated.PAIRS)
    for picture in ("bytes.png", "starts.png"):
        assert (out / picture).stat().st_size > 500
    written = [path for path in out.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert all(runs.WRITTEN.fullmatch(path.relative_to(out).as_posix()) for path in written)


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path, run, monkeypatch):
    names = [MIXED, "unequal-widths-different-initial-parameters-matched"]
    arguments = ["--methods", *names, "--rounds", "3"]
    assert run(*arguments, "--out", tmp_path / "whole")[0] == 0
    for name in names:  # in the third round of each
        with monkeypatch.context() as patched:
            epoch = federated.as_epoch

            def stopping(clients, method, one_round, epoch=epoch, name=name):
                def stopped(clients, state):
                    if method == name and state.step == 2:
                        raise ValueError("stopped")
                    return one_round(clients, state)

                return epoch(clients, method, stopped)

            patched.setattr(federated, "as_epoch", stopping)
            status, _, error = run(*arguments, "--out", tmp_path / "parts")
        assert (status, error.strip()) == (2, "error: stopped")
    assert run(*arguments, "--out", tmp_path / "parts")[0] == 0
    whole, parts = (json.loads((tmp_path / each / "results.json").read_text()) for each in ("whole", "parts"))
    assert whole["models"] == parts["models"]


def break_clients(monkeypatch, broken, number):
    """Makes clients send NaN in a round; returns the list of the rounds in which stacks of clients train."""
    train, rounds = clients.Clients.train, []

    def train_and_break(self, state, stacked, members, **options):
        rounds.append(int(state.step))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stacked))  # nobody keeps the NaN
        new = train(self, state, stacked, members, **options)
        bad = np.isin(members, broken) & (state.step == number)
        return jax.tree.map(lambda x: jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x), new)

    monkeypatch.setattr(clients.Clients, "train", train_and_break)
    return rounds


def test_unequal_widths_go_on_where_nobody_with_all_units_is_left(tmp_path, run, monkeypatch):
    break_clients(monkeypatch, [0, 2], number=0)  # those of width 1
    arguments = ("--methods", "unequal-widths-different-initial-parameters-matched", "--invalid", "leave out")
    with pytest.warns(UserWarning, match="round 1: client 0, client 2 sent NaN.*: left out of the round"):
        status, _, error = run(*arguments, "--out", tmp_path / "run")
    assert status == 0, error


def test_matched_units_are_those_of_all_later_rounds(tmp_path, run, monkeypatch):
    keep, match, later, matched = units.keep, units.match_widths, [], []

    def spy_on_keep(graph, model, kept):
        later.append(kept)
        return keep(graph, model, kept)

    def spy_on_match(*arguments):
        matched.append(match(*arguments))
        return matched[-1]

    monkeypatch.setattr(units, "keep", spy_on_keep)
    monkeypatch.setattr(units, "match_widths", spy_on_match)
    arguments = ("--methods", "unequal-widths-different-initial-parameters-matched", "--rounds", "3")
    assert run(*arguments, "--out", tmp_path / "run")[0] == 0
    # Clients 0 and 2 have width 1, client 1 has width 0.5: their order in a round
    found = [matched[i].kept for i in (0, 2, 1)]
    assert any(kept.tolist() != [*range(len(kept))] for kept in found[2].values())
    assert len(later) == 2 * 3
    jax.tree.map(np.testing.assert_array_equal, later, found * 2)


def test_the_documentation_states_how_the_server_learns_by_default():
    config = federated.CONFIGS["mnist"][1]
    numbers = f"{config.server_steps:,} and {config.server_patience}"
    documents = {"methods": f"{numbers} unless they are given", "results": f"here they are {numbers}."}
    for folder, sentence in documents.items():
        page = Path(__file__).parents[1] / "docs" / folder / "federated.md"
        assert sentence in page.read_text(encoding="utf-8")


def test_the_server_stops_where_validation_does_not_improve_and_keeps_what_it_prefers(monkeypatch):
    config = SimpleNamespace(server_steps=100, server_patience=30, server_batch_size=10, learning_rate=0.1)
    one = SimpleNamespace(config=config, validation=lambda model: {"validation_errors": 5})
    own = clients.Clients(one, 0, {"server": None}, {}, np.zeros((50, 2)), [])
    options = {}

    def fit(state, epoch, data, **given):
        options.update(given)
        return SimpleNamespace(best="best", history={"validation_errors": histories.pop()})

    monkeypatch.setattr(train, "fit", fit)
    model = models.from_function(lambda w, x: x @ w, jnp.zeros((2, 2)))
    histories = [[6, 5, 7], [6, 4, 5]]
    assert own.teach(model, np.zeros((50, 2)), 0) == "best"
    assert own.teach(model, np.zeros((50, 2)), 0) is model
    assert options["epochs"] == 20  # of five steps
    for count, ends in ((7, False), (8, True)):  # six epochs after the best one
        errors = [6, 4, *[4] * (count - 2)]
        assert options["stop"]({"validation_errors": errors, "loss": errors}) == ends


def test_a_client_that_sends_nan_is_refused_and_the_run_goes_on_without_it(tmp_path, run, monkeypatch):
    rounds = break_clients(monkeypatch, [1], number=1)
    arguments = ["--methods", "FedAvg", MIXED, "alone", "--rounds", "3", "--out", tmp_path / "run"]
    status, _, error = run(*arguments)
    assert status == 2
    assert "alone, seed 1, round 2: client 1 sent" in error
    assert '--invalid "leave out"' in error
    assert len(error.strip().splitlines()) == 1
    rounds.clear()
    with pytest.warns(UserWarning, match="left out of the round") as warned:
        status, printed, error = run(*arguments, "--invalid", "leave out")
    assert status == 0, error
    assert rounds == [1, 2, 0, 1, 2, *[0, 0, 1, 1, 2, 2]]  # the first round of "alone" was kept
    # In the mixed stacks the clients stand in the order 0, 2, 1
    told = [str(each.message) for each in warned]
    assert told == [
        f"{name}, seed 1, round 2: client 1 sent NaN, infinite or too large numbers: left out of the round"
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
        (("--clients", "500"), "--clients must be less than"),
        (("--server-batch-size", "51"), "--server-batch-size must be at most --public 50"),
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
    first, second = rounds.go_on(groups, [0, 1], new, old)
    assert first["w"].tolist() == [[1] * 3, [0] * 3]
    assert second["w"].tolist() == [[1] * 4]


def test_public_and_private_images_are_disjoint_and_all_are_used():
    config = dataclasses.replace(federated.CONFIGS["digits"][1], public=40)
    labels = np.arange(400) % 10
    public, private, shards = clients.divide(config, labels, 1)
    assert sorted([*public, *private]) == list(range(400))
    assert sorted(np.concatenate(shards)) == list(range(360))
    expected = train.federated.dirichlet_shards(labels[private], 5, 0.3, seed=1, least=10)
    assert all(map(np.array_equal, shards, expected))


def test_the_headline_says_less_and_more_bytes_and_the_clients_own_accuracy():
    def entry(accuracy, sent, **more):
        return {"test": {"accuracy": accuracy}, "sent": sent, **more}

    central = {"test": {"accuracy": [0.95, 0.95]}}
    table = traffic.compare({
        "FedAvg": entry([0.9, 0.8], [500, 500]), "FedMD": entry([0.8, 0.7], [2000, 1000], clients=[0.6, 0.5]),
        "co-distilled": entry([0.85, 0.77], [20, 20], clients=[0.75, 0.75]), "central": central,
    })  # fmt: skip
    said = traffic.headline(table)
    assert "FedMD with 3 times of its bytes (6 times of those in float16): the clients −30.00 ± 0.00" in said
    assert (
        "co-distilled with 1/25 of its bytes (1/12.5 of those in float16): the clients −10.00 ± 5.00 points, a "
        "network of the server −4.00 ± 1.00"
    ) in said
    assert traffic.headline({"central": central}) == "Central training: 95.00 % of the test images."


def test_pairs_are_compared_seed_by_seed():
    a = {"test": {"accuracy": [0.5, 0.9]}, "rounds": [[40, 10], [50, 90]]}
    b = {"test": {"accuracy": [0.6, 0.96]}, "rounds": [[50, 40], [50, 90]]}
    (said,) = traffic.differences({"a": a, "b": b}, [("a", "b"), ("a", "c")])
    assert "b minus a: +8.00 ± 2.00, of validation images after round 1 +20.00 ± 10.00." in said
    assert traffic.differences({"a": a}, [("a", "b")]) == []

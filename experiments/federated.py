"""Compares ways for clients to learn together without sharing their examples: accuracy against the bytes they send.

The training images are divided among clients whose mixtures of classes differ (Dirichlet). Some images are set aside
as public: everybody has them, without their labels. In each round the clients train on their own images and send
parameters (FedAvg, FedDF) or predictions for the public images (FedMD, co-distillation). All methods have the same
clients, the same number of rounds and the same number of steps on private images. The bytes are those of the arrays
that are sent, up and down; how everybody got the public images is not counted. The curves are of validation images;
the test set is used once, at the end.

    python experiments/federated.py                        # mnist where it can be had, else digits
    python experiments/federated.py digits                 # a minute, no download
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import pictures, results
from harness.clients import Clients, Groups, RoundResult, State, as_epoch, divide, in_turn, make_programs, mlp
from harness.experiment import Run, adam, mnist_or_digits, plain, prepare
from harness.options import Amount, Count, Options, Positive, read
from harness.runs import run_main

from distill_jax import data, metrics, models, train
from distill_jax.compress import units
from distill_jax.teachers import kinds
from distill_jax.train import federated, sweeps


@dataclass(frozen=True)
class Config(Options):
    """The options of the experiment."""

    clients: Count = 10  # number of clients
    concentration: Positive = 0.1  # of the Dirichlet distribution; low: clients with few classes each
    least: Count = 10  # lowest number of examples of a client
    public: Count = 4000  # number of training images that are public, without their labels
    rounds: Count = 20  # number of rounds
    steps: Count = 50  # number of steps of each client per round
    batch_size: Count = 32  # number of private images per step, and of public ones beside them
    learning_rate: Positive = 1e-3  # learning rate (Adam, which begins anew in each round)
    weight: Amount = 1.0  # weight of the consensus in the loss of co-distillation
    top: Count = 2  # number of classes of the top-k predictions
    hidden: tuple[Count, ...] = (200, 200)  # widths of the hidden layers of a client
    mixed: tuple[str, ...] = ("mlp:200,200", "mlp:300", "mlp:100,100,100")
    """networks of clients whose architectures differ, in turn"""
    widths: tuple[Positive, ...] = (1.0, 0.5, 0.25)
    """shares of the hidden units that clients of unequal widths have, in turn"""
    central_epochs: Count = 20  # number of epochs of the central training, on all private images
    methods: tuple[str, ...] = ()  # the methods to compare; none: all
    invalid: Literal["refuse", "leave out"] = "refuse"
    """what to do about a client that sends NaN: refuse the round, or leave the client out of it; a run that was refused
    goes on with "leave out" from its last checkpoint"""
    save_seconds: Amount = 0.0  # shortest time between two checkpoints, in seconds; 0: one after each round
    # With "refuse", no round of the run has left out anybody: see train_all
    PRACTICAL: ClassVar[Any] = (*Options.PRACTICAL, "invalid")


CONFIGS = {
    "digits": ("The digits embedded in scikit-learn, without download; a minute.", Config(
        dataset="digits", seeds=2, clients=5, concentration=0.3, public=300, rounds=15, steps=20, batch_size=16,
        learning_rate=3e-3, hidden=(64, 32), mixed=("mlp:64,32", "mlp:48", "mlp:32,32,32"), central_epochs=40,
    )),
    "mnist": ("MNIST; a quarter of an hour on two free cores.", Config(dataset="mnist", validation=2000)),
}  # fmt: skip
COLUMNS: Mapping[str, results.Column] = {
    "accuracy %": results.score("accuracy", percent=True),
    "clients' accuracy %": lambda m: results.mean_sd(m["clients"], percent=True) if "clients" in m else None,
    "validation % after round 1": lambda m: results.mean_sd(m["rounds"][0]) if "rounds" in m else None,
    "after the last": lambda m: results.mean_sd(m["rounds"][-1]) if "rounds" in m else None,
    "MB up": lambda m: f"{m['sent'][0] / 1e6:.3g}" if "sent" in m else None,
    "MB down": lambda m: f"{m['sent'][1] / 1e6:.3g}" if "sent" in m else None,
    "clients left out of rounds": lambda m: f"{m['left_out']:g}" if m.get("left_out") else None,
}


def average_parameters(
    clients: Clients,
    state: State,
    *,
    different: bool = False,
    aligned: bool = False,
    distil: bool = False,
    dtype: str = "float32",
) -> RoundResult:
    """FedAvg, or FedDF (``distil``); initial parameters may be ``different`` and their units ``aligned`` then.

    Parameters are sent in ``dtype``.
    """
    count, first = clients.run.config.clients, different and not state.step
    server = as_sent(state.model["server"], dtype)
    down = 0 if first else count * federated.payload_bytes(server)
    if first:
        start = sweeps.stack([clients.network(i) for i in range(count)])
    else:
        start = sweeps.repeat(as_sent(server, "float32"), count)
    stacked = clients.train(state, start, range(count))
    sent = as_sent(stacked, dtype)
    each = [as_sent(sweeps.take(sent, i), "float32") for i in range(count)]
    predictions = clients.predict([stacked], architectures(clients)) if distil else np.zeros(count)
    kept = federated.finite_clients(list(zip(each, predictions, strict=True)), invalid="leave out")
    if first and aligned:  # later, all begin with the server's units in their order
        largest = each[max(kept, key=lambda i: clients.sizes[i])]
        for i in kept:
            order = units.match_weights(clients.graph, each[i], largest)
            each[i] = units.permute(clients.graph, each[i], order)
    server = federated.average_models([each[i] for i in kept], [clients.sizes[i] for i in kept])
    if distil:
        consensus = federated.average_predictions(predictions[kept])
        server = sweeps.take(clients.learn(state, "public", sweeps.repeat(server, 1), consensus), 0)
    return RoundResult(state._replace(model={"server": server}), federated.payload_bytes(sent), down, kept)


def as_sent(model: models.Model, dtype: str) -> models.Model:
    """Converts the numbers of a model to the dtype in which they are sent, or in which one computes."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), model)


def average_widths(
    clients: Clients, state: State, *, different: bool = False, matched: bool = False
) -> RoundResult:
    """Averages unequal widths; initial parameters may be ``different`` and units ``matched`` then."""
    config, first = clients.run.config, different and not state.step
    server, own_units = state.model["server"], list(state.extra)
    shares = np.resize(config.widths, config.clients)
    each, down = [server] * config.clients, 0
    for share, members in in_turn(config.clients, config.widths):
        if first:
            start = [
                clients.network(i, mlp(config.hidden, share)).replace(apply_fn=server.apply_fn)
                for i in members
            ]
        else:
            start = [units.keep(clients.graph, server, own_units[i]) for i in members]
            down += federated.payload_bytes(start)
        stacked = clients.train(state, sweeps.stack(start), members)
        for place, i in enumerate(members):
            each[i] = sweeps.take(stacked, place)
    kept = federated.finite_clients(each, invalid="leave out")
    if first and matched:
        widest = max(kept, key=lambda i: (shares[i], clients.sizes[i]))
        # Where nobody is left that has all units, the others are the server's initial ones
        server = units.put_back(clients.graph, each[widest], own_units[widest], server)
        for i in kept:
            each[i], own_units[i] = units.match_widths(clients.graph, each[i], own_units[i], server)
    up = federated.payload_bytes(each)
    chosen: list[Any] = [[values[i] for i in kept] for values in (each, own_units, clients.sizes)]
    server = units.average_widths(clients.graph, server, *chosen)
    extra = jax.tree.map(jnp.asarray, own_units)
    return RoundResult(state._replace(model={"server": server}, extra=extra), up, down, kept)


def exchange_predictions(
    clients: Clients, state: State, *, top: bool = False, mixed: bool = False, together: bool = True
) -> RoundResult:
    """Co-distillation, or FedMD (not ``together``); the server teaches a student of its own, which costs no bytes."""
    config, classes = clients.run.config, clients.run.dataset.classes
    groups, kind = architectures(clients, mixed), kinds.Top(config.top) if top else kinds.Logits()
    stacks = list(state.model["clients"])
    for place, (_, members) in enumerate(groups):
        context = {"image": clients.public, **state.extra} if together else None
        if state.step and not together:  # FedMD: first the consensus, then the own images
            stacks[place] = clients.learn(state, "scores", stacks[place], state.extra["teacher"])
        stacks[place] = clients.train(state, stacks[place], members, context=context)
    sent = federated.encode_predictions(clients.predict(stacks, groups), kind, invalid="leave out")
    received = [federated.dense(kind.decode(each), classes) for each in sent.values()]
    of: Any = "probabilities" if top else "logits"
    answer = kind.encode(federated.average_predictions(received, of=of), dtype="float16")
    consensus = federated.dense(kind.decode(answer), classes)
    server = sweeps.take(
        clients.learn(state, "public", sweeps.repeat(state.model["server"], 1), consensus), 0
    )
    new = state._replace(
        model={"server": server, "clients": go_on(groups, list(sent), stacks, state.model["clients"])},
        extra={"teacher": jnp.asarray(consensus), "weight": jnp.ones(len(consensus))},
    )
    payload = config.clients * federated.payload_bytes(answer)  # as large as what each client sends
    return RoundResult(new, payload, payload, list(sent))


def go_on(
    groups: Groups, kept: Sequence[int], new: Sequence[models.Model], old: Sequence[models.Model]
) -> tuple[models.Model, ...]:
    """Takes the stacks after a round, in which clients that were left out are as they were before it."""

    def chosen(members, new, old):
        which = np.isin(members, kept)
        return jax.tree.map(
            lambda x, y: jnp.where(which.reshape(-1, *[1] * (np.ndim(x) - 1)), x, y), new, old
        )

    return tuple(chosen(members, *pair) for (_, members), *pair in zip(groups, new, old, strict=True))


def train_alone(clients: Clients, state: State) -> RoundResult:
    """Each client by itself: nothing is sent."""
    groups = architectures(clients)
    stacked = clients.train(state, state.model["clients"][0], groups[0][1])
    each = [sweeps.take(stacked, i) for i in groups[0][1]]
    kept = federated.finite_clients(each, invalid="leave out")
    return RoundResult(
        state._replace(model={"clients": go_on(groups, kept, [stacked], state.model["clients"])}), 0, 0, kept
    )


def architectures(clients: Clients, mixed: bool = False) -> Groups:
    """Says which clients have which network."""
    config = clients.run.config
    return in_turn(config.clients, config.mixed if mixed else [mlp(config.hidden)])


def begin(clients: Clients, model: Mapping[str, Any], extra: Any = ()) -> State:
    """Makes the state before the first round."""
    return State(jnp.zeros((), jnp.int32), jax.random.key(clients.seed), dict(model), extra)


def stacks_of(clients: Clients, mixed: bool = False) -> tuple[models.Model, ...]:
    """Makes the clients' networks before the first round, one stack per architecture."""
    return tuple(
        sweeps.stack([clients.network(i, spec) for i in members])
        for spec, members in architectures(clients, mixed)
    )


def begin_alone(clients: Clients) -> State:
    """Makes the state of clients without a server."""
    return begin(clients, {"clients": stacks_of(clients)})


def begin_parameters(clients: Clients) -> State:
    """Makes the state of a server whose clients keep nothing from round to round."""
    return begin(clients, {"server": clients.network()})


def begin_widths(clients: Clients) -> State:
    """Makes the state of a server whose clients have the first units of each group, as many as their width says."""
    shares = np.resize(clients.run.config.widths, clients.run.config.clients)
    free = {name: group.size for name, group in clients.graph.groups.items() if group.free}
    firsts = [{name: jnp.arange(math.ceil(share * n)) for name, n in free.items()} for share in shares]
    return begin(clients, {"server": clients.network()}, firsts)


def begin_predictions(clients: Clients, mixed: bool = False) -> State:
    """Makes the state of a server with a student of its own, and of clients that have no consensus yet."""
    shape = len(clients.public), clients.run.dataset.classes
    no_consensus = {"teacher": jnp.zeros(shape), "weight": jnp.zeros(shape[0])}
    return begin(clients, {"server": clients.network(), "clients": stacks_of(clients, mixed)}, no_consensus)


class Method(NamedTuple):
    """A way to learn together."""

    one_round: Callable[[Clients, State], RoundResult]
    begin: Callable[[Clients], State]
    pictures: Sequence[str] = ()  # in which its curve is drawn


def by_predictions(mixed: bool = False, **options: Any) -> Method:
    """Makes a method whose clients send predictions."""
    one_round = functools.partial(exchange_predictions, mixed=mixed, **options)
    return Method(one_round, functools.partial(begin_predictions, mixed=mixed), ("bytes.png",))


def by_parameters(*pictures: str, **options: Any) -> Method:
    """Makes a method whose clients send parameters."""
    return Method(functools.partial(average_parameters, **options), begin_parameters, pictures)


def by_widths(**options: Any) -> Method:
    """Makes a method whose clients send the parameters of unequal widths."""
    return Method(functools.partial(average_widths, **options), begin_widths, ("starts.png",))


METHODS = {
    "alone": Method(train_alone, begin_alone),
    "FedAvg": by_parameters("bytes.png", "starts.png"),
    "FedAvg-float16": by_parameters("bytes.png", dtype="float16"),
    "FedAvg-different-initial-parameters": by_parameters("starts.png", different=True),
    "FedAvg-different-initial-parameters-aligned": by_parameters("starts.png", different=True, aligned=True),
    "FedDF": by_parameters("bytes.png", distil=True),
    "FedMD": by_predictions(together=False),
    "co-distilled": by_predictions(),
    "co-distilled-top-k": by_predictions(top=True),
    "co-distilled-top-k-mixed": by_predictions(top=True, mixed=True),
    "unequal-widths": by_widths(),
    "unequal-widths-different-initial-parameters": by_widths(different=True),
    "unequal-widths-different-initial-parameters-matched": by_widths(different=True, matched=True),
}


class Trained(NamedTuple):
    """What a method made, and its figures for each round."""

    model: Any  # as in State
    history: Mapping[str, Any]


def train_all(run: Run, seed: int, programs: Mapping[str, Any]) -> dict[str, Trained]:
    """Trains the clients of one seed by each method."""
    config, clients = run.config, Clients.of(run, seed, programs)
    found = {}
    for name, method in METHODS.items():
        if name in (config.methods or METHODS):
            done = run.fit(
                name, seed, method.begin(clients), as_epoch(clients, name, method.one_round),
                {"label": clients.private["label"]},  # whose number and order no round uses
                epochs=config.rounds, batch_size=1, order=seed, validate=programs["validation"],
            )  # fmt: skip
            if config.invalid == "refuse" and np.any(done.history["left_out"]):
                raise ValueError(
                    f"{name} went on without some clients in an earlier run in this directory: pass --invalid "
                    '"leave out", or delete that run by --restart'
                )
            found[name] = Trained(done.model, done.history)
    if "alone" in found:  # averaged once, after the last step
        stacked = found["alone"].model["clients"][0]
        each = [sweeps.take(stacked, i) for i in range(config.clients)]
        largest = each[int(np.argmax(clients.sizes))]
        aligned = [
            units.permute(clients.graph, c, units.match_weights(clients.graph, c, largest)) for c in each
        ]
        for name, averaged in (("alone, averaged", each), ("alone, aligned, averaged", aligned)):
            found[name] = Trained({"server": federated.average_models(averaged, clients.sizes)}, {})
    tx = adam(config.learning_rate, config.central_epochs, len(clients.private["label"]) // config.batch_size)
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx), transform=plain)
    start = train.init_state(clients.network(), tx, run.key(seed, 0))
    done = run.fit(
        "central", seed, start, epoch, clients.private, epochs=config.central_epochs, batch_size=config.batch_size,
        order=seed,
    )  # fmt: skip
    return found | {"central": Trained({"server": done.model}, {})}


def test(run: Run, trained: Sequence[Mapping[str, Trained]]) -> dict[str, Any]:
    """Evaluates all methods on the test set; without a server, the mean over the clients counts."""
    split, table = run.dataset.test, {}

    def figures(logits):
        return metrics.figures(logits, split.label)

    for name in trained[0]:
        entry: dict[str, Any] = {"test": {}}
        for each in (seed[name] for seed in trained):
            of_clients = [
                figures(logits)
                for stack in each.model.get("clients", ())
                for logits in models.predict(sweeps.as_one(stack), split.image, prepare=prepare).swapaxes(
                    0, 1
                )
            ]
            of_all = (
                {n: float(np.mean([f[n] for f in of_clients])) for n in of_clients[0]} if of_clients else {}
            )
            if of_clients:
                entry.setdefault("clients", []).append(of_all["accuracy"])
            server = each.model.get("server")
            shown = figures(models.predict(server, split.image, prepare=prepare)) if server else of_all
            for figure, value in shown.items():
                entry["test"].setdefault(figure, []).append(value)
        histories = [seed[name].history for seed in trained]
        if histories[0]:
            wrong = np.array([h["validation_errors"] for h in histories])
            entry["rounds"] = (
                100 - 100 * wrong / len(run.dataset.validation.label)
            ).T.tolist()  # [rounds][seeds]
            entry["bytes_sent"] = np.cumsum(
                [np.add(h["bytes_up"], h["bytes_down"]) for h in histories], 1
            ).mean(0)
            entry["sent"] = [
                np.mean([np.sum(h[way]) for h in histories]) for way in ("bytes_up", "bytes_down")
            ]
            entry["left_out"] = sum(np.sum(h["left_out"]) for h in histories)
        table[name] = entry
    return table


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    images, needed = len(dataset.train.id), config.clients * config.least
    config.need("clients", needed < images, f"be less than {images} training images / --least {config.least}")
    private, least = images - config.public, max(needed, config.batch_size)
    config.need("public", private >= least, f"leave {least} of {images} images to the clients")
    config.among("methods", list(METHODS))
    config.need("top", config.top <= dataset.classes, f"be at most {dataset.classes}")
    config.need(
        "widths",
        bool(config.widths) and config.widths[0] == max(config.widths) == 1,
        "begin with 1, the largest",
    )
    config.need("mixed", bool(config.mixed), "name at least one network")
    for spec in config.mixed:
        models.build(spec, dataset.image_shape, dataset.classes, jax.random.key(0))
    for seed in range(config.seeds):  # that each client of each seed gets enough images
        divide(config, dataset.train.label, seed)


ABOUT = {"bytes.png": "parameters and predictions", "starts.png": "averages of parameters"}


def draw(run: Run, table: Mapping[str, Any]) -> dict[str, str]:
    """Draws validation accuracy against the bytes sent: what is sent, and how parameters are averaged."""
    seeds, drawn = run.config.seeds, {}
    levels = {"alone": np.mean(table["alone"]["rounds"][-1])} if "alone" in table else {}
    for file, about in ABOUT.items():
        names = [name for name, method in METHODS.items() if name in table and file in method.pictures]
        curves = {n: (table[n]["bytes_sent"], np.array(table[n]["rounds"])) for n in names}
        if curves:
            pictures.against_bytes(
                run.directory / file, curves, ylabel="validation accuracy, %", levels=levels
            )
            caption = f"Validation accuracy after each round against all bytes sent until then, up and down, {about}"
            drawn[f"{caption}: means over {seeds} seeds, bands one standard deviation"] = file
    return drawn


def headline(table: Mapping[str, Any]) -> str:
    """Says what each method that sends predictions does, and its bytes as a share of FedAvg's."""
    accuracy = {name: 100 * np.mean(entry["test"]["accuracy"]) for name, entry in table.items()}
    sent = {name: sum(entry["sent"]) for name, entry in table.items() if "sent" in entry}
    told = [
        f"{name} {accuracy[name]:.2f} % (its clients {100 * np.mean(table[name]['clients']):.2f} %) with "
        f"{times(sent[name], sent['FedAvg'])} of its bytes, {times(2 * sent[name], sent['FedAvg'])} of those in float16"
        for name in sent
        if "FedAvg" in sent and "clients" in table[name] and sent[name]
    ]
    if not told:
        return f"Central training: {accuracy['central']:.2f} % of the test images."
    return (
        f"FedAvg: {accuracy['FedAvg']:.2f} % of the test images; {'; '.join(told)}; all images in one place: "
        f"{accuracy['central']:.2f} %."
    )


def times(part: float, whole: float) -> str:
    """Writes a ratio of bytes: "1/25", or "3.2 times" where there are more.

    >>> times(4, 100), times(250, 100)
    ('1/25', '2.5 times')
    """
    return f"1/{whole / part:.3g}" if part < whole else f"{part / whole:.3g} times"


def note(config: Config) -> str:
    """Says how many steps each method makes."""
    steps = config.rounds * config.steps
    return (
        f"Each client makes {steps:,} steps of {config.batch_size} private images. FedMD's clients make "
        f"{steps - config.steps:,} more on public images, and in co-distillation each batch has {config.batch_size} "
        f"public images besides. FedDF and the methods that send predictions also train the server's network, "
        f"{steps:,} steps; the clients do not get it, and its accuracy is not theirs."
    )


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("federated", name, config, check)
    programs = make_programs(run)
    trained = [train_all(run, seed, programs) for seed in range(config.seeds)]
    found = run.record(test(run, trained))
    run.finish(
        found, draw(run, found["models"]), headline=headline(found["models"]), notes=[note(config)],
        columns=COLUMNS,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    run_main(main)

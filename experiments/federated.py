"""Compares ways for clients to learn together without sharing their examples: accuracy against the bytes they send.

The training images are divided among clients whose mixtures of classes differ (Dirichlet). Some images are set aside
as public: everybody has them, without their labels. In each round the clients train on their own images and send
parameters (FedAvg, FedDF) or predictions for the public images (FedMD, co-distillation). All methods have the same
clients, the same number of rounds and the same number of steps on private images. The bytes are those of the arrays
that are sent, up and down. The curves are of validation images; the test set is used once, at the end.

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
from harness.clients import Sent, State, World, as_epoch, in_turn, make_programs, mlp
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
    """what to do about a client that sends NaN: refuse the round, which can be repeated from the last checkpoint, or
    leave the client out of it"""
    save_seconds: Amount = 0.0  # shortest time between two checkpoints, in seconds; 0: one after each round
    PRACTICAL: ClassVar[Any] = (
        *Options.PRACTICAL,
        "invalid",
    )  # a run that was not refused has left out nobody


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
}


METHODS = (
    "alone", "FedAvg", "FedAvg, aligned", "FedAvg, own starts", "FedAvg, own starts, aligned", "FedDF", "FedMD",
    "co-distilled", "co-distilled, top-k", "co-distilled, top-k, mixed", "widths", "widths, own starts",
    "widths, own starts, matched",
)  # fmt: skip


def average_parameters(
    world: World, state: State, *, own: bool = False, aligned: bool = False, distil: bool = False
) -> Sent:
    """FedAvg; with ``own`` initial parameters of each client, with ``aligned`` units, or FedDF (``distil``)."""
    count, first = world.run.config.clients, own and not state.step
    server = state.model["server"]
    down = 0 if first else count * federated.payload_bytes(server.params)
    start = sweeps.stack([world.network(i) for i in range(count)]) if first else sweeps.repeat(server, count)
    stacked = world.train(state, start, range(count))
    clients = [sweeps.take(stacked, i) for i in range(count)]
    up = federated.payload_bytes(stacked.params)
    kept = federated.sound(clients, invalid=world.run.config.invalid)
    if aligned and (first or not own):  # later, all began with the server's units in their order
        reference = clients[max(kept, key=lambda i: world.sizes[i])] if first else server
        for i in kept:
            order = units.match_weights(world.graph, clients[i], reference)
            clients[i] = units.permute(world.graph, clients[i], order)
    server = federated.average_models([clients[i] for i in kept], [world.sizes[i] for i in kept])
    if distil:
        consensus = federated.average_predictions(world.predict([stacked])[kept])
        server = sweeps.take(world.learn(state, "public", sweeps.repeat(server, 1), consensus), 0)
    return state._replace(model={"server": server}), up, down


def average_widths(world: World, state: State, *, own: bool = False, matched: bool = False) -> Sent:
    """HeteroFL; with ``own`` initial parameters of each client, whose units may be ``matched`` in the first round."""
    config, first = world.run.config, own and not state.step
    server, kept = state.model["server"], list(state.extra)
    clients, down = [server] * config.clients, 0
    for share, members in in_turn(config.clients, config.widths).items():
        if first:
            start = [
                world.network(i, mlp(config.hidden, share)).replace(apply_fn=server.apply_fn) for i in members
            ]
        else:
            start = [units.keep(world.graph, server, kept[i]) for i in members]
            down += federated.payload_bytes([each.params for each in start])
        stacked = world.train(state, sweeps.stack(start), members)
        for place, i in enumerate(members):
            clients[i] = sweeps.take(stacked, place)
    up = federated.payload_bytes([each.params for each in clients])
    sound = federated.sound(clients, invalid=config.invalid)
    if first and matched:
        widest = [i for i in sound if i in in_turn(config.clients, config.widths)[max(config.widths)]]
        server = clients[max(widest, key=lambda i: world.sizes[i])]
        for i in sound:
            clients[i], kept[i] = units.match_widths(world.graph, clients[i], kept[i], server)
    chosen: list[Any] = [[values[i] for i in sound] for values in (clients, kept, world.sizes)]
    server = units.average_widths(world.graph, server, *chosen)
    return state._replace(model={"server": server}, extra=jax.tree.map(jnp.asarray, kept)), up, down


def exchange_predictions(
    world: World, state: State, *, groups: Mapping[str, list[int]], kind: kinds.Kind, together: bool
) -> Sent:
    """FedMD, or co-distillation (``together``); the server teaches a student of its own, which costs no bytes."""
    config, classes = world.run.config, world.run.dataset.classes
    known = bool(state.step)
    stacks = list(state.model["clients"])
    for place, members in enumerate(groups.values()):
        context = {"image": world.public, **state.extra} if together else None
        if known and not together:  # FedMD: first the consensus, then the own images
            stacks[place] = world.learn(state, "scores", stacks[place], state.extra["teacher"])
        stacks[place] = world.train(state, stacks[place], members, context=context)
    predictions = world.predict(stacks)
    sound = federated.sound(predictions, invalid=config.invalid)
    for place, (members, before) in enumerate(zip(groups.values(), state.model["clients"], strict=True)):
        stacks[place] = choose(
            np.isin(members, sound), stacks[place], before
        )  # others go on from where they were
    sent = [kind.encode(predictions[i], dtype="float16") for i in sound]
    received = [federated.dense(kind.decode(each), classes) for each in sent]
    of: Any = "probabilities" if isinstance(kind, kinds.Top) else "logits"
    back = kind.encode(federated.average_predictions(received, of=of), dtype="float16")
    consensus = federated.dense(kind.decode(back), classes)
    server = sweeps.take(world.learn(state, "public", sweeps.repeat(state.model["server"], 1), consensus), 0)
    extra = {"teacher": jnp.asarray(consensus), "weight": jnp.ones(len(consensus))}
    new = state._replace(model={"server": server, "clients": tuple(stacks)}, extra=extra)
    return new, federated.payload_bytes(sent), config.clients * federated.payload_bytes(back)


def choose(which: np.ndarray, new: models.Model, old: models.Model) -> models.Model:
    """Takes some of the stacked clients from one stack, and the others from another."""
    return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *[1] * (np.ndim(x) - 1)), x, y), new, old)


def train_alone(world: World, state: State) -> Sent:
    """Each client by itself: nothing is sent."""
    stacked = world.train(state, state.model["clients"][0], range(world.run.config.clients))
    return state._replace(model={"clients": (stacked,)}), 0, 0


def methods(world: World) -> dict[str, tuple[Callable[..., Sent], State]]:
    """Lists the methods: name → what a round does, and the state before the first round."""
    config, server = world.run.config, world.network()
    count, public = config.clients, len(world.public)
    begin = functools.partial(State, jnp.zeros((), jnp.int32), jax.random.key(world.seed))
    silent = {"teacher": jnp.zeros((public, world.run.dataset.classes)), "weight": jnp.zeros(public)}
    same, mixed = {mlp(config.hidden): list(range(count))}, in_turn(count, config.mixed)

    def stacks(groups):
        return tuple(sweeps.stack([world.network(i, spec) for i in each]) for spec, each in groups.items())

    def predictions(groups, kind, together):
        fn = functools.partial(exchange_predictions, groups=groups, kind=kind, together=together)
        return fn, begin({"server": server, "clients": stacks(groups)}, silent)

    def parameters(fn=average_parameters, extra=(), **options):
        return functools.partial(fn, **options), begin({"server": server}, extra)

    share_of = {i: share for share, each in in_turn(count, config.widths).items() for i in each}
    free = {name: group.size for name, group in world.graph.groups.items() if group.free}
    firsts = [
        {n: jnp.arange(math.ceil(share_of[i] * size)) for n, size in free.items()} for i in range(count)
    ]
    widths = functools.partial(parameters, average_widths, firsts)
    top = kinds.Top(config.top)
    return {
        "alone": (train_alone, begin({"clients": stacks(same)})),
        "FedAvg": parameters(),
        "FedAvg, aligned": parameters(aligned=True),
        "FedAvg, own starts": parameters(own=True),
        "FedAvg, own starts, aligned": parameters(own=True, aligned=True),
        "FedDF": parameters(distil=True),
        "FedMD": predictions(same, kinds.Logits(), False),
        "co-distilled": predictions(same, kinds.Logits(), True),
        "co-distilled, top-k": predictions(same, top, True),
        "co-distilled, top-k, mixed": predictions(mixed, top, True),
        "widths": widths(),
        "widths, own starts": widths(own=True),
        "widths, own starts, matched": widths(own=True, matched=True),
    }


class Trained(NamedTuple):
    """What a method made, and its figures for each round."""

    model: Any  # as in State
    history: Mapping[str, Any]


def train_all(run: Run, seed: int, programs: Mapping[str, Any]) -> dict[str, Trained]:
    """Trains the clients of one seed by each method."""
    config, world = run.config, World.of(run, seed, programs)
    found = {}
    for name, (one_round, state) in methods(world).items():
        if name in (config.methods or METHODS):
            done = run.fit(
                name, seed, state, as_epoch(world, one_round), {"label": world.private["label"]},
                epochs=config.rounds, batch_size=1, order=seed, validate=programs["validation"],
            )  # fmt: skip
            found[name] = Trained(done.model, done.history)
    if "alone" in found:  # averaged once, after the last step
        stacked = found["alone"].model["clients"][0]
        clients = [sweeps.take(stacked, i) for i in range(config.clients)]
        widest = clients[int(np.argmax(world.sizes))]
        aligned = [
            units.permute(world.graph, c, units.match_weights(world.graph, c, widest)) for c in clients
        ]
        for name, each in (("alone, averaged", clients), ("alone, aligned, averaged", aligned)):
            found[name] = Trained({"server": federated.average_models(each, world.sizes)}, {})
    tx = adam(config.learning_rate, config.central_epochs, len(world.private["label"]) // config.batch_size)
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx), transform=plain)
    start = train.init_state(world.network(), tx, run.key(seed, 0))
    done = run.fit(
        "central", seed, start, epoch, world.private, epochs=config.central_epochs, batch_size=config.batch_size,
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
        table[name] = entry
    return table


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    private = len(dataset.train.id) - config.public
    needed = config.clients * config.least
    config.need("public", private >= max(needed, config.batch_size), f"leave {needed} images to the clients")
    config.among("methods", METHODS)
    config.need("top", config.top <= dataset.classes, f"be at most {dataset.classes}")
    config.need(
        "widths",
        bool(config.widths) and config.widths[0] == max(config.widths) == 1,
        "begin with 1, the largest",
    )
    for spec in config.mixed:
        models.build(spec, dataset.image_shape, dataset.classes, jax.random.key(0))


def draw(run: Run, table: Mapping[str, Any]) -> dict[str, str]:
    """Draws validation accuracy against the bytes sent: what is sent, and how parameters are averaged."""
    seeds, drawn = run.config.seeds, {}
    for file, about, names in (
        ("bytes.png", "parameters and predictions", ("FedAvg", "FedDF", "FedMD", *METHODS[7:11])),
        ("starts.png", "averages of parameters", (*METHODS[1:5], *METHODS[10:])),
    ):
        curves = {n: (table[n]["bytes_sent"], np.array(table[n]["rounds"])) for n in names if n in table}
        levels = {"alone": np.mean(table["alone"]["rounds"][-1])} if "alone" in table else {}
        if curves:
            pictures.against_bytes(
                run.directory / file, curves, ylabel="validation accuracy, %", levels=levels
            )
            caption = f"Validation accuracy after each round against all bytes sent until then, up and down, {about}"
            drawn[f"{caption}: means over {seeds} seeds, bands one standard deviation"] = file
    return drawn


def headline(table: Mapping[str, Any]) -> str:
    """Says what the best method that sends predictions does at a fraction of FedAvg's bytes."""
    accuracy = {name: 100 * np.mean(entry["test"]["accuracy"]) for name, entry in table.items()}
    sent = {name: sum(entry["sent"]) for name, entry in table.items() if "sent" in entry}
    by_predictions = [name for name in sent if name == "FedMD" or name.startswith("co-")]
    if "FedAvg" not in sent or not by_predictions:
        return f"Central training: {accuracy['central']:.2f} % of the test images."
    told = [
        f"{name} {accuracy[name]:.2f} % with 1/{sent['FedAvg'] / sent[name]:.0f} of its bytes"
        for name in by_predictions
    ]
    return (
        f"FedAvg: {accuracy['FedAvg']:.2f} % of the test images; {'; '.join(told)}; all images in one place: "
        f"{accuracy['central']:.2f} %."
    )


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("federated", name, config, check)
    programs = make_programs(run)
    trained = [train_all(run, seed, programs) for seed in range(config.seeds)]
    found = run.record(test(run, trained))
    run.finish(found, draw(run, found["models"]), headline=headline(found["models"]), columns=COLUMNS)
    return 0


if __name__ == "__main__":
    run_main(main)

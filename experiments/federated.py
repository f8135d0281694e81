"""Compares ways for clients to learn together without sharing their examples: accuracy against the bytes they send.

The training images are divided among clients whose mixtures of classes differ (Dirichlet). Some images are set aside
as public: everybody has them, without their labels. In each round the clients train on their own images and send
parameters (FedAvg, FedDF) or predictions for the public images (FedMD, co-distillation). All methods have the same
clients, the same number of rounds and the same number of steps on private images. The bytes are those of the arrays
that are sent, up and down; those of the public images are reported apart. Where predictions are sent, the last
consensus teaches a network of the server, too. The curves are of validation images; the test set is used once, at the
end.

    python experiments/federated.py                        # mnist where it can be had, else digits
    python experiments/federated.py digits                 # a minute, no download
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from harness import pictures, traffic
from harness.clients import Clients, as_epoch, divide, make_programs
from harness.experiment import Run, adam, mnist_or_digits, plain
from harness.options import Amount, Count, Options, Positive, read
from harness.rounds import (
    Method,
    after_alone,
    begin_alone,
    by_parameters,
    by_predictions,
    by_widths,
    train_alone,
)
from harness.runs import run_main
from harness.traffic import Trained, differences, evaluate, headline

from distill_jax import data, models, train


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
    server_steps: Count = 1000
    """highest number of steps on public images by which FedDF's server learns in each round, and by which a network of
    the server learns the last consensus of predictions; the step with the fewest validation errors counts"""
    server_patience: Count = 150  # number of steps without fewer validation errors until it stops
    server_batch_size: Count = 128  # number of public images in such a step
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
        learning_rate=3e-3, server_batch_size=50, hidden=(64, 32), mixed=("mlp:64,32", "mlp:48", "mlp:32,32,32"),
        central_epochs=40,
    )),
    "mnist": ("MNIST; twenty minutes on a free core.", Config(dataset="mnist", validation=2000)),
    # Of 50, 200 and 400 steps at a rate of 1e-3, and 200 at 3e-4 and 3e-3, the best for FedAvg on the validation images
    # of one seed
    "tuned": ("MNIST, more rounds, and steps for which FedAvg was tuned; an hour on a free core.", Config(
        dataset="mnist", validation=2000, steps=200, rounds=60,
        methods=("FedAvg", "FedAvg-float16", "co-distilled-top-k"),
    )),
}  # fmt: skip
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
# Of each pair the report gives the difference, second minus first
PAIRS = (
    ("FedAvg", "FedDF"),
    ("FedAvg-different-initial-parameters", "FedAvg-different-initial-parameters-aligned"),
    ("unequal-widths-different-initial-parameters", "unequal-widths-different-initial-parameters-matched"),
    ("co-distilled", "co-distilled-top-k"),
    ("co-distilled-top-k", "co-distilled-top-k-mixed"),
    ("alone, distilled once", "co-distilled"),
)


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
            model = dict(done.state.model)
            if "teacher" in done.state.extra:
                consensus = np.asarray(done.state.extra["teacher"])
                model["server"] = clients.teach(clients.network(), consensus, config.rounds)
            up, down = (float(np.sum(done.history[way])) for way in ("bytes_up", "bytes_down"))
            found[name] = Trained(model, (up, down), done.history)
    if "alone" in found:
        for name, (server, up) in after_alone(clients, found["alone"].model["clients"][0]).items():
            found[name] = Trained({"server": server}, (up, 0), {})
    tx = adam(config.learning_rate, config.central_epochs, len(clients.private["label"]) // config.batch_size)
    epoch = train.make_epoch(train.make_train_step(train.supervised(), tx), transform=plain)
    start = train.init_state(clients.network(), tx, run.key(seed, 0))
    done = run.fit(
        "central", seed, start, epoch, clients.private, epochs=config.central_epochs, batch_size=config.batch_size,
        order=seed,
    )  # fmt: skip
    return found | {"central": Trained({"server": done.model}, None, {})}


def check(config: Config, dataset: data.Dataset) -> None:
    """Refuses options that do not fit the data, before anything is trained or written."""
    images, needed = len(dataset.train.id), config.clients * config.least
    config.need("clients", needed < images, f"be less than {images} training images / --least {config.least}")
    private, least = images - config.public, max(needed, config.batch_size)
    config.need("public", private >= least, f"leave {least} of {images} images to the clients")
    config.need(
        "server_batch_size", config.server_batch_size <= config.public, f"be at most --public {config.public}"
    )
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


def notes(run: Run, table: Mapping[str, Any]) -> list[str]:
    """Says what each method costs besides the bytes, and compares pairs of methods."""
    config, split = run.config, run.dataset.train
    steps, public = config.rounds * config.steps, config.clients * config.public * split.image[0].nbytes / 1e6
    return [
        f"Each client makes {steps:,} steps of {config.batch_size} private images. FedMD's clients make "
        f"{steps - config.steps:,} more on public images, and in co-distillation each batch has {config.batch_size} "
        f"public images besides. FedDF's server makes at most {config.server_steps:,} steps of "
        f"{config.server_batch_size} public images per round. Where predictions are sent, a network of the server "
        "learns the last consensus in as many; the clients do not get it. Both stop by validation errors.",
        f"The public images are not among the bytes: to deliver them to all clients takes {public:.3g} MB.",
        *differences(table, PAIRS),
    ]


def main() -> int:
    """Runs the experiment; returns the exit status."""
    name, config = read(CONFIGS, __doc__, mnist_or_digits)
    run = Run.start("federated", name, config, check)
    programs = make_programs(run)
    trained = [train_all(run, seed, programs) for seed in range(config.seeds)]
    found = run.record(evaluate(run, trained))
    table = found["models"]
    run.finish(
        found, draw(run, table), headline=headline(table), notes=notes(run, table), columns=traffic.COLUMNS
    )
    return 0


if __name__ == "__main__":
    run_main(main)

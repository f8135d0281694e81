"""Clients that keep their examples: those of one seed, their training, and a round of them as an epoch.

The rounds of the methods are in :mod:`harness.rounds`.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distill_jax import models, train
from distill_jax.compress import units
from distill_jax.train import federated, sweeps
from harness.experiment import Run, arrays, plain, prepare


class State(NamedTuple):
    """What is kept from round to round: a training state, so that ``train.fit`` trains it and keeps checkpoints."""

    step: jax.Array  # the number of rounds done
    key: jax.Array
    model: dict[str, Any]  # "server": a model, or "clients": stacked models, one stack per architecture
    extra: Any = ()  # the consensus and its weights; or the units that each client has


class RoundResult(NamedTuple):
    """What a round of a method made."""

    state: State
    bytes_up: float  # of all clients, also of those that were left out
    bytes_down: float
    kept: Sequence[int]  # the clients whose numbers were finite; the others were left out of the round


Groups = Sequence[tuple[Any, list[int]]]  # what clients have in common, and which they are


@dataclass
class Clients:
    """The clients of one seed, and what they can do."""

    run: Run
    seed: int
    programs: Mapping[str, Any]
    private: dict[str, np.ndarray]
    public: np.ndarray
    shards: list[np.ndarray]
    losses: list[float] = field(default_factory=list)  # of the clients in this round

    @classmethod
    def of(cls, run: Run, seed: int, programs: Mapping[str, Any]) -> "Clients":
        """Sets the public images aside, and divides the others."""
        examples = arrays(run.dataset.train)
        public, own, shards = divide(run.config, examples["label"], seed)
        private = {name: x[own] for name, x in examples.items()}
        return cls(run, seed, programs, private, examples["image"][public], shards)

    @property
    def sizes(self) -> list[int]:
        """The number of examples of each client."""
        return [len(rows) for rows in self.shards]

    @functools.cached_property
    def graph(self) -> units.UnitGraph:
        """The units of the widest network."""
        return units.trace(self.network(), prepare(self.public[:1]))

    def network(self, client: int | None = None, spec: str = "") -> models.Model:
        """Builds a network with the initial parameters of the server (None) or of a client."""
        number = self.run.config.clients if client is None else client
        key = jax.random.fold_in(jax.random.key(self.seed), number)
        shape, classes = self.run.dataset.image_shape, self.run.dataset.classes
        return models.build(spec or mlp(self.run.config.hidden), shape, classes, key)

    def train(
        self, state: State, clients: models.Model, members: Sequence[int], *, context: Any = None
    ) -> Any:
        """Trains the stacked clients of one architecture on their own images; in ``context`` is the consensus."""
        config, number = self.run.config, int(state.step)
        order = federated.client_order(
            self.shards, steps=config.steps, batch_size=config.batch_size, seed=self.seed, number=number
        )
        key = jax.random.fold_in(jax.random.fold_in(state.key, number), members[0])
        objective = "own" if context is None else "both"
        new, figures = self.programs[objective](clients, self.private, order[:, list(members)], key, context)
        self.losses.extend(figures["loss"].tolist())
        return new

    def learn(self, state: State, clients: models.Model, consensus: Any) -> models.Model:
        """Trains stacked clients on the consensus alone, as in FedMD."""
        config, count = self.run.config, len(jax.tree.leaves(clients)[0])
        order = federated.client_order(
            [np.arange(len(self.public))] * count, steps=config.steps, batch_size=config.batch_size,
            seed=1_000 + self.seed, number=int(state.step),
        )  # fmt: skip
        data = {"image": self.public, "teacher": consensus}
        return self.programs["scores"](clients, data, order, state.key)[0]

    def teach(self, model: models.Model, consensus: np.ndarray, number: int) -> models.Model:
        """Distils the consensus into a network of the server, and stops where validation does not improve.

        Returns:
          The network with the fewest validation errors: as it is after an epoch, or as it was given.
        """
        config, errors = self.run.config, self.run.validation(model)["validation_errors"]
        steps = len(self.public) // config.server_batch_size  # of an epoch
        patience = math.ceil(config.server_patience / steps)
        start = jax.tree.map(jnp.copy, model)  # training writes over its start
        done = train.fit(
            train.init_state(start, optimizer(config), jax.random.key(self.seed)), self.programs["server"],
            {"image": self.public, "teacher": consensus}, epochs=math.ceil(config.server_steps / steps),
            batch_size=config.server_batch_size, seed=1_000 * self.seed + number, validate=self.run.validation,
            stop=lambda history: np.argmin(history["validation_errors"]) < len(history["loss"]) - patience,
        )  # fmt: skip
        return done.best if min(done.history["validation_errors"]) < errors else model

    def predict(self, stacks: Sequence[models.Model], groups: Groups) -> np.ndarray:
        """Computes the logits of all clients, in their order, for the public images: ``[clients, images, classes]``."""
        outputs = [models.predict(sweeps.as_one(each), self.public, prepare=prepare) for each in stacks]
        stacked_order = np.concatenate([members for _, members in groups])
        return np.concatenate(outputs, 1).swapaxes(0, 1)[np.argsort(stacked_order)]


def divide(config: Any, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Draws the rows of the public and of the private images, and each client's rows among the private ones."""
    order = np.random.default_rng([7, seed]).permutation(len(labels))
    public, private = order[: config.public], order[config.public :]
    shards = federated.dirichlet_shards(
        labels[private], config.clients, config.concentration, seed=seed, least=config.least
    )
    return public, private, shards


def mlp(widths: Sequence[int], share: float = 1.0) -> str:
    """Names an MLP with a share of the widths."""
    return "mlp:" + ",".join(str(math.ceil(share * width)) for width in widths)


def in_turn(clients: int, choices: Sequence[Any]) -> Groups:
    """Gives each client one of the choices in turn: (choice, its clients), also where two choices are equal."""
    return [(choice, list(range(i, clients, len(choices)))) for i, choice in enumerate(choices[:clients])]


def as_epoch(
    clients: Clients, name: str, one_round: Callable[[Clients, State], RoundResult]
) -> Callable[..., Any]:
    """Makes an epoch of ``train.fit`` of a method's round; the data and the order that ``fit`` gives are not used.

    A client whose numbers are not finite ends the run, or is left out with a warning, as the options say.
    """

    def epoch(state, data, order, context=None):
        done = one_round(clients, state)
        missing = sorted(set(range(clients.run.config.clients)) - set(done.kept))
        if missing:
            told = (
                f"{name}, seed {clients.seed + 1}, round {int(state.step) + 1}: "
                f"{', '.join(f'client {i}' for i in missing)} sent NaN, infinite or too large numbers"
            )
            if clients.run.config.invalid == "refuse":
                raise ValueError(
                    f'{told}: go on without from the last checkpoint by --invalid "leave out", or take a lower '
                    "--learning-rate"
                )
            warnings.warn(f"{told}: left out of the round", stacklevel=2)
        # The others are losses of clients that were left out
        finite = [loss for loss in clients.losses if math.isfinite(loss)]
        clients.losses.clear()
        figures = {
            "loss": np.mean(finite) if finite else math.nan, "bytes_up": done.bytes_up, "bytes_down": done.bytes_down,
            "left_out": len(missing),
        }  # fmt: skip
        return done.state._replace(step=state.step + 1), {n: np.array([v]) for n, v in figures.items()}

    return epoch


def optimizer(config: Any) -> optax.GradientTransformation:
    """Makes the optimizer of clients and servers."""
    return optax.adam(config.learning_rate)


def make_programs(run: Run) -> dict[str, Any]:
    """Makes what is compiled once for all seeds and methods: the trainings, and the validation."""
    config = run.config
    tx = optimizer(config)
    together = train.make_validation(arrays(run.dataset.validation), prepare=prepare, stacked=True)

    def validate(model):
        if "server" in model:
            return run.validation(model["server"])
        each = [e for stack in model["clients"] for e in together(stack)["validation_errors"]]
        return {"validation_errors": float(np.mean(each))}

    def local(loss_fn, transform=plain):
        return federated.make_local_training(train.make_train_step(loss_fn, tx), tx, transform=transform)

    both = federated.with_public(config.batch_size, prepare=prepare)
    soft = train.distill(temperature=1.0, alpha=0.0)
    # FedMD's program: the mean absolute difference of logits
    scores = train.distill(temperature=None, alpha=0.0, soft=lambda s, t: jnp.abs(s - t).mean(-1))
    return {
        "validation": validate,
        "own": local(train.supervised()),
        "both": local(federated.co_distill(weight=config.weight), both),
        "scores": local(scores),
        "server": train.make_epoch(train.make_train_step(soft, tx), transform=plain),
    }

"""The candidates of compress_to_file: how they are made of an original, trained, finished, judged and measured."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optax
from harness import Run, adam, arrays, jittered, labelled, logs, plain, prepare

from distill_jax import export, metrics, models, teachers, train
from distill_jax._checks import BudgetError
from distill_jax.compress import low_rank, quantisation, search, units

if TYPE_CHECKING:
    from compress_to_file import Config

NUMBERS: dict[str, dict[str, Any] | None] = {  # how a network is rounded, if it is
    "float": None,
    "int8-weights": {"bits": 8},
    "int4-weights": {"bits": 4},
    "int8": {"bits": 8, "activations": True},
}
TRAINED = "-trained"  # the end of the name of numbers that are rounded in training
NUMBERS |= {f"{name}{TRAINED}": rounding for name, rounding in NUMBERS.items() if rounding}


class Tools:
    """What makes, trains, finishes and judges the candidates of one seed."""

    def __init__(self, config: Config, run: Run, seed: int, original: models.Model):
        self.config, self.run, self.seed, self.original = config, run, seed, original
        rows = np.random.default_rng(seed).permutation(len(run.dataset.train.label))[: config.examples]
        self.x = prepare(run.dataset.train.image[rows])
        self.made = functools.cache(self._make)  # made once, then used for all kinds of numbers
        self.first: dict[tuple[str, Any], search.Settings] = {}  # the first settings that gave each network
        # Made once, so that networks of the same shapes are compiled once
        self.recipe = functools.cache(self._recipe)
        self.data, self.context = arrays(run.dataset.train), original if config.jitter else None
        if not config.jitter:  # the original sees the same images in each epoch
            self.data["teacher"] = run.store_labels(seed, original)

    def make(self, original: models.Model, settings: search.Settings) -> models.Model | None:
        """Removes blocks and units, factorises kernels, and rounds numbers that are rounded in training."""
        model = self.made(settings.get("depth", 1.0), settings["width"], settings.get("rank", 1.0))
        if model is None:
            return None
        same = teachers.fingerprint((model.params, model.state)), settings["numbers"]
        first = self.first.setdefault(same, settings)
        if first != settings:  # widths become equal by --multiple, depths where they leave the same blocks
            names = [",".join(f"{key}={value}" for key, value in each.items()) for each in (settings, first)]
            logs.pulse.say(f"{names[0]} is left out: it is the same network as {names[1]}")
            return None
        rounding = NUMBERS[settings["numbers"]]
        if rounding and settings["numbers"].endswith(TRAINED):
            return quantisation.simulate(model, [self.x], **rounding)
        return model

    def _make(self, depth: float, width: float, rank: float) -> models.Model | None:
        model = self.original
        graph = units.trace(model, self.x[:1])
        if depth < 1:
            influence = units.block_influence(graph, model, [self.x], how="kl")
            try:
                gone = units.prune_blocks(graph, influence, depth)
            except BudgetError:
                return None  # too few blocks
            model = units.drop_blocks(graph, model, gone)
            graph = units.trace(model, self.x[:1])
        exact = {name for name, group in graph.groups.items() if group.free and group.exact_shrunk}
        scores = {name: each for name, each in units.scores.l2(graph, model).items() if name in exact}
        try:
            kept = units.prune(graph, scores, width, across="group", multiple=self.config.multiple)
        except BudgetError:
            return None  # even with one such multiple per layer there are more units
        model = units.keep(graph, model, kept)
        if rank == 1:
            return model
        kernels, roots = low_rank.kernels(model, self.x), low_rank.layer_roots(model, self.x)
        try:
            ranks = low_rank.allocate(model, kernels, rank, of="flops", roots=roots)
        except BudgetError:
            return None  # even products of rank 1 have more
        return low_rank.factorise(model, kernels, ranks, roots=roots)

    def _recipe(self, epochs: int) -> tuple[optax.GradientTransformation, Any]:
        """Makes the optimizer and the epoch of a training on the labels of the data and of the original."""
        config = self.config
        tx = adam(config.learning_rate, epochs, len(self.data["label"]) // config.batch_size)
        step = train.make_train_step(train.distill(temperature=config.temperature, alpha=config.alpha), tx)
        return tx, train.make_epoch(
            step, transform=labelled(jittered(config.jitter)) if config.jitter else plain
        )

    def tune(self, model: models.Model, settings: search.Settings, epochs: int) -> models.Model:
        """Trains for so many epochs; what is trained already, with other numbers, is taken from the run."""
        run = self.run
        start = teachers.fingerprint((model.params, model.state))[:8]
        name = (
            " ".join(f"{k} {v}" for k, v in settings.items() if k != "numbers")
            + f", {epochs} epochs from {start}"
        )
        tx, epoch = self.recipe(epochs)
        order = 20_000 + self.seed
        done = run.fit(
            name, self.seed, train.init_state(model, tx, run.key(self.seed, order)), epoch, self.data, epochs=epochs,
            batch_size=self.config.batch_size, order=order, context=self.context,
        )  # fmt: skip
        return done.model

    def finish(self, model: models.Model, settings: search.Settings) -> models.Model:
        """Turns weights, and perhaps activations, into integers, if these are asked for."""
        rounding = NUMBERS[settings["numbers"]]
        if rounding is None:
            return model
        if settings["numbers"].endswith(TRAINED):
            return quantisation.freeze(model)
        return quantisation.quantise(model, [self.x], **rounding)

    def accuracy(self, model: models.Model) -> float:
        """Computes the accuracy on the validation images."""
        label = self.run.dataset.validation.label
        return metrics.figures(self.run.judge(model).validation_logits, label)["accuracy"]

    def latency(self, path: Path) -> dict[str, Any]:
        """Measures a file in a fresh process."""
        config = self.config
        return export.latency(path, self.x[: config.batch], threads=config.threads, seconds=config.seconds)


def settings_of(config: Config) -> list[dict[str, Any]]:
    """Lists the candidates."""
    axes = {"depth": config.depths, "width": config.widths, "rank": config.ranks, "numbers": config.numbers}
    chosen = {
        name: values for name, values in axes.items() if name not in ("depth", "rank") or values != (1.0,)
    }
    return [dict(zip(chosen, values, strict=True)) for values in itertools.product(*chosen.values())]

"""The ways in which a student of inject_mnist.py starts: at random, from selected, or from merged units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import prepare
from harness.networks import build

from distill_jax import data, models
from distill_jax.compress import units

if TYPE_CHECKING:
    from inject_mnist import Config

STARTS = RANDOM, SHUFFLED, UNIFORM, SCORED, MERGED = "random", "shuffled", "uniform", "by score", "merged"
SELECTED = (UNIFORM, SCORED)


class Start(NamedTuple):
    """One way to start: one of STARTS, the score that selected the units, and the power of the scale."""

    start: str
    score: str = ""
    scale: float = 0.0

    def __str__(self) -> str:
        power = f", p = {self.scale:g}" if self.start in (*SELECTED, SHUFFLED) else ""
        return self.start + (f", {self.score}" if self.score else "") + power


def all_starts(config: Config) -> list[Start]:
    """Lists all starts that are tried."""
    scaled = [Start(kind, "", p) for kind in (SHUFFLED, UNIFORM) for p in config.scales]
    scored = [Start(SCORED, score, p) for score in config.scores for p in config.scales]
    return [Start(RANDOM), *scaled, *scored, Start(MERGED)]


def begin(
    config: Config, dataset: data.Dataset, teacher: models.Model, seed: int
) -> dict[Start, models.Model]:
    """Makes the students of one seed before their first step."""
    rows = np.random.default_rng([2, seed]).permutation(len(dataset.train.label))
    x = prepare(dataset.train.image[rows[: config.examples]])
    student = build(config, dataset, "student", seed)
    large, small = units.trace(teacher, x), units.trace(student, x)

    def cut(model: models.Model, kept: Any) -> models.Model:
        return units.inject(student, units.keep(large, model, kept)).model

    def by_score(name: str) -> models.Model:
        inputs = (x,) if name in ("mean_activation", "apoz") else ()
        scores = getattr(units.scores, name)(large, teacher, *inputs)
        return cut(teacher, units.select(large, small, how=scores))

    def scaled(model: models.Model, power: float) -> models.Model:
        """Scales the kernels, whose inputs are on the last axis but one."""

        def scale(own, theirs):
            return own if own.ndim < 2 else own * (theirs.shape[-2] / own.shape[-2]) ** power

        return model.replace(params=jax.tree.map(scale, model.params, teacher.params))

    uniform = units.select(large, small)
    values = units.activations(large, teacher, x)
    likeness = {name: values[name].T for name in uniform}
    sizes = {name: len(kept) for name, kept in uniform.items()}
    selected, places = cut(teacher, uniform), np.random.default_rng([3, seed])

    def shuffled(values: jax.Array) -> jax.Array:
        return jnp.asarray(places.permutation(np.ravel(values)).reshape(values.shape))

    made = {
        (RANDOM, ""): student,
        (SHUFFLED, ""): jax.tree.map(shuffled, selected),
        (UNIFORM, ""): selected,
        (MERGED, ""): cut(*units.merge(large, teacher, sizes, likeness=likeness)),
        **{(SCORED, name): by_score(name) for name in config.scores},
    }
    return {start: scaled(made[start.start, start.score], start.scale) for start in all_starts(config)}

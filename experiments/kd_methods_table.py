"""The methods that kd_methods.py compares: the loss of each, its weight, and the layers that it compares."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax

from distill_jax import features, losses, models
from distill_jax.features import Learned

OUTPUTS = "outputs"  # the name of a model's logits among its layers


def on_logits(loss: Callable[..., jax.Array], *, labelled: bool = False) -> Callable[[], Learned]:
    """Gives a loss between logits the form of a loss between layers, so that one objective serves all methods."""

    def apply(params, student, teacher, *, labels=None, where=None, key=None):
        where = None if where is None else where[:, None]
        return loss(student[0], teacher[0], *([labels] if labelled else []), where=where)

    return lambda: Learned(lambda key, student_shapes, teacher_shapes: {}, apply)


def standardised_kl(student: jax.Array, teacher: jax.Array, where: Any) -> jax.Array:
    """Computes the KL divergence between standardised logits."""
    student, teacher = (losses.standardise(x, where=where) for x in (student, teacher))
    return losses.kl(student, teacher, temperature=2.0, where=where)


kl = functools.partial(losses.kl, temperature=4.0)  # the temperature of RepDistiller
attention = functools.partial(losses.attention_transfer, mean=True)


class Method(NamedTuple):
    """A method: the loss is hard·(cross-entropy with the labels) + weight·(part between layers).

    Attributes:
      hard: the weight of the labels.
      weight: the weight of the part.
      part: makes the part, a loss between layers of student and teacher.
      layers: which layers it compares: ``maps``, the last feature map of each resolution; ``map``, the last one of
        all; ``vector``, the embedding before the classifier; ``logits``.
    """

    hard: float
    weight: float
    part: Callable[[], Learned]
    layers: Literal["maps", "map", "vector", "logits"]


# The weights are those of the papers or of RepDistiller, whose PKT is ours times the batch size, 64. For CC, which
# is another loss there, and for methods that it does not have, the weights are 1, or bring the loss to the size of
# KD's. They are not tuned.
METHODS: dict[str, Method] = {
    "kd": Method(0.1, 0.9, on_logits(kl), "logits"),
    "lskd": Method(0.1, 9.0, on_logits(standardised_kl), "logits"),
    "dkd": Method(1.0, 1.0, on_logits(losses.dkd, labelled=True), "logits"),
    "nkd": Method(1.0, 1.0, on_logits(losses.nkd, labelled=True), "logits"),
    "wsld": Method(1.0, 2.5, on_logits(losses.wsld, labelled=True), "logits"),
    "dist": Method(1.0, 32.0, on_logits(functools.partial(losses.dist, temperature=4.0)), "logits"),
    "ranking": Method(1.0, 1.0, on_logits(losses.ranking_logistic), "logits"),
    "jensen_shannon": Method(0.1, 4.0, on_logits(losses.jensen_shannon), "logits"),
    "total_variation": Method(0.1, 0.9, on_logits(losses.total_variation), "logits"),
    "fitnet": Method(1.0, 100.0, lambda: features.project(losses.hint), "map"),
    "at": Method(1.0, 1000.0, lambda: features.project_maps(attention), "maps"),
    "nst": Method(1.0, 50.0, lambda: features.project_maps(losses.nst), "maps"),
    "vid": Method(1.0, 1.0, lambda: features.vid(mean=True), "maps"),
    "ft": Method(1.0, 200.0, lambda: features.factor_transfer(mean=True), "map"),
    "review": Method(1.0, 1.0, features.review_kd, "maps"),
    "cka": Method(1.0, 1.0, lambda: features.relation(losses.cka), "vector"),
    "sp": Method(1.0, 3000.0, lambda: features.relation(losses.similarity_preserving), "map"),
    "rkd": Method(1.0, 1.0, lambda: features.rkd(distance=25.0, angle=50.0), "vector"),
    "pkt": Method(1.0, 30000.0 / 64, lambda: features.relation(losses.pkt, pool=True), "vector"),
    "cc": Method(1.0, 1.0, features.correlation_congruence, "vector"),
    "ickd": Method(1.0, 1.0, features.ickd, "map"),
    "info_nce": Method(1.0, 0.8, features.info_nce, "vector"),
}


class Layers(NamedTuple):
    """The layers that are compared.

    Attributes:
      pairs: for each kind of ``Method.layers``, the pairs (student's layer, teacher's layer).
      shapes: name → shape of the layers of the student, and of the teacher.
      teacher: the names of the teacher's layers that some method needs.
    """

    pairs: Mapping[str, list[tuple[str, str]]]
    shapes: tuple[Mapping[str, Any], Mapping[str, Any]]
    teacher: list[str]


def choose_layers(student: models.Model, teacher: models.Model, image: Any) -> Layers:
    """Pairs the layers of two models, and prints how."""
    shapes = [features.layer_shapes(model, image) for model in (student, teacher)]
    pairing = features.match_layers(*shapes)
    print(f"\nPairs of layers:\n{pairing}\n")
    maps = [pair for pair in pairing if len(shapes[0][pair[0]].shape) > 2] or list(pairing)
    vectors = [pair for pair in pairing if len(shapes[0][pair[0]].shape) == 2] or maps
    pairs = {"maps": maps, "map": maps[-1:], "vector": vectors[-1:], "logits": [(OUTPUTS, OUTPUTS)]}
    logits = [{OUTPUTS: jax.eval_shape(model, image)} for model in (student, teacher)]
    names = sorted({name for _, name in maps + vectors})
    return Layers(pairs, (shapes[0] | logits[0], shapes[1] | logits[1]), names)

"""Small sentence encoders before they are trained: see kd_embeddings.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import sentences

from distill_jax import models
from distill_jax.compress import units

if TYPE_CHECKING:
    from kd_embeddings import Config

Inputs = dict[str, np.ndarray]


def weighted_mean(params: Any, x: Mapping[str, jax.Array]) -> jax.Array:
    """Computes embeddings of length 1: a linear map of the weighted mean of the vectors of tokens."""
    weights = jnp.exp(params["log_weights"])[x["tokens"]] * (x["segments"] != 0)
    mean = jnp.einsum("bt,btd->bd", weights, params["vectors"][x["tokens"]]) / weights.sum(-1, keepdims=True)
    y = mean @ params["kernel"] + params["bias"]
    return y / jnp.sqrt(jnp.maximum(jnp.square(y).sum(-1, keepdims=True), 1e-24))


def make_static(
    config: Config, teacher: models.Model, tokenizer: sentences.Tokenizer, rows: sentences.Sentences
) -> models.Model:
    """Makes the static student as Model2Vec: vectors of single tokens, on the principal axes."""
    frame = tokenizer(["a"])
    count, vocabulary = int(frame["segments"].sum()), len(teacher.params["embedding"])
    tokens = np.tile(frame["tokens"][:, :count], (vocabulary, 1))
    tokens[:, count // 2] = np.arange(vocabulary)
    alone = models.predict(teacher, {"tokens": tokens, "segments": np.ones_like(tokens)}, batch_size=1024)
    centred = alone - alone.mean(0)
    axes = np.linalg.svd(centred.T @ centred)[0][:, : config.axes]
    share, _ = sentences.frequencies(rows, vocabulary)
    weights = np.log(config.rare / (config.rare + share))  # SIF (Arora et al., 2017)
    params = {
        "vectors": centred @ axes, "log_weights": weights, "kernel": axes.T, "bias": np.zeros(alone.shape[1]),
    }  # fmt: skip
    return models.from_function(weighted_mean, jax.tree.map(jnp.float32, params))


def make_transformer(config: Config, teacher: models.Model, rows: sentences.Sentences) -> models.Model:
    """Makes the transformer: some of the teacher's layers, pruned to a share of its FLOPs."""
    some = {name: values[:64] for name, values in rows.image().items()}
    layers = teacher.params["layers"]
    layers = [layers[i] for i in config.layers or range(len(layers))]
    student = teacher.replace(params={**teacher.params, "layers": layers})
    graph = units.trace(student, some)
    budget = config.budget * units.costs.flops(units.trace(teacher, some), {})
    batches = calibration(config, rows)
    student, scores = units.rotate_heads(graph, student, batches)
    solved = [name for name in graph.groups if name.endswith(("value.kernel", "up.kernel"))]
    scores |= units.scores.reconstruction(graph, student, batches, groups=solved)

    def similarities(model: models.Model) -> np.ndarray:
        embeddings = np.concatenate([models.predict(model, x, batch_size=256) for x in batches])
        return embeddings @ embeddings.T

    truth = similarities(teacher)
    scores = units.scores.measured(
        graph, student, scores, lambda model: 1 - sentences.rank_correlation(similarities(model), truth),
        of=units.costs.flops, batches=batches,
    )  # fmt: skip
    kept = units.prune(graph, scores, budget, of=units.costs.flops)
    small = units.keep(graph, units.compensate(graph, student, kept, batches).model, kept)
    for i, layer in enumerate(small.params["layers"]):
        sizes = [layer["attention"][part]["kernel"].shape[2] for part in ("query", "value")]
        hidden = layer["feed_forward"]["up"]["kernel"].shape[1]
        print(
            f"Layer {i}: {hidden} feed-forward units; queries and keys of {sizes[0]} dimensions, values of {sizes[1]}."
        )
    return small


def calibration(config: Config, rows: sentences.Sentences) -> list[Inputs]:
    """Takes sentences of the eight commonest lengths, a batch of each: padding would count in least squares."""
    lengths = (rows.segments != 0).sum(1)
    found, counts = np.unique(lengths, return_counts=True)
    batches = []
    for length in found[np.argsort(-counts, kind="stable")[:8]]:
        at = np.flatnonzero(lengths == length)
        most = min(len(at), -(-config.calibration // 8))
        at = at[np.arange(most) * len(at) // most]  # spread over all texts
        batches.append({name: values[at, :length] for name, values in rows.image().items()})
    return batches

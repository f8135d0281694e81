"""Turns the heads of attention onto principal axes, so that the dimensions of heads can be pruned."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax._model import Model, PyTree, check_model
from distill_jax.compress._products import check_batches, probe, replaced, rows_of, stacked
from distill_jax.compress.units.editing import float_leaves
from distill_jax.compress.units.graph import UnitGraph, check_graph
from distill_jax.compress.units.scoring import Scores


class Rotated(NamedTuple):
    """What :func:`rotate_heads` returns.

    Attributes:
      model: the model with rotated heads; it computes what the given one computes, up to rounding.
      scores: for the groups of dimensions of queries and keys, and of values, float64 ``[size]``: what a dimension
        adds, in the mean square, to the scores of attention, or to its outputs, summed over heads.
    """

    model: Model
    scores: Scores


def rotate_heads(graph: UnitGraph, model: Model, batches: Sequence[PyTree]) -> Rotated:
    """Rotates queries with keys, and values with outputs, so that a head's last dimensions matter least.

    A head sees its queries and keys in their products alone: for any invertible R, the queries q·R and the keys k·R⁻ᵀ
    have the same products. The same is true of values v·R and the kernel R⁻¹·W of the outputs. Of all R, this function
    takes the one whose first d dimensions are the best ones, for each d: those with which the mean square of the error
    is least, of the products (queries and keys taken as independent) or of the head's outputs. So a head of 32
    dimensions can become one of 16 that does nearly the same, where a network with half of its heads does not. Prune
    the groups of dimensions by the scores, all heads of a layer alike. Where several heads of queries share values, the
    dimensions of the values are good ones, but not always the best: one R must serve the outputs of all these heads.

    Rotated are the parts of the parameters, at any depth, that hold ``query``, ``key``, ``value``, and ``output`` or
    ``out``, each with a ``kernel`` (``[width, heads, size]``, and ``[heads, size, width]`` of the outputs) and perhaps
    a ``bias``: the attention of this library and of Flax. Several heads of queries may share one of keys and values.

    Args:
      graph: the network's units, from :func:`distill_jax.compress.units.trace`.
      model: the model, of the traced structure and shapes.
      batches: inputs, batch by batch. Padding counts as well, so leave it out.

    Returns:
      The model with rotated heads, and the scores of the dimensions.

    Raises:
      ValueError: if there is no attention, or the network does more with queries and keys than to multiply them
        (rotary positions, norms), by its program or by its outputs; if the model is not the traced one, or a layer's
        inputs are not finite.

    References:
      Ashkboos et al., `SliceGPT: Compress Large Language Models by Deleting Rows and Columns`, 2024
      (arXiv 2401.15024), rotate the residual stream so. Of heads: the best approximation of a product of two matrices
      by one of lower rank, under the norm of the inputs.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> config = models.EncoderConfig(vocabulary=50, width=8, layers=1, heads=2, hidden=16, max_length=4)
    >>> model = models.build_encoder(config, jax.random.key(0))
    >>> x = {"tokens": jnp.arange(12).reshape(3, 4), "segments": jnp.ones((3, 4), int)}
    >>> graph = units.trace(model, x)
    >>> rotated = units.rotate_heads(graph, model, [x])
    >>> [(name, len(scores)) for name, scores in rotated.scores.items()]
    [('layers.0.attention.query.kernel#1', 4), ('layers.0.attention.value.kernel', 4)]
    """
    check_graph(graph)
    check_model("model", model)
    check_batches(batches)
    leaves = float_leaves(graph, model)
    attentions = list(_attentions(leaves))
    if not attentions:
        raise ValueError(
            "model: no part of its parameters is attention: none holds query, key, value and output kernels of three "
            "axes"
        )
    summed = {path: kernel.summed for path, kernel in probe(model, batches[0]).kernels.items()}
    triangles: dict[str, np.ndarray] = {}
    wanted = {path for each in attentions for path in (each.query, each.key, each.output)}
    for x in batches:
        rows = rows_of(model, x)
        for path in wanted:
            if path not in rows:
                raise ValueError(
                    f"model: {path} is reshaped before it multiplies, or is used in other ways, so its heads cannot be "
                    "rotated"
                )
            ones = np.ones((len(rows[path]), 1))
            triangles[path] = stacked(triangles.get(path), np.concatenate([ones, rows[path]], 1))
    groups = {(s.path, s.axis): name for name, group in graph.groups.items() for s in group.slices}
    new, scores = dict[str, np.ndarray](), Scores()
    for each in attentions:
        turned, (of_keys, of_values) = each.rotated(leaves, triangles, summed)
        new |= turned
        for path, energies in ((each.query, of_keys), (each.value, of_values)):
            name = groups.get((path, 2), "")
            if not name or len(energies) != graph.groups[name].size:
                raise ValueError(
                    f"model: the dimensions of the heads of {path} are no group of their own: rotary positions, or "
                    "values that are split again, do not allow that heads are rotated and cut"
                )
            scores[name] = energies

    def with_kernels(new: Mapping[str, np.ndarray]) -> Model:
        params, state = replaced((model.params, model.state), tuple(graph.names), new)
        return model.replace(params=params, state=state)

    turned_in_step: dict[str, np.ndarray] = {}
    for each in attentions:
        for one, other in ((each.query, each.key), (each.output, each.value)):
            pair = {path: new[path] for path in (one, other, _bias(one), _bias(other)) if path in new}
            _check_same(model, with_kernels(pair), with_kernels({one: new[one]}), batches, each.query)
            turned_in_step |= pair
    return Rotated(with_kernels(turned_in_step), scores)


def _check_same(model: Model, rotated: Model, alone: Model, batches: Sequence[PyTree], path: str) -> None:
    """Raises ``ValueError`` if outputs change, beside what they do when one of two kernels is rotated alone.

    Parameters are compared in float32 at least, on the batch with the most numbers.
    """
    x = max(batches, key=lambda x: sum(np.size(leaf) for leaf in jax.tree.leaves(x)))

    def wide(leaf: Any) -> Any:
        dtype = jnp.result_type(leaf)
        return jnp.asarray(leaf, jnp.float32) if dtype in (jnp.bfloat16, jnp.float16) else leaf

    found = []
    for each in (model, rotated, alone):
        outputs = jax.tree.leaves(each.replace(params=jax.tree.map(wide, each.params))(x))
        found.append(np.concatenate([np.ravel(np.asarray(y, np.float64)) for y in outputs]))
    before, after, wrong = found
    eps = max(float(jnp.finfo(jnp.result_type(y)).eps) for y in outputs)
    rounding = max(1e-5, 4 * eps) * np.abs(before).max(initial=0)
    if not np.abs(after - before).max(initial=0) <= 0.02 * np.abs(wrong - before).max(initial=0) + rounding:
        raise ValueError(
            f"model: its outputs change when the heads of {path.removesuffix('.query.kernel')} are rotated, so it does "
            "more with queries and keys than to multiply them: rotary positions and norms of queries do not allow it"
        )


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The paths of the kernels of an attention, and of the biases that are there."""

    query: str
    key: str
    value: str
    output: str

    def rotated(
        self,
        leaves: Mapping[str, np.ndarray],
        triangles: Mapping[str, np.ndarray],
        summed: Mapping[str, tuple[int, ...]],
    ) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Computes the new kernels and biases, and the scores of the dimensions of keys and of values."""
        query, key, value = (_with_bias(leaves, path) for path in (self.query, self.key, self.value))
        output = np.asarray(leaves[self.output], np.float64)
        query, key, value, output = query.copy(), key.copy(), value.copy(), output.copy()
        heads, size = key.shape[1:]
        shared = query.shape[1] // heads  # this many heads of queries have the same keys
        counts = {path: triangle[0, 0] ** 2 for path, triangle in triangles.items()}
        mixed = triangles[self.output] / np.sqrt(counts[self.output])
        # A bias makes up for the mean of the values. Scores of attention do not change with the mean of the keys.
        mixed = mixed[int(_bias(self.output) in leaves) :, 1:]
        axes = summed[self.output]  # in which order the products are summed over heads and their dimensions
        mixed = mixed.reshape(-1, *(output.shape[axis] for axis in axes)).transpose(
            0, *(1 + np.argsort(axes))
        )
        keys = triangles[self.key][1:, 1:] / np.sqrt(counts[self.key])
        queries = triangles[self.query] / np.sqrt(counts[self.query])
        energies = np.zeros(size), np.zeros(value.shape[2])
        for head in range(heads):
            own = slice(head * shared, (head + 1) * shared)
            asked = np.einsum("ni,ihd->nhd", queries, query[:, own]).reshape(-1, size)
            turn, back, energy = _principal(asked, (keys @ key[1:, head]).T)
            turn, back = _balanced(turn, back, query[:, own].reshape(-1, size), key[:, head].T)
            query[:, own], key[:, head] = query[:, own] @ turn, key[:, head] @ back.T
            energies[0][:] += energy
            weights = output[own].transpose(1, 0, 2).reshape(value.shape[2], -1)
            turn, back, _ = _principal(mixed[:, own].reshape(-1, value.shape[2]), weights)
            turn, back = _balanced(turn, back, value[:, head], weights)
            value[:, head] = value[:, head] @ turn
            output[own] = np.einsum("de,hew->hdw", back, output[own])
            energies[1][:] += _losses(mixed[:, own] @ turn, output[own])
        new = {self.query: query[1:], self.key: key[1:], self.value: value[1:], self.output: output}
        for path, array in ((self.query, query), (self.key, key), (self.value, value)):
            if (bias := _bias(path)) in leaves:
                new[bias] = array[0]
        return new, energies


def _principal(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds R and R⁻¹ such that, for each d, the first d columns of rows·R are best for rows·weights.

    Returns:
      R, its inverse, and the mean squares that the columns add to the products.
    """
    size = rows.shape[1]
    scale = np.sqrt(np.sum(rows**2) / size) or 1.0
    # A little of the identity, or a direction that no row has would have no inverse
    triangle = np.linalg.qr(np.concatenate([rows, 1e-6 * scale * np.eye(size)]), mode="r")
    left, values, _ = np.linalg.svd(triangle @ weights, full_matrices=True)
    energies = np.zeros(size)
    energies[: len(values)] = values**2
    return np.linalg.solve(triangle, left), left.T @ triangle, energies


def _losses(mixed: np.ndarray, output: np.ndarray) -> np.ndarray:
    """Computes by how much the squared error of the outputs rises when each dimension goes, after those behind it.

    Args:
      mixed: ``[n, heads, size]``, the values of heads that share their dimensions.
      output: ``[heads, size, width]``.
    """
    size = mixed.shape[2]
    errors = [np.sum(np.einsum("nhd,hdw->nhw", mixed[:, :, d:], output[:, d:]) ** 2) for d in range(size + 1)]
    return np.maximum(-np.diff(errors), 0)


def _balanced(
    turn: np.ndarray, back: np.ndarray, before: np.ndarray, after: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Scales each new dimension so that it is as long in both kernels, or training would move one of them alone."""
    first, second = np.linalg.norm(before @ turn, axis=0), np.linalg.norm(back @ after, axis=1)
    least = 1e-12 * max(first.max(), second.max(), 1e-300)
    scale = np.sqrt(np.maximum(second, least) / np.maximum(first, least))
    return turn * scale, back / scale[:, None]


def _bias(path: str) -> str:
    return path.removesuffix("kernel") + "bias"


def _with_bias(leaves: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    """Puts the bias, or zeros, before the rows of a kernel: ``[1 + width, heads, size]``."""
    kernel = np.asarray(leaves[path], np.float64)
    bias = leaves.get(_bias(path), np.zeros(kernel.shape[1:]))
    return np.concatenate([np.asarray(bias, np.float64)[None], kernel])


def _attentions(leaves: Mapping[str, Any]) -> Iterator[_Attention]:
    """Finds the parts that hold queries, keys, values and outputs, with kernels of three axes."""
    for path in leaves:
        prefix = path.removesuffix("query.kernel")
        if prefix == path:
            continue
        output = "output" if f"{prefix}output.kernel" in leaves else "out"
        names = [f"{prefix}{part}.kernel" for part in ("query", "key", "value", output)]
        shapes = [np.shape(leaves.get(name, ())) for name in names]
        if all(len(shape) == 3 for shape in shapes):
            query, key, value, out = shapes
            fits = query[2] == key[2] and key[1] == value[1] and query[1] % key[1] == 0
            if fits and out[:2] == (query[1], value[2]):
                yield _Attention(*names)

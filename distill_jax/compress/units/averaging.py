"""Averages networks of unequal widths, whose units are those of a wider network."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distill_jax import weights
from distill_jax._checks import check_sequence
from distill_jax._model import Model, check_model
from distill_jax.compress.units.alignment import match_weights
from distill_jax.compress.units.editing import map_leaves
from distill_jax.compress.units.graph import UnitGraph
from distill_jax.compress.units.injection import leaves_by_name
from distill_jax.compress.units.masks import Kept, position_masks, shapes_of
from distill_jax.compress.units.permutation import permute
from distill_jax.compress.units.removal import keep


def put_back(graph: UnitGraph, small: Model, kept: Kept, model: Model) -> Model:
    """Writes the arrays of a smaller network into a wider one, in the places of its units: the reverse of ``keep``.

    Args:
      graph: the units of the wider network, from :func:`distill_jax.compress.units.trace`.
      small: the smaller network, of the shapes of ``keep(graph, model, kept)``.
      kept: for each group, the wider network's units that the smaller one has, in rising order. It has all units of
        groups that are not named.
      model: the wider network.

    Returns:
      The wider network with these arrays; its other units stay.

    Raises:
      ValueError: if ``kept`` is not valid, or an array has another shape than the kept units make.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.zeros((1, 3)), "b": jnp.zeros((3, 1))}
    >>> model = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(model, jnp.ones((1, 1)))
    >>> small = model.replace(params={"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))})
    >>> units.put_back(graph, small, {"a": [0, 2]}, model).params["a"]
    Array([[1., 0., 1.]], dtype=float32)
    """
    check_model("small", small)
    check_model("model", model)
    masks, given = position_masks(graph, kept), leaves_by_name(small)
    for name, like in shapes_of(graph, kept).items():
        if np.shape(given.get(name, np.nan)) != like.shape:
            got = f"shape {np.shape(given[name])}" if name in given else "none"
            raise ValueError(
                f"small: {name} must have shape {like.shape}, as the kept units make it, got {got}"
            )

    def edit(leaf: Any, name: str) -> Any:
        axes = masks.get(name, {})
        places = [np.flatnonzero(axes.get(axis, np.ones(n, bool))) for axis, n in enumerate(np.shape(leaf))]
        return jnp.asarray(leaf).at[np.ix_(*places)].set(given[name]) if places else given[name]

    return map_leaves(graph, edit, model)


class Matched(NamedTuple):
    """What :func:`match_widths` returns.

    Attributes:
      model: the smaller network with its units in the order of ``kept``; it computes the same.
      kept: group → the wider network's units that stand for those of the smaller one, in rising order.
    """

    model: Model
    kept: dict[str, np.ndarray]


def match_widths(graph: UnitGraph, small: Model, kept: Kept, reference: Model, *, seed: int = 0) -> Matched:
    """Finds for each unit of a network the unit of a wider one that is most like it.

    The smaller network is filled up with units whose weights are 0, and these are matched to the wider network's by
    :func:`match_weights`.

    Args:
      graph: the units of the wider network, from :func:`distill_jax.compress.units.trace`.
      small: the smaller network.
      kept: any units of the wider network, as many in each group as the smaller one has, in rising order.
      reference: the wider network.
      seed: the seed of the random order in which groups are visited.

    Returns:
      The smaller network in another order of its units, and the units of the wider one that they are matched to.

    Raises:
      ValueError: in the cases of :func:`put_back` and :func:`match_weights`.

    >>> from distill_jax import models
    >>> from distill_jax.compress import units
    >>> params = {"a": jnp.array([[1.0, 2.0, 3.0]]), "b": jnp.eye(3)}
    >>> wide = models.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    >>> graph = units.trace(wide, jnp.ones((1, 1)))
    >>> small = wide.replace(params={"a": jnp.array([[3.0, 1.0]]), "b": jnp.eye(3)[jnp.array([2, 0])]})
    >>> units.match_widths(graph, small, {"a": [0, 1]}, wide).kept
    {'a': array([0, 2])}
    """
    check_model("reference", reference)
    empty = jax.tree.map(jnp.zeros_like, reference)
    filled = put_back(graph, small, kept, empty)
    orders = match_weights(graph, filled, reference, seed=seed)
    places = {
        name: np.flatnonzero(np.isin(orders[name], units)) if name in orders else np.asarray(units)
        for name, units in kept.items()
    }
    moved = keep(graph, permute(graph, filled, orders), places)
    return Matched(small.replace(params=moved.params, state=moved.state), places)


def average_widths(
    graph: UnitGraph,
    model: Model,
    clients: Sequence[Model],
    kept: Sequence[Kept],
    sizes: ArrayLike | Sequence[float],
) -> Model:
    """Averages networks of unequal widths: each number over those networks that have it, Σ n_k·θ_k / Σ n_k.

    Args:
      graph: the units of the widest network, from :func:`distill_jax.compress.units.trace`.
      model: the widest network; it keeps its own numbers where nobody else has one.
      clients: the networks to average, each of the shapes of ``keep(graph, model, kept[k])``.
      kept: for each of them, the units of the widest network that it has. In HeteroFL these are the first of each
        group; :func:`match_widths` finds those that are most alike.
      sizes: n_k > 0, such as the numbers of examples.

    Returns:
      The widest network with the averages.

    Raises:
      ValueError: in the cases of :func:`put_back` and :func:`distill_jax.weights.mean`, or if there are not as many
        ``kept`` as clients.

    References:
      Diao, Ding, Tarokh, `HeteroFL: Computation and Communication Efficient Federated Learning for Heterogeneous
      Clients`, 2021 (arXiv 2010.01264). There each client that has a number counts alike, narrow networks divide their
      activations by their share of the units (the scaler), and the loss is masked to a client's own classes. None of
      these is done here.
    """
    check_sequence("clients", clients, "models")
    check_sequence("kept", kept, "dicts, group → units")
    if not len(clients):
        raise ValueError("clients must be at least one model, got none")
    if len(kept) != len(clients):
        raise ValueError(f"kept must have one entry per client, {len(clients)}, got {len(kept)}")
    nothing = jax.tree.map(jnp.zeros_like, model)
    whole, marks = [], []
    for i, (client, units) in enumerate(zip(clients, kept, strict=True)):
        try:
            whole.append(put_back(graph, client, units, model))
        except ValueError as error:
            raise ValueError(f"client {i}: {error}") from None
        marks.append(put_back(graph, jax.tree.map(jnp.ones_like, client), units, nothing))
    return weights.fisher_mean(whole, marks, sizes)

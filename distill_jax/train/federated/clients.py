"""What clients do by themselves: their shards of the examples, and their training in a round."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax._checks import (
    check_count,
    check_function,
    check_integers,
    check_positive,
    check_sequence,
    check_tx,
    need,
)
from distill_jax._model import Model, PyTree, check_model, identity
from distill_jax.train import sweeps
from distill_jax.train.objectives import Schedule, at, check_options, check_weight, error_rate, soft_mean
from distill_jax.train.step import LossFn, Step, init_state, weighted_mean

DRAWS = 1000  # attempts to give each client enough examples


def dirichlet_shards(
    labels: ArrayLike, clients: int, concentration: float, *, seed: int, least: int = 1
) -> list[np.ndarray]:
    """Divides examples among clients, each with its own mixture of classes.

    The examples of each class are divided in shares drawn from a symmetric Dirichlet distribution. At a concentration
    of 0.1 a client has most of its examples from two or three classes; at 100 all clients have nearly the same mixture.
    The clients' numbers of examples differ, too. Each example belongs to exactly one client. The draw is repeated until
    each client has enough examples.

    Args:
      labels: classes, integers ``[n]``.
      clients: the number of clients.
      concentration: the parameter of the Dirichlet distribution, > 0.
      seed: the seed of the draw; the shards are a pure function of the arguments.
      least: the lowest number of examples of a client.

    Returns:
      The rows of each client in rising order, a list of int32 ``[n_k]``.

    Raises:
      ValueError: if an argument is not what is said above, or 1,000 draws leave a client without enough examples.

    References:
      Hsu, Qi, Brown, `Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification`,
      2019 (arXiv 1909.06335), who draw each client's shares of the classes for clients of equal size. Yurochkin
      et al., `Bayesian Nonparametric Federated Learning of Neural Networks`, 2019 (arXiv 1905.12022), draw each
      class's shares of the clients, as is done here.

    >>> [len(rows) for rows in dirichlet_shards([0, 1] * 50, 4, 0.5, seed=0)]
    [39, 29, 12, 20]
    """
    check_integers("labels", labels)
    check_count("clients", clients)
    check_positive("concentration", concentration)
    check_count("seed", seed, least=0)
    check_count("least", least)
    labels = np.asarray(labels)
    if labels.ndim != 1 or len(labels) < clients * least:
        raise ValueError(
            f"labels must be [n] with at least {least} for each of {clients} clients, got shape {labels.shape}"
        )
    rng = np.random.default_rng(seed)
    sizes: list[int] = []
    for _ in range(DRAWS):
        parts = []
        for each in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == each))
            ends = np.cumsum(rng.dirichlet(np.full(clients, float(concentration))))[:-1]
            parts.append(np.split(rows, np.round(ends * len(rows)).astype(int)))
        shards = [np.sort(np.concatenate(own)).astype(np.int32) for own in zip(*parts, strict=True)]
        sizes = [len(rows) for rows in shards]
        if min(sizes) >= least:
            return shards
    raise ValueError(
        f"in {DRAWS} draws a client always had fewer than {least} examples, in the last one client "
        f"{int(np.argmin(sizes))} {min(sizes)}: take fewer clients, a higher concentration or a lower least"
    )


def client_order(
    shards: Sequence[np.ndarray], *, steps: int, batch_size: int, seed: int, number: int
) -> np.ndarray:
    """Draws the batches of all clients for one round: the same number of steps for each, whatever its shard's size.

    A client goes through its shard in random order, and again in another order when it has come to the end. So a
    client with few examples sees each more often in a round than one with many.

    Args:
      shards: the rows of each client, such as :func:`dirichlet_shards` makes them.
      steps: the number of steps of the round.
      batch_size: the number of examples per step of each client.
      seed: the seed of the order.
      number: the number of the round, from 0.

    Returns:
      Rows, int32 ``[steps, clients, batch_size]``, for an epoch of :mod:`distill_jax.train.sweeps`.

    Raises:
      ValueError: if a client has no examples, or an argument is not what is said above.
    """
    check_sequence("shards", shards, "arrays of rows")
    for name, value, lowest in (
        ("steps", steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0), ("number", number, 0),
    ):  # fmt: skip
        check_count(name, value, least=lowest)
    orders = []
    for client, rows in enumerate(shards):
        check_integers(f"shards[{client}]", rows)
        if not len(rows):
            raise ValueError(f"client {client} has no examples (shards[{client}] is empty): leave it out")
        rng, wanted = np.random.default_rng([seed, number, client]), steps * batch_size
        passes = [rng.permutation(rows) for _ in range(-(-wanted // len(rows)))]
        orders.append(np.concatenate(passes)[:wanted].reshape(steps, batch_size))
    return np.stack(orders, 1).astype(np.int32)


def make_local_training(
    step: Step,
    tx: optax.GradientTransformation,
    *,
    transform: Callable[[PyTree, Any, jax.Array], Any] | None = None,
) -> Callable[..., tuple[Model, dict[str, jax.Array]]]:
    """Makes the training of clients of one architecture, side by side: one round in one call.

    Each client begins a round with a new optimizer state.

    Args:
      step: a train step, from :func:`distill_jax.train.make_train_step`.
      tx: its optimizer.
      transform: ``(context, batch, key) -> batch``, as in :func:`distill_jax.train.make_epoch`.

    Returns:
      ``(models, data, order, key, context=None) -> (models, metrics)``. ``models`` are stacked; ``data`` holds the
      examples of all clients and ``order`` their rows ``[steps, clients, batch]``, from :func:`client_order`;
      ``metrics`` are means over the steps, ``[clients]``.

    Raises:
      ValueError: if ``step`` or ``tx`` is not what is said above; when it is called, if ``order`` has not one column
        per stacked model, or its rows are not among the examples.
    """
    check_function("step", step, "state, batch")
    check_tx("tx", tx)
    epoch = sweeps.make_epoch(lambda: step, transform=transform)
    begin = jax.jit(jax.vmap(lambda model, key: init_state(model, tx, key)))

    def train_clients(models, data, order, key, context=None):
        check_model("models", models)
        check_integers("order", order)
        counts = sorted({np.shape(leaf)[:1] for leaf in jax.tree.leaves(models)})
        if np.ndim(order) != 3 or counts != [np.shape(order)[1:2]]:
            raise ValueError(
                f"order must be rows [steps, clients, batch] with one column per stacked model, got shape "
                f"{np.shape(order)} for models whose first axes are {', '.join(map(str, counts))}"
            )
        states = begin(models, jax.random.split(key, np.shape(order)[1]))
        students, metrics = epoch(sweeps.Students(states), data, order, context)
        return students.model, {name: jnp.mean(values, 0) for name, values in metrics.items()}

    return train_clients


def with_public(
    batch_size: int, *, prepare: Callable[[Any], Any] = identity
) -> Callable[..., dict[str, Any]]:
    """Makes the ``transform`` that adds public examples to each batch of a client, for :func:`co_distill`.

    Args:
      batch_size: the number of public examples per batch, drawn with replacement.
      prepare: applied to the images, private and public.

    Returns:
      ``(context, batch, key) -> batch``, where ``context`` holds the public ``"image"``, the consensus ``"teacher"``
      and ``"weight"`` (0 for examples for which there is no consensus yet), arrays ``[n, ...]``. The batch has it as
      ``"public"``.
    """
    check_count("batch_size", batch_size)
    check_function("prepare", prepare, "images")

    def transform(context, batch, key):
        need(context, "image", "teacher", "weight")
        rows = jax.random.randint(key, (batch_size,), 0, len(context["weight"]))
        public = jax.tree.map(lambda x: x[rows], dict(context))
        public["image"] = prepare(public["image"])
        return {**batch, "image": prepare(batch["image"]), "public": public}

    return transform


def co_distill(
    *, weight: Schedule = 1.0, temperature: Schedule = 1.0, soft: Callable[..., jax.Array] = losses.kl
) -> LossFn:
    """Builds the objective of a client that learns from its own examples and the consensus at once: hard + w·soft.

    The consensus is for public examples in the same batch. Where a client learns first from the one and then from the
    other, as in FedMD, it forgets in each part what it learned in the part before.

    Args:
      weight: w ≥ 0, or a schedule of it.
      temperature: T > 0, or a schedule of it.
      soft: the soft loss, as in :func:`distill_jax.train.distill`.

    Returns:
      A ``loss_fn`` with the metrics ``"hard"``, ``"soft"`` and ``"error_rate"`` (of the client's own examples), for
      batches from :func:`with_public`. Both parts go through the model together. Schedules begin again in each round
      of :func:`make_local_training`. The soft part is a mean over the public examples by their own weights; a step
      that accumulates a batch in parts weighs the parts by the private examples, so that its mean may differ where the
      public weights do.

    Raises:
      ValueError: if w is a negative constant, or T one that is not positive.

    References:
      Bistritz, Mann, Bambos, `Distributed Distillation for On-Device Learning`, 2020: local training that is
      regularised by the average of soft decisions on public data (there between neighbours, without a server).
    """
    check_weight("weight", weight)
    check_options(0.0, temperature, soft)

    def loss_fn(model, batch, *, key, step):
        need(batch, "image", "label", "public")
        public: Mapping[str, Any] = batch["public"]
        need(public, "image", "teacher")
        own = len(jax.tree.leaves(batch["image"])[0])
        both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), batch["image"], public["image"])
        logits, state = model.apply(both, key=key)
        metrics = {
            "hard": weighted_mean(losses.cross_entropy(logits[:own], batch["label"]), batch),
            "soft": soft_mean(
                soft, logits[own:], public["teacher"], public, temperature=at(temperature, step)
            ),
            "error_rate": error_rate(logits[:own], batch),
        }
        return metrics["hard"] + at(weight, step) * metrics["soft"], (state, metrics)

    return loss_fn

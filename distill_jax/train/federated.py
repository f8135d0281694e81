"""Federated learning: clients that keep their examples, and send parameters or predictions.

A round has three parts: the clients train on their own examples, they send something, and the server averages it.

- *Parameters* travel in FedAvg: :func:`average_models`. All clients have one architecture.
- *Predictions* for public examples without labels travel in federated distillation: :func:`average_predictions`.
  The average, the *consensus*, is what clients and server learn from next. Architectures may differ. What is sent are
  the arrays that a kind of labels makes (:mod:`distill_jax.teachers.kinds`), and :func:`payload_bytes` counts them.

Clients of one architecture are stacked as in :mod:`distill_jax.train.sweeps` and train side by side, in one compiled
program (:func:`make_local_training`). :mod:`distill_jax.compress.units` averages clients whose units are in different
orders (``match_weights``) or whose widths differ (``average_widths``).

>>> import optax
>>> from distill_jax import models, train
>>> from distill_jax.train import sweeps
>>> data = {"image": np.eye(4, dtype=np.float32), "label": np.array([0, 0, 1, 1])}
>>> shards = [np.array([0, 2]), np.array([1, 3])]
>>> tx = optax.sgd(0.5)
>>> train_clients = make_local_training(train.make_train_step(train.supervised(), tx), tx)
>>> model = models.from_function(lambda w, x: x @ w, jnp.zeros((4, 2)))
>>> for number in range(3):
...     order = client_order(shards, steps=5, batch_size=2, seed=0, number=number)
...     clients, _ = train_clients(sweeps.repeat(model, 2), data, order, jax.random.key(number))
...     model = average_models([sweeps.take(clients, i) for i in range(2)], [2, 2])
>>> model(data["image"]).argmax(-1).tolist()
[0, 0, 1, 1]
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from distill_jax import losses, weights
from distill_jax._checks import (
    check_choice,
    check_count,
    check_function,
    check_integers,
    check_positive,
    check_real,
    check_sequence,
    check_tx,
    is_key,
    need,
    shown,
)
from distill_jax._model import Model, PyTree, check_model, identity
from distill_jax.losses.tokens import TopK
from distill_jax.teachers.kinds import Kind
from distill_jax.train import sweeps
from distill_jax.train.objectives import Schedule, at, check_options, check_weight, error_rate, soft_mean
from distill_jax.train.step import LossFn, Step, init_state, weighted_mean

Invalid = Literal["refuse", "leave out"]
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


def finite_clients(
    updates: Sequence[PyTree] | np.ndarray, *, invalid: Invalid = "refuse", names: Sequence[str] = ()
) -> list[int]:
    """Finds the clients whose numbers are all finite, in the precision in which JAX computes with them.

    Args:
      updates: what each client sent: parameters, models or predictions.
      invalid: what to do about a client that sent NaN or infinite numbers: ``"refuse"`` the round, or ``"leave out"``
        the client.
      names: the clients' names in messages; ``client 0``, ``client 1`` and so on by default.

    Returns:
      The numbers of these clients.

    Raises:
      ValueError: if a client is to be refused (the message names it), or none is left.
    """
    names = _names(updates, names)
    wrong = {}
    for i, update in enumerate(updates):
        if said := _not_finite(update):
            wrong[i] = f"{names[i]} {said}"
    return _accepted(wrong, len(updates), invalid)


def _not_finite(update: PyTree) -> str:
    """Says how many numbers are not finite; nothing if all are."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(update) if weights.is_float(leaf)]
    with np.errstate(over="ignore"):  # float64 beyond float32 is infinite to JAX
        held = [leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=False) for leaf in leaves]
    count = sum(int((~np.isfinite(leaf)).sum()) for leaf in held)
    return f"sent {count} of {sum(leaf.size for leaf in held)} numbers NaN or infinite" if count else ""


def _accepted(wrong: Mapping[int, str], clients: int, invalid: Invalid) -> list[int]:
    """Lists the clients that did nothing wrong, unless the round is refused."""
    check_choice("invalid", invalid, ("refuse", "leave out"))
    if wrong and (invalid == "refuse" or len(wrong) == clients):
        advice = "" if invalid == "leave out" else ", or leave it out by invalid='leave out'"
        raise ValueError(
            f"{'; '.join(wrong.values())}: train it with a lower learning rate or other examples{advice}"
        )
    return [i for i in range(clients) if i not in wrong]


def _names(updates: Sequence[Any] | np.ndarray, names: Sequence[str]) -> Sequence[str]:
    if isinstance(updates, str) or not hasattr(updates, "__len__") or not len(updates):
        raise ValueError(f"expected what at least one client sent, a list, got {shown(updates)}")
    names = names or [f"client {i}" for i in range(len(updates))]
    if len(names) != len(updates):
        raise ValueError(f"names must have one entry per client, {len(updates)}, got {len(names)}")
    return names


def _sizes(sizes: ArrayLike | Sequence[float], names: Sequence[str]) -> np.ndarray:
    check_real("sizes", sizes)
    array = np.asarray(sizes, np.float64)
    if array.shape != (len(names),):
        raise ValueError(f"sizes must have one number per client, {len(names)}, got shape {array.shape}")
    for name, size in zip(names, array, strict=True):
        if not (np.isfinite(size) and size > 0):
            raise ValueError(f"{name} has no examples (sizes must be positive, got {size:g}): leave it out")
    return array


def average_models(
    models: Sequence[PyTree],
    sizes: ArrayLike | Sequence[float],
    *,
    invalid: Invalid = "refuse",
    names: Sequence[str] = (),
) -> PyTree:
    """Averages the models of clients, weighted by their numbers of examples: FedAvg, Σ n_k·θ_k / Σ n_k.

    Args:
      models: the clients' models, or trees of parameters, of one architecture.
      sizes: the clients' numbers of examples, n_k > 0.
      invalid: what to do about a client that sent NaN, as in :func:`finite_clients`.
      names: the clients' names in messages, as in :func:`finite_clients`.

    Returns:
      The average: :func:`distill_jax.weights.mean`, whose remark on BatchNorm holds.

    Raises:
      ValueError: if a client sent NaN and is not left out, has another architecture, or has no examples; the message
        names it.

    References:
      McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data`, 2017
      (arXiv 1602.05629), Algorithm 1. (There, a client's number of steps grows with its number of examples.)

    >>> float(average_models([1.0, 5.0], [3, 1]))
    2.0
    """
    kept, names = finite_clients(models, invalid=invalid, names=names), _names(models, names)
    chosen = [models[i] for i in kept]
    weights.check(*chosen, names=[names[i] for i in kept])
    return weights.mean(chosen, _sizes(sizes, names)[kept])


def average_predictions(
    predictions: Sequence[ArrayLike] | np.ndarray,
    sizes: ArrayLike | Sequence[float] | None = None,
    *,
    of: Literal["logits", "probabilities"] = "logits",
    class_names: Sequence[Sequence[str]] | None = None,
    invalid: Invalid = "refuse",
    names: Sequence[str] = (),
) -> np.ndarray:
    """Averages the predictions of clients for the same public examples: their consensus.

    Args:
      predictions: the logits of each client, ``[n, classes]``; from labels of other kinds by :func:`dense`.
      sizes: the clients' weights, such as their numbers of examples, > 0; all are equal by default.
      of: what is averaged. FedMD averages class scores, which are logits in its program, and FedDF averages logits. In
        a mean of logits the scale of each client's logits counts, in a mean of probabilities it counts little.
      class_names: the names of each client's classes, in the order of its logits; they must all be the same.
      invalid: what to do about a client that sent NaN, as in :func:`finite_clients`.
      names: the clients' names in messages, as in :func:`finite_clients`.

    Returns:
      The consensus as logits, float32 ``[n, classes]``: the mean of the logits, or the logarithm of the mean
      probabilities (not below −80).

    Raises:
      ValueError: if a client sent NaN and is not left out, or predictions of another shape, has other classes or
        the same in another order; the message names it.

    References:
      Li, Wang, `FedMD: Heterogenous Federated Learning via Model Distillation`, 2019 (arXiv 1910.03581), Algorithm 1.
      Lin et al., `Ensemble Distillation for Robust Model Fusion in Federated Learning`, 2020 (arXiv 2006.07242),
      Algorithm 1.

    >>> average_predictions([[[2.0, 0.0]], [[0.0, 1.0]]]).tolist()
    [[1.0, 0.5]]
    """
    check_choice("of", of, ("logits", "probabilities"))
    names = _names(predictions, names)
    for name, logits in zip(names, predictions, strict=True):
        check_real(f"the predictions of {name}", logits)
        if np.ndim(logits) != 2 or np.shape(logits) != np.shape(predictions[0]):
            raise ValueError(
                f"{name} sent predictions of shape {np.shape(logits)}, {names[0]} of {np.shape(predictions[0])}: all "
                "must be [n, classes] for the same public examples and classes"
            )
    if class_names is not None:
        check_classes(class_names, np.shape(predictions[0])[1], names=names)
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as such
        each = [np.asarray(logits).astype(np.float32) for logits in predictions]
    kept = finite_clients(each, invalid=invalid, names=names)
    share = _sizes(np.ones(len(names)) if sizes is None else sizes, names)[kept]
    logits = np.stack([each[i] for i in kept])
    if of == "probabilities":
        logits = np.asarray(jax.nn.softmax(logits))
    mean = np.tensordot((share / share.sum()).astype(np.float32), logits, 1)
    return mean if of == "logits" else _log(mean)


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, np.float32(np.exp(-80.0))))


def check_classes(
    class_names: Sequence[Sequence[str]], classes: int | None = None, *, names: Sequence[str] = ()
) -> None:
    """Raises ``ValueError`` unless all clients have the same classes in the same order.

    Args:
      class_names: the names of each client's classes, in the order of its outputs.
      classes: the number of classes that there must be; None for any.
      names: the clients' names in messages, as in :func:`finite_clients`.
    """
    names = _names(class_names, names)
    first = list(class_names[0])
    for name, each in zip(names, class_names, strict=True):
        if missing := sorted(set(map(str, first)) ^ set(map(str, each))):
            raise ValueError(
                f"{name} has {len(each)} classes, {names[0]} has {len(first)}, and only one of them has "
                f"{', '.join(missing[:5])}: give all clients outputs for the classes of all"
            )
        if list(each) != first:
            raise ValueError(f"{name} has its classes in another order than {names[0]}: reorder its outputs")
    if classes is not None and len(first) != classes:
        raise ValueError(f"class_names must have {classes} names, as there are outputs, got {len(first)}")


def encode_predictions(
    predictions: Sequence[ArrayLike] | np.ndarray,
    kind: Kind,
    *,
    dtype: str = "float16",
    invalid: Invalid = "refuse",
    names: Sequence[str] = (),
) -> dict[int, dict[str, np.ndarray]]:
    """Makes what each client sends of its predictions.

    Args:
      predictions: the logits of each client, ``[n, classes]``.
      kind: a kind of labels, such as ``teachers.kinds.Top(2)``; one that needs no ids of examples.
      dtype: the dtype in which numbers are sent: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
      invalid: what to do about a client whose predictions are NaN, infinite, or too large for ``dtype``, as in
        :func:`finite_clients`.
      names: the clients' names in messages, as in :func:`finite_clients`.

    Returns:
      The number of each client that is not left out → the arrays that it sends.

    Raises:
      ValueError: if a client is to be refused (the message names it), or none is left.

    >>> from distill_jax.teachers import kinds
    >>> encode_predictions([[[2.0, 0.0]], [[1e5, 0.0]]], kinds.Logits(), invalid="leave out")
    {0: {'logits': array([[2., 0.]], dtype=float16)}}
    """
    names = _names(predictions, names)
    sent, wrong = {}, {}
    for i, logits in enumerate(predictions):
        if said := _not_finite(logits):
            wrong[i] = f"{names[i]} {said}"
            continue
        try:
            sent[i] = kind.encode(logits, dtype=dtype)
        except ValueError as error:
            wrong[i] = f"the predictions of {names[i]} cannot be sent ({error})"
    _accepted(wrong, len(predictions), invalid)
    return sent


def dense(labels: ArrayLike | TopK, classes: int) -> np.ndarray:
    """Turns labels that were sent into logits of all classes, which can be averaged.

    Args:
      labels: what ``decode`` of a kind of labels gives: logits, or top-k labels. The probability of OTHER is divided
        equally among the other classes.
      classes: the number of classes.

    Returns:
      Logits, float32 ``[n, classes]``; of top-k labels the log-probabilities (not below −80) times the temperature of
      the labels.

    Raises:
      ValueError: if logits have another number of classes, or a label lies outside them.

    >>> labels = TopK(jnp.array([[2]]), jnp.log(jnp.array([[0.8, 0.2]])), 1.0)
    >>> np.exp(dense(labels, 3)).round(2).tolist()
    [[0.10000000149011612, 0.10000000149011612, 0.800000011920929]]
    """
    check_count("classes", classes)
    if not isinstance(labels, TopK):
        check_real("labels", labels)
        logits = np.asarray(labels, np.float32)
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise ValueError(f"labels must be logits [n, {classes}], got shape {logits.shape}")
        return logits
    indices, probabilities = np.asarray(labels.indices), np.exp(np.asarray(labels.log_probs, np.float32))
    if indices.min() < 0 or indices.max() >= classes:
        raise ValueError(f"labels must lie in [0, {classes}), got indices {indices.min()} to {indices.max()}")
    others = classes - indices.shape[1]
    whole = np.repeat(probabilities[:, -1:] / max(others, 1), classes, 1)
    np.put_along_axis(whole, indices, probabilities[:, :-1], 1)
    return _log(whole) * np.float32(labels.temperature)


def payload_bytes(payload: PyTree) -> int:
    """Counts the bytes of what is sent: of all arrays of a pytree, in their own dtypes.

    Args:
      payload: parameters, a model, or the arrays that a kind of labels makes.

    Returns:
      The number of bytes. A random key, such as the state of a model with dropout may hold, counts with its numbers.

    >>> payload_bytes({"logits": np.zeros((5, 10), np.float16)})
    100
    """
    leaves = [jax.random.key_data(leaf) if is_key(leaf) else leaf for leaf in jax.tree.leaves(payload)]
    return sum(np.asarray(leaf).nbytes for leaf in leaves)


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

"""What clients send, parameters or predictions: its averages, its bytes, and whose numbers are refused."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.typing import ArrayLike

from distill_jax import weights
from distill_jax._checks import check_choice, check_count, check_real, is_key, shown
from distill_jax._model import PyTree
from distill_jax.losses.tokens import TopK
from distill_jax.teachers.kinds import Kind

Invalid = Literal["refuse", "leave out"]


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

    >>> import jax.numpy as jnp
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

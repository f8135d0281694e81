"""Contrastive losses: the student's embedding of an example should be closest to the teacher's of the same.

:func:`info_nce` takes its negative examples from the batch. :func:`crd` takes them from a memory of past
embeddings of the whole data set. The memory is an explicit state: :func:`crd_init` makes it,
:func:`crd_negatives` draws from it, and :func:`crd` returns it updated.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from distill_jax._checks import check_count, check_fraction, check_integers, check_positive
from distill_jax.losses._space import direction, flatten, product


def info_nce(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    temperature: float | ArrayLike = 0.07,
    symmetric: bool = False,
    where: ArrayLike | None = None,
) -> Array:
    """InfoNCE, contrastive distillation within the batch: −log(e^(c_ii/τ) / Σ_j e^(c_ij/τ)).

    c_ij is the cosine between the student's embedding of example i and the teacher's of example j. log(batch)
    minus the mean value is a lower bound of the mutual information of the two embeddings. The other examples
    of the batch are the negatives.

    Args:
      student: ``[batch, ..., features]``, any float dtype; flattened, and divided by its length.
      teacher: embeddings of the same batch and size. Where sizes differ, project one first.
      labels: integers ``[batch]``. If given, other examples of the same class are not used as negatives.
      temperature: τ > 0, a scalar.
      symmetric: whether to average this value with the one in which student and teacher are exchanged,
        −log(e^(c_ii/τ) / Σ_j e^(c_ji/τ)).
      where: ``bool [batch]``: which examples count.

    Returns:
      ``[batch]``, nats, float32 (float64 for float64 input); 0 for an example without negatives.

    Raises:
      ValueError: if the shapes do not fit, ``where`` or the labels are not ``[batch]``, or the
        temperature is not positive.

    Note:
      This is CRD's objective with negatives from the batch; the published method is :func:`crd`. The
      collections that contain CRD have no reference code for this form.

    References:
      van den Oord, Li, Vinyals, `Representation Learning with Contrastive Predictive Coding`, 2018,
      Eq. 4; Tian, Krishnan, Isola, `Contrastive Representation Distillation`, 2020, §3.

    >>> x = jnp.eye(2)
    >>> f'{info_nce(x, x, temperature=1.0)[0]:.4f}'  # log(1 + 1/e)
    '0.3133'
    """
    check_positive("temperature", temperature)
    student, teacher, valid = flatten(student, teacher, where)
    _check_same(student, teacher)
    negative = valid[:, None] & valid & ~jnp.eye(valid.shape[0], dtype=bool)
    if labels is not None:
        check_integers("labels", labels)
        labels = jnp.asarray(labels)
        if labels.shape != valid.shape:
            raise ValueError(f"labels must have shape {valid.shape}, one per example, got {labels.shape}")
        negative &= labels[:, None] != labels
    logits = product(direction(student, -1), direction(teacher, -1)) / jnp.asarray(temperature, student.dtype)
    own = jnp.diagonal(logits)

    def view(logits):
        # −log p = log(1 + Σ_(j≠i) e^(l_ij − l_ii)), which keeps its digits where p is near 1
        gap = jnp.where(negative, logits - own[:, None], 0.0)
        peak = jax.lax.stop_gradient(jnp.max(gap, -1, where=negative, initial=0.0))
        total = jnp.sum(jnp.exp(gap - peak[:, None]), -1, where=negative)
        near = jnp.log1p(jnp.where(peak > 0, 0.0, total))
        far = peak + jnp.log(jnp.exp(-peak) + jnp.where(peak > 0, total, 1.0))
        return jnp.where(valid, jnp.where(peak > 0, far, near), 0.0)

    if symmetric:
        return 0.5 * (view(logits) + view(logits.T))
    return view(logits)


class CRDState(NamedTuple):
    """What :func:`crd` remembers of the data set; a pytree of arrays.

    Attributes:
      student: ``[examples, features]``, the running embedding of each example by the student.
      teacher: ``[examples, features]``, the running embedding of each example by the teacher.
      log_z_student: scalar, the logarithm of the constant Z by which the student's scores are divided;
        −inf until the first batch sets it.
      log_z_teacher: scalar, the logarithm of the constant for the teacher's scores.
    """

    student: Array
    teacher: Array
    log_z_student: Array
    log_z_teacher: Array


def crd_init(key: Array, examples: int, features: int, *, dtype: DTypeLike = jnp.float32) -> CRDState:
    """Makes the memory of :func:`crd`: random embeddings of length about 1.

    Args:
      key: draws the entries uniformly within ±√(3/features), as RepDistiller does.
      examples: the number of examples of the training set.
      features: the number of features of an embedding.
      dtype: the dtype of the memory.

    Returns:
      A :class:`CRDState`.

    Raises:
      ValueError: if a size is not positive.
    """
    check_count("examples", examples)
    check_count("features", features)
    limit = (3 / features) ** 0.5
    banks = jax.random.uniform(key, (2, examples, features), dtype, -limit, limit)
    unset = jnp.asarray(-jnp.inf, dtype)
    return CRDState(banks[0], banks[1], unset, unset)


def crd_negatives(
    key: Array, ids: ArrayLike, *, examples: int, count: int, labels: ArrayLike | None = None
) -> Array:
    """Draws negative examples for :func:`crd`, uniformly and with replacement, from all other examples.

    Args:
      key: draws the negatives; use a new one in every step.
      ids: integers ``[batch]`` in [0, examples), the positions of the batch's examples in the training set.
      examples: the number of examples of the training set.
      count: the number of negatives per example; 16,384 in the paper's experiments on CIFAR-100.
      labels: integers ``[examples]``, the classes of the *whole* training set. If given, negatives come
        only from other classes, as in the paper's best variant.

    Returns:
      int32 ``[batch, count]``; −1, which is no example, where there is none to draw.

    Raises:
      ValueError: if a size is not positive, or the labels are not ``[examples]``.

    Note:
      RepDistiller draws negatives of other classes without replacement where there are enough. Without
      labels, it may draw the example itself.

    References:
      Tian, Krishnan, Isola, `Contrastive Representation Distillation`, 2020, §4 and appendix.

    >>> drawn = crd_negatives(jax.random.key(0), jnp.array([0, 2]), examples=3, count=50)
    >>> print([sorted(set(row)) for row in drawn.tolist()])
    [[1, 2], [0, 1]]
    """
    check_count("examples", examples)
    check_count("count", count)
    check_integers("ids", ids)
    ids = jnp.asarray(ids)
    shape = (*ids.shape, count)
    if labels is None:
        drawn = jax.random.randint(key, shape, 0, max(examples - 1, 1), jnp.int32)
        drawn += drawn >= ids[:, None]  # skip the example itself
        return jnp.where(examples > 1, drawn, -1)
    check_integers("labels", labels)
    labels = jnp.asarray(labels)
    if labels.shape != (examples,):
        raise ValueError(f"labels must have one entry per example, shape ({examples},), got {labels.shape}")
    # Sorted by class, the example's own class is an interval to skip
    order = jnp.argsort(labels).astype(jnp.int32)
    ranked, own = labels[order], labels[ids]
    first = jnp.searchsorted(ranked, own, side="left")[:, None]
    size = jnp.searchsorted(ranked, own, side="right")[:, None] - first
    others = examples - size
    drawn = jax.random.randint(key, shape, 0, jnp.maximum(others, 1), jnp.int32)
    drawn = order[jnp.where(drawn < first, drawn, drawn + size)]
    return jnp.where(others > 0, drawn, -1)


def crd(
    student: ArrayLike,
    teacher: ArrayLike,
    state: CRDState,
    ids: ArrayLike,
    negatives: ArrayLike,
    *,
    temperature: float | ArrayLike = 0.07,
    momentum: float | ArrayLike = 0.5,
    where: ArrayLike | None = None,
    axis_name: str | None = None,
) -> tuple[Array, CRDState]:
    """Contrastive representation distillation (CRD) against a memory of the whole data set.

    For the student's embedding v of an example and the memory w of the teacher, the value is −log D(w₊) −
    Σ_k log(1 − D(w_k)), with D(w) = P/(P + m/n) and P = e^(⟨v, w⟩/τ)/Z. w₊ is the memory of the example, and
    the w_k are those of its m negatives among the n examples. The same for the teacher's embedding and
    the memory of the student is added. The mean over examples is the loss of the paper. Gradients flow to
    both embeddings, and not to Z or the memory. Where m·features > n, the scores of all examples are computed
    and the drawn ones picked, which needs less memory than gathering m vectors per example.

    Args:
      student: ``[batch, ..., features]``, any float dtype; flattened, and divided by its length.
      teacher: embeddings of the same batch and size.
      state: from :func:`crd_init`, or from the step before.
      ids: integers ``[batch]``, the positions of the batch's examples in the training set. If two examples
        that count have the same id, either of them may be remembered.
      negatives: integers ``[batch, m]``, for example from :func:`crd_negatives`.
      temperature: τ > 0.
      momentum: in [0, 1], the share of the old embedding when the memory is updated.
      where: ``bool [batch]``: which examples count. The others are not remembered either.
      axis_name: the mapped axis over which the batch is divided under ``pmap``, ``shard_map`` or ``vmap``,
        so that every part remembers the whole batch. (A sharded batch under ``jit`` needs none.)

    Returns:
      ``(values, state)``. Values are ``[batch]``, nats, float32 (float64 for float64 input), and NaN where
      an id or a negative is outside [0, examples). The new state holds this batch's embeddings, mixed with
      the old ones and divided by their length. After the first batch it also holds Z, n times the mean of
      e^(⟨v, w⟩/τ) over that batch.

    Raises:
      ValueError: if the shapes do not fit, the temperature is not positive, or the momentum is
        outside [0, 1].

    Note:
      RepDistiller and mdistiller add 1e-7 to P + m/n. torchdistill 1.1.5 cannot draw negatives itself
      (it asks for ``self.prob``, which it never sets).

    References:
      Tian, Krishnan, Isola, `Contrastive Representation Distillation`, 2020, §3 and the appendix on
      memory and noise-contrastive estimation (Eq. 18, as numbered in RepDistiller's code).

    >>> state = crd_init(jax.random.key(0), 4, 2)
    >>> x, ids = jnp.eye(2), jnp.array([0, 1])
    >>> values, state = crd(x, x, state, ids, jnp.array([[2], [3]]), momentum=0.0)
    >>> print(values.shape, state.student[:2].tolist())
    (2,) [[1.0, 0.0], [0.0, 1.0]]
    """
    check_positive("temperature", temperature)
    check_fraction("momentum", momentum)
    student, teacher, valid = flatten(student, teacher, where)
    _check_same(student, teacher)
    check_integers("ids", ids)
    check_integers("negatives", negatives)
    ids, negatives = jnp.asarray(ids), jnp.asarray(negatives)
    examples, features = state.student.shape
    batch = student.shape[0]
    if student.shape[1] != features:
        raise ValueError(
            f"the state holds {features} features per example, but the embeddings have {student.shape[1]}: "
            "give crd_init the number of features of the embeddings"
        )
    if ids.shape != (batch,) or negatives.ndim != 2 or negatives.shape[0] != batch:
        raise ValueError(
            f"ids must have shape ({batch},) and negatives ({batch}, m), got {ids.shape} and {negatives.shape}"
        )
    student, teacher = direction(student, -1), direction(teacher, -1)
    chosen = jnp.concatenate([ids[:, None], negatives], 1)
    known = jnp.all((chosen >= 0) & (chosen < examples), 1)
    chosen = jnp.clip(chosen, 0, examples - 1)
    counted = valid & known
    temperature = jnp.asarray(temperature, student.dtype)
    values, log_z = jnp.zeros(batch, student.dtype), []
    log_noise = jnp.log(jnp.asarray(negatives.shape[1] / examples, student.dtype))
    for anchor, bank, log_constant in (
        (student, state.teacher, state.log_z_student),
        (teacher, state.student, state.log_z_teacher),
    ):
        scores = _scores(anchor, jax.lax.stop_gradient(bank), chosen) / temperature
        estimate = _log_mean(jax.lax.stop_gradient(scores), counted, axis_name) + math.log(examples)
        log_constant = jnp.where(log_constant == -jnp.inf, estimate, log_constant)
        log_z.append(log_constant.astype(state.log_z_student.dtype))
        usable = jnp.where(log_constant == -jnp.inf, 0.0, log_constant)
        odds = scores - jax.lax.stop_gradient(usable) - log_noise  # log of P : m/n
        values += jax.nn.softplus(-odds[:, 0]) + jnp.sum(jax.nn.softplus(odds[:, 1:]), 1)
    values = jnp.where(valid, jnp.where(known, values, jnp.nan), 0.0)
    seen = (jnp.where(counted, ids, examples), student, teacher)  # out of range: dropped
    if axis_name is not None:
        seen = jax.lax.all_gather(seen, axis_name, tiled=True)
    places, student, teacher = seen

    def remember(bank, new):
        mixed = momentum * bank.at[places].get(mode="clip") + (1 - momentum) * new
        return bank.at[places].set(direction(mixed, -1).astype(bank.dtype), mode="drop")

    state = CRDState(remember(state.student, student), remember(state.teacher, teacher), *log_z)
    return values, jax.lax.stop_gradient(state)


def _check_same(student: Array, teacher: Array) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student and teacher embeddings must have the same number of features, got {student.shape[1]} "
            f"and {teacher.shape[1]}: project one first, as the losses in distill_jax.features do"
        )


def _scores(anchor: Array, bank: Array, chosen: Array) -> Array:
    """Computes ⟨anchor_i, bank[chosen_ik]⟩, ``[batch, chosen]``."""
    examples, features = bank.shape
    bank = bank.astype(anchor.dtype)
    if examples <= chosen.shape[1] * features:
        return jnp.take_along_axis(product(anchor, bank), chosen, 1)
    return product(bank[chosen], anchor[:, None])[..., 0]


def _log_mean(scores: Array, counted: Array, axis_name: str | None) -> Array:
    """Computes the logarithm of the mean of e^scores over the rows that count; −inf where none counts."""
    rows = jnp.broadcast_to(counted[:, None], scores.shape)
    log_sum, count = jax.nn.logsumexp(scores, where=rows), jnp.sum(rows)
    if axis_name is not None:
        log_sum = jax.nn.logsumexp(jax.lax.all_gather(log_sum, axis_name))
        count = jax.lax.psum(count, axis_name)
    return log_sum - jnp.log(jnp.maximum(count, 1).astype(scores.dtype))

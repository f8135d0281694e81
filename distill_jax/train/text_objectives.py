"""Objectives for language models, whose examples are rows of tokens.

``batch["image"]`` is the input of the model: tokens ``[batch, length]``, or a dict with ``"tokens"`` and, where
several texts or padding are in a row, ``"segments"`` (see :func:`distill_jax.data.text.pack`). The logits at a token
are the prediction of the next one. ``batch["counts"]``, bool ``[batch, length]``, says which tokens may count as
predicted; those of a prompt may not. With ``batch["weight"] = token_weight(batch["image"])`` the means are over all
tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distill_jax import losses
from distill_jax._checks import (
    check_choice,
    check_count,
    check_fraction,
    check_function,
    check_integers,
    need,
)
from distill_jax._model import Model, PyTree
from distill_jax.losses import tokens as token_losses
from distill_jax.models import head_kernel, hidden_states
from distill_jax.teachers import label
from distill_jax.train.objectives import Schedule, at, check_options, is_zero, teacher_of
from distill_jax.train.step import Batch, LossFn, weighted_mean


def predicted(image: PyTree, counts: ArrayLike | None = None) -> jax.Array:
    """Says which tokens are predicted, and count: each but the first of its text.

    Args:
      image: tokens ``[batch, length]``, or a dict with ``"tokens"`` and perhaps ``"segments"``.
      counts: bool ``[batch, length]``: which tokens may count; None: all.

    Returns:
      bool ``[batch, length − 1]``, an entry for each token but the first of the row.

    Raises:
      ValueError: if there are fewer than two tokens in a row, or the shapes differ.

    >>> print(predicted({"tokens": jnp.array([[5, 6, 7, 8]]), "segments": jnp.array([[1, 1, 2, 2]])}))
    [[ True False  True]]
    """
    rows = tokens_of(image)
    segments = image["segments"] if isinstance(image, Mapping) and "segments" in image else None
    for name, array in (("segments", segments), ("counts", counts)):
        if array is not None and jnp.shape(array) != rows.shape:
            raise ValueError(f"{name} must be {rows.shape}, one entry per token, got {jnp.shape(array)}")
    found = jnp.ones((len(rows), rows.shape[1] - 1), bool)
    if segments is not None:
        segments = jnp.asarray(segments)
        found &= (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    return found if counts is None else found & jnp.asarray(counts, bool)[:, 1:]


def token_weight(image: PyTree, counts: ArrayLike | None = None) -> jax.Array:
    """Counts the tokens of each row that are predicted: the ``"weight"`` of a batch for means over all tokens.

    Args:
      image: as in :func:`predicted`.
      counts: as in :func:`predicted`.

    Returns:
      float32 ``[batch]``.
    """
    return token_losses.sequence_weight(predicted(image, counts))


def tokens_of(image: PyTree) -> jax.Array:
    """Returns the tokens ``[batch, length]`` of an input of a language model, at least two in a row."""
    if isinstance(image, Mapping) and "tokens" not in image:
        raise ValueError(f"batch['image'] must be tokens, or a dict with 'tokens'; it has {sorted(image)}")
    rows = jnp.asarray(image["tokens"] if isinstance(image, Mapping) else image)
    if rows.ndim != 2 or rows.shape[1] < 2:
        raise ValueError(f"tokens must have shape [batch, length], length from 2, got {rows.shape}")
    return rows


def next_token(*, chunked: bool = False) -> LossFn:
    """Builds the objective of a language model: the mean cross-entropy of the next token, in nats.

    It is also that of sequence-level distillation, where the rows are a teacher's texts, see
    :func:`distill_jax.teachers.write_samples`.

    Args:
      chunked: as in :func:`distill_tokens`.

    Returns:
      A ``loss_fn`` with the metric ``"error_rate"``, the fraction of tokens that are not the likeliest ones.

    Raises:
      ValueError: if ``chunked`` is neither True nor False; when traced, if it is True and the model is no transformer.

    References:
      Kim, Rush, `Sequence-Level Knowledge Distillation`, 2016, §3.2 (there the teacher's likeliest texts by beam
      search).
    """
    check_choice("chunked", chunked, (True, False))

    def wrong(logits, labels):
        return (jnp.argmax(logits, -1) != labels).astype(jnp.float32)

    def loss_fn(model, batch, *, key, step):
        need(batch, "image")
        mean, state = _compared(model, batch, key, chunked)
        labels = tokens_of(batch["image"])
        rate = mean(wrong, labels[:, 1:], learns=False)
        return mean(losses.cross_entropy, labels[:, 1:]), (state, {"error_rate": rate})

    return loss_fn


def distill_tokens(
    *,
    temperature: Schedule | None = 1.0,
    alpha: Schedule = 0.0,
    soft: Callable[..., jax.Array] = losses.kl,
    other_from_text: bool = False,
    chunked: bool = False,
) -> LossFn:
    """Builds the objective of word-level distillation: the mean over tokens of α·hard + (1 − α)·soft.

    The teacher's labels, ``batch["teacher"]``, have an entry for each token of the row: logits
    ``[batch, length, vocabulary]``, or stored labels such as :class:`distill_jax.losses.tokens.TopK`, for which
    ``soft`` is ``losses.tokens.bucketed(losses.kl)``.

    Args:
      temperature: T > 0, or an optax schedule of it, passed to ``soft`` by that name; None for a ``soft`` that takes no
        temperature.
      alpha: α in [0, 1], the weight of the text itself, or a schedule of it.
      soft: ``(student_logits, teacher, *, temperature) -> values``, one value per token, ``[batch, length]``: any loss
        between logits.
      other_from_text: whether the text teaches what top-k labels leave open: which of the tokens of OTHER is likely,
        see :func:`distill_jax.losses.tokens.other_cross_entropy`, which is added to ``soft`` then. For labels
        :class:`~distill_jax.losses.tokens.TopK` of temperature 1.
      chunked: whether the student's logits are computed from its hidden states for some tokens at a time, and never
        all held, by :func:`distill_jax.losses.tokens.chunked`: for a transformer with a large vocabulary, and labels
        that are stored. (The teacher's logits, if they are the labels, are held.)

    Returns:
      A ``loss_fn`` with the metric ``"soft"``, unless α is the constant 0 ``"hard"``, and with ``other_from_text``
      ``"other"``.

    Raises:
      ValueError: if α is a constant outside [0, 1], T one that is not positive, a switch neither True nor False, or
        ``other_from_text`` True where T is not 1; when traced, if ``chunked`` is True and the model is no transformer,
        or ``other_from_text`` is True and the labels are not top-k labels.

    References:
      Kim, Rush, `Sequence-Level Knowledge Distillation`, 2016, §3.1.
    """
    check_options(alpha, temperature, soft)
    check_choice("chunked", chunked, (True, False))
    check_choice("other_from_text", other_from_text, (True, False))
    if other_from_text and temperature not in (None, 1):
        raise ValueError(
            f"other_from_text needs temperature 1, since the text is not softened, got {temperature!r}"
        )

    def among_other(logits, given):
        return token_losses.other_cross_entropy(logits, *given)

    def loss_fn(model, batch, *, key, step):
        teacher = teacher_of(batch)
        need(batch, "image")
        mean, state = _compared(model, batch, key, chunked)
        labels = jax.tree.map(lambda x: x[:, :-1], teacher["logits"])
        options = {} if temperature is None else {"temperature": at(temperature, step)}
        text = tokens_of(batch["image"])[:, 1:]
        metrics = {"soft": mean(soft, labels, **options)}
        learned = metrics["soft"]
        if other_from_text:
            if not isinstance(labels, token_losses.TopK):
                raise ValueError(f"other_from_text needs top-k labels, a TopK, got {type(labels).__name__}")
            metrics["other"] = mean(among_other, (text, labels.indices))
            learned += metrics["other"]
        if is_zero(alpha):
            return learned, (state, metrics)
        metrics["hard"] = mean(losses.cross_entropy, text)
        share = at(alpha, step)
        return share * metrics["hard"] + (1 - share) * learned, (state, metrics)

    return loss_fn


def _compared(
    model: Model, batch: Batch, key: jax.Array | None, chunked: bool
) -> tuple[Callable[..., jax.Array], PyTree]:
    """Runs the model; returns a function that compares its logits with labels, and the model's new state.

    The function is ``(loss, labels [batch, length − 1, ...], *, learns=True, **options) -> number``, the mean over the
    tokens. Without ``learns`` it has no gradient.
    """
    counted = predicted(batch["image"], batch.get("counts"))
    outputs, state = (hidden_states(model) if chunked else model).apply(batch["image"], key=key)
    head: dict[str, Any] = {"student_kernel": head_kernel(model)} if chunked else {}

    def mean(
        loss: Callable[..., jax.Array], labels: PyTree, *, learns: bool = True, **options: Any
    ) -> jax.Array:
        given = outputs[:, :-1], head
        rows, kernel = given if learns else jax.lax.stop_gradient(given)
        if not chunked:
            return weighted_mean(token_losses.sequence(loss)(rows, labels, tokens=counted, **options), batch)
        # The weight of each token in the mean over rows of their means over tokens
        of_rows = jax.grad(weighted_mean)(jnp.zeros(len(counted)), batch)
        weights = counted * (of_rows / jnp.maximum(counted.sum(-1), 1))[:, None]
        # The gradient of one number is computed with it, so no logit is computed twice
        total = token_losses.chunked(loss, reduce="sum")
        return total(rows, labels, tokens=counted, weights=weights, **kernel, **options)

    return mean, state


def on_policy(
    sampler: Callable[..., Mapping[str, jax.Array]],
    *,
    prompt: int,
    share: float = 0.5,
    score: Callable[[PyTree, Mapping[str, Any]], Mapping[str, Any]] = label,
) -> Callable[..., dict[str, Any]]:
    """Makes the ``transform`` of on-policy distillation: the student writes, the teacher scores.

    With probability ``share`` the rows of a batch are replaced by the student's own: it goes on from the first
    ``prompt`` tokens of each row, and what it has written counts. Otherwise the rows stay as they are, with the batch's
    own ``"counts"``. Rows of weight 0 have weight 0 in either case. Then the teacher labels the rows. The loss is that
    of :func:`distill_tokens`, with any divergence.
    The whole step, the sampler included, is one compiled program; no gradient flows through what was sampled.

    Args:
      sampler: ``(model, prompts, *, key) -> rows``: continues the inputs ``prompts``, of ``prompt`` tokens, to rows as
        long as those of the data, with all entries that the input has.
        ``functools.partial(models.generate, length=row length - prompt)`` is one.
      prompt: the number of tokens of a row from which the student goes on.
      share: λ in [0, 1].
      score: ``(context, batch) -> batch`` with ``"teacher"``. By default ``context`` is the teacher, whose logits are
        taken.

    Returns:
      The ``transform`` of :func:`distill_jax.train.make_epoch`: ``(context, batch, key, *, model) -> batch``. It sets
      the batch's ``"image"``, ``"counts"``, ``"weight"`` and ``"teacher"``.

    Raises:
      ValueError: if an argument is not of that form; when traced, if the sampler returns no such dict, or rows of
        another shape than those of the data.

    References:
      Agarwal et al., `On-Policy Distillation of Language Models` (GKD), 2024 (arXiv 2306.13649), Algorithm 1.
    """
    check_function("sampler", sampler, "model, prompts, *, key")
    check_function("score", score, "context, batch")
    check_count("prompt", prompt)
    check_fraction("share", share)

    def transform(context, batch, key, *, model):
        need(batch, "image")
        image, draws = batch["image"], jax.random.split(key)
        rows = tokens_of(image)
        if prompt >= rows.shape[1]:
            raise ValueError(f"prompt must be below the length of a row, {rows.shape[1]}, got {prompt}")
        given = jnp.asarray(batch.get("counts", jnp.ones(rows.shape, bool)))

        def own(_):
            prompts = jax.tree.map(lambda x: x[:, :prompt], image)
            sampled = sampler(model, prompts, key=draws[0])
            written = jnp.broadcast_to(jnp.arange(rows.shape[1]) >= prompt, rows.shape)
            if not isinstance(sampled, Mapping) or "tokens" not in sampled:
                raise ValueError(
                    f"the sampler must return a dict with 'tokens', got {type(sampled).__name__}"
                    + (f" with {sorted(sampled)}" if isinstance(sampled, Mapping) else "")
                )
            check_integers("the sampler's tokens", sampled["tokens"])
            if sampled["tokens"].shape != rows.shape:
                raise ValueError(
                    f"the sampler's rows must have the shape of the data's, {rows.shape}, got "
                    f"{sampled['tokens'].shape}"
                )
            if "segments" in sampled:
                written &= sampled["segments"] != 0
            new: PyTree = sampled["tokens"]
            if isinstance(image, Mapping):
                if missing := image.keys() - sampled.keys():
                    raise ValueError(
                        f"the sampler's rows must have all entries of the data's, {sorted(image)}: "
                        f"{sorted(missing)} are missing"
                    )
                new = {name: sampled[name] for name in image}
            new = jax.tree.map(lambda x, old: jnp.asarray(x, old.dtype), new, image)
            return jax.lax.stop_gradient(new), written

        def data(_):
            return image, given

        if share in (0, 1):
            image, counts = (own if share else data)(None)
        else:
            image, counts = jax.lax.cond(jax.random.uniform(draws[1]) < share, own, data, None)
        weight = token_weight(image, counts)
        if "weight" in batch:
            weight = jnp.where(jnp.asarray(batch["weight"]) > 0, weight, 0.0)
        return dict(score(context, {**batch, "image": image, "counts": counts, "weight": weight}))

    return transform


def exposure(
    student: Model,
    teacher: Model,
    rows: PyTree,
    sampler: Callable[..., Mapping[str, jax.Array]],
    *,
    prompt: int,
    key: jax.Array,
) -> dict[str, jax.Array]:
    """Measures how much worse a student is on its own texts than on given ones.

    Both continue the first ``prompt`` tokens of the rows. At each further token, the student's distribution is compared
    with the teacher's. Only the places count, of either text, where the row goes on with the text in which the prompt
    ends: what is packed behind it begins without a prompt.

    Args:
      student: the student.
      teacher: the teacher, which stands for the truth.
      rows: held-out texts, an input of both. A row whose prompt ends with padding does not count; outside of ``jit``
        :func:`distill_jax.models.generate` refuses it.
      sampler: as in :func:`on_policy`.
      prompt: as in :func:`on_policy`.
      key: a random key for the sampler.

    Returns:
      ``"on_data"`` and ``"on_own"``: the mean KL(teacher ‖ student) per token after the prompt, in nats, where the
      tokens before are those of the rows, or the student's own; and ``"own_loss"``, the teacher's mean loss on what the
      student has written, in nats. ``on_own / on_data − 1`` is the excess accumulated error, the share by which errors
      grow in generation.

    Raises:
      ValueError: if an argument is not of that form.

    References:
      Arora et al., `Why Exposure Bias Matters: An Imitation Learning Perspective of Error Accumulation in Language
      Generation`, 2022 (arXiv 2204.01171).
    """
    score = distill_tokens()
    truth = next_token()

    def figure(share):
        batch = on_policy(sampler, prompt=prompt, share=share)(teacher, {"image": rows}, key, model=student)
        counts = batch["counts"] & (jnp.arange(tokens_of(rows).shape[1]) >= prompt)
        if isinstance(rows, Mapping) and "segments" in rows:
            segments = jnp.asarray(rows["segments"])
            counts &= segments == segments[:, prompt - 1 : prompt]
        return {**batch, "counts": counts, "weight": token_weight(batch["image"], counts)}

    options: dict[str, Any] = {"key": None, "step": jnp.int32(0)}
    on_data, on_own = figure(0), figure(1)
    return {
        "on_data": score(student, on_data, **options)[0],
        "on_own": score(student, on_own, **options)[0],
        "own_loss": truth(teacher, on_own, **options)[0],
    }

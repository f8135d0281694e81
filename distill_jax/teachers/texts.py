"""Stores for language models: one label per token, and texts that a teacher writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_function, is_key
from distill_jax._model import PyTree, example_count
from distill_jax.teachers._ids import as_ids
from distill_jax.teachers.kinds import Kind, Logits, Tokens
from distill_jax.teachers.store import LabelStore, fingerprint, write_labels


def token_ids(ids: ArrayLike, length: int) -> np.ndarray:
    """Computes the ids of the tokens of rows, by which a store keeps one label per token.

    Args:
      ids: the ids of the rows, integers ``[...]``.
      length: the number of tokens of a row.

    Returns:
      int64 ``[..., length]``: id · length + position.

    Raises:
      ValueError: if the ids are no integers, ``length`` is not positive, or an id of a token would not fit.

    >>> print(token_ids([7, 2], 3))
    [[21 22 23]
     [ 6  7  8]]
    """
    check_count("length", length)
    rows = as_ids(ids)
    least, most = -(2**63) // length + 1, 2**63 // length - 1
    if rows.size and not least <= rows.min() <= rows.max() <= most:
        raise ValueError(
            f"ids times the length {length} must fit into 64 bits, got ids from {rows.min()} to {rows.max()}"
        )
    return rows[..., None] * length + np.arange(length)


def write_token_labels(
    path: str | Path,
    ids: ArrayLike,
    outputs: Callable[[np.ndarray], PyTree],
    *,
    length: int,
    fingerprint: Mapping[str, str],
    kind: Kind = Logits(),  # noqa: B008
    dtype: str = "float32",
    shard_rows: int = 64,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> LabelStore:
    """Writes a store with one label per token, or completes one whose writing was interrupted.

    The labels of rows are read by ``store[token_ids(ids, length)]``, ``[rows, length, ...]``: as the
    ``batch["teacher"]`` of :func:`distill_jax.train.distill_tokens`. ``store.bytes_per_label`` are the bytes per token.

    Args:
      path: the directory, which is created if it does not exist.
      ids: the ids of the rows, integers ``[n]``, without repetition.
      outputs: ``positions -> outputs [len(positions), length, ...]`` of the teacher, where position i means the row
        ``ids[i]``: logits, or what ``kind`` says.
      length: the number of tokens of a row.
      fingerprint: as in :func:`write_labels`.
      kind: as in :func:`write_labels`.
      dtype: as in :func:`write_labels`.
      shard_rows: the number of rows per file, which is the number of rows that ``outputs`` gets.
      progress: called after each file with the number of tokens that have labels and the number of all.

    Returns:
      The opened store, whose examples are tokens.

    Raises:
      ValueError: if outputs have not one entry per token, or for the reasons of :func:`write_labels`.
      OSError: if the disk is full or cannot be written.
    """
    check_function("outputs", outputs, "positions")
    check_count("shard_rows", shard_rows)

    def of_tokens(positions: np.ndarray) -> PyTree:
        rows = positions[::length] // length  # a file holds whole rows
        made = jax.tree.map(np.asarray, outputs(rows))
        for array in jax.tree.leaves(made):
            if array.shape[:2] != (len(rows), length):
                raise ValueError(
                    f"outputs must be [{len(rows)}, {length}, ...], one entry per token, got {array.shape}"
                )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), made)

    return write_labels(
        path, token_ids(ids, length).ravel(), of_tokens, fingerprint=fingerprint, kind=kind, dtype=dtype,
        shard_rows=shard_rows * length, progress=progress,
    )  # fmt: skip


def write_samples(
    path: str | Path,
    prompts: PyTree,
    sampler: Callable[..., Mapping[str, jax.Array]],
    *,
    vocabulary: int,
    fingerprint: Mapping[str, str],
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> LabelStore:
    """Writes a store of texts that a teacher makes of prompts, or completes one whose writing was interrupted.

    The texts are those of sequence-level distillation. Each batch has its own file and its own random key, made of
    ``seed`` and the number of its first prompt. So an interruption loses at most one batch, and the store ends with the
    same bytes as without it.

    Args:
      path: the directory, which is created if it does not exist.
      prompts: an array or a pytree of arrays ``[n, ...]``, such as tokens or the dict that a transformer takes.
      sampler: ``(prompts, *, key) -> texts``, a dict with ``"tokens"`` and ``"segments"``, integers
        ``[batch, length]``. ``functools.partial(models.generate, teacher, length=64)`` is one.
      vocabulary: the number of tokens that there are.
      fingerprint: names → strings that say what the texts depend on: the teacher, and how it is sampled. Entries
        ``"prompts"``, ``"seed"`` and ``"sampler"`` are added; the last has those keywords of a ``functools.partial``
        that are numbers, strings or tuples, such as ``length`` and ``temperature``.
      seed: the seed of all draws, from 0.
      batch_size: the number of prompts that are continued at once. The draws depend on it.
      progress: called after each batch with the number of texts written and the number of all.

    Returns:
      The opened store. ``store[ids]`` gives the texts of the prompts ``ids``, from 0 to n − 1, as a dict of
      ``"tokens"`` and ``"segments"``, int32 ``[len(ids), length]``.

    Raises:
      ValueError: if an argument is not of that form, or for the reasons of :func:`write_labels`.
      OSError: if the disk is full or cannot be written.

    References:
      Kim, Rush, `Sequence-Level Knowledge Distillation`, 2016, §3.2.
    """
    check_function("sampler", sampler, "prompts, *, key")
    check_count("seed", seed, least=0)
    check_count("batch_size", batch_size)
    prompts = jax.tree.map(np.asarray, prompts)
    count = example_count("prompts", prompts)

    def outputs(positions: np.ndarray) -> PyTree:
        rows = np.resize(positions, min(batch_size, count))  # the last batch is filled up, and compiled once
        key = jax.random.fold_in(jax.random.key(seed), int(positions[0]))
        made = sampler(jax.tree.map(lambda x: x[rows], prompts), key=key)
        if not isinstance(made, Mapping) or not {"tokens", "segments"} <= made.keys():
            raise ValueError(
                f"sampler must return a dict with 'tokens' and 'segments', got {type(made).__name__}"
                + (f" with {sorted(made)}" if isinstance(made, Mapping) else "")
            )
        if len(made["tokens"]) != len(rows):
            raise ValueError(
                f"sampler must return one text for each of {len(rows)} prompts, got {len(made['tokens'])}: give a "
                "prompt as often as it is to be continued"
            )
        return {name: np.asarray(made[name])[: len(positions)] for name in ("tokens", "segments")}

    options = getattr(sampler, "keywords", {})
    known = {}
    for name in sorted(options):
        value = options[name]
        if isinstance(value, np.generic | np.ndarray | jax.Array) and not value.ndim and not is_key(value):
            value = value.item()  # a number, though not one of Python's
        if isinstance(value, int | float | str | tuple):
            known[name] = value
    described = {**fingerprint, "prompts": _fingerprint(prompts), "seed": str(seed), "sampler": str(known)}
    return write_labels(
        path, np.arange(count), outputs, fingerprint=described, kind=Tokens(vocabulary), shard_rows=batch_size,
        progress=progress,
    )  # fmt: skip


_fingerprint = fingerprint  # an argument of write_samples has that name

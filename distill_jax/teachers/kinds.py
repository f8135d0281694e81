"""Kinds of labels: what is kept of a teacher's outputs, and what is read back.

- :class:`Logits`: all of them.
- :class:`Top`: the k likeliest classes, and one class, OTHER, for the rest.
- :class:`Sampled`: classes that are drawn from the teacher's distribution, an unbiased estimate of it.
- :class:`Hidden`: the inputs of the teacher's last layer, from which its logits are computed when they are read.
- :class:`Features`: logits and captured features.
- :class:`Tokens`: texts that the teacher has written.

A kind is an argument of :func:`distill_jax.teachers.write_labels`. By itself it turns outputs into the arrays that are
stored or sent (``encode``), and these into labels (``decode``), without any file.
"""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from distill_jax._checks import check_count, check_integers, check_positive, check_real
from distill_jax._model import PyTree, padded_batches
from distill_jax.losses.tokens import TopK, top_k
from distill_jax.teachers._encoding import as_array, as_logits, cast, narrowest, wide
from distill_jax.teachers._ids import DRAWS, as_ids, check_seed, fold_view, keys_of
from distill_jax.teachers._label_files import check_dtype

__all__ = ["Features", "Hidden", "Kind", "Logits", "Sampled", "Tokens", "Top"]

PART = 2**22  # the number of logits that are worked on at once


class Kind(abc.ABC):
    """What is kept of a teacher's outputs: the class of all kinds, which are those of this module."""

    def encode(
        self, outputs: PyTree, *, dtype: str = "float32", ids: ArrayLike | None = None, view: int = 0
    ) -> dict[str, np.ndarray]:
        """Computes what is stored of a teacher's outputs.

        Args:
          outputs: logits ``[n, classes]``, or what the kind says. A class that is masked has the logit −∞.
          dtype: the dtype of floating-point numbers: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Ids of classes
            and counts have the narrowest of ``uint8``, ``uint16`` and ``uint32``.
          ids: the ids of the examples, integers ``[n]``, from which the draws of :class:`Sampled` follow.
          view: the number of the view, see :class:`distill_jax.teachers.Views`.

        Returns:
          name → array ``[n, ...]``.

        Raises:
          ValueError: if outputs have the wrong shape, are no real numbers, are NaN, overflow ``dtype``, or are −∞ for
            all classes.

        Warns:
          UserWarning: if logits seem to be probabilities.
        """
        check_dtype(dtype)
        return self._encode(outputs, dtype, None if ids is None else as_ids(ids), view)

    @abc.abstractmethod
    def decode(self, arrays: Mapping[str, np.ndarray]) -> PyTree:
        """Computes labels from what is stored.

        Args:
          arrays: as ``encode`` makes them, with any leading axes in the place of ``n``.

        Returns:
          The labels, a pytree of NumPy arrays with the same leading axes. Floating-point numbers are float32.
        """

    def described(self) -> dict[str, Any]:
        """Describes the kind by its name and its numbers."""
        return {"kind": type(self).__name__.lower(), **dataclasses.asdict(self)}  # type: ignore[call-overload]

    def head(self) -> bytes:
        """Returns what is stored once for all labels: nothing, but for :class:`Hidden`."""
        return b""

    def count_classes(self, outputs: PyTree) -> int | None:
        """Counts the classes of a teacher's outputs; None where they have none."""
        return np.shape(outputs)[-1]

    @abc.abstractmethod
    def _encode(
        self, outputs: PyTree, dtype: str, ids: np.ndarray | None, view: int
    ) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Logits(Kind):
    """All logits: they serve any loss at any temperature. Read back as float32 ``[..., classes]``."""

    def _encode(self, outputs, dtype, ids, view):
        return {"logits": cast("logits", as_logits(outputs, ids), dtype, masked=True)}

    def decode(self, arrays: Mapping[str, np.ndarray]) -> PyTree:  # noqa: D102
        return wide(arrays["logits"])


@dataclasses.dataclass(frozen=True)
class Top(Kind):
    """The k likeliest classes with their log-probabilities, and OTHER, all other classes together.

    Read back as :class:`distill_jax.losses.tokens.TopK`: labels for :func:`distill_jax.losses.tokens.bucketed`.

    Attributes:
      k: the number of classes that are kept.
      temperature: T > 0, the temperature of the labels, at which alone they are valid.
    """

    k: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_count("k", self.k)
        _set_temperature(self)

    def _encode(self, outputs, dtype, ids, view):
        logits = cast("logits", as_logits(outputs, ids), "float32", masked=True)
        classes = logits.shape[1]
        if self.k > classes:
            raise ValueError(f"k must lie in [1, {classes}], the number of classes, got {self.k}")
        indices, log_probs = [], []
        for batch, counted in padded_batches(logits, max(1, PART // classes)):
            labels = _top_k(batch, self.k, self.temperature)
            indices.append(np.asarray(labels.indices)[: counted.sum()])
            log_probs.append(np.asarray(labels.log_probs)[: counted.sum()])
        return {
            "indices": np.concatenate(indices).astype(narrowest(classes - 1)),
            "log_probs": cast("log-probabilities", np.concatenate(log_probs), dtype, masked=True),
        }

    def decode(self, arrays: Mapping[str, np.ndarray]) -> TopK:  # noqa: D102
        indices: Any = arrays["indices"].astype(np.int32)
        log_probs: Any = wide(arrays["log_probs"])
        return TopK(indices, log_probs, self.temperature)


@functools.partial(jax.jit, static_argnums=1)
def _top_k(logits: jax.Array, k: int, temperature: jax.Array) -> TopK:
    return top_k(logits, k, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class Sampled(Kind):
    """Classes drawn from the teacher's distribution softmax(z/T), with the number of times each was drawn.

    Their shares of the draws are an unbiased estimate of the distribution. So :func:`soft_cross_entropy
    <distill_jax.losses.soft_cross_entropy>` and its gradient are, in the mean over draws, those of all logits. (So is
    the gradient of :func:`kl <distill_jax.losses.kl>`; its value is larger, since the draws have less entropy.)

    Read back as :class:`distill_jax.losses.tokens.TopK` in which OTHER has probability 0: labels for
    :func:`distill_jax.losses.tokens.bucketed`. Where draws are fewer than classes, each label has as many places as
    draws, and places without a class of their own have probability 0.

    Attributes:
      draws: the number of draws per example.
      temperature: T > 0, the temperature of the labels, at which alone they are valid.
      seed: the seed of the draws, from 0 to 2³² − 1. They depend on it, the example's id and the view alone.

    References:
      Anshumann et al., `Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs`, 2025 (arXiv 2503.16870):
      random sampling KD, with the teacher itself as the proposal.
    """

    draws: int
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("draws", self.draws)
        check_seed(self.seed)
        _set_temperature(self)

    def _encode(self, outputs, dtype, ids, view):
        logits = cast("logits", as_logits(outputs, ids), "float32", masked=True)
        if ids is None:
            raise ValueError("ids must be given, since the draws follow from them, got None")
        keys = fold_view(keys_of(self.seed, DRAWS, ids), np.uint32(view))
        part = max(1, PART // max(logits.shape[1], self.draws))
        counted = [
            self._count(
                logits[i : i + part], (np.asarray(_bits(keys[i : i + part], self.draws)) + 0.5) / 2**32
            )
            for i in range(0, len(logits), part)
        ]
        return {name: np.concatenate([arrays[name] for arrays in counted]) for name in counted[0]}

    def _count(self, logits: np.ndarray, uniform: np.ndarray) -> dict[str, np.ndarray]:
        """Turns uniform numbers in (0, 1), float64 ``[n, draws]``, into draws of classes, and counts these."""
        classes = logits.shape[1]
        z = logits.astype(np.float64) / self.temperature
        cumulated = np.cumsum(np.exp(z - z.max(-1, keepdims=True)), -1)
        cumulated /= cumulated[:, -1:]
        rows = np.arange(len(z))[:, None]  # row i is moved to (i, i + 1), so that one search serves all rows
        drawn = np.searchsorted((cumulated + rows).ravel(), uniform + rows, "right")
        counts = np.bincount(drawn.ravel(), minlength=z.size).reshape(z.shape)
        if self.draws >= classes:
            return {"counts": counts.astype(narrowest(self.draws))}
        indices = np.argsort(-counts, -1, "stable")[:, : self.draws]  # then classes that were not drawn
        counts = np.take_along_axis(counts, indices, -1)
        return {
            "indices": indices.astype(narrowest(classes - 1)),
            "counts": counts.astype(narrowest(self.draws)),
        }

    def decode(self, arrays: Mapping[str, np.ndarray]) -> TopK:  # noqa: D102
        counts: Any = arrays["counts"]
        indices: Any = arrays.get("indices", np.arange(counts.shape[-1]))
        with np.errstate(divide="ignore"):
            log_probs: Any = np.log(wide(counts) / np.float32(self.draws))
        log_probs = np.append(log_probs, np.full_like(log_probs[..., :1], -np.inf), -1)
        indices = np.broadcast_to(indices.astype(np.int32), counts.shape)
        return TopK(indices, log_probs, self.temperature)


@functools.partial(jax.jit, static_argnums=1)
def _bits(keys: jax.Array, draws: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.bits(key, (draws,), np.uint32))(keys)


@dataclasses.dataclass(frozen=True, eq=False)
class Hidden(Kind):
    """The inputs of the teacher's last layer. That layer, its *head*, is stored once.

    The teacher's outputs are then its hidden states ``[n, hidden]``. Read back as logits, float32 ``[..., classes]``,
    which are computed for what is asked for. It takes less space than logits where hidden < classes.

    Attributes:
      kernel: ``[hidden, classes]``: logits = hidden @ kernel + bias. Stored in float32.
      bias: ``[classes]``; 0 by default.
    """

    kernel: ArrayLike
    bias: ArrayLike | None = None

    def __post_init__(self) -> None:
        check_real("kernel", self.kernel)
        kernel = np.asarray(self.kernel, np.float32)
        if kernel.ndim != 2 or not kernel.size:
            raise ValueError(f"kernel must have shape [hidden, classes], got {kernel.shape}")
        bias = np.zeros(kernel.shape[1], np.float32) if self.bias is None else self.bias
        check_real("bias", bias)
        bias = np.asarray(bias, np.float32)
        if bias.shape != kernel.shape[1:]:
            raise ValueError(
                f"bias must have shape {kernel.shape[1:]}, one number per class, got {bias.shape}"
            )
        if not (np.isfinite(kernel).all() and np.isfinite(bias).all()):
            raise ValueError("kernel and bias must be finite, got NaN or infinite numbers: check the teacher")
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "bias", bias)

    def described(self) -> dict[str, Any]:  # noqa: D102
        head = hashlib.sha256(self.head()).hexdigest()
        return {"kind": "hidden", "head": head, "head_shape": list(np.shape(self.kernel))}

    def head(self) -> bytes:  # noqa: D102
        return np.asarray(self.kernel).tobytes() + np.asarray(self.bias).tobytes()

    def count_classes(self, outputs: PyTree) -> int:  # noqa: D102
        return np.shape(self.kernel)[1]

    def _encode(self, outputs, dtype, ids, view):
        width = np.shape(self.kernel)[0]
        hidden = as_array("hidden states", outputs, ids, str(width))
        if hidden.shape[1] != width:
            raise ValueError(
                f"hidden states must have {width} numbers, as the kernel has rows, got {hidden.shape[1]}"
            )
        return {"hidden": cast("hidden states", hidden, dtype)}

    def decode(self, arrays: Mapping[str, np.ndarray]) -> PyTree:  # noqa: D102
        return wide(arrays["hidden"]) @ np.asarray(self.kernel) + np.asarray(self.bias)


@dataclasses.dataclass(frozen=True)
class Features(Kind):
    """Logits and captured features.

    The teacher's outputs are those of a captured model (:func:`distill_jax.features.capture`), a pair of logits
    ``[n, classes]`` and a dict of arrays ``[n, ...]``; or the dict that is read back,
    ``{"logits": ..., "features": {name: ...}}``, with logits or without.
    """

    def _encode(self, outputs, dtype, ids, view):
        outputs = _captured(outputs)
        arrays = Logits()._encode(outputs["logits"], dtype, ids, view) if "logits" in outputs else {}
        for name, values in outputs["features"].items():
            values = as_array(f"features {name!r}", values, ids)
            arrays[f"features/{name}"] = cast(f"features {name!r}", values, dtype)
        return arrays

    def decode(self, arrays: Mapping[str, np.ndarray]) -> PyTree:  # noqa: D102
        read = {name: wide(array) for name, array in arrays.items()}
        logits = {"logits": read.pop("logits")} if "logits" in read else {}
        return {**logits, "features": {name.removeprefix("features/"): x for name, x in read.items()}}

    def count_classes(self, outputs: PyTree) -> int | None:  # noqa: D102
        logits = _captured(outputs).get("logits")
        return None if logits is None else np.shape(logits)[-1]


@dataclasses.dataclass(frozen=True)
class Tokens(Kind):
    """Texts that the teacher has written: the labels of sequence-level distillation.

    The teacher's outputs are a dict of ``"tokens"`` and ``"segments"``, integers ``[n, length]``, as
    :func:`distill_jax.models.generate` makes it. Read back as this dict, int32.

    Attributes:
      vocabulary: the number of tokens that there are, which says how narrow a stored token is.
    """

    vocabulary: int

    def __post_init__(self) -> None:
        check_count("vocabulary", self.vocabulary)

    def _encode(self, outputs, dtype, ids, view):
        if not isinstance(outputs, Mapping) or not {"tokens", "segments"} <= outputs.keys():
            raise ValueError(f"outputs must be a dict of tokens and segments, got {type(outputs).__name__}")
        arrays = {}
        for name in ("tokens", "segments"):
            check_integers(name, outputs[name])
            array = as_array(name, outputs[name], ids, "length")
            most = self.vocabulary - 1 if name == "tokens" else array.shape[1]
            if array.min() < 0 or array.max() > most:
                raise ValueError(f"{name} must lie in [0, {most}], got {array.min()} to {array.max()}")
            arrays[name] = array.astype(narrowest(most))
        return arrays

    def decode(self, arrays: Mapping[str, np.ndarray]) -> PyTree:  # noqa: D102
        return {name: array.astype(np.int32) for name, array in arrays.items()}

    def count_classes(self, outputs: PyTree) -> int:  # noqa: D102
        return self.vocabulary


KINDS = (Logits, Top, Sampled, Hidden, Features, Tokens)


def kind_of(described: Mapping[str, Any], head: bytes) -> Kind:
    """Makes the kind that a store describes: the reverse of :meth:`Kind.described`."""
    name = described["kind"]
    if name == "hidden":
        weights, (hidden, classes) = np.frombuffer(head, np.float32), described["head_shape"]
        return Hidden(weights[: hidden * classes].reshape(hidden, classes), weights[hidden * classes :])
    kind = next(kind for kind in KINDS if kind.__name__.lower() == name)
    return kind(**{field.name: described[field.name] for field in dataclasses.fields(kind)})


def _captured(outputs: PyTree) -> Mapping[str, Any]:
    if isinstance(outputs, tuple) and len(outputs) == 2:
        outputs = {"logits": outputs[0], "features": outputs[1]}
    fits = isinstance(outputs, Mapping) and outputs.keys() <= {"logits", "features"}
    if not fits or not isinstance(outputs.get("features"), Mapping) or not outputs["features"]:
        raise ValueError(
            "outputs must be a pair of logits and a dict of features, as a captured model gives, got "
            f"{type(outputs).__name__}"
        )
    return outputs


def _set_temperature(kind: Any) -> None:
    check_positive("temperature", kind.temperature)
    if np.ndim(kind.temperature):
        raise ValueError(f"temperature must be one number, got shape {np.shape(kind.temperature)}")
    object.__setattr__(kind, "temperature", float(kind.temperature))

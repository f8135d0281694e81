"""The best exported file within budgets of bytes, latency and quality."""

import math
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from distill_jax import _files, export
from distill_jax._checks import (
    BudgetError,
    check_at_most,
    check_choice,
    check_count,
    check_finite,
    check_fraction,
    check_function,
    check_mapping,
    check_positive,
    check_sequence,
    shown,
)
from distill_jax._model import Model, PyTree, check_inputs, check_model, example_count
from distill_jax.compress.search._kept import ORIGINAL, Kept, number, trained

Settings = Mapping[str, Any]  # what describes a candidate, such as {"width": 0.5, "bits": 8}
Aim = Literal["quality", "latency", "bytes"]


class Candidate(NamedTuple):
    """A network that was tried, and what its file measures.

    Attributes:
      name: its settings in words, such as ``"width=0.5,bits=8"``; or ``"original"``.
      settings: its settings.
      bytes: the size of its file.
      latency_ms: the median time of a call of its file, in milliseconds.
      quality: its quality after the last round in which it was trained; −∞ if it was not trained, or if its
        quality is not a number.
      epochs: the number of epochs for which it was trained in all.
      path: its file, if it was trained to the end; else None. Its bytes and latency are then those of the file before
        the training.
      model: the network that is in this file; or None.
      measured: the result of :func:`distill_jax.export.latency`, as a model card takes it.
    """

    name: str
    settings: dict[str, Any]
    bytes: int
    latency_ms: float
    quality: float
    epochs: int
    path: Path | None
    model: Model | None
    measured: dict[str, Any]


class BestFile(NamedTuple):
    """The result of :func:`best_file`.

    Attributes:
      chosen: the file that was chosen.
      front: the Pareto front, from small to large. A file is left out if another one is at least as good in bytes,
        latency and quality, and better in one of them.
      candidates: all candidates that could be made, and the original, by name.
    """

    chosen: Candidate
    front: list[Candidate]
    candidates: dict[str, Candidate]


class _UnwritableError(ValueError):
    """A network cannot be written, or its file does not run."""


@dataclass(frozen=True)
class _Budgets:
    """What a file must keep to, and what it is chosen for."""

    aim: Aim
    most_bytes: float | None
    most_ms: float | None
    least_quality: float | None

    def __post_init__(self) -> None:
        check_choice("aim", self.aim, ("quality", "latency", "bytes"))
        for name in ("most_bytes", "most_ms"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value)
        if self.least_quality is not None:
            check_finite("least_quality", self.least_quality)
        if self.aim == "quality" and self.most_bytes is None and self.most_ms is None:
            raise ValueError(
                "aim: 'quality' needs most_bytes or most_ms, since the best network is mostly the largest: give one, "
                "or another aim"
            )
        if self.aim != "quality" and self.least_quality is None:
            raise ValueError(
                f"aim: {self.aim!r} needs least_quality, or the smallest network would be chosen whatever it computes"
            )

    def used(self, candidate: Candidate) -> float:
        """The share of the budgets of bytes and latency that a file takes: the larger of the two."""
        bytes_used = candidate.bytes / (self.most_bytes or math.inf)
        return max(bytes_used, candidate.latency_ms / (self.most_ms or math.inf))

    def reached(self, candidate: Candidate) -> bool:
        return self.least_quality is None or candidate.quality >= self.least_quality

    def rank(self, candidate: Candidate) -> tuple[float, ...]:
        """Sorts candidates: first those of enough quality, the best for the aim first; then the others by quality."""
        costs = candidate.bytes, candidate.latency_ms
        if not self.reached(candidate) or self.aim == "quality":
            return not self.reached(candidate), -candidate.quality, *costs
        return False, *(costs if self.aim == "bytes" else costs[::-1]), -candidate.quality

    def complaint(self, candidates: Sequence[Candidate]) -> BudgetError:
        """Says which budget none of the candidates keeps, and what the nearest one has."""
        limits: dict[str, tuple[str, bool]] = {}
        if self.most_bytes is not None:
            limits["most_bytes"] = (
                f"{self.most_bytes:,} bytes",
                min(c.bytes for c in candidates) > self.most_bytes,
            )
        if self.most_ms is not None:
            limits["most_ms"] = f"{self.most_ms:g} ms", min(c.latency_ms for c in candidates) > self.most_ms
        # Where each budget is kept by some file, none keeps all of them
        limits = {name: limit for name, limit in limits.items() if limit[1]} or limits
        fitting = [each for each in candidates if self.used(each) <= 1]
        nearest = min(fitting, key=self.rank) if fitting else min(candidates, key=self.used)
        has = f"that of {nearest.name!r} has {nearest.bytes:,} bytes and {nearest.latency_ms:.3g} ms"
        if not fitting:
            within = " and ".join(limit for limit, _ in limits.values())
            return BudgetError(
                f"{', '.join(limits)}: no file is within {within}; {has}: raise the budget, or give smaller candidates",
                *limits,
            )
        return BudgetError(
            f"least_quality: no trained file within the budgets reaches {self.least_quality:g}; {has}, and reaches "
            f"{nearest.quality:g}: ask for less, train longer, or give larger candidates",
            "least_quality",
        )


def best_file(
    model: Model,
    make: Callable[[Model, Settings], Model | None],
    candidates: Sequence[Settings],
    x: PyTree,
    *,
    tune: Callable[[Model, Settings, int], Model],
    quality: Callable[[Model], float],
    directory: str | Path,
    epochs: Sequence[int],
    finish: Callable[[Model, Settings], Model] | None = None,
    write: Callable[[Path, Model, PyTree], object] = export.stablehlo,
    suffix: str = ".model",
    aim: Aim = "quality",
    most_bytes: int | None = None,
    most_ms: float | None = None,
    least_quality: float | None = None,
    keep: float = 0.5,
    batch: int = 1,
    threads: int = 1,
    seconds: float = 0.5,
) -> BestFile:
    """Makes smaller networks, trains and exports them, and chooses by what the exported files measure.

    Each candidate is made, exported as it is, and measured in a fresh process. Bytes and latency hardly depend on
    the values of the weights, so what is over one of their budgets is not trained. The others are trained in rounds
    (successive halving): after each round the better part goes on. Those of the last round are exported
    and measured again, in files of their own in ``directory``; with them takes part the original, which is not trained.

    Everything that is found is kept in ``directory`` at once. The same call in a new process continues there, and a
    call with other budgets uses what is there. With another ``batch``, ``threads``, ``seconds`` or ``suffix``, files
    are written and measured again. Networks are made again, so ``make`` must give the same one each time.

    Args:
      model: the trained original.
      make: ``(model, settings) -> model``: makes the network that settings describe of the original, with fewer units
        (:mod:`distill_jax.compress.units`), blocks or ranks; or returns None where it cannot.
      candidates: the settings: dicts of numbers, strings, booleans or None. What the names mean is up to the functions.
      x: real inputs, on which exported files may be compared with their networks.
      tune: ``(model, settings, epochs) -> model``: trains a network for so many epochs, usually with the original as
        its teacher. It is called anew in each round, with the result of the round before. Shapes, dtypes and the
        model's function stay.
      quality: ``model -> number`` on data that nothing was trained on, the higher the better, such as an accuracy.
      directory: where networks and files are kept. Take a new directory whenever the functions or their data change.
      epochs: the number of epochs of each round.
      finish: ``(model, settings) -> model``: what becomes of a network before it is validated and exported, without
        training: :func:`distill_jax.compress.quantisation.quantise`, for example; or
        :func:`~distill_jax.compress.quantisation.freeze`, where ``make`` returns a network from
        :func:`~distill_jax.compress.quantisation.simulate`, which is rounded in training. None for nothing.
      write: ``(path, model, x)``: writes a file, such as :func:`distill_jax.export.onnx`, or either with
        some of its options set by ``functools.partial``.
      suffix: the end of the names of the files.
      aim: what is chosen of the files within the budgets: ``"quality"``, the one of the highest quality (of equal
        ones the smallest); ``"latency"``, the fastest; ``"bytes"``, the smallest.
      most_bytes: the largest file that may be chosen; or None.
      most_ms: the longest median time of a call, in milliseconds; or None. A file that takes longer is measured up to
        three times, and its fastest time counts, since other work on the machine makes calls longer.
      least_quality: the lowest quality that may be chosen; or None.
      keep: the share of the candidates that goes on to the next round, rounded up. Those of enough quality come
        first, in the order of the aim, then the others in the order of quality.
      batch: the number of examples per call for which latency is measured.
      threads: the number of threads that the runtime may use.
      seconds: how long each file is called.

    Returns:
      The chosen file, the Pareto front, and all candidates.

    Raises:
      ValueError: if no file keeps within the budgets of bytes and latency, which is found before anything is trained,
        or none of these reaches ``least_quality``: the nearest is named with what it has; if the original cannot be
        written, for example since its evaluation is random or changes its state, or no candidate can; if functions do
        not return what is said above, two candidates have the same name, no budget is given that the aim needs, or the
        directory holds another search.

    Warns:
      UserWarning: if a candidate cannot be written, for what reason; it is left out.
    """
    check_model("model", model)
    check_inputs("x", x)
    functions: dict[str, tuple[object, str]] = {
        "make": (make, "model, settings"),
        "tune": (tune, "model, settings, epochs"),
        "quality": (quality, "model"),
        "write": (write, "path, model, x"),
    }
    if finish is not None:
        functions["finish"] = (finish, "model, settings")
    for name, (function, arguments) in functions.items():
        check_function(name, function, arguments)
    named = _named(candidates)
    check_sequence("epochs", epochs, "numbers of epochs, one for each round")
    if not len(epochs):
        raise ValueError("epochs must be a number of epochs for each round, got none")
    for count in epochs:
        check_count("epochs", count)
    check_fraction("keep", keep, without=0)
    check_count("batch", batch)
    check_at_most("batch", batch, example_count("x", x))
    if not isinstance(suffix, str) or not re.fullmatch(r"(\.\w+)+", suffix):
        raise ValueError(f"suffix must be the end of a file's name, such as '.onnx', got {shown(suffix)}")
    budgets = _Budgets(aim, most_bytes, most_ms, least_quality)
    check_count("threads", threads)
    check_positive("seconds", seconds)
    first = jax.tree.map(lambda leaf: leaf[:batch], x)
    # Figures hold for these; taken otherwise, they are taken again
    under = {"batch": int(batch), "threads": int(threads), "seconds": float(seconds), "suffix": suffix}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Kept] = {}

    def finished(name: str) -> Model:
        of = kept[name].model
        return of if finish is None or name == ORIGINAL else finish(of, named[name])

    def path_of(name: str) -> Path:
        return directory / f"{name}{suffix}"

    def measured(name: str, path: Path) -> dict[str, Any]:
        of = finished(name)
        try:
            write(path, of, x)
            runs = [export.latency(path, first, threads=threads, seconds=seconds)]
            limit = most_ms or math.inf
            while len(runs) < 3 and runs[-1]["latency_ms"] > limit:  # other work may have slowed it
                runs.append(export.latency(path, first, threads=threads, seconds=seconds))
            return {"under": under, "found": min(runs, key=lambda run: run["latency_ms"])}
        except ValueError as error:
            raise _UnwritableError(f"write, for {name!r}: {error}") from error

    def validated(name: str) -> float:
        value = number("quality", quality(finished(name)), name)
        return -math.inf if math.isnan(value) else value  # its training has diverged

    def known(name: str, what: str) -> bool:
        return kept[name].info.get(what, {}).get("under") == under

    def write_out(name: str) -> None:
        if not known(name, "file") or not path_of(name).exists():
            kept[name].add(kept[name].model, file=measured(name, path_of(name)))

    def check_rounds(name: str) -> None:
        """Refuses a network that was trained otherwise, or longer: the others would not be trained as long."""
        asked, done = [*map(int, epochs)], [each["epochs"] for each in kept[name].info.get("rounds", [])]
        if done != asked[: len(done)]:
            raise ValueError(
                f"directory: {directory} holds another search, in which {name!r} was trained in rounds of {done} "
                f"epochs, not {asked}: give another directory"
            )

    def draft(name: str) -> None:
        """Measures the file of a network, usually before it is trained."""
        if not known(name, "draft"):
            with tempfile.TemporaryDirectory() as temporary:
                found = measured(name, Path(temporary) / path_of(name).name)
            kept[name].add(kept[name].model, draft=found, rounds=kept[name].info.get("rounds", []))

    def train_round(name: str, place: int) -> None:
        rounds, count = kept[name].info["rounds"], int(epochs[place])
        if len(rounds) == place:
            model = trained("tune", lambda model: tune(model, named[name], count), kept[name].model)
            rounds = [*rounds, {"epochs": count}]
            kept[name].info.pop("file", None)  # that of the network before this round
            kept[name].add(model, rounds=rounds)
        if "quality" not in rounds[place]:
            done = {"epochs": count, "quality": validated(name)}
            kept[name].add(kept[name].model, rounds=[*rounds[:place], done])

    def candidate(name: str, place: int = 0, *, whole: bool = False) -> Candidate:
        """Says what is known of a network, up to a round; or all of it, with its file."""
        info = kept[name].info
        found = info["file" if whole else "draft"]["found"]
        rounds = info["rounds"] if whole else info["rounds"][:place]
        return Candidate(
            name=name,
            settings=dict(named.get(name, {})),
            bytes=found["bytes"],
            latency_ms=found["latency_ms"],
            quality=rounds[-1]["quality"] if rounds else -math.inf,
            epochs=sum(each["epochs"] for each in rounds),
            path=path_of(name) if whole else None,
            model=finished(name) if whole else None,
            measured=found,
        )

    with _files.locked(directory):
        kept[ORIGINAL] = Kept(directory, ORIGINAL, model)
        write_out(ORIGINAL)
        if "rounds" not in kept[ORIGINAL].info:
            kept[ORIGINAL].add(model, rounds=[{"epochs": 0, "quality": validated(ORIGINAL)}])
        for name, settings in named.items():
            if (made := make(model, settings)) is not None:
                check_model(f"what make returns for {name!r}", made)
                kept[name] = Kept(directory, name, made)
                check_rounds(name)
                try:
                    draft(name)
                except _UnwritableError as error:
                    warnings.warn(f"{error} (this candidate is left out)", stacklevel=2)
                    del kept[name]
        if len(kept) == 1:
            raise ValueError(
                "candidates: none of them could be made and written: see the warnings, or give others"
            )
        found = {name: candidate(name, whole=name == ORIGINAL) for name in kept}
        if not any(budgets.used(each) <= 1 for each in found.values()):
            raise budgets.complaint([*found.values()])
        going = [name for name, each in found.items() if name != ORIGINAL and budgets.used(each) <= 1]
        for place in range(len(epochs)):
            if place:
                going.sort(key=lambda name: budgets.rank(found[name]))
                del going[math.ceil(keep * len(going) - 1e-9) :]
            for name in going:
                train_round(name, place)
                found[name] = candidate(name, place + 1)
        for name in going:
            write_out(name)
            found[name] = candidate(name, whole=True)
    files = [found[ORIGINAL], *(found[name] for name in going)]
    chosen = [each for each in files if budgets.used(each) <= 1 and budgets.reached(each)]
    if not chosen:
        raise budgets.complaint(files)
    return BestFile(min(chosen, key=budgets.rank), _front(files), found)


def _named(candidates: Sequence[Settings]) -> dict[str, Settings]:
    """Gives each candidate its name, which is also that of its folder."""
    check_sequence("candidates", candidates, "dicts of settings")
    named: dict[str, Settings] = {}
    for settings in candidates:
        check_mapping("each of candidates", settings, "name → value")
        name = ",".join(f"{key}={value}" for key, value in settings.items())
        if not re.fullmatch(r"\w[\w=.,+-]*", name) or name in (ORIGINAL, *named):
            raise ValueError(
                f"candidates: each must have settings of its own, of letters, digits, '_', '.', '+' and '-', as they "
                f"become the name of a file, got {shown(dict(settings))}"
            )
        named[name] = settings
    if not named:
        raise ValueError("candidates must be dicts of settings, at least one, got none")
    return named


def _front(files: Sequence[Candidate]) -> list[Candidate]:
    """Returns the Pareto front: the files that no other one beats in one respect without being worse in another."""
    points = [(each.bytes, each.latency_ms, -each.quality) for each in files]

    def surpassed(point: tuple[float, ...]) -> bool:
        return any(o != point and all(a <= b for a, b in zip(o, point, strict=True)) for o in points)

    front = [each for each, point in zip(files, points, strict=True) if not surpassed(point)]
    return sorted(front, key=lambda each: each.bytes)

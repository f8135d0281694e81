"""The smallest network within a budget of loss."""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from distill_jax._checks import (
    check_count,
    check_fraction,
    check_function,
    check_mapping,
    check_not_negative,
    check_real,
    check_sequence,
)
from distill_jax._model import Model, check_model
from distill_jax.compress.search._kept import ORIGINAL, Kept, number, trained


class Edit(NamedTuple):
    """A smaller network that is to be made.

    Attributes:
      name: its name, such as ``"prune, iterative 0.18"``.
      operator: the name of the operator that makes it, such as ``"prune"``.
      share: the share of the original's units that shall stay, between 0 and 1.
      start: the name of the network from which it is made: ``"original"``, or an earlier trial.
    """

    name: str
    operator: str
    share: float
    start: str

    @property
    def iterative(self) -> bool:
        """Whether it is made from a network that is already smaller than the original."""
        return self.start != ORIGINAL


class Trial(NamedTuple):
    """A smaller network that was made.

    Attributes:
      edit: what was done.
      loss: its validation loss after fine-tuning.
      size: its size, such as the number of parameters.
    """

    edit: Edit
    loss: float
    size: float


class Found(NamedTuple):
    """The result of :func:`find_smallest`.

    Attributes:
      chosen: the name of the smallest network within the budget; ``"original"`` if no smaller one is.
      trials: all networks that were tried, by name, in their order.
    """

    chosen: str
    trials: dict[str, Trial]


# Makes a network, fine-tunes it, and returns its validation loss and its size
Attempt = Callable[[Edit], tuple[float, float]]


def find_smallest(
    attempt: Attempt,
    original: tuple[float, float],
    *,
    operators: Sequence[str],
    shares: Sequence[float],
    budget: float,
    iterative: Sequence[str] = (),
    refinements: int = 0,
    baselines: Sequence[str] = (),
) -> Found:
    """Tries a grid of edits, refines it where the budget ends, and chooses the smallest network within it.

    First each operator is applied to the original at each share. Then each iterative operator is applied
    step by step, to the network that it made at the share before. Each refinement looks at the smallest
    network within the budget so far, and tries a share between it and the next smaller one of the same
    operator, at the geometric mean of both. In the end each baseline is tried at the share of the chosen
    network.

    Args:
      attempt: ``edit -> (loss, size)``: makes, fine-tunes and validates a network. It is called once for
        each name.
      original: the validation loss and the size of the original.
      operators: the names of the operators, baselines included.
      shares: the shares of units of the grid, falling, between 0 and 1.
      budget: by how much the loss may exceed that of the original.
      iterative: the operators that are also applied step by step.
      refinements: number of further shares.
      baselines: operators that use nothing of the original, such as training from random weights. They are
        tried for comparison and never chosen.

    Returns:
      The chosen network, and all trials. Of networks of equal size the one with the lower loss is chosen.

    Raises:
      ValueError: if an argument is not what is said above: if all operators are baselines, a baseline is
        not among the operators, ``shares`` do not fall between 1 and 0, or an iterative
        operator is a baseline; if ``attempt`` does not return a loss and a size.

    >>> def attempt(edit):
    ...     return 1 / edit.share, 100 * edit.share
    >>> find_smallest(
    ...     attempt, (1.0, 100.0), operators=["prune"], shares=[0.5, 0.25], budget=2.0, refinements=1
    ... ).trials.keys()
    dict_keys(['prune 0.5', 'prune 0.25', 'prune 0.354'])
    """
    check_function("attempt", attempt, "edit")
    for name, value in {"operators": operators, "iterative": iterative, "baselines": baselines}.items():
        check_sequence(name, value, "names")
        if len(set(value)) < len(value):
            raise ValueError(f"{name} must be different names, got {list(value)}")
    check_sequence("shares", shares, "shares")
    for share in shares:
        check_fraction("shares", share)
    check_count("refinements", refinements, least=0)
    _check_budget(original, budget)
    real = [name for name in operators if name not in baselines]
    falling = [1.0, *shares, 0.0]
    if not real or not len(shares) or any(a <= b for a, b in itertools.pairwise(falling)):
        raise ValueError(
            "operators and shares: expected an operator that is no baseline, and shares that fall between 1 and 0, got "
            f"{list(operators)} and {list(shares)}"
        )
    if wrong := [name for name in baselines if name not in operators]:
        raise ValueError(f"baselines: {wrong} are not among the operators, {list(operators)}")
    if wrong := [name for name in iterative if name in baselines]:
        raise ValueError(f"iterative: {wrong} are baselines, which use nothing of the network before")
    trials: dict[str, Trial] = {}

    def run(operator: str, share: float, start: str = ORIGINAL) -> str:
        kind = "" if start == ORIGINAL else ", iterative"
        name = f"{operator}{kind} {share:.3g}"
        if name in trials and trials[name].edit.share != share:
            name = f"{operator}{kind} {share!r}"  # three digits do not tell two shares apart
        if name not in trials:
            edit = Edit(name, operator, share, start)
            found = attempt(edit)
            if not isinstance(found, Sequence) or len(found) != 2 or not float(found[1]) >= 0:
                raise ValueError(f"attempt must return the loss and the size of the network, got {found!r}")
            trials[name] = Trial(edit, *found)
        return name

    def chosen() -> str:
        return smallest_within(trials, original, budget, baselines=baselines)

    for operator in operators:
        for share in shares:
            run(operator, share)
    for operator in iterative:
        start = run(operator, shares[0])
        for share in shares[1:]:
            start = run(operator, share, start)
    for _ in range(refinements):
        best = chosen()
        edit = trials[best].edit if best in trials else Edit(ORIGINAL, real[0], 1.0, ORIGINAL)
        series = [t.edit for t in trials.values() if t.edit.operator == edit.operator]
        smaller = [e.share for e in series if e.iterative == edit.iterative and e.share < edit.share]
        if not smaller:
            break
        run(edit.operator, (edit.share * max(smaller)) ** 0.5, best if edit.iterative else ORIGINAL)
    best = chosen()
    for operator in baselines if best in trials else ():
        run(operator, trials[best].edit.share)
    return Found(best, trials)


# Makes a model smaller: (the model, the share of its units, parameters or blocks that shall stay) -> a model, or
# None where it cannot
Operator = Callable[[Model, float], Model | None]


class Smallest(NamedTuple):
    """The result of :func:`smallest_model`.

    Attributes:
      model: the chosen model, after training; the original if no smaller one is within the budget.
      chosen: its name; ``"original"`` if no smaller one is within the budget.
      trials: all models that were tried, by name, in their order.
      models: the models that could be made, after training, and the original.
    """

    model: Model
    chosen: str
    trials: dict[str, Trial]
    models: dict[str, Model]


def number_of_parameters(model: Model) -> int:
    """Counts the single weights of a model."""
    return sum(np.size(leaf) for leaf in jax.tree.leaves(model.params))


def smallest_model(
    model: Model,
    operators: Mapping[str, Operator],
    *,
    fine_tune: Callable[[Model], Model],
    validate: Callable[[Model], float],
    shares: Sequence[float],
    budget: float,
    size: Callable[[Model], float] = number_of_parameters,
    iterative: Sequence[str] = (),
    refinements: int = 0,
    directory: str | Path | None = None,
) -> Smallest:
    """Makes a model smaller in several ways, trains and validates each, and chooses the smallest within a budget.

    What is tried, and in which order, is said at :func:`find_smallest`. With a directory the search resumes: each
    model is saved there after its training, and the same call in a new process continues after the last one. It
    makes the smaller models again, so the operators must give the same model each time.

    Args:
      model: the trained original.
      operators: name → ``(model, share) -> model``: makes a model smaller, by width, depth, rank, or as you like; or
        returns None where it cannot. Such a trial has infinite loss and size.
        ``share`` is that of the given model. Where a step by step search applies it to a model that is smaller
        already, the shares multiply.
      fine_tune: ``model -> model``: trains a smaller model, usually with the original as its teacher. Shapes,
        dtypes and the model's function stay.
      validate: ``model -> loss`` on data that nothing was trained on, the lower the better.
      shares: the shares of the grid, falling, between 0 and 1.
      budget: by how much the loss may exceed that of the original.
      size: ``model -> size``, by default the number of parameters. It may measure what counts for you; for the bytes
        and the latency of exported files see :func:`best_file`.
      iterative: the operators that are also applied step by step.
      refinements: number of further shares.
      directory: where trained models are kept, one folder for each; None to keep nothing. Take a new directory
        whenever the functions or their data change.

    Returns:
      The chosen model, and all trials.

    Raises:
      ValueError: in the cases of :func:`find_smallest`; if a function does not return what is said above; if the
        directory holds a search of other networks; if the name of an operator cannot be that of a folder.

    >>> import jax.numpy as jnp
    >>> from distill_jax import models
    >>> model = models.from_function(lambda p, x: x @ p, jnp.arange(4.0))
    >>> def first(model, share):
    ...     return model.replace(params=model.params[-round(share * model.params.size) :])
    >>> def error(model):
    ...     return float(14 - (model.params**2).sum())
    >>> smallest_model(
    ...     model, {"largest": first}, fine_tune=lambda m: m, validate=error, shares=[0.75, 0.5], budget=1.0
    ... ).model.params
    Array([2., 3.], dtype=float32)
    """
    check_model("model", model)
    check_mapping("operators", operators, "name → function")
    functions: dict[str, tuple[object, str]] = {
        f"operators[{name!r}]": (function, "model, share") for name, function in operators.items()
    }
    functions |= {"fine_tune": (fine_tune, "model"), "validate": (validate, "model"), "size": (size, "model")}
    for name, (function, arguments) in functions.items():
        check_function(name, function, arguments)
    if wrong := [name for name in operators if not re.fullmatch(r"\w[\w +-]*", name)]:
        raise ValueError(
            f"operators: a name must be made of letters, digits, blanks, '+', '-' and '_', as it becomes that of a "
            f"folder, got {wrong}"
        )
    made, share_of = {ORIGINAL: model}, {ORIGINAL: 1.0}

    def figures(name: str, of: Model) -> tuple[float, float]:
        return number("validate", validate(of), name), number("size", size(of), name)

    def attempt(edit: Edit) -> tuple[float, float]:
        name, start = edit.name, edit.start
        small = operators[edit.operator](made[start], edit.share / share_of[start]) if start in made else None
        if small is None:
            return np.inf, np.inf
        check_model(f"what operators[{edit.operator!r}] returns", small)
        kept = Kept(None if directory is None else Path(directory), name, small)
        if not kept.info:
            kept.add(trained("fine_tune", fine_tune, small), trained=True)
        if "figures" not in kept.info:
            kept.add(kept.model, figures=figures(name, kept.model))
        made[name], share_of[name] = kept.model, edit.share
        loss, extent = kept.info["figures"]
        return loss, extent

    done = find_smallest(
        attempt, figures(ORIGINAL, model), operators=[*operators], shares=shares, budget=budget,
        iterative=iterative, refinements=refinements,
    )  # fmt: skip
    return Smallest(made[done.chosen], done.chosen, done.trials, made)


def _check_budget(original: tuple[float, float], budget: float) -> None:
    check_not_negative("budget", budget)
    check_sequence("original", original, "a loss and a size")
    if len(original) != 2:
        raise ValueError(f"original must be the loss and the size of the original, got {original!r}")
    for value in original:
        check_real("original", value)
        if np.isnan(value):
            raise ValueError(f"original must be numbers, got {original!r}")


def smallest_within(
    trials: Mapping[str, Trial],
    original: tuple[float, float],
    budget: float,
    *,
    baselines: Sequence[str] = (),
) -> str:
    """Names the smallest network whose loss is within the budget; ``"original"`` if no trial's is.

    Args:
      trials: the networks that were tried, by name.
      original: the validation loss and the size of the original.
      budget: by how much the loss may exceed that of the original.
      baselines: the operators whose networks are not chosen.

    Returns:
      The name of a trial, or ``"original"``.

    Raises:
      ValueError: if ``budget`` is negative or NaN, or ``original`` no pair of numbers.
    """
    _check_budget(original, budget)
    limit = original[0] + budget
    fitting = [t for t in trials.values() if t.edit.operator not in baselines and t.loss <= limit]
    candidates = [(original[1], original[0], ORIGINAL)]
    candidates += [(trial.size, trial.loss, trial.edit.name) for trial in fitting]
    return min(candidates, key=lambda candidate: candidate[:2])[2]

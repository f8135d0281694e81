"""Whether each comparison of a network's own code with the adapted program is needed, and notices something.

``python tests/faults/comparisons.py``. The library runs without each comparison of ``_trace/again.py`` in turn, on
programs of ``widths.py``, until one of them, run again with the arrays of fewer units, computes something else than
the silenced network although its groups are called exact. The part of a program that is most likely to do so comes
first, then each part alone, then random rows of them. Without each comparison of ``running.py``, a network must keep
its own function under ``units.keep`` although that computes something else.
"""

import argparse
import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import widths

from distill_jax.compress import units
from distill_jax.compress.units import running
from distill_jax.compress.units._trace import again
from distill_jax.models import from_function


class Comparison(NamedTuple):
    """A comparison, and how to remove it.

    Attributes:
      text: the code that compares, which occurs once in its module.
      instead: what stands there without the comparison.
      part: a part of ``widths.py`` for which it matters; or a function of units and of the random key, which is
        None in evaluation.
      module: where the code is.
    """

    text: str
    instead: str
    part: str | Callable[..., Any]
    module: types.ModuleType = again


@jax.custom_vjp
def divided_derivative(h):
    return h


divided_derivative.defvjp(lambda h: (h, None), lambda _, change: (change / change.shape[-1],))

COMPARISONS = {
    "operations": Comparison("if [*map(_form, olds)] != [*map(_form, news)]:", "if len(olds) != len(news):", "parity"),
    "shapes": Comparison("if len(given) != len(wanted) or any(", "if False and any(", "counted"),
    "shapes of what repeats": Comparison(
        "any_size or [False] * len(wanted)", "[any(any_size)] * len(wanted)", "shuffled_gain"
    ),
    "constant or not": Comparison(
        "!= (new in again.constants):\n            return NUMBER",
        '!= (new in again.constants):\n            return ""',
        "constant_or_value",
    ),
    "order": Comparison('return "" if found == root(new, same[1]) else', 'return "" if True else', "ordered"),
    "constants": Comparison('return "" if _same_array(a, b, masks, any_size) else NUMBER', 'return ""', "scaled"),
    "dtypes of constants": Comparison("a.dtype == b.dtype and", "", "exponent_of_other_type"),
    "options": Comparison("if option := other_option(", "if option := False and other_option(", "power"),
    "numbers as options": Comparison("return bool(a == b or", "return bool(True or", "power"),
    "tuples as options": Comparison("and all(map(_same, a, b))", "", "padded_evenly"),
    "programs as options": Comparison("return str(a) == str(b)", "return True", "reduced"),
    "cut of a slice": Comparison('return "cut"', "pass", "time_from_width"),
    "inner programs": Comparison("if reason := other_program(body, again_body):", "if False:", "scaled_in_loop"),
    "results": Comparison('if reason := other_value("its results", result, given, masks):', "if False:", "swapped"),
    "evaluation": Comparison(
        "same(None) and", "", lambda h, key: h / h.shape[-1] if key is None else h, running
    ),
    "training": Comparison(
        "and same(any_key())", "", lambda h, key: h if key is None else h / h.shape[-1], running
    ),
    "derivatives": Comparison(
        "if _derives(flatten(closed, calls=True)):", "if False:", lambda h, key: divided_derivative(h), running
    ),
}  # fmt: skip


@contextlib.contextmanager
def without(comparison: Comparison) -> Iterator[None]:
    """Runs the library without a comparison: the functions of its module get the code of the edited module."""
    module, source = comparison.module, inspect.getsource(comparison.module)
    if source.count(comparison.text) != 1:
        raise RuntimeError(f"{comparison.text!r} does not occur once in {module.__file__}")
    edited = {"__name__": module.__name__}
    exec(compile(source.replace(comparison.text, comparison.instead), module.__file__, "exec"), edited)
    codes = {
        function: function.__code__
        for function in vars(module).values()
        if isinstance(function, types.FunctionType) and function.__module__ == module.__name__
    }
    try:
        for function in codes:
            function.__code__ = edited[function.__name__].__code__
        yield
    finally:
        for function, code in codes.items():
            function.__code__ = code


def wrong(parts: list[str] | None, seed: int) -> list[str]:
    """Says what is wrong with the re-runs of a program of these parts, or of a random one."""
    rng = np.random.default_rng(seed)
    fn, params, x, names = widths.program(rng, parts)
    return [f"{names}: {text}" for text in widths.check(fn, params, x, rng)[0] if text.startswith("rerun")]


def wrongly_kept(function: Callable[..., Any]) -> list[str]:
    """Says what is wrong with the function that ``units.keep`` gives a network."""
    rng = np.random.default_rng(0)
    params, x = {"a": rng.normal(size=(3, 6)), "b": rng.normal(size=(6, 2))}, rng.normal(size=(4, 3))
    model = from_function(lambda p, x, key=None: function(x @ p["a"], key) @ p["b"], params)
    graph = units.trace(model, x)
    modes = {"evaluation": None, "training": jax.random.key(0)}
    errors = {mode: units.verify(graph, model, {"a": [0, 4]}, x, key=key) for mode, key in modes.items()}
    return [f"{mode}: off by {error:.1e}" for mode, error in errors.items() if error > 1e-9]


def programs(comparison: Comparison, most: int) -> Iterator[list[str]]:
    """Yields what is wrong with each of the programs, those first for which the comparison is likely to matter."""
    if callable(comparison.part):
        yield wrongly_kept(comparison.part)
        return
    parts = [[comparison.part], *([part] for part in widths.PARTS), *[None] * most]
    for seed in range(most):
        yield wrong(parts[seed], seed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=300, help="most programs for each comparison")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    missed = 0
    for name, comparison in COMPARISONS.items():
        with without(comparison):
            found = next(filter(None, programs(comparison, arguments.programs)), None)
        missed += found is None
        print(f"{name}: not noticed" if found is None else f"{name}: noticed by {found[0]}", flush=True)
    return missed > 0


if __name__ == "__main__":
    sys.exit(main())

"""The page of methods names all there are, and its program runs."""

import inspect
import re
from pathlib import Path

import jax
import numpy as np
from test_units_trace import large_networks

from distill_jax import features, losses, train
from distill_jax.compress import sparsity, units
from distill_jax.train import several_teachers

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "methods.md").read_text()


def test_every_method_is_named():
    names = {*losses.__all__, *losses.tokens.__all__, *(f"learned.{n}" for n in features.__all__)}
    for module in (train, several_teachers, sparsity):
        functions = inspect.getmembers(module, inspect.isfunction)
        names |= {n for n, f in functions if f.__module__ == module.__name__ and n[0] != "_"}
    named = re.findall(r"`(?:(?:losses|schemes|teachers|sparsity)\.)?([\w.]+)[`(]", PAGE)
    assert names <= set(named), sorted(names - set(named))


def test_the_program_runs():
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    space = {}
    exec(compile(program, "docs/methods.md", "exec"), space)
    assert np.isfinite(space["metrics"]["loss"])
    before, after = space["student"].params, space["params"]
    assert jax.tree.structure(before) == jax.tree.structure(after)


def test_readme_leads_there():
    text = (ROOT / "README.md").read_text()
    assert "docs/methods.md" in text
    assert "docs/units.md" in text


def test_the_tables_of_units_are_what_is_printed_and_the_program_runs():
    page = (ROOT / "docs" / "units.md").read_text()
    program = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    space = {}
    exec(compile(program.replace("resnet56", "resnet8"), "docs/units.md", "exec"), space)
    jax.tree.map(np.testing.assert_array_equal, space["back"], space["model"])
    graphs = [units.trace(*network) for network in large_networks()]
    printed = {tuple(row.split()) for graph in graphs for row in str(graph).splitlines()}
    tables = re.findall(r"```\n(group .*?)```", page, re.DOTALL)
    shown = [tuple(row.split()) for table in tables for row in table.splitlines()]
    assert len(shown) > 20
    assert not [row for row in shown if row not in printed]

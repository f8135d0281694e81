"""The project's conventions, held by a test."""

import ast
import importlib
import inspect
import pkgutil
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax
from distill_jax import losses

ROOT = Path(__file__).parents[1]
# Imports point downwards only: a module may use those of the lines above its own.
LAYERS = [
    {"files", "augment", "parallel", "losses"},
    {"learned", "train", "data", "models", "metrics", "checkpoint", "report", "pictures"},
    {"objectives", "targets", "runs"},
    {"fit"},
    {"study"},
]
MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(distill_jax.__path__, "distill_jax.")
    if not name.rpartition(".")[2].startswith("_")
)


def public(module):
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name, value


FUNCTIONS = [
    (f"{module}.{name}", value)
    for module in MODULES
    for name, value in public(importlib.import_module(module))
    if inspect.isfunction(value)
]


def our_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill_jax"):
            head = node.module.split(".")[1:2]
            yield from head or [alias.name for alias in node.names]


def test_imports_point_downwards():
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for path in (ROOT / "distill_jax").rglob("*.py"):
        place = path.relative_to(ROOT / "distill_jax").parts[0].removesuffix(".py")
        if place == "__init__":
            continue
        assert place in level, f"{place} has no layer: give it one in {__file__}"
        for imported in our_imports(path):
            below = imported == place or level[imported] < level[place]
            assert below, f"{path.name} imports {imported}, which is not below it"


def test_every_module_can_be_reached_by_attribute():
    top = {name.split(".")[1] for name in MODULES}
    assert set(distill_jax.__all__) == top
    for name in top:
        assert getattr(distill_jax, name).__name__ == f"distill_jax.{name}"
    with pytest.raises(AttributeError, match="no attribute 'lossses'"):
        distill_jax.lossses


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[n for n, _ in FUNCTIONS])
def test_signatures_and_docstrings(name, function):
    assert function.__doc__, f"{name} has no docstring"
    parameters = inspect.signature(function).parameters
    assert not {"rng", "optimizer"} & parameters.keys(), "the terms are key and tx"
    documented = "Args:" in function.__doc__
    if documented:
        missing = [p for p in parameters if not re.search(rf"\b{p}\b", function.__doc__)]
        assert not missing, f"{name} does not document {missing}"


@pytest.mark.parametrize("name", [n for n in losses.__all__ if callable(getattr(losses, n))])
def test_what_a_loss_is(name):
    """Arrays in, one value an example out; keyword-only options; a source; a doctest."""
    loss = getattr(losses, name)
    parameters = list(inspect.signature(loss).parameters.values())
    assert [p.kind for p in parameters[:2]] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in parameters[2:])
    assert {"axis", "where"} <= {p.name for p in parameters}
    assert "References:" in loss.__doc__
    assert ">>> " in loss.__doc__
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.bfloat16)
    value = loss(x, jax.nn.softmax(x))
    assert value.shape == (2, 3)
    assert value.dtype == jnp.float32


def test_every_import_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[>=\[]", d)[0].lower().replace("-", "_") for d in declared["dependencies"]}
    names |= {"sklearn", "orbax"} if {"scikit_learn", "orbax_checkpoint"} <= names else set()
    standard = __import__("sys").stdlib_module_names
    for path in [*(ROOT / "distill_jax").rglob("*.py"), *(ROOT / "experiments").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module or ""]
            else:
                continue
            for module in found:
                top = module.split(".")[0]
                optional = path.name == "bench_step.py" and top == "torch"
                assert top in standard or top in names or optional or top == "distill_jax", (
                    f"{path.name} imports {top}, which pyproject.toml does not declare"
                )

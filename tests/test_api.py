"""The project's conventions, held by a test."""

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import distill_jax
from distill_jax import losses

ROOT = Path(__file__).parents[1]
# Imports point downwards only: a module may use those of the lines above its own.
LAYERS = [
    {"_checks", "_cpu", "_files"},
    {"losses", "data", "_jaxpr", "_model"},
    {"features", "weights", "metrics"},
    {"models"},
    {"teachers", "export"},
    {"train"},
    {"compress"},
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
    assert set(distill_jax.__all__) == {name for name in top if name[0] != "_"}
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
        nothing = "._" in name or inspect.signature(function).return_annotation in (None, "None")
        assert nothing or "Returns:" in function.__doc__ or "Yields:" in function.__doc__, (
            f"{name} returns what?"
        )


# Parameters of which nothing is known. (What may be any pytree is typed PyTree.)
UNKNOWN = {
    "options": "keyword arguments of another function",
    "args": "positional arguments of another function",
    "kwargs": "keyword arguments of another function",
    "leaf": "any leaf of a pytree, an array or not",
}


def public_parameters(body, place):
    """Each parameter of the public functions, and of the public classes' methods, as it is written."""
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") and node.name not in ("__init__", "__call__"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_parameters(node.body, f"{place}.{node.name}")
        else:
            given = node.args
            every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
            for parameter in every:
                if parameter and parameter.arg not in ("self", "cls"):
                    yield f"{place}.{node.name}", parameter


def test_every_parameter_has_a_type_unless_nothing_is_known():
    untyped = [
        f"{place}: {parameter.arg}"
        for module in MODULES
        if "._" not in module
        for place, parameter in public_parameters(
            ast.parse(inspect.getsource(importlib.import_module(module))).body, module
        )
        if parameter.annotation is None
        or (ast.unparse(parameter.annotation) == "Any" and parameter.arg not in UNKNOWN)
    ]
    assert not untyped, f"write their types (PyTree for any pytree): {untyped}"


# What is no loss by itself: a transform of logits, and what carries a state
PARTS = {"CRDState", "crd", "crd_init", "crd_negatives", "standardise"}


def losses_of(*modules):
    homes = {f"distill_jax.losses.{module}" for module in modules}
    found = [n for n in losses.__all__ if getattr(getattr(losses, n), "__module__", "") in homes]
    return sorted(set(found) - PARTS)


LOGIT_LOSSES = losses_of("logits", "classes", "ranking", "correlations", "imbalance")
FEATURE_LOSSES = losses_of("features", "summaries", "relations", "contrast")


def test_every_loss_is_of_one_kind():
    assert set(LOGIT_LOSSES) | set(FEATURE_LOSSES) | PARTS | {"tokens"} == set(losses.__all__)


@pytest.mark.parametrize("name", LOGIT_LOSSES + FEATURE_LOSSES)
def test_what_a_loss_is(name):
    """Arrays first, then keyword-only options, among them what counts; a source; a doctest."""
    loss = getattr(losses, name)
    parameters = inspect.signature(loss).parameters
    needed = [n for n, p in parameters.items() if p.kind != inspect.Parameter.KEYWORD_ONLY]
    if name in LOGIT_LOSSES:
        assert needed[:2] in (["student_logits", "teacher_logits"], ["logits", "labels"])
        assert {"axis", "where"} <= parameters.keys()
    else:
        assert needed[0] == "student"
        assert "where" in parameters
    assert "References:" in loss.__doc__
    assert ">>> " in loss.__doc__


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_a_logit_loss_gives_one_float32_an_example(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.bfloat16)
    given = {"student_logits": x, "teacher_logits": -x, "logits": x, "labels": jnp.ones((2, 3), int)}
    given |= {"counts": jnp.arange(1, 6), "prior": jnp.full(5, 0.2)}
    loss = getattr(losses, name)
    needed = inspect.signature(loss).parameters.values()
    value = loss(**{p.name: given[p.name] for p in needed if p.default is p.empty})
    assert value.shape == (2, 3)
    assert value.dtype == jnp.float32


def requirements(*extras):
    """The import names that the library's dependencies, or those of extras, provide."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names, found = set() if extras else set(project["dependencies"]), set()
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            inner = re.fullmatch(r"distill_jax\[(.*)\]", line)
            if inner:
                found |= requirements(*inner[1].split(","))
            else:
                names.add(line)
    renamed = {
        "scikit_learn": "sklearn",
        "orbax_checkpoint": "orbax",
        "pillow": "PIL",
        "tensorboardx": "tensorboardX",
    }
    names = {re.split(r"[>=\[]", name)[0].lower().replace("-", "_") for name in names}
    return found | {renamed.get(name, name) for name in names}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_every_import_is_declared():
    """The library needs its dependencies alone, ``data`` and ``models`` their extras; experiments need theirs."""
    needed = requirements()
    assert needed == {"jax", "flax", "optax", "orbax", "numpy", "scipy", "ml_dtypes", "flatbuffers"}
    known = {*sys.stdlib_module_names, "distill_jax", "harness"}
    for path in [*(ROOT / "distill_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        allowed = needed | known
        if "experiments" in path.parts:
            allowed |= requirements("experiments", "log", "onnx") | {
                file.stem for file in path.parent.glob("*.py")
            }
        elif "data" in path.parts:
            allowed |= requirements("data", "sound")
        elif "export" in path.parts:
            allowed |= requirements("onnx")
        elif "models" in path.parts:
            allowed |= requirements("text")
        if path.name == "step_peers.py":
            allowed |= {"torch", "keras", "torchdistill"}
        extra = set(imports(path)) - allowed
        assert not extra, f"{path.name} imports {extra}, which pyproject.toml does not declare"


def test_losses_load_none_of_the_extras():
    program = "import sys; from distill_jax import losses, models, train, compress, data, export; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout.split()
    heavy = {
        "sklearn",
        "tensorflow_datasets",
        "matplotlib",
        "tyro",
        "tqdm",
        "PIL",
        "requests",
        "harness",
        "soundfile",
        "onnx",
        "jax2onnx",
        "onnxruntime",
    }
    assert not heavy & set(loaded)

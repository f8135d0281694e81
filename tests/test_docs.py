"""The site names everything there is, and the programs of its short pages run (notebooks run at the build)."""

import importlib
import inspect
import re
import shlex
import sys
from pathlib import Path

import bench_trace
import jax
import numpy as np
import pytest
from flax import nnx
from harness import options

from distill_jax import features, losses, models
from distill_jax.compress import one_shot, quantisation, sparsity, units

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
METHODS = sorted((DOCS / "methods").glob("*.md"))


def programs(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def functions(module):
    names = getattr(module, "__all__", None) or [n for n, f in vars(module).items() if is_own(module, n, f)]
    return {name for name in names if not inspect.ismodule(getattr(module, name))}


def is_own(module, name, value):
    return name[0] != "_" and getattr(value, "__module__", None) == module.__name__


@pytest.mark.parametrize("room", [losses, losses.tokens, features, one_shot, quantisation, sparsity, units])
def test_every_method_is_named(room):
    """A page of methods, or the guide beside it, names each function by its call."""
    pages = [*METHODS, *(DOCS / "guides").glob("*.md"), DOCS / "units.md"]
    text = "\n".join(page.read_text() for page in pages)
    path = room.__name__.removeprefix("distill_jax.")
    short = path.rpartition(".")[2]
    plumbing = {name for name in functions(room) if inspect.isclass(getattr(room, name))}
    plumbing |= {"name_values", "naming"}  # for those who write a converter of modules
    missing = {
        name
        for name in functions(room) - plumbing
        if not re.search(rf"\b({re.escape(path)}|{short})\.{name}\b", text)
    }
    assert not missing


def test_every_public_name_has_an_entry(tmp_path, monkeypatch):
    pytest.importorskip("sphinx")
    monkeypatch.syspath_prepend(str(DOCS))
    import api_pages

    pages = api_pages.write(tmp_path)
    index = (DOCS / "api" / "index.md").read_text()
    text = {path: (tmp_path / f"{path}.rst").read_text() for path in pages}
    reached = "".join(text.values())
    for path in pages:
        assert f"<{path}>" in index + reached, f"no table of contents leads to {path}"
    for path, value in api_pages.public_objects().items():
        if not inspect.ismodule(value):
            room, _, name = path.rpartition(".")
            assert re.search(rf"^\.\. (py:)?\w+:: {name}$", text[room], re.MULTILINE), path
    sys.modules.pop("api_pages")


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_the_short_programs_run(page):
    for program in programs(page):
        exec(compile(program, page.name, "exec"), {})


def test_the_tables_of_units_are_what_is_printed_and_the_program_runs():
    page = DOCS / "units.md"
    space = {}
    exec(compile("\n".join(programs(page)).replace("resnet56", "resnet8"), page.name, "exec"), space)
    jax.tree.map(np.testing.assert_array_equal, space["back"], space["model"])
    for table in bench_trace.tables():
        assert f"```\n{table}\n```" in page.read_text()


def test_the_programs_of_readme_run(tmp_path, monkeypatch):
    """Both at a stretch, with a teacher, a student and arrays as a reader would have them."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    space = {
        "my_teacher": models.MLP((6, 16, 3), rngs=nnx.Rngs(0)),
        "my_student": models.MLP((6, 8, 3), rngs=nnx.Rngs(1)),
        "images": generator.normal(size=(64, 6)).astype(np.float32),
        "labels": generator.integers(0, 3, 64),
    }
    exec(compile("\n".join(programs(ROOT / "README.md")), "README.md", "exec"), space)
    assert space["logits"].shape == (5, 3)
    assert sum(x.size for x in jax.tree.leaves(space["small"].params)) == 6 * 4 + 4 + 4 * 3 + 3
    assert (tmp_path / "small.model").exists()


def test_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def commands(page):
    """The command lines of a page that call an experiment of today: (experiment, arguments)."""
    shown = re.sub(r"# as it was run\n.*?```", "", page, flags=re.DOTALL).replace("\\\n", " ")
    for name, arguments in re.findall(r"python experiments/(\w+)\.py([^\n`#]*)", shown):
        yield name, shlex.split(arguments.replace("DIR", "."))


def test_every_command_of_the_documentation_can_be_typed():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = [command for page in pages for command in commands(page.read_text())]
    assert len(found) > 15
    for name, arguments in found:
        module = importlib.import_module(name)
        options.read(module.CONFIGS, module.__doc__, next(iter(module.CONFIGS)), arguments)

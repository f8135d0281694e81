"""Writes the pages of the API reference from the rooms' ``__all__``, and checks that every public name is there."""

import ast
import functools
import importlib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging

import distill_jax

logger = logging.getLogger(__name__)

# Names in our signatures that belong to nobody's page: type variables, aliases, literals.
OUTSIDE = [
    "Array", "ArrayLike", "PyTree", "Any", "Callable", "Sequence", "Mapping", "Iterable", "Iterator",
    "Path", "ModuleType", "Literal", "Hashable", "Protocol", "NamedTuple", "Generic", "Union", "Optional",
    "Mesh", "NamedSharding", "Sharding",
]  # fmt: skip


def rooms() -> Iterator[tuple[str, ModuleType]]:
    """Yields every public module: the package's rooms, and the modules that a room's ``__all__`` names."""
    for name in sorted(distill_jax.__all__):
        yield from _with_submodules(f"distill_jax.{name}")


def _with_submodules(path: str) -> Iterator[tuple[str, ModuleType]]:
    module = importlib.import_module(path)
    yield path, module
    for name in public_names(module):
        value = getattr(module, name)
        if inspect.ismodule(value):
            yield from _with_submodules(f"{path}.{name}")


def public_names(module: ModuleType) -> list[str]:
    """Lists what a module offers: its ``__all__``, or else what it defines without an underscore."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def public_objects() -> dict[str, Any]:
    """Maps the full public name of every function, class, constant and module to it."""
    found: dict[str, Any] = {}
    for path, module in rooms():
        found[path] = module
        found |= {f"{path}.{name}": getattr(module, name) for name in public_names(module)}
    return found


def page(path: str, module: ModuleType) -> str:
    """Writes the reStructuredText page of one public module."""
    sections: dict[str, list[str]] = {}
    submodules = []
    for name in public_names(module):
        value = getattr(module, name)
        if inspect.ismodule(value):
            submodules.append(f"{path}.{name}")
            continue
        home = getattr(value, "__module__", None)
        home = home if isinstance(home, str) and home.startswith("distill_jax") else path
        sections.setdefault(home, []).append(name)

    title = path.removeprefix("distill_jax.")
    lines = [title, "=" * len(title), "", f".. py:module:: {path}", ""]
    lines += [_paragraphs(module), ""]
    if submodules:
        lines += [".. toctree::", "   :maxdepth: 1", ""]
        lines += [f"   {name.removeprefix('distill_jax.')} <{name}>" for name in submodules] + [""]
    for home in sorted(sections, key=lambda home: _order(module, home)):
        if home != path and len(sections) > 1:
            heading = home.rpartition(".")[2].strip("_").replace("_", " ").capitalize()
            lines += [heading, "-" * len(heading), "", _paragraphs(importlib.import_module(home)), ""]
            lines += [f".. py:currentmodule:: {path}", ""]
        for name in _by_source(module, sections[home]):
            lines += _entry(path, getattr(module, name), name)
    return "\n".join(lines)


def _paragraphs(module: ModuleType) -> str:
    return inspect.cleandoc(module.__doc__ or "")


def _order(module: ModuleType, home: str) -> int:
    """The place of a section: that of its first import in the room's ``__init__``."""
    source = inspect.getsource(module)
    place = source.find(f"from {home} import")
    return place if place >= 0 else len(source)


def _by_source(module: ModuleType, names: list[str]) -> list[str]:
    def line(name: str) -> int:
        value = inspect.unwrap(getattr(module, name))
        try:
            return inspect.getsourcelines(value)[1]
        except (TypeError, OSError):
            return 0

    return sorted(names, key=line)


def _entry(path: str, value: Any, name: str) -> list[str]:
    if inspect.isclass(value):
        return [f".. autoclass:: {name}", "   :members:", ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {name}", ""]
    found, _ = alias(path, name)
    if _is_type(value) and found is not None:
        return [f".. py:type:: {name}", f"   :canonical: {ast.unparse(found)}", ""]
    return [f".. py:data:: {name}", f"   :type: {type(value).__name__}", ""]


def write(folder: Path) -> list[str]:
    """Writes all pages and their index into a folder; returns the names of the pages."""
    folder.mkdir(exist_ok=True)
    pages = {path: page(path, module) for path, module in rooms()}
    for path, text in pages.items():
        _write_if_changed(folder / f"{path}.rst", text)
    for file in folder.glob("distill_jax.*.rst"):
        if file.stem not in pages:
            file.unlink()
    return list(pages)


def _write_if_changed(file: Path, text: str) -> None:
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")


def source_signature(app, what, name, value, options, signature, returns):
    """Gives a function's signature as its source writes it: ``ArrayLike`` stays a word."""
    if what not in ("function", "method") or not inspect.isroutine(value):
        return None
    function: Any = inspect.unwrap(value)
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(node, ast.FunctionDef):
        return None
    arguments = node.args
    if what == "method" and arguments.args and arguments.args[0].arg in ("self", "cls"):
        del arguments.args[0]
    spell = _Spelled(function.__module__)
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
        if argument.annotation:
            argument.annotation = spell.visit(argument.annotation)
    result = ast.unparse(spell.visit(node.returns)) if node.returns else None
    return f"({ast.unparse(arguments)})", result


class _Spelled(ast.NodeTransformer):
    """Replaces an alias of this library that is not public, such as ``Kept``, by what it stands for."""

    def __init__(self, module: str) -> None:
        self.module = module

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str) and node.value.isidentifier():  # a forward reference
            return self.visit(ast.Name(node.value))
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        module = getattr(importlib.import_module(self.module), ast.unparse(node.value), None)
        ours = inspect.ismodule(module) and module.__name__.startswith("distill_jax")
        return ast.Name(node.attr) if ours else node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node if ast.unparse(node.value) == "Literal" else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in OUTSIDE or node.id in _public_by_last_name():
            return node
        found, module = alias(self.module, node.id)
        return node if found is None else _Spelled(module).visit(found)


@functools.cache
def _public_by_last_name() -> dict[str, str]:
    """Maps ``Model`` to ``distill_jax.models.Model``: public classes and aliases whose own name is unique."""
    found: dict[str, list[str]] = {}
    for path, value in public_objects().items():
        if _is_type(value):
            found.setdefault(path.rpartition(".")[2], []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


def _is_type(value: Any) -> bool:
    return inspect.isclass(value) or isinstance(value, types.UnionType) or hasattr(value, "__origin__")


def alias(module: str, name: str) -> tuple[ast.expr | None, str]:
    """Finds what an alias stands for, and the module that says so; (None, module) if it is no alias."""
    while True:
        tree = ast.parse(inspect.getsource(importlib.import_module(module)))
        found, origin = _definition(tree, name)
        if found is not None or origin is None:
            return found, module
        module = origin


def _definition(tree: ast.Module, name: str) -> tuple[ast.expr | None, str | None]:
    """Finds an alias in a module: its value, or else the module of this library it is imported from."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node.value, None
        ours = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distill_jax")
        if ours and name in {alias.asname or alias.name for alias in node.names}:
            return None, node.module
    return None, None


def escape_bars(app, what, name, value, options, lines):
    """Lets |x| mean an absolute value, where reStructuredText would look for a substitution."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            pieces = re.split(r"(``.*?``)", line)
            lines[i] = "".join(p if p.startswith("``") else p.replace("|", r"\|") for p in pieces)


def skip_member(app, what, name, value, skip, options):
    """Leaves out what Python writes by itself: the fields' one-liners of a named tuple."""
    if (getattr(value, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    return None


def resolve_private_path(app, env, node, contnode):
    """Resolves a reference that has a name in another module than its public one.

    Such are the modules that define a name, a name whose room is left out, and the field of a public class. Types
    that are not public stay text.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    module, role = node.get("py:module") or "distill_jax", node["reftype"]
    head = target.rpartition(".")[0]
    candidates = [target, f"{module}.{target}", _unique_names().get(target), _unique_names().get(head)]
    for candidate in filter(None, candidates):
        value = _import(candidate)
        if value is None:
            continue
        for public, other in public_objects().items():
            if other is value:
                domain = env.get_domain("py")
                return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, contnode)
        if inspect.ismodule(value) or (role in ("class", "data") and _is_type(value)):
            return contnode
    homes = [home for home in list(sys.modules) if home.startswith("distill_jax")]
    if role == "class" and any(_is_alias(home, target) for home in homes):
        return contnode  # an alias in a class body
    return None


@functools.cache
def _unique_names() -> dict[str, str]:
    """Maps ``flops`` to its full public name, for all names that only one room has."""
    found: dict[str, list[str]] = {}
    for path in public_objects():
        found.setdefault(path.rpartition(".")[2], []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


def _is_alias(module: str, name: str) -> bool:
    value = getattr(sys.modules[module], name, None)
    return _is_type(value) and not inspect.isclass(value)


def _import(path: str) -> Any:
    if not path.startswith("distill_jax"):
        return None
    parts = path.split(".")
    for split in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for name in parts[split:]:
            value = getattr(value, name, None)
        return value
    return None


def link_names(app, doctree):
    """Links inline code such as ``losses.kl`` to its entry, and warns where a room has no such name."""
    if app.env.docname.startswith("api/distill_jax"):
        return
    public = public_objects()
    short = {path.rpartition(".")[2]: path for path, _ in rooms()}  # `units` for compress.units
    for literal in list(doctree.findall(nodes.literal)):
        match = re.fullmatch(r"(?:distill_jax\.)?(\w+)((?:\.\w+)+)(?:\(\))?", literal.astext())
        if not match or match[1] not in short or isinstance(literal.parent, nodes.reference):
            continue
        target = short[match[1]] + match[2]
        if target in public:
            link = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=True
            )
            literal.replace_self(link)
            link += literal
        elif _import(target) is None and not inspect.isclass(_import(target.rpartition(".")[0])):
            logger.warning("%s is no public name", literal.astext(), location=literal)


def check_complete(app, exception):
    """Warns, and so fails the build, if a public name has no entry in the reference."""
    if exception is None and app.builder.name == "html":
        written = app.env.get_domain("py").objects
        missing = sorted(set(public_objects()) - set(written))
        if missing:
            logger.warning("the API reference lacks %s", ", ".join(missing))
